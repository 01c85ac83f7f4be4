"""What an update and a loss are given: right in every mode, or refused by name."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import few

from jaxdiff import losses, numerics, predictions, processes, timesteps, training, weightings
from jaxdiff.losses import noised
from jaxdiff.training import ema, make_update, parallel

KEY = jax.random.key(0)
VP = processes.vp()
X0 = jax.random.normal(jax.random.key(1), (8, 3))
OPTIMIZER = optax.sgd(0.1)


def shrink(params, x_t, t, cond=None, *, key=None):
    return x_t * params["w"][None]


def own_loss(params, key, batch):
    """A loss of one's own that draws per-example noise by the one key it gets."""
    noise = numerics.normal(key, batch["x0"])
    return jnp.sum((batch["x0"] * params["w"][None] - noise) ** 2, axis=1), {}


def start(params=None, decay=0.9):
    params = {"w": jnp.ones(3)} if params is None else params
    return training.init(params, OPTIMIZER, ema_decay=decay)


LOSSES = {"own": own_loss, "library": losses.denoising(shrink, VP)}
WRAPPED = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "jitted checkpoint": lambda loss: jax.jit(jax.checkpoint(loss)),
    "vmap": lambda loss: (
        lambda params, key, batch: jax.tree.map(
            lambda x: x[0], jax.vmap(loss, (0, None, None))(_one_more(params), key, batch)
        )
    ),
}


def _one_more(params):
    return jax.tree.map(lambda leaf: leaf[None], params)


@pytest.mark.parametrize(
    ("name", "wrapped"),
    few(
        [(name, wrapped) for name in LOSSES for wrapped in WRAPPED],
        [("own", wrapped) for wrapped in ("jit", "checkpoint", "vmap")],
    ),
)
def test_a_wrapped_loss_draws_the_noise_of_the_plain_one(name, wrapped):
    loss = WRAPPED[wrapped](LOSSES[name])
    jax.eval_shape(loss, {"w": jnp.ones(3)}, KEY, {"x0": X0[:4]})  # before, as it sees a part
    sharded = make_update(loss, OPTIMIZER, ema_decay=0.9, axis_name="i", accumulate=2)

    @jax.jit
    def both(state, key, x0):
        in_parts = make_update(loss, OPTIMIZER, ema_decay=0.9, accumulate=2)
        by_shard = jax.vmap(sharded, (None, None, 0), axis_name="i")
        moved = in_parts(state, key, {"x0": x0})[0]
        return moved.params["w"], by_shard(state, key, {"x0": x0.reshape(2, 4, 3)})[0].params["w"]

    in_parts, shards = both(start(), KEY, X0)
    np.testing.assert_allclose(in_parts, moved_at_once(name), rtol=1e-12)
    np.testing.assert_allclose(shards[0], moved_at_once(name), rtol=1e-12)


@functools.cache
def moved_at_once(name):
    """Return the parameters after an update by a whole batch."""
    update = jax.jit(make_update(LOSSES[name], OPTIMIZER, ema_decay=0.9))
    return np.asarray(update(start(), KEY, {"x0": X0})[0].params["w"])


@pytest.mark.parametrize("axis_name", [None, "data", "another"])
def test_what_parallel_compiles_is_told_its_axis(axis_name):
    update = make_update(own_loss, OPTIMIZER, ema_decay=0.9, axis_name=axis_name)
    mesh = parallel.make_mesh(1)
    for step in (parallel.pmap(update), parallel.jit(update), parallel.mesh(update, mesh)):
        state, _ = step(start(), KEY, {"x0": X0})
        np.testing.assert_allclose(state.params["w"], moved_at_once("own"), rtol=1e-12)


