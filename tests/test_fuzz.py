"""Every public function, given what it cannot use: it works, or refuses an argument by its name.

Each case is a call that works; one argument of it is replaced by a value of another kind, rank,
dtype or size. Few are tried by default, the same ones each time; `make test-all` tries many.
"""

import inspect
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdiff import (
    Mixture,
    denoisers,
    forward,
    guidance,
    likelihood,
    losses,
    metrics,
    predictions,
    processes,
    sample,
    samplers,
    timesteps,
    training,
    variational,
    weightings,
)
from jaxdiff.training import ema, parallel

KEY = jax.random.key(0)
VP = processes.vp()
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
T = jnp.full(4, 0.5)
S = jnp.full(4, 0.25)
TS = jnp.asarray([1.0, 0.5, 0.0])
MIXTURE = Mixture(jnp.ones(1), jnp.zeros((1, 2)), jnp.eye(2)[None])
DENOISE = MIXTURE.denoiser(VP)
OPTIMIZER = optax.sgd(0.1)
POINTS = np.random.default_rng(1).normal(size=(16, 2))
LEVELS = jnp.asarray(np.random.default_rng(2).integers(0, 16, (4, 2)), jnp.uint8)


def apply(params, x_t, t, cond=None, *, key=None):
    return x_t * params["w"]


def network(x_t, t):
    return 0.5 * x_t


PARAMS = {"w": jnp.asarray(0.5)}


def loss_of(make, **options):
    """A loss called, its factory's arguments and its own together."""

    def call(apply, process, key, batch, **more):
        return make(apply, process, **options, **more)(PARAMS, key, batch)

    call.__name__ = make.__name__
    return call


def drawn(make):
    """A sampler made and run."""

    def call(process, denoise, **options):
        return sample(KEY, make(process, denoise, **options), X, TS[:2])

    call.__name__ = make.__name__
    return call


def denoised(make, **fixed):
    """A denoiser made and asked."""

    def call(**options):
        return make(**fixed, **options)(X, T)

    call.__name__ = make.__name__
    call.parameters = list(inspect.signature(make).parameters)
    return call


def updated(loss_fn, optimizer, ema_decay, accumulate, key, batch):
    state = training.init(PARAMS, optimizer, ema_decay=0.9)
    update = training.make_update(loss_fn, optimizer, ema_decay=ema_decay, accumulate=accumulate)
    return update(state, key, batch)


BATCH = {"x0": X, "cond": jnp.arange(4)}
LOSS = losses.denoising(apply, VP)
OF_LOSS = {"apply": apply, "process": VP, "key": KEY, "batch": BATCH}
OF_SAMPLER = {"process": VP, "denoise": DENOISE}

PICTURES = np.tanh(np.random.default_rng(3).normal(size=(2, 11, 12, 1)))


def encode(params, x):
    return x * params["w"], jnp.ones_like(x)


def decode(params, z):
    return z * params["w"]


def features(x):
    return [x]


def autoencoded(key, batch, **options):
    params = {"autoencoder": PARAMS, "discriminator": PARAMS}
    return losses.autoencoding(**options)(params, key, batch)


def discriminated(params, key, batch, **options):
    return losses.discriminating(**options)(params, key, batch)


OF_AUTOENCODER = {"encode": encode, "decode": decode, "discriminate": decode}
OF_AUTOENCODER |= {"key": KEY, "batch": BATCH}

