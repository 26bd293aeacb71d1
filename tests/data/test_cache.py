"""Copies of shards on disk: copied once, checked, shared, deleted only when not in use."""

from __future__ import annotations

import concurrent.futures
import io
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from trainer.core.errors import DataError
from trainer.data import cache, records, tfrecord
from trainer.data.cache import Cache
from trainer.data.dataset import Dataset, Split
from trainer.data.records import ImageRecord
from trainer.data.store import DiskStore, MemoryStore
from trainer.io import files


def record(number: int, side: int = 10) -> ImageRecord:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + number % 7, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return ImageRecord(buffer.getvalue(), side, side + number % 7, number % 2, f"{number}.jpg")


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


Make = Callable[..., tuple[Dataset, Split]]


@pytest.fixture
def make(tmp_path: pathlib.Path) -> Make:
    """Prepares a split of `count` images, from number `first`, in `shards` shards."""

    def prepared(count: int, shards: int, first: int = 0, name: str = "bucket") -> tuple[Dataset, Split]:
        folder = str(tmp_path / name)
        parts = np.array_split(np.arange(first, first + count), shards)
        with mock.patch.object(files, "is_remote", return_value=False):
            written = [records.write_shard(folder, f"{k}-of-{shards}", map(record, p)) for k, p in enumerate(parts)]
            split = Split("train", tuple(written))
            dataset = Dataset(folder, "t", ("a", "b"), {"train": split}, {})
            dataset.save()
        return dataset, split

    return prepared


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Treats folders "bucket..." as buckets; returns the names of files read from them."""
    read: list[str] = []
    real = files.read

    def counted(path: str, what: str) -> bytes:
        if "/bucket" in path and not path.endswith(".json"):
            read.append(os.path.basename(path))
        return real(path, what)

    monkeypatch.setattr(files, "is_remote", lambda path: "/bucket" in path)
    monkeypatch.setattr(files, "read", counted)
    return read


def copies(folder: pathlib.Path) -> set[str]:
    return {path.name for path in (folder / "shards").glob("*.tfrecord")}


def test_disk_and_memory_give_the_same_bytes(make: Make, remote: list[str], tmp_path: pathlib.Path) -> None:
    """In any order, with repeats, for any number of shards and threads."""
    memory = MemoryStore(*make(23, 1), 8, quiet)
    ids = np.random.default_rng(0).integers(0, 23, 60)
    for shards, threads in ((1, 1), (4, 3), (8, 16)):
        store = DiskStore(*make(23, shards), 8, Cache(str(tmp_path / "cache")), quiet, threads)
        assert (store.take(ids) == memory.images[ids]).all()
        assert (store.labels == memory.labels).all()
        assert (store.sizes == memory.sizes).all()
        assert len(store) == 23
    assert len(remote) == 1 + 1 + 4 + 8  # the first by MemoryStore


def test_a_shard_is_copied_once(make: Make, remote: list[str], tmp_path: pathlib.Path) -> None:
    for _ in range(3):
        store = DiskStore(*make(9, 3), 8, Cache(str(tmp_path / "cache")), quiet)
    assert sorted(remote) == ["0-of-3", "1-of-3", "2-of-3"]
    # The same shards under other names, in another data set, share the copies.
    dataset, split = make(9, 3)
    twice = Split("both", split.shards * 2)
    both = DiskStore(dataset, twice, 8, Cache(str(tmp_path / "cache")), quiet)
    assert len(remote) == 3
    assert (both.take(np.arange(9, 18)) == store.take(np.arange(9))).all()
    assert len(copies(tmp_path / "cache")) == 3


def test_a_shard_on_this_disk_is_used_where_it_is(make: Make, tmp_path: pathlib.Path) -> None:
    store = DiskStore(*make(9, 3), 8, Cache(str(tmp_path / "cache"), limit=1), quiet)
    assert store.take(np.array([8, 0])).shape == (2, 8, 8, 3)
    assert sorted(os.listdir(tmp_path / "cache")) == ["index"]


def test_the_index_is_saved_and_memory_mapped(
    make: Make, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Cache(str(tmp_path / "cache")).open(*make(9, 3))
    monkeypatch.setattr(records, "index_shard", None)  # nothing is checked a second time
    again = Cache(str(tmp_path / "cache")).open(*make(9, 3))
    for one, other in zip(first, again, strict=True):
        assert (one.entries == other.entries).all()
        assert isinstance(other.entries.base, np.memmap)


@pytest.mark.parametrize("damage", ["empty", "nonsense", "cut", "flipped"])
def test_a_damaged_index_is_rebuilt(make: Make, tmp_path: pathlib.Path, damage: str) -> None:
    first = DiskStore(*make(9, 3), 8, Cache(str(tmp_path / "cache")), quiet)
    (path,) = (tmp_path / "cache" / "index").iterdir()
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-10] ^= 1  # the last image's width
    damaged = {"empty": b"", "nonsense": b"\x93NUMPY nonsense", "cut": content[:-30], "flipped": bytes(flipped)}[damage]
    path.unlink()  # the first store keeps using the file it has open
    path.write_bytes(damaged)
    again = DiskStore(*make(9, 3), 8, Cache(str(tmp_path / "cache")), quiet)
    assert path.read_bytes() == content
    assert (again.take(np.arange(9)) == first.take(np.arange(9))).all()
    assert (again.sizes == first.sizes).all()


def test_a_shard_that_is_another_file_is_not_kept(make: Make, remote: list[str], tmp_path: pathlib.Path) -> None:
    dataset, split = make(3, 1)
    path = pathlib.Path(dataset.folder, "0-of-1")
    content = path.read_bytes()
    # A complete shard of the same length with other images: every record is intact, but it is not
    # what was prepared.
    payloads = [payload for _, payload in tfrecord.payloads(content, "s")]
    path.write_bytes(b"".join(tfrecord.frame(bytes(p)) for p in [*payloads[1:], payloads[0]]))
    with pytest.raises(DataError, match=r"0-of-1 does not have the CRC32C in dataset\.json"):
        DiskStore(dataset, split, 8, Cache(str(tmp_path / "cache")), quiet)
    assert not copies(tmp_path / "cache")
    path.write_bytes(content)
    assert DiskStore(dataset, split, 8, Cache(str(tmp_path / "cache")), quiet).take(np.array([0])).any()
    assert remote == ["0-of-1"] * 2


@pytest.mark.parametrize("open_store", [MemoryStore, DiskStore])
def test_a_shard_that_is_another_file_is_refused_where_it_lies(
    make: Make, tmp_path: pathlib.Path, open_store: type
) -> None:
    """A local shard has no copy, so only indexing compares it with what was prepared."""
    dataset, split = make(3, 1)
    path = pathlib.Path(dataset.folder, "0-of-1")
    payloads = [payload for _, payload in tfrecord.payloads(path.read_bytes(), "s")]
    path.write_bytes(b"".join(tfrecord.frame(bytes(p)) for p in [*payloads[1:], payloads[0]]))
    assert path.stat().st_size == split.shards[0].bytes
    cached = (Cache(str(tmp_path / "cache")),) if open_store is DiskStore else ()
    with pytest.raises(DataError, match=r"0-of-1 does not have the CRC32C in dataset\.json"):
        open_store(dataset, split, 8, *cached, quiet)


def test_a_damaged_shard_is_not_copied_whatever_the_limit_on_corrupt_records(
    make: Make, remote: list[str], tmp_path: pathlib.Path
) -> None:
    """A run without tolerance would be served the damaged copy."""
    dataset, split = make(10, 1)
    path = pathlib.Path(dataset.folder, "0-of-1")
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(bytes(content))
    corrupt = records.CorruptRecordLog(dataset, split, 0.5)
    with pytest.raises(DataError, match="keeps none of a damaged shard, whatever --max_bad_fraction"):
        DiskStore(dataset, split, 8, Cache(str(tmp_path / "cache")), quiet, corrupt=corrupt)
    assert len(corrupt.records) == 1
    assert not copies(tmp_path / "cache")
    assert remote == ["0-of-1"]


def test_a_record_that_changes_during_the_run_is_named(make: Make, tmp_path: pathlib.Path) -> None:
    dataset, split = make(3, 1)
    store = DiskStore(dataset, split, 8, Cache(str(tmp_path / "cache")), quiet)
    path = pathlib.Path(dataset.folder, "0-of-1")
    offset = [offset for offset, _ in tfrecord.payloads(path.read_bytes(), "s")][1]
    with path.open("r+b") as file:
        file.seek(offset + 40)
        byte = file.read(1)
        file.seek(offset + 40)
        file.write(bytes([byte[0] ^ 1]))
    store.take(np.array([0, 2]))
    with pytest.raises(DataError, match=rf"0-of-1: record 1 at byte {offset} is damaged .* changed"):
        store.take(np.array([1]))
    with path.open("r+b") as file:
        file.truncate(offset + 20)
    with pytest.raises(DataError, match=rf"record 1 at byte {offset} is damaged"):
        store.take(np.array([1]))


def test_a_shard_cut_short_since_it_was_checked_is_found_at_the_start(make: Make, tmp_path: pathlib.Path) -> None:
    dataset, split = make(3, 1)
    DiskStore(dataset, split, 8, Cache(str(tmp_path / "cache")), quiet)
    os.truncate(os.path.join(dataset.folder, "0-of-1"), 100)
    with pytest.raises(DataError, match=rf"0-of-1 has 100 bytes; dataset\.json says {split.shards[0].bytes}"):
        DiskStore(dataset, split, 8, Cache(str(tmp_path / "cache")), quiet)


def test_the_least_recently_used_copy_goes_first_and_copies_in_use_stay(
    make: Make, remote: list[str], tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "cache"
    datasets = [make(6, 1, first=6 * k, name=f"bucket{k}") for k in range(5)]
    names = [cache.copy_name(split.shards[0]) for _, split in datasets]
    limit = 3 * max(split.shards[0].bytes for _, split in datasets) + 100
    live = Cache(str(folder), limit)
    store = DiskStore(*datasets[0], 8, live, quiet)  # in use until the end
    for k in (1, 2):
        DiskStore(*datasets[k], 8, Cache(str(folder), limit), quiet)
        os.utime(folder / "shards" / names[k], (k, k))
    os.utime(folder / "shards" / names[0], (0, 0))  # the oldest, but in use
    DiskStore(*datasets[1], 8, Cache(str(folder), limit), quiet)  # 2 is now the oldest
    assert copies(folder) == {*names[:3]}
    DiskStore(*datasets[3], 8, Cache(str(folder), limit), quiet)
    assert copies(folder) == {names[0], names[1], names[3]}
    before = store.take(np.arange(6))
    second = DiskStore(*datasets[3], 8, Cache(str(folder), limit), quiet)
    third = DiskStore(*datasets[4], 8, Cache(str(folder), limit), quiet)
    assert copies(folder) == {names[0], names[3], names[4]}
    with pytest.raises(
        DataError, match=r"take 0\.00 GiB and --cache_dir=.* has room for 0\.00 GiB: give a larger --cache_gb"
    ):
        DiskStore(*datasets[1], 8, Cache(str(folder), limit), quiet)
    assert (store.take(np.arange(6)) == before).all()
    del second, third
    live.close()
    assert len(remote) == 5


HOLDER = """
import sys
sys.path.insert(0, "tests")
from trainer.io import files
files.is_remote = lambda path: "/bucket" in path
from trainer.data.cache import Cache
from trainer.data.dataset import Dataset
dataset = Dataset.load(sys.argv[1])
cache = Cache(sys.argv[2], int(sys.argv[3]))
shards = cache.open(dataset, dataset.splits["train"])
print(len(shards), flush=True)
sys.stdin.read()
"""


def hold(dataset: Dataset, folder: pathlib.Path, limit: int = 0) -> subprocess.Popen[str]:
    """Starts a process that opens the split and uses it until its input ends."""
    command = [sys.executable, "-c", HOLDER, dataset.folder, str(folder), str(limit)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("remote")
def test_two_processes_copy_once_and_keep_each_others_copies(make: Make, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "cache"
    dataset, split = make(40, 8)
    total = sum(shard.bytes for shard in split.shards)
    both = [hold(dataset, folder, total), hold(dataset, folder, total)]
    try:
        assert [process.stdout.readline() for process in both] == ["8\n"] * 2  # type: ignore[union-attr]
        assert len(copies(folder)) == 8
        inodes = {name: os.stat(folder / "shards" / name).st_mtime_ns for name in copies(folder)}
        # A third run has no room: two live ones use all of it.
        third = make(40, 8, first=100, name="bucket2")
        with pytest.raises(DataError, match="has room for"):
            DiskStore(*third, 8, Cache(str(folder), total), quiet)
        both[0].kill()  # its lease ends with it
        both[0].wait()
        with pytest.raises(DataError, match="has room for"):
            DiskStore(*third, 8, Cache(str(folder), total), quiet)
        assert {name: os.stat(folder / "shards" / name).st_mtime_ns for name in copies(folder)} == inodes
        both[1].kill()
        both[1].wait()
        larger = total + sum(shard.bytes for shard in third[1].shards) // 2
        DiskStore(*third, 8, Cache(str(folder), larger), quiet)
        mine = {cache.copy_name(shard) for shard in third[1].shards}
        assert mine <= copies(folder)
        assert sum(os.path.getsize(folder / "shards" / name) for name in copies(folder)) <= larger
    finally:
        for process in both:
            process.kill()
            process.wait()


def test_a_shard_that_two_runs_need_at_once_is_read_once(
    make: Make, remote: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run finds no copy, waits while the first one copies, and then uses that copy."""
    dataset, split = make(5, 1)
    real = files.read

    def slow(path: str, what: str) -> bytes:
        if "/bucket" in path:
            while len(list((tmp_path / "cache" / "leases").iterdir())) < 2:
                time.sleep(0.01)
            time.sleep(0.5)  # the second run has its lease; now it looks for the copy
        return real(path, what)

    monkeypatch.setattr(files, "read", slow)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        stores = [
            pool.submit(DiskStore, dataset, split, 8, Cache(str(tmp_path / "cache")), lambda *_: None) for _ in range(2)
        ]
        one, other = (store.result(60).take(np.arange(5)) for store in stores)
    assert (one == other).all()
    assert remote == ["0-of-1"]


