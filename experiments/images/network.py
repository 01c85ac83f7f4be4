"""The network of a model of images, as a config says it."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx

from experiments.common import options
from experiments.common.command import Refusal
from jaxdiff import data, nn
from jaxdiff.typing import Key

if TYPE_CHECKING:
    from experiments.images.model import Config

NETWORKS: dict[str, Any] = {"dit": nn.DiT, "unet": nn.UNet}
ARGUMENTS = {
    "dit": {"width": "width", "depth": "depth", "patch_size": "patch_size"},
    "unet": {"channels": "width", "num_blocks": "depth"},
}
"""For each network its arguments and the config's fields that they come from."""
CHOICES = {
    "dit": ("num_heads", "mlp_ratio"),
    "unet": ("num_heads", "multipliers", "attention_levels"),
}
"""For each network further fields, which are None where its own default is meant."""


def maker(
    config: "Config", images: data.Images | data.Description, key: Key | None = None
) -> Callable[[], nnx.Module]:
    """Return what makes the network, of the config's seed unless a key is given.

    Raises:
        Refusal: if a field is given that another network takes.
    """
    for name in sorted({*CHOICES["dit"], *CHOICES["unet"]} - {*CHOICES[config.network]}):
        if getattr(config, name) is not None:
            raise Refusal(f"{options.option(name)} is not one of the {config.network}'s options.")
    given: dict[str, Any] = {
        argument: getattr(config, field) for argument, field in ARGUMENTS[config.network].items()
    }
    chosen = {name: getattr(config, name) for name in CHOICES[config.network]}
    given |= {name: value for name, value in chosen.items() if value is not None}
    network = NETWORKS[config.network]

    def make() -> nnx.Module:
        return network(
            images.shape,
            num_classes=images.num_classes,
            dropout=config.dropout,
            remat=config.remat,
            dtype=jnp.dtype(config.dtype),
            rngs=nnx.Rngs(config.seed if key is None else key),
            **given,
        )

    return make


def choices_of(config: "Config") -> dict[str, Any]:
    """Return the further fields of the config's network, its own default in place of None."""
    own = inspect.signature(vars(NETWORKS[config.network])["__init__"]).parameters
    values = {name: getattr(config, name) for name in CHOICES[config.network]}
    return {name: own[name].default if value is None else value for name, value in values.items()}


def option_names(config: "Config") -> dict[str, str]:
    """Return the options that the network's arguments come from, where the names differ."""
    names = {
        argument: options.option(field) for argument, field in ARGUMENTS[config.network].items()
    }
    names["shape"] = "--network" if config.multipliers is None else "--multipliers"
    if config.num_heads is None:
        names["num_heads"] = "--width"
    return names
