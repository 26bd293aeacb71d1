"""Measure how fast images reach a step, and in how much memory.

    python benchmarks/data_path.py          # minutes, 1.2 GB of disk; into benchmarks/data_path
    python benchmarks/data_path.py --quick  # under two minutes; into build/data_path-quick

Measured by number of cores, kind of store, size of the set, and position in the run. All data is
generated. Drawn JPEGs of 500 x 375 pixels and about 70 kB stand in for photographs. Sets of growing
size have small images, each in a record of its own. The set of 106 GB is one shard under many names
(hard links): it has the records, the index and the order of a large set, and the bytes of one
shard. Files are read from the kernel's page cache, so a slower disk adds its own time. Writes
results.json, and table.md from it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np

BATCH = 64
PHOTO = (375, 500)  # height and width in pixels
SMALL = 16  # side in pixels of the images of sets of growing size
SHARD = 1000  # records in a shard of sets of growing size
LARGE_SHARD = 500  # records in the shard of the large set

FULL: dict[str, Any] = {
    "sides": [256, 448],
    "photos": 512,
    "sizes": [1_000, 10_000, 100_000, 1_000_000],
    "images": 20_000,
    "kept": 1024,
    "orders": [1_000_000, 10_000_000, 100_000_000],
    "large_shards": 1600,
    "large_batches": [0, 100, 200, 400, 800],
}
QUICK: dict[str, Any] = {
    "sides": [256],
    "photos": 128,
    "sizes": [1_000, 10_000],
    "images": 2_000,
    "kept": 256,
    "orders": [1_000_000],
    "large_shards": 100,
    "large_batches": [0, 20, 40],
}
Row = dict[str, Any]


def photo(number: int) -> bytes:
    """A JPEG with about the roughness of a photograph."""
    from PIL import Image

    rng, (height, width) = np.random.default_rng(number), PHOTO
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    rough = np.clip(smooth + rng.integers(-12, 13, (height, width, 3)), 0, 255).astype(np.uint8)
    return _jpeg(rough, 85)


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _small_image(number: int, comments: int = 0) -> bytes:
    """A JPEG of 16 x 16 pixels, with so many JPEG comments of 64 kB of random bytes."""
    rng = np.random.default_rng(number)
    encoded = _jpeg(rng.integers(0, 256, (SMALL, SMALL, 3), np.uint8), 75)
    comment = b"\xff\xfe\xff\xff" + rng.bytes(65533)
    return encoded[:2] + comments * comment + encoded[2:]


def _dataset(folder: str, shards: list[Any]) -> tuple[Any, Any]:
    from trainer.data.dataset import Dataset, Split

    split = Split("train", tuple(shards))
    return Dataset(folder, "generated", tuple("abcdefghij"), {"train": split}, {}), split


def photos(folder: str, count: int) -> tuple[Any, Any]:
    """A set of `count` photographs, 64 of them different, in one shard."""
    from trainer.data.records import ImageRecord, write_shard

    encoded = [photo(number) for number in range(min(64, count))]
    image_records = (ImageRecord(encoded[n % len(encoded)], *PHOTO, n % 10, f"{n}.jpg") for n in range(count))
    return _dataset(folder, [write_shard(folder, "photos", image_records)])


def growing(folder: str, sizes: list[int]) -> Iterator[tuple[Any, Any]]:
    """A set of each size in turn; a larger set contains the shards of the smaller ones. Shards have
    1,000 records.
    """
    from trainer.data.records import ImageRecord, write_shard

    encoded, shards = [_small_image(number) for number in range(64)], []
    for size in sizes:
        for number in range(len(shards), size // SHARD):
            names = range(number * SHARD, (number + 1) * SHARD)
            image_records = (ImageRecord(encoded[n % 64], SMALL, SMALL, n % 10, f"{n}.jpg") for n in names)
            shards.append(write_shard(folder, f"{number}", image_records))
        yield _dataset(folder, shards)


def linked(folder: str, shards: int) -> tuple[Any, Any]:
    """A set of `shards` shards of 65 MB, all hard links to one file."""
    from trainer.data.dataset import Shard
    from trainer.data.records import ImageRecord, write_shard

    image_records = (ImageRecord(_small_image(number, 2), SMALL, SMALL, 0, "") for number in range(LARGE_SHARD))
    shard = write_shard(folder, "large-0", image_records)
    for number in range(1, shards):
        os.link(os.path.join(folder, "large-0"), os.path.join(folder, f"large-{number}"))
    return _dataset(folder, [Shard(f"large-{n}", shard.examples, shard.bytes, shard.crc32c) for n in range(shards)])


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `work` took, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _no_progress(done: int, total: int) -> None:
    """A progress callback that shows nothing."""


def by_cores(folder: str, cores: int, side: int, images: int) -> Row:
    """Decoded images/s of the disk store on a limited number of cores: the best of five.

    Args:
        folder: empty.
        cores: number of cores that this process may use.
        side: of the decoded images in pixels.
        images: in the set.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])  # before TensorFlow counts them

    from trainer.data.cache import Cache
    from trainer.data.order import ExampleSampler
    from trainer.data.store import DiskStore

    dataset, split = photos(folder, images)
    store = DiskStore(dataset, split, side, Cache(os.path.join(folder, "cache")), _no_progress)
    sampler, steps = ExampleSampler(0, images, BATCH), images // BATCH
    store.take(sampler.batches(0, 1)[0])
    # Other work may run on the machine, so the best time counts, here and below.
    seconds = [
        _timed(lambda k=k: [store.take(sampler.batches(k * steps + t, 1)[0]) for t in range(steps)])[0]
        for k in range(5)
    ]
    return {
        "cores and threads": cores,
        "pixels": side,
        "kB an image": split.shards[0].bytes / images / 1000,
        "images/s": steps * BATCH / min(seconds),
    }


