"""Any images -> TFRecord shards and dataset.json, in a folder or on gs://.

    funmatch prepare --dataset=tfds:NAME[/CONFIG][:VERSION] --out=OUT   tensorflow-datasets
    funmatch prepare --dataset=folder:PATH --out=OUT        PATH/SPLIT/CLASS/*.{jpg,png,...}
    funmatch prepare --dataset=csv:FILE --out=OUT           lines of path,label[,split]
    funmatch prepare --dataset=tfrecord:GLOB --out=OUT      existing TFRecord files
    funmatch prepare --dataset=synthetic --out=OUT          drawn flowers, no download
    funmatch prepare --verify=OUT                           reads everything back

The same input and flags give the same bytes, for any number of workers. dataset.json is written
last: a folder without it is not a data set. After an interruption, the same command resumes with
the shards that are missing.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

from trainer import cli
from trainer.core.console import Console
from trainer.core.errors import ConfigError

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset
    from trainer.ingest.sources import Progress, Source, SourceOptions

# Sizes of Flowers102, and a split to train teachers on.
SYNTHETIC_SPLITS = {"train": 1020, "validation": 1020, "test": 6149, "pretrain": 40800}

# The kind of source that a flag is for. A flag that is not here is for several kinds.
_KIND_OF_FLAG = {"data_dir": "tfds", "image": "tfds", "label": "tfds", "features": "tfrecord", "columns": "csv"}

_PLAN_FLAGS = (
    "dataset",
    "splits",
    "image",
    "label",
    "features",
    "columns",
    "classes",
    "class_order",
    "encoding",
    "unlabelled",
    "exif",
    "seed",
)
_SYNTHETIC_PLAN_FLAGS = ("dataset", "seed", "classes", "size", *SYNTHETIC_SPLITS)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the verb's flags in `values`."""
    group: dict[str, Any] = {"flag_values": values, "module_name": "prepare"}
    text, number, switch = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_boolean
    text("dataset", "", "tfds:NAME[/CONFIG][:VERSION], folder:PATH, csv:FILE, tfrecord:GLOB, synthetic.", **group)
    text("out", "", "Folder or gs:// prefix to write to.", **group)
    text("verify", "", "A prepared data set to read back: counts, CRCs, every image decoded.", **group)
    text(
        "splits",
        "",
        "NAME=WHERE items: a split expression of tensorflow-datasets (train=train[:90%]), a split of "
        "the source, or, for tfrecord, a pattern of paths. Or NAME:SHARE items "
        "(train:0.9,validation:0.1), for a source without splits: images are assigned class by "
        "class, by a hash of their bytes and --seed. Empty: the paper's, else the source's own.",
        **group,
    )
    text(
        "data_dir",
        "",
        "Where tensorflow-datasets keeps its files, a local folder or gs://; empty: ~/tensorflow_datasets.",
        **group,
    )
    text("image", "", "The feature with the image, if tensorflow-datasets has several.", **group)
    text("label", "", "The feature with the class, likewise.", **group)
    text(
        "features",
        "",
        "Layout of tfrecord: image:KEY,label:KEY,filename:KEY (the last two may be left out), or "
        "funmatch, notebook (the FunMatch-Distillation notebooks), tfds or imagenet (the scripts of "
        "TF-Slim). Empty: found from the first records.",
        **group,
    )
    text(
        "columns",
        "",
        "Columns of csv: path:COLUMN,label:COLUMN,split:COLUMN, by name or number from 0. Empty: found by usual names.",
        **group,
    )
    text(
        "classes",
        "",
        "Synthetic: number of species, at least 2 (102). Others: a file with one class name per "
        "line, in order. Empty: from the source.",
        **group,
    )
    flags.DEFINE_enum(
        "class_order",
        "auto",
        ["auto", "natural", "text"],
        "Order of the class names of a folder, a table or TFRecord files. text: as Keras and "
        "torchvision sort names (1, 10, 2). natural: numbers by value (1, 2, 10). auto: names that "
        "are numbers by value, others as text; of a table or TFRecord files, numbers are class "
        "numbers.",
        **group,
    )
    text(
        "encoding",
        "",
        "Of a table and of --classes, as cp1252 or utf-16. Empty: UTF-8, or what the file's byte order mark says.",
        **group,
    )
    switch(
        "unlabelled",
        False,
        "Leave the labels out: images to distil on, or to measure agreement on. --classes then names "
        "the teacher's classes.",
        **group,
    )
    flags.DEFINE_enum(
        "exif",
        "keep",
        ["keep", "upright"],
        "keep: images as they are stored, the bytes unchanged. upright: apply EXIF rotations; "
        "rotated images become PNG.",
        **group,
    )
    switch(
        "skip_bad",
        False,
        "Leave out images that cannot be decoded, and report how many. Otherwise they are an error.",
        **group,
    )
    number("workers", 0, "Threads, at least 1; 0: one per core. The bytes do not depend on it.", **group)
    switch("overwrite", False, "Replace the data set at --out.", **group)
    number("seed", 0, "Seed of the synthetic images, and of --splits by share; at least 0.", **group)
    number("size", 256, "Longer side of synthetic images in pixels, at least 16.", **group)
    for split, count in SYNTHETIC_SPLITS.items():
        number(split, count, f"Number of synthetic images in the split {split}; 0 leaves it out.", **group)


def main(argv: list[str] | None = None) -> int:
    """Runs the verb; returns an exit code."""
    return cli.run(__doc__, define_flags, _run, argv)


