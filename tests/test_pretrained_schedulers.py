"""Processes of schedulers' configs: equal to their formulae, and to diffusers as far as it goes."""

import json

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from peers import common

from jaxdiff import processes
from jaxdiff.pretrained import schedulers
from jaxdiff.pretrained.errors import WeightsError

GOLDEN = common.read("schedulers")
SD15 = json.loads("""{
  "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
  "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": false,
  "num_train_timesteps": 1000, "set_alpha_to_one": false, "skip_prk_steps": true,
  "steps_offset": 1, "trained_betas": null}""")


@jax.jit
def _alpha(process, times):
    return process.alpha(times)


def alpha_bar(schedule):
    times = np.arange(1, schedule.num_steps + 1) / schedule.num_steps
    return np.asarray(_alpha(schedule.process, times)) ** 2


@pytest.mark.parametrize("name", GOLDEN.config)
def test_chains_are_those_of_diffusers(name):
    """To what the source loses: betas and 1 - beta are float32 there, products of these exact."""
    schedule = schedulers.read(GOLDEN.config[name])
    betas, cumulative = GOLDEN.arrays[name].astype(np.float64)
    rounded = (1 - betas).astype(np.float32)
    np.testing.assert_array_equal(np.cumprod(rounded, dtype=float).astype(np.float32), cumulative)
    if GOLDEN.config[name].get("rescale_betas_zero_snr"):
        # Roots of products are shifted too, each to 2^-24, and made into betas again.
        allowed = np.sqrt(len(betas)) * 2.0**-23
        np.testing.assert_allclose(np.sqrt(alpha_bar(schedule)), np.sqrt(cumulative), atol=allowed)
        return
    np.testing.assert_allclose(schedule.process.betas, betas, rtol=2.0**-22)
    # A step is off by half a unit of its 1 - beta, and by its beta; the product once more.
    lost = np.cumsum((np.spacing(rounded) / 2 + 2.0**-22 * betas) / (1 - betas)) + 2.0**-24
    assert (np.abs(alpha_bar(schedule) / cumulative - 1) <= lost).all()


def exact(config):
    """Cumulative products of 1 - beta to thirty digits, by the formulae."""
    steps = config.get("num_train_timesteps", 1000)
    start, end = (
        mpmath.mpf(config.get(k, v)) for k, v in (("beta_start", 1e-4), ("beta_end", 0.02))
    )
    grid = [mpmath.mpf(i) / (steps - 1) for i in range(steps)]
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        betas = [start + (end - start) * u for u in grid]
    elif kind == "scaled_linear":
        low, high = mpmath.sqrt(start), mpmath.sqrt(end)
        betas = [(low + (high - low) * u) ** 2 for u in grid]
    else:
        shift = mpmath.mpf(0.008)
        bar = [
            mpmath.cos((mpmath.mpf(i) / steps + shift) / (1 + shift) * mpmath.pi / 2) ** 2
            for i in range(steps + 1)
        ]
        betas = [min(1 - b / a, mpmath.mpf(0.999)) for a, b in zip(bar, bar[1:], strict=False)]
    products = [mpmath.mpf(1)]
    for beta in betas:
        products.append(products[-1] * (1 - beta))
    if config.get("rescale_betas_zero_snr"):
        roots = [mpmath.sqrt(product) for product in products[1:]]
        scale = roots[0] / (roots[0] - roots[-1])
        return np.asarray([float(((root - roots[-1]) * scale) ** 2) for root in roots])
    return np.asarray([float(product) for product in products[1:]])


@pytest.mark.parametrize("name", ["linear", "sd", "cosine", "zero_snr"])
def test_chains_are_exact_in_double_precision(name):
    with mpmath.workdps(30):
        wanted = exact(GOLDEN.config[name])
    schedule = schedulers.read(GOLDEN.config[name])
    # 1e-12, and what float64 loses of 1 - alpha_bar where cos^2 or a shifted root goes to 0.
    np.testing.assert_allclose(alpha_bar(schedule), wanted, rtol=1e-12, atol=1e-17)
    assert wanted.shape == (schedule.num_steps,)


