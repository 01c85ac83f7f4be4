"""The functional form: what a module becomes, how it is called, what is refused."""

import functools

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from network_cases import each_network, make, mlp_and_dit, outline, prepare, quick_jit

from jaxdiff import denoisers, nn, processes


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
    params = jax.device_get(params)
    stack = jax.tree.map(lambda a: np.stack([a, 0.5 * a]), params)
    both = jax.vmap(apply, in_axes=(0, None, None, None))(stack, x, t, labels)
    alone = apply(jax.tree.map(lambda a: 0.5 * a, params), x, t, labels)
    both, alone = jax.device_get((both, alone))
    np.testing.assert_allclose(both[1], alone, atol=2e-5 * float(np.abs(alone).max()))


@mlp_and_dit
def test_forward_mode_equals_reverse_mode(name):
    """Divergences push tangents through the network."""
    params, apply, x, t, labels = prepare(name, dtype=jnp.float64, param_dtype=jnp.float64)
    x = np.asarray(x, np.float64)
    tangent = np.random.default_rng(5).normal(size=x.shape)

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


# --- A free call ----------------------------------------------------------------------------


class Encoder(nnx.Module):
    """Takes no time and returns two things."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, image, *, scale=1.0, key=None):
        mean = self.layer(image) * scale
        return mean, mean if key is None else mean + jax.random.normal(key, mean.shape)


class Demanding(nnx.Module):
    """A network without defaults."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x_t, t, cond, *, key):
        return self.layer(x_t), cond, key


class Plain(nnx.Module):
    """Takes no key."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


def test_a_module_is_called_as_it_says():
    x = jnp.ones((4, 3))
    params, apply = nn.functional(Encoder(nnx.Rngs(0)))
    mean, same = apply(params, x, scale=2.0)
    np.testing.assert_allclose(mean, 2.0 * x @ params["layer"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(mean, same)
    assert np.all(apply(params, image=x, key=jax.random.key(0))[1] != mean)
    init, apply = nn.deferred(lambda: Encoder(nnx.Rngs(0)))
    np.testing.assert_array_equal(apply(init(), x, scale=2.0)[0], mean)


def test_conditioning_and_key_are_none_where_they_are_not_given():
    params, apply = nn.functional(Demanding(nnx.Rngs(0)))
    x, key = jnp.ones((4, 2)), jax.random.key(0)
    assert apply(params, x, 0.0)[1:] == (None, None)
    assert apply(params, x, 0.0, 3)[1:] == (3, None)
    assert apply(params, x, 0.0, cond=3, key=key)[1:] == (3, key)


def test_a_key_is_refused_by_a_module_that_takes_none():
    params, apply = nn.functional(Plain(nnx.Rngs(0)))
    assert apply(params, jnp.ones((4, 2))).shape == (4, 2)
    with pytest.raises(TypeError, match=r"`key` must not be given: Plain.*Let it take key=None"):
        apply(params, jnp.ones((4, 2)), key=jax.random.key(0))


def test_each_method_of_a_module_is_a_function_of_the_same_parameters():
    class Twice(nnx.Module):
        def __init__(self):
            self.factor = nnx.Param(jnp.asarray(2.0))

        def forth(self, x):
            return x * self.factor[...]

        def back(self, x, key=None):
            return x / self.factor[...] if key is None else x

    params, forth = nn.functional(Twice(), "forth")
    _, back = nn.functional(Twice(), "back")
    assert forth({"factor": jnp.asarray(3.0)}, 5.0) == 15.0
    assert back(params, 5.0) == 2.5
    assert back(params, 5.0, key=jax.random.key(0)) == 5.0
    with pytest.raises(TypeError, match=r"Twice\.forth has no argument of that name"):
        forth(params, 5.0, key=jax.random.key(0))
    with pytest.raises(TypeError, match="`module` must have a sideways; Twice has none"):
        nn.functional(Twice(), "sideways")


def test_a_module_that_cannot_be_called_is_refused():
    class Silent(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(2, 2, rngs=rngs)

    with pytest.raises(TypeError, match="`module` must have a __call__; Silent has none"):
        nn.functional(Silent(nnx.Rngs(0)))


# --- Refusals -------------------------------------------------------------------------------


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
