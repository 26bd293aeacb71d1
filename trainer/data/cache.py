"""Copies of remote shards on this machine's disk, for splits that do not fit into memory.

All runs share them.

A copy is keyed by the shard's CRC32C and length, so splits and data sets that share a shard share
its copy. The folder:

    shards/CRC32C-BYTES.tfrecord    the copies; shards on a local disk are read in place
    index/SPLIT-CLASSES.npy         where a split's records are, memory-mapped
    leases/ID.json                  the copies in use by a living process, which locks the file; the
                                    kernel releases the lock when the process ends, however it ends
    lock                            held while space is allocated

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
from trainer.data.dataset import INDEX_FILE, Dataset, Shard, Split
from trainer.data.records import CorruptRecordLog, EncodedShard
from trainer.io import files

_RESERVED_BYTES = 1 << 30  # left free on the disk if no limit is given
_COPY_THREADS = 4  # each holds a whole shard in memory
_SPARE_FILES = 256  # that this process may open beside the shards


def copy_name(shard: Shard) -> str:
    """Returns the file name of a shard's copy."""
    return f"{shard.crc32c:08x}-{shard.bytes}.tfrecord"


@dataclasses.dataclass(frozen=True)
class DiskSpace:
    """Disk space for copies of shards.

    Attributes:
        required: bytes of all copies needed, including those already present.
        available: bytes they may take: what the limit or the disk leaves once all copies not in
            use are deleted.
    """

    required: int
    available: int


