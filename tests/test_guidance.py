import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE, PROCESSES, known

from jaxdiff import (
    Mixture,
    denoisers,
    guidance,
    predictions,
    processes,
    sample,
    samplers,
    timesteps,
)
from jaxdiff.guidance import classifier, classifier_free, classifier_free_batched, dps, interval

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X_T = jnp.asarray(RNG.normal(size=(4, 2)))
VP, FLOW = processes.vp(), processes.flow()
COMPONENT = Mixture(np.ones(1), MIXTURE.means[1:], MIXTURE.covariances[1:])
SCALES = jnp.array([0.0, 1.0, 2.5, -1.0])
MEAN, STD, MASK = np.array([0.5, -1.0, 2.0]), 0.7, np.array([1.0, 0.0, 1.0])
X3 = jnp.asarray(RNG.normal(size=(4, 3)))


def close(actual, expected, rtol=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-10)


# --- Exact: a mixture, and one of its components as the condition ---------------------------


def log_responsibility(process):
    """The exact log p(component 1 | x_t), up to its prior, at one time or at one a row."""

    def at_one_time(x_t, t):
        component = COMPONENT.diffuse(process, t).log_prob(x_t)
        return component - MIXTURE.diffuse(process, t).log_prob(x_t)

    def log_prob(x_t, t):
        return at_one_time(x_t, t) if t.ndim == 0 else jax.vmap(at_one_time)(x_t, t)

    return log_prob


@jax.jit
def exact(process, t, scale):
    mixture, component = MIXTURE.denoiser(process), COMPONENT.denoiser(process)
    log_prob = log_responsibility(process)
    made = {
        "mixture": mixture,
        "component": component,
        "classifier_1": classifier(process, mixture, log_prob, 1.0),
        "classifier": classifier(process, mixture, log_prob, scale),
        "classifier_free": classifier_free(component, mixture, scale),
    }
    rows = jnp.full(4, t)
    return {name: (denoise(X_T, t), denoise(X_T, rows)) for name, denoise in made.items()}


@pytest.mark.parametrize("name", ["vp", "flow", "edm", "zero_snr"])
def test_guidance_by_the_exact_classifier_is_exact(name):
    t = 0.4 * PROCESSES[name].t_max
    found = exact(known(name, t), t, SCALES)
    assert np.abs(found["mixture"][0] - found["component"][0]).max() > 0.1
    for one_time, rows in found.values():
        close(rows, one_time)
    close(found["classifier_1"][0], found["component"][0])
    close(found["classifier_free"][0], found["classifier"][0])
    close(found["classifier"][0][0], found["mixture"][0][0])
    close(found["classifier"][0][1], found["component"][0][1])


@pytest.mark.parametrize("name", ["flow", "zero_snr"])
def test_a_classifier_changes_nothing_where_there_is_no_signal(name):
    t = PROCESSES[name].t_max
    found = exact(known(name, t), t, SCALES)
    for one_time, rows in (found["classifier"], found["classifier_1"]):
        np.testing.assert_array_equal(one_time, found["mixture"][0])
        np.testing.assert_array_equal(rows, found["mixture"][1])


def test_a_classifier_of_scale_0_is_the_denoiser():
    assert classifier(VP, jnp.multiply, jnp.multiply, 0.0) is jnp.multiply


# --- Who is evaluated, and with how many rows -----------------------------------------------


def counted(calls, name, factor):
    def denoise(x_t, t):
        calls.append(name)
        return factor * x_t

    return denoise


@pytest.mark.parametrize(
    ("scale", "rule", "evaluated"),
    [
        (1.0, guidance.linear, "c"),
        (np.ones(4), guidance.linear, "c"),
        (1, guidance.rescaled(0.5), "c"),
        (1.0, guidance.projected(), "c"),
        (0.0, guidance.linear, "u"),
        (0.0, guidance.projected(), "cu"),
        (2.0, guidance.linear, "cu"),
        (np.array([1.0, 1.0, 1.0, 0.0]), guidance.linear, "cu"),
    ],
)
@pytest.mark.parametrize("make", [classifier_free, guidance.autoguidance])
def test_a_known_scale_evaluates_only_what_it_needs(make, scale, rule, evaluated):
    calls = []
    parts = [counted(calls, name, factor) for name, factor in (("c", 2.0), ("u", 3.0))]
    guided = make(*parts, scale, rule=rule)(X_T, jnp.asarray(0.5))
    assert "".join(calls) == evaluated
    rows = jnp.reshape(jnp.broadcast_to(scale, 4), (4, 1))
    close(guided, rule(2.0 * X_T, 3.0 * X_T, rows))


