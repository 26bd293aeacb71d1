"""Where a data set is written: a local folder, or a bucket by google-cloud-storage. The same steps for both.

An upload to a bucket is resumable and goes on after a broken connection; the server gets the CRC32C first and refuses
other bytes; an object is only ever replaced if it is still the one that was seen when the place was opened, so that a
second writer is noticed and not mixed with. Credentials are the application's default ones.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import posixpath
import shutil
import struct
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from trainer.core.errors import DataError
from trainer.io import files

_CHUNK = 8 << 20  # of an upload: what is sent again when a connection breaks, and held in memory by each thread
_PATIENCE = 600.0  # seconds that one request is retried
_SHARDS = "funmatch-shards-"  # begins the names of folders of shards on their way to a bucket


def open_destination(folder: str) -> LocalDestination:
    """The place at `folder`, on a disk or gs://.

    Raises:
        DataError: it cannot be written to, or there are no credentials.
    """
    if folder.startswith("gs://"):
        return GcsDestination(folder)
    if files.is_remote(folder):
        raise DataError(f"--out={folder}: data sets are written to local folders and to gs://")
    return LocalDestination(folder)


class LocalDestination:
    """A local folder.

    Attributes:
        folder: as the user named it.
        local: where shards are first written, on this machine's disk.
        writers: shards that are worth making at a time, at least.
    """

    writers = 1

    def __init__(self, folder: str) -> None:
        self.folder = self.local = folder
        files.require_writable(folder, "--out")
        self._lock = _hold(folder)
        if self._lock is None:
            raise DataError(
                f"--out={folder} is being written by another process: let it finish, or choose another --out"
            )
        if self._lock >= 0:
            for inside in (folder, files.join(folder, ".incomplete")):
                files.remove_temporary(inside)  # of processes that were killed
            with contextlib.suppress(OSError):
                os.rmdir(files.join(folder, ".incomplete"))  # if it is empty

    def close(self) -> None:
        """Lets another process write here."""
        if self._lock is not None and self._lock >= 0:
            os.close(self._lock)
            self._lock = None

    def holds(self, name: str, size: int, crc32c: int) -> bool:
        """Whether the file `name` is there with this length and CRC32C."""
        import google_crc32c

        path, crc = files.join(self.folder, name), 0
        try:
            if os.path.getsize(path) != size:
                return False
            with open(path, "rb") as file:
                while block := file.read(_CHUNK):
                    crc = google_crc32c.extend(crc, block)
        except OSError:
            return False
        return crc == crc32c

    def send(self, name: str, size: int, crc32c: int) -> None:
        """Brings the finished file `name` from `local` to its place."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it is not there."""
        path = files.join(self.folder, name)
        return files.read(path, "a file") if files.exists(path) else None

    def write(self, name: str, content: bytes, *, new: bool = False) -> bool:
        """Writes a small file. With `new` it must not be there yet; returns whether it was written."""
        path = files.join(self.folder, name)
        if new:
            files.make_folder(posixpath.dirname(path), "a file")
            try:
                with open(path, "xb") as file:
                    file.write(content)
            except FileExistsError:
                return False
            except OSError as error:
                raise DataError(f"cannot write {path}: {files.reason(error)}") from error
            return True
        files.write(path, content, "a file")
        return True

    def remove(self, name: str) -> None:
        """Deletes a file; one that is gone already is fine."""
        files.remove(files.join(self.folder, name))

    def remove_folder(self, name: str, last: str = "") -> None:
        """Deletes a folder with small files; the one named `last` goes last."""
        folder = files.join(self.folder, name)
        for found in sorted(files.names(folder), key=lambda found: found == last):
            files.remove(files.join(folder, found))
        shutil.rmtree(folder, ignore_errors=True)

    def changed(self, shards: dict[str, tuple[int, int]]) -> list[str]:
        """Of these names with lengths and CRC32Cs, those that are not there so (any more)."""
        wrong = []
        for name, (size, _) in shards.items():
            path = files.join(self.folder, name)
            if not os.path.exists(path) or os.path.getsize(path) != size:
                wrong.append(name)
        return wrong


