"""The likelihood of images under published weights: of their latents, or of their pixels."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import flows
from experiments.common.command import Refusal
from experiments.common.options import Count, CountOrNone, Seed, Within
from experiments.images import judging
from experiments.pretrained import conditioning
from experiments.pretrained.weights import factor, from_levels, num_channels
from jaxdiff import data, likelihood, numerics
from jaxdiff.pretrained import Autoencoder, Denoising
from jaxdiff.processes import Process
from jaxdiff.training import parallel
from jaxdiff.typing import Array, Key, PyTree

REMEDY = "give a larger --tolerance"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a likelihood is taken."""

    latents: Literal["mean", "sample"] = "mean"
    """Of a latent model: the mean of the autoencoder's posterior, or one draw from it."""
    num_probes: Count = 1
    """Random probes of the divergence, an image."""
    exact: bool = False
    """Take the exact divergence, as many tangents an evaluation as there are numbers."""
    tolerance: Annotated[float, Within(1e-12, 1.0)] = 1e-3
    """Relative and absolute tolerance of the ODE; rounding sets in at about 1e-6 in float32."""
    t_min: Annotated[float | None, Within(0.0)] = None
    """Where the flow begins; by default the cleanest time that the network was trained at."""
    batch_size: CountOrNone = None
    """Images that a device solves for at once; as many as have 131,072 numbers unless given."""
    seed: Seed = 0
    """Of dequantisation, draws of latents and probes."""


class Found(NamedTuple):
    """What was found.

    Attributes:
        values: of each image (N,), in units of `unit`.
        unit: bits_per_dim of pixels, or nats_per_latent_dim.
        num_dims: D.
        said: how, as JSON holds it.
    """

    values: np.ndarray
    unit: str
    num_dims: int
    said: dict[str, Any]


