"""Views: random bits against the published vectors, crops against TensorFlow's sampler, pixels against its resize."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from trainer import views


def words(*values: int) -> tuple[tf.Tensor, ...]:
    return tuple(tf.constant(value, tf.uint32) for value in values)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # Random123's known answers for threefry2x32, 20 rounds
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_threefry_known_answers(key: tuple, counter: tuple, expected: tuple, compiled: bool) -> None:
    function = tf.function(views.threefry, jit_compile=True) if compiled else views.threefry
    assert tuple(int(word) for word in function(words(*key), words(*counter))) == expected


def test_uniform_numbers_are_uniform_and_independent() -> None:
    drawn = views.uniform(3, tf.constant(5), tf.range(20_000), 6).numpy()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for column in drawn.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    correlation = np.corrcoef(drawn.T) - np.eye(6)
    assert np.abs(correlation).max() < 0.03
    other_step = views.uniform(3, tf.constant(6), tf.range(20_000), 6).numpy()
    assert abs(np.corrcoef(drawn[:, 0], other_step[:, 0])[0, 1]) < 0.03


def test_uniform_is_a_function_of_its_row() -> None:
    whole = views.uniform(9, tf.constant(4), tf.range(50), 3).numpy()
    part = views.uniform(9, tf.constant(4), tf.constant([17, 3]), 3).numpy()
    assert (part == whole[[17, 3]]).all()


def boxes(height: int, width: int, count: int) -> np.ndarray:
    draws = views.uniform(1, tf.constant(0), tf.range(count), views._DRAWS)
    sizes = tf.tile(tf.constant([[height, width]], tf.float32), [count, 1])
    return views.inception_box(draws[:, : views._DRAWS - 1], sizes).numpy()


def tensorflows_boxes(height: int, width: int, count: int) -> np.ndarray:
    @tf.function
    def sample() -> tf.Tensor:
        def one(seed: tf.Tensor) -> tf.Tensor:
            begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
                [height, width, 3],
                tf.zeros([0, 0, 4]),
                tf.stack([seed, 11]),
                0.0,
                views.ASPECT,
                views.AREA,
                100,
                True,
            )
            return tf.cast(tf.concat([begin[:2], size[:2]], 0), tf.float32)

        return tf.map_fn(one, tf.range(count), fn_output_signature=tf.float32)

    return sample().numpy() / np.array([height, width, height, width], np.float32)


@pytest.mark.parametrize(("height", "width"), [(100, 100), (300, 500), (500, 375), (64, 40), (60, 400)])
def test_crops_are_distributed_as_tensorflows(height: int, width: int) -> None:
    """Kolmogorov-Smirnov on top, left, height, width, area and aspect, at 1 % over all 30 tests."""
    count = 4000
    ours, theirs = boxes(height, width, count), tensorflows_boxes(height, width, count)
    for array in (ours, theirs):
        assert (array[:, :2] >= 0).all()
        assert (array[:, :2] + array[:, 2:] <= 1 + 1e-6).all()

    def features(a: np.ndarray) -> list[np.ndarray]:
        return [*a.T, a[:, 2] * a[:, 3], a[:, 3] * width / (a[:, 2] * height)]

    for mine, tensorflows in zip(features(ours), features(theirs), strict=True):
        # Ties of the pixel grid are the same on both sides up to float rounding.
        assert stats.ks_2samp(np.round(mine, 4), np.round(tensorflows, 4)).pvalue > 0.01 / 30


def test_impossible_shapes_give_the_whole_image() -> None:
    assert (boxes(10, 1000, 50)[:, 2] > 0).all()
    assert np.allclose(boxes(1, 1, 5), [[0, 0, 1, 1]])


PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), np.uint8)


@pytest.mark.parametrize("size", [7, 16, 20, 33, 64])
@pytest.mark.parametrize(
    ("top", "left", "height", "width"),
    [(0, 0, 40, 40), (4, 8, 20, 28), (39, 0, 1, 40), (10, 30, 5, 10)],
)
def test_render_is_crop_then_tensorflows_resize(size: int, top: int, left: int, height: int, width: int) -> None:
    box = tf.constant([[top / 40, left / 40, height / 40, width / 40]] * 3)
    flip = tf.constant([False, True, False])
    crop = PICTURES[:, top : top + height, left : left + width]
    expected = tf.image.resize(crop, [size, size]).numpy() / 127.5 - 1
    expected[1] = expected[1, :, ::-1]
    for compiled in (False, True):
        render = tf.function(views.render, jit_compile=True) if compiled else views.render
        found = render(tf.constant(PICTURES), box, flip, size).numpy()
        assert np.abs(found - expected).max() < 2e-4


@pytest.mark.parametrize("size", [5, 8, 20])
def test_area_is_tensorflows_area(size: int) -> None:
    box = tf.constant([[0.1, 0.2, 0.5, 0.5]] * 3)
    expected = tf.image.resize(PICTURES[:, 4:24, 8:28], [size, size], method="area").numpy() / 127.5 - 1
    found = views.render(tf.constant(PICTURES), box, None, size, area=True).numpy()
    assert np.abs(found - expected).max() < 2e-4


def test_squashed_crop_keeps_the_originals_proportions() -> None:
    """A 20 x 60 original kept as 40 x 40: a box of 10 x 10 original pixels covers 20 rows and 6.67 columns of it."""
    ramp = np.broadcast_to(np.arange(60, dtype=np.float32), (20, 60))
    squashed = tf.image.resize(ramp[..., None], [40, 40], antialias=True).numpy()
    kept = np.repeat(squashed, 3, -1).round().astype(np.uint8)
    box = tf.constant([[0.25, 24 / 60, 10 / 20, 12 / 60]])
    view = views.render(tf.constant(kept[None]), box, None, 12).numpy()
    columns = (view[0, 0, :, 0] + 1) * 127.5
    assert np.abs(columns - np.arange(24, 36)).max() < 1.3


def test_central_box_is_a_square_of_original_pixels() -> None:
    box = views.central_box(tf.constant([[100.0, 200.0], [50.0, 50.0]])).numpy()
    assert np.allclose(box, [[0.1, 0.3, 0.8, 0.4], [0.1, 0.1, 0.8, 0.8]])


def global_views(replicas: int, batch: int, **options: object) -> np.ndarray:
    """The views of a global batch, put together from what each replica makes."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (batch, 16, 16, 3), np.uint8)
    sizes = rng.integers(8, 30, (batch, 2)).astype(np.float32)
    parts = []
    for replica in range(replicas):
        rows = views.Rows.of(replica, replicas, batch)
        chosen = rows.numbers.numpy()
        (view,), own = views.training_views(
            tf.constant(images[chosen]),
            tf.constant(sizes[chosen]),
            rows,
            7,
            tf.constant(3),
            (8,),
            **options,
        )
        parts.append(view.numpy())
    return np.concatenate(parts), float(own)


