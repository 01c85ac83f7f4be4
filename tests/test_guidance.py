import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, PROCESSES, known

from jaxdiff import Mixture, guidance, processes, sample, samplers, timesteps

KEY = jax.random.key(0)
X_T = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))
VP, FLOW = processes.vp(), processes.flow()
T = jnp.asarray(0.4)
COMPONENT = Mixture(np.ones(1), MIXTURE.means[1:], MIXTURE.covariances[1:])


def log_share(process):
    """The exact log p(component 1 | x_t)."""

    def log_prob(x_t, t):
        whole, part = MIXTURE.diffuse(process, t), COMPONENT.diffuse(process, t)
        return part.log_prob(x_t) + jnp.log(MIXTURE.weights[1]) - whole.log_prob(x_t)

    return log_prob


@functools.cache
def guided_by_classifier():
    @jax.jit
    def run(process, t, scale):
        denoise = MIXTURE.denoiser(process)
        by_classifier = guidance.classifier(process, denoise, log_share(process), scale)
        exact = COMPONENT.denoiser(process)
        free = guidance.classifier_free(exact, denoise, scale)
        return by_classifier(X_T, t), free(X_T, t), exact(X_T, t)

    return run


@pytest.mark.parametrize("name", ["vp", "flow", "edm", "zero_snr"])
def test_the_exact_classifier_makes_the_conditional_denoiser_and_classifier_free_guidance(name):
    t = 0.4 * PROCESSES[name].t_max
    by_classifier, free, exact = guided_by_classifier()(known(name, t), t, 1.0)
    np.testing.assert_allclose(by_classifier, exact, rtol=1e-9)
    np.testing.assert_allclose(free, exact, rtol=1e-12)
    by_classifier, free, _ = guided_by_classifier()(known(name, t), t, 2.5)
    np.testing.assert_allclose(by_classifier, free, rtol=1e-9)


def test_where_alpha_is_0_gradients_add_nothing_and_stay_finite():
    denoise = MIXTURE.denoiser(FLOW)
    by_classifier = guidance.classifier(FLOW, denoise, log_share(FLOW))
    by_measurement = guidance.dps(FLOW, denoise, lambda x: x, X_T)
    for guided in (by_classifier, by_measurement):
        value, slope = jax.jit(jax.value_and_grad(lambda x, g=guided: g(x, 1.0).sum()))(X_T)
        np.testing.assert_allclose(value, denoise(X_T, jnp.asarray(1.0)).sum(), rtol=1e-12)
        assert np.isfinite(slope).all()


def counting(scale):
    """A denoiser that counts the rows of each call."""
    rows = []

    def denoise(x_t, t):
        rows.append(x_t.shape[0])
        return scale * x_t

    return denoise, rows


def test_at_scale_1_and_0_only_one_model_is_evaluated():
    (conditional, with_rows), (unconditional, without_rows) = counting(0.5), counting(0.25)
    guided = guidance.classifier_free(conditional, unconditional, 1.0)
    np.testing.assert_allclose(guided(X_T, T), 0.5 * X_T)
    assert (with_rows, without_rows) == ([6], [])
    guided = guidance.classifier_free(conditional, unconditional, jnp.zeros(6))
    np.testing.assert_allclose(guided(X_T, T), 0.25 * X_T)
    assert (with_rows, without_rows) == ([6], [6])
    guided = guidance.autoguidance(conditional, unconditional, 3.0)
    np.testing.assert_allclose(guided(X_T, T), X_T)  # 0.25 + 3 (0.5 - 0.25)
    assert (with_rows, without_rows) == ([6, 6], [6, 6])


@pytest.mark.parametrize("times", [T, jnp.full(6, T)])
@pytest.mark.parametrize("rule", [guidance.linear, guidance.rescaled(0.5), guidance.projected()])
def test_one_batched_call_is_two_calls(rule, times):
    labels, calls = jnp.arange(6) % 3, []

    def denoise_cond(x_t, t, label):
        calls.append(x_t.shape[0])
        t = t if t.ndim == 0 else t[:, None]
        return jnp.tanh(x_t) * (1.0 + label[:, None]) + t

    scale = jnp.linspace(0.5, 3.0, 6)
    batched = guidance.classifier_free_batched(denoise_cond, labels, 7, scale, rule=rule)
    result = batched(X_T, times)
    assert calls == [12]
    conditional, unconditional = (
        lambda x, t, label=label: denoise_cond(x, t, label) for label in (labels, jnp.full(6, 7))
    )
    expected = guidance.classifier_free(conditional, unconditional, scale, rule=rule)
    np.testing.assert_allclose(result, expected(X_T, times), rtol=1e-12)
    calls.clear()
    guidance.classifier_free_batched(denoise_cond, labels, 7, 1.0, rule=rule)(X_T, times)
    assert calls == [6]


