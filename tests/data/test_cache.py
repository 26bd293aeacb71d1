"""Copies of shards on the disk: made once, checked, shared between processes, deleted only when no run uses them."""

from __future__ import annotations

import concurrent.futures
import io
import os
import pathlib
import subprocess
import sys
import threading
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


def picture(number: int, side: int = 10) -> ImageRecord:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + number % 7, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return ImageRecord(buffer.getvalue(), side, side + number % 7, number % 2, f"{number}.jpg")


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


Make = Callable[..., tuple[Dataset, Split]]


@pytest.fixture
def make(tmp_path: pathlib.Path) -> Make:
    """Prepares a split of `count` pictures from number `first` in `shards` shards."""

    def prepared(count: int, shards: int, first: int = 0, name: str = "bucket") -> tuple[Dataset, Split]:
        folder = str(tmp_path / name)
        parts = np.array_split(np.arange(first, first + count), shards)
        with mock.patch.object(files, "is_remote", return_value=False):
            written = [records.write_shard(folder, f"{k}-of-{shards}", map(picture, p)) for k, p in enumerate(parts)]
            split = Split("train", tuple(written))
            made = Dataset(folder, "t", ("a", "b"), {"train": split}, {})
            made.save()
        return made, split

    return prepared


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Takes folders called "bucket..." for buckets; holds the files that were read from them."""
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
    """In any order of asking, with repeats, for any number of shards and threads."""
    whole = MemoryStore(*make(23, 1), 8, quiet)
    ids = np.random.default_rng(0).integers(0, 23, 60)
    for shards, threads in ((1, 1), (4, 3), (8, 16)):
        held = DiskStore(*make(23, shards), 8, Cache(str(tmp_path / "cache")), quiet, threads)
        assert (held.take(ids) == whole.images[ids]).all()
        assert (held.labels == whole.labels).all()
        assert (held.sizes == whole.sizes).all()
        assert len(held) == 23
    assert len(remote) == 1 + 1 + 4 + 8  # the first by the store in memory


def test_a_shard_is_copied_once(make: Make, remote: list[str], tmp_path: pathlib.Path) -> None:
    for _ in range(3):
        held = DiskStore(*make(9, 3), 8, Cache(str(tmp_path / "cache")), quiet)
    assert sorted(remote) == ["0-of-3", "1-of-3", "2-of-3"]
    # The same shards under other names, in another data set, have no second copy.
    made, split = make(9, 3)
    twice = Split("both", split.shards * 2)
    both = DiskStore(made, twice, 8, Cache(str(tmp_path / "cache")), quiet)
    assert len(remote) == 3
    assert (both.take(np.arange(9, 18)) == held.take(np.arange(9))).all()
    assert len(copies(tmp_path / "cache")) == 3


def test_a_shard_on_this_disk_is_used_where_it_is(make: Make, tmp_path: pathlib.Path) -> None:
    held = DiskStore(*make(9, 3), 8, Cache(str(tmp_path / "cache"), limit=1), quiet)
    assert held.take(np.array([8, 0])).shape == (2, 8, 8, 3)
    assert sorted(os.listdir(tmp_path / "cache")) == ["index"]


def test_the_index_is_kept_and_mapped(make: Make, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = DiskStore(*make(9, 3), 8, Cache(str(tmp_path / "cache")), quiet)
    monkeypatch.setattr(records, "index_shard", None)  # nothing is checked a second time
    again = DiskStore(*make(9, 3), 8, Cache(str(tmp_path / "cache")), quiet)
    assert (again.labels == first.labels).all()
    assert isinstance(again._encoded._shards[0].table.base, np.memmap)


@pytest.mark.parametrize("damage", ["empty", "nonsense", "cut", "flipped"])
def test_a_damaged_index_is_made_again(make: Make, tmp_path: pathlib.Path, damage: str) -> None:
    first = DiskStore(*make(9, 3), 8, Cache(str(tmp_path / "cache")), quiet)
    (kept,) = (tmp_path / "cache" / "index").iterdir()
    content = kept.read_bytes()
    flipped = bytearray(content)
    flipped[-10] ^= 1  # the last image's width
    damaged = {"empty": b"", "nonsense": b"\x93NUMPY nonsense", "cut": content[:-30], "flipped": bytes(flipped)}[damage]
    kept.unlink()  # the first store goes on with the file that it has
    kept.write_bytes(damaged)
    again = DiskStore(*make(9, 3), 8, Cache(str(tmp_path / "cache")), quiet)
    assert kept.read_bytes() == content
    assert (again.take(np.arange(9)) == first.take(np.arange(9))).all()
    assert (again.sizes == first.sizes).all()


def test_a_shard_that_is_another_file_is_not_kept(make: Make, remote: list[str], tmp_path: pathlib.Path) -> None:
    made, split = make(3, 1)
    path = pathlib.Path(made.folder, "0-of-1")
    content = path.read_bytes()
    # A whole shard of the same length with other pictures: every record is sound, and it is not what was prepared.
    one = [payload for _, payload in tfrecord.payloads(content, "s")]
    path.write_bytes(b"".join(tfrecord.frame(bytes(p)) for p in [*one[1:], one[0]]))
    with pytest.raises(DataError, match=r"0-of-1 does not have the CRC32C that dataset\.json says"):
        DiskStore(made, split, 8, Cache(str(tmp_path / "cache")), quiet)
    assert not copies(tmp_path / "cache")
    path.write_bytes(content)
    assert DiskStore(made, split, 8, Cache(str(tmp_path / "cache")), quiet).take(np.array([0])).any()
    assert remote == ["0-of-1"] * 2


@pytest.mark.parametrize("open_store", [MemoryStore, DiskStore])
def test_a_shard_that_is_another_file_is_refused_where_it_lies(
    make: Make, tmp_path: pathlib.Path, open_store: type
) -> None:
    """On this disk there is no copy, so nobody but the index compares it with what was prepared."""
    made, split = make(3, 1)
    path = pathlib.Path(made.folder, "0-of-1")
    one = [payload for _, payload in tfrecord.payloads(path.read_bytes(), "s")]
    path.write_bytes(b"".join(tfrecord.frame(bytes(p)) for p in [*one[1:], one[0]]))
    assert path.stat().st_size == split.shards[0].bytes
    cached = (Cache(str(tmp_path / "cache")),) if open_store is DiskStore else ()
    with pytest.raises(DataError, match=r"0-of-1 does not have the CRC32C that dataset\.json says"):
        open_store(made, split, 8, *cached, quiet)


def test_a_damaged_shard_is_not_copied_even_if_bad_records_are_borne(
    make: Make, remote: list[str], tmp_path: pathlib.Path
) -> None:
    """Its copy would pass for the whole one with a run that bears none."""
    made, split = make(10, 1)
    path = pathlib.Path(made.folder, "0-of-1")
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(bytes(content))
    damage = records.CorruptRecordLog(made, split, 0.5)
    with pytest.raises(DataError, match="none of such a shard whatever --max_bad_fraction"):
        DiskStore(made, split, 8, Cache(str(tmp_path / "cache")), quiet, damage=damage)
    assert len(damage.bad) == 1
    assert not copies(tmp_path / "cache")
    assert remote == ["0-of-1"]


def test_a_record_that_changes_under_the_run_is_named(make: Make, tmp_path: pathlib.Path) -> None:
    made, split = make(3, 1)
    held = DiskStore(made, split, 8, Cache(str(tmp_path / "cache")), quiet)
    path = pathlib.Path(made.folder, "0-of-1")
    offset = [offset for offset, _ in tfrecord.payloads(path.read_bytes(), "s")][1]
    with path.open("r+b") as file:
        file.seek(offset + 40)
        byte = file.read(1)
        file.seek(offset + 40)
        file.write(bytes([byte[0] ^ 1]))
    held.take(np.array([0, 2]))
    with pytest.raises(DataError, match=rf"0-of-1: record 1 at byte {offset} is damaged .* changed"):
        held.take(np.array([1]))
    with path.open("r+b") as file:
        file.truncate(offset + 20)
    with pytest.raises(DataError, match=rf"record 1 at byte {offset} is damaged"):
        held.take(np.array([1]))


def test_a_shard_cut_short_since_it_was_checked_is_found_at_the_start(make: Make, tmp_path: pathlib.Path) -> None:
    made, split = make(3, 1)
    DiskStore(made, split, 8, Cache(str(tmp_path / "cache")), quiet)
    os.truncate(os.path.join(made.folder, "0-of-1"), 100)
    with pytest.raises(DataError, match=rf"0-of-1 has 100 bytes; dataset\.json says {split.shards[0].bytes}"):
        DiskStore(made, split, 8, Cache(str(tmp_path / "cache")), quiet)


def test_the_longest_unused_goes_first_and_what_a_run_uses_stays(
    make: Make, remote: list[str], tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "cache"
    sets = [make(6, 1, first=6 * k, name=f"bucket{k}") for k in range(5)]
    names = [cache.name(split.shards[0]) for _, split in sets]
    limit = 3 * max(split.shards[0].bytes for _, split in sets) + 100
    live = Cache(str(folder), limit)
    held = DiskStore(*sets[0], 8, live, quiet)  # in use to the end
    for k in (1, 2):
        DiskStore(*sets[k], 8, Cache(str(folder), limit), quiet)
        os.utime(folder / "shards" / names[k], (k, k))
    os.utime(folder / "shards" / names[0], (0, 0))  # the oldest of all, yet used
    DiskStore(*sets[1], 8, Cache(str(folder), limit), quiet)  # now 2 is the longest unused
    assert copies(folder) == {*names[:3]}
    DiskStore(*sets[3], 8, Cache(str(folder), limit), quiet)
    assert copies(folder) == {names[0], names[1], names[3]}
    before = held.take(np.arange(6))
    second = DiskStore(*sets[3], 8, Cache(str(folder), limit), quiet)
    third = DiskStore(*sets[4], 8, Cache(str(folder), limit), quiet)
    assert copies(folder) == {names[0], names[3], names[4]}
    with pytest.raises(
        DataError, match=r"take 0\.00 GiB and --cache_dir=.* has room for 0\.00 GiB: give a larger --cache_gb"
    ):
        DiskStore(*sets[1], 8, Cache(str(folder), limit), quiet)
    assert (held.take(np.arange(6)) == before).all()
    del second, third
    live.close()
    assert len(remote) == 5


OTHER = """
import sys
sys.path.insert(0, "tests")
from trainer.io import files
files.is_remote = lambda path: "/bucket" in path
from trainer.data.cache import Cache
from trainer.data.records import Dataset
made = Dataset.load(sys.argv[1])
cache = Cache(sys.argv[2], int(sys.argv[3]))
held = cache.open(made, made.splits["train"])
print(len(held), flush=True)
sys.stdin.read()
"""


def other(made: Dataset, folder: pathlib.Path, limit: int = 0) -> subprocess.Popen[str]:
    """Another process that opens the split and holds it until its input ends."""
    command = [sys.executable, "-c", OTHER, made.folder, str(folder), str(limit)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("remote")
def test_two_processes_copy_once_and_do_not_take_from_each_other(make: Make, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "cache"
    made, split = make(40, 8)
    total = sum(shard.bytes for shard in split.shards)
    both = [other(made, folder, total), other(made, folder, total)]
    try:
        assert [process.stdout.readline() for process in both] == ["8\n"] * 2  # type: ignore[union-attr]
        assert len(copies(folder)) == 8
        inodes = {name: os.stat(folder / "shards" / name).st_mtime_ns for name in copies(folder)}
        # A third run has no room, for two live ones use all of it.
        foreign = make(40, 8, first=100, name="bucket2")
        with pytest.raises(DataError, match="has room for"):
            DiskStore(*foreign, 8, Cache(str(folder), total), quiet)
        both[0].kill()  # its lease ends with it
        both[0].wait()
        with pytest.raises(DataError, match="has room for"):
            DiskStore(*foreign, 8, Cache(str(folder), total), quiet)
        assert {name: os.stat(folder / "shards" / name).st_mtime_ns for name in copies(folder)} == inodes
        both[1].kill()
        both[1].wait()
        larger = total + sum(shard.bytes for shard in foreign[1].shards) // 2
        DiskStore(*foreign, 8, Cache(str(folder), larger), quiet)
        mine = {cache.name(shard) for shard in foreign[1].shards}
        assert mine <= copies(folder)
        assert sum(os.path.getsize(folder / "shards" / name) for name in copies(folder)) <= larger
    finally:
        for process in both:
            process.kill()
            process.wait()


def test_a_shard_that_two_runs_want_at_once_is_read_once(
    make: Make, remote: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one has found no copy, waits while the first makes it, and then takes that."""
    made, split = make(5, 1)
    both, real, load = threading.Event(), files.read, cache._load
    looked: list[str] = []

    def slow(path: str, what: str) -> bytes:
        if "/bucket" in path:
            assert both.wait(30)
        return real(path, what)

    def seen(path: str, split: Split) -> np.ndarray | None:
        found = load(path, split)
        looked.append(path)
        if len(looked) == 2:
            both.set()
        return found

    monkeypatch.setattr(files, "read", slow)
    monkeypatch.setattr(cache, "_load", seen)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        stores = [
            pool.submit(DiskStore, made, split, 8, Cache(str(tmp_path / "cache")), lambda *_: None) for _ in range(2)
        ]
        one, other = (store.result(60).take(np.arange(5)) for store in stores)
    assert (one == other).all()
    assert remote == ["0-of-1"]


