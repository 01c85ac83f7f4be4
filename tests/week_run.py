"""Train a small digits model for many steps, and say now and then what the process takes.

    week_run.py FOLDER NUM_STEPS EVERY

Run by test_week.py in a process of its own; prints an object a line: step, bytes of memory that are
its own, threads, open files.
"""

import json
import pathlib
import sys
import threading

import psutil

from experiments import digits
from experiments.common import command
from experiments.common.devices import Running
from experiments.images.model import Config, open_images
from jaxdiff.training import telling


def main(folder, num_steps, every):
    config = Config(
        width=8,
        depth=1,
        patch_size=8,
        batch_size=8,
        num_steps=int(num_steps),
        warmup_steps=5,
        checkpoint_every=500,
        log_every=20,
    )
    process, read, due = psutil.Process(), telling.Told.read, [int(every)]

    def telling_of(told, step, length, **options):
        read(told, step, length, **options)
        if step >= due[0]:
            due[0] += int(every)
            memory = process.memory_full_info()
            counts = {"threads": threading.active_count(), "files": process.num_fds()}
            said = {"step": step, "bytes": memory.uss, "rss": memory.rss, **counts}
            print(json.dumps({**said, "system_threads": process.num_threads()}), flush=True)

    telling.Told.read = telling_of
    images = open_images(config, "train")
    return command.run(
        "fit",
        lambda: digits.fit(config, images, pathlib.Path(folder), Running(), progress=False),
        [],
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
