"""Existing TFRecord files as a source, in any layout of image and label.

Files are read once to index them, which checks every CRC and collects labels and hashes, and once
to copy their images.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import fnmatch
import functools
import hashlib
import itertools
import os
import posixpath
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.core.errors import ConfigError, DataError
from trainer.data import image_header
from trainer.data.tfrecord import FOOTER, HEADER, location, masked_crc
from trainer.ingest import images
from trainer.ingest.images import ValidatedImage
from trainer.ingest.labels import Classes, Found, clean, number_classes, read_class_names
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
    # The scripts of Inception and TF-Slim that convert ImageNet.
    "imagenet": {"image": "image/encoded", "label": "image/class/label", "filename": "image/filename"},
}
_TEXT_OF_LABEL = "image/class/text"  # of these scripts: the name of the label's class
_RECORDS_THAT_DECIDE = 1000  # of the first file, at most, whose features determine the layout
_GZIP = b"\x1f\x8b"  # first bytes of a compressed file
_SHARD = re.compile(r"(.*-)([0-9]{5})-of-([0-9]{5})([^/]*)", re.DOTALL)
_TFDS_CLASS_NAMES = "label.labels.txt"  # written by tensorflow-datasets beside its files
_NO_LABEL = -1


@dataclasses.dataclass
class _Index:
    """The records of one file.

    Attributes:
        path: of the file.
        offsets: int64 [records], byte offset of each payload.
        lengths: int64 [records], bytes of each payload.
        labels: class number or name of each record, as text; "": none.
        hashes: `content_hash` of each image; empty if not requested.
        features: all features that any record has.
        widths: lengths of labels that are one-hot.
    """

    path: str
    offsets: np.ndarray
    lengths: np.ndarray
    labels: list[str]
    hashes: list[bytes]
    features: frozenset[str]
    widths: frozenset[int]

    def location(self, number: int) -> str:
        """Describes a record for messages: file, record number, byte offset."""
        return location(self.path, number, int(self.offsets[number]) - HEADER.size)


def tfrecord_source(pattern: str, layout: str, options: SourceOptions, progress: Progress) -> Source:
    """Existing TFRecord files. Every record is checked against its CRCs.

    Splits come from the names of files or their folders (train-00000-of-00004, val/x.tfrec),
    unless --splits gives patterns or shares. Labels are class numbers, one-hot lists, or texts:
    names of classes, or numbers if all are. A record without a label is unlabelled.

    Args:
        pattern: of paths, with * and ?; or a folder.
        layout: a key of `LAYOUTS`, or image:KEY,label:KEY,filename:KEY; empty: found from the
            first records.
        options: flags common to all sources; `splits` are patterns of paths.
        progress: called with what is being done, how many are done, and how many in all.

    Raises:
        ConfigError: a malformed layout, or one with a feature that no record has.
        DataError: no files, labels of which no class can be made, or a damaged record or one of
            another layout; the message has file, record and offset.
    """
    flag = f"--dataset=tfrecord:{pattern}"
    paths = _glob(flag, pattern)
    keys = _layout(flag, layout, paths, options)
    paths_of = _paths_by_split(flag, paths, options)
    used = sorted({path for members in paths_of.values() for path in members})
    indices: dict[str, _Index] = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        read_index = functools.partial(_index, keys=keys, options=options)
        for done, index in enumerate(pool.map(read_index, used), 1):
            indices[index.path] = index
            progress("index", done, len(used))
    _require_features(flag, layout, keys, indices.values())
    classes = _record_classes(flag, layout, list(indices.values()), options)
    numbering = hashlib.sha256(repr((classes.names, sorted(classes.number.items()))).encode()).hexdigest()

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
                    label = classes.number[index.labels[number]]
                    yield functools.partial(_load, payload, keys, label, index, number, options)

        def key(start: int, stop: int) -> str:
            return "\n".join(
                f"{index.path}\t{destination.mark(index.path)}\t{len(index.offsets)}\t"
                f"{hashlib.sha256(numbers.tobytes()).hexdigest()}\t{keys}\t{numbering}"
                for index, numbers in ranges(start, stop)
            )

        return SourceSplit(name, int(ends[-1]) if len(ends) else 0, loaders, key)

    if options.shares:
        sizes = [len(indices[path].offsets) for path in used]
        labels = [classes.number[label] for path in used for label in indices[path].labels]
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
    notes = (*_record_notes(keys, list(indices.values()), options), *classes.notes)
    warnings = (*_missing_shards(used), *_without_labels(keys, list(indices.values()), options), *classes.warnings)
    return Source(name, classes.names, tuple(splits), {"features": keys}, notes=notes, warnings=warnings)


def _without_labels(keys: dict[str, str], indices: list[_Index], options: SourceOptions) -> list[str]:
    """Describes files without any label beside files with labels."""
    if not options.labelled or "label" not in keys:
        return []
    lacking = [index for index in indices if index.labels and not any(index.labels)]
    if not lacking or len(lacking) == sum(bool(index.labels) for index in indices):
        return []
    return [
        f"{len(lacking):,} of {len(indices):,} files have no label at {keys['label']!r} in any record (first: {lacking[0].path}, "
        f"with {', '.join(sorted(lacking[0].features))}): are its labels at another feature?"
    ]


def _missing_shards(paths: Collection[str]) -> list[str]:
    """Describes shards that the names of others (x-00003-of-00010) say there are."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        if match := _SHARD.fullmatch(path):
            found.setdefault((match[1], match[3], match[4]), set()).add(int(match[2]))
    lines = []
    for (start, count, end), numbers in found.items():
        if missing := sorted(set(range(int(count))) - numbers):
            width = len(count)
            lines.append(
                f"{len(missing):,} of {int(count):,} shards of {start}*-of-{count}{end} are not taken or missing (first: "
                f"{missing[0]:0{width}d}-of-{count})"
            )
    return lines


