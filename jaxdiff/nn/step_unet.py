r"""The U-Net of DDPM and of latent diffusion, which takes the number of a step.

With w = width of the first level and T(n) the sinusoids of the step's number n, the vector that
all residual blocks are given is c = silu(outer(silu(inner(T(n))))), c being added in a block. The
input goes through a convolution; every level is residual blocks, attention or a transformer after
each where it has them, and a convolution of stride 2; in the middle stand a block, attention and a
block; the way up takes all of that back, one block a level more, each level ending with repetition
and a convolution. See `residual` and `transformer` for the blocks.

    n = T t - 1 at time t in (0, 1] of a process of T steps; see `jaxdiff.nn.on_steps`

Source: Ho et al. 2020 (arXiv:2006.11239), appendix B; Rombach et al. 2022 (arXiv:2112.10752),
section 3.3; what is added to c for image sizes and pooled text is Podell et al. 2023
(arXiv:2307.01952), section 2.2.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff import checks
from jaxdiff.nn.conditioning import Perceptron
from jaxdiff.nn.layers import GroupNorm, check_input, checkpointed, sinusoidal, upsample
from jaxdiff.nn.residual import AttentionBlock, ResidualBlock
from jaxdiff.nn.transformer import Transformer
from jaxdiff.typing import Array, Key, PyTree


class Level(NamedTuple):
    """What stands at one resolution, on one way.

    Attributes:
        width: channels.
        num_blocks: residual blocks.
        num_heads: of the attention after each; 0 is without.
        depth: blocks of the transformer that it is; 0 is attention among pixels alone.
    """

    width: int
    num_blocks: int
    num_heads: int = 0
    depth: int = 0


class Pooled(NamedTuple):
    """What is added to the embedding of the step: a pooled text, and sizes as sinusoids.

    Attributes:
        width: of the pooled text and all sinusoids together.
        size_width: of the sinusoids of one size.
    """

    width: int
    size_width: int


class StepUNet(nnx.Module):
    """The U-Net of DDPM and of latent diffusion.

    Args:
        in_channels: of what it sees. More than `out_channels` are what stands beside x.
        out_channels: of x, and of what it predicts.
        down: the levels on the way down, highest resolution first.
        middle: one level of two blocks, with attention or without between them.
        up: the levels on the way up, lowest resolution first, one block more in each.
        context_width: of the tokens that transformers attend to; None is without.
        pooled: what is added to the embedding of the step; None is nothing.
        cond_width: of the vector of the step; None is four times the width of the first level.
        flip: as of :func:`jaxdiff.nn.layers.sinusoidal`, which embeds the step.
        shift: likewise.
        max_groups: of all normalisations.
        epsilon: of those outside transformers.
        middle_normed: whether the attention in the middle begins with a normalisation.
        added: whether residual blocks add the step's vector; else it scales and shifts.
        padding: 1 on all sides before a convolution of stride 2; 0: one at the far sides alone.
        remat: recompute residual blocks and attention in the backward pass, for memory.
        dtype: of the computation; normalisation and softmax are in float32 at least.
        param_dtype: of the parameters.
        rngs: source of the initial parameters.
    """

    time = "step"
    """What its time is; see :func:`jaxdiff.nn.on_steps`."""
    middle_01: ResidualBlock

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        down: tuple[Level, ...],
        middle: Level,
        up: tuple[Level, ...],
        context_width: int | None = None,
        pooled: Pooled | None = None,
        cond_width: int | None = None,
        flip: bool = True,
        shift: float = 0.0,
        max_groups: int = 32,
        epsilon: float = 1e-5,
        middle_normed: bool = True,
        added: bool = True,
        padding: int = 1,
        remat: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_channels, self.out_channels = in_channels, out_channels
        self.down, self.middle, self.up = down, middle, up
        self.context_width, self.pooled = context_width, pooled
        self.flip, self.shift = flip, shift
        self.padding, self.remat, self.dtype = padding, remat, dtype
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        first = down[0].width
        cond_width = cond_width or 4 * first
        self.step = Perceptron(first, cond_width, **options)
        if pooled is not None:
            self.pooled_in = Perceptron(pooled.width, cond_width, **options)
        self.conv_in = nnx.Conv(in_channels, first, (3, 3), **options)
        norm: dict[str, Any] = {"max_groups": max_groups, "epsilon": epsilon}

        def residual(name: str, channels: int, level: Level) -> int:
            block = ResidualBlock(
                channels, level.width, cond_width, added=added, norm=norm, **options
            )
            setattr(self, name, block)
            return level.width

        def attending(name: str, level: Level, *, normed: bool = True) -> None:
            if not level.num_heads:
                return
            given: dict[str, Any] = {"num_heads": level.num_heads, **options}
            if level.depth:
                given |= {"depth": level.depth, "max_groups": max_groups}
                setattr(self, name, Transformer(level.width, context_width or 0, **given))
            else:
                setattr(self, name, AttentionBlock(level.width, normed=normed, norm=norm, **given))

        sides = ((1, 1), (1, 1)) if padding else ((0, 1), (0, 1))
        current = first
        kept = [current]
        for i, level in enumerate(down):
            for j in range(level.num_blocks):
                current = residual(f"down_{i:02d}_{j:02d}", current, level)
                attending(f"down_attention_{i:02d}_{j:02d}", level)
                kept.append(current)
            if i < len(down) - 1:
                halve = nnx.Conv(current, current, (3, 3), strides=2, padding=sides, **options)
                setattr(self, f"downsample_{i:02d}", halve)
                kept.append(current)
        current = residual("middle_00", current, middle)
        attending("middle_attention", middle, normed=middle_normed)
        current = residual("middle_01", current, middle)
        for i, level in enumerate(up):
            for j in range(level.num_blocks):
                current = residual(f"up_{i:02d}_{j:02d}", current + kept.pop(), level)
                attending(f"up_attention_{i:02d}_{j:02d}", level)
            if i < len(up) - 1:
                setattr(self, f"upsample_{i:02d}", nnx.Conv(current, current, (3, 3), **options))
        self.norm_out = GroupNorm(current, param_dtype=param_dtype, **norm)
        self.conv_out = nnx.Conv(current, out_channels, (3, 3), **options)

    @property
    def cond_names(self) -> tuple[str, ...]:
        """What its conditioning has by name.

        tokens
            (B, L, context_width), a text encoder's; alone, they are the conditioning themselves.
        pooled
            (B, C), a pooled text.
        sizes
            (B, N), the numbers that describe an image's size and crop.
        beside
            (B, H, W, in_channels - out_channels), joined to x as its last channels: for
            inpainting the mask, 1 where to paint, then the latents of the image that is masked.
        """
        names = ["tokens"] if self.context_width is not None else []
        names += ["pooled", "sizes"] if self.pooled is not None else []
        return (*names, *(["beside"] if self.in_channels > self.out_channels else []))

    def __call__(self, x: Array, t: Array, cond: PyTree = None, *, key: Key | None = None) -> Array:
        """Evaluate the network.

        Args:
            x: shape (B, H, W, out_channels).
            t: numbers of steps, shape () or (B,); those between whole ones are allowed.
            cond: a mapping of `cond_names`, the tokens themselves where there is nothing else, or
                None where there is nothing.
            key: not used; there is no dropout.

        Returns:
            The shape of x, in the dtype of the computation but at least float32.

        Raises:
            TypeError: if an argument is of another kind.
            ValueError: if a shape is wrong, or conditioning is missing or unknown.
        """
        dtype = self.dtype
        x = check_input(x, ("H", "W", self.out_channels), dtype)
        self._check_size(x.shape)
        given = self._conditioning(cond, x)
        checks.real("t", t)
        t = jnp.asarray(t)
        if t.shape not in ((), x.shape[:1]):
            raise ValueError(f"`t` must have shape () or ({x.shape[0]},); got {t.shape}.")
        c = self._vector(jnp.broadcast_to(t, x.shape[:1]), given)
        if "beside" in given:
            x = jnp.concatenate([x, given["beside"].astype(dtype)], axis=-1)
        tokens = given["tokens"].astype(dtype) if "tokens" in given else None
        return self._evaluate(x, c, tokens).astype(jnp.promote_types(dtype, jnp.float32))

    def _vector(self, t: Array, given: Mapping[str, Array]) -> Array:
        """Return the activated vector (B, C) of the steps and what is added to them."""
        waves: dict[str, Any] = {"flip": self.flip, "shift": self.shift}
        c = self.step(sinusoidal(t, self.down[0].width, **waves).astype(self.dtype))
        if self.pooled is not None:
            sizes = sinusoidal(given["sizes"].reshape(-1), self.pooled.size_width, **waves)
            sizes = sizes.reshape(t.shape[0], -1).astype(self.dtype)
            together = jnp.concatenate([given["pooled"].astype(self.dtype), sizes], axis=-1)
            c = c + self.pooled_in(together)
        return jax.nn.silu(c)

    def _evaluate(self, x: Array, c: Array, tokens: Array | None) -> Array:
        """Return the output (B, H, W, out_channels)."""

        def block(name: str, h: Array, level: Level, attention: str) -> Array:
            h = checkpointed(getattr(self, name), self.remat)(h, c)
            if not level.num_heads:
                return h
            given = (h, tokens) if level.depth else (h,)
            return checkpointed(getattr(self, attention), self.remat)(*given)

        h = self.conv_in(x)
        kept = [h]
        for i, level in enumerate(self.down):
            for j in range(level.num_blocks):
                h = block(f"down_{i:02d}_{j:02d}", h, level, f"down_attention_{i:02d}_{j:02d}")
                kept.append(h)
            if i < len(self.down) - 1:
                h = getattr(self, f"downsample_{i:02d}")(h)
                kept.append(h)
        h = block("middle_00", h, self.middle, "middle_attention")
        h = checkpointed(self.middle_01, self.remat)(h, c)
        for i, level in enumerate(self.up):
            for j in range(level.num_blocks):
                h = jnp.concatenate([h, kept.pop()], axis=-1)
                h = block(f"up_{i:02d}_{j:02d}", h, level, f"up_attention_{i:02d}_{j:02d}")
            if i < len(self.up) - 1:
                height, width = kept[-1].shape[1:3]  # one less than twice where that was odd
                h = getattr(self, f"upsample_{i:02d}")(upsample(h)[:, :height, :width])
        return self.conv_out(jax.nn.silu(self.norm_out(h)))

    def _check_size(self, shape: tuple[int, ...]) -> None:
        factor = 2 ** (len(self.down) - 1)
        if not self.padding and (shape[1] % factor or shape[2] % factor):
            raise ValueError(
                f"`x` must have H and W divisible by {factor} for {len(self.down)} levels; "
                f"got {shape}. Pad the images."
            )

    def _conditioning(self, cond: PyTree, x: Array) -> Mapping[str, Array]:
        """Return the conditioning by name."""
        names = self.cond_names
        if names == ("tokens",) and cond is not None and not isinstance(cond, Mapping):
            cond = {"tokens": cond}
        given = {} if cond is None else cond
        if not isinstance(given, Mapping) or set(given) != set(names):
            wanted = f"a mapping of {', '.join(names)}" if names else "None"
            got = ", ".join(map(str, given)) if isinstance(given, Mapping) else checks.shown(given)
            raise ValueError(f"`cond` must be {wanted} for this network; got {got or 'none'}.")
        shapes: dict[str, tuple[int | str, ...]] = {
            "tokens": ("L", self.context_width or 0),
            "pooled": ("C",),
            "sizes": ("N",),
            "beside": (*x.shape[1:3], self.in_channels - self.out_channels),
        }
        for name, value in given.items():
            checks.real(f'cond["{name}"]', value)
            shape = (x.shape[0], *shapes[name])
            found = jnp.shape(value)
            sizes = zip(shape, found, strict=False)
            if len(found) != len(shape) or any(w not in (n, str(w)) for w, n in sizes):
                wanted = ", ".join(map(str, shape))
                raise ValueError(f'`cond["{name}"]` must have shape ({wanted}); got {found}.')
        if self.pooled is not None:
            num_sizes, num_pooled = given["sizes"].shape[1], given["pooled"].shape[1]
            if num_pooled + num_sizes * self.pooled.size_width != self.pooled.width:
                raise ValueError(
                    "`pooled` and `sizes` of `cond` must have C + N "
                    f"{self.pooled.size_width} = {self.pooled.width}; "
                    f"got C={num_pooled} and N={num_sizes}."
                )
        return {name: jnp.asarray(value) for name, value in given.items()}
