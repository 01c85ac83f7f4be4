"""An autoencoder beside a discriminator: their networks, losses and updates, small."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxdiff import losses, nn
from jaxdiff.nn.space_to_depth import space_to_depth
from jaxdiff.training import make_update, networks

SHAPE = (8, 8, 1)
BEGINS = 3
"""The step at which the adversarial term begins."""


@functools.cache
def made(dtype):
    """The parameters of both, and what encodes, decodes and discriminates."""
    options = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    autoencoder = nn.SpaceToDepthAutoencoder(
        1, latent_channels=2, widths=(4,), num_blocks=0, rngs=nnx.Rngs(0), **options
    )
    discriminator = nn.PatchDiscriminator(1, widths=(4, 8), rngs=nnx.Rngs(1), **options)
    params, encode = nn.functional(autoencoder, "encode")
    _, decode = nn.functional(autoencoder, "decode")
    others, discriminate = nn.functional(discriminator)
    return {"autoencoder": params, "discriminator": others}, encode, decode, discriminate


def params(dtype="float64"):
    return made(dtype)[0]


def frozen(dtype="float64"):
    return {"features": jnp.asarray(np.random.default_rng(3).normal(size=(4, 6)), dtype)}


def images(num_steps, num_rows, dtype="float64"):
    rng = np.random.default_rng(4)
    return np.tanh(rng.normal(size=(num_steps, num_rows, *SHAPE))).astype(dtype)


def features(frozen, x):
    return [jnp.tanh(space_to_depth(x) @ frozen["features"])]


def update(dtype="float64", begins=BEGINS, **options):
    """Both networks in turn, every term on; the adversarial one from step `begins`."""
    _, encode, decode, discriminate = made(dtype)

    def loss_of(state):
        return losses.autoencoding(
            encode,
            decode,
            absolute=0.1,
            divergence=1e-2,
            features=functools.partial(features, state.frozen),
            perceptual=0.5,
            discriminate=discriminate,
            adversarial=jnp.where(state.step < begins, 0.0, 0.3),
        )

    # An epsilon above what is rounding in a gradient, which Adam would make a step of.
    optimizer = optax.adam(1e-3, b1=0.5, eps=1e-3)
    hinge = losses.discriminating(encode, decode, discriminate)
    return networks.alternate(
        autoencoder=make_update(
            loss_of=loss_of, optimizer=optimizer, ema_decay=0.9, part="autoencoder", **options
        ),
        discriminator=make_update(hinge, optimizer, ema_decay=0.5, part="discriminator", **options),
    )
