"""A server that speaks Kaggle's API, reached by the real client through its environment alone.

`HTTPS_PROXY` makes the client CONNECT here for api.kaggle.com and for the bucket that Kaggle's
answers point to; this server ends TLS with a certificate that `REQUESTS_CA_BUNDLE` makes the client
trust. Nothing in the client is patched.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import pathlib
import re
import ssl
import threading
from typing import Any

HOSTS = ("api.kaggle.com", "storage.googleapis.com")
SIGNATURE = "signature-that-opens-the-bucket"


@dataclasses.dataclass
class Seen:
    host: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class Server:
    """Attributes:
    archives: content by "owner/dataset", "owner/dataset/3" or "owner/model/framework/variation/1".
    key: what `Authorization` must be, as the client sends it; "" for any or none.
    tokens: those that are active, with their user.
    status: answer of the API instead of what is asked for.
    cut: bytes after which a download breaks off, one for each of the next downloads.
    seen: requests.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.archives: dict[str, bytes] = {}
        self.key, self.tokens, self.status = "", {}, 0
        self.cut: list[int] = []
        self.seen: list[Seen] = []
        self.certificate = certificate(folder / "kaggle.pem")
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(self.certificate)
        owner = self

        class Handler(_Handler):
            server_state = owner

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def env(self) -> dict[str, str]:
        proxy = f"http://127.0.0.1:{self.http.server_port}"
        return {
            "HTTPS_PROXY": proxy,
            "https_proxy": proxy,
            "REQUESTS_CA_BUNDLE": str(self.certificate),
            "NO_PROXY": "",
            "no_proxy": "",
        }

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def asked(self, host: str, part: str = "") -> list[Seen]:
        return [seen for seen in self.seen if seen.host == host and part in seen.path]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Server
    host = ""

    def log_message(self, *_: object) -> None:
        """The log is ours."""

    def do_CONNECT(self) -> None:
        self.host = self.path.partition(":")[0]
        if self.host not in HOSTS:
            return self.send_error(502)
        self.send_response(200)
        self.end_headers()
        self.connection = self.server_state.context.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb")
        self.close_connection = False
        return None

    def answer(self, status: int, headers: dict[str, str], content: bytes = b"", sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:sent])
        self.wfile.flush()
        if sent is not None and sent < len(content):
            self.close_connection = True
            self.connection.close()

    def say(self, value: dict[str, Any], status: int = 200) -> None:
        self.answer(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def note(self) -> dict[str, Any]:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        self.server_state.seen.append(Seen(self.host, self.path, dict(self.headers), body))
        return body

    def do_POST(self) -> None:
        state, body = self.server_state, self.note()
        call = self.path.removeprefix("/v1/")
        if call == "security.OAuthService/IntrospectToken":
            user = state.tokens.get(body["token"])
            return self.say({"active": bool(user), "username": user or ""})
        if state.status:
            return self.say({"code": state.status, "message": f"no: {self.headers.get('Authorization')}"}, state.status)
        if state.key and self.headers.get("Authorization") != state.key:
            return self.say({"code": 401, "message": "Unauthenticated"}, 401)
        if call == "models.ModelApiService/GetModelInstance":
            return self.say({"versionNumber": 4, "slug": body["instanceSlug"]})
        if call == "models.ModelApiService/DownloadModelInstanceVersion":
            parts = [body[name] for name in ("ownerSlug", "modelSlug", "framework", "instanceSlug", "versionNumber")]
        elif call == "datasets.DatasetApiService/DownloadDataset":
            parts = [body["ownerSlug"], body["datasetSlug"], body.get("datasetVersionNumber")]
        else:
            return self.say({"code": 501, "message": call}, 501)
        name = "/".join(str(part) for part in parts if part)
        if name not in state.archives:
            return self.say({"code": 404, "message": "Not found"}, 404)
        return self.answer(
            302, {"Location": f"https://storage.googleapis.com/bucket/{name}?X-Goog-Signature={SIGNATURE}"}
        )

    def do_GET(self) -> None:
        self.note()
        name = self.path.partition("?")[0].removeprefix("/bucket/")
        content = self.server_state.archives[name]
        headers = {
            "ETag": f'"{hashlib.md5(content).hexdigest()}"',
            "Last-Modified": "Mon, 02 Mar 2026 10:00:00 GMT",
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        sent = self.server_state.cut.pop(0) if self.server_state.cut else None
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and self.headers.get("If-Range") in (None, headers["ETag"]):
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.answer(206, headers, content[start:], sent)
        return self.answer(200, headers, content, sent)


def certificate(path: pathlib.Path) -> pathlib.Path:
    """A key and a certificate for `HOSTS`, in one file."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in HOSTS]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(key.private_bytes(*plain) + made.public_bytes(serialization.Encoding.PEM))
    return path