def test_outside_the_interval_only_the_conditional_model_runs():
    ran = []

    def telling(name, factor):
        def denoise(x_t, t):
            jax.debug.callback(lambda: ran.append(name))
            return factor * x_t

        return denoise

    limited = guidance.interval(
        VP, telling("guided", 2.0), telling("conditional", 1.0), jnp.asarray(0.5), 2.0
    )
    levels = jnp.array([0.1, 0.5001, 1.999, 2.1])
    times = VP.time_of_log_snr(-2.0 * jnp.log(levels))
    run = jax.jit(limited)
    for t, name in zip(times, ["conditional", "guided", "guided", "conditional"], strict=True):
        ran.clear()
        out = run(X_T[:4], t)
        jax.effects_barrier()
        assert ran == [name]
        np.testing.assert_allclose(out, X_T[:4] * (2.0 if name == "guided" else 1.0))
    rows = run(X_T[:4], times)  # one time an example
    np.testing.assert_allclose(rows, X_T[:4] * jnp.array([[1.0], [2.0], [2.0], [1.0]]))


def test_pure_noise_is_within_an_interval_without_end():
    limited = guidance.interval(FLOW, lambda x, t: 2.0 * x, lambda x, t: x, 1.0, np.inf)
    np.testing.assert_allclose(limited(X_T, jnp.asarray(1.0)), 2.0 * X_T)


def test_rules_are_what_they_say():
    conditional, unconditional = jnp.array([[3.0, 4.0]]), jnp.array([[3.0, 2.0]])
    linear = guidance.linear(conditional, unconditional, 3.0)
    np.testing.assert_allclose(linear, [[3.0, 8.0]])
    back = guidance.rescaled(1.0)(conditional, unconditional, 3.0)
    np.testing.assert_allclose(back, linear * 0.5 / 2.5)  # standard deviations 0.5 and 2.5
    half = guidance.rescaled(0.5)(conditional, unconditional, 3.0)
    np.testing.assert_allclose(half, linear * 0.6)
    # the difference (0, 2) has 2 * 4 / 25 (3, 4) along (3, 4)
    apg = guidance.projected()(conditional, unconditional, 3.0)
    np.testing.assert_allclose(apg, conditional + 2.0 * np.array([[-0.96, 2.0 - 1.28]]))
    np.testing.assert_allclose(jnp.sum((apg - conditional) * conditional), 0.0, atol=1e-12)
    all_of_it = guidance.projected(eta=1.0)(conditional, unconditional, 3.0)
    np.testing.assert_allclose(all_of_it, linear)
    short = guidance.projected(eta=1.0, max_norm=0.5)(conditional, unconditional, 3.0)
    np.testing.assert_allclose(short, [[3.0, 5.0]])


def test_dynamic_threshold_limits_each_example_by_its_own_percentile():
    x0_hat = jnp.array([[0.5, -0.25, 0.1, 0.9], [4.0, -2.0, 1.0, 0.0]])
    limited = guidance.dynamic_threshold(lambda x, t: x0_hat, percentile=2.0 / 3.0)
    out = limited(x0_hat, T)
    np.testing.assert_allclose(out[0], x0_hat[0])
    np.testing.assert_allclose(out[1], [1.0, -1.0, 0.5, 0.0])  # the percentile of |x0_hat| is 2


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
def test_dps_is_exact_for_a_mask_and_isotropic_gaussian_data(name, noise_std):
    std, mean, process = 0.7, jnp.array([[0.5, -1.0]]), PROCESSES[name]
    data = Mixture(np.ones(1), mean, std**2 * np.eye(2)[None])
    mask, t = jnp.array([[1.0, 0.0]]), 0.4 * process.t_max
    y = mask * jnp.full((6, 1), 0.9)
    guided = guidance.dps(
        process,
        data.denoiser(process),
        lambda x: mask * x,
        y,
        noise_std=noise_std,
        data_std=std,
    )
    alpha, variance = process.alpha(t), process.variance(t)
    # precisions add: of the prior, of x_t = alpha x0 + sigma eps, and of y where it sees
    precision = 1 / std**2 + alpha**2 / variance
    plain = (mean / std**2 + alpha * X_T / variance) / precision
    spread = 1 / precision
    seen = plain + spread / (spread + noise_std**2) * (y - plain)
    expected = jnp.where(mask > 0, seen, plain)
    for times in (t, jnp.full(6, t)):
        np.testing.assert_allclose(jax.jit(guided)(X_T, times), expected, rtol=1e-9)


