"""Scenes as records of pictures with captions."""

import dataclasses

import numpy as np

from jaxdiff import checks
from jaxdiff.data.scenes import captions, drawing
from jaxdiff.data.scenes.factors import COMBINATIONS, KINDS, Combinations, Factors, draw

MIN_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Scenes:
    """N scenes: `Records` of "image", with captions.

    Scene i is a function of (seed, i), the shares and the combinations; of `size` only its pixels
    are. A quarter of a millisecond each, in the threads that read ahead; in memory they are

        data.from_arrays(scenes.rows(np.arange(len(scenes))))

    Attributes:
        num_examples: N.
        seed: in 0..2^63 - 1.
        size: S, the side of the pictures, at least 16.
        shares: of scenes of one object, of two in a relation, and of several alike.
        combinations: "seen" in training; "held_out": an object of a shape and colour that are never
            seen together; "held_out_order": a first and a second shape that are never so related,
            for scenes of two; "all" of them, evenly.

    Raises:
        TypeError: if a number is none, or no whole one.
        ValueError: if one is out of range, the shares do not sum to 1, or an order is held out of
            scenes that are not all of two objects.
    """

    num_examples: int
    seed: int = 0
    size: int = 32
    shares: tuple[float, float, float] = (1.0, 0.0, 0.0)
    combinations: Combinations = "seen"

    def __post_init__(self) -> None:
        checks.count("num_examples", self.num_examples)
        checks.count("seed", self.seed, least=0)
        if self.seed >= 2**63:
            raise ValueError(f"`seed` must be in 0..2^63 - 1; got {self.seed}.")
        checks.count("size", self.size, least=MIN_SIZE)
        checks.choice("combinations", self.combinations, COMBINATIONS)
        if len(self.shares) != len(KINDS):
            raise ValueError(f"`shares` must be three, of {', '.join(KINDS)}; got {self.shares}.")
        for share in self.shares:
            checks.number("shares", share, 0.0, 1.0)
        if abs(sum(self.shares) - 1.0) > 1e-9:
            raise ValueError(f"`shares` must sum to 1; got {self.shares}.")
        if self.combinations == "held_out_order" and self.shares[1] != 1.0:
            raise ValueError(
                "`shares` must be (0, 1, 0) where `combinations` is held_out_order: one object "
                f"has no order; got {self.shares}."
            )

    def __len__(self) -> int:
        return self.num_examples

    @property
    def title(self) -> str:
        """How messages name them."""
        return f"scenes/{self.combinations}"

    def factors(self, indices: np.ndarray) -> Factors:
        """Return what is in scenes `indices` (B,)."""
        return draw(self.seed, np.asarray(indices), self.shares, self.combinations)

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return {"image": uint8 (B, S, S, 3)} of scenes `indices` (B,)."""
        return {"image": drawing.render(self.factors(indices), self.size)}

    def captions(self, indices: np.ndarray) -> list[str]:
        """Return the captions of scenes `indices` (B,)."""
        return captions.describe(self.factors(indices))
