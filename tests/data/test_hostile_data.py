"""Damaged and hostile records are counted and located; none is dropped silently."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import re
import struct
import zlib

import conftest
import google_crc32c
import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from trainer.core.errors import DataError
from trainer.data import cache, image_header, records, store, tfrecord
from trainer.data.dataset import Dataset, Shard, Split
from trainer.data.records import CorruptRecord, CorruptRecordLog, ImageRecord

SIDE = 8


def image(number: int, height: int = 10, width: int = 12) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def encode(source: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    source.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def payload(number: int, kind: str = "PNG") -> bytes:
    return ImageRecord(encode(image(number), kind), 10, 12, number % 3, f"{number}.png").serialize()


def frames(payloads: list[bytes]) -> tuple[bytes, list[int]]:
    """Returns a shard's content and the offsets of its records."""
    parts = [tfrecord.frame(part) for part in payloads]
    return b"".join(parts), np.cumsum([0, *map(len, parts)]).tolist()


def write_dataset(folder: pathlib.Path, *contents: tuple[bytes, int], damaged: tuple[bytes, ...] = ()) -> Dataset:
    """Writes shards given as (content, records); the files hold `damaged` instead, if given."""
    shards = []
    for number, (content, count) in enumerate(contents):
        shards.append(Shard(f"s{number}", count, len(content), google_crc32c.value(content)))
        (folder / f"s{number}").write_bytes(damaged[number] if damaged else content)
    dataset = Dataset(str(folder), "test", ("a", "b", "c"), {"train": Split("train", tuple(shards))}, {})
    dataset.save()
    return dataset


def index(dataset: Dataset, content: bytes, corrupt: CorruptRecordLog | None = None) -> np.ndarray:
    return records.index_shard(dataset, dataset.splits["train"].shards[0], content, "f", corrupt)


# -- damage of the file


def test_two_thousand_flipped_bytes(tmp_path: pathlib.Path) -> None:
    """Without tolerance the error locates the record; with it, that one record is left out."""
    content, starts = frames([payload(n) for n in range(5)])
    dataset = write_dataset(tmp_path, (content, 5))
    whole, split = index(dataset, content), dataset.splits["train"]
    rng = np.random.default_rng(20210609)
    for _ in range(2000):
        position = int(rng.integers(len(content)))
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 256))
        number = int(np.searchsorted(starts, position, side="right")) - 1
        with pytest.raises(DataError, match=rf"/s0: record {number} at byte {starts[number]} "):
            index(dataset, bytes(damaged))
        corrupt = CorruptRecordLog(dataset, split, 0.2)
        table = index(dataset, bytes(damaged), corrupt)
        assert [(r.file, r.record, r.offset) for r in corrupt.records] == [("s0", number, starts[number])], position
        kept = np.delete(np.arange(5), number)
        np.testing.assert_array_equal(table[table["offset"] >= 0], whole[kept])


def test_truncation_at_every_byte(tmp_path: pathlib.Path) -> None:
    content, starts = frames([payload(n) for n in range(3)])
    dataset = write_dataset(tmp_path, (content, 3))
    split = dataset.splits["train"]
    for length in range(len(content)):
        whole = int(np.searchsorted(starts, length, side="right")) - 1
        with pytest.raises(DataError, match=rf"/s0: record {whole} at byte {starts[whole]} is (cut off|missing)"):
            index(dataset, content[:length])
        corrupt = CorruptRecordLog(dataset, split, 0.99)
        if whole == 0:
            with pytest.raises(
                DataError, match=r"3 of 3 records of 'train' are bad, more than --max_bad_fraction=0\.99"
            ):
                index(dataset, content[:length], corrupt)
            continue
        table = index(dataset, content[:length], corrupt)
        assert [r.record for r in corrupt.records] == list(range(whole, 3))
        assert (table["offset"] >= 0).tolist() == [n < whole for n in range(3)]


