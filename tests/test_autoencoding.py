"""Autoencoders that are trained: their losses, and the networks that they are made for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxdiff import losses, nn, numerics
from jaxdiff.nn.layers import RMSNorm
from jaxdiff.nn.space_to_depth import depth_to_space, space_to_depth
from jaxdiff.rows import Rows
from jaxdiff.training import make_update, networks

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X0 = np.tanh(RNG.normal(size=(6, 6)))
PARAMS = {
    "autoencoder": {"mean": RNG.normal(size=(6, 2)), "log_std": np.log([[0.5, 0.2]])}
    | {"decoder": RNG.normal(size=(2, 6))},
    "discriminator": {"w": 3.0 * RNG.normal(size=(6, 3))},
}
FEATURES = RNG.normal(size=(2, 6, 5))


def encode(params, x):
    mean = x @ params["mean"]
    return mean, jnp.broadcast_to(jnp.exp(params["log_std"]), mean.shape)


def decode(params, z):
    return z @ params["decoder"]


def discriminate(params, x):
    return x @ params["w"]


def features(x):
    return [jnp.maximum(x @ each, 0.0).reshape(-1, 1, 5) for each in FEATURES]


ALL = {
    "squared": 2.0,
    "absolute": 0.3,
    "divergence": 0.1,
    "features": features,
    "perceptual": 0.7,
    "discriminate": discriminate,
    "adversarial": 0.4,
}
LOSS = losses.autoencoding(encode, decode, **ALL)
HINGE = losses.discriminating(encode, decode, discriminate)


def reconstructed():
    """Mean, standard deviation and decoded images, in NumPy; the noise alone is the library's."""
    params = PARAMS["autoencoder"]
    mean, std = X0 @ params["mean"], np.exp(params["log_std"])
    z = mean + std * np.asarray(numerics.normal(KEY, jnp.asarray(mean)))
    return mean, std, z @ params["decoder"]


@functools.cache
def evaluated():
    """All that the losses say of the images, and their gradients, by one program."""

    def loss_and_gradient(loss_fn, params):
        def mean(params):
            loss, metrics = loss_fn(params, KEY, {"x0": X0})
            return loss.mean(), (loss, metrics)

        grads, aux = jax.grad(mean, has_aux=True)(params)
        return *aux, grads

    @jax.jit
    def evaluate(params):
        numbers = Rows(jnp.asarray([4, 1]), jnp.full(2, 6))
        plain = losses.autoencoding(encode, decode)
        return {
            "autoencoder": loss_and_gradient(LOSS, params),
            "discriminator": loss_and_gradient(HINGE, params),
            "plain": plain(params["autoencoder"], KEY, {"x0": X0}),
            "few": LOSS(params, KEY, {"x0": X0[:2]})[0],
            "numbered": LOSS(params, KEY, {"x0": X0[[4, 1]], "rows": numbers})[0],
        }

    return jax.device_get(evaluate(PARAMS))


# --- The losses ------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_sum_of_its_terms():
    mean, std, x_hat = reconstructed()
    error = x_hat - X0
    distance = 0.0
    for each in FEATURES:
        found, wanted = (np.maximum(x @ each, 0.0) for x in (x_hat, X0))
        found, wanted = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (found, wanted))
        distance = distance + np.mean((found - wanted) ** 2, axis=1) / 2
    terms = {
        "squared_error": np.mean(error**2, axis=1),
        "absolute_error": np.mean(np.abs(error), axis=1),
        "divergence": np.mean((mean**2 + std**2 - 1) / 2 - np.log(std), axis=1),
        "perceptual": distance,
        "adversarial": -np.mean(x_hat @ PARAMS["discriminator"]["w"], axis=1),
    }
    loss, metrics, _ = evaluated()["autoencoder"]
    assert metrics.keys() == {*terms, "loss", "psnr"}
    for name, term in terms.items():  # the norm of features has 1e-10 added to its square
        np.testing.assert_allclose(metrics[name], term, rtol=1e-7, err_msg=name)
    weights = (2.0, 0.3, 0.1, 0.7, 0.4)
    wanted = sum(w * term for w, term in zip(weights, terms.values(), strict=True))
    np.testing.assert_allclose(loss, wanted, rtol=1e-7)
    np.testing.assert_array_equal(metrics["loss"], loss)
    np.testing.assert_allclose(metrics["psnr"], 10 * np.log10(4 / terms["squared_error"]))


