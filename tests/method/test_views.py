"""Views: random bits against the published vectors, crops against TensorFlow's sampler, pixels against its resize and NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import reference
import tensorflow as tf
from scipy import stats

from trainer.core import options
from trainer.core.config import Config
from trainer.method import counter_rng, crops, views
from trainer.models import value_range


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
    function = tf.function(counter_rng.threefry, jit_compile=True) if compiled else counter_rng.threefry
    assert tuple(int(word) for word in function(words(*key), words(*counter))) == expected


def test_uniform_numbers_are_uniform_and_independent() -> None:
    drawn = counter_rng.uniform(3, tf.constant(5), tf.range(20_000), 6).numpy()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for column in drawn.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    correlation = np.corrcoef(drawn.T) - np.eye(6)
    assert np.abs(correlation).max() < 0.03
    other_step = counter_rng.uniform(3, tf.constant(6), tf.range(20_000), 6).numpy()
    assert abs(np.corrcoef(drawn[:, 0], other_step[:, 0])[0, 1]) < 0.03


def test_uniform_is_a_function_of_its_row() -> None:
    whole = counter_rng.uniform(9, tf.constant(4), tf.range(50), 3).numpy()
    part = counter_rng.uniform(9, tf.constant(4), tf.constant([17, 3]), 3).numpy()
    assert (part == whole[[17, 3]]).all()


def boxes(height: int, width: int, count: int) -> np.ndarray:
    draws = counter_rng.uniform(1, tf.constant(0), tf.range(count), crops.DRAWS_PER_CROP)
    sizes = tf.tile(tf.constant([[height, width]], tf.float32), [count, 1])
    return crops.inception_box(draws[:, : crops.DRAWS_PER_CROP - 1], sizes).numpy()


def tensorflows_boxes(height: int, width: int, count: int) -> np.ndarray:
    @tf.function
    def sample() -> tf.Tensor:
        def one(seed: tf.Tensor) -> tf.Tensor:
            begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
                [height, width, 3],
                tf.zeros([0, 0, 4]),
                tf.stack([seed, 11]),
                0.0,
                crops.ASPECT_RATIOS,
                (0.05, 1.0),
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
        render = tf.function(crops.render, jit_compile=True) if compiled else crops.render
        found = render(tf.constant(PICTURES), box, flip, size).numpy()
        assert np.abs(found - expected).max() < 2e-4


@pytest.mark.parametrize("size", [5, 8, 20])
def test_area_is_tensorflows_area(size: int) -> None:
    box = tf.constant([[0.1, 0.2, 0.5, 0.5]] * 3)
    expected = tf.image.resize(PICTURES[:, 4:24, 8:28], [size, size], method="area").numpy() / 127.5 - 1
    found = crops.render(tf.constant(PICTURES), box, None, size, area=True).numpy()
    assert np.abs(found - expected).max() < 2e-4


def test_squashed_crop_keeps_the_originals_proportions() -> None:
    """A 20 x 60 original kept as 40 x 40: a box of 10 x 10 original pixels covers 20 rows and 6.67 columns of it."""
    ramp = np.broadcast_to(np.arange(60, dtype=np.float32), (20, 60))
    squashed = tf.image.resize(ramp[..., None], [40, 40], antialias=True).numpy()
    kept = np.repeat(squashed, 3, -1).round().astype(np.uint8)
    box = tf.constant([[0.25, 24 / 60, 10 / 20, 12 / 60]])
    view = crops.render(tf.constant(kept[None]), box, None, 12).numpy()
    columns = (view[0, 0, :, 0] + 1) * 127.5
    assert np.abs(columns - np.arange(24, 36)).max() < 1.3


def test_central_box_is_a_square_of_original_pixels() -> None:
    box = crops.central_box(tf.constant([[100.0, 200.0], [50.0, 50.0]]), 0.8).numpy()
    assert np.allclose(box, [[0.1, 0.3, 0.8, 0.4], [0.1, 0.1, 0.8, 0.8]])


def batch_of(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of 16 x 16 pixels, and sizes of the originals, of any proportions."""
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (batch, 16, 16, 3), np.uint8), rng.integers(8, 30, (batch, 2)).astype(np.float32)


