"""Stores made shard by shard: killed, damaged and shared by processes, the bytes are the same."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxdiff import data
from jaxdiff.data import stored

COUNT, SIZE = 5, 3
ATTRIBUTES = {"scale": 0.18215, "by": {"weights": "ab", "names": ["x", "y"]}}


def make(first, last):
    """Rows by their numbers, of several dtypes, nested."""
    rows = np.arange(first, last)
    return {
        "mean": rows[:, None] * np.ones(3, np.float32),
        "text": {"tokens": rows[:, None] % 7 + np.arange(2), "mask": rows[:, None] > [1, 2]},
        "deviation": jnp.asarray(rows, jnp.bfloat16),
    }


def store(folder, make=make, count=COUNT, **options):
    options = {"shard_size": SIZE, "attributes": ATTRIBUTES} | options
    stored.write_shards(folder, count, make, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Counted:
    """`make` that remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, first, last):
        self.asked.append((first, last))
        return make(first, last)


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "unharmed"
    store(folder)
    return contents(folder)


def test_it_is_the_store_that_is_written_whole(tmp_path, unharmed):
    sorted_attributes = json.loads(json.dumps(ATTRIBUTES, sort_keys=True))
    stored.write(tmp_path / "w", [make(0, COUNT)], shard_size=SIZE, attributes=sorted_attributes)
    whole = contents(tmp_path / "w")
    assert {name: unharmed[name] for name in whole} == whole
    assert sorted(unharmed.keys() - whole.keys()) == ["00000.json", "00001.json"]
    store(tmp_path / "s")
    assert contents(tmp_path / "s") == unharmed
    found = stored.open(tmp_path / "s")
    assert (len(found), found.attributes) == (COUNT, ATTRIBUTES)
    rows = found.rows(np.array([4, 0, 2]))
    assert rows["deviation"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(rows["deviation"], [4, 0, 2])
    np.testing.assert_array_equal(rows["text"]["mask"], [[1, 1], [0, 0], [1, 0]])


def test_whatever_write_fails_the_same_call_goes_on_to_the_same_bytes(
    tmp_path, monkeypatch, unharmed
):
    replace, countdown = os.replace, [0]

    def failing(call):
        def called(*args):
            countdown[0] -= 1
            if countdown[0] == 0:
                raise OSError(28, "No space left on device")
            return call(*args)

        return called

    monkeypatch.setattr(os, "replace", failing(replace))
    monkeypatch.setattr(os, "fsync", failing(lambda descriptor: None))
    for number in range(1, 100):
        folder, counted = tmp_path / str(number), Counted()
        countdown[0] = number
        with contextlib.suppress(OSError):
            store(folder, counted)
            break
        there = sum(f"{i:05d}.json" in os.listdir(folder) for i in range(2))
        if "index.json" not in os.listdir(folder):
            said = (
                r"data.stored made"
                if not os.listdir(folder)
                else r"is not finished: (none|\d of 2)"
            )
            with pytest.raises(data.NotPreparedError, match=said):
                stored.open(folder)
        before = len(counted.asked)
        store(folder, counted)
        assert contents(folder) == unharmed, number
        assert counted.asked[before:] == [(0, 3), (3, 5)][there:]
    # Two shards of four arrays and a record, and the index: a flush, a rename, a flush of each.
    assert number == 11 * 3 + 1


def test_a_store_that_is_not_finished_says_how_far_it_is(tmp_path):
    def failing(first, last):
        if first >= 4 * SIZE:
            raise RuntimeError("as asked")
        return make(first, last)

    with pytest.raises(RuntimeError, match="as asked"):
        store(tmp_path, failing, 20)
    with pytest.raises(
        data.NotPreparedError, match="is not finished: 4 of 7 shards are there; run the command"
    ):
        stored.open(tmp_path)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_processes_share_the_shards_and_whoever_is_last_writes_the_index(tmp_path, order):
    store(tmp_path / "one", count=20)
    calls = []
    for i in order:
        assert not (tmp_path / "s" / "index.json").exists()
        counted = Counted()
        told = []
        store(
            tmp_path / "s", counted, 20, mine=(i, 3), progress=lambda *said, t=told: t.append(said)
        )
        assert [first // SIZE % 3 for first, _ in counted.asked] == [i] * len(counted.asked)
        calls += counted.asked
        mine = [last - first for first, last in counted.asked]
        assert told == [(sum(mine[:k]), sum(mine)) for k in range(len(mine) + 1)]
    assert sorted(calls) == [(first, min(first + SIZE, 20)) for first in range(0, 20, SIZE)]
    assert contents(tmp_path / "s") == contents(tmp_path / "one")


def test_a_finished_store_is_not_touched(tmp_path, unharmed):
    store(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    told, counted = [], Counted()
    store(tmp_path, counted, progress=lambda *said: told.append(said))
    assert counted.asked == []
    assert told == [(COUNT, COUNT)]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("00000-1.npy", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
        ("00000-1.npy", lambda raw: raw[:-1]),
        ("00000-1.npy", None),
        ("00000.json", lambda raw: raw[:-9]),
        ("00000.json", lambda raw: raw.replace(b"0.18215", b"0.18216")),
        ("00000.json", None),
        ("index.json", lambda raw: raw[:-9]),
    ],
)
def test_what_is_damaged_is_made_again_and_nothing_else(tmp_path, unharmed, file, harm, finished):
    store(tmp_path)
    if not finished:
        (tmp_path / "index.json").unlink()
    if (path := tmp_path / file).exists():
        path.write_bytes(harm(path.read_bytes())) if harm else path.unlink()
    counted = Counted()
    store(tmp_path, counted)
    assert counted.asked == ([] if file == "index.json" else [(0, 3)])
    assert contents(tmp_path) == unharmed


def test_a_store_is_not_finished_while_a_damaged_shard_is_made_again(tmp_path):
    def failing(first, last):
        raise RuntimeError("as asked")

    store(tmp_path)
    (tmp_path / "00001-0.npy").write_bytes(b"")
    with pytest.raises(RuntimeError, match="as asked"):
        store(tmp_path, failing)
    with pytest.raises(data.NotPreparedError, match="1 of 2 shards are there"):
        stored.open(tmp_path)


def test_damage_of_another_process_shard_is_not_finished_over(tmp_path):
    store(tmp_path, mine=(0, 2))
    (tmp_path / "00000-0.npy").write_bytes(b"")
    store(tmp_path, mine=(1, 2))
    with pytest.raises(data.NotPreparedError, match="not finished"):
        stored.open(tmp_path)
    store(tmp_path, mine=(0, 2))
    assert len(stored.open(tmp_path)) == COUNT


def other(first, last):
    return {**make(first, last), "mean": np.zeros((last - first, 4), np.float32)}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"count": 6}, ValueError, "`num_examples` must be as when .* was begun, 5; got 6"),
        ({"shard_size": 4}, ValueError, "`shard_size` must be as when .*, 3; got 4. Take another"),
        (
            {"attributes": {**ATTRIBUTES, "scale": 2}},
            ValueError,
            r"`attributes` must be as when .* begun, \{'scale': 0.18215\}; got \{'scale': 2\}",
        ),
        ({"make": other}, ValueError, r"`make\(3, 5\)` must give the fields"),
        (
            {"make": lambda a, b: make(a, b - 1)},
            ValueError,
            "give 2 rows; got 1",
        ),
        ({"make": lambda a, b: [3]}, TypeError, "must be arrays by name"),
        ({"make": lambda a, b: {}}, ValueError, "one leading axis"),
        ({"make": lambda a: {}}, TypeError, "`make` must be a function|does not take 2"),
        ({"attributes": {"a": float("nan")}}, ValueError, "`attributes` must be JSON"),
        ({"attributes": {"a": {1, 2}}}, TypeError, "JSON"),
        ({"count": 0}, ValueError, "`num_examples` must be at least 1"),
        ({"mine": (2, 2)}, ValueError, r"`mine` must be .*; got \(2, 2\)"),
        ({"mine": 1}, TypeError, r"`mine` must be \(i, n\)"),
    ],
)
def test_another_store_in_its_place_is_refused_by_name(tmp_path, unharmed, options, error, said):
    store(tmp_path)
    (tmp_path / "00001.json").unlink()
    with pytest.raises(error, match=said):
        store(tmp_path, **options)
    store(tmp_path)
    assert contents(tmp_path) == unharmed


