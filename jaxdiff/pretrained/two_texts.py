"""Two text encoders as one, as SDXL has them.

Both are asked for the tokens' vectors before their last block, which stand side by side, and the
second for that of the whole prompt, through its projection.

Source: Podell et al. 2023 (arXiv:2307.01952), section 2.1 and table 1.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jaxdiff.pretrained.loaded import TextEncoder
from jaxdiff.pretrained.tokenizer import Tokenizer
from jaxdiff.typing import Array, PyTree

__all__ = ["TwoTokenizers", "together"]


@dataclasses.dataclass(frozen=True)
class TwoTokenizers:
    """A function of one prompt or several, which gives both their tokens, int32 (B, 2, L).

    Attributes:
        first: of the first encoder.
        second: of the second; they differ in what fills up.
    """

    first: Tokenizer
    second: Tokenizer

    @property
    def length(self) -> int:
        """L."""
        return self.first.length

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the tokens of prompts; see :class:`Tokenizer`."""
        return np.stack([self.first(prompts), self.second(prompts)], axis=1)

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Return what is left out of each prompt; see :class:`Tokenizer`."""
        return self.first.cut(prompts)


def together(first: TextEncoder, second: TextEncoder, *, null_is_zero: bool) -> TextEncoder:
    """Make one encoder of two.

    Args:
        first: any.
        second: one with a projection.
        null_is_zero: whether zeros stand for no prompt.

    Returns:
        The encoder of tokens (B, 2, L): ``encode(params, tokens)`` -> {"tokens": (B, L, D),
        "pooled": (B, P)}, D being the sum of both widths.

    Raises:
        ValueError: if they take numbers of tokens that differ.
    """
    lengths = {each.length for each in (first.tokenize, second.tokenize) if each.made is not None}
    if len(lengths) > 1:
        raise ValueError(f"Both text encoders must take as many tokens; got {sorted(lengths)}.")

    def encode(params: PyTree, tokens: Array) -> Mapping[str, Array]:
        one = first.apply(params["first"], tokens[:, 0], skip=1)
        two = second.apply(params["second"], tokens[:, 1], skip=1)
        joined = jnp.concatenate([one.tokens, two.tokens], axis=-1)
        return {"tokens": joined, "pooled": two.pooled}

    return TextEncoder(
        params={"first": first.params, "second": second.params},
        tokenize=TwoTokenizers(first.tokenize, second.tokenize),
        encode=encode,
        config={"text_encoder": first.config, "text_encoder_2": second.config},
        apply=None,
        pools=True,
        null_is_zero=null_is_zero,
    )
