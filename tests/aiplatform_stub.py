"""A Vertex AI of this machine: keeps the jobs that are created, as JSON that arrived, and answers
as the service does.

So much of Cloud TPU, Cloud Build and Cloud Storage as our commands need is there too.
"""

from __future__ import annotations

import dataclasses
import http.server
import json
import re
import threading
from typing import Any

COLLECTIONS = ("customJobs", "hyperparameterTuningJobs")


@dataclasses.dataclass
class Request:
    """One that arrived; `body` is its JSON, or its bytes where it is none."""

    method: str
    path: str
    token: str
    body: Any


def error(code: int, status: str, message: str) -> tuple[int, dict[str, Any]]:
    """An answer in the form of Google's services."""
    return code, {"error": {"code": code, "message": message, "status": status}}


def uploaded(body: bytes) -> bytes:
    """The file in an upload of Cloud Storage: the second part of a message of two."""
    boundary = body[: body.index(b"\n")].strip()
    file = body.split(boundary)[2]
    return file[re.search(rb"\r?\n\r?\n", file).end() :].removesuffix(b"\n").removesuffix(b"\r")  # type: ignore[union-attr]


class Stub:
    """Serves on a port of the system's choice until `close`. `refusal`, if set, is the answer to
    every creation.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.jobs: list[dict[str, Any]] = []
        self.refusal: tuple[int, dict[str, Any]] | None = None
        self.build: dict[str, Any] = {}
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body: Any = self.rfile.read(length)
                if self.headers.get("content-type", "").startswith("application/json"):
                    body = json.loads(body or b"null")
                token = self.headers.get("authorization", "").removeprefix("Bearer ")
                request = Request(self.command, self.path.partition("?")[0], token, body)
                stub.requests.append(request)
                code, answer = stub.answer(request)
                text = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("content-type", "application/json; charset=UTF-8")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = _answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Nothing on the screen."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def reset(self) -> None:
        self.requests, self.jobs, self.refusal, self.build = [], [], None, {}

    def answer(self, request: Request) -> tuple[int, dict[str, Any]]:
        if "/storage/v1/" in request.path:
            return 200, self._storage(request)
        if match := re.fullmatch(r"/v2/(projects/[^/]+/locations/[^/]+)/queuedResources", request.path):
            return 200, {"name": f"{match[1]}/operations/1", "done": False}
        if match := re.fullmatch(r"/v1/(projects/([^/]+)/locations/[^/]+)/builds(/b1)?", request.path):
            self.build |= request.body or {}
            build = self.build | {
                "id": "b1",
                "name": f"{match[1]}/builds/b1",
                "projectId": match[2],
                "status": "SUCCESS",
            }
            kind = "type.googleapis.com/google.devtools.cloudbuild.v1.BuildOperationMetadata"
            operation = {"name": f"{match[1]}/operations/b1", "metadata": {"@type": kind, "build": build}}
            return 200, build if match[3] else operation
        match = re.fullmatch(r"/v1/(projects/[^/]+/locations/[^/]+)/(\w+)", request.path)
        if not match or match[2] not in COLLECTIONS:
            return error(404, "NOT_FOUND", f"no method for {request.path}")
        if request.method == "GET":
            return 200, {match[2]: [job for job in self.jobs if f"/{match[2]}/" in job["name"]]}
        if self.refusal:
            return self.refusal
        name = f"{match[1]}/{match[2]}/{len(self.jobs) + 1}"
        job = request.body | {"name": name, "state": "JOB_STATE_PENDING"}
        self.jobs.append(job)
        return 200, job

    @staticmethod
    def _storage(request: Request) -> dict[str, Any]:
        name = "my-project_us-west4_cloudbuild"
        bucket = {"kind": "storage#bucket", "id": name, "name": name, "location": "US-WEST4"}
        if request.path.endswith("/b"):
            return {"kind": "storage#buckets", "items": [bucket]}
        if request.path.endswith("/o"):
            return {"kind": "storage#object", "bucket": bucket["name"], "name": "source/1.tgz", "generation": "1"} | {
                "size": str(len(uploaded(request.body)))
            }
        return bucket
