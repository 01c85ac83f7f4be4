"""The zip form of PyTorch's files."""

from pathlib import Path
from typing import NoReturn

from jaxdiff.pretrained.errors import WeightsError


def open_zip(path: Path) -> NoReturn:
    """Refuse the file.

    Raises:
        WeightsError: always.
    """
    raise WeightsError(f"{path} is not read yet. Save it as safetensors where it comes from.")