def test_the_loss_is_the_squared_error_and_a_little_divergence_where_nothing_else_is_said():
    loss, metrics = evaluated()["plain"]
    wanted = metrics["squared_error"] + 1e-6 * metrics["divergence"]
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)
    assert metrics.keys() == {"loss", "squared_error", "absolute_error", "divergence", "psnr"}


def test_the_divergence_is_the_integral_that_it_stands_for():
    z = np.linspace(-12.0, 12.0, 20001)[:, np.newaxis, np.newaxis]
    mean, std, _ = reconstructed()
    log_q = -0.5 * ((z - mean) / std) ** 2 - np.log(std)
    density = np.exp(log_q) / np.sqrt(2 * np.pi)
    integral = np.sum(density * (log_q + 0.5 * z**2), axis=0) * (z[1] - z[0])
    _, metrics, _ = evaluated()["autoencoder"]
    np.testing.assert_allclose(metrics["divergence"], integral.mean(1), rtol=1e-9)


def test_the_discriminators_loss_is_of_hinges():
    real, made = (x @ PARAMS["discriminator"]["w"] for x in (X0, reconstructed()[2]))
    loss, metrics, _ = evaluated()["discriminator"]
    hinges = np.maximum(1 - real, 0) + np.maximum(1 + made, 0)
    assert (real > 1).any()
    assert (made < -1).any()
    np.testing.assert_allclose(loss, hinges.mean(1), rtol=1e-12)
    np.testing.assert_allclose(metrics["real"], real.mean(1), rtol=1e-12)
    np.testing.assert_allclose(metrics["reconstructed"], made.mean(1), rtol=1e-12)


def test_an_examples_latents_are_the_same_in_any_batch():
    whole = evaluated()["autoencoder"][0]
    np.testing.assert_allclose(evaluated()["few"], whole[:2], rtol=1e-12)
    np.testing.assert_allclose(evaluated()["numbered"], whole[[4, 1]], rtol=1e-12)


def test_no_gradient_goes_to_the_other_part():
    for own in PARAMS:
        for part, grad in evaluated()[own][2].items():
            moved = [np.abs(leaf).max() for leaf in jax.tree.leaves(grad)]
            assert all(moved) if part == own else not any(moved)


def updates(begins=0, optimizer=optax.sgd(0.1), **options):  # noqa: B008
    def loss_of(state):
        weight = jnp.where(state.step < begins, 0.0, ALL["adversarial"])
        return losses.autoencoding(encode, decode, **(ALL | {"adversarial": weight}))

    return networks.alternate(
        autoencoder=make_update(
            loss_of=loss_of, optimizer=optimizer, ema_decay=0.9, part="autoencoder", **options
        ),
        discriminator=make_update(HINGE, optimizer, ema_decay=0.9, part="discriminator", **options),
    )


@functools.cache
def two_steps(begins, **options):
    """The states after no, one and two steps; `begins` is traced, so that one program serves."""
    states = [updates(begins).init(PARAMS)]
    for _ in range(2):
        states.append(compiled(**options)(states[-1], begins))
    return jax.device_get(states)


@functools.cache
def compiled(**options):
    return jax.jit(lambda state, begins: updates(begins, **options)(state, KEY, {"x0": X0})[0])


@jax.jit
def step_by_hand(params):
    for i, (part, loss_fn) in enumerate((("autoencoder", LOSS), ("discriminator", HINGE))):
        key = jax.random.fold_in(jax.random.fold_in(KEY, i), 0)

        def mean(params, loss_fn=loss_fn, key=key):
            return loss_fn(params, key, {"x0": X0})[0].mean()

        grads = jax.grad(mean)(params)[part]
        params = params | {part: jax.tree.map(lambda p, g: p - 0.1 * g, params[part], grads)}
    return params