@pytest.mark.usefixtures("remote")
def test_a_half_written_copy_is_copied_again(make: Make, tmp_path: pathlib.Path) -> None:
    dataset, split = make(6, 2)
    shards = tmp_path / "cache" / "shards"
    shards.mkdir(parents=True)
    name = cache.copy_name(split.shards[0])
    (shards / f"{name}.12345678.tmp").write_bytes(b"half")
    (shards / "ffffffff-9.tfrecord.12345678.tmp").write_bytes(b"half")
    (shards / name).write_bytes(b"another length")
    store = DiskStore(dataset, split, 8, Cache(str(tmp_path / "cache")), quiet)
    assert store.take(np.arange(6)).any()
    assert (shards / name).stat().st_size == split.shards[0].bytes
    assert not (shards / "ffffffff-9.tfrecord.12345678.tmp").exists()


def test_the_space_is_known_before_anything_is_copied(make: Make, remote: list[str], tmp_path: pathlib.Path) -> None:
    dataset, split = make(6, 2)
    space = Cache(str(tmp_path / "cache"), 1000).space([(dataset, split), (dataset, split)])
    assert (space.required, space.available) == (sum(shard.bytes for shard in split.shards), 1000)
    assert Cache(str(tmp_path / "cache")).space([(dataset, split)]).available > 1 << 20
    assert not remote


