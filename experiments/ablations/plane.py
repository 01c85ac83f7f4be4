"""Ablations in the plane, where the score, the density and the draws are exact."""

import dataclasses
import functools
from typing import Annotated, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablations import sampling
from experiments.ablations.world import SEED, Measure, World, member_of
from experiments.ablations.world import Member as MemberOf
from experiments.common.command import Refusal
from experiments.common.options import Role, Share
from experiments.common.targets import TargetName, make_target
from experiments.toy2d import model as toy2d
from jaxdiff import likelihood, metrics, sample, samplers, timesteps
from jaxdiff.typing import Array, Batch, LossFn, PyTree

LEVELS = tuple(range(-6, 11))
"""Log-SNRs at which the score is judged."""
PATH_STEPS = 64
"""Euler steps of the paths whose bend is taken."""


@dataclasses.dataclass(frozen=True)
class Config(toy2d.Config, sampling.Swept):
    """A run of experiments.toy2d, with more to vary."""

    times: Literal["log_snr", "stratified"] = "log_snr"
    """Distribution of training times: uniform between two log-SNRs, or in t."""
    more_ema_decays: tuple[float, ...] = ()
    """Decays of further averages to keep."""
    ema_decay: Annotated[Share, Role.NUMBER] = dataclasses.field(default=cast(float, None))
    """Decay of the moving average; unless given, 1 - 10 / `num_steps`, which forgets the start."""

    def __post_init__(self) -> None:
        if self.ema_decay is None:
            decay = max(0.0, 1.0 - 10.0 / max(self.num_steps, 1))
            object.__setattr__(self, "ema_decay", decay)


Member = MemberOf[Config]


def unread(config: Config) -> dict[str, str]:
    """Return why a run does not read a field, by field; see `World`."""
    found = sampling.unread(config)
    if config.loss in ("flow_matching", "flow_matching_ot", "elbo"):
        found["loss_on"] = f"loss {config.loss} says itself whose error is averaged"
    if config.loss == "elbo":
        found["times"] = "loss elbo draws its own times"
        found.pop("log_snr_high", None)  # where they begin
        if config.prediction not in ("eps", "score"):
            found["log_snr_low"] = found["times"]
    return found


def check(config: Config) -> None:
    """Refuse a config that cannot be meant."""
    toy2d.check(config)
    sampling.check(config)
    if config.loss == "explicit" and make_target(config.target).mixture is None:
        raise Refusal(f"loss explicit needs the score, which target {config.target} hides.")


class PlaneProblem:
    """What the members of a group share; a `Problem`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def build(self, member: Member) -> toy2d.Model:
        """Make a member's target, network and process."""
        return toy2d.build_model(member.config, sampling.make_process(member), member.key)

    def init_params(self, member: Member) -> PyTree:
        """Return a member's initial parameters."""
        return self.build(member).init_params()

    def loss(self, member: Member) -> LossFn:
        """Return a member's loss."""
        times = timesteps.draw_stratified() if member.config.times == "stratified" else None
        return toy2d.build_loss(member.config, self.build(member), times)

    def table(self, config: Config) -> PyTree:
        """Return nothing: draws are fresh."""
        return ()

    def batch(self, member: Member, table: PyTree, step: Array) -> Batch:
        """Return the batch of a step."""
        key = jax.random.fold_in(jax.random.fold_in(member.key, 1), step)
        return {"x0": make_target(member.config.target).sample(key, member.config.batch_size)}

    def draw(self, member: Member, params: PyTree) -> Array:
        """Return samples (N, 2), drawn as the member's config says."""
        model, key = self.build(member), jax.random.fold_in(member.key, 2)
        shape = (member.config.eval_points, 2)
        return sampling.draw(member.config, model.process, model.denoiser(params), key, shape)

    def calls(self, config: Config) -> int:
        """Return the evaluations of the network that a sample takes."""
        return sampling.calls(config)

    def call_flops(self) -> float | None:
        """Return the operations of one evaluation for one sample, None where unknown."""
        model = self.build(member_of(self.config, {SEED: np.uint32(self.config.seed)}))
        return sampling.call_flops(model, (self.config.eval_points, 2))


# --- Measures -------------------------------------------------------------------------------


