"""The records of a data set's array_record files, by index: few files open, what is damaged named.

A file is opened when the first of its records is read, and read at that record alone, whose
checksum array_record compares. What is not what was written is refused by its number in the split,
its file and its place there, whether its bytes were altered, its file is cut short or gone, or it
is no example of such features.
"""

import bisect
import collections
import concurrent.futures
import errno
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxdiff.data.errors import UnreadableError
from jaxdiff.data.extras import require

OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
"""Of array_record, for random access."""
SHORT_FOOTERS = "footer_prefetch_bytes:0"
"""For versions that know it: others read the last MiB of every file that they open."""
BUFFER_BYTES = 8192
"""What is read of a file at once; the default of 1 MiB would be read for every record."""
SHARE_OF_FILES = 8
"""One of so many of the files that a process may open, a split keeps open."""
MAX_OPEN = 2048
SLOW = 3e-3
"""Seconds that reading of one file may take before others are read meanwhile."""
AT_ONCE = 32
"""So many then."""


class Shard(NamedTuple):
    """What a split has of a file."""

    path: str
    skip: int
    """The file's first record that the split has."""
    take: int
    """How many it has from there on."""
    total: int
    """How many records the file holds."""


class Shards(Sequence[Any]):
    """Records by index, decoded. Safe to be read by several threads.

    Args:
        shards: of the split, in order.
        decode: what makes an example of a record.
        title: how messages name the split.
        location: the folder that it is read from.
        max_open: how many files are kept open, the last ones used; by default an eighth of those
            that the process may open (`ulimit -n`), at most 2,048.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        decode: Callable[[bytes], Any],
        title: str,
        location: str,
        max_open: int | None = None,
    ) -> None:
        self._shards, self._decode = tuple(shards), decode
        self._title, self._location = title, location
        self._ends = list(itertools.accumulate(shard.take for shard in self._shards))
        self._max_open = _max_open() if max_open is None else max_open
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __repr__(self) -> str:
        return f"Shards({self._title!r}, {len(self)} records in {len(self._shards)} files)"

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return examples by their numbers in the split.

        Raises:
            IndexError: if there is no such number.
            OSError: if the process may open no further file.
            UnreadableError: a ValueError, if one is damaged, naming it.
        """
        found: list[Any] = [None] * len(indices)
        by_shard = self._by_shard(indices)
        places = [(n, [place for _, place in wanted]) for n, wanted in by_shard.items()]
        for (number, wanted), records in zip(by_shard.items(), self._read_all(places), strict=True):
            for (row, place), record in zip(wanted, records, strict=True):
                try:
                    found[row] = self._decode(record)
                except (MemoryError, ImportError):
                    raise
                except Exception as error:  # decoders raise of every kind
                    raise self._damaged(number, place, _reason(error)) from error
        return found

    def _by_shard(self, indices: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
        """Return, by the number of the file, what is wanted of it: (row, place in the file)."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for row, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"{self._title} has examples 0..{len(self) - 1}; got {index}.")
            number = bisect.bisect_right(self._ends, index)
            shard = self._shards[number]
            place = int(index) - (self._ends[number] - shard.take) + shard.skip
            wanted.setdefault(number, []).append((row, place))
        return wanted

    def _read_all(self, wanted: list[tuple[int, list[int]]]) -> list[Sequence[bytes]]:
        """Read of files, one by one while that is fast, else many at once: a mount answers late."""
        records: list[Sequence[bytes]] = []
        start = time.perf_counter()
        for number, places in wanted:
            if len(records) > 1 and time.perf_counter() - start > SLOW * len(records):
                break
            records.append(self._read(number, places))
        if rest := wanted[len(records) :]:
            at_once = min(len(rest), AT_ONCE, self._max_open)
            with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
                records += pool.map(self._read, *zip(*rest, strict=True))
        return records

    def _read(self, number: int, places: list[int]) -> Sequence[bytes]:
        reader = self._reader(number, places[0])
        try:
            return list(reader.read(places))
        except RuntimeError:  # which of them, and why, shows one by one
            return [self._read_one(reader, number, place) for place in places]

    def _read_one(self, reader: Any, number: int, place: int) -> bytes:
        try:
            return bytes(reader.read([place])[0])
        except RuntimeError as error:
            raise self._damaged(number, place, _reason(error)) from error

    def _reader(self, number: int, place: int) -> Any:
        """Return the open file of a number; what was not used for longest is closed for it.

        It is closed when no thread reads from it any more.
        """
        with self._lock:
            if (reader := self._readers.get(number)) is not None:
                self._readers.move_to_end(number)
                return reader
        opened = self._opened(number, place)  # others may read meanwhile
        with self._lock:
            reader = self._readers.setdefault(number, opened)
            self._readers.move_to_end(number)
            while len(self._readers) > self._max_open:
                self._readers.popitem(last=False)
        return reader

    def _opened(self, number: int, place: int) -> Any:
        module = require("array_record.python.array_record_module")
        shard = self._shards[number]
        known = SHORT_FOOTERS.split(":")[0] in (module.ArrayRecordReader.__init__.__doc__ or "")
        options = f"{OPTIONS},{SHORT_FOOTERS}" if known else OPTIONS
        try:
            reader = module.ArrayRecordReader(
                shard.path, options=options, file_reader_buffer_size=BUFFER_BYTES
            )
            if reader.num_records() == shard.total:
                return reader
            # A file that is cut between two blocks opens as an empty one, and gives empty records.
            reason = f"it holds {reader.num_records()} records, not {shard.total}"
            reader.read([place])
        except RuntimeError as error:
            if os.strerror(errno.EMFILE) in str(error):
                raise OSError(
                    errno.EMFILE,
                    f"too many files are open to read another of {self._title}; allow more by "
                    f"ulimit -n, or keep less than {self._max_open} of them open",
                    shard.path,
                ) from error
            raise self._damaged(number, place, f"the file: {_reason(error)}") from error
        raise self._damaged(number, place, f"the file: {reason}")

    def _damaged(self, number: int, place: int, reason: str) -> UnreadableError:
        shard = self._shards[number]
        index = self._ends[number] - shard.take + place - shard.skip
        return UnreadableError(
            f"{self._title} in {self._location} cannot be read: example {index} is record {place} "
            f"of {os.path.basename(shard.path)}, which is damaged ({reason}). Copy that file anew "
            "from where it is sound, or remove the folder and prepare the set again."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._readers, self._lock = collections.OrderedDict(), threading.Lock()


def shards_of(tfds: Any, source: Any) -> Iterator[Shard]:
    """Yield what a data source of TFDS reads."""
    for each in tfds.core.data_sources.base.file_instructions(source.dataset_info, source.split):
        yield Shard(os.fspath(each.filename), each.skip, each.take, each.examples_in_shard)


def _max_open() -> int:
    try:
        import resource
    except ImportError:  # not a Unix
        return 64
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        return MAX_OPEN
    return min(max(allowed // SHARE_OF_FILES, 1), MAX_OPEN)


def _reason(error: Exception) -> str:
    """Return one line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