def test_what_is_reported_is_what_was_injected(tmp_path: pathlib.Path) -> None:
    """Many kinds of damage in random places of two shards: all other records survive, in order."""
    rng = np.random.default_rng(7)
    for trial in range(40):
        folder = tmp_path / str(trial)
        folder.mkdir()
        injected: list[tuple[str, int]] = []
        contents, damaged_files = [], []
        for file in ("s0", "s1"):
            payloads = [payload(100 * trial + n) for n in range(10)]
            bad = sorted(rng.choice(10, rng.integers(0, 5), replace=False).tolist())
            for number in bad[::2]:  # corrupt when written: the shard's CRC32C is right
                payloads[number] = [b"\xff\xff", b"", tf.train.Example().SerializeToString(),
                                    ImageRecord(b"no image", 10, 12, 0, "x").serialize()][int(rng.integers(4))]  # fmt: skip
            content, starts = frames(payloads)
            contents.append((content, 10))
            changed = bytearray(content)
            for number in bad[1::2]:
                position = starts[number] + int(rng.choice([0, 3, 8, 12, 40]))
                changed[position] ^= 0x41
            damaged_files.append(bytes(changed))
            injected += [(file, number) for number in bad]
        dataset = write_dataset(folder, *contents, damaged=tuple(damaged_files))
        corrupt = CorruptRecordLog(dataset, dataset.splits["train"], 0.5)
        memory = store.MemoryStore(dataset, dataset.splits["train"], SIDE, lambda *_: None, corrupt)
        assert [(r.file, r.record) for r in corrupt.records] == injected
        assert len(corrupt.messages()) == len(injected)
        left = [n for f in range(2) for n in range(10) if (f"s{f}", n) not in injected]
        assert memory.labels.tolist() == [(100 * trial + n) % 3 for n in left]
        assert len(memory) == len(memory.images) == 20 - len(injected)


def test_two_consecutive_damaged_lengths_are_both_counted(tmp_path: pathlib.Path) -> None:
    """The second record's offset cannot be known, but it is counted as missing."""
    content, starts = frames([payload(n) for n in range(6)])
    changed = bytearray(content)
    changed[starts[2]] ^= 1
    changed[starts[3]] ^= 1
    dataset = write_dataset(tmp_path, (content, 6))
    corrupt = CorruptRecordLog(dataset, dataset.splits["train"], 0.5)
    table = index(dataset, bytes(changed), corrupt)
    assert len(corrupt.records) == 2
    assert corrupt.records[0] == CorruptRecord("s0", 2, starts[2], "has a damaged length")
    assert "its header was lost in the damage before it" in corrupt.records[1].reason
    assert table["label"][table["offset"] >= 0].tolist() == [0, 1, 1, 2]


def test_empty_foreign_and_overlong_shards(tmp_path: pathlib.Path) -> None:
    content, _ = frames([payload(n) for n in range(4)])
    dataset = write_dataset(tmp_path, (content, 4))
    with pytest.raises(DataError, match=r"s0: record 0 at byte 0 is missing: the file has 0 of [\d,]+ bytes"):
        index(dataset, b"")
    foreign, _ = frames([payload(n) for n in range(10, 14)])
    with pytest.raises(DataError, match=r"does not have the CRC32C in dataset\.json"):
        index(dataset, foreign, CorruptRecordLog(dataset, dataset.splits["train"], 0.9))
    with pytest.raises(DataError, match=r"has 3 bytes after its 4 records"):
        index(dataset, content + b"abc", CorruptRecordLog(dataset, dataset.splits["train"], 0.9))


# -- hostile images

RGB = image(1)
HUGE_JPEG = encode(image(1), "JPEG")
_AT = HUGE_JPEG.index(b"\xff\xc0") + 5
HUGE_JPEG = HUGE_JPEG[:_AT] + struct.pack(">HH", 10_000, 10_000) + HUGE_JPEG[_AT + 4 :]
MOVING = encode(image(1), "GIF", save_all=True, append_images=[image(2)])
DEEP = encode(Image.fromarray((np.arange(120).reshape(10, 12) * 500).astype(np.uint16)), "PNG")


def png_of(width: int, height: int) -> bytes:
    """Returns a PNG whose header declares a size, with the right checksum."""
    valid = encode(RGB, "PNG")
    head = b"IHDR" + struct.pack(">II", width, height) + valid[24:29]
    return valid[:12] + head + struct.pack(">I", zlib.crc32(head)) + valid[33:]