def _run(values: flags.FlagValues) -> None:
    console = Console()
    if values.workers < 0:
        raise ConfigError(f"--workers={values.workers}: it must be at least 1, or 0 for one per core")
    if values.verify:
        from trainer.ingest.verify import verify

        console.info(verify(values.verify, console.progress, workers=values.workers))
        return
    if not values.out:
        raise ConfigError("--out is missing: give the folder or gs:// prefix to write to")
    from trainer.ingest import writer

    # Pillow warns about odd EXIF data and large images. The first does not matter; the writer
    # reports the second.
    warnings.filterwarnings("ignore", module="PIL")
    began = time.monotonic()
    dataset = writer.write_dataset(
        lambda: _source(values, console.progress),
        values.out,
        console.progress,
        plan=_plan(values),
        overwrite=values.overwrite,
        skip_bad=values.skip_bad,
        workers=values.workers,
        shard_bytes=writer.SHARD_BYTES,
        console=console,
    )
    console.close()
    console.info(f"{values.out}: {_summary(dataset, time.monotonic() - began)}")


def _plan(values: flags.FlagValues) -> dict[str, Any]:
    """Returns the flags that determine the bytes; only a run with equal ones resumes."""
    names = _SYNTHETIC_PLAN_FLAGS if values.dataset == "synthetic" else _PLAN_FLAGS
    return {name: getattr(values, name) for name in names}


def _summary(dataset: Dataset, seconds: float) -> str:
    counts = ", ".join(f"{split.name} {split.examples:,}" for split in dataset.splits.values())
    images = sum(split.examples for split in dataset.splits.values())
    megabytes = sum(shard.bytes for split in dataset.splits.values() for shard in split.shards) / 1e6
    return (
        f"{len(dataset.classes) or 'no'} classes; {counts}; {megabytes:,.1f} MB in {seconds:,.1f} s "
        f"({images / seconds:,.0f} images/s, {megabytes / seconds:,.1f} MB/s)"
    )


def _source(values: flags.FlagValues, progress: Progress) -> Source:
    """Opens the source that --dataset=KIND:LOCATION names."""
    kind, _, location = values.dataset.partition(":")
    if kind not in SOURCES or bool(location) == (kind == "synthetic"):
        raise ConfigError(
            f"--dataset={values.dataset}: it must be tfds:NAME, folder:PATH, csv:FILE, tfrecord:GLOB or synthetic"
        )
    if values.seed < 0:
        raise ConfigError(f"--seed={values.seed}: it must be at least 0")
    return SOURCES[kind](location, values, progress)


def _options(kind: str, values: flags.FlagValues) -> SourceOptions:
    """Returns the flags common to all kinds of existing images; rejects flags of other kinds."""
    from trainer.ingest import labels, sources
    from trainer.io.text import require_encoding

    for flag, flag_kind in _KIND_OF_FLAG.items():
        if getattr(values, flag) and kind != flag_kind:
            raise ConfigError(f"--{flag} is for --dataset={flag_kind}:..., not for {kind}")
    if values.encoding:
        require_encoding(values.encoding, "--encoding")
    if values.class_order != "auto" and (values.classes or kind == "tfds"):
        given = "--classes gives" if values.classes else "tensorflow-datasets gives"
        raise ConfigError(f"--class_order={values.class_order}: {given} the order of the classes; leave the flag out")
    splits, shares = sources.parse_splits(values.splits)
    return sources.SourceOptions(
        splits=splits,
        shares=shares,
        seed=values.seed,
        labelled=not values.unlabelled,
        upright=values.exif == "upright",
        classes=labels.read_class_names(values.classes, values.encoding) if values.classes else (),
        class_order=values.class_order,
        encoding=values.encoding,
    )


def _tfds(location: str, values: flags.FlagValues, progress: Progress) -> Source:  # noqa: ARG001
    from trainer.ingest.tfds_source import tfds_source

    return tfds_source(location, values.data_dir, values.image, values.label, _options("tfds", values))


def _folder(location: str, values: flags.FlagValues, progress: Progress) -> Source:
    from trainer.ingest.folder_source import folder_source

    return folder_source(location, _options("folder", values), progress)


def _csv(location: str, values: flags.FlagValues, progress: Progress) -> Source:
    from trainer.ingest.folder_source import csv_source
    from trainer.ingest.sources import parse_pairs

    options = _options("csv", values)
    return csv_source(location, parse_pairs("columns", values.columns, ("path", "label", "split")), options, progress)


def _tfrecord(location: str, values: flags.FlagValues, progress: Progress) -> Source:
    from trainer.ingest.tfrecord_source import tfrecord_source

    return tfrecord_source(location, values.features, _options("tfrecord", values), progress)


def _synthetic(location: str, values: flags.FlagValues, progress: Progress) -> Source:  # noqa: ARG001
    from trainer.ingest.synthetic_source import synthetic_source

    if values.classes and not values.classes.lstrip("-").isdigit():
        raise ConfigError(f"--classes={values.classes}: with --dataset=synthetic it is a number of species")
    splits = {name: getattr(values, name) for name in SYNTHETIC_SPLITS}
    return synthetic_source(values.seed, int(values.classes or 102), values.size, splits)


# Opens a source of each kind, given its location, the flags, and what to call with progress.
SOURCES: dict[str, Callable[[str, flags.FlagValues, Progress], Source]] = {
    "tfds": _tfds,
    "folder": _folder,
    "csv": _csv,
    "tfrecord": _tfrecord,
    "synthetic": _synthetic,
}


if __name__ == "__main__":
    sys.exit(main())