@pytest.mark.usefixtures("remote")
def test_corrupt_images_are_left_out_and_a_damaged_shard_raises(make: Make, tmp_path: pathlib.Path) -> None:
    """A shard as prepared may hold corrupt images. One with another checksum is another file."""
    dataset, _ = make(6, 1)
    with mock.patch.object(files, "is_remote", return_value=False):
        images = [record(0), ImageRecord(b"no image", 10, 10, 0, "evil.jpg"), record(2)]
        split = Split("train", (records.write_shard(dataset.folder, "bad", images),))
    corrupt = records.CorruptRecordLog(dataset, split, 0.5)
    store = DiskStore(dataset, split, 16, Cache(str(tmp_path / "one")), quiet, corrupt=corrupt)
    assert [(record.file, record.record) for record in corrupt.records] == [("bad", 1)]
    assert store.labels.tolist() == [0, 0]
    path = pathlib.Path(dataset.folder, "bad")
    content = bytearray(path.read_bytes())
    content[40] ^= 1  # in the first record
    path.write_bytes(content)
    corrupt = records.CorruptRecordLog(dataset, split, 0.9)
    with pytest.raises(DataError, match=r"bad does not have the CRC32C .* none of a damaged shard.* --store=host$"):
        DiskStore(dataset, split, 16, Cache(str(tmp_path / "two")), quiet, corrupt=corrupt)
    assert list((tmp_path / "two" / "shards").glob("*.tfrecord")) == []
    corrupt = records.CorruptRecordLog(dataset, split, 0.9)
    assert len(MemoryStore(dataset, split, 16, quiet, corrupt)) == 1
    assert [record.record for record in corrupt.records] == [0, 1]
