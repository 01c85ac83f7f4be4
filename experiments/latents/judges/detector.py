"""A judge that has learned: a small network that finds objects in the cells of a grid.

The picture is cut into 8 x 8 cells. Each cell tells how much of an object's centre is its own: a
centre is shared among the four cells whose middles are around it, by bilinear weights. So the
shares of an object sum to 1 wherever it lies, and all are in the cell that has the most of it and
the eight cells around. That cell is where the object is read, if the nine hold more than a half;
they are then forgotten, so that none is counted twice.

    config = detector.Config()
    params = detector.train(config)
    reading = detector.read(params, images)

It is trained on all combinations of scenes: of what it never saw it would be no judge. Whatever it
is shown, it sees something in it: `templates` is a judge without this fault.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.latents.judges.reading import Reading, check_pictures, of_factors
from jaxdiff import checks, data, nn, training
from jaxdiff.data.scenes import BACKGROUNDS, COLOURS, MAX_OBJECTS, SHAPES, SIZES, Scenes
from jaxdiff.typing import Array, Batch, Key, PyTree

CELLS, PATCHES = 8, 16
"""A side: of the grid, and of the patches that the first layer sees."""
NUM_EXAMPLES, SEEDS = 2**18, 2**32
"""Of the scenes it is trained on: how many, and the first seed, past those of any others."""
READ_AT_ONCE = 128
RARE = 4.0
"""By which a cell's logit of a centre is lower: one of 64 has it."""
ROUNDS = 12
"""How many objects are looked for."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How a detector is trained.

    Attributes:
        seed: of its parameters and its scenes.
        size: S, the side of the pictures; a multiple of 16.
        num_steps: of training.
        batch_size: scenes a step.
        learning_rate: of the first steps; it falls to 0 along a line.
        shares: of the three kinds of scenes.
    """

    seed: int = 0
    size: int = 32
    num_steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 5e-3
    shares: tuple[float, float, float] = (0.35, 0.4, 0.25)


class Seen(NamedTuple):
    """What the network makes of B pictures: logits, and offsets.

    Attributes:
        share: of a centre, (B, 8, 8).
        shape: of the object there, (B, 8, 8, number of shapes).
        colour: likewise.
        size: likewise.
        offset: of its centre from the cell's middle in cells, (B, 8, 8, 2), row and column.
        background: of the picture, (B, number of backgrounds).
    """

    share: Array
    shape: Array
    colour: Array
    size: Array
    offset: Array
    background: Array


SPLITS = np.cumsum([1, len(SHAPES), len(COLOURS), len(SIZES)])
"""Where the fields of a cell end, the last but the offset."""