@pytest.mark.parametrize("mixup", [True, False])
def test_views_are_the_same_for_any_number_of_replicas(mixup: bool) -> None:
    one, _ = global_views(1, 8, mixup=mixup)
    for replicas in (2, 4, 8):
        assert (global_views(replicas, 8, mixup=mixup)[0] == one).all()


def test_mixup_rolls_the_global_batch_by_one_with_one_coefficient() -> None:
    plain, nothing = global_views(1, 8, mixup=False)
    mixed, own = global_views(2, 8, mixup=True)
    assert nothing == 1.0
    assert 0 < own < 1
    assert np.allclose(mixed, own * plain + (1 - own) * np.roll(plain, 1, axis=0), atol=1e-6)


def test_mixup_coefficients_are_uniform_over_steps() -> None:
    draw = tf.function(lambda step: views.uniform(0, step, tf.constant([2**31 - 1]), 1)[0, 0])
    own = [float(draw(tf.constant(step))) for step in range(1500)]
    assert stats.kstest(own, "uniform").pvalue > 1e-3


def test_every_model_sees_the_same_crop() -> None:
    images = tf.constant(PICTURES)
    sizes = tf.constant([[40.0, 40.0]] * 3)
    rows = views.Rows(tf.constant([2, 0, 1]))
    (small, large), _ = views.training_views(images, sizes, rows, 1, tf.constant(0), (10, 20), mixup=True)
    (alone,), _ = views.training_views(images, sizes, rows, 1, tf.constant(0), (20,), mixup=True)
    assert (large.numpy() == alone.numpy()).all()
    assert np.corrcoef(small.numpy().ravel(), tf.image.resize(large, [10, 10]).numpy().ravel())[0, 1] > 0.9


def test_half_of_the_views_are_mirrored() -> None:
    draws = views.uniform(0, tf.constant(0), tf.range(4000), views._DRAWS).numpy()
    assert abs((draws[:, -1] < 0.5).mean() - 0.5) < 0.03