CASES = {
    "processes.vp": (processes.vp, {"beta_min": 0.1, "beta_max": 20.0}),
    "processes.sub_vp": (processes.sub_vp, {"beta_min": 0.1, "beta_max": 20.0}),
    "processes.ve": (processes.ve, {"sigma_min": 0.01, "sigma_max": 50.0}),
    "processes.edm": (processes.edm, {"sigma_max": 80.0}),
    "processes.cosine": (processes.cosine, {"log_snr_shift": 0.0}),
    "processes.ddpm": (processes.ddpm, {"num_steps": 10, "beta_start": 1e-4, "beta_end": 0.02}),
    "processes.from_betas": (processes.from_betas, {"betas": np.linspace(0.1, 0.2, 3)}),
    "processes.until": (processes.until, {"process": VP, "t_max": 0.5}),
    "prior_sample": (
        lambda key, shape: VP.prior_sample(key, shape),
        {"key": KEY, "shape": (4, 2)},
    ),
    "forward.marginal": (forward.marginal, {"process": VP, "x0": X, "t": T}),
    "forward.transition": (forward.transition, {"process": VP, "x_s": X, "s": S, "t": T}),
    "forward.posterior": (forward.posterior, {"process": VP, "x_t": X, "x0": X, "t": T, "s": S}),
    "forward.perturb": (forward.perturb, {"key": KEY, "process": VP, "x0": X, "t": T}),
    "predictions.convert": (
        predictions.convert,
        {"process": VP, "source": "eps", "target": "v", "value": X, "x_t": X, "t": T},
    ),
    "predictions.from_pair": (
        predictions.from_pair,
        {"process": VP, "kind": "v", "x0": X, "eps": X, "t": T},
    ),
    "predictions.error_ratio": (
        predictions.error_ratio,
        {"process": VP, "target": "eps", "source": "v", "t": T},
    ),
    "timesteps.uniform": (
        timesteps.uniform,
        {"process": VP, "num_steps": 3, "t_end": 0.0, "t_start": 1.0},
    ),
    "timesteps.quadratic": (
        timesteps.quadratic,
        {"process": VP, "num_steps": 3, "t_end": 0.0, "t_start": 1.0},
    ),
    "timesteps.log_snr": (
        timesteps.log_snr,
        {"process": VP, "num_steps": 3, "t_end": 1e-3, "t_start": 1.0},
    ),
    "timesteps.karras": (
        timesteps.karras,
        {"process": VP, "num_steps": 3, "sigma_min": 0.01, "sigma_max": 50.0, "rho": 7.0},
    ),
    "timesteps.flow_shift": (timesteps.flow_shift, {"process": VP, "num_steps": 3, "shift": 3.0}),
    "timesteps.draw_at": (timesteps.draw_at, {"t": 0.5}),
    "timesteps.draw_log_normal": (timesteps.draw_log_normal, {"mean": -1.2, "std": 1.2}),
    "timesteps.draw_log_snr": (timesteps.draw_log_snr, {"low": -8.0, "high": 8.0}),
    "weightings.min_snr": (weightings.min_snr, {"gamma": 5.0}),
    "weightings.edm": (weightings.edm, {"sigma_data": 0.5}),
    "variational.level_decoder": (variational.level_decoder, {"num_levels": 16}),
    "variational.prior_divergence": (variational.prior_divergence, {"process": VP, "x0": X}),
    "denoisers.from_network": (
        denoised(denoisers.from_network),
        {"network": network, "process": VP, "prediction": "v", "clip": 1.0},
    ),
    "denoisers.edm_preconditioned": (
        denoised(denoisers.edm_preconditioned),
        {"network": network, "process": VP, "sigma_data": 0.5},
    ),
    "denoisers.to_score": (denoised(denoisers.to_score), {"process": VP, "denoise": DENOISE}),
    "guidance.classifier_free": (
        denoised(guidance.classifier_free),
        {"conditional": DENOISE, "unconditional": DENOISE, "scale": 2.0},
    ),
    "guidance.autoguidance": (
        denoised(guidance.autoguidance),
        {"denoise": DENOISE, "weaker": DENOISE, "scale": 2.0},
    ),
    "guidance.classifier_free_batched": (
        denoised(guidance.classifier_free_batched, cond=jnp.ones(4), null=0.0),
        {"denoise_cond": lambda x, t, c: x, "scale": 2.0},
    ),
    "guidance.rescaled": (guidance.rescaled, {"phi": 0.5}),
    "guidance.projected": (guidance.projected, {"eta": 0.5, "max_norm": 1.0}),
    "guidance.interval": (
        denoised(guidance.interval),
        {"process": VP, "guided": DENOISE, "conditional": DENOISE, "low": 0.1, "high": 1.0},
    ),
    "guidance.classifier": (
        denoised(guidance.classifier),
        {"process": VP, "denoise": DENOISE, "log_prob": lambda x, t: -(x[:, 0] ** 2), "scale": 2.0},
    ),
    "guidance.dynamic_threshold": (
        denoised(guidance.dynamic_threshold),
        {"denoise": DENOISE, "percentile": 0.9, "bound": 1.0},
    ),
    "guidance.dps": (
        denoised(guidance.dps),
        {"process": VP, "denoise": DENOISE, "operator": lambda x: x, "y": X, "scale": 1.0},
    ),
    "denoisers.preconditioned": (
        lambda apply, process, sigma_data, prediction, noise_level: denoisers.preconditioned(
            apply, process, sigma_data, prediction=prediction, noise_level=noise_level
        )(PARAMS, X, T),
        {"apply": apply, "process": VP, "sigma_data": 0.5, "prediction": "v"}
        | {"noise_level": "log_snr"},
    ),
    "losses.denoising": (
        loss_of(losses.denoising),
        {**OF_LOSS, "prediction": "v", "loss_on": "eps", "weighting": weightings.simple()}
        | {"times": timesteps.draw_uniform(), "drop_cond": 0.1, "null_cond": 4},
    ),
    "losses.flow_matching": (
        loss_of(losses.flow_matching),
        {**OF_LOSS, "coupling": "independent", "drop_cond": 0.1, "null_cond": 4},
    ),
    "losses.explicit": (
        loss_of(losses.explicit),
        {**OF_LOSS, "score": denoisers.to_score(VP, DENOISE)},
    ),
    "losses.implicit": (loss_of(losses.implicit), OF_LOSS),
    "losses.sliced": (loss_of(losses.sliced), {**OF_LOSS, "num_projections": 1}),
    "losses.finite_difference": (
        loss_of(losses.finite_difference),
        {**OF_LOSS, "step": 0.01, "num_projections": 1},
    ),
    "losses.autoencoding": (
        autoencoded,
        {**OF_AUTOENCODER, "squared": 1.0, "absolute": 0.1, "divergence": 0.1}
        | {"features": features, "perceptual": 0.1, "adversarial": 0.1},
    ),
    "losses.discriminating": (
        discriminated,
        {**OF_AUTOENCODER, "params": {"autoencoder": PARAMS, "discriminator": PARAMS}},
    ),
    "losses.elbo": (loss_of(losses.elbo, prediction="v"), {**OF_LOSS, "t_min": 0.01}),
    "samplers.ddim": (drawn(samplers.ddim), {**OF_SAMPLER, "eta": 0.5}),
    "samplers.ancestral": (drawn(samplers.ancestral), {**OF_SAMPLER, "variance": "upper"}),
    "samplers.euler": (drawn(samplers.euler), OF_SAMPLER),
    "samplers.heun": (drawn(samplers.heun), OF_SAMPLER),
    "samplers.euler_maruyama": (drawn(samplers.euler_maruyama), OF_SAMPLER),
    "samplers.edm": (
        drawn(samplers.edm),
        {**OF_SAMPLER, "churn": 0.1, "s_tmin": 0.0, "s_tmax": 1.0, "s_noise": 1.0},
    ),
    "samplers.dpm_solver_pp": (drawn(samplers.dpm_solver_pp), {**OF_SAMPLER, "order": 2}),
    "samplers.dpm_solver_pp_sde": (drawn(samplers.dpm_solver_pp_sde), OF_SAMPLER),
    "samplers.unipc": (drawn(samplers.unipc), {**OF_SAMPLER, "order": 2}),
    "samplers.deis": (drawn(samplers.deis), {**OF_SAMPLER, "order": 2}),
    "samplers.adaptive": (
        drawn(samplers.adaptive),
        {**OF_SAMPLER, "rtol": 1e-2, "atol": 1e-2, "max_steps": 256},
    ),
    "samplers.count_calls": (
        samplers.count_calls,
        {"sampler": samplers.ddim(VP, DENOISE), "ts": TS},
    ),
    "samplers.langevin": (
        lambda score, step_size, noise: sample(
            KEY, samplers.langevin(score, step_size, noise=noise), X, TS
        ),
        {"score": denoisers.to_score(VP, DENOISE), "step_size": 0.1, "noise": 1.0},
    ),
    "samplers.predictor_corrector": (
        samplers.predictor_corrector,
        {
            "predictor": samplers.ddim(VP, DENOISE),
            "corrector": samplers.langevin(denoisers.to_score(VP, DENOISE), 0.1),
            "num_corrections": 1,
        },
    ),
    "samplers.sdedit": (
        lambda process, x0, t_start: sample(
            KEY, samplers.sdedit(process, samplers.ddim(VP, DENOISE), x0, t_start), X, TS
        ),
        {"process": VP, "x0": X, "t_start": float(TS[0])},
    ),
    "samplers.inpainting": (
        lambda process, x0, known, t_start: sample(
            KEY, samplers.inpainting(process, samplers.ddim(VP, DENOISE), x0, known, t_start), X, TS
        ),
        {"process": VP, "x0": X, "known": X > 0, "t_start": float(TS[0])},
    ),
    "sample": (
        sample,
        {"key": KEY, "sampler": samplers.ddim(VP, DENOISE), "x_T": X, "ts": TS}
        | {"index": jnp.arange(4)},
    ),
    "samplers.encode": (
        samplers.encode,
        {"sampler": samplers.ddim(VP, DENOISE), "x0": X, "ts": TS[::-1]},
    ),
    "likelihood.log_prob": (
        likelihood.log_prob,
        {"process": VP, "denoise": DENOISE, "x": X, "key": KEY, "num_probes": 1}
        | {"rtol": 1e-1, "atol": 1e-1, "t_min": 0.01, "max_steps": 256},
    ),
    "likelihood.elbo": (
        likelihood.elbo,
        {"key": KEY, "process": VP, "denoise": DENOISE, "x0": X, "ts": TS.at[-1].set(0.1)},
    ),
    "likelihood.bits_per_dim": (
        likelihood.bits_per_dim,
        {"log_prob": T, "num_dims": 2, "bin_width": 0.1},
    ),
    "likelihood.importance_weighted": (likelihood.importance_weighted, {"log_weights": X}),
    "likelihood.levels_log_prob": (
        likelihood.levels_log_prob,
        {"key": KEY, "log_density": lambda key, x: -(x**2).reshape(len(x), -1).sum(1)}
        | {"levels": LEVELS, "num_levels": 16, "num_samples": 1},
    ),
    "Mixture": (
        Mixture,
        {"weights": jnp.ones(1), "means": jnp.zeros((1, 2)), "covariances": jnp.eye(2)[None]},
    ),
    "Mixture.log_prob": (lambda x: MIXTURE.log_prob(x), {"x": X}),
    "Mixture.score": (lambda x: MIXTURE.score(x), {"x": X}),
    "Mixture.sample": (lambda key, n: MIXTURE.sample(key, n), {"key": KEY, "n": 3}),
    "Mixture.diffuse": (
        lambda process, t: MIXTURE.diffuse(process, t),
        {"process": VP, "t": jnp.asarray(0.5)},
    ),
    "metrics.frechet": (metrics.frechet, {"x": POINTS, "y": POINTS}),
    "metrics.mmd": (metrics.mmd, {"x": POINTS, "y": POINTS, "bandwidth": 1.0, "block": 8}),
    "metrics.sliced_wasserstein": (
        metrics.sliced_wasserstein,
        {"key": KEY, "x": POINTS, "y": POINTS, "num_projections": 4, "p": 2},
    ),
    "metrics.precision_recall": (
        metrics.precision_recall,
        {"real": POINTS, "fake": POINTS, "k": 3},
    ),
    "metrics.psnr": (metrics.psnr, {"x": X, "y": X + 0.1, "data_range": 2.0}),
    "metrics.ssim": (metrics.ssim, {"x": PICTURES, "y": PICTURES, "data_range": 2.0}),
    "training.init": (
        lambda params, ema_decay: training.init(params, OPTIMIZER, ema_decay=ema_decay),
        {"params": PARAMS, "ema_decay": 0.9},
    ),
    "training.make_update": (
        updated,
        {"loss_fn": LOSS, "optimizer": OPTIMIZER, "ema_decay": 0.9, "accumulate": 1}
        | {"key": KEY, "batch": BATCH},
    ),
    "training.ema.exponent": (ema.exponent, {"std": 0.1}),
    "training.parallel.make_mesh": (parallel.make_mesh, {"data": 1, "fsdp": 1}),
}
"""By name: a function, and arguments that it takes."""

