"""Finds images that occur more than once in a data set, from the hashes of their pixels.

An image of `train` that is also in `test` makes the result of an evaluation better than it is; one
image under two labels teaches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

UNUSABLE = -2  # in place of the label of an image that cannot be used


class SplitImages(NamedTuple):
    """What is known about the images of a split, in the order of its source.

    Attributes:
        name: of the split.
        labels: int32 [n], class number, -1: none, `UNUSABLE`: left out.
        digests: uint64 [n], equal for equal images; 0: not known.
    """

    name: str
    labels: np.ndarray
    digests: np.ndarray

    @property
    def usable(self) -> int:
        """Number of images that can be used."""
        return int((self.labels != UNUSABLE).sum())


class Duplicates(NamedTuple):
    """Images that occur more than once.

    Attributes:
        counts: number of images of a split (first key) that are also in one before it, or repeat
            others of the same split (second key).
        notes: what the user should know, each a line.
        warnings: what spoils training or evaluation, each a line.
    """

    counts: dict[str, dict[str, int]]
    notes: list[str]
    warnings: list[str]


def find_duplicates(
    splits: Sequence[SplitImages], classes: Sequence[str], image_name: Callable[[str, int], str]
) -> Duplicates:
    """Compares all images with each other.

    Args:
        splits: in their order; an image is reported in the later one.
        classes: class names.
        image_name: names image i of a split; called for the few images that are reported.
    """
    found = Duplicates({}, [], [])
    for position, split in enumerate(splits):
        for other in splits[:position]:
            _across(split, other, image_name, found)
        _within(split, classes, image_name, found)
    return found


def _across(split: SplitImages, other: SplitImages, image_name: Callable[[str, int], str], found: Duplicates) -> None:
    """Adds the images of `split` that are also in `other` to `found`."""
    known = np.flatnonzero(other.digests)
    digests, first = np.unique(other.digests[known], return_index=True)
    if not len(digests):
        return
    at = np.minimum(np.searchsorted(digests, split.digests), len(digests) - 1)
    repeated = np.flatnonzero((digests[at] == split.digests) & (split.digests != 0))
    if not len(repeated):
        return
    originals = known[first[at[repeated]]]
    labels = split.labels[repeated], other.labels[originals]
    conflicts = int(((labels[0] != labels[1]) & (labels[0] >= 0) & (labels[1] >= 0)).sum())
    found.counts.setdefault(split.name, {})[other.name] = len(repeated)
    example = f"{image_name(split.name, int(repeated[0]))} = {image_name(other.name, int(originals[0]))}"
    other_label = f", {conflicts:,} of them with another label" if conflicts else ""
    found.warnings.append(
        f"{len(repeated):,} of {split.usable:,} images of {split.name} {'is' if len(repeated) == 1 else 'are'} also in "
        f"{other.name}, with the same pixels{other_label} (first: {example}): remove them from one of the two"
    )


def _within(
    split: SplitImages, classes: Sequence[str], image_name: Callable[[str, int], str], found: Duplicates
) -> None:
    """Adds the images that `split` holds more than once to `found`."""
    known = np.flatnonzero(split.digests)
    _, group, sizes = np.unique(split.digests[known], return_inverse=True, return_counts=True)
    if not (repeats := len(known) - len(sizes)):
        return
    found.counts.setdefault(split.name, {})[split.name] = repeats
    labels = split.labels[known]
    lowest, highest = np.full(len(sizes), np.iinfo(np.int32).max), np.full(len(sizes), -1)
    np.minimum.at(lowest, group[labels >= 0], labels[labels >= 0])
    np.maximum.at(highest, group[labels >= 0], labels[labels >= 0])
    members = np.flatnonzero((lowest < highest)[group] & (labels >= 0))
    if len(members):
        first = members[0]
        second = members[(group[members] == group[first]) & (labels[members] != labels[first])][0]
        example = " and ".join(
            f"{image_name(split.name, int(known[i]))} ({classes[labels[i]]})" for i in (first, second)
        )
        found.warnings.append(
            f"{len(members):,} images of {split.name} have the same pixels as others and another label (first: {example}): "
            "correct the labels, or remove the images"
        )
    found.notes.append(
        f"{repeats:,} of {split.usable:,} images of {split.name} {'has' if repeats == 1 else 'have'} the same pixels as "
        "others"
    )
