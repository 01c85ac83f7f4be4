"""What both kinds of data share: hyper-parameters that are swept, and sampling under `vmap`."""

import dataclasses
import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from experiments.ablations.fields import replaced
from experiments.ablations.world import Member, R, RunConfig
from experiments.common.choices import PROCESSES
from experiments.common.command import Refusal
from experiments.common.methods import METHODS, make_grid
from experiments.common.options import Role
from jaxdiff import predictions, processes, sample
from jaxdiff.processes import Process
from jaxdiff.training import throughput
from jaxdiff.typing import Array, Denoiser, Key


@dataclasses.dataclass(frozen=True)
class Swept:
    """Hyper-parameters that the configs of the experiments leave at their defaults."""

    beta_min: Annotated[float, Role.NUMBER] = 0.1
    """Rate of the noise of vp and sub_vp at t = 0."""
    beta_max: Annotated[float, Role.NUMBER] = 20.0
    """Their rate at t = 1."""
    log_snr_shift: Annotated[float, Role.NUMBER] = 0.0
    """What is added to the log-SNR of cosine."""
    average: Annotated[float | None, Role.AVERAGE] = None
    """Decay of the average that is sampled and judged; that of `ema_decay` unless given."""


def make_process(member: Member[RunConfig]) -> Process:
    """Make the process of a member, whose hyper-parameters may be traced."""
    name, numbers = member.config.process, member.numbers
    if name == "vp":
        return processes.vp(numbers["beta_min"], numbers["beta_max"])
    if name == "sub_vp":
        return processes.sub_vp(numbers["beta_min"], numbers["beta_max"])
    if name == "cosine":
        return processes.cosine(numbers["log_snr_shift"])
    return PROCESSES[name]()


UNREAD = {
    "checkpoint_every": "an ablation stores groups, not checkpoints",
    "log_every": "an ablation logs no steps",
    "data_dir": "where data lie changes no number",
    "remat": "it saves memory and changes no number",
    "more_ema_decays": "they are kept beside `ema_decay`; `average` chooses among them",
    "ema_stds": "ablations judge averages of a decay only: vary `average`",
    "mixture_components": "no measure is of the Gaussian mixture",
    "grid_size": "an ablation draws no densities",
    "eval_examples": "no measure asked for is of the likelihood",
    "eval_tolerance": "no measure asked for is of the likelihood",
}
"""Fields that neither training nor sampling reads, and why nothing is seen of them."""
LIKELIHOOD = frozenset(("eval_examples", "eval_tolerance", "log_snr_high"))
"""Fields that measures of the likelihood read."""


def unread(config: RunConfig) -> dict[str, str]:
    """Return why a run does not read a field, by field, of those that both kinds of data have."""
    found = dict(UNREAD)
    if config.process not in ("vp", "sub_vp"):
        why = f"process {config.process} has no range of beta"
        found |= {"beta_min": why, "beta_max": why}
    if config.process != "cosine":
        found["log_snr_shift"] = f"process {config.process} has no shift of its log-SNR"
    if config.average is not None and config.average != config.ema_decay:
        found["ema_decay"] = f"the average of decay {config.average:g} is judged in its place"
    schedule = getattr(config, "schedule", "cosine")
    if schedule in ("constant", "inverse_sqrt"):
        found["decay_steps"] = f"schedule {schedule} has no end"
    if config.times != "log_snr":
        found["log_snr_high"] = f"times {config.times} do not begin there"
        if config.prediction not in predictions.SIGNAL_NEEDED:
            found["log_snr_low"] = f"times {config.times} do not end there"
    return found


def meant(config: R) -> R:
    """Return a config with the values that its `decay_steps` and `average` stand for."""
    decay_steps = config.decay_steps or config.num_steps
    average = config.ema_decay if config.average is None else config.average
    return replaced(config, {"decay_steps": decay_steps, "average": average})


def bounded(config: RunConfig, process: Process, denoise: Denoiser) -> Denoiser:
    """Keep a network that predicts noise from times at which next to no data are left.

    There alpha is 0, and what it says of x0 is divided by it; past the training times' lowest
    log-SNR it is asked what it would say at that one.
    """
    if config.prediction not in predictions.SIGNAL_NEEDED:
        return denoise
    latest = process.time_of_log_snr(jnp.asarray(config.log_snr_low, float))
    return lambda x_t, t, *cond: denoise(x_t, jnp.minimum(t, latest), *cond)


def draw(
    config: RunConfig,
    process: Process,
    denoise: Denoiser,
    key: Key,
    shape: tuple[int, ...],
    grid: str = "uniform",
) -> Array:
    """Draw samples of a shape (N, ...) as a config says: its sampler, in `sample_steps` steps.

    The grid is one of `methods.make_grid`.
    """
    method = METHODS[config.sampler]
    key_start, key_path = jax.random.split(key)
    ts = make_grid(grid, process, config.sample_steps, method.start(process))
    x_T = process.prior_sample(key_start, shape, t=ts[0])  # noqa: N806
    sampler = method.make(process, bounded(config, process, denoise))
    return sample(key_path, sampler, x_T, ts)


def calls(config: RunConfig) -> int:
    """Return the evaluations of a denoiser that a sample takes.

    Raises:
        Refusal: if they do not follow from the config.
    """
    found = _calls(config.sampler, config.sample_steps)
    if found is None:
        raise Refusal(f"sampler {config.sampler} chooses its own number of calls; take another.")
    return found


@functools.cache
def _calls(sampler: str, num_steps: int) -> int | None:
    return METHODS[sampler].calls(num_steps)


def call_flops(model: Any, shape: tuple[int, ...], *cond: Any) -> float | None:
    """Return the operations of a network's call for one of a batch of a shape (N, ...)."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    params = jax.eval_shape(model.init_params)
    whole = throughput.count_flops(
        lambda p, x: model.apply(p, x, jnp.float32(0.5), *cond), params, x
    )
    return None if whole is None else whole / shape[0]


def check(config: RunConfig) -> None:
    """Refuse what ablations add to a config and cannot be meant."""
    if not 0.0 < config.beta_min <= config.beta_max:
        raise Refusal(
            "beta_min must be positive and at most beta_max; "
            f"got {config.beta_min} and {config.beta_max}."
        )
    kept = (config.ema_decay, *config.more_ema_decays)
    if config.average is not None and config.average not in kept:
        raise Refusal(f"average must be one of those that are kept, {kept}; got {config.average}.")
    calls(config)
