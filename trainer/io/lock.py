"""One writer for a workdir: a lock that dies with its process on a disk, a lease that runs out in a bucket.

On a disk the kernel holds the lock (flock), so that a killed process leaves none behind. A bucket has no locks. There the writer
owns an object, which it writes anew four times in each lease on the condition that nobody else has (a generation precondition).
Whoever finds the object waits for a change: one within the lease says that the owner lives, none that it is dead and that the
object may be taken over, on the same condition. No clocks of two machines are compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, Protocol

from trainer.core.console import Console
from trainer.core.errors import DataError
from trainer.io import files
from trainer.io.bucket import Conflict, Unavailable, raise_conflicts, request_options, translate_errors

NAME = ".lock"
_RENEWALS = 4  # in the time of a lease
_POLL_SECONDS = 2.0


class WorkdirLock(Protocol):
    """A workdir that is ours."""

    def check(self) -> None:
        """To be called before each commit.

        Raises:
            DataError: the workdir is not ours any more, or that cannot be known.
        """

    def release(self) -> None:
        """Gives the workdir back."""


@contextlib.contextmanager
def hold_workdir(workdir: str, console: Console, lease: float = 60.0) -> Iterator[WorkdirLock]:
    """Makes this process the only writer of `workdir`, which is there.

    Args:
        workdir: on a disk or gs://.
        console: tells people of what is waited for, or cannot be had.
        lease: for gs://, seconds without a sign of life after which others may take over; 0: nobody is kept out.

    Raises:
        DataError: another process is its writer; the text says which.
    """
    held: WorkdirLock
    if not files.is_remote(workdir):
        held = _on_disk(files.join(workdir, NAME), console)
    elif workdir.startswith("gs://") and lease:
        held = _in_bucket(files.join(workdir, NAME), console, lease)
    else:
        console.warning(f"nothing keeps a second job from writing to {workdir}")
        held = Unlocked()
    try:
        yield held
    finally:
        held.release()


class Unlocked:
    """Where locks cannot be had."""

    def check(self) -> None:
        """See `Held`."""

    def release(self) -> None:
        """See `Held`."""


def _card() -> dict[str, Any]:
    """Who we are, for people."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid(), "since": now}


def _refusal(path: str, content: bytes) -> DataError:
    try:
        card = json.loads(content)
        who = f"process {card['process']} on {card['host']} since {card['since']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return DataError(
        f"--workdir={path.removesuffix('/' + NAME)} is in use by {who}: wait until it ends, stop it, or choose another workdir"
    )


class _Disk:
    """A lock on a file of the workdir."""

    def __init__(self, path: str, handle: int) -> None:
        self._path, self._handle = path, handle

    def check(self) -> None:
        if not _is_at(self._path, self._handle):
            raise DataError(
                f"{self._path} was removed or replaced, so another job may be writing there: nothing more is written"
            )

    def release(self) -> None:
        # Gone before it is unlocked: who waits for the lock then looks at the path again.
        with contextlib.suppress(OSError):
            if _is_at(self._path, self._handle):
                os.unlink(self._path)
        os.close(self._handle)