def _glob(flag: str, pattern: str) -> list[str]:
    try:
        folder = tf.io.gfile.isdir(pattern)
        if folder:
            pattern = files.join(pattern, "*.tfrec*")
        paths = sorted(path for path in tf.io.gfile.glob(pattern) if not tf.io.gfile.isdir(path))
    except tf.errors.OpError as error:
        raise DataError(f"{flag}: {files.reason(error)}") from error
    if not paths and folder:
        raise DataError(
            f"{flag} has no files *.tfrec*: give a pattern of names, as --dataset=tfrecord:{posixpath.dirname(pattern)}/*.record"
        )
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


def _layout(flag: str, layout: str, paths: list[str], options: SourceOptions) -> dict[str, str]:
    """Returns the feature keys of image, label and filename; the last two may be missing.

    Args:
        flag: the source as given by the user, for messages.
        layout: value of --features.
        paths: of the files, of which the first with records decides if `layout` is empty.
        options: whether labels are needed.
    """
    if layout in LAYOUTS:
        keys = LAYOUTS[layout]
    elif layout:
        keys = parse_pairs("features", layout, ("image", "label", "filename"))
        if "image" not in keys:
            raise ConfigError(
                f"--features={layout}: it must have image:KEY, and may have label:KEY and filename:KEY, or be one of "
                f"{', '.join(LAYOUTS)}"
            )
    else:
        keys = _find_layout(flag, paths, options)
    return {name: key for name, key in keys.items() if name != "label" or options.labelled}


def _find_layout(flag: str, paths: list[str], options: SourceOptions) -> dict[str, str]:
    features: set[str] = set()
    for path in paths:
        for _, _, payload in itertools.islice(_scan(path), _RECORDS_THAT_DECIDE):
            features |= _parse_example(payload, path).features.feature.keys()
        if features:
            break
    else:
        raise DataError(f"{flag}: {paths[0]} has no records" + (", nor has any other file" if len(paths) > 1 else ""))
    for keys in LAYOUTS.values():
        if keys["image"] in features and (keys["label"] in features or not options.labelled):
            return keys
    if _is_sequence(payload):
        raise DataError(f"{flag}: {paths[0]} has tf.train.SequenceExample: write each image as a tf.train.Example")
    raise DataError(
        f"{flag}: the first records have the features {', '.join(sorted(features))}: say which ones to take, as "
        "--features=image:KEY,label:KEY, or, without labels, --features=image:KEY"
    )