def test_each_part_moves_by_its_own_gradient():
    _, moved, _ = two_steps(0)
    wanted = step_by_hand(PARAMS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), moved.params, wanted)


def test_the_adversarial_term_may_begin_later():
    at_once, later, never = (two_steps(begins) for begins in (0, 1, 100))

    def gap(one, other):
        leaves = (jax.tree.leaves(state.params["autoencoder"]) for state in (one, other))
        return max(np.abs(a - b).max() for a, b in zip(*leaves, strict=True))

    assert gap(later[1], never[1]) < 1e-14
    assert gap(at_once[1], never[1]) > 1e-3
    assert gap(later[2], never[2]) > 1e-3


@pytest.mark.slow  # test_parallel.py has the networks' in two parts
def test_gradients_in_two_parts_make_the_same_update():
    whole, parts = two_steps(1)[2], two_steps(1, accumulate=2)[2]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9), parts.params, whole.params
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"squared": -1.0}, "`squared` must be at least 0"),
        ({"divergence": float("nan")}, "`divergence` must"),
        ({"perceptual": 1.0}, "`perceptual` weighs the difference of `features`"),
        ({"adversarial": 1.0}, "`adversarial` weighs what `discriminate` says"),
    ],
)
def test_weights_without_what_they_weigh_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        losses.autoencoding(encode, decode, **options)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"encode": lambda p, x: x}, r"`encode` must return \(mean, std\)"),
        ({"encode": lambda p, x: (x, x[:, :1])}, "mean and std of one shape"),
        ({"encode": lambda p, x: (x[:1], x[:1])}, "`encode` must return arrays of the 6 rows"),
        ({"decode": lambda p, z: z}, "`decode` must return the shape of x0"),
        ({"discriminate": lambda p, x: x.mean()}, "`discriminate` must return arrays of the 6"),
        ({"features": lambda x: x}, "`features` must return a list of maps"),
        ({"features": lambda x: [x.mean()]}, "`features` must return arrays of the 6 rows"),
        ({"discriminate": None, "adversarial": 0.0}, "mean"),  # the parts are not the autoencoder's
    ],
)
def test_functions_that_return_something_else_are_refused(change, match):
    given = {"encode": encode, "decode": decode, **ALL, **change}
    with pytest.raises((TypeError, ValueError, KeyError), match=match):
        jax.eval_shape(losses.autoencoding(**given), PARAMS, KEY, {"x0": X0})


def test_parameters_without_both_parts_are_refused():
    for loss_fn in (LOSS, HINGE):
        with pytest.raises(ValueError, match="`params` must be a dictionary of the parts"):
            jax.eval_shape(loss_fn, PARAMS["autoencoder"], KEY, {"x0": X0})


# --- The networks ----------------------------------------------------------------------------


def abstract(make, **options):
    return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0), **options))


def num_parameters(module):
    leaves = jax.tree.leaves(nnx.state(module))
    return sum(leaf.size for leaf in leaves)


def shapes(make, method, x, **options):
    """Shapes and dtypes of what a method of a network makes of an array."""

    def call(x):
        return getattr(make(rngs=nnx.Rngs(0), **options), method)(x)

    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), jax.eval_shape(call, x))


def test_the_small_autoencoder_is_as_small_as_it_says():
    network = abstract(nn.SpaceToDepthAutoencoder)
    assert (network.channels, network.latent_channels, network.factor) == (3, 4, 4)
    count = num_parameters(network)
    assert count == 163_220
    assert f"{count:,}" in nn.SpaceToDepthAutoencoder.__doc__


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_latents_and_images_have_their_shapes(dtype):
    make = functools.partial(nn.SpaceToDepthAutoencoder, dtype=jnp.dtype(dtype))
    latents = ((2, 8, 8, 4), "float32")
    assert shapes(make, "encode", np.zeros((2, 32, 32, 3))) == (latents, latents)
    decoded = shapes(make, "decode", np.zeros((2, 8, 8, 4)))
    assert decoded == ((2, 32, 32, 3), "float32")
    deep = {"channels": 1, "widths": (4, 8, 8), "num_blocks": 0, "latent_channels": 2}
    mean, _ = shapes(make, "encode", np.zeros((1, 16, 24, 1)), **deep)
    assert mean == ((1, 2, 3, 2), "float32")


