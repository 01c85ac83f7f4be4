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
    folder, descriptor = _held_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _held_folder() -> tuple[pathlib.Path, int]:
    """Make a folder that is held; another's sweep may come between, and delete it."""
    while True:
        folder = pathlib.Path(tempfile.mkdtemp(prefix=_NAME))
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            if hold(descriptor) is not False and folder.exists():
                return folder, descriptor
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
