"""TFRecords that people have already: of the authors' notebooks, of tensorflow-datasets, of any layout of image and label.

Files are read once to index them, which checks every CRC and gives labels and hashes, and once to copy their pictures.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fnmatch
import functools
import hashlib
import itertools
import os
import posixpath
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.core.errors import ConfigError, DataError
from trainer.data.tfrecord import masked_crc
from trainer.ingest import images
from trainer.ingest.images import ValidatedImage
from trainer.ingest.sources import (
    SPLITS,
    Load,
    Progress,
    Source,
    SourceOptions,
    SourceSplit,
    by_share,
    class_numbers,
    digest,
    names_in,
    parse_pairs,
)
from trainer.io import destination, files

LAYOUTS = {
    "funmatch": {"image": "image/encoded", "label": "label", "filename": "image/filename"},
    # Of the notebooks of github.com/sayakpaul/FunMatch-Distillation.
    "notebook": {"image": "image", "label": "class"},
    # Of tensorflow-datasets' own files.
    "tfds": {"image": "image", "label": "label", "filename": "file_name"},
}


@dataclasses.dataclass
class _Index:
    """Where the records of one file are: position and length of each payload, labels, digests if they are wanted."""

    path: str
    offsets: np.ndarray
    lengths: np.ndarray
    labels: list[int | str]
    digests: list[bytes]


def source(pattern: str, layout: str, wanted: SourceOptions, progress: Progress) -> Source:
    """TFRecord files that are there already. Every record is checked against its CRCs.

    Splits are told from the names of files and their folders (train-00000-of-00004, val/x.tfrec), unless --splits gives
    patterns or shares. Labels are numbers, or class names as text.

    Args:
        pattern: of paths, with * and ?; or a folder.
        layout: of `LAYOUTS`, or image:KEY,label:KEY,filename:KEY; empty: found from the first record.
        wanted: the rest.
        progress: called with what, done, total.

    Raises:
        ConfigError: a layout that is none.
        DataError: no files, a damaged record, or one of another layout; file, record and offset are named.
    """
    flag = f"--dataset=tfrecord:{pattern}"
    paths = _glob(flag, pattern)
    keys = _layout(flag, layout, paths[0])
    own: dict[str, list[str]] = {}
    for path in paths:
        own.setdefault(_split_of(path) if not (wanted.splits or wanted.shares) else "", []).append(path)
    if "" in own and len(own) > 1:
        raise DataError(
            f"{flag}: {own[''][0]} does not say its split by its name, and others do: give patterns, as "
            "--splits=train=*train*,test=*test*"
        )
    if wanted.splits:
        own = {ours: [p for p in paths if fnmatch.fnmatch(p, where)] for ours, where in wanted.splits.items()}
        if empty := [f"{ours}={where}" for ours, where in wanted.splits.items() if not own[ours]]:
            raise DataError(f"{flag}: no file's path matches --splits={empty[0]}; the first is {paths[0]}")
    used = sorted({path for members in own.values() for path in members})
    indices: dict[str, _Index] = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        reading = functools.partial(_index, keys=keys, seed=wanted.seed if wanted.shares else None)
        for done, index in enumerate(pool.map(reading, used), 1):
            indices[index.path] = index
            progress("index", done, len(used))
    classes, number = _record_classes(flag, paths, layout, indices, wanted)

    def part(split: str, members: list[tuple[_Index, np.ndarray]]) -> SourceSplit:
        ends = np.cumsum([len(chosen) for _, chosen in members])

        def ranges(start: int, stop: int) -> Iterator[tuple[_Index, np.ndarray]]:
            for (index, chosen), end in zip(members, ends, strict=True):
                first = end - len(chosen)
                if max(start, first) < min(stop, end):
                    yield index, chosen[max(start - first, 0) : stop - first]

        def loads(start: int, stop: int) -> Iterator[Load]:
            for index, chosen in ranges(start, stop):
                for position, payload in _payloads(index, chosen):
                    label = number(index.labels[position]) if wanted.labelled else -1
                    yield functools.partial(_record, payload, keys, label, index, position, wanted.upright)

        def key(start: int, stop: int) -> str:
            return "\n".join(
                f"{index.path}\t{destination.mark(index.path)}\t{len(index.offsets)}\t{hashlib.sha256(chosen.tobytes()).hexdigest()}"
                f"\t{keys}\t{classes if index.labels and isinstance(index.labels[0], str) else ''}"
                for index, chosen in ranges(start, stop)
            )

        return SourceSplit(split, int(ends[-1]) if len(ends) else 0, loads, key)

    if wanted.shares:
        sizes = [len(indices[path].offsets) for path in used]
        labels = [number(label) for path in used for label in indices[path].labels]
        hashes = [found for path in used for found in indices[path].digests]
        starts = np.cumsum([0, *sizes])
        parts = []
        for split, dealt in by_share(sum(sizes), wanted.shares, wanted.seed, labels, hashes).items():
            chosen = np.asarray(dealt, np.int64)
            cut = [chosen[(chosen >= a) & (chosen < b)] - a for a, b in itertools.pairwise(starts)]
            parts.append(part(split, [(indices[path], c) for path, c in zip(used, cut, strict=True) if len(c)]))
    else:
        parts = [
            part(split or "train", [(indices[path], np.arange(len(indices[path].offsets))) for path in members])
            for split, members in own.items()
        ]
    return Source(f"tfrecord {posixpath.basename(pattern.rstrip('/*'))}", classes, tuple(parts), {"features": keys})


def _glob(flag: str, pattern: str) -> list[str]:
    try:
        if tf.io.gfile.isdir(pattern):
            pattern = files.join(pattern, "*.tfrec*")
        paths = sorted(path for path in tf.io.gfile.glob(pattern) if not tf.io.gfile.isdir(path))
    except tf.errors.OpError as error:
        raise DataError(f"{flag}: {files.reason(error)}") from error
    if not paths:
        raise DataError(f"{flag}: there is no such file")
    return paths


def _split_of(path: str) -> str:
    """The split that a file's name, or its folder's, tells; "" if none."""
    folder, name = posixpath.split(path)
    for text in (name, posixpath.basename(folder)):
        words = [word for word in re.split(r"[^a-z]+", text.lower()) if word in SPLITS]
        if words:
            return {"training": "train", "val": "validation", "valid": "validation", "testing": "test"}.get(
                words[0], words[0]
            )
    return ""


def _layout(flag: str, layout: str, path: str) -> dict[str, str]:
    if layout in LAYOUTS:
        return LAYOUTS[layout]
    if layout:
        keys = parse_pairs("features", layout, ("image", "label", "filename"))
        if "image" not in keys:
            raise ConfigError(
                f"--features={layout}: it must say image:KEY, and may say label:KEY and filename:KEY, or be one of "
                f"{', '.join(LAYOUTS)}"
            )
        return keys
    payload = next((payload for _, _, payload in _scan(path)), None)
    if payload is None:
        raise DataError(f"{flag}: {path} has no records")
    there = sorted(_example(payload, path).features.feature)
    for keys in LAYOUTS.values():
        if keys["image"] in there and keys["label"] in there:
            return keys
    raise DataError(
        f"{flag}: the first record has the features {', '.join(there) or 'none'}: say which ones to take, as "
        "--features=image:KEY,label:KEY"
    )


def _scan(path: str) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset of the payload, and payload of each record, one at a time in memory."""
    number, offset = 0, 0
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            while head := file.read(12):
                where = f"{path}: record {number} at byte {offset}"
                if head[:2] == b"\x1f\x8b":
                    raise DataError(f"{path} is compressed: decompress it first (gunzip)")
                if len(head) < 12 or struct.unpack_from("<I", head, 8)[0] != masked_crc(head[:8]):
                    raise DataError(f"{where} has a damaged length; is this a TFRecord file?")
                length = struct.unpack_from("<Q", head)[0]
                payload = file.read(length + 4)
                if len(payload) < length + 4:
                    raise DataError(f"{where} is cut off")
                if struct.unpack_from("<I", payload, length)[0] != masked_crc(memoryview(payload)[:length]):
                    raise DataError(f"{where} is damaged (its CRC32C does not match)")
                yield number, offset + 12, payload[:length]
                number, offset = number + 1, offset + 16 + length
    except tf.errors.OpError as error:
        raise DataError(f"cannot read {path}: {files.reason(error)}") from error