ANY_PYTREE = {"null_cond", "params", "ema_decay"}
"""Arguments that may be nearly anything."""

NONSENSE = {
    "text": "text",
    "an object": object(),
    "a dictionary": {"a": 1},
    "a class": int,
    "a text array": np.array("x"),
    "a complex number": 1j,
}
"""What no argument but a pytree can be: to take it is wrong, whatever comes out."""
OTHERS = {
    "None": None,
    "True": True,
    "-1": -1,
    "0": 0,
    "2.5": 2.5,
    "NaN": float("nan"),
    "inf": float("inf"),
    "an empty list": [],
    "an empty array": np.zeros(0),
    "an empty batch": jnp.zeros((0, 2)),
    "one row more": jnp.ones((5, 2)),
    "a rank too many": jnp.ones((4, 2, 3)),
    "integers": jnp.arange(4),
    "bytes": jnp.zeros((4, 2), jnp.uint8),
    "NaNs": jnp.full((4, 2), jnp.nan),
    "half precision": jnp.ones((4, 2), jnp.bfloat16),
    "a function of nothing": lambda: 0,
    "a function of all": lambda *args, **options: 0.0,
    "a factory": processes.vp,
    "a process": VP,
    "a key": KEY,
    "row keys": jax.random.split(KEY, 3),
    "a legacy key": jax.random.PRNGKey(0),
    "a traced-like shape": jax.ShapeDtypeStruct((4, 2), jnp.float32),
    "a large number": 1e30,
}


