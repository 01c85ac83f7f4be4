"""A folder sealed with the SHA-256 of each file in it, and what is wrong with one that was altered.

The seal is a text file, `SHA256SUMS`, one line a file in the order of their names, as `sha256sum`
writes and checks it. It is written last: a folder without it is incomplete. A sealed folder is
sound if sealing it again would give the same text byte for byte, so that damage to the seal itself,
and a file too many, are seen as well.
"""

import hashlib
import os
from pathlib import Path

SEAL = "SHA256SUMS"


def seal(folder: Path) -> None:
    """Flush every file of a folder to the disk, then write their checksums beside them.

    Args:
        folder: a complete folder, written by nobody else meanwhile.
    """
    digests = _digests(folder)
    (folder / SEAL).write_text(_text(digests))
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Flush a file or a folder to the disk, so that it outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damage(folder: Path) -> str | None:
    """Compare a folder with its seal.

    Args:
        folder: a folder that was sealed, perhaps damaged since.

    Returns:
        None if it is sound; otherwise "corrupt (...)" or "incomplete (...)", saying why.
    """
    try:
        if not (folder / SEAL).is_file():
            return f"incomplete ({SEAL} is missing)"
        sealed = (folder / SEAL).read_bytes()
        found = _digests(folder)
    except OSError as error:
        return f"corrupt ({error})"
    if sealed == _text(found).encode():
        return None
    lines = sealed.decode(errors="replace").splitlines()
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in expected:
        if name not in found:
            return f"incomplete ({name} is missing)"
    for name, digest in found.items():
        if expected.get(name) != digest:
            return f"corrupt ({name} does not match {SEAL})"
    return f"corrupt ({SEAL} is malformed)"


def _digests(folder: Path) -> dict[str, str]:
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    )
    digests = {}
    for name in names:
        if name != SEAL:
            with (folder / name).open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _text(digests: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())
