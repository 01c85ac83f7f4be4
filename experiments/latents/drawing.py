"""Pictures of a trained model: picture i is a function of (parameters, key, i, prompt i)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.averages import NO_CHOICE, Average
from experiments.common.guiding import Form
from experiments.common.methods import METHODS, make_grid
from experiments.latents import autoencoder as autoencoders
from experiments.latents import coding, encoding
from experiments.latents import denoiser as denoisers_stage
from experiments.latents.autoencoder import Autoencoder
from experiments.latents.denoiser import Recipe
from experiments.latents.encoding import Store, Text
from experiments.pretrained.conditioning import Guided
from jaxdiff import data, denoisers, files, generation
from jaxdiff.pretrained import Denoising
from jaxdiff.samplers import Sampler
from jaxdiff.typing import Array, Key, PyTree

UNGUIDED = 1.0
SOME_SCALE = 2.0
"""Any other: a program takes the scale as an argument, but not whether there is one."""
AT_ONCE = 64
"""Pictures that a device draws in one call unless told otherwise."""


class Trained(NamedTuple):
    """All that a run has made, read back.

    Attributes:
        config: of the denoiser.
        recipe: its network and process.
        params: its parameters.
        store: what it was trained on.
        text: how prompts are given to it.
        autoencoder: what decodes.
        autoencoder_config: of it.
        decoder: its parameters.
        step: updates of the denoiser that were done.
        home: the folder of the run whose autoencoder and latents it has.
        identity: what names the run and the step.
    """

    config: denoisers_stage.Config
    recipe: Recipe
    params: PyTree
    store: Store
    text: Text
    autoencoder: Autoencoder
    autoencoder_config: autoencoders.Config
    decoder: PyTree
    step: int
    home: files.Path
    identity: dict[str, Any]


class Coded(NamedTuple):
    """An autoencoder that was trained, and what it made.

    Attributes:
        config: of the autoencoder.
        autoencoder: its functions.
        params: its parameters.
        store: the latents.
        text: how captions are given.
    """

    config: autoencoders.Config
    autoencoder: Autoencoder
    params: PyTree
    store: Store
    text: Text


def read_autoencoder(run_dir: str | files.Path) -> tuple[autoencoders.Config, Autoencoder, PyTree]:
    """Read back the autoencoder of a run.

    Raises:
        Refusal: if there is none.
    """
    config, restored, averages = autoencoders.STAGE.restore(run_dir)
    del restored
    record = autoencoders.STAGE.recorded(run_dir)
    built = autoencoders.build(config, tuple(record["shape"]))
    return config, built, autoencoders.own(config, averages)


def read_coded(run_dir: str | files.Path, text_weights: str | None = None) -> Coded:
    """Read back the autoencoder of a run and open its latents; refuse those of another.

    Raises:
        Refusal: if a stage is missing, or they do not belong together.
    """
    config, autoencoder, params = read_autoencoder(run_dir)
    folder = files.to_path(run_dir) / encoding.FOLDER
    remedy = f" Make them:\n  python -m experiments.latents encode --run-dir {run_dir}"
    store = encoding.read(folder, remedy)
    encoding.check_maker(store, params, folder)
    return Coded(config, autoencoder, params, store, encoding.of_record(store.text, text_weights))


def read(
    run_dir: str | files.Path, average: Average = NO_CHOICE, text_weights: str | None = None
) -> Trained:
    """Read back a run whose denoiser was trained.

    Raises:
        Refusal: if a stage is missing, or they do not belong together.
    """
    stage = denoisers_stage.STAGE
    config, restored, params = stage.restore(run_dir, average)
    home = stage.recorded(run_dir).get("latents_of") or run_dir
    coded = read_coded(home, text_weights)
    encoding.check_trained_on(coded.store, stage.recorded(run_dir), stage.at(run_dir))
    return Trained(
        config,
        denoisers_stage.build(config, coded.store, coded.text),
        params,
        coded.store,
        coded.text,
        coded.autoencoder,
        coded.config,
        coded.params,
        restored.step,
        files.to_path(home),
        {"run": stage.hash_of(restored.config), "step": restored.step},
    )


class Drawing(NamedTuple):
    """What draws pictures of prompts.

    Attributes:
        draw: (given, key, scale, first=0) -> levels, uint8 (N, H, W, C), of rows that `told` gave.
        path: likewise -> levels at each time from noise to data, (T + 1, N, H, W, C).
    """

    draw: Callable[..., np.ndarray]
    path: Callable[..., np.ndarray]


def make_drawing(
    trained: Trained,
    *,
    sampler: str,
    num_steps: int,
    form: Form | None = None,
    mixes: bool = False,
    at_once: int = AT_ONCE,
    devices: Sequence[jax.Device] | None = None,
) -> Drawing:
    """Return what draws pictures: two programs, with guidance and without, take any prompts.

    Args:
        trained: the run.
        sampler: its name.
        num_steps: from noise to data.
        form: of guidance; linear, everywhere, unless given.
        mixes: draw what :func:`between` gives.
        at_once: pictures that a device draws in one call; the last call is filled up.
        devices: by default all of this process.
    """
    recipe, form = trained.recipe, Form() if form is None else form
    model = Denoising(recipe.model, trained.params, None, None, {})
    method = METHODS[sampler]
    start = method.start(recipe.process, recipe.model.needs_signal)
    levels = make_levels(trained, devices)
    count = at_once * len(jax.local_devices() if devices is None else devices)

    def make_sampler(process: Any, denoise: Any, cond: PyTree = None) -> Sampler:
        return method.make(process, _mixing(denoise) if mixes else denoise, cond)

    @functools.cache
    def generator(is_guided: bool) -> generation.Generate:
        guided = Guided(model, form, SOME_SCALE if is_guided else UNGUIDED)
        return generation.make_generator(
            recipe.model,
            make_sampler,
            make_grid("uniform", recipe.process, num_steps, start),
            recipe.shape,
            denoiser_of=guided.denoiser,
            by_row=True,
            devices=devices,
            at_once=at_once,
        )

    def generate(given: PyTree, key: Key, scale: float, first: int, **options: Any) -> Any:
        shared = Guided(model, form, scale).shared(recipe.null)
        num = len(jax.tree.leaves(given)[0])
        chosen = np.minimum(
            np.arange(-(-num // count) * count), num - 1
        )  # so that one program does
        rows = jax.tree.map(lambda leaf: leaf[chosen], given)
        found = generator(scale != UNGUIDED)(shared, key, rows, first, **options)
        return (found[0][:num], found[1][:, :num]) if options else found[:num]

    def draw(given: PyTree, key: Key, scale: float, first: int = 0) -> np.ndarray:
        return levels(generate(given, key, scale, first))

    def path(given: PyTree, key: Key, scale: float, first: int = 0) -> np.ndarray:
        _, states = generate(given, key, scale, first, keep_path=True)
        times, rows = states.shape[:2]
        found = levels(states.reshape(times * rows, *states.shape[2:]))
        return found.reshape(times, rows, *found.shape[1:])

    return Drawing(draw, path)


def make_levels(
    trained: Trained, devices: Sequence[jax.Device] | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from what the denoiser makes to levels, uint8 (N, H, W, C)."""
    if trained.config.space == "pixels":
        to_levels = jax.jit(lambda x: data.to_levels(jnp.clip(x, -1.0, 1.0), 256))
        return lambda x0: np.asarray(to_levels(x0)).astype(np.uint8)
    _, decode = coding.make_coders(trained.autoencoder, devices)
    return lambda z: decode(trained.decoder, encoding.unscaled(trained.store, z))


def between(one: PyTree, other: PyTree, shares: np.ndarray) -> PyTree:
    """Return what is given for pictures between two prompts.

    Args:
        one: what is given for the first, (1, ...).
        other: for the second.
        shares: of the second in each picture's denoiser, (N,): their weighted mean, which is that
            of a product of powers of the two densities at each noise level.
    """

    def spread(leaf: np.ndarray) -> np.ndarray:
        return np.broadcast_to(leaf, (len(shares), *leaf.shape[1:]))

    parts = {"one": jax.tree.map(spread, one), "other": jax.tree.map(spread, other)}
    return {**parts, "share": shares.astype(np.float32)}


def _mixing(denoise: Any) -> Any:
    """Let a conditional denoiser take what :func:`between` gives."""

    def mixed(x_t: Array, t: Array, cond: PyTree = None) -> Array:
        share = cond["share"].reshape(-1, *[1] * (x_t.ndim - 1))
        one, other = (denoisers.conditioned(denoise, cond[k])(x_t, t) for k in ("one", "other"))
        return (1.0 - share) * one + share * other

    return mixed
