"""Files of weights are read lazily, and what is wrong with one is said with its name."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.pretrained import files
from jaxdiff.pretrained.errors import WeightsError

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_]


def tensors(dtype=np.float32):
    draw = np.random.default_rng(0).normal
    return {"a": draw(size=(3, 2)).astype(dtype), "b": draw(size=5).astype(dtype)}


def written(path, **arrays):
    save_file(arrays, path)
    return path


def sharded(folder, where=None):
    """Two shards, of a and of b, and their index."""
    arrays = tensors()
    written(folder / "m-1.safetensors", a=arrays["a"])
    written(folder / "m-2.safetensors", b=arrays["b"])
    where = {"a": "m-1.safetensors", "b": "m-2.safetensors"} if where is None else where
    path = folder / "m.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": where}))
    return path


def refused(path, match):
    with pytest.raises(WeightsError, match=match) as caught:
        files.open_weights(path)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_a_file_gives_what_was_written(tmp_path, dtype):
    arrays = tensors(dtype) | {"empty": np.zeros((0, 3), dtype), "one": np.asarray(1, dtype)}
    read = files.open_weights(written(tmp_path / "x.safetensors", **arrays))
    assert set(read) == set(arrays)
    for key, value in arrays.items():
        assert read.spec(key) == (value.shape, value.dtype)
        assert read[key].dtype == value.dtype
        np.testing.assert_array_equal(read[key], value)


def test_the_length_of_a_header_is_not_taken_for_another_form(tmp_path):
    for first in b"\x80<\x1f":
        names = ("a" * length for length in range(8, 900, 8))
        paths = (written(tmp_path / "x.safetensors", **{name: np.ones(3)}) for name in names)
        path = next(path for path in paths if path.read_bytes()[0] == first & 0xF8)
        assert len(files.open_weights(path)) == 1


def test_shards_are_one_mapping(tmp_path):
    read = files.open_weights(sharded(tmp_path))
    assert len(read) == 2
    for key, value in tensors().items():
        assert read.spec(key) == (value.shape, value.dtype)
        np.testing.assert_array_equal(read[key], value)


def test_what_is_no_whole_file_is_said(tmp_path):
    whole = written(tmp_path / "x.safetensors", **tensors()).read_bytes()
    path = tmp_path / "y.safetensors"
    for content, match in (
        (whole[:-1], "no whole safetensors file"),
        (whole[:50], "no whole safetensors file"),
        (whole + b"x", "no whole safetensors file"),
        (b"", "empty"),
        (b"hello, world", "no whole safetensors file"),
        (b"\x89PNG\r\n", "a picture, not weights. Give the folder"),
        (b"\x80\x02}q\x00.", "pickle.*safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!doctype html>", "web page"),
    ):
        path.write_bytes(content)
        refused(path, match)


def test_a_file_cut_while_open_is_said(tmp_path):
    path = written(tmp_path / "x.safetensors", **tensors())
    read = files.open_weights(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(WeightsError, match=r"x\.safetensors: b \(float32\) cannot be read"):
        read["b"]


def test_a_dtype_of_few_bits_has_a_name(tmp_path):
    arrays = {"a": np.ones(4, ml_dtypes.float8_e4m3fn)}
    read = files.open_weights(written(tmp_path / "x.safetensors", **arrays))
    assert read.spec("a").dtype == ml_dtypes.float8_e4m3fn


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ({"a": "m-1.safetensors", "b": "m-3.safetensors"}, r"missing beside it: m-3\.safetensors"),
        ({"a": "m-1.safetensors", "b": "m-1.safetensors"}, "b: .*m-1.safetensors.*not hold"),
        ({"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"}, "c: the index"),
        ({"b": "m-2.safetensors", "a": "m-2.safetensors"}, "a: the index"),
        ({"a": "../m-1.safetensors"}, "beside its index"),
        ({"a": "/m-1.safetensors"}, "beside its index"),
        ({"a": "..", "b": "."}, "beside its index"),
        ({"a": 1}, "no `weight_map`"),
        (["a"], "no `weight_map`"),
    ],
    ids=str,
)
def test_an_index_that_is_not_of_its_shards_is_refused(tmp_path, where, match):
    refused(sharded(tmp_path, where), match)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    path = sharded(tmp_path)
    written(tmp_path / "m-2.safetensors", **tensors())
    refused(path, r"a: m-2\.safetensors holds it, the index has it in m-1")
    path.write_text('{"weight_map": {"a": "m-1.safetensors", "a": "m-2.safetensors"}}')
    refused(path, "'a' twice")
    path.write_text('{"weight_map": {"b": "m-2.safetensors"}}')
    refused(path, "a: m-2.safetensors holds it, the index has it nowhere")


def test_a_damaged_index_or_shard_is_named(tmp_path):
    path = sharded(tmp_path)
    shard = tmp_path / "m-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=re.escape(str(shard))):
        files.open_weights(path)
    for text in ("", "{", "[1]", "\xff", "[" * 100000):
        path.write_bytes(text.encode("latin-1"))
        refused(path, "JSON")


def test_the_widest_and_safest_file_of_a_folder_is_found(tmp_path):
    with pytest.raises(WeightsError, match=r"holds no weights: .*It holds nothing"):
        files.find(tmp_path)
    (tmp_path / "readme.md").touch()
    with pytest.raises(WeightsError, match=r"It holds readme\.md"):
        files.find(tmp_path)
    for name in (
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "model.safetensors",
    )[:2]:
        (tmp_path / name).touch()
        assert files.find(tmp_path).name == name
    (tmp_path / "model.safetensors").touch()
    assert files.find(tmp_path).name == "model.safetensors"


def test_a_missing_file_is_an_error_of_its_own(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        files.open_weights(tmp_path / "none.safetensors")
