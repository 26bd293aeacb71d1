"""The images of a run: where they are kept, and which corrupt records the run skips."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence

import numpy as np

from trainer.core.config import Config
from trainer.core.console import Console
from trainer.core.errors import DataError
from trainer.data.cache import Cache, describe_shortage
from trainer.data.dataset import Dataset, Split
from trainer.data.memory import STORE_ORDER, choose_stores, decoded_bytes, free_memory
from trainer.data.records import CorruptRecord, CorruptRecordLog
from trainer.data.store import ConcatenatedStore, DiskStore, ImageStore, MemoryStore
from trainer.io import files
from trainer.method import fidelity
from trainer.run.accelerator import Accelerator
from trainer.run.plan import RunPlan, check_labels

_MAX_LINES = 20  # corrupt records of a split that are printed one by one


@dataclasses.dataclass(frozen=True)
class Stores:
    """The images of a run.

    Attributes:
        train: training images of all sets.
        train_sizes: number of images of each set, in the order of `--data`.
        eval: images of the evaluation and the final split, by the split's name.
        skipped: corrupt records that the run does without, by split.
    """

    train: ImageStore
    train_sizes: list[int]
    eval: dict[str, ImageStore]
    skipped: dict[str, list[CorruptRecord]]


def open_stores(plan: RunPlan, kinds: tuple[str, str], console: Console) -> Stores:
    """Reads and checks every record, and decodes the images that are kept in memory.

    Args:
        plan: of the run.
        kinds: of training and evaluation, from `choose_kinds`.
        console: shows progress and skipped records.

    Raises:
        ConfigError: no image of `--eval_split` has the label that `--keep_best` needs.
        DataError: a record is corrupt, a label is missing where it is needed, or there is no room.
    """
    config = plan.config
    train_kind, eval_kind = kinds
    skipped: dict[str, list[CorruptRecord]] = {}

    def open_split(dataset: Dataset, flag: str, kind: str) -> ImageStore:
        split = dataset.split(getattr(config, flag), flag)
        corrupt = CorruptRecordLog(dataset, split, config.max_bad_fraction)
        store = _open_split(config, dataset, split, kind, corrupt, console)
        if corrupt.records:
            name = split.name if len(plan.train_sets) == 1 else f"{dataset.folder}, {split.name}"
            skipped[name] = corrupt.records
        return store

    train_stores = [open_split(dataset, "train_split", train_kind) for dataset in plan.train_sets]
    eval_stores: dict[str, ImageStore] = {}
    for flag in ("eval_split", "final_split"):
        name = getattr(config, flag)
        if name not in eval_stores:
            eval_stores[name] = open_split(plan.eval_set, flag, eval_kind)
    check_labels(plan, train_stores, eval_stores[config.eval_split].labels)
    _drop_foreign_labels(plan, train_stores, console)
    if config.max_bad_fraction and config.workdir and not (config.check or config.dry_run):
        require_same_records(config.workdir, skipped)
    train = train_stores[0] if len(train_stores) == 1 else ConcatenatedStore(train_stores)
    sizes = [len(store) for store in train_stores]
    return Stores(train, sizes, eval_stores, skipped)


def _open_split(
    config: Config, dataset: Dataset, split: Split, kind: str, corrupt: CorruptRecordLog, console: Console
) -> ImageStore:
    """Opens one split as `kind` ("device", "host", "disk"), and prints the skipped records."""
    task = f"decode {split.name}" if kind != "disk" else f"copy and check {split.name}, bytes"

    def progress(done: int, total: int) -> None:
        console.progress(task, done, total)

    store: ImageStore
    if kind == "disk":
        store = DiskStore(dataset, split, config.store_size, open_cache(config), progress, corrupt=corrupt)
    else:
        store = MemoryStore(dataset, split, config.store_size, progress, corrupt)
    messages = corrupt.messages()
    for message in messages[:_MAX_LINES]:
        console.warning(f"skipped: {message}")
    if messages:
        more = f"{len(messages) - _MAX_LINES} more; " if len(messages) > _MAX_LINES else ""
        console.warning(
            f"{more}{len(messages)} of {split.examples:,} records of {split.name!r} are corrupt and skipped"
        )
    return store


def _drop_foreign_labels(plan: RunPlan, train_stores: list[ImageStore], console: Console) -> None:
    """Removes labels that number other classes than the student's."""
    for dataset, store in zip(plan.train_sets, train_stores, strict=True):
        if store.classes != plan.eval_set.classes:
            store.labels[:] = -1
            if store.classes:
                console.info(
                    f"the labels of {dataset.folder} are not used: its classes are not those of {plan.eval_set.folder}"
                )


