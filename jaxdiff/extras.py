"""What an optional dependency that is missing says: who needs it, and which extra brings it."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def needed_by(name: str, extra: str = "train") -> Iterator[None]:
    """Let imports in the block that fail name the extra to install.

    Args:
        name: of the module of this library that imports.
        extra: what brings the dependency.

    Raises:
        ImportError: in place of one that the block raises; of the same kind.
    """
    try:
        yield
    except ImportError as error:
        missing = (error.name or "another package").partition(".")[0]
        message = (
            f"{name} needs {missing}: {error}. Install it with: pip install 'jaxdiff[{extra}]'"
        )
        raise type(error)(message, name=error.name, path=error.path) from error


def require(module: str, name: str) -> Any:
    """Import a module of the `train` extra, at the time that it is needed.

    Args:
        module: to import.
        name: of the module of this library that needs it.

    Raises:
        ImportError: if it cannot be imported, naming the extra to install.
    """
    with needed_by(name):
        return importlib.import_module(module)
