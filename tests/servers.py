"""Object stores on this machine, for tests: emulators of Google's and Amazon's, on free ports."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxdiff import files

BUCKET = "bucket"
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def gcs(log: Path) -> Iterator[dict[str, str]]:
    """Serve `gs://bucket`; yield the environment that leads there."""
    port = free_port()
    command = [BIN / "gcp-storage-emulator", "start", "--host=127.0.0.1", f"--port={port}"]
    with _served([*command, "--in-memory", f"--default-bucket={BUCKET}"], port, log) as url:
        yield gcs_environment(url)


def gcs_environment(url: str) -> dict[str, str]:
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would look for credentials
    }


@contextlib.contextmanager
def s3(log: Path) -> Iterator[dict[str, str]]:
    """Serve `s3://bucket`; yield the environment that leads there."""
    port = free_port()
    with _served([BIN / "moto_server", "-H", "127.0.0.1", "-p", str(port)], port, log) as url:
        request = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request).close()
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextlib.contextmanager
def _served(command: list[object], port: int, log: Path) -> Iterator[str]:
    with log.open("wb") as output:
        server = subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError(f"{command[0]} ended: {log.read_text()[-2000:]}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def bucket(*schemes: object) -> object:
    """Make the fixture `bucket` of a test module: of a store of each scheme, served throughout."""

    @pytest.fixture(scope="module", params=schemes, name="bucket")
    def served(request, tmp_path_factory):
        with opened(request.param, tmp_path_factory.mktemp("server")) as found:
            yield found

    return served


@contextlib.contextmanager
def opened(scheme: str, folder: Path) -> Iterator[files.Path]:
    """Serve a store of a scheme, "gs" or "s3", and lead this process there; yield its bucket."""
    serve = {"gs": gcs, "s3": s3}[scheme]
    with serve(folder / "log") as environment, led_to(environment):
        yield files.to_path(f"{scheme}://{BUCKET}")


@contextlib.contextmanager
def led_to(environment: dict[str, str]) -> Iterator[None]:
    """Let this process's stores be those that an environment names."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    _forget_clients()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        _forget_clients()


def _forget_clients() -> None:
    import gcsfs
    import s3fs

    for kind in (gcsfs.GCSFileSystem, s3fs.S3FileSystem):
        kind.clear_instance_cache()
