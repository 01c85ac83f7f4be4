import io

import numpy as np
import pytest
import servers

from jaxdiff import files
from jaxdiff.files import stores

bucket = servers.bucket("gs", "s3")


@pytest.fixture
def folder(bucket, request):
    return bucket / f"with a space/{request.node.originalname}"


def test_an_object_is_written_whole_and_read_back(folder):
    files.write_text(folder / "a.txt", "before")
    with pytest.raises(ZeroDivisionError), files.whole(folder / "a.txt") as file:
        file.write(b"after" * (1 // 0))
    assert (folder / "a.txt").read_text() == "before"
    files.write_arrays(folder / "b" / "a.npz", {"x": np.arange(3)})
    with np.load((folder / "b" / "a.npz").open("rb")) as read:
        np.testing.assert_array_equal(read["x"], [0, 1, 2])
    assert files.names(folder) == ["a.txt", "b/a.npz"]
    assert files.sizes(folder)["a.txt"] == 6
    assert [path.name for path in folder.iterdir()] == ["a.txt", "b"]


def test_it_tells_files_folders_and_what_is_not_there(folder):
    files.write_text(folder / "a" / "b.txt", "text")
    told = [
        (path.exists(), path.is_dir(), path.is_file())
        for path in (folder, folder / "a" / "b.txt", folder / "a" / "c.txt", folder / "a" / "b")
    ]
    assert told == [(True, True, False), (True, False, True), *[(False, False, False)] * 2]
    with pytest.raises(FileNotFoundError, match=r"No such file.*c\.txt"):
        (folder / "a" / "c.txt").read_bytes()
    assert files.names(folder / "none") == []


def test_what_another_wrote_or_deleted_is_seen_at_once(folder):
    assert not folder.exists()
    for client in (stores.StorePath(str(folder)), folder):
        files.write_text(client / f"{id(client)}", "text")
        assert len(list(folder.iterdir())) == len(files.names(client))
    files.remove_tree(folder)
    assert not folder.exists()
    with pytest.raises(FileNotFoundError):
        list(folder.iterdir())


@pytest.mark.parametrize("end", [b"", b"\r", b"\n", b"\r\n", b"\0", b"--"])
def test_every_byte_to_the_last_comes_back(folder, end, tmp_path):
    data = b"\n\r\r\n--==0==" + end
    (tmp_path / "a").write_bytes(data)
    (folder / "sent").put(tmp_path / "a")
    (folder / "written").write_bytes(data)
    assert [(folder / name).read_bytes() for name in ("sent", "written")] == [data, data]


def test_files_go_there_and_come_back(folder, tmp_path):
    data = np.random.default_rng(0).bytes(2**20)
    (tmp_path / "a").write_bytes(data)
    (folder / "a").put(tmp_path / "a")
    (folder / "a").get(tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data
    assert isinstance((folder / "a").open("rb"), io.BytesIO)


def test_an_object_can_be_made_only_where_there_is_none(folder, bucket):
    assert (folder / "a").create(b"one")
    if str(bucket).startswith("s3"):  # Google's emulator ignores the condition
        assert not (folder / "a").create(b"two")
        assert (folder / "a").read_bytes() == b"one"


def test_nothing_is_renamed_in_a_store(folder):
    with pytest.raises(io.UnsupportedOperation, match="in a store"):
        (folder / "a").rename(folder / "b")


@pytest.mark.parametrize("url", ["ftp://bucket/run", "gs://", "http://host/run"])
def test_what_is_no_store_is_refused(url):
    with pytest.raises(ValueError, match="must be like gs://BUCKET/run"):
        files.to_path(url)


def test_what_fails_is_tried_again_and_then_given_up(monkeypatch):
    path, tried = stores.StorePath("gs://bucket/a"), []
    monkeypatch.setattr(stores, "DELAYS", (0.0, 0.0))

    def request(result=None):
        tried.append(1)
        if result is None or len(tried) < result:
            raise TimeoutError("slow")
        return result

    assert path._ask(lambda: request(3)) == 3
    tried.clear()
    with pytest.raises(
        stores.StoreError, match=r"tried 3 times.*TimeoutError: slow.*gs://bucket/a"
    ):
        path._ask(request)
    assert len(tried) == 3
    with pytest.raises(PermissionError, match="refused"):
        path._ask(lambda: (_ for _ in ()).throw(OSError("Forbidden: bucket")))


def test_a_scratch_folder_goes_with_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "jaxdiff-scratch-left").mkdir()
    (tmp_path / "jaxdiff-scratch-left" / "file").touch()
    with files.scratch() as folder, files.scratch() as other:
        assert sorted(tmp_path.iterdir()) == sorted([folder, other])
    assert list(tmp_path.iterdir()) == []
