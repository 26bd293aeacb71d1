"""Data sets of tensorflow-datasets: original bytes, the paper's splits, errors. No network."""

from __future__ import annotations

import io
import pathlib
import re
import socket
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from conftest import here
from PIL import Image

from trainer.data import records
from trainer.data.dataset import Dataset
from trainer.data.records import EncodedSplit
from trainer.ingest import tfds_source, verify, writer

# tensorflow-datasets names the data set after the class: local_flowers.
COUNTS = {"train": 25, "validation": 6, "test": 11}

# mock_data replaces the file system of the whole process while it opens a data set. Two threads
# that do so at once may leave the replacement in place.
IN_ONE_THREAD = ("--workers=1",)


def image(split: str, number: int) -> bytes:
    rng = np.random.default_rng([len(split), number])
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 11, 3), np.uint8)).save(buffer, "JPEG", quality=77)
    return buffer.getvalue()


class LocalFlowers(tfds.core.GeneratorBasedBuilder):
    """A data set with a second image feature (a mask), a second label and a box."""

    VERSION = tfds.core.Version("1.2.3")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "mask": tfds.features.Image(shape=(None, None, 1)),
            "label": tfds.features.ClassLabel(names=["daisy", "rose", "tulip"]),
            "colour": tfds.features.ClassLabel(num_classes=2),
            "file_name": tfds.features.Text(),
            "box": tfds.features.BBoxFeature(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, object]:  # noqa: ARG002
        return {split: self._generate_examples(split, count) for split, count in COUNTS.items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, object]]]:
        for number in range(count):
            yield (
                number,
                {
                    "image": io.BytesIO(image(split, number)),
                    "mask": np.zeros((8, 11, 1), np.uint8),
                    "label": number % 3,
                    "colour": number % 2,
                    "file_name": f"{split}-{number}.jpg",
                    "box": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
                },
            )


class LocalTwins(LocalFlowers):
    """The same without a supervised pair, so that image and label are ambiguous."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=super()._info().features)


class LocalWords(tfds.core.GeneratorBasedBuilder):
    """No images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, object]:  # noqa: ARG002
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, object]]]:
        yield 0, {"text": "word"}


class LocalDeep(tfds.core.GeneratorBasedBuilder):
    """Images of 16 bits and of floats, labels of which some are missing, a name in parts (NFD)."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "deep": tfds.features.Image(shape=(8, 11, 1), dtype=np.uint16, encoding_format="png"),
            "height": tfds.features.Image(shape=(8, 11, 1), dtype=np.float32),
            "label": tfds.features.ClassLabel(names=["cafe\u0301", "tea"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, object]:  # noqa: ARG002
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, object]]]:
        for number, label in enumerate((1, -1)):
            deep = np.full((8, 11, 1), 32768 + number, np.uint16)
            yield number, {"deep": deep, "height": np.ones((8, 11, 1), np.float32), "label": label}


class LocalFar(LocalFlowers):
    """A data set whose download fails."""

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, object]:  # noqa: ARG002
        raise ConnectionError("the cable is out")


class LocalGuarded(LocalFlowers):
    """A data set that must be downloaded manually."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    Register at example.org and put flowers.tar
    into the folder.
    """

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, object]:
        assert dl_manager.manual_dir
        return super()._split_generators(dl_manager)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where tensorflow-datasets keeps the data sets of this module."""
    return str(tmp_path_factory.mktemp("tfds"))


def run(tmp_path: pathlib.Path, name: str, data_dir: str, *flags: str, out: str = "out") -> Dataset:
    process = here("prepare", f"--dataset=tfds:{name}", f"--data_dir={data_dir}", f"--out={tmp_path / out}", *flags)
    assert process.returncode == 0, process.stderr
    return Dataset.load(str(tmp_path / out))


def refused(tmp_path: pathlib.Path, name: str, data_dir: str, *flags: str, code: int = 3) -> str:
    process = here("prepare", f"--dataset=tfds:{name}", f"--data_dir={data_dir}", f"--out={tmp_path / 'out'}", *flags)
    assert process.returncode == code, process.stderr
    assert not (tmp_path / "out/dataset.json").exists()
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def contents(dataset: Dataset, split: str) -> dict[str, tuple[bytes, int]]:
    encoded = EncodedSplit(dataset, dataset.splits[split])
    images = [encoded.record(i) for i in range(len(encoded))]
    return {image.filename: (image.encoded, image.label) for image in images}