class GcsDestination(LocalDestination):
    """A prefix of a bucket."""

    writers = 4

    def __init__(self, folder: str, flag: str = "--out", *, reading: bool = False) -> None:
        bucket, _, prefix = folder.removeprefix("gs://").rstrip("/").partition("/")
        self.folder, self.local = folder.rstrip("/"), ""
        self._lock = None
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._threads = threading.local()
        self._credentials: Any = None
        if not bucket:
            raise DataError(f"{flag}={folder}: the name of a bucket is missing")
        if not os.environ.get("STORAGE_EMULATOR_HOST"):
            import google.auth

            with self._plainly("find credentials for"):
                scope = "https://www.googleapis.com/auth/devstorage.read_write"
                self._credentials, _ = google.auth.default(scopes=[scope])
        self._seen = self._list()
        if reading:
            return
        with self._plainly("write to"):
            # An empty object, sent and taken away: permissions are known before the work.
            probe = self._blob(f".write-probe-{os.urandom(4).hex()}")
            probe.upload_from_string(b"", if_generation_match=0, retry=_retry())
            probe.delete(retry=_retry())
        _sweep_temporary()
        # Locked before it has the name that others look for, so that none of them takes it for a dead process's.
        made = tempfile.mkdtemp(prefix="funmatch-")
        self._lock = _hold(made)
        self.local = os.path.join(os.path.dirname(made), _SHARDS + os.path.basename(made).removeprefix("funmatch-"))
        os.rename(made, self.local)

    def close(self) -> None:
        """Removes the shards that were on their way."""
        if self.local:
            shutil.rmtree(self.local, ignore_errors=True)
        super().close()

    def names(self) -> dict[str, str]:
        """The objects that were there when the place was opened, and a mark that changes when one does."""
        return {name: str(generation) for name, (generation, _, _) in self._seen.items() if not name.endswith("/")}

    def holds(self, name: str, size: int, crc32c: int) -> bool:
        """Whether the object was there when the place was opened, with this length and CRC32C."""
        found = self._seen.get(name)
        return found is not None and found[1:] == (size, crc32c)

    def send(self, name: str, size: int, crc32c: int) -> None:
        """Uploads a finished shard, unless the bucket has it already, and removes it here."""
        path = files.join(self.local, name)
        if not self.holds(name, size, crc32c):
            self._upload(name, path, size, crc32c)
        os.unlink(path)

    def read(self, name: str) -> bytes | None:
        """The content of a small object; None if it is not there."""
        from google.api_core import exceptions

        with self._plainly("read from"):
            try:
                return bytes(self._blob(name).download_as_bytes(retry=_retry()))
            except exceptions.NotFound:
                return None

    def write(self, name: str, content: bytes, *, new: bool = False) -> bool:
        """Writes a small object, in place of the one that this process knows of, if any."""
        import google_crc32c

        path = files.join(self.local, f"small-{threading.get_ident()}")
        with open(path, "wb") as file:
            file.write(content)
        try:
            self._upload(name, path, len(content), google_crc32c.value(content), 0 if new else None)
        except _Taken:
            if new:
                return False
            raise
        finally:
            os.unlink(path)
        return True

    def remove(self, name: str) -> None:
        """Deletes an object; one that is gone already is fine."""
        from google.api_core import exceptions

        with self._plainly("delete from"), contextlib.suppress(exceptions.NotFound):
            self._blob(name).delete(retry=_retry())
        self._seen.pop(name, None)

    def remove_folder(self, name: str, last: str = "") -> None:
        """Deletes all objects under a prefix; the one named `last` goes last."""
        for found in sorted(self._list(f"{name}/"), key=lambda found: found == f"{name}/{last}"):
            self.remove(found)

    def changed(self, shards: dict[str, tuple[int, int]]) -> list[str]:
        """Of these names with lengths and CRC32Cs, those that the bucket does not hold so (any more)."""
        there = self._list()
        return [name for name, known in shards.items() if name not in there or there[name][1:] != known]

    def _list(self, under: str = "") -> dict[str, tuple[int, int, int]]:
        """Generation, length and CRC32C of the objects, by their names below the prefix."""
        with self._plainly("list"):
            found = self._client().list_blobs(
                self._bucket,
                prefix=self._prefix + under,
                fields="items(name,generation,size,crc32c),nextPageToken",
                retry=_retry(),
            )
            return {
                blob.name[len(self._prefix) :]: (int(blob.generation), int(blob.size), _number(blob.crc32c))
                for blob in found
            }

    def _upload(self, name: str, path: str, size: int, crc32c: int, generation: int | None = None) -> None:
        from google.api_core import exceptions

        known = self._seen.get(name, (0, 0, 0))[0] if generation is None else generation
        blob = self._blob(name)
        # The server refuses other bytes: a damaged object never becomes visible.
        blob.crc32c = base64.b64encode(struct.pack(">I", crc32c)).decode()
        with self._plainly("write to"):
            try:
                blob.upload_from_filename(
                    path,
                    content_type="application/octet-stream",
                    if_generation_match=known,
                    checksum="crc32c",
                    retry=_retry(),
                )
            except exceptions.PreconditionFailed:
                # Ours already, if the answer to an earlier try was lost.
                blob.reload(retry=_retry())
                if generation == 0 or (blob.size, _number(blob.crc32c)) != (size, crc32c):
                    raise _Taken(
                        f"gs://{self._bucket}/{self._prefix}{name} was written by somebody else meanwhile: let one job "
                        "finish, then run this one again, or choose another --out"
                    ) from None
        if (blob.size, _number(blob.crc32c)) != (size, crc32c):
            raise DataError(f"{self.folder}/{name} arrived damaged: its CRC32C is not that of what was sent; run again")
        self._seen[name] = (int(blob.generation), size, crc32c)

    def _blob(self, name: str) -> Any:
        return self._client().bucket(self._bucket).blob(self._prefix + name, chunk_size=_CHUNK)

    def _client(self) -> Any:
        """This thread's client: its connections are not made for several."""
        if not hasattr(self._threads, "client"):
            from google.cloud import storage

            more = {"credentials": self._credentials, "project": "unused"} if self._credentials else {}
            self._threads.client = storage.Client(**more)
        return self._threads.client

    @contextlib.contextmanager
    def _plainly(self, verb: str) -> Iterator[None]:
        """Turns what the libraries raise into one line."""
        import requests
        from google.api_core import exceptions
        from google.auth import exceptions as auth
        from google.cloud.storage import exceptions as storage_exceptions

        where = f"gs://{self._bucket}/{self._prefix}"
        try:
            yield
        except auth.DefaultCredentialsError as error:
            raise DataError(
                f"cannot {verb} {where}: there are no Google credentials here. On your machine: gcloud auth "
                "application-default login; in a job: its service account, or GOOGLE_APPLICATION_CREDENTIALS"
            ) from error
        except exceptions.NotFound as error:
            raise DataError(f"cannot {verb} {where}: there is no bucket {self._bucket}") from error
        except (exceptions.Forbidden, exceptions.Unauthorized) as error:
            raise DataError(
                f"cannot {verb} {where}: no permission. The account needs storage.objects.get, list, create and delete "
                f"on the bucket, which roles/storage.objectAdmin gives ({files.reason(error)})"
            ) from error
        except storage_exceptions.DataCorruption as error:
            raise DataError(f"cannot {verb} {where}: what arrived was damaged on its way; run again") from error
        except (
            exceptions.GoogleAPIError,
            auth.GoogleAuthError,
            storage_exceptions.InvalidResponse,
            requests.RequestException,
            OSError,
        ) as error:
            raise DataError(f"cannot {verb} {where}: {files.reason(error)}; the same command goes on") from error


