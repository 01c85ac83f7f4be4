"""What a load gives, by the kind of what is loaded: parameters, and pure functions of them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxdiff.denoisers import Model
from jaxdiff.nn.functional import seeing
from jaxdiff.pretrained.schedulers import Schedule
from jaxdiff.typing import Apply, Array, PyTree

__all__ = ["Autoencoder", "Denoising", "TextEncoder", "Vision"]


class Autoencoder(NamedTuple):
    """An autoencoder of images.

    Attributes:
        params: its parameters.
        encode: (params, x (B, H, W, C) in [-1, 1]) -> (mean, std), each (B, h, w, c), of latents
            as the denoising network sees them.
        decode: (params, z (B, h, w, c)) -> x (B, H, W, C).
        config: of its file.
    """

    params: PyTree
    encode: Callable[[PyTree, Array], tuple[Array, Array]]
    decode: Callable[[PyTree, Array], Array]
    config: Mapping[str, Any]


class TextEncoder(NamedTuple):
    """A text encoder and its tokenizer.

    Attributes:
        params: its parameters.
        tokenize: a `Tokenizer`, prompts -> int32 (B, L); its `cut` says what is left out of those
            too long.
        encode: (params, tokens (B, L)) -> (B, L, D); of two encoders together, as SDXL has them,
            (params, tokens (B, 2, L)) -> {"tokens": (B, L, D), "pooled": (B, P)}.
        config: of its file.
        apply: (params, tokens, skip=0) -> `nn.Text`: from before the last `skip` blocks, and the
            vector of the prompt too; None of two.
        pools: whether `encode` gives a mapping.
        null_is_zero: whether zeros stand for no prompt, and not the empty one.
    """

    params: PyTree
    tokenize: Any
    encode: Callable[[PyTree, Array], Any]
    config: Mapping[str, Any]
    apply: Any = None
    pools: bool = False
    null_is_zero: bool = False


class Vision(NamedTuple):
    """A network that sees images.

    Attributes:
        params: its parameters.
        apply: (params, x (B, H, W, 3) normalised) -> (B, D).
        patches: likewise -> (B, H / p, W / p, D), the features of each patch.
        config: of its file.
    """

    params: PyTree
    apply: Callable[[PyTree, Array], Array]
    patches: Callable[[PyTree, Array], Array]
    config: Mapping[str, Any]


class Denoising(NamedTuple):
    """A denoising network, with what lies beside it in a pipeline.

    Attributes:
        model: its pure function, process and prediction; ``model.denoiser(params, cond)``.
        params: of the network.
        autoencoder: of the images whose latents it denoises; None where there is none.
        text: the encoder of its prompts; None likewise.
        config: of the network's file.
        num_classes: of the labels that it takes, this number being the null label; None where it
            takes none.
        clip: the limit of x0_hat's entries with which its scheduler samples; None is none.
        shift: of the times of its scheduler's grids, 1 being none; see `schedulers.Schedule`.
    """

    model: Model
    params: PyTree
    autoencoder: Autoencoder | None
    text: TextEncoder | None
    config: Mapping[str, Any]
    num_classes: int | None = None
    clip: float | None = None
    shift: float = 1.0

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        apply: Apply,
        params: PyTree,
        config: Mapping[str, Any],
        **rest: Any,
    ) -> "Denoising":
        """Return that of a network of steps, with what its scheduler's config says."""
        model = Model(seeing(schedule.step, apply), schedule.process, schedule.prediction)
        return cls(
            model, params, None, None, config, clip=schedule.clip, shift=schedule.shift, **rest
        )
