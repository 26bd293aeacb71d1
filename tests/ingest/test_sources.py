"""Folders, tables and existing TFRecord files become data sets, in a fixed order."""

from __future__ import annotations

import io
import json
import pathlib
import shutil
import threading

import numpy as np
import pytest
import tensorflow as tf
from conftest import here
from PIL import Image
from samples import image, put, tree

from trainer.core.errors import ConfigError
from trainer.data import records
from trainer.data.dataset import Dataset
from trainer.data.records import EncodedSplit, ImageRecord
from trainer.ingest import images, sources, writer


def run(tmp_path: pathlib.Path, source: str, *flags: str, out: str = "out") -> Dataset:
    process = here("prepare", f"--dataset={source}", f"--out={tmp_path / out}", *flags)
    assert process.returncode == 0, process.stderr
    return Dataset.load(str(tmp_path / out))


def refused(tmp_path: pathlib.Path, source: str, *flags: str, code: int = 3) -> str:
    process = here("prepare", f"--dataset={source}", f"--out={tmp_path / 'out'}", *flags)
    assert process.returncode == code, process.stderr
    assert not (tmp_path / "out/dataset.json").exists()
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in process.stderr
    return lines[0]


def contents(dataset: Dataset, split: str) -> list[tuple[str, int]]:
    encoded = EncodedSplit(dataset, dataset.splits[split])
    return [(encoded.record(i).filename, encoded.record(i).label) for i in range(len(encoded))]


# -- folders


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["test/a/1.jpg", "train/b/2.jpg"], {"test": [("test/a/1.jpg", 0)], "train": [("train/b/2.jpg", 1)]}),
        (["a/1.jpg", "b/2.jpg"], {"train": [("a/1.jpg", 0), ("b/2.jpg", 1)]}),
        (["train/1.jpg", "val/2.jpg"], {"train": [("train/1.jpg", -1)], "val": [("val/2.jpg", -1)]}),
        (["train/1.jpg", "daisy/2.jpg"], {"train": [("daisy/2.jpg", 0), ("train/1.jpg", 1)]}),
        (["1.jpg", "2.JPEG"], {"train": [("1.jpg", -1), ("2.JPEG", -1)]}),
    ],
)
def test_levels_of_folders(
    tmp_path: pathlib.Path, names: list[str], expected: dict[str, list[tuple[str, int]]]
) -> None:
    put(tmp_path / "in", *names)
    dataset = run(tmp_path, f"folder:{tmp_path}/in")
    assert {split: contents(dataset, split) for split in dataset.splits} == expected
    assert bool(dataset.classes) == any(label >= 0 for part in expected.values() for _, label in part)


