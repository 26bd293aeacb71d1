"""TFRecords: TensorFlow reads ours, we read TensorFlow's, and damage is located."""

from __future__ import annotations

import pathlib

import google_crc32c
import numpy as np
import pytest
import tensorflow as tf

from trainer.core.errors import DataError
from trainer.data import records, tfrecord
from trainer.data.dataset import Dataset, Split
from trainer.data.records import EncodedSplit, ImageRecord


def png(height: int = 20, width: int = 30) -> bytes:
    return bytes(tf.io.encode_png(np.zeros((height, width, 3), np.uint8)).numpy())


def record(label: int = 1, encoded: bytes = b"") -> ImageRecord:
    return ImageRecord(encoded or png(), 20, 30, label, "a/b.jpg")


def make_dataset(folder: pathlib.Path, images: list[ImageRecord]) -> Dataset:
    shard = records.write_shard(str(folder), "train-0.tfrecord", images)
    dataset = Dataset(str(folder), "test", ("x", "y", "z"), {"train": Split("train", (shard,))}, {})
    dataset.save()
    return Dataset.load(str(folder))


def test_tensorflow_reads_our_shards(tmp_path: pathlib.Path) -> None:
    shard = records.write_shard(str(tmp_path), "s", [record(i, bytes([i]) * 100) for i in range(3)])
    raw = (tmp_path / "s").read_bytes()
    assert (shard.examples, shard.bytes, shard.crc32c) == (3, len(raw), google_crc32c.value(raw))
    for i, payload in enumerate(tf.data.TFRecordDataset(str(tmp_path / "s"))):
        parsed = tf.io.parse_single_example(
            payload,
            {
                "image/encoded": tf.io.FixedLenFeature([], tf.string),
                "label": tf.io.FixedLenFeature([], tf.int64),
                "image/height": tf.io.FixedLenFeature([], tf.int64),
                "image/width": tf.io.FixedLenFeature([], tf.int64),
            },
        )
        assert parsed["image/encoded"] == bytes([i]) * 100
        assert (int(parsed["label"]), int(parsed["image/height"]), int(parsed["image/width"])) == (i, 20, 30)


def test_we_read_tensorflows_shards(tmp_path: pathlib.Path) -> None:
    with tf.io.TFRecordWriter(str(tmp_path / "s")) as writer:
        for payload in (b"", b"one", b"two" * 1000):
            writer.write(payload)
    payloads = [bytes(payload) for _, payload in tfrecord.payloads((tmp_path / "s").read_bytes(), "s")]
    assert payloads == [b"", b"one", b"two" * 1000]


def test_round_trip_and_labels(tmp_path: pathlib.Path) -> None:
    images = [record(2), record(-1), record(0)]
    dataset = make_dataset(tmp_path, images)
    split = EncodedSplit(dataset, dataset.split("train", "train_split"))
    assert [split.record(i) for i in range(3)] == images
    assert split.labels.tolist() == [2, -1, 0]
    assert split.sizes.tolist() == [[20, 30]] * 3


def test_the_same_images_give_the_same_bytes(tmp_path: pathlib.Path) -> None:
    for name in ("a", "b"):
        records.write_shard(str(tmp_path), name, [record(i) for i in range(5)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_flipped_byte_is_found_and_named() -> None:
    content = b"".join(tfrecord.frame(record(i).serialize()) for i in range(3))
    starts = [offset for offset, _ in tfrecord.payloads(content, "f")]
    rng = np.random.default_rng(0)
    for position in rng.choice(len(content), 200, replace=False):
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 256))
        number = sum(start <= position for start in starts) - 1
        with pytest.raises(DataError, match=rf"^f: record {number} at byte {starts[number]} "):
            list(tfrecord.payloads(bytes(damaged), "f"))


def test_every_truncation_is_found() -> None:
    one = tfrecord.frame(record().serialize())
    content = one + one
    for length in range(len(one) + 1, len(content)):
        with pytest.raises(DataError, match=rf"record 1 at byte {len(one)} is cut off"):
            list(tfrecord.payloads(content[:length], "f"))
    assert len(list(tfrecord.payloads(one, "f"))) == 1


def test_missing_short_and_foreign_shards(tmp_path: pathlib.Path) -> None:
    dataset = make_dataset(tmp_path, [record(), record()])
    path = tmp_path / "train-0.tfrecord"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"{path}: record 1 at byte {len(content) // 2} is missing: the file has"):
        EncodedSplit(dataset, dataset.splits["train"])
    path.unlink()
    with pytest.raises(DataError, match="cannot read a shard"):
        EncodedSplit(dataset, dataset.splits["train"])


def test_label_outside_the_classes_is_named(tmp_path: pathlib.Path) -> None:
    dataset = make_dataset(tmp_path, [record(0), record(3)])
    with pytest.raises(DataError, match=r"record 1 .*label 3, but dataset\.json has 3 classes"):
        EncodedSplit(dataset, dataset.splits["train"])


@pytest.mark.parametrize(
    "payload",
    [b"\xff\xff", b"", tf.train.Example().SerializeToString(), ImageRecord(b"x", 0, 5).serialize()],
)
def test_other_protos_are_refused(payload: bytes) -> None:
    with pytest.raises(DataError, match="here"):
        ImageRecord.parse(payload, "here")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}', '{"format": "funmatch-dataset/1"}'])
def test_damaged_index_is_one_line(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=r"dataset\.json"):
        Dataset.load(str(tmp_path))
