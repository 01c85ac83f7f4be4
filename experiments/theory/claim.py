"""What an article on the theory of diffusion models claims, each claim drawn and measured."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

from jaxdiff import files
from jaxdiff.typing import Key

Measured: TypeAlias = float | dict[str, Any]
"""A number, or a table of numbers."""


class Context(NamedTuple):
    """What a claim is measured with.

    Attributes:
        directory: where its figures go.
        seed: of everything random.
        full: whether at full size, or as small as still runs every line.
    """

    directory: files.Path
    seed: int
    full: bool

    def key(self, number: int) -> Key:
        """Return the key of a claim, by its number."""
        return jax.random.fold_in(jax.random.key(self.seed), number)

    def size(self, full: int, smoke: int) -> int:
        """Return one of two sizes."""
        return full if self.full else smoke


class Claim(NamedTuple):
    """A claim after it was measured.

    Attributes:
        claim: what is said, a sentence.
        expected: what the measurement should give if it is so.
        measured: what it gave.
        holds: whether that agrees.
        figures: the pictures, of the run's folder.
        note: what the reader should know beside.
    """

    claim: str
    expected: str
    measured: Measured
    holds: bool
    figures: tuple[str, ...]
    note: str = ""


Measure: TypeAlias = Callable[[Context], Claim]
