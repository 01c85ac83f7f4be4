"""Texts that a network is conditioned on: their mask, their absence, and their transformer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff import losses, nn, processes

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = jax.random.key(0, impl="unsafe_rbg")  # any generator shows it; this compiles quickly
NUM_TOKENS, ROWS, LENGTH = 11, 3, 5
TEXTS = nn.Texts(NUM_TOKENS, length=LENGTH, width=8, depth=1, num_heads=2)
KEPT = np.arange(LENGTH) < np.array([[5], [2], [0]])
"""Which tokens of each row there are; the last row has none."""
TOKENS = np.random.default_rng(3).integers(0, NUM_TOKENS, (ROWS, LENGTH)).astype(np.int32)
COND = {"tokens": TOKENS, "mask": KEPT}


def build(name, dtype, conditioning=TEXTS):
    options = {"conditioning": conditioning, "rngs": nnx.Rngs(0)}
    options |= {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    if name == "unet":
        return nn.UNet((4, 4, 1), channels=4, multipliers=(1, 2), num_heads=2, **options)
    if name == "mlp":
        return nn.MLP(2, width=16, depth=1, **options)
    kind, _, deep = name.partition(" ")  # the last block of joint attention is another
    options |= {"width": 16, "depth": 2 if deep else 1, "num_heads": 2, "text_attention": kind}
    return nn.DiT((4, 4, 1), query_key_norm=True, **options)


@functools.cache
def prepare(name, dtype):
    """Return (params, jitted apply, apply, x, log_snr), no parameter being zero."""
    shapes, apply = nn.functional(nnx.eval_shape(lambda: build(name, dtype)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: (0.3 * rng.normal(size=a.shape)).astype(a.dtype), shapes)
    x = rng.normal(size=(ROWS, 2) if name == "mlp" else (ROWS, 4, 4, 1)).astype(dtype)
    log_snr = np.linspace(-5.0, 5.0, ROWS).astype(dtype)
    params, x, log_snr = jax.device_put((params, x, log_snr))  # compiles nothing
    return params, quick_jit(apply), apply, x, log_snr


each_network = pytest.mark.parametrize(
    ("name", "dtype"),
    [("cross", "float32"), ("joint", "float64")]
    + [
        pytest.param(name, dtype, marks=pytest.mark.slow)
        for name, dtype in (
            ("cross", "float64"),
            ("joint deep", "float32"),
            ("joint deep", "float64"),
            ("unet", "float32"),
            ("unet", "float64"),
        )
    ],
)


@each_network
def test_a_text_that_is_padded_is_the_text_alone(name, dtype):
    params, apply, _, x, log_snr = prepare(name, dtype)
    output = apply(params, x, log_snr, COND)
    short = {key: value[:, :2] for key, value in COND.items()}
    alone = apply(params, x, log_snr, short)  # of the second row, without any padding
    # Sums in another order, of numbers of about 1.
    tolerance = {"float32": 1e-6, "float64": 1e-13}[dtype] * float(jnp.abs(output).max())
    np.testing.assert_allclose(alone[1:], output[1:], atol=tolerance)
    assert np.abs(output[0] - alone[0]).max() > 1e-3


@each_network
def test_tokens_behind_the_mask_have_no_influence_to_the_bit(name, dtype):
    params, apply, _, x, log_snr = prepare(name, dtype)
    output = apply(params, x, log_snr, COND)
    assert np.isfinite(output).all()
    for other in (NUM_TOKENS - 1 - TOKENS, np.full_like(TOKENS, -1), np.full_like(TOKENS, 99)):
        tokens = np.where(KEPT, TOKENS, other)
        again = apply(params, x, log_snr, {"tokens": tokens, "mask": KEPT})
        np.testing.assert_array_equal(again, output)
    changed = apply(params, x, log_snr, COND | {"tokens": np.roll(TOKENS, 1, axis=1)})
    assert np.all(np.abs(changed - output)[:2].reshape(2, -1).max(axis=1) > 1e-3)
    np.testing.assert_array_equal(changed[2], output[2])


@pytest.mark.parametrize(
    "name",
    ["mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cross", "joint deep", "unet"))],
)
def test_no_text_is_one_that_is_masked_altogether(name):
    params, apply, _, x, log_snr = prepare(name, "float32")
    without = apply(params, x, log_snr)
    masked = apply(params, x, log_snr, COND | {"mask": np.zeros_like(KEPT)})
    np.testing.assert_allclose(masked, without, atol=1e-6 * float(jnp.abs(without).max()))


@pytest.mark.parametrize(
    "name",
    ["mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cross", "joint deep", "unet"))],
)
def test_gradients_reach_the_transformer_of_the_texts(name):
    params, _, apply, x, log_snr = prepare(name, "float32")

    def total(params):
        return jnp.mean(apply(params, x, log_snr, COND, key=KEY) ** 2)

    found = jax.device_get(quick_jit(jax.grad(total))(params))["conditioning"]["texts"]
    assert jax.tree.all(jax.tree.map(lambda a: np.isfinite(a).all(), found))
    seen = np.isin(np.arange(NUM_TOKENS), TOKENS[KEPT])
    np.testing.assert_array_equal(np.abs(found["tokens"]).max(axis=1) > 0, seen)
    assert np.all(np.abs(found["positions"]).max(axis=1) > 0)
    kernels = [found["block_00"][each]["kernel"] for each in ("qkv", "projection", "inner")]
    for kernel in (*kernels, found["context"]["kernel"], found["vector"]["kernel"]):
        assert np.abs(kernel).max() > 1e-6


def embedding(texts, width=3):
    """Return (params, a function of them and of a value)."""
    made = nnx.eval_shape(
        lambda: texts.make(width, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(made)
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda a: 0.5 * rng.normal(size=a.shape), state)

    def embed(params, cond):
        return texts.embed(nnx.merge(graph, params), cond, "cond", ROWS)

    return params, embed


def test_the_transformer_is_that_of_its_equations():
    """Against numpy, row by row and head by head."""
    params, embed = embedding(dataclasses.replace(TEXTS, depth=2))
    found = quick_jit(embed)(params, COND)
    params = nnx.to_pure_dict(params)

    def dense(h, layer):
        return h @ layer["kernel"] + layer["bias"]

    def norm(h, layer):
        centred = h - h.mean(axis=-1, keepdims=True)
        variance = np.mean(centred**2, axis=-1, keepdims=True)
        return centred / np.sqrt(variance + 1e-6) * layer["scale"] + layer["bias"]

    def gelu(x):
        return np.asarray(0.5 * x * jax.scipy.special.erfc(-x / np.sqrt(2.0)))

    for row, count in enumerate(KEPT.sum(axis=1)):
        h = params["tokens"][TOKENS[row, :count]] + params["positions"][:count]
        for name in ("block_00", "block_01") if count else ():
            block = params[name]
            query, key, value = np.split(
                dense(norm(h, block["attention_norm"]), block["qkv"]), 3, axis=1
            )
            mixed = np.zeros_like(h)
            for head in (slice(0, 4), slice(4, 8)):
                scores = np.exp(query[:, head] @ key[:, head].T / 2.0)
                mixed[:, head] = scores / scores.sum(axis=1, keepdims=True) @ value[:, head]
            h = h + dense(mixed, block["projection"])
            h = h + dense(gelu(dense(norm(h, block["mlp_norm"]), block["inner"])), block["outer"])
        h = norm(h, params["norm"])
        mean = h.mean(axis=0) if count else np.zeros(8)
        np.testing.assert_allclose(found.vector[row], dense(mean, params["vector"]), atol=1e-12)
        wanted = dense(h, params["context"])
        np.testing.assert_allclose(found.context.tokens[row, :count], wanted, atol=1e-12)
    np.testing.assert_array_equal(found.context.mask, KEPT)


def test_without_a_vector_there_are_tokens_alone():
    params, embed = embedding(dataclasses.replace(TEXTS, pooled=False))
    found = jax.eval_shape(embed, params, COND)
    assert found.vector is None
    assert found.context.tokens.shape == (ROWS, LENGTH, 3)


@pytest.mark.parametrize("unknown", [-1, NUM_TOKENS])
def test_an_unknown_token_makes_nan_of_its_row_where_it_is_traced(unknown):
    params, apply, _, x, log_snr = prepare("cross", "float32")
    tokens = TOKENS.copy()
    tokens[1, 1] = unknown
    output = apply(params, x, log_snr, {"tokens": tokens, "mask": KEPT})
    np.testing.assert_array_equal(np.isnan(output).reshape(ROWS, -1).all(axis=1), [0, 1, 0])
    assert np.isfinite(output[::2]).all()


def test_texts_are_dropped_by_the_losses():
    def network(params, x_t, t, cond, *, key=None):
        return x_t * jnp.sum(jnp.where(cond["mask"], cond["tokens"], 0), axis=1)[:, jnp.newaxis]

    def loss(rate, cond):
        null = nn.null_cond(TEXTS)
        loss_fn = losses.denoising(network, processes.flow(), drop_cond=rate, null_cond=null)
        return jax.eval_shape(loss_fn, None, KEY, {"x0": np.ones((ROWS, 2)), "cond": cond})[0]

    assert loss(0.5, COND).shape == (ROWS,)


@pytest.mark.parametrize(
    ("cond", "error", "message"),
    [
        (TOKENS, TypeError, r"`cond` must hold `tokens` \(3, L\) and `mask` \(3, L\)"),
        (COND | {"tokens": TOKENS + 0.5}, TypeError, r"`cond.tokens` must hold integers"),
        (COND | {"tokens": TOKENS[:2]}, ValueError, r"shape \(3, L\), L in 1..5; got \(2, 5\)"),
        (COND | {"tokens": TOKENS[0]}, ValueError, r"shape \(3, L\), L in 1..5; got \(5,\)"),
        ({k: v[:, :0] for k, v in COND.items()}, ValueError, r"L in 1..5; got \(3, 0\)"),
        ({k: np.tile(v, 2) for k, v in COND.items()}, ValueError, r"L in 1..5; got \(3, 10\)"),
        (COND | {"mask": KEPT[:, :4]}, ValueError, r"`cond.mask` must have the shape"),
        (COND | {"mask": KEPT + 0.5}, TypeError, r"`cond.mask` must hold booleans"),
        (COND | {"tokens": TOKENS + NUM_TOKENS}, ValueError, r"`cond.tokens` must be in 0..10"),
        (COND | {"tokens": TOKENS - NUM_TOKENS}, ValueError, r"`cond.tokens` must be in 0..10"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(cond, error, message):
    params, _, apply, x, log_snr = prepare("mlp", "float32")
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda params, x: apply(params, x, log_snr, cond), params, x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 0}, ValueError, "`length` must be at least 1"),
        ({"width": 2.5}, TypeError, "`width` must be a whole number"),
        ({"num_heads": 3}, ValueError, "`width` must be a multiple of num_heads = 3; got 128"),
    ],
)
def test_sizes_are_judged(options, error, message):
    with pytest.raises(error, match=message):
        nn.Texts(NUM_TOKENS, **{"length": LENGTH, **options})
