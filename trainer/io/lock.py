"""One writer for a workdir: a file lock on a disk, a lease in a bucket.

On a disk the kernel holds the lock (flock) and drops it with the process. A bucket has no locks.
There the writer owns an object, which it rewrites four times in each lease on the condition that
it has not changed (a generation precondition). Another job that finds the object watches it for
one lease. If it changes, its owner is alive and the job is refused. If not, the owner is dead and
the job takes the object over, on the same condition. Clocks of two machines are never compared.
"""

from __future__ import annotations

import contextlib
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
from trainer.io import bucket, files
from trainer.io.bucket import Conflict, NoCredentials, Unavailable

NAME = ".lock"
_RENEWALS = 4  # per lease
_POLL_SECONDS = 2.0
# Limits of one request and of its repetitions: a renewal that fails must fail well within the
# lease.
_REQUEST_SECONDS, _RETRY_SECONDS = 10.0, 20.0


class WorkdirLock(Protocol):
    """The right to write to a workdir."""

    def check(self) -> None:
        """To be called before each commit.

        Raises:
            DataError: another job has the workdir, or may have it.
        """

    def release(self) -> None:
        """Lets another job write to the workdir."""


@contextlib.contextmanager
def hold_workdir(workdir: str, console: Console, lease: float = 60.0) -> Iterator[WorkdirLock]:
    """Makes this process the only writer of `workdir`, which exists.

    Args:
        workdir: on a disk or in a bucket.
        console: gets a line when a lease of another job is waited for, and a warning when there is
            no lock.
        lease: in a bucket, seconds without a renewal after which another job may take over; 0: no
            lock.

    Yields:
        The lock. It is released at the end.

    Raises:
        DataError: another process is writing to it; the text says which.
    """
    lock: WorkdirLock
    if not files.is_remote(workdir):
        lock = _lock_file(files.join(workdir, NAME), console)
    elif bucket.is_bucket(workdir) and lease:
        lock = _lease_object(files.join(workdir, NAME), console, lease)
    else:
        console.warning(f"nothing keeps a second job from writing to {workdir}")
        lock = Unlocked()
    try:
        yield lock
    finally:
        lock.release()


class Unlocked:
    """A `WorkdirLock` that keeps no other job out."""

    def check(self) -> None:
        """Never raises."""

    def release(self) -> None:
        """Does nothing."""