def by_size(folder: str, sizes: list[int], images: int) -> list[Row]:
    """Time to open sets of growing size, and time per image afterwards.

    One thread, except for decoding.

    Args:
        folder: empty.
        sizes: numbers of records, ascending multiples of `SHARD`.
        images: number of images that are read.
    """
    from trainer.data.cache import Cache
    from trainer.data.order import ExampleSampler
    from trainer.data.records import EncodedSplit
    from trainer.data.store import DiskStore

    rows = []
    for dataset, split in growing(folder, sizes):
        cache = Cache(os.path.join(folder, "cache"))
        first_open, _ = _timed(lambda d=dataset, s=split, c=cache: c.open(d, s))
        second_open, shards = _timed(lambda d=dataset, s=split, c=cache: c.open(d, s))
        encoded = EncodedSplit(dataset, split, shards)
        ids = ExampleSampler(0, split.examples, images).batches(0, 1)[0].tolist()
        for example in ids[:1000]:
            encoded.record(example)
        read = min(_timed(lambda i=ids, e=encoded: [e.record(example) for example in i])[0] for _ in range(3))
        store = DiskStore(dataset, split, 32, cache, _no_progress)
        decoded_ids = np.array(ids[: images // 4])
        store.take(decoded_ids[:BATCH])
        decoded = min(_timed(lambda o=store, i=decoded_ids: o.take(i))[0] for _ in range(3))
        rows.append(
            {
                "records": split.examples,
                "shards": len(split.shards),
                "s to check and index": first_open,
                "s to open again": second_open,
                "µs to find and read an image": 1e6 * read / len(ids),
                "µs decoded too": 1e6 * decoded / len(decoded_ids),
            }
        )
    return rows


def by_place(examples: int) -> list[Row]:
    """Milliseconds to the ids of batch t of a run that starts or resumes there, and to each of the
    100 after it.
    """
    from trainer.data.order import ExampleSampler

    last = examples // BATCH - 1
    rows = []
    for batch in (0, last // 4, last // 2, 3 * last // 4, last, last + 1, 1000 * last):
        times = []
        for _ in range(3):
            sampler = ExampleSampler(0, examples, BATCH)
            first, _ = _timed(lambda o=sampler, b=batch: o.batches(b, 1))
            after, _ = _timed(lambda o=sampler, b=batch: [o.batches(b + k, 1) for k in range(100)])
            times.append((first, after / 100))
        rows.append(
            {
                "batch": batch,
                "epoch": batch * BATCH // examples,
                "ms to this batch": 1e3 * min(first for first, _ in times),
                "ms to each of 100 after it": 1e3 * min(after for _, after in times),
            }
        )
    return rows


def by_order(examples: int) -> Row:
    """The order of a run over `examples` examples: time to a far batch, and memory. Needs a process
    of its own.
    """
    from trainer.data.order import ExampleSampler

    before, far = _memory("VmRSS"), 10**12 // BATCH
    sampler = ExampleSampler(0, min(examples, 2**31 - 1), BATCH)
    first, _ = _timed(lambda: sampler.batches(far, 1))
    after, _ = _timed(lambda: [sampler.batches(far, 1) for _ in range(100)])
    return {
        "examples": examples,
        "s to any batch": first,
        "ms to each after it": 10 * after,
        "MB while it is made": (_memory("VmHWM") - before) / 1e6,
        "MB kept": (_memory("VmRSS") - before) / 1e6,
    }


def by_kind(folder: str, side: int, images: int) -> list[Row]:
    """Time and memory of each kind of store on one set. All stores must return the same images.

    Args:
        folder: empty.
        side: of the decoded images in pixels.
        images: in the set.
    """
    import tensorflow as tf

    from trainer.core.config import Config
    from trainer.data.cache import Cache
    from trainer.data.order import ExampleSampler
    from trainer.data.store import DiskStore, MemoryStore
    from trainer.method.feed import BatchPrefetcher

    dataset, split = photos(folder, images)
    config = Config(image_size=side // 2, store_size=side, batch_size=BATCH)
    memory_seconds, memory = _timed(lambda: MemoryStore(dataset, split, side, _no_progress))
    cache = Cache(os.path.join(folder, "cache"))
    disk_seconds, disk = _timed(lambda: DiskStore(dataset, split, side, cache, _no_progress))
    copy_seconds, on_device = _timed(lambda: tf.constant(memory.images))
    gather = tf.function(lambda ids: tf.gather(on_device, ids), autograph=False)
    rows, steps, first_batches = [], images // BATCH, {}
    for kind, store, open_seconds in (
        ("device", None, memory_seconds + copy_seconds),
        ("host", memory, memory_seconds),
        ("disk", disk, disk_seconds),
    ):
        prefetcher, sampler = BatchPrefetcher(config, 1, (0,), store), ExampleSampler(0, images, BATCH)

        def step(
            t: int, prefetcher: BatchPrefetcher = prefetcher, sampler: ExampleSampler = sampler, store: Any = store
        ) -> tf.Tensor:
            ids, streamed = prefetcher.take(t, 1, sampler)
            return gather(ids[0]) if store is None else streamed[0][0][0]

        first_batches[kind] = step(0).numpy()
        seconds = min(_timed(lambda s=step: [s(t) for t in range(steps)])[0] for _ in range(3))
        prefetcher.close()
        resident = {"device": 2 * memory.images.nbytes, "host": memory.images.nbytes, "disk": 36 * images}[kind]
        rows.append(
            {
                "store": kind,
                "s to open": open_seconds,
                "MB in memory": resident / 1e6,
                "µs an image": 1e6 * seconds / (steps * BATCH),
                "images/s": steps * BATCH / seconds,
            }
        )
    if not all((batch == first_batches["device"]).all() for batch in first_batches.values()):
        raise AssertionError("the stores return different images")
    return rows


def by_reading(folder: str, shards: int, batches: list[int]) -> list[Row]:
    """Resident memory while a large set is read in the order of a run.

    Args:
        folder: empty.
        shards: of the set; 65 MB each.
        batches: numbers of batches read at which memory is measured, ascending.
    """
    from trainer.data.cache import Cache
    from trainer.data.dataset import Split
    from trainer.data.order import ExampleSampler
    from trainer.data.store import DiskStore

    dataset, split = linked(folder, shards)
    cache = Cache(os.path.join(folder, "cache"))
    # A small set first, so that the memory of TensorFlow and its decoder is not counted.
    first = DiskStore(dataset, Split("train", split.shards[:1]), 32, cache, _no_progress)
    for _ in range(20):
        first.take(np.arange(BATCH) % len(first))
    before, rows, seen = _memory("VmRSS"), [], set()
    store = DiskStore(dataset, split, 32, cache, _no_progress)
    sampler = ExampleSampler(0, len(store), BATCH)
    done = 0
    for count in batches:
        for step in range(done, count):
            ids = sampler.batches(step, 1)[0]
            seen |= set((ids // LARGE_SHARD).tolist())
            store.take(ids)
        done = count
        rows.append(
            {
                "batches read": done,
                "shards read from": len(seen),
                "GB in the set": sum(shard.bytes for shard in split.shards) / 1e9,
                "GB read": done * BATCH * split.shards[0].bytes / LARGE_SHARD / 1e9,
                "resident MB more than before": (_memory("VmRSS") - before) / 1e6,
            }
        )
    return rows


def _memory(field: str) -> int:
    """Resident memory of this process in bytes: `VmRSS` now, or `VmHWM` at its peak."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[field].split()[0]) * 1024


PARTS: dict[str, Callable[..., Any]] = {
    "by_cores": by_cores,
    "by_size": by_size,
    "by_place": by_place,
    "by_order": by_order,
    "by_kind": by_kind,
    "by_reading": by_reading,
}
TITLES = {
    "by_cores": f"Images decoded from the disk ({PHOTO[1]} x {PHOTO[0]} JPEGs), by cores",
    "by_kind": f"The kinds of store, the same photographs, batches of {BATCH}",
    "by_size": f"Cost of an image by the size of the set (images of {SMALL} pixels, about 1 kB; one thread, decoding: all cores)",
    "by_place": f"Time to the ids of batch t, 1,000,000 examples, batches of {BATCH} (an epoch's end includes the next order)",
    "by_order": f"The order of larger sets, batches of {BATCH}",
    "by_reading": "Resident memory while a large set is read in the order of a run (records of 131 kB)",
}


def apart(part: str, folder: str, *arguments: Any) -> Any:
    """Runs one measurement in a process of its own, in an empty folder that is removed afterwards.

    Args:
        part: a key of `PARTS`.
        folder: in which the empty folder is created.
        arguments: of the measurement, after its folder; as JSON.

    Returns:
        What the measurement returns.

    Raises:
        SystemExit: it failed; the text is its standard error.
    """
    empty = tempfile.mkdtemp(dir=folder)
    needs_folder = part not in ("by_place", "by_order")
    values = [empty, *arguments] if needs_folder else list(arguments)
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--part", part, json.dumps(values)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            raise SystemExit(f"{part}{arguments} failed:\n{process.stderr}")
        return json.loads(process.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(empty, ignore_errors=True)


def measure(plan: dict[str, Any], folder: str, report: Callable[[str], None]) -> dict[str, list[Row]]:
    """Runs all measurements.

    Args:
        plan: sizes, `FULL` or `QUICK`.
        folder: in which the sets are generated.
        report: receives a line for each measurement.

    Returns:
        Rows by part, in the order of `TITLES`.
    """
    cores = len(os.sched_getaffinity(0))
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= cores]
    calls: dict[str, list[tuple[Any, ...]]] = {
        "by_cores": [(n, side, plan["photos"]) for side in plan["sides"] for n in counts],
        "by_kind": [(plan["sides"][0], plan["kept"])],
        "by_size": [(plan["sizes"], plan["images"])],
        "by_place": [(1_000_000,)],
        "by_order": [(examples,) for examples in plan["orders"]],
        "by_reading": [(plan["large_shards"], plan["large_batches"])],
    }
    results: dict[str, list[Row]] = {}
    for part in TITLES:
        for arguments in calls[part]:
            seconds, rows = _timed(lambda p=part, a=arguments: apart(p, folder, *a))
            results.setdefault(part, []).extend(rows if isinstance(rows, list) else [rows])
            report(f"{part}{arguments}: {seconds:.0f} s")
    return results


def cell(value: Any) -> str:
    """A number with three significant digits; integers in full."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(result: dict[str, Any]) -> str:
    """All tables with their titles, the command and the machine."""
    parts = [f"**{title}**\n\n{table(result['rows'][part])}" for part, title in TITLES.items()]
    return "\n".join([*parts, f"`{result['command']}`; {result['machine']}.\n"])


def machine() -> str:
    """Processor, cores, versions."""
    installed = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
    tensorflow = next((installed[name] for name in ("tensorflow", "tensorflow-tpu") if name in installed), "?")
    with open("/proc/cpuinfo") as file:
        name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0))
    return f"{name}, {cores} cores, TensorFlow {tensorflow}, NumPy {np.__version__}, Python {platform.python_version()}"


def main() -> int:
    """Measures, then writes and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sets, only to see that it works")
    parser.add_argument("--out", type=pathlib.Path, help="folder for results.json and table.md")
    parser.add_argument("--folder", help="where sets are generated and then removed; empty: the temporary folder")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part[0]](*json.loads(arguments.part[1]))))
        return 0
    root = pathlib.Path(__file__).resolve().parent
    out = arguments.out or (root.parent / "build" / "data_path-quick" if arguments.quick else root / "data_path")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="funmatch-data-path-") as folder:
        rows = measure(
            QUICK if arguments.quick else FULL, folder, lambda text: print(text, file=sys.stderr, flush=True)
        )
    command = "python benchmarks/data_path.py" + (" --quick" if arguments.quick else "")
    result = {"command": command, "machine": machine(), "rows": rows}
    (out / "results.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (out / "table.md").write_text(markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
