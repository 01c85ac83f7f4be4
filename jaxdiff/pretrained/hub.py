"""Hub ids: what of a repository is needed, brought by huggingface_hub, or what to bring by hand."""

import fnmatch
import posixpath
import re
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from jaxdiff import extras
from jaxdiff.pretrained import files
from jaxdiff.pretrained.errors import WeightsError

__all__ = ["fetch", "is_id", "needed"]

_TEXT = ("*.json", "*.txt")
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "vae_*", "*/checkpoint-*")
"""Folders of pipelines that nothing here reads."""
_PATIENCE = 0.6


def is_id(path: str) -> bool:
    """Tell whether a text can be the id of a repository, "owner/name"."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None


def needed(names: Iterable[str]) -> list[str]:
    """Return which of a repository's files are read: configs, and one file of weights a component.

    Args:
        names: of its files, with slashes.
    """
    wanted = []
    of_folder: dict[str, list[str]] = {}
    for name in names:
        folder, file = posixpath.split(name)
        if any(fnmatch.fnmatch(folder, unused) for unused in _UNUSED):
            continue
        of_folder.setdefault(folder, []).append(file)
    for folder, inner in of_folder.items():
        chosen = [file for file in inner if any(fnmatch.fnmatch(file, text) for text in _TEXT)]
        found = files.preferred(inner) if "config.json" in inner else None
        if found is not None and found not in chosen:
            chosen.append(found)
        elif found is not None:
            stem = found.removesuffix(".safetensors.index.json")
            chosen += [file for file in inner if re.fullmatch(rf"{stem}-\d+-of-\d+\.\w+", file)]
        wanted += [posixpath.join(folder, file) for file in chosen]
    return sorted(wanted)


def fetch(name: str) -> Path:
    """Return the folder of a repository on the hub, brought here where it is not.

    Args:
        name: "owner/name".

    Raises:
        WeightsError: if it is not here and there is no network, no such repository, or no leave to
            read it; says what to bring by hand.
        ImportError: if huggingface_hub is not installed.
    """
    with extras.needed_by("jaxdiff.pretrained", "pretrained"):
        import huggingface_hub
        from huggingface_hub import constants, errors
    failed = (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError)
    if constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT):
        try:  # what was brought here before
            return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        except failed:
            reason = f"{constants.ENDPOINT} cannot be reached"
            raise WeightsError(_by_hand(name, reason)) from None
    try:
        wanted = needed(huggingface_hub.HfApi().list_repo_files(name))
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except failed as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(_by_hand(name, reason)) from error


def _by_hand(name: str, reason: str) -> str:
    folder = name.rpartition("/")[2]
    return (
        f"{name} is no folder or file here, and it cannot be brought from the hub: {reason}. "
        "Where there is a network, bring its configs (*.json, *.txt) and weights (*.safetensors), "
        f'and load the folder:\n  hf download {name} --include "*.json" "*.txt" "*.safetensors" '
        f'--local-dir {folder}\n  pretrained.load("{folder}")'
    )


def _reachable(endpoint: str) -> bool:
    """Tell within a second whether a connection can be made, through a proxy where one is set."""
    url = urllib.parse.urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = url.port or (80 if url.scheme == "http" else 443)
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((url.hostname or "", port), _PATIENCE).close()
        except (OSError, ValueError):
            return
        connected.set()

    # A thread, since looking a name up cannot be bounded in time otherwise.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(_PATIENCE)
    return connected.is_set()
