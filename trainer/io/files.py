"""Files on a disk and in a bucket alike (tf.io.gfile): reads, atomic writes, errors as one line.

`scheme` is the one function that tells kinds of storage apart. What is peculiar to TensorFlow's
client of one kind stands in `_CLIENTS`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import posixpath
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

from trainer.core.errors import DataError
from trainer.io import gcs_client

gcs_client.set_defaults()  # for programs that do not start with trainer.cli

import tensorflow as tf  # noqa: E402

T = TypeVar("T")

_CLIENTS = {"gs": gcs_client}

_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp|\.write-probe-[0-9a-f]{8}")


def scheme(path: str) -> str:
    """The kind of storage: "gs" for gs://..., "https" for https://...; empty for a local disk."""
    head, separator, _ = path.partition("://")
    return head if separator else ""


def is_remote(path: str) -> bool:
    """True for gs:// and other schemes, whose objects appear whole when their upload completes."""
    return bool(scheme(path))


def join(folder: str, *parts: str) -> str:
    """Joins with slashes, keeping the double one of gs://."""
    return posixpath.join(folder, *parts)


def attempt(work: Callable[[], T], path: str, definite: tuple[type[Exception], ...] = ()) -> T:
    """Calls `work`, up to twice more if a bucket refuses it.

    TensorFlow's client itself repeats what the network or the server failed at, but not what the
    server refused. A refusal may pass: a new permission takes a while to reach all servers.

    Args:
        work: one operation on `path`, which can be repeated.
        path: on a disk nothing is repeated.
        definite: refusals that are not repeated.

    Returns:
        What `work` returned.
    """
    client = _CLIENTS.get(scheme(path))
    for pause in client.REFUSAL_PAUSES if client else ():
        try:
            return work()
        except definite:
            raise
        except _REFUSALS:
            time.sleep(pause)
    return work()


_REFUSALS = (
    tf.errors.PermissionDeniedError,
    tf.errors.UnauthenticatedError,
    tf.errors.NotFoundError,
    tf.errors.FailedPreconditionError,
)


def read(path: str, what: str, size: int = -1) -> bytes:
    """The content of `path`.

    Args:
        path: on a disk or in a bucket.
        what: it holds, for errors.
        size: bytes to read from its start, at most; negative: all.

    Raises:
        DataError: it cannot be read.
    """

    def work() -> bytes:
        with tf.io.gfile.GFile(path, "rb") as file:
            return bytes(file.read(size))

    try:
        return attempt(work, path)
    except tf.errors.OpError as error:
        raise DataError(f"cannot read {what} {path}: {reason(error, path)}") from error


def write(path: str, content: bytes, what: str) -> None:
    """Makes `path` hold `content`, whole or not at all, also if the machine crashes.

    On a disk: a temporary file is flushed and then renamed over `path`. In a bucket an object
    becomes visible only when its upload is complete, so it is written directly (a rename there is
    copy plus delete).

    Args:
        path: on a disk or in a bucket.
        content: all of it.
        what: it holds, for errors.

    Raises:
        DataError: it cannot be written.
    """
    try:
        if is_remote(path):
            attempt(lambda: _upload(path, content), path)
            return
        with replacing(path, what) as file:
            file.write(content)
    except (tf.errors.OpError, OSError) as error:
        raise DataError(f"cannot write {what} {path}: {reason(error, path)}") from error


def _upload(path: str, content: bytes) -> None:
    file = tf.io.gfile.GFile(path, "wb")
    try:
        file.write(content)
        file.close()
    except tf.errors.OpError:
        # GFile's destructor retries a failed upload twice. That triples the time until the error
        # is raised, and can write after another job has taken the lease over. The extra reference
        # keeps the destructor from running.
        if (inner := getattr(file, "_writable_file", None)) is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(inner))
        raise


@contextlib.contextmanager
def replacing(path: str, what: str) -> Iterator[BinaryIO]:
    """A new local file. It replaces `path` at the end, or is deleted if an error is raised.

    Args:
        path: on a disk.
        what: it holds, for errors.

    Yields:
        The open file.

    Raises:
        DataError: its folder cannot be created.
        OSError: it cannot be written.
    """
    make_folder(posixpath.dirname(path), what)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    sync_folder(posixpath.dirname(path))


def sync_folder(path: str) -> None:
    """Makes new names in a local folder survive a power failure."""
    handle = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: str, what: str) -> None:
    """Creates a folder and its parents. A bucket needs none.

    Raises:
        DataError: it cannot be created, or it is a file.
    """
    try:
        if path and not is_remote(path):
            os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create the folder of {what} {path}: {reason(error)}") from error


def is_temporary(name: str) -> bool:
    """Whether `replacing` or `require_writable` make temporary files of such names."""
    return bool(_TEMPORARY.fullmatch(name))


