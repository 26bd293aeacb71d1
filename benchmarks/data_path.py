"""How fast images reach a step: by cores, by the kind of store, by the size of the set, by the place in the run; in what memory.

    python benchmarks/data_path.py            # some minutes and 1.2 GB of disk, given back; into benchmarks/data_path
    python benchmarks/data_path.py --quick    # under two minutes, smaller sets; into build/data_path-quick

Everything is generated. Photographs are stood in for by drawn JPEGs of 500 x 375 pixels and about 70 kB. Sets that grow have small
pictures, all of them records of their own. The set of 106 GB is one shard under many names (hard links): it has the places, the
index and the order of a large set, and the bytes of one shard. What was written is read from the kernel's memory, so a disk
that is slower than that adds its own time. Writes results.json, and table.md from it.
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
SMALL = 16  # pixels, of the pictures of sets that grow
SHARD = 1000  # records
LARGE_SHARD = 500

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


def _small(number: int, comment: int = 0) -> bytes:
    """A picture of 16 x 16 pixels, with so many comments of 64 kB that do not compress."""
    rng = np.random.default_rng(number)
    encoded = _jpeg(rng.integers(0, 256, (SMALL, SMALL, 3), np.uint8), 75)
    long = b"\xff\xfe\xff\xff" + rng.bytes(65533)
    return encoded[:2] + comment * long + encoded[2:]


def _dataset(folder: str, shards: list[Any]) -> tuple[Any, Any]:
    from trainer.data.dataset import Dataset, Split

    split = Split("train", tuple(shards))
    return Dataset(folder, "generated", tuple("abcdefghij"), {"train": split}, {}), split


def photos(folder: str, count: int) -> tuple[Any, Any]:
    """A set of so many photographs, of 64 different ones, in one shard."""
    from trainer.data.records import ImageRecord, write_shard

    drawn = [photo(number) for number in range(min(64, count))]
    each = (ImageRecord(drawn[n % len(drawn)], *PHOTO, n % 10, f"{n}.jpg") for n in range(count))
    return _dataset(folder, [write_shard(folder, "photos", each)])


def growing(folder: str, sizes: list[int]) -> Iterator[tuple[Any, Any]]:
    """A set of each size in turn, a larger one with the shards of the one before; 1,000 records each, every record in the file."""
    from trainer.data.records import ImageRecord, write_shard

    drawn, shards = [_small(number) for number in range(64)], []
    for size in sizes:
        for number in range(len(shards), size // SHARD):
            names = range(number * SHARD, (number + 1) * SHARD)
            each = (ImageRecord(drawn[n % 64], SMALL, SMALL, n % 10, f"{n}.jpg") for n in names)
            shards.append(write_shard(folder, f"{number}", each))
        yield _dataset(folder, shards)


def linked(folder: str, shards: int) -> tuple[Any, Any]:
    """A set of so many shards of 65 MB, which are one file."""
    from trainer.data.dataset import Shard
    from trainer.data.records import ImageRecord, write_shard

    each = (ImageRecord(_small(number, 2), SMALL, SMALL, 0, "") for number in range(LARGE_SHARD))
    one = write_shard(folder, "large-0", each)
    for number in range(1, shards):
        os.link(os.path.join(folder, "large-0"), os.path.join(folder, f"large-{number}"))
    return _dataset(folder, [Shard(f"large-{n}", one.examples, one.bytes, one.crc32c) for n in range(shards)])


def _timed(act: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = act()
    return time.perf_counter() - began, found


def _silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def by_cores(folder: str, cores: int, side: int, images: int) -> Row:
    """Decoded images/s of the store on the disk, where this process may use so many cores: the best of five."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])  # before TensorFlow counts them

    from trainer.data.cache import Cache
    from trainer.data.order import ExampleSampler
    from trainer.data.store import DiskStore

    dataset, split = photos(folder, images)
    held = DiskStore(dataset, split, side, Cache(os.path.join(folder, "cache")), _silent)
    order, steps = ExampleSampler(0, images, BATCH), images // BATCH
    held.take(order.batches(0, 1)[0])
    # The machine is shared: the best, here and below.
    seconds = [
        _timed(lambda k=k: [held.take(order.batches(k * steps + t, 1)[0]) for t in range(steps)])[0] for k in range(5)
    ]
    return {
        "cores and threads": cores,
        "pixels": side,
        "kB an image": split.shards[0].bytes / images / 1000,
        "images/s": steps * BATCH / min(seconds),
    }


