"""Options of the diffusion transformer: joint attention, normal queries and keys, activations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import few
from flax import nnx

from jaxdiff import nn
from jaxdiff.nn.conditioning import Context
from jaxdiff.nn.joint import JointBlock

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
ROWS, LENGTH, NUM, WIDTH, HEADS = 3, 4, 6, 8, 2
KEPT = np.arange(LENGTH) < np.array([[4], [2], [0]])
OPTIONS = {
    "num_heads": HEADS,
    "mlp_ratio": 3,
    "mlp_epsilon": 1e-6,
    "dropout": 0.0,
    "query_key_norm": True,
    "activation": "relu_squared",
}
KEY = jax.random.key(0, impl="unsafe_rbg")  # any generator shows it; this compiles quickly
CHOICES = {"text_attention": "joint", "query_key_norm": True, "activation": "relu_squared"}


def drawn(shapes, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: (0.5 * rng.normal(size=a.shape)).astype(a.dtype), shapes)


def normal(x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-6)


def dense(x, layer):
    return x @ layer["kernel"] + layer["bias"]


def by_head(x, layer):
    """Normalise (N, C) head by head; return one array a head."""
    heads = np.split(x, HEADS, axis=1)
    scales = np.split(layer["scale"], HEADS)
    return [
        h / np.sqrt(np.mean(h**2, axis=1, keepdims=True) + 1e-6) * s
        for h, s in zip(heads, scales, strict=True)
    ]


def asked(h, c, stream):
    shift, scale, *_ = np.split(dense(c, stream["modulation"]), 6)
    query, key, value = np.split(dense(normal(h) * (1 + scale) + shift, stream["qkv"]), 3, axis=1)
    return by_head(query, stream["query_norm"]), by_head(key, stream["key_norm"]), value


def moved(h, mixed, c, stream):
    _, _, gate1, shift, scale, gate2 = np.split(dense(c, stream["modulation"]), 6)
    h = h + gate1 * dense(mixed, stream["projection"])
    inner = np.maximum(dense(normal(h) * (1 + scale) + shift, stream["inner"]), 0.0) ** 2
    return h + gate2 * dense(inner, stream["outer"])


def attended(queries, keys, value):
    mixed = []
    for query, key, part in zip(queries, keys, np.split(value, HEADS, axis=1), strict=True):
        scores = np.exp(query @ key.T / np.sqrt(WIDTH / HEADS))
        mixed.append(scores / scores.sum(axis=1, keepdims=True) @ part)
    return np.concatenate(mixed, axis=1)


def reference(h, c, tokens, block):
    """One block on one example in numpy, the tokens being those that are shown."""
    queries, keys, value = asked(h, c, block)
    context = block["context"]
    if "qkv" not in context:
        shift, scale = np.split(dense(c, context["modulation"]), 2)
        given = dense(normal(tokens) * (1 + scale) + shift, context["key_value"])
        key, other = np.split(given, 2, axis=1)
        pairs = zip(by_head(key, context["key_norm"]), keys, strict=True)
        mixed = attended(queries, map(np.concatenate, pairs), np.concatenate([other, value]))
        return moved(h, mixed, c, block), None
    others = asked(tokens, c, context)
    queries, keys = (
        [np.concatenate(pair) for pair in zip(*both, strict=True)]
        for both in zip(others[:2], (queries, keys), strict=True)
    )
    mixed = attended(queries, keys, np.concatenate([others[2], value]))
    count = len(tokens)
    return moved(h, mixed[count:], c, block), moved(tokens, mixed[:count], c, context)


def test_joint_blocks_are_those_of_their_equations():
    def make():
        options = {**OPTIONS, "dtype": jnp.float64, "param_dtype": jnp.float64}
        options["rngs"] = nnx.Rngs(0)
        return [JointBlock(WIDTH, site=i, depth=2, **options) for i in range(2)]

    split = [nnx.split(block) for block in nnx.eval_shape(make)]
    states = [drawn(state, seed) for seed, (_, state) in enumerate(split)]
    rng = np.random.default_rng(5)
    h, tokens = (rng.normal(size=(ROWS, n, WIDTH)) for n in (NUM, LENGTH))
    c = rng.normal(size=(ROWS, WIDTH))

    @quick_jit
    def evaluate(states, h, c, tokens):
        first, second = (nnx.merge(graph, s) for (graph, _), s in zip(split, states, strict=True))
        h, context = first(h, c, Context(tokens, KEPT), None)
        end, nothing = second(h, c, context, None)
        assert nothing is None
        return h, context.tokens, end

    found = evaluate(states, h, c, tokens)
    blocks = [nnx.to_pure_dict(state) for state in states]
    for row, count in enumerate(KEPT.sum(axis=1)):
        after, after_tokens = reference(h[row], c[row], tokens[row, :count], blocks[0])
        end, _ = reference(after, c[row], after_tokens, blocks[1])
        np.testing.assert_allclose(found[0][row], after, atol=1e-11)
        np.testing.assert_allclose(found[1][row, :count], after_tokens, atol=1e-11)
        np.testing.assert_allclose(found[2][row], end, atol=1e-10)


def build(**options):
    options = {"width": WIDTH, "depth": 2, "num_heads": HEADS, "rngs": nnx.Rngs(0), **options}
    return nn.DiT((4, 4, 1), conditioning=nn.Sequences(5), **options)


def case():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(ROWS, 4, 4, 1)).astype(np.float32)
    tokens = rng.normal(size=(ROWS, LENGTH, 5)).astype(np.float32)
    return x, np.linspace(-3.0, 3.0, ROWS, dtype=np.float32), {"tokens": tokens, "mask": KEPT}


def gradients(**options):
    """Return (gradients by parameters, output) of a network in training."""
    x, log_snr, cond = case()
    shapes, apply = nn.functional(nnx.eval_shape(lambda: build(**options, **CHOICES)))

    def total(params):
        output = apply(params, x, log_snr, cond, key=KEY)
        return jnp.mean(output**2), output

    return quick_jit(jax.grad(total, has_aux=True))(drawn(shapes))


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_recomputed_joint_transformers_have_the_gradients_of_kept_ones(rate):
    kept, recomputed = (gradients(remat=remat, dropout=rate) for remat in (False, True))
    # float32 sums of some tens of terms, in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), kept, recomputed
    )
    assert min(float(jnp.abs(a).max()) for a in jax.tree.leaves(kept[0])) > 1e-7


def test_joint_blocks_may_be_recomputed():
    module = nnx.eval_shape(lambda: build(remat=True, **CHOICES))
    shapes, apply = nn.functional(module)
    x, log_snr, cond = case()
    text = str(jax.make_jaxpr(lambda params: apply(params, x, log_snr, cond))(shapes))
    assert text.count("remat") == 2


def test_dropout_differs_from_stream_to_stream_and_block_to_block():
    module = nnx.eval_shape(lambda: build(dropout=0.3, **CHOICES))
    streams = [module.block_00, module.block_00.context, module.block_01]
    assert len({stream.site for stream in streams}) == 3


@functools.cache
def computed():
    """Return (params, output) of a network of one block with no options."""
    shapes, apply = nn.functional(nnx.eval_shape(lambda: build(depth=1)))
    params = drawn(shapes)
    return params, quick_jit(apply)(params, *case())


@pytest.mark.parametrize("option", few([*CHOICES, "none"], ["query_key_norm"]))
def test_every_option_changes_what_is_computed(option):
    """And none of them the parameters that others have too."""
    x, log_snr, cond = case()
    plain, found = computed()
    chosen = {name: value for name, value in CHOICES.items() if name == option}
    shapes, other = nn.functional(nnx.eval_shape(lambda: build(depth=1, **chosen)))

    def merged(tree, into):
        if not isinstance(into, dict):
            return tree if np.shape(tree) == np.shape(into) else into
        return {
            name: merged(tree[name], into[name]) if name in tree else into[name] for name in into
        }

    changed = quick_jit(other)(merged(plain, drawn(shapes)), x, log_snr, cond)
    if option == "none":
        np.testing.assert_array_equal(found, changed)
    else:
        assert np.all(np.abs(found - changed).reshape(ROWS, -1).max(axis=1) > 1e-4)


def names(tree):
    paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path in paths}


def test_options_add_parameters_and_rename_none():
    plain, joint, normed = (
        names(nn.functional(nnx.eval_shape(lambda o=o: build(depth=1, **o)))[0])
        for o in ({}, {"text_attention": "joint"}, {"query_key_norm": True})
    )
    parts = itertools.product(("", "cross."), ("query_norm", "key_norm"))
    assert normed - plain == {f"block_00.{within}{norm}.scale" for within, norm in parts}
    assert not plain - normed
    assert all("cross" in name for name in plain - joint)
    assert all("context" in name for name in joint - plain)


def test_joint_attention_without_tokens_is_plain():
    shapes = [
        nn.functional(
            nnx.eval_shape(
                lambda kind=kind: nn.DiT(
                    (4, 4, 1),
                    width=8,
                    depth=1,
                    num_classes=2,
                    text_attention=kind,
                    rngs=nnx.Rngs(0),
                )
            )
        )[0]
        for kind in ("cross", "joint")
    ]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_attention": "both"}, "`text_attention` must be one of cross, joint; got 'both'"),
        ({"activation": "relu"}, "`activation` must be one of gelu, relu_squared; got 'relu'"),
    ],
)
def test_choices_are_judged(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