def test_an_update_that_cannot_be_told_its_axis_is_refused_where_it_lacks_it():
    update = make_update(own_loss, OPTIMIZER, ema_decay=0.9)

    def plain(state, key, batch):
        return update(state, key, batch)

    with pytest.raises(ValueError, match="`axis_name` must be 'data'.*parallel.pmap"):
        parallel.pmap(plain)(start(), KEY, {"x0": X0})
    batch = {"x0": X0[None]}
    with pytest.raises(ValueError, match="`axis_name` must be 'mine'"):
        jax.pmap(update, axis_name="mine", in_axes=(None, None, 0))(start(), KEY, batch)
    with pytest.raises(ValueError, match="`axis_name` must be 'of yours'"):
        jax.pmap(update, in_axes=(None, None, 0))(start(), KEY, batch)
    named = make_update(own_loss, OPTIMIZER, ema_decay=0.9, axis_name="data")
    with pytest.raises(ValueError, match="`axis_name` is 'data', and no such axis is mapped"):
        jax.jit(named)(start(), KEY, {"x0": X0})
    moved, _ = parallel.pmap(lambda *args: named(*args))(start(), KEY, {"x0": X0})
    np.testing.assert_allclose(moved.params["w"], moved_at_once("own"))


def test_members_of_a_vmap_train_alone_without_an_axis():
    update = make_update(own_loss, OPTIMIZER, ema_decay=0.9)
    many = jax.jit(jax.vmap(update, (None, 0, None), axis_name="members"))
    states, _ = many(start(), jax.random.split(KEY, 2), {"x0": X0})
    assert jnp.abs(states.params["w"][0] - states.params["w"][1]).min() > 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_average_of_16_bit_parameters_moves(dtype):
    def loss(params, key, batch):
        return params["w"].astype(jnp.float32) @ batch["g"].T, {}

    optimizer = optax.sgd(2.0**-6)  # moves by exactly 1/64
    state = training.init({"w": jnp.ones(1, dtype)}, optimizer, ema_decay=0.99)
    update = parallel.jit(make_update(loss, optimizer, ema_decay=0.99))
    average, moved = 1.0, 1.0
    for _ in range(40):
        state, _ = update(state, KEY, {"g": -jnp.ones((8, 1), jnp.float32)})
        moved += 1 / 64
        average = 0.99 * average + 0.01 * moved
    assert state.params["w"].dtype == dtype
    assert state.ema["w"].dtype == jnp.float32
    np.testing.assert_allclose(state.ema["w"][0], average, rtol=1e-5)


def test_how_much_of_the_start_an_average_holds():
    assert ema.initial_share(0.9997, 1000) == pytest.approx(0.7408, abs=1e-4)
    assert ema.initial_share(0.0, 1) == 0.0
    assert ema.initial_share(ema.PowerDecay(0.1), 10) == 0.0
    state = start({"w": jnp.ones(3)}, 0.9)
    update = make_update(lambda p, k, b: (b["x0"] @ p["w"], {}), optax.sgd(0.0), ema_decay=0.9)
    state = state._replace(params={"w": jnp.zeros(3)})
    for _ in range(5):
        state, _ = update(state, KEY, {"x0": X0})
    np.testing.assert_allclose(state.ema["w"], ema.initial_share(0.9, 5), rtol=1e-12)


BAD_LOSSES = {
    "a mean": (
        lambda p, k, b: (jnp.mean(b["x0"] @ p["w"]), {}),
        r"one loss an example.*\(8,",
    ),
    "a column": (lambda p, k, b: ((b["x0"] @ p["w"])[:, None], {}), "one loss an example"),
    "no metrics": (lambda p, k, b: b["x0"] @ p["w"], "`loss_fn` must return"),
    "whole numbers": (lambda p, k, b: (jnp.ones(8, int), {}), "loss of floating-point numbers"),
    "a list of metrics": (lambda p, k, b: (b["x0"] @ p["w"], [1.0]), "metrics by name"),
    "a taken name": (
        lambda p, k, b: (b["x0"] @ p["w"], {"grad_norm": jnp.ones(8)}),
        "must not name a metric 'grad_norm'",
    ),
    "the name of a count": (
        lambda p, k, b: (b["x0"] @ p["w"], {"skipped": jnp.ones(8)}),
        "must not name a metric 'skipped'",
    ),
}


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_what_is_no_loss_an_example_is_refused(name):
    loss, match = BAD_LOSSES[name]
    with pytest.raises((TypeError, ValueError), match=match):
        make_update(loss, OPTIMIZER, ema_decay=0.9)(start(), KEY, {"x0": X0})


