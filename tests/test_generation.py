"""Many samples: sample i is a function of (parameters, key, i, its conditioning)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import Model, denoisers, generation, guidance, processes, sample, samplers, timesteps

PROCESS, KEY = processes.vp(), jax.random.key(2)
TS = timesteps.uniform(PROCESS, 4)
MEANS = jnp.asarray([[-1.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
STD = 0.5
TRACES = []


def apply(params, x_t, t, cond=None, *, key=None):
    """The exact denoiser of N(means[cond], STD^2 I), or of N(0, STD^2 I)."""
    TRACES.append(x_t.shape)
    alpha, variance = PROCESS.alpha(t), PROCESS.variance(t)
    mean = jnp.zeros_like(x_t) if cond is None else params["means"][cond["class"]]
    gain = alpha * STD**2 / (alpha**2 * STD**2 + variance)
    gain, alpha = (
        jnp.reshape(each, jnp.shape(each) + (1,) * (jnp.ndim(t))) for each in (gain, alpha)
    )
    return mean + gain * (x_t - alpha * mean)


MODEL = Model(apply, PROCESS, "x0")
PARAMS = {"means": MEANS}


def make(make_sampler=samplers.ancestral, ts=TS, **options):
    return generation.make_generator(MODEL, make_sampler, ts, (2,), **options)


def conditioning(num_rows):
    return {"class": np.arange(num_rows) % 3}


@functools.cache
def ten():
    return make()(PARAMS, KEY, conditioning(10))


def test_a_sample_depends_on_its_number_only():
    generate = make(at_once=4)
    np.testing.assert_allclose(generate(PARAMS, KEY, conditioning(10)), ten(), rtol=1e-12)
    one = generate(PARAMS, KEY, {"class": np.asarray([7 % 3])}, first=7)
    np.testing.assert_allclose(one, ten()[7:8], rtol=1e-12)
    assert len({tuple(row) for row in ten()}) == 10


def test_it_is_what_sample_gives_of_the_numbers_of_rows():
    key_start, key_path = jax.random.split(KEY)
    x_T = PROCESS.prior_sample(key_start, (10, 2))  # noqa: N806
    sampler = samplers.ancestral(PROCESS, MODEL.denoiser(PARAMS, conditioning(10)))
    wanted = sample(key_path, sampler, x_T, TS)
    np.testing.assert_allclose(ten(), wanted, rtol=1e-12)


def test_many_samples_have_the_law_of_the_model():
    """Of the exact denoiser the reverse chain draws the data, up to its steps."""
    x0 = make(ts=timesteps.uniform(PROCESS, 200))(PARAMS, KEY, {"class": np.arange(3000) % 3})
    for label, mean in enumerate(MEANS):
        found = x0[label::3]
        stderr = STD / len(found) ** 0.5
        print(f"mean off by {np.abs(found.mean(0) - mean).max() / stderr:.1f} standard errors")
        np.testing.assert_allclose(found.mean(0), mean, atol=5 * stderr)
        np.testing.assert_allclose(found.std(0), STD, atol=5 * stderr)


def test_the_path_goes_from_noise_to_the_sample():
    x0, path = make()(PARAMS, KEY, conditioning(10), keep_path=True)
    assert path.shape == (len(TS), 10, 2)
    np.testing.assert_allclose(x0, ten(), rtol=1e-12)
    np.testing.assert_array_equal(path[-1], x0)
    wanted = PROCESS.prior_sample(jax.random.split(KEY)[0], (10, 2))
    np.testing.assert_allclose(path[0], wanted, rtol=1e-12)


def test_a_number_of_rows_has_no_conditioning():
    x0 = make(samplers.heun)(PARAMS, KEY, 5)
    assert x0.shape == (5, 2)
    np.testing.assert_allclose(make(samplers.heun)(PARAMS, KEY, 9, first=2)[:3], x0[2:], rtol=1e-12)


def test_guidance_is_a_denoiser_of_whatever_the_parameters_hold_and_compiles_once():
    def denoiser_of(shared, cond):
        towards, away = (MODEL.denoiser(shared["params"], each) for each in (cond, None))
        return guidance.classifier_free(towards, away, shared["scale"])

    generate = make(samplers.ddim, denoiser_of=denoiser_of)
    plain = make(samplers.ddim)(PARAMS, KEY, conditioning(6))
    guided = [
        generate({"params": PARAMS, "scale": jnp.asarray(scale)}, KEY, conditioning(6))
        for scale in (1.0,)
    ]
    np.testing.assert_allclose(guided[0], plain, rtol=1e-10)
    before = len(TRACES)
    far = generate({"params": PARAMS, "scale": jnp.asarray(2.0)}, KEY, conditioning(6))
    assert len(TRACES) == before
    assert np.abs(far - plain).max() > 0.1


def test_a_sampler_that_solves_row_by_row_is_given_the_conditioning():
    def by_row(process, denoise, *, cond):
        return samplers.ancestral(process, denoisers.conditioned(denoise, cond))

    def denoiser_of(params, cond):
        assert cond is None
        return lambda x_t, t, cond: apply(params, x_t, t, cond)

    found = make(by_row, denoiser_of=denoiser_of, by_row=True)(PARAMS, KEY, conditioning(10))
    np.testing.assert_allclose(found, ten(), rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: make(None), TypeError, "`make_sampler` must be a function"),
        (lambda: make(at_once=0), ValueError, "`at_once` must be at least 1"),
        (lambda: make(denoiser_of=3), TypeError, "`denoiser_of` must be a function"),
        (
            lambda: generation.make_generator(apply, samplers.ddim, TS, (2,)),
            TypeError,
            "`model` must be a Model",
        ),
        (lambda: make()(PARAMS, 0, 3), TypeError, "key"),
        (lambda: make()(PARAMS, KEY, 0), ValueError, "`rows` must be at least 1"),
        (lambda: make()(PARAMS, KEY, [1, 2]), TypeError, "`rows` must be a whole number"),
        (lambda: make()(PARAMS, KEY, None), TypeError, "`rows` must be a whole number"),
        (lambda: make()(PARAMS, KEY, 3, first=-1), ValueError, "`first` must be at least 0"),
        (
            lambda: make()(PARAMS, KEY, {"class": np.arange(3), "other": np.arange(2)}),
            ValueError,
            "must hold 3 rows",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()
