"""Any images -> TFRecord shards and dataset.json, in a folder or on gs://.

    funmatch prepare --dataset=tfds:NAME[/CONFIG][:VERSION] --out=OUT   a set of tensorflow-datasets, the paper's splits
    funmatch prepare --dataset=folder:PATH --out=OUT                    PATH/SPLIT/CLASS/*.{jpg,png,...}; less levels: docs/data.md
    funmatch prepare --dataset=csv:FILE --out=OUT                       lines of path,label[,split]
    funmatch prepare --dataset=tfrecord:GLOB --out=OUT                  shards that are there already
    funmatch prepare --dataset=synthetic --out=OUT                      drawn flowers, no download
    funmatch prepare --verify=OUT                                       reads everything back

Same input and flags, same bytes, for any number of workers. Shards first, dataset.json last: a folder without it is no
data set. The same command again goes on with the shards that are missing.
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

from absl import flags

from trainer import cli
from trainer.core.errors import ConfigError

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset
    from trainer.ingest.sources import Source, SourceOptions
from trainer.ingest.verify import verify
from trainer.ingest.writer import Progress, write_dataset

SYNTHETIC_SPLITS = {
    "train": 1020,
    "validation": 1020,
    "test": 6149,
    "pretrain": 40800,
}  # Flowers102's, and one for teachers


def define_flags(values: flags.FlagValues) -> None:
    """The verb's flags."""
    group: dict[str, Any] = {"flag_values": values, "module_name": "prepare"}
    text, number, switch = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_boolean
    text("dataset", "", "tfds:NAME[/CONFIG][:VERSION], folder:PATH, csv:FILE, tfrecord:GLOB or synthetic.", **group)
    text("out", "", "Folder or gs:// prefix to write to.", **group)
    text("verify", "", "A prepared data set to read back: counts, CRCs, every image decoded.", **group)
    text(
        "splits",
        "",
        "NAME=WHERE items: a split expression of tensorflow-datasets (train=train[:90%]), a split of the source, or, for "
        "tfrecord, a pattern of paths. Or NAME:SHARE items (train:0.9,validation:0.1), for a source without splits: dealt "
        "out class by class, by a hash of each picture's bytes and --seed. Empty: the paper's, else the source's own.",
        **group,
    )
    text(
        "data_dir",
        "",
        "Where tensorflow-datasets keeps its files, on a disk or gs://; empty: ~/tensorflow_datasets.",
        **group,
    )
    text("image", "", "The feature with the picture, where a set of tensorflow-datasets has several.", **group)
    text("label", "", "The feature with the class, likewise.", **group)
    text(
        "features",
        "",
        "Layout of tfrecord: image:KEY,label:KEY,filename:KEY (the last two may be left out), or funmatch, notebook (the "
        "FunMatch-Distillation notebooks) or tfds. Empty: found from the first record.",
        **group,
    )
    text(
        "columns",
        "",
        "Columns of csv: path:COLUMN,label:COLUMN,split:COLUMN, by name or number from 0. Empty: found.",
        **group,
    )
    text(
        "classes",
        "",
        "Synthetic: species, at least 2 (102). Others: a file with a class name a line, in order. Empty: from the source.",
        **group,
    )
    switch(
        "unlabelled", False, "Leave the labels out: pictures to distil on, for --data beside an --eval_data.", **group
    )
    flags.DEFINE_enum(
        "exif",
        "keep",
        ["keep", "upright"],
        "keep: pictures as they are stored, the bytes untouched. upright: those with an EXIF rotation are turned, as PNG.",
        **group,
    )
    switch(
        "skip_bad",
        False,
        "Leave pictures out that cannot be decoded, and say how many; else they are an error.",
        **group,
    )
    number("workers", 0, "Threads, at least 1; 0: one for each core. It changes no byte.", **group)
    switch("overwrite", False, "Replace the data set that is at --out.", **group)
    number("seed", 0, "Seed of the synthetic garden, and of --splits by share; at least 0.", **group)
    number("size", 256, "Longer side of synthetic pictures in pixels, at least 16.", **group)
    for split, count in SYNTHETIC_SPLITS.items():
        number(split, count, f"Synthetic pictures in the split {split}; 0 leaves it out.", **group)


def main(argv: list[str] | None = None) -> int:
    """The verb; returns an exit code."""
    return cli.run(__doc__, define_flags, _run, argv)