BAD = [
    ("empty", b"", (10, 12), "an empty image"),
    ("no image", b"\x00" * 100, (10, 12), "not a JPEG, PNG, GIF or BMP"),
    ("WebP", encode(RGB, "WEBP"), (10, 12), "not a JPEG, PNG, GIF or BMP"),
    ("0 x 0 in the record", encode(RGB, "PNG"), (0, 0), "image size 0 x 0 pixels"),
    ("0 x 12 in the PNG", png_of(12, 0), (10, 12), "a PNG of 0 x 12 pixels"),
    ("another size than its record's", encode(RGB, "PNG"), (12, 10), "its image has 10 x 12 pixels; its record says 12 x 10"),
    ("100 megapixels", HUGE_JPEG, (10_000, 10_000), "a JPEG of 10,000 x 10,000 pixels, more than 67,108,864 in all"),
    ("PNG bomb", png_of(1 << 20, 1 << 20), (1 << 20, 1 << 20), "a PNG of 1,048,576 x 1,048,576 pixels, more than"),
    ("16 bits", DEEP, (10, 12), "a PNG of 16 bits per channel"),
    ("animated", MOVING, (10, 12), "a GIF of 2 frames"),
    ("JPEG without its end", encode(RGB, "JPEG")[:-2], (10, 12), "a JPEG that is cut off"),
    ("half a progressive JPEG", encode(RGB, "JPEG", progressive=True)[:-60], (10, 12), "a JPEG that is cut off"),
    ("half a PNG", encode(RGB, "PNG")[:200], (10, 12), "a PNG that is cut off"),
    ("GIF without its trailer", encode(RGB, "GIF")[:-1], (10, 12), "a GIF that is cut off"),
    ("BMP without its end", encode(RGB, "BMP")[:-1], (10, 12), "a BMP that is cut off"),
    ("a JPEG's head alone", encode(RGB, "JPEG")[:30], (10, 12), "a JPEG that is cut off in its header"),
    ("a JPEG without image data", b"\xff\xd8\xff\xd9", (10, 12), "a JPEG without image data"),
]  # fmt: skip


