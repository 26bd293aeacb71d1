"""The fake of Google Cloud Storage, before anything is tested with it: against the known traps of
such fakes, one by one.

Three clients: raw HTTP for what the protocol says, TensorFlow's own gs:// client, and
google-cloud-storage.
"""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import urllib.parse

import fake_gcs
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT
from google.api_core import exceptions, retry
from google.cloud import storage as client_library

gfile = tf.io.gfile
UPLOAD = "/upload/storage/v1/b/bucket/o"
OBJECTS = "/storage/v1/b/bucket/o"


class Raw:
    """Requests to the fake as bytes go over the wire, over plain HTTP, one connection for all."""

    def __init__(self, server: fake_gcs.Server) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)

    def __call__(
        self, method: str, path: str, body: bytes = b"", **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request(method, path, body, named)
        answer = self._connection.getresponse()
        return answer.status, answer.headers, answer.read()


@pytest.fixture
def raw(gcs: fake_gcs.Server) -> Raw:
    return Raw(gcs)


def start(raw: Raw, name: str, more: str = "") -> str:
    status, headers, _ = raw("POST", f"{UPLOAD}?uploadType=resumable&name={name}{more}")
    assert status == 200
    return str(headers["Location"]).partition("/upload")[1] + str(headers["Location"]).partition("/upload")[2]


# -- what the protocol says


def test_nothing_stored_is_told_without_a_range(gcs: fake_gcs.Server, raw: Raw) -> None:
    where = start(raw, "x")
    status, headers, _ = raw("PUT", where, Content_Range="bytes */500")
    assert (status, headers["Range"]) == (308, None)
    quantum = b"q" * fake_gcs.QUANTUM
    status, headers, _ = raw("PUT", where, quantum, Content_Range=f"bytes 0-{len(quantum) - 1}/{len(quantum) + 3}")
    assert (status, headers["Range"]) == (308, f"bytes=0-{len(quantum) - 1}")
    assert gcs.names("bucket") == [], "an upload that is not complete shows"
    status, _, body = raw(
        "PUT", where, b"end", Content_Range=f"bytes {len(quantum)}-{len(quantum) + 2}/{len(quantum) + 3}"
    )
    assert (status, json.loads(body)["size"]) == (200, str(len(quantum) + 3))
    assert gcs.get("bucket", "x") == quantum + b"end"
    again, _, body = raw("PUT", where, Content_Range=f"bytes */{len(quantum) + 3}")
    assert (again, json.loads(body)["name"]) == (200, "x"), "a complete upload says so when it is asked"


def test_pieces_below_the_quantum_are_not_kept(gcs: fake_gcs.Server, raw: Raw) -> None:
    where = start(raw, "x")
    status, headers, _ = raw("PUT", where, b"abc", Content_Range="bytes 0-2/10")
    assert (status, headers["Range"]) == (308, None)
    assert raw("PUT", where, b"0123456789", Content_Range="bytes 0-9/10")[0] == 200
    assert gcs.get("bucket", "x") == b"0123456789"


def test_pieces_that_are_not_what_they_say_are_refused(raw: Raw) -> None:
    where = start(raw, "x")
    assert raw("PUT", where, b"abc", Content_Range="bytes 0-9/10")[0] == 400
    assert raw("PUT", where, b"abc", Content_Range="bytes 7-9/10")[0] == 503
    assert raw("PUT", UPLOAD + "?uploadType=resumable&upload_id=nobody", b"abc")[0] == 404


def test_a_range_past_the_end_is_416(gcs: fake_gcs.Server, raw: Raw) -> None:
    gcs.put("bucket", "a b/c", b"0123456789")
    path = OBJECTS + "/a%20b%2Fc?alt=media"
    assert raw("GET", path, Range="bytes=10-20")[0] == 416
    status, headers, body = raw("GET", path, Range="bytes=8-200")
    assert (status, body, headers["Content-Range"]) == (206, b"89", "bytes 8-9/10")
    assert raw("GET", path, Range="bytes=-3")[2] == b"789"
    assert raw("GET", path, Range="bytes=4-")[2] == b"456789"
    assert raw("GET", path)[::2] == (200, b"0123456789")
    gcs.put("bucket", "empty", b"")
    assert raw("GET", OBJECTS + "/empty?alt=media", Range="bytes=0-9")[0] == 416
    assert raw("GET", OBJECTS + "/nobody?alt=media")[0] == 404
    assert raw("GET", "/storage/v1/b/nowhere/o/x")[0] == 404


def test_preconditions(gcs: fake_gcs.Server, raw: Raw) -> None:
    one = f"{UPLOAD}?uploadType=media&name=x&ifGenerationMatch="
    assert raw("POST", one + "0", b"1")[0] == 200
    assert raw("POST", one + "0", b"2")[0] == 412
    generation = json.loads(raw("GET", OBJECTS + "/x")[2])["generation"]
    assert raw("POST", one + "7", b"2")[0] == 412
    assert gcs.get("bucket", "x") == b"1"
    assert raw("POST", one + generation, b"2")[0] == 200
    assert raw("DELETE", f"{OBJECTS}/x?ifGenerationMatch={generation}")[0] == 412, "it has another generation now"
    assert raw("GET", f"{OBJECTS}/x?generation={generation}")[0] == 404
    now = json.loads(raw("GET", OBJECTS + "/x")[2])["generation"]
    assert int(now) > int(generation)
    assert raw("GET", f"{OBJECTS}/x?ifGenerationNotMatch={now}")[0] == 304
    assert raw("POST", f"{OBJECTS}/x/rewriteTo/b/bucket/o/x?ifGenerationMatch=0")[0] == 412
    assert raw("POST", f"{OBJECTS}/x/rewriteTo/b/bucket/o/y?ifSourceGenerationMatch=1")[0] == 412
    assert raw("POST", f"{OBJECTS}/x/rewriteTo/b/bucket/o/y?ifGenerationMatch=0")[0] == 200
    assert raw("PATCH", OBJECTS + "/y", b'{"metadata": {"a": "b"}}')[0] == 200
    resource = json.loads(raw("GET", OBJECTS + "/y")[2])
    assert (resource["metageneration"], resource["metadata"]) == ("2", {"a": "b"})
    assert raw("DELETE", f"{OBJECTS}/y?ifMetagenerationMatch=1")[0] == 412
    assert raw("DELETE", f"{OBJECTS}/y?ifMetagenerationMatch=2")[0] == 204
    assert raw("DELETE", OBJECTS + "/y")[0] == 404


def test_two_uploads_race_for_a_name_and_one_wins(gcs: fake_gcs.Server, raw: Raw) -> None:
    first, second = (start(raw, "x", "&ifGenerationMatch=0") for _ in range(2))
    assert raw("PUT", second, b"second", Content_Range="bytes 0-5/6")[0] == 200
    assert raw("PUT", first, b"first", Content_Range="bytes 0-4/5")[0] == 412, "it is checked when the upload completes"
    assert gcs.get("bucket", "x") == b"second"


def test_lists_come_in_pages(gcs: fake_gcs.Server, raw: Raw) -> None:
    for name in ("a/1", "a/2", "a/b/1", "a/b/2", "a/c/1", "a/d", "b"):
        gcs.put("bucket", name, b"")
    gcs.page_size = 2
    seen: list[str] = []
    pages, token = 0, ""
    while True:
        query = urllib.parse.urlencode({"prefix": "a/", "delimiter": "/", "pageToken": token})
        told = json.loads(raw("GET", f"{OBJECTS}?{query}")[2])
        seen += told.get("prefixes", []) + [item["name"] for item in told.get("items", [])]
        pages += 1
        if not (token := told.get("nextPageToken", "")):
            break
    assert (sorted(seen), pages) == (["a/1", "a/2", "a/b/", "a/c/", "a/d"], 3)
    assert len(json.loads(raw("GET", f"{OBJECTS}?maxResults=1")[2])["items"]) == 1


def test_checksums_are_told_and_checked(gcs: fake_gcs.Server, raw: Raw) -> None:
    gcs.put("bucket", "x", b"123456789")
    told = json.loads(raw("GET", OBJECTS + "/x")[2])
    assert told["crc32c"] == "4waSgw==", "CRC32C of 123456789 is 0xE3069283"
    assert base64.b64decode(told["md5Hash"]).hex() == "25f9e794323b453885f5181f1b624d0b", "MD5 of 123456789"
    assert told["updated"].endswith("Z")
    wrong = (
        b'--b\r\nContent-Type: application/json\r\n\r\n{"name": "y", "crc32c": "AAAAAA=="}\r\n--b\r\n\r\nhi\r\n--b--'
    )
    assert raw("POST", UPLOAD + "?uploadType=multipart", wrong, Content_Type="multipart/related; boundary=b")[0] == 400
    assert raw("POST", UPLOAD + "?uploadType=multipart", wrong.replace(b'"AAAAAA=="', json.dumps(
        fake_gcs.Object(b"hi", 0).crc32c).encode()), Content_Type="multipart/related; boundary=b")[0] == 200  # fmt: skip
    assert gcs.get("bucket", "y") == b"hi"


def test_compose(gcs: fake_gcs.Server, raw: Raw) -> None:
    gcs.put("bucket", "a", b"1")
    gcs.put("bucket", "b", b"2")
    body = json.dumps({"sourceObjects": [{"name": "a"}, {"name": "b"}, {"name": "a"}]}).encode()
    assert raw("POST", OBJECTS + "/c/compose?ifGenerationMatch=0", body)[0] == 200
    assert gcs.get("bucket", "c") == b"121"
    assert raw("POST", OBJECTS + "/c/compose?ifGenerationMatch=0", body)[0] == 412


def test_what_is_not_known_is_not_made_up(raw: Raw) -> None:
    assert raw("GET", "/storage/v1/b/bucket/acl")[0] == 501
    assert raw("POST", "/batch/storage/v1")[0] == 501


def test_the_proxy_leads_to_google_alone(gcs: fake_gcs.Server) -> None:
    with socket.create_connection(("127.0.0.1", gcs.port), timeout=10) as to_proxy:
        to_proxy.sendall(b"CONNECT example.com:443 HTTP/1.1\r\n\r\n")
        assert to_proxy.recv(100).split()[1] == b"502"


def test_tls_location_and_expect_100(gcs: fake_gcs.Server) -> None:
    """As TensorFlow's curl uploads: chunked, a Content-Length besides, and no body before the
    server said 100.
    """
    context = ssl.create_default_context(cafile=gcs.ca)
    with socket.create_connection(("127.0.0.1", gcs.port), timeout=10) as plain:
        plain.sendall(b"CONNECT www.googleapis.com:443 HTTP/1.1\r\n\r\n")
        assert plain.recv(1000).startswith(b"HTTP/1.1 200")
        with context.wrap_socket(plain, server_hostname="www.googleapis.com") as secure:
            head = f"POST {UPLOAD}?uploadType=resumable&name=x HTTP/1.1\r\nHost: www.googleapis.com\r\n"
            secure.sendall(f"{head}Content-Length: 0\r\n\r\n".encode())
            answer = secure.recv(10_000).decode()
            location = answer.split("\r\nLocation: ")[1].split("\r\n")[0]  # as TensorFlow looks: by this very case
            assert location.startswith("https://www.googleapis.com/")
            path = location.removeprefix("https://www.googleapis.com")
            secure.sendall(
                f"PUT {path} HTTP/1.1\r\nHost: www.googleapis.com\r\nContent-Range: bytes 0-4/5\r\n"
                "Content-Length: 5\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n".encode()
            )
            assert secure.recv(1000).startswith(b"HTTP/1.1 100")
            secure.sendall(b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n")
            assert secure.recv(1000).startswith(b"HTTP/1.1 200")
    assert gcs.get("bucket", "x") == b"hello"


# -- TensorFlow's own client


def test_tensorflow_reads_writes_lists_renames_and_deletes(gcs_here: fake_gcs.Server) -> None:
    assert gfile.exists("gs://bucket/")
    assert not gfile.exists("gs://bucket/x")
    for name, content in {"a/x y+%": b"hello", "a/empty": b"", "a/b/c": b"deep"}.items():
        with gfile.GFile(f"gs://bucket/{name}", "wb") as file:
            file.write(content)
        with gfile.GFile(f"gs://bucket/{name}", "rb") as file:
            assert file.read() == content
        assert gcs_here.get("bucket", name) == content
    with gfile.GFile("gs://bucket/a/x y+%", "rb") as file:
        file.seek(4)
        assert file.read() == b"o"
        file.seek(5)
        assert file.read() == b""
    assert sorted(gfile.listdir("gs://bucket/a")) == ["b/", "empty", "x y+%"]
    assert gfile.glob("gs://bucket/a/*") == ["gs://bucket/a/b", "gs://bucket/a/empty", "gs://bucket/a/x y+%"]
    gfile.rename("gs://bucket/a/b/c", "gs://bucket/a/b/d")
    assert gcs_here.names("bucket", "a/b/") == ["a/b/d"]
    with pytest.raises(tf.errors.NotFoundError):
        gfile.GFile("gs://bucket/a/b/c", "rb").read()
    with gfile.GFile("gs://bucket/a/b/d", "ab") as file:
        file.write(b"er")
    assert gcs_here.get("bucket", "a/b/d") == b"deeper"
    gfile.makedirs("gs://bucket/d/e")
    marker = gcs_here.requests("upload")[-1]
    assert "uploadType=media" in marker.path
    assert "ifGenerationMatch=0" in marker.path
    gfile.rmtree("gs://bucket/a")
    assert gcs_here.names("bucket") == ["d/", "d/e/"]
    assert all(request.tls and request.headers["Authorization"] == "Bearer a-token" for request in gcs_here.log)


def test_tensorflow_lists_what_needs_many_pages(gcs_here: fake_gcs.Server) -> None:
    for number in range(23):
        gcs_here.put("bucket", f"many/{number:02}", b"")
    gcs_here.page_size = 5
    assert gfile.listdir("gs://bucket/many") == [f"{number:02}" for number in range(23)]
    assert len(gcs_here.requests("list")) >= 5


def test_tensorflow_goes_on_with_an_upload_that_broke_off(gcs_here: fake_gcs.Server) -> None:
    content = np.random.default_rng(0).bytes(900_000)
    faults = [
        gcs_here.fail("broken", "chunk"),
        gcs_here.fail(503, "chunk"),
        gcs_here.fail(503, "start"),
        gcs_here.fail("broken", "read"),
    ]
    with gfile.GFile("gs://bucket/big", "wb") as file:
        file.write(content)
    with gfile.GFile("gs://bucket/big", "rb") as file:
        assert file.read() == content
    assert [fault.consumed for fault in faults] == [1, 1, 1, 1]
    pieces = [request.range for request in gcs_here.requests("chunk")]
    assert pieces == ["bytes 0-899999/900000"] + ["bytes 262144-899999/900000"] * 2, "it did not go on at byte 262,144"


WORK = """
import tensorflow as tf
with tf.io.TFRecordWriter("gs://bucket/r.tfrecord") as writer:
    for number in range(50):
        writer.write(f"record {number}".encode() * 100)
read = [r.numpy() for r in tf.data.TFRecordDataset("gs://bucket/r.tfrecord")]
assert read == [f"record {number}".encode() * 100 for number in range(50)]
variable = tf.Variable(tf.random.stateless_normal([1000], (1, 2)))
manager = tf.train.CheckpointManager(tf.train.Checkpoint(v=variable), "gs://bucket/ckpt", max_to_keep=2)
for _ in range(3):
    variable.assign_add(tf.ones([1000]))
    manager.save()
assert manager.checkpoints == ["gs://bucket/ckpt/ckpt-2", "gs://bucket/ckpt/ckpt-3"]
kept = variable.numpy()
with tf.io.gfile.GFile("gs://bucket/mark", "wb") as mark:
    mark.write("-")
manager.save()
variable.assign(tf.zeros([1000]))
tf.train.Checkpoint(v=variable).restore(manager.latest_checkpoint).assert_consumed()
assert (variable.numpy() == kept).all()
writer = tf.summary.create_file_writer("gs://bucket/tb")
with writer.as_default(step=1):
    tf.summary.scalar("x", 1.0)
writer.close()
(name,) = tf.io.gfile.glob("gs://bucket/tb/events*")
assert len(list(tf.data.TFRecordDataset(name))) == 2
"""


def test_tensorflow_records_checkpoints_and_summaries(gcs: fake_gcs.Server) -> None:
    """In a process of its own: some of these calls let no other Python thread run while they wait
    for the server.
    """
    subprocess.run([sys.executable, "-c", WORK], env=os.environ | gcs.env, check=True)
    mark = gcs.requests(match="mark")[-1].number
    changes = [r.kind for r in gcs.log if r.kind in fake_gcs.MUTATING and r.number > mark and "tb/" not in r.object]
    deleted = 2  # what is older than max_to_keep
    assert len(changes) == 23 + deleted, "a save of TensorFlow's is known to make 23 changes"


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        ("403", tf.errors.PermissionDeniedError),
        ("404", tf.errors.NotFoundError),
        ("412", tf.errors.FailedPreconditionError),
        ("503", tf.errors.AbortedError),
        ("429", tf.errors.AbortedError),
        ("reset", tf.errors.AbortedError),
        ("broken", tf.errors.AbortedError),
    ],
)
def test_faults_reach_tensorflow(gcs_here: fake_gcs.Server, failure: str, error: type[Exception]) -> None:
    gcs_here.put("bucket", "x", b"content")
    fault = gcs_here.fail(failure, "read", times=None)
    with pytest.raises(error):
        gfile.GFile("gs://bucket/x", "rb").read()
    assert fault.consumed == (4 if error is tf.errors.AbortedError else 1), (
        "the client tries 3 times more, or not at all"
    )
    assert gcs_here.heal() == [fault]
    assert gfile.GFile("gs://bucket/x", "rb").read() == b"content"