COND = {"label": np.array([1, 2, 3, 4], np.int32), "text": RNG.normal(size=(4, 2))}
NULL = {"label": 0, "text": np.zeros(2)}


@pytest.mark.parametrize("t", [0.5, np.array([0.1, 0.2, 0.3, 0.4])])
@pytest.mark.parametrize(("scale", "rows"), [(2.5, 8), (SCALES, 8), (1.0, 4), (0.0, 4)])
def test_the_batched_model_is_the_unbatched_one_in_one_call(scale, rows, t):
    t, calls = jnp.asarray(t), []

    def model(x_t, t, cond):
        calls.append((x_t.shape, t.shape, cond["label"].shape, cond["label"].dtype))
        t = jnp.reshape(t, (-1, 1)) if t.ndim else t
        return jnp.tanh(x_t + t * cond["text"]) + cond["label"].reshape(-1, 1)

    batched = classifier_free_batched(model, COND, NULL, scale)(X_T, t)
    assert calls == [((rows, 2), (rows,) * t.ndim, (rows,), np.int32)]
    null = {"label": np.zeros(4, np.int32), "text": np.zeros((4, 2))}
    parts = [lambda x, t, cond=cond: model(x, t, cond) for cond in (COND, null)]
    close(batched, classifier_free(*parts, scale)(X_T, t))


def test_the_batched_model_gives_its_v_as_the_unbatched_one_does():
    def network(x_t, t, cond=None):
        return jnp.tanh(x_t + cond["text"])

    t, null = jnp.asarray(0.4), {"text": np.zeros((4, 2))}
    cond = {"text": COND["text"]}
    denoise = denoisers.from_network(network, VP, "eps")
    parts = [denoisers.conditioned(denoise, each) for each in (cond, null)]
    batched = classifier_free_batched(denoise, cond, null, 2.5)
    close(batched.v(X_T, t), classifier_free(*parts, 2.5).v(X_T, t))
    assert classifier_free_batched(denoise, cond, null, 2.5, rule=guidance.projected()).v is None
    assert classifier_free_batched(lambda x, t, cond: x, cond, null, 2.5).v is None


def test_the_batched_model_gets_the_conditional_rows_first():
    first = []

    def model(x_t, t, cond):
        first.append(cond[:4])
        return x_t

    classifier_free_batched(model, jnp.arange(1, 5), 0, 3.0)(X_T, 0.5)
    np.testing.assert_array_equal(first[0], [1, 2, 3, 4])


def halves(ran, low=0.5, high=2.0, process=VP):
    def part(name, factor):
        def denoise(x_t, t):
            jax.debug.callback(lambda: ran.append(name))
            return factor * x_t

        return denoise

    return interval(process, part("guided", 2.0), part("conditional", 1.0), low, high)


TIMES = [VP.time_of_log_snr(-2 * jnp.log(level)) for level in (0.4, 1.0, 2.1)]


def test_only_one_denoiser_runs_at_one_time():
    ran, traced = [], []
    denoise = jax.jit(lambda process, t, low: halves(ran, low, process=process)(X_T, t))
    for t, name in zip(TIMES, ["conditional", "guided", "conditional"], strict=True):
        for run, names in ((denoise(VP, t, 0.5), ran), (halves(traced)(X_T, t), traced)):
            close(run, X_T * {"conditional": 1.0, "guided": 2.0}[name])
            jax.effects_barrier()
            assert names == [name]
            names.clear()


def test_the_interval_is_chosen_in_python_where_all_is_known():
    calls = []
    part = [counted(calls, name, 1.0) for name in "gc"]
    denoise = interval(VP, *part, 0.5, 2.0)
    for t, evaluated in [
        (TIMES[0], "c"),
        (TIMES[1], "g"),
        (jnp.full(4, TIMES[1]), "g"),
        (jnp.full(4, TIMES[2]), "c"),
        (jnp.stack([*TIMES, TIMES[0]]), "gc"),
    ]:
        jax.jit(lambda x, t=t: denoise(x, t))(X_T)
        assert "".join(calls) == evaluated
        calls.clear()


