"""Writing a data set to a bucket: whole, checked, resumable, not mixed with another writer's."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import fake_gcs
import numpy as np
import pytest
from conftest import ROOT, here, silent

from trainer.core.errors import DataError
from trainer.data import dataset, records
from trainer.data.dataset import Dataset
from trainer.ingest import verify, writer
from trainer.io import destination

OUT = "gs://bucket/sets/flowers"


def garden(out: str, *flags: str) -> str:
    done = here(
        "prepare",
        "--dataset=synthetic",
        f"--out={out}",
        "--classes=3",
        "--size=24",
        "--train=30",
        "--validation=0",
        "--test=12",
        "--pretrain=0",
        *flags,
    )
    return done.stderr if done.returncode == 0 else f"exit {done.returncode}: {done.stderr}"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards of few pictures, and little patience with a bucket that fails for ever."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 5000)
    monkeypatch.setattr(destination, "RETRY_SECONDS", 3.0)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the same command writes to a local folder, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_BYTES", 5000)
        out = tmp_path_factory.mktemp("local") / "out"
        assert not garden(str(out)).startswith("exit")
    return {path.name: path.read_bytes() for path in out.iterdir()}


def there(gcs: fake_gcs.Server) -> dict[str, bytes]:
    return {name.removeprefix("sets/flowers/"): gcs.get("bucket", name) for name in gcs.names("bucket")}


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the objects below the prefix, as they are made."""
    names: list[str] = []
    finish = fake_gcs.Server._finish

    def note(self: fake_gcs.Server, bucket: str, name: str, *rest: Any) -> Any:
        answer = finish(self, bucket, name, *rest)
        names.append(name.removeprefix("sets/flowers/"))
        return answer

    monkeypatch.setattr(fake_gcs.Server, "_finish", note)
    return names


def test_a_bucket_gets_what_a_folder_gets_index_last(
    gcs_here: fake_gcs.Server, local: dict[str, bytes], stored: list[str]
) -> None:
    assert "3 classes; train 30, test 12" in garden(OUT)
    assert len(local) > 4
    assert there(gcs_here) == local
    assert stored[-1] == "dataset.json"
    assert stored.count("dataset.json") == 1
    assert "are whole and decodable" in verify.verify(OUT, silent)
    assert "holds a data set already" in garden(OUT)


def test_a_rerun_sends_what_is_missing_or_different(
    gcs_here: fake_gcs.Server, local: dict[str, bytes], stored: list[str]
) -> None:
    gcs_here.fail("403", "upload", after=6, times=None)
    assert "no permission" in garden(OUT, "--workers=1")
    gcs_here.heal()
    kept = [name for name in there(gcs_here) if name.endswith(".tfrecord")]
    assert kept
    assert "dataset.json" not in there(gcs_here)
    spoilt = f"sets/flowers/{kept[0]}"
    gcs_here.put("bucket", spoilt, gcs_here.get("bucket", spoilt)[:-1] + b"?")
    stored.clear()
    assert not garden(OUT).startswith("exit")
    assert there(gcs_here) == local
    sent = {name for name in stored if name.endswith(".tfrecord")}
    assert sent == {name for name in local if name.endswith(".tfrecord")} - set(kept) | {kept[0]}


@pytest.mark.parametrize("failure", ["503", "reset", "lost"])
def test_what_fails_once_is_tried_again(gcs_here: fake_gcs.Server, local: dict[str, bytes], failure: str) -> None:
    """Each kind of request of a writer: small objects, shards, lists, reads and deletions."""
    faults = [gcs_here.fail(failure, kind, after=after) for kind, after in (("list", 0), ("delete", 1), ("read", 1))]
    faults += [gcs_here.fail(failure, "upload", after=after) for after in (1, 4)]
    assert not garden(OUT).startswith("exit")
    assert [fault.consumed for fault in faults] == [1] * 5
    assert there(gcs_here) == local


GARDEN = """
import sys
from trainer import cli
from trainer.ingest import writer
writer.SHARD_BYTES = 5000
sys.exit(cli.main(sys.argv[1:]))
"""


