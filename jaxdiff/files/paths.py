"""Where a run, a folder of samples or a data set lies: on a disk, or in an object store.

On a disk a path is `pathlib.Path`. Of a URL (`gs://bucket/run`, `s3://...`, whatever `etils.epath`
knows) it is a `StorePath`, which has the same methods as far as they make sense there. Code that
takes either uses those: `/`, `name`, `parent`, `exists`, `is_dir`, `is_file`, `iterdir`,
`read_bytes`, `read_text`, `open("rb")`, `unlink`; it writes by `files.write_text`, `files.whole`
and their fellows, and lists by `files.names`.
"""

import os
import pathlib
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from jaxdiff.extras import needed_by

if TYPE_CHECKING:
    from jaxdiff.files.stores import StorePath

    Path: TypeAlias = pathlib.Path | StorePath
else:
    Path = os.PathLike

guards: dict[str, Callable[[str], None]] = {}
"""By the URL of a folder in a store: what is called with the URL of each object below it, before it
is written or deleted and before each try again, and raises where that must not be."""


def to_path(path: str | os.PathLike[str]) -> "Path":
    """Return the path that a text names.

    Args:
        path: of a local file or folder, or a URL; a path stays what it is.

    Raises:
        ValueError: if it is a URL of a kind that `etils.epath` does not know.
        ImportError: if it is a URL, and what reads such a store is not installed.
    """
    text = os.fspath(path)
    if "://" not in text:
        return path if isinstance(path, pathlib.Path) else pathlib.Path(text)
    with needed_by("jaxdiff.files", "stores"):
        from jaxdiff.files.stores import StorePath

        return path if isinstance(path, StorePath) else StorePath.of(text)


def is_stored(path: "Path") -> "TypeGuard[StorePath]":
    """Tell whether a path is in an object store: no renames there, no locks, nothing appended."""
    return not isinstance(path, pathlib.Path)


def sizes(folder: "Path") -> dict[str, int]:
    """Return the size in bytes of each file of a folder and those below it, by name, sorted."""
    if is_stored(folder):
        return folder.sizes()
    local: Any = folder
    return {name: (local / name).lstat().st_size for name in names(folder)}


def names(folder: "Path") -> list[str]:
    """List the files of a folder and those below it, sorted."""
    if is_stored(folder):
        return list(folder.sizes())
    local: Any = folder
    found = (path for path in local.rglob("*") if not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def remove_tree(folder: "Path") -> None:
    """Delete a folder, or what is there in its place, as far as that can be; a link goes itself."""
    if is_stored(folder):
        folder.rmtree(missing_ok=True)
    elif folder.is_symlink() or folder.is_file():
        try:
            folder.unlink()
        except OSError:
            return
    else:
        shutil.rmtree(folder, ignore_errors=True)
