"""Which examples make batch t: a function of (seed, position), with nothing to save."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from trainer.core.errors import ConfigError, DataError

_CYCLE = 10_000  # rows over which sets are mixed in exact shares
_PATTERN = 0xFFFFFFFF  # the stream that says which set a row is from


def permutation(seed: int, epoch: int, examples: int, stream: int = 0) -> np.ndarray:
    """The order of epoch `epoch`: int32 [examples], each id once.

    Sorting Philox's raw 64-bit stream, because NumPy promises that stream for ever and does not promise
    `Generator.permutation`'s.

    Args:
        seed: 0 to 2^31 - 1.
        epoch: from 0.
        examples: below 2^31.
        stream: 0 to 2^32 - 1, one for each set that has epochs of its own.
    """
    raw = np.random.Philox(key=[seed + (stream << 32), epoch]).random_raw(examples)
    return np.argsort(raw, kind="stable").astype(np.int32)


class _Epochs:
    """Permutations of one stream, one after the other without a seam; those in use are kept."""

    def __init__(self, seed: int, examples: int, stream: int) -> None:
        self._seed, self._examples, self._stream = seed, examples, stream
        self._kept: dict[int, np.ndarray] = {}

    def ids(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start], in time independent of `start`."""
        epochs = range(start // self._examples, -(-stop // self._examples))
        self._kept = {e: self._kept[e] if e in self._kept else self._make(e) for e in epochs}
        parts = [self._kept[e][max(0, start - e * self._examples) : max(0, stop - e * self._examples)] for e in epochs]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    def _make(self, epoch: int) -> np.ndarray:
        return permutation(self._seed, epoch, self._examples, self._stream)


class ExampleSampler:
    """Which example ids make batch t: epochs follow one another without a seam, each shows every example once.

    Of several sets, an id is a position in all of them, one after the other. Without weights they are one set. With weights,
    each set goes through epochs of its own, and each 10,000 rows, counted from the start of the run, hold every set in its
    exact share (to a ten-thousandth), in an order drawn anew. Which set a row is from is a function of (seed, step, row).
    """

    def __init__(
        self, seed: int, examples: int | Sequence[int], batch_size: int, weights: Sequence[float] = ()
    ) -> None:
        """
        Args:
            seed: 0 to 2^31 - 1.
            examples: of the set, or of each set.
            batch_size: rows of the global batch.
            weights: of each set, > 0, of any sum; none: the sets are one.

        Raises:
            ConfigError: a set would be in no row of 10,000.
            DataError: more examples than an int32 counts.
        """
        sets = [examples] if isinstance(examples, int) else list(examples)
        if sum(sets) >= 2**31:
            raise DataError(f"{sum(sets):,} examples; at most {2**31 - 1:,} can be trained on at once")
        self._batch, self._seed = batch_size, seed
        self._shares = np.array([_CYCLE])
        if len(sets) > 1 and weights:
            self._shares = _shares(weights)
        else:
            sets = [sum(sets)]
        self._starts = np.cumsum([0, *sets])[:-1]
        self._sets = [_Epochs(seed, size, number) for number, size in enumerate(sets)]

    def batches(self, first: int, count: int) -> np.ndarray:
        """Ids int32 [count, batch] of batches `first` .. `first + count - 1`, in time independent of `first`."""
        start, stop = first * self._batch, (first + count) * self._batch
        if len(self._sets) == 1:
            return self._sets[0].ids(start, stop).reshape(count, self._batch)
        cycles = range(start // _CYCLE, -(-stop // _CYCLE))
        which = np.concatenate([self._pattern(cycle) for cycle in cycles])
        skip = start - cycles[0] * _CYCLE
        before, which = which[:skip], which[skip : skip + stop - start]
        found = np.empty(stop - start, np.int32)
        for number, epochs in enumerate(self._sets):
            own = which == number
            seen = cycles[0] * int(self._shares[number]) + int((before == number).sum())
            found[own] = epochs.ids(seen, seen + int(own.sum())) + self._starts[number]
        return found.reshape(count, self._batch)

    def _pattern(self, cycle: int) -> np.ndarray:
        """The set of each row of a cycle."""
        rows = np.repeat(np.arange(len(self._shares)), self._shares)
        return rows[permutation(self._seed, cycle, _CYCLE, _PATTERN)]


def _shares(weights: Sequence[float]) -> np.ndarray:
    """Rows of each set in a cycle: weights rounded so that they sum to it, the largest remainders up."""
    exact = [Fraction(weight) * _CYCLE / sum(map(Fraction, weights)) for weight in weights]
    shares = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda k: shares[k] - exact[k])
    for k in by_rest[: _CYCLE - sum(shares)]:
        shares[k] += 1
    if min(shares) < 1:
        raise ConfigError(f"--data_weights={','.join(map(str, weights))}: a share below 1 in {_CYCLE:,} is no share")
    return np.array(shares)