def _hold(folder: str) -> int | None:
    """Locks a local folder until the handle that it returns is closed, or the process ends, however it does.

    None: another process holds it. -1: the file system has no locks.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        os.close(handle)
        return -1
    return handle


def _sweep_temporary() -> None:
    """Removes folders of shards on their way whose processes were killed."""
    for name in os.listdir(tempfile.gettempdir()):
        path = os.path.join(tempfile.gettempdir(), name)
        if not name.startswith(_SHARDS):
            continue
        with contextlib.suppress(OSError):
            if (handle := _hold(path)) is not None and handle >= 0:
                shutil.rmtree(path, ignore_errors=True)
                os.close(handle)


class _Taken(DataError):
    """Another writer was there."""


def _retry() -> Any:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(_PATIENCE)


def _number(crc32c: str | None) -> int:
    """A CRC32C as Cloud Storage writes it, as a number."""
    return int(struct.unpack(">I", base64.b64decode(crc32c or "AAAAAA=="))[0])


def tree(folder: str) -> list[tuple[tuple[str, ...], str]]:
    """All files under `folder`, sorted: the parts of each relative path, and a mark that changes when the file does.

    Raises:
        DataError: there is no such folder, or it cannot be listed.
    """
    if folder.startswith("gs://"):
        place = GcsDestination(folder, "--dataset", reading=True)
        return sorted((tuple(name.split("/")), mark) for name, mark in place.names().items())
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: there is no such folder")
    found: list[tuple[tuple[str, ...], str]] = []
    for where, _, names in os.walk(folder, followlinks=True):
        below = os.path.relpath(where, folder)
        parts = () if below == "." else tuple(below.split(os.sep))
        for name in names:
            found.append(((*parts, name), mark(os.path.join(where, name))))
    return sorted(found)


def mark(path: str) -> str:
    """A mark that changes when a local file does; empty for other files, and for one that is not there."""
    if files.is_remote(path):
        return ""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}"