def _owner() -> dict[str, Any]:
    """Identifies this process, and describes it for messages."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid(), "since": now}


def _refusal(path: str, content: bytes) -> DataError:
    try:
        owner = json.loads(content)
        process = f"process {owner['process']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        process = "another process"
    return DataError(
        f"--workdir={path.removesuffix('/' + NAME)} is in use by {process}: wait until it ends, stop it, or choose "
        "another workdir"
    )


class _FileLock:
    """A locked file in the workdir."""

    def __init__(self, path: str, handle: int) -> None:
        self._path, self._handle = path, handle

    def check(self) -> None:
        if not _is_at(self._path, self._handle):
            raise DataError(
                f"{self._path} was removed or replaced, so another job may be writing there: nothing more is written"
            )

    def release(self) -> None:
        # Removed before it is unlocked: a process that then gets the lock sees that the file is
        # not at its path.
        with contextlib.suppress(OSError):
            if _is_at(self._path, self._handle):
                os.unlink(self._path)
        os.close(self._handle)


def _is_at(path: str, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False


def _lock_file(path: str, console: Console) -> WorkdirLock:
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
        if _is_at(path, handle):  # otherwise its owner removed it between the two calls
            break
        os.close(handle)
    with contextlib.suppress(OSError):  # a full disk must not stop a finished job
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(_owner()).encode(), 0)
    return _FileLock(path, handle)


class LeaseStore(Protocol):
    """The methods of a bucket that a lease needs: reads, and changes on a condition."""

    def read(self, name: str) -> tuple[int, bytes]:
        """See `GcsBucket.read`."""

    def write(self, name: str, content: bytes, generation: int) -> int:
        """See `GcsBucket.write`."""

    def delete(self, name: str, generation: int) -> None:
        """See `GcsBucket.delete`."""


class Lease:
    """The right to write to a workdir in a bucket, which lapses unless it is renewed in time."""

    def __init__(self, path: str, store: LeaseStore, name: str, seconds: float) -> None:
        """
        Args:
            path: of the object, for messages.
            store: the bucket.
            name: of the object in the bucket.
            seconds: without a renewal after which another job may take over.
        """
        self._path, self._store, self._name, self._seconds = path, store, name, seconds
        self._owner = _owner()
        self._generation, self._renewed_at, self._renewals = 0, 0.0, 0
        self._lost: DataError | None = None
        self._failure = ""  # why the last renewal failed; empty if it did not
        self._guard, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)

    def acquire(self, console: Console) -> Lease:
        """Creates the object, or takes over a dead owner's, and starts to renew it.

        Raises:
            DataError: the owner is alive, or the bucket does not answer.
        """
        try:
            generation, _ = self._store.read(self._name)
            if generation:
                console.info(f"{self._path} exists: waiting {self._seconds:.0f} s to see whether its owner is alive")
            deadline = time.monotonic() + self._seconds
            while generation and time.monotonic() < deadline:
                time.sleep(min(_POLL_SECONDS, self._seconds / 10))
                current, content = self._store.read(self._name)
                if current not in (0, generation):
                    raise _refusal(self._path, content)
                generation = current
            try:
                self._write(generation)
            except Conflict:
                raise _refusal(self._path, self._store.read(self._name)[1]) from None
        except Unavailable as error:
            raise DataError(
                f"cannot take {self._path}, which keeps other jobs out: {error.reason}; {error.advice}"
            ) from error
        self._thread.start()
        return self

    def check(self) -> None:
        """See `WorkdirLock`. Renews the lease if half of it has passed."""
        with self._guard:
            if self._lost is None and time.monotonic() > self._renewed_at + self._seconds / 2:
                self._renew()
            if self._lost is not None:
                raise self._lost
            if (age := time.monotonic() - self._renewed_at) > self._seconds:
                raise DataError(
                    f"{self._path} could not be renewed for {age:.0f} s ({self._failure}), so another job may be writing "
                    "there: nothing more is written; give the same command again"
                )

    def release(self) -> None:
        """See `WorkdirLock`."""
        self._stop.set()
        if self._failure:
            return  # a delete would fail as slowly; the lease lapses without one
        self._thread.join()
        if self._lost is None:
            with contextlib.suppress(Conflict, Unavailable):
                self._store.delete(self._name, self._generation)

    def _keep_renewing(self) -> None:
        while not self._stop.wait(self._seconds / _RENEWALS):
            with self._guard:
                self._renew()
            if self._lost is not None:
                return

    def _renew(self) -> None:
        try:
            self._write(self._generation)
            self._failure = ""
        except Conflict:
            self._lost = DataError(
                f"{self._path} was taken over by another job while this one did not renew it: nothing more is written"
            )
        except Unavailable as error:
            self._failure = error.reason

    def _write(self, generation: int) -> None:
        # Counted from before the request: the bucket may have served it at once and answered late.
        started, self._renewals = time.monotonic(), self._renewals + 1
        content = json.dumps(self._owner | {"turn": self._renewals}).encode()
        try:
            self._generation = self._store.write(self._name, content, generation)
        except Conflict:
            # The client repeats a request whose answer was lost. Then the object holds what was
            # just written.
            current, stored = self._store.read(self._name)
            if stored != content:
                raise
            self._generation = current
        self._renewed_at = started


def _lease_object(path: str, console: Console, seconds: float) -> WorkdirLock:
    try:
        store, name = bucket.open_bucket(path, "--workdir", _REQUEST_SECONDS, _RETRY_SECONDS)
    except NoCredentials as error:
        console.warning(f"{path} cannot be taken ({error.reason}): nothing keeps a second job out")
        return Unlocked()
    return Lease(path, store, name, seconds).acquire(console)
