"""Checkpoints: bit for bit, whole whenever the process dies, and never a damaged one read back."""

import contextlib
import errno
import hashlib
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxdiff.training import checksums, step_folders
from jaxdiff.training.checkpoint import CheckpointError, Checkpoints


class State(NamedTuple):
    """Stands for any training state: the checkpoint code knows none."""

    step: Any
    params: Any
    ema: Any
    opt_state: Any


CONFIG = {"seed": 3, "optimizer": {"learning_rate": 1e-3}, "tags": ["a", None]}


def make_state(step=1, width=4, blocks=2):
    params = {
        f"block_{i:02d}": {
            "kernel": jnp.arange(3 * width, dtype=jnp.float32).reshape(3, width) / (i + step),
            "bias": jnp.full(width, i + step / 7, jnp.bfloat16),
        }
        for i in range(blocks)
    }
    params["scale"] = {"value": jnp.float64(step) / 3}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    ema = jax.tree.map(jnp.copy, params)
    return State(jnp.int32(step), params, ema, optimizer.init(params))


def same_bits(left, right):
    left, right = np.asarray(left), np.asarray(right)
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    return left.tobytes() == right.tobytes()


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for path, ok in jax.tree_util.tree_leaves_with_path(jax.tree.map(same_bits, left, right)):
        assert ok, jax.tree_util.keystr(path)


def listing(directory):
    return {
        path.relative_to(directory).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.stat().st_mtime_ns,
        )
        for path in directory.rglob("*")
    }


