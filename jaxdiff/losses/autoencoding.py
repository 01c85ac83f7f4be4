r"""The losses of an autoencoder whose latents are Gaussian, and of the discriminator beside it.

With (mu, s) the mean and standard deviation of the encoder, z = mu + s eps, x_hat the decoded z and
e = x_hat - x0, the loss of an example is the sum of

    squared      mean e^2
    absolute     mean |e|
    divergence   mean over latent dimensions of KL(N(mu, s^2) || N(0, 1))
                     = (mu^2 + s^2 - 1) / 2 - log s
    perceptual   mean over feature maps of mean (f(x_hat) / |f(x_hat)| - f(x0) / |f(x0)|)^2
    adversarial  -mean over patches of D(x_hat)

each times its weight, |f| being the norm over the channels of a pixel. The discriminator's is

    mean over patches of relu(1 - D(x0)) + relu(1 + D(x_hat))

They are trained in turn, each on its part of the parameters::

    update = networks.alternate(
        autoencoder=make_update(autoencoding(..., discriminate=discriminate, adversarial=0.1),
                                optimizer, ema_decay=0.999, part="autoencoder"),
        discriminator=make_update(discriminating(encode, decode, discriminate),
                                  optimizer, ema_decay=0.0, part="discriminator"),
    )

Where the adversarial term is to begin at step N: ``loss_of=lambda state: autoencoding(...,
adversarial=jnp.where(state.step < N, 0.0, 0.1))`` in place of the first loss.

Sources: Kingma and Welling 2014 (arXiv:1312.6114), appendix B, the divergence; Rombach et al. 2022
(arXiv:2112.10752), section 3.1, the sum; Zhang et al. 2018 (arXiv:1801.03924), eq. 1, the
perceptual term, here with means in place of learned weights and sums; Lim and Ye 2017
(arXiv:1705.02894), the hinges.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxdiff import checks, numerics, rows
from jaxdiff.losses import noised
from jaxdiff.typing import Array, Batch, Key, LossFn, PyTree

Encode: TypeAlias = Callable[[PyTree, Array], tuple[Array, Array]]
"""(params, x (B, ...)) -> mean and standard deviation of latents, each (B, ...)."""
Decode: TypeAlias = Callable[[PyTree, Array], Array]
"""(params, z (B, ...)) -> x (B, ...)."""
Discriminate: TypeAlias = Callable[[PyTree, Array], Array]
"""(params, x (B, ...)) -> logits of patches (B, ...)."""
Features: TypeAlias = Callable[[Array], Sequence[Array]]
"""x (B, ...) -> feature maps, each (B, ..., C)."""

PARTS = ("autoencoder", "discriminator")
"""Of the parameters, where there is a discriminator."""


class Reconstructed(NamedTuple):
    """A batch, encoded and decoded: x0 and x_hat (B, ...), mean and std of the latents (B, ...)."""

    x0: Array
    x_hat: Array
    mean: Array
    std: Array


def autoencoding(
    encode: Encode,
    decode: Decode,
    *,
    squared: Any = 1.0,
    absolute: Any = 0.0,
    divergence: Any = 1e-6,
    features: Features | None = None,
    perceptual: Any = 0.0,
    discriminate: Discriminate | None = None,
    adversarial: Any = 0.0,
) -> LossFn:
    """Make the loss of an autoencoder; all weights may be traced.

    Args:
        encode: ``encode(params, x0)`` -> mean and standard deviation of the latents, (B, ...).
        decode: ``decode(params, z)`` -> the data, of the shape of x0.
        squared: weight of the mean squared error.
        absolute: weight of the mean absolute error.
        divergence: weight of the divergence from N(0, I) a latent dimension.
        features: ``features(x)`` -> feature maps, each (B, ..., C), of a network that is not
            trained: it closes over its parameters, those of ``state.frozen`` by `loss_of`.
        perceptual: weight of the difference of the features.
        discriminate: ``discriminate(params, x)`` -> logits (B, ...). With it `params` is
            ``{"autoencoder": ..., "discriminator": ...}``, else the autoencoder's own.
        adversarial: weight of what it says; no gradient goes to its parameters.

    Returns:
        ``loss_fn(params, key, batch)`` -> (loss (B,), metrics), the metrics being "loss",
        "squared_error", "absolute_error", "divergence" and "psnr", in decibels of data in [-1, 1],
        and, where there are features or a discriminator, "perceptual" and "adversarial"; all but
        the loss without their weights.

    Raises:
        TypeError: if a function is none, a weight no number or, when called, if ``batch["x0"]``
            holds integers or what a function returns no real numbers.
        ValueError: if a weight is negative, or above 0 where what it weighs is not given; when
            called, if a shape is wrong or `params` has other parts.
    """
    checks.function("encode", encode, "(params, x) -> (mean, std)", takes=2)
    checks.function("decode", decode, "(params, z) -> x", takes=2)
    weights = {
        "squared_error": checks.number("squared", squared, 0.0),
        "absolute_error": checks.number("absolute", absolute, 0.0),
        "divergence": checks.number("divergence", divergence, 0.0),
        "perceptual": checks.number("perceptual", perceptual, 0.0),
        "adversarial": checks.number("adversarial", adversarial, 0.0),
    }
    if features is not None:
        checks.function("features", features, "x -> [(B, ..., C), ...]", takes=1)
    elif _is_on(perceptual):
        raise ValueError("`perceptual` weighs the difference of `features`, which are not given.")
    if discriminate is not None:
        checks.function("discriminate", discriminate, "(params, x) -> logits (B, ...)", takes=2)
    elif _is_on(adversarial):
        raise ValueError("`adversarial` weighs what `discriminate` says, which is not given.")

    def loss_fn(params: PyTree, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        own, other = (params, None) if discriminate is None else _parts(params)
        x0, x_hat, mean, std = _reconstruct(encode, decode, own, key, batch)
        error = x_hat - x0
        squared_error = noised.row_mean(error**2)
        terms = {
            "squared_error": squared_error,
            "absolute_error": noised.row_mean(jnp.abs(error)),
            "divergence": noised.row_mean(0.5 * (mean**2 + std**2 - 1.0) - jnp.log(std)),
        }
        if features is not None:
            terms["perceptual"] = _feature_distance(features, x0, x_hat)
        if discriminate is not None:
            logits = _logits(discriminate, jax.lax.stop_gradient(other), x_hat)
            terms["adversarial"] = -noised.row_mean(logits)
        terms = {name: term.astype(x0.dtype) for name, term in terms.items()}
        loss = jnp.zeros_like(squared_error)
        for name, term in terms.items():
            loss = loss + jnp.asarray(weights[name], x0.dtype) * term
        psnr = 10.0 * jnp.log10(4.0 / jax.lax.stop_gradient(squared_error))
        return loss, {"loss": loss, **terms, "psnr": psnr}

    return loss_fn


def discriminating(encode: Encode, decode: Decode, discriminate: Discriminate) -> LossFn:
    """Make the loss of the discriminator beside an autoencoder.

    Args:
        encode: as of :func:`autoencoding`.
        decode: likewise.
        discriminate: likewise.

    Returns:
        ``loss_fn(params, key, batch)`` -> (loss (B,), {"loss", "real", "reconstructed"}), the
        latter two being the mean logits of an example and of its reconstruction. `params` is
        ``{"autoencoder": ..., "discriminator": ...}``; no gradient goes to the former.

    Raises:
        TypeError: as :func:`autoencoding`.
        ValueError: likewise.
    """
    checks.function("encode", encode, "(params, x) -> (mean, std)", takes=2)
    checks.function("decode", decode, "(params, z) -> x", takes=2)
    checks.function("discriminate", discriminate, "(params, x) -> logits (B, ...)", takes=2)

    def loss_fn(params: PyTree, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        other, own = _parts(params)
        given = _reconstruct(encode, decode, jax.lax.stop_gradient(other), key, batch)
        real, made = (_logits(discriminate, own, x) for x in (given.x0, given.x_hat))
        hinges = jax.nn.relu(1.0 - real), jax.nn.relu(1.0 + made)
        loss = sum(map(noised.row_mean, hinges), start=jnp.zeros((), real.dtype))
        means = {"real": noised.row_mean(real), "reconstructed": noised.row_mean(made)}
        return loss, {"loss": loss, **means}

    return loss_fn


def _is_on(weight: Any) -> bool:
    """Tell whether a weight may be other than 0: one that is traced may."""
    known = numerics.concrete(weight)
    return known is None or float(known) != 0.0


def _parts(params: PyTree) -> tuple[PyTree, PyTree]:
    """Return the parameters of autoencoder and discriminator.

    Raises:
        ValueError: if there are others.
    """
    if not isinstance(params, Mapping) or set(params) != set(PARTS):
        raise ValueError(
            f"`params` must be a dictionary of the parts {PARTS[0]!r} and {PARTS[1]!r}; got "
            f"{', '.join(map(repr, params)) if isinstance(params, Mapping) else type(params)}."
        )
    return params[PARTS[0]], params[PARTS[1]]


def _reconstruct(
    encode: Encode, decode: Decode, params: PyTree, key: Key, batch: Batch
) -> Reconstructed:
    """Encode a batch, draw latents, row by row, and decode them.

    Raises:
        TypeError: if the batch holds integers, or what a function returns no real numbers.
        ValueError: if a shape is wrong.
    """
    x0, numbers = noised.clean(batch)
    returned = encode(params, x0)
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise TypeError(f"`encode` must return (mean, std); got {checks.shown(returned)}.")
    mean, std = (_of_rows("encode", each, x0) for each in returned)
    if mean.shape != std.shape:
        raise ValueError(
            f"`encode` must return mean and std of one shape; got {mean.shape} and {std.shape}."
        )
    noise = numerics.normal(noised.by_row(rows.one_key(key), numbers), mean)
    x_hat = checks.output("decode", decode(params, mean + std * noise), x0, "x0")
    return Reconstructed(x0, x_hat, mean, std)


def _of_rows(name: str, value: Any, x0: Array) -> Array:
    """Return what a function gave, in float32 at least, if it has the rows of x0.

    Raises:
        TypeError: if it does not hold real numbers.
        ValueError: if it has other rows.
    """
    checks.real(f"{name}(...)", value)
    value = jnp.asarray(value)
    if value.shape[:1] != x0.shape[:1] or value.size == 0:
        raise ValueError(
            f"`{name}` must return arrays of the {x0.shape[0]} rows of x0; got {value.shape}."
        )
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _logits(discriminate: Discriminate, params: PyTree, x: Array) -> Array:
    return _of_rows("discriminate", discriminate(params, x), x).astype(x.dtype)


def _feature_distance(features: Features, x0: Array, x_hat: Array) -> Array:
    """Return the mean over feature maps of the mean squared difference of directions, (B,).

    Raises:
        TypeError: if there are no maps of real numbers.
        ValueError: if one has no channels or the rows are others.
    """
    maps = [features(x) for x in (x0, x_hat)]
    if not isinstance(maps[0], tuple | list) or not maps[0]:
        raise TypeError(f"`features` must return a list of maps; got {checks.shown(maps[0])}.")
    distances = []
    for wanted, found in zip(*maps, strict=True):
        ours, theirs = (_direction(_of_rows("features", each, x0)) for each in (found, wanted))
        distances.append(noised.row_mean((ours - theirs) ** 2))
    return jnp.mean(jnp.stack(distances), axis=0)


def _direction(f: Array) -> Array:
    """Return f (B, ..., C) over its norm over C, and 0 where f is 0."""
    return f * jax.lax.rsqrt(jnp.sum(f**2, axis=-1, keepdims=True) + 1e-10)
