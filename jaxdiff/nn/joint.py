r"""Blocks in which the tokens of an image and those of a context attend to each other as one row.

Both are streams with weights of their own (see `jaxdiff.nn.streams`); what is mixed is

    attention of (q, q') to (k, k'), (v, v')

over the tokens of both, where nobody attends to a token of the context behind the mask. Nothing
comes after the last block's context, so that has keys and values alone.

Source: Esser et al. 2024 (arXiv:2403.03206), section 4 and Figure 2.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxdiff.nn.conditioning import Context
from jaxdiff.nn.layers import Linear, RMSNorm, attend
from jaxdiff.nn.streams import Stream, modulate
from jaxdiff.typing import Array, Key


class Given(nnx.Module):
    """The context of the last block: keys and values, modulated; `options` go to its layers."""

    def __init__(self, width: int, *, num_heads: int, query_key_norm: bool, **options: Any) -> None:
        zeros, xavier = nnx.initializers.zeros, nnx.initializers.xavier_uniform()
        self.modulation = Linear(width, 2 * width, kernel_init=zeros, **options)
        self.key_value = Linear(width, 2 * width, kernel_init=xavier, **options)
        norm = {"num_heads": num_heads, "param_dtype": options["param_dtype"]}
        self.key_norm = RMSNorm(width, **norm) if query_key_norm else None

    def __call__(self, tokens: Array, c: Array) -> tuple[Array, Array]:
        """Return keys and values of tokens, each (B, L, C), given c (B, C)."""
        shift, scale = jnp.split(self.modulation(c)[:, jnp.newaxis], 2, axis=-1)
        key, value = jnp.split(self.key_value(modulate(tokens, shift, scale)), 2, axis=-1)
        return (key if self.key_norm is None else self.key_norm(key)), value


class JointBlock(Stream):
    """One block of both; it is the stream of the image, and has that of the context.

    Args:
        width: C, of both.
        site: number of the block.
        depth: number of all blocks.
        given: further options of :class:`jaxdiff.nn.streams.Stream`, of both.
    """

    def __init__(self, width: int, *, site: int, depth: int, **given: Any) -> None:
        super().__init__(width, site=site, **given)
        names = ("num_heads", "query_key_norm", "dtype", "param_dtype", "rngs")
        self.context = (
            Stream(width, site=depth + site, **given)
            if site < depth - 1
            else Given(width, **{name: given[name] for name in names})
        )

    def __call__(
        self, h: Array, c: Array, context: Context, key: Key | None
    ) -> tuple[Array, Context | None]:
        """Map tokens (B, N, C) and a context (B, L, C) to their like, given activated c (B, C).

        The context is None after the last block.
        """
        tokens, mask = context
        first, second = self.modulations(c)
        own = self.asked(h, first)
        shown = _joined(mask, jnp.ones(h.shape[:2], bool))
        if isinstance(self.context, Given):
            keys, values = map(_joined, self.context(tokens, c), own[1:])
            mixed = attend(own[0], keys, values, self.num_heads, shown)
            h = self.attended(h, mixed, first, key)
            return self.perceived(h, second, key), None
        others_first, others_second = self.context.modulations(c)
        queries, keys, values = map(_joined, self.context.asked(tokens, others_first), own)
        mixed = attend(queries, keys, values, self.num_heads, shown)
        others_mixed, own_mixed = jnp.split(mixed, [tokens.shape[1]], axis=1)
        h = self.attended(h, own_mixed, first, key)
        tokens = self.context.attended(tokens, others_mixed, others_first, key)
        tokens = self.context.perceived(tokens, others_second, key)
        return self.perceived(h, second, key), Context(tokens, mask)


def _joined(context: Array, image: Array) -> Array:
    """Return what the tokens of both have, (B, L, ...) and (B, N, ...), as one row."""
    return jnp.concatenate([context, image], axis=1)
