"""Archives: what is good comes out whole; what is hostile or damaged is refused, and nothing of it
stays or goes astray.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pathlib
import random
import stat
import tarfile
import types
import zipfile
from collections.abc import Callable

import pytest
from samples import entry, make_archive

from trainer.core.errors import DataError
from trainer.io import archives

GOOD = {
    "T-r101x3-128/saved_model.pb": b"graph" * 300,
    "T-r101x3-128/variables/variables.index": b"",
    "T-r101x3-128/variables/variables.data-00000-of-00001": random.Random(0).randbytes((1 << 20) + 17),
    "leer ä.txt": b"x" * 512,  # a whole block of tar
}
KINDS = ["zip", "stored", "tar", "tar.gz", "tar.bz2", "tar.xz"]


def tree(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(path: pathlib.Path, words: str, limits: archives.Limits | None = None) -> str:
    """Extracting fails with these words, leaves nothing, and touches nothing around it."""
    root = path.parent
    before = set(root.rglob("*"))
    with pytest.raises(DataError, match=words) as told:
        archives.extract(str(path), str(root / "deep" / "er" / "out"), "the archive", limits)
    assert set(root.rglob("*")) - before <= {root / "deep", root / "deep" / "er"}
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_went_in_comes_out(tmp_path: pathlib.Path, kind: str) -> None:
    """Whatever the file is called; readable by its owner alone."""
    path = make_archive(tmp_path / "download", GOOD, kind)
    found = archives.extract(str(path), str(tmp_path / "out"), "the archive")
    assert found == sorted(GOOD)
    assert tree(tmp_path / "out") == GOOD
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


def test_folders_and_dots_are_fine(tmp_path: pathlib.Path) -> None:
    """As `tar czf x.tgz .` and zips with entries for folders have them."""
    with tarfile.open(tmp_path / "t", "w:gz") as archive:
        archive.addfile(entry("./", kind=tarfile.DIRTYPE))
        archive.addfile(entry("./a/", kind=tarfile.DIRTYPE))
        archive.addfile(entry("./a/b", 1), io.BytesIO(b"1"))
    assert archives.extract(str(tmp_path / "t"), str(tmp_path / "one"), "t") == ["a/b"]
    with zipfile.ZipFile(tmp_path / "z", "w") as zipped:
        zipped.mkdir("a")
        zipped.writestr("a//b", b"1")
    assert archives.extract(str(tmp_path / "z"), str(tmp_path / "two"), "z") == ["a/b"]


ASTRAY = [
    ("../out", "leads out"),
    ("a/../../out", "leads out"),
    ("a/..", "leads out"),
    ("/tmp/out", "absolute"),
    ("//host/out", "absolute"),
    ("..\\out", "a Windows path"),
    ("a\\b", "a Windows path"),
    ("C:out", "a Windows path"),
    ("c:/out", "a Windows path"),
    ("a\nb", "control characters"),
    ("\x1b[2Jb", "control characters"),
    ("n" * 256, "too long"),
    ("a/" * 70 + "b", "too long"),
]


@pytest.mark.parametrize(("name", "words"), ASTRAY)
@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_paths_that_leave_the_folder(tmp_path: pathlib.Path, name: str, words: str, kind: str) -> None:
    told = refused(make_archive(tmp_path / "x", {"good": b"1", name: b"evil"}, kind), words)
    assert "\x1b" not in told


def test_a_null_byte_hides_no_path(tmp_path: pathlib.Path) -> None:
    """zipfile reads "good\\0/../../out" as "good"."""
    path = make_archive(tmp_path / "x", {"goodN/../../out": b"evil"}, "stored")
    path.write_bytes(path.read_bytes().replace(b"goodN/", b"good\0/"))
    refused(path, "control characters")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
@pytest.mark.parametrize("name", ["x", "x/"])
def test_what_is_neither_file_nor_folder_in_a_zip(tmp_path: pathlib.Path, mode: int, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        made = zipfile.ZipInfo(name)
        made.create_system, made.external_attr = 3, (mode | 0o777) << 16
        archive.writestr(made, "/etc/passwd")
    refused(tmp_path / "x.zip", "neither a file nor a folder")


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.CONTTYPE,
        b"Z",
    ],
)
def test_what_is_neither_file_nor_folder_in_a_tar(tmp_path: pathlib.Path, kind: bytes) -> None:
    """A link is refused even within the folder, and nothing is written through one."""
    (tmp_path / "outside").mkdir()
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(entry("x", 0, kind, "../../../outside"))
        archive.addfile(entry("x/file", 4), io.BytesIO(b"evil"))
    if kind in (tarfile.CONTTYPE, b"Z"):  # old or unknown kinds are files to every tar; then x is one and a folder too
        refused(tmp_path / "x.tar", "is in it twice|neither")
    else:
        refused(tmp_path / "x.tar", "neither a file nor a folder")
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize(
    "names", [("a", "a"), ("a", "./a"), ("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b"), ("a//b", "a/b")]
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_come_twice(tmp_path: pathlib.Path, names: tuple[str, str], kind: str) -> None:
    path = tmp_path / "x"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as zipped:
            for name in names:
                zipped.writestr(name, name)
    else:
        with tarfile.open(path, "w") as archive:
            for name in names:
                archive.addfile(entry(name, 1), io.BytesIO(b"1"))
    refused(path, "is in it twice")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_bombs_by_ratio(tmp_path: pathlib.Path, kind: str) -> None:
    path = make_archive(tmp_path / "x", {"zeros": bytes(32 << 20)}, kind)
    assert path.stat().st_size < 100_000
    refused(path, "out of proportion")
    # And what is in proportion passes: the limit is one of ratio and not of size.
    assert archives.extract(str(path), str(tmp_path / "out"), "x", archives.Limits(ratio=10**7)) == ["zeros"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_bombs_by_size_and_number(tmp_path: pathlib.Path, kind: str) -> None:
    path = make_archive(tmp_path / "x", {str(n): b"12345" for n in range(10)}, kind)
    refused(path, "more than 49 bytes", archives.Limits(total=49))
    refused(path, "more than 9 entries", archives.Limits(files=9))
    assert len(archives.extract(str(path), str(tmp_path / "out"), "x", archives.Limits(total=50, files=10))) == 10


def test_a_zip_whose_entries_share_their_bytes(tmp_path: pathlib.Path) -> None:
    """The densest bombs have one kernel of zeros and many names for it."""
    path = make_archive(tmp_path / "x", {"0": bytes(2 << 20)}, "zip")
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(1, 40):
            again = archive.getinfo("0")
            copy = zipfile.ZipInfo(str(number))
            for name in ("CRC", "compress_size", "file_size", "header_offset", "compress_type"):
                setattr(copy, name, getattr(again, name))
            archive.filelist.append(copy)
        archive._didModify = True
    refused(path, "out of proportion")


def test_a_size_in_a_header_is_not_believed(tmp_path: pathlib.Path) -> None:
    path = make_archive(tmp_path / "x", {"zeros": bytes(40 << 20)}, "zip")
    data = bytearray(path.read_bytes())
    true, lie = (40 << 20).to_bytes(4, "little"), (1000).to_bytes(4, "little")
    assert data.count(true) == 2
    path.write_bytes(bytes(data.replace(true, lie)))
    refused(path, "damaged|of its header")


def test_a_header_of_tar_as_large_as_memory(tmp_path: pathlib.Path) -> None:
    """tarfile reads a long name whole before anybody can look at it."""
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        with gzip.open(tmp_path / "x.tgz", "wb") as file:
            file.write(entry("././@LongLink", 8 << 20, kind).tobuf(tarfile.GNU_FORMAT))
            file.write(bytes(8 << 20))
        refused(tmp_path / "x.tgz", "header of several million")


def test_a_file_with_holes_is_refused(tmp_path: pathlib.Path) -> None:
    """GNU's sparse files claim terabytes in no bytes."""
    header = bytearray(entry("x", 0, tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % (1 << 30)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + bytes(1024))
    refused(tmp_path / "x.tar", "a sparse file")


def test_an_endless_tail_is_not_read(tmp_path: pathlib.Path) -> None:
    """A good tar and gigabytes of zeros behind it, in a small file."""
    inside = io.BytesIO()
    with tarfile.open(fileobj=inside, mode="w") as archive:
        archive.addfile(entry("a", 1), io.BytesIO(b"1"))
    with gzip.open(tmp_path / "x", "wb", compresslevel=1) as file:
        file.write(inside.getvalue())
        for _ in range(100):
            file.write(bytes(1 << 20))
    refused(tmp_path / "x", "out of proportion")


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [cut, flipped])
def test_damaged_archives(tmp_path: pathlib.Path, kind: str, damage: Callable[[bytes], bytes]) -> None:
    path = make_archive(tmp_path / "x", GOOD, kind)
    path.write_bytes(damage(path.read_bytes()))
    if kind == "tar" and damage is flipped:  # tar has no checksum of its content
        archives.extract(str(path), str(tmp_path / "out"), "x")
        assert tree(tmp_path / "out").keys() == GOOD.keys()
        return
    refused(path, "damaged|cannot be unpacked")


