"""Ablations of a text-to-image model: do its pictures of scenes show what their prompts say?

Each run is the denoiser of experiments.latents. What it is trained on is made once, in memory: an
autoencoder, a tokenizer, and latents and captions of as many scenes of each kind. Which kinds a
run sees, and how often, are its batches': so mixtures are compared on the same latents.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablations import sampling
from experiments.ablations.fields import replaced
from experiments.ablations.world import SEED, Measure, Shared, World, member_of
from experiments.ablations.world import Member as MemberOf
from experiments.common import options
from experiments.common.command import Refusal
from experiments.common.methods import MethodName
from experiments.common.options import Count, LogSnr, Role, Share, Within
from experiments.latents import autoencoder as autoencoders
from experiments.latents import coding, denoiser, encoding, obedience, sources
from experiments.latents.drawing import Coded
from experiments.latents.encoding import Encoding, Store
from experiments.latents.judges import obeyed, templates
from jaxdiff import data, denoisers, guidance
from jaxdiff.data import stored
from jaxdiff.data.scenes import KINDS, Scenes
from jaxdiff.typing import Array, Batch, Denoiser, LossFn, PyTree

GOLDEN = 0.5 * (5.0**0.5 - 1.0)
"""Multiples of it, less their whole parts, fill the unit interval evenly, however many they are."""
_ALONE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
"""Shares of scenes that are all of one kind."""
_CAPTIONS = 2000
"""Captions of each kind that the tokenizer is learned from, however many scenes there are."""
_UNET_LACKS = ("patch_size", "mlp_ratio", "text_attention", "query_key_norm", "activation")


@dataclasses.dataclass(frozen=True)
class Config(denoiser.Config, sampling.Swept):
    """A denoiser of experiments.latents, with more to vary."""

    more_ema_decays: tuple[Share, ...] = ()
    """Decays of further averages to keep."""
    log_snr_low: LogSnr = -10.0
    """Log-SNR of the noisiest times at which a network that predicts noise is asked."""
    scene_shares: tuple[Share, Share, Share] = autoencoders.MIXED
    """Of scenes of one object, of two in a relation, and of several alike, in each batch."""
    num_scenes: Annotated[int, Within(32)] = 20_000
    """Scenes of each kind that there are to train on."""
    autoencoder_steps: Count = 3000
    """Updates of the autoencoder, on scenes of all kinds alike."""
    sampler: Annotated[MethodName, Role.SAMPLING] = "euler"
    """Method that draws the pictures."""
    sample_steps: Annotated[Count, Role.SAMPLING] = 25
    """Its steps."""
    guidance_scale: Annotated[float, Role.SAMPLING] = 2.0
    """Classifier-free guidance; 1 is the conditional model."""
    num_prompts: Count = 256
    """Prompts of each kind, seen and held out."""


Member = MemberOf[Config]


def check(config: Config) -> None:
    """Refuse a config that cannot be meant."""
    denoiser.check(config)
    sampling.check(config)
    denoiser.check_scale(config, config.guidance_scale)
    if config.space != "latents":
        raise Refusal(f"--space must be latents here; got {config.space}.")
    with options.naming(Config, shares="--scene-shares"):
        Scenes(1, shares=config.scene_shares)


def unread(config: Config) -> dict[str, str]:
    """Return why a run does not read a field, by field; see `World`."""
    found = sampling.unread(config)
    if config.optimizer != "muon":
        found["muon_learning_rate"] = f"optimizer {config.optimizer} has no rate of Muon"
    if config.network == "unet":
        found |= {name: f"network unet has no {name}" for name in _UNET_LACKS}
    found["num_prompts"] = "no measure asked for is of samples"
    return found


# --- What is trained on -----------------------------------------------------------------------


def scenes_of(kind: int, num: int) -> Scenes:
    """Return scenes to train on that are all of a kind; other kinds' are of another seed."""
    config = autoencoders.Config(seed=kind)
    return sources.scenes_of(config, "train", num=num, shares=_ALONE[kind])


@functools.cache
def learn_text() -> encoding.Text:
    """Learn the tokenizer, once."""
    every = range(len(KINDS))
    captions = [scenes_of(kind, _CAPTIONS).captions(np.arange(_CAPTIONS)) for kind in every]
    return encoding.learn([caption for each in captions for caption in each], Encoding())


