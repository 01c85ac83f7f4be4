"""Files of PyTorch are read without it, and nothing that is in one is ever run."""

import argparse
import functools
import io
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peers import common

from jaxdiff.pretrained import files, plain_pickle, torch_zip
from jaxdiff.pretrained.errors import WeightsError

GOLDEN = common.read("torch_zip")
WRITTEN = GOLDEN.arrays["written"].tobytes()
EXPECTED = {name: array for name, array in GOLDEN.arrays.items() if name != "written"}
NUMBERS = np.arange(12, dtype=np.float32)


def dumped(value):
    """The instructions that make a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def named(module, name):
    return b"c" + f"{module}\n{name}\n".encode()


def stored(key="0", kind="FloatStorage", size=12):
    words = dumped("storage") + named("torch", kind) + dumped(key) + dumped("cpu") + dumped(size)
    return b"(" + words + b"tQ"


def tensor(offset=0, shape=(3, 4), strides=(4, 1), storage=None):
    args = (stored() if storage is None else storage) + b"".join(
        map(dumped, (offset, shape, strides))
    )
    rest = dumped(False) + named("collections", "OrderedDict") + b")R"
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + args + rest + b"tR"


def state(**tensors):
    """The instructions that make a dict of tensors."""
    return b"}(" + b"".join(dumped(key) + value for key, value in tensors.items()) + b"u"


def archive(path, instructions, storages=None, compress=zipfile.ZIP_STORED, **entries):
    storages = {"0": NUMBERS.tobytes()} if storages is None else storages
    with zipfile.ZipFile(path, "w", compress) as file:
        file.writestr("x/data.pkl", b"\x80\x02" + instructions + b".")
        for name, content in entries.items():
            file.writestr(f"x/{name}", content)
        for key, content in storages.items():
            file.writestr(f"x/data/{key}", content)
    return path


def refused(path, match):
    with pytest.raises(WeightsError, match=match) as caught:
        dict(files.open_weights(path))
    assert str(path) in str(caught.value)


def test_a_file_of_torch_gives_what_torch_wrote(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(WRITTEN)
    read = files.open_weights(path)
    assert set(read) == set(EXPECTED)
    for name, array in EXPECTED.items():
        assert read.spec(name) == (array.shape, read[name].dtype)
        assert read[name].dtype == GOLDEN.config[name]
        np.testing.assert_array_equal(np.asarray(read[name], array.dtype), array)


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "expected"),
    [
        (0, (3, 4), (4, 1), NUMBERS.reshape(3, 4)),
        (0, (4, 3), (1, 4), NUMBERS.reshape(3, 4).T),
        (5, (2, 2), (4, 2), [[5, 7], [9, 11]]),
        (11, (), (), 11),
        (0, (1, 12), (2**40, 1), NUMBERS[None]),
        (7, (2, 2), (0, 1), [[7, 8], [7, 8]]),
        (12, (0, 3), (3, 1), np.zeros((0, 3))),
    ],
)
def test_views_are_those_of_their_storage(tmp_path, offset, shape, strides, expected):
    path = archive(tmp_path / "x.pt", state(w=tensor(offset, shape, strides)))
    np.testing.assert_array_equal(files.open_weights(path)["w"], np.asarray(expected, np.float32))


def test_tensors_may_share_a_storage_and_be_of_several(tmp_path):
    other = stored("1", "LongStorage", 2)
    instructions = state(a=tensor(), b=tensor(4, (2,), (1,)), c=tensor(0, (2,), (1,), other))
    storages = {"0": NUMBERS.tobytes(), "1": np.asarray([7, -7]).tobytes()}
    read = files.open_weights(archive(tmp_path / "x.pt", instructions, storages))
    for _ in range(2):
        np.testing.assert_array_equal(read["b"], [4, 5])
        np.testing.assert_array_equal(read["c"], [7, -7])
        np.testing.assert_array_equal(read["a"], NUMBERS.reshape(3, 4))


def test_the_order_of_bytes_is_that_of_the_file(tmp_path):
    storages = {"0": NUMBERS.astype(">f4").tobytes()}
    path = archive(tmp_path / "x.pt", state(w=tensor()), storages, byteorder=b"big")
    np.testing.assert_array_equal(files.open_weights(path)["w"], NUMBERS.reshape(3, 4))
    refused(archive(tmp_path / "y.pt", state(w=tensor()), byteorder=b"middle"), "byte order")


class Attack:
    """What pickle makes a call of."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks():
    """Pickles that run something where they are believed, and what a refusal names."""
    for protocol in range(6):
        for value, name in (
            (Attack(os.mkdir, "ran"), os.mkdir.__module__ + ".mkdir"),
            (Attack(eval, "print(1)"), "eval"),
            (Attack(exec, "1"), "exec"),
            (argparse.Namespace(lr=1), "argparse.Namespace" if protocol > 1 else "copy_?reg"),
            (functools.partial(print), "functools.partial"),
            ({1, 2}, "set|EMPTY_SET"),
        ):
            yield pickle.dumps(value, protocol), name


