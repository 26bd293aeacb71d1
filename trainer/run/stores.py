"""Where the images of a run are kept, and which records it does without."""

from __future__ import annotations

import dataclasses
import json

from trainer.core.config import Config
from trainer.core.console import Console
from trainer.core.errors import DataError
from trainer.data.cache import Cache, describe_shortage
from trainer.data.dataset import Dataset, Split
from trainer.data.memory import choose_stores, decoded_bytes, free_memory
from trainer.data.records import CorruptRecord, CorruptRecordLog
from trainer.io import files
from trainer.run.accelerator import Accelerator


def report_corrupt_records(damage: CorruptRecordLog, split: Split, console: Console, most: int = 20) -> None:
    lines = damage.messages()
    for line in lines[:most]:
        console.warning(f"left out: {line}")
    if lines:
        more = f"{len(lines) - most} more; " if len(lines) > most else ""
        console.warning(f"{more}{len(lines)} of {split.examples:,} records of {split.name!r} are bad and left out")


def require_same_records(workdir: str, left_out: dict[str, list[CorruptRecord]]) -> None:
    """Writes down which records a run does without, once: the order of the others depends on it.

    Raises:
        DataError: an earlier process of this run did without others.
    """
    path = files.join(workdir, "left_out.json")
    text = json.dumps({name: [dataclasses.asdict(bad) for bad in bads] for name, bads in left_out.items()}, indent=1)
    if not files.exists(path):
        files.write(path, f"{text}\n".encode(), "the list of bad records")
    elif files.read(path, "the list of bad records").decode(errors="replace") != f"{text}\n":
        raise DataError(
            f"other records are bad now than when this run began ({path} lists those): it would not go on as it began. "
            "Mend the data, or take another --workdir"
        )


def plan_stores(
    config: Config, accelerator: Accelerator, sets: tuple[Dataset, ...], held_out: Dataset, console: Console
) -> tuple[str, str]:
    """Where the images of training and of evaluation will be kept (`store.choose`), said in a line.

    Raises:
        DataError: there is no room for them, neither in memory nor on the disk; the line has the sizes.
    """
    train = [(dataset, dataset.split(config.train_split, "train_split")) for dataset in sets]
    names = dict.fromkeys((config.eval_split, config.final_split))
    others = [(held_out, held_out.splits[name]) for name in names]
    need, other = (sum(decoded_bytes(split, config.store_size) for _, split in group) for group in (train, others))
    kinds = choose_stores(config.store, accelerator.image_bytes, free_memory(), need, other)
    on_disk = (train if kinds[0] == "disk" else []) + (others if kinds[1] == "disk" else [])
    if on_disk:
        cache = open_cache(config)
        found = cache.space(on_disk)
        if found.required > found.available:
            raise DataError(
                f"the images take {(need + other) / 2**30:.2f} GiB decoded at {config.store_size} pixels, which is "
                f"not in memory (--store={config.store}), and {describe_shortage(found, cache.folder)}"
            )
    if kinds != ("device", "host"):
        console.info(f"{need / 2**30:.2f} GiB of training images at {config.store_size} pixels: store {kinds[0]}")
    return kinds


def open_cache(config: Config) -> Cache:
    """The cache of copies of shards that the configuration names."""
    return Cache(config.cache_dir or files.join(files.cache_folder(), "data"), int(config.cache_gb * 2**30))
