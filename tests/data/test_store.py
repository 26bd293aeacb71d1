"""The order of examples, and images decoded into memory."""

from __future__ import annotations

import io
import itertools
import pathlib
import pickle

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy import stats

from trainer.core.errors import ConfigError, DataError
from trainer.data import order, records, store
from trainer.data.dataset import Dataset, Split
from trainer.data.records import ImageRecord


@pytest.mark.parametrize(("examples", "batch"), [(10, 3), (10, 10), (7, 20), (1, 4), (64, 8)])
def test_every_epoch_shows_every_example_once(examples: int, batch: int) -> None:
    count = 3 * examples
    ids = order.ExampleSampler(5, examples, batch).batches(0, count).ravel()
    for epoch in range(len(ids) // examples):
        assert sorted(ids[epoch * examples : (epoch + 1) * examples]) == list(range(examples))


@pytest.mark.parametrize(("examples", "batch"), [(10, 3), (7, 20)])
def test_batch_t_is_the_same_however_it_is_reached(examples: int, batch: int) -> None:
    whole = order.ExampleSampler(1, examples, batch).batches(0, 30)
    for first in range(30):
        assert (order.ExampleSampler(1, examples, batch).batches(first, 30 - first) == whole[first:]).all()
    stepwise = order.ExampleSampler(1, examples, batch)
    assert all((stepwise.batches(t, 1)[0] == whole[t]).all() for t in range(30))


def test_a_far_batch_needs_only_its_own_epochs() -> None:
    sampler = order.ExampleSampler(0, 1020, 512)
    first = 1_992_187 * 512
    epochs = range(first // 1020, (first + 512) // 1020 + 1)
    ids = np.concatenate([order.permutation(0, epoch, 1020) for epoch in epochs])[first % 1020 :]
    assert (sampler.batches(1_992_187, 1) == ids[:512]).all()
    fresh = len(pickle.dumps(sampler))
    for t in range(1000):
        sampler.batches(t, 1)
    assert len(pickle.dumps(sampler)) < fresh + 2 * 1020 * 4  # at most two epochs are cached


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(order.permutation(seed, epoch, 50)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


def test_order_is_pinned_for_ever() -> None:
    """A run that started under another version of NumPy resumes with the same order."""
    assert order.permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_permutations_are_uniform() -> None:
    """Chi-square over all 24 orders of four, and over the position of each of 20 examples."""
    orders: dict[tuple, int] = {}
    for epoch in range(4800):
        key = tuple(order.permutation(3, epoch, 4).tolist())
        orders[key] = orders.get(key, 0) + 1
    assert len(orders) == 24
    assert stats.chisquare(list(orders.values())).pvalue > 1e-4
    places = np.array([order.permutation(7, epoch, 20) for epoch in range(4000)])
    for example in range(20):
        counts = np.bincount(np.argmax(places == example, axis=1), minlength=20)
        assert stats.chisquare(counts).pvalue > 1e-5


def png(height: int, width: int, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


def make(folder: pathlib.Path, images: list[ImageRecord]) -> tuple[Dataset, Split]:
    split = Split("train", (records.write_shard(str(folder), "s", images),))
    return Dataset(str(folder), "t", ("a", "b"), {"train": split}, {}), split


def test_images_are_squashed_and_sizes_remembered(tmp_path: pathlib.Path) -> None:
    shapes = [(8, 8), (20, 9), (5, 40)]
    images = [ImageRecord(png(h, w, i), h, w, i % 2, "") for i, (h, w) in enumerate(shapes)]
    memory = store.MemoryStore(*make(tmp_path, images), 8, quiet)
    assert memory.images.shape == (3, 8, 8, 3)
    assert memory.sizes.tolist() == [list(map(float, s)) for s in shapes]
    assert memory.labels.tolist() == [0, 1, 0]
    # The first needs no resizing, so it is kept to the bit.
    assert (memory.images[0] == tf.io.decode_png(images[0].encoded, 3).numpy()).all()
    expected = np.asarray(Image.open(io.BytesIO(images[1].encoded)).resize((8, 8), Image.Resampling.BILINEAR))
    assert np.abs(memory.images[1].astype(int) - expected).max() <= 2


def test_undecodable_image_is_named(tmp_path: pathlib.Path) -> None:
    images = [ImageRecord(png(4, 4), 4, 4), ImageRecord(b"no image", 4, 4, 0, "bad.jpg")]
    with pytest.raises(
        DataError, match=r"s: record 1 at byte \d+ is unusable: not a JPEG, PNG, GIF or BMP \(bad.jpg\)"
    ):
        store.MemoryStore(*make(tmp_path, images), 8, quiet)


def test_more_than_memory_is_refused_with_sizes(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"needs .* GiB decoded"):
        store.MemoryStore(*make(tmp_path, [ImageRecord(png(4, 4), 4, 4)] * 3), 1 << 20, quiet)


SETS = {
    "one": (17, ()),
    "two as one": ((10, 7), ()),
    "two by weight": ((10, 7), (0.7, 0.3)),
    "three by weight": ((3, 40, 11), (1.0, 2.0, 0.5)),
}


@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("batch", [4, 17, 5])
def test_restored_at_every_batch_of_two_epochs_the_rest_is_the_same(sets: str, batch: int) -> None:
    """As Grain tests its iterators, with batch sizes that do and do not divide the epoch."""
    examples, weights = SETS[sets]
    count = -(-2 * int(np.sum(examples)) // batch) + 1
    whole = order.ExampleSampler(1, examples, batch, weights).batches(0, count)
    for first in range(count):
        restored = order.ExampleSampler(1, examples, batch, weights)
        assert (restored.batches(first, count - first) == whole[first:]).all()
        stepwise = order.ExampleSampler(1, examples, batch, weights)
        assert (stepwise.batches(first, 1)[0] == whole[first]).all()


@pytest.mark.parametrize("batch", [4, 7])
def test_each_set_goes_through_epochs_of_its_own(batch: int) -> None:
    """No repeats within an epoch, whatever the share, and another order in each epoch."""
    sizes, weights = (30, 30, 5), (0.6, 0.3, 0.1)
    ids = order.ExampleSampler(2, sizes, batch, weights).batches(0, 20_000 // batch).ravel()
    starts = np.cumsum([0, *sizes])
    orders = set()
    for number, size in enumerate(sizes):
        set_ids = ids[(ids >= starts[number]) & (ids < starts[number + 1])] - starts[number]
        assert len(set_ids) > 3 * size
        for epoch in range(len(set_ids) // size):
            part = set_ids[epoch * size : (epoch + 1) * size]
            assert sorted(part) == list(range(size))
            orders.add((size, *part[:5]))
    assert len(orders) > 300


def test_shares_are_exact_and_placed_at_random() -> None:
    weights, cycle = (0.7, 0.3), 10_000
    ids = order.ExampleSampler(0, (1000, 1000), 100, weights).batches(0, 3 * cycle // 100).ravel()
    second = (ids >= 1000).reshape(3, cycle)
    assert second.sum(axis=1).tolist() == [3000] * 3
    assert not (second[0] == second[1]).all()
    # Rows are independent: the four kinds of neighbouring pairs occur as often as by chance.
    pairs = np.bincount(2 * second[:, :-1].ravel() + second[:, 1:].ravel(), minlength=4)
    chance = np.outer([0.7, 0.3], [0.7, 0.3]).ravel() * pairs.sum()
    assert stats.chisquare(pairs, chance).pvalue > 1e-4


def test_sets_without_weights_are_one() -> None:
    several, one = order.ExampleSampler(4, (9, 4, 7), 6), order.ExampleSampler(4, 20, 6)
    assert (several.batches(0, 40) == one.batches(0, 40)).all()


def test_a_share_of_no_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--data_weights=1,1e-06: a data set has less than 1 row in 10,000"):
        order.ExampleSampler(0, (5, 5), 2, (1, 1e-6))
    assert order.rows_per_cycle((1, 1, 1)).sum() == 10_000
    with pytest.raises(DataError, match="at once"):
        order.ExampleSampler(0, (2**30, 2**30), 2)


def test_neighbours_are_independent_and_places_uniform() -> None:
    """Over 400 epochs of 60 examples. Mixup blends neighbouring rows."""
    size, epochs = 60, 400
    ids = order.ExampleSampler(9, size, size).batches(0, epochs)
    after = np.zeros((size, size))
    np.add.at(after, (ids[:, :-1].ravel(), ids[:, 1:].ravel()), 1)
    follows = after[~np.eye(size, dtype=bool)]
    assert stats.chisquare(follows).pvalue > 1e-4
    places = np.zeros((size, size))
    np.add.at(places, (np.arange(size)[None, :].repeat(epochs, 0), ids), 1)
    assert stats.chisquare(places.ravel()).pvalue > 1e-4
    # Consecutive epochs are uncorrelated.
    ranks = np.argsort(ids, axis=1)
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in itertools.pairwise(ranks)]
    assert abs(np.mean(correlations)) < 4 / np.sqrt(size * epochs)
