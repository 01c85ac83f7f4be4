"""Import what the `train` extra brings, or say which extra is missing."""

import importlib
from typing import Any


def require(module: str) -> Any:
    """Import a module of the `train` extra.

    Raises:
        ImportError: if it cannot be imported, naming the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"jaxdiff.data needs {module}: {error}. Install it with: pip install 'jaxdiff[train]'"
        ) from error
