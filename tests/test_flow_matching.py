import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import drawn

from jaxdiff import losses, processes, timesteps
from jaxdiff.losses.flow_matching import optimal_transport

KEY, FLOW = jax.random.key(0), processes.flow()


def network(params, x_t, t, cond=None, *, key=None):
    return params * jnp.sin(x_t) + t[:, None]


def test_independent_flow_matching_is_denoising_of_the_velocity():
    loss_fns = (
        losses.flow_matching(network),
        losses.denoising(network, FLOW, prediction="velocity"),
        losses.flow_matching(network, prediction="x0"),
        losses.denoising(network, FLOW, prediction="x0", loss_on="velocity"),
    )

    @jax.jit
    def evaluate(batch):
        return [loss_fn(0.5, KEY, batch)[0] for loss_fn in loss_fns]

    ours, denoising, on_x0, as_velocity = evaluate({"x0": drawn(0, 16)})
    np.testing.assert_array_equal(ours, denoising)
    np.testing.assert_array_equal(on_x0, as_velocity)


def test_transport_in_one_dimension_pairs_rank_with_rank():
    x0, eps = np.random.default_rng(1).normal(size=(2, 257, 1))
    paired = np.asarray(optimal_transport(x0, eps))
    np.testing.assert_array_equal(paired[np.argsort(x0[:, 0])], np.sort(eps, axis=0))


def test_transport_is_the_best_of_all_permutations():
    import itertools

    x0, eps = np.random.default_rng(2).normal(size=(2, 6, 2, 3))

    def cost(eps):
        return float(((x0 - eps) ** 2).sum())

    best = min(cost(eps[list(order)]) for order in itertools.permutations(range(6)))
    assert cost(np.asarray(optimal_transport(x0, eps))) == pytest.approx(best, rel=1e-12)


def test_coupled_noise_is_the_same_noise_in_another_order():
    @jax.jit
    def inputs(batch):
        seen = []

        def spy(params, x_t, t, cond=None, *, key=None):
            seen.append((x_t, t))
            return jnp.zeros_like(x_t)

        for coupling in ("independent", "optimal_transport"):
            losses.flow_matching(spy, coupling=coupling)(0.0, KEY, batch)
        return seen

    batch = {"x0": drawn(0, 32)}
    (x_t, t), (coupled, t_again) = jax.device_get(inputs(batch))
    np.testing.assert_array_equal(t, t_again)
    apart, eps = ((x - (1 - t)[:, None] * batch["x0"]) / t[:, None] for x in (x_t, coupled))
    assert not np.allclose(apart, eps)
    np.testing.assert_allclose(np.sort(apart[:, 0]), np.sort(eps[:, 0]), rtol=1e-8)


def test_coupling_straightens_the_paths():
    # The smallest loss is E Var(velocity | x_t): how much the paths through a point disagree.
    batches = drawn(3, 60 * 128).reshape(60, 128, 2)

    def best_linear(coupling):
        loss_fn = losses.flow_matching(
            lambda p, x, t, c=None, *, key=None: x @ p["w"] + p["b"],
            coupling=coupling,
            times=timesteps.draw_at(0.5),
        )
        params = {"w": jnp.zeros((2, 2)), "b": jnp.zeros((1, 2))}

        @jax.jit
        def step(params, key, x0):
            batch = {"x0": x0}
            loss, grads = jax.value_and_grad(lambda p: loss_fn(p, key, batch)[0].mean())(params)
            return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), loss

        found = []
        for key, x0 in zip(jax.random.split(jax.random.key(3), 60), batches, strict=True):
            params, loss = step(params, key, x0)
            found.append(float(loss))
        return np.mean(found[30:])

    independent, coupled = best_linear("independent"), best_linear("optimal_transport")
    print(f"what no linear network can predict: {independent:.3f}, coupled {coupled:.3f}")
    assert coupled < 0.5 * independent


def test_conditioning_goes_with_its_data():
    def told(params, x_t, t, cond=None, *, key=None):
        assert cond.shape == (8,)
        return x_t * cond[:, None]

    batch = {"x0": drawn(0, 8), "cond": jnp.arange(8)}
    loss_fn = losses.flow_matching(told, coupling="optimal_transport", drop_cond=0.5, null_cond=9)
    assert np.isfinite(jax.jit(loss_fn)(0.0, KEY, batch)[0]).all()


def test_an_unknown_coupling_is_refused():
    with pytest.raises(ValueError, match="`coupling` must be"):
        losses.flow_matching(network, coupling="sinkhorn")
