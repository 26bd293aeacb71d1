"""The order of examples, and images in memory."""

from __future__ import annotations

import io
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy import stats

from trainer import records, store
from trainer.errors import DataError
from trainer.records import Dataset, Picture, Split


@pytest.mark.parametrize(("examples", "batch"), [(10, 3), (10, 10), (7, 20), (1, 4), (64, 8)])
def test_every_epoch_shows_every_example_once(examples: int, batch: int) -> None:
    count = 3 * examples
    ids = store.Order(5, examples, batch).batches(0, count).ravel()
    for epoch in range(len(ids) // examples):
        assert sorted(ids[epoch * examples : (epoch + 1) * examples]) == list(range(examples))


@pytest.mark.parametrize(("examples", "batch"), [(10, 3), (7, 20)])
def test_batch_t_is_the_same_however_it_is_reached(examples: int, batch: int) -> None:
    whole = store.Order(1, examples, batch).batches(0, 30)
    for first in range(30):
        assert (store.Order(1, examples, batch).batches(first, 30 - first) == whole[first:]).all()
    stepwise = store.Order(1, examples, batch)
    assert all((stepwise.batches(t, 1)[0] == whole[t]).all() for t in range(30))


def test_far_batches_are_near() -> None:
    order = store.Order(0, 1020, 512)
    assert order.batches(1_992_187, 1).shape == (1, 512)
    assert len(order._epochs) <= 2


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(store.permutation(seed, epoch, 50)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


def test_order_is_pinned_for_ever() -> None:
    """A run that started under another version of NumPy goes on with the same pictures."""
    assert store.permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_permutations_are_uniform() -> None:
    """Chi-square over all 24 orders of four, and over the place of each of 20 examples."""
    orders: dict[tuple, int] = {}
    for epoch in range(4800):
        key = tuple(store.permutation(3, epoch, 4).tolist())
        orders[key] = orders.get(key, 0) + 1
    assert len(orders) == 24
    assert stats.chisquare(list(orders.values())).pvalue > 1e-4
    places = np.array([store.permutation(7, epoch, 20) for epoch in range(4000)])
    for example in range(20):
        counts = np.bincount(np.argmax(places == example, axis=1), minlength=20)
        assert stats.chisquare(counts).pvalue > 1e-5


def jpeg(height: int, width: int, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


def make(folder: pathlib.Path, pictures: list[Picture]) -> tuple[Dataset, Split]:
    split = Split("train", (records.write_shard(str(folder), "s", pictures),))
    return Dataset(str(folder), "t", ("a", "b"), {"train": split}, {}), split


def test_images_are_squashed_and_sizes_remembered(tmp_path: pathlib.Path) -> None:
    shapes = [(8, 8), (20, 9), (5, 40)]
    pictures = [Picture(jpeg(h, w, i), h, w, i % 2, "") for i, (h, w) in enumerate(shapes)]
    held = store.MemoryStore(*make(tmp_path, pictures), 8, quiet)
    assert held.images.shape == (3, 8, 8, 3)
    assert held.sizes.tolist() == [list(map(float, s)) for s in shapes]
    assert held.labels.tolist() == [0, 1, 0]
    # The first needs no resizing, so it is kept to the bit.
    assert (held.images[0] == tf.io.decode_png(pictures[0].encoded, 3).numpy()).all()
    expected = np.asarray(Image.open(io.BytesIO(pictures[1].encoded)).resize((8, 8), Image.Resampling.BILINEAR))
    assert np.abs(held.images[1].astype(int) - expected).max() <= 2


def test_undecodable_image_is_named(tmp_path: pathlib.Path) -> None:
    pictures = [Picture(jpeg(4, 4), 4, 4), Picture(b"no picture", 4, 4, 0, "bad.jpg")]
    with pytest.raises(DataError, match=r"s: record 1 at byte \d+ is unusable: no JPEG, PNG, GIF or BMP \(bad.jpg\)"):
        store.MemoryStore(*make(tmp_path, pictures), 8, quiet)


def test_more_than_memory_is_refused_with_sizes(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"needs .* GiB decoded"):
        store.MemoryStore(*make(tmp_path, [Picture(jpeg(4, 4), 4, 4)] * 3), 1 << 20, quiet)