@pytest.mark.parametrize(("encoded", "size", "reason"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_hostile_image_is_located_and_counted(
    tmp_path: pathlib.Path, encoded: bytes, size: tuple[int, int], reason: str
) -> None:
    hostile = ImageRecord(encoded, *size, 1, "evil.jpg").serialize()
    content, starts = frames([payload(0), hostile, payload(2)])
    dataset = write_dataset(tmp_path, (content, 3))
    split = dataset.splits["train"]
    with pytest.raises(DataError, match=rf"/s0: record 1 at byte {starts[1]} is unusable: {re.escape(reason)}"):
        store.MemoryStore(dataset, split, SIDE, lambda *_: None)
    for kind in ("memory", "disk"):
        corrupt = CorruptRecordLog(dataset, split, 0.34)
        if kind == "memory":
            opened: store.ImageStore = store.MemoryStore(dataset, split, SIDE, lambda *_: None, corrupt)
        else:
            copies = cache.Cache(str(tmp_path / "cache"))
            opened = store.DiskStore(dataset, split, SIDE, copies, lambda *_: None, corrupt=corrupt)
        assert [(r.file, r.record, r.offset) for r in corrupt.records] == [("s0", 1, starts[1])]
        assert opened.labels.tolist() == [0, 2]
        rest = _rest(tmp_path / kind)
        expected = store.MemoryStore(rest, rest.splits["train"], SIDE, lambda *_: None).images
        np.testing.assert_array_equal(opened.take(np.array([1, 0])), expected[::-1])


def _rest(folder: pathlib.Path) -> Dataset:
    """Writes the data set without its hostile record."""
    folder.mkdir()
    return write_dataset(folder, (frames([payload(0), payload(2)])[0], 2))


def test_an_image_that_only_the_decoder_rejects(tmp_path: pathlib.Path) -> None:
    """Header and end are valid, the data between is not.

    With tolerance it is found before the first step.
    """
    broken = bytearray(encode(RGB, "PNG"))
    broken[60] ^= 0xFF
    assert image_header.parse_header(bytes(broken)).format == "PNG"
    content, starts = frames([payload(0), ImageRecord(bytes(broken), 10, 12, 1, "evil.png").serialize(), payload(2)])
    dataset = write_dataset(tmp_path, (content, 3))
    split = dataset.splits["train"]
    with pytest.raises(
        DataError, match=rf"/s0: record 1 at byte {starts[1]} \(evil\.png\): the image cannot be decoded"
    ):
        store.MemoryStore(dataset, split, SIDE, lambda *_: None)
    corrupt = CorruptRecordLog(dataset, split, 0.5)
    assert store.MemoryStore(dataset, split, SIDE, lambda *_: None, corrupt).labels.tolist() == [0, 2]
    assert corrupt.records == [CorruptRecord("s0", 1, starts[1], "is unusable: its image cannot be decoded")]


def test_unusual_but_valid_images_are_accepted(tmp_path: pathlib.Path) -> None:
    """One pixel, CMYK, grey, progressive, a palette: all decode to the pixels of Pillow."""
    cases = {
        "1 x 1": encode(image(3, 1, 1), "PNG"),
        "1 x 1 JPEG": encode(image(3, 1, 1), "JPEG"),
        "CMYK": encode(RGB.convert("CMYK"), "JPEG", quality=95),
        "grey": encode(RGB.convert("L"), "JPEG"),
        "progressive": encode(RGB, "JPEG", progressive=True),
        "palette": encode(RGB.quantize(16), "PNG"),
        "GIF": encode(RGB.quantize(16), "GIF"),
        "BMP": encode(RGB, "BMP"),
        "padding before a marker": encode(RGB, "JPEG").replace(b"\xff\xdb", b"\xff\xff\xdb", 1),
    }
    payloads = []
    for name, encoded in cases.items():
        size = Image.open(io.BytesIO(encoded)).size
        payloads.append(ImageRecord(encoded, size[1], size[0], 0, name).serialize())
    dataset = write_dataset(tmp_path, (frames(payloads)[0], len(cases)))
    split = records.EncodedSplit(dataset, dataset.splits["train"])
    for number, (name, encoded) in enumerate(cases.items()):
        ours = records.decode(tf.constant(split.record(number).encoded)).numpy().astype(int)
        theirs = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)
        # Decoders round differently; a wrong colour model is off by far more.
        assert np.abs(ours - theirs).mean() <= 3, name
        assert np.abs(ours - theirs).max() <= 8, name


def test_truncated_images_of_every_length_are_found() -> None:
    """TensorFlow decodes some of these."""
    for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("BMP", {})):
        whole = encode(image(5, 16, 16), kind, **options)
        assert image_header.parse_header(whole) == image_header.Header(kind, 16, 16)
        for length in range(len(whole)):
            with pytest.raises(image_header.InvalidImage):
                image_header.parse_header(whole[:length])


