"""What answers show about a classifier, against SciPy and worked examples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trainer.run import teacher_statistics as statistics

NAMES = tuple(sorted(str(number) for number in range(1, 13)))  # 1, 10, 11, 12, 2, ...


def answers(labels: np.ndarray, classes: int, accuracy: float, seed: int = 0) -> np.ndarray:
    """Answers of which this share is right."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(len(labels)) >= accuracy
    return np.where(wrong, (labels + rng.integers(1, classes, len(labels))) % classes, labels)


@pytest.mark.parametrize(("correct", "images"), [(0, 10), (105, 120), (50, 50), (3, 15), (250, 512)])
def test_the_interval_is_wilsons(correct: int, images: int) -> None:
    expected = stats.binomtest(correct, images).proportion_ci(0.95, "wilson")
    assert statistics.wilson(correct, images) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(("successes", "trials", "share"), [(0, 5, 0.2), (5, 5, 0.2), (8, 50, 0.1), (60, 512, 0.1)])
def test_the_tail_is_the_binomials(successes: int, trials: int, share: float) -> None:
    expected = stats.binomtest(successes, trials, share, alternative="greater").pvalue
    assert statistics.binomial_tail(successes, trials, share) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("only_one", "only_other"), [(0, 0), (6, 0), (12, 3), (3, 12), (7, 7)])
def test_paired_classifiers_are_compared_by_mcnemars_exact_test(only_one: int, only_other: int) -> None:
    one = np.repeat([True, False, True], [only_one, only_other, 20])
    other = np.repeat([False, True, True], [only_one, only_other, 20])
    expected = stats.binomtest(only_one, only_one + only_other).pvalue if only_one + only_other else 1.0
    assert statistics.mcnemar(one, other) == pytest.approx(expected)


def test_a_winner_must_beat_each_other_setting_clearly() -> None:
    right, half = np.ones(40, bool), np.arange(40) % 2 == 0
    assert statistics.clear_winner({"a": half, "b": right, "c": ~half}) == "b"
    assert statistics.clear_winner({"a": half, "b": right, "c": right.copy()}) == ""
    nearly = right.copy()
    nearly[:5] = False  # 5 images: p = 0.06
    assert statistics.clear_winner({"a": nearly, "b": right}) == ""


def test_chance_is_that_of_the_commonest_class() -> None:
    labels = np.repeat([0, 1], [45, 5])
    accuracy = statistics.Accuracy.of(labels == 0, labels, 10)
    assert accuracy.chance == pytest.approx(0.9)
    assert not accuracy.above_chance  # 90 % right, by answering one class
    assert str(accuracy) == "90.0% of 50 images (95% interval 78.6 to 95.7); chance 90.0%"
    even = statistics.Accuracy.of(np.arange(50) < 40, np.arange(50) % 5, 5)
    assert even.chance == pytest.approx(0.2)
    assert even.above_chance


def test_a_random_classifier_is_rarely_above_chance() -> None:
    """At most in 5 % of cases, by construction."""
    rng = np.random.default_rng(0)
    cases = [statistics.Accuracy(int(rng.binomial(50, 0.1)), 50, 0.1).above_chance for _ in range(2000)]
    assert np.mean(cases) <= 0.05


def test_ties_and_values_that_are_not_finite_are_wrong() -> None:
    logits = np.array([[1, 0], [1, 1], [np.nan, 0], [0, 1]], np.float32)
    assert statistics.right(logits, np.array([0, 0, 1, 1])).tolist() == [True, False, False, True]


def test_constant_and_uniform_outputs() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 6)).astype(np.float32)
    assert not statistics.is_constant(logits)
    assert statistics.is_constant(np.repeat(logits[:1], 20, axis=0))
    assert statistics.is_constant(np.zeros((20, 6), np.float32))
    assert not statistics.is_constant(logits[:1])  # one image shows nothing
    assert not statistics.is_uniform(logits)
    assert statistics.is_uniform(1e-3 * logits)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("natural", sorted(NAMES, key=int)),
        ("reversed", NAMES[::-1]),
        ("one later", [NAMES[-1], *NAMES[:-1]]),
        ("one earlier", [*NAMES[1:], NAMES[0]]),
    ],
)
def test_a_known_order_is_named(name: str, order: list[str]) -> None:
    """A teacher that is right on 80 % of the images, with its outputs in `order`."""
    labels = np.arange(96) % 12
    outputs = np.array([order.index(NAMES[label]) for label in answers(labels, 12, 0.8)])
    found = statistics.better_order(outputs, labels, NAMES)
    assert found is not None
    assert found.name == name
    assert [NAMES[label] for label in found.classes] == list(order)
    assert found.share == pytest.approx(0.8, abs=0.1)
    assert found.share_now < 0.3


def test_text_order_is_named_for_data_in_natural_order() -> None:
    natural = tuple(sorted(NAMES, key=int))
    labels = np.arange(48) % 12
    outputs = np.array([NAMES.index(natural[label]) for label in labels])
    found = statistics.better_order(outputs, labels, natural)
    assert found is not None
    assert (found.name, found.share) == ("text", 1.0)


def test_any_other_order_is_found_on_one_half_and_tested_on_the_other() -> None:
    rng = np.random.default_rng(1)
    order = rng.permutation(12)
    labels = np.arange(96) % 12
    found = statistics.better_order(np.argsort(order)[answers(labels, 12, 0.9)], labels, NAMES)
    assert found is not None
    assert found.name == ""
    assert found.classes.tolist() == order.tolist()


def test_a_permutation_never_fits_random_answers() -> None:
    """Taken and tested on the same few images, the best permutation would always fit better."""
    for seed in range(200):
        labels = np.arange(48) % 12
        random = np.random.default_rng(seed).integers(0, 12, 48)
        assert statistics.better_order(random, labels, NAMES) is None
    labels = np.arange(60) % 12
    assert statistics.better_order(answers(labels, 12, 0.6), labels, NAMES) is None


def test_classes_that_are_never_answered() -> None:
    labels = np.repeat([0, 1, 2, 3], [10, 10, 10, 2])
    assert statistics.never_answered(np.where(labels == 1, 0, labels % 3), labels, 5).tolist() == [1]


def test_two_swapped_classes_of_many_are_found() -> None:
    """They are 5 % of the images, of which the other 95 % say nothing about their order."""
    labels = np.arange(1000) % 40
    order = np.arange(40)
    order[[3, 17]] = 17, 3
    names = tuple(f"class {number:02}" for number in range(40))
    found = statistics.better_order(order[answers(labels, 40, 0.9)], labels, names)
    assert found is not None
    assert found.classes.tolist() == order.tolist()
    assert statistics.better_order(answers(labels, 40, 0.9), labels, names) is None


def test_images_of_one_class_say_nothing_about_an_order() -> None:
    labels = np.full(60, 2)
    assert statistics.better_order(np.zeros(60, np.int64), labels, NAMES) is None


def test_classes_without_a_right_answer() -> None:
    labels = np.arange(60) % 20
    swapped = np.where(labels < 2, 1 - labels, labels)
    assert statistics.never_right(swapped, labels, 20) == {0: 1, 1: 0}
    assert statistics.never_right(labels, labels, 20) == {}
    # One that is wrong half of the time may miss the three images of a class by chance.
    assert statistics.never_right(np.where(np.arange(60) % 20 < 10, 19, labels), labels, 20) == {}