def test_a_published_config_is_read():
    schedule = schedulers.read(SD15)
    assert (schedule.prediction, schedule.num_steps, schedule.clip) == ("eps", 1000, None)
    assert alpha_bar(schedule)[-1] == pytest.approx(0.00466, rel=1e-3)
    np.testing.assert_allclose(schedule.step(jnp.asarray([0.001, 1.0])), [0, 999], atol=1e-12)


@pytest.mark.parametrize(
    ("predicted", "kind"), [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")]
)
def test_predictions_have_our_names(predicted, kind):
    assert schedulers.read(SD15 | {"prediction_type": predicted}).prediction == kind


def test_what_differs_only_in_sampling_is_one_process():
    wanted = schedulers.read(SD15)
    for kind in ("DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LMSDiscrete"):
        given = SD15 | {"_class_name": f"{kind}Scheduler", "use_karras_sigmas": True}
        jax.tree.map(np.testing.assert_array_equal, schedulers.read(given), wanted)


def test_zero_terminal_snr_ends_at_exactly_zero():
    schedule = schedulers.read(SD15 | {"rescale_betas_zero_snr": True})
    assert float(schedule.process.alpha(jnp.asarray(1.0))) == 0.0


def test_flows_are_flows():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    schedule = schedulers.read(config | {"shift": 3.0, "base_shift": 0.5})
    assert isinstance(schedule.process, processes.Flow)
    assert (schedule.prediction, schedule.shift) == ("velocity", 3.0)
    assert float(schedule.step(jnp.asarray(0.25))) == 250.0
    by_unipc = {
        "_class_name": "UniPCMultistepScheduler",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "prediction_type": "flow_prediction",
    }
    assert schedulers.read(by_unipc) == schedule


def test_the_limit_of_samples_is_told():
    ddpm = {"_class_name": "DDPMScheduler"}
    assert schedulers.read(ddpm).clip == 1.0
    assert schedulers.read(ddpm | {"clip_sample": False}).clip is None
    assert schedulers.read(ddpm | {"clip_sample_range": 2.0}).clip == 2.0
    assert schedulers.read({"_class_name": "HeunDiscreteScheduler"}).clip is None
    assert schedulers.read({"_class_name": "PNDMScheduler", "clip_sample": True}).clip is None


def test_a_learned_variance_is_left_out_where_the_network_leaves_it_out():
    config = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    assert schedulers.read(config, cuts_variance=True).prediction == "eps"
    with pytest.raises(WeightsError, match="learned_range"):
        schedulers.read(config)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "`_class_name`.*EDMEulerScheduler"),
        ({"_class_name": "LCMScheduler"}, "`_class_name`.*LCMScheduler"),
        ({"_class_name": None}, "`_class_name`.*None"),
        ({"beta_schedule": "sigmoid"}, "`beta_schedule`.*sigmoid"),
        ({"prediction_type": "flow_prediction"}, "`prediction_type`.*flow_prediction"),
        ({"use_flow_sigmas": True}, "`prediction_type`.*epsilon"),
        ({"thresholding": True}, "`thresholding`.*True"),
        ({"timestep_type": "continuous"}, "`timestep_type`.*continuous"),
        ({"use_dynamic_shifting": True}, "`use_dynamic_shifting`"),
        ({"shift_terminal": 0.02}, "`shift_terminal`"),
        ({"predict_epsilon": False}, "'predict_epsilon'"),
        ({"trained_betas": [0.1, 0.2]}, "`trained_betas`.*1000"),
        ({"trained_betas": [0.1, "x"], "num_train_timesteps": 2}, "`trained_betas`"),
        ({"trained_betas": [0.1, 1.2], "num_train_timesteps": 2}, "betas"),
        ({"beta_start": "x"}, "`beta_start`.*'x'"),
        ({"beta_end": 2.0}, "betas"),
        ({"num_train_timesteps": 0}, "`num_train_timesteps`"),
        ({"num_train_timesteps": 2.5}, "`num_train_timesteps`"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(change, match):
    with pytest.raises(WeightsError, match=match):
        schedulers.read(SD15 | change)
