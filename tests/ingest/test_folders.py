"""Folders: what is an image, what is left out and reported, and what the folders mean."""

from __future__ import annotations

import os
import pathlib
import unicodedata

import pytest
from conftest import silent
from samples import Prepared, image, prepare, put

from trainer.core.errors import DataError
from trainer.data import image_header
from trainer.ingest.listing import list_images


def prepared(tmp_path: pathlib.Path, *flags: str) -> Prepared:
    number = len(list(tmp_path.glob("out*")))
    return prepare(f"folder:{tmp_path}/in", tmp_path / f"out{number}", *flags)


def test_an_image_is_known_by_its_content(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "in/daisy"
    root.mkdir(parents=True)
    names = ("a.jfif", "b.JPE", "c", "d.JPG", "e.unknown", "Screen 12.30")
    for number, name in enumerate(names):
        (root / name).write_bytes(image(number))
    (root / "png.jpg").write_bytes(image(7, kind="PNG"))
    (root / "f.gifv").write_bytes(image(8, kind="GIF"))
    (root / "LICENSE").write_text("text")
    (root / "g.dat").write_bytes(b"\0" * 40)
    done = prepared(tmp_path)
    assert set(done.labels()) == {f"daisy/{name}" for name in (*names, "png.jpg", "f.gifv")}
    assert "1 .dat, 1 without suffix (daisy/LICENSE)" in done.line("left out 2")


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (image(0), "JPEG"),
        (image(0, kind="PNG"), "PNG"),
        (image(0, kind="GIF"), "GIF"),
        (image(0, kind="BMP"), "BMP"),
        (image(0, kind="WEBP"), "WEBP"),
        (image(0, kind="TIFF"), "TIFF"),
        (image(0, kind="PPM"), "PNM"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif", "AVIF"),
        (b"\0\0\0\x18ftypavis\0\0\0\0", "AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmsf1\0\0\0\0", "HEIC"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", ""),
        (b"BMW, a car", ""),
        (b"BM", ""),
        (b"P3rl", ""),
        (b"RIFF\0\0\0\0WAVE", ""),
        (b"\xff\xfe\0", ""),
        (b"", ""),
    ],
)
def test_formats_by_first_bytes(head: bytes, expected: str) -> None:
    assert image_header.sniff(head[: image_header.SNIFF_BYTES]) == expected


def test_what_systems_leave_behind_is_no_class_and_is_reported(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "in"
    put(root, "daisy/1.jpg", "rose/2.jpg")
    clean = prepared(tmp_path)
    put(
        root,
        "daisy/._1.jpg",
        ".thumbnails/1.jpg",
        ".ipynb_checkpoints/1-checkpoint.jpg",
        "@eaDir/1.jpg",
        "__MACOSX/daisy/1.jpg",
        "#recycle/1.jpg",
        "$RECYCLE.BIN/1.jpg",
        "System Volume Information/1.jpg",
        "lost+found/1.jpg",
        "rose/Thumbs.db",
        "rose/desktop.ini",
        "rose/.DS_Store",
        "README.txt",
        "rose/notes.txt",
        "classes.csv",
    )
    done = prepared(tmp_path)
    assert done.labels() == {"daisy/1.jpg": 0, "rose/2.jpg": 1}
    assert clean.dataset is not None
    assert done.dataset is not None
    assert clean.dataset.splits == done.dataset.splits
    assert "not_images" not in clean.dataset.source
    assert done.dataset.source["not_images"] == {"hidden": 4, "system": 8, ".txt": 2, ".csv": 1}
    line = done.line("left out 15 entries")
    assert "8 system (#recycle, $RECYCLE.BIN, @eaDir)" in line
    assert "2 .txt" in line


def test_links_and_pipes(tmp_path: pathlib.Path) -> None:
    """A loop ends, a pipe is not waited for, and a link to another folder is followed."""
    root = tmp_path / "in"
    put(root, "train/a/1.jpg", "train/b/2.jpg")
    (root / "test").symlink_to("train")
    (root / "train/a/up").symlink_to("..")
    (root / "train/a/self").symlink_to("self")
    os.mkfifo(root / "train/a/pipe")
    os.mkfifo(root / "train/a/pipe.jpg")
    done = prepared(tmp_path)
    assert set(done.labels("test")) == {"test/a/1.jpg", "test/b/2.jpg"}
    line = done.line("warning: left out")
    assert "2 unreadable (train/a/self, test/a/self)" in line
    assert "4 special" in line
    assert "2 link to a folder that holds it" in line
    (root / "train/a/gone.jpg").symlink_to("nowhere")
    assert "gone.jpg" in prepared(tmp_path).line("error: 2 of 6 images cannot be used")


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "in", "a/1.jpg", "b/2.jpg")
    (tmp_path / "in/a").chmod(0)
    monkeypatch.chdir(tmp_path / "in")
    root = os.geteuid() == 0  # whom no permission stops
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(DataError, match=r"cannot list \./a: Permission denied"):
            list_images(".", silent)
    finally:
        if root:
            os.seteuid(0)
        (tmp_path / "in/a").chmod(0o755)


def test_names_are_compared_composed(tmp_path: pathlib.Path) -> None:
    for split, form in (("train", "NFD"), ("test", "NFC")):
        put(tmp_path / "in", f"{split}/{unicodedata.normalize(form, 'Löwenzahn')}/1.jpg", f"{split}/rose/2.jpg")
    done = prepared(tmp_path)
    assert done.dataset is not None
    assert done.dataset.classes == ("Löwenzahn", "rose")
    assert list(done.labels("test").values()) == list(done.labels("train").values()) == [0, 1]


def test_names_that_are_not_utf8(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", "a/1.jpg")
    (tmp_path / "in" / os.fsdecode(b"\xe4.txt")).touch()
    (tmp_path / "in" / os.fsdecode(b"a/\xe4")).touch()
    assert r"(a/\xe4)" in prepared(tmp_path).line("1 without suffix")
    put(tmp_path / "in", os.fsdecode(b"B\xe4r/1.jpg"))
    assert r"not UTF-8, so classes could be mistaken: B\xe4r/1.jpg;" in prepared(tmp_path).line("error")


def test_folders_without_images_are_reported(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", "train/a/1.jpg", "test/a/2.jpg")
    for name in ("train/tulip", "test/tulip", "train/a/masks"):
        (tmp_path / "in" / name).mkdir()
    done = prepared(tmp_path)
    assert done.dataset is not None
    assert done.dataset.classes == ("a",)
    assert "test/tulip, train/tulip, train/a/masks" in done.line("warning: 3 folders have no image", "a class needs")


def test_numbered_folders_have_their_natural_order(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", *(f"train/{number}/x.jpg" for number in range(1, 13)))
    done = prepared(tmp_path)
    assert done.labels()["train/12/x.jpg"] == 11
    assert "1, 2, 3" in done.line("--class_order=text")
    assert prepared(tmp_path, "--class_order=text").labels()["train/12/x.jpg"] == 3


def test_splits_and_classes_that_are_mixed_up(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", *(f"{name}/{number}.jpg" for name in ("train", "test", "daisy") for number in range(2)))
    line = prepared(tmp_path).line("error", "named as splits (test, train) beside others (daisy)")
    assert "as train/daisy/NAME" in line
    assert "--splits=test=test,train=train" in line
    chosen = prepared(tmp_path, "--splits=train=train,test=test")
    assert chosen.labels("test") == {"test/0.jpg": -1, "test/1.jpg": -1}
    shared = prepared(tmp_path, "--splits=train:1")
    assert set(shared.labels().values()) == {0, 1, 2}
    shared.line("warning: test, train are taken as classes")


def test_splits_that_differ_in_case_only(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", "Train/a/1.jpg", "train/a/2.jpg")
    prepared(tmp_path).line("error", "splits Train, train, which differ only in case")


def test_folders_of_folders_are_reported_as_splits(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", "animals/cat/1.jpg", "plants/rose/2.jpg")
    prepared(tmp_path).line("taken as splits", "animals, plants")


def test_a_stray_image_is_refused_and_counts_are_given(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", "a/1.jpg", "a/2.jpg", "logo.png")
    prepared(tmp_path).line("error", "logo.png and a/1.jpg (and 1 more so)")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.zip", "is an archive: unpack it"),
        ("x.tar.gz", "is an archive"),
        ("x.csv", "--dataset=csv:"),
        ("x.tfrecord", "--dataset=tfrecord:"),
        ("x.jpg", "give the folder that holds the images"),
        ("prepared", "prepared already: give it to the job, as --data="),
        ("empty", "has no images"),
    ],
)
def test_places_that_are_no_folder_of_images(tmp_path: pathlib.Path, name: str, message: str) -> None:
    for folder in ("prepared", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "prepared/dataset.json").write_text("{}")
    if "." in name:
        (tmp_path / name).touch()
    done = prepare(f"folder:{tmp_path / name}", tmp_path / "out")
    assert done.code == 3
    done.line("error: ", message)


def test_a_blank_name_is_no_class(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", "a/1.jpg", " /2.jpg")
    prepared(tmp_path).line("error", "the folder of  /2.jpg has a blank name")


def test_class_names_survive_without_labels(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", "a/1.jpg")
    (tmp_path / "names.txt").write_text("x\ny\n")
    done = prepared(tmp_path, "--unlabelled", f"--classes={tmp_path}/names.txt")
    assert done.dataset is not None
    assert done.dataset.classes == ("x", "y")
    assert done.labels() == {"a/1.jpg": -1}


@pytest.mark.parametrize("names", [("a/train/1.jpg", "b/test/2.jpg"), ("images/train/1.jpg", "images/val/2.jpg")])
def test_splits_below_other_folders_are_no_classes(tmp_path: pathlib.Path, names: tuple[str, ...]) -> None:
    put(tmp_path / "in", *names)
    done = prepared(tmp_path)
    assert done.code == 3
    done.line("error", "has splits within other folders", "put the folder of the split above, as train/")


def test_one_class_only_is_reported(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", "train/images/1.jpg", "valid/images/2.jpg")
    prepared(tmp_path).line("warning: the folders name one class only, 'images'")
