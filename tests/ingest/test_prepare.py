"""Preparing data: any kind of image, the same bytes each time, complete or absent."""

from __future__ import annotations

import io
import json
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from conftest import silent
from PIL import Image

from trainer.core.errors import ConfigError, DataError
from trainer.data import records
from trainer.data.dataset import Dataset, Split
from trainer.data.records import EncodedSplit
from trainer.ingest import verify
from trainer.ingest.folder_source import folder_source
from trainer.ingest.sources import SourceOptions
from trainer.ingest.synthetic_source import write_synthetic_dataset
from trainer.ingest.writer import SHARD_BYTES, write_dataset


def write_flowers(out: pathlib.Path, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> Dataset:
    splits = {"train": 7, "test": 4}
    return write_synthetic_dataset(str(out), seed, 3, 24, splits, silent, shard_bytes=shard_bytes)


def write_folder(path: pathlib.Path, out: str | pathlib.Path) -> Dataset:
    """Prepares the image files in `path`."""
    plan = {"dataset": f"folder:{path}"}
    return write_dataset(lambda: folder_source(str(path), SourceOptions(), silent), str(out), silent, plan=plan)


def test_synthetic_counts_and_names(tmp_path: pathlib.Path) -> None:
    write_flowers(tmp_path)
    dataset = Dataset.load(str(tmp_path))
    assert {name: split.examples for name, split in dataset.splits.items()} == {"train": 7, "test": 4}
    assert len(dataset.classes) == 3
    assert EncodedSplit(dataset, dataset.splits["train"]).labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert dataset.image_size["max_height"] <= 24


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: pathlib.Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_flowers(tmp_path / name, seed)
    read = {n: [p.read_bytes() for p in sorted((tmp_path / n).glob("*.tfrecord"))] for n in "abc"}
    assert read["a"] == read["b"] != read["c"]


def test_many_shards_hold_all_images_in_order(tmp_path: pathlib.Path) -> None:
    datasets = write_flowers(tmp_path / "one"), write_flowers(tmp_path / "many", shard_bytes=2000)
    assert [len(dataset.splits["train"].shards) > 2 for dataset in datasets] == [False, True]
    one, many = (EncodedSplit(dataset, dataset.splits["train"]) for dataset in datasets)
    assert [one.record(i) for i in range(7)] == [many.record(i) for i in range(7)]


def test_numbers_out_of_range() -> None:
    with pytest.raises(ConfigError, match="--classes=1"):
        write_synthetic_dataset("x", 0, 1, 24, {"train": 1}, silent)
    with pytest.raises(ConfigError, match="--train=-1"):
        write_synthetic_dataset("x", 0, 2, 24, {"train": -1}, silent)
    with pytest.raises(ConfigError, match="every split is empty"):
        write_synthetic_dataset("x", 0, 2, 24, {"train": 0}, silent)


def test_an_existing_data_set_is_kept_without_overwrite(tmp_path: pathlib.Path) -> None:
    write_flowers(tmp_path)
    with pytest.raises(DataError, match="--overwrite"):
        write_flowers(tmp_path, 1)
    write_synthetic_dataset(str(tmp_path), 1, 2, 24, {"train": 2}, silent, overwrite=True)
    assert list(Dataset.load(str(tmp_path)).splits) == ["train"]


def test_there_is_no_data_set_until_it_is_complete(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DataError("disk full")

    monkeypatch.setattr(records, "write_shard", fail)
    with pytest.raises(DataError, match="disk full"):
        write_flowers(tmp_path)
    with pytest.raises(DataError, match="no data set"):
        Dataset.load(str(tmp_path))


def write(path: pathlib.Path, image: Image.Image, kind: str, **options: object) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def noise(mode: str, size: tuple[int, int] = (17, 11)) -> Image.Image:
    bands = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], bands), np.uint8)
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels, mode)