def flip_bit(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three sound checkpoints; tests that damage them work on a copy."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, make_state(step), CONFIG)
    return directory


@pytest.fixture
def run(saved, tmp_path):
    """Return a copy of the three checkpoints, its reader and what the reader reports."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    reports: list[str] = []
    with Checkpoints(directory, report=reports.append) as checkpoints:
        yield directory, checkpoints, reports


# Round trips


@pytest.mark.parametrize("abstract", [False, True])
def test_state_returns_bit_for_bit_in_the_structure_of_the_target(saved, abstract):
    target = make_state(30)
    if abstract:
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), target)
    restored = Checkpoints(saved).restore(target)
    assert restored.step == 30
    assert restored.config == CONFIG
    assert_same(restored.state, make_state(30))
    kind = np.ndarray if abstract else jax.Array
    assert all(isinstance(leaf, kind) for leaf in jax.tree.leaves(restored.state))


def test_every_dtype_returns_bit_for_bit(tmp_path):
    real = ["bool", "int8", "uint8", "int32", "uint32", "int64", "float16", "bfloat16", "float32"]
    names = [*real, "float64", "complex64", "complex128"]
    state = {name: jnp.asarray([0, 1, 1], name) for name in names}
    state["special"] = jnp.array([np.nan, -np.nan, np.inf, -0.0, 5e-324])
    state["scalar"] = jnp.int32(-7)
    state["numpy"] = np.arange(6.0).reshape(2, 3)
    state["python"] = 0.1
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        assert_same(checkpoints.restore().state, jax.tree.map(np.asarray, state))
        assert_same(checkpoints.restore(state).state, state)


def test_twelve_blocks_keep_their_order_without_a_target(tmp_path):
    want = make_state(blocks=12)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, want)
        restored = checkpoints.restore().state
    assert list(restored["params"]) == sorted(want.params)
    assert_same(restored["params"], want.params)
    assert_same(restored["ema"], want.ema)


def test_plain_orbax_reads_a_checkpoint_without_a_target(saved):
    with ocp.StandardCheckpointer() as reader:
        restored = reader.restore(saved / "30" / "state")
    want = make_state(30)
    assert sorted(restored) == ["ema", "opt_state", "params", "step"]
    assert_same(restored["params"], want.params)
    assert same_bits(restored["opt_state"][1][0]["count"], want.opt_state[1][0].count)


def test_same_state_has_the_same_leaves_whenever_it_is_saved(tmp_path):
    for name in ("a", "b"):
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(1, make_state(1))
    first, second = (Checkpoints(tmp_path / name).restore().state for name in ("a", "b"))
    assert_same(first, second)


def test_a_chosen_step_is_restored(saved):
    restored = Checkpoints(saved).restore(step=10)
    assert restored.step == 10
    assert same_bits(restored.state["step"], jnp.int32(10))


def test_sha256sum_accepts_the_seal(saved):
    lines = (saved / "30" / checksums.SEAL).read_text().splitlines()
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((saved / "30" / name).read_bytes()).hexdigest() == digest
    assert len(lines) == sum(path.is_file() for path in (saved / "30").rglob("*")) - 1


def run_python(program, *arguments, devices=1, **options):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        **options,
    )


def test_eight_devices_save_for_one_and_restore_onto_their_shardings(tmp_path):
    program = """
        import sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from jaxdiff.training.checkpoint import Checkpoints
        assert "orbax" not in sys.modules  # it costs 0.6 s, which a reader of losses need not pay
        mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
        place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))
        state = {"sharded": place(jnp.arange(32.0).reshape(8, 4), "data", "fsdp"),
                 "replicated": place(jnp.ones(3, jnp.bfloat16))}
        step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(5, state)
            later = step(state)
            restored = checkpoints.restore(later).state
        for name, leaf in restored.items():
            assert leaf.sharding == later[name].sharding, name
            assert np.array_equal(leaf + jnp.ones((), leaf.dtype), later[name]), name
    """
    process = run_python(program, tmp_path, devices=8)
    assert process.wait(60) == 0
    process.stdout.close()
    with ocp.StandardCheckpointer() as reader:
        plain = reader.restore(tmp_path / "5" / "state")
    assert same_bits(plain["sharded"], np.arange(32, dtype=np.float32).reshape(8, 4))
    target = {"sharded": jnp.zeros((8, 4), jnp.float32), "replicated": jnp.zeros(3, jnp.bfloat16)}
    onto_one = Checkpoints(tmp_path).restore(target).state
    assert onto_one["sharded"].sharding == target["sharded"].sharding
    assert_same(onto_one, plain)


# Fitting a target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(step=jnp.int64(1)), r"step: wanted int64\[\], got int32\[\]"),
        (
            lambda s: s._replace(ema={**s.ema, "block_01": {"kernel": jnp.ones((3, 5))}}),
            r"ema\.block_01\.kernel: wanted float64\[3, 5\], got float32\[3, 4\]",
        ),
        (
            lambda s: s._replace(params={**s.params, "head": jnp.ones(2)}),
            r"params\.head: wanted float64\[2\], got no such leaf",
        ),
        (
            lambda s: s._replace(params={}, ema={}),
            r"ema\.block_00\.bias: wanted no such leaf, got bfloat16\[4\].*and 5 more",
        ),
    ],
)
def test_a_target_that_does_not_fit_is_refused_by_the_name_of_its_leaf(saved, change, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(saved).restore(change(make_state(30)))


# Damage


def test_one_flipped_bit_in_any_file_is_seen(run):
    directory, checkpoints, reports = run
    files = [path for path in (directory / "30").rglob("*") if path.is_file()]
    assert len(files) >= 6
    for file in files:
        whole = file.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 1):
            flip_bit(file, position, random.Random(position).randrange(8))
            damage = checksums.find_damage(directory / "30")
            assert damage is not None, f"{file}, byte {position}"
            assert "corrupt" in damage or "incomplete" in damage
            file.write_bytes(whole)
    assert checkpoints.latest_sound() == 30
    assert not reports


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda folder: flip_bit(largest(folder), 7), "corrupt"),
        (lambda folder: largest(folder).write_bytes(largest(folder).read_bytes()[:-3]), "corrupt"),
        (lambda folder: largest(folder).write_bytes(b""), "corrupt"),
        (lambda folder: largest(folder).unlink(), "incomplete"),
        (lambda folder: shutil.rmtree(folder / "state"), "incomplete"),
        (lambda folder: (folder / "config.json").write_text("{}\n"), "corrupt"),
        (lambda folder: (folder / checksums.SEAL).unlink(), "incomplete"),
        (lambda folder: (folder / checksums.SEAL).write_bytes(b""), "corrupt"),
        (lambda folder: (folder / checksums.SEAL).write_bytes(b"\xff\xfe"), "incomplete"),
        (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "incomplete"),
    ],
    ids=[
        "bit flipped",
        "file truncated",
        "file emptied",
        "file missing",
        "state missing",
        "config changed",
        "seal missing",
        "seal emptied",
        "seal not text",
        "folder empty",
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(run, damage, word):
    directory, checkpoints, reports = run
    damage(directory / "30")
    restored = checkpoints.restore(make_state())
    assert restored.step == 20
    assert_same(restored.state, make_state(20))
    (report,) = reports
    assert str(directory / "30") in report
    assert word in report
    with pytest.raises(CheckpointError, match=word):
        checkpoints.restore(step=30)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p.stat().st_size, p))


@pytest.mark.parametrize(
    "name", ["40.tmp", "40.orbax-checkpoint-tmp", "40.orbax-checkpoint-tmp-17"]
)
def test_a_leftover_temporary_folder_is_reported_and_not_used(run, name):
    directory, checkpoints, reports = run
    shutil.copytree(directory / "30", directory / name)
    assert checkpoints.latest_sound() == checkpoints.latest_sound() == 30
    (report,) = reports
    assert str(directory / name) in report
    assert "incomplete" in report


def test_reports_go_to_stderr_by_default(run, capfd):
    directory, _, _ = run
    (directory / "30" / checksums.SEAL).unlink()
    assert Checkpoints(directory).latest_sound() == 20
    captured = capfd.readouterr()
    assert captured.out == ""
    assert str(directory / "30") in captured.err
    assert captured.err.count("\n") == 1


def test_with_none_sound_the_error_names_the_directory_and_nothing_is_touched(run):
    directory, checkpoints, reports = run
    for step in (10, 20, 30):
        flip_bit(largest(directory / str(step)), 11)
    before = listing(directory)
    for attempt in (checkpoints.latest_sound, checkpoints.restore):
        with pytest.raises(CheckpointError, match=str(directory)):
            attempt()
    assert listing(directory) == before
    assert len(reports) == 3


def test_no_directory_or_an_empty_one_is_no_checkpoint(tmp_path):
    for directory in (tmp_path, tmp_path / "absent" / "checkpoints"):
        checkpoints = Checkpoints(directory)
        assert checkpoints.steps() == []
        assert checkpoints.latest_sound() is None
        assert checkpoints.restore(make_state()) is None
    assert not (tmp_path / "absent").exists()


def test_a_damaged_step_is_put_aside_when_the_run_reaches_it_again(run):
    directory, checkpoints, reports = run
    flip_bit(largest(directory / "30"), 5)
    damaged = listing(directory / "30")
    assert checkpoints.restore().step == 20
    checkpoints.save(30, make_state(30), CONFIG)
    assert_same(checkpoints.restore(make_state()).state, make_state(30))
    assert checkpoints.steps() == [10, 20, 30]
    assert listing(directory / "30.corrupt") == damaged
    assert "30.corrupt" in reports[-1]


def test_damaged_checkpoints_do_not_count_among_the_last(run):
    directory, checkpoints, _ = run
    flip_bit(largest(directory / "30"), 5)
    assert checkpoints.restore().step == 20
    checkpoints.save(35, make_state(35))
    checkpoints.wait()
    assert checkpoints.steps() == [10, 20, 30, 35]


# Saving


def test_a_sound_checkpoint_of_the_same_step_is_kept(run):
    directory, checkpoints, reports = run
    before = listing(directory)
    checkpoints.save(30, make_state(99))
    checkpoints.wait()
    assert listing(directory) == before
    assert "kept" in reports[-1]


def test_donating_the_state_after_save_does_not_reach_the_checkpoint(tmp_path, monkeypatch):
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    state = update({"jax": jnp.ones((256, 256)), "scalar": jnp.int32(1), "numpy": np.ones(5)})
    state["numpy"] = np.ones(5)
    want = jax.tree.map(lambda x: np.array(x, copy=True), state)
    write = Checkpoints._write

    def write_late(self, step, held):
        time.sleep(0.3)  # the donations below happen before orbax sees the snapshot
        write(self, step, held)

    monkeypatch.setattr(Checkpoints, "_write", write_late)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        state["numpy"][:] = -1.0
        for _ in range(3):
            state = update(state)
        jax.block_until_ready(state)
        assert_same(checkpoints.restore().state, want)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "want"), [(3, None, [6, 7, 8]), (2, 3, [0, 3, 6, 7, 8])]
)
def test_pruning_keeps_the_last_and_every_nth(tmp_path, keep_last, keep_every, want):
    state = {"params": jnp.ones(2)}
    with Checkpoints(tmp_path, keep_last=keep_last, keep_every=keep_every) as checkpoints:
        for step in range(9):
            checkpoints.save(step, state)
    assert checkpoints.steps() == want
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(step) for step in want]


def test_a_rewound_run_keeps_what_it_saves(run):
    _, checkpoints, _ = run
    checkpoints.save(15, make_state(15))
    checkpoints.wait()
    assert checkpoints.steps() == [10, 15, 20, 30]


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(run, monkeypatch, background):
    directory, checkpoints, _ = run

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = listing(directory)
    if background:
        monkeypatch.setattr(step_folders, "seal", full)
        checkpoints.save(40, make_state(40))
    else:
        monkeypatch.setattr(Path, "mkdir", full)
    message = "step 40 .*last one there is step 30.*No space left on device"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.save(50 if background else 40, make_state(50))
    monkeypatch.undo()
    assert listing(directory) == before
    checkpoints.save(40, make_state(40))
    assert checkpoints.latest_sound() == 40


def test_an_orbax_failure_is_one_clear_error(tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"params": {"empty": jnp.ones((0, 3))}})
    with pytest.raises(CheckpointError, match=r"step 1 .*none yet.*zero size.*params\.empty"):
        checkpoints.close()
    assert capfd.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_or_runs_through_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoints(file)
    with pytest.raises(CheckpointError, match="Could not save step 1 .*Not a directory"):
        Checkpoints(file / "checkpoints").save(1, {"params": jnp.ones(2)})


def test_an_unwritable_directory_is_a_clear_error(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*Permission denied"):
        Checkpoints(tmp_path / "checkpoints").save(1, {"params": jnp.ones(2)})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: Checkpoints(d, keep_last=0), ValueError, "`keep_last` must be at least 1"),
        (lambda d: Checkpoints(d, keep_every=0), ValueError, "`keep_every` must be at least 1"),
        (lambda d: Checkpoints("ftp://bucket/run"), ValueError, "URL must be like gs://"),
        (lambda d: Checkpoints(d).save(-1, {}), ValueError, "`step` must be at least 0; got -1"),
        (lambda d: Checkpoints(d).save(1.5, {}), TypeError, "float"),
        (lambda d: Checkpoints(d).save(1, {}, {"a": object()}), TypeError, "object"),
        (
            lambda d: Checkpoints(d).save(1, {"a": {10: 1.0}}),
            ValueError,
            r"string keys.*10 in a\.10",
        ),
        (
            lambda d: Checkpoints(d).save(1, {"a.b": 1.0, "a": {"b": 2.0}}),
            ValueError,
            r"two leaves of the name a\.b",
        ),
        (lambda d: Checkpoints(d).restore(step=7), CheckpointError, r"`step` must be one of"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_written(tmp_path, call, error, message):
    with pytest.raises(error, match=message):
        call(tmp_path / "checkpoints")
    assert list(tmp_path.iterdir()) == []


# Death at any instant


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_lies_in_the_place_of_a_save_is_replaced_and_not_followed(run, tmp_path, kind):
    directory, checkpoints, _ = run
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").touch()
    for step in (40, 99):
        place = directory / f"{step}.tmp"
        place.symlink_to(victim) if kind == "link" else place.touch()
    checkpoints.save(40, make_state(40))
    checkpoints.wait()
    assert checkpoints.sound_steps() == [20, 30, 40]
    assert [path.name for path in directory.iterdir() if path.suffix == ".tmp"] == []
    assert [path.name for path in victim.iterdir()] == ["kept"]


class Killed(BaseException):
    """Passes every `except Exception`, so nothing is tidied up, as after SIGKILL."""


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (Checkpoints, "_write", 0),  # staged, nothing of the state written
        (step_folders, "seal", 0),  # written, not sealed
        (checksums, "flush", 0),  # sealed, not flushed
        (Path, "rename", 1),  # the damaged step 30 is aside, its successor not in place
        (step_folders, "flush", 0),  # in place, directory not flushed
        (step_folders, "prune", 0),  # committed, not pruned
        (Path, "rename", 2),  # about to put an old one under its deletion name
        (shutil, "rmtree", 2),  # the old one renamed, not emptied
        (os, "unlink", 1),  # halfway through emptying it
    ],
)
def test_death_at_any_instant_leaves_a_sound_checkpoint(run, monkeypatch, owner, name, call):
    directory, _, _ = run
    flip_bit(largest(directory / "30"), 5)
    original, calls = getattr(owner, name), []

    def killing(*args, **kwargs):
        calls.append(name)
        if len(calls) > call:
            raise Killed
        return original(*args, **kwargs)

    dying = Checkpoints(directory, keep_last=2, report=lambda message: None)
    monkeypatch.setattr(owner, name, killing)
    dying.save(30, make_state(30))
    with pytest.raises(Killed):
        dying.wait()
    monkeypatch.undo()
    broken = [s for s in dying.steps() if checksums.find_damage(directory / str(s)) is not None]
    assert broken in ([], [30])  # 30 as it was before; nothing that a death has damaged

    with Checkpoints(directory, keep_last=2, report=lambda message: None) as reborn:
        found = reborn.restore(make_state())
        assert found.step in (20, 30)
        assert_same(found.state, make_state(found.step))
        reborn.save(30, make_state(30))
        reborn.save(40, make_state(40))
    assert reborn.steps() == [30, 40]
    assert [path.name for path in directory.iterdir() if path.suffix == ".tmp"] == []
    assert all(checksums.find_damage(directory / str(step)) is None for step in (30, 40))


def test_sigkill_in_the_middle_of_saves_leaves_the_newest_or_the_one_before(tmp_path):
    program = """
        import sys
        import jax.numpy as jnp
        from jaxdiff.training.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1])
        for step in range(1, 10_000):
            checkpoints.save(step, {"params": {f"w{i}": jnp.full(500, step) for i in range(8)}})
            print(step, flush=True)
    """
    children = [run_python(program, tmp_path / str(i)) for i in range(3)]
    for i, child in enumerate(children):
        with contextlib.closing(child.stdout):
            begun = [int(child.stdout.readline()) for _ in range(3 + i)][-1]
            time.sleep(random.uniform(0, 0.15))
            child.kill()
            begun = max([begun, *(int(line) for line in child.stdout if line.endswith("\n"))])
        child.wait()
        restored = Checkpoints(tmp_path / str(i), report=lambda message: None).restore()
        # save(n) returns after n - 1 is committed; n + 1 may have begun, its line not yet printed
        assert restored.step in (begun - 1, begun, begun + 1)
        for leaf in restored.state["params"].values():
            assert np.array_equal(leaf, np.full(500, restored.step))
