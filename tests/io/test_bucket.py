"""Objects in a bucket: conditions, repetitions, and errors that are one line."""

from __future__ import annotations

import io

import fake_gcs
import google_crc32c
import pytest
from conftest import ROOT

from trainer.core.errors import DataError
from trainer.io import bucket
from trainer.io.bucket import Conflict, GcsBucket, ObjectInfo, Unavailable


@pytest.fixture
def gcs_bucket(gcs_here: fake_gcs.Server) -> GcsBucket:
    """The fake's bucket, which is given up on soon."""
    del gcs_here
    return bucket.open_bucket("gs://bucket", "--out", request_seconds=5.0, retry_seconds=2.0)[0]


def test_google_cloud_storage_is_called_in_one_module() -> None:
    words = ("google.cloud", "google.api_core", "google.auth", "requests.exceptions")
    users = {
        str(path.relative_to(ROOT / "trainer"))
        for path in (ROOT / "trainer").rglob("*.py")
        for word in words
        if f"from {word}" in path.read_text() or f"import {word}" in path.read_text()
    }
    assert users == {"io/bucket.py"}


@pytest.mark.parametrize("path", ["gs://bucket/a/b", "gs://bucket/a/b/"])
@pytest.mark.usefixtures("gcs_here")
def test_a_path_is_a_bucket_and_a_name(path: str) -> None:
    assert bucket.is_bucket(path)
    assert bucket.open_bucket(path, "--out", 5.0, 2.0)[1] == "a/b"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/x", "--out=s3://bucket/x: only local folders and gs:// are supported"),
        ("gs:///x", "the name of a bucket is missing"),
    ],
)
def test_paths_that_are_no_bucket(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        bucket.open_bucket(path, "--out", 5.0, 2.0)


def test_an_object_is_only_changed_in_the_expected_generation(gcs_bucket: GcsBucket) -> None:
    assert gcs_bucket.read("x") == (0, b"")
    assert gcs_bucket.stat("x") is None
    first = gcs_bucket.write("x", b"1", 0)
    assert gcs_bucket.read("x") == (first, b"1")
    with pytest.raises(Conflict):
        gcs_bucket.write("x", b"2", 0)
    second = gcs_bucket.write("x", b"2", first)
    with pytest.raises(Conflict):
        gcs_bucket.delete("x", first)
    assert gcs_bucket.read("x") == (second, b"2")
    gcs_bucket.delete("x", second)
    with pytest.raises(Conflict):
        gcs_bucket.delete("x", second)
    gcs_bucket.delete("x")
    assert gcs_bucket.list("") == {}


def test_uploads_are_listed_with_their_checksums(gcs_bucket: GcsBucket) -> None:
    content = b"a shard" * 1000
    crc32c = google_crc32c.value(content)
    info = gcs_bucket.upload("a/x", io.BytesIO(content), len(content), crc32c, 0)
    assert info == ObjectInfo(info.generation, len(content), crc32c)
    gcs_bucket.write("b", b"", 0)
    assert gcs_bucket.list("a/") == {"a/x": info}
    assert gcs_bucket.stat("a/x") == info
    assert gcs_bucket.read("b")[1] == b""


@pytest.mark.parametrize("size", [5, 9 << 20])
def test_content_that_differs_from_its_checksum_is_refused(gcs_bucket: GcsBucket, size: int) -> None:
    """In one request, and in a resumable upload. As if a file was damaged after it was written."""
    with pytest.raises(Unavailable, match="crc32c"):
        gcs_bucket.upload("x", io.BytesIO(bytes(size)), size, google_crc32c.value(b"other"), 0)
    assert gcs_bucket.list("") == {}


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("403", r"cannot read from gs://bucket/x: no permission \(.*403.*\); the account needs .*storage.objectAdmin"),
        ("503", r"cannot read from gs://bucket/x: .*503.*\(Timeout of 2.0s exceeded\); the same command resumes"),
        ("reset", r"cannot read from gs://bucket/x: .*; the same command resumes"),
    ],
)
def test_a_lasting_failure_is_one_line(
    gcs_here: fake_gcs.Server, gcs_bucket: GcsBucket, failure: str, message: str
) -> None:
    gcs_here.put("bucket", "x", b"1")
    gcs_here.fail(failure, "read", times=None)
    with pytest.raises(Unavailable, match=message) as caught:
        gcs_bucket.read("x")
    assert "\n" not in str(caught.value)
    gcs_here.heal()
    assert gcs_bucket.read("x")[1] == b"1"


def test_a_missing_bucket_is_named(gcs_here: fake_gcs.Server) -> None:
    del gcs_here
    nowhere, _ = bucket.open_bucket("gs://nowhere", "--out", 5.0, 2.0)
    for request in (lambda: nowhere.write("x", b"1", 0), lambda: nowhere.list("")):
        with pytest.raises(Unavailable, match="there is no bucket nowhere"):
            request()
