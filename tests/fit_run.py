"""Train a tiny digits model for some steps, without a report: a run that tests kill and move.

    fit_run.py FOLDER NUM_STEPS CHECKPOINT_EVERY [RUNNING as JSON [HARM]]

Run by test_crashes.py, mostly in a process of its own; exits as the command line would. HARM is
what goes wrong in this process alone: `fail`, or `seed` for another config.
"""

import json
import sys
from unittest import mock

from experiments import digits
from experiments.common import command
from experiments.common.devices import Running
from experiments.images.model import Config, open_images
from jaxdiff import files
from jaxdiff.training import throughput


def main(folder, num_steps, checkpoint_every, running="{}", harm=""):
    running = Running(**json.loads(running))
    config = Config(
        width=16,
        depth=1,
        patch_size=4,
        batch_size=32,
        num_steps=int(num_steps),
        decay_steps=60,
        warmup_steps=5,
        checkpoint_every=int(checkpoint_every),
        log_every=1,
        seed=int(harm == "seed"),
    )

    def train():
        running.start()
        if harm == "fail":
            raise OSError("as asked")
        images = open_images(config, "train")
        uncounted = mock.patch.object(throughput, "count_flops", return_value=None)
        with command.compiling_for("smoke"), uncounted:  # it traces the step once more
            digits.fit(config, images, files.to_path(folder), running, progress=False)

    return command.run("fit", train, [])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