def test_the_interval_is_that_of_each_row():
    times = jnp.stack([TIMES[1], TIMES[0], TIMES[2], TIMES[1]])
    expected = X_T * np.array([[2.0], [1.0], [1.0], [2.0]])
    close(halves([])(X_T, times), expected)
    close(jax.jit(halves([]))(X_T, times), expected)


@pytest.mark.parametrize(("high", "factor"), [(np.inf, 2.0), (1e9, 1.0)])
def test_pure_noise_is_at_level_infinity(high, factor):
    ones = jnp.ones(4)
    for denoise in (halves([], 1.0, high, FLOW), jax.jit(halves([], 1.0, high, FLOW))):
        close(denoise(X_T, ones[0]), factor * X_T)
        close(denoise(X_T, ones), factor * X_T)
    close(halves([], 0.0, 1.0, FLOW)(X_T, 0.0 * ones), 2.0 * X_T)  # and no noise at level 0


# --- Rules ----------------------------------------------------------------------------------


C, U = jnp.asarray(RNG.normal(size=(2, 3, 2, 2)))
W = jnp.array([2.0, -1.0, 5.0]).reshape(3, 1, 1)


def test_linear_by_hand():
    close(guidance.linear(jnp.array([3.0]), jnp.array([1.0]), 4.0), [9.0])


def test_rescaled_has_the_contrast_of_the_conditional():
    found, plain = guidance.rescaled(1.0)(C, U, W), guidance.linear(C, U, W)
    close(found.std((1, 2)), C.std((1, 2)))
    close(found / plain, (C.std((1, 2)) / plain.std((1, 2)))[:, None, None] * np.ones((3, 2, 2)))
    close(guidance.rescaled(0.0)(C, U, W), plain)
    close(guidance.rescaled(0.7)(C, U, W), 0.7 * found + 0.3 * plain)
    # by hand: linear is [-1, 3] with std 2, conditional has std 1
    by_hand = guidance.rescaled(0.5)(jnp.array([[0.0, 2.0]]), jnp.array([[1.0, 1.0]]), 2.0)
    close(by_hand, [[-0.75, 2.25]])


def test_rescaling_something_flat_changes_nothing():
    flat = jnp.ones((2, 3))
    close(guidance.rescaled(0.7)(flat, 3.0 * flat, 2.0), -flat)


def test_projected_is_the_published_formula():
    c, u = jnp.array([[2.0, 0.0]]), jnp.array([[-1.0, -4.0]])  # d = (3, 4) of norm 5
    close(guidance.projected()(c, u, 3.0), [[2.0, 8.0]])
    close(guidance.projected(0.5)(c, u, 3.0), [[5.0, 8.0]])
    close(guidance.projected(0.5, 2.5)(c, u, 3.0), [[3.5, 4.0]])
    close(guidance.projected(1.0, 7.0)(c, u, 3.0), guidance.linear(c, u, 3.0))


def test_projected_moves_across_the_conditional_only():
    close(guidance.projected(1.0)(C, U, W), guidance.linear(C, U, W))
    move = guidance.projected()(C, U, W) - C
    assert np.abs(move).min() > 1e-3
    close(jnp.sum(move * C, (1, 2)), np.zeros(3))
    close(guidance.projected(1.0, 0.1)(C, U, 2.0 * jnp.ones((3, 1, 1))) - C, 0.1 * direction(C - U))


def direction(d):
    return d / np.linalg.norm(d.reshape(3, -1), axis=1).reshape(3, 1, 1)


def test_dynamic_threshold_by_hand():
    x0 = jnp.array([[[0.0, -1.0], [2.0, 4.0]], [[0.5, -0.5], [0.1, 0.9]]])
    found = guidance.dynamic_threshold(lambda x, t: x, percentile=2.0 / 3.0)(x0, 0.5)
    close(found[0], [[0.0, -0.5], [1.0, 1.0]])  # s = 2
    np.testing.assert_array_equal(found[1], x0[1])  # inside the bound
    found = guidance.dynamic_threshold(lambda x, t: x, 1.0, bound=2.0)(x0, 0.5)
    close(found[0], 0.5 * x0[0])


