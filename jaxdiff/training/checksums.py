"""A folder sealed with the SHA-256 of each file in it, and what is wrong with one that was altered.

The seal is a text file, `SHA256SUMS`, one line a file in the order of their names, as `sha256sum`
writes and checks it. It is written last: a folder without it is incomplete. What was written is
judged, and nothing else: files that others put there (a file manager's, an editor's) do not count.
So that a seal that lost some of its lines is seen too, one of the sealed files, `contents`, lists
all of them.
"""

import hashlib
import json
import re
from pathlib import Path

from jaxdiff import files
from jaxdiff.files import flush

SEAL = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)\n")
_OF_OTHERS = re.compile(r"(.*/)?(\..*|Thumbs\.db|desktop\.ini)")


def names(folder: Path) -> list[str]:
    """List the files of a folder and those below it, but for the seal, in the seal's order."""
    return [name for name in files.names(folder) if name != SEAL]


def seal(folder: Path) -> None:
    """Flush every file of a folder to the disk, then write their checksums beside them.

    Args:
        folder: a complete folder, written by nobody else meanwhile.
    """
    digests = {name: _digest(folder / name) for name in names(folder)}
    (folder / SEAL).write_text(_text(digests))
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def find_damage(folder: Path, contents: str | None = None) -> str | None:
    """Compare a folder with its seal.

    Args:
        folder: a folder that was sealed, perhaps damaged since.
        contents: the file, JSON, whose `files` are all those written, if it is among the sealed. By
            default, and where it is not, any other file but a hidden one is damage.

    Returns:
        None if it is sound; otherwise "corrupt (...)" or "incomplete (...)", saying why.
    """
    try:
        if not (folder / SEAL).is_file():
            return f"incomplete ({SEAL} is missing)"
        text = (folder / SEAL).read_bytes().decode(errors="replace")
        sealed = {name: digest for digest, name in _LINE.findall(text)}
        for name, digest in sealed.items():
            if not (folder / name).exists():
                return f"incomplete ({name} is missing)"
            if _digest(folder / name) != digest:
                return f"corrupt ({name} does not match {SEAL})"
        if text != _text(sealed):
            return f"incomplete ({SEAL} is malformed)"
        if contents is not None and contents in sealed:
            written = {contents, *json.loads((folder / contents).read_bytes())["files"]}
            missing = written ^ sealed.keys()
        else:
            missing = {n for n in names(folder) if n not in sealed and not _OF_OTHERS.fullmatch(n)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"corrupt ({error})"
    return f"corrupt ({min(missing)} does not match {SEAL})" if missing else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(digests: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())