def refusal_names(message, names):
    """Tell whether a message names an argument, as `name` or `name[...]`."""
    quoted = "|".join(map(re.escape, names))
    # the last are the words of what was given: a process for a function, a denoiser of 2-D points
    inner = "x|x_t|x0|t|t_max|beta_min|log_snr_shift"
    return re.search(rf"`({quoted})\b|(batch|cond)\[|`({inner})`", message) is not None


def replace_and_call(case, argument, kind):
    function, valid = CASES[case]
    value = (NONSENSE | OTHERS)[kind]
    names = getattr(function, "parameters", None) or list(valid)
    refusal = None
    try:
        jax.block_until_ready(function(**{**valid, argument: value}))
    except (TypeError, ValueError) as error:
        refusal = str(error)
    what = f"{case}({argument}={kind})"
    if refusal is None:
        nonsense = kind in NONSENSE and argument not in ANY_PYTREE
        assert not nonsense, f"{what} is accepted"
    else:
        named = refusal_names(refusal, {*names, *valid})
        assert named, f"{what} is refused without an argument's name: {refusal}"


def arguments_of(case):
    return sorted(CASES[case][1])


def fuzz(case, max_examples):
    @settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(arguments_of(case)), st.sampled_from(sorted(NONSENSE | OTHERS)))
    def run(argument, kind):
        replace_and_call(case, argument, kind)

    run()


