"""Where a data set is written: a local folder, or a bucket. The same steps for both.

An upload to a bucket is resumable; the server gets the CRC32C first and refuses other bytes. An
object is only replaced if it still has the generation that was listed when the destination was
opened, so that a second writer is noticed and two data sets do not mix.
"""

from __future__ import annotations

import abc
import contextlib
import fcntl
import io
import os
import posixpath
import shutil
import tempfile
from typing import BinaryIO

from trainer.core.errors import DataError
from trainer.io import bucket, files

REQUEST_SECONDS = 60.0  # how long one request to a bucket may be without an answer
RETRY_SECONDS = 600.0  # how long one request to a bucket is repeated
_BLOCK_BYTES = 8 << 20
_SHARDS = "funmatch-shards-"  # begins the names of local folders of shards to upload


def open_destination(folder: str) -> Destination:
    """The destination at `folder`, on a disk or in a bucket.

    Raises:
        DataError: it cannot be written to, or there are no credentials.
    """
    return BucketDestination(folder) if files.is_remote(folder) else LocalDestination(folder)


class Destination(abc.ABC):
    """A place for shards and small files. One process writes to it at a time.

    Attributes:
        folder: as the user named it.
        local: where shards are first written, on this machine's disk.
        writers: shards that are worth making at a time, at least.
    """

    folder: str
    local: str
    writers: int

    @abc.abstractmethod
    def close(self) -> None:
        """Lets another process write here."""

    @abc.abstractmethod
    def holds(self, name: str, size: int, crc32c: int) -> bool:
        """Whether the file `name` exists with this length and CRC32C.

        Args:
            name: relative to the destination.
            size: bytes.
            crc32c: of its content.
        """

    @abc.abstractmethod
    def send(self, name: str, size: int, crc32c: int) -> None:
        """Brings a finished shard from `local` to its place.

        Args:
            name: relative to both.
            size: bytes.
            crc32c: of its content.

        Raises:
            DataError: that failed.
        """

    @abc.abstractmethod
    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it does not exist."""

    @abc.abstractmethod
    def write(self, name: str, content: bytes, *, new: bool = False) -> bool:
        """Writes a small file.

        Args:
            name: relative to the destination.
            content: all of it.
            new: the file must not exist yet.

        Returns:
            Whether it was written: False only with `new`.

        Raises:
            DataError: it cannot be written.
        """

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Deletes a file; one that is gone already is fine."""

    @abc.abstractmethod
    def remove_folder(self, name: str, last: str = "") -> None:
        """Deletes a folder of small files; the one named `last` goes last."""

    @abc.abstractmethod
    def changed(self, shards: dict[str, tuple[int, int]]) -> list[str]:
        """Of these names with lengths and CRC32Cs, those that do not exist so."""