@pytest.mark.parametrize("nested", [False, True])
def test_code_is_refused_by_its_name_and_not_run(tmp_path, monkeypatch, nested):
    monkeypatch.chdir(tmp_path)
    for i, (instructions, name) in enumerate(attacks()):
        body = instructions.removesuffix(b".")
        if body.startswith(b"\x80"):
            body = body[2:]
        if nested:
            body = b"}(" + dumped("ema") + state(w=tensor()) + dumped("args") + body + b"u"
        refused(archive(tmp_path / f"{i}.pt", body), rf"(?s){name}|instruction")
    assert not (tmp_path / "ran").exists()


def test_the_checkpoint_of_a_training_is_refused_with_the_remedy(tmp_path):
    weights = b"}(" + dumped("ema") + state(w=tensor()) + dumped("args")
    path = archive(tmp_path / "x.pt", weights + dumped(argparse.Namespace(lr=1)) + b"u")
    refused(path, "holds argparse.Namespace.*save its weights alone as safetensors")


@pytest.mark.parametrize(
    ("instructions", "match"),
    [
        (named("os", "system") + dumped("touch ran") + b"\x85R", "os.system"),
        (named("torch._utils", "_rebuild_tensor"), "torch._utils._rebuild_tensor"),
        (named("torch.storage", "UntypedStorage"), "torch.storage.UntypedStorage"),
        (dumped("os") + dumped("system") + b"\x93", "os.system"),
        (dumped("collections") + dumped("Ordered\x1b[2J") + b"\x93", r"'collections\.Ordered\\x1b"),
        (dumped(1) + dumped("system") + b"\x93", "a name that is no text"),
        (b"ios\nsystem\n", "INST|instruction"),
        (b"(" + named("os", "system") + b"o", "os.system"),
        (named("collections", "OrderedDict") + b")\x81", "NEWOBJ"),
        (b"\x82\x01", "EXT1|instruction"),
        (b"}" + b"\x80\x05\x97", "NEXT_BUFFER"),
        (b"}}b", "a state"),
        (named("collections", "OrderedDict") + b")R" + dumped([1]) + b"b", "a state"),
        (named("torch", "FloatStorage") + b")R", "cannot be called"),
        (dumped("eval") + dumped(("1",)) + b"R", "cannot be called"),
        (named("collections", "OrderedDict") + dumped(((1, 2, 3),)) + b"R", "pairs"),
        (named("collections", "OrderedDict") + dumped((5,)) + b"R", "pairs"),
        (b"h\x07", "memory"),
        (b"r\xff\xff\xff\xff", "more than there is"),
        (b"j\xff\xff\xff\xff", "memory"),
        (b"\x8e" + b"\xff" * 7 + b"\x7f", "instructions that are none"),
        (b"X\xff\xff\xff\x7fabc", "instructions that are none"),
        (b"I" + b"9" * 9999 + b"\n", "instructions that are none"),
        (b"}" + b"\x8b\xff\xff\xff\x7f", "instructions that are none"),
        (b"]]", "leave something over"),
        (b"(", "a mark in place"),
        (b"", "STOP|over|more than there is|not enough"),
        (b"t", "more than there is|mark"),
        (b"(]a", "mark|list"),
        (b"}(" + dumped(("a", 1)) + dumped(1) + b"u", "a key"),
        (b"}(" + dumped(2**70) + dumped(1) + b"u", "a key"),
        (b"}(" + dumped("a" * 2000) + dumped(1) + b"u", "a key"),
        (b"}(" + dumped("a") + dumped(1) + dumped("a") + dumped(1) + b"u", "twice"),
        (b"}(" + dumped("a") + b"u", "a dict that is none"),
        (b"N" + dumped("a") + dumped(1) + b"s", "a dict that is none"),
        (state(w=tensor(storage=dumped(1))), "whole numbers"),
        (state(w=tensor(-1)), "whole numbers"),
        (state(w=tensor(0, (3, -4))), "whole numbers"),
        (state(w=tensor(0, (3, True))), "whole numbers"),
        (state(w=tensor(0, (3, 4), (4, -1))), "whole numbers"),
        (state(w=tensor(0, (3, 4), (4,))), "2 axes and 1 strides"),
        (state(w=tensor(1)), "beyond the end"),
        (state(w=tensor(0, (3, 4), (5, 1))), "beyond the end"),
        (state(w=tensor(13, (), ())), "beyond the end"),
        (state(w=tensor(0, (10**6, 10**6), (0, 0))), "numbers in a storage of 12"),
        (state(w=tensor(0, (0, 2**40, 2**40), (1, 1, 1))), "too large"),
        (state(w=tensor(0, (1,) * 40, (1,) * 40)), "40 axes"),
        (state(w=tensor(storage=stored(kind="QInt8Storage"))), "torch.QInt8Storage"),
        (state(w=tensor(storage=stored(key="../0"))), "storage '../0' must have"),
        (state(w=tensor(storage=stored(key=""))), "storage '' must have"),
        (state(w=tensor(storage=stored(size=13))), "must have 52 bytes; got 48"),
        (state(w=tensor(storage=stored(size=2**50))), "no known kind"),
        (state(w=tensor(storage=dumped("storage") + b"Q")), "not to a storage"),
        (state(a=tensor(), b=tensor(storage=stored(kind="IntStorage"))), "two kinds"),
        (
            b"}(" + dumped(1) + tensor() + dumped("1") + tensor() + b"u",
            "two tensors of the name '1'",
        ),
        (b"}q\x01(" + dumped("a") + b"h\x01u", "without end"),
        (b"]" + b"]a" * 3 + b"0", "POP|instruction"),
        (b"}", "no tensors"),
        (dumped([1, "a", None]), "no tensors"),
    ],
    ids=lambda x: None if isinstance(x, bytes) else x[:30],
)
def test_instructions_that_a_state_dict_has_not_are_refused(tmp_path, instructions, match):
    refused(archive(tmp_path / "x.pt", instructions), match)


