"""A data set of 100 GB on disk takes a bounded amount of memory."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
from conftest import ROOT

GROWTH = 200 << 20  # bytes: index and order of 800,000 records, and the images being decoded

# One shard of 500 records of 131 kB (small JPEGs with long comments), hard-linked under 1,600
# names.
PROGRAM = """
import io, os, resource, sys
import numpy as np
from PIL import Image
from trainer.data import records
from trainer.data.cache import Cache
from trainer.data.dataset import Dataset, Shard, Split
from trainer.data.order import ExampleSampler
from trainer.data.records import ImageRecord
from trainer.data.store import DiskStore

folder = sys.argv[1]

def image(number):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, "JPEG")
    comment = b"\\xff\\xfe\\xff\\xff" + np.random.default_rng(number).bytes(65533)
    return ImageRecord(buffer.getvalue()[:2] + 2 * comment + buffer.getvalue()[2:], 16, 16, 0, "")

shard = records.write_shard(folder, "0", map(image, range(500)))
names = [str(number) for number in range(1600)]
for name in names[1:]:
    os.link(os.path.join(folder, "0"), os.path.join(folder, name))
split = Split("train", tuple(Shard(name, shard.examples, shard.bytes, shard.crc32c) for name in names))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def read(dataset, split, batches):
    store = DiskStore(dataset, split, 32, Cache(os.path.join(folder, "cache")), lambda *_: None)
    sampler = ExampleSampler(0, len(store), 64)
    seen = set()
    for step in range(batches):
        ids = sampler.batches(step, 1)[0]
        seen |= set((ids // 500).tolist())
        assert store.take(ids).shape == (64, 32, 32, 3)
    return len(store), len(seen)

small = Split("train", split.shards[:1])
read(Dataset(folder, "t", ("a",), {"train": small}, {}), small, 20)
before = peak()
counts = read(Dataset(folder, "t", ("a",), {"train": split}, {}), split, 300)
print(sum(s.bytes for s in split.shards), *counts, peak() - before)
"""


@pytest.mark.slow
def test_memory_stays_bounded_over_a_set_of_100_gb(tmp_path: pathlib.Path) -> None:
    """300 batches over all shards: peak memory grows by at most 1/500 of the data set's size."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    size, examples, shards, growth = map(int, done.stdout.split())
    assert size > 100e9
    assert (examples, shards) == (800_000, 1600)
    assert growth < GROWTH, f"{growth / 2**20:.0f} MiB"