def test_a_local_builder_keeps_bytes_labels_and_names(
    tmp_path: pathlib.Path, data_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 4000)
    for workers in (1, 3):
        dataset = run(tmp_path, "local_flowers", data_dir, f"--workers={workers}", out=str(workers))
    assert dataset.classes == ("daisy", "rose", "tulip")
    assert {name: split.examples for name, split in dataset.splits.items()} == COUNTS
    assert len(dataset.splits["train"].shards) > 1
    for split, count in COUNTS.items():
        expected = {f"{split}-{i}.jpg": (image(split, i), i % 3) for i in range(count)}
        assert contents(dataset, split) == expected
    assert dataset.image_size == {"max_height": 8, "max_width": 11, "median_height": 8, "median_width": 11}
    assert dataset.source["tensorflow_datasets"] == "local_flowers/1.2.3"
    one, three = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "13")
    assert one == three


def test_images_of_more_than_8_bits_and_missing_labels(tmp_path: pathlib.Path, data_dir: str) -> None:
    dataset = run(tmp_path, "local_deep", data_dir, "--image=deep")
    assert dataset.classes == ("caf\u00e9", "tea")
    split = EncodedSplit(dataset, dataset.splits["train"])
    assert sorted(split.labels.tolist()) == [-1, 1]
    assert (records.decode(tf.constant(split.record(0).encoded)).numpy() == 128).all()
    assert dataset.source["became_png"] == 2
    # A float image is stored as a PNG whose four bytes per pixel are the bits of a float.
    line = refused(tmp_path / "x", "local_deep", data_dir, "--image=height")
    assert "its images (height) are stored as float32" in line


def test_split_expressions(tmp_path: pathlib.Path, data_dir: str) -> None:
    whole = list(contents(run(tmp_path, "local_flowers", data_dir, out="whole"), "train").items())
    splits = "--splits=train=train[:80%],validation=train[80%:],test=test+validation[:2]"
    dataset = run(tmp_path, "local_flowers:1.2.3", data_dir, splits)
    assert list(contents(dataset, "train").items()) == whole[:20]
    assert list(contents(dataset, "validation").items()) == whole[20:]
    assert len(contents(dataset, "test")) == 13
    line = refused(tmp_path / "x", "local_flowers", data_dir, "--splits=train=trian", code=2)
    assert "--splits=train=trian" in line
    assert "validation (6)" in line
    line = refused(tmp_path / "x", "local_flowers", data_dir, "--splits=train:0.9", code=2)
    assert "train[:90%]" in line


def test_several_images_and_labels(tmp_path: pathlib.Path, data_dir: str) -> None:
    line = refused(tmp_path, "local_twins", data_dir, code=2)
    assert "--image=image, mask" in line
    line = refused(tmp_path, "local_twins", data_dir, "--image=image", code=2)
    assert "--label=label, colour" in line
    dataset = run(tmp_path, "local_twins", data_dir, "--image=image", "--label=colour")
    assert dataset.classes == ("0", "1")
    assert contents(dataset, "test")["test-3.jpg"] == (image("test", 3), 1)
    dataset = run(tmp_path, "local_flowers", data_dir, "--unlabelled", out="bare")
    assert dataset.classes == ()
    assert contents(dataset, "test")["test-3.jpg"] == (image("test", 3), -1)
    assert "--label=box" in refused(tmp_path / "x", "local_flowers", data_dir, "--label=box", code=2)
    line = refused(tmp_path / "x", "local_words", data_dir)
    assert "is not a data set of images" in line
    assert "text" in line


def lay_out(data_dir: pathlib.Path, name: str, counts: dict[str, int]) -> pathlib.Path:
    """Writes a data set with its real name, features and version, as tensorflow-datasets does."""
    builder = tfds.builder(name, data_dir=str(data_dir))
    folder, features = pathlib.Path(builder.data_dir), builder.info.features
    folder.mkdir(parents=True)
    infos = []
    for split, count in counts.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, split=split, filetype_suffix="tfrecord"
        )
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[count], num_bytes=1, filename_template=template))
        path = template.sharded_filepath(shard_index=0, num_shards=1)
        with tf.io.TFRecordWriter(str(path)) as writer:
            for number in range(count):
                row = {
                    "image": io.BytesIO(image(split, number)),
                    "label": number,
                    "file_name": f"{split}-{number}.jpg",
                    "species": number % 2,
                    "segmentation_mask": np.zeros((8, 11, 1), np.uint8),
                    "head_bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
                }
                row = {key: row[key] for key in features if key in row}
                writer.write(features.serialize_example(features.encode_example(row)))
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=infos, check_data=False)
    return folder


