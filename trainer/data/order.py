"""The order of examples: batch t is a function of (seed, t), so there is no state to save."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from trainer.core.errors import ConfigError, DataError

_CYCLE = 10_000  # rows in which every data set has exactly its share
_MIXING_STREAM = 0xFFFFFFFF  # random stream that assigns rows to data sets


def permutation(seed: int, epoch: int, examples: int, stream: int = 0) -> np.ndarray:
    """Returns the example ids of one epoch in their order.

    Sorts Philox's raw 64-bit stream, because NumPy guarantees that stream across versions and does
    not guarantee `Generator.permutation`.

    Args:
        seed: 0 to 2^31 - 1.
        epoch: >= 0.
        examples: number of examples, below 2^31.
        stream: 0 to 2^32 - 1, a different one for each data set with its own epochs.

    Returns:
        int32 [examples], each id in 0 .. examples - 1 once.
    """
    raw = np.random.Philox(key=[seed + (stream << 32), epoch]).random_raw(examples)
    return np.argsort(raw, kind="stable").astype(np.int32)


class _EpochStream:
    """Consecutive epochs of one data set as one long sequence of ids.

    Caches the permutations of the last request.
    """

    def __init__(self, seed: int, examples: int, stream: int) -> None:
        self._seed, self._examples, self._stream = seed, examples, stream
        self._cache: dict[int, np.ndarray] = {}

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Returns ids [start, stop) of the sequence: int32 [stop - start].

        Takes time independent of `start`.
        """
        epochs = range(start // self._examples, -(-stop // self._examples))
        self._cache = {
            e: self._cache[e] if e in self._cache else permutation(self._seed, e, self._examples, self._stream)
            for e in epochs
        }
        parts = [self._cache[e][max(0, start - e * self._examples) : max(0, stop - e * self._examples)] for e in epochs]
        return np.concatenate([np.zeros(0, np.int32), *parts])


class ExampleSampler:
    """Samples the example ids of batch t.

    Each epoch holds every example once; batches may span two epochs.

    With several data sets, an id is an index into their concatenation. Without weights they are
    sampled as one set. With weights, each set has its own epochs, and every 10,000 rows from the
    start of the run hold each set in its exact share (rounded to 1/10,000), in a newly drawn
    order. The data set of a row is a function of (seed, step, row).
    """

    def __init__(
        self, seed: int, examples: int | Sequence[int], batch_size: int, weights: Sequence[float] = ()
    ) -> None:
        """
        Args:
            seed: 0 to 2^31 - 1.
            examples: number of examples of the data set, or of each data set.
            batch_size: rows of the global batch.
            weights: relative weight of each data set, > 0; empty: all sets are sampled as one.

        Raises:
            ConfigError: a data set would have no row in 10,000.
            DataError: more examples than int32 ids can address.
        """
        sizes = [examples] if isinstance(examples, int) else list(examples)
        if sum(sizes) >= 2**31:
            raise DataError(f"{sum(sizes):,} examples; at most {2**31 - 1:,} can be trained on at once")
        self._batch_size, self._seed = batch_size, seed
        self._rows_per_cycle = np.array([_CYCLE])
        if len(sizes) > 1 and weights:
            self._rows_per_cycle = rows_per_cycle(weights)
        else:
            sizes = [sum(sizes)]
        self._starts = np.cumsum([0, *sizes])[:-1]
        self._streams = [_EpochStream(seed, size, number) for number, size in enumerate(sizes)]

    def batches(self, first: int, count: int) -> np.ndarray:
        """Returns the ids of batches `first` .. `first + count - 1`: int32 [count, batch_size].

        Takes time independent of `first`.
        """
        start, stop = first * self._batch_size, (first + count) * self._batch_size
        if len(self._streams) == 1:
            return self._streams[0].ids(start, stop).reshape(count, self._batch_size)
        cycles = range(start // _CYCLE, -(-stop // _CYCLE))
        set_of_row = np.concatenate([self._sets_in_cycle(cycle) for cycle in cycles])
        skip = start - cycles[0] * _CYCLE
        before, set_of_row = set_of_row[:skip], set_of_row[skip : skip + stop - start]
        ids = np.empty(stop - start, np.int32)
        for number, stream in enumerate(self._streams):
            rows = set_of_row == number
            seen = cycles[0] * int(self._rows_per_cycle[number]) + int((before == number).sum())
            ids[rows] = stream.ids(seen, seen + int(rows.sum())) + self._starts[number]
        return ids.reshape(count, self._batch_size)

    def _sets_in_cycle(self, cycle: int) -> np.ndarray:
        """Returns the data set of each row of a cycle: int [10,000]."""
        sets = np.repeat(np.arange(len(self._rows_per_cycle)), self._rows_per_cycle)
        return sets[permutation(self._seed, cycle, _CYCLE, _MIXING_STREAM)]


def rows_per_cycle(weights: Sequence[float]) -> np.ndarray:
    """Returns the rows of each data set in 10,000: int [sets], rounded by largest remainder.

    Raises:
        ConfigError: a data set would have none.
    """
    exact = [Fraction(weight) * _CYCLE / sum(map(Fraction, weights)) for weight in weights]
    rows = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: rows[k] - exact[k])
    for k in by_remainder[: _CYCLE - sum(rows)]:
        rows[k] += 1
    if min(rows) < 1:
        raise ConfigError(
            f"--data_weights={','.join(map(str, weights))}: a data set has less than 1 row in {_CYCLE:,}; "
            "give it a larger weight or leave it out of --data"
        )
    return np.array(rows)