def _require_features(flag: str, layout: str, keys: dict[str, str], indices: Collection[_Index]) -> None:
    """Raises if no record has a feature that the user named."""
    features = frozenset[str]().union(*(index.features for index in indices))
    if not features:
        raise DataError(f"{flag} has no records")
    # The names of known layouts may be absent: not every tool writes them.
    required = [name for name in keys if name != "filename" or layout not in (*LAYOUTS, "")]
    if missing := [name for name in required if keys[name] not in features]:
        hint = "; --unlabelled takes the images without labels" if missing[0] == "label" else ""
        raise ConfigError(
            f"--features={layout}: no record of {flag} has the feature {keys[missing[0]]!r} ({missing[0]}); they have "
            f"{', '.join(sorted(features))}{hint}"
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
                if len(header) < HEADER.size or HEADER.unpack(header)[1] != masked_crc(header[:8]):
                    if not number:
                        _refuse_foreign(path, header + file.read(64))
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


def _refuse_foreign(path: str, head: bytes) -> None:
    """Raises if the first bytes of a file are those of something other than TFRecords."""
    if head.startswith(_GZIP):
        raise DataError(f"{path} is compressed: decompress it first (gunzip)")
    if head[:1] == b"\x78" and int.from_bytes(head[:2], "big") % 31 == 0:
        raise DataError(
            f"{path} is compressed with ZLIB: write it again without compression, or decompress it, as with "
            "python -c 'import sys, zlib; sys.stdout.buffer.write(zlib.decompress(sys.stdin.buffer.read()))' < FILE > NEW"
        )
    if what := images.foreign(head) or image_header.sniff(head):
        raise DataError(f"{path} is not a TFRecord file but {what}")


def _is_sequence(payload: bytes) -> bool:
    """Whether an Example is in fact a SequenceExample: the same, and lists of features."""
    try:
        return bool(tf.train.SequenceExample.FromString(payload).feature_lists.feature_list)
    except Exception:  # protobuf's DecodeError differs between its implementations
        return False


def _parse_example(payload: bytes, where: str) -> Any:
    try:
        return tf.train.Example.FromString(payload)
    except Exception as error:  # protobuf's DecodeError differs between its implementations
        raise DataError(f"{where}: not a tf.train.Example") from error


def _index(path: str, keys: dict[str, str], options: SourceOptions) -> _Index:
    """Reads and checks a whole file. Hashes its images if they are assigned by shares."""
    offsets, lengths, hashes = [], [], []
    labels: list[str] = []
    features: set[str] = set()
    widths: set[int] = set()
    for number, offset, payload in _scan(path):
        where = location(path, number, offset - HEADER.size)
        feature = _parse_example(payload, where).features.feature
        features.update(feature)
        image = _one_image(feature, keys["image"], where)
        label, width = _label(feature, keys["label"], where, options.encoding) if "label" in keys else ("", 0)
        if width:
            widths.add(width)
        offsets.append(offset)
        lengths.append(len(payload))
        labels.append(sys.intern(label))
        if options.shares:
            hashes.append(content_hash(image, options.seed))
    return _Index(
        path,
        np.asarray(offsets, np.int64),
        np.asarray(lengths, np.int64),
        labels,
        hashes,
        frozenset(features),
        frozenset(widths),
    )


def _one_image(feature: Any, key: str, where: str) -> bytes:
    """Returns the bytes of a record's image.

    Raises:
        DataError: it has none, several, or numbers.
    """
    value = feature[key] if key in feature else tf.train.Feature()
    contents: Sequence[bytes] = value.bytes_list.value
    if len(contents) == 1:
        return contents[0]
    if contents:
        raise DataError(f"{where} has {len(contents)} images at {key!r}: records with one image are read")
    if numbers := len(value.int64_list.value) or len(value.float_list.value):
        raise DataError(
            f"{where} has {numbers:,} numbers at {key!r}, not the bytes of an image file: store an encoded image, as "
            "tf.io.encode_png makes it"
        )
    raise DataError(f"{where} has no image at {key!r}; it has {', '.join(sorted(feature)) or 'nothing'}")


def _label(feature: Any, key: str, where: str, encoding: str) -> tuple[str, int]:
    """Returns a record's label as text, "" for none, and the length of a one-hot label, else 0.

    Args:
        feature: of the record.
        key: of the label.
        where: location of the record, for messages.
        encoding: of texts, a Python codec; empty: UTF-8.

    Raises:
        DataError: it is a list that is not one-hot, or text in another encoding.
    """
    value = feature[key] if key in feature else tf.train.Feature()
    texts: Sequence[bytes] = value.bytes_list.value
    numbers: Sequence[float] = value.int64_list.value or value.float_list.value
    if len(texts) > 1:
        raise DataError(f"{where} has {len(texts)} labels at {key!r}: images with one label are read")
    if texts:
        try:
            text = texts[0].decode(encoding or "utf-8")
        except UnicodeDecodeError:
            raise DataError(
                f"{where}: the label {texts[0]!r} is not {(encoding or 'utf-8').upper()}: say how it is encoded, as "
                "--encoding=cp1252"
            ) from None
        # Numbers as bytes: cleaned as text, 9 and 10 would be white space.
        if re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text):
            raise DataError(
                f"{where}: the label {texts[0]!r} at {key!r} is not text but numbers as bytes: write them as an int64 feature"
            )
        return clean(text), 0
    if len(numbers) == 1:
        number = numbers[0]
        return str(int(number) if number % 1 == 0 else number), 0
    if not numbers:
        return "", 0
    values = np.asarray(numbers)
    if not values.any():  # of no class
        return "", len(values)
    if values.max() != 1 or np.count_nonzero(values) != 1:
        raise DataError(
            f"{where}: the label at {key!r} is a list of {len(values)} numbers that is not one-hot: images with one label are "
            "read, or none (--unlabelled)"
        )
    return str(values.argmax()), len(values)


