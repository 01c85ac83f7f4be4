"""Ablations in the plane, where the score, the density and the draws are exact."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablations import sampling
from experiments.ablations.training import Members
from experiments.ablations.world import Measure, Problem, World
from experiments.common.command import Refusal
from experiments.common.options import Share
from experiments.common.targets import make_target
from experiments.toy2d import model as toy2d
from jaxdiff import likelihood, metrics, timesteps
from jaxdiff.training import throughput
from jaxdiff.typing import Array, Batch, LossFn, PyTree

LEVELS = tuple(range(-6, 11))
"""Log-SNRs at which the score is judged."""
PATH_STEPS = 64
"""Euler steps of the paths whose bend is taken."""

MEASURES = {
    "score_error": Measure("squared error of the score, times sigma^2"),
    "nll_gap": Measure("NLL above the entropy, nats"),
    "wasserstein": Measure("sliced Wasserstein distance of samples", sampled=True),
    "bend": Measure("variance of the velocity along a path"),
}


@dataclasses.dataclass(frozen=True)
class Config(toy2d.Config, sampling.Swept):
    """A run of experiments.toy2d, with more to vary."""

    times: Literal["log_snr", "stratified"] = "log_snr"
    """Distribution of training times: uniform between two log-SNRs, or in t."""
    more_ema_decays: tuple[float, ...] = ()
    """Decays of further averages to keep."""
    ema_decay: Share = dataclasses.field(default=cast(float, None))
    """Decay of the moving average; unless given, 1 - 10 / `num_steps`, which forgets the start."""

    def __post_init__(self) -> None:
        if self.ema_decay is None:
            decay = max(0.0, 1.0 - 10.0 / max(self.num_steps, 1))
            object.__setattr__(self, "ema_decay", decay)


def unread(config: Config) -> dict[str, str]:
    """Return why a run does not read a field, by field; see `World`."""
    found = sampling.unread(config)
    if config.loss in ("flow_matching", "flow_matching_ot", "elbo"):
        found["loss_on"] = f"loss {config.loss} says itself whose error is averaged"
    if config.loss == "elbo":
        found["times"] = "loss elbo draws its own times"
        if config.prediction not in ("eps", "score"):
            found["log_snr_low"] = found["times"]
    return found


def check(config: Config) -> None:
    """Refuse a config that cannot be meant."""
    toy2d.check(config)
    sampling.check(config)
    if config.loss == "explicit" and make_target(config.target).mixture is None:
        raise Refusal(f"loss explicit needs the score, which target {config.target} hides.")


def problem(config: Config) -> Problem:
    """Make the problem of a group."""
    compiled: dict[Any, Any] = {}

    def build(config: Config) -> toy2d.Model:
        return toy2d.build_model(config, sampling.make_process(config))

    def batch(config: Any, table: PyTree, step: Array) -> Batch:
        key = jax.random.fold_in(jax.random.fold_in(config.seed, 1), step)
        return {"x0": build(config).target.sample(key, config.batch_size)}

    def loss(config: Config) -> LossFn:
        times = timesteps.draw_stratified() if config.times == "stratified" else None
        return toy2d.build_loss(config, build(config), times)

    def draw(how: Config, members: Members, params: PyTree) -> np.ndarray:
        def of_one(config: Any, params: PyTree) -> Array:
            config = _sampled_by(how, config)
            model, key = build(config), jax.random.fold_in(config.seed, 2)
            shape = (config.eval_points, 2)
            return sampling.draw(config, model.process, model.denoiser(params), key, shape)

        key = how.sampler, how.sample_steps
        return np.asarray(members.map_once(compiled, key, of_one)(params))

    def measure(
        name: str, how: Config, members: Members, params: PyTree, samples: np.ndarray | None
    ) -> Sequence[float]:
        if name == "wasserstein":
            assert samples is not None
            return _wasserstein(members, samples)
        of_one = {"score_error": score_error, "nll_gap": nll_gap, "bend": bend}[name]
        mapped = members.map_once(
            compiled, name, lambda config, p: of_one(config, build(config), p)
        )
        return np.asarray(mapped(params)).tolist()

    def calls(how: Config) -> int:
        return sampling.calls(how)

    def call_flops() -> float | None:
        model = build(config)
        x = jax.ShapeDtypeStruct((config.eval_points, 2), jnp.float32)
        params = jax.eval_shape(model.init_params)
        whole = throughput.count_flops(lambda p, x: model.apply(p, x, jnp.float32(0.5)), params, x)
        return None if whole is None else whole / config.eval_points

    return Problem(
        lambda config: build(config).init_params(),
        loss,
        lambda config: (),
        batch,
        measure,
        draw,
        calls,
        call_flops,
    )


def _sampled_by(how: Config, config: Any) -> Any:
    return dataclasses.replace(config, sampler=how.sampler, sample_steps=how.sample_steps)


# --- Measures -------------------------------------------------------------------------------


def score_error(config: Any, model: toy2d.Model, params: PyTree) -> Array:
    """Return the mean of sigma^2 ||s_hat - s||^2 / D over points of q(x_t), evenly in log-SNR."""
    mixture, process = model.target.mixture, model.process
    if mixture is None:
        raise Refusal(f"score_error needs the score, which target {config.target} hides.")
    denoise, exact = model.denoiser(params), mixture.denoiser(process)
    key = jax.random.fold_in(config.seed, 3)

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


def nll_gap(config: Any, model: toy2d.Model, params: PyTree) -> Array:
    """Return the mean of log p - log p_model over fresh draws, in nats."""
    if model.target.log_prob is None:
        raise Refusal(f"nll_gap needs the density, which target {config.target} hides.")
    x = model.target.sample(jax.random.fold_in(config.seed, 4), config.eval_points)
    log_prob, _ = likelihood.log_prob(
        model.process,
        sampling.bounded(config, model.process, model.denoiser(params)),
        x,
        rtol=config.eval_tolerance,
        atol=config.eval_tolerance,
        t_min=jnp.maximum(model.process.time_of_log_snr(jnp.float32(config.log_snr_high)), 0.0),
    )
    return jnp.mean(model.target.log_prob(x) - log_prob)


def bend(config: Any, model: toy2d.Model, params: PyTree) -> Array:
    """Return how far from straight paths are: E int ||v - mean v||^2 dt / D; 0 if so.

    Source: Liu et al. 2023 (arXiv:2209.03003), section 2.2, the straightness S(Z).
    """
    how = dataclasses.replace(config, sampler="euler", sample_steps=PATH_STEPS)
    key_start, key_path = jax.random.split(jax.random.fold_in(config.seed, 5))
    x_T = model.process.prior_sample(key_start, (config.eval_points, 2))  # noqa: N806
    denoise = model.denoiser(params)
    _, path = sampling.run(how, model.process, denoise, key_path, x_T, collect=lambda x: x)
    velocity = jnp.diff(jnp.concatenate([x_T[None], path]), axis=0) * PATH_STEPS
    return jnp.mean(jnp.var(velocity, axis=0))


def _wasserstein(members: Members, samples: np.ndarray) -> list[float]:
    @functools.partial(jax.jit, static_argnums=1)
    def exact(seed: Array, num: int) -> Array:
        target = make_target(members.config.target)
        return target.sample(jax.random.fold_in(jax.random.key(seed), 6), num)

    key = jax.random.key(0)
    return [
        metrics.sliced_wasserstein(key, x, exact(seed, len(x)))
        for seed, x in zip(members.numbers["seed"], samples, strict=True)
    ]


NOTES = {
    "network": "there is one network in the plane, an MLP: vary `width` and `depth`.",
    "weighting": "losses in the plane are not weighted; images have `weighting`.",
    "schedule": "the learning rate always falls by a cosine here; images have `schedule`.",
}
WORLD = World(Config, sampling.NUMBERS, sampling.SAMPLING, MEASURES, check, problem, unread, NOTES)
