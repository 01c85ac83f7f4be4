r"""Texts as a condition: a small transformer of their tokens, trained with the network.

    nn.DiT(shape, conditioning=nn.Texts(tokenizer.num_tokens, length=tokenizer.length), rngs=rngs)

Tokens and their positions are embedded and added; in every block, as in `jaxdiff.nn.text_encoder`,

    h <- h + proj(attention(qkv(norm(h))))
    h <- h + outer(gelu(inner(norm(h))))

where every token attends to all of its text. Of norm(h) a dense layer makes the tokens that the
network attends to, and another of its mean over the text the vector that is added to that of time.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff import checks, numerics
from jaxdiff.nn.conditioning import Condition, Context, Embedding
from jaxdiff.nn.layers import LayerNorm, Linear, masked_mean
from jaxdiff.nn.sequences import check_mask, sequence_parts
from jaxdiff.nn.text_encoder import TextBlock
from jaxdiff.typing import Array, PyTree

EPSILON = 1e-6
"""Added to the variance in the normalisations."""


@dataclasses.dataclass(frozen=True)
class Texts(Condition):
    """Texts as numbers of their tokens (B, L) and a mask (B, L); a vector, and tokens.

    The value is a mapping or a named tuple of `tokens`, integers, and `mask`, of booleans or of 0
    and 1, true where there is a token: what :func:`jaxdiff.data.learn_tokenizer` makes. L may
    differ between calls. What stands behind the mask has no influence, whatever it is; a text that
    is masked altogether stands for none. A token that is out of range where it cannot be seen
    (under jit) makes NaN of its row.

    Args:
        num_tokens: of the vocabulary: tokens are integers in 0..num_tokens - 1.
        length: the greatest L.
        width: of the transformer, a multiple of `num_heads`.
        depth: number of its blocks.
        num_heads: of its attention.
        pooled: whether it gives a vector beside the tokens.

    Raises:
        TypeError: if a size is no whole number.
        ValueError: if a size is below 1, or `num_heads` does not divide `width`.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3, with the normalisation before each
    branch; tokens and a pooled vector side by side as in Esser et al. 2024 (arXiv:2403.03206),
    section 4, whose encoders are not trained.
    """

    num_tokens: int
    _: dataclasses.KW_ONLY
    length: int
    width: int = 128
    depth: int = 2
    num_heads: int = 4
    pooled: bool = True
    holds: ClassVar[str] = "texts"
    has_context: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("num_tokens", "length", "width", "depth", "num_heads"):
            checks.count(name, getattr(self, name))
        if self.width % self.num_heads:
            raise ValueError(
                f"`width` must be a multiple of num_heads = {self.num_heads}; got {self.width}."
            )

    def make(self, width: int, **options: Any) -> nnx.Module:
        """Make the transformer and what takes it to `width`."""
        return TextTransformer(self, width, **options)

    def embed(self, made: Any, value: PyTree, name: str, num_rows: int) -> Embedding:
        """Embed texts.

        Raises:
            TypeError: if there are not tokens of integers and a mask of truth values.
            ValueError: if a shape is another, there are no tokens at all or too many, or a known
                one is none of the vocabulary.
        """
        return made(*self._checked(value, name, num_rows))

    def null(self) -> dict[str, np.ndarray]:
        """Return one masked token, which serves in the place of any number of them."""
        return {"tokens": np.zeros(1, np.int32), "mask": np.zeros(1, bool)}

    def _checked(self, value: PyTree, name: str, num_rows: int) -> tuple[Array, Array]:
        """Return tokens (B, L), 0 behind the mask and `num_tokens` where unknown, and the mask."""
        given, given_mask = sequence_parts(value, name, f"({num_rows}, L)", num_rows)
        tokens = numerics.as_array(given, f"{name}.tokens")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"`{name}.tokens` must hold integers; got {tokens.dtype}.")
        shape = tokens.shape
        if len(shape) != 2 or shape[0] != num_rows or not 1 <= shape[1] <= self.length:
            raise ValueError(
                f"`{name}.tokens` must have shape ({num_rows}, L), L in 1..{self.length}; "
                f"got {shape}."
            )
        mask = check_mask(given_mask, name, shape)
        known, shown = numerics.concrete(given), numerics.concrete(given_mask)
        if known is not None and shown is not None:
            judged = np.where(shown.astype(bool), known, 0)
            checks.whole_numbers(f"{name}.tokens", judged, self.num_tokens)
        tokens = jnp.where(mask, tokens.astype(jnp.promote_types(tokens.dtype, jnp.int32)), 0)
        # A negative index would count from the end, so send it out of range on the other side.
        return jnp.where(tokens < 0, self.num_tokens, tokens), mask


class TextTransformer(nnx.Module):
    """The parameters of a :class:`Texts`, in a network of some width; `options` go to layers."""

    def __init__(self, texts: Texts, width: int, **options: Any) -> None:
        param_dtype = options["param_dtype"]
        small, xavier = nnx.initializers.normal(0.02), nnx.initializers.xavier_uniform()

        def table(num_rows: int) -> nnx.Param:
            shape = (num_rows, texts.width)
            return nnx.Param(small(options["rngs"].params(), shape, param_dtype))

        self.depth = texts.depth
        self.dtype = options["dtype"]
        self.tokens = table(texts.num_tokens)
        self.positions = table(texts.length)
        for i in range(texts.depth):
            block = TextBlock(
                texts.width,
                num_heads=texts.num_heads,
                hidden=4 * texts.width,
                activation="gelu",
                epsilon=EPSILON,
                kernel_init=xavier,
                **options,
            )
            setattr(self, f"block_{i:02d}", block)
        self.norm = LayerNorm(texts.width, epsilon=EPSILON, param_dtype=param_dtype)
        self.context = Linear(texts.width, width, kernel_init=xavier, **options)
        self.vector = (
            Linear(texts.width, width, kernel_init=xavier, **options) if texts.pooled else None
        )

    def __call__(self, tokens: Array, mask: Array) -> Embedding:
        """Embed tokens (B, L), each of the vocabulary or beyond it, with their mask (B, L)."""
        h = self.tokens[...].at[tokens].get(mode="fill", fill_value=jnp.nan)
        h = h + self.positions[...][jnp.newaxis, : tokens.shape[1]]
        h = h.astype(self.dtype)
        for i in range(self.depth):
            h = getattr(self, f"block_{i:02d}")(h, mask)
        h = self.norm(h)
        vector = None if self.vector is None else self.vector(masked_mean(h, mask))
        return Embedding(vector, Context(self.context(h), mask))
