"""Noise by row is the same everywhere: in parts, under every transformation, for every key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import few

from jaxdiff import losses, numerics, processes, rows, timesteps

KEY = jax.random.key(0)
WHOLE = np.zeros((8, 3))
KINDS = ("threefry2x32", "rbg", "unsafe_rbg")


@pytest.mark.parametrize("stride", [1, 2])
def test_a_part_draws_its_rows_of_the_whole(stride):
    whole = np.asarray(numerics.normal(KEY, WHOLE))
    for first in range(3):
        part = numerics.normal(rows.part_key(KEY, first, stride, 8), WHOLE[:3])
        np.testing.assert_array_equal(part, whole[first : first + 3 * stride : stride])


def test_a_split_key_knows_its_rows_still():
    whole = np.asarray(numerics.normal(jax.random.fold_in(jax.random.split(KEY)[1], 3), WHOLE))
    part = jax.random.fold_in(jax.random.split(rows.part_key(KEY, 4, 1, 8))[1], 3)
    np.testing.assert_array_equal(numerics.normal(part, WHOLE[4:]), whole[4:])


@pytest.mark.parametrize(
    "wrap",
    [jax.jit, jax.checkpoint, lambda f: jax.vmap(f, (None, 0))],
    ids=["jit", "checkpoint", "vmap"],
)
def test_what_was_traced_before_draws_the_rows_it_is_given(wrap):
    draw = wrap(numerics.normal)
    x = WHOLE[None, :4] if wrap not in (jax.jit, jax.checkpoint) else WHOLE[:4]
    draw(KEY, x)  # a cached trace must not remember these rows
    part = draw(rows.part_key(KEY, 4, 1, 8), x)
    whole = np.asarray(numerics.normal(KEY, WHOLE))
    np.testing.assert_array_equal(np.reshape(part, (4, 3)), whole[4:])


def test_parts_draw_different_noise_even_where_it_is_not_by_row():
    parts = [jax.random.normal(rows.part_key(KEY, first, 1, 8), (4,)) for first in (0, 4)]
    assert np.abs(parts[0] - parts[1]).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_each_other_for_any_kind_of_key(kind):
    key = jax.random.key(0, impl=kind)
    whole = np.asarray(numerics.normal(key, WHOLE))
    np.testing.assert_array_equal(numerics.normal(key, WHOLE[:3]), whole[:3])
    by_row = rows.keys(key, 8)
    np.testing.assert_array_equal(numerics.normal(by_row[5:], WHOLE[5:]), whole[5:])
    given = jax.random.split(key, 8)  # row keys of the caller's own
    np.testing.assert_array_equal(
        numerics.normal(given[5:], WHOLE[5:]), numerics.normal(given, WHOLE)[5:]
    )
    first, second = numerics.split(given)
    np.testing.assert_array_equal(
        jax.random.key_data(numerics.split(given[:2])[0]), jax.random.key_data(first[:2])
    )
    assert (jax.random.key_data(first) != jax.random.key_data(second)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_a_kind_differ_in_every_word(kind):
    """All words of a longer key count: none is dropped where it is made threefry's."""
    words = jax.random.key_data(jax.random.key(7, impl=kind))
    drawn = {
        float(numerics.normal(jax.random.wrap_key_data(words.at[i].add(1), impl=kind), WHOLE)[0, 0])
        for i in range(len(words))
    }
    assert len(drawn) == len(words)


@pytest.mark.parametrize("draw_name", ["stratified", "uniform", "log_snr", "log_normal"])
def test_times_of_a_part_are_those_of_the_whole(draw_name):
    options = {"log_snr": (-8.0, 8.0)}.get(draw_name, ())
    draw = getattr(timesteps, f"draw_{draw_name}")(*options)
    numbered = rows.Rows(jnp.array([6, 1]), jnp.array([8, 8]))

    @jax.jit
    def evaluate(key, part_key, numbered):
        cases = (key, 8), (part_key, 4), (key, numbered)
        return [draw(key, processes.vp(), num) for key, num in cases]

    whole, of_part, of_some = evaluate(KEY, rows.part_key(KEY, 1, 2, 8), numbered)
    np.testing.assert_array_equal(of_part, whole[1::2])
    np.testing.assert_array_equal(of_some, whole[np.array([6, 1])])


def shrink(params, x_t, t, cond=None, *, key=None):
    kept = 1.0 if key is None else numerics.uniform(key, x_t.shape[0])[:, None] + 0.5
    return params * kept * x_t


LOSSES = {
    "denoising": functools.partial(losses.denoising, drop_cond=0.5, null_cond=0),
    "flow_matching": losses.flow_matching,
    "implicit": losses.implicit,
    "sliced": losses.sliced,
    "finite_difference": losses.finite_difference,
    "elbo": functools.partial(losses.elbo, t_min=0.01),
}


@pytest.mark.parametrize("name", few(LOSSES, ["denoising", "flow_matching", "sliced", "elbo"]))
def test_a_loss_of_numbered_rows_is_that_of_the_rows_of_the_whole(name):
    loss = LOSSES[name](shrink, processes.vp())
    batch = {"x0": np.random.default_rng(0).normal(size=(8, 2)), "cond": np.arange(1, 9)}
    chosen = np.array([7, 2, 5])
    some = jax.tree.map(lambda leaf: leaf[chosen], batch)
    part = jax.tree.map(lambda leaf: leaf[1::2], batch)
    some["rows"] = rows.Rows(jnp.asarray(chosen), jnp.asarray([8, 8, 8]))

    @jax.jit
    def evaluate(*cases):
        return [loss(0.5, key, batch)[0] for key, batch in cases]

    whole, of_some, of_part = evaluate(
        (KEY, batch), (KEY, some), (rows.part_key(KEY, 1, 2, 8), part)
    )
    np.testing.assert_allclose(of_some, whole[chosen], rtol=1e-12)
    np.testing.assert_allclose(of_part, whole[1::2], rtol=1e-12)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (jnp.arange(3), "must be a jaxdiff.rows.Rows"),
        (rows.Rows(jnp.arange(2), jnp.full(2, 3)), r'batch\["rows"\].numbers'),
        (rows.Rows(jnp.arange(3), jnp.asarray(3)), r'batch\["rows"\].total'),
        (rows.Rows(jnp.arange(3.0), jnp.full(3, 3)), r'batch\["rows"\].numbers must hold integers'),
    ],
)
def test_rows_that_do_not_number_the_batch_are_refused(bad, match):
    loss = losses.denoising(shrink, processes.vp())
    with pytest.raises((TypeError, ValueError), match=match):
        loss(0.5, KEY, {"x0": jnp.zeros((3, 2)), "rows": bad})


@pytest.mark.parametrize(
    ("key", "match"),
    [
        (0, "typed key from jax.random.key; got int"),
        (jax.random.PRNGKey(0), "looks like a legacy one"),
        (jax.random.split(KEY, (2, 2)), r"got shape \(2, 2\)"),
        (jnp.zeros(3), "got an array"),
    ],
)
def test_what_is_no_key_is_refused_with_a_remedy(key, match):
    with pytest.raises((TypeError, ValueError), match=match):
        numerics.normal(key, WHOLE)