def test_a_metric_called_loss_does_not_replace_the_loss():
    def loss(params, key, batch):
        return batch["x0"] @ params["w"], {"loss": jnp.full(8, 7.0)}

    _, metrics = make_update(loss, OPTIMIZER, ema_decay=0.9)(start(), KEY, {"x0": X0})
    np.testing.assert_allclose(metrics["loss"], jnp.mean(X0 @ jnp.ones(3)))


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"w": jnp.ones(3), "n": jnp.arange(3)}, r"`params\['n'\]`.*int64"),
        ({"w": "text"}, r"`params\['w'\]`"),
        ({}, "at least one array"),
        (eqx.nn.MLP(2, 2, 4, 1, key=KEY), "equinox.partition"),
    ],
)
def test_parameters_without_a_gradient_are_refused(params, match):
    with pytest.raises((TypeError, ValueError), match=match):
        training.init(params, OPTIMIZER, ema_decay=0.9)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((start(decay={"a": 0.5}), KEY, {"x0": X0}), "`state.ema` must hold"),
        ((start()._replace(opt_state=()), KEY, {"x0": X0}), "`state.opt_state` must be of this"),
        (({"w": jnp.ones(3)}, KEY, {"x0": X0}), "`state` must be a TrainState"),
        ((start(), jax.random.PRNGKey(0), {"x0": X0}), "`key` must be a typed key.*legacy"),
        ((start(), 0, {"x0": X0}), "`key` must be a typed key.*got int"),
        ((start(), jax.random.split(KEY, 8), {"x0": X0}), "`key` must be one key; got 8"),
        ((start(), KEY, {}), "`batch` must hold arrays.*got nothing"),
        ((start(), KEY, {"x0": X0, "cond": jnp.ones(4)}), r"batch\['cond'\] \(4,\)"),
        ((start(), KEY, {"x0": X0[:0]}), "`batch` must hold arrays"),
        ((start(), KEY, {"x0": jnp.asarray(1.0)}), "`batch` must hold arrays"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_what_an_update_cannot_use_is_refused_by_name(arguments, match, compiled):
    update = make_update(own_loss, OPTIMIZER, ema_decay=0.9)
    with pytest.raises((TypeError, ValueError), match=match):
        (_leniently(update) if compiled else update)(*arguments)


def _leniently(update):
    """Compiled where the arguments can be, as a user would."""

    def run(state, key, batch):
        if isinstance(key, int):
            return update(state, key, batch)
        return jax.jit(update)(state, key, batch)

    return run


@pytest.mark.parametrize("accumulate", [2.0, "2", True, None])
def test_parts_that_are_no_whole_number_are_refused(accumulate):
    with pytest.raises(TypeError, match="`accumulate` must be a whole number"):
        make_update(own_loss, OPTIMIZER, ema_decay=0.9, accumulate=accumulate)


# --- Losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (X0, '`batch` must be a dictionary with "x0"; got an array'),
        ({"image": X0}, "`batch` must hold clean data as \"x0\".*got 'image'"),
        ({"x0": X0, "label": jnp.arange(8)}, "as \"cond\"; got 'x0', 'label'"),
        ({"x0": X0, "cond": jnp.arange(4)}, r'batch\["cond"\] must have the 8 rows'),
        ({"x0": X0, "cond": {"text": jnp.zeros((1, 4))}}, r"\['text'\] must have the 8 rows"),
        ({"x0": X0[:0]}, r"with B >= 1; got \(0, 3\)"),
        ({"x0": jnp.round(127.5 * (X0 / 4 + 1))}, "levels, it seems. Scale them to"),
        ({"x0": {"a": X0}}, "`x0` must be an array; got dict"),
        ({"x0": "text"}, "`x0`"),
    ],
)
def test_a_batch_that_is_not_clean_data_is_refused(batch, match):
    with pytest.raises((TypeError, ValueError), match=match):
        losses.denoising(shrink, VP)({"w": jnp.ones(3)}, KEY, batch)