def test_killed_on_the_way_the_same_command_goes_on_and_leaves_nothing(
    gcs_here: fake_gcs.Server, local: dict[str, bytes], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a real SIGKILL after some uploads. What it had on this disk is removed too, and what a
    living process has is not.
    """
    flags = ["--classes=3", "--size=24", "--train=30", "--validation=0", "--test=12", "--pretrain=0"]
    argv = ["prepare", "--dataset=synthetic", f"--out={OUT}", *flags]
    environment = os.environ | gcs_here.env | {"TMPDIR": str(tmp_path)}
    with gcs_here.lock:  # it cannot get ahead of us
        process = subprocess.Popen(
            [sys.executable, "-c", GARDEN, *argv], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
        )
        gcs_here.kill_after(9, process.pid)
    assert process.wait(120) == -signal.SIGKILL
    assert "dataset.json" not in there(gcs_here)
    assert len(there(gcs_here)) > 3
    (left,) = tmp_path.glob("funmatch-shards-*")
    monkeypatch.setattr(destination.tempfile, "tempdir", str(tmp_path))
    other = destination.BucketDestination("gs://bucket/other")
    assert left.exists() is False, "the next one that makes shards removes it"
    assert not garden(OUT).startswith("exit")
    assert there(gcs_here) == local
    assert set(tmp_path.iterdir()) == {pathlib.Path(other.local)}
    other.close()
    assert set(tmp_path.iterdir()) == set()


def place_and_file(size: int) -> tuple[destination.BucketDestination, dataset.Shard, bytes]:
    """An open place, and a shard of one record that waits to be sent."""
    place = destination.BucketDestination(OUT)
    encoded = np.random.default_rng(0).bytes(size)
    shard = records.write_shard(place.local, "x.tfrecord", [records.ImageRecord(encoded, 4, 4)])
    return place, shard, (pathlib.Path(place.local) / "x.tfrecord").read_bytes()


@pytest.mark.parametrize("failure", ["broken", "reset", "503", "lost"])
def test_an_upload_broken_midway_goes_on(gcs_here: fake_gcs.Server, failure: str) -> None:
    place, shard, content = place_and_file(20 << 20)
    gcs_here.fail(failure, "chunk", after=1)
    place.send(shard.file, shard.bytes, shard.crc32c)
    assert gcs_here.get("bucket", "sets/flowers/x.tfrecord") == content
    chunks = gcs_here.requests("chunk")
    assert len(gcs_here.requests("start")) == 1, "the upload was begun again"
    # Three pieces, and one of them once more: not all of them.
    assert len(chunks) == 4
    assert not list(pathlib.Path(place.local).iterdir())
    place.close()
    assert not pathlib.Path(place.local).exists()


@pytest.mark.parametrize("size", [1000, 20 << 20])
def test_a_damaged_upload_is_caught(gcs_here: fake_gcs.Server, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Bytes that change on the way to the server never become an object."""
    place, shard, content = place_and_file(size)
    finish = fake_gcs.Server._finish

    def flip(
        self: fake_gcs.Server, bucket: str, name: str, conditions: dict, resource: dict, kind: str, data: bytes
    ) -> dict:
        return finish(self, bucket, name, conditions, resource, kind, data[:-1] + bytes([data[-1] ^ 1]))

    with monkeypatch.context() as patch:
        patch.setattr(fake_gcs.Server, "_finish", flip)
        with pytest.raises(DataError, match=r"CRC32C|crc32c|damaged"):
            place.send(shard.file, shard.bytes, shard.crc32c)
    assert not gcs_here.names("bucket", "sets/flowers/x")
    place.send(shard.file, shard.bytes, shard.crc32c)
    assert gcs_here.get("bucket", "sets/flowers/x.tfrecord") == content


@pytest.mark.usefixtures("gcs_here")
@pytest.mark.parametrize("size", [1000, 20 << 20])
def test_a_server_that_has_other_bytes_is_noticed(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Though it took what it was sent without a word."""
    place, shard, _ = place_and_file(size)
    describe = fake_gcs.Server._resource

    def other(self: fake_gcs.Server, bucket: str, name: str) -> dict[str, Any]:
        return describe(self, bucket, name) | {"crc32c": "AAAAAA=="}

    monkeypatch.setattr(fake_gcs.Server, "_resource", other)
    with pytest.raises(DataError, match="damaged"):
        place.send(shard.file, shard.bytes, shard.crc32c)


def test_two_writers_do_not_mix(gcs_here: fake_gcs.Server) -> None:
    """An object that came, or changed, after the place was opened is not replaced, unless it is the
    same.
    """
    gcs_here.put("bucket", "sets/flowers/y.tfrecord", b"before")
    place, shard, content = place_and_file(1000)
    gcs_here.put("bucket", "sets/flowers/x.tfrecord", b"another's")
    with pytest.raises(DataError, match="written by another process"):
        place.send(shard.file, shard.bytes, shard.crc32c)
    assert gcs_here.get("bucket", "sets/flowers/x.tfrecord") == b"another's"
    gcs_here.put("bucket", "sets/flowers/x.tfrecord", content)
    place.send(shard.file, shard.bytes, shard.crc32c)
    known = {shard.file: (shard.bytes, shard.crc32c)}
    assert place.changed(known) == []
    gcs_here.put("bucket", "sets/flowers/x.tfrecord", b"another's")
    assert place.changed(known) == [shard.file]
    assert place.write("claim", b"1", new=True) is not place.write("claim", b"2", new=True)
    assert place.read("claim") == b"1"


def test_a_shard_that_changes_before_the_index_is_noticed(
    gcs_here: fake_gcs.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = destination.BucketDestination.changed

    def meddle(self: destination.BucketDestination, shards: dict[str, tuple[int, int]]) -> list[str]:
        gcs_here.put("bucket", f"sets/flowers/{min(shards)}", b"another's")
        return changed(self, shards)

    monkeypatch.setattr(destination.BucketDestination, "changed", meddle)
    assert "was changed by another process" in garden(OUT)
    assert "dataset.json" not in there(gcs_here)


def test_verify_reads_a_bucket_back(gcs_here: fake_gcs.Server, local: dict[str, bytes]) -> None:
    for name, content in local.items():
        gcs_here.put("bucket", f"sets/flowers/{name}", content)
    assert "42 images in 2 splits are whole and decodable" in verify.verify(OUT, silent)
    name = sorted(name for name in local if name.startswith("train"))[1]
    spoilt = bytearray(local[name])
    spoilt[len(spoilt) // 2] ^= 1
    gcs_here.put("bucket", f"sets/flowers/{name}", bytes(spoilt))
    with pytest.raises(DataError, match=rf"{name}: record \d+ at byte \d+"):
        verify.verify(OUT, silent)


def test_a_folder_and_a_table_in_a_bucket(gcs_here: fake_gcs.Server, tmp_path: pathlib.Path, data: str) -> None:
    dataset = Dataset.load(data)
    split = records.EncodedSplit(dataset, dataset.splits["validation"])
    # The last has no suffix, so that its first bytes are read.
    names = [f"{'ab'[number % 2]}/{number}{'.jpg' if number < 5 else ''}" for number in range(6)]
    for number, name in enumerate(names):
        gcs_here.put("bucket", f"raw/{name}", split.record(number).encoded)
    for name in ("@eaDir/0.jpg", "a/.DS_Store", "a/notes.txt", "a/LICENSE"):
        gcs_here.put("bucket", f"raw/{name}", b"no image")
    lines = [f"gs://bucket/raw/{name},{number % 2}" for number, name in enumerate(names)]
    gcs_here.put("bucket", "lists/all.csv", "\n".join(lines).encode())
    for kind, count in (("folder:gs://bucket/raw", 2), ("csv:gs://bucket/lists/all.csv", 2)):
        out = str(tmp_path / kind[:3])
        done = here("prepare", f"--dataset={kind}", f"--out={out}")
        assert done.returncode == 0, done.stderr
        made = Dataset.load(out)
        assert made.splits["train"].examples == 6
        assert len(made.classes) == count
        left_out = {".txt": 1, "hidden": 1, "system": 1, "without suffix": 1}
        assert made.source.get("not_images", {}) == (left_out if kind.startswith("folder") else {})
        again = records.EncodedSplit(made, made.splits["train"])
        assert sorted(again.record(i).encoded for i in range(6)) == sorted(split.record(i).encoded for i in range(6))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("gs://nowhere/x", "there is no bucket nowhere"),
        ("gs://", "the name of a bucket is missing"),
        ("s3://bucket/x", "only local folders and gs:// are supported"),
    ],
)
@pytest.mark.usefixtures("gcs_here")
def test_places_that_are_none(out: str, message: str) -> None:
    assert message in garden(out)


def test_no_permission_is_known_before_the_work(gcs_here: fake_gcs.Server) -> None:
    gcs_here.fail("403", "upload", times=None)
    line = garden(OUT)
    assert line.startswith("exit 3")
    assert "roles/storage.objectAdmin" in line
    assert "draw" not in line


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    import google.auth

    def none(**_: object) -> None:
        raise google.auth.exceptions.DefaultCredentialsError("nothing")

    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr(google.auth, "default", none)
    line = garden(OUT)
    assert line.startswith("exit 3")
    assert "gcloud auth application-default login" in line
