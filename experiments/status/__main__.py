"""Say what a run is at: progress, speed, checkpoints and their soundness, disk, and what is wrong.

    python -m experiments.status runs/digits
    python -m experiments.status gs://bucket/runs/digits --json

It reads beside the run that writes, and touches no file and no accelerator. Runs in folders below,
such as the stages of `latents`, are told too.
"""

import dataclasses
import json
import sys
from typing import Annotated, Any

import tyro

from experiments.common import command
from experiments.common.command import Refusal
from experiments.status import reading, telling
from experiments.status.gathering import status as status_of


def status(
    run_dir: Annotated[str, tyro.conf.Positional],
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    verify: int | None = None,
) -> None:
    """Say what a run is at.

    Args:
        run_dir: Folder of the run, or its URL in a store.
        as_json: Say it as JSON, times in seconds, sizes in bytes, null for what is not known; runs
            in folders below are `parts`.
        verify: How many of the newest checkpoints are compared with their checksums, which reads
            them whole: 3 by default, in a store none.
    """
    if verify is not None and verify < 0:
        raise Refusal(f"--verify must be at least 0; got {verify}.")
    place = reading.place(run_dir)
    own, inner = reading.runs_in(place)
    whole = [status_of(place, verify)] if own else []
    parts = {each.folder.name: status_of(each, verify) for each in inner}
    if as_json:
        said: dict[str, Any] = (
            dataclasses.asdict(whole[0]) if own else {"run_dir": str(place.folder)}
        )
        said["parts"] = {name: dataclasses.asdict(part) for name, part in parts.items()}
        print(json.dumps(said, indent=2))
    else:
        print("\n".join(line for each in [*whole, *parts.values()] for line in telling.lines(each)))


def main(argv: list[str]) -> int:
    """Run the command line."""
    return command.run("status", status, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