def measure(
    loaded: Denoising,
    images: data.Images,
    rows: Sequence[Any],
    protocol: Protocol,
    devices: Sequence[jax.Device] | None = None,
) -> Found:
    """Take the likelihood of all images, each given its own prompt or label.

    Args:
        loaded: the network and what lies beside it.
        images: of a size that it takes.
        rows: their prompts or labels, N; of any content where it takes none.
        protocol: how.
        devices: by default all of this process.

    Raises:
        Refusal: if the network does not take such images, or the flow does not begin in its range.
        flows.Unsolved: where the solver does not come to an end.
    """
    process = flows.until_start(loaded.model.process, loaded.model.prediction)
    t_min = _start(loaded, process, protocol)
    key_x, key_probes = jax.random.split(jax.random.key(protocol.seed))
    encoder, levels = loaded.autoencoder, _colours(loaded, images)
    height, width = levels.shape[1:3]
    cond = given_to(loaded, rows, (height, width))
    num_dims = _size(loaded, levels, cond)
    at_once = protocol.batch_size
    if at_once is None:
        at_once = 16 if protocol.exact else max(judging.CHUNK_NUMBERS // num_dims, 1)
    if encoder is None:
        x = judging.dequantized(key_x, levels, images).astype(jnp.result_type(float))
    else:
        x = encoded(encoder, key_x, levels, protocol.latents, at_once, devices)

    def of_rows(params: PyTree, keys: Key, x: Array, cond: PyTree) -> Array:
        log_prob, _ = likelihood.log_prob(
            process,
            loaded.model.denoiser(params),
            x,
            cond=cond,
            key=None if protocol.exact else keys,
            num_probes=None if protocol.exact else protocol.num_probes,
            rtol=protocol.tolerance,
            atol=protocol.tolerance,
            t_min=t_min,
        )
        return log_prob

    count = at_once * (1 if devices is None else len(devices))
    solve = flows.solve_by_row(of_rows, count, devices=devices, remedy=REMEDY)
    log_prob = solve(loaded.params, numerics.row_keys(key_probes, len(x)), x, cond)
    if encoder is None:
        bits = likelihood.bits_per_dim(jnp.asarray(log_prob), num_dims, images.bin_width)
        values, unit = np.asarray(bits), "bits_per_dim"
    else:
        values, unit = -log_prob / num_dims, "nats_per_latent_dim"
    return Found(values, unit, num_dims, _said(loaded, process, t_min, protocol))


def encoded(
    encoder: Autoencoder,
    key: Key,
    levels: np.ndarray,
    latents: str,
    at_once: int,
    devices: Sequence[jax.Device] | None = None,
) -> np.ndarray:
    """Return the latents (N, h, w, c) of levels (N, H, W, C) of 256, as the network sees them.

    Args:
        encoder: of images in [-1, 1].
        key: of draws, image i having the i-th of its row keys.
        levels: uint8.
        latents: the posterior's "mean", or one "sample".
        at_once: how many images are encoded in one call.
        devices: by default all of this process.
    """

    def of_rows(params: PyTree, keys: Key, x: Array) -> Array:
        mean, std = encoder.encode(params, x)
        return mean if latents == "mean" else mean + std * numerics.normal(keys, mean)

    spread = parallel.map_rows(of_rows, devices=devices)
    keys, float_type = numerics.row_keys(key, len(levels)), jnp.result_type(float)
    parts = [
        spread(encoder.params, keys[chosen], from_levels(levels[chosen]).astype(float_type))
        for chosen in flows.chunks(np.arange(len(levels)), at_once)
    ]
    return np.concatenate(parts)[: len(levels)]


def given_to(loaded: Denoising, rows: Sequence[Any], size: tuple[int, int]) -> PyTree:
    """Return what the network is given for images of a size (H, W) and of N prompts or labels.

    None where it takes neither; see `conditioning.encoded`. Where zeros stand for no prompt, they
    do for the empty one.
    """
    if loaded.text is None:
        return None if conditioning.taken(loaded) == "nothing" else np.asarray(rows, np.int32)
    prompts = sorted(set(rows))
    names = {f"The prompt {each!r}": each for each in prompts}
    chosen = [prompts.index(each) for each in rows]
    found = conditioning.encoded(loaded.text, names, size)
    if loaded.text.null_is_zero and "" in prompts:  # the first, as they are sorted
        zeros = conditioning.nothing(found)
        found = {name: np.concatenate([zeros[name][:1], found[name][1:]]) for name in found}
    return jax.tree.map(lambda leaf: leaf[chosen], found)


def _start(loaded: Denoising, process: Process, protocol: Protocol) -> Array:
    least = flows.cleanest(loaded.model.process)
    t_min = least if protocol.t_min is None else jnp.asarray(protocol.t_min, float)
    if not 0.0 < float(t_min) < float(process.t_max):
        raise Refusal(
            f"--t-min must lie between 0 and {float(process.t_max):g}, where the flow ends; got "
            f"{float(t_min):g}. Left out it is {float(least):g}."
        )
    return t_min


def _colours(loaded: Denoising, images: data.Images) -> np.ndarray:
    """Return all levels, grey ones threefold for a network of colours."""
    encoder, levels = loaded.autoencoder, images.levels
    wanted = num_channels(loaded) if encoder is None else encoder.config.get("in_channels", 3)
    if levels.shape[3] == 1 and wanted == 3:
        return np.repeat(levels, 3, axis=3)
    if levels.shape[3] != wanted:
        raise Refusal(
            f"--images must have {wanted} channels for these weights; got {levels.shape[3]}."
        )
    return levels


def _size(loaded: Denoising, levels: np.ndarray, cond: PyTree) -> int:
    """Return D, the numbers that the network sees of an image, or refuse the images' size."""
    height, width = levels.shape[1:3]
    by = factor(loaded)
    shape = height // by, width // by, num_channels(loaded)
    try:
        if height % by or width % by:
            raise ValueError(f"their sides must be multiples of {by}.")
        jax.eval_shape(
            loaded.model.apply,
            loaded.params,
            jax.ShapeDtypeStruct((1, *shape), jnp.result_type(float)),
            jax.ShapeDtypeStruct((), jnp.result_type(float)),
            jax.tree.map(lambda leaf: leaf[:1], cond),
        )
    except (TypeError, ValueError) as error:
        raise Refusal(f"--images of {height} x {width} do not fit the network: {error}") from error
    return math.prod(shape)


def _said(loaded: Denoising, process: Process, t_min: Array, protocol: Protocol) -> dict[str, Any]:
    """Say how the numbers were found, in what is the same for all images."""
    noise = functools.partial(_level, process)
    latent = loaded.autoencoder is not None
    return {
        "density": "of the probability flow of the network as it is: without guidance, x0_hat not "
        "clipped; given the prompt or the label where the network takes one",
        "of": (
            f"latents, the {protocol.latents} of the autoencoder's posterior, in the scale that "
            "the network sees; no statement about bits of pixels"
            if latent
            else "pixels in [-1, 1], dequantised uniformly once: in expectation an upper bound on "
            "the bits of the discrete model"
        ),
        "process": type(loaded.model.process).__name__,
        "prediction": loaded.model.prediction,
        "t_min": float(t_min),
        "noise_left": noise(t_min),
        "t_max": float(process.t_max),
        "noise_at_end": noise(jnp.asarray(process.t_max, float)),
        "divergence": "exact" if protocol.exact else f"{protocol.num_probes} Rademacher probes",
        "solver": "Tsit5, each image with its own steps",
        "tolerance": protocol.tolerance,
        "seed": protocol.seed,
    }


def _level(process: Process, t: Array) -> float | None:
    """Return sigma / alpha; None where it is infinite, which JSON does not hold."""
    level = float(jnp.exp(-0.5 * process.log_snr(t)))
    return level if math.isfinite(level) else None
