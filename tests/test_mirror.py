"""Copies of sets in buckets: whole files, what is missing only, compared with what stores tell."""

import base64
import hashlib
import os
import sys
import threading
import time

import fsspec
import numpy as np
import pytest

from experiments import mirror as command
from jaxdiff import files
from jaxdiff.data import NotPreparedError, UnreadableError, load_folder, mirror, stored

module = sys.modules["jaxdiff.data.mirror"]
FILES = {
    "1.0.0/a-00000": b"first" * 1000,
    "1.0.0/a-00001": b"second",
    "1.0.0/dataset_info.json": b"{}",
}


@pytest.fixture
def bucket():
    """A folder of a store in memory."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pipe({f"/bucket/my_set/{name}": data for name, data in FILES.items()})
    yield "memory://bucket/my_set"
    store.store.clear()


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_a_folder_of_a_store_is_copied_once(bucket, tmp_path, monkeypatch):
    told = []
    made = mirror(bucket, tmp_path / "my_set", progress=lambda *at: told.append(at))
    assert contents(tmp_path / "my_set") == FILES
    size = sum(map(len, FILES.values()))
    assert made[:4] == (3, size, 3, size)
    assert (told[0], told[-1]) == ((0, size), (size, size))
    before = os.stat(tmp_path / "my_set/1.0.0/a-00000").st_mtime_ns
    monkeypatch.delattr(module, "_chunks")  # nothing is read: there are no checksums to compare
    again = mirror(bucket, tmp_path / "my_set", verify=True)
    assert again[:4] == (3, size, 0, 0)
    assert os.stat(tmp_path / "my_set/1.0.0/a-00000").st_mtime_ns == before


def test_a_local_folder_and_what_it_holds_are_copied_too(tmp_path):
    latents = {"mean": np.arange(12.0).reshape(6, 2)}
    stored.write(tmp_path / "there", [latents], shard_size=2)
    mirror(tmp_path / "there", tmp_path / "here")
    np.testing.assert_array_equal(
        stored.open(tmp_path / "here").rows(np.arange(6))["mean"], latents["mean"]
    )


def test_a_copy_that_was_interrupted_goes_on_and_until_then_is_no_set(
    bucket, tmp_path, monkeypatch
):
    fetch = module._fetch

    def failing(store, each, written):
        if each.name.endswith("a-00001"):
            written.write(b"sec")
            raise KeyboardInterrupt
        fetch(store, each, written)

    monkeypatch.setattr(module, "_fetch", failing)
    with pytest.raises(KeyboardInterrupt):
        mirror(bucket, tmp_path, num_workers=1)
    assert contents(tmp_path) == {"1.0.0/a-00000": FILES["1.0.0/a-00000"]}
    monkeypatch.setattr(module, "_fetch", fetch)
    assert mirror(bucket, tmp_path)[2:4] == (2, 8)
    assert contents(tmp_path) == FILES


def test_what_has_another_size_is_copied_anew(bucket, tmp_path):
    mirror(bucket, tmp_path)
    (tmp_path / "1.0.0/a-00000").write_bytes(b"cut")
    assert mirror(bucket, tmp_path).copied_files == 1
    assert contents(tmp_path) == FILES


class Telling:
    """A store that tells checksums, as Google's does, of which some reads fail or differ."""

    def __init__(self, kind, wrong=0, failing=0):
        self.inner = fsspec.filesystem("memory")
        self.kind, self.wrong, self.failing, self.lock = kind, wrong, failing, threading.Lock()

    def find(self, path, **options):
        listing = self.inner.find(path, **options)
        return {name: said | self.told(self.inner.cat(name)) for name, said in listing.items()}

    def told(self, data):
        if self.kind == "md5":
            return {"md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode()}
        crc = pytest.importorskip("google_crc32c").Checksum(data).digest()
        return {"crc32c": base64.b64encode(crc).decode()}

    def open(self, path, mode, **options):
        import io

        data = self.inner.cat(path)
        with self.lock:
            if path.endswith("a-00000") and self.failing:
                self.failing -= 1
                raise RuntimeError("HTTP 503\nmore of it")
            if path.endswith("a-00000") and self.wrong:
                self.wrong -= 1
                data = b"F" + data[1:]
        return io.BytesIO(data)


@pytest.fixture
def telling(monkeypatch):
    def use(*args, **options):
        store = Telling(*args, **options)
        monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (store, "/bucket/my_set"))
        monkeypatch.setattr(module.time, "sleep", lambda seconds: None)

    return use