def score_error(problem: PlaneProblem, member: Member, params: PyTree) -> Array:
    """Return the mean of sigma^2 ||s_hat - s||^2 / D over points of q(x_t), evenly in log-SNR."""
    config, model = member.config, problem.build(member)
    mixture, process = model.target.mixture, model.process
    if mixture is None:
        raise Refusal(f"score_error needs the score, which target {config.target} hides.")
    denoise, exact = model.denoiser(params), mixture.denoiser(process)
    key = jax.random.fold_in(member.key, 3)

    def at(level: Array, key: Array) -> Array:
        t = process.time_of_log_snr(level)
        key_data, key_noise = jax.random.split(key)
        x0 = model.target.sample(key_data, config.eval_points)
        x_t = process.alpha(t) * x0 + process.sigma(t) * jax.random.normal(key_noise, x0.shape)
        # sigma (s_hat - s) = alpha / sigma (x0_hat - x0)
        return jnp.exp(level) * jnp.mean((denoise(x_t, t) - exact(x_t, t)) ** 2)

    levels = jnp.asarray(LEVELS, jnp.float32)
    return jnp.mean(
        jax.lax.map(lambda args: at(*args), (levels, jax.random.split(key, len(levels))))
    )


def nll_gap(problem: PlaneProblem, member: Member, params: PyTree) -> Array:
    """Return the mean of log p - log p_model over fresh draws, in nats."""
    config, model = member.config, problem.build(member)
    if model.target.log_prob is None:
        raise Refusal(f"nll_gap needs the density, which target {config.target} hides.")
    x = model.target.sample(jax.random.fold_in(member.key, 4), config.eval_points)
    log_prob, _ = likelihood.log_prob(
        model.process,
        sampling.bounded(config, model.process, model.denoiser(params)),
        x,
        rtol=config.eval_tolerance,
        atol=config.eval_tolerance,
        t_min=jnp.maximum(model.process.time_of_log_snr(jnp.float32(config.log_snr_high)), 0.0),
    )
    return jnp.mean(model.target.log_prob(x) - log_prob)


def bend(problem: PlaneProblem, member: Member, params: PyTree) -> Array:
    """Return how far from straight paths are: E int ||v - mean v||^2 dt / D; 0 if so.

    Source: Liu et al. 2023 (arXiv:2209.03003), section 2.2, the straightness S(Z).
    """
    config, model = member.config, problem.build(member)
    process = model.process
    key_start, key_path = jax.random.split(jax.random.fold_in(member.key, 5))
    x_T = process.prior_sample(key_start, (config.eval_points, 2))  # noqa: N806
    sampler = samplers.euler(process, sampling.bounded(config, process, model.denoiser(params)))
    ts = timesteps.uniform(process, PATH_STEPS)
    _, path = sample(key_path, sampler, x_T, ts, collect=lambda x: x)
    velocity = jnp.diff(jnp.concatenate([x_T[None], path]), axis=0) * PATH_STEPS
    return jnp.mean(jnp.var(velocity, axis=0))


def wasserstein(problem: PlaneProblem, config: Config, seed: int, samples: np.ndarray) -> float:
    """Return the sliced Wasserstein distance of samples (N, 2) and as many fresh draws."""
    fresh = _fresh(config.target, np.uint32(seed), len(samples))
    return metrics.sliced_wasserstein(jax.random.key(0), samples, fresh)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _fresh(target: TargetName, seed: Array, num: int) -> Array:
    return make_target(target).sample(jax.random.fold_in(jax.random.key(seed), 6), num)


MEASURES = {
    "score_error": Measure("squared error of the score, times sigma^2", of_model=score_error),
    "nll_gap": Measure("NLL above the entropy, nats", of_model=nll_gap, reads=sampling.LIKELIHOOD),
    "wasserstein": Measure("sliced Wasserstein distance of samples", of_samples=wasserstein),
    "bend": Measure("variance of the velocity along a path", of_model=bend),
}
NOTES = {
    "network": "there is one network in the plane, an MLP: vary `width` and `depth`.",
    "weighting": "losses in the plane are not weighted; images have `weighting`.",
    "schedule": "the learning rate always falls by a cosine here; images have `schedule`.",
}
WORLD = World(Config, MEASURES, check, PlaneProblem, unread, sampling.meant, NOTES)
