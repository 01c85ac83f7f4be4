"""Networks and their functional form: float32 in and out although the tests run in float64."""

import functools

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff import denoisers, nn, numerics, processes

NUM_CLASSES = 3
# Nearly all the time here is LLVM's; these arrays are too small to need its optimisations.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make(name, **options):
    """Build a tiny network: (module, shape of one example)."""
    options = {"num_classes": NUM_CLASSES, "rngs": nnx.Rngs(0), **options}
    if name == "mlp":
        return nn.MLP(2, width=16, depth=2, **options), (2,)
    shape = (8, 8, 1)
    if name == "unet":
        return nn.UNet(shape, channels=4, multipliers=(1, 2), num_heads=2, **options), shape
    return nn.DiT(shape, width=16, depth=1, num_heads=2, **options), shape


@functools.cache
def outline(name, **options):
    """Build a network with shapes for parameters: drawing them is what takes time to compile."""
    module = nnx.eval_shape(lambda: make(name, **options)[0])
    return module, (2,) if name == "mlp" else (8, 8, 1)


@functools.cache
def prepare(name, **options):
    """Return (params, jitted apply, x, t, labels) for a batch of 4; compiled once for all tests.

    No parameter is zero, so that every path is open.
    """
    module, shape = outline(name, **options)
    shapes, apply = nn.functional(module)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), shapes)
    x = jnp.asarray(rng.normal(size=(4, *shape)), jnp.float32)
    t = jnp.linspace(-5.0, 5.0, 4, dtype=jnp.float32)
    return params, quick_jit(apply), x, t, jnp.arange(4)


def check(name, x, t, cond=None, **options):
    """Run the checks of a network, and none of its arithmetic."""
    params, apply = nn.functional(outline(name, **options)[0])
    jax.eval_shape(lambda params, x, t: apply(params, x, t, cond), params, x, t)


each_network = pytest.mark.parametrize("name", ["mlp", "unet", "dit"])
# Where the three share the code under test: the U-Net takes several seconds a compilation.
mlp_and_dit = pytest.mark.parametrize("name", ["mlp", "dit"])


# --- Values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda s, r: nn.UNet(s, channels=4, multipliers=(1, 2), rngs=r), (8, 8, 1)),
        (lambda s, r: nn.UNet(s, channels=4, rngs=r), (28, 28, 1)),
        (lambda s, r: nn.UNet(s, channels=4, num_blocks=2, rngs=r), (32, 32, 3)),
        (lambda s, r: nn.DiT(s, width=8, depth=1, rngs=r), (8, 8, 1)),
        (lambda s, r: nn.DiT(s, width=8, depth=1, patch_size=4, rngs=r), (28, 28, 1)),
        (lambda s, r: nn.DiT(s, width=8, depth=1, learned_positions=True, rngs=r), (32, 16, 3)),
        (lambda s, r: nn.MLP(*s, width=8, rngs=r), (5,)),
    ],
)
def test_output_has_the_shape_of_the_input(build, shape):
    params, apply = nn.functional(nnx.eval_shape(lambda: build(shape, nnx.Rngs(0))))
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    t = jax.ShapeDtypeStruct((), jnp.float32)
    output = jax.eval_shape(apply, params, x, t)
    assert (output.shape, output.dtype) == (x.shape, x.dtype)


@each_network
def test_initialisation_follows_from_the_seed_and_outputs_exactly_zero(name):
    _, apply, x, t, labels = prepare(name)

    @quick_jit
    def initialise(key):
        return nn.functional(make(name, rngs=nnx.Rngs(key))[0])[0]

    # Any generator shows it; rbg compiles quickly.
    first, again, other = (initialise(jax.random.key(seed, impl="rbg")) for seed in (0, 0, 1))
    np.testing.assert_array_equal(apply(first, x, t, labels), 0.0)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(*(p["conditioning"]["time_in"]["kernel"] for p in (first, other)))


@each_network
def test_scalar_time_equals_time_of_each_row(name):
    params, apply, x, _, labels = prepare(name)
    scalar = apply(params, x, jnp.float32(1.5), labels)
    np.testing.assert_array_equal(scalar, apply(params, x, jnp.full(4, 1.5, jnp.float32), labels))


