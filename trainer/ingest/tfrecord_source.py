"""Existing TFRecord files as a source, in any layout of image and label.

Files are read once to index them, which checks every CRC and collects labels and hashes, and once
to copy their images.
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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.core.errors import ConfigError, DataError
from trainer.data.tfrecord import FOOTER, HEADER, location, masked_crc
from trainer.ingest import images
from trainer.ingest.images import ValidatedImage
from trainer.ingest.labels import number_classes, read_class_names, tally
from trainer.ingest.sources import (
    SPLIT_NAMES,
    Loader,
    Progress,
    Source,
    SourceOptions,
    SourceSplit,
    content_hash,
    parse_pairs,
    split_by_share,
)
from trainer.io import destination, files

LAYOUTS = {
    "funmatch": {"image": "image/encoded", "label": "label", "filename": "image/filename"},
    # The notebooks of github.com/sayakpaul/FunMatch-Distillation.
    "notebook": {"image": "image", "label": "class"},
    # Files of tensorflow-datasets.
    "tfds": {"image": "image", "label": "label", "filename": "file_name"},
}
_GZIP = b"\x1f\x8b"  # first bytes of a compressed file
_TFDS_CLASS_NAMES = "label.labels.txt"  # written by tensorflow-datasets beside its files
_NO_LABEL = -1


@dataclasses.dataclass
class _Index:
    """The records of one file.

    Attributes:
        path: of the file.
        offsets: int64 [records], byte offset of each payload.
        lengths: int64 [records], bytes of each payload.
        labels: class number or name of each record; -1: none.
        hashes: `content_hash` of each image; empty if not requested.
    """

    path: str
    offsets: np.ndarray
    lengths: np.ndarray
    labels: list[int | str]
    hashes: list[bytes]

    def location(self, number: int) -> str:
        """Describes a record for messages: file, record number, byte offset."""
        return location(self.path, number, int(self.offsets[number]) - HEADER.size)


def tfrecord_source(pattern: str, layout: str, options: SourceOptions, progress: Progress) -> Source:
    """Existing TFRecord files. Every record is checked against its CRCs.

    Splits come from the names of files or their folders (train-00000-of-00004, val/x.tfrec),
    unless --splits gives patterns or shares. Labels are class numbers, or class names as text.

    Args:
        pattern: of paths, with * and ?; or a folder.
        layout: a key of `LAYOUTS`, or image:KEY,label:KEY,filename:KEY; empty: found from the
            first record.
        options: flags common to all sources; `splits` are patterns of paths.
        progress: called with what is being done, how many are done, and how many in all.

    Raises:
        ConfigError: a malformed layout.
        DataError: no files, or a damaged record or one of another layout; the message has file,
            record and offset.
    """
    flag = f"--dataset=tfrecord:{pattern}"
    paths = _glob(flag, pattern)
    keys = _layout(flag, layout, paths[0])
    paths_of = _paths_by_split(flag, paths, options)
    used = sorted({path for members in paths_of.values() for path in members})
    indices: dict[str, _Index] = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        read_index = functools.partial(_index, keys=keys, seed=options.seed if options.shares else None)
        for done, index in enumerate(pool.map(read_index, used), 1):
            indices[index.path] = index
            progress("index", done, len(used))
    classes, class_number = _record_classes(flag, paths, layout, indices, options)

    def source_split(name: str, members: list[tuple[_Index, np.ndarray]]) -> SourceSplit:
        """A split of some records, given by file and record numbers (int64 [n])."""
        ends = np.cumsum([len(numbers) for _, numbers in members])

        def ranges(start: int, stop: int) -> Iterator[tuple[_Index, np.ndarray]]:
            for (index, numbers), end in zip(members, ends, strict=True):
                first = end - len(numbers)
                if max(start, first) < min(stop, end):
                    yield index, numbers[max(start - first, 0) : stop - first]

        def loaders(start: int, stop: int) -> Iterator[Loader]:
            for index, numbers in ranges(start, stop):
                for number, payload in _read_payloads(index, numbers):
                    label = class_number(index.labels[number]) if options.labelled else _NO_LABEL
                    yield functools.partial(_load, payload, keys, label, index, number, options.upright)

        def key(start: int, stop: int) -> str:
            return "\n".join(
                f"{index.path}\t{destination.mark(index.path)}\t{len(index.offsets)}\t"
                f"{hashlib.sha256(numbers.tobytes()).hexdigest()}\t{keys}\t"
                f"{classes if index.labels and isinstance(index.labels[0], str) else ''}"
                for index, numbers in ranges(start, stop)
            )

        return SourceSplit(name, int(ends[-1]) if len(ends) else 0, loaders, key)

    if options.shares:
        sizes = [len(indices[path].offsets) for path in used]
        labels = [class_number(label) for path in used for label in indices[path].labels]
        hashes = [image_hash for path in used for image_hash in indices[path].hashes]
        starts = np.cumsum([0, *sizes])
        splits = []
        for name, assigned in split_by_share(options.shares, options.seed, labels, hashes).items():
            numbers = np.asarray(assigned, np.int64)
            by_file = [numbers[(numbers >= a) & (numbers < b)] - a for a, b in itertools.pairwise(starts)]
            members = [(indices[path], part) for path, part in zip(used, by_file, strict=True) if len(part)]
            splits.append(source_split(name, members))
    else:
        splits = [
            source_split(
                name or "train", [(indices[path], np.arange(len(indices[path].offsets))) for path in split_paths]
            )
            for name, split_paths in paths_of.items()
        ]
    name = f"tfrecord {posixpath.basename(pattern.rstrip('/*'))}"
    return Source(name, classes, tuple(splits), {"features": keys})


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


def _paths_by_split(flag: str, paths: list[str], options: SourceOptions) -> dict[str, list[str]]:
    """Returns the files of each split to write; "" stands for all if nothing names a split."""
    if options.splits:
        matches = {split: [p for p in paths if fnmatch.fnmatch(p, where)] for split, where in options.splits.items()}
        if unmatched := [f"{split}={where}" for split, where in options.splits.items() if not matches[split]]:
            raise DataError(f"{flag}: no file's path matches --splits={unmatched[0]}; the first is {paths[0]}")
        return matches
    if options.shares:
        return {"": paths}
    by_split: dict[str, list[str]] = {}
    for path in paths:
        by_split.setdefault(_split_of(path), []).append(path)
    if "" in by_split and len(by_split) > 1:
        raise DataError(
            f"{flag}: the name of {by_split[''][0]} does not say its split, and those of other files do: give patterns, "
            "as --splits=train=*train*,test=*test*"
        )
    return by_split


def _split_of(path: str) -> str:
    """Returns the split that a file's name, or its folder's name, says; "" if none."""
    folder, name = posixpath.split(path)
    for text in (name, posixpath.basename(folder)):
        words = [word for word in re.split(r"[^a-z]+", text.lower()) if word in SPLIT_NAMES]
        if words:
            return {"training": "train", "val": "validation", "valid": "validation", "testing": "test"}.get(
                words[0], words[0]
            )
    return ""


def _layout(flag: str, layout: str, path: str) -> dict[str, str]:
    """Returns the feature keys of image, label and filename; the last two may be missing."""
    if layout in LAYOUTS:
        return LAYOUTS[layout]
    if layout:
        keys = parse_pairs("features", layout, ("image", "label", "filename"))
        if "image" not in keys:
            raise ConfigError(
                f"--features={layout}: it must have image:KEY, and may have label:KEY and filename:KEY, or be one of "
                f"{', '.join(LAYOUTS)}"
            )
        return keys
    payload = next((payload for _, _, payload in _scan(path)), None)
    if payload is None:
        raise DataError(f"{flag}: {path} has no records")
    features = sorted(_parse_example(payload, path).features.feature)
    for keys in LAYOUTS.values():
        if keys["image"] in features and keys["label"] in features:
            return keys
    raise DataError(
        f"{flag}: the first record has the features {', '.join(features) or 'none'}: say which ones to take, as "
        "--features=image:KEY,label:KEY"
    )


def _scan(path: str) -> Iterator[tuple[int, int, bytes]]:
    """Yields number, payload offset and payload of each record.

    Holds one record in memory at a time.
    """
    number, offset = 0, 0
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            while header := file.read(HEADER.size):
                where = location(path, number, offset)
                if header.startswith(_GZIP):
                    raise DataError(f"{path} is compressed: decompress it first (gunzip)")
                if len(header) < HEADER.size or HEADER.unpack(header)[1] != masked_crc(header[:8]):
                    raise DataError(f"{where} has a damaged length; is this a TFRecord file?")
                length = HEADER.unpack(header)[0]
                payload = file.read(length + FOOTER.size)
                if len(payload) < length + FOOTER.size:
                    raise DataError(f"{where} is cut off")
                if FOOTER.unpack_from(payload, length)[0] != masked_crc(memoryview(payload)[:length]):
                    raise DataError(f"{where} is damaged (its CRC32C does not match)")
                yield number, offset + HEADER.size, payload[:length]
                number, offset = number + 1, offset + HEADER.size + length + FOOTER.size
    except tf.errors.OpError as error:
        raise DataError(f"cannot read {path}: {files.reason(error)}") from error


def _parse_example(payload: bytes, where: str) -> Any:
    try:
        return tf.train.Example.FromString(payload)
    except Exception as error:  # protobuf's DecodeError differs between its implementations
        raise DataError(f"{where}: not a tf.train.Example") from error


def _index(path: str, keys: dict[str, str], seed: int | None) -> _Index:
    """Reads and checks a whole file. Hashes its images if `seed` is given."""
    offsets, lengths, hashes = [], [], []
    labels: list[int | str] = []
    for number, offset, payload in _scan(path):
        where = location(path, number, offset - HEADER.size)
        feature = _parse_example(payload, where).features.feature
        image: Sequence[bytes] = feature[keys["image"]].bytes_list.value if keys["image"] in feature else ()
        if len(image) != 1:
            raise DataError(
                f"{where} has no image at {keys['image']!r}; it has {', '.join(sorted(feature)) or 'nothing'}"
            )
        offsets.append(offset)
        lengths.append(len(payload))
        labels.append(_label(feature, keys, where))
        if seed is not None:
            hashes.append(content_hash(image[0], seed))
    return _Index(path, np.asarray(offsets, np.int64), np.asarray(lengths, np.int64), labels, hashes)


def _label(feature: Any, keys: dict[str, str], where: str) -> int | str:
    if "label" not in keys or keys["label"] not in feature:
        return _NO_LABEL
    value = feature[keys["label"]]
    if len(value.int64_list.value) == 1:
        return int(value.int64_list.value[0])
    if len(value.bytes_list.value) == 1:
        return str(value.bytes_list.value[0].decode(errors="replace"))
    raise DataError(f"{where}: the label at {keys['label']!r} is neither one whole number nor one text")


def _record_classes(
    flag: str, paths: list[str], layout: str, indices: dict[str, _Index], options: SourceOptions
) -> tuple[tuple[str, ...], Callable[[int | str], int]]:
    """Returns class names, and a function from a record's label to its class number."""
    labels = {label for index in indices.values() for label in index.labels}
    texts = {label for label in labels if isinstance(label, str)}
    if not options.labelled or labels <= {_NO_LABEL}:
        return options.classes, lambda _: _NO_LABEL
    if texts:
        if len(texts) < len(labels - {_NO_LABEL}):
            raise DataError(f"{flag} has labels that are numbers and labels that are text")
        numbered = number_classes(flag, tally((text, "a record") for text in texts), options, numeric=True)
        return numbered.names, lambda label: numbered.number[str(label)] if label != _NO_LABEL else _NO_LABEL
    names_file = files.join(posixpath.dirname(paths[0]), _TFDS_CLASS_NAMES)
    classes = options.classes
    if not classes and layout in ("", "tfds") and files.exists(names_file):
        classes = read_class_names(names_file)
    largest = max(int(label) for label in labels)
    if classes and largest >= len(classes):
        raise DataError(
            f"{flag} has label {largest}, and there are {len(classes)} class names, from 0 to {len(classes) - 1}"
        )
    return classes or tuple(map(str, range(largest + 1))), lambda label: max(int(label), _NO_LABEL)


def _read_payloads(index: _Index, numbers: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Yields number and payload of the records `numbers` of a file, in that order."""
    gap = FOOTER.size + HEADER.size  # between one payload and the next
    try:
        with tf.io.gfile.GFile(index.path, "rb") as file:
            position = -1
            for number in numbers:
                offset, length = int(index.offsets[number]), int(index.lengths[number])
                if offset != position:
                    file.seek(offset)
                yield int(number), file.read(length + gap)[:length]
                position = offset + length + gap
    except tf.errors.OpError as error:
        raise DataError(f"cannot read {index.path}: {files.reason(error)}") from error


def _load(
    payload: bytes, keys: dict[str, str], label: int, index: _Index, number: int, upright: bool
) -> ValidatedImage:
    where = index.location(number)
    feature = _parse_example(payload, where).features.feature
    names = feature[keys["filename"]].bytes_list.value if "filename" in keys and keys["filename"] in feature else ()
    name = names[0].decode(errors="replace") if names else f"{posixpath.basename(index.path)}#{number}"
    return images.validate_image(feature[keys["image"]].bytes_list.value[0], label, name, where, upright)