class Detector(nnx.Module):
    """Convolutions at 16 x 16 patches, then at 8 x 8 cells, each of which sees its neighbours.

    Args:
        patch: pixels a side of a patch.
        widths: channels of the patches and of the cells.
        num_blocks: residual convolutions of the cells.
        rngs: of the parameters.
    """

    def __init__(
        self, patch: int, *, widths: tuple[int, int] = (24, 48), num_blocks: int = 2, rngs: nnx.Rngs
    ) -> None:
        fine, coarse = widths
        self.num_blocks = num_blocks
        self.patches = nnx.Conv(3 * patch**2, fine, (3, 3), rngs=rngs)
        self.norm_patches = nnx.RMSNorm(fine, rngs=rngs)
        self.cells = nnx.Conv(4 * fine, coarse, (3, 3), rngs=rngs)
        for i in range(num_blocks):
            setattr(self, f"norm_{i:02d}", nnx.RMSNorm(coarse, rngs=rngs))
            setattr(self, f"block_{i:02d}", nnx.Conv(coarse, coarse, (3, 3), rngs=rngs))
        self.norm = nnx.RMSNorm(coarse, rngs=rngs)
        self.cell = nnx.Linear(coarse, int(SPLITS[-1]) + 2, rngs=rngs)
        self.background = nnx.Linear(coarse, len(BACKGROUNDS), rngs=rngs)

    def __call__(self, images: Array) -> Seen:
        """Map uint8 (B, S, S, 3) to what is seen."""
        x = images.astype(jnp.float32) / 127.5 - 1.0
        h = self.patches(patched(x, x.shape[1] // PATCHES))
        h = jax.nn.relu(self.norm_patches(h))
        h = self.cells(patched(h, PATCHES // CELLS))
        for i in range(self.num_blocks):
            inner = jax.nn.relu(getattr(self, f"norm_{i:02d}")(h))
            h = h + getattr(self, f"block_{i:02d}")(inner)
        h = jax.nn.relu(self.norm(h))
        share, shape, colour, size, offset = jnp.split(self.cell(h), SPLITS, axis=-1)
        background = self.background(h.mean((1, 2)))
        return Seen(share[..., 0] - RARE, shape, colour, size, offset, background)


def patched(x: Array, side: int) -> Array:
    """Make channels of patches: (B, H, W, C) -> (B, H / side, W / side, side^2 C)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.swapaxes(2, 3).reshape(batch, height // side, width // side, -1)


class Labelled:
    """Scenes with what is in them, as records: "image", and the fields of their `Reading`."""

    def __init__(self, scenes: Scenes) -> None:
        self._scenes, self.title = scenes, scenes.title

    def __len__(self) -> int:
        return len(self._scenes)

    def rows(self, indices: np.ndarray) -> dict[str, Any]:
        """Return scenes `indices` (B,)."""
        labels = of_factors(self._scenes.factors(indices))._asdict()
        return self._scenes.rows(indices) | labels


def init_params(config: Config) -> PyTree:
    """Return the parameters before training: a nest of dicts of arrays.

    Raises:
        ValueError: if the size is no multiple of 16.
    """
    return nn.functional(_module(config.size, config.seed))[0]


def make_update(config: Config) -> training.GradientUpdate:
    """Make the update of `training.fit`, whose metrics are the parts of the loss.

    It keeps no average but the parameters themselves.

    Raises:
        TypeError: if `num_steps` is no whole number.
        ValueError: if it is below 1.
    """

    def loss_fn(params: PyTree, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        seen = _network(batch["image"].shape[1])(params, batch["image"])
        parts = losses(seen, batch)
        return jnp.stack(list(parts.values())).sum(0), parts

    num_steps = checks.count("num_steps", config.num_steps)
    peak, rise = config.learning_rate, min(50, num_steps // 2)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, rise),
            optax.linear_schedule(peak, 0.0, num_steps - rise),
        ],
        [rise],
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    return training.make_update(loss_fn, optimizer, ema_decay=0.0)


def batches_from(config: Config, step: int = 0) -> Iterator[Batch]:
    """Return the labelled scenes of each step from `step` on, drawn ahead by threads."""
    scenes = Scenes(NUM_EXAMPLES, SEEDS + config.seed, config.size, config.shares, "all")
    return data.batches(Labelled(scenes), config.batch_size, seed=config.seed, start_step=step)


def train(seed: int, size: int = 32, num_steps: int = Config.num_steps) -> PyTree:
    """Train a detector: about a minute of one core.

    Args:
        seed: of its parameters and its scenes.
        size: S, the side of the pictures; a multiple of 16.
        num_steps: of training.

    Returns:
        Its parameters: a nest of dicts of arrays.

    Raises:
        TypeError: as :func:`make_update`.
        ValueError: likewise, or if the size is no multiple of 16.
    """
    config = Config(seed, size, num_steps)
    update, key = make_update(config), jax.random.key(seed)
    state, step = update.init(init_params(config)), training.parallel.jit(update)
    for batch in itertools.islice(batches_from(config), num_steps):
        state, _ = step(state, key, batch)
    return state.params


def read(params: PyTree, images: np.ndarray) -> Reading:
    """Read pictures, 128 at once.

    Args:
        params: of a detector of their size.
        images: uint8 (B, S, S, 3).

    Returns:
        What they show.

    Raises:
        ValueError: if they are no such pictures, or S is no multiple of 16.
    """
    check_pictures(images)
    parts = []
    for first in range(0, len(images), READ_AT_ONCE):
        some = images[first : first + READ_AT_ONCE]
        missing = READ_AT_ONCE - len(some)
        seen = _read(params, np.pad(some, ((0, missing), (0, 0), (0, 0), (0, 0))))
        parts.append({name: np.asarray(field)[: len(some)] for name, field in seen.items()})
    return Reading(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


@jax.jit
def _read(params: PyTree, images: Array) -> dict[str, Array]:
    return decoded(_network(images.shape[1])(params, images))


def decoded(seen: Seen) -> dict[str, Array]:
    """Return the fields of the `Reading` of B pictures, by what the cells tell."""
    cell, mass = found(jax.nn.sigmoid(seen.share))
    cell = cell[:, :MAX_OBJECTS]

    def at_cells(field: Array) -> Array:
        """Map (B, 8, 8, D) to (B, 4, D)."""
        return jnp.take_along_axis(field.reshape(len(field), CELLS**2, -1), cell[..., None], 1)

    middle = jnp.stack(jnp.divmod(cell, CELLS), -1) + 0.5
    return {
        "num_objects": (mass > 0.5).sum(1),
        "shape": at_cells(seen.shape).argmax(-1),
        "colour": at_cells(seen.colour).argmax(-1),
        "centre": (middle + at_cells(seen.offset)) / CELLS,
        "size": at_cells(seen.size).argmax(-1),
        "background": seen.background.argmax(-1),
    }


def found(share: Array) -> tuple[Array, Array]:
    """Find objects in a grid, each once.

    Args:
        share: of an object's centre, (B, 8, 8).

    Returns:
        (cell, mass), (B, 12) each: the number of the cell, 8 row + column, and how much of a
        centre it and those around it hold; by falling mass. Those above a half are objects.
    """
    line = jnp.arange(CELLS)[None]

    def next_one(left: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        cell = left.reshape(len(left), -1).argmax(1)
        row, column = (abs(line - at[:, None]) <= 1 for at in jnp.divmod(cell, CELLS))
        around = row[:, :, None] & column[:, None, :]
        return jnp.where(around, 0.0, left), (cell, jnp.where(around, left, 0.0).sum((1, 2)))

    _, (cell, mass) = jax.lax.scan(next_one, share, length=ROUNDS)
    order = jnp.argsort(-mass, 0)
    return jnp.take_along_axis(cell, order, 0).T, jnp.take_along_axis(mass, order, 0).T


def losses(seen: Seen, batch: Batch) -> dict[str, Array]:
    """Return the parts of the loss, (B,) each.

    What is said of objects is wanted of each cell by its share of them.

    Args:
        seen: of B pictures.
        batch: the fields of their `Reading`.
    """
    there = jnp.arange(MAX_OBJECTS)[None] < batch["num_objects"][:, None]
    at = jnp.clip(batch["centre"].astype(jnp.float32) * CELLS - 0.5, 0.0, CELLS - 1.0)
    off = at[:, :, None] - jnp.arange(CELLS, dtype=jnp.float32)[None, None, :, None]  # (B, 4, 8, 2)
    row, column = jnp.moveaxis(jnp.maximum(1.0 - abs(off), 0.0), -1, 0)
    share = row[..., None] * column[..., None, :] * there[..., None, None]  # (B, 4, 8, 8)
    each = share / there.sum(1)[:, None, None, None]  # one object weighs as several alike

    def classes(logits: Array, label: Array) -> Array:
        one_hot = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)
        wanted = jnp.einsum("bkij,bkc->bijc", each, one_hot)
        return optax.softmax_cross_entropy(logits, wanted).sum((1, 2))

    down = (seen.offset[:, None, :, :, 0] - off[..., 0][..., None]) ** 2
    right = (seen.offset[:, None, :, :, 1] - off[..., 1][..., None, :]) ** 2
    return {
        "share": optax.sigmoid_binary_cross_entropy(seen.share, share.sum(1)).sum((1, 2)),
        "shape": classes(seen.shape, batch["shape"]),
        "colour": classes(seen.colour, batch["colour"]),
        "size": classes(seen.size, batch["size"]),
        "offset": (each * (down + right)).sum((1, 2, 3)),
        "background": optax.softmax_cross_entropy_with_integer_labels(
            seen.background, batch["background"]
        ),
    }


def _network(size: int) -> Any:
    return nn.functional(nnx.eval_shape(lambda: _module(size, 0)))[1]


def _module(size: int, seed: int) -> Detector:
    if size % PATCHES or size < PATCHES:
        raise ValueError(f"`size` must be a multiple of {PATCHES}; got {size}.")
    return Detector(size // PATCHES, rngs=nnx.Rngs(seed))
