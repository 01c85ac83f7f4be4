"""Checkpoints in object stores: never one that is believed and wrong, whenever the process dies."""

import jax
import numpy as np
import pytest
import servers
from test_checkpoint import CONFIG, Killed, assert_same, make_state

from jaxdiff import files
from jaxdiff.files import stores
from jaxdiff.training import checksums, lease, step_objects
from jaxdiff.training.checkpoint import CheckpointError, Checkpoints

SLOW = pytest.mark.slow


bucket = servers.bucket("gs", pytest.param("s3", marks=SLOW))


@pytest.fixture
def directory(bucket, request, monkeypatch):
    """Three sound checkpoints; nobody races for the lease, so nobody waits to see who won."""
    monkeypatch.setattr(lease, "SETTLE", 0.0)
    place = bucket / f"a run/{request.node.originalname}/checkpoints"
    files.remove_tree(place)
    with Checkpoints(place) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, make_state(step), CONFIG, {"loss": 1 / step})
    return place


def listing(directory):
    return {name: (directory / name).read_bytes() for name in files.names(directory)}


def largest(folder):
    sizes = {name: size for name, size in files.sizes(folder).items() if "/d/" in name}
    return folder / max(sizes, key=lambda name: (sizes[name], name))


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(bytes(data))


def assert_believed(directory, *steps):
    """Hold every checkpoint that a reader takes for one against what was saved as it."""
    with Checkpoints(directory, report=lambda message: None) as checkpoints:
        found = checkpoints.sound_steps()
        assert found in steps
        for step in found:
            assert_same(checkpoints.restore(make_state(), step=step).state, make_state(step))


def test_a_state_comes_back_bit_for_bit_and_the_oldest_go(directory):
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(make_state())
        assert (restored.step, restored.config) == (30, CONFIG)
        assert_same(restored.state, make_state(30))
        assert checkpoints.best("loss") == 30
        checkpoints.save(40, make_state(40))
        checkpoints.wait()
        assert checkpoints.sound_steps() == [20, 30, 40]
        assert not (directory / "10").exists()
        assert_same(checkpoints.restore(make_state(), step=20).state, make_state(20))