@each_network
def test_row_of_a_batch_equals_the_row_alone(name):
    params, apply, x, t, labels = prepare(name)
    batch = apply(params, x, t, labels)
    alone = apply(params, x[2:3], t[2:3], labels[2:3])
    # float32 sums of up to 1e2 terms of order 1, in another order for another batch size.
    np.testing.assert_allclose(batch[2:3], alone, atol=2e-5 * float(jnp.abs(batch).max()))


@each_network
def test_time_and_label_change_the_output(name):
    params, apply, x, t, labels = prepare(name)
    output = apply(params, x, t, labels)
    for other in (apply(params, x, t + 1, labels), apply(params, x, t, (labels + 1) % 4)):
        assert np.all(np.abs(other - output).max(axis=tuple(range(1, x.ndim))) > 1e-3)


@each_network
def test_no_condition_is_the_null_label(name):
    params, apply, x, t, _ = prepare(name)
    null = jnp.full(4, NUM_CLASSES)
    np.testing.assert_array_equal(apply(params, x, t), apply(params, x, t, null))


@each_network
def test_infinite_log_snr_gives_finite_output_and_gradients(name):
    params, apply, x, _, labels = prepare(name)
    t = jnp.array([-jnp.inf, jnp.inf, -20.0, 20.0], jnp.float32)

    def total(params, x, t):
        return jnp.mean(apply.__wrapped__(params, x, t, labels) ** 2)

    value, gradients = quick_jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(params, x, t)
    assert jax.tree.all(jax.tree.map(lambda a: jnp.isfinite(a).all(), (value, gradients)))
    ends = apply(params, jnp.broadcast_to(x[:1], x.shape), t, jnp.zeros(4, int))
    np.testing.assert_array_equal(ends[:2], ends[2:])


@each_network
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_parameters_and_output_are_float32_whatever_the_computation(name, dtype):
    params, apply, x, t, labels = prepare(name, dtype=dtype)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(apply, params, x, t, labels).dtype == jnp.float32


@mlp_and_dit
def test_bfloat16_agrees_with_float32_to_its_precision(name):
    params, apply, x, t, labels = prepare(name, dtype=jnp.bfloat16)
    output, exact = (f(params, x, t, labels) for f in (apply, prepare(name)[1]))
    error = float(jnp.linalg.norm(output - exact) / jnp.linalg.norm(exact))
    assert 1e-4 < error < 0.1  # 8 bits: 0.004 an operation, over some tens of them


@each_network
def test_float64_is_computed_where_asked_for(name):
    params, apply, x, t, labels = prepare(name, dtype=jnp.float64, param_dtype=jnp.float64)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.float64)}
    assert jax.eval_shape(apply, params, x, t, labels).dtype == jnp.float64


def test_layer_norm_is_the_published_formula():
    from jaxdiff.nn.layers import layer_norm

    x = 100.0 + jax.random.normal(jax.random.key(0), (3, 5, 16))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(x), expected, rtol=1e-10, atol=1e-10)
    # 100 +- 1 in float32 has 5 digits of the deviation left.
    np.testing.assert_allclose(layer_norm(x.astype(jnp.float32)), expected, atol=1e-4)