def test_processes_that_make_different_fields_are_refused(tmp_path):
    store(tmp_path / "a", mine=(0, 2))
    store(tmp_path / "b", other, mine=(1, 2))
    for path in (tmp_path / "b").iterdir():
        path.rename(tmp_path / "a" / path.name)
    with pytest.raises(ValueError, match="`make` must give the same fields for every shard"):
        store(tmp_path / "a")


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    stored.write(tmp_path / "whole", [make(0, COUNT)])
    for name in ("mine", "file", "whole"):
        with pytest.raises(FileExistsError, match=f"`folder` .*{name} holds"):
            store(tmp_path / name)
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]


# --- Killed ---------------------------------------------------------------------------------

KILLED = """if True:
    import os, pathlib, signal, sys
    sys.path.insert(0, "tests")
    import test_shards

    root, countdown = pathlib.Path(sys.argv[1]), [0]

    def deadly(call):
        def called(*args, **options):
            countdown[0] -= 1
            if countdown[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)
        return called

    for name in ("open", "replace", "fsync", "unlink", "close", "fdopen"):
        setattr(os, name, deadly(getattr(os, name)))
    number, killed = 0, True
    while killed:
        number += 1
        child = os.fork()
        if not child:
            countdown[0] = number
            test_shards.store(root / str(number))
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert killed or number > 50
        test_shards.store(root / str(number))
    print(number)
"""