@functools.cache
def load(num_scenes: int, autoencoder_steps: int) -> Coded:
    """Train the autoencoder and encode so many scenes of each kind, one kind after another, once.

    The autoencoder is that of the preset relations, whatever a run's own seed and shares.
    """
    config = replaced(autoencoders.PRESETS["relations"], {"num_steps": autoencoder_steps})
    kinds = [sources.in_memory(scenes_of(kind, num_scenes)) for kind in range(len(KINDS))]
    rows, text = np.arange(num_scenes), learn_text()
    levels = np.concatenate([pictures.rows(rows)["image"] for pictures in kinds])
    captions = [caption for pictures in kinds for caption in pictures.captions(rows)]
    built = autoencoders.build(config, levels.shape[1:])
    params = train_autoencoder(config, built, levels)
    encode, _ = coding.make_coders(built)
    mean, deviation = encode(params, levels)
    made = {"mean": mean, "deviation": deviation, "text": text.encode(captions)}
    scale, shift = encoding.scale_and_shift(mean, deviation)
    shapes = built.latent_shape, built.shape
    by, records = stored.fingerprint(params), data.from_arrays(made)
    return Coded(
        config, built, params, Store(records, by, scale, shift, text.record, *shapes), text
    )


def train_autoencoder(
    config: autoencoders.Config, built: autoencoders.Autoencoder, levels: np.ndarray
) -> PyTree:
    """Train an autoencoder of pictures, uint8 (N, H, W, C); return its averaged parameters."""
    records = data.from_arrays({"image": levels})
    trained = autoencoders.build_training(config, built, records)
    state, key = trained.update.init(trained.init_params()), jax.random.key(config.seed)
    update = jax.jit(trained.update, donate_argnums=0)
    batches = data.batches(records, config.batch_size, seed=config.seed)
    for _ in range(config.num_steps):
        state, _ = update(state, key, next(batches))
    return jax.tree.map(np.asarray, autoencoders.averaged(config, state))


def chosen(config: Config) -> np.ndarray:
    """Return which scenes each batch holds, (steps, B), numbered as :func:`load` has them.

    Every stretch of the stream has the kinds by their shares, to within a scene or two. Of each
    kind, scenes come in the order of :func:`jaxdiff.data.batch_indices`, epoch by epoch.
    """
    num, count = config.num_scenes, config.num_steps * config.batch_size
    ends = np.cumsum(config.scene_shares)[:-1]
    kind = np.searchsorted(ends, np.arange(count) * GOLDEN % 1.0, side="right")
    rows = np.empty(count, np.int32)
    for i in range(len(KINDS)):
        (places,) = np.nonzero(kind == i)
        epochs = range(-(-len(places) // num))
        order = [data.batch_indices(num, num, config.seed, epoch) for epoch in epochs]
        rows[places] = i * num + np.concatenate([*order, np.empty(0, np.int64)])[: len(places)]
    return rows.reshape(config.num_steps, config.batch_size)


# --- The problem ------------------------------------------------------------------------------


class ToldProblem:
    """What the members of a group share; a `Problem`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.coded = load(config.num_scenes, config.autoencoder_steps)
        records = self.coded.store.records
        self._rows = jax.tree.map(jnp.asarray, records.rows(np.arange(len(records))))
        asked = replaced(self.coded.config, {"scene_shares": (0.5, 0.5, 0.0)})
        self.cells = {cell.name: cell for cell in obedience.cells(asked, config.num_prompts)}
        self._judged: dict[str, Mapping[str, float]] = {}

    def build(self, member: Member) -> denoiser.Recipe:
        """Make a member's network and process."""
        store, text = self.coded.store, self.coded.text
        process = sampling.make_process(member)
        return denoiser.build(member.config, store, text, member.key, process)

    def init_params(self, member: Member) -> PyTree:
        """Return a member's initial parameters."""
        return self.build(member).init_params()

    def loss(self, member: Member) -> LossFn:
        """Return a member's loss."""
        return denoiser.build_loss(member.config, self.build(member), self.coded.store)

    def table(self, config: Config) -> dict[str, Any]:
        """Return which scenes each batch holds, (steps, B), and all of them."""
        return {"chosen": chosen(config), "all": Shared(self._rows)}

    def batch(self, member: Member, table: dict[str, Any], step: Array) -> Batch:
        """Return the batch of a step."""
        rows = table["chosen"][step]
        batch: Batch = jax.tree.map(lambda leaf: leaf[rows], table["all"].arrays)
        return batch

    def draw(self, member: Member, params: PyTree) -> Array:
        """Return levels, uint8 (N, H, W, C), of the prompts of all cells, one after another.

        They are drawn a cell at a time, which bounds the memory.
        """
        config, coded, recipe = member.config, self.coded, self.build(member)
        given = [denoiser.told(coded.text, cell.captions) for cell in self.cells.values()]
        keys = jax.random.split(jax.random.fold_in(member.key, 2), len(given))
        shape = (config.num_prompts, *recipe.shape)

        def of_cell(args: tuple[Any, PyTree]) -> Array:
            key, cond = args
            denoise = guided(config, recipe, params, cond)
            z = sampling.draw(config, recipe.process, denoise, key, shape)
            z = z / coded.store.scale + coded.store.shift
            return coded.autoencoder.levels(coded.params, z)

        stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *given)
        levels = jax.lax.map(of_cell, (keys, stacked))
        return levels.reshape(-1, *levels.shape[2:])

    def calls(self, config: Config) -> int:
        """Return the evaluations of the network that a sample takes."""
        return sampling.calls(config) * (1 + (config.guidance_scale != 1.0))

    def call_flops(self) -> float | None:
        """Return the operations of one evaluation for one sample, None where unknown."""
        recipe = self.build(member_of(self.config, {SEED: np.uint32(self.config.seed)}))
        cond = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (64, *leaf.shape)), recipe.null)
        return sampling.call_flops(recipe, (64, *recipe.shape), cond)

    def judged(self, name: str, samples: np.ndarray) -> Mapping[str, float]:
        """Return the shares of samples (N, H, W, C) that obey the prompts of a cell, by factor.

        Templates read them, which learn nothing; several measures are of one reading.
        """
        first = [*self.cells].index(name) * self.config.num_prompts
        pictures = samples[first : first + self.config.num_prompts]
        which = f"{name} {stored.fingerprint(pictures)}"
        if which not in self._judged:
            found = obeyed(templates.read(pictures), self.cells[name].factors)
            self._judged[which] = {factor: float(x.mean()) for factor, x in found.items()}
        return self._judged[which]


