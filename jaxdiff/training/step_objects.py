"""The checkpoints of a run in an object store, where nothing is renamed: the seal commits.

A step is written on the local disk, sealed there, and sent to `<step>/`, its `SHA256SUMS` last:
what has none is an unfinished save or deletion, which nobody takes for a checkpoint. Deletion goes
the other way, the seal first. A step is brought back whole, held against its seal on the local
disk, and read there, so that what is believed is what was verified.

A state that is spread over several processes is written by orbax to its place at once, each process
its part; process 0 then brings it back to seal what is there.
"""

import contextlib
import errno
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdiff import files
from jaxdiff.files.stores import StoreError, StorePath
from jaxdiff.training import checksums, lock, step_folders
from jaxdiff.training.checksums import SEAL, seal

_ATTEMPTS = 3
"""How often what was sent is sent again where the store holds less of it."""


class StepObjects:
    """The steps of a directory in a store; see `step_folders.Steps`."""

    def __init__(self, directory: StorePath) -> None:
        """Name the directory, below which each step has its objects."""
        self.directory = directory
        self._staging = contextlib.ExitStack()
        self._staged: dict[int, Path] = {}
        self._held = contextlib.ExitStack()
        self._verified: dict[int, Path] = {}

    def steps(self) -> list[int]:
        """See `Steps`."""
        return sorted(step for step, names in self._found().items() if SEAL in names)

    def leftovers(self) -> list[files.Path]:
        """See `Steps`."""
        found = self._found()
        return [self._place(step) for step in sorted(found) if SEAL not in found[step]]

    def stage(self, step: int, spread: bool) -> files.Path:
        """See `Steps`; one that is spread is staged in its place, where no other may be then."""
        self.unstage(step)
        place = self._place(step)
        if spread:
            if (place / SEAL).exists() and self.find_damage(step, None, ()) is not None:
                self._put_aside(step)
            self._delete(step)
        else:
            self._staged = {step: self._staging.enter_context(files.scratch()) / str(step)}
            self._staged[step].mkdir()
        return self.staged(step, spread)

    def staged(self, step: int, spread: bool) -> files.Path:
        """See `Steps`."""
        return self._place(step) if spread else self._staged[step]

    def unstage(self, step: int) -> None:
        """See `Steps`; what was sent of it stays, without a seal, until the next save."""
        self._staged = {}
        self._staging.close()

    @contextlib.contextmanager
    def opened(self, step: int) -> Iterator[Path]:
        """See `Steps`; held against its seal, if `find_damage` has not just done so.

        Raises:
            StoreError: if what came is not what was sealed.
        """
        with contextlib.ExitStack() as held:
            if step in self._verified:
                held.callback(self.close)
                yield self._verified[step]
                return
            copy = self._bring(step, held.enter_context(files.scratch()) / str(step))
            damage = checksums.find_damage(copy, step_folders.CONTENTS)
            if damage is not None:
                raise StoreError(errno.EIO, f"what came of it is {damage}", str(self._place(step)))
            yield copy

    def find_damage(
        self, step: int, config: Mapping[str, Any] | None, free: Collection[str]
    ) -> str | None:
        """See `Steps`.

        Raises:
            StoreError: if the store does not answer, which is no damage.
        """
        self.close()
        with contextlib.ExitStack() as held:
            try:
                copy = self._bring(step, held.enter_context(files.scratch()) / str(step))
            except FileNotFoundError as error:
                return f"incomplete ({error.filename} is missing)"
            damage = step_folders.damage_of(copy, step, config, free)
            if damage is None:
                self._held, self._verified = held.pop_all(), {step: copy}
            return damage

    def commit(
        self, step: int, keys: Mapping[str, str], damage_of: Callable[[int], str | None]
    ) -> str | None:
        """See `Steps`."""
        folder, message, made = self._place(step), None, self._staged.get(step)
        there: dict[str, int] = {}
        try:
            if made is None:  # it is there, in parts of several processes
                made = self._bring(step, self._staging.enter_context(files.scratch()) / str(step))
                there = files.sizes(made)
            elif SEAL in (left := folder.sizes()):
                damage = damage_of(step)
                if damage is None:
                    return f"{folder} already holds a sound checkpoint; it is kept."
                message = f"{folder} is {damage}; moved to {self._put_aside(step)}."
            elif left:
                files.remove_tree(folder)
            step_folders.describe(made, step, keys)
            seal(made)
            self._send(made, folder, there)
        finally:
            self.unstage(step)
        return message

    def retire(self, step: int) -> None:
        """See `Steps`."""
        (self._place(step) / SEAL).unlink(missing_ok=True)

    def clear(self) -> None:
        """See `Steps`."""
        for path in self.leftovers():
            files.remove_tree(path)

    def close(self) -> None:
        """See `Steps`."""
        self._verified = {}
        self._held.close()

    def _place(self, step: int) -> StorePath:
        place: StorePath = self.directory / str(step)
        return place

    def _found(self) -> dict[int, set[str]]:
        """Return the names of the objects of each step, sealed or not."""
        found: dict[int, set[str]] = {}
        for name in self.directory.sizes():
            step, _, rest = name.partition("/")
            if rest and step_folders.COMMITTED.fullmatch(step):
                found.setdefault(int(step), set()).add(rest)
        return found

    def _bring(self, step: int, to: Path) -> Path:
        """Copy the objects of a step to a local folder that does not exist."""
        folder = self._place(step)
        for name in folder.sizes():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).get(to / name)
        to.mkdir(parents=True, exist_ok=True)
        return to

    def _send(self, made: Path, folder: StorePath, there: dict[str, int]) -> None:
        """Copy what is not there of a sealed local folder to the store, the seal at the end."""
        wanted = {name: size for name, size in files.sizes(made).items() if name != SEAL}
        for _ in range(_ATTEMPTS):
            for name, size in wanted.items():
                if there.get(name) != size:
                    (folder / name).put(made / name)
            there = folder.sizes()
            if there == wanted:
                lock.require_held(self.directory)
                (folder / SEAL).put(made / SEAL)
                return
        wrong = {name for name, _ in wanted.items() ^ there.items()}
        said = ", ".join(f"{n}: {wanted.get(n, 0)}, {there.get(n, 0)}" for n in sorted(wrong))
        raise StoreError(
            errno.EIO, f"the store holds other sizes than were sent ({said})", str(folder)
        )

    def _put_aside(self, step: int) -> StorePath:
        """Copy a damaged step to where nobody takes it for one, then delete it."""
        folder = self._place(step)
        aside: StorePath = step_folders.free_name(folder)
        with files.scratch() as local:
            copy = self._bring(step, local / str(step))
            for name in files.names(copy):
                (aside / name).put(copy / name)
        self._delete(step)
        return aside

    def _delete(self, step: int) -> None:
        self.retire(step)
        files.remove_tree(self._place(step))