def test_a_folder_may_hold_every_kind_of_image(tmp_path: pathlib.Path) -> None:
    """Every mode, depth and format becomes a decodable record."""
    root = tmp_path / "in/train"
    grey16 = Image.fromarray(np.linspace(0, 65535, 17 * 11).astype(np.uint16).reshape(11, 17))
    frames = [noise("RGB").convert("P"), noise("L").convert("P")]
    kept = {
        "a/grey.jpg": write(root / "a/grey.jpg", noise("L"), "JPEG"),
        "a/rgb.JPG": write(root / "a/rgb.JPG", noise("RGB"), "JPEG"),
        "a/cmyk.jpeg": write(root / "a/cmyk.jpeg", noise("CMYK"), "JPEG"),
        "b/grey.png": write(root / "b/grey.png", noise("L"), "PNG"),
        "b/rgb.png": write(root / "b/rgb.png", noise("RGB"), "PNG"),
        "b/rgb.bmp": write(root / "b/rgb.bmp", noise("RGB"), "BMP"),
        "b/palette.png": write(root / "b/palette.png", noise("RGB").convert("P"), "PNG"),
    }
    write(root / "b/rgba.png", noise("RGBA"), "PNG")
    write(root / "b/grey_alpha.png", noise("LA"), "PNG")
    write(root / "b/deep.png", grey16, "PNG")
    write(root / "b/moving.gif", frames[0], "GIF", save_all=True, append_images=frames[1:])
    write(root / "b/web.webp", noise("RGB"), "WEBP")
    write(root / "b/scan.tiff", noise("RGB"), "TIFF")
    write(root / "b/one.png", noise("RGB", (1, 1)), "PNG")
    (root / "b/notes.txt").write_text("no image")
    dataset = write_folder(tmp_path / "in", tmp_path / "out")
    assert dataset.classes == ("a", "b")
    split = EncodedSplit(dataset, dataset.splits["train"])
    by_name = {split.record(i).filename: split.record(i) for i in range(len(split))}
    assert len(by_name) == 14
    for name, encoded in kept.items():
        assert by_name[f"train/{name}"].encoded == encoded, f"{name} did not keep its bytes"
    for name, record in by_name.items():
        image = records.decode(tf.constant(record.encoded)).numpy()
        assert image.shape == (record.height, record.width, 3), name
        assert record.label == (0 if "/a/" in name else 1)
    rgba = np.asarray(noise("RGBA"), np.float64)
    white = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
    on_white = records.decode(tf.constant(by_name["train/b/rgba.png"].encoded)).numpy()
    assert np.abs(on_white - white).max() <= 1
    deep = records.decode(tf.constant(by_name["train/b/deep.png"].encoded)).numpy()
    assert np.abs(deep[..., 0].ravel() - np.linspace(0, 255, 17 * 11)).max() <= 1
    assert "16 images" not in verify.verify(str(tmp_path / "out"), silent)


def test_classes_are_the_union_over_splits(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "in/train/b/1.png", noise("RGB"), "PNG")
    write(tmp_path / "in/test/a/1.png", noise("RGB"), "PNG")
    dataset = write_folder(tmp_path / "in", tmp_path / "out")
    assert dataset.classes == ("a", "b")
    assert EncodedSplit(dataset, dataset.splits["train"]).labels.tolist() == [1]


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_unreadable_image_is_named(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "in/train/a").mkdir(parents=True)
    (tmp_path / "in/train/a/broken.png").write_bytes(content)
    with pytest.raises(
        DataError, match=r"1 of 1 images cannot be used: .*train/a/broken\.png: the image cannot be read"
    ):
        write_folder(tmp_path / "in", tmp_path / "out")


def test_truncated_jpeg_is_named(tmp_path: pathlib.Path) -> None:
    whole = write(tmp_path / "in/train/a/half.jpg", noise("RGB", (64, 64)), "JPEG")
    (tmp_path / "in/train/a/half.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"half\.jpg"):
        write_folder(tmp_path / "in", tmp_path / "out")


def test_empty_and_missing_folders(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        write_folder(tmp_path / "nowhere", "x")
    with pytest.raises(DataError, match=r"train/daisy/1\.jpg"):
        write_folder(tmp_path, "x")


def test_verify_finds_damage(tmp_path: pathlib.Path) -> None:
    write_flowers(tmp_path)
    assert "11 images in 2 splits" in verify.verify(str(tmp_path), silent)
    path = tmp_path / "train-00000-of-00001.tfrecord"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=rf"{path}: record \d at byte \d+"):
        verify.verify(str(tmp_path), silent)


def test_verify_decodes(tmp_path: pathlib.Path) -> None:
    broken = bytearray(tf.io.encode_png(np.zeros((4, 4, 3), np.uint8)).numpy())
    broken[45] ^= 0xFF  # after the header, which is checked first
    shard = records.write_shard(str(tmp_path), "t", [records.ImageRecord(bytes(broken), 4, 4, 0, "n.jpg")])
    Dataset(str(tmp_path), "t", ("a",), {"train": Split("train", (shard,))}, {}).save()
    with pytest.raises(DataError, match=r"record 0 .*n\.jpg.*cannot be decoded"):
        verify.verify(str(tmp_path), silent)
    assert json.loads((tmp_path / "dataset.json").read_text())["classes"] == ["a"]