@pytest.mark.parametrize("kind", ["md5", "crc32c"])
def test_checksums_are_compared_while_copying_and_when_asked_of_what_is_there(
    bucket, tmp_path, telling, kind
):
    telling(kind, wrong=1, failing=1)
    mirror("gs://", tmp_path)
    assert contents(tmp_path) == FILES
    path = tmp_path / "1.0.0/a-00000"
    path.write_bytes(b"F" + path.read_bytes()[1:])
    assert mirror("gs://", tmp_path).copied_files == 0  # of the same size
    assert mirror("gs://", tmp_path, verify=True).copied_files == 1
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            {"wrong": 9},
            "a-00000 is not what the store says: what it gave does not match its checksum",
        ),
        ({"failing": 9}, r"a-00000 cannot be read: RuntimeError: HTTP 503\."),
    ],
)
def test_what_stays_wrong_is_named_and_the_rest_stays(bucket, tmp_path, telling, fault, said):
    telling("md5", **fault)
    with pytest.raises(UnreadableError, match=said):
        mirror("gs://", tmp_path, num_workers=2)
    assert "1.0.0/a-00000" not in contents(tmp_path)
    assert "1.0.0/dataset_info.json" not in contents(tmp_path)
    telling("md5")
    mirror("gs://", tmp_path)
    assert contents(tmp_path) == FILES


def test_while_another_process_copies_to_a_folder_this_one_waits(bucket, tmp_path):
    descriptor = os.open(tmp_path / module.LOCK, os.O_RDWR | os.O_CREAT)
    assert files.hold(descriptor)
    made = []
    waiting = threading.Thread(target=lambda: made.append(mirror(bucket, tmp_path)))
    waiting.start()
    time.sleep(0.3)
    assert contents(tmp_path) == {}
    (tmp_path / "1.0.0").mkdir()
    (tmp_path / "1.0.0/a-00001").write_bytes(FILES["1.0.0/a-00001"])  # by that one
    os.close(descriptor)
    waiting.join(timeout=30)
    assert made[0].copied_files == 2
    assert contents(tmp_path) == FILES


def test_a_disk_without_room_is_told_before_anything_is_copied(bucket, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(OSError, match=r"No space left on device: the copy needs 0.0 GB"):
        mirror(bucket, tmp_path)
    assert contents(tmp_path) == {}


def test_what_cannot_be_copied_is_refused(bucket, tmp_path, monkeypatch):
    with pytest.raises(NotPreparedError, match="`source` must be a folder of files; memory://none"):
        mirror("memory://none", tmp_path / "here")
    with pytest.raises(ValueError, match="`destination` must be a local directory; got gs://b"):
        mirror(bucket, "gs://b")
    with pytest.raises(NotPreparedError, match="`path` must be a local directory"):
        load_folder("gs://bucket/photos", 8)
    fsspec.filesystem("memory").pipe("/bucket/my_set/../../up", b"")
    with pytest.raises(UnreadableError, match="leads out of it"):
        mirror(bucket, tmp_path / "here")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(("url", "package"), [("gs://b/x", "gcsfs"), ("s3://b/x", "s3fs")])
def test_a_missing_store_names_the_extra(tmp_path, monkeypatch, url, package):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    known = sys.modules["fsspec.registry"]._registry
    monkeypatch.delitem(known, url.partition("://")[0], raising=False)
    with pytest.raises(ImportError, match=r"(?s)data\.mirror needs.*'jaxdiff\[stores\]'"):
        mirror(url, tmp_path)


def test_the_command_copies_and_tells_how_fast(bucket, tmp_path, capsys):
    argv = ["--source", bucket, "--destination", str(tmp_path / "my_set")]
    assert command.main(argv) == 0
    assert "copied 3 files, 0.000 GB in" in capsys.readouterr().out
    assert contents(tmp_path / "my_set") == FILES
    assert command.main(["--source", "memory://none", "--destination", str(tmp_path)]) == 1
    assert "error: `source` must be a folder" in capsys.readouterr().err