def test_what_is_there_is_the_same_bytes_as_on_a_disk(directory, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(30, make_state(30), CONFIG, {"loss": 1 / 30})
    for name in ("checkpoint.json", "config.json", "metrics.json", "state/manifest.ocdbt"):
        stored = (directory / "30" / name).exists()
        assert stored == (tmp_path / "30" / name).exists()
    assert {name.split("/")[0] for name in files.names(directory / "30")} == {
        name.split("/")[0] for name in files.names(tmp_path / "30")
    }


@pytest.mark.parametrize(
    "damage",
    ["flipped", "unsealed", *(pytest.param(d, marks=SLOW) for d in ("cut", "missing", "copied"))],
)
def test_a_damaged_one_is_named_and_the_newest_sound_one_used(directory, damage):
    folder, reports = directory / "30", []
    if damage == "flipped":
        flip_bit(largest(folder))
    elif damage == "cut":
        largest(folder).write_bytes(largest(folder).read_bytes()[:-1])
    elif damage == "missing":
        largest(folder).unlink()
    elif damage == "unsealed":
        (folder / checksums.SEAL).unlink()
    else:
        for name in files.names(directory / "20"):
            (folder / name).write_bytes((directory / "20" / name).read_bytes())
    before = listing(directory)
    with Checkpoints(directory, report=reports.append) as checkpoints:
        assert checkpoints.restore(make_state()).step == 20
        assert len(reports) == 1
        assert str(folder) in reports[0]
        assert "corrupt" in reports[0] or "incomplete" in reports[0]
        assert listing(directory) == before
        checkpoints.save(30, make_state(30))
    assert_believed(directory, [20, 30], [10, 20, 30])
    aside = directory / "30.corrupt"
    assert aside.exists() == (damage != "unsealed")


def test_none_sound_is_a_clear_stop_that_changes_nothing(directory):
    for step in (10, 20, 30):
        flip_bit(largest(directory / str(step)))
    before = listing(directory)
    with (
        Checkpoints(directory, report=lambda message: None) as checkpoints,
        pytest.raises(CheckpointError, match="Every checkpoint in .*checkpoints is corrupt"),
    ):
        checkpoints.restore(make_state())
    assert listing(directory) == before


def test_a_sound_one_of_the_same_step_is_kept(directory):
    before, reports = listing(directory), []
    with Checkpoints(directory, report=reports.append) as checkpoints:
        checkpoints.save(30, make_state(31))
    assert "already holds a sound checkpoint" in reports[0]
    assert listing(directory) == before


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("put", 20),
        pytest.param("put", 1, marks=SLOW),
        pytest.param("unlink", 1, marks=SLOW),
        pytest.param("get", 1, marks=SLOW),
        pytest.param("sizes", 1, marks=SLOW),
    ],
)
def test_death_at_any_request_leaves_nothing_that_is_believed_and_wrong(
    directory, name, every, monkeypatch
):
    """The step is there already, and damaged: it is put aside, deleted and written anew."""
    original, last = getattr(stores.StorePath, name), 0
    for call in range(0, 60, every):
        calls = []
        if files.sizes(directory / "30"):
            some = files.names(directory / "30")[0]
            (directory / "30" / some).write_bytes(b"damaged")

        def killing(*args, number=call, made=calls, **kwargs):
            made.append(name)
            if len(made) > number:
                raise Killed
            return original(*args, **kwargs)

        dying = Checkpoints(directory, keep_last=2, report=lambda message: None)
        monkeypatch.setattr(stores.StorePath, name, killing)
        dying.save(30, make_state(30))
        try:
            dying.wait()
        except Killed:
            last = call
        monkeypatch.undo()
        assert_believed(directory, [10, 20], [20], [20, 30], [10, 20, 30])
        dying.close()  # its lease goes while there is a store that can be told
        if last < call:
            break
    assert last > 0 or name == "sizes"
    with Checkpoints(directory, keep_last=2, report=lambda message: None) as reborn:
        reborn.save(40, make_state(40))
    assert_believed(directory, [30, 40])
    assert {each.name.partition(".")[0] for each in directory.iterdir()} == {"30", "40"}


def test_a_store_that_does_not_answer_is_no_damage_and_a_clear_stop(directory, monkeypatch):
    monkeypatch.setattr(stores, "DELAYS", (0.0,))

    def silent(*_, **__):
        raise TimeoutError("no answer")

    checkpoints = Checkpoints(directory)
    checkpoints.claim()
    store = directory._store
    with monkeypatch.context() as silenced:
        silenced.setattr(store, "get_file", silent)
        with pytest.raises(stores.StoreError, match="tried 2 times.*no answer"):
            checkpoints.restore(make_state())
        for name in ("put_file", "pipe_file"):
            silenced.setattr(store, name, silent)
        checkpoints.save(40, make_state(40))
        with pytest.raises(CheckpointError, match="Could not save step 40.*is step 30.*no answer"):
            checkpoints.wait()
    checkpoints.save(40, make_state(40))
    checkpoints.close()
    assert_believed(directory, [20, 30, 40])


def test_less_than_was_sent_is_sent_again_and_else_not_sealed(directory, monkeypatch):
    put, cut = stores.StorePath.put, []

    def cutting(path, file):
        put(path, file)
        if path.name == "config.json" and len(cut) < 1:
            cut.append(path.write_bytes(path.read_bytes()[:-3]))

    monkeypatch.setattr(stores.StorePath, "put", cutting)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(40, make_state(40), CONFIG)
        checkpoints.wait()
        monkeypatch.setattr(step_objects, "_ATTEMPTS", 1)
        cut.clear()
        checkpoints.save(50, make_state(50), CONFIG)
        with pytest.raises(CheckpointError, match="step 50.*other sizes than were sent"):
            checkpoints.wait()
    assert_believed(directory, [20, 30, 40])


def test_nothing_stays_on_the_local_disk(directory, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(40, make_state(40))
        assert checkpoints.latest_sound() == 40
        assert len(list(tmp_path.iterdir())) == 1  # until it is read, or all is closed
    assert list(tmp_path.iterdir()) == []
    leaves = jax.tree.leaves(Checkpoints(directory).restore().state)
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    assert list(tmp_path.iterdir()) == []