def require_same_records(workdir: str, skipped: dict[str, list[CorruptRecord]]) -> None:
    """Writes down which records a run skips, once: the order of the others depends on it.

    Raises:
        DataError: an earlier process of this run skipped others.
    """
    path = files.join(workdir, "left_out.json")
    records = {name: [dataclasses.asdict(record) for record in corrupt] for name, corrupt in skipped.items()}
    text = json.dumps(records, indent=1)
    if not files.exists(path):
        files.write(path, f"{text}\n".encode(), "the list of corrupt records")
    elif files.read(path, "the list of corrupt records").decode(errors="replace") != f"{text}\n":
        raise DataError(
            f"other records are corrupt now than when this run began ({path} lists those), so it cannot resume "
            "with the same order of examples: restore the data, or take another --workdir"
        )


def choose_kinds(plan: RunPlan, accelerator: Accelerator, console: Console) -> tuple[str, str]:
    """Where the images of training and of evaluation are kept (`memory.choose_stores`).

    Args:
        plan: of the run.
        accelerator: whose memory may hold the images.
        console: gets a line where the choice is not the fastest.

    Returns:
        "device", "host" or "disk" for training, "host" or "disk" for evaluation.

    Raises:
        DataError: there is no room, neither in memory nor on the disk; the message gives the sizes.
    """
    config = plan.config
    train, others = _splits(plan)
    train_bytes, eval_bytes = _decoded_bytes(plan, config.store_size)
    kinds = choose_stores(config.store, accelerator.image_bytes, free_memory(), train_bytes, eval_bytes)
    on_disk = (train if kinds[0] == "disk" else []) + (others if kinds[1] == "disk" else [])
    if on_disk:
        cache = open_cache(config)
        space = cache.space(on_disk)
        if space.required > space.available:
            raise DataError(
                f"the images take {(train_bytes + eval_bytes) / 2**30:.2f} GiB decoded at {config.store_size} pixels, "
                f"which is not in memory (--store={config.store}), and {describe_shortage(space, cache.folder)}"
            )
    if kinds != ("device", "host"):
        console.info(
            f"{train_bytes / 2**30:.2f} GiB of training images at {config.store_size} pixels: store {kinds[0]}"
        )
    return kinds


def _splits(plan: RunPlan) -> tuple[list[tuple[Dataset, Split]], list[tuple[Dataset, Split]]]:
    """The splits that a run trains on, and those that it evaluates on."""
    config = plan.config
    train = [(dataset, dataset.split(config.train_split, "train_split")) for dataset in plan.train_sets]
    names = dict.fromkeys((config.eval_split, config.final_split))
    return train, [(plan.eval_set, plan.eval_set.splits[name]) for name in names]


def _decoded_bytes(plan: RunPlan, side: int) -> tuple[int, int]:
    """Bytes of the images of training and of evaluation, decoded to squares of `side` pixels."""
    train, others = _splits(plan)
    return sum(decoded_bytes(split, side) for _, split in train), sum(decoded_bytes(split, side) for _, split in others)