# --- Inverse problems -----------------------------------------------------------------------


def gaussian(process):
    def denoise(x_t, t):
        t = jnp.reshape(t, (-1, 1)) if jnp.ndim(t) else t
        alpha, variance = process.alpha(t), process.variance(t)
        return MEAN.reshape(1, 3) + alpha * STD**2 / (alpha**2 * STD**2 + variance) * (
            x_t - alpha * MEAN.reshape(1, 3)
        )

    return denoise


def masked(x0):
    return MASK.reshape(1, 3) * x0


def summed(x0):
    """Rows orthonormal, so that A A^T = I."""
    return jnp.stack([x0[:, 0] + x0[:, 1], x0[:, 0] - x0[:, 1]], 1) / jnp.sqrt(2.0)


Y = {masked: masked(jnp.asarray(RNG.normal(size=(4, 3)))), summed: X3[:, :2]}
MATRIX = {masked: np.diag(MASK), summed: summed(jnp.eye(3)).T}


@jax.jit
def solve(process, t, noise_std):
    found = {}
    for operator in (masked, summed):
        guided = dps(process, gaussian(process), operator, Y[operator], noise_std=noise_std,
                     data_std=STD)  # fmt: skip
        found[operator.__name__] = guided(X3, t), guided(X3, jnp.full(4, t))
    return found


@pytest.mark.parametrize("noise_std", [0.3, 0.0])
@pytest.mark.parametrize("name", ["vp", "flow", "edm", "zero_snr"])
def test_dps_is_the_exact_posterior_mean_for_gaussian_data(name, noise_std):
    t = 0.3 * PROCESSES[name].t_max
    process = known(name, t)
    alpha, variance = float(process.alpha(t)), float(process.variance(t))
    found = solve(process, t, noise_std)
    for operator in (masked, summed):
        # Kalman's formula: condition N(mean, spread I), which is p(x0 | x_t), on y.
        spread = 1.0 / (1.0 / STD**2 + alpha**2 / variance)
        mean = spread * (MEAN / STD**2 + alpha / variance * np.asarray(X3))
        A = MATRIX[operator]  # noqa: N806
        gram = spread * A @ A.T + noise_std**2 * np.eye(len(A))
        gain = spread * A.T @ np.linalg.pinv(gram)
        expected = mean + (np.asarray(Y[operator]) - mean @ A.T) @ gain.T
        for denoised in found[operator.__name__]:
            close(denoised, expected)


def test_dps_with_data_std_0_is_the_published_likelihood():
    plain = gaussian(VP)

    def log_prob(x_t, t):
        return -0.5 * jnp.sum((Y[masked] - masked(plain(x_t, t))) ** 2, 1) / 0.3**2

    guided = dps(VP, plain, masked, Y[masked], noise_std=0.3, data_std=0.0, scale=SCALES)
    published = classifier(VP, plain, log_prob, SCALES)
    close(*jax.jit(lambda x_t, t: (guided(x_t, t), published(x_t, t)))(X3, 0.4))


def test_dps_changes_nothing_without_signal_or_without_noise():
    for t in (1.0, 0.0):
        for found in solve(known("flow", t), t, 0.0).values():
            for denoised in found:
                close(denoised, gaussian(FLOW)(X3, t))


def test_sampling_keeps_the_observed_pixels():
    @jax.jit
    def run(process, x_T, ts):
        denoise = dps(process, gaussian(process), masked, Y[masked], data_std=STD)
        return sample(KEY, samplers.ddim(process, denoise), x_T, ts)

    x0 = run(VP, X3, timesteps.uniform(VP, 5))
    observed = MASK == 1
    close(x0[:, observed], Y[masked][:, observed])
    assert np.abs(x0[:, ~observed]).min() > 1e-3


# --- What all guidance promises -------------------------------------------------------------