def test_containers_that_double_end(tmp_path):
    body = tensor() + b"q\x63"
    for _ in range(14):
        body += b"q\x00" + b"h\x00" * 29 + b"(" + b"h\x00" * 30 + b"t"
    refused(archive(tmp_path / "x.pt", b"(" + body + b"t"), "without end")


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
    good = state(w=tensor())
    path = tmp_path / "x.pt"
    refused(archive(path, good, compress=zipfile.ZIP_DEFLATED), "compressed")
    refused(archive(path, good, storages={}), "must have 48 bytes; got none")
    refused(archive(path, good, storages={"0": b"1234"}), "got 4")
    refused(archive(path, good, **{"../../ran": b"x"}), "holds 'x/../../ran'")
    refused(archive(path, good, **{"code/a.py": b"x"}), "holds 'x/code/a.py'")
    refused(archive(path, good, **{"constants.pkl": b"x"}), "holds 'x/constants.pkl'")
    refused(archive(path, good + b"0" * plain_pickle.LIMIT), "more than")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", b"x")
    refused(path, "one data.pkl")
    with zipfile.ZipFile(path, "w") as file:
        for name in ("a/data.pkl", "b/data.pkl"):
            file.writestr(name, b"x")
    refused(path, "one data.pkl")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"x")
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("a/data.pkl", b"x")
    refused(path, "twice")
    path.write_bytes(WRITTEN[:-40])
    refused(path, "no whole file of PyTorch")


def test_a_file_of_the_old_form_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
    refused(path, "before version 1.6.*safetensors")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 7)), min_size=1, max_size=3))
@example([(4, 0)])
def test_a_damaged_file_is_refused_or_gives_the_same(tmp_path_factory, flips):
    damaged = bytearray(WRITTEN)
    for position, bit in flips:
        damaged[position % len(WRITTEN)] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(damaged)
    try:
        read = dict(torch_zip.TorchZip(path))
    except WeightsError:
        return
    assert set(read) == set(EXPECTED)
    for name, array in EXPECTED.items():
        np.testing.assert_array_equal(np.asarray(read[name], array.dtype), array)


INSTRUCTIONS = zipfile.ZipFile(io.BytesIO(WRITTEN)).read("archive/data.pkl")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_instructions_end_in_plain_values_or_a_refusal(data):
    changes = st.tuples(st.integers(0, len(INSTRUCTIONS) - 1), st.binary(max_size=9))
    instructions = bytearray(INSTRUCTIONS)
    for position, content in data.draw(st.lists(changes, min_size=1, max_size=4)):
        instructions[position : position + len(content)] = content
    try:
        read = plain_pickle.read(bytes(instructions))
        views = dict(torch_zip._flattened(read))
    except plain_pickle.RefusedError:
        return
    for storage, offset, shape, strides in views.values():
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        assert 0 in shape or 0 <= last < storage.size


def test_a_missing_file_is_an_error_of_its_own(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("none.pt")):
        torch_zip.TorchZip(tmp_path / "none.pt")
