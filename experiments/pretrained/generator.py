"""Images of published weights: image i is a function of (weights, what is asked, seed, i)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.command import Refusal, refusing
from experiments.common.methods import METHODS
from experiments.pretrained.conditioning import Conditioning, Guided
from experiments.pretrained.editing import Edit
from experiments.pretrained.weights import factor, num_channels, to_levels
from jaxdiff import generation, samplers, timesteps
from jaxdiff.denoisers import conditioned
from jaxdiff.devices import map_rows
from jaxdiff.pretrained import Denoising
from jaxdiff.samplers import Sampler
from jaxdiff.typing import Array, Key, PyTree

Draw = Callable[[int, int], np.ndarray]
"""(first, last) -> the images of these numbers, uint8 (N, H, W, C)."""


def make_grid(loaded: Denoising, sampler: str, num_steps: int, strength: float = 1.0) -> Array:
    """Return the times of a sampler, those of the weights' own scheduler being shifted as it says.

    Args:
        loaded: the weights.
        sampler: its name.
        num_steps: from noise to data.
        strength: begin at this share of all time, in (0, 1], with that share of the steps.
    """
    process = loaded.model.process
    start = METHODS[sampler].start(process, loaded.model.needs_signal)
    if strength < 1.0:
        start = min(float(start), strength * float(process.t_max))
        num_steps = max(1, round(num_steps * strength))
    return timesteps.flow_shift(process, num_steps, loaded.shift, t_start=start)


def make_draw(
    guided: Guided,
    conditioning: Conditioning,
    key: Key,
    labels: np.ndarray,
    size: tuple[int, int],
    *,
    sampler: str,
    num_steps: int,
    edit: Edit | None = None,
    devices: Sequence[jax.Device] | None = None,
    at_once: int = 1,
) -> Draw:
    """Return a function that draws some of the images, spread over devices.

    Whatever the number of rows, the programs are compiled once: the last call is filled up.

    Args:
        guided: the denoiser.
        conditioning: what all images are of.
        key: of all noise.
        labels: of all images, (N,).
        size: (H, W).
        sampler: its name.
        num_steps: from noise to data.
        edit: what they begin from.
        devices: by default all of this process.
        at_once: images that a device draws in one call.

    Raises:
        Refusal: if the network does not take what it is given.
    """
    loaded, devices = guided.loaded, jax.local_devices() if devices is None else devices
    by = factor(loaded)
    shape = size[0] // by, size[1] // by, num_channels(loaded)
    shared = guided.shared(conditioning.null)
    strength = 1.0 if edit is None else edit.strength
    in_one_call = min(at_once * len(devices), len(labels))

    def rows(numbers: np.ndarray) -> PyTree:
        given = conditioning.rows(labels[numbers], None if edit is None else edit.beside)
        return {"given": given, **({} if edit is None else edit.rows(len(numbers)))}

    _check_taken(guided, shared, rows(np.zeros(1, int))["given"], shape)
    decode = make_decode(loaded, devices)
    generate = None
    if strength > 0.0:
        ts = make_grid(loaded, sampler, num_steps, strength)
        generate = generation.make_generator(
            loaded.model,
            _sampler_of(sampler, edit, float(ts[0])),
            ts,
            shape,
            denoiser_of=guided.denoiser,
            by_row=True,
            devices=devices,
            at_once=at_once,
        )

    def draw(first: int, last: int) -> np.ndarray:
        filled = math.ceil((last - first) / in_one_call) * in_one_call
        numbers = np.minimum(first + np.arange(filled), len(labels) - 1)
        parts = []
        for i in range(0, filled, in_one_call):
            cond = rows(numbers[i : i + in_one_call])
            if generate is None:
                x0 = cond["x0"]
            else:
                given: Any = cond if jax.tree.leaves(cond) else in_one_call
                x0 = generate(shared, key, given, first + i)
            parts.append(decode(x0))
        levels = np.concatenate(parts)[: last - first]
        return levels if edit is None else edit.pasted(levels)

    return draw


def make_decode(
    loaded: Denoising, devices: Sequence[jax.Device] | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from what the network makes to images, uint8 (N, H, W, C)."""
    encoder = loaded.autoencoder

    def levels(params: PyTree, x0: Array) -> Array:
        return to_levels(x0 if encoder is None else encoder.decode(params, x0))

    mapped, params = map_rows(levels, devices=devices), None if encoder is None else encoder.params
    return lambda x0: mapped(params, x0)


def _sampler_of(name: str, edit: Edit | None, t_start: float) -> Callable[..., Sampler]:
    """Return what makes the sampler, (process, denoise, cond=) of rows."""

    def make(process: Any, denoise: Any, cond: PyTree = None) -> Sampler:
        cond = {"given": None} if cond is None else cond
        sampler = METHODS[name].make(process, denoise, cond["given"])
        if edit is None:
            return sampler
        if edit.covers:
            sampler = samplers.sdedit(process, sampler, cond["x0"], t_start)
        if edit.known is None:
            return sampler
        return samplers.inpainting(process, sampler, cond["x0"], cond["known"], t_start)

    return make


def _check_taken(guided: Guided, shared: PyTree, given: PyTree, shape: tuple[int, ...]) -> None:
    """Refuse a network that does not take its conditioning or the size, before it is compiled."""

    def call(shared: PyTree, given: PyTree, x_t: Array) -> Array:
        t = jnp.asarray(guided.loaded.model.process.t_max / 2, x_t.dtype)
        return conditioned(guided.denoiser(shared), given)(x_t, t)

    x_t = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    with refusing(TypeError, ValueError, say="--weights: the network does not take this: "):
        found = jax.eval_shape(call, shared, given, x_t)
    if found.shape != x_t.shape:
        raise Refusal(f"--weights: the network makes {found.shape} of {x_t.shape}.")