def test_the_end_marker_of_a_thumbnail_does_not_hide_a_cut() -> None:
    thumbnail = encode(image(9, 4, 4), "JPEG")
    segment = b"Exif\0\0" + thumbnail
    whole = encode(RGB, "JPEG")
    whole = whole[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment + whole[2:]
    assert image_header.parse_header(whole) == image_header.Header("JPEG", 10, 12)
    with pytest.raises(image_header.InvalidImage, match="cut off"):
        image_header.parse_header(whole[:-2])


# -- the job


@pytest.fixture(scope="module")
def damaged_sets(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shared data set with 3 of 40 training records damaged, and with the other 37 alone."""
    whole = Dataset.load(data)
    (shard,) = whole.splits["train"].shards
    content = pathlib.Path(data, shard.file).read_bytes()
    spans = [(offset, bytes(part)) for offset, part in tfrecord.payloads(content, "x")]
    folders = {name: tmp_path_factory.mktemp(name) for name in ("damaged", "rest")}
    for folder in folders.values():
        for path in pathlib.Path(data).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    changed = bytearray(content)
    for number, position in ((4, 0), (17, 30), (39, 14)):
        changed[spans[number][0] + position] ^= 0x10
    (folders["damaged"] / shard.file).write_bytes(changed)
    images = [ImageRecord.parse(part, "x") for n, (_, part) in enumerate(spans) if n not in (4, 17, 39)]
    rest = records.write_shard(str(folders["rest"]), shard.file, images)
    splits = whole.splits | {"train": Split("train", (rest,))}
    dataclasses.replace(whole, folder=str(folders["rest"]), splits=splits).save()
    return {name: str(folder) for name, folder in folders.items()}


def task_flags(data: str, teacher: str, workdir: pathlib.Path, *more: str) -> tuple[str, ...]:
    return (
        "task", f"--data={data}", f"--teacher=keras:{teacher}", "--student=bit-tiny", f"--image_size={conftest.IMAGE}",
        f"--store_size={conftest.SIDE}", "--steps=4", "--batch_size=8", "--steps_per_loop=2", "--eval_every=4",
        f"--workdir={workdir}", *more,
    )  # fmt: skip


def test_a_corrupt_record_stops_the_job(
    damaged_sets: dict[str, str], teacher_file: str, tmp_path: pathlib.Path
) -> None:
    process = conftest.here(*task_flags(damaged_sets["damaged"], teacher_file, tmp_path / "run"))
    assert process.returncode == 3
    errors = [line for line in process.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert re.search(r"train-\S+: record 4 at byte \d+ has a damaged length", errors[0])


def test_more_corrupt_records_than_the_limit_stop_the_job(
    damaged_sets: dict[str, str], teacher_file: str, tmp_path: pathlib.Path
) -> None:
    process = conftest.here(
        *task_flags(damaged_sets["damaged"], teacher_file, tmp_path / "run", "--max_bad_fraction=0.05")
    )
    assert process.returncode == 3
    assert "3 of 40 records of 'train' are bad, more than --max_bad_fraction=0.05" in process.stderr


def test_the_store_holds_the_other_records_in_order(damaged_sets: dict[str, str]) -> None:
    """As if the corrupt records had never been in the data set."""
    stores = {}
    for name, folder in damaged_sets.items():
        dataset = Dataset.load(folder)
        corrupt = CorruptRecordLog(dataset, dataset.splits["train"], 0.1)
        stores[name] = store.MemoryStore(dataset, dataset.splits["train"], conftest.SIDE, lambda *_: None, corrupt)
        assert [record.record for record in corrupt.records] == ([4, 17, 39] if name == "damaged" else [])
    for part in ("images", "labels", "sizes"):
        np.testing.assert_array_equal(getattr(stores["damaged"], part), getattr(stores["rest"], part))


@pytest.mark.slow
def test_corrupt_records_are_left_out_counted_and_reported(
    damaged_sets: dict[str, str], teacher_file: str, tmp_path: pathlib.Path
) -> None:
    """And the weights equal those of a run on the other records alone."""
    weights = {}
    for name in ("damaged", "rest"):
        run = tmp_path / name
        process = conftest.here(*task_flags(damaged_sets[name], teacher_file, run, "--max_bad_fraction=0.1"))
        assert process.returncode == 0, process.stderr
        result = json.loads((run / "result.json").read_text())
        assert result["examples"] == 37
        left_out = result["left_out"].get("train", [])
        assert [record["record"] for record in left_out] == ([4, 17, 39] if name == "damaged" else [])
        assert json.loads((run / "left_out.json").read_text()) == result["left_out"]
        assert ("3 of 40 records of 'train' are corrupt and skipped" in process.stderr) == (name == "damaged")
        assert process.stderr.count("warning: skipped: ") == len(left_out)
        weights[name] = keras.saving.load_model(run / "export/model.keras").get_weights()
    for ours, theirs in zip(weights["damaged"], weights["rest"], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_that_left_out_other_records_is_not_resumed(
    damaged_sets: dict[str, str], teacher_file: str, tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "left_out.json").write_text("{}\n")
    process = conftest.here(*task_flags(damaged_sets["damaged"], teacher_file, run, "--max_bad_fraction=0.1"))
    assert process.returncode == 3
    assert "other records are corrupt now than when this run began" in process.stderr