def _is_at(path: str, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False


def _on_disk(path: str, console: Console) -> WorkdirLock:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise DataError(f"cannot write the lock {path}: {files.reason(error)}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            content = os.pread(handle, 4096, 0)
            os.close(handle)
            raise _refusal(path, content) from None
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise DataError(f"cannot lock {path}: {files.reason(error)}") from error
            console.warning(f"{path} cannot be locked ({files.reason(error)}): nothing keeps a second job out")
            return Unlocked()
        if _is_at(path, handle):  # else its owner removed it between our two calls
            break
        os.close(handle)
    with contextlib.suppress(OSError):  # a full disk must not stop a job that may only want to finish
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(_card()).encode(), 0)
    return _Disk(path, handle)


class Register(Protocol):
    """An object that is only changed on a condition."""

    def read(self) -> tuple[int, bytes]:
        """Generation and content; generation 0 where there is no object. Raises `Unavailable`."""

    def write(self, content: bytes, generation: int) -> int:
        """Replaces generation `generation` (0: creates) and returns the new one. Raises `Conflict` or `Unavailable`."""

    def delete(self, generation: int) -> None:
        """Raises `Conflict` or `Unavailable`."""


class Lease:
    """A workdir in a bucket that is ours as long as we say so in time."""

    def __init__(self, path: str, register: Register, lease: float) -> None:
        """
        Args:
            path: of the object, for people.
            register: the object.
            lease: seconds without one after which others may take over.
        """
        self._path, self._register, self._renew, self._lease = path, register, lease / _RENEWALS, lease
        self._card = _card()
        self._generation, self._renewed, self._turn = 0, 0.0, 0
        self._lost: DataError | None = None
        self._trouble = ""  # why the last renewal failed, if it did
        self._guard, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def acquire(self, console: Console) -> Lease:
        """Takes the free object, or a dead owner's after `lease` seconds.

        Raises:
            DataError: the owner lives, or the bucket does not answer.
        """
        try:
            found, content = self._register.read()
            if found:
                console.info(f"{self._path} is there: its owner is given {self._lease:.0f} s to show that it lives")
            deadline = time.monotonic() + self._lease
            while found and time.monotonic() < deadline:
                time.sleep(min(_POLL_SECONDS, self._lease / 10))
                now, content = self._register.read()
                if now not in (0, found):
                    raise _refusal(self._path, content)
                found = now
            try:
                self._write(found)
            except Conflict:
                raise _refusal(self._path, self._register.read()[1]) from None
        except Unavailable as error:
            raise DataError(f"cannot take {self._path}, which keeps other jobs out: {error}") from error
        self._thread.start()
        return self

    def check(self) -> None:
        """See `Held`. Renews by itself where the last renewal is old."""
        with self._guard:
            if self._lost is None and time.monotonic() > self._renewed + self._lease / 2:
                self._try()
            if self._lost is not None:
                raise self._lost
            if (age := time.monotonic() - self._renewed) > self._lease:
                raise DataError(
                    f"{self._path} could not be renewed for {age:.0f} s ({self._trouble}), so another job may be writing "
                    "there: nothing more is written; give the same command again"
                )

    def release(self) -> None:
        """See `Held`."""
        self._end.set()
        if self._trouble:
            return  # who is ending because of a silent bucket does not wait for it once more: the lease runs out
        self._thread.join()
        if self._lost is None:
            with contextlib.suppress(Conflict, Unavailable):
                self._register.delete(self._generation)

    def _keep(self) -> None:
        while not self._end.wait(self._renew):
            with self._guard:
                self._try()
            if self._lost is not None:
                return

    def _try(self) -> None:
        try:
            self._write(self._generation)
            self._trouble = ""
        except Conflict:
            self._lost = DataError(
                f"{self._path} was taken over by another job while this one did not answer: nothing more is written"
            )
        except Unavailable as error:
            self._trouble = str(error)

    def _write(self, generation: int) -> None:
        # Counted from before the request: the bucket may have served it at once and answered late.
        began, self._turn = time.monotonic(), self._turn + 1
        content = json.dumps(self._card | {"turn": self._turn}).encode()
        try:
            self._generation = self._register.write(content, generation)
        except Conflict:
            # The client repeats a request whose answer was lost; then the conflict is with ourselves.
            found, there = self._register.read()
            if there != content:
                raise
            self._generation = found
        self._renewed = began


@dataclasses.dataclass(frozen=True)
class BucketObject:
    """A `Register` of google-cloud-storage: an object's name in its bucket."""

    bucket: Any
    name: str

    def read(self) -> tuple[int, bytes]:
        """See `Register`."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        while True:
            # A blob that knows its generation asks for that one alone, so each request has a blob of its own.
            blob = self.bucket.blob(self.name)
            try:
                with translate_errors():
                    blob.reload(**request_options())
            except NotFound:
                return 0, b""
            with (
                contextlib.suppress(NotFound, PreconditionFailed),
                translate_errors(),
            ):  # replaced meanwhile: look again
                return int(blob.generation), blob.download_as_bytes(**request_options())

    def write(self, content: bytes, generation: int) -> int:
        """See `Register`."""
        blob = self.bucket.blob(self.name)
        with translate_errors(), raise_conflicts():
            blob.upload_from_string(content, "application/json", if_generation_match=generation, **request_options())
        return int(blob.generation)

    def delete(self, generation: int) -> None:
        """See `Register`."""
        with translate_errors(), raise_conflicts():
            self.bucket.blob(self.name).delete(if_generation_match=generation, **request_options())


def _in_bucket(path: str, console: Console, lease: float) -> WorkdirLock:
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    bucket, _, name = path.removeprefix("gs://").partition("/")
    try:
        client = storage.Client(project="none")  # objects belong to buckets; no project is ever asked for
    except DefaultCredentialsError as error:
        console.warning(f"{path} cannot be taken ({files.reason(error)}): nothing keeps a second job out")
        return Unlocked()
    return Lease(path, BucketObject(client.bucket(bucket), name), lease).acquire(console)