@pytest.mark.slow
def test_killed_at_any_system_call_the_same_call_goes_on_to_the_same_bytes(tmp_path, unharmed):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert len(list(tmp_path.iterdir())) == int(run.stdout)
    for folder in tmp_path.iterdir():
        assert contents(folder) == unharmed, folder.name


@pytest.mark.slow
def test_killed_by_surprise_and_damaged_again_and_again_it_ends_whole(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, 'tests'); import pathlib, test_shards\n"
        "slow = lambda a, b: (time.sleep(0.05), test_shards.make(a, b))[1]\n"
        "print('at work', flush=True)\n"
        "test_shards.store(pathlib.Path(sys.argv[1]), slow, 90)\n"
    )
    folder, rng = tmp_path / "s", np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE)
        process.stdout.readline()
        try:
            process.wait(rng.uniform(0.1, 0.8))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        process.stdout.close()
        found = sorted(folder.glob("*-*.npy")) if folder.exists() else []
        if found:
            path = found[rng.integers(len(found))]
            path.write_bytes(path.read_bytes()[:-1])
    store(folder, count=90)
    store(tmp_path / "unharmed", count=90)
    assert contents(folder) == contents(tmp_path / "unharmed")


# --- Fingerprints ---------------------------------------------------------------------------


def test_a_fingerprint_tells_parameters_apart_and_never_changes():
    tree = {"a": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "b": {"c": np.float32(2)}}
    known = "c500987c72c168db33046832d7f2a85bfb276c11a5d5b8783b3850b4c52ae254"
    assert stored.fingerprint(tree) == known
    assert stored.fingerprint({"b": {"c": jnp.float32(2)}, "a": np.asarray(tree["a"])}) == known
    others = (
        {**tree, "a": tree["a"].at[1, 2].add(1e-6)},
        {**tree, "a": tree["a"].reshape(3, 2)},
        {**tree, "a": tree["a"].astype(jnp.int32)},
        {**tree, "b": {"d": np.float32(2)}},
        {**tree, "a": tree["a"].astype(jnp.bfloat16)},
    )
    assert len({known, *map(stored.fingerprint, others)}) == 6
    assert stored.fingerprint(tree, tree) not in (known, stored.fingerprint((tree, tree)))
    with pytest.raises(TypeError, match=r"`trees\[0\]\['a'\]` must be an array of numbers; got 3"):
        stored.fingerprint({"a": 3})
