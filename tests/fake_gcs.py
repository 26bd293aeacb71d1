"""Google Cloud Storage on this machine, for TensorFlow's own gs:// client and for
google-cloud-storage, with faults.

TensorFlow's client has no switch for another server: its hosts are constants. But it honours
`https_proxy` and `CURL_CA_BUNDLE`, so this server is a CONNECT proxy that ends TLS for
www.googleapis.com and storage.googleapis.com with a certificate of a throw-away authority.
google-cloud-storage finds the same buckets over plain HTTP by `STORAGE_EMULATOR_HOST`.

In a test: the fixture `gcs` (a server; `gcs.env` is for a subprocess), or `gcs_here` (this
process's TensorFlow uses it too, but not by tf.io.TFRecordWriter and tf.train.Checkpoint.restore,
which wait for an answer while no other Python thread may run). By hand: `python tests/fake_gcs.py
--bucket=b` prints the variables to export and serves until it is interrupted.

What it knows: objects with generation, metageneration, CRC32C, MD5 and time; preconditions; pages,
prefixes and delimiters; media, multipart and resumable uploads; ranges; rewrite, compose, patch,
delete; buckets. `fail` makes requests go wrong, `kill_after` kills a process right after its n-th
change was made and before it is told so. What it does not: access lists, versions of the past,
batches, notifications, gzip transcoding.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import http.server
import io
import ipaddress
import json
import os
import pathlib
import random
import re
import signal
import socket
import socketserver
import ssl
import struct
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Any

import google_crc32c

HOSTS = ("www.googleapis.com", "storage.googleapis.com")
KINDS = (
    "bucket", "stat", "list", "read", "start", "chunk", "status", "upload", "rewrite", "compose", "patch", "delete",
)  # fmt: skip
MUTATING = frozenset({"start", "chunk", "upload", "rewrite", "compose", "patch", "delete"})
FAILURES = ("503", "429", "500", "412", "404", "403", "401", "reset", "lost", "broken", "stall")
QUANTUM = 256 * 1024  # of an upload that breaks off, the server keeps a multiple of this


@dataclasses.dataclass
class Object:
    """What a name in a bucket holds."""

    data: bytes
    generation: int
    metageneration: int = 1
    content_type: str = "application/octet-stream"
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    updated: str = ""

    @property
    def crc32c(self) -> str:
        return base64.b64encode(struct.pack(">I", google_crc32c.value(self.data))).decode()

    @property
    def md5(self) -> str:
        return base64.b64encode(hashlib.md5(self.data).digest()).decode()


@dataclasses.dataclass
class Fault:
    """Makes matching requests fail.

    Attributes:
        failure: a status; "reset" (connection reset, nothing done); "lost" (done, then reset: the
            client cannot know); "broken" (half of the answer, then the end; of an upload, half
            arrives); "stall" (no answer for `Server.stall_seconds`, nothing done).
        kind: of `KINDS`; empty: any.
        after: matching requests, of those that no earlier fault took, that pass before the first
            one fails.
        times: how many fail then; None: all.
        match: a part of the object's name.
        number: the request with this number in the server's log alone (1 is the first).
        seen, consumed: matching requests so far, and failures so far.
    """

    failure: str
    kind: str = ""
    after: int = 0
    times: int | None = 1
    match: str = ""
    number: int | None = None
    seen: int = 0
    consumed: int = 0

    def takes(self, request: Request) -> bool:
        """Whether this request is one to fail; counts it."""
        if self.kind not in ("", request.kind) or self.match not in request.object:
            return False
        if self.number is not None and self.number != request.number:
            return False
        self.seen += 1
        if self.seen <= self.after or (self.times is not None and self.consumed >= self.times):
            return False
        self.consumed += 1
        return True


@dataclasses.dataclass
class Kill:
    """A client that is to die: see `Server.kill_after`."""

    pid: int
    left: int
    kind: str
    match: str

    def due(self, request: Request) -> bool:
        """Whether it dies after this change; counts it."""
        if self.kind in ("", request.kind) and self.match in request.object:
            self.left -= 1
            return self.left == 0
        return False


@dataclasses.dataclass
class Request:
    """A line of the log."""

    number: int
    method: str
    host: str
    path: str
    kind: str
    bucket: str
    object: str
    range: str = ""
    status: int = 0  # 0: no answer was sent
    fault: str = ""
    tls: bool = False
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Upload:
    """A resumable upload under way."""

    bucket: str
    name: str
    conditions: dict[str, str]
    resource: dict[str, Any]
    content_type: str
    data: bytes = b""
    done: dict[str, Any] | None = None


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclasses.dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200) -> Answer:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=UTF-8"})


class Server:
    """The server, its buckets, its log and its faults. Use it as a context manager, or `start` and
    `close`.
    """

    def __init__(self, *buckets: str, folder: str | None = None, port: int = 0) -> None:
        self.lock = threading.RLock()
        self.buckets: dict[str, dict[str, Object]] = {name: {} for name in buckets}
        self.uploads: dict[str, Upload] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.mutations = 0  # changes made so far
        self.page_size = 1000
        self.stall_seconds = 60.0
        self.token = ""  # if set, requests over TLS must carry it as their bearer token
        self.killed: list[int] = []
        self._kill: Kill | None = None
        self._generation = int(time.time() * 1e6)
        self._numbers = 0
        self._closing = threading.Event()
        self._scratch = tempfile.TemporaryDirectory() if folder is None else contextlib.nullcontext(folder)
        self.folder = self._scratch.__enter__()
        self.ca = make_certificates(self.folder)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(os.path.join(self.folder, "server.pem"), os.path.join(self.folder, "server.key"))
        self._http = _Listener(("127.0.0.1", port), _Handler)
        self._http.owner = self
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    # -- life

    def start(self) -> Server:
        self._thread.start()
        return self

    def close(self) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._scratch.__exit__(None, None, None)

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """For a subprocess: TensorFlow's client and google-cloud-storage find this server, and
        retry without long waits.
        """
        return self.route | KNOBS

    @property
    def route(self) -> dict[str, str]:
        """Of `env`, what leads here; TensorFlow reads these at each request, so they can be set at
        any time.
        """
        return {
            "https_proxy": self.address,
            "HTTPS_PROXY": self.address,
            "http_proxy": "",
            "HTTP_PROXY": "",
            "all_proxy": "",
            "ALL_PROXY": "",
            "no_proxy": "127.0.0.1,localhost",
            "NO_PROXY": "127.0.0.1,localhost",
            "CURL_CA_BUNDLE": self.ca,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": self.token or "a-token",
            "NO_GCE_CHECK": "true",
            "STORAGE_EMULATOR_HOST": self.address,
            "GOOGLE_CLOUD_PROJECT": "a-project",
        }

    # -- what tests do

    def reset(self, *buckets: str) -> None:
        """Empty buckets, no faults, no log, as at the start."""
        with self.lock:
            self.buckets = {name: {} for name in buckets}
            self.uploads, self.log, self.faults, self.killed, self._kill = {}, [], [], [], None
            self.page_size, self.stall_seconds, self.token, self._numbers, self.mutations = 1000, 60.0, "", 0, 0

    def fail(self, failure: str | int, kind: str = "", **more: Any) -> Fault:
        """Adds a fault (see `Fault`); the first one that takes a request decides."""
        fault = Fault(str(failure), kind, **more)
        assert fault.failure in FAILURES, fault
        assert kind in ("", *KINDS), fault
        with self.lock:
            self.faults.append(fault)
        return fault

    def heal(self) -> list[Fault]:
        """Takes all faults away and returns them, with what each consumed."""
        with self.lock:
            gone, self.faults = self.faults, []
        return gone

    def kill_after(self, count: int, pid: int, kind: str = "", match: str = "") -> None:
        """Sends SIGKILL to `pid` once `count` more changes were made, before the client hears of
        the last one.

        Args:
            count: from 1.
            pid: of the client.
            kind: only changes of this one count; empty: all.
            match: only changes of objects with this in their name count.
        """
        assert kind in ("", *MUTATING), kind
        with self.lock:
            self._kill = Kill(pid, count, kind, match)

    def sprinkle(self, seed: int, share: float, failures: tuple[str, ...], requests: int = 3000) -> None:
        """Adds a fault to single requests by their number, drawn anew for each seed, and none to
        two of three neighbours.

        So every request that is given a few tries gets through, and what is repeated goes wrong now
        and then too.
        """
        drawn, number = random.Random(seed), 0
        while number < requests:
            number += 3 + int(drawn.expovariate(share / (1 - 3 * share)))
            self.fail(drawn.choice(failures), number=number)

    def put(self, bucket: str, name: str, data: bytes) -> None:
        with self.lock:
            self._store(self._bucket(bucket), name, data)

    def get(self, bucket: str, name: str) -> bytes:
        with self.lock:
            return self.buckets[bucket][name].data

    def take(self, bucket: str, name: str) -> bytes:
        """The content of an object, which is gone then."""
        with self.lock:
            return self.buckets[bucket].pop(name).data

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def put_tree(self, folder: str | pathlib.Path, bucket: str, prefix: str) -> None:
        """Puts a local folder's files under `prefix` (no slash at its end)."""
        for path in sorted(pathlib.Path(folder).rglob("*")):
            if path.is_file():
                self.put(bucket, f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def get_tree(self, bucket: str, prefix: str, folder: str | pathlib.Path) -> None:
        """Writes the objects under `prefix` (no slash at its end) to a local folder; folder markers
        are left out.
        """
        for name in self.names(bucket, prefix + "/"):
            if not name.endswith("/"):
                path = pathlib.Path(folder) / name[len(prefix) + 1 :]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.get(bucket, name))

    def snapshot(self) -> dict[str, dict[str, Object]]:
        """All buckets as they are; give it to `restore`."""
        with self.lock:
            return {bucket: dict(objects) for bucket, objects in self.buckets.items()}

    def restore(self, snapshot: dict[str, dict[str, Object]]) -> None:
        with self.lock:
            self.buckets = {bucket: dict(objects) for bucket, objects in snapshot.items()}

    def requests(self, kind: str = "", match: str = "") -> list[Request]:
        """The log, or the part of it that is of a kind and names an object with `match` in it."""
        with self.lock:
            return [r for r in self.log if kind in ("", r.kind) and match in r.object]

    # -- what the handler does

    def begin(self, request: Request) -> str:
        """Numbers and logs a request; returns the failure that it must meet, or nothing."""
        with self.lock:
            self._numbers += 1
            request.number = self._numbers
            if (upload := self.uploads.get(request.object)) is not None:
                request.object = upload.name
            self.log.append(request)
            request.fault = next((f.failure for f in self.faults if f.takes(request)), "")
            return request.fault

    def stall(self) -> None:
        self._closing.wait(self.stall_seconds)

    def execute(self, request: Request, query: dict[str, str], headers: Any, body: bytes) -> Answer | None:
        """Does what a request asks. None: the client was killed meanwhile."""
        with self.lock:
            try:
                if self.token and request.tls and headers.get("Authorization") != f"Bearer {self.token}":
                    status = 403 if headers.get("Authorization") else 401
                    raise Refusal(status, "Anonymous caller does not have storage.objects access")
                answer = self._do(request, query, headers, body)
            except Refusal as refusal:
                return refused(refusal.status, str(refusal))
            if request.kind in MUTATING and answer.status < 400:
                self.mutations += 1
                if self._kill and self._kill.due(request):
                    pid = self._kill.pid
                    self._kill = None
                    os.kill(pid, signal.SIGKILL)
                    self.killed.append(pid)
                    return None
            return answer

    def torn(self, query: dict[str, str], headers: Any, body: bytes) -> None:
        """Half of an upload's body arrived."""
        with self.lock, contextlib.suppress(Refusal):
            upload = self.uploads.get(query.get("upload_id", ""))
            first = _content_range(headers)[0]
            if upload is not None and first == len(upload.data):
                kept = (len(body) // 2 + first) // QUANTUM * QUANTUM - first
                upload.data += body[: max(kept, 0)]

    def _do(self, request: Request, query: dict[str, str], headers: Any, body: bytes) -> Answer:
        kind, bucket, name = request.kind, request.bucket, request.object
        if kind == "bucket":
            if request.method == "POST":
                new = json.loads(body)["name"]
                if new in self.buckets:
                    raise Refusal(409, f"bucket {new} exists")
                self.buckets[new] = {}
                return Answer.of(self._bucket_resource(new))
            self._bucket(bucket)
            if request.method == "DELETE":
                if self.buckets[bucket]:
                    raise Refusal(409, "The bucket you tried to delete is not empty.")
                del self.buckets[bucket]
                return Answer(204)
            return Answer.of(self._bucket_resource(bucket))
        if kind in ("chunk", "status"):
            return self._continue(query, headers, body)
        objects = self._bucket(bucket)
        if kind == "list":
            return Answer.of(self._list(bucket, query))
        if kind in ("start", "upload"):
            return self._upload(request, query, headers, body)
        if kind in ("stat", "read", "patch", "delete"):
            found = self._object(objects, bucket, name, query)
            check(query, found, reading=request.method == "GET")
            if kind == "stat":
                return Answer.of(self._resource(bucket, name))
            if kind == "read":
                return read(found, headers.get("Range"))
            if kind == "patch":
                change = json.loads(body or b"{}")
                changed = copy.copy(found)
                changed.metadata = {
                    key: value for key, value in (found.metadata | (change.get("metadata") or {})).items() if value
                }
                changed.content_type = change.get("contentType", found.content_type)
                changed.metageneration += 1
                changed.updated = now()
                objects[name] = changed
                return Answer.of(self._resource(bucket, name))
            del objects[name]
            return Answer(204)
        if kind == "rewrite":
            found = self._object(objects, bucket, name, {"generation": query.get("sourceGeneration", "")})
            source = {k.replace("Source", ""): v for k, v in query.items() if k.startswith("ifSource")}
            check(source, found)
            target = request.path.split("?")[0].split("/")  # .../rewriteTo/b/BUCKET/o/NAME
            to_bucket, to_name = target[-3], urllib.parse.unquote(target[-1])
            there = self._bucket(to_bucket)
            check({k: v for k, v in query.items() if not k.startswith("ifSource")}, there.get(to_name))
            self._store(there, to_name, found.data, found.content_type, found.metadata)
            resource = self._resource(to_bucket, to_name)
            if "/copyTo/" in request.path:
                return Answer.of(resource)
            size = str(len(found.data))
            told = {"kind": "storage#rewriteResponse", "totalBytesRewritten": size, "objectSize": size, "done": True}
            return Answer.of(told | {"resource": resource})
        assert kind == "compose", kind
        wanted = json.loads(body)
        check(query, objects.get(name))
        parts = []
        for source in wanted["sourceObjects"]:
            found = self._object(objects, bucket, source["name"], {"generation": str(source.get("generation", ""))})
            condition = source.get("objectPreconditions", {}).get("ifGenerationMatch")
            check({} if condition is None else {"ifGenerationMatch": str(condition)}, found)
            parts.append(found.data)
        if not 1 <= len(parts) <= 32:
            raise Refusal(400, "The number of source components provided is not between 1 and 32")
        content_type = wanted.get("destination", {}).get("contentType", "application/octet-stream")
        self._store(objects, name, b"".join(parts), content_type)
        return Answer.of(self._resource(bucket, name))

    def _upload(self, request: Request, query: dict[str, str], headers: Any, body: bytes) -> Answer:
        bucket, name = request.bucket, request.object
        conditions = {key: value for key, value in query.items() if key.startswith("if")}
        resource: dict[str, Any] = {}
        content_type = headers.get("X-Upload-Content-Type") or headers.get("Content-Type") or ""
        if request.kind == "start":
            resource = json.loads(body) if body else {}
            name = request.object = name or resource["name"]
            check(conditions, self.buckets[bucket].get(name))
            key = f"upload-{request.number}"
            self.uploads[key] = Upload(bucket, name, conditions, resource, content_type)
            scheme = "https" if request.tls else "http"
            where = f"{scheme}://{request.host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
            return Answer(200, b"", {"Location": where, "X-GUploader-UploadID": key})
        if query.get("uploadType") == "multipart":
            resource, content_type, body = multipart(headers.get("Content-Type") or "", body)
            name = request.object = name or resource["name"]
        return Answer.of(self._finish(bucket, name, conditions, resource, content_type, body))

    def _continue(self, query: dict[str, str], headers: Any, body: bytes) -> Answer:
        upload = self.uploads.get(query.get("upload_id", ""))
        if upload is None:
            raise Refusal(404, "no such upload")
        if upload.done is not None:
            return Answer.of(upload.done)
        first, last, total = _content_range(headers)
        if first is not None:
            if headers.get("Content-Range") and last - first + 1 != len(body):
                raise Refusal(400, f"Content-Range names {last - first + 1} bytes, {len(body)} came")
            if first > len(upload.data):
                raise Refusal(503, f"byte {first} came, {len(upload.data)} are stored")
            upload.data = upload.data[:first] + body
            if not headers.get("Content-Range"):
                total = len(upload.data)
        if total is not None and len(upload.data) == total and (first is not None or total == 0):
            upload.done = self._finish(
                upload.bucket, upload.name, upload.conditions, upload.resource, upload.content_type, upload.data
            )
            upload.data = b""
            return Answer.of(upload.done)
        if first is not None and len(upload.data) % QUANTUM:
            # Pieces that do not end the object must be multiples of the quantum.
            upload.data = upload.data[: len(upload.data) // QUANTUM * QUANTUM]
        # Nothing stored is told by no Range at all: "bytes=0-0" would mean that one byte is.
        return Answer(308, b"", {"Range": f"bytes=0-{len(upload.data) - 1}"} if upload.data else {})

    def _finish(
        self,
        bucket: str,
        name: str,
        conditions: dict[str, str],
        resource: dict[str, Any],
        content_type: str,
        data: bytes,
    ) -> dict[str, Any]:
        objects = self._bucket(bucket)
        check(conditions, objects.get(name))
        new = Object(data, 0)
        for field, ours in (("crc32c", new.crc32c), ("md5Hash", new.md5)):
            if resource.get(field, ours) != ours:
                raise Refusal(400, f"Provided {field} {resource[field]!r} doesn't match calculated {ours!r}.")
        kind = resource.get("contentType") or content_type or "application/octet-stream"
        self._store(objects, name, data, kind, resource.get("metadata"))
        return self._resource(bucket, name)

    def _store(
        self,
        objects: dict[str, Object],
        name: str,
        data: bytes,
        content_type: str = "application/octet-stream",
        metadata: dict[str, str] | None = None,
    ) -> None:
        self._generation += 1
        objects[name] = Object(bytes(data), self._generation, 1, content_type, dict(metadata or {}), now())

    def _bucket(self, name: str) -> dict[str, Object]:
        if name not in self.buckets:
            raise Refusal(404, "The specified bucket does not exist.")
        return self.buckets[name]

    def _object(self, objects: dict[str, Object], bucket: str, name: str, query: dict[str, str]) -> Object:
        found = objects.get(name)
        wanted = query.get("generation")
        if found is None or (wanted and int(wanted) != found.generation):
            raise Refusal(404, f"No such object: {bucket}/{name}")
        return found

    def _list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        size = min(int(query.get("maxResults") or self.page_size), self.page_size)
        after = base64.urlsafe_b64decode(query["pageToken"]).decode() if query.get("pageToken") else ""
        entries: dict[str, bool] = {}  # name -> whether it is a prefix
        for name in self.names(bucket, prefix):
            if name < query.get("startOffset", "") or ("endOffset" in query and name >= query["endOffset"]):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                entries[prefix + rest.split(delimiter)[0] + delimiter] = True
            else:
                entries.setdefault(name, False)
        page = [name for name in sorted(entries) if name > after]
        told: dict[str, Any] = {"kind": "storage#objects"}
        if len(page) > size:
            page = page[:size]
            told["nextPageToken"] = base64.urlsafe_b64encode(page[-1].encode()).decode()
        if prefixes := [name for name in page if entries[name]]:
            told["prefixes"] = prefixes
        if items := [self._resource(bucket, name) for name in page if not entries[name]]:
            told["items"] = items
        return told

    def _resource(self, bucket: str, name: str) -> dict[str, Any]:
        found = self.buckets[bucket][name]
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{found.generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(found.generation),
            "metageneration": str(found.metageneration),
            "contentType": found.content_type,
            "size": str(len(found.data)),
            "crc32c": found.crc32c,
            "md5Hash": found.md5,
            "etag": found.crc32c,
            "timeCreated": found.updated,
            "updated": found.updated,
            "storageClass": "STANDARD",
            "metadata": found.metadata,
        }

    def _bucket_resource(self, name: str) -> dict[str, Any]:
        return {"kind": "storage#bucket", "id": name, "name": name, "location": "US", "metageneration": "1"}


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def check(conditions: dict[str, str], found: Object | None, reading: bool = False) -> None:
    """Refuses what a precondition forbids; a generation of 0 stands for "there is none"."""
    generation = found.generation if found else 0
    meta = found.metageneration if found else 0
    for name, have in (("Generation", generation), ("Metageneration", meta)):
        wanted, unwanted = conditions.get(f"if{name}Match"), conditions.get(f"if{name}NotMatch")
        if wanted is not None and int(wanted) != have:
            raise Refusal(412, "At least one of the pre-conditions you specified did not hold.")
        if unwanted is not None and int(unwanted) == have:
            raise Refusal(304 if reading else 412, "At least one of the pre-conditions you specified did not hold.")


def read(found: Object, asked: str | None) -> Answer:
    """The object or a range of it."""
    size = len(found.data)
    headers = {
        "Content-Type": found.content_type,
        "X-Goog-Generation": str(found.generation),
        "X-Goog-Metageneration": str(found.metageneration),
        "X-Goog-Hash": f"crc32c={found.crc32c},md5={found.md5}",
        "X-Goog-Stored-Content-Length": str(size),
        "Accept-Ranges": "bytes",
    }
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if not match or match.groups() == ("", ""):
        return Answer(200, found.data, headers)
    if match[1]:
        first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
    else:
        first, last = max(size - int(match[2]), 0), size - 1
    if first >= size or last < first:
        return refused(416, "The requested range cannot be satisfied.", {"Content-Range": f"bytes */{size}"})
    return Answer(206, found.data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{size}"})


def refused(status: int, text: str, headers: dict[str, str] | None = None) -> Answer:
    if status == 304:
        return Answer(304)
    error = {"code": status, "message": text, "errors": [{"message": text, "domain": "global", "reason": "fake"}]}
    answer = Answer.of({"error": error}, status)
    answer.headers |= headers or {}
    return answer


def multipart(content_type: str, body: bytes) -> tuple[dict[str, Any], str, bytes]:
    """The resource, the content's type and the content of a multipart/related body."""
    match = re.search(r'boundary="?([^";]+)"?', content_type)
    if not match:
        raise Refusal(400, "multipart without a boundary")
    parts = []
    for part in body.split(b"--" + match[1].encode())[1:3]:
        head, _, content = part.partition(b"\r\n\r\n")
        kind = re.search(rb"content-type:\s*([^\r\n]+)", head, re.IGNORECASE)
        parts.append((kind[1].decode() if kind else "", content.removesuffix(b"\r\n")))
    return json.loads(parts[0][1]), parts[1][0], parts[1][1]


def _content_range(headers: Any) -> tuple[Any, Any, int | None]:
    """First and last byte (None: a question for the status) and the total (None: unknown)."""
    text = headers.get("Content-Range")
    if not text:
        return 0, None, None
    match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", text.strip())
    if not match:
        raise Refusal(400, f"Content-Range: {text}")
    total = None if match[3] == "*" else int(match[3])
    if match[1] is None:
        return None, None, total
    return int(match[1]), int(match[2]), total


class _Listener(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 64
    owner: Server

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed or gave up is the point of many tests; anything else is our
        mistake.
        """
        if not isinstance(sys.exception(), (OSError, ssl.SSLError)):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer goes out as one
    disable_nagle_algorithm = True
    server: _Listener
    tls = False

    def log_message(self, *_: object) -> None:
        """The log is ours."""

    def do_CONNECT(self) -> None:
        host = self.path.partition(":")[0]
        if host not in HOSTS:
            self.close_connection = True
            return self.send_error(502, f"this proxy knows {HOSTS}, not {host}")
        self.send_response(200, "Connection established")
        self.end_headers()
        self.wfile.flush()
        self.connection = self.server.owner._tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb")
        self.tls, self.close_connection = True, False
        return None

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()
        with contextlib.suppress(OSError):
            self.connection.close()

    def drop(self, reset: bool) -> None:
        """Ends the connection without an answer; with a reset the client sees an error and no
        orderly end.
        """
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for part in (self.rfile, self.wfile, self.connection):
            with contextlib.suppress(OSError):
                part.close()
        self.rfile = self.wfile = io.BytesIO()  # the base class flushes once more

    def body(self) -> bytes:
        # curl sends Transfer-Encoding: chunked AND a Content-Length, which then counts for nothing.
        if "chunked" in (self.headers.get("Transfer-Encoding") or "").lower():
            parts = []
            while True:
                size = int(self.rfile.readline().split(b";")[0], 16)
                part = self.rfile.read(size)
                if len(part) < size:
                    raise ConnectionResetError("the body broke off")
                parts.append(part)
                self.rfile.readline()
                if not size:
                    return b"".join(parts)
        size = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(size)
        if len(content) < size:
            raise ConnectionResetError("the body broke off")
        return content

    def reply(self, answer: Answer, share: float = 1.0) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body[: int(len(answer.body) * share)])
        self.wfile.flush()

    def go(self) -> None:
        owner = self.server.owner
        body = self.body()
        url = urllib.parse.urlsplit(self.path)
        query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        host = self.headers.get("Host") or ""
        request = classify(self.command, host, url.path, query, self.headers)
        request.tls, request.path = self.tls, self.path
        request.headers = dict(self.headers.items())
        request.range = self.headers.get("Range") or self.headers.get("Content-Range") or ""
        failure = owner.begin(request)
        if not request.kind:
            request.status = 501
            return self.reply(refused(501, f"the fake does not know {self.command} {self.path}"))
        if failure.isdigit():
            request.status = int(failure)
            return self.reply(refused(int(failure), f"injected {failure}"))
        if failure == "stall":
            owner.stall()
            return self.drop(reset=False)
        if failure == "reset":
            return self.drop(reset=True)
        if failure == "broken" and request.kind == "chunk":
            owner.torn(query, self.headers, body)
            return self.drop(reset=True)
        answer = owner.execute(request, query, self.headers, body)
        if answer is None or failure == "lost":
            return self.drop(reset=True)
        if failure == "broken":
            if not answer.body:  # then half of the headers
                self.wfile.write(b"HTTP/1.1 200")
                self.wfile.flush()
            else:
                self.reply(answer, share=0.5)
            return self.drop(reset=False)
        request.status = answer.status
        return self.reply(answer)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = go  # noqa: N815


def classify(method: str, host: str, path: str, query: dict[str, str], headers: Any) -> Request:
    """Which kind of request this is, and of which bucket and object."""

    def known(kind: str, bucket: str = "", name: str = "") -> Request:
        return Request(0, method, host, path, kind, bucket, name)

    parts = path.split("/")  # raw: an object's slashes are escaped
    if path.startswith("/upload/storage/v1/b/"):
        bucket, name = parts[5], query.get("name", "")
        if method == "PUT":
            asks = (headers.get("Content-Range") or "").startswith("bytes */")
            # An empty object's only piece looks like a question. The upload's own name stands in
            # for the object's.
            kind = "status" if asks and headers.get("Content-Range") != "bytes */0" else "chunk"
            return known(kind, bucket, query.get("upload_id", ""))
        return known("start" if query.get("uploadType") == "resumable" else "upload", bucket, name)
    path = path.removeprefix("/download")
    if path.startswith("/storage/v1/b"):
        parts = path.split("/")[3:]  # b, BUCKET, o, NAME, verb, ...
        if len(parts) <= 2:
            return known("bucket", parts[1] if len(parts) == 2 else "")
        bucket, name = parts[1], urllib.parse.unquote(parts[3]) if len(parts) > 3 else ""
        if parts[2] == "storageLayout":
            return known("bucket", bucket)
        if parts[2] != "o":
            return known("")
        if len(parts) == 3:
            return known("list", bucket, query.get("prefix", "")) if method == "GET" else known("")
        if len(parts) > 4:
            kind = {"rewriteTo": "rewrite", "copyTo": "rewrite", "compose": "compose"}.get(parts[4], "")
            return known(kind, bucket, name)
        if method == "GET":
            return known("read" if query.get("alt") == "media" else "stat", bucket, name)
        return known({"PATCH": "patch", "PUT": "patch", "DELETE": "delete"}.get(method, ""), bucket, name)
    if method == "GET" and host.partition(":")[0] == "storage.googleapis.com":
        bucket, _, name = path[1:].partition("/")
        return known("read", bucket, urllib.parse.unquote(name))
    return known("")


# Read by TensorFlow when it is imported: no cache of what objects are, short waits.
KNOBS = {
    "GCS_STAT_CACHE_MAX_AGE": "0",
    "GCS_RETRY_CONFIG_INIT_DELAY_TIME_US": "0",
    "GCS_RETRY_CONFIG_MAX_DELAY_TIME_US": "0",
    "GCS_RETRY_CONFIG_MAX_RETRIES": "3",
    "GCS_REQUEST_IDLE_TIMEOUT_SECS": "2",
}


def make_certificates(folder: str) -> str:
    """Makes a throw-away authority and a server's certificate in `folder`; returns the path of the
    authority's.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    begins = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    ends = begins + datetime.timedelta(days=30)
    keys = {who: ec.generate_private_key(ec.SECP256R1()) for who in ("ca", "server")}
    for who in ("ca", "server"):
        alternatives = [*map(x509.DNSName, HOSTS), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        made = (
            x509.CertificateBuilder()
            .subject_name(named(f"funmatch test {who}"))
            .issuer_name(named("funmatch test ca"))
            .public_key(keys[who].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
            .add_extension(x509.BasicConstraints(ca=who == "ca", path_length=None), critical=True)
        )
        if who == "server":
            made = made.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        certificate = made.sign(keys["ca"], hashes.SHA256())
        pathlib.Path(folder, f"{who}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key = keys[who].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        pathlib.Path(folder, f"{who}.key").write_bytes(key)
    return os.path.join(folder, "ca.pem")


@contextlib.contextmanager
def serve(*buckets: str) -> Iterator[Server]:
    """A server with these buckets."""
    with Server(*buckets) as server:
        yield server


def main(argv: Iterable[str] | None = None) -> int:
    """Serves until it is interrupted; prints shell lines that lead clients here, and at the end
    what faults consumed.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bucket", action="append", default=[], help="a bucket; repeatable")
    parser.add_argument("--port", type=int, default=0, help="0: one that is free")
    parser.add_argument("--folder", help="where certificates go; default: one that goes away with the server")
    parser.add_argument(
        "--fail", action="append", default=[], metavar="FAILURE:KIND[:TIMES[:MATCH]]", help="TIMES may be 'all'"
    )
    parser.add_argument("--log", action="store_true", help="a line for each request, on standard error, at the end")
    options = parser.parse_args(None if argv is None else list(argv))
    with Server(*(options.bucket or ["bucket"]), folder=options.folder, port=options.port) as server:
        for text in options.fail:
            failure, kind, times, match = (*text.split(":"), "", "", "")[:4]
            server.fail(failure, kind, times=None if times == "all" else int(times or 1), match=match)
        for name, value in server.env.items():
            print(f"export {name}={value!r}", flush=True)
        print("# ready", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            threading.Event().wait()
        if options.log:
            for request in server.log:
                told = (request.number, request.method, request.kind, request.bucket, request.object, request.range)
                print(*told, request.status, request.fault, file=sys.stderr)
        for fault in server.faults:
            print(f"{fault.failure}:{fault.kind} consumed {fault.consumed}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
