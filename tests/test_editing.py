"""Samplers that begin from an example, or keep what is known of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import few
from sampler_cases import SAMPLERS

from jaxdiff import Mixture, processes, sample, samplers, timesteps

VP, FLOW, KEY = processes.vp(), processes.flow(), jax.random.key(0)
ALONE = Mixture(np.ones(1), np.array([[0.3, -0.4]]), np.array([[[0.2, 0.0], [0.0, 0.5]]]))
"""One whose dimensions know nothing of each other."""
X0 = jnp.asarray([[1.0, -2.0], [0.5, 0.7], [-1.0, 0.0]])
KNOWN = jnp.asarray([[True, False]])
SOME = ("ddim", "ancestral", "heun", "unipc_3")
MORE = (
    "adaptive",
    "dpm_solver_pp_3",
    "dpm_solver_pp_sde",
    "deis_2",
    "edm_churn",
    "unipc_corrected",
)


def run(process, sampler, t_start, num_steps=6, **options):
    ts = timesteps.uniform(process, num_steps, t_start=t_start)
    x_T = process.prior_sample(KEY, X0.shape, t=t_start)  # noqa: N806
    return jax.jit(lambda x_T: sample(KEY, sampler, x_T, ts, **options))(x_T)  # noqa: N803


def test_an_example_is_put_under_the_noise():
    sampler = samplers.unipc(VP, ALONE.denoiser(VP), order=1)
    ts = timesteps.uniform(VP, 6, t_start=0.4)
    x_t = VP.alpha(jnp.asarray(0.4)) * X0 + VP.prior_sample(KEY, X0.shape, t=0.4)
    wanted = sample(KEY, sampler, x_t, ts)
    got = run(VP, samplers.sdedit(VP, sampler, X0, 0.4), 0.4)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    one_for_all = run(VP, samplers.sdedit(VP, sampler, X0[:1], 0.4), 0.4)
    np.testing.assert_allclose(one_for_all[0], got[0], rtol=1e-12)


def test_where_noise_is_all_nothing_is_left_of_an_example():
    sampler = samplers.heun(FLOW, ALONE.denoiser(FLOW))
    edited = run(FLOW, samplers.sdedit(FLOW, sampler, X0, 1.0), 1.0)
    np.testing.assert_array_equal(edited, run(FLOW, sampler, 1.0))


@pytest.mark.parametrize("name", few([*SOME, *MORE], SOME))
def test_what_is_known_is_kept_and_tells_nothing_of_what_is_independent(name):
    """Where dimensions know nothing of each other the rest is as it would be without."""
    sampler = SAMPLERS[name](VP, ALONE.denoiser(VP))
    kept = samplers.inpainting(VP, sampler, X0, KNOWN, 1.0)
    got, path = run(VP, kept, 1.0, collect=kept.value)
    np.testing.assert_array_equal(got[:, 0], X0[:, 0])
    if name == "unipc_3":  # which corrects no point that was moved: its predictor is left
        sampler = SAMPLERS["dpm_solver_pp_3"](VP, ALONE.denoiser(VP))
    tolerance = 1e-6 if name == "adaptive" else 1e-12  # its steps are those of whole rows
    np.testing.assert_allclose(got[:, 1], run(VP, sampler, 1.0)[:, 1], rtol=tolerance, atol=1e-12)
    ts = timesteps.uniform(VP, 6)
    eps = VP.prior_sample(KEY, X0.shape, t=1.0) / VP.sigma(ts[0])
    for x_s, s in zip(path, ts[1:], strict=True):
        noised = VP.alpha(s) * X0 + VP.sigma(s) * eps
        np.testing.assert_allclose(x_s[:, 0], noised[:, 0], rtol=1e-12)


def test_what_is_known_draws_the_rest_towards_it():
    tied = Mixture(np.ones(1), np.zeros((1, 2)), np.array([[[1.0, 0.9], [0.9, 1.0]]]))
    sampler = samplers.ddim(VP, tied.denoiser(VP), eta=1.0)
    x0 = jnp.full((400, 2), 2.0)
    kept = samplers.inpainting(VP, sampler, x0, KNOWN, 1.0)
    x_T = VP.prior_sample(KEY, x0.shape)  # noqa: N806
    rest = sample(KEY, kept, x_T, timesteps.uniform(VP, 20))[:, 1]
    assert 1.0 < rest.mean() < 2.0  # 1.8 given the other; putting it in place is no exact law


def test_the_rest_may_begin_with_the_example_too():
    sampler = samplers.ddim(VP, ALONE.denoiser(VP))
    begun = samplers.sdedit(VP, sampler, X0, 0.3)
    got = run(VP, samplers.inpainting(VP, begun, X0, KNOWN, 0.3), 0.3)
    np.testing.assert_allclose(got[:, 1], run(VP, begun, 0.3)[:, 1], rtol=1e-12)
    np.testing.assert_array_equal(got[:, 0], X0[:, 0])


def test_they_say_of_themselves_what_the_sampler_within_says():
    sampler = samplers.heun(VP, ALONE.denoiser(VP))
    for made in (
        samplers.sdedit(VP, sampler, X0, 1.0),
        samplers.inpainting(VP, sampler, X0, KNOWN, 1.0),
    ):
        assert samplers.count_calls(made, timesteps.uniform(VP, 5)) == 9
        assert not made.deterministic
        with pytest.raises(ValueError, match="must be deterministic to encode"):
            samplers.encode(made, X0, timesteps.uniform(VP, 5)[::-1])
    sampler = samplers.adaptive(VP, ALONE.denoiser(VP), 1e-2, 1e-2)
    kept = samplers.inpainting(VP, sampler, X0, KNOWN, 1.0)
    _, calls = run(VP, kept, 1.0, 1, collect=lambda state: kept.info(state)["calls"])
    assert (calls > 0).all()


DDIM = samplers.ddim(VP, ALONE.denoiser(VP))


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: samplers.sdedit(VP, samplers.ddim, X0, 0.5), TypeError, "`sampler`"),
        (lambda: samplers.sdedit(None, DDIM, X0, 0.5), TypeError, "`process`"),
        (lambda: samplers.sdedit(VP, DDIM, X0, -0.5), ValueError, "`t_start`"),
        (lambda: samplers.sdedit(VP, DDIM, jnp.ones(2, int), 0.5), TypeError, "`x0`"),
        (lambda: run(VP, samplers.sdedit(VP, DDIM, X0, 0.5), 0.6), ValueError, "must begin at"),
        (lambda: run(VP, samplers.sdedit(VP, DDIM, X0[:2], 0.5), 0.5), ValueError, "`x0` must"),
        (lambda: samplers.inpainting(VP, DDIM, X0, X0, 0.5), TypeError, "`known` must hold bool"),
        (lambda: samplers.inpainting(VP, DDIM, X0, KNOWN[0], 0.5), ValueError, "rank of `x0`"),
        (lambda: samplers.inpainting(VP, DDIM, X0, KNOWN[:, :0], 0.5), ValueError, "broadcast"),
        (lambda: samplers.inpainting(VP, DDIM, X0, KNOWN, 0.0), ValueError, "`t_start`"),
        (
            lambda: run(VP, samplers.inpainting(VP, DDIM, X0[:1], X0[:2] > 0, 0.5), 0.5),
            ValueError,
            "`known` must have a row",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()
