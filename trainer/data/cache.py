"""Copies of shards on this machine's disk, for splits that do not fit into memory: made once, checked, shared by all runs.

A shard is known by its CRC32C and length, so splits and data sets with the same shard have one copy. In the folder:

    shards/CRC32C-BYTES.tfrecord    copies; a shard that lies on a disk already is used where it is and has none
    index/SPLIT-CLASSES.npy         where the records of a split are (trainer.data.records.ENTRY), memory-mapped
    leases/ID.json                  the copies that a living process uses; it holds a lock on the file, which the kernel
                                    drops with the process however that ends
    lock                            held while room is made

Safe for any number of processes on one machine, on a file system with flock.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import io
import json
import os
import resource
import shutil
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import google_crc32c
import numpy as np

from trainer.core.errors import DataError
from trainer.data import records
from trainer.data.dataset import INDEX, Dataset, Shard, Split
from trainer.data.records import CorruptRecordLog, EncodedShard
from trainer.io import files

_SPARE = 1 << 30  # bytes that are left free on the disk when no limit is given
_COPIERS = 4  # shards read at a time, each whole in memory


def name(shard: Shard) -> str:
    """The file name of a shard's copy."""
    return f"{shard.crc32c:08x}-{shard.bytes}.tfrecord"


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that some splits take on the disk, and what there is.

    Attributes:
        copies: bytes of copies that must be there, those that are there already included.
        room: bytes that copies may take: what the limit or the disk leaves when all that no living process uses is gone.
    """

    copies: int
    room: int


class Cache:
    """The cache in a folder, as one process sees it."""

    def __init__(self, folder: str, limit: int = 0) -> None:
        """
        Args:
            folder: on this machine's disk; made if it is not there.
            limit: bytes that all copies together may take; 0: what the disk has, but for a gibibyte.
        """
        self.folder, self._limit = folder, limit
        self._leases: list[int] = []
        weakref.finalize(self, _close, self._leases)

    def need(self, splits: list[tuple[Dataset, Split]]) -> Need:
        """What `splits` take and what there is, before anything is copied."""
        wanted = {
            name(s): s.bytes for dataset, split in splits if files.is_remote(dataset.folder) for s in split.shards
        }
        if not wanted:
            return Need(0, 0)
        with self._locked():
            others = {other: size for other, size in self._leased().items() if other not in wanted}
            return Need(sum(wanted.values()), self._room() - sum(others.values()))

    def open(
        self,
        dataset: Dataset,
        split: Split,
        progress: Callable[[int, int], None] = lambda *_: None,
        damage: CorruptRecordLog | None = None,
    ) -> list[EncodedShard]:
        """The shards of a split as open files. What is not here yet is copied, and what was never checked is checked.

        Args:
            dataset, split: which.
            progress: called with bytes copied or checked so far and in all.
            damage: counts bad records; by default the first one is an error.

        Raises:
            DataError: a shard is missing or damaged, or the copies do not fit.
        """
        damage = damage or CorruptRecordLog(dataset, split)
        remote = files.is_remote(dataset.folder)
        if remote:
            self._lease({name(shard): shard.bytes for shard in split.shards})
        index = os.path.join(self.folder, "index", f"{split.crc32c}-{len(dataset.classes)}.npy")
        table = _load(index, split)
        if table is not None and (damage.limit or (table["offset"] < 0).any()):
            table = None  # made by a run that counted otherwise
        todo = {name(s): s for s in split.shards if table is None or (remote and not self._has(s))}
        done, total, lock = 0, sum(shard.bytes for shard in todo.values()), threading.Lock()

        def take(shard: Shard) -> np.ndarray:
            nonlocal done
            found = self._take(dataset, shard, remote, damage)
            with lock:
                done += shard.bytes
                progress(done, total)
            return found

        with concurrent.futures.ThreadPoolExecutor(_COPIERS) as pool:
            try:
                tables = dict(zip(todo, pool.map(take, todo.values()), strict=True))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # the first error ends it, and not after the last shard
                raise
        if table is None:
            table = _store(index, np.concatenate([tables[name(shard)] for shard in split.shards]))
        _allow_open_files(len(split.shards))
        opened, start = [], 0
        for shard in split.shards:
            path = self._path(dataset, shard, remote)
            opened.append(EncodedShard(path, table[start : start + shard.examples], _open(path, shard)))
            start += shard.examples
        return opened

    def _path(self, dataset: Dataset, shard: Shard, remote: bool) -> str:
        return os.path.join(self.folder, "shards", name(shard)) if remote else files.join(dataset.folder, shard.file)

    def _has(self, shard: Shard) -> bool:
        try:
            return os.path.getsize(os.path.join(self.folder, "shards", name(shard))) == shard.bytes
        except OSError:
            return False

    def _take(self, dataset: Dataset, shard: Shard, remote: bool, damage: CorruptRecordLog) -> np.ndarray:
        """Checks a shard, copies it if it lies elsewhere and has no copy, and returns its index."""
        path = self._path(dataset, shard, remote)
        source = files.join(dataset.folder, shard.file)
        if not remote:
            return records.index_shard(dataset, shard, files.read(source, "a shard"), source, damage)
        # Whoever holds this lock copies; another process waits here and finds the copy made.
        with _flock(f"{path}.copying"):
            if self._has(shard):
                return records.index_shard(dataset, shard, files.read(path, "a copy of a shard"), path, damage)
            content = files.read(source, "a shard")
            found = records.index_shard(dataset, shard, content, source, damage)
            if google_crc32c.value(content) != shard.crc32c:
                # The copy would pass for the whole one with every run that has the same shard.
                raise DataError(
                    f"{source} does not have the CRC32C that {INDEX} says: it was damaged after it was prepared. "
                    "--store=disk keeps copies that other runs share, and none of such a shard whatever --max_bad_fraction: "
                    "copy the shard again, or leave its bad records out with --store=host"
                )
            files.write(path, content, "a copy of a shard")
            return found

    @contextmanager
    def _locked(self) -> Iterator[None]:
        for part in ("shards", "index", "leases"):
            files.make_folder(os.path.join(self.folder, part), "copies of shards (--cache_dir)")
        with _flock(os.path.join(self.folder, "lock")):
            yield

    def _lease(self, wanted: dict[str, int]) -> None:
        """Says that this process uses the copies `wanted` (bytes by name), and deletes others until there is room.

        Raises:
            DataError: there is not enough.
        """
        with self._locked():
            leased = self._leased() | wanted
            room, need = self._room(), sum(leased.values())
            if need > room:
                raise DataError(f"{too_little(Need(need, room), self.folder)} (all runs on this machine together)")
            shards = os.path.join(self.folder, "shards")
            for other in os.listdir(shards):  # of a process that ended while it copied
                if not other.endswith(".tfrecord") and other.split(".tfrecord")[0] + ".tfrecord" not in leased:
                    os.unlink(os.path.join(shards, other))
            here = self._copies()
            # The longest unused go first.
            idle = sorted((found.used, other) for other, found in here.items() if other not in leased)
            total = need + sum(here[other].bytes for _, other in idle)
            for _, other in idle:
                if total <= room:
                    break
                os.unlink(os.path.join(shards, other))
                total -= here[other].bytes
            path = os.path.join(self.folder, "leases", f"{uuid.uuid4().hex}.json")
            with open(path, "x") as file:
                json.dump(wanted, file)
            handle = os.open(path, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._leases.append(handle)
            for used in wanted.keys() & here.keys():
                os.utime(os.path.join(shards, used))

    def _leased(self) -> dict[str, int]:
        """Bytes by name of what living processes use; leases of dead ones are deleted."""
        found: dict[str, int] = {}
        folder = os.path.join(self.folder, "leases")
        for lease in os.listdir(folder):
            path = os.path.join(folder, lease)
            with open(path) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    found |= json.load(file)
                else:
                    os.unlink(path)
        return found

    def _copies(self) -> dict[str, _Copy]:
        with os.scandir(os.path.join(self.folder, "shards")) as entries:
            return {e.name: _Copy(e.stat().st_size, e.stat().st_mtime) for e in entries if e.name.endswith(".tfrecord")}

    def _room(self) -> int:
        """Bytes that copies may take in all."""
        here = sum(copy.bytes for copy in self._copies().values())
        on_disk = max(0, shutil.disk_usage(self.folder).free - _SPARE) + here
        return min(self._limit, on_disk) if self._limit else on_disk

    def close(self) -> None:
        """Gives the copies back: another run may delete them. Otherwise this object's end does it."""
        _close(self._leases)


