"""Objects in a bucket: conditional writes, retries with a time limit, errors as one line.

The only module that calls google-cloud-storage. Another kind of bucket is a class with the methods
of `GcsBucket` and a row in `_CLASSES`. (TensorFlow's own client, for training, is in files.py and
gcs_client.py.)
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import os
import struct
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

from trainer.core.errors import DataError
from trainer.io import files

# Bytes of an upload that are held in memory by each thread, and sent again when a connection
# breaks.
CHUNK_BYTES = 8 << 20
_READ_WRITE = "https://www.googleapis.com/auth/devstorage.read_write"


class Conflict(Exception):
    """The object does not have the generation that the request requires."""


class Unavailable(DataError):
    """A request failed.

    Attributes:
        reason: what went wrong, without what was attempted.
        advice: what the user can do.
    """

    def __init__(self, attempt: str, reason: str, advice: str) -> None:
        """
        Args:
            attempt: what was attempted, as in "write to gs://bucket/name".
            reason: what went wrong.
            advice: what the user can do.
        """
        super().__init__(f"cannot {attempt}: {reason}; {advice}")
        self.reason, self.advice = reason, advice


class NoCredentials(Unavailable):
    """This machine has no credentials for the storage."""


@dataclasses.dataclass(frozen=True)
class ObjectInfo:
    """What a bucket tells of an object.

    Attributes:
        generation: changes with each write; never 0.
        size: bytes.
        crc32c: of the content.
    """

    generation: int
    size: int
    crc32c: int


def is_bucket(path: str) -> bool:
    """Whether `open_bucket` can open `path`."""
    return files.scheme(path) in _CLASSES


def open_bucket(path: str, flag: str, request_seconds: float, retry_seconds: float) -> tuple[GcsBucket, str]:
    """The bucket of `path`, and the rest of `path`, without slashes at its end.

    Args:
        path: gs://BUCKET or gs://BUCKET/NAME.
        flag: with its dashes, for errors.
        request_seconds: how long one request may be without an answer.
        retry_seconds: how long one request is repeated when it fails in a way that may pass.

    Raises:
        NoCredentials: there are none on this machine.
        DataError: there is no class for this scheme, or `path` names no bucket.
    """
    if not is_bucket(path):
        schemes = " and ".join(f"{scheme}://" for scheme in _CLASSES)
        raise DataError(f"{flag}={path}: only local folders and {schemes} are supported")
    name, _, rest = path.partition("://")[2].rstrip("/").partition("/")
    if not name:
        raise DataError(f"{flag}={path}: the name of a bucket is missing")
    return _CLASSES[files.scheme(path)](name, request_seconds, retry_seconds), rest


class GcsBucket:
    """A bucket of Google Cloud Storage, for several threads.

    Credentials are the application's default ones.
    """

    def __init__(self, name: str, request_seconds: float, retry_seconds: float) -> None:
        """
        Args:
            name: of the bucket.
            request_seconds: see `open_bucket`.
            retry_seconds: see `open_bucket`.

        Raises:
            NoCredentials: there are none on this machine.
        """
        from google.cloud.storage.retry import DEFAULT_RETRY

        self._name = name
        self._limits: dict[str, Any] = {
            "timeout": request_seconds,
            "retry": DEFAULT_RETRY.with_timeout(retry_seconds),
        }
        self._threads = threading.local()
        self._credentials: Any = None
        if not os.environ.get("STORAGE_EMULATOR_HOST"):
            import google.auth

            with self._one_line("find credentials for", ""):
                self._credentials, _ = google.auth.default(scopes=[_READ_WRITE])

    def read(self, name: str) -> tuple[int, bytes]:
        """Generation and content of an object; generation 0 where there is no object.

        Raises:
            Unavailable: it cannot be read.
        """
        from google.api_core.exceptions import NotFound

        blob = self._blob(name)
        with self._one_line("read from", name):
            try:
                content = bytes(blob.download_as_bytes(**self._limits))
            except NotFound:
                return 0, b""
            return int(blob.generation), content

    def write(self, name: str, content: bytes, generation: int) -> int:
        """Replaces an object if it still has this generation, and returns the new one.

        Args:
            name: of the object.
            content: all of it.
            generation: 0: there must be no object.

        Raises:
            Conflict: the object has another generation. Also where an earlier try was served and
                its answer was lost.
            Unavailable: it cannot be written, or the bucket has other bytes than were sent.
        """
        import google_crc32c

        crc32c = google_crc32c.value(content)
        return self.upload(name, io.BytesIO(content), len(content), crc32c, generation).generation

    def upload(self, name: str, content: BinaryIO, size: int, crc32c: int, generation: int) -> ObjectInfo:
        """Like `write`, from an open file. A large upload resumes after a broken connection.

        Args:
            name: of the object.
            content: seekable, at its start.
            size: bytes.
            crc32c: of the content. The bucket refuses other bytes: a damaged object never becomes
                visible.
            generation: see `write`.

        Raises:
            Conflict: see `write`.
            Unavailable: see `write`.
        """
        from google.api_core.exceptions import PreconditionFailed

        blob = self._blob(name, CHUNK_BYTES)
        blob.crc32c = base64.b64encode(struct.pack(">I", crc32c)).decode()
        with self._one_line("write to", name):
            try:
                blob.upload_from_file(
                    content,
                    size=size,
                    content_type="application/octet-stream",
                    if_generation_match=generation,
                    checksum=None,  # else the client sends the checksum of what it reads, in place of ours
                    **self._limits,
                )
            except PreconditionFailed as error:
                raise Conflict from error
        info = _info(blob)
        if (info.size, info.crc32c) != (size, crc32c):
            raise Unavailable(
                f"write to {self._address(name)}",
                "it arrived damaged: its CRC32C is not that of what was sent",
                "run again",
            )
        return info

    def delete(self, name: str, generation: int | None = None) -> None:
        """Deletes an object.

        Args:
            name: of the object.
            generation: that it must have; None: any, and one that is gone already is fine.

        Raises:
            Conflict: the object has another generation, or is gone.
            Unavailable: it cannot be deleted.
        """
        from google.api_core.exceptions import NotFound, PreconditionFailed

        with self._one_line("delete from", name):
            try:
                self._blob(name).delete(if_generation_match=generation, **self._limits)
            except (NotFound, PreconditionFailed) as error:
                if generation is not None:
                    raise Conflict from error

    def stat(self, name: str) -> ObjectInfo | None:
        """Generation, size and CRC32C of an object; None where there is no object.

        Raises:
            Unavailable: the bucket does not tell.
        """
        from google.api_core.exceptions import NotFound

        blob = self._blob(name)
        with self._one_line("read from", name):
            try:
                blob.reload(**self._limits)
            except NotFound:
                return None
            return _info(blob)

    def list(self, prefix: str) -> dict[str, ObjectInfo]:
        """The objects whose names begin with `prefix`, by their whole names.

        Raises:
            Unavailable: they cannot be listed.
        """
        with self._one_line("list", prefix):
            blobs = self._client().list_blobs(
                self._name, prefix=prefix, fields="items(name,generation,size,crc32c),nextPageToken", **self._limits
            )
            return {blob.name: _info(blob) for blob in blobs}

    def _address(self, name: str) -> str:
        return f"gs://{self._name}/{name}"

    def _blob(self, name: str, chunk_size: int | None = None) -> Any:
        """A blob for one request: once it knows a generation, it requests that one alone."""
        return self._client().bucket(self._name).blob(name, chunk_size=chunk_size)

    def _client(self) -> Any:
        """This thread's client: its connections are not made for several threads."""
        if not hasattr(self._threads, "client"):
            from google.cloud import storage

            # Objects belong to buckets; no project is ever needed. Without credentials, the client
            # takes an emulator's.
            self._threads.client = storage.Client(project="unused", credentials=self._credentials)
        return self._threads.client

    @contextlib.contextmanager
    def _one_line(self, verb: str, name: str) -> Iterator[None]:
        """Turns what google-cloud-storage, google-auth and requests raise into `Unavailable`."""
        from google.api_core import exceptions
        from google.auth import exceptions as auth
        from google.cloud.storage import exceptions as storage
        from requests.exceptions import RequestException

        attempt = f"{verb} {self._address(name)}"
        try:
            yield
        except auth.DefaultCredentialsError as error:
            raise NoCredentials(
                attempt,
                "there are no Google credentials here",
                "on your machine: gcloud auth application-default login; in a job: its service account, or "
                "GOOGLE_APPLICATION_CREDENTIALS",
            ) from error
        except exceptions.NotFound as error:
            raise Unavailable(attempt, f"there is no bucket {self._name}", "check its name") from error
        except (exceptions.Forbidden, exceptions.Unauthorized) as error:
            raise Unavailable(
                attempt,
                f"no permission ({files.reason(error)})",
                "the account needs storage.objects.get, list, create and delete on the bucket, which "
                "roles/storage.objectAdmin gives",
            ) from error
        except exceptions.RetryError as error:
            cause = f"{files.reason(error.cause)} ({files.reason(error)})" if error.cause else files.reason(error)
            raise Unavailable(attempt, cause, "the same command resumes") from error
        except storage.DataCorruption as error:
            raise Unavailable(attempt, "the data was damaged on its way", "run again") from error
        except (
            exceptions.GoogleAPIError,
            auth.GoogleAuthError,
            storage.InvalidResponse,
            RequestException,
            OSError,
        ) as error:
            raise Unavailable(attempt, files.reason(error), "the same command resumes") from error


_CLASSES = {"gs": GcsBucket}


def _info(blob: Any) -> ObjectInfo:
    (crc32c,) = struct.unpack(">I", base64.b64decode(blob.crc32c or "AAAAAA=="))
    return ObjectInfo(int(blob.generation), int(blob.size), crc32c)
