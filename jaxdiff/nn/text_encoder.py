r"""The text transformer of CLIP, which makes sequences to attend to of prompts.

Tokens and their positions are embedded and added. Every block is

    h <- h + proj(attention(qkv(norm(h))))
    h <- h + outer(act(inner(norm(h))))

where a token attends to itself and those before it. What comes out is norm(h); the vector of a
whole prompt is that of its last token, the first that marks the end.

Source: Radford et al. 2021 (arXiv:2103.00020), section 2.4.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff import checks
from jaxdiff.nn.layers import LayerNorm, Linear, attention
from jaxdiff.typing import Array


def quick_gelu(x: Array) -> Array:
    """Return x sigmoid(1.702 x).

    Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415), section 2.
    """
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """Return x Phi(x), Phi being the normal distribution function, by the error function."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}
"""Those of the perceptrons, by name."""


class Text(NamedTuple):
    """What the encoder makes of prompts.

    Attributes:
        tokens: one vector a token, (B, L, C).
        pooled: one a prompt, (B, C), or (B, P) where there is a projection.
    """

    tokens: Array
    pooled: Array


class TextBlock(nnx.Module):
    """One block; `options` go to its layers."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        hidden: int,
        activation: str,
        epsilon: float,
        **options: Any,
    ) -> None:
        self.num_heads = num_heads
        self.activation = activation
        norm_options = {"epsilon": epsilon, "param_dtype": options["param_dtype"]}
        self.attention_norm = LayerNorm(width, **norm_options)
        self.qkv = Linear(width, 3 * width, **options)
        self.projection = Linear(width, width, **options)
        self.mlp_norm = LayerNorm(width, **norm_options)
        self.inner = Linear(width, hidden, **options)
        self.outer = Linear(hidden, width, **options)

    def __call__(self, h: Array, mask: Array) -> Array:
        """Map tokens (B, L, C) to the same shape, given what may be attended to.

        The mask says which tokens all may attend to, (B, L), or which each may, (1, L, L) or
        (B, L, L).
        """
        mixed = attention(self.qkv(self.attention_norm(h)), self.num_heads, mask)
        h = h + self.projection(mixed)
        return h + self.outer(ACTIVATIONS[self.activation](self.inner(self.mlp_norm(h))))


class TextEncoder(nnx.Module):
    """Makes vectors of tokens.

    Args:
        num_tokens: of the vocabulary.
        length: the greatest number of tokens of a prompt.
        width: C, a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: of the attention.
        hidden: width of the perceptrons' hidden layer.
        activation: of the perceptrons, one of `ACTIVATIONS`.
        epsilon: added to the variance in the normalisations.
        end: the token that marks the end; None is the greatest of the prompt.
        projection: P, the size of the vector of a prompt; None is C, without a projection.
        dtype: of the computation; normalisation and softmax are in float32 at least.
        param_dtype: of the parameters.
        rngs: source of the initial parameters.

    Raises:
        TypeError: if a size is no whole number.
        ValueError: if a size is below 1, `num_heads` does not divide `width`, or `activation` is
            unknown.
    """

    def __init__(
        self,
        num_tokens: int,
        *,
        length: int = 77,
        width: int,
        depth: int,
        num_heads: int,
        hidden: int,
        activation: str = "quick_gelu",
        epsilon: float = 1e-5,
        end: int | None = None,
        projection: int | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = {"num_tokens": num_tokens, "length": length, "width": width, "depth": depth}
        for name, size in (sizes | {"num_heads": num_heads, "hidden": hidden}).items():
            checks.count(name, size)
        checks.choice("activation", activation, tuple(ACTIVATIONS))
        if width % num_heads:
            raise ValueError(f"`width` must be a multiple of num_heads = {num_heads}; got {width}.")
        self.num_tokens = num_tokens
        self.length = length
        self.depth = depth
        self.end = end
        self.dtype = dtype
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        small = nnx.initializers.normal(0.02)
        self.tokens = nnx.Param(small(rngs.params(), (num_tokens, width), param_dtype))
        self.positions = nnx.Param(small(rngs.params(), (length, width), param_dtype))
        for i in range(depth):
            block = TextBlock(
                width,
                num_heads=num_heads,
                hidden=hidden,
                activation=activation,
                epsilon=epsilon,
                **options,
            )
            setattr(self, f"block_{i:02d}", block)
        self.norm = LayerNorm(width, epsilon=epsilon, param_dtype=param_dtype)
        self.projection = (
            None if projection is None else Linear(width, projection, use_bias=False, **options)
        )

    def __call__(self, tokens: Array, *, skip: int = 0) -> Text:
        """Encode prompts.

        Args:
            tokens: whole numbers (B, L), L at most `length`.
            skip: take the tokens' vectors from before the last so many blocks, as they are there,
                without the last normalisation; the vector of the prompt is taken at the end.

        Raises:
            TypeError: if `tokens` is not of integers.
            ValueError: if its shape is another, a known one is none of the vocabulary, or `skip`
                lies outside 0..depth.
        """
        tokens = checks.whole_numbers("tokens", tokens, self.num_tokens)
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.length:
            raise ValueError(
                f"`tokens` must have shape (B, L), L at most {self.length}; got {tokens.shape}."
            )
        if checks.count("skip", skip, 0) > self.depth:
            raise ValueError(f"`skip` must be at most {self.depth}, the depth; got {skip}.")
        length = tokens.shape[1]
        # A traced token beyond the vocabulary is NaN, not another one.
        h = self.tokens[...].at[tokens].get(mode="fill", fill_value=jnp.nan)
        h = h + self.positions[...][jnp.newaxis, :length]
        h = kept = h.astype(self.dtype)
        mask = jnp.tri(length, dtype=bool)[jnp.newaxis]
        for i in range(self.depth):
            kept = h if i == self.depth - skip else kept
            h = getattr(self, f"block_{i:02d}")(h, mask)
        h = self.norm(h)
        pooled = h[jnp.arange(h.shape[0]), self._last(tokens)]
        if self.projection is not None:
            pooled = self.projection(pooled)
        return Text(kept if skip else h, pooled)

    def _last(self, tokens: Array) -> Array:
        """Return where each prompt ends, (B,)."""
        return jnp.argmax(tokens if self.end is None else tokens == self.end, axis=1)