def test_faults_by_number_object_and_count(gcs: fake_gcs.Server, raw: Raw) -> None:
    gcs.put("bucket", "x", b"")
    gcs.put("bucket", "y", b"")
    by_number = gcs.fail(500, number=2)
    assert [raw("GET", OBJECTS + "/x")[0] for _ in range(3)] == [200, 500, 200]
    by_object = gcs.fail(429, "stat", match="y", after=1, times=2)
    assert [raw("GET", OBJECTS + "/y")[0] for _ in range(4)] == [200, 429, 429, 200]
    assert raw("GET", OBJECTS + "/x")[0] == 200
    assert [(f.consumed, f.seen) for f in (by_number, by_object)] == [(1, 1), (2, 4)]


def test_a_lost_answer_is_to_a_request_that_was_done(gcs: fake_gcs.Server, raw: Raw) -> None:
    gcs.put("bucket", "x", b"")
    for failure, left in (("reset", ["x"]), ("lost", [])):
        gcs.fail(failure, "delete")
        with pytest.raises(ConnectionError):
            raw("DELETE", OBJECTS + "/x")
        assert gcs.names("bucket") == left


def test_a_stall_gives_no_answer(gcs: fake_gcs.Server, raw: Raw) -> None:
    gcs.stall_seconds = 0.3
    gcs.fail("stall", "stat")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        raw("GET", OBJECTS + "/x")
    assert gcs.log[-1].status == 0


