"""Copy a prepared data set from a bucket to the local disk, once on every host.

python -m experiments.mirror --source gs://bucket/data/my_set --destination /mnt/disk/data/my_set
"""

import sys
import time

from experiments.common import command
from jaxdiff import data


def mirror(source: str, destination: str, verify: bool = False, num_workers: int = 8) -> None:
    """Copy what is missing; run again, go on where it stopped.

    Args:
        source: The folder of the set: gs://, s3:// or a path.
        destination: A local folder; `train --data-dir` takes the one above.
        verify: Also compare what is there with the checksums that the store tells.
        num_workers: How many files are copied at once.
    """
    last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 5.0:
            last = time.monotonic()
            print(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB", flush=True)

    with command.refusing(ValueError, ImportError):
        made = data.mirror(
            source, destination, verify=verify, num_workers=num_workers, progress=tell
        )
    speed = made.copied_bytes / 1e6 / max(made.seconds, 1e-3)
    print(f"{destination}: {made.num_files} files, {made.num_bytes / 1e9:.3f} GB")
    print(
        f"copied {made.copied_files} files, {made.copied_bytes / 1e9:.3f} GB in "
        f"{made.seconds:.1f} s, {speed:.0f} MB/s"
    )


def main(argv: list[str]) -> int:
    """Run the command line."""
    return command.run("mirror", mirror, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
