"""gs:// with TensorFlow's own client against a fake: answers, passing faults and lasting faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import fake_gcs
import pytest
import tensorflow as tf

from trainer.core.errors import DataError
from trainer.io import files, gcs_client

OLD, NEW = b"old" * 100_000, b"new" * 300_000  # the new one takes more than one of an upload's quanta
FAILURES = ("503", "429", "500", "reset", "lost", "broken", "stall", "403", "404", "412")


def write() -> bytes:
    files.write("gs://bucket/d/x", NEW, "a thing")
    return NEW


def rename() -> None:
    tf.io.gfile.rename("gs://bucket/d/x", "gs://bucket/d/z", overwrite=True)


# What makes a request of a kind, what it returns and the objects afterwards.
Work = tuple[Callable[[], Any], Any, dict[str, bytes]]
STAYS = {"d/x": OLD, "d/y": b"y"}
WORK: dict[str, Work] = {
    "stat": (lambda: files.exists("gs://bucket/d/x"), True, STAYS),
    "list": (lambda: files.names("gs://bucket/d"), ["x", "y"], STAYS),
    "read": (lambda: files.read("gs://bucket/d/x", "a thing"), OLD, STAYS),
    "start": (write, NEW, STAYS | {"d/x": NEW}),
    "chunk": (write, NEW, STAYS | {"d/x": NEW}),
    "status": (write, NEW, STAYS | {"d/x": NEW}),
    "delete": (lambda: files.remove("gs://bucket/d/x"), None, {"d/y": b"y"}),
    "rewrite": (rename, None, {"d/z": OLD, "d/y": b"y"}),
}
# "There is none" is an answer and no fault.
ANSWERS = {("stat", "404"): (False, STAYS), ("list", "404"): ([], STAYS), ("delete", "404"): (None, STAYS)}
# Where the status of an upload is refused, the upload is restarted and succeeds.
RESTARTED = {("status", "403"), ("status", "404"), ("status", "412")}
# No job renames in a bucket, so a refused rename is not repeated.
REFUSALS = ("403", "404", "412")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.time, "sleep", lambda _: None)


def fill(server: fake_gcs.Server, kind: str) -> None:
    server.reset("bucket")
    server.put("bucket", "d/x", OLD)
    server.put("bucket", "d/y", b"y")
    if kind == "status":
        server.fail("broken", "chunk")  # only then is the status asked for
    server.stall_seconds = 30


def objects(server: fake_gcs.Server) -> dict[str, bytes]:
    return {name: server.get("bucket", name) for name in server.names("bucket")}


@pytest.mark.parametrize("kind", WORK)
def test_what_passes_is_not_felt(gcs_here: fake_gcs.Server, kind: str) -> None:
    work, returned, left = WORK[kind]
    for failure in FAILURES:
        for times in (1,) if failure == "stall" else (1, 2):
            if kind == "rewrite" and failure in REFUSALS:
                continue
            fill(gcs_here, kind)
            fault = gcs_here.fail(failure, kind, times=times)
            case = (kind, failure, times)
            if (kind, failure) in ANSWERS and (kind, times) != ("list", 1):  # a folder is looked for twice
                assert (work(), objects(gcs_here)) == ANSWERS[kind, failure], case
                continue
            assert work() == returned, case
            assert objects(gcs_here) == left, case
            # A request whose answer was lost was served: what follows may need no second one.
            assert 1 <= fault.consumed <= times, case
            assert failure == "lost" or fault.consumed == times or kind == "status", case


def lasting(server: fake_gcs.Server, kind: str, failure: str) -> None:
    work, _, _ = WORK[kind]
    fill(server, kind)
    fault = server.fail(failure, kind, times=None)
    if (kind, failure) in RESTARTED:
        assert work() == NEW
        assert fault.consumed
        return
    with pytest.raises((DataError, tf.errors.OpError)) as caught:
        work()
    assert fault.consumed >= 1
    if kind == "rewrite":
        return
    text = str(caught.value)
    assert isinstance(caught.value, DataError), text
    assert "\n" not in text
    assert "gs://bucket" in text
    expected = {
        "403": "roles/storage.objectAdmin",
        "404": "check that the bucket gs://bucket exists",
        "412": "another process is writing there",
        "429": "gets too many requests",
    }.get(failure, "gs://bucket does not answer")
    if (kind, failure) in (
        ("chunk", "404"),
        ("status", "404"),
    ):  # the client begins the upload anew, and says so at the end
        expected = "gs://bucket"
    assert expected in text
    if failure.isdigit() and (kind, failure) != ("chunk", "404"):
        assert f"HTTP {failure} (injected {failure})" in text
    # Nothing half done. A delete whose answer is lost each time was done.
    after = objects(server)
    if kind == "delete" and failure in ("lost", "broken"):
        assert after in (STAYS, {"d/y": b"y"})
    elif kind in ("start", "chunk", "status"):
        assert after["d/x"] in (OLD, NEW)
    else:
        assert after == STAYS


@pytest.mark.parametrize("kind", WORK)
def test_what_lasts_is_one_line_and_nothing_is_torn(gcs_here: fake_gcs.Server, kind: str) -> None:
    for failure in FAILURES:
        if (kind, failure) in ANSWERS or failure in ("stall", "lost"):
            continue
        if kind in ("delete", "chunk", "rewrite") and failure == "broken":
            continue  # done all the same: see the test of what passes
        lasting(gcs_here, kind, failure)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORK)
def test_a_stall_that_lasts(gcs_here: fake_gcs.Server, kind: str) -> None:
    lasting(gcs_here, kind, "stall")


@pytest.mark.parametrize("failure", ["403", "503", "reset"])
def test_a_folder_that_cannot_be_looked_at_is_not_empty(gcs_here: fake_gcs.Server, failure: str) -> None:
    """listdir raises "not found": a run would find no checkpoints and start again."""
    # A new name: TensorFlow caches for some seconds that a folder exists, and then raises the right
    # error.
    gcs_here.reset("bucket")
    folder = f"seldom-{failure}"
    for name in ("x", "y"):
        gcs_here.put("bucket", f"{folder}/{name}", b"")
    gcs_here.fail(failure, "list", times=None)
    with pytest.raises(tf.errors.NotFoundError):
        tf.io.gfile.listdir(f"gs://bucket/{folder}")
    with pytest.raises(DataError, match=f"cannot list gs://bucket/{folder}"):
        files.names(f"gs://bucket/{folder}")
    gcs_here.heal()
    gcs_here.put("bucket", f"{folder}/deep/er/z", b"")
    assert files.names(f"gs://bucket/{folder}") == ["deep", "x", "y"]
    assert files.names("gs://bucket/nothing") == []


def test_a_missing_bucket(gcs_here: fake_gcs.Server) -> None:
    with pytest.raises(DataError, match=r"check that the bucket gs://nowhere exists"):
        files.write("gs://nowhere/x", b"1", "a thing")
    with pytest.raises(
        DataError, match=r"--workdir gs://nowhere/w is not writable: .*check that the bucket gs://nowhere"
    ):
        files.require_writable("gs://nowhere/w", "--workdir")
    assert gcs_here.requests("start")


def test_what_errors_mean() -> None:
    body = '{"error": {"code": 401, "message": "Anonymous caller does not have storage.objects.get access"}}'
    text = f"Error executing an HTTP request: HTTP response code 401 with body '{body}'\n\t when reading"
    assert gcs_client.explain(text, "gs://b/x").startswith("HTTP 401 (Anonymous caller does not")
    assert "GOOGLE_APPLICATION_CREDENTIALS" in gcs_client.explain(text, "gs://b/x")
    resolve = "Error executing an HTTP request: libcurl code 6 meaning 'Couldn't resolve host name'"
    assert (
        gcs_client.explain(resolve, "gs://b/x")
        == "libcurl code 6 meaning 'Couldn't resolve host name'; check the network connection"
    )
    assert files.reason(ValueError("anything"), "/a/b") == "anything"


CHILD = """
import json, sys, threading, time
from trainer.io import files
found = {}
def one(kind, work):
    began = time.monotonic()
    try:
        work()
        text = ""
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    found[kind] = (time.monotonic() - began, text)
works = {
    "stat": lambda: files.exists("gs://bucket/stat"),
    "list": lambda: files.names("gs://bucket/list"),
    "read": lambda: files.read("gs://bucket/read", "a thing"),
    "start": lambda: files.write("gs://bucket/start", b"new", "a thing"),
    "chunk": lambda: files.write("gs://bucket/chunk", b"new", "a thing"),
    "delete": lambda: files.remove("gs://bucket/delete"),
}
threads = [threading.Thread(target=one, args=pair) for pair in works.items()]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(found))
"""


def child(server: fake_gcs.Server, code: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs code with the settings that users get."""
    inherited = {name: value for name, value in os.environ.items() if name not in fake_gcs.KNOBS}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | server.route | more,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