def test_patches_are_contiguous_and_come_back():
    from jaxdiff.nn.dit import patchify, unpatchify

    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = patchify(x, 2)
    np.testing.assert_array_equal(tokens[1, 4], x[1, 2:4, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpatchify(tokens, 2, (4, 6, 3)), x)


# --- Dropout and rematerialisation ----------------------------------------------------------


@mlp_and_dit
def test_dropout_is_on_with_a_key_and_masks_rows_whatever_the_batch(name):
    params, apply, x, t, labels = prepare(name, dropout=0.5)
    key = jax.random.key(3)
    batch = apply(params, x, t, labels, key=key)
    first = apply(params, x[:2], t[:2], labels[:2], key=key)
    # A different mask would change the output by its own size; the rest is float32 rounding.
    np.testing.assert_allclose(first, batch[:2], atol=2e-5 * float(jnp.abs(batch).max()))
    assert np.abs(batch - prepare(name)[1](params, x, t, labels)).max() > 1e-2


@each_network
def test_nothing_random_is_drawn_without_a_key_or_without_dropout(name):
    params, apply, x, t, labels = prepare(name, dropout=0.5)
    key = jax.random.key(3)
    draws = "random_bits"
    assert draws in str(jax.make_jaxpr(apply.__wrapped__)(params, x, t, labels, key=key))
    assert draws not in str(jax.make_jaxpr(apply.__wrapped__)(params, x, t, labels))
    assert draws not in str(
        jax.make_jaxpr(prepare(name)[1].__wrapped__)(params, x, t, labels, key=key)
    )


def test_row_keys_draw_the_rows_that_one_key_draws():
    params, apply, x, t, labels = prepare("mlp", dropout=0.5)
    key = jax.random.key(3)
    batch = apply(params, x, t, labels, key=key)
    last = apply(params, x[2:], t[2:], labels[2:], key=numerics.row_keys(key, 4)[2:])
    np.testing.assert_allclose(last, batch[2:], atol=2e-5 * float(jnp.abs(batch).max()))


def test_dropout_keeps_the_mean_and_differs_between_rows_and_sites():
    from jaxdiff.nn.layers import dropout

    rows = numerics.row_keys(jax.random.key(0), 2)
    x = jnp.ones((2, 40_000), jnp.float32)
    first, second = dropout(x, 0.2, rows, 0), dropout(x, 0.2, rows, 1)
    assert set(np.unique(first)) == {np.float32(0.0), np.float32(1.25)}
    error = np.sqrt(0.25 / 80_000)  # the variance of an entry is 0.2 / 0.8
    assert abs(float(first.mean()) - 1.0) < 4 * error, f"standard error {error}"
    # Independent masks agree on a share 0.8^2 + 0.2^2 = 0.68 of the entries.
    assert abs(float(jnp.mean(first == second)) - 0.68) < 0.01
    assert abs(float(jnp.mean(first[0] == first[1])) - 0.68) < 0.01


@each_network
def test_remat_wraps_the_blocks(name):
    plain, remat = (
        str(jax.make_jaxpr(apply.__wrapped__)(params, x, t))
        for params, apply, x, t, _ in (prepare(name), prepare(name, remat=True))
    )
    assert "remat" not in plain
    assert "remat" in remat


def test_remat_gives_the_same_gradient():
    params, _, x, t, labels = prepare("mlp")

    def gradient(apply):
        def loss(params):
            return jnp.mean(apply.__wrapped__(params, x, t, labels) ** 2)

        return quick_jit(jax.grad(loss))(params)

    plain, remat = (gradient(prepare("mlp", **kind)[1]) for kind in ({}, {"remat": True}))
    scale = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(plain))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        # The same float32 operations, fused differently.
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale)


# --- The functional form --------------------------------------------------------------------


def keys_of(tree):
    if isinstance(tree, dict):
        for key, branch in tree.items():
            yield key
            yield from keys_of(branch)


@each_network
def test_parameters_are_plain_dicts_with_string_keys(name):
    params, _ = nn.functional(outline(name)[0])
    assert {type(key) for key in keys_of(params)} == {str}


def test_twelve_blocks_sort_in_order():
    build = functools.partial(nn.DiT, (4, 4, 1), width=4, depth=12, num_heads=1)
    params, _ = nn.functional(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    blocks = [key for key in params if key.startswith("block_")]
    assert blocks == [f"block_{i:02d}" for i in range(12)]
    assert sorted(blocks) == blocks


def test_jit_equals_eager():
    params, jitted, x, t, labels = prepare("mlp")
    eager = nn.functional(outline("mlp")[0])[1](params, x, t, labels)
    compiled = jitted(params, x, t, labels)
    # Fusion reorders float32 sums.
    np.testing.assert_allclose(compiled, eager, atol=2e-5 * float(jnp.abs(eager).max()))


@mlp_and_dit
def test_vmap_over_seeds_equals_a_loop(name):
    params, apply, x, t, labels = prepare(name)
    stack = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), params)
    both = jax.vmap(apply, in_axes=(0, None, None, None))(stack, x, t, labels)
    alone = apply(jax.tree.map(lambda a: 0.5 * a, params), x, t, labels)
    np.testing.assert_allclose(both[1], alone, atol=2e-5 * float(jnp.abs(alone).max()))


@mlp_and_dit
def test_forward_mode_equals_reverse_mode(name):
    """Divergences push tangents through the network."""
    params, apply, x, t, labels = prepare(name, dtype=jnp.float64, param_dtype=jnp.float64)
    x = x.astype(jnp.float64)
    tangent = jax.random.normal(jax.random.key(5), x.shape)

    @quick_jit
    def both_ways(x):
        def network(x):
            return apply.__wrapped__(params, x, t, labels)

        pushed = jax.jvp(network, (x,), (tangent,))[1]
        pulled = jax.vjp(network, x)[1](tangent)[0]
        return jnp.sum(pushed * tangent), jnp.sum(pulled * tangent)

    np.testing.assert_allclose(*both_ways(x), rtol=1e-10)


