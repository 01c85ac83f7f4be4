import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import numerics

KEY = jax.random.key(0)
WHOLE = jnp.zeros((8, 3, 2))


def test_noise_of_a_row_does_not_depend_on_the_batch_size():
    large = numerics.normal(KEY, jnp.zeros((64, 3)))
    small = numerics.normal(KEY, jnp.zeros((7, 3)))
    np.testing.assert_array_equal(large[:7], small)


def test_row_keys_draw_what_one_key_draws():
    rows = numerics.row_keys(KEY, 8)
    whole = numerics.normal(KEY, WHOLE)
    np.testing.assert_array_equal(numerics.normal(rows, WHOLE), whole)
    np.testing.assert_array_equal(numerics.normal(rows[6:], WHOLE[6:]), whole[6:])
    np.testing.assert_array_equal(
        jax.random.key_data(numerics.split(rows)[:, 2]),
        jax.random.key_data(jax.random.split(rows[2])),
    )


def test_noise_of_a_row_is_fold_in_of_its_number():
    expected = jax.random.normal(jax.random.fold_in(KEY, 4), (3,), jnp.float32)
    drawn = numerics.normal(KEY, jnp.zeros((8, 3), jnp.float32))
    np.testing.assert_array_equal(drawn[4], expected)
    assert drawn.dtype == jnp.float32


def test_expand_like_broadcasts_scalars_and_rows():
    x = jnp.zeros((4, 2, 3))
    assert numerics.expand_like(jnp.float32(1), x).shape == ()
    assert numerics.expand_like(jnp.zeros(4), x).shape == (4, 1, 1)


@pytest.mark.parametrize("shape", [(3,), (4, 1)])
def test_expand_like_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="`t` must have shape"):
        numerics.expand_like(jnp.zeros(shape), jnp.zeros((4, 2)))


def test_divergence_is_the_trace_of_the_jacobian():
    matrix = np.random.default_rng(0).normal(size=(6, 6))

    def fn(x):
        return jnp.sin(matrix @ x.ravel()).reshape(x.shape)

    x = np.random.default_rng(1).normal(size=(2, 3))
    value, divergence = jax.jit(lambda x: numerics.divergence(fn, x))(x)
    np.testing.assert_allclose(value.ravel(), np.sin(matrix @ x.ravel()), rtol=1e-14)
    trace = np.sum(np.cos(matrix @ x.ravel()) * np.diag(matrix))
    np.testing.assert_allclose(divergence, trace, rtol=1e-13)


def test_hutchinson_over_all_sign_vectors_is_the_trace():
    matrix = np.random.default_rng(0).normal(size=(3, 3))
    signs = jnp.array(np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), axis=-1).reshape(-1, 3))
    estimate = jax.jit(lambda x: numerics.hutchinson_divergence(lambda x: matrix @ x, x, signs)[1])
    np.testing.assert_allclose(estimate(jnp.ones(3)), np.trace(matrix), rtol=1e-13)


def test_sqrt_has_zero_gradient_at_zero():
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(jax.grad(numerics.sqrt)))(jnp.array([0.0, 4.0])), [0, 0.25]
    )


def test_untyped_keys_are_refused():
    with pytest.raises(TypeError, match=r"`key` must be a typed key"):
        numerics.normal(jax.random.PRNGKey(0), jnp.zeros((2, 2)))


def test_wrong_number_of_row_keys_is_refused():
    with pytest.raises(ValueError, match="3 row keys for 2 rows"):
        numerics.normal(jax.random.split(KEY, 3), jnp.zeros((2, 2)))
