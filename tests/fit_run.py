"""Train a tiny digits model for some steps, without a report: a run that tests kill and move.

    fit_run.py FOLDER NUM_STEPS CHECKPOINT_EVERY [RUNNING as JSON [HARM]]

NUM_STEPS and RUNNING may be of several parts, `2,4` and a list, made by one process.
Run in a process of its own by test_crashes.py; exits as the command line would. HARM is what goes
wrong in this process alone: `fail`, or `seed` for another config.
"""

import dataclasses
import json
import pathlib
import sys

from experiments import digits
from experiments.common import command
from experiments.common.devices import Running
from experiments.images.model import Config, open_images


def main(folder, num_steps, checkpoint_every, running="{}", harm=""):
    running = json.loads(running)
    parts = [Running(**each) for each in (running if isinstance(running, list) else [running])]
    config = Config(
        width=16,
        depth=1,
        patch_size=4,
        batch_size=32,
        decay_steps=60,
        warmup_steps=5,
        checkpoint_every=int(checkpoint_every),
        log_every=1,
        seed=int(harm == "seed"),
    )

    def train():
        parts[0].start()
        if harm == "fail":
            raise OSError("as asked")
        images = open_images(config, "train")
        for steps, running in zip(num_steps.split(","), parts, strict=True):
            part = dataclasses.replace(config, num_steps=int(steps))
            with command.compiling_for("smoke"):
                digits.fit(part, images, pathlib.Path(folder), running, progress=False)

    return command.run("fit", train, [])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