each_case = pytest.mark.parametrize("case", CASES)


@pytest.mark.slow
@each_case
def test_the_call_that_is_to_be_spoilt_works(case):
    function, valid = CASES[case]
    jax.block_until_ready(function(**valid))


@each_case
def test_a_wrong_argument_is_refused_by_its_name(case):
    fuzz(case, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "2")))


@pytest.mark.slow
@each_case
def test_every_wrong_argument_is_refused_by_its_name(case):
    """All there is to try, one by one: a few hundred calls a function."""
    failures = []
    for argument in arguments_of(case):
        for kind in NONSENSE | OTHERS:
            try:
                replace_and_call(case, argument, kind)
            except Exception as error:  # noqa: BLE001
                failures.append(f"{argument}={kind}: {type(error).__name__}: {error}"[:300])
    assert not failures, "\n".join(failures)


def test_every_public_function_of_the_core_is_tried():
    """A function that is added must get a case, or stand here with the reason why not."""
    elsewhere = {
        "processes.flow",  # takes nothing
        "timesteps.draw_uniform",
        "timesteps.draw_stratified",
        "weightings.simple",
        "weightings.likelihood",
        "likelihood.uniform",
        "guidance.linear",  # a rule: called by guidance with arrays of one shape
        "likelihood.default_t_min",  # of a process alone
        "timesteps.start",  # of a process, and what is true or not
        "denoisers.conditioned",  # tested in test_model
        "denoisers.as_model",  # the first arguments of every loss
        "likelihood.dequantized",  # tested in test_dequantization
        "likelihood.logistic_normal",
        "metrics.c2st",  # trains a classifier
        "metrics.frechet_of_moments",
        "metrics.merge",
        "metrics.moments",
    }
    modules = (processes, timesteps, weightings, guidance, losses, samplers, likelihood, metrics)
    for module in (*modules, denoisers, forward, predictions):
        short = module.__name__.removeprefix("jaxdiff.")
        for name in getattr(module, "__all__", dir(module)):
            found = getattr(module, name)
            if not inspect.isfunction(found) or not found.__module__.startswith(module.__name__):
                continue
            if name.startswith(("_", "check_", "require_", "step_", "stratified")):
                continue
            full = f"{short}.{name}"
            known = full in CASES or name in CASES or full in elsewhere
            assert known, f"{full} has no case here"