def guided(x_t, t, shift=0.0, scale=3.0, process=FLOW):
    """Everything at once."""

    def strong(x_t, t):
        return jnp.tanh(x_t) + shift

    def weak(x_t, t):
        return 0.5 * x_t

    def log_prob(x_t, t):
        return -jnp.sum(x_t**2, 1)

    def model(x_t, t, cond):
        return jnp.tanh(x_t * cond)

    made = interval(
        process,
        classifier_free(strong, weak, scale, rule=guidance.rescaled(0.7)),
        classifier_free_batched(model, x_t, 0.0, scale, rule=guidance.projected(0.2, 1.0)),
        0.2,
        5.0,
    )
    made = classifier(process, made, log_prob, 0.1 * scale)
    made = dps(process, made, lambda x0: x0[:, :1], x_t[:, :1], noise_std=0.1)
    return guidance.dynamic_threshold(guidance.autoguidance(made, weak, scale))(x_t, t)


def test_guidance_composes_inside_one_compiled_sampler():
    traces = []

    @jax.jit
    @jax.value_and_grad
    def total(scale, shift, ts):
        def denoise(x_t, t):
            traces.append(1)
            return guided(x_t, t, shift, scale)

        x0 = sample(KEY, samplers.ddim(FLOW, denoise), X_T, ts)
        return jnp.sum(x0**2)

    ts = timesteps.uniform(FLOW, 4)
    value, slope = total(2.0, 0.1, ts)
    count = len(traces)
    other, _ = total(5.0, 0.1, ts)
    assert len(traces) == count
    assert value != other
    h = 1e-6
    close(slope, (total(2.0 + h, 0.1, ts)[0] - total(2.0 - h, 0.1, ts)[0]) / (2 * h), rtol=1e-5)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_gradients_are_finite_where_something_is_0(t):
    slopes = GRADIENT(X_T.at[0].set(0.0), jnp.asarray(t), 0.0, 3.0)
    assert all(np.isfinite(slope).all() for slope in slopes)
    rows = GRADIENT(X_T, jnp.full(4, t), 0.0, SCALES)
    assert all(np.isfinite(slope).all() for slope in rows)


GRADIENT = jax.jit(jax.grad(lambda *args: jnp.sum(guided(*args)), argnums=(0, 1, 2, 3)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, SCALES])
def test_the_result_has_the_dtype_of_x_t(dtype, scale):
    x_t = X_T.astype(dtype)

    def network(x_t, t):
        return x_t.astype(jnp.bfloat16)

    for t in (jnp.float32(0.5), jnp.full(4, 0.5)):
        assert jax.eval_shape(lambda x, t: guided(x, t, 0.0, scale), x_t, t).dtype == dtype
        made = classifier_free(network, network, scale)
        assert jax.eval_shape(made, x_t, t).dtype == dtype


def test_guided_denoisers_say_that_they_need_signal():
    eps = denoisers.from_network(lambda x, t: x, FLOW, "eps")
    ts = timesteps.uniform(FLOW, 2)
    for made in (
        classifier_free(eps, jnp.multiply, 2.0),
        classifier_free(jnp.multiply, eps, 2.0),
        classifier(FLOW, eps, jnp.multiply, 1.0),
        guidance.dynamic_threshold(interval(FLOW, jnp.multiply, eps, 0.0, 1.0)),
        dps(FLOW, eps, masked, X3),
    ):
        with pytest.raises(ValueError, match="alpha is 0 for a network that predicts eps"):
            sample(KEY, samplers.ddim(FLOW, made), X_T, ts)


def itself(x0):
    return x0


def same(x_t, t, cond=None):
    return x_t


def test_guidance_that_is_linear_hands_v_on():
    v, eps = (denoisers.from_network(lambda x, t: jnp.sin(x), VP, kind) for kind in ("v", "eps"))
    t = jnp.asarray(0.3)
    for scale in (1.0, 2.5, SCALES):
        made = interval(VP, classifier_free(v, eps, scale), eps, 0.0, 100.0)
        expected = predictions.convert(VP, "x0", "v", made(X_T, t), X_T, t)
        close(made.v(X_T, t), expected)
    assert classifier_free(v, lambda x, t: x, 2.0).v is None
    assert classifier_free(v, eps, 2.0, rule=guidance.rescaled(0.5)).v is None
    assert guidance.dynamic_threshold(v).v is None


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: classifier_free(same, same, "3"), "`scale` must hold real numbers; got '3'"),
        (lambda: classifier_free(same, None, 3.0), "`unconditional` must be a function"),
        (lambda: interval(processes.vp, same, same, 0.0, 1.0), "`process`"),
        (lambda: classifier(VP, same, None, 1.0), "`log_prob` must be a function"),
        (lambda: guidance.dynamic_threshold(same, "0.9"), "`percentile` must be a real number"),
        (lambda: guidance.rescaled(None), "`phi`"),
        (lambda: dps(VP, same, None, X_T), "`operator` must be a function"),
    ],
)
def test_what_is_no_number_or_function_is_refused(call, match):
    with pytest.raises(TypeError, match=match):
        call()


