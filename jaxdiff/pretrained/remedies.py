"""What would do, where the tensors of a file are not those of the network that its config says."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxdiff.pretrained import autoencoder, clip, dinov2, dit, unet
from jaxdiff.pretrained.naming import NamingError, Table

_NAMED: tuple[tuple[str, Table], ...] = (
    ("UNet2DConditionModel or UNet2DModel, a pipeline's folder unet", unet.TABLE),
    ("DiT or SiT, a pipeline's folder transformer", dit.TABLE),
    ("AutoencoderKL, a pipeline's folder vae", autoencoder.TABLE),
    ("CLIPTextModel, a pipeline's folder text_encoder", clip.TABLE),
    ("Dinov2Model", dinov2.TABLE),
)
_MOST = 0.5
"""The share of tensors that must be named as a network's for them to be taken for it."""


def class_name(config: Mapping[str, Any]) -> Any:
    """Return the class that a config names; None where it names none."""
    return config.get("_class_name") or next(iter(config.get("architectures") or []), None)


def remedy(
    error: NamingError, config: Mapping[str, Any], table: Table, keys: Collection[str]
) -> str:
    """Return, in a sentence, what to look at where tensors are not those of a network.

    Args:
        error: what does not fit.
        config: of the network.
        table: of the network.
        keys: of all tensors of the file.
    """
    name = class_name(config)
    if error.by_values:
        return "Names and shapes fit, the numbers do not: load the file as it was published."
    if name is None:
        return "Give the file of all its weights, as it was published."
    own = _share(table, keys)
    best, kind = max((_share(other, keys), kind) for kind, other in _NAMED)
    if own >= max(best, _MOST):
        return (
            f"The config.json says {name}, and the names are its own: is it the config.json that "
            "was published with these weights?"
        )
    if best >= _MOST:
        return (
            f"The config.json says {name}, and the tensors are named as those of {kind}: is this "
            "the folder of another component?"
        )
    return (
        f"The config.json says {name}, and the tensors are named as those of no network that is "
        f"known here: put the weights of {name} beside it, as diffusers or transformers name them."
    )


def _share(table: Table, keys: Collection[str]) -> float:
    patterns = [re.compile(rule.pattern) for rule in table]
    known = sum(any(pattern.fullmatch(key) for pattern in patterns) for key in keys)
    return known / max(len(keys), 1)