def test_data_in_other_units_are_not_taken_for_levels():
    for x0 in (40.0 * X0, jnp.round(X0), jnp.zeros((8, 3))):
        loss, _ = losses.denoising(shrink, VP)({"w": jnp.ones(3)}, KEY, {"x0": x0})
        assert jnp.isfinite(loss).all()


def seen_cond(null, cond, rate=1.0):
    """What the network is given where the conditioning is dropped."""
    seen = []

    def apply(params, x_t, t, cond=None, *, key=None):
        seen.append(cond)
        return x_t

    loss = losses.denoising(apply, VP, drop_cond=rate, null_cond=null)
    loss({}, KEY, {"x0": X0, "cond": cond})
    return seen[0]


@pytest.mark.parametrize("null", [256, np.int32(256), jnp.int32(-1)])
def test_a_null_label_reaches_the_network_whatever_the_labels_dtype(null):
    cond = seen_cond(null, jnp.full(8, 7, jnp.uint8))
    np.testing.assert_array_equal(cond, jnp.full(8, null))
    assert seen_cond(255, jnp.full(8, 7, jnp.uint8)).dtype == jnp.uint8


@pytest.mark.parametrize(
    ("null", "cond", "match"),
    [
        ({"a": 0}, jnp.zeros(8, int), "`null_cond` must be a pytree like"),
        (0, {"a": jnp.zeros(8, int)}, "`null_cond` must be a pytree like"),
        (0.5, jnp.zeros(8, int), "`null_cond` must be of the kind"),
        (jnp.zeros(3), jnp.zeros((8, 4)), "the shape of one row"),
        (jnp.zeros((8, 4)), jnp.zeros((8, 4)), "the shape of one row"),
    ],
)
def test_a_null_that_does_not_fit_is_refused(null, cond, match):
    with pytest.raises((TypeError, ValueError), match=match):
        seen_cond(null, cond)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"drop_cond": "often"}, "`drop_cond` must be a real number"),
        ({"drop_cond": float("nan"), "null_cond": 0}, "`drop_cond` must lie in"),
        ({"times": timesteps.draw_uniform}, "`times` must be a function.*called first"),
        ({"times": timesteps.draw_log_snr}, "`times` must be a function.*called first"),
        ({"weighting": weightings.simple}, "`weighting` must be one of"),
        ({"process": processes.vp}, r"`process` must be a process.*Call it: vp\(\)"),
        ({"process": "vp"}, "`process` must be a process"),
        ({"apply": {"w": 1}}, "`apply` must be a function"),
    ],
)
@pytest.mark.parametrize("make", [losses.denoising, losses.flow_matching])
def test_options_of_a_loss_are_refused_by_name(make, options, match):
    options = {"apply": shrink, "process": VP} | options
    with pytest.raises((TypeError, ValueError), match=match):
        make(options.pop("apply"), options.pop("process"), **options)


def test_a_network_that_takes_no_key_is_refused_with_the_wrapper():
    loss = losses.denoising(lambda params, x_t, t: x_t, VP)
    with pytest.raises(TypeError, match=re.escape("wrap one that takes less, lambda params, x_t")):
        loss({}, KEY, {"x0": X0})


def test_a_network_of_log_snr_is_refused_until_it_is_told_the_process():
    def apply(params, x_t, log_snr, cond=None, *, key=None):
        return x_t

    apply.time = "log_snr"
    with pytest.raises(ValueError, match="nn.on_log_snr"):
        losses.denoising(apply, VP)