@pytest.mark.parametrize("percentile", [0, 1])
def test_whole_percentiles_are_percentiles(percentile):
    x0 = jnp.array([[0.0, -2.0, 4.0]])
    found = guidance.dynamic_threshold(lambda x, t: x, percentile)(x0, 0.5)
    close(found, np.clip(x0, -1.0, 1.0) if percentile == 0 else 0.25 * x0)


NAN, INF = np.nan, np.inf
HALF = jnp.asarray(0.5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: classifier_free(same, same, NAN), "`scale` must be finite.*nan"),
        (lambda: classifier_free(same, same, np.ones((4, 1))), "`scale`"),
        (lambda: classifier_free(same, same, np.ones(3))(X_T, HALF), r"`scale`.*\(4,\); got \(3,"),
        (lambda: classifier_free(same, same, np.arange(3))(X_T, HALF), r"`scale`.*\(4,\)"),
        (lambda: guidance.autoguidance(same, same, INF), "`scale`"),
        (
            lambda: classifier_free(lambda x, t: x[:2], same, 2.0)(X_T, HALF),
            "`conditional`.*shape",
        ),
        (lambda: classifier_free_batched(same, COND, {"label": 0}, 2.0), "`null`"),
        (lambda: classifier_free_batched(same, X_T, {"label": 0}, 2.0), "`null`"),
        (lambda: classifier_free_batched(same, X_T, np.zeros(3), 2.0), "`null`"),
        (lambda: classifier_free_batched(same, X_T[0], X_T, 2.0), "`null`"),
        (lambda: classifier_free_batched(same, X_T, 0.0, NAN), "`scale`"),
        (lambda: classifier_free_batched(same, X_T[:3], 0.0, 2.0)(X_T, HALF), "`cond`.*4 rows"),
        (lambda: classifier_free_batched(same, 1, 0, 1.0)(X_T, HALF), r"`cond`.*4 rows; got \(\)"),
        (lambda: interval(VP, same, same, 2.0, 1.0), "`low`.*2.0 and 1.0"),
        (lambda: interval(VP, same, same, -1.0, 1.0), "`low`.*-1.0"),
        (lambda: interval(VP, same, same, NAN, 1.0), "`low`"),
        (lambda: interval(VP, same, same, 0.0, NAN), "`high`"),
        (lambda: interval(VP, same, same, np.zeros(4), 1.0), "`low`"),
        (lambda: interval(VP, same, same, 0.0, 1.0)(X_T, jnp.linspace(0.1, 1, 3)), "`t`"),
        (lambda: classifier(VP, same, same, NAN), "`scale`"),
        (lambda: classifier(VP, same, same, 1.0)(X_T, HALF), "`log_prob`"),
        (lambda: guidance.rescaled(1.5), "`phi`.*1.5"),
        (lambda: guidance.rescaled(NAN), "`phi`"),
        (lambda: guidance.projected(INF), "`eta`"),
        (lambda: guidance.projected(0.0, 0.0), "`max_norm`"),
        (lambda: guidance.dynamic_threshold(same, 99.5), "`percentile`.*99.5"),
        (lambda: guidance.dynamic_threshold(same, 0.9, 0.0), "`bound`"),
        (lambda: dps(VP, same, itself, X_T, noise_std=-0.1), "`noise_std`.*-0.1"),
        (lambda: dps(VP, same, itself, X_T, data_std=INF), "`data_std`"),
        (lambda: dps(VP, same, itself, X_T, data_std=0.0), "`noise_std` or `data_std`"),
        (lambda: dps(VP, same, itself, X_T, scale=NAN), "`scale`"),
        (lambda: dps(VP, same, lambda x: x, X_T[:, :1])(X_T, HALF), r"`y`.*\(4, 2\); got \(4, 1"),
    ],
)
def test_bad_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