def test_other_state_is_refused_by_name():
    class Stateful(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 2, rngs=rngs)
            self.norm = nnx.BatchNorm(2, rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)

    with pytest.raises(ValueError, match=r"drop\.rngs\.count.*norm\.mean \(BatchStat\)"):
        nn.functional(Stateful(nnx.Rngs(0)))


def test_lists_of_modules_are_refused_with_the_remedy():
    class Listed(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])

    with pytest.raises(ValueError, match=r"blocks\.0, blocks\.1.*zero-padded"):
        nn.functional(Listed(nnx.Rngs(0)))


def test_on_log_snr_shows_the_network_the_log_snr():
    process = processes.flow()
    params, apply, x, _, labels = prepare("mlp")
    t = jnp.array([0.1, 0.4, 0.8, 1.0], jnp.float32)
    wrapped = nn.on_log_snr(apply, process.log_snr)(params, x, t, labels)
    np.testing.assert_array_equal(wrapped, apply(params, x, process.log_snr(t), labels))
    assert np.isfinite(wrapped).all()


class EquinoxNetwork(eqx.Module):
    layer: eqx.nn.Linear

    def __call__(self, x_t, t):
        return jax.vmap(self.layer)(x_t) * jnp.exp(-t).astype(x_t.dtype)


def linen_network():
    module = linen.Dense(2)
    params = module.init(jax.random.key(0), jnp.ones((1, 2), jnp.float32))
    return lambda x_t, t: module.apply(params, x_t)


def nnx_network():
    params, apply, *_ = prepare("mlp")
    return lambda x_t, t: apply(params, x_t, t)


@pytest.mark.parametrize(
    "build",
    [
        nnx_network,
        linen_network,
        lambda: EquinoxNetwork(eqx.nn.Linear(2, 2, key=jax.random.key(0))),
        lambda: lambda x_t, t: jnp.zeros_like(x_t),
    ],
    ids=["nnx", "linen", "equinox", "function"],
)
def test_any_callable_serves_as_a_network(build):
    denoise = denoisers.from_network(build(), processes.vp(), prediction="v")
    x = jnp.ones((3, 2), jnp.float32)
    assert denoise(x, jnp.float32(0.5)).shape == x.shape


# --- Refusals -------------------------------------------------------------------------------


@each_network
@pytest.mark.parametrize("label", [-1, NUM_CLASSES + 1])
def test_labels_out_of_range_are_refused(name, label):
    x = jnp.ones((2, *outline(name)[1]), jnp.float32)
    with pytest.raises(ValueError, match=r"`cond`.*0\.\.3.*null label"):
        check(name, x, jnp.float32(0.0), jnp.array([0, label]))


@pytest.mark.parametrize("label", [-1, NUM_CLASSES + 1])
def test_traced_labels_out_of_range_give_nan(label):
    params, apply, x, t, _ = prepare("mlp")
    output = apply(params, x, t, jnp.array([0, 0, label, 0]))
    np.testing.assert_array_equal(np.isnan(output).all(-1), [False, False, True, False])


@each_network
@pytest.mark.parametrize("num_classes", [None, 0])
def test_labels_are_refused_by_an_unconditional_network(name, num_classes):
    x = jnp.ones((2, *outline(name)[1]), jnp.float32)
    with pytest.raises(ValueError, match="`cond` must be None"):
        check(name, x, jnp.float32(0.0), jnp.array([0, 1]), num_classes=num_classes)


@each_network
def test_wrong_shapes_are_refused(name):
    x = jnp.ones((2, *outline(name)[1]), jnp.float32)
    with pytest.raises(ValueError, match="`x` must have shape"):
        check(name, x[..., jnp.newaxis], jnp.float32(0.0))
    with pytest.raises(ValueError, match="`x` must have shape"):
        check(name, x[0], jnp.float32(0.0))
    with pytest.raises(ValueError, match="`log_snr` must have shape"):
        check(name, x, jnp.zeros(3, jnp.float32))
    with pytest.raises(ValueError, match="`cond` must have shape"):
        check(name, x, jnp.float32(0.0), jnp.array([0]))
    with pytest.raises(TypeError, match="`cond` must hold integer labels"):
        check(name, x, jnp.float32(0.0), jnp.zeros(2, jnp.float32))