def test_a_score_of_another_shape_is_refused():
    loss = losses.explicit(shrink, VP, lambda x_t, t: x_t[:, :1])
    with pytest.raises(ValueError, match="`score` must return the shape of x_t"):
        loss({"w": jnp.ones(3)}, KEY, {"x0": X0})


# --- Weights at the ends of a process -------------------------------------------------------

LIMITS = {  # of the weight on the squared error of a kind, as alpha goes to 0
    ("min_snr", "eps"): 1.0,
    ("min_snr", "x0"): 0.0,
    ("min_snr", "v"): 0.0,
    ("min_snr", "score"): 1.0,
    ("edm", "score"): np.inf,
    ("likelihood", "score"): np.inf,
    ("likelihood", "x0"): 0.0,
    ("likelihood", "v"): 0.0,
    ("likelihood", "eps"): np.inf,
    ("edm", "x0"): 4.0,
    ("edm", "v"): 4.0,
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("process", [processes.cosine(), processes.flow()], ids=["cosine", "flow"])
@pytest.mark.parametrize(("name", "kind"), LIMITS)
def test_weights_reach_their_limits_where_alpha_is_0(name, kind, process, dtype):
    weighting = getattr(weightings, name)()
    weight = noised.weight(kind, kind, None, weighting)
    t = jnp.asarray([1.0 - 1e-5, 1.0], dtype)
    near, at = weight.at(process, t)
    np.testing.assert_allclose(at, LIMITS[name, kind], atol=1e-12)
    if np.isfinite(LIMITS[name, kind]):
        np.testing.assert_allclose(near, LIMITS[name, kind], atol=1e-4)


@pytest.mark.parametrize("name", ["min_snr", "edm", "likelihood"])
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "score", "velocity"])
def test_a_weighting_is_the_product_that_defines_it(name, kind):
    weighting = getattr(weightings, name)()
    for process in (processes.vp(), processes.cosine(), processes.ve(), processes.ddpm()):
        t = jnp.linspace(0.05, 0.95, 7) * process.t_max
        ratio = predictions.error_ratio(process, weighting.on, kind, t)
        expected = weighting.weight(process, t) * ratio**2
        np.testing.assert_allclose(weighting.of_kind(process, t, kind), expected, rtol=1e-9)


def test_the_likelihood_weight_is_half_the_slope_of_log_snr():
    for process in (processes.vp(), processes.cosine(), processes.edm(), processes.flow()):
        t = jnp.linspace(0.05, 0.95, 7) * process.t_max
        slope = numerics.time_derivative(process.log_snr, t)
        np.testing.assert_allclose(
            weightings.likelihood().weight(process, t), -0.5 * slope, rtol=1e-9
        )


def test_no_loss_is_nan_at_the_last_time():
    for process in (processes.cosine(), processes.flow()):
        for name, kind in (("min_snr", "eps"), ("likelihood", "v"), ("likelihood", "x0")):
            loss = losses.denoising(
                shrink,
                process,
                prediction=kind,
                weighting=getattr(weightings, name)(),
                times=timesteps.draw_at(1.0),
            )
            values, _ = loss({"w": jnp.ones(3)}, KEY, {"x0": X0})
            assert jnp.isfinite(values).all()


def test_a_row_that_is_nan_is_skipped_under_an_optimal_coupling():
    loss = losses.flow_matching(shrink, coupling="optimal_transport")
    update = jax.jit(make_update(loss, OPTIMIZER, ema_decay=0.9, skip_nonfinite=True))
    for bad in (jnp.nan, jnp.inf):
        state, metrics = update(start(), KEY, {"x0": X0.at[3, 0].set(bad)})
        assert not jnp.isfinite(metrics["loss"])
        np.testing.assert_array_equal(state.params["w"], jnp.ones(3))
