"""Who may write a run in an object store: whoever holds the lease, for as long as it is renewed.

A store has no locks that die with a process. Below the run directory lie objects `.lock/<n>`, of
which the highest number decides. It holds a random token, who wrote it, and for how many seconds it
counts (`TTL`) from when it was written, by the store's clock. A thread writes it anew every quarter
of them. So a crash stops others for `TTL` seconds at the most; a process on the same machine that
is seen to be dead stops nobody.

**To acquire it** is to create the number after the highest, where that one is released, ended or
to be taken over; then to read it back, and to list again: it is ours only if it holds our token and
nothing came between. A store that creates only what is not there (Google's, Amazon's, most that
speak S3) lets one of several that race win. One that ignores the condition is found out, by
creating the same object twice; there the last one to write wins, after a pause of `SETTLE` seconds
in which the others read that they lost. One whose request took longer than that on its way is not
seen: then two may hold the lease until the first looks again, a quarter of `TTL` later or at its
next checkpoint.

**It is lost** when a look finds a higher number or another's token, or when it could not be renewed
in time. The holder counts nine tenths of `TTL` from before its last renewal was sent, by a clock of
its own that goes on while the machine sleeps; others count all of it from when the store wrote the
renewal, by the store's clock, read from an object they write. So no host's date matters, and the
holder stops first. What is lost stays lost: nothing below the folder is written or deleted by this
process any more, and `RunError` says why. What cannot be kept is a write that was already on its
way; a checkpoint is believed by its checksums alone, so one that two mixed is not believed.

A release deletes the objects. Where a lease was taken over that had not ended, its old holder may
not have noticed: the release then leaves one object that says so, for the next writer to delete.
"""

import concurrent.futures.thread  # noqa: F401  before _release_all is registered, to end after it
import contextlib
import dataclasses
import datetime
import os
import sys
import threading
import time
from typing import Any, NamedTuple

from jaxdiff import files
from jaxdiff.training import holder as holders
from jaxdiff.training.folders import RunError
from jaxdiff.training.holder import LOCK, Holder, clock

SETTLE = 1.0
"""Seconds that whoever acquires one waits for others, where the store ignores conditions."""
LEASED = "; its lease ends "
"""What is in a refusal of a folder that another process writes, and in no other: it ends of itself
when that process is gone."""
_SURE = 0.9
_ATTEMPTS = 10


