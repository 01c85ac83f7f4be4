"""Folders on the local disk for what is on its way to an object store or from it."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from jaxdiff.files.whole import hold

_NAME = "jaxdiff-scratch-"


@contextlib.contextmanager
def scratch() -> Iterator[pathlib.Path]:
    """Make a folder in the system's place for temporary files, and delete it when the block ends.

    One that a kill left is locked by nobody: the next process that comes here deletes it.
    """
    _sweep()
    folder = pathlib.Path(tempfile.mkdtemp(prefix=_NAME))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        hold(descriptor)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _sweep() -> None:
    with contextlib.suppress(OSError):
        for left in pathlib.Path(tempfile.gettempdir()).glob(f"{_NAME}*"):
            with contextlib.suppress(OSError):
                descriptor = os.open(left, os.O_RDONLY)
                try:
                    if hold(descriptor):  # another user's cannot be opened, one alive holds its own
                        shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(descriptor)