class Cache:
    """The cache in a folder, as used by one process.

    Its leases last until `close` or until it is garbage-collected.
    """

    def __init__(self, folder: str, limit: int = 0) -> None:
        """
        Args:
            folder: on a local disk; created if missing.
            limit: bytes that all copies together may take; 0: the free disk space less 1 GiB.
        """
        self.folder, self._limit = folder, limit
        self._leases: list[int] = []
        weakref.finalize(self, _close, self._leases)

    def space(self, splits: list[tuple[Dataset, Split]]) -> DiskSpace:
        """Returns the disk space that copies of `splits` require and that is available."""
        required = {
            copy_name(shard): shard.bytes
            for dataset, split in splits
            if files.is_remote(dataset.folder)
            for shard in split.shards
        }
        if not required:
            return DiskSpace(0, 0)
        with self._locked():
            in_use = sum(size for name, size in self._leased().items() if name not in required)
            return DiskSpace(sum(required.values()), self._capacity() - in_use)

    def open(
        self,
        dataset: Dataset,
        split: Split,
        progress: Callable[[int, int], None] = lambda *_: None,
        corrupt: CorruptRecordLog | None = None,
    ) -> list[EncodedShard]:
        """Opens the shards of a split.

        Copies the remote ones that are missing, and checks what was never checked.

        Args:
            dataset: the data set of the split.
            split: which split to open.
            progress: called with the number of bytes copied or checked so far and in all.
            corrupt: collects corrupt records; by default the first one raises.

        Raises:
            DataError: a shard is missing or damaged, or the copies do not fit.
        """
        corrupt = corrupt or CorruptRecordLog(dataset, split)
        remote = files.is_remote(dataset.folder)
        if remote:
            self._lease({copy_name(shard): shard.bytes for shard in split.shards})
        index_path = os.path.join(self.folder, "index", f"{split.crc32c}-{len(dataset.classes)}.npy")
        index = _load_index(index_path, split)
        if index is not None and (corrupt.max_fraction or (index["offset"] < 0).any()):
            index = None  # it was built under another limit on corrupt records
        unchecked = {copy_name(s): s for s in split.shards if index is None or (remote and not self._has(s))}
        done, total, lock = 0, sum(shard.bytes for shard in unchecked.values()), threading.Lock()

        def fetch(shard: Shard) -> np.ndarray:
            nonlocal done
            entries = self._fetch(dataset, shard, remote, corrupt)
            with lock:
                done += shard.bytes
                progress(done, total)
            return entries

        with concurrent.futures.ThreadPoolExecutor(_COPY_THREADS) as pool:
            try:
                entries = dict(zip(unchecked, pool.map(fetch, unchecked.values()), strict=True))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # do not wait for the other shards
                raise
        if index is None:
            index = _save_index(index_path, np.concatenate([entries[copy_name(shard)] for shard in split.shards]))
        _raise_open_file_limit(len(split.shards))
        opened, start = [], 0
        for shard in split.shards:
            path = self._path(dataset, shard, remote)
            opened.append(EncodedShard(path, index[start : start + shard.examples], _open(path, shard)))
            start += shard.examples
        return opened

    def _path(self, dataset: Dataset, shard: Shard, remote: bool) -> str:
        if remote:
            return os.path.join(self.folder, "shards", copy_name(shard))
        return files.join(dataset.folder, shard.file)

    def _has(self, shard: Shard) -> bool:
        try:
            return os.path.getsize(os.path.join(self.folder, "shards", copy_name(shard))) == shard.bytes
        except OSError:
            return False

    def _fetch(self, dataset: Dataset, shard: Shard, remote: bool, corrupt: CorruptRecordLog) -> np.ndarray:
        """Checks a shard, copies it if it is remote and has no copy, and returns its index."""
        path = self._path(dataset, shard, remote)
        source = files.join(dataset.folder, shard.file)
        if not remote:
            return records.index_shard(dataset, shard, files.read(source, "a shard"), source, corrupt)
        # The lock's holder copies; another process waits here and then uses the copy.
        with _flock(f"{path}.copying"):
            if self._has(shard):
                return records.index_shard(dataset, shard, files.read(path, "a copy of a shard"), path, corrupt)
            content = files.read(source, "a shard")
            entries = records.index_shard(dataset, shard, content, source, corrupt)
            if google_crc32c.value(content) != shard.crc32c:
                # The cache is keyed by CRC32C, so a corrupt copy would be served to every run that
                # shares this shard.
                raise DataError(
                    f"{source} does not have the CRC32C in {INDEX_FILE}: it was damaged after it was prepared. "
                    "--store=disk shares copies between runs and keeps none of a damaged shard, whatever "
                    "--max_bad_fraction: copy the shard again, or leave its bad records out with --store=host"
                )
            files.write(path, content, "a copy of a shard")
            return entries

    @contextmanager
    def _locked(self) -> Iterator[None]:
        for part in ("shards", "index", "leases"):
            files.make_folder(os.path.join(self.folder, part), "copies of shards (--cache_dir)")
        with _flock(os.path.join(self.folder, "lock")):
            yield

    def _lease(self, required: dict[str, int]) -> None:
        """Leases the copies `required` (bytes by name), and deletes others until they fit.

        Raises:
            DataError: there is not enough space.
        """
        with self._locked():
            leased = self._leased() | required
            capacity, size = self._capacity(), sum(leased.values())
            if size > capacity:
                shortage = describe_shortage(DiskSpace(size, capacity), self.folder)
                raise DataError(f"{shortage} (all runs on this machine together)")
            shards = os.path.join(self.folder, "shards")
            for name in os.listdir(shards):  # files of processes that ended while they copied
                if not name.endswith(".tfrecord") and name.split(".tfrecord")[0] + ".tfrecord" not in leased:
                    os.unlink(os.path.join(shards, name))
            copies = self._copies()
            least_recent_first = sorted((copy.last_used, name) for name, copy in copies.items() if name not in leased)
            total = size + sum(copies[name].bytes for _, name in least_recent_first)
            for _, name in least_recent_first:
                if total <= capacity:
                    break
                os.unlink(os.path.join(shards, name))
                total -= copies[name].bytes
            path = os.path.join(self.folder, "leases", f"{uuid.uuid4().hex}.json")
            with open(path, "x") as file:
                json.dump(required, file)
            handle = os.open(path, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._leases.append(handle)
            for name in required.keys() & copies.keys():
                os.utime(os.path.join(shards, name))

    def _leased(self) -> dict[str, int]:
        """Returns bytes by name of all copies in use by living processes.

        Deletes the leases of dead ones.
        """
        leased: dict[str, int] = {}
        folder = os.path.join(self.folder, "leases")
        for lease in os.listdir(folder):
            path = os.path.join(folder, lease)
            with open(path) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    leased |= json.load(file)
                else:
                    os.unlink(path)
        return leased

    def _copies(self) -> dict[str, _Copy]:
        with os.scandir(os.path.join(self.folder, "shards")) as entries:
            return {e.name: _Copy(e.stat().st_size, e.stat().st_mtime) for e in entries if e.name.endswith(".tfrecord")}

    def _capacity(self) -> int:
        """Returns the bytes that all copies together may take."""
        copied = sum(copy.bytes for copy in self._copies().values())
        on_disk = max(0, shutil.disk_usage(self.folder).free - _RESERVED_BYTES) + copied
        return min(self._limit, on_disk) if self._limit else on_disk

    def close(self) -> None:
        """Releases the leases: other runs may delete the copies."""
        _close(self._leases)


@dataclasses.dataclass(frozen=True)
class _Copy:
    """A copy's length in bytes and the time of its last use, in seconds since the epoch."""

    bytes: int
    last_used: float


def _close(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())


def describe_shortage(space: DiskSpace, folder: str) -> str:
    """Returns one line for users about copies that do not fit into the cache at `folder`."""
    return (
        f"copies of the shards take {space.required / 2**30:.2f} GiB and --cache_dir={folder} has room for "
        f"{max(0, space.available) / 2**30:.2f} GiB: give a larger --cache_gb if that is the limit, a --cache_dir on a "
        "larger disk, or smaller images"
    )


@contextmanager
def _flock(path: str) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _load_index(path: str, split: Split) -> np.ndarray | None:
    """Loads a saved index, memory-mapped; None if it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            crc, left = google_crc32c.Checksum(), os.path.getsize(path) - 4
            while left > 0:
                crc.update(file.read(min(left, 1 << 24)))
                left -= min(left, 1 << 24)
            if file.read() != crc.digest():
                return None
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return index if index.dtype == records.INDEX_DTYPE and index.shape == (split.examples,) else None


def _save_index(path: str, index: np.ndarray) -> np.ndarray:
    """Saves an index followed by its CRC32C, and returns it memory-mapped."""
    buffer = io.BytesIO()
    np.save(buffer, index)
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
        raise DataError(f"{path} has {size} bytes; {INDEX_FILE} says {shard.bytes}: prepare or copy it again")
    return handle


def _raise_open_file_limit(shards: int) -> None:
    """Raises this process's soft limit of open files.

    Shards stay open, so that deleting one does not break a run.

    Raises:
        DataError: the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(os.listdir("/proc/self/fd")) + shards + _SPARE_FILES
    if soft == resource.RLIM_INFINITY or limit <= soft:
        return
    if hard != resource.RLIM_INFINITY and limit > hard:
        raise DataError(
            f"{shards} shards must be open at once and this process may open {hard} files: raise the limit "
            f"(`ulimit -Hn {limit}`)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
