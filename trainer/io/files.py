"""Files on a disk and in a bucket alike (tf.io.gfile): whole reads, atomic whole writes, errors as one line."""

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
from typing import Any, BinaryIO, TypeVar

from trainer.core.errors import DataError
from trainer.io import gcs_client

gcs_client.set_defaults()  # in a program that has not come through trainer.cli

import tensorflow as tf  # noqa: E402

T = TypeVar("T")

_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp|\.write-probe-[0-9a-f]{8}")


def is_remote(path: str) -> bool:
    """True for gs:// and other schemes, whose objects appear whole when their upload completes."""
    return "://" in path


def join(folder: str, *parts: str) -> str:
    """Joins with slashes, keeping the double one of gs://."""
    return posixpath.join(folder, *parts)


def attempt(work: Callable[[], T], path: str, definite: tuple[type[Exception], ...] = ()) -> T:
    """What `work` returns, with up to two more tries where a bucket said no in a way that may pass.

    TensorFlow's client itself repeats what failed on the way or on the server's side. It takes a refusal for an answer, but one
    may come of a permission that has not reached all servers yet.

    Args:
        work: does one thing to `path`, and can do it again.
        path: on a disk nothing is tried twice.
        definite: refusals that are answers.
    """
    for pause in (0.5, 1.5) if path.startswith("gs://") else ():
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


def read(path: str, what: str) -> bytes:
    """The whole content of `path`.

    Raises:
        DataError: it cannot be read; the text says `what` it was meant to be.
    """

    def work() -> bytes:
        with tf.io.gfile.GFile(path, "rb") as file:
            return bytes(file.read())

    try:
        return attempt(work, path)
    except tf.errors.OpError as error:
        raise DataError(f"cannot read {what} {path}: {reason(error, path)}") from error


def write(path: str, content: bytes, what: str) -> None:
    """Makes `path` hold `content`, whole or not at all, through a crash too.

    On a disk: a temporary file, flushed to the platter, then renamed over `path`. In a bucket an object becomes
    visible only when its upload is complete, so it is written directly (a rename there is copy plus delete).

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
        # A file whose upload failed would begin it all over again when it is destroyed, twice: three times as long until
        # the error is told, and once more after the job has given the place up. So it never is.
        if (inner := getattr(file, "_writable_file", None)) is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(inner))
        raise


@contextlib.contextmanager
def replacing(path: str, what: str) -> Iterator[BinaryIO]:
    """A new local file to write in pieces, which takes the place of `path` when all went well, and leaves nothing else.

    Raises:
        DataError: its folder cannot be made.
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
    """Makes the names in a local folder survive a power cut."""
    handle = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: str, what: str) -> None:
    """Creates a folder and its parents; a bucket needs none.

    Raises:
        DataError: it cannot be created, or a file is in its place.
    """
    try:
        if path and not is_remote(path):
            os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create the folder of {what} {path}: {reason(error)}") from error


def is_temporary(name: str) -> bool:
    """Whether a file of this name was one of ours on its way to another name; a crash leaves it behind."""
    return bool(_TEMPORARY.fullmatch(name))


def remove_temporary(folder: str) -> None:
    """Deletes what crashes left of `write` and `require_writable`; only for a folder's one writer."""
    for name in names(folder):
        if is_temporary(name):
            remove(join(folder, name))


def require_writable(folder: str, what: str) -> None:
    """Writes, reads back and deletes a small object in `folder`, so that a job fails before its work and not after.

    Raises:
        DataError: that did not work.
    """
    probe = join(folder, f".write-probe-{uuid.uuid4().hex[:8]}")
    try:
        content = uuid.uuid4().hex.encode()
        write(probe, content, what)
        if read(probe, what) != content:
            raise DataError("what was written is not what is read back")
        attempt(lambda: tf.io.gfile.remove(probe), probe)
    except (tf.errors.OpError, DataError) as error:
        cause = error.__cause__ if isinstance(error, DataError) else error  # what `write` met, without the probe's name
        why = reason(cause, folder) if cause else str(error)
        raise DataError(f"{what} {folder} is not writable: {why}; choose another or change its permissions") from error


def copy_tree(source: str, target: str, what: str, last: str) -> None:
    """Copies the files of a folder to another, on a disk or gs://; the one named `last` comes last, and so says that all is there.

    Raises:
        DataError: it cannot be read or written.
    """
    try:
        found = [join(folder, name) for folder, _, inside in tf.io.gfile.walk(source) for name in inside]
    except tf.errors.OpError as error:
        raise DataError(f"cannot list {source}: {reason(error, source)}") from error
    for path in sorted(found, key=lambda path: (posixpath.basename(path) == last, path)):
        write(join(target, posixpath.relpath(path, source)), read(path, what), what)


def exists(path: str) -> bool:
    """Whether a file or object is at `path`.

    Raises:
        DataError: the answer cannot be had (no permission, no such bucket).
    """
    try:
        return bool(attempt(lambda: tf.io.gfile.exists(path), path))
    except tf.errors.OpError as error:
        raise DataError(f"cannot look at {path}: {reason(error, path)}") from error


# Seconds after which "not found" of a list can only be the end of the client's tries; asking once more would double them.
_PATIENCE = 30.0


def names(folder: str) -> list[str]:
    """Names directly in `folder`, sorted, without trailing slashes; empty if there is no such folder.

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
    began = time.monotonic()
    try:
        return {name.rstrip("/") for name in tf.io.gfile.listdir(folder)}
    except tf.errors.NotFoundError:
        if not folder.startswith("gs://"):
            raise
        # listdir says "not found" of a folder that it was not let to look at, or that did not answer: a run would take its
        # checkpoints for gone, and begin anew. glob says what went wrong. It lists what lies deeper too, hence only now.
        if time.monotonic() > began + _PATIENCE:
            raise tf.errors.UnavailableError(None, None, "no answer to a list") from None
        start = folder.rstrip("/") + "/"
        return {path.removeprefix(start).split("/")[0] for path in tf.io.gfile.glob(start + "*")}


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
    """Where files from elsewhere are kept: $FUNMATCH_CACHE, else ~/.cache/funmatch, else a folder for temporary files."""
    home = os.environ.get("FUNMATCH_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "funmatch")
    try:
        os.makedirs(home, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    except OSError:
        pass
    return _temporary()


@functools.cache
def _temporary() -> str:
    """One folder for this process, gone with it."""
    folder = tempfile.mkdtemp(prefix="funmatch-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def reason(error: Any, path: str = "") -> str:
    """The first line of an error, without TensorFlow's wrapping; with a `path` in a bucket, what to do about it too."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(getattr(error, "message", None) or str(error) or type(error).__name__)
    return gcs_client.explain(text, path) if path.startswith("gs://") else text.splitlines()[0].strip()
