"""Which files of a folder are images, and what else is there.

A file with a usual suffix of images counts as one without being read, since a bucket may hold
millions; whether it can be decoded shows later. A file with an unknown suffix, or none, is an image
if its first bytes say so.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import os
import re
import stat
from collections.abc import Iterable, Iterator

from trainer.core.errors import DataError
from trainer.core.wording import plural
from trainer.data import image_header
from trainer.ingest.sources import Progress, run_in_order
from trainer.io import destination, files
from trainer.io.text import is_utf8

Parts = tuple[str, ...]  # of a path relative to the folder

# fmt: off
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff",
    ".jpe", ".jfif", ".pjpeg", ".pjp", ".apng", ".dib", ".ppm", ".pgm", ".pbm", ".pnm",
    ".avif", ".heic", ".heif", ".hif", ".jxl", ".jp2",
)
# Never images that training could use: not read, only counted.
_OTHER_SUFFIXES = frozenset({
    ".txt", ".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf",
    ".log", ".lock", ".html", ".htm", ".css", ".js", ".py", ".pyc", ".ipynb", ".sh", ".bat", ".r", ".m", ".c", ".h", ".cpp",
    ".java", ".db", ".sqlite", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".npy", ".npz", ".mat", ".h5",
    ".hdf5", ".pkl", ".pickle", ".pt", ".pth", ".keras", ".ckpt", ".onnx", ".pb", ".tflite", ".tfrecord", ".tfrec",
    ".parquet", ".arrow", ".feather", ".lmdb", ".mdb", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".ods", ".ppt", ".pptx",
    ".svg", ".psd", ".ai", ".eps", ".xcf", ".ico", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".3gp",
    ".mp3", ".wav", ".m4a", ".flac", ".aae", ".thm", ".xmp", ".exe", ".dll", ".so", ".lnk", ".url", ".webloc", ".tmp",
    ".part", ".crdownload", ".download", ".bak", ".swp", ".sha256", ".md5",
    # Raw files of cameras: they begin as TIFF does, and decode to a thumbnail.
    ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".raf", ".rw2",
})
# fmt: on
# What operating systems and network storage put beside files, in lower case.
_SYSTEM = frozenset(
    {
        "@eadir",
        "@tmp",
        "@recycle",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "__macosx",
        "__pycache__",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
    }
)
_HEADS_AHEAD = 256  # files whose first bytes are read at a time
_NAMED = 3  # examples of each kind of what is left out


@dataclasses.dataclass
class LeftOut:
    """What is not an image, by kind: a suffix, "without suffix", hidden, system, unreadable,
    special, or a link to a folder that holds it.

    Attributes:
        counts: number of files, or of folders with all that is in them.
        examples: the first few, for kinds other than suffixes.
    """

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Counts a file or folder."""
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < _NAMED and example not in examples:
            examples.append(example)

    def line(self) -> str:
        """Describes it in one line; empty if there is nothing."""
        if not self.counts:
            return ""
        kinds = []
        for kind, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            named = "" if kind.startswith(".") else f" ({', '.join(printable(name) for name in self.examples[kind])})"
            kinds.append(f"{count:,} {kind}{named}")
        total = self.counts.total()
        return f"left out {plural(total, 'entry that is no image', 'entries that are no images')}: {', '.join(kinds)}"


@dataclasses.dataclass
class Listing:
    """What a folder holds.

    Attributes:
        images: path of each image, and a text that changes when the file does; sorted.
        folders: paths of the folders below it, as far as they are known.
        left_out: the other files.
    """

    images: list[tuple[Parts, str]]
    folders: set[Parts]
    left_out: LeftOut

    def empty_folders(self) -> list[Parts]:
        """Folders without images anywhere below them, without those within one of them."""
        filled = {parts[:depth] for parts, _ in self.images for depth in range(len(parts))}
        return sorted(folder for folder in self.folders if folder not in filled and folder[:-1] in filled)


