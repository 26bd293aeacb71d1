"""Any image classification set of tensorflow-datasets, its encoded bytes untouched.

tensorflow-datasets is the extra `datasets`; it downloads and lays out, we only read. The sets of the paper have the paper's
splits (Table 5).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.resources.abc
import importlib.util
import logging
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from trainer.core.errors import ConfigError, DataError
from trainer.ingest import images
from trainer.ingest.sources import Load, Source, SourceOptions, SourceSplit
from trainer.io import files

# Paper, Table 5. What it calls the test split of food101 and of ImageNet is `validation` here.
PAPER_SPLITS = {
    "oxford_flowers102": {"train": "train", "validation": "validation", "test": "test"},
    "oxford_iiit_pet": {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"},
    "food101": {"train": "train[:90%]", "validation": "train[90%:]", "test": "validation"},
    "sun397": {"train": "train", "validation": "validation", "test": "test"},
    "imagenet2012": {"train": "train[:98%]", "validation": "train[98%:]", "test": "validation"},
}


def source(name: str, data_dir: str, image: str, label: str, wanted: SourceOptions) -> Source:
    """A set by its name in tensorflow-datasets: NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION.

    Args:
        name: of the set.
        data_dir: where tensorflow-datasets keeps its files, on a disk or gs://; empty: where it does by itself.
        image: feature with the picture; empty: the one there is, or the one for supervised learning.
        label: feature with the class, likewise.
        wanted: `splits` are split expressions of tensorflow-datasets, by our names.

    Raises:
        ConfigError: tensorflow-datasets is not installed, or a feature or split is not there.
        DataError: there is no such set, or it cannot be had: no network, a package that it needs, or files that are
            only given out by hand.
    """
    tfds = _library(name)
    if wanted.shares:
        raise ConfigError(
            "--splits with shares is for sources without splits; tensorflow-datasets cuts its own: "
            "--splits=train=train[:90%],validation=train[90%:]"
        )
    builder = _builder(tfds, name, data_dir)
    _prepare(tfds, builder, name)
    features = builder.info.features
    image = _feature("image", image, 0, tfds.features.Image, builder, name)
    take = {image: True}
    classes: tuple[str, ...] = ()
    if wanted.labelled and (label := _feature("label", label, 1, tfds.features.ClassLabel, builder, name)):
        take[label] = True
        known = features[label]
        classes = wanted.classes or tuple(known.names or map(str, range(known.num_classes)))
        if len(classes) != known.num_classes:
            raise DataError(f"--classes names {len(classes)} classes; {name} has {known.num_classes}")
    else:
        label = ""
    text = next((f for f in ("file_name", "filename", "image/filename") if f in features), "")
    if text:
        take[text] = True
    have = builder.info.splits
    splits = wanted.splits or PAPER_SPLITS.get(builder.name) or {own: own for own in have}
    parts = tuple(
        _part(tfds, builder, ours, own, take, (image, label, text), wanted.upright) for ours, own in splits.items()
    )
    facts = {"tensorflow_datasets": builder.info.full_name, "splits": splits}
    return Source(f"tfds {builder.info.full_name}", classes, parts, facts)


def _library(name: str) -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ConfigError(
            f"--dataset=tfds:{name} needs tensorflow-datasets ({error}): pip install 'funmatch[datasets]'"
        ) from error
    if importlib.util.find_spec("importlib_resources") is None:
        # tensorflow-datasets 4.9.10 imports it and requires it on old Pythons only. The standard library's is the same.
        sys.modules["importlib_resources"] = importlib.resources
    return tensorflow_datasets


def _builder(tfds: Any, name: str, data_dir: str) -> Any:
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        with _quiet():
            return tfds.builder(name, **({"data_dir": data_dir} if data_dir else {}))
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(name.split("/")[0].split(":")[0], tfds.list_builders(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"--dataset=tfds:{name}: tensorflow-datasets has no such set{hint}") from error
    except Exception as error:  # another config or version, or a name that is no name: their own many classes
        raise DataError(f"--dataset=tfds:{name}: {_line(error)}") from error


def _prepare(tfds: Any, builder: Any, name: str) -> None:
    """Downloads and lays out what is not there yet."""
    if builder.is_prepared():
        return
    manual = " ".join((getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None) or "").split())
    place = f"{builder._data_dir_root}/downloads/manual"
    _resolve(builder, name)
    try:
        with _quiet():
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=place))
    except ImportError as error:
        package = {"cv2": "opencv-python-headless"}.get(error.name or "", error.name)
        raise DataError(
            f"--dataset=tfds:{name} needs the package {package or error} to be made: pip install it and run again"
        ) from error
    except Exception as error:  # whatever a set's own code and the network bring
        if manual and not isinstance(error, MemoryError) and not _network(error):
            raise DataError(
                f"--dataset=tfds:{name} is only given out by hand. Put its files into {place} and run the same command "
                f"again. tensorflow-datasets says: {manual}"
            ) from error
        if _network(error):
            raise DataError(_no_network(name, _line(error))) from error
        raise DataError(f"--dataset=tfds:{name}: tensorflow-datasets cannot make it: {_line(error)}") from error


def _resolve(builder: Any, name: str) -> None:
    """Says at once that there is no network; tensorflow-datasets would try for minutes."""
    hosts = {urllib.parse.urlsplit(str(url)).hostname or "" for url in builder.url_infos or {}} - {""}
    proxied = any(urllib.request.getproxies().get(scheme) for scheme in ("http", "https"))
    if not hosts or proxied or files.names(f"{builder._data_dir_root}/downloads"):
        return
    for host in sorted(hosts)[:1]:
        try:
            socket.getaddrinfo(host, 443)
        except OSError as error:
            raise DataError(_no_network(name, f"{host}: {files.reason(error)}")) from error


def _no_network(name: str, why: str) -> str:
    return (
        f"--dataset=tfds:{name} cannot be downloaded ({why}). Without a network here, make it on a machine that has one and "
        "give its folder as --data_dir, which may be gs://"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of each retried connection: what went wrong in the end is one line."""
    loggers = [logging.getLogger(name) for name in ("urllib3", "absl")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _network(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is the network's."""
    while error is not None:
        module = type(error).__module__.split(".")[0]
        if module in ("requests", "urllib3", "urllib", "socket", "http") or isinstance(
            error, (ConnectionError, TimeoutError)
        ):
            return True
        if type(error).__name__ in ("DownloadError", "gaierror"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {files.reason(error)}"[:300]


def _feature(flag: str, asked: str, place: int, kind: type, builder: Any, name: str) -> str:
    """The feature that is the image, or the label; "" for no label."""
    features = builder.info.features
    there = (
        [key for key, feature in features.items() if isinstance(feature, kind)] if hasattr(features, "items") else []
    )
    if asked:
        if asked in there:
            return asked
        raise ConfigError(f"--{flag}={asked}: {name} has no such {flag}; it has {', '.join(there) or 'none'}")
    keys = builder.info.supervised_keys
    if keys and len(keys) > place and keys[place] in there:
        return str(keys[place])
    if len(there) == 1:
        return there[0]
    if not there and flag == "label":
        return ""
    if not there:
        shown = ", ".join(features) if hasattr(features, "keys") else type(features).__name__
        raise DataError(f"--dataset=tfds:{name} is no set of images: its features are {shown}")
    raise ConfigError(f"--dataset=tfds:{name} has several: choose one of --{flag}={', '.join(there)}")


def _part(
    tfds: Any, builder: Any, ours: str, own: str, take: dict[str, bool], keys: tuple[str, str, str], upright: bool
) -> SourceSplit:
    have = builder.info.splits
    try:
        whole = tfds.core.splits.AbstractSplit.from_spec(own).to_absolute(have)
    except Exception as error:  # a split that is not there, or no expression at all
        raise ConfigError(
            f"--splits={ours}={own}: {_line(error)}; {builder.name} has "
            f"{', '.join(f'{split} ({have[split].num_examples})' for split in have)}"
        ) from error
    pieces = [
        (piece.splitname, piece.from_ or 0, have[piece.splitname].num_examples if piece.to is None else piece.to)
        for piece in whole
    ]
    image, label, text = keys

    def cut(start: int, stop: int) -> list[tuple[str, int, int]]:
        found, before = [], 0
        for split, first, last in pieces:
            a, b = max(start - before, 0), min(stop - before, last - first)
            if a < b:
                found.append((split, first + a, first + b))
            before += last - first
        return found

    def loads(start: int, stop: int) -> Iterator[Load]:
        for split, first, last in cut(start, stop):
            # One file after another: the order does not depend on how many are read at a time.
            reading = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False, add_tfds_id=not text)
            data = builder.as_dataset(
                split=tfds.core.ReadInstruction(split, from_=first, to=last, unit="abs"),
                shuffle_files=False,
                read_config=reading,
                decoders=tfds.decode.PartialDecoding(take, decoders={image: tfds.decode.SkipDecoding()}),
            )
            number = first
            for row in data.take(last - first).as_numpy_iterator():
                name = row[text or "tfds_id"].decode(errors="replace")
                found_label = int(row[label]) if label else -1
                where = f"{builder.info.full_name} {split}[{number}] ({name})"
                yield functools.partial(images.validate_image, row[image], found_label, name, where, upright)
                number += 1
            if number < last:
                raise DataError(
                    f"tensorflow-datasets gave {number - first} pictures of {builder.info.full_name} {split}[{first}:{last}]: "
                    "its files are not whole; delete them and run again"
                )

    def key(start: int, stop: int) -> str:
        sizes = [have[split].num_bytes for split, _, _ in pieces if split in have]
        return f"{builder.info.full_name} {cut(start, stop)} {keys} {sizes}"

    return SourceSplit(ours, sum(last - first for _, first, last in pieces), loads, key)