CHANGES = f"""
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
for n in range(5):
    connection.request("POST", "{UPLOAD}?uploadType=media&name=" + str(n), b"x")
    connection.getresponse().read()
    connection.request("GET", "{OBJECTS}/" + str(n))
    connection.getresponse().read()
"""


def test_kill_after_the_nth_change(gcs: fake_gcs.Server) -> None:
    for changes in (1, 3):
        gcs.reset("bucket")
        with gcs.lock:  # it cannot get ahead of us
            process = subprocess.Popen([sys.executable, "-c", CHANGES, str(gcs.port)])
            gcs.kill_after(changes, process.pid)
        assert process.wait(60) == -signal.SIGKILL
        assert gcs.names("bucket") == [str(n) for n in range(changes)]
        assert gcs.mutations == changes
        assert gcs.log[-1].status == 0, "the client was told of its last change"
        assert gcs.killed == [process.pid]


def test_kill_after_a_change_of_a_kind(gcs: fake_gcs.Server) -> None:
    with gcs.lock:
        process = subprocess.Popen([sys.executable, "-c", CHANGES, str(gcs.port)])
        gcs.kill_after(1, process.pid, "upload", "3")
    assert process.wait(60) == -signal.SIGKILL
    assert gcs.names("bucket") == ["0", "1", "2", "3"]
    with gcs.lock:
        process = subprocess.Popen([sys.executable, "-c", CHANGES, str(gcs.port)])
        gcs.kill_after(1, process.pid, "delete")
    assert process.wait(60) == 0


