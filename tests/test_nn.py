"""Networks: float32 in and out although the tests run in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from network_cases import (
    NUM_CLASSES,
    check,
    each_network,
    make,
    mlp_and_dit,
    outline,
    prepare,
    quick_jit,
    quick_networks,
)

from jaxdiff import nn, numerics

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


@quick_networks
def test_initialisation_follows_from_the_seed(name):
    @quick_jit
    def initialise(key):
        return nn.functional(make(name, rngs=nnx.Rngs(key))[0])[0]

    # Any generator shows it; this one compiles quickly.
    first, again, other = (
        initialise(jax.random.key(seed, impl="unsafe_rbg")) for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(*(p["conditioning"]["time_in"]["kernel"] for p in (first, other)))


@each_network
def test_the_first_output_is_exactly_zero(name):
    """By its last layer, whatever the others are; so that alone is drawn."""
    params, apply, x, t, labels = prepare(name)
    last = "conv_out" if name == "unet" else "output"
    initial = jax.jit(lambda: nn.functional(make(name)[0])[0][last])()
    np.testing.assert_array_equal(apply({**params, last: initial}, x, t, labels), 0.0)


def names_of(params):
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def test_parameters_keep_their_names_and_first_values():
    """Runs of earlier versions are read by these names; the values depend on the order of draws."""
    module = nn.MLP(1, width=2, depth=1, num_classes=2, rngs=nnx.Rngs(0))
    found = {name: float(np.ravel(a)[0]) for name, a in names_of(nn.functional(module)[0]).items()}
    assert found == pytest.approx(
        {
            "block_00.inner.bias": 0.0,
            "block_00.inner.kernel": -0.0480226837,
            "block_00.modulation.kernel": 0.0553166568,
            "block_00.outer.bias": 0.0,
            "block_00.outer.kernel": -0.1478622854,
            "conditioning.labels": -0.0204177070,
            "conditioning.time_in.bias": 0.0,
            "conditioning.time_in.kernel": 0.2064231783,
            "conditioning.time_out.bias": 0.0,
            "conditioning.time_out.kernel": 0.9857959151,
            "input.bias": 0.0,
            "input.kernel": 0.6871700287,
            "output.bias": 0.0,
            "output.kernel": 0.0,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("unet", {"attention": 304, "conv_in": 40, "down_00_00": 448, "down_01_00": 1216}),
        ("unet", {"middle_00": 1472, "middle_01": 1472, "up_01_00": 2200, "up_00_00": 804}),
        ("unet", {"norm_out": 8, "conv_out": 37, "conditioning": 1376}),
        ("dit", {"block_00": 4848, "conditioning": 1376, "input": 80, "output": 68}),
        ("dit", {"final_modulation": 544}),
    ],
)
def test_parts_of_image_networks_keep_their_names_and_sizes(name, sizes):
    params, _ = nn.functional(outline(name)[0])
    assert (
        sizes.items()
        <= {k: sum(a.size for a in names_of(v).values()) for k, v in params.items()}.items()
    )
    assert len(params) == {"unet": 11, "dit": 5}[name]


@each_network
def test_scalar_time_equals_time_of_each_row(name):
    params, apply, x, _, labels = prepare(name)
    scalar = apply(params, x, np.float32(1.5), labels)
    np.testing.assert_array_equal(scalar, apply(params, x, np.full(4, 1.5, np.float32), labels))


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
    null = np.full(4, NUM_CLASSES)
    np.testing.assert_array_equal(apply(params, x, t), apply(params, x, t, null))


@quick_networks
def test_infinite_log_snr_gives_finite_output_and_gradients(name):
    params, apply, x, _, labels = prepare(name)
    t = np.array([-np.inf, np.inf, -20.0, 20.0], np.float32)

    def total(params, x, t):
        return jnp.mean(apply.__wrapped__(params, x, t, labels) ** 2)

    value, gradients = quick_jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(params, x, t)
    assert jax.tree.all(jax.tree.map(lambda a: np.isfinite(a).all(), (value, gradients)))
    ends = apply(params, np.broadcast_to(x[:1], x.shape), t, np.zeros(4, int))
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
    error = float(np.linalg.norm(output - exact) / np.linalg.norm(exact))
    assert 1e-4 < error < 0.1  # 8 bits: 0.004 an operation, over some tens of them


@each_network
def test_float64_is_computed_where_asked_for(name):
    params, apply, x, t, labels = prepare(name, dtype=jnp.float64, param_dtype=jnp.float64)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.float64)}
    assert jax.eval_shape(apply, params, x, t, labels).dtype == jnp.float64


def test_one_set_of_parameters_serves_images_of_every_size():
    params, _, x, t, labels = prepare("unet")
    wide = jnp.concatenate([x, x], axis=2)
    options = {"channels": 4, "multipliers": (1, 2), "num_heads": 2, "num_classes": NUM_CLASSES}
    made_for = [(8, 8, 1), (8, 16, 1)]
    programs = []
    for shape in made_for:
        module = nnx.eval_shape(lambda s=shape: nn.UNet(s, rngs=nnx.Rngs(0), **options))
        shapes, apply = nn.functional(module)
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
        programs.append(jax.make_jaxpr(apply)(params, wide, t, labels))
    assert str(programs[0]) == str(programs[1])
    assert programs[0].out_avals[0].shape == wide.shape


def test_images_that_cannot_be_halved_are_refused():
    x = jnp.ones((2, 8, 8, 1), jnp.float32)
    with pytest.raises(ValueError, match="`x` must have H and W divisible by 2 for 2 levels"):
        check("unet", x[:, :7], jnp.float32(0.0))
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, H, W, 1\); got \(2, 8, 8, 2\)"):
        check("unet", jnp.concatenate([x, x], axis=-1), jnp.float32(0.0))
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, 8, 8, 1\); got \(2, 8, 4, 1\)"):
        check("dit", x[:, :, :4], jnp.float32(0.0))


def test_attention_stands_at_the_levels_asked_for():
    options = {"channels": 4, "multipliers": (1, 2), "num_blocks": 2, "num_heads": 2}
    shapes, apply = nn.functional(
        nnx.eval_shape(
            lambda: nn.UNet((8, 8, 1), attention_levels=(1,), rngs=nnx.Rngs(0), **options)
        )
    )
    found = {name for name in shapes if "attention" in name}
    places = {f"{way}_attention_01_{i:02d}" for way in ("down", "up") for i in range(2)}
    assert found == {"attention"} | places
    x = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    program = str(jax.make_jaxpr(apply)(shapes, x, jax.ShapeDtypeStruct((), jnp.float32)))
    assert program.count(" exp ") == 5  # of the softmax in each


def test_log_snr_may_be_given_by_its_name():
    params, apply, x, t, labels = prepare("mlp")
    np.testing.assert_array_equal(
        apply(params, x, log_snr=t, cond=labels), apply(params, x, t, labels)
    )


def test_layer_norm_scales_and_shifts_in_float32():
    from jaxdiff.nn.layers import LayerNorm, layer_norm

    norm = LayerNorm(16, epsilon=1e-5, param_dtype=float)
    scale, shift = np.linspace(0.5, 2.0, 16), np.arange(16.0)
    norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(shift)
    x = np.random.default_rng(0).normal(size=(3, 5, 16))

    @jax.jit
    def evaluate(x):
        half = x.astype(jnp.bfloat16)
        in_single = norm(half.astype(jnp.float32)).astype(jnp.bfloat16)
        return norm(x), layer_norm(x, 1e-5), norm(half), in_single

    scaled, plain, half, in_single = evaluate(x)
    expected = np.asarray(plain) * scale + shift
    np.testing.assert_allclose(scaled, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(half, in_single)


def test_layer_norm_is_the_published_formula():
    from jaxdiff.nn.layers import layer_norm

    x = 100.0 + np.random.default_rng(0).normal(size=(3, 5, 16))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    double, single = jax.jit(lambda x: (layer_norm(x), layer_norm(x.astype(jnp.float32))))(x)
    np.testing.assert_allclose(double, expected, rtol=1e-10, atol=1e-10)
    # 100 +- 1 in float32 has 5 digits of the deviation left.
    np.testing.assert_allclose(single, expected, atol=1e-4)


def test_group_norm_is_the_published_formula():
    from jaxdiff.nn.layers import GroupNorm

    norm = GroupNorm(6, max_groups=2, epsilon=0.1, param_dtype=float)
    norm.bias[...] = jnp.arange(6.0)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 6))
    groups = x.reshape(2, 12, 2, 3)
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = ((groups - mean) / np.sqrt(variance + 0.1)).reshape(x.shape) + np.arange(6.0)
    np.testing.assert_allclose(jax.jit(norm)(x), expected, rtol=1e-10, atol=1e-10)


def test_steps_are_embedded_as_ddpm_does_and_flipped_as_dit_does():
    from jaxdiff.nn.layers import sinusoidal

    t = np.array([0.0, 1.0, 999.0])
    ddpm = 10000.0 ** (-np.arange(4) / 3)
    expected = np.concatenate([np.sin(np.outer(t, ddpm)), np.cos(np.outer(t, ddpm))], axis=-1)
    np.testing.assert_allclose(sinusoidal(jnp.asarray(t), 8, shift=1.0), expected, atol=1e-12)
    dit = np.outer(t, 10000.0 ** (-np.arange(4) / 4))
    expected = np.concatenate([np.cos(dit), np.sin(dit)], axis=-1)
    np.testing.assert_allclose(sinusoidal(jnp.asarray(t), 8, flip=True), expected, atol=1e-12)
    assert sinusoidal(jnp.arange(2), 8).dtype == jnp.float32
    with pytest.raises(ValueError, match="`width` must be even; got 7"):
        sinusoidal(jnp.asarray(t), 7)


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

    @jax.jit
    def drop(key, x):
        rows = numerics.row_keys(key, 2)
        return dropout(x, 0.2, rows, 0), dropout(x, 0.2, rows, 1)

    ones = np.ones((2, 40_000), np.float32)
    first, second = jax.device_get(drop(jax.random.key(0), ones))
    assert set(np.unique(first)) == {np.float32(0.0), np.float32(1.25)}
    error = np.sqrt(0.25 / 80_000)  # the variance of an entry is 0.2 / 0.8
    assert abs(float(first.mean()) - 1.0) < 4 * error, f"standard error {error}"
    # Independent masks agree on a share 0.8^2 + 0.2^2 = 0.68 of the entries.
    assert abs(float(np.mean(first == second)) - 0.68) < 0.01
    assert abs(float(np.mean(first[0] == first[1])) - 0.68) < 0.01


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

        return jax.device_get(quick_jit(jax.grad(loss))(params))

    plain, remat = (gradient(prepare("mlp", **kind)[1]) for kind in ({}, {"remat": True}))
    scale = max(float(np.abs(a).max()) for a in jax.tree.leaves(plain))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        # The same float32 operations, fused differently.
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale)


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
        (lambda r: nn.UNet((8, 8, 1), multipliers=(1, 0), rngs=r), "`multipliers`"),
        (lambda r: nn.UNet((8, 8, 1), attention_levels=(3,), rngs=r), r"in 0\.\.2"),
        (
            lambda r: nn.UNet(
                (8, 8, 1), channels=6, multipliers=(1, 2), attention_levels=(0,), rngs=r
            ),
            "the 6 channels of level 0; got 4",
        ),
        (lambda r: nn.DiT((8, 9, 1), rngs=r), "`patch_size`"),
        (lambda r: nn.DiT((8, 8, 1), width=10, rngs=r), "`width`"),
        (lambda r: nn.DiT((8, 8, 1), width=16, num_heads=3, rngs=r), "`width`"),
    ],
)
def test_impossible_sizes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(nnx.Rngs(0))