def _example(payload: bytes, where: str) -> Any:
    try:
        return tf.train.Example.FromString(payload)
    except Exception as error:  # protobuf's DecodeError differs between its implementations
        raise DataError(f"{where}: not a tf.train.Example") from error


def _index(path: str, keys: dict[str, str], seed: int | None) -> _Index:
    offsets, lengths, digests = [], [], []
    labels: list[int | str] = []
    for number, offset, payload in _scan(path):
        where = f"{path}: record {number} at byte {offset - 12}"
        feature = _example(payload, where).features.feature
        image: Any = feature[keys["image"]].bytes_list.value if keys["image"] in feature else ()
        if len(image) != 1:
            raise DataError(
                f"{where} has no image at {keys['image']!r}; it has {', '.join(sorted(feature)) or 'nothing'}"
            )
        offsets.append(offset)
        lengths.append(len(payload))
        labels.append(_label(feature, keys, where))
        if seed is not None:
            digests.append(digest(image[0], seed))
    return _Index(path, np.asarray(offsets, np.int64), np.asarray(lengths, np.int64), labels, digests)


def _label(feature: Any, keys: dict[str, str], where: str) -> int | str:
    if "label" not in keys or keys["label"] not in feature:
        return -1
    found = feature[keys["label"]]
    if len(found.int64_list.value) == 1:
        return int(found.int64_list.value[0])
    if len(found.bytes_list.value) == 1:
        return str(found.bytes_list.value[0].decode(errors="replace"))
    raise DataError(f"{where}: the label at {keys['label']!r} is neither one whole number nor one text")