def test_a_tar_cut_between_two_files(tmp_path: pathlib.Path) -> None:
    """Which Python's tarfile takes for a whole one."""
    path = make_archive(tmp_path / "x", {"a": b"1", "b": b"2"}, "tar")
    path.write_bytes(path.read_bytes()[:1024])
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["a"]
    refused(path, "stops before its end")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_wrong_checksum_behind_the_last_file(tmp_path: pathlib.Path, compress: Callable[[bytes], bytes]) -> None:
    """The checksum comes after what a reader of tar looks at."""
    path = make_archive(tmp_path / "x", {"a": b"1" * 5000}, "tar")
    data = bytearray(compress(path.read_bytes()))
    data[-6 if compress is gzip.compress else -12] ^= 0xFF
    path.write_bytes(bytes(data))
    refused(path, "damaged|cannot be unpacked")


@pytest.mark.parametrize(
    "data", [b"", b"no archive" * 100, b"PK\x03\x04", b"\x1f\x8b", bytes(2000), b"BZh", b"\x7fELF"]
)
def test_what_is_no_archive(tmp_path: pathlib.Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    refused(tmp_path / "x", "damaged|neither a zip nor a tar|cannot be unpacked")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_empty_archive(tmp_path: pathlib.Path, kind: str) -> None:
    refused(make_archive(tmp_path / "x", {}, kind), "no file|neither a zip nor a tar")


def test_a_locked_zip(tmp_path: pathlib.Path) -> None:
    path = make_archive(tmp_path / "x", {"a": b"1"}, "stored")
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(data))
    refused(path, "encrypted")