def _run(values: Any) -> None:
    from trainer.core.console import Console

    console = Console()
    # Pillow warns of odd EXIF and of big pictures; both are told by our own words, or do not matter.
    warnings.filterwarnings("ignore", module="PIL")
    if values.workers < 0:
        raise ConfigError(f"--workers={values.workers}: it must be at least 1, or 0 for one for each core")
    if values.verify:
        console.info(verify(values.verify, console.progress, workers=values.workers))
        return
    if not values.out:
        raise ConfigError("--out is missing: the folder or gs:// prefix to write to")
    began = time.monotonic()
    dataset = write_dataset(
        lambda: _source(values, console.progress),
        values.out,
        console.progress,
        plan=_plan(values),
        overwrite=values.overwrite,
        skip_bad=values.skip_bad,
        workers=values.workers,
        console=console,
    )
    console.close()
    seconds = time.monotonic() - began
    counts = ", ".join(f"{split.name} {split.examples:,}" for split in dataset.splits.values())
    images = sum(split.examples for split in dataset.splits.values())
    size = sum(shard.bytes for split in dataset.splits.values() for shard in split.shards)
    console.info(
        f"{values.out}: {len(dataset.classes) or 'no'} classes; {counts}; {size / 1e6:,.1f} MB in {seconds:,.1f} s "
        f"({images / seconds:,.0f} images/s, {size / 1e6 / seconds:,.1f} MB/s)"
    )


def _plan(values: Any) -> dict[str, Any]:
    """The flags that decide bytes: who goes on with the work of another must have the same."""
    names: tuple[str, ...] = (
        "dataset",
        "splits",
        "image",
        "label",
        "features",
        "columns",
        "classes",
        "unlabelled",
        "exif",
        "seed",
    )
    if values.dataset == "synthetic":
        names = ("dataset", "seed", "classes", "size", *SYNTHETIC_SPLITS)
    return {name: getattr(values, name) for name in names}


def _source(values: Any, progress: Progress) -> Source:
    from trainer.ingest import folder_source, sources, synthetic_source

    kind, _, rest = values.dataset.partition(":")
    if values.seed < 0:
        raise ConfigError(f"--seed={values.seed}: it must be at least 0")
    if kind == "synthetic" and not rest:
        if values.classes and not values.classes.lstrip("-").isdigit():
            raise ConfigError(f"--classes={values.classes}: with --dataset=synthetic it is a number of species")
        splits = {name: getattr(values, name) for name in SYNTHETIC_SPLITS}
        return synthetic_source.synthetic_source(values.seed, int(values.classes or 102), values.size, splits)
    if not rest or kind not in ("tfds", "folder", "csv", "tfrecord"):
        raise ConfigError(
            f"--dataset={values.dataset}: it must be tfds:NAME, folder:PATH, csv:FILE, tfrecord:GLOB or synthetic"
        )
    for flag, owners in (
        ("data_dir", ("tfds",)),
        ("image", ("tfds",)),
        ("label", ("tfds",)),
        ("features", ("tfrecord",)),
        ("columns", ("csv",)),
    ):
        if getattr(values, flag) and kind not in owners:
            raise ConfigError(f"--{flag} is for --dataset={owners[0]}:..., not for {kind}")
    chosen, shares = sources.parse_splits(values.splits)
    wanted = sources.SourceOptions(
        splits=chosen,
        shares=shares,
        seed=values.seed,
        labelled=not values.unlabelled,
        upright=values.exif == "upright",
        classes=sources.names_in(values.classes) if values.classes else (),
    )
    if kind == "tfds":
        from trainer.ingest import tfds_source

        return tfds_source.source(rest, values.data_dir, values.image, values.label, wanted)
    if kind == "csv":
        columns = sources.parse_pairs("columns", values.columns, ("path", "label", "split"))
        return folder_source.csv_source(rest, columns, wanted, progress)
    if kind == "tfrecord":
        from trainer.ingest import tfrecord_source

        return tfrecord_source.source(rest, values.features, wanted, progress)
    return folder_source.folder_source(rest, wanted, progress)


def synthetic(
    out: str,
    seed: int,
    classes: int,
    size: int,
    splits: dict[str, int],
    progress: Progress,
    *,
    overwrite: bool = False,
) -> Dataset:
    """Draws a garden (trainer.ingest.synthetic_source.synthetic_source) and writes it to `out`.

    Raises:
        ConfigError: a number out of range.
        DataError: `out` cannot be written, or holds a data set already.
    """
    from trainer.ingest import synthetic_source

    plan = {"dataset": "synthetic", "seed": seed, "classes": classes, "size": size, **splits}
    return write_dataset(
        lambda: synthetic_source.synthetic_source(seed, classes, size, splits),
        out,
        progress,
        plan=plan,
        overwrite=overwrite,
    )


def folder(
    path: str, out: str, progress: Progress, *, wanted: SourceOptions | None = None, overwrite: bool = False
) -> Dataset:
    """Writes the image files in `path` (trainer.ingest.folder_source.folder_source) to `out`.

    Raises:
        DataError: no images, an image that cannot be used (it is named), or `out` cannot be written.
    """
    from trainer.ingest import folder_source, sources

    wanted = wanted or sources.SourceOptions()
    plan = {"dataset": f"folder:{path}", "wanted": repr(wanted)}
    return write_dataset(
        lambda: folder_source.folder_source(path, wanted, progress), out, progress, plan=plan, overwrite=overwrite
    )


if __name__ == "__main__":
    sys.exit(main())
