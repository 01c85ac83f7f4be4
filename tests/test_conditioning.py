"""What networks are conditioned on: its values, its absence, its mask, and what is refused."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff import losses, nn, processes

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
BOTH = {"label": nn.Labels(3), "text": nn.Sequences(5)}
ROWS, LENGTH = 4, 6
KEPT = np.arange(LENGTH) < np.array([[6], [2], [1], [0]])
"""Which tokens of each row there are; the last row has none."""


def build(name, conditioning, **options):
    options = {"conditioning": conditioning, "rngs": nnx.Rngs(0), **options}
    if name == "mlp":
        return nn.MLP(2, width=16, depth=1, **options)
    if name == "unet":
        return nn.UNet((4, 4, 1), channels=4, multipliers=(1, 2), num_heads=2, **options)
    return nn.DiT((4, 4, 1), width=16, depth=1, num_heads=2, **options)


@functools.cache
def prepare(name, kind):
    """Return (params, jitted apply, apply, x, log_snr), no parameter being zero."""
    conditioning = KINDS[kind]
    shapes, apply = nn.functional(nnx.eval_shape(lambda: build(name, conditioning)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: (0.3 * rng.normal(size=a.shape)).astype(a.dtype), shapes)
    shape = (2,) if name == "mlp" else (4, 4, 1)
    x = rng.normal(size=(ROWS, *shape)).astype(np.float32)
    log_snr = np.linspace(-5.0, 5.0, ROWS, dtype=np.float32)
    params, x, log_snr = jax.device_put((params, x, log_snr))  # compiles nothing
    return params, quick_jit(apply), apply, x, log_snr


@dataclasses.dataclass(frozen=True)
class Angles(nn.Condition):
    """A kind of one's own; no turn stands for none."""

    holds = "angles"

    def make(self, width, **options):
        return nnx.Linear(2, width, **options)

    def embed(self, made, value, name, num_rows):
        return nn.Embedding(made(jnp.stack([jnp.cos(value), jnp.sin(value)], axis=-1)))

    def null(self):
        return np.zeros((), np.float32)


KINDS = {
    "angles": Angles(),
    "labels": nn.Labels(3),
    "vectors": nn.Vectors(5),
    "sequences": nn.Sequences(5),
    "both": BOTH,
}
each_network = pytest.mark.parametrize("name", ["mlp", "unet", "dit"])


def sequence(seed=2, mask=KEPT):
    tokens = np.random.default_rng(seed).normal(size=(ROWS, LENGTH, 5))
    return {"tokens": tokens.astype(np.float32), "mask": mask}


def value(kind):
    if kind == "labels":
        return np.arange(ROWS) % 3
    if kind == "angles":
        return np.full(ROWS, 1.0, np.float32)
    if kind == "vectors":
        return sequence()["tokens"][:, 0]
    if kind == "sequences":
        return sequence(mask=np.ones_like(KEPT))
    return {"label": value("labels"), "text": value("sequences")}


def none_of(kind):
    """Return the null value of a batch like `value(kind)`."""
    return jax.tree.map(
        lambda a, null: np.broadcast_to(null, a.shape), value(kind), nn.null_cond(KINDS[kind])
    )


# --- Values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mlp", kind) for kind in ("angles", "vectors", "sequences", "both")]
    + [("dit", "both"), pytest.param("unet", "both", marks=pytest.mark.slow)],
)
def test_every_condition_changes_every_row_and_none_is_its_null_value(name, kind):
    params, apply, _, x, log_snr = prepare(name, kind)
    cond, null = value(kind), none_of(kind)
    output, without = apply(params, x, log_snr, cond), apply(params, x, log_snr, null)
    names = BOTH if kind == "both" else ()
    others = [apply(params, x, log_snr, cond | {each: null[each]}) for each in names]
    for other in (without, *others):
        change = np.abs(other - output)
        assert np.all(change.max(axis=tuple(range(1, x.ndim))) > 1e-4)
    np.testing.assert_array_equal(apply(params, x, log_snr), without)
    if name == "mlp" and kind == "both":
        half = apply(params, x, log_snr, cond | {"text": None})
        np.testing.assert_array_equal(half, others[1])


