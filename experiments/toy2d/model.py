"""A model of a distribution in the plane, as a config says it: network, process, loss, batches."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.common import flows, options
from experiments.common.choices import PROCESSES, Kind, ProcessName
from experiments.common.command import Refusal
from experiments.common.methods import MethodName
from experiments.common.options import (
    Count,
    CountOrNone,
    LogSnr,
    Natural,
    NotNegative,
    Positive,
    Role,
    Seed,
    Share,
    Tolerance,
)
from experiments.common.targets import Target, TargetName, make_target
from jaxdiff import denoisers, losses, nn, timesteps
from jaxdiff.processes import Process
from jaxdiff.typing import Apply, Array, Batch, Denoiser, Key, LossFn, PyTree

LossName = Literal[
    "denoising",
    "explicit",
    "implicit",
    "sliced",
    "finite_difference",
    "flow_matching",
    "flow_matching_ot",
    "elbo",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is."""

    target: TargetName = "mixture"
    """Distribution to learn."""
    seed: Seed = 0
    """Of everything random: parameters, data, noise, evaluation."""
    loss: LossName = "denoising"
    """Loss; explicit needs a target whose score is known."""
    process: ProcessName = "cosine"
    """Forward process."""
    prediction: Kind = "v"
    """What the network predicts."""
    loss_on: Kind = "eps"
    """The quantity whose squared error is the loss; predictions are turned into it first."""
    log_snr_low: LogSnr = -8.0
    """Log-SNR of the noisiest training times."""
    log_snr_high: LogSnr = 11.0
    """Log-SNR of the cleanest training times, and of the data end of the likelihood."""
    width: Count = 64
    """Width of the network."""
    depth: Count = 3
    """Residual blocks of the network."""
    batch_size: Count = 512
    """Fresh draws an update."""
    num_steps: Count = 14_000
    """Updates in all; a larger number extends a run."""
    decay_steps: CountOrNone = None
    """Updates over which the learning rate decays; the first `num_steps` unless given."""
    learning_rate: Annotated[Positive, Role.NUMBER] = 1.5e-3
    """Peak learning rate of AdamW."""
    warmup_steps: Natural = 100
    """Updates over which the learning rate rises."""
    weight_decay: Annotated[NotNegative, Role.NUMBER] = 1e-4
    """Decoupled weight decay."""
    clip_norm: Annotated[Positive, Role.NUMBER] = 1.0
    """Gradients are scaled down to this global norm."""
    ema_decay: Annotated[Share, Role.NUMBER] = 0.9997
    """Decay of the moving average of the parameters, which samples and is judged."""
    eval_points: Count = 10_000
    """Fresh draws that the likelihood is taken of, and samples that are told from draws."""
    eval_tolerance: Tolerance = 1e-3
    """Relative and absolute tolerance of the likelihood's ODE."""
    sampler: Annotated[MethodName, Role.SAMPLING] = "heun"
    """Method that draws the samples."""
    sample_steps: Annotated[Count, Role.SAMPLING] = 50
    """Its steps."""
    grid_size: Count = 64
    """Points a side of the pictures of densities."""
    checkpoint_every: Count = 2000
    """Updates between checkpoints; the last is always saved."""
    log_every: Count = 100
    """Updates between logged ones."""


PRESETS = {
    "full": Config(),
    "smoke": Config(
        width=16,
        depth=1,
        batch_size=64,
        num_steps=20,
        warmup_steps=5,
        eval_points=200,
        eval_tolerance=1e-2,
        sample_steps=8,
        grid_size=12,
        checkpoint_every=10,
        log_every=5,
    ),
}


class Model(NamedTuple):
    """What a config means.

    Attributes:
        target: what is learned.
        process: the forward process.
        init_params: makes the initial parameters; may be traced.
        apply: the pure network, given times.
        prediction: what it predicts.
    """

    target: Target
    process: Process
    init_params: Callable[[], PyTree]
    apply: Apply
    prediction: str

    def denoiser(self, params: PyTree) -> Denoiser:
        """Return the denoiser of a network."""
        return denoisers.from_network(partial(self.apply, params), self.process, self.prediction)


