"""Names and layouts of weights files: complete, one to one, or a refusal that lists everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.devices import placement
from jaxdiff.pretrained import naming
from jaxdiff.pretrained.errors import WeightsError
from jaxdiff.pretrained.naming import NamingError, Rule

TABLE = (
    Rule(r"h\.(\d+)\.attn\.q\.weight", "block_{0:02d}.qkv.kernel", "linear", (0, 3)),
    Rule(r"h\.(\d+)\.attn\.k\.weight", "block_{0:02d}.qkv.kernel", "linear", (1, 3)),
    Rule(r"h\.(\d+)\.attn\.v\.weight", "block_{0:02d}.qkv.kernel", "linear", (2, 3)),
    Rule(r"h\.0\.time\.weight", "time.kernel", "linear"),
    Rule(r"h\.\d+\.time\.(weight)", None, same_as="h.0.time.{0}"),
    Rule(r"(norm)\.weight", "{0}.scale"),
    Rule(r"ids", None),
)


def tensors():
    draw = np.random.default_rng(0).normal
    found = {f"h.{i}.attn.{n}.weight": draw(size=(4, 3)) for i in range(11) for n in "qkv"}
    time = draw(size=(2, 3))
    return found | {f"h.{i}.time.weight": time for i in range(11)} | {"norm.weight": draw(size=4)}


def like(dtype=jnp.float32):
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    blocks = {f"block_{i:02d}": {"qkv": {"kernel": leaf(3, 12)}} for i in range(11)}
    return blocks | {"time": {"kernel": leaf(3, 2)}, "norm": {"scale": leaf(4)}}


def refusal(source, wanted=None, table=TABLE):
    with pytest.raises(NamingError) as caught:
        naming.fill(table, source, like() if wanted is None else wanted, "float32")
    return caught.value


def test_each_tensor_becomes_its_parameter():
    source = tensors() | {"ids": np.arange(3)}
    params = naming.fill(TABLE, source, like(), "float32")
    parts = [source[f"h.10.attn.{name}.weight"].T for name in "qkv"]
    np.testing.assert_array_equal(
        params["block_10"]["qkv"]["kernel"], np.concatenate(parts, axis=1).astype(np.float32)
    )
    np.testing.assert_array_equal(params["norm"]["scale"], source["norm.weight"].astype("f4"))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), like()
    )


def laid(layout, value, wanted):
    table, leaf = (Rule("x", "y", layout),), jax.ShapeDtypeStruct(wanted, jnp.float64)
    return np.asarray(naming.fill(table, {"x": value}, {"y": leaf}, "float64")["y"])


def test_layouts_are_those_of_the_products_they_are_for():
    draw = np.random.default_rng(0).normal
    weight, x = draw(size=(5, 3)), draw(size=(2, 3))
    image, filters = draw(size=(2, 6, 7, 3)), draw(size=(5, 3, 3, 2))
    np.testing.assert_allclose(x @ laid("linear", weight, (3, 5)), x @ weight.T)
    one = weight[:, :, None, None]
    np.testing.assert_array_equal(laid("linear", one, (3, 5)), weight.T)
    theirs = jax.lax.conv(image.transpose(0, 3, 1, 2), filters, (3, 2), "VALID")
    ours = jax.lax.conv_general_dilated(
        image,
        laid("conv", filters, (3, 2, 3, 5)),
        (3, 2),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), rtol=1e-12, atol=1e-12)
    patches = image[:, :, :6].reshape(2, 2, 3, 3, 2, 3).transpose(0, 1, 3, 2, 4, 5)
    by_patch = patches.reshape(2, 2, 3, -1) @ laid("conv_as_patches", filters, (18, 5))
    np.testing.assert_allclose(by_patch, ours, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(laid("flat", weight[None], (15,)), weight.reshape(-1))
    np.testing.assert_array_equal(laid("unbatched", weight[None], (5, 3)), weight)


def test_everything_that_does_not_fit_is_listed_and_nothing_is_read():
    class Unread(dict):
        def spec(self, key):
            return super().__getitem__(key)

        def __getitem__(self, key):
            raise AssertionError("read")

    source = Unread(tensors() | {"extra": np.zeros(3), "h.77.attn.q.weight": np.zeros((4, 3))})
    del source["norm.weight"], source["h.3.attn.k.weight"]
    source |= {"h.4.attn.v.weight": np.zeros((5, 3)), "h.0.time.weight": np.zeros(6)}
    error = refusal(source)
    assert error.missing == ["block_03.qkv.kernel [3, 12], part 1 of 3", "norm.scale [4]"]
    assert error.left_over[0] == "extra"
    assert "h.77.attn.q.weight (for block_77.qkv.kernel" in error.left_over[1]
    text = str(error)
    assert "h.4.attn.v.weight [5, 3]: gives [3, 5] of 3 parts" in text
    assert "h.0.time.weight [6]: must have 2 axes" in text
    assert "h.1.time.weight [2, 3]: must be equal to h.0.time.weight" in text


def test_a_long_list_is_shown_in_part_and_kept_whole():
    error = refusal({f"x{i}": np.zeros(1) for i in range(50)})
    assert len(error.left_over) == 50
    assert len(error.missing) == 13
    assert "50 tensors are left over" in str(error)
    assert "and 45 more" in str(error)
    assert "x40" not in str(error)


def test_a_parameter_given_twice_is_refused():
    both = (*TABLE, Rule("weight_of_norm", "norm.scale"))
    error = refusal(tensors() | {"weight_of_norm": np.zeros(4)}, table=both)
    assert error.unfitting == ["weight_of_norm [4]: norm.scale is given by norm.weight too"]


def test_copies_must_be_there_and_equal():
    source = tensors()
    source["h.7.time.weight"] = source["h.7.time.weight"] + 1e-7
    assert refusal(source).unfitting == [
        "h.7.time.weight: must be equal to h.0.time.weight, and is not"
    ]
    alone = {"norm.weight": np.zeros(4), "h.1.time.weight": np.zeros(1)}
    error = refusal(alone, {"norm": like()["norm"]})
    assert error.missing == ["h.0.time.weight, of which h.1.time.weight is a copy"]


def test_constants_must_be_what_their_shape_says():
    def counted(shape):
        if len(shape) != 1:
            raise ValueError("must have 1 axis")
        return np.linspace(0.0, 1.0, shape[0])

    table = (Rule(r"places", None, constant=counted), *TABLE)
    wanted, norm = {"norm": like()["norm"]}, {"norm.weight": np.zeros(4)}
    for dtype in ("bfloat16", "float32", "float64"):
        source = norm | {"places": np.linspace(0.0, 1.0, 7).astype(jnp.dtype(dtype))}
        assert naming.fill(table, source, wanted, "float32").keys() == {"norm"}
        for wrong in (1e-2, np.nan):
            moved = (source["places"] + wrong).astype(source["places"].dtype)
            error = refusal(norm | {"places": moved}, wanted, table)
            assert error.unfitting == ["places: must hold the constants of its shape, and does not"]
    error = refusal(norm | {"places": np.zeros((1, 7))}, wanted, table)
    assert error.unfitting == ["places [1, 7]: must have 1 axis"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_parameters_take_the_dtype_that_is_asked_for(dtype):
    source = {"norm.weight": np.asarray([1.0, 2.0, 3.0, 4.0]).astype(jnp.bfloat16)}
    params = naming.fill(TABLE, source, {"norm": like()["norm"]}, dtype)
    assert params["norm"]["scale"].dtype == dtype
    np.testing.assert_array_equal(params["norm"]["scale"].astype("f8"), [1, 2, 3, 4])


def test_dtypes_that_are_no_weights_are_refused():
    wanted = {"norm": like()["norm"]}
    for dtype in (np.int8, np.int64, bool, jnp.float8_e4m3fn):
        with pytest.raises(WeightsError, match=rf"norm.weight \({np.dtype(dtype)}\)"):
            naming.fill(TABLE, {"norm.weight": np.ones(4, dtype)}, wanted, "float32")
    for dtype in ("int32", "float31"):
        with pytest.raises((TypeError, ValueError), match="`dtype` must"):
            naming.fill(TABLE, {"norm.weight": np.ones(4)}, wanted, dtype)
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        naming.fill(TABLE, {"norm.weight": np.ones(4)}, wanted, "float64")


def test_parameters_are_no_views_of_the_file():
    memory = np.ones(4096 + 64, np.float32)
    start = -memory.ctypes.data % 64 // 4  # where JAX would take it as it is
    weight = memory[start : start + 4096]
    leaf = jax.ShapeDtypeStruct((4096,), jnp.float32)
    params = naming.fill(TABLE, {"norm.weight": weight}, {"norm": {"scale": leaf}}, "float32")
    weight[:] = 2.0
    assert float(params["norm"]["scale"].max()) == 1.0


def test_parameters_are_made_where_they_are_wanted():
    mesh = placement.make_mesh(1, 1, devices=jax.devices()[:1])
    there = placement.shardings(like(), mesh, fsdp=True)
    wanted = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like(), there
    )
    placed = naming.fill(TABLE, tensors(), wanted, "float32")
    assert jax.tree.all(jax.tree.map(lambda x, sharding: x.sharding == sharding, placed, there))
    jax.tree.map(
        np.testing.assert_array_equal, placed, naming.fill(TABLE, tensors(), like(), "float32")
    )


def test_rules_that_are_none_are_refused():
    wanted, shapes = {"norm": like()["norm"]}, {"norm.weight": (4,)}
    with pytest.raises(ValueError, match="`layout` must be one of same, linear"):
        naming.plan((Rule(r"norm\.weight", "norm.scale", "sideways"),), shapes, wanted)
    with pytest.raises(ValueError, match="do not fill"):
        naming.plan((Rule(r"norm\.weight", "norm{0}.scale"),), shapes, wanted)