def global_views(replicas: int, batch: int, *, compiled: bool = False, **changes: object) -> tuple[np.ndarray, ...]:
    """The views of a global batch, put together from what each replica makes: student's, teacher's, share."""
    images, sizes = batch_of(batch)
    settings = Config(image_size=8, seed=7, **changes)  # type: ignore[arg-type]
    teachers = () if views.mode(settings).fixed else (12,)

    def make(replica: int) -> views.Views:
        rows = views.BatchRows.of(replica, replicas, batch, views.mixup_partner(settings))
        chosen = tf.gather(tf.constant(images), rows.rows), tf.gather(tf.constant(sizes), rows.rows)
        made = views.training_views(settings, *chosen, rows, tf.constant(3), teachers)
        return made.student, made.teachers.get(12, tf.zeros([0])), made.mixup_ratios

    run = tf.function(make, jit_compile=True) if compiled else make
    parts = [[part.numpy() for part in run(replica)] for replica in range(replicas)]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("mode", options.VIEWS)
@pytest.mark.parametrize("compiled", [False, True])
def test_every_mode_is_the_numpy_reference_pixel_for_pixel(mode: str, compiled: bool) -> None:
    student, teacher, share = global_views(1, 6, compiled=compiled, views=mode)
    images, sizes = batch_of(6)
    expected = reference.step_views(mode, images, sizes, 7, 3, 8, 12)
    assert np.abs(student - expected[0]).max() < 3e-4
    assert np.allclose(share[:, 0], expected[2], atol=1e-7)
    if expected[1] is None:
        assert teacher.size == 0
    else:
        assert np.abs(teacher - expected[1]).max() < 3e-4


def test_modes_are_the_flags() -> None:
    assert tuple(views.VIEWS) == options.VIEWS


@pytest.mark.parametrize("mode", ["ind/rc", "ind/ic"])
def test_independent_views_differ_and_consistent_ones_do_not(mode: str) -> None:
    """At one size, so that the crop alone decides."""
    images, sizes = (tf.constant(a) for a in batch_of(32))
    rows = views.BatchRows.of(0, 1, 32, "")

    def both(name: str) -> tuple[np.ndarray, np.ndarray]:
        made = views.training_views(Config(image_size=8, views=name), images, sizes, rows, tf.constant(0), (8,))
        return made.student.numpy(), made.teachers[8].numpy()

    student, teacher = both(mode)
    assert (np.abs(student - teacher).max(axis=(1, 2, 3)) > 0.05).mean() > 0.9
    student, teacher = both(mode.replace("ind", "same"))
    assert (student == teacher).all()


@pytest.mark.parametrize(
    "changes",
    [
        *({"views": mode} for mode in options.VIEWS),
        {"mixup": "example"},
        {"compat": ("keras_example",)},
    ],
)
def test_views_are_the_same_for_any_number_of_replicas(changes: dict) -> None:
    one = global_views(1, 8, **changes)
    for replicas in (2, 4, 8):
        for part, whole in zip(global_views(replicas, 8, **changes), one, strict=True):
            assert (part == whole).all()


def test_mixup_rolls_the_global_batch_by_one_with_one_coefficient() -> None:
    plain, _, nothing = global_views(1, 8, views="same/ic")
    mixed, _, own = global_views(2, 8)
    assert (nothing == 1.0).all()
    assert 0 < own[0, 0] < 1
    assert (own == own[0]).all()
    assert np.allclose(mixed, own[0] * plain + (1 - own[0]) * np.roll(plain, 1, axis=0), atol=1e-6)