def by_size(folder: str, sizes: list[int], images: int) -> list[Row]:
    """What opening takes, and an image once it is open, of sets of growing size; one thread but for "decoded"."""
    from trainer.data.cache import Cache
    from trainer.data.order import ExampleSampler
    from trainer.data.records import EncodedSplit
    from trainer.data.store import DiskStore

    rows = []
    for dataset, split in growing(folder, sizes):
        cache = Cache(os.path.join(folder, "cache"))
        checked, _ = _timed(lambda d=dataset, s=split, c=cache: c.open(d, s))
        opened, shards = _timed(lambda d=dataset, s=split, c=cache: c.open(d, s))
        encoded = EncodedSplit(dataset, split, shards)
        ids = ExampleSampler(0, split.examples, images).batches(0, 1)[0].tolist()
        for example in ids[:1000]:
            encoded.record(example)
        read = min(_timed(lambda i=ids, e=encoded: [e.record(example) for example in i])[0] for _ in range(3))
        held = DiskStore(dataset, split, 32, cache, _silent)
        some = np.array(ids[: images // 4])
        held.take(some[:BATCH])
        decoded = min(_timed(lambda h=held, s=some: h.take(s))[0] for _ in range(3))
        rows.append(
            {
                "records": split.examples,
                "shards": len(split.shards),
                "s to check and index": checked,
                "s to open again": opened,
                "µs to find and read an image": 1e6 * read / len(ids),
                "µs decoded too": 1e6 * decoded / len(some),
            }
        )
    return rows


def by_place(examples: int) -> list[Row]:
    """Milliseconds to the ids of batch t of a run that begins or goes on there, and of each of the hundred after it."""
    from trainer.data.order import ExampleSampler

    last = examples // BATCH - 1
    places = [0, last // 4, last // 2, 3 * last // 4, last, last + 1, 1000 * last]
    rows = []
    for place in places:
        found = []
        for _ in range(3):
            order = ExampleSampler(0, examples, BATCH)
            first, _ = _timed(lambda o=order, p=place: o.batches(p, 1))
            after, _ = _timed(lambda o=order, p=place: [o.batches(p + k, 1) for k in range(100)])
            found.append((first, after / 100))
        rows.append(
            {
                "batch": place,
                "epoch": place * BATCH // examples,
                "ms to this batch": 1e3 * min(f for f, _ in found),
                "ms to each of 100 after it": 1e3 * min(a for _, a in found),
            }
        )
    return rows


def by_order(examples: int) -> Row:
    """The order of a run over so many examples: time to a far batch, and memory, in a process of its own."""
    from trainer.data.order import ExampleSampler

    before, far = _memory("VmRSS"), 10**12 // BATCH
    order = ExampleSampler(0, min(examples, 2**31 - 1), BATCH)
    first, _ = _timed(lambda: order.batches(far, 1))
    after, _ = _timed(lambda: [order.batches(far, 1) for _ in range(100)])
    return {
        "examples": examples,
        "s to any batch": first,
        "ms to each after it": 10 * after,
        "MB while it is made": (_memory("VmHWM") - before) / 1e6,
        "MB kept": (_memory("VmRSS") - before) / 1e6,
    }


def by_kind(folder: str, side: int, images: int) -> list[Row]:
    """What each kind of store takes to open and to give a step its images, on one set; all must give the same."""
    import tensorflow as tf

    from trainer.core.config import Config
    from trainer.data.cache import Cache
    from trainer.data.order import ExampleSampler
    from trainer.data.store import DiskStore, MemoryStore
    from trainer.method.feed import BatchPrefetcher

    dataset, split = photos(folder, images)
    config = Config(image_size=side // 2, store_size=side, batch_size=BATCH)
    opened, memory = _timed(lambda: MemoryStore(dataset, split, side, _silent))
    indexed, disk = _timed(lambda: DiskStore(dataset, split, side, Cache(os.path.join(folder, "cache")), _silent))
    moved, on_device = _timed(lambda: tf.constant(memory.images))
    gather = tf.function(lambda ids: tf.gather(on_device, ids), autograph=False)
    rows, steps, given = [], images // BATCH, {}
    for kind, held, start in (("device", None, opened + moved), ("host", memory, opened), ("disk", disk, indexed)):
        feed, order = BatchPrefetcher(config, 1, (0,), held), ExampleSampler(0, images, BATCH)

        def step(t: int, feed: BatchPrefetcher = feed, order: ExampleSampler = order, held: Any = held) -> tf.Tensor:
            ids, streamed = feed.take(t, 1, order)
            return gather(ids[0]) if held is None else streamed[0][0][0]

        given[kind] = step(0).numpy()
        seconds = min(_timed(lambda s=step: [s(t) for t in range(steps)])[0] for _ in range(3))
        feed.close()
        resident = {"device": 2 * memory.images.nbytes, "host": memory.images.nbytes, "disk": 36 * images}[kind]
        rows.append(
            {
                "store": kind,
                "s to open": start,
                "MB in memory": resident / 1e6,
                "µs an image": 1e6 * seconds / (steps * BATCH),
                "images/s": steps * BATCH / seconds,
            }
        )
    if not all((squares == given["device"]).all() for squares in given.values()):
        raise AssertionError("the kinds of store differ")
    return rows


def by_reading(folder: str, shards: int, batches: list[int]) -> list[Row]:
    """Resident memory while a large set is read in the order of a run."""
    from trainer.data.cache import Cache
    from trainer.data.dataset import Split
    from trainer.data.order import ExampleSampler
    from trainer.data.store import DiskStore

    dataset, split = linked(folder, shards)
    cache = Cache(os.path.join(folder, "cache"))
    # What TensorFlow and its decoder take, they take with the smallest set too.
    first = DiskStore(dataset, Split("train", split.shards[:1]), 32, cache, _silent)
    for _ in range(20):
        first.take(np.arange(BATCH) % len(first))
    before, rows, seen = _memory("VmRSS"), [], set()
    held = DiskStore(dataset, split, 32, cache, _silent)
    order = ExampleSampler(0, len(held), BATCH)
    done = 0
    for wanted in batches:
        for step in range(done, wanted):
            ids = order.batches(step, 1)[0]
            seen |= set((ids // LARGE_SHARD).tolist())
            held.take(ids)
        done = wanted
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


def _memory(what: str) -> int:
    """Bytes: `VmRSS` now, or `VmHWM` at most."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[what].split()[0]) * 1024


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
    "by_kind": f"The kinds of store side by side, the same photographs, batches of {BATCH}",
    "by_size": f"An image's cost by the size of the set (pictures of {SMALL} pixels, about 1 kB; one thread, decoding: all cores)",
    "by_place": f"Time to the ids of batch t, 1,000,000 examples, batches of {BATCH} (after an epoch's last comes the next order)",
    "by_order": f"The order of larger sets, batches of {BATCH}",
    "by_reading": "Resident memory while a large set is read in the order of a run (records of 131 kB)",
}


def apart(part: str, folder: str, *arguments: Any) -> Any:
    """Runs one measurement in a process of its own, in an empty folder that is removed after it."""
    inside = tempfile.mkdtemp(dir=folder)
    needs_folder = part not in ("by_place", "by_order")
    given = [inside, *arguments] if needs_folder else list(arguments)
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--part", part, json.dumps(given)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{part}{arguments} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def measure(plan: dict[str, Any], folder: str, say: Callable[[str], None]) -> dict[str, list[Row]]:
    """All of it: rows by part, in the order of the titles."""
    cores = len(os.sched_getaffinity(0))
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= cores]
    asked: dict[str, list[tuple[Any, ...]]] = {
        "by_cores": [(n, side, plan["photos"]) for side in plan["sides"] for n in counts],
        "by_kind": [(plan["sides"][0], plan["kept"])],
        "by_size": [(plan["sizes"], plan["images"])],
        "by_place": [(1_000_000,)],
        "by_order": [(examples,) for examples in plan["orders"]],
        "by_reading": [(plan["large_shards"], plan["large_batches"])],
    }
    found: dict[str, list[Row]] = {}
    for part in TITLES:
        for arguments in asked[part]:
            seconds, rows = _timed(lambda p=part, a=arguments: apart(p, folder, *a))
            found.setdefault(part, []).extend(rows if isinstance(rows, list) else [rows])
            say(f"{part}{arguments}: {seconds:.0f} s")
    return found


def cell(value: Any) -> str:
    """Three digits that count; whole numbers whole."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(result: dict[str, Any]) -> str:
    """All tables with their titles, and what made them."""
    parts = [f"**{title}**\n\n{table(result['rows'][part])}" for part, title in TITLES.items()]
    return "\n".join([*parts, f"`{result['command']}`; {result['machine']}.\n"])


def machine() -> str:
    """Processor, cores, versions."""
    installed = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    tensorflow = next((installed[name] for name in ("tensorflow", "tensorflow-tpu") if name in installed), "?")
    with open("/proc/cpuinfo") as file:
        name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0))
    return f"{name}, {cores} cores, TensorFlow {tensorflow}, NumPy {np.__version__}, Python {platform.python_version()}"


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sets, to see that it works")
    parser.add_argument("--out", type=pathlib.Path, help="folder for results.json and table.md")
    parser.add_argument("--folder", help="where sets are generated, and removed; empty: the temporary folder")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        print(json.dumps(PARTS[asked.part[0]](*json.loads(asked.part[1]))))
        return 0
    root = pathlib.Path(__file__).resolve().parent
    out = asked.out or (root.parent / "build" / "data_path-quick" if asked.quick else root / "data_path")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="funmatch-data-path-") as folder:
        rows = measure(QUICK if asked.quick else FULL, folder, lambda text: print(text, file=sys.stderr, flush=True))
    command = "python benchmarks/data_path.py" + (" --quick" if asked.quick else "")
    result = {"command": command, "machine": machine(), "rows": rows}
    (out / "results.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (out / "table.md").write_text(markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