FAILED = """
from trainer.io import files
from trainer.core.errors import DataError
try:
    files.write("gs://bucket/x", b"new", "a thing")
except DataError as error:
    print(error)
"""


def test_a_failed_upload_is_not_begun_again_unseen(gcs: fake_gcs.Server) -> None:
    """TensorFlow would when the file is destroyed, at the latest when its process ends.

    There no Python thread may run, so the server must be in another process.
    """
    fault = gcs.fail("503", "start", times=None)
    done = child(gcs, FAILED, **fake_gcs.KNOBS)
    assert "cannot write a thing gs://bucket/x: HTTP 503 (injected 503), 4 times" in done.stdout, done.stderr
    assert fault.consumed == 1 + int(fake_gcs.KNOBS["GCS_RETRY_CONFIG_MAX_RETRIES"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["stall", "503", "reset"])
def test_what_lasts_ends_within_a_minute(gcs: fake_gcs.Server, failure: str) -> None:
    """With the settings that users get, every kind of request at once."""
    for kind in ("stat", "list/x", "read", "start", "chunk", "delete"):
        gcs.put("bucket", kind, b"old")
    gcs.stall_seconds = 300
    for kind in ("stat", "list", "read", "start", "chunk", "status", "delete"):
        gcs.fail(failure, kind, times=None, match="" if kind in ("list", "status") else kind)
    done = child(gcs, CHILD)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 6
    for kind, (seconds, text) in found.items():
        assert text.startswith("DataError: cannot "), (kind, text)
        assert "does not answer" in text
        assert seconds < 60, (kind, seconds)
    for kind in ("stat", "read", "start", "chunk", "delete"):
        assert gcs.get("bucket", kind) == b"old"


def test_no_credentials_are_said_at_once(gcs: fake_gcs.Server, tmp_path: Any) -> None:
    """The client falls back to an empty token and keeps it as long as the process runs: it must
    stop.
    """
    gcs.token = "real"
    began = time.monotonic()
    done = child(
        gcs,
        "import sys; from trainer import cli; sys.exit(cli.main(['prepare', '--verify=gs://bucket/data']))",
        GOOGLE_AUTH_TOKEN_FOR_TESTING="",
        GOOGLE_APPLICATION_CREDENTIALS="",
        CLOUDSDK_CONFIG=str(tmp_path),
        HOME=str(tmp_path),
    )
    assert done.returncode == 3
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "gs://bucket/data/dataset.json: HTTP 401" in line
    assert "gcloud auth application-default login" in line
    assert time.monotonic() - began < 60


def test_defaults_are_set_unless_they_are_set_already() -> None:
    code = (
        "import os; from trainer.io import gcs_client; gcs_client.set_defaults(); "
        "print({name: os.environ[name] for name in gcs_client.DEFAULTS})"
    )
    inherited = {name: value for name, value in os.environ.items() if name not in gcs_client.DEFAULTS}
    for own in ({}, {"GCS_RETRY_CONFIG_MAX_RETRIES": "10"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env=inherited | own, capture_output=True, text=True, check=True
        )
        assert eval(done.stdout) == gcs_client.DEFAULTS | own  # noqa: S307
    code = "import os; from trainer import cli; cli._import_tensorflow(); print(os.environ['GCS_RETRY_CONFIG_MAX_RETRIES'])"
    done = subprocess.run([sys.executable, "-c", code], env=inherited, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == gcs_client.DEFAULTS["GCS_RETRY_CONFIG_MAX_RETRIES"]
