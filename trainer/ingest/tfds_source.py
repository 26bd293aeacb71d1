"""Image classification data sets of tensorflow-datasets as sources.

Encoded images keep their bytes.

tensorflow-datasets (the extra `datasets`) downloads and prepares its files; this module reads
them. The data sets of the paper have the paper's splits (Table 5).
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
from typing import Any, NamedTuple

import numpy as np

from trainer.core.errors import ConfigError, DataError
from trainer.ingest import images
from trainer.ingest.labels import clean
from trainer.ingest.sources import Loader, Source, SourceOptions, SourceSplit
from trainer.io import files

# Paper, Table 5. Its test splits of food101 and ImageNet are called `validation` in
# tensorflow-datasets.
PAPER_SPLITS = {
    "oxford_flowers102": {"train": "train", "validation": "validation", "test": "test"},
    "oxford_iiit_pet": {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"},
    "food101": {"train": "train[:90%]", "validation": "train[90%:]", "test": "validation"},
    "sun397": {"train": "train", "validation": "validation", "test": "test"},
    "imagenet2012": {"train": "train[:98%]", "validation": "train[98%:]", "test": "validation"},
}


def tfds_source(name: str, data_dir: str, image: str, label: str, options: SourceOptions) -> Source:
    """A data set of tensorflow-datasets: NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION.

    Args:
        name: of the data set.
        data_dir: where tensorflow-datasets keeps its files, a local folder or gs://; empty: its
            default.
        image: feature that holds the image; empty: the only image, or the one of the supervised
            pair.
        label: feature that holds the class; empty: likewise.
        options: flags common to all sources; `splits` are split expressions of
            tensorflow-datasets.

    Raises:
        ConfigError: tensorflow-datasets is not installed, or a feature or split does not exist.
        DataError: the data set does not exist or cannot be obtained: no network, a missing
            package, or files that must be downloaded manually.
    """
    tfds = _library(name)
    if options.shares:
        raise ConfigError(
            "--splits with shares is for sources without splits; tensorflow-datasets cuts its own: "
            "--splits=train=train[:90%],validation=train[90%:]"
        )
    builder = _builder(tfds, name, data_dir)
    _prepare(tfds, builder, name)
    features = builder.info.features
    image = _feature("image", image, 0, tfds.features.Image, builder, name)
    _require_integers(features[image], image, name)
    label = _feature("label", label, 1, tfds.features.ClassLabel, builder, name) if options.labelled else ""
    classes: tuple[str, ...] = ()
    if label:
        class_label = features[label]
        names = map(clean, class_label.names) if class_label.names else map(str, range(class_label.num_classes))
        classes = options.classes or tuple(names)
        if len(classes) != class_label.num_classes:
            raise DataError(f"--classes has {len(classes)} classes; {name} has {class_label.num_classes}")
    filename = next((f for f in ("file_name", "filename", "image/filename") if f in features), "")
    splits = (
        options.splits or PAPER_SPLITS.get(builder.name) or {own_split: own_split for own_split in builder.info.splits}
    )
    source_splits = tuple(
        _source_split(tfds, builder, split, expression, _Keys(image, label, filename), options.upright)
        for split, expression in splits.items()
    )
    metadata = {"tensorflow_datasets": builder.info.full_name, "splits": splits}
    return Source(f"tfds {builder.info.full_name}", classes, source_splits, metadata)


class _Keys(NamedTuple):
    """Names of the features to read; "": none."""

    image: str
    label: str
    filename: str


def _library(name: str) -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ConfigError(
            f"--dataset=tfds:{name} needs tensorflow-datasets ({error}): pip install 'funmatch[datasets]'"
        ) from error
    if importlib.util.find_spec("importlib_resources") is None:
        # tensorflow-datasets 4.9.10 imports this backport but requires it on old Pythons only. The
        # standard library's module is the same.
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
        raise DataError(f"--dataset=tfds:{name}: tensorflow-datasets has no such data set{hint}") from error
    except Exception as error:  # tensorflow-datasets raises many types
        raise DataError(f"--dataset=tfds:{name}: {_line(error)}") from error


def _prepare(tfds: Any, builder: Any, name: str) -> None:
    """Downloads and prepares the data set if it is not there yet."""
    if builder.is_prepared():
        return
    manual = " ".join((getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None) or "").split())
    manual_dir = f"{builder._data_dir_root}/downloads/manual"
    _check_network(builder, name)
    try:
        with _quiet():
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    except ImportError as error:
        package = {"cv2": "opencv-python-headless"}.get(error.name or "", error.name)
        raise DataError(
            f"--dataset=tfds:{name} needs the package {package or error}: pip install it and run the same command again"
        ) from error
    except Exception as error:  # a data set's own code may raise anything
        if manual and not isinstance(error, MemoryError) and not _is_network_error(error):
            raise DataError(
                f"--dataset=tfds:{name} must be downloaded manually. Put its files into {manual_dir} and run the same "
                f"command again. Instructions of tensorflow-datasets: {manual}"
            ) from error
        if _is_network_error(error):
            raise DataError(_no_network(name, _line(error))) from error
        raise DataError(f"--dataset=tfds:{name}: tensorflow-datasets cannot prepare it: {_line(error)}") from error


def _check_network(builder: Any, name: str) -> None:
    """Raises at once if there is no network; tensorflow-datasets would retry for minutes."""
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
        f"--dataset=tfds:{name} cannot be downloaded ({why}). If this machine has no network, prepare the data set with "
        "tensorflow-datasets on one that has, and give its folder as --data_dir, which may be gs://"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warnings about each retried connection; the final error is one line."""
    loggers = [logging.getLogger(name) for name in ("urllib3", "absl")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _is_network_error(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is a network error."""
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


def _feature(flag: str, requested: str, position: int, kind: type, builder: Any, name: str) -> str:
    """Returns the name of the image or label feature; "" if there is no label.

    Args:
        flag: "image" or "label".
        requested: value of the flag; empty: not given.
        position: of the feature in the supervised pair.
        kind: class of the feature in tensorflow-datasets.
        builder: of the data set.
        name: of the data set, for messages.
    """
    features = builder.info.features
    is_dict = hasattr(features, "items")
    candidates = [key for key, feature in features.items() if isinstance(feature, kind)] if is_dict else []
    if requested:
        if requested in candidates:
            return requested
        raise ConfigError(f"--{flag}={requested}: {name} has no such {flag}; it has {', '.join(candidates) or 'none'}")
    keys = builder.info.supervised_keys
    if keys and len(keys) > position and keys[position] in candidates:
        return str(keys[position])
    if len(candidates) == 1:
        return candidates[0]
    if not candidates and flag == "label":
        return ""
    if not candidates:
        names = ", ".join(features) if is_dict else type(features).__name__
        raise DataError(f"--dataset=tfds:{name} is not a data set of images: its features are {names}")
    raise ConfigError(f"--dataset=tfds:{name} has several: choose one of --{flag}={', '.join(candidates)}")


def _require_integers(image: Any, key: str, name: str) -> None:
    """Raises if tensorflow-datasets stores an image's floats as if they were the bytes of a PNG.

    Args:
        image: the feature.
        key: of the feature.
        name: of the data set, for messages.
    """
    dtype = image.np_dtype.name if isinstance(image.np_dtype, np.dtype) else image.np_dtype.__name__
    if dtype not in ("uint8", "uint16"):
        raise DataError(
            f"--dataset=tfds:{name}: its images ({key}) are stored as {dtype}, and it is not known what is black and "
            "white: images of uint8 and uint16 are read"
        )


def _source_split(tfds: Any, builder: Any, split: str, expression: str, keys: _Keys, upright: bool) -> SourceSplit:
    """The images of a split expression.

    Args:
        tfds: the module tensorflow_datasets.
        builder: of the data set.
        split: name to write.
        expression: of tensorflow-datasets, such as train[:90%].
        keys: features to read.
        upright: apply EXIF rotations.
    """
    own_splits = builder.info.splits
    try:
        instructions = tfds.core.splits.AbstractSplit.from_spec(expression).to_absolute(own_splits)
    except Exception as error:  # tensorflow-datasets raises many types
        raise ConfigError(
            f"--splits={split}={expression}: {_line(error)}; {builder.name} has "
            f"{', '.join(f'{name} ({own_splits[name].num_examples})' for name in own_splits)}"
        ) from error
    pieces = [
        (i.splitname, i.from_ or 0, own_splits[i.splitname].num_examples if i.to is None else i.to)
        for i in instructions
    ]

    def cut(start: int, stop: int) -> list[tuple[str, int, int]]:
        """Returns the ranges of the data set's own splits that make images [start, stop)."""
        ranges, before = [], 0
        for own_split, first, last in pieces:
            a, b = max(start - before, 0), min(stop - before, last - first)
            if a < b:
                ranges.append((own_split, first + a, first + b))
            before += last - first
        return ranges

    def loaders(start: int, stop: int) -> Iterator[Loader]:
        for own_split, first, last in cut(start, stop):
            # One file after another, so that the order does not depend on how many are read at a
            # time.
            config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False, add_tfds_id=not keys.filename)
            data = builder.as_dataset(
                split=tfds.core.ReadInstruction(own_split, from_=first, to=last, unit="abs"),
                shuffle_files=False,
                read_config=config,
                decoders=tfds.decode.PartialDecoding(
                    {key: True for key in keys if key}, decoders={keys.image: tfds.decode.SkipDecoding()}
                ),
            )
            number = first
            for row in data.take(last - first).as_numpy_iterator():
                filename = row[keys.filename or "tfds_id"].decode(errors="replace")
                label = int(row[keys.label]) if keys.label else -1
                location = f"{builder.info.full_name} {own_split}[{number}] ({filename})"
                yield functools.partial(images.validate_image, row[keys.image], label, filename, location, upright)
                number += 1
            if number < last:
                raise DataError(
                    f"tensorflow-datasets gave {number - first} images of {builder.info.full_name} "
                    f"{own_split}[{first}:{last}]: its files are incomplete; delete them and run the same command again"
                )

    def key(start: int, stop: int) -> str:
        sizes = [own_splits[own_split].num_bytes for own_split, _, _ in pieces if own_split in own_splits]
        return f"{builder.info.full_name} {cut(start, stop)} {keys} {sizes}"

    return SourceSplit(split, sum(last - first for _, first, last in pieces), loaders, key)