def remove_temporary(folder: str) -> None:
    """Deletes the temporary files that crashes left; only for a folder's one writer."""
    for name in names(folder):
        if is_temporary(name):
            remove(join(folder, name))


def require_writable(folder: str, what: str) -> None:
    """Writes, reads back and deletes a small file, so that a job fails before its work.

    Raises:
        DataError: one of these failed.
    """
    probe = join(folder, f".write-probe-{uuid.uuid4().hex[:8]}")
    try:
        content = uuid.uuid4().hex.encode()
        write(probe, content, what)
        if read(probe, what) != content:
            raise DataError("what was written is not what is read back")
        attempt(lambda: tf.io.gfile.remove(probe), probe)
    except (tf.errors.OpError, DataError) as error:
        cause = error.__cause__ if isinstance(error, DataError) else error  # without the probe
        message = reason(cause, folder) if cause else str(error)
        raise DataError(
            f"{what} {folder} is not writable: {message}; choose another or change its permissions"
        ) from error


def copy_tree(source: str, target: str, what: str, last: str) -> None:
    """Copies the files of a folder to another.

    Args:
        source: on a disk or in a bucket.
        target: on a disk or in a bucket.
        what: they hold, for errors.
        last: name of the file that is copied last. Where it is present, the copy is complete.

    Raises:
        DataError: it cannot be read or written.
    """
    try:
        paths = [join(folder, name) for folder, _, file_names in tf.io.gfile.walk(source) for name in file_names]
    except tf.errors.OpError as error:
        raise DataError(f"cannot list {source}: {reason(error, source)}") from error
    for path in sorted(paths, key=lambda path: (posixpath.basename(path) == last, path)):
        write(join(target, posixpath.relpath(path, source)), read(path, what), what)


def exists(path: str) -> bool:
    """Whether `path` exists.

    Raises:
        DataError: that cannot be known (no permission, no such bucket).
    """
    try:
        return bool(attempt(lambda: tf.io.gfile.exists(path), path))
    except tf.errors.OpError as error:
        raise DataError(f"cannot look at {path}: {reason(error, path)}") from error


# Seconds after which "not found" of a list can only be the end of the client's tries. Trying once
# more would double them.
_LIST_SECONDS = 30.0


def names(folder: str) -> list[str]:
    """Names directly in `folder`, sorted, without trailing slashes; none if it does not exist.

    Raises:
        DataError: it cannot be listed.
    """
    try:
        return sorted(attempt(lambda: _list(folder), folder, (tf.errors.NotFoundError,)))
    except tf.errors.NotFoundError:
        return []
    except tf.errors.OpError as error:
        raise DataError(f"cannot list {folder}: {reason(error, folder)}") from error


def _list(folder: str) -> set[str]:
    started = time.monotonic()
    try:
        return {name.rstrip("/") for name in tf.io.gfile.listdir(folder)}
    except tf.errors.NotFoundError:
        if not is_remote(folder):
            raise
        # listdir raises "not found" also where the bucket refuses or does not answer. A run would
        # conclude that it has no checkpoints and start again. glob raises the right error. It also
        # lists subfolders, so it is only the second try.
        if time.monotonic() > started + _LIST_SECONDS:
            raise tf.errors.UnavailableError(None, None, "no answer to a list") from None
        prefix = folder.rstrip("/") + "/"
        return {path.removeprefix(prefix).split("/")[0] for path in tf.io.gfile.glob(prefix + "*")}


def remove(path: str) -> None:
    """Deletes a file or object; one that is gone already is fine.

    Raises:
        DataError: it cannot be deleted.
    """
    try:
        attempt(lambda: tf.io.gfile.remove(path), path, (tf.errors.NotFoundError,))
    except tf.errors.NotFoundError:
        pass
    except tf.errors.OpError as error:
        raise DataError(f"cannot delete {path}: {reason(error, path)}") from error


def cache_folder() -> str:
    """For downloads: $FUNMATCH_CACHE, else ~/.cache/funmatch, else a temporary folder."""
    home = os.environ.get("FUNMATCH_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "funmatch")
    try:
        os.makedirs(home, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    except OSError:
        pass
    return _temporary_folder()


@functools.cache
def _temporary_folder() -> str:
    """One folder for this process, deleted when it ends."""
    folder = tempfile.mkdtemp(prefix="funmatch-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def reason(error: BaseException, path: str = "") -> str:
    """The first line of an error; with a `path` in a bucket, also what to do about it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(getattr(error, "message", None) or str(error) or type(error).__name__)
    client = _CLIENTS.get(scheme(path))
    return client.explain(text, path) if client else text.splitlines()[0].strip()