@each_network
def test_what_stands_behind_the_mask_has_no_influence_to_the_bit(name):
    params, apply, _, x, log_snr = prepare(name, "sequences")
    cond = sequence()
    output = apply(params, x, log_snr, cond)
    assert np.isfinite(output).all()
    hidden = ~KEPT[..., np.newaxis]
    for other in (
        np.where(hidden, sequence(seed=3)["tokens"], cond["tokens"]),
        np.where(hidden, cond["tokens"][:, ::-1], cond["tokens"]),
        np.where(hidden, np.float32(np.nan), cond["tokens"]),
    ):
        again = apply(params, x, log_snr, cond | {"tokens": other})
        np.testing.assert_array_equal(again, output)
    changed = apply(params, x, log_snr, cond | {"tokens": cond["tokens"] + 1.0})
    changed, output = np.asarray(changed), np.asarray(output)
    assert np.all(np.abs(changed - output)[:3].reshape(3, -1).max(axis=1) > 1e-4)
    np.testing.assert_array_equal(changed[3], output[3])


@pytest.mark.parametrize("name", ["mlp", "dit"])
def test_padding_and_the_order_of_tokens_do_not_matter(name):
    params, apply, _, x, log_snr = prepare(name, "sequences")
    cond = sequence()
    longer = {
        "tokens": np.concatenate([cond["tokens"][:, ::-1], np.ones((ROWS, 3, 5))], axis=1),
        "mask": np.concatenate([cond["mask"][:, ::-1], np.zeros((ROWS, 3), bool)], axis=1),
    }
    output, other = (apply(params, x, log_snr, each) for each in (cond, longer))
    # float32 sums of some tens of terms, in another order.
    np.testing.assert_allclose(other, output, atol=2e-5 * float(jnp.abs(output).max()))


@pytest.mark.parametrize("name", ["mlp", "dit", pytest.param("unet", marks=pytest.mark.slow)])
def test_gradients_are_finite_with_and_without_tokens(name):
    params, _, apply, x, log_snr = prepare(name, "both")
    text = sequence()
    text["tokens"] = np.where(KEPT[..., np.newaxis], text["tokens"], np.float32(np.nan))
    cond = {"label": value("labels"), "text": text}

    def total(params, tokens, x):
        given = cond | {"text": text | {"tokens": tokens}}
        return jnp.mean(apply(params, x, log_snr, given, key=jax.random.key(0)) ** 2)

    gradients = quick_jit(jax.grad(total, argnums=(0, 1, 2)))(params, text["tokens"], x)
    gradients = jax.device_get(gradients)
    assert jax.tree.all(jax.tree.map(lambda a: np.isfinite(a).all(), gradients))
    np.testing.assert_array_equal(gradients[1][~KEPT], 0.0)
    assert np.all(np.abs(gradients[1][KEPT]).max(axis=-1) > 0)


def test_masked_attention_is_the_softmax_over_what_is_shown():
    from jaxdiff.nn.layers import attend

    rng = np.random.default_rng(0)
    query, key, values = (rng.normal(size=(ROWS, n, 8)) for n in (3, LENGTH, LENGTH))
    found = quick_jit(attend, static_argnums=3)(query, key, values, 2, KEPT)
    for row, count in enumerate(KEPT.sum(axis=1)):
        expected = np.zeros((3, 8))
        for head in (slice(0, 4), slice(4, 8)) if count else ():
            scores = np.exp(query[row, :, head] @ key[row, :count, head].T / 2.0)
            shares = scores / scores.sum(axis=1, keepdims=True)
            expected[:, head] = shares @ values[row, :count, head]
        np.testing.assert_allclose(found[row], expected, atol=1e-12)


