"""The share of training crops that stored squares blur."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from trainer.core.config import Config
from trainer.method import crops, fidelity

VIEW = 128
TALL = np.float32([[500, 667]])


def sample(sizes: np.ndarray = TALL, **changes: object) -> fidelity.CropSample:
    found = fidelity.sample_crops(Config(image_size=VIEW, **changes), sizes)  # type: ignore[arg-type]
    assert found is not None
    return found


def counted_share(height: int, width: int, side: int | None, min_area: float) -> float:
    """Crops with fewer than 128 pixels along an axis, in whole pixels of a stored copy.

    Of the original itself where `side` is None.
    """
    draws = np.random.default_rng(4).random((40_000, crops.DRAWS_PER_CROP - 1), np.float32)
    sizes = np.tile(np.float32([[height, width]]), (len(draws), 1))
    boxes = crops.inception_box(tf.constant(draws), tf.constant(sizes), min_area).numpy().astype(float)
    kept_height, kept_width = (height, width) if side is None else (side, side)
    return np.mean((np.round(boxes[:, 2] * kept_height, 3) < VIEW) | (np.round(boxes[:, 3] * kept_width, 3) < VIEW))


@pytest.mark.parametrize(("side", "share"), [(256, 0.55), (384, 0.25), (512, 0.10), (640, 0.02), (704, 0.0)])
def test_share_of_a_photograph_of_500_x_667(side: int, share: float) -> None:
    assert fidelity.blurred_share(sample(), side, VIEW) == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize(("height", "width"), [(500, 667), (2000, 900), (1024, 1024)])
@pytest.mark.parametrize("min_area", [0.05, 0.25])
def test_share_is_that_of_the_crops_of_training(height: int, width: int, min_area: float) -> None:
    drawn = sample(np.float32([[height, width]]), min_crop_area=min_area)
    for side in (256, 320, 448):
        expected = counted_share(height, width, side, min_area)
        assert fidelity.blurred_share(drawn, side, VIEW) == pytest.approx(expected, abs=0.02)


def test_negligible_is_the_share_of_small_crops_in_the_paper() -> None:
    assert counted_share(500, 667, None, 0.05) == pytest.approx(fidelity.NEGLIGIBLE, abs=0.005)


def test_originals_with_fewer_pixels_than_the_square_lose_nothing() -> None:
    assert fidelity.blurred_share(sample(np.float32([[200, 256]])), 256, VIEW) == 0
    # One axis of the two has more than was kept.
    wide = fidelity.blurred_share(sample(np.float32([[200, 300]])), 256, VIEW)
    assert 0.2 < wide < fidelity.blurred_share(sample(np.float32([[400, 600]])), 256, VIEW)


def test_sizes_count_equally() -> None:
    alone = fidelity.blurred_share(sample(), 256, VIEW)
    mixed = fidelity.blurred_share(sample(np.float32([[500, 667], [100, 100], [100, 100]])), 256, VIEW)
    assert mixed == pytest.approx(alone / 3, abs=0.015)
    many = np.repeat(np.float32([[500, 667], [100, 100]]), 20_000, axis=0)
    assert fidelity.blurred_share(sample(many), 256, VIEW) == pytest.approx(alone / 2, abs=0.015)


def test_views_without_small_crops_lose_nothing() -> None:
    for mode in ("fix/rs", "fix/cc", "ind/rc", "same/rc"):
        assert fidelity.blurred_share(sample(views=mode), 256, VIEW) == 0
    for mode in ("fix/ic_ens", "ind/ic", "same/ic", "mix"):
        assert fidelity.blurred_share(sample(views=mode), 256, VIEW) > 0.5


def test_recipes_that_crop_a_resized_square_have_no_share() -> None:
    for changes in ({"resize_size": 160}, {"compat": ("crop",)}, {"compat": ("keras_example",)}):
        assert fidelity.sample_crops(Config(image_size=VIEW, **changes), TALL) is None  # type: ignore[arg-type]
    assert fidelity.sample_crops(Config(image_size=VIEW), TALL[:0]) is None


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ((500, 667), [256, 320, 384, 448, 512, 576, 640]),
        ((500, 375), [256, 320, 384, 448, 512]),
        ((200, 256), [256]),
        ((3000, 4000), [256, 320, 384, 448, 512, 576, 640]),
    ],
)
def test_useful_sides_end_where_the_original_or_the_crops_do(size: tuple[int, int], sides: list[int]) -> None:
    assert list(fidelity.useful_sides(sample(np.float32([size])), 256, VIEW)) == sides
