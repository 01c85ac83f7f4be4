"""Keys of initial parameters, counted in Python."""

from typing import Any

import jax

from jaxdiff.typing import Key


class Counted:
    """Stands in for `nnx.Rngs(seed)` where hundreds of layers are made for their shapes alone.

    `nnx.Rngs` counts in a variable, which takes a time that is quadratic in the number of layers
    when it is traced: SDXL's U-Net took a minute.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._count = 0

    def params(self) -> Key:
        """Return the next key."""
        self._count += 1
        return jax.random.fold_in(jax.random.key(self._seed), self._count)


def counted() -> Any:
    """Return a source of keys where an `nnx.Rngs` is asked for."""
    return Counted()
