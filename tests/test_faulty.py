"""Files in a store are right whatever its requests meet with, or it is said that they are not."""

import asyncio
import collections
import concurrent.futures
import contextlib
import types

import faulty
import numpy as np
import pytest
import servers

from jaxdiff import files
from jaxdiff.files import stores
from jaxdiff.training import folders, lease, lock

SLOW = ("429", "500", "late 503", "closed")


@pytest.fixture(scope="module", params=["gs", pytest.param("s3", marks=pytest.mark.slow)])
def upstream(request, tmp_path_factory):
    """The scheme, and the environment that leads to its emulator."""
    log = tmp_path_factory.mktemp("server") / "log"
    serve = servers.gcs if request.param == "gs" else servers.s3
    with serve(log) as environment:
        yield request.param, environment


@pytest.fixture
def through(upstream, request, monkeypatch):
    """Lead this process's requests through a proxy; return the folder and the counts."""
    scheme, environment = upstream
    stack = contextlib.ExitStack()

    def begin(**options):
        url = environment["STORAGE_EMULATOR_HOST" if scheme == "gs" else "AWS_ENDPOINT_URL"]
        url, counts = stack.enter_context(faulty.proxy(url, **options))
        led = servers.gcs_environment(url) if scheme == "gs" else environment
        led = {**led, "AWS_ENDPOINT_URL": url, "AWS_MAX_ATTEMPTS": "2"}
        stack.enter_context(servers.led_to(led))
        import aiobotocore.endpoint
        import gcsfs.retry  # which reads the environment
        import s3fs.core

        quick = types.SimpleNamespace(**{**vars(asyncio), "sleep": soon})
        for module in (gcsfs.retry, s3fs.core, aiobotocore.endpoint):
            monkeypatch.setattr(module, "asyncio", quick)
        folder = files.to_path(f"{scheme}://{servers.BUCKET}")
        return folder / request.node.originalname, counts

    async def soon(seconds):
        await asyncio.sleep(0.001 * seconds)

    monkeypatch.setattr(stores, "DELAYS", (0.01, 0.02, 0.05))
    with stack:
        yield begin


def test_without_faults_all_passes(through, tmp_path):
    folder, counts = through()
    files.write_text(folder / "a b.txt", "text")
    files.write_arrays(folder / "b" / "a.npz", {"x": np.arange(3)})
    data = np.random.default_rng(0).bytes(7 * 2**20)  # in parts
    (tmp_path / "a").write_bytes(data)
    (folder / "large").put(tmp_path / "a")
    (folder / "large").get(tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data
    assert files.names(folder) == ["a b.txt", "b/a.npz", "large"]
    assert [path.name for path in folder.iterdir()] == ["a b.txt", "b", "large"]
    assert (folder / "b").is_dir()
    assert (folder / "a b.txt").is_file()
    assert (folder / "a b.txt").modified() > 1e9
    with pytest.raises(FileNotFoundError):
        (folder / "none").read_bytes()
    assert (folder / "new").create(b"one")
    assert not (folder / "new").create(b"two")
    assert (folder / "new").read_bytes() == b"one"
    files.remove_tree(folder)
    assert not folder.exists()
    assert counts["sound"] == counts["requests"] == counts["forwarded"] > 10


def test_with_faults_what_is_written_is_read_back(through):
    folder, counts = through(seed=1, rate=0.2, delay=0.02)
    written = {f"{i:02d}": np.random.default_rng(i).bytes(10 ** (i % 6)) for i in range(30)}
    for name, data in written.items():
        (folder / name).write_bytes(data)
    assert files.sizes(folder) == {name: len(data) for name, data in written.items()}
    assert {name: (folder / name).read_bytes() for name in written} == written
    for name in written:
        (folder / name).unlink(missing_ok=True)
    assert files.names(folder) == []
    faults = {kind: counts[kind] for kind in faulty.KINDS}
    assert sum(faults.values()) == counts["requests"] - counts["sound"] > 5


def test_half_an_answer_is_not_taken_for_all_of_it(through):
    folder, _ = through()
    (folder / "a").write_bytes(b"data" * 1000)
    folder, counts = through(rate=1.0, kinds=("cut",))
    with pytest.raises(stores.StoreError, match="did not do as asked, tried 4 times"):
        (folder / "a").read_bytes()
    assert counts["cut"] == counts["forwarded"] >= 4


@pytest.mark.parametrize(
    "kind",
    [
        "503",
        "half",
        "closed after",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("429", "500", "late 503", "closed")
        ),
    ],
)
def test_a_store_that_fails_every_time_is_given_up(through, kind):
    folder, counts = through(rate=1.0, kinds=(kind,))
    with pytest.raises(stores.StoreError, match="did not do as asked, tried 4 times") as told:
        (folder / "a").write_bytes(b"data" * 1000)
    assert told.value.filename == str(folder / "a")
    assert counts[kind] == counts["requests"] >= 4
    assert (counts["forwarded"] > 0) == (kind in faulty.UNANSWERED)


def test_faults_depend_on_the_seed_alone(upstream):
    def drawn(**options):
        with faulty.proxy("http://127.0.0.1:1", **options):
            server = faulty._Server("http://127.0.0.1:1", 3, 0.5, faulty.KINDS, 0.0)
            server.server_close()
            return [server.draw() for _ in range(20)]

    assert drawn() == drawn()
    assert len(set(drawn())) > 3
    with pytest.raises(ValueError, match="`kinds` must be of"), faulty.proxy("", kinds=("x",)):
        pass


def test_a_lease_is_one_through_faults(through, monkeypatch):
    folder, counts = through(seed=2, rate=0.15, delay=0.02)
    for _ in range(4):
        with lock.writing(folder):
            files.write_text(folder / "a", "text")
            with pytest.raises(folders.RunError, match="is being written by process"):
                lease.acquire(folder)
            lock.require_held(folder)
    assert counts["requests"] > counts["sound"]


def test_what_is_created_at_once_is_created_once(through):
    folder, _ = through()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: (folder / "a").create(bytes([i])), range(8)))
    assert collections.Counter(made) == {True: 1, False: 7}
    assert (folder / "a").read_bytes() == bytes([made.index(True)])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = [pool.submit(_acquired, folder) for _ in range(4)]
        held = [each.result() for each in found if each.result() is not None]
    assert len(held) == 1
    held[0].renew()
    held[0].release()


def _acquired(folder):
    try:
        return lease.acquire(folder)
    except folders.RunError:
        return None