def test_each_token_may_have_a_mask_of_its_own():
    from jaxdiff.nn.layers import attend, attention

    kept = np.broadcast_to([True, False, True], (ROWS, 3))

    @quick_jit
    def evaluate(qkv):
        query, key, value = jnp.split(qkv, 3, axis=-1)
        alone = [
            attend(query[:, n : n + 1], key[:, : n + 1], value[:, : n + 1], 2) for n in range(3)
        ]
        by_token = (np.tri(3, dtype=bool)[np.newaxis], np.repeat(kept[:, np.newaxis], 3, axis=1))
        return alone, *(attention(qkv, 2, mask) for mask in (*by_token, kept))

    alone, found, same, of_all = evaluate(np.random.default_rng(0).normal(size=(ROWS, 3, 12)))
    np.testing.assert_allclose(found, np.concatenate(alone, axis=1), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(of_all, same)


def test_mean_over_a_mask_counts_only_what_is_shown():
    from jaxdiff.nn.layers import masked_mean

    tokens = np.random.default_rng(0).normal(size=(ROWS, LENGTH, 3))
    found = jax.jit(masked_mean)(tokens, KEPT)
    np.testing.assert_allclose(found[1], tokens[1, :2].mean(axis=0), rtol=1e-12)
    np.testing.assert_array_equal(found[3], 0.0)


def test_cross_attention_adds_nothing_at_first():
    from jaxdiff.nn.layers import CrossAttention

    @quick_jit
    def evaluate(key, x, mask):
        options = {"num_heads": 1, "param_dtype": jnp.float32, "rngs": nnx.Rngs(key)}
        return CrossAttention(2, 2, **options)(x, x, mask)

    key = jax.random.key(0, impl="unsafe_rbg")  # any generator shows it; this compiles quickly
    output = evaluate(key, np.ones((1, 2, 2)), np.ones((1, 2), bool))
    np.testing.assert_array_equal(output, 0.0)


def test_a_mask_may_be_of_integers_and_a_sequence_a_named_tuple():
    class Text(NamedTuple):
        mask: jax.Array
        tokens: jax.Array

    params, apply, _, x, log_snr = prepare("mlp", "sequences")
    cond = sequence()
    expected = apply(params, x, log_snr, cond)
    other = Text(cond["mask"].astype(np.int32), cond["tokens"])
    np.testing.assert_array_equal(apply(params, x, log_snr, other), expected)


def test_conditioning_is_dropped_by_the_losses():
    params, _, apply, x, _ = prepare("mlp", "both")
    process = processes.vp()
    network = nn.on_log_snr(apply, process.log_snr)

    null = nn.null_cond(KINDS["both"])

    @quick_jit
    def all_losses(params, x, cond, none):
        def loss(rate, cond):
            loss_fn = losses.denoising(network, process, drop_cond=rate, null_cond=null)
            return loss_fn(params, jax.random.key(0), {"x0": x, "cond": cond})[0]

        return loss(1.0, cond), loss(0.0, none), loss(0.0, cond)

    dropped, replaced, kept = all_losses(params, x, value("both"), none_of("both"))
    np.testing.assert_allclose(dropped, replaced, rtol=1e-6)
    assert np.all(np.abs(dropped - kept) > 1e-4)


def test_num_classes_is_short_for_labels():
    short, long = (
        nnx.eval_shape(lambda o=option: nn.MLP(2, width=4, depth=1, rngs=nnx.Rngs(0), **o))
        for option in ({"num_classes": 3}, {"conditioning": nn.Labels(3)})
    )
    assert nnx.split(short) == nnx.split(long)
    assert nn.functional(short)[0]["conditioning"]["labels"].shape == (4, 4)


# --- Refusals -------------------------------------------------------------------------------


def refuse(kind, cond, **options):
    params, _, apply, x, log_snr = prepare("mlp", kind)
    jax.eval_shape(lambda params: apply(params, x, log_snr, cond, **options), params)


@pytest.mark.parametrize(
    ("kind", "cond", "error", "message"),
    [
        ("vectors", np.ones((ROWS, 4)), ValueError, r"`cond` must have shape \(4, 5\)"),
        ("vectors", np.ones(5), ValueError, r"`cond` must have shape \(4, 5\); got \(5,\)"),
        ("vectors", np.ones((ROWS, 5), bool), TypeError, "`cond` must hold real numbers"),
        ("vectors", "text", TypeError, "`cond` must hold real numbers"),
        ("sequences", np.ones((ROWS, 2, 5)), TypeError, "`cond` must hold `tokens`.* and `mask`"),
        ("sequences", {"tokens": np.ones((ROWS, 2, 5))}, TypeError, "nothing else; got tokens"),
        (
            "sequences",
            {"tokens": np.ones((ROWS, 2, 4)), "mask": np.ones((ROWS, 2), bool)},
            ValueError,
            r"`cond\.tokens` must have shape \(4, L, 5\); got \(4, 2, 4\)",
        ),
        (
            "sequences",
            {"tokens": np.ones((ROWS, 0, 5)), "mask": np.ones((ROWS, 0), bool)},
            ValueError,
            r"`cond\.tokens` must have shape \(4, L, 5\); got \(4, 0, 5\)",
        ),
        (
            "sequences",
            {"tokens": np.ones((ROWS, 2, 5)), "mask": np.ones((ROWS, 3), bool)},
            ValueError,
            r"`cond\.mask` must have the shape of the tokens.*\(4, 2\); got \(4, 3\)",
        ),
        (
            "sequences",
            {"tokens": np.ones((ROWS, 2, 5)), "mask": np.ones((ROWS, 2))},
            TypeError,
            r"`cond\.mask` must hold booleans, or 0 and 1.*got float64",
        ),
        (
            "sequences",
            {"tokens": np.ones((ROWS, 2, 5)), "mask": np.full((ROWS, 2), 2)},
            ValueError,
            r"`cond\.mask` must hold booleans, or 0 and 1; got 2\.\.2",
        ),
        ("both", np.arange(ROWS), TypeError, "`cond` must be a mapping of label, text"),
        ("both", {"label": np.arange(ROWS)}, ValueError, "got text missing"),
        ("both", {"label": 0, "text": None, "image": 0}, ValueError, "got image unknown"),
        (
            "both",
            {"label": np.arange(2), "text": None},
            ValueError,
            r'`cond\["label"\]` must have shape \(4,\)',
        ),
        (
            "both",
            {"label": np.full(ROWS, 4), "text": None},
            ValueError,
            r'`cond\["label"\]` must hold labels in 0\.\.3',
        ),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(kind, cond, error, message):
    with pytest.raises(error, match=message):
        refuse(kind, cond)


@pytest.mark.parametrize(
    ("kind", "cond", "message"),
    [
        ("angles", None, "`cond` must hold angles"),
        ("sequences", None, '`cond` must hold sequences.*batch\\["cond"\\], or.*nn.null_cond'),
        (
            "both",
            {"label": np.arange(ROWS) % 3, "text": None},
            r'`cond\["text"\]` must hold sequences.*batch\["cond"\]\["text"\]',
        ),
    ],
)
def test_training_without_all_conditioning_is_refused(kind, cond, message):
    with pytest.raises(ValueError, match=message):
        refuse(kind, cond, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"conditioning": 3}, TypeError, "`conditioning` must be nn.Labels"),
        ({"conditioning": nn.Labels}, TypeError, "`conditioning` must be nn.Labels"),
        ({"conditioning": {}}, ValueError, "at least one condition"),
        ({"conditioning": {"a": 3}}, TypeError, r"`conditioning\['a'\]` must be nn.Labels"),
        ({"conditioning": {"a b": nn.Labels(2)}}, ValueError, "names such as label; got 'a b'"),
        ({"conditioning": nn.Labels(2), "num_classes": 2}, ValueError, "give one of the two"),
    ],
)
def test_what_is_no_conditioning_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        nn.MLP(2, width=4, depth=1, rngs=nnx.Rngs(0), **options)


def test_tokens_that_no_kind_told_of_are_refused():
    class Hidden(nn.Sequences):
        has_context = False

    shapes, apply = nn.functional(nnx.eval_shape(lambda: build("mlp", Hidden(5))))
    x = jnp.ones((1, 2), jnp.float32)
    with pytest.raises(TypeError, match="`has_context` of Hidden must be True"):
        jax.eval_shape(apply, shapes, x, jnp.float32(0.0))


@pytest.mark.parametrize("kind", [nn.Labels, nn.Vectors, nn.Sequences])
def test_sizes_of_conditions_are_judged(kind):
    with pytest.raises(ValueError, match="must be at least 1; got 0"):
        kind(0)
    with pytest.raises(TypeError, match="must be a whole number; got 2.5"):
        kind(2.5)
