"""Parameters in a file of their own; rows over devices; what a step costs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.training import parallel, throughput
from jaxdiff.training.checkpoint import CheckpointError
from jaxdiff.training.export import export_params, import_params

PARAMS = {f"block_{i:02d}": {"w": jnp.full((2, 3), i, jnp.float32)} for i in range(12)}


def test_exported_parameters_come_back_in_their_order(tmp_path):
    export_params(tmp_path / "p.npz", PARAMS, {"width": 3})
    params, config = import_params(tmp_path / "p.npz")
    assert config == {"width": 3}
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
    for got, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == np.float32
    with np.load(tmp_path / "p.npz") as plain:  # by NumPy alone
        assert plain["block_11.w"].shape == (2, 3)
        assert json.loads(str(plain["__config__"])) == {"width": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        export_params(tmp_path / "p.bin", PARAMS)
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:50])
    for name in ("other.npz", "cut.npz"):
        with pytest.raises(CheckpointError, match=name):
            import_params(tmp_path / name)


def test_dtypes_that_numpy_lacks_come_back(tmp_path):
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "file": {"s": jnp.float32(2.0)}}
    params["scale"] = jnp.asarray(1.5, jnp.float8_e4m3fn)
    export_params(tmp_path / "p.npz", params)
    found, config = import_params(tmp_path / "p.npz")
    assert config == {}
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and (a == b).all(), found, params)
    assert jax.tree.all(same)
    np.savez(tmp_path / "old.npz", __config__="{}", w=np.asarray(params["w"]))  # as it was written
    assert import_params(tmp_path / "old.npz")[0]["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["__config__", "__dtypes__"])
def test_names_that_the_file_needs_and_keys_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"`params` must not have a leaf of the name {name}"):
        export_params(tmp_path / "p.npz", {name: jnp.ones(2)})
    with pytest.raises(ValueError, match=r"`params` must hold numbers; a\.key is a random key"):
        export_params(tmp_path / "p.npz", {"a": {"key": jax.random.key(0)}})
    with pytest.raises(ValueError, match=r"`params` must have no key with a dot in it; got 'a\.b'"):
        export_params(tmp_path / "p.npz", {"a": jnp.ones(2), "c": {"a.b": jnp.ones(2)}})
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_is_one_error_or_changes_nothing(tmp_path):
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2, jnp.bfloat16)}
    export_params(tmp_path / "p.npz", params, {"width": 3})
    whole, wanted = (tmp_path / "p.npz").read_bytes(), import_params(tmp_path / "p.npz")
    for position in range(0, len(whole), 3):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        (tmp_path / "q.npz").write_bytes(data)
        try:
            found = import_params(tmp_path / "q.npz")
        except CheckpointError:
            continue
        assert repr(found) == repr(wanted), position


def test_rows_are_mapped_as_they_are():
    mapped = parallel.map_rows(lambda shared, x, y: {"sum": shared * x + y})
    x, y = np.arange(10.0).reshape(5, 2), np.ones((5, 2))
    np.testing.assert_array_equal(mapped(3.0, x, y)["sum"], 3 * x + 1)


def test_operations_of_a_product_are_counted():
    a, b = jnp.zeros((64, 32)), jax.ShapeDtypeStruct((32, 16), jnp.float32)
    flops = throughput.count_flops(lambda a, b: a @ b, a.astype(jnp.float32), b)
    assert flops == pytest.approx(2 * 64 * 32 * 16, rel=0.01)


def test_rates_say_what_is_known():
    work = throughput.Work(examples=32, flops=1e9, peak=1e12)
    assert work.rates(10.0) == {
        "steps_per_second": 10.0,
        "examples_per_second": 320.0,
        "model_flops_per_second": 1e10,
        "utilisation": 0.01,
    }
    assert throughput.NO_WORK.rates(2.0) == {"steps_per_second": 2.0}


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v4", 275e12), ("NVIDIA H100 80GB HBM3", 989e12), ("TPU v5 lite", 197e12), ("cpu", None)],
)
def test_peaks_of_known_devices(kind, peak):
    class Device:
        device_kind = kind

    assert throughput.peak_flops(Device()) == peak