@dataclasses.dataclass(frozen=True)
class _Copy:
    bytes: int
    used: float


def _close(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())


def too_little(need: Need, folder: str) -> str:
    """One line on copies that do not fit."""
    return (
        f"copies of the shards take {need.copies / 2**30:.2f} GiB and --cache_dir={folder} has room for "
        f"{max(0, need.room) / 2**30:.2f} GiB: give a larger --cache_gb if that is the limit, a --cache_dir on a larger disk, "
        "or smaller images"
    )


@contextmanager
def _flock(path: str) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _load(path: str, split: Split) -> np.ndarray | None:
    """An index made earlier, memory-mapped; None if there is none that is whole."""
    try:
        with open(path, "rb") as file:
            crc, left = google_crc32c.Checksum(), os.path.getsize(path) - 4
            while left > 0:
                crc.update(file.read(min(left, 1 << 24)))
                left -= min(left, 1 << 24)
            if file.read() != crc.digest():
                return None
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return table if table.dtype == records.ENTRY and table.shape == (split.examples,) else None


def _store(path: str, table: np.ndarray) -> np.ndarray:
    """Keeps an index, followed by its CRC32C, and returns it memory-mapped."""
    buffer = io.BytesIO()
    np.save(buffer, table)
    buffer.write(google_crc32c.Checksum(buffer.getvalue()).digest())
    files.write(path, buffer.getvalue(), "the index of a split (--cache_dir)")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _open(path: str, shard: Shard) -> int:
    try:
        handle = os.open(path, os.O_RDONLY)
        size = os.fstat(handle).st_size
    except OSError as error:
        raise DataError(f"cannot read a shard {path}: {files.reason(error)}") from error
    if size != shard.bytes:
        raise DataError(f"{path} has {size} bytes; {INDEX} says {shard.bytes}: prepare or copy it again")
    return handle


def _allow_open_files(more: int) -> None:
    """Raises this process's limit of open files: shards stay open, so that nobody can take them away under a run.

    Raises:
        DataError: the system does not let it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + more + 256
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise DataError(
            f"{more} shards must be open at once and this process may open {hard} files: raise it (`ulimit -Hn {wanted}`)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
