"""Who holds the lease of a folder in a store, and until when; see `lease` for what is done with it.

Only times that the store itself has set are compared: when the object of a lease was written, and
when another one was that is written to tell the time.
"""

import contextlib
import dataclasses
import datetime
import errno
import json
import math
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from jaxdiff import files

LOCK = ".lock"
TTL = 120.0
"""Seconds that a lease holds after it was renewed."""
_ATTEMPTS = 10

_clocks: dict[str, tuple[float, float]] = {}
"""By bucket: when its clock was read, and how far it is ahead of `clock`."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """What the object of a lease says of who acquired it.

    Attributes:
        number: the object's name.
        token: random; of one acquisition.
        pid: of the process.
        host: where it runs.
        since: when it acquired the lease, by its own clock.
        ttl: for how many seconds the lease holds after it was written.
        process: which process it is, where that can be told; see `_process`.
        released: whether it ended, the object being there for others only.
    """

    number: int
    token: str = ""
    pid: int = 0
    host: str = ""
    since: str = ""
    ttl: float = TTL
    process: str = ""
    released: bool = False

    def __str__(self) -> str:
        if not self.pid:  # the object is damaged
            return "another process"
        return f"process {self.pid} on {self.host}, since {self.since}"

    def text(self) -> bytes:
        """Return what its object holds."""
        said = dataclasses.asdict(self)
        del said["number"]
        return json.dumps(said).encode() + b"\n"


def numbers(directory: Any) -> list[int]:
    """List the numbers that there are, sorted."""
    return sorted(int(name) for name in files.names(directory / LOCK) if name.isdecimal())


def highest(directory: Any) -> tuple[Holder | None, list[int]]:
    """Return what the object of the highest number says, None where there is none; and the numbers.

    Raises:
        OSError: if the store does not answer, or lists what is not there.
    """
    for _ in range(_ATTEMPTS):
        there = numbers(directory)
        if not there:
            return None, there
        with contextlib.suppress(FileNotFoundError):  # released in this instant
            return read(directory, there[-1]), there
    raise OSError(errno.EIO, "the store lists an object that is not there", str(directory / LOCK))


def place_of(directory: Any, number: int) -> Any:
    """Name the object of a number."""
    return directory / LOCK / str(number)


def read(directory: Any, number: int) -> Holder:
    """Return what an object says; its number alone where it is damaged.

    Raises:
        FileNotFoundError: if there is none.
    """
    text = place_of(directory, number).read_bytes()
    with contextlib.suppress(ValueError, TypeError, LookupError):
        said = json.loads(text)
        return Holder(number, **{**said, "ttl": float(said["ttl"]), "pid": int(said["pid"])})
    return Holder(number)


def this_process(number: int) -> Holder:
    """Return what this process says of itself where it acquires a lease."""
    return Holder(
        number,
        token=secrets.token_hex(16),
        pid=os.getpid(),
        host=socket.gethostname(),
        since=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        ttl=TTL,
        process=_process(os.getpid()),
    )


def ends_at(directory: Any, holder: Holder) -> float:
    """Return when a lease ends, in seconds since 1970, by the store's clock.

    Raises:
        FileNotFoundError: if it is released meanwhile.
    """
    return float(place_of(directory, holder.number).modified()) + holder.ttl


def store_time(directory: Any) -> float:
    """Return the store's time, or a little less: read from what is written there, once in a while.

    Raises:
        FileNotFoundError: if what was written was deleted by another's release.
    """
    read_at, _ = _clocks.get(_bucket(directory), (-math.inf, 0.0))
    if clock() - read_at >= TTL:
        probe = directory / LOCK / f"now-{secrets.token_hex(8)}"
        probe.write_bytes(b"now\n")
        try:
            told = float(probe.modified())
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
        at = clock()
        _clocks[_bucket(directory)] = at, told - at
    return known_time(directory)


def known_time(directory: Any) -> float:
    """Return the store's time if its clock was read, this host's otherwise; no request is made."""
    known = _clocks.get(_bucket(directory))
    return time.time() if known is None else clock() + known[1]


def _bucket(directory: Any) -> str:
    return "/".join(os.fspath(directory).split("/", 3)[:3])


def clock() -> float:
    """Return the seconds of a clock that nobody sets, and that goes on while the machine sleeps."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


def _process(pid: int) -> str:
    """Return what no other process has: boot, name space of processes, number, start; or nothing.

    Empty where the system does not tell, or there is no such process.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
    return f"{boot} {space} {pid} {started}"


def is_dead(holder: Holder) -> bool:
    """Tell whether a holder ran on this machine and does not any more."""
    ours = _process(os.getpid()).split(" ")
    theirs = holder.process.split(" ")
    if len(ours) != 4 or theirs[:2] != ours[:2]:
        return False
    found = _process(holder.pid)
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's, which may be hidden
        pass
    return found not in ("", holder.process)
