"""TFRecord files of many origins: labels and layouts are understood, or refused by name."""

from __future__ import annotations

import pathlib
import unicodedata

import numpy as np
import pytest
import tensorflow as tf
from conftest import here
from samples import image

from trainer.data.dataset import Dataset
from trainer.data.records import EncodedSplit

Row = dict[str, object]


def feature(value: object) -> tf.train.Feature:
    values = value if isinstance(value, list) else [value]
    if values and isinstance(values[0], float):
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))
    if not values or isinstance(values[0], int):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
    raw = [text if isinstance(text, bytes) else str(text).encode() for text in values]
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=raw))


def write(path: pathlib.Path, rows: list[Row], compression: str | None = None) -> str:
    """Writes a file; returns the source that it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for row in rows:
            features = tf.train.Features(feature={key: feature(value) for key, value in row.items()})
            writer.write(tf.train.Example(features=features).SerializeToString())
    return f"tfrecord:{path.parent}"


def labelled(tmp_path: pathlib.Path, labels: list[object], **more: object) -> str:
    """A file of images with these labels; None: without one."""
    rows = [
        {"image": image(number)} | more | ({} if label is None else {"label": label})
        for number, label in enumerate(labels)
    ]
    return write(tmp_path / "in/train.tfrecord", rows)


def run(tmp_path: pathlib.Path, source: str, *flags: str, out: str = "out") -> tuple[Dataset, list[int], str]:
    """Prepares; returns the data set, its labels, and what was printed."""
    process = here("prepare", f"--dataset={source}", f"--out={tmp_path / out}", *flags)
    assert process.returncode == 0, process.stderr
    dataset = Dataset.load(str(tmp_path / out))
    labels = [label for split in dataset.splits.values() for label in EncodedSplit(dataset, split).labels.tolist()]
    return dataset, labels, process.stderr


def refused(tmp_path: pathlib.Path, source: str, *flags: str, code: int = 3) -> str:
    process = here("prepare", f"--dataset={source}", f"--out={tmp_path / 'out'}", *flags)
    assert process.returncode == code, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in process.stderr
    return lines[0]


@pytest.mark.parametrize("label", [bytes([9]), np.int64(9).tobytes(), tf.io.serialize_tensor(np.int64(9)).numpy()])
def test_numbers_as_bytes_are_no_names(tmp_path: pathlib.Path, label: bytes) -> None:
    assert "numbers as bytes" in refused(tmp_path, labelled(tmp_path, [b"\x01", label]))


def test_shards_that_are_missing_are_reported(tmp_path: pathlib.Path) -> None:
    rows: list[Row] = [{"image": image(0), "label": 0}]
    for number in (0, 2):
        write(tmp_path / f"in/a-train.tfrecord-{number:05d}-of-00004", rows)
    source = write(tmp_path / "in/b-test.tfrecord-00000-of-00001", rows)
    printed = run(tmp_path, source)[2]
    assert "warning: 2 of 4 shards of" in printed
    assert "(first: 00001-of-00004)" in printed
    assert "b-test" not in printed.replace("b-test.tfrecord-00000-of-00001#0", "")


def test_other_suffixes_need_a_pattern(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "in/train.record", [{"image": image(0), "label": 0}])
    assert "give a pattern of names" in refused(tmp_path, source)
    assert run(tmp_path, f"{source}/*.record")[1] == [0]


def test_files_with_labels_elsewhere_are_reported(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "in/train-1.tfrecord", [{"image": image(0), "label": 0}])
    source = write(tmp_path / "in/train-2.tfrecord", [{"image": image(1), "class": 1}])
    printed = run(tmp_path, source)[2]
    assert "warning: 1 of 2 files have no label at 'label' in any record" in printed
    assert "with class, image)" in printed


def test_sequences_are_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "in").mkdir()
    lists = tf.train.FeatureLists(feature_list={"image": tf.train.FeatureList(feature=[feature(image(0))])})
    with tf.io.TFRecordWriter(str(tmp_path / "in/train.tfrecord")) as writer:
        context = tf.train.Features(feature={"label": feature(1)})
        writer.write(tf.train.SequenceExample(context=context, feature_lists=lists).SerializeToString())
    assert "has tf.train.SequenceExample" in refused(tmp_path, f"tfrecord:{tmp_path}/in")


# -- which features


def test_a_feature_that_no_record_has_is_an_error(tmp_path: pathlib.Path) -> None:
    source = labelled(tmp_path, [0, 1], file_name="x")
    line = refused(tmp_path, source, "--features=image:image,label:TYPO", code=2)
    assert "has the feature 'TYPO' (label); they have file_name, image, label; --unlabelled" in line
    assert "'NAME' (filename)" in refused(tmp_path, source, "--features=image:image,filename:NAME", code=2)
    assert "no image at 'TYPO'; it has file_name, image, label" in refused(tmp_path, source, "--features=image:TYPO")
    assert "'class' (label)" in refused(tmp_path, source, "--features=notebook", code=2)
    # A known layout's name of the file may be missing, and labels that are not taken too.
    assert run(tmp_path, source, "--features=image:image,label:TYPO", "--unlabelled")[1] == [-1, -1]
    assert run(tmp_path, labelled(tmp_path / "b", [0, 1]), "--features=tfds", out="b")[1] == [0, 1]


def test_a_first_record_without_a_label_does_not_decide(tmp_path: pathlib.Path) -> None:
    dataset, labels, printed = run(tmp_path, labelled(tmp_path, [None, 2, [], 1, 0, -1, b""]))
    assert labels == [-1, 2, -1, 1, 0, -1, -1]
    assert dataset.classes == ("0", "1", "2")
    assert "3 of 7 records have no label at 'label' and are unlabelled (first: " in printed
    assert "record 0 at byte 0)" in printed
    assert dataset.source["without_label"] == {"train": 4}
    assert dataset.source["labels"] == {"train": [1, 1, 1]}


def test_without_labels_the_flag_is_asked_for(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "in/train.tfrecord", [{"image": image(0), "size": 3}])
    assert "image, size: say which" in refused(tmp_path, source)
    assert run(tmp_path, source, "--unlabelled")[1] == [-1]
    assert run(tmp_path, source, "--features=image:image", out="b")[1] == [-1]


def test_files_without_records_are_reported(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "in/train-0.tfrecord", [])
    assert "train-0.tfrecord has no records" in refused(tmp_path, f"tfrecord:{tmp_path}/in")
    source = write(tmp_path / "in/train-1.tfrecord", [{"image": image(0), "label": 0}])
    assert "1 of 2 files have no records (first: " in run(tmp_path, source)[2]
    write(tmp_path / "in/train-2.tfrecord", [{"picture": image(0), "label": 0}])
    assert "train-2.tfrecord: record 0 at byte 0 has no image at 'image'" in refused(tmp_path / "x", source)


# -- which labels


def test_digits_as_text_are_class_numbers(tmp_path: pathlib.Path) -> None:
    dataset, labels, _ = run(tmp_path, labelled(tmp_path, [str(number) for number in range(12)]))
    assert dataset.classes == tuple(map(str, range(12)))  # was 0, 1, 10, 11, 2
    assert labels == list(range(12))


def test_labels_of_one_number_of_any_type(tmp_path: pathlib.Path) -> None:
    dataset, labels, _ = run(tmp_path, labelled(tmp_path, [1, 2.0, "0", " 1 ", float("nan"), -1.0, "-1"]))
    assert dataset.classes == ("0", "1", "2")
    assert labels == [1, 2, 0, 1, -1, -1, -1]


def test_labels_from_1_are_reported_and_names_offered(tmp_path: pathlib.Path) -> None:
    """The scripts of Inception and TF-Slim count from 1, and write names beside the numbers."""
    rows = [
        {
            "image/encoded": image(n),
            "image/class/label": n + 1,
            "image/class/text": f"n{n}",
            "image/filename": f"{n}.jpg",
        }
        for n in range(3)
    ]
    source = write(tmp_path / "in/train.tfrecord", rows)
    dataset, labels, printed = run(tmp_path, source)
    assert labels == [1, 2, 3]
    assert "class 0 has no image" in printed
    flag = "--features=image:image/encoded,label:image/class/text"
    assert flag in printed
    assert dataset.source["labels"] == {"train": [0, 1, 1, 1]}
    dataset, labels, printed = run(tmp_path, source, flag, out="b")
    assert (dataset.classes, labels) == (("n0", "n1", "n2"), [0, 1, 2])


def test_one_hot_labels_are_class_numbers(tmp_path: pathlib.Path) -> None:
    hot = np.eye(4).tolist()
    dataset, labels, _ = run(tmp_path, labelled(tmp_path, [hot[2], hot[0], [0, 1, 0, 0], [0.0] * 4]))
    assert dataset.classes == ("0", "1", "2", "3")  # also the last, which no image has
    assert labels == [2, 0, 1, -1]
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    source, flag = labelled(tmp_path, [hot[2]]), f"--classes={tmp_path}/names.txt"
    assert run(tmp_path, source, flag, out="b")[0].classes == ("a", "b", "c", "d")
    (tmp_path / "names.txt").write_text("a\nb\n")
    assert "length 4, and --classes has 2 names" in refused(tmp_path / "x", source, flag)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([[0.2, 0.8]], "record 0 at byte 0: the label at 'label' is a list of 2 numbers that is not one-hot"),
        ([0, [3, 5]], "list of 2 numbers"),
        ([[1, 1, 0]], "list of 3 numbers"),
        ([["a", "b"]], "has 2 labels at 'label'"),
        ([[0, 1], [0, 0, 1]], "one-hot labels of length 2 and 3; all must have one length"),
        ([0, 1, -2], "-2"),
        ([0, 1, 0.5], "0.5"),
        ([0, 1, 2, "rose"], "'rose'"),
        (["Stra\u00dfe".encode("cp1252")], "is not UTF-8: say how it is encoded, as --encoding=cp1252"),
    ],
)
def test_labels_that_are_not_one_class_are_refused(tmp_path: pathlib.Path, labels: list[object], reason: str) -> None:
    line = refused(tmp_path, labelled(tmp_path, labels))
    assert reason in line
    assert "record " in line or "one-hot labels" in line  # where it is


def test_names_are_compared_as_people_read_them(tmp_path: pathlib.Path) -> None:
    composed = "caf\u00e9"
    names = [composed, unicodedata.normalize("NFD", composed), f" {composed}", "tea"]
    assert run(tmp_path, labelled(tmp_path, names))[1] == [0, 0, 0, 1]
    source = labelled(tmp_path, [composed.encode("cp1252")])
    assert run(tmp_path, source, "--encoding=cp1252", out="b")[0].classes == (composed,)


# -- what is no image, and no TFRecord file


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.zeros((40, 40, 3), np.uint8).tobytes(), "zeros"),
        (np.arange(4800, dtype=np.uint8).tobytes(), "perhaps 40 x 40 raw pixels: store an encoded image"),
        (tf.io.serialize_tensor(np.zeros((4, 4, 3), np.uint8)).numpy(), "a serialized tensor: store an encoded image"),
        ([1, 2, 3], "has 3 numbers at 'image', not the bytes of an image file"),
        ([0.5], "has 1 numbers at 'image'"),
        ([image(0), image(1)], "has 2 images at 'image'"),
        ([], "has no image at 'image'"),
    ],
)
def test_what_is_there_instead_of_an_image_is_said(tmp_path: pathlib.Path, content: object, reason: str) -> None:
    rows: list[Row] = [{"image": content, "label": number} for number in range(3)]
    line = refused(tmp_path, write(tmp_path / "in/train.tfrecord", rows))
    assert reason in line
    assert "record 0 at byte 0" in line
    assert "in/train.tfrecord" in line


def test_files_that_are_no_tfrecords_are_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "in/train.tfrecord"
    for compression, hint in (("GZIP", "gunzip"), ("ZLIB", "zlib.decompress")):
        line = refused(tmp_path, write(path, [{"image": image(0), "label": 0}], compression))
        assert "compressed" in line
        assert hint in line
    for content, what in (
        (b"<!DOCTYPE html><html>Sign in</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (image(0), "JPEG"),
        (b"PK\x03\x04" + bytes(40), "unpack it"),
    ):
        path.write_bytes(content)
        line = refused(tmp_path, f"tfrecord:{path}")
        assert "train.tfrecord is not a TFRecord file but " in line
        assert what in line