def test_no_room_is_said_before_anything_is_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_archive(tmp_path / "x", {"a": b"12345"}, "zip")
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=4))
    refused(path, "the disk has 4 left")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar"])
def test_any_flipped_byte_is_refused_or_harmless(tmp_path: pathlib.Path, kind: str) -> None:
    """240 of them: never anything but one line, and never a file beside the folder."""
    content = {"folder/one": b"1" * 40, "two": b"2" * 700}
    good = make_archive(tmp_path / "good", content, kind).read_bytes()
    rng = random.Random(0)
    outcomes = {"refused": 0, "same": 0, "other": 0}
    for trial in range(80):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        folder = tmp_path / str(trial)
        folder.mkdir()
        (folder / "x").write_bytes(bytes(data))
        told = ""
        try:
            archives.extract(str(folder / "x"), str(folder / "out"), "x")
        except DataError as error:
            told = str(error)
        assert "\n" not in told
        assert (folder / "out").exists() == (not told)
        outcomes["refused" if told else "same" if tree(folder / "out") == content else "other"] += 1
        assert {p.name for p in folder.iterdir()} <= {"x", "out"}
    assert outcomes["refused"] >= 5, outcomes
    if kind == "tar.gz":
        assert outcomes["other"] == 0, outcomes


def test_a_folder_that_is_there_is_not_touched(tmp_path: pathlib.Path) -> None:
    path = make_archive(tmp_path / "x", {"a": b"1"}, "zip")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(FileExistsError):
        archives.extract(str(path), str(tmp_path / "out"), "x")
    assert tree(tmp_path / "out") == {"mine": b"mine"}