@pytest.mark.parametrize(
    ("name", "counts", "expected"),
    [
        ("oxford_flowers102", {"train": 4, "validation": 3, "test": 5}, {"train": 4, "validation": 3, "test": 5}),
        ("oxford_iiit_pet", {"train": 20, "test": 5}, {"train": 18, "validation": 2, "test": 5}),
        ("food101", {"train": 30, "validation": 7}, {"train": 27, "validation": 3, "test": 7}),
        ("sun397", {"train": 4, "validation": 3, "test": 5}, {"train": 4, "validation": 3, "test": 5}),
        ("imagenet2012", {"train": 100, "validation": 6}, {"train": 98, "validation": 2, "test": 6}),
    ],
)
def test_the_splits_of_the_paper(
    tmp_path: pathlib.Path, name: str, counts: dict[str, int], expected: dict[str, int]
) -> None:
    """Table 5, on files laid out as by tensorflow-datasets, with its builder of each data set."""
    lay_out(tmp_path / "tfds", name, counts)
    dataset = run(tmp_path, name, str(tmp_path / "tfds"))
    assert {split: part.examples for split, part in dataset.splits.items()} == expected
    assert len(dataset.classes) == {"oxford_flowers102": 102, "oxford_iiit_pet": 37, "food101": 101}.get(
        name, 397 if name == "sun397" else 1000
    )
    test = "validation" if "test" not in counts else "test"
    images = list(contents(dataset, "test").values())
    assert images == [(image(test, i), i) for i in range(counts[test])]
    if "validation" not in counts or test == "validation":
        last = list(contents(dataset, "validation").values())
        assert last == [(image("train", i), i) for i in range(expected["train"], counts["train"])]


def test_mock_data(tmp_path: pathlib.Path) -> None:
    """The mock of tensorflow-datasets, for a data set of which only the metadata is there."""
    folder = lay_out(tmp_path / "tfds", "oxford_flowers102", {"train": 7, "validation": 3, "test": 5})
    for path in folder.glob("*.tfrecord*"):
        path.unlink()
    with tfds.testing.mock_data(num_examples=7, data_dir=str(tmp_path / "tfds")):
        dataset = run(tmp_path, "oxford_flowers102", str(tmp_path / "tfds"), *IN_ONE_THREAD)
    assert {split: part.examples for split, part in dataset.splits.items()} == {"train": 7, "validation": 3, "test": 5}
    assert dataset.classes[0] == "pink primrose"
    assert "15 images in 3 splits" in verify.verify(str(tmp_path / "out"), lambda *_: None)


def test_incomplete_files_are_detected(tmp_path: pathlib.Path) -> None:
    folder = lay_out(tmp_path / "tfds", "oxford_flowers102", {"train": 7, "validation": 3, "test": 5})
    for path in folder.glob("*.tfrecord*"):
        path.unlink()
    with tfds.testing.mock_data(num_examples=4, data_dir=str(tmp_path / "tfds")):
        line = refused(tmp_path, "oxford_flowers102", str(tmp_path / "tfds"), *IN_ONE_THREAD)
    assert re.search(r"gave 4 images of oxford_flowers102/[\d.]+ (train\[0:7\]|test\[0:5\])", line)


def test_unavailable_data_sets(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = str(tmp_path / "tfds")
    assert "did you mean oxford_flowers102?" in refused(tmp_path, "oxford_flower102", where)
    assert "9.9.9" in refused(tmp_path, "local_flowers:9.9.9", where)
    line = refused(tmp_path, "local_far", where)
    assert "the cable is out" in line
    assert "--data_dir" in line
    line = refused(tmp_path, "local_guarded", where)
    assert f"Put its files into {where}/downloads/manual" in line
    assert "Register at example.org and put flowers.tar into the folder." in line
    (tmp_path / "tfds/downloads/manual").mkdir(parents=True)
    (tmp_path / "tfds/downloads/manual/flowers.tar").write_text("")
    assert run(tmp_path, "local_guarded", where).splits["train"].examples == 25

    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    line = refused(tmp_path / "x", "food101", str(tmp_path / "other"))
    assert "Name or service not known" in line
    assert "--data_dir" in line


def test_without_the_library(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert "pip install 'funmatch[datasets]'" in refused(tmp_path, "food101", str(tmp_path), code=2)


def test_a_data_set_that_needs_a_package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'cv2'", name="cv2")

    monkeypatch.setattr(LocalFlowers, "download_and_prepare", missing)
    assert "opencv-python-headless" in refused(tmp_path, "local_flowers", str(tmp_path / "none"))


def test_tensorflow_datasets_has_every_data_set_of_the_paper() -> None:
    assert set(tfds_source.PAPER_SPLITS) <= set(tfds.list_builders())