@each_network
def test_training_without_labels_is_refused_where_there_are_classes(name):
    params, apply = nn.functional(outline(name)[0])
    x = jnp.ones((2, *outline(name)[1]), jnp.float32)
    with pytest.raises(ValueError, match=r"`cond` must hold labels.*\"cond\".*label 3 stands for"):
        jax.eval_shape(lambda p: apply(p, x, jnp.float32(0.0), key=jax.random.key(0)), params)


@each_network
def test_what_is_no_array_is_refused_by_its_name(name):
    x = jnp.ones((2, *outline(name)[1]), jnp.float32)
    params, apply = nn.functional(outline(name)[0])
    for cond in ({"label": jnp.zeros(2, int)}, "3", jnp.zeros(2, bool)):
        with pytest.raises(TypeError, match="`cond` must hold integer labels"):
            jax.eval_shape(lambda p, cond=cond: apply(p, x, jnp.float32(0.0), cond), params)
    with pytest.raises(TypeError, match="`x` must hold real numbers"):
        jax.eval_shape(lambda p: apply(p, {"image": x}, jnp.float32(0.0)), params)
    with pytest.raises(TypeError, match="`log_snr` must hold real numbers"):
        jax.eval_shape(lambda p: apply(p, x, None), params)


def test_a_network_says_what_its_time_is():
    process = processes.vp()
    _, apply = nn.functional(outline("mlp")[0])
    assert apply.time == "log_snr"
    assert nn.deferred(lambda: make("mlp")[0])[1].time == "log_snr"
    timed = nn.on_log_snr(apply, process.log_snr)
    assert timed.time == "t"
    with pytest.raises(ValueError, match="`apply` takes times, not log-SNRs"):
        nn.on_log_snr(timed, process.log_snr)
    with pytest.raises(TypeError, match="`log_snr` must be a function of the time, such as"):
        nn.on_log_snr(apply, process)
    nn.on_log_snr(lambda params, x_t, t, cond=None, key=None: x_t, process.log_snr)


@pytest.mark.parametrize(
    ("module", "got"),
    [(nn.MLP, "the class MLP"), (lambda x: x, "the function <lambda>"), ({}, "{} ")],
)
def test_what_is_no_module_is_not_taken_apart(module, got):
    with pytest.raises(TypeError, match=f"`module` must be a flax.nnx.Module, made; got {got}"):
        nn.functional(module)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"width": 16.0}, "width"),
        ({"depth": True}, "depth"),
        ({"dropout": "0.1"}, "dropout"),
        ({"num_classes": 2.5}, "num_classes"),
        ({"dtype": int}, "dtype"),
        ({"dtype": "float"}, None),
        ({"rngs": 0}, "rngs"),
    ],
)
def test_options_of_another_kind_are_refused(options, name):
    def build():
        return nn.MLP(2, **{"width": 4, "depth": 1, "rngs": nnx.Rngs(0), **options})

    if name is None:
        nnx.eval_shape(build)
    else:
        with pytest.raises(TypeError, match=f"`{name}` must"):
            build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda r: nn.MLP(0, rngs=r), "`num_dims`"),
        (lambda r: nn.MLP(2, depth=0, rngs=r), "`depth`"),
        (lambda r: nn.MLP(2, dropout=1.0, rngs=r), "`dropout`"),
        (lambda r: nn.MLP(2, num_classes=-1, rngs=r), "`num_classes`"),
        (lambda r: nn.UNet((8, 8), rngs=r), "`shape`"),
        (lambda r: nn.UNet((6, 6, 1), rngs=r), "divisible by 4"),
        (lambda r: nn.UNet((8, 8, 1), multipliers=(), rngs=r), "`multipliers`"),
        (lambda r: nn.UNet((8, 8, 1), num_heads=7, rngs=r), "`num_heads`"),
        (lambda r: nn.DiT((8, 9, 1), rngs=r), "`patch_size`"),
        (lambda r: nn.DiT((8, 8, 1), width=10, rngs=r), "`width`"),
        (lambda r: nn.DiT((8, 8, 1), width=16, num_heads=3, rngs=r), "`width`"),
    ],
)
def test_impossible_sizes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(nnx.Rngs(0))