class Lease:
    """A lease that was acquired: renewed by a thread until it is released, or lost."""

    def __init__(self, directory: Any, holder: Holder, until: float, shadow: float) -> None:
        """Keep a lease; made by `acquire`.

        Args:
            directory: that of the run, a `StorePath`.
            holder: this process.
            until: when it is lost unless it is renewed, by `clock`.
            shadow: until when another may believe that it still has it, by `clock`.
        """
        self.directory = directory
        self._holder = holder
        self._place = holders.place_of(directory, holder.number)
        self._until, self._shadow = until, shadow
        self._lost: str | None = None
        self._renewing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._guard = os.fspath(directory)
        self._permit = self._require  # one object, to be known again
        files.guards[self._guard] = self._permit
        _leases.add(self)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether it is lost, as far as this process knows; no request is made."""
        return self._why() is not None

    def check(self) -> None:
        """Refuse to go on where the lease is lost, as far as this process knows.

        Raises:
            RunError: saying why.
        """
        why = self._why()
        if why is not None:
            raise RunError(
                f"{self.directory} is not written by this process any more: its lease, of "
                f"{self._holder}, {why}. What was saved before is as it was."
            )

    def renew(self) -> None:
        """Look who holds it, and make it last for `TTL` seconds more.

        Raises:
            RunError: if it is lost.
            OSError: if the store does not answer; it is lost only when its time is over.
        """
        with self._renewing:
            self.check()
            began = clock()
            highest, _ = holders.highest(self.directory)
            if highest is None or highest.number < self._holder.number:
                self._lost = "was deleted"
            elif highest.number > self._holder.number:
                self._lost = f"was taken over by {highest}"
            elif highest.token != self._holder.token:
                self._lost = f"was acquired at the same time by {highest}"
            self.check()
            self._place.write_bytes(self._holder.text())
            self._until = began + _SURE * self._holder.ttl
        self.check()

    def release(self) -> None:
        """End it, as far as the store answers; what is lost is left to others."""
        self._ended.set()
        with self._renewing:
            if files.guards.get(self._guard) is self._permit:
                del files.guards[self._guard]
            _leases.discard(self)
            if self.lost:
                return
            self._lost = "is released"
        with contextlib.suppress(OSError):  # it ends of itself
            for name in files.names(self.directory / LOCK):
                if not name.isdecimal() or int(name) < self._holder.number:
                    (self.directory / LOCK / name).unlink(missing_ok=True)
            if clock() < self._shadow:
                self._place.write_bytes(dataclasses.replace(self._holder, released=True).text())
            else:
                self._place.unlink(missing_ok=True)

    def leave_to_parent(self) -> None:
        """Be lost, in a fork: the process that acquired it has it."""
        self._lost = "is that of the process that this one was forked from"
        self._renewing = threading.Lock()
        self._ended = threading.Event()

    def _require(self, url: str) -> None:
        if not url.startswith(f"{self._guard}/{LOCK}/"):
            self.check()

    def _why(self) -> str | None:
        if self._lost is None and clock() >= self._until:
            self._lost = f"could not be renewed within its {self._holder.ttl:.0f} seconds"
        return self._lost

    def _keep(self) -> None:
        wait = self._holder.ttl / 4
        while not self._ended.wait(wait):
            try:
                self.renew()
            except RunError as error:
                sys.stderr.write(f"{error}\n")
                return
            except OSError:  # it may answer before the time is over
                wait = self._holder.ttl / 40
            else:
                wait = self._holder.ttl / 4


_leases: set[Lease] = set()
"""Those that are to be released when the program ends."""


def acquire(directory: Any, *, take_over: bool = False) -> Lease:
    """Acquire the lease of a folder in a store.

    Args:
        directory: a `StorePath`.
        take_over: end the lease of another process where one is held. That process stops when it
            next looks: a quarter of `TTL` later, or at its next checkpoint.

    Raises:
        RunError: if another process holds it, saying which.
        OSError: if the store refuses or does not answer.
    """
    taken: str | None = None
    for _ in range(_ATTEMPTS):
        highest, before = holders.highest(directory)
        shadow = 0.0
        if highest is not None:
            try:
                ends = holders.ends_at(directory, highest)
                over = holders.is_dead(highest) or ends <= holders.store_time(directory)
            except FileNotFoundError:  # released in this instant
                continue
            held = not (over or highest.released)
            if held and not (take_over and taken in (None, highest.token)):
                raise RunError(_refusal(directory, highest, ends))
            taken = highest.token if held else taken
            shadow = 0.0 if over else clock() + highest.ttl
        ours = holders.this_process(1 if highest is None else highest.number + 1)
        until = clock() + _SURE * ours.ttl
        if _create(directory, ours, before):
            return Lease(directory, ours, until, shadow)
    raise RunError(f"--run-dir {directory} is being acquired by others at once. Try again.")


def refuse_held(directory: Any) -> None:
    """Refuse a folder in a store whose lease another process holds.

    Raises:
        RunError: if one does, saying which.
        OSError: if the store refuses or does not answer.
    """
    with contextlib.suppress(FileNotFoundError):  # released in this instant
        highest, _ = holders.highest(directory)
        if highest is None or highest.released or holders.is_dead(highest):
            return
        ends = holders.ends_at(directory, highest)
        if ends > holders.store_time(directory):
            raise RunError(_refusal(directory, highest, ends))


class Seen(NamedTuple):
    """What a reader sees of a lease that is not released.

    Attributes:
        holder: who acquired it.
        age: seconds since it was renewed.
        dead: whether its holder ran on this machine and does not any more.
    """

    holder: Holder
    age: float
    dead: bool

    @property
    def held(self) -> bool:
        """Whether it stops others."""
        return not self.dead and self.age < self.holder.ttl


def look(directory: Any) -> Seen | None:
    """Look at the lease of a folder in a store; None where there is none that is not released.

    Nothing is written: the time is told by the store's clock if this process has read it, otherwise
    by this host's.

    Raises:
        OSError: if the store refuses or does not answer.
    """
    try:
        highest, _ = holders.highest(directory)
        if highest is None or highest.released:
            return None
        renewed = holders.ends_at(directory, highest) - highest.ttl
    except FileNotFoundError:  # released in this instant
        return None
    age = max(0.0, holders.known_time(directory) - renewed)
    return Seen(highest, age, holders.is_dead(highest))


def is_held(directory: Any) -> bool | None:
    """Tell whether a process holds the lease of a folder in a store, as a reader sees it.

    None where the store does not answer.
    """
    try:
        seen = look(directory)
    except OSError:
        return None
    return seen is not None and seen.held


def _create(directory: Any, ours: Holder, before: list[int]) -> bool:
    """Make the object of a lease; tell whether it is ours, and the highest."""
    place, text = holders.place_of(directory, ours.number), ours.text()
    # where it exists already, that may be by a request of ours whose answer was lost
    kept = not place.create(text) or not place.create(text)
    if not kept:
        time.sleep(SETTLE)
    try:
        won = holders.read(directory, ours.number).token == ours.token
    except FileNotFoundError:
        won = False
    if won and set(holders.numbers(directory)) - {*before, ours.number}:
        place.unlink(missing_ok=True)
        won = False
    return won


def _refusal(directory: Any, highest: Holder, ends: float) -> str:
    when = datetime.datetime.fromtimestamp(ends).astimezone().isoformat(timespec="seconds")
    return (
        f"--run-dir {directory} is being written by {highest}{LEASED}{when} unless it is "
        "renewed. Wait until it ends, stop that process, or take another --run-dir. If it is gone "
        "already, --take-over does not wait; if it is not, that stops it."
    )


def _release_all() -> None:
    for lease in list(_leases):
        lease.release()


# Before the interpreter ends the pools whose threads a request may need; `atexit` comes after.
threading._register_atexit(_release_all)  # type: ignore[attr-defined]
