"""What a record of a run says of its data, so that it can be sampled without them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdiff import checks
from jaxdiff.data.scaling import bin_width


@dataclasses.dataclass(frozen=True)
class Description:
    """What images are, whichever they are.

    Attributes:
        shape: (H, W, C) of an image.
        num_levels: L; pixels are integers in 0..L-1.
        num_classes: K, labels being 0..K-1; None where there are no labels.
        class_names: K names, or None.
    """

    shape: tuple[int, int, int]
    num_levels: int
    num_classes: int | None
    class_names: tuple[str, ...] | None = None

    @property
    def bin_width(self) -> float:
        """The width 2/L of a level in [-1, 1]."""
        return bin_width(self.num_levels)

    def to_record(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {
            "shape": list(self.shape),
            "num_levels": self.num_levels,
            "num_classes": self.num_classes,
            "class_names": None if self.class_names is None else list(self.class_names),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Description":
        """Return what `to_record` gave.

        Raises:
            TypeError: if a value is of another kind.
            ValueError: if one is missing, or cannot be meant.
        """
        missing = [field.name for field in dataclasses.fields(cls) if field.name not in record]
        if missing:
            raise ValueError(f"`{missing[0]}` is missing in the description of the data.")
        shape, names, num_classes = (
            record[name] for name in ("shape", "class_names", "num_classes")
        )
        if not isinstance(shape, list | tuple) or len(shape) != 3:
            raise ValueError(f"`shape` must be (H, W, C); got {shape!r}.")
        height, width, channels = (checks.count("shape", size) for size in shape)
        bin_width(record["num_levels"])
        if num_classes is not None:
            checks.count("num_classes", num_classes)
        if names is not None and not (
            isinstance(names, list | tuple) and len(names) == num_classes
        ):
            raise ValueError(f"`class_names` must be {num_classes} names; got {names!r}.")
        return cls(
            (height, width, channels),
            record["num_levels"],
            num_classes,
            None if names is None else tuple(map(str, names)),
        )
