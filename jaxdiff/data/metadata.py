"""`metadata.jsonl` of a folder of images: a caption for each, as imagefolder data sets have it.

    {"file_name": "cats/1.jpg", "text": "a cat asleep on a chair"}

A line an image, UTF-8, paths with slashes from the folder on; other keys are passed over. What
cannot be meant is refused with its line, all images being named once.
"""

import codecs
import json
import os
import posixpath
from collections.abc import Iterable

from jaxdiff.data.errors import UnreadableError

FILE = "metadata.jsonl"
MAX_NAMED = 5


def read(folder: str) -> dict[str, str] | None:
    """Return the caption of each file that the folder's metadata name, or None without them.

    Raises:
        UnreadableError: a ValueError, if a line is no such record, names no file or one twice; the
            first five are told.
    """
    path = os.path.join(folder, FILE)
    if not os.path.isfile(path):
        return None
    texts: dict[str, str] = {}
    wrong = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip() and (problem := _added(folder, line, texts)):
                    wrong.append(f"line {number}: {problem}")
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error}.") from error
    if wrong:
        raise UnreadableError(f"{path}: {_some(wrong, '; ')}. Mend or remove what is named.")
    if not texts:
        raise UnreadableError(f"{path} names no image. Fill it or remove it.")
    return texts


def check_all_named(folder: str, texts: dict[str, str], files: Iterable[str]) -> None:
    """Refuse images of the folder that the metadata do not name.

    Raises:
        UnreadableError: a ValueError, with the first five.
    """
    unnamed = sorted(set(files) - {*texts, FILE})
    if unnamed:
        raise UnreadableError(
            f"{os.path.join(folder, FILE)} has no line for {_some(unnamed, ', ')}. Add what is "
            "missing, or move what is no image of the set elsewhere."
        )


def _added(folder: str, line: bytes, texts: dict[str, str]) -> str | None:
    """Add what a line says; return what is wrong with it."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    except ValueError as error:
        return f"no JSON ({error})"
    if not isinstance(record, dict):
        return f"no record, but {record!r:.40}"
    for key in ("file_name", "text"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            found = f"is {record[key]!r:.40}" if key in record else "is missing"
            return f'"{key}" {found}, where a text is needed'
        if any("\ud800" <= letter <= "\udfff" for letter in record[key]):
            return f'"{key}" has half a character ({record[key]!r:.40})'
    name = posixpath.normpath(record["file_name"])
    if name.startswith(("/", "..")):
        return f"{name} is outside the folder"
    if name in texts:
        return f"{name} has a caption already"
    if not os.path.isfile(os.path.join(folder, name)):
        return f"there is no file {name}"
    texts[name] = record["text"]
    return None


def _some(items: list[str], between: str) -> str:
    more = len(items) - MAX_NAMED
    return between.join(items[:MAX_NAMED]) + (f"{between}and {more} more" if more > 0 else "")