def test_mixup_by_example_has_a_coefficient_for_each() -> None:
    images, sizes = batch_of(6)
    student, teacher, share = global_views(1, 6, mixup="example")
    expected = reference.step_views("mix", images, sizes, 7, 3, 8, 12, each=True)
    assert np.abs(student - expected[0]).max() < 3e-4
    assert np.abs(teacher - expected[1]).max() < 3e-4
    assert np.allclose(share[:, 0], expected[2], atol=1e-7)
    rows = views.BatchRows.of(0, 1, 3000, "roll")
    settings = Config(image_size=2, mixup="example")
    small = tf.zeros([3001, 2, 2, 3], tf.uint8)
    made = views.training_views(settings, small, tf.ones([3001, 2]) * 2, rows, tf.constant(0), ())
    assert stats.kstest(made.mixup_ratios.numpy()[:, 0], "uniform").pvalue > 1e-3


def test_mixup_coefficients_are_uniform_over_steps() -> None:
    draw = tf.function(lambda step: counter_rng.uniform(0, step, tf.constant([2**31 - 1]), 1)[0, 0])
    own = [float(draw(tf.constant(step))) for step in range(1500)]
    assert stats.kstest(own, "uniform").pvalue > 1e-3


def test_every_model_sees_the_same_crop() -> None:
    images = tf.constant(PICTURES)
    sizes = tf.constant([[40.0, 40.0]] * 3)
    rows = views.BatchRows.of(0, 1, 3, "")
    settings = Config(image_size=10, views="same/ic", seed=1)
    made = views.training_views(settings, images, sizes, rows, tf.constant(0), (20,))
    alone = views.training_views(
        dataclasses.replace(settings, image_size=20), images, sizes, rows, tf.constant(0), ()
    ).student
    assert (made.teachers[20].numpy() == alone.numpy()).all()
    shrunk = tf.image.resize(made.teachers[20], [10, 10]).numpy()
    assert np.corrcoef(made.student.numpy().ravel(), shrunk.ravel())[0, 1] > 0.8


@pytest.mark.parametrize("mode", ["fix/rs", "fix/cc", "fix/ic_ens"])
def test_fixed_views_are_functions_of_the_example(mode: str) -> None:
    images, sizes = batch_of(5)
    settings = Config(views=mode, seed=3)
    ids = np.array([4, 0, 2], np.int32)

    def fixed(numbers: np.ndarray, crop: int) -> np.ndarray:
        chosen = tf.constant(images[numbers]), tf.constant(sizes[numbers]), tf.constant(numbers)
        return views.fixed_view(settings, *chosen, tf.constant(crop), 9).numpy()

    def expected(i: int, crop: int) -> np.ndarray:
        if mode == "fix/rs":
            return reference.area(images[i], np.array([0.0, 0, 1, 1]), 9)
        if mode == "fix/cc":
            return reference.area(images[i], reference.central_box(*sizes[i], 0.8), 9)
        draws = reference.uniform(3, crop, i, 2 * reference.DRAWS + 1, reference.DRAWS)
        return reference.crop("inception", images[i], tuple(sizes[i]), draws, 9)

    for crop in (0, 6):
        found = fixed(ids, crop)
        assert (found == fixed(np.arange(5, dtype=np.int32), crop)[ids]).all()
        for picture, i in zip(found, ids, strict=True):
            assert np.abs(picture - expected(i, crop)).max() < 3e-4
    assert (fixed(ids, 0) != fixed(ids, 6)).any() == (mode == "fix/ic_ens")


def test_mild_crops_are_uniform_squares_of_the_original() -> None:
    sizes = tf.tile(tf.constant([[300.0, 400.0]]), [4000, 1])
    draws = counter_rng.uniform(0, tf.constant(0), tf.range(4000), 2)
    box = crops.mild_box(draws, sizes, 0.8).numpy()
    assert np.allclose(box[:, 2] * 300, 240, atol=1e-3)
    assert np.allclose(box[:, 3] * 400, 240, atol=1e-3)
    assert stats.kstest(box[:, 0] / 0.2, "uniform").pvalue > 1e-3
    assert stats.kstest(box[:, 1] / 0.4, "uniform").pvalue > 1e-3


