"""Power-function averages against their weights written out, and averages made afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import training
from jaxdiff.training import ema

KEY = jax.random.key(0)
STEPS = 400
PATH = np.cumsum(np.random.default_rng(0).normal(size=(STEPS, 3)), axis=0)
"""Parameters of each step: a random walk."""


def weights(steps, std):
    """The weight of each step in the average at the last of them, by its closed form."""
    power = ema.exponent(std) + 1.0
    i = np.arange(1, steps + 1)
    return (i**power - (i - 1.0) ** power) / steps**power


def average(steps, std):
    return weights(steps, std) @ PATH[:steps]


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, 0.25, ema.MAX_STD])
def test_the_exponent_gives_the_profile_its_width(std):
    g = ema.exponent(std)
    assert np.sqrt(g + 1) / ((g + 2) * np.sqrt(g + 3)) == pytest.approx(std, rel=1e-9)
    tau = (np.arange(200_000) + 0.5) / 200_000  # the profile on [0, 1], integrated by midpoints
    profile = (g + 1) * tau**g
    mean = np.mean(profile * tau)
    assert np.sqrt(np.mean(profile * (tau - mean) ** 2)) == pytest.approx(std, rel=1e-4)


def test_published_widths():
    # Karras et al. 2024, section 3.1: widths 0.05 and 0.10 are gamma 16.97 and 6.94
    assert ema.exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert ema.exponent(0.10) == pytest.approx(6.94, abs=0.005)


def test_updates_keep_the_average_of_the_closed_form():
    optimizer = optax.sgd(1.0)
    path = jnp.asarray(PATH[:50])

    def loss_fn(params, key, batch):  # its gradient leads to the next point of the path
        return jnp.sum(params["w"][None] * batch["x0"], axis=-1), {}

    decays = {"wide": ema.PowerDecay(0.2), "narrow": ema.PowerDecay(0.05), "plain": 0.9}
    update = training.make_update(loss_fn, optimizer, ema_decay=decays)
    state = training.init({"w": jnp.zeros(3)}, optimizer, ema_decay=decays)
    for point in path:
        state, _ = update(state, KEY, {"x0": (state.params["w"] - point)[None]})
    np.testing.assert_allclose(state.params["w"], path[-1], rtol=1e-10)
    for name in ("wide", "narrow"):
        expected = weights(50, decays[name].std) @ PATH[:50]
        np.testing.assert_allclose(state.ema[name]["w"], expected, rtol=1e-5)  # float32 decays


@pytest.mark.parametrize("std", [0.06, 0.1, 0.15])
@pytest.mark.parametrize("step", [STEPS, 300])
def test_averages_made_afterwards_are_those_that_were_not_kept(std, step):
    kept = [(t, s) for t in range(50, STEPS + 1, 50) for s in (0.05, 0.12)]
    found = ema.post_hoc_weights(*zip(*kept, strict=True), step, std)
    made = ema.combine(found, ({"w": average(t, s)} for t, s in kept))["w"]
    wanted = average(step, std)
    others = [np.abs(average(t, s) - wanted).max() for t, s in kept]
    print(f"off by {np.abs(made - wanted).max():.3f}, the nearest kept one by {min(others):.3f}")
    assert np.abs(made - wanted).max() < 0.15 * min(others)
    assert found.sum() == pytest.approx(1.0, abs=0.01)


def test_an_average_that_was_kept_is_found_again():
    kept = [(100, 0.1), (200, 0.1), (200, 0.2)]
    found = ema.post_hoc_weights(*zip(*kept, strict=True), 200, 0.1)
    np.testing.assert_allclose(found, [0.0, 1.0, 0.0], atol=1e-9)


def test_sums_keep_the_dtype():
    trees = [{"w": np.float32([1.0, 2.0])}, {"w": np.float32([3.0, 5.0])}]
    made = ema.combine([0.25, 0.75], trees)["w"]
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, np.float32([2.5, 4.25]))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ema.exponent(0.3), "std"),
        (lambda: ema.exponent(0.0), "std"),
        (lambda: ema.post_hoc_weights([], [], 1, 0.1), "`steps` and `stds`"),
        (lambda: ema.post_hoc_weights([5], [0.1, 0.2], 1, 0.1), "`steps` and `stds`"),
        (lambda: ema.post_hoc_weights([5], [0.1], 6, 0.1), "`step` must lie in 1..5"),
        (lambda: ema.combine([], []), "`trees`"),
        (lambda: ema.check_decay(ema.PowerDecay(0.5)), "`ema_decay`.std"),
        (lambda: ema.check_decay({"a": ema.PowerDecay(-1.0)}), r"`ema_decay\['a'\]`.std"),
    ],
)
def test_what_has_no_meaning_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_a_warm_up_forgets_the_start_and_ends_as_the_constant_decay():
    decay = ema.Warmup(0.99)
    averages = {"warm": jnp.zeros(3), "still": jnp.ones(3)}
    move = jax.jit(
        lambda averages, params, step: {
            "warm": ema.move(averages["warm"], params, decay, step),
            "still": ema.move(averages["still"], 0.0 * params, decay, step),
        }
    )
    by_hand = np.zeros(3)
    for step, params in enumerate(PATH[:50], 1):
        averages = move(averages, jnp.asarray(params), jnp.int32(step))
        d = min(0.99, (1 + step) / (10 + step))
        by_hand = d * by_hand + (1 - d) * params
    np.testing.assert_allclose(averages["warm"], by_hand, rtol=1e-6)
    share = ema.initial_share(decay, 50)
    np.testing.assert_allclose(averages["still"], share, rtol=1e-5)
    assert share < 1e-6 < 0.5 < ema.initial_share(0.99, 50)
    assert float(decay(jnp.int32(889))) < 0.99 == pytest.approx(float(decay(jnp.int32(2000))))


@pytest.mark.parametrize("bad", [1.5, -0.1, float("nan")])
def test_a_warm_up_to_no_decay_is_refused(bad):
    with pytest.raises(ValueError, match=r"`ema_decay\['a'\]\.decay` must lie in"):
        training.init({"w": jnp.ones(2)}, optax.sgd(0.1), ema_decay={"a": ema.Warmup(bad)})