def test_folding_pixels_keeps_them_together_and_is_undone():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    folded = space_to_depth(jnp.asarray(x))
    np.testing.assert_array_equal(folded[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(depth_to_space(folded), x)


def test_the_norm_divides_by_the_root_of_the_mean_square():
    x = RNG.normal(size=(2, 3, 3, 5))
    norm = RMSNorm(5, param_dtype=jnp.float64)
    norm.scale[...] = jnp.arange(5.0)
    wanted = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * np.arange(5.0)
    np.testing.assert_allclose(norm(jnp.asarray(x)), wanted, rtol=1e-12)


def test_latents_are_scaled_and_shifted_within():
    options = {"channels": 1, "widths": (4,), "num_blocks": 1, "dtype": jnp.float64}

    @jax.jit
    def evaluate(x):
        plain = nn.SpaceToDepthAutoencoder(rngs=nnx.Rngs(0), **options)
        other = nn.SpaceToDepthAutoencoder(rngs=nnx.Rngs(0), scale=2.0, shift=0.5, **options)
        latents = plain.encode(x), other.encode(x)
        return *latents, plain.decode(latents[0][0]), other.decode(latents[1][0])

    (mean, std), (scaled_mean, scaled_std), image, same = evaluate(RNG.normal(size=(2, 4, 4, 1)))
    np.testing.assert_allclose(scaled_mean, 2.0 * (mean - 0.5), rtol=1e-12)
    np.testing.assert_allclose(scaled_std, 2.0 * std, rtol=1e-12)
    np.testing.assert_allclose(same, image, rtol=1e-9)


def test_the_discriminator_makes_the_published_number_of_patches():
    published = {"widths": (64, 128, 256, 512)}
    for options, size, wanted in ((published, 256, 30), ({}, 32, 6), ({}, 12, 1)):
        x = np.zeros((2, size, size, 3))
        found = shapes(nn.PatchDiscriminator, "__call__", x, **options)
        assert found == ((2, wanted, wanted), "float32")


def test_a_discriminators_row_does_not_depend_on_the_others():
    @jax.jit
    def evaluate(x):
        network = nn.PatchDiscriminator(1, widths=(4, 4), dtype=jnp.float64, rngs=nnx.Rngs(0))
        return network(x)[:1], network(x[:1])

    x = RNG.normal(size=(3, 6, 6, 1)) * np.asarray([1.0, 1.0, 100.0]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(*evaluate(x), rtol=1e-9)


def test_other_sizes_are_refused():
    network = abstract(nn.SpaceToDepthAutoencoder)
    with pytest.raises(ValueError, match="`x` must have H and W divisible by 4; got"):
        network.encode(np.zeros((2, 8, 6, 3)))
    with pytest.raises(ValueError, match=r"`z` must have shape \(B, H, W, 4\); got \(2, 4, 4, 3\)"):
        network.decode(np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="`x` must have H and W of at least 12, for one patch"):
        abstract(nn.PatchDiscriminator)(np.zeros((2, 8, 8, 3)))
    for make in (nn.SpaceToDepthAutoencoder, nn.PatchDiscriminator):
        with pytest.raises(ValueError, match="`widths` must hold one number a level; got none"):
            abstract(make, widths=())
        with pytest.raises(TypeError, match="`channels` must be a whole number"):
            abstract(make, channels=1.5)
    with pytest.raises(ValueError, match="`scale` must be positive"):
        abstract(nn.SpaceToDepthAutoencoder, scale=0.0)
    with pytest.raises(ValueError, match=r"`slope` must lie in \[0, 1\]"):
        abstract(nn.PatchDiscriminator, slope=2.0)