@pytest.mark.usefixtures("remote")
def test_a_copy_left_half_made_is_made_again(make: Make, tmp_path: pathlib.Path) -> None:
    made, split = make(6, 2)
    shards = tmp_path / "cache" / "shards"
    shards.mkdir(parents=True)
    name = cache.name(split.shards[0])
    (shards / f"{name}.12345678.tmp").write_bytes(b"half")
    (shards / "ffffffff-9.tfrecord.12345678.tmp").write_bytes(b"half")
    (shards / name).write_bytes(b"another length")
    held = DiskStore(made, split, 8, Cache(str(tmp_path / "cache")), quiet)
    assert held.take(np.arange(6)).any()
    assert (shards / name).stat().st_size == split.shards[0].bytes
    assert not (shards / "ffffffff-9.tfrecord.12345678.tmp").exists()


def test_need_is_known_before_anything_is_copied(make: Make, remote: list[str], tmp_path: pathlib.Path) -> None:
    made, split = make(6, 2)
    need = Cache(str(tmp_path / "cache"), 1000).need([(made, split), (made, split)])
    assert (need.copies, need.room) == (sum(shard.bytes for shard in split.shards), 1000)
    assert Cache(str(tmp_path / "cache")).need([(made, split)]).room > 1 << 20
    assert not remote


