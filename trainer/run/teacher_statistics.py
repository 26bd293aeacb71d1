"""What answers on labelled images show about a classifier, and how sure it is. NumPy only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from trainer.core.natural_order import natural_key

_Z95 = 1.959964
_CLEAR = 0.01  # p-value below which one of several settings is clearly the best
_ORDER = 0.001  # p-value below which another order of the classes fits better
_MIN_OF_CLASS = 5  # images of a class, below which it may be missed by chance


def wilson(correct: int, images: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score; `images` >= 1."""
    share, square = correct / images, _Z95**2
    centre = (share + square / (2 * images)) / (1 + square / images)
    half = _Z95 / (1 + square / images) * math.sqrt(share * (1 - share) / images + square / (4 * images**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def binomial_tail(successes: int, trials: int, probability: float) -> float:
    """The probability of at least this many successes.

    Args:
        successes: 0 .. `trials`.
        trials: >= 0.
        probability: of one success, in (0, 1).
    """
    if successes <= 0:
        return 1.0
    if not 0 < probability < 1:
        return float(probability >= 1)
    log_p, log_q = math.log(probability), math.log1p(-probability)
    terms = (
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * log_p + (trials - k) * log_q
        for k in range(successes, trials + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))


def mcnemar(one: np.ndarray, other: np.ndarray) -> float:
    """p-value (two-sided, exact) that two classifiers are equally often right.

    bool [n] each, on the same images.
    """
    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    return min(1.0, 2 * binomial_tail(max(only_one, only_other), only_one + only_other, 0.5))


def clear_winner(correct: Mapping[str, np.ndarray]) -> str:
    """The setting that is clearly the best: more often right than each other one, p < 0.01.

    Args:
        correct: for each setting bool [n], which images it gets right.

    Returns:
        Its name; empty if there is none.
    """
    best = max(correct, key=lambda name: correct[name].sum())
    clear = all(mcnemar(correct[best], other) < _CLEAR for name, other in correct.items() if name != best)
    return best if clear else ""


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Top-1 on labelled images.

    Attributes:
        correct: number of right answers.
        images: number of images, >= 1.
        chance: share of right answers without looking: that of the commonest class, and at least
            one of the number of classes.
    """

    correct: int
    images: int
    chance: float

    @classmethod
    def of(cls, correct: np.ndarray, labels: np.ndarray, classes: int) -> Accuracy:
        """From answers.

        Args:
            correct: bool [n], which are right.
            labels: int [n], >= 0.
            classes: number of them.
        """
        commonest = int(np.bincount(labels).max()) / len(labels)
        return cls(int(correct.sum()), len(labels), max(1.0 / classes, commonest))

    @property
    def share(self) -> float:
        """Of right answers, in [0, 1]."""
        return self.correct / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `share`."""
        return wilson(self.correct, self.images)

    @property
    def above_chance(self) -> bool:
        """Whether it is better than chance (one-sided, p < 0.05)."""
        return binomial_tail(self.correct, self.images, self.chance) < 0.05

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.share:.1%} of {self.images:,} images (95% interval {100 * low:.1f} to {100 * high:.1f}); "
            f"chance {self.chance:.1%}"
        )


def right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool [n]: logits float [n, classes] have one largest value, at the label, and are finite."""
    of_label = np.take_along_axis(logits, labels[:, None].astype(np.int64), axis=1)
    return np.isfinite(logits).all(axis=1) & ((logits >= of_label).sum(axis=1) == 1)


def is_constant(logits: np.ndarray) -> bool:
    """Whether finite logits [n, classes] of at least two images do not depend on the image."""
    return len(logits) > 1 and float(np.ptp(logits, axis=0).max()) <= 1e-6 * max(1e-30, float(np.abs(logits).max()))


def is_uniform(logits: np.ndarray) -> bool:
    """Whether the probabilities of finite logits [n, classes] are nearly 1 / classes everywhere."""
    return float(np.ptp(logits, axis=1).max()) < 1e-2


def mean_confidence(logits: np.ndarray) -> float:
    """The mean probability of the likeliest class, for finite logits [n, classes]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return float((1.0 / np.exp(shifted).sum(axis=1)).mean())