def guided(config: Config, recipe: denoiser.Recipe, params: PyTree, cond: PyTree) -> Denoiser:
    """Return the denoiser of pictures of these prompts, guided as the config says."""
    plain = recipe.model.denoiser(params)
    if config.guidance_scale == 1.0:
        return denoisers.conditioned(plain, cond)
    return guidance.classifier_free_batched(plain, cond, recipe.null, config.guidance_scale)


# --- Measures ---------------------------------------------------------------------------------


def obedient(label: str, cell: str, factor: str = "all") -> Measure:
    """Make the measure of how many pictures of a cell's prompts obey them in a factor."""

    def share(problem: ToldProblem, config: Config, seed: int, samples: np.ndarray) -> float:
        return problem.judged(cell, samples)[factor]

    reads = frozenset(("num_prompts",))
    return Measure(label, of_samples=share, higher_is_better=True, reads=reads)


_TWO, _UNSEEN = "two_objects_seen", "of a colour never seen with its shape"
MEASURES = {
    "obeyed_two": obedient("two objects, all as asked", _TWO),
    "obeyed_two_held_out": obedient(f"two objects, one {_UNSEEN}", "two_objects_held_out"),
    "obeyed_two_order": obedient(
        "two objects, in an order never seen", "two_objects_held_out_order"
    ),
    "bound_relation": obedient("two objects, related as asked", _TWO, "relation"),
    "bound_colours": obedient("two objects, of the colours asked for", _TWO, "colours"),
    "bound_shapes": obedient("two objects, of the shapes asked for", _TWO, "shapes"),
    "obeyed_one": obedient("one object, all as asked", "seen"),
    "obeyed_one_held_out": obedient(f"one object, {_UNSEEN}", "held_out"),
}
NOTES = {
    "loss": "latents are trained by denoising alone: vary `prediction`, `weighting`, `times`.",
    "data": "the pictures are scenes: vary `scene_shares`, `num_scenes`.",
    "num_samples": "a sample is of a prompt: vary `num_prompts`.",
    "sample_grid": "times of samples are equal steps of t: vary `sample_steps`.",
}
WORLD = World(Config, MEASURES, check, ToldProblem, unread, sampling.meant, NOTES)