def test_sprinkled_faults_leave_two_of_three_neighbours_alone(gcs: fake_gcs.Server) -> None:
    drawn = []
    for seed in (1, 1, 2):
        gcs.heal()
        gcs.sprinkle(seed, 0.2, ("503", "reset"))
        drawn.append([(fault.number, fault.failure) for fault in gcs.faults])
    assert drawn[0] == drawn[1] != drawn[2]
    numbers = [number for number, _ in drawn[0] if number]
    assert min(b - a for a, b in itertools.pairwise(numbers)) == 3
    assert 500 < len(numbers) < 700
    assert {failure for _, failure in drawn[0]} == {"503", "reset"}


def test_a_token_may_be_required(gcs: fake_gcs.Server, raw: Raw) -> None:
    gcs.token = "secret"
    context = ssl.create_default_context(cafile=gcs.ca)
    for sent, status in (
        ("", 401),
        ("Authorization: Bearer other\r\n", 403),
        ("Authorization: Bearer secret\r\n", 200),
    ):
        with socket.create_connection(("127.0.0.1", gcs.port), timeout=10) as plain:
            plain.sendall(b"CONNECT storage.googleapis.com:443 HTTP/1.1\r\n\r\n")
            assert plain.recv(1000).startswith(b"HTTP/1.1 200")
            with context.wrap_socket(plain, server_hostname="storage.googleapis.com") as secure:
                secure.sendall(f"GET {OBJECTS} HTTP/1.1\r\nHost: storage.googleapis.com\r\n{sent}\r\n".encode())
                assert secure.recv(1000).startswith(f"HTTP/1.1 {status}".encode())
    assert raw("GET", OBJECTS)[0] == 200, "an emulator over plain HTTP knows no accounts"