def test_least_area_of_a_crop() -> None:
    sizes = tf.tile(tf.constant([[200.0, 300.0]]), [3000, 1])
    draws = counter_rng.uniform(1, tf.constant(0), tf.range(3000), 18)
    box = crops.inception_box(draws, sizes, 0.4).numpy()
    assert (box[:, 2] * box[:, 3]).min() >= 0.4 - 1e-6
    assert (box[:, 2] * box[:, 3]).min() < 0.45


# The Keras example, step by step with TensorFlow's own image functions.


@pytest.mark.parametrize("size", [8, 16, 128])
def test_compat_crop_is_the_examples(size: int) -> None:
    """resize to 160 x 160, random_crop of 128 x 128, flip, [0, 1]; for other sizes in the same proportion."""
    zoomed = round(size * 1.25)
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (40, 48, 48, 3), np.uint8)
    settings = Config(image_size=size, views="same/ic", compat=("crop",))
    rows = views.BatchRows.of(0, 1, 40, "")
    made = views.training_views(settings, tf.constant(images), tf.ones([40, 2]) * 99, rows, tf.constant(2), ())
    found = value_range.to_range(made.student, "0,1").numpy()
    resized = tf.image.resize(images.astype(np.float32) / 255.0, (zoomed, zoomed)).numpy()
    corners = set()
    for picture, view in zip(resized, found, strict=True):
        places = [(y, x) for y in range(zoomed - size + 1) for x in range(zoomed - size + 1)]
        crops = [picture[y : y + size, x : x + size] for y, x in places]
        errors = [min(np.abs(view - c).max(), np.abs(view - c[:, ::-1]).max()) for c in crops]
        assert min(errors) < 2e-5
        corners.add(places[int(np.argmin(errors))])
    assert len(corners) > 5
    assert max(max(c) for c in corners) <= zoomed - size


def test_compat_crops_reach_every_corner_equally() -> None:
    draws = counter_rng.uniform(0, tf.constant(0), tf.range(30_000), 2)
    box = crops.squashed_box(draws, 128, 160).numpy()
    top = np.round(box[:, 0] * 160).astype(int)
    assert np.allclose(box[:, 0] * 160, top, atol=1e-4)
    assert stats.chisquare(np.bincount(top, minlength=33)).pvalue > 1e-3
    assert set(top) == set(range(33))
    assert np.allclose(box[:, 2:], 0.8)


def test_compat_evaluation_is_the_examples() -> None:
    """central_crop of 0.875, then a bilinear resize, of pictures whose crop is a whole number of pixels."""
    images = np.random.default_rng(2).integers(0, 256, (3, 64, 64, 3), np.uint8)
    view = views.evaluation_view(Config(compat=("central",)), tf.constant(images), tf.ones([3, 2]) * 64, 16)
    cropped = tf.image.central_crop(images.astype(np.float32) / 255.0, 0.875)
    expected = tf.image.resize(cropped, (16, 16)).numpy()
    assert np.abs(value_range.to_range(view, "0,1").numpy() - expected).max() < 2e-5


def test_compat_mixup_reverses_the_batch() -> None:
    plain, _, _ = global_views(1, 8, views="same/ic")
    mixed, _, own = global_views(4, 8, compat=("mixup",))
    assert np.allclose(mixed, own[0] * plain + (1 - own[0]) * plain[::-1], atol=1e-6)


@pytest.mark.parametrize(("name", "low", "high"), [("-1,1", -1, 1), ("0,1", 0, 1), ("0,255", 0, 255)])
def test_ranges(name: str, low: float, high: float) -> None:
    found = value_range.to_range(tf.constant([-1.0, 0.0, 1.0]), name).numpy()
    assert np.allclose(found, [low, (low + high) / 2, high])


def test_half_of_the_views_are_mirrored() -> None:
    draws = counter_rng.uniform(0, tf.constant(0), tf.range(4000), crops.DRAWS_PER_CROP).numpy()
    assert abs((draws[:, -1] < 0.5).mean() - 0.5) < 0.03
