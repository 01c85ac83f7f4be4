"""What both kinds of data share: hyper-parameters that are swept, and sampling under `vmap`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.common.choices import PROCESSES
from experiments.common.command import Refusal
from experiments.common.methods import METHODS
from jaxdiff import predictions, processes, sample, timesteps
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser, Key

NUMBERS = frozenset(
    ("learning_rate", "weight_decay", "clip_norm", "ema_decay")
    + ("beta_min", "beta_max", "log_snr_shift")
)
"""Fields that change numbers but neither shapes nor program."""
SAMPLING = frozenset(("sampler", "sample_steps", "average"))
"""Fields that a trained run is sampled by."""


@dataclasses.dataclass(frozen=True)
class Swept:
    """Hyper-parameters that the configs of the experiments leave at their defaults."""

    beta_min: float = 0.1
    """Rate of the noise of vp and sub_vp at t = 0."""
    beta_max: float = 20.0
    """Their rate at t = 1."""
    log_snr_shift: float = 0.0
    """What is added to the log-SNR of cosine."""
    average: float | None = None
    """Decay of the average that is sampled and judged; that of `ema_decay` unless given."""


def make_process(config: Any) -> Process:
    """Make the process of a config, whose hyper-parameters may be traced."""
    if config.process == "vp":
        return processes.vp(config.beta_min, config.beta_max)
    if config.process == "sub_vp":
        return processes.sub_vp(config.beta_min, config.beta_max)
    if config.process == "cosine":
        return processes.cosine(config.log_snr_shift)
    return PROCESSES[config.process]()


UNMEASURED = {
    "checkpoint_every": "an ablation stores groups, not checkpoints",
    "log_every": "an ablation logs no steps",
    "data_dir": "where data lie changes no number",
    "more_ema_decays": "they are kept beside `ema_decay`; `average` chooses among them",
    "ema_stds": "ablations judge averages of a decay only: vary `average`",
    "mixture_components": "no measure is of the Gaussian mixture",
    "sample_grid": "an ablation samples in equal steps of t",
    "grid_size": "an ablation draws no densities",
}
"""Fields that no measure sees, and why."""


def unread(config: Any) -> dict[str, str]:
    """Return why a run does not read a field, by field, of those that both kinds of data have."""
    found = dict(UNMEASURED)
    if config.process not in ("vp", "sub_vp"):
        why = f"process {config.process} has no range of beta"
        found |= {"beta_min": why, "beta_max": why}
    if config.process != "cosine":
        found["log_snr_shift"] = f"process {config.process} has no shift of its log-SNR"
    if config.average is not None and config.average != config.ema_decay:
        found["ema_decay"] = f"the average of decay {config.average:g} is judged in its place"
    if getattr(config, "schedule", "cosine") in ("constant", "inverse_sqrt"):
        found["decay_steps"] = f"schedule {config.schedule} has no end"
    if config.times != "log_snr" and config.prediction not in predictions.SIGNAL_NEEDED:
        found["log_snr_low"] = f"times {config.times} do not end there"
    return found


def bounded(config: Any, process: Process, denoise: Denoiser) -> Denoiser:
    """Keep a network that predicts noise from times at which next to no data are left.

    There alpha is 0, and what it says of x0 is divided by it; past the training times' lowest
    log-SNR it is asked what it would say at that one.
    """
    if config.prediction not in predictions.SIGNAL_NEEDED:
        return denoise
    latest = process.time_of_log_snr(jnp.asarray(config.log_snr_low, float))
    return lambda x_t, t, *cond: denoise(x_t, jnp.minimum(t, latest), *cond)


def draw(
    config: Any, process: Process, denoise: Denoiser, key: Key, shape: tuple[int, ...]
) -> Array:
    """Draw samples of a shape (N, ...) as a config says: its sampler, in `sample_steps` steps."""
    key_start, key_path = jax.random.split(key)
    start = METHODS[config.sampler].start(process)
    x_T = process.prior_sample(key_start, shape, t=start)  # noqa: N806
    return run(config, process, denoise, key_path, x_T)


def run(
    config: Any,
    process: Process,
    denoise: Denoiser,
    key: Key,
    x_T: Array,
    **options: Any,  # noqa: N803
) -> Any:
    """Sample from given noise; options are those of `sample`."""
    method = METHODS[config.sampler]
    ts = timesteps.uniform(process, config.sample_steps, t_start=method.start(process))
    sampler = method.make(process, bounded(config, process, denoise))
    return sample(key, sampler, x_T, ts, **options)


def calls(config: Any) -> int:
    """Return the evaluations of a denoiser that a sample takes.

    Raises:
        Refusal: if they do not follow from the config.
    """
    found = METHODS[config.sampler].calls(config.sample_steps)
    if found is None:
        raise Refusal(f"sampler {config.sampler} chooses its own number of calls; take another.")
    return found


def check(config: Any) -> None:
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
