"""Local copies of remote files, and their checksums."""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
import uuid
from typing import Any

import tensorflow as tf

from trainer.core.errors import DataError
from trainer.io import files


def checksum(path: str, role: str) -> str:
    """SHA-256 (hex) of a file, wherever it lies.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(local_copy(path, role), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"--{role}: cannot read {path}: {files.reason(error)}") from error


def local_copy(path: str, role: str) -> str:
    """A path on this machine's disk with the content of `path`: itself, or a copy in the cache, which is made once.

    Args:
        path: on a disk, gs:// or https://. A copy is known by its address and by what the server says of its version.
        role: the flag whose file it is, for errors.

    Raises:
        DataError: it is not there or cannot be brought here whole.
    """
    if path.startswith("http://"):
        raise DataError(f"--{role}: {path} comes over an open line that anybody can change; use https:// or gs://")
    if not path.startswith("https://") and not files.exists(path):
        raise DataError(f"--{role}={path}: there is no such file")
    if not files.is_remote(path):
        return path
    part = ""
    try:
        key = hashlib.sha256(f"{path} {_version(path)}".encode()).hexdigest()[:16]
        kept = os.path.join(files.cache_folder(), f"{key}-{urllib.parse.urlparse(path).path.rsplit('/', 1)[-1][-80:]}")
        if os.path.exists(kept):
            return kept
        part = f"{kept}.{uuid.uuid4().hex[:8]}.part"
        with open(part, "wb") as target:
            _copy(path, role, target)
            target.flush()
            os.fsync(target.fileno())
        os.replace(part, kept)
    except (OSError, tf.errors.OpError) as error:  # URLError is an OSError
        raise DataError(f"--{role}: cannot fetch {path}: {getattr(error, 'reason', None) or error}") from error
    finally:
        if part and os.path.exists(part):
            os.unlink(part)
    return kept


def _version(path: str) -> str:
    if not path.startswith("https://"):
        found = tf.io.gfile.stat(path)
        return f"{found.length} {found.mtime_nsec}"
    try:
        with _open(path, "HEAD") as answer:
            return " ".join(answer.headers.get(name) or "" for name in ("ETag", "Last-Modified", "Content-Length"))
    except urllib.error.HTTPError as error:
        if error.code in (403, 405, 501):  # an address signed for GET alone, or a server without HEAD
            return ""
        raise


def _open(address: str, method: str = "GET") -> Any:
    answer = urllib.request.urlopen(urllib.request.Request(address, method=method), timeout=60)
    if not answer.url.startswith("https://"):
        answer.close()
        raise OSError(f"it leads to {answer.url.split('?')[0]}, an open line that anybody can change")
    return answer


def _copy(path: str, role: str, target: Any) -> None:
    if not path.startswith("https://"):
        target.write(files.read(path, f"the {role}"))
        return
    with _open(path) as answer:
        shutil.copyfileobj(answer, target, 1 << 20)
        promised = answer.headers.get("Content-Length")
    if promised is not None and target.tell() != int(promised):
        raise OSError(f"{target.tell():,} of {int(promised):,} bytes came")