def fit_store_size(
    plan: RunPlan,
    kinds: tuple[str, str],
    view_sizes: Sequence[int],
    accelerator: Accelerator,
    model_macs: Callable[[], float] = lambda: math.inf,
) -> RunPlan:
    """Raises an automatic store size as far as the training crops need it and there is room.

    Room is memory of the same kind, and time: the views' resampling stays within
    `fidelity.VIEW_SHARE` of the models' operations. The size stays as it is where images are
    decoded or sent to the device at each step, since that takes longer in proportion to their
    pixels. The chief writes the choice down at once: it depends on the memory that is free now, and
    a run keeps it.

    Args:
        plan: of the run.
        kinds: of training and evaluation, from `choose_kinds`; a larger size does not change them.
        view_sizes: sides of the models' views, in pixels.
        accelerator: whose memory may hold the images. A collective of all machines.
        model_macs: multiplications and additions (pairs) of all models for one image in a training
            step; called only if a larger size would help.

    Raises:
        DataError: the choice cannot be written down.
    """
    if plan.store_size_from == "flags":
        return plan
    config, new = plan.config, plan.store_size_from == "default"
    side = _largest_side(plan, kinds, view_sizes, accelerator, model_macs) if new else config.store_size
    plan = plan.with_store_size(accelerator.least_of_all(side))
    if new and accelerator.chief and config.workdir and not (config.check or config.dry_run):
        plan.record()
    return plan


def _largest_side(
    plan: RunPlan,
    kinds: tuple[str, str],
    view_sizes: Sequence[int],
    accelerator: Accelerator,
    model_macs: Callable[[], float],
) -> int:
    """The store size for a new run on this machine."""
    config = plan.config
    smallest = largest = config.store_size
    crops = fidelity.sample_crops(config, _median_sizes(plan))
    if crops is None or kinds[0] == "disk" or (kinds[0] == "host" and not accelerator.reads_host_memory):
        return smallest
    memory, macs = free_memory(), None
    for side in fidelity.useful_sides(crops, smallest, max(view_sizes)):
        if side == smallest:
            continue
        macs = model_macs() if macs is None else macs
        if fidelity.view_macs(side, view_sizes) > fidelity.VIEW_SHARE * macs:
            break
        fastest, _ = choose_stores("auto", accelerator.image_bytes, memory, *_decoded_bytes(plan, side))
        if STORE_ORDER.index(fastest) <= STORE_ORDER.index(kinds[0]):  # there is room in the same memory
            largest = side
    return largest


def _median_sizes(plan: RunPlan) -> np.ndarray:
    """Median heights and widths of the training sets' originals by their indices, each as often
    as its share of the training images: float32 [k, 2].
    """
    examples = [dataset.splits[plan.config.train_split].examples for dataset in plan.train_sets]
    shares = np.array(plan.config.data_weights or examples, float)
    counts = np.ceil(100 * shares / shares.sum()).astype(int)
    medians = [[d.image_size.get("median_height", 0), d.image_size.get("median_width", 0)] for d in plan.train_sets]
    sizes = np.repeat(np.array(medians, np.float32), counts, axis=0)
    return sizes[sizes.min(axis=1) > 0]


def print_fidelity(plan: RunPlan, kinds: tuple[str, str], sizes: np.ndarray, view_size: int, console: Console) -> None:
    """Prints how many training crops the store size blurs, and which size would not.

    Args:
        plan: of the run.
        kinds: of training and evaluation, from `choose_kinds`.
        sizes: float32 [k, 2], height and width of the training images' originals in pixels.
        view_size: side of the largest view, in pixels.
        console: gets a line; none if the share is below half a percent or has no meaning.
    """
    config = plan.config
    crops = fidelity.sample_crops(config, sizes)
    if crops is None or (share := fidelity.blurred_share(crops, config.store_size, view_size)) < 0.005:
        return
    line = (
        f"images are kept at {config.store_size} x {config.store_size} pixels: {share:.0%} of training crops are blurrier "
        "than from the full-size images"
    )
    *_, side = fidelity.useful_sides(crops, config.store_size, view_size)
    if side > config.store_size:
        less = fidelity.blurred_share(crops, side, view_size)
        needs = f"{sum(_decoded_bytes(plan, side)) / 2**30:.2f} GiB decoded"
        if kinds[0] == "disk":
            needs = f"{(side / config.store_size) ** 2:.1f} times the pixels for each image that is decoded"
        where = "in a new run, " if plan.store_size_from == "start" else ""
        line += f"; {where}--store_size={side} makes it {less:.0%}, needs {needs}"
    console.info(line)


def open_cache(config: Config) -> Cache:
    """The cache of copies of shards that the configuration names."""
    return Cache(config.cache_dir or files.join(files.cache_folder(), "data"), int(config.cache_gb * 2**30))