# -- google-cloud-storage


def test_the_python_library(gcs_here: fake_gcs.Server) -> None:
    client = client_library.Client()
    bucket = client.bucket("bucket")
    assert bucket.exists()
    assert not client.bucket("nowhere").exists()
    small, large = bucket.blob("a/small"), bucket.blob("a/large", chunk_size=fake_gcs.QUANTUM)
    small.upload_from_string("hello")
    content = np.random.default_rng(1).bytes(700_000)
    large.upload_from_file(io.BytesIO(content))
    assert len(gcs_here.requests("chunk")) == 3
    assert bucket.blob("a/large").download_as_bytes() == content
    assert bucket.blob("a/large").download_as_bytes(start=10, end=19) == content[10:20]
    gcs_here.page_size = 1
    assert [blob.name for blob in client.list_blobs("bucket", prefix="a/")] == ["a/large", "a/small"]
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("a/small").upload_from_string("again", if_generation_match=0)
    small.reload()
    copied = bucket.copy_blob(small, bucket, "b", if_generation_match=0)
    assert (copied.crc32c, copied.md5_hash) == (small.crc32c, small.md5_hash)
    bucket.blob("c").compose([small, copied])
    assert gcs_here.get("bucket", "c") == b"hellohello"
    bucket.rename_blob(copied, "d")
    bucket.blob("c").delete(if_generation_match=bucket.get_blob("c").generation)
    with pytest.raises(exceptions.NotFound):
        bucket.blob("c").delete()
    assert gcs_here.names("bucket") == ["a/large", "a/small", "d"]
    gcs_here.fail(503, "stat")
    quick = retry.Retry(predicate=retry.if_transient_error, initial=0.01, timeout=5)
    assert bucket.blob("d").exists(retry=quick)
    assert not any(request.tls for request in gcs_here.log)


def test_by_hand(gcs: fake_gcs.Server) -> None:  # noqa: ARG001
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/fake_gcs.py"), "--bucket=mine", "--fail=503:stat", "--log"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    told: dict[str, str] = {}
    while (line := process.stdout.readline().strip()) != "# ready":
        name, _, value = line.removeprefix("export ").partition("=")
        told[name] = value.strip("'")
    port = int(told["STORAGE_EMULATOR_HOST"].rsplit(":", 1)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    statuses = []
    for _ in range(2):
        connection.request("GET", "/storage/v1/b/mine/o/x")
        answer = connection.getresponse()
        answer.read()
        statuses.append(answer.status)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert statuses == [503, 404]
    assert "503:stat consumed 1" in errors
    assert "1 GET stat mine x" in errors