def never_answered(answers: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Classes with at least 5 images that no image gets.

    Args:
        answers: int [n], top-1.
        labels: int [n], >= 0.
        classes: number of them.
    """
    images, given = np.bincount(labels, minlength=classes), np.bincount(answers, minlength=classes)
    return np.flatnonzero((images >= _MIN_OF_CLASS) & (given[:classes] == 0))


def never_right(answers: np.ndarray, labels: np.ndarray, classes: int) -> dict[int, int]:
    """Classes of which no image gets the right answer, and the commonest answer instead.

    Only classes with at least 3 images, and so many that the classifier, as often right as on all
    images, misses all of them with a probability below 1 %.

    Args:
        answers: int [n], top-1.
        labels: int [n], >= 0.
        classes: number of them.
    """
    wrong = float((answers != labels).mean())
    images = np.bincount(labels, minlength=classes)
    right_of = np.bincount(labels[answers == labels], minlength=classes)
    found = np.flatnonzero((images >= 3) & (right_of == 0) & (wrong**images < _CLEAR))
    return {int(label): int(np.bincount(answers[labels == label]).argmax()) for label in found}


@dataclasses.dataclass(frozen=True)
class Order:
    """An order of the classes that fits the answers better than the data's.

    Attributes:
        name: "text", "natural", "reversed", "case-insensitive", "one later", "one earlier" (see
            `_known_orders`), or "" for one that was taken from half of the images.
        classes: for each output the class of the data that it means, int [classes].
        share: of right answers with it; of the other half of the images if `name` is empty.
        share_now: with the data's order, on the same images.
    """

    name: str
    classes: np.ndarray
    share: float
    share_now: float


def better_order(answers: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Order | None:
    """Another order of the classes that clearly fits the answers better, if there is one.

    Known orders are tried as they are. Any other permutation is taken from one half of the images
    of each class and tested on the other, so that it cannot fit by chance.

    Args:
        answers: int [n], top-1.
        labels: int [n], >= 0.
        names: of the classes, in the data's order.
    """
    if len(np.unique(labels)) < 2:  # images of one class say nothing about an order
        return None
    best: Order | None = None
    needed = min(0.5, 5.0 / len(names))
    for name, classes in _known_orders(names).items():
        found = _compare(name, classes, answers, labels, needed, 0.1)
        if found and (best is None or found.share > best.share):
            best = found
    if best is not None:
        return best
    # Every second image of each class.
    first = np.zeros(len(labels), bool)
    first[np.argsort(labels, kind="stable")[::2]] = True
    return _compare("", _assign(answers[first], labels[first], len(names)), answers[~first], labels[~first], 0.5, 0.2)


def _compare(
    name: str, classes: np.ndarray, answers: np.ndarray, labels: np.ndarray, share: float, gain: float
) -> Order | None:
    """An order, if it is clearly better on images of the classes that it moves.

    On others it changes nothing, so that two swapped classes of a thousand count as much as all.

    Args:
        name: of the order.
        classes: for each output the class that it means, int [classes].
        answers: int [n].
        labels: int [n].
        share: of right answers that it must reach on these images.
        gain: in that share that it must bring.
    """
    now, then = answers == labels, classes[answers] == labels
    moved = (classes != np.arange(len(classes)))[labels]
    if not moved.any() or mcnemar(now, then) >= _ORDER:
        return None
    if then[moved].mean() < max(share, now[moved].mean() + gain):
        return None
    return Order(name, classes, float(then.mean()), float(now.mean()))


def _known_orders(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Orders in which a teacher may have been trained; for each output the class of the data."""
    index = {name: number for number, name in enumerate(names)}
    numbers = np.arange(len(names))
    orders = {
        "text": np.array([index[name] for name in sorted(names)]),
        "natural": np.array([index[name] for name in sorted(names, key=natural_key)]),
        "case-insensitive": np.array([index[name] for name in sorted(names, key=str.casefold)]),
        "reversed": numbers[::-1],
        "one later": np.roll(numbers, 1),  # the teacher's first output is something else
        "one earlier": np.roll(numbers, -1),
    }
    return {name: order for name, order in orders.items() if not np.array_equal(order, numbers)}


def _assign(answers: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """A permutation, for each output its class, that makes many answers right.

    The largest counts of (output, class) come first; what is left stays in place where it can.
    """
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (answers, labels), 1)
    assigned, taken = np.full(classes, -1), np.zeros(classes, bool)
    cells = np.flatnonzero(counts)
    for cell in cells[np.argsort(-counts.ravel()[cells], kind="stable")]:
        output, label = divmod(int(cell), classes)
        if assigned[output] < 0 and not taken[label]:
            assigned[output], taken[label] = label, True
    in_place = (assigned < 0) & ~taken
    assigned[in_place] = np.flatnonzero(in_place)
    assigned[assigned < 0] = np.flatnonzero(~(taken | in_place))
    return assigned
