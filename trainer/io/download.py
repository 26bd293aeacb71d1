"""Local copies of remote files, and their checksums."""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
import uuid
from typing import Any, BinaryIO

import tensorflow as tf

from trainer.core.errors import DataError
from trainer.io import files


def checksum(path: str, role: str) -> str:
    """SHA-256 (hex) of a file.

    Args:
        path: on a disk, in a bucket or https://.
        role: the flag that names the file, without dashes, for errors.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(local_copy(path, role), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"--{role}: cannot read {path}: {files.reason(error)}") from error


def local_copy(path: str, role: str) -> str:
    """A file on this machine's disk with the content of `path`: itself, or a copy in the cache.

    Args:
        path: on a disk, in a bucket or https://. The cache knows a copy by its address and the
            version at the server.
        role: the flag that names the file, without dashes, for errors.

    Raises:
        DataError: it does not exist or cannot be fetched whole.
    """
    if files.scheme(path) == "http":
        raise DataError(
            f"--{role}: {path} is not encrypted, so anybody on the way can change it; use https:// or gs://"
        )
    if not _is_https(path) and not files.exists(path):
        raise DataError(f"--{role}={path}: there is no such file")
    if not files.is_remote(path):
        return path
    part = ""
    try:
        key = hashlib.sha256(f"{path} {_version(path)}".encode()).hexdigest()[:16]
        name = urllib.parse.urlparse(path).path.rsplit("/", 1)[-1][-80:]
        cached = os.path.join(files.cache_folder(), f"{key}-{name}")
        if os.path.exists(cached):
            return cached
        part = f"{cached}.{uuid.uuid4().hex[:8]}.part"
        with open(part, "wb") as target:
            _copy(path, role, target)
            target.flush()
            os.fsync(target.fileno())
        os.replace(part, cached)
    except (OSError, tf.errors.OpError) as error:  # URLError is an OSError
        raise DataError(f"--{role}: cannot fetch {path}: {getattr(error, 'reason', None) or error}") from error
    finally:
        if part and os.path.exists(part):
            os.unlink(part)
    return cached


def _is_https(path: str) -> bool:
    return files.scheme(path) == "https"


def _version(path: str) -> str:
    if not _is_https(path):
        status = tf.io.gfile.stat(path)
        return f"{status.length} {status.mtime_nsec}"
    try:
        with _open(path, "HEAD") as response:
            return " ".join(response.headers.get(name) or "" for name in ("ETag", "Last-Modified", "Content-Length"))
    except urllib.error.HTTPError as error:
        if error.code in (403, 405, 501):  # a URL signed for GET alone, or a server without HEAD
            return ""
        raise


def _open(url: str, method: str = "GET") -> Any:
    response = urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=60)
    if not _is_https(response.url):
        response.close()
        raise OSError(f"it redirects to {response.url.split('?')[0]}, which is not encrypted")
    return response


def _copy(path: str, role: str, target: BinaryIO) -> None:
    if not _is_https(path):
        target.write(files.read(path, f"the {role}"))
        return
    with _open(path) as response:
        shutil.copyfileobj(response, target, 1 << 20)
        promised = response.headers.get("Content-Length")
    if promised is not None and target.tell() != int(promised):
        raise OSError(f"only {target.tell():,} of {int(promised):,} bytes arrived")