def _record_classes(
    flag: str, paths: list[str], layout: str, indices: dict[str, _Index], wanted: SourceOptions
) -> tuple[tuple[str, ...], Callable[[int | str], int]]:
    """Class names, and what makes a label a number."""
    found = {label for index in indices.values() for label in index.labels}
    texts = {label for label in found if isinstance(label, str)}
    if not wanted.labelled or found <= {-1}:
        return (), lambda _: -1
    if texts:
        if len(texts) < len(found - {-1}):
            raise DataError(f"{flag} has labels that are numbers and labels that are text")
        classes, numbers = class_numbers(flag, texts, wanted)
        return classes, lambda label: numbers[str(label)] if label != -1 else -1
    beside = files.join(posixpath.dirname(paths[0]), "label.labels.txt")  # as tensorflow-datasets writes it
    classes = wanted.classes
    if not classes and layout in ("", "tfds") and files.exists(beside):
        classes = names_in(beside)
    top = max(int(label) for label in found)
    if classes and top >= len(classes):
        raise DataError(
            f"{flag} has label {top}, and there are {len(classes)} class names, from 0 to {len(classes) - 1}"
        )
    return classes or tuple(map(str, range(top + 1))), lambda label: max(int(label), -1)


def _payloads(index: _Index, chosen: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Position and bytes of the chosen records, read in order."""
    try:
        with tf.io.gfile.GFile(index.path, "rb") as file:
            at = -1
            for position in chosen:
                offset, length = int(index.offsets[position]), int(index.lengths[position])
                if offset != at:
                    file.seek(offset)
                # Past the CRC of this record and the head of the next, where the next payload starts.
                yield int(position), file.read(length + 16)[:length]
                at = offset + length + 16
    except tf.errors.OpError as error:
        raise DataError(f"cannot read {index.path}: {files.reason(error)}") from error


def _record(
    payload: bytes, keys: dict[str, str], label: int, index: _Index, position: int, upright: bool
) -> ValidatedImage:
    where = f"{index.path}: record {position} at byte {int(index.offsets[position]) - 12}"
    feature = _example(payload, where).features.feature
    names = feature[keys["filename"]].bytes_list.value if "filename" in keys and keys["filename"] in feature else ()
    name = names[0].decode(errors="replace") if names else f"{posixpath.basename(index.path)}#{position}"
    return images.validate_image(feature[keys["image"]].bytes_list.value[0], label, name, where, upright)