def build_model(config: Config, process: Process | None = None, key: Key | None = None) -> Model:
    """Make target, process unless one is given, and network; refuse what they refuse.

    Initial parameters are those of the config's seed, unless a key is given.
    """

    def make() -> nnx.Module:
        rngs = nnx.Rngs(config.seed if key is None else key)
        return nn.MLP(2, width=config.width, depth=config.depth, rngs=rngs)

    with options.naming(Config):
        init_params, apply = nn.deferred(make)
    process = PROCESSES[config.process]() if process is None else process
    apply = nn.on_log_snr(apply, process.log_snr)
    return Model(make_target(config.target), process, init_params, apply, config.prediction)


def build_loss(config: Config, model: Model, times: timesteps.Draw | None = None) -> LossFn:
    """Make the loss that a config names; its times are uniform in log-SNR unless given."""
    if times is None:
        times = timesteps.draw_log_snr(config.log_snr_low, config.log_snr_high)
    args = model.apply, model.process
    given: dict[str, Any] = {"prediction": config.prediction, "times": times}
    regression = given | {"loss_on": config.loss_on}

    def explicit() -> LossFn:
        if model.target.mixture is None:
            raise Refusal(f"--loss explicit needs the score, which --target {config.target} hides.")
        exact = model.target.mixture.denoiser(model.process)
        score = denoisers.to_score(model.process, exact)
        return losses.explicit(*args, score, **regression)

    def elbo() -> LossFn:
        t_min = flows.data_end(model.process, jnp.asarray(config.log_snr_high))
        return losses.elbo(*args, prediction=config.prediction, t_min=t_min)

    makers: dict[str, Callable[[], LossFn]] = {
        "denoising": lambda: losses.denoising(*args, **regression),
        "explicit": explicit,
        "implicit": lambda: losses.implicit(*args, **regression),
        "sliced": lambda: losses.sliced(*args, **regression),
        "finite_difference": lambda: losses.finite_difference(*args, **regression),
        "flow_matching": lambda: losses.flow_matching(*args, **given),
        "flow_matching_ot": lambda: losses.flow_matching(
            *args, **given, coupling="optimal_transport"
        ),
        "elbo": elbo,
    }
    with options.naming(Config, coupling="--loss"):
        return makers[config.loss]()


def batches(config: Config, target: Target, start: int) -> Iterator[Batch]:
    """Yield the draws of each step from `start` on, a function of (seed, step)."""
    key = jax.random.fold_in(jax.random.key(config.seed), 1)

    @jax.jit
    def draw(key: Key, step: Array) -> Array:
        return target.sample(jax.random.fold_in(key, step), config.batch_size)

    step = start
    while True:
        yield {"x0": draw(key, step)}
        step += 1


def check(config: Config) -> None:
    """Refuse a config whose values cannot be meant."""
    options.judge(config)
    process = PROCESSES[config.process]()
    flows.check_ends(process, config.prediction, config.log_snr_low, config.log_snr_high)


def from_record(record: Mapping[str, Any]) -> Config:
    """Return the resolved config of what a run's record holds."""
    fields = {field.name for field in dataclasses.fields(Config)}
    if record.keys() != fields:
        raise Refusal(
            "This run was written by another version of the experiment: its config differs in "
            f"{', '.join(sorted(record.keys() ^ fields))}."
        )
    config = Config(**record)
    check(config)
    return dataclasses.replace(config, decay_steps=config.decay_steps or config.num_steps)


def asked_again(record: Mapping[str, Any]) -> Config:
    """Return the config by which a command line would ask for the run of a record again."""
    return dataclasses.replace(from_record(record), decay_steps=record["decay_steps"])