def test_inpainting_keeps_what_was_seen():
    mask = jnp.array([[1.0, 0.0]])
    y = mask * jnp.full((6, 1), 0.8)

    @jax.jit
    def run(ts):
        guided = guidance.dps(VP, MIXTURE.denoiser(VP), lambda x: mask * x, y, data_std=0.9)
        return sample(KEY, samplers.ddim(VP, guided), X_T, ts)

    x0 = run(timesteps.log_snr(VP, 100, 1e-4))
    np.testing.assert_allclose(x0[:, 0], 0.8, atol=0.02)
    assert np.std(x0[:, 1]) > 0.1


def test_guidance_composes_within_sample_and_is_not_traced_again_for_new_scales():
    traces = []

    @jax.jit
    def run(scale, low, x_T):
        def conditional(x, t):
            traces.append(1)
            return jnp.tanh(x)

        free = guidance.classifier_free(
            conditional, lambda x, t: 0.1 * x, scale, rule=guidance.rescaled(0.7)
        )
        limited = guidance.interval(VP, guidance.dynamic_threshold(free), conditional, low, 5.0)
        x0 = sample(KEY, samplers.ddim(VP, limited), x_T, timesteps.uniform(VP, 5))
        return x0.sum(), x0

    slope = jax.jit(jax.grad(lambda *args: run(*args)[0], argnums=(0, 2)))
    for scale, low in ((2.0, 0.1), (3.0, 0.2)):
        assert np.isfinite(run(scale, low, X_T)[1]).all()
    assert len(traces) == 2  # within the interval and outside it
    assert all(np.isfinite(leaf).all() for leaf in slope(2.0, 0.1, X_T))


def test_a_network_of_low_precision_leaves_float32():
    def network(x_t, t):
        return x_t.astype(jnp.bfloat16)

    x_t, t = jnp.asarray(X_T, jnp.float32), jnp.float32(0.4)
    free = guidance.classifier_free(network, network, 2.0)
    others = [
        guidance.interval(VP, free, network, 0.5, 1.0),
        guidance.classifier(VP, network, lambda x, t: x.sum(1)),
        guidance.dps(VP, network, lambda x: x, x_t),
        guidance.dynamic_threshold(network),
    ]
    for guided in (free, *others):
        assert jax.eval_shape(guided, x_t, t).dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda d: guidance.interval(VP, d, d, 2.0, 1.0), "`low` must be at most `high`"),
        (lambda d: guidance.interval(VP, d, d, -1.0, 1.0), "`low`"),
        (lambda d: guidance.interval(VP, d, d, 0.0, np.nan), "`high`"),
        (lambda d: guidance.rescaled(1.5), "`phi`"),
        (lambda d: guidance.projected(max_norm=0.0), "`max_norm`"),
        (lambda d: guidance.dynamic_threshold(d, percentile=99.5), "`percentile`"),
        (lambda d: guidance.dynamic_threshold(d, bound=0.0), "`bound`"),
        (lambda d: guidance.dps(VP, d, d, X_T, noise_std=-1.0), "`noise_std`"),
        (lambda d: guidance.dps(VP, d, d, X_T, data_std=0.0), "both be 0"),
        (lambda d: guidance.dps(VP, d, lambda x: x, X_T[:2])(X_T, T), "`y` must have"),
        (lambda d: guidance.classifier_free(d, d, jnp.ones(3) * 2)(X_T, T), "must have shape"),
        (lambda d: guidance.classifier_free_batched(d, {"a": X_T}, 0, 2.0), "structure"),
        (lambda d: guidance.classifier_free_batched(d, X_T[:, 0], X_T[None], 2.0), "broadcast"),
        (
            lambda d: guidance.classifier_free_batched(d, jnp.arange(3), 0, 2.0)(X_T, T),
            "one entry an example",
        ),
    ],
)
def test_bad_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(lambda x, t: x)