@pytest.mark.usefixtures("remote")
def test_bad_records_of_a_whole_shard_are_left_out_and_a_damaged_shard_stops(
    make: Make, tmp_path: pathlib.Path
) -> None:
    """A shard that dataset.json knows may hold bad pictures. One that it does not know is another file."""
    made, _ = make(6, 1)
    with mock.patch.object(files, "is_remote", return_value=False):
        pictures = [picture(0), ImageRecord(b"no picture", 10, 10, 0, "evil.jpg"), picture(2)]
        split = Split("train", (records.write_shard(made.folder, "bad", pictures),))
    damage = records.CorruptRecordLog(made, split, 0.5)
    store = DiskStore(made, split, 16, Cache(str(tmp_path / "one")), quiet, damage=damage)
    assert [(bad.file, bad.record) for bad in damage.bad] == [("bad", 1)]
    assert store.labels.tolist() == [0, 0]
    path = pathlib.Path(made.folder, "bad")
    content = bytearray(path.read_bytes())
    content[40] ^= 1  # in the first record
    path.write_bytes(content)
    damage = records.CorruptRecordLog(made, split, 0.9)
    with pytest.raises(DataError, match=r"bad does not have the CRC32C .* none of such a shard .* --store=host$"):
        DiskStore(made, split, 16, Cache(str(tmp_path / "two")), quiet, damage=damage)
    assert list((tmp_path / "two" / "shards").glob("*.tfrecord")) == []
    damage = records.CorruptRecordLog(made, split, 0.9)
    assert len(MemoryStore(made, split, 16, quiet, damage)) == 1
    assert [bad.record for bad in damage.bad] == [0, 1]