class LocalDestination(Destination):
    """A local folder."""

    writers = 1

    def __init__(self, folder: str) -> None:
        """
        Raises:
            DataError: it is not writable, or another process is writing to it.
        """
        self.folder = self.local = folder
        files.require_writable(folder, "--out")
        try:
            self._lock = _lock_folder(folder)
        except BlockingIOError:
            raise DataError(
                f"--out={folder} is being written by another process: let it finish, or choose another --out"
            ) from None
        if self._lock >= 0:
            for inside in (folder, files.join(folder, ".incomplete")):
                files.remove_temporary(inside)  # of processes that were killed
            with contextlib.suppress(OSError):
                os.rmdir(files.join(folder, ".incomplete"))  # if it is empty

    def close(self) -> None:
        """Lets another process write here."""
        self._lock = _unlock(self._lock)

    def holds(self, name: str, size: int, crc32c: int) -> bool:
        """See `Destination`. Reads the file."""
        import google_crc32c

        path, checksum = files.join(self.folder, name), 0
        try:
            if os.path.getsize(path) != size:
                return False
            with open(path, "rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    checksum = google_crc32c.extend(checksum, block)
        except OSError:
            return False
        return checksum == crc32c

    def send(self, name: str, size: int, crc32c: int) -> None:
        """See `Destination.send`; does nothing, since `local` is the destination."""

    def read(self, name: str) -> bytes | None:
        """See `Destination`."""
        path = files.join(self.folder, name)
        return files.read(path, "a file") if files.exists(path) else None

    def write(self, name: str, content: bytes, *, new: bool = False) -> bool:
        """See `Destination`."""
        path = files.join(self.folder, name)
        if not new:
            files.write(path, content, "a file")
            return True
        files.make_folder(posixpath.dirname(path), "a file")
        try:
            with open(path, "xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        except OSError as error:
            raise DataError(f"cannot write {path}: {files.reason(error)}") from error
        return True

    def remove(self, name: str) -> None:
        """See `Destination`."""
        files.remove(files.join(self.folder, name))

    def remove_folder(self, name: str, last: str = "") -> None:
        """See `Destination`."""
        folder = files.join(self.folder, name)
        for file in sorted(files.names(folder), key=lambda file: file == last):
            files.remove(files.join(folder, file))
        shutil.rmtree(folder, ignore_errors=True)

    def changed(self, shards: dict[str, tuple[int, int]]) -> list[str]:
        """See `Destination`. Looks at lengths only."""
        changed = []
        for name, (size, _) in shards.items():
            path = files.join(self.folder, name)
            if not os.path.exists(path) or os.path.getsize(path) != size:
                changed.append(name)
        return changed


class BucketDestination(Destination):
    """A prefix of a bucket."""

    writers = 4

    def __init__(self, folder: str, flag: str = "--out", *, reading: bool = False) -> None:
        """
        Args:
            folder: gs://BUCKET/PREFIX or gs://BUCKET.
            flag: with its dashes, for errors.
            reading: nothing is going to be written.

        Raises:
            DataError: it cannot be listed or written to, or there are no credentials.
        """
        self.folder, self.local = folder.rstrip("/"), ""
        self._lock = -1
        self._bucket, prefix = bucket.open_bucket(folder, flag, REQUEST_SECONDS, RETRY_SECONDS)
        self._prefix = f"{prefix}/" if prefix else ""
        self._objects = self._list()
        if reading:
            return
        # Permissions are checked before the work.
        probe = f"{self._prefix}.write-probe-{os.urandom(4).hex()}"
        self._bucket.write(probe, b"", 0)
        self._bucket.delete(probe)
        _remove_abandoned()
        # Locked before it has the name that other processes look for, so that none of them takes
        # it for abandoned.
        unlocked = tempfile.mkdtemp(prefix="funmatch-")
        self._lock = _lock_folder(unlocked)
        name = _SHARDS + os.path.basename(unlocked).removeprefix("funmatch-")
        self.local = os.path.join(os.path.dirname(unlocked), name)
        os.rename(unlocked, self.local)

    def close(self) -> None:
        """Removes the shards that were not sent."""
        if self.local:
            shutil.rmtree(self.local, ignore_errors=True)
        self._lock = _unlock(self._lock)

    def names(self) -> dict[str, str]:
        """The objects as they were at the start, each with a text that changes when it does."""
        return {name: str(info.generation) for name, info in self._objects.items() if not name.endswith("/")}

    def holds(self, name: str, size: int, crc32c: int) -> bool:
        """Whether the object existed when the destination was opened, with this length and CRC32C.

        Args:
            name: below the prefix.
            size: bytes.
            crc32c: of its content.
        """
        return _matches(self._objects.get(name), size, crc32c)

    def send(self, name: str, size: int, crc32c: int) -> None:
        """Uploads a finished shard, unless the bucket has it already, and removes it here.

        Args:
            name: of the file in `local`, and of the object below the prefix.
            size: bytes.
            crc32c: of its content.

        Raises:
            DataError: it cannot be uploaded, or another process wrote this object.
        """
        path = files.join(self.local, name)
        try:
            if not self.holds(name, size, crc32c):
                with open(path, "rb") as file:
                    self._replace(name, file, size, crc32c)
            os.unlink(path)
        except OSError as error:
            raise DataError(f"cannot read the shard {path}: {files.reason(error)}; the same command resumes") from error

    def read(self, name: str) -> bytes | None:
        """The content of a small object; None if it does not exist."""
        generation, content = self._bucket.read(self._prefix + name)
        return content if generation else None

    def write(self, name: str, content: bytes, *, new: bool = False) -> bool:
        """Writes a small object, in place of the generation that this process knows.

        Args:
            name: below the prefix.
            content: all of it.
            new: the object must not exist yet.

        Returns:
            Whether it was written: False only with `new`.

        Raises:
            DataError: it cannot be written, or another process wrote this object.
        """
        import google_crc32c

        size, crc32c = len(content), google_crc32c.value(content)
        if not new:
            self._replace(name, io.BytesIO(content), size, crc32c)
            return True
        try:
            self._objects[name] = self._bucket.upload(self._prefix + name, io.BytesIO(content), size, crc32c, 0)
        except bucket.Conflict:
            return False
        return True

    def remove(self, name: str) -> None:
        """Deletes an object; one that is gone already is fine."""
        self._bucket.delete(self._prefix + name)
        self._objects.pop(name, None)

    def remove_folder(self, name: str, last: str = "") -> None:
        """Deletes all objects under a prefix; the one named `last` goes last."""
        for path in sorted(self._list(f"{name}/"), key=lambda path: path == f"{name}/{last}"):
            self.remove(path)

    def changed(self, shards: dict[str, tuple[int, int]]) -> list[str]:
        """Of these names with lengths and CRC32Cs, those that the bucket does not hold so."""
        objects = self._list()
        return [name for name, (size, crc32c) in shards.items() if not _matches(objects.get(name), size, crc32c)]

    def _list(self, under: str = "") -> dict[str, bucket.ObjectInfo]:
        """The objects by their names below the prefix."""
        objects = self._bucket.list(self._prefix + under)
        return {name.removeprefix(self._prefix): info for name, info in objects.items()}

    def _replace(self, name: str, content: BinaryIO, size: int, crc32c: int) -> None:
        """Uploads an object in place of the generation that this process knows."""
        current = self._objects.get(name)
        try:
            info = self._bucket.upload(self._prefix + name, content, size, crc32c, current.generation if current else 0)
        except bucket.Conflict:
            # It is our own upload if an earlier try was served and its answer was lost.
            stored = self._bucket.stat(self._prefix + name)
            if stored is None or not _matches(stored, size, crc32c):
                raise DataError(
                    f"{self.folder}/{name} was written by another process meanwhile: let one job finish, then run this "
                    "one again, or choose another --out"
                ) from None
            info = stored
        self._objects[name] = info


def _matches(info: bucket.ObjectInfo | None, size: int, crc32c: int) -> bool:
    return info is not None and (info.size, info.crc32c) == (size, crc32c)


def _lock_folder(folder: str) -> int:
    """Locks a local folder until the returned handle is closed or the process ends.

    Returns:
        The handle; -1 where the file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return -1
    return handle


def _unlock(handle: int) -> int:
    """Closes a handle of `_lock_folder`, and returns the one that stands for no lock."""
    if handle >= 0:
        os.close(handle)
    return -1


def _remove_abandoned() -> None:
    """Removes local folders of shards whose processes were killed before the upload."""
    for name in os.listdir(tempfile.gettempdir()):
        path = os.path.join(tempfile.gettempdir(), name)
        if not name.startswith(_SHARDS):
            continue
        with contextlib.suppress(OSError):
            if (handle := _lock_folder(path)) >= 0:
                shutil.rmtree(path, ignore_errors=True)
                os.close(handle)


def mark(path: str) -> str:
    """A text that changes when a local file does; empty for remote and missing files."""
    if files.is_remote(path):
        return ""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}"