def test_images_at_several_depths_are_refused(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", "train/a/1.jpg", "train/2.jpg")
    line = refused(tmp_path, f"folder:{tmp_path}/in")
    assert "train/2.jpg" in line
    assert "train/a/1.jpg" in line


def test_unlabelled_by_flag(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", "train/a/1.jpg", "train/b/2.jpg")
    dataset = run(tmp_path, f"folder:{tmp_path}/in", "--unlabelled")
    assert dataset.classes == ()
    assert [label for _, label in contents(dataset, "train")] == [-1, -1]


def test_splits_are_chosen_and_renamed(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", "train/a/1.jpg", "val/a/2.jpg", "extra/a/3.jpg")
    dataset = run(tmp_path, f"folder:{tmp_path}/in", "--splits=train=train,validation=val")
    assert {split: contents(dataset, split) for split in dataset.splits} == {
        "train": [("train/a/1.jpg", 0)],
        "validation": [("val/a/2.jpg", 0)],
    }
    line = refused(tmp_path / "x", f"folder:{tmp_path}/in", "--splits=train=nowhere")
    assert "'nowhere'" in line
    assert "extra" in line
    assert "has splits of its own" in refused(tmp_path / "x", f"folder:{tmp_path}/in", "--splits=train:0.9")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train", "neither NAME=WHERE nor NAME:SHARE"),
        ("=x", "neither NAME=WHERE"),
        ("train:x", "'x' is not a share"),
        ("train:0", "above 0"),
        ("train:nan", "above 0"),
        ("train:0.9,test:0.2", "add up to 1.1"),
        ("train:0.9,train:0.1", "is there twice"),
        ("train:0.9,test=test", "mixes"),
    ],
)
def test_bad_splits(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sources.parse_splits(text)


# -- splits by share


def test_shares_hold_for_every_class_and_equal_images_stay_together() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 3000).tolist()
    hashes = [bytes(rng.bytes(8)) for _ in labels]
    twins = [(number, number + 1) for number in range(0, 3000, 10)]
    for one, other in twins:
        labels[other], hashes[other] = labels[one], hashes[one]
    shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
    assigned = sources.split_by_share(shares, 0, labels, hashes)
    assert sorted(number for numbers in assigned.values() for number in numbers) == list(range(3000))
    for split, share in shares.items():
        counts = np.bincount([labels[n] for n in assigned[split]], minlength=7)
        # One image for rounding at the cut, one for a twin kept with its twin.
        assert np.abs(counts - share * np.bincount(labels)).max() <= 2, split
    split_of = {number: split for split, numbers in assigned.items() for number in numbers}
    assert all(split_of[one] == split_of[other] for one, other in twins)
    reseeded = sources.split_by_share(shares, 1, labels, hashes)
    assert assigned["test"] != sources.split_by_share({"test": 0.1}, 0, labels, hashes)["test"]
    assert reseeded.keys() == assigned.keys()


def test_equal_images_are_never_in_two_splits() -> None:
    """Even where the cut falls among them."""
    hashes = [bytes([number % 7]) * 8 for number in range(7 * 31)]
    assigned = sources.split_by_share({"train": 0.5, "test": 0.5}, 0, [0] * len(hashes), hashes)
    assert not {hashes[n] for n in assigned["train"]} & {hashes[n] for n in assigned["test"]}
    assert all(assigned.values())


def test_small_classes_do_not_all_round_the_same_way() -> None:
    """Of 100 classes of 4 images, each small split gets about a tenth, instead of none."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(100), 4).tolist()
    hashes = [bytes(rng.bytes(8)) for _ in labels]
    assigned = sources.split_by_share({"train": 0.8, "validation": 0.1, "test": 0.1}, 0, labels, hashes)
    assert sum(map(len, assigned.values())) == 400
    assert 25 <= len(assigned["validation"]) <= 55
    assert 25 <= len(assigned["test"]) <= 55


def test_shares_depend_on_bytes_and_seed_and_not_on_names(tmp_path: pathlib.Path) -> None:
    for name, order in (("one", range(40)), ("two", reversed(range(40)))):
        for position, number in enumerate(order):
            path = tmp_path / name / f"c{number % 2}" / f"{position}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image(number))

    def splits_by_image(folder: str, *flags: str) -> dict[bytes, str]:
        dataset = run(
            tmp_path,
            f"folder:{tmp_path}/{folder}",
            "--splits=train:0.5,test:0.5",
            *flags,
            out="".join([folder, *flags]),
        )
        by_image = {}
        for split in dataset.splits.values():
            encoded = EncodedSplit(dataset, split)
            by_image |= {encoded.record(i).encoded: split.name for i in range(len(encoded))}
        return by_image

    one = splits_by_image("one")
    assert len(one) == 40
    assert sorted(one.values()).count("test") == 20
    assert splits_by_image("two") == one
    assert splits_by_image("one", "--seed=1") != one


# -- tables


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("a/1.jpg,daisy\na/2.jpg,rose\n", [], {"train": [("a/1.jpg", 0), ("a/2.jpg", 1)]}),
        ("path,label\na/1.jpg,2\na/2.jpg,0\n", [], {"train": [("a/1.jpg", 2), ("a/2.jpg", 0)]}),
        ("image;class;x\na/1.jpg;rose;\na/2.jpg;daisy;\n", [], {"train": [("a/1.jpg", 1), ("a/2.jpg", 0)]}),
        ("a/1.jpg,x,train\na/2.jpg,x,test\n", [], {"train": [("a/1.jpg", 0)], "test": [("a/2.jpg", 0)]}),
        ("\ufefffile,target,split\r\na/1.jpg,x,t\r\na/2.jpg,,t\r\n", [], {"t": [("a/1.jpg", 0), ("a/2.jpg", -1)]}),
        ("a/1.jpg\na/2.jpg\n", [], {"train": [("a/1.jpg", -1), ("a/2.jpg", -1)]}),
        (
            "id,what,photo\n7,rose,a/1.jpg\n8,daisy,a/2.jpg\n",
            ["--columns=path:photo,label:what"],
            {"train": [("a/1.jpg", 1), ("a/2.jpg", 0)]},
        ),
        ("7,a/1.jpg,0\n8,a/2.jpg,1\n", ["--columns=path:1,label:2"], {"train": [("a/1.jpg", 0), ("a/2.jpg", 1)]}),
        ('"a/1.jpg","a, b"\n"a/2.jpg","a"\n', [], {"train": [("a/1.jpg", 1), ("a/2.jpg", 0)]}),
    ],
)
def test_tables(
    tmp_path: pathlib.Path, text: str, flags: list[str], expected: dict[str, list[tuple[str, int]]]
) -> None:
    put(tmp_path / "in", "a/1.jpg", "a/2.jpg")
    (tmp_path / "in/list.csv").write_bytes(text.encode())
    dataset = run(tmp_path, f"csv:{tmp_path}/in/list.csv", *flags)
    assert {split: contents(dataset, split) for split in dataset.splits} == expected


def test_class_names_for_a_table(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", "1.jpg", "2.jpg")
    (tmp_path / "in/names.txt").write_text("zinnia\nrose\ndaisy\n")
    (tmp_path / "in/numbers.csv").write_text("1.jpg,0\n2.jpg,2\n")
    (tmp_path / "in/words.csv").write_text("1.jpg,zinnia\n2.jpg,daisy\n")
    for name in ("numbers", "words"):
        dataset = run(tmp_path, f"csv:{tmp_path}/in/{name}.csv", f"--classes={tmp_path}/in/names.txt", out=name)
        assert dataset.classes == ("zinnia", "rose", "daisy")
        assert [label for _, label in contents(dataset, "train")] == [0, 2]
    (tmp_path / "in/more.csv").write_text("1.jpg,0\n2.jpg,3\n")
    line = refused(tmp_path, f"csv:{tmp_path}/in/more.csv", f"--classes={tmp_path}/in/names.txt")
    assert "label 3" in line
    (tmp_path / "in/other.csv").write_text("1.jpg,tulip\n2.jpg,rose\n")
    line = refused(tmp_path, f"csv:{tmp_path}/in/other.csv", f"--classes={tmp_path}/in/names.txt")
    assert "'tulip'" in line


def test_mistakes_in_tables(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", "1.jpg")
    table = tmp_path / "in/list.csv"
    table.write_text("path,label\n1.jpg,a\n,b\n")
    assert "line 3 names no file" in refused(tmp_path, f"csv:{table}")
    table.write_text("path,label\n1.jpg,a\n")
    assert "no column 'klass'" in refused(tmp_path, f"csv:{table}", "--columns=label:klass", code=2)
    table.write_text("")
    assert "is empty" in refused(tmp_path, f"csv:{table}")
    table.write_text("1.jpg,a\ngone.jpg,b\n")
    assert f"{tmp_path}/in/gone.jpg" in refused(tmp_path, f"csv:{table}")
    assert "cannot read a table" in refused(tmp_path, f"csv:{tmp_path}/nowhere.csv")


# -- existing TFRecord files


def shard(path: pathlib.Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for row in rows:
            feature = {}
            for key, value in row.items():
                if isinstance(value, int):
                    feature[key] = tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
                else:
                    raw = value if isinstance(value, bytes) else str(value).encode()
                    feature[key] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[raw]))
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())


@pytest.mark.parametrize("flags", [[], ["--features=notebook"], ["--features=image:image,label:class"]])
def test_shards_of_the_notebooks(tmp_path: pathlib.Path, flags: list[str]) -> None:
    """Names and keys as tfrecords_pets37.ipynb of FunMatch-Distillation writes them."""
    for split, labels in (("train", [3, 0, 36]), ("validation", [1]), ("test", [2, 2])):
        rows = [{"image": image(i), "class": label} for i, label in enumerate(labels)]
        shard(tmp_path / f"in/{split}/{split}_pets37-0-{len(rows)}.tfrec", rows)
    dataset = run(tmp_path, f"tfrecord:{tmp_path}/in/*/*.tfrec", *flags)
    assert {name: split.examples for name, split in dataset.splits.items()} == {"test": 2, "train": 3, "validation": 1}
    assert dataset.classes == tuple(map(str, range(37)))
    encoded = EncodedSplit(dataset, dataset.splits["train"])
    assert encoded.labels.tolist() == [3, 0, 36]
    assert [encoded.record(i).encoded for i in range(3)] == [image(i) for i in range(3)]
    assert encoded.record(1).filename == "train_pets37-0-3.tfrec#1"
    assert encoded.sizes.tolist() == [[7, 9]] * 3


def test_shards_with_names_texts_patterns_and_shares(tmp_path: pathlib.Path) -> None:
    for part in ("x", "y"):
        rows = [{"pic": image(i), "who": ("cat", "dog")[i % 2], "f": f"{part}{i}.jpg"} for i in range(20)]
        shard(tmp_path / f"in/{part}.tfrecord", rows)
    layout = "--features=image:pic,label:who,filename:f"
    dataset = run(tmp_path, f"tfrecord:{tmp_path}/in", layout, "--splits=train=*/x.*,test=*/y.*", out="a")
    assert dataset.classes == ("cat", "dog")
    assert contents(dataset, "test")[:3] == [("y0.jpg", 0), ("y1.jpg", 1), ("y2.jpg", 0)]
    dataset = run(tmp_path, f"tfrecord:{tmp_path}/in", layout, "--splits=train:0.5,test:0.5", out="b")
    train, test = (dict(contents(dataset, split)) for split in ("train", "test"))
    assert len(train) + len(test) == 40
    # x and y hold the same images, and no image is in both splits.
    assert not {name[1:] for name in train} & {name[1:] for name in test}
    line = refused(tmp_path, f"tfrecord:{tmp_path}/in")
    assert "f, pic, who" in line
    line = refused(tmp_path, f"tfrecord:{tmp_path}/in", layout, "--splits=train=*/z.*")
    assert "train=*/z.*" in line


def test_shards_of_a_prepared_data_set_can_be_prepared_again(tmp_path: pathlib.Path, data: str) -> None:
    dataset = run(tmp_path, f"tfrecord:{data}/*.tfrecord")
    original = Dataset.load(data)
    for name, split in original.splits.items():
        assert dataset.splits[name].crc32c == split.crc32c


def test_damaged_and_foreign_shards_are_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "in/train.tfrecord"
    shard(path, [{"image": image(i), "class": i} for i in range(3)])
    whole = path.read_bytes()
    for position, message in (
        (5, "damaged length"),
        (60, "record 0 at byte 0 is damaged"),
        (len(whole) - 9, "record 2 at byte"),
    ):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(bytes(damaged))
        assert message in refused(tmp_path, f"tfrecord:{path}")
    path.write_bytes(whole[:-3])
    assert "record 2 at byte" in refused(tmp_path, f"tfrecord:{path}")
    path.write_bytes(b"\x1f\x8b" + bytes(40))
    assert "compressed" in refused(tmp_path, f"tfrecord:{path}")
    shard(path, [{"image": image(0), "class": 0}, {"class": 1}])
    assert "record 1 at byte" in refused(tmp_path, f"tfrecord:{path}")
    assert "no such file" in refused(tmp_path, f"tfrecord:{tmp_path}/in/*.tfrec")
    assert "--features=label:x" in refused(tmp_path, f"tfrecord:{path}", "--features=label:x", code=2)


# -- images that cannot be used, or must be converted


def test_unusable_images_are_counted_or_left_out(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", *[f"train/a/{i}.jpg" for i in range(10)], "test/a/x.jpg")
    for number in (2, 3, 5, 7):
        (tmp_path / f"in/train/a/{number}.jpg").write_bytes(image(number)[:-40])
    line = refused(tmp_path, f"folder:{tmp_path}/in")
    assert "4 of 11 images cannot be used" in line
    assert "train/a/2.jpg" in line
    lines = (tmp_path / "out/.incomplete/unusable.txt").read_text().splitlines()
    assert [f"train/a/{n}.jpg" in text for n, text in zip((2, 3, 5, 7), lines, strict=True)] == [True] * 4
    process = here("prepare", f"--dataset=folder:{tmp_path}/in", f"--out={tmp_path}/out", "--skip_bad")
    assert "left out 4 of 11" in process.stderr
    dataset = Dataset.load(str(tmp_path / "out"))
    assert dataset.splits["train"].examples == 6
    assert dataset.source == {"left_out": 4, "labels": {"train": [6], "test": [1]}}
    assert not (tmp_path / "out/.incomplete").exists()
    (tmp_path / "in/test/a/x.jpg").write_bytes(b"no")
    line = refused(tmp_path / "y", f"folder:{tmp_path}/in", "--skip_bad")
    assert "split 'test' would be empty" in line


@pytest.mark.parametrize("progressive", [False, True])
def test_no_damaged_jpeg_passes_that_training_cannot_decode(progressive: bool) -> None:
    """Decoding at an eighth of the size rejects the same files as decoding in full."""
    whole = image(0, (120, 90), quality=90, progressive=progressive)
    rng = np.random.default_rng(0)
    tries = [whole] + [whole[: int(n)] for n in rng.integers(10, len(whole), 60)]
    for position in rng.integers(0, len(whole), 200):
        damaged_jpeg = bytearray(whole)
        damaged_jpeg[position] ^= int(rng.integers(1, 256))
        tries.append(bytes(damaged_jpeg))
    outcomes = set()
    for encoded in tries:
        try:
            shape = tuple(records.decode(tf.constant(encoded)).shape)
        except tf.errors.OpError:
            shape = ()
        try:
            record = images.validate_image(encoded, 0, "", "x").record
            passed = (*tuple(records.decode(tf.constant(record.encoded)).shape[:2]), 3)
        except images.UnusableImage:
            passed = ()
        if passed:
            assert shape[:2] == (record.height, record.width)
        outcomes.add((bool(shape), bool(passed)))
    assert (True, True) in outcomes
    assert (False, False) in outcomes
    assert (False, True) not in outcomes


def rotated() -> bytes:
    """A JPEG with an EXIF rotation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return image(0, (40, 24), exif=exif)


def test_exif_rotation_is_reported_and_applied_on_demand(tmp_path: pathlib.Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(rotated())
    (tmp_path / "in/b.jpg").write_bytes(image(1))
    process = here("prepare", f"--dataset=folder:{tmp_path}/in", f"--out={tmp_path}/keep")
    assert "1 images have an EXIF rotation, which is not applied" in process.stderr
    kept = Dataset.load(str(tmp_path / "keep"))
    first = EncodedSplit(kept, kept.splits["train"]).record(0)
    assert (first.encoded, first.height, first.width) == (rotated(), 24, 40)
    dataset = run(tmp_path, f"folder:{tmp_path}/in", "--exif=upright", out="up")
    split = EncodedSplit(dataset, dataset.splits["train"])
    assert (split.record(0).height, split.record(0).width) == (40, 24)
    upright = records.decode(tf.constant(split.record(0).encoded)).numpy()
    stored = np.asarray(Image.open(io.BytesIO(rotated())))
    assert np.array_equal(upright, np.rot90(stored, -1))
    assert split.record(1).encoded == image(1)


# -- writing


def test_bytes_do_not_depend_on_workers(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 3000)
    put(
        tmp_path / "in", *[f"{split}/{name}/{i}.jpg" for split in ("train", "test") for name in "ab" for i in range(20)]
    )
    for workers in (1, 2, 7):
        run(tmp_path, f"folder:{tmp_path}/in", f"--workers={workers}", out=str(workers))
    dataset = Dataset.load(str(tmp_path / "1"))
    assert len(dataset.splits["train"].shards) > 3
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "7")


def test_an_interrupted_run_resumes_with_what_is_missing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a shard was damaged meanwhile."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 1500)
    put(tmp_path / "in", *[f"train/a/{i:02}.jpg" for i in range(30)])
    names = [shard.file for shard in run(tmp_path, f"folder:{tmp_path}/in", out="whole").splits["train"].shards]
    assert len(names) > 6
    out = tmp_path / "out"
    (out / names[4] / "in the way").mkdir(parents=True)
    assert "cannot write a shard" in refused(tmp_path, f"folder:{tmp_path}/in", "--workers=1")
    assert sorted(tree(out)) == names[:4]
    shutil.rmtree(out / names[4])
    damaged = out / names[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    before = {name: (out / name).stat().st_mtime_ns for name in names[:4]}
    run(tmp_path, f"folder:{tmp_path}/in", "--workers=1")
    assert [(out / name).stat().st_mtime_ns == before[name] for name in names[:4]] == [True, False, True, True]
    assert tree(out) == tree(tmp_path / "whole")


def test_the_shard_of_a_changed_image_is_written_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 1500)
    put(tmp_path / "in", *[f"train/a/{i:02}.jpg" for i in range(20)])
    (tmp_path / "in/train/a/19.jpg").write_bytes(b"bad")
    refused(tmp_path, f"folder:{tmp_path}/in")
    for number in (0, 19):
        (tmp_path / f"in/train/a/{number:02}.jpg").write_bytes(image(99))
    dataset = run(tmp_path, f"folder:{tmp_path}/in")
    split = EncodedSplit(dataset, dataset.splits["train"])
    assert [split.record(i).encoded == image(99) for i in range(20)] == [True] + [False] * 18 + [True]


def test_another_unfinished_data_set_is_not_mixed_with(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", "train/a/1.jpg")
    put(tmp_path / "other", "train/a/1.jpg", first=5)
    (tmp_path / "in/train/a/2.jpg").write_bytes(b"bad")
    refused(tmp_path, f"folder:{tmp_path}/in")
    line = refused(tmp_path, f"folder:{tmp_path}/other")
    assert "holds another data set that is unfinished" in line
    assert f"folder:{tmp_path}/in" in line
    dataset = run(tmp_path, f"folder:{tmp_path}/other", "--overwrite")
    assert EncodedSplit(dataset, dataset.splits["train"]).record(0).encoded == image(5)


def test_overwriting_leaves_no_old_shard(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "in", *[f"train/a/{i}.jpg" for i in range(9)])
    with monkeypatch.context() as patch:
        patch.setattr(writer, "SHARD_BYTES", 1000)
        run(tmp_path, f"folder:{tmp_path}/in")
    assert len(list((tmp_path / "out").iterdir())) > 3
    run(tmp_path, f"folder:{tmp_path}/in", "--overwrite")
    assert sorted(tree(tmp_path / "out")) == ["dataset.json", "train-00000-of-00001.tfrecord"]


def test_few_images_are_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Whatever the size of the data set, a writer holds a bounded number of images."""
    alive, peak, lock = 0, 0, threading.Lock()

    class CountedRecord(ImageRecord):
        def __del__(self) -> None:
            nonlocal alive
            with lock:
                alive -= 1

    def validate_image(encoded: bytes, label: int, name: str, *_: object) -> images.ValidatedImage:
        nonlocal alive, peak
        with lock:
            alive += 1
            peak = max(peak, alive)
        return images.ValidatedImage(CountedRecord(encoded, 7, 9, label, name))

    monkeypatch.setattr(images, "validate_image", validate_image)
    put(tmp_path / "in", *[f"train/a/{i}.jpg" for i in range(600)])
    run(tmp_path, f"folder:{tmp_path}/in", "--workers=2")
    assert 0 < peak <= writer.SAMPLE_IMAGES + writer.IMAGES_AHEAD + 8


def test_flags_of_other_kinds_are_refused(tmp_path: pathlib.Path) -> None:
    for kind, flag in (("folder:x", "--columns=path:0"), ("csv:x", "--features=tfds"), ("folder:x", "--label=y")):
        assert flag.split("=")[0] in refused(tmp_path, kind, flag, code=2)
    assert "--dataset=zip:x" in refused(tmp_path, "zip:x", code=2)
    assert "number of species" in refused(tmp_path, "synthetic", "--classes=names.txt", code=2)
    assert "--workers=-1" in refused(tmp_path, "synthetic", "--workers=-1", code=2)
    assert "--seed=-1" in refused(tmp_path, "folder:x", "--seed=-1", code=2)


def test_dataset_json_says_what_it_was_made_from(tmp_path: pathlib.Path) -> None:
    shard(tmp_path / "in/train.tfrecord", [{"image": image(0), "class": 0}])
    run(tmp_path, f"tfrecord:{tmp_path}/in")
    index = json.loads((tmp_path / "out/dataset.json").read_text())
    assert index["source"]["features"] == {"image": "image", "label": "class"}