def list_images(folder: str, progress: Progress) -> Listing:
    """Finds the images in a folder and all folders below it.

    Hidden and system files and folders are left out with all that is in them. Links are followed,
    but not to a folder that holds them.

    Args:
        folder: local or gs://.
        progress: called with what is being done, how many are done, and how many in all.

    Raises:
        DataError: it cannot be listed, or the name of an image is not UTF-8.
    """
    left_out, folders = LeftOut(), set[Parts]()
    entries = _remote(folder, left_out, folders) if files.is_remote(folder) else _local(folder, left_out, folders)
    found: list[tuple[Parts, str]] = []
    unknown: list[tuple[Parts, str]] = []
    for parts, mark in entries:
        suffix = _suffix(parts[-1])
        if suffix in IMAGE_SUFFIXES:
            found.append((parts, mark))
        elif suffix in _OTHER_SUFFIXES:
            left_out.add(suffix, "/".join(parts))
        else:
            unknown.append((parts, mark))
    with concurrent.futures.ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        jobs = (functools.partial(_format, files.join(folder, *parts)) for parts, _ in unknown)
        for number, (entry, result) in enumerate(zip(unknown, run_in_order(pool, jobs, _HEADS_AHEAD), strict=True), 1):
            image_format = result()
            if image_format:
                found.append(entry)
            else:
                name = "/".join(entry[0])
                left_out.add("unreadable" if image_format is None else _suffix(entry[0][-1]) or "without suffix", name)
            progress("look at files of unknown kind", number, len(unknown))
    if broken := ["/".join(parts) for parts, _ in found if not is_utf8(os.fsencode("/".join(parts)))]:
        raise DataError(
            f"{folder} has images with names that are not UTF-8, so classes could be mistaken: {printable(broken[0])}"
            f"{f' and {len(broken) - 1:,} more' if len(broken) > 1 else ''}; rename them (convmv does it for whole folders)"
        )
    return Listing(sorted(found), folders, left_out)


def printable(name: str) -> str:
    """Returns a name with bytes that are not UTF-8, and control characters, escaped."""
    escaped = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\x{ord(match.group()):02x}", escaped)


def _suffix(name: str) -> str:
    """Returns a suffix in lower case; "" if what follows the last dot does not look like one."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if re.fullmatch(r"\.[a-z0-9_+-]{1,12}", suffix) else ""


def _kind(name: str) -> str:
    """Returns "hidden" or "system" for names that are not the user's data, else ""."""
    if name.lower() in _SYSTEM:
        return "system"
    return "hidden" if name.startswith(".") else ""


def _format(path: str) -> str | None:
    """Returns the format of an image, "" for another file, or None for a local one out of reach.

    Raises:
        DataError: a bucket does not give it, which may pass: what is an image must not depend on
            that.
    """
    if files.is_remote(path):
        return image_header.sniff(files.read(path, "a file", image_header.SNIFF_BYTES))
    try:
        with open(path, "rb") as file:  # TensorFlow refuses names that are not UTF-8
            return image_header.sniff(file.read(image_header.SNIFF_BYTES))
    except OSError:
        return None


def _remote(folder: str, left_out: LeftOut, folders: set[Parts]) -> Iterable[tuple[Parts, str]]:
    """Lists a bucket; adds to `left_out` and `folders`."""
    pruned: set[Parts] = set()
    for name, version in destination.BucketDestination(folder, "--dataset", reading=True).names().items():
        parts = tuple(name.split("/"))
        special = next((depth for depth, part in enumerate(parts, 1) if _kind(part)), 0)
        if special:
            if parts[:special] not in pruned:
                pruned.add(parts[:special])
                left_out.add(_kind(parts[special - 1]), parts[special - 1])
            continue
        folders.update(parts[:depth] for depth in range(1, len(parts)))
        yield parts, version


def _local(folder: str, left_out: LeftOut, folders: set[Parts]) -> Iterator[tuple[Parts, str]]:
    """Lists a local folder; adds to `left_out` and `folders`.

    Raises:
        DataError: it, or a folder below it, cannot be listed.
    """
    status = os.stat(folder)
    waiting: list[tuple[Parts, frozenset[tuple[int, int]]]] = [((), frozenset({(status.st_dev, status.st_ino)}))]
    while waiting:
        below, ancestors = waiting.pop()
        where = os.path.join(folder, *below)
        try:
            entries = sorted(os.scandir(where), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"cannot list {printable(where)}: {files.reason(error)}; make it readable, or move it away"
            ) from error
        for entry in entries:
            parts = (*below, entry.name)
            if kind := _kind(entry.name):
                left_out.add(kind, entry.name)
                continue
            try:
                status = os.stat(entry.path)
            except OSError:  # a link to nothing or to itself, or no permission
                if _suffix(entry.name) in IMAGE_SUFFIXES:
                    yield parts, ""  # reported as an image that cannot be read
                else:
                    left_out.add("unreadable", "/".join(parts))
                continue
            identity = (status.st_dev, status.st_ino)
            if stat.S_ISREG(status.st_mode):
                yield parts, f"{status.st_size}:{status.st_mtime_ns}"
            elif not stat.S_ISDIR(status.st_mode):
                left_out.add("special", "/".join(parts))  # reading a pipe would wait forever
            elif identity in ancestors:
                left_out.add("link to a folder that holds it", "/".join(parts))
            else:
                folders.add(parts)
                waiting.append((parts, ancestors | {identity}))