def _record_classes(flag: str, layout: str, indices: list[_Index], options: SourceOptions) -> Classes:
    """Determines the classes of all records.

    Raises:
        DataError: labels are both one-hot and others, or no class can be made of one.
    """
    found: dict[str, Found] = {}
    for index in indices:
        for label, count in collections.Counter(index.labels).items():
            before = found.get(label)
            where = before.where if before else index.location(index.labels.index(label))
            found[label] = Found(where, count + (before.images if before else 0))
    if not options.labelled:
        return number_classes(flag, found, options, numeric=True)
    if widths := sorted(frozenset[int]().union(*(index.widths for index in indices))):
        classes = options.classes or tuple(map(str, range(widths[-1])))
        if len(widths) > 1 or len(classes) != widths[0]:
            lengths = " and ".join(map(str, widths))
            raise DataError(
                f"{flag} has one-hot labels of length {lengths}"
                + (f", and --classes has {len(classes)} names" if len(widths) == 1 else "; all must have one length")
            )
        options = dataclasses.replace(options, classes=classes)
    names_file = files.join(posixpath.dirname(indices[0].path), _TFDS_CLASS_NAMES)
    are_numbers = all(re.fullmatch("-?[0-9]*", label) for label in found)
    if not options.classes and are_numbers and layout in ("", "tfds") and files.exists(names_file):
        options = dataclasses.replace(options, classes=read_class_names(names_file))
    return number_classes(flag, found, options, numeric=True)


def _record_notes(keys: dict[str, str], indices: list[_Index], options: SourceOptions) -> list[str]:
    """Describes what is missing in files and records."""
    notes = []
    if empty := [index.path for index in indices if not len(index.offsets)]:
        notes.append(f"{len(empty):,} of {len(indices):,} files have no records (first: {empty[0]})")
    if not options.labelled or "label" not in keys:
        return notes
    total = sum(len(index.labels) for index in indices)
    if absent := sum(index.labels.count("") for index in indices):
        first = next(index for index in indices if "" in index.labels)
        notes.append(
            f"{absent:,} of {total:,} records have no label at {keys['label']!r} and are unlabelled (first: "
            f"{first.location(first.labels.index(''))})"
        )
    if keys["label"] == LAYOUTS["imagenet"]["label"] and any(_TEXT_OF_LABEL in index.features for index in indices):
        notes.append(
            f"classes are the numbers at {keys['label']!r}; to take their names instead: --features=image:{keys['image']},"
            f"label:{_TEXT_OF_LABEL}"
        )
    return notes


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
    payload: bytes, keys: dict[str, str], label: int, index: _Index, number: int, options: SourceOptions
) -> ValidatedImage:
    where = index.location(number)
    feature = _parse_example(payload, where).features.feature
    names = feature[keys["filename"]].bytes_list.value if "filename" in keys and keys["filename"] in feature else ()
    name = (
        names[0].decode(options.encoding or "utf-8", errors="replace")
        if names
        else f"{posixpath.basename(index.path)}#{number}"
    )
    return images.validate_image(feature[keys["image"]].bytes_list.value[0], label, name, where, options.upright)
