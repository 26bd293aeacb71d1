"""Views: random bits against published vectors, crops against TensorFlow's sampler, pixels against
its resize and NumPy.
"""

from __future__ import annotations

import dataclasses
import pathlib

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from PIL import Image
from scipy import stats

from trainer.core import options
from trainer.core.config import Config
from trainer.data.store import squash
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
    draws = counter_rng.uniform(3, tf.constant(5), tf.range(20_000), 6).numpy()
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    correlation = np.corrcoef(draws.T) - np.eye(6)
    assert np.abs(correlation).max() < 0.03
    other_step = counter_rng.uniform(3, tf.constant(6), tf.range(20_000), 6).numpy()
    assert abs(np.corrcoef(draws[:, 0], other_step[:, 0])[0, 1]) < 0.03


def test_uniform_depends_on_the_row_alone() -> None:
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
        def box(seed: tf.Tensor) -> tf.Tensor:
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

        return tf.map_fn(box, tf.range(count), fn_output_signature=tf.float32)

    return sample().numpy() / np.array([height, width, height, width], np.float32)


@pytest.mark.parametrize(("height", "width"), [(100, 100), (300, 500), (500, 375), (64, 40), (60, 400)])
def test_crops_are_distributed_as_tensorflows(height: int, width: int) -> None:
    """Kolmogorov-Smirnov on top, left, height, width, area, aspect, at 1 % over all 30 tests."""
    count = 4000
    ours, theirs = boxes(height, width, count), tensorflows_boxes(height, width, count)
    for array in (ours, theirs):
        assert (array[:, :2] >= 0).all()
        assert (array[:, :2] + array[:, 2:] <= 1 + 1e-6).all()

    def features(a: np.ndarray) -> list[np.ndarray]:
        return [*a.T, a[:, 2] * a[:, 3], a[:, 3] * width / (a[:, 2] * height)]

    for our_feature, their_feature in zip(features(ours), features(theirs), strict=True):
        # Ties of the pixel grid are the same on both sides up to float rounding.
        assert stats.ks_2samp(np.round(our_feature, 4), np.round(their_feature, 4)).pvalue > 0.01 / 30


def test_images_too_long_for_any_crop_are_used_whole() -> None:
    assert (boxes(10, 1000, 50)[:, 2] > 0).all()
    assert np.allclose(boxes(1, 1, 5), [[0, 0, 1, 1]])


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), np.uint8)


@pytest.mark.parametrize("size", [7, 16, 20, 33, 64])
@pytest.mark.parametrize(
    ("top", "left", "height", "width"),
    [(0, 0, 40, 40), (4, 8, 20, 28), (39, 0, 1, 40), (10, 30, 5, 10)],
)
def test_render_is_crop_then_tensorflows_resize(size: int, top: int, left: int, height: int, width: int) -> None:
    box = tf.constant([[top / 40, left / 40, height / 40, width / 40]] * 3)
    flip = tf.constant([False, True, False])
    crop = IMAGES[:, top : top + height, left : left + width]
    expected = tf.image.resize(crop, [size, size]).numpy() / 127.5 - 1
    expected[1] = expected[1, :, ::-1]
    for compiled in (False, True):
        render = tf.function(crops.render, jit_compile=True) if compiled else crops.render
        actual = render(tf.constant(IMAGES), box, flip, size).numpy()
        assert np.abs(actual - expected).max() < 2e-4


@pytest.mark.parametrize("size", [5, 8, 20])
def test_area_is_tensorflows_area(size: int) -> None:
    box = tf.constant([[0.1, 0.2, 0.5, 0.5]] * 3)
    expected = tf.image.resize(IMAGES[:, 4:24, 8:28], [size, size], method="area").numpy() / 127.5 - 1
    actual = crops.render(tf.constant(IMAGES), box, None, size, area=True).numpy()
    assert np.abs(actual - expected).max() < 2e-4


def test_squashed_crop_keeps_the_originals_proportions() -> None:
    """In a 20 x 60 original stored as 40 x 40, 10 x 10 pixels are 20 rows and 6.67 columns."""
    ramp = np.broadcast_to(np.arange(60, dtype=np.float32), (20, 60))
    squashed = tf.image.resize(ramp[..., None], [40, 40], antialias=True).numpy()
    stored = np.repeat(squashed, 3, -1).round().astype(np.uint8)
    box = tf.constant([[0.25, 24 / 60, 10 / 20, 12 / 60]])
    view = crops.render(tf.constant(stored[None]), box, None, 12).numpy()
    columns = (view[0, 0, :, 0] + 1) * 127.5
    assert np.abs(columns - np.arange(24, 36)).max() < 1.3


def test_central_box_is_a_square_of_original_pixels() -> None:
    box = crops.central_box(tf.constant([[100.0, 200.0], [50.0, 50.0]]), 0.8).numpy()
    assert np.allclose(box, [[0.1, 0.3, 0.8, 0.4], [0.1, 0.1, 0.8, 0.8]])


def random_batch(batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of 16 x 16 pixels, and sizes of the originals, of any proportions."""
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (batch_size, 16, 16, 3), np.uint8), rng.integers(8, 30, (batch_size, 2)).astype(
        np.float32
    )


def global_views(
    replicas: int, batch_size: int, *, compiled: bool = False, **changes: object
) -> tuple[np.ndarray, ...]:
    """Student views, teacher views and mixup ratios of a global batch, replica after replica."""
    images, sizes = random_batch(batch_size)
    config = Config(image_size=8, seed=7, **changes)  # type: ignore[arg-type]
    teachers = () if views.mode(config).fixed else (12,)

    def make(replica: int) -> views.Views:
        batch_rows = views.BatchRows.of(replica, replicas, batch_size, views.mixup_partner(config))
        examples = tf.gather(tf.constant(images), batch_rows.rows), tf.gather(tf.constant(sizes), batch_rows.rows)
        batch = views.training_views(config, *examples, batch_rows, tf.constant(3), teachers)
        return batch.student, batch.teachers.get(12, tf.zeros([0])), batch.mixup_ratios

    run = tf.function(make, jit_compile=True) if compiled else make
    by_replica = [[part.numpy() for part in run(replica)] for replica in range(replicas)]
    return tuple(np.concatenate(parts) for parts in zip(*by_replica, strict=True))


@pytest.mark.parametrize("mode", options.VIEWS)
@pytest.mark.parametrize("compiled", [False, True])
def test_every_mode_is_the_numpy_reference_pixel_for_pixel(mode: str, compiled: bool) -> None:
    student, teacher, ratios = global_views(1, 6, compiled=compiled, views=mode)
    images, sizes = random_batch(6)
    expected = reference.step_views(mode, images, sizes, 7, 3, 8, 12)
    assert np.abs(student - expected[0]).max() < 3e-4
    assert np.allclose(ratios[:, 0], expected[2], atol=1e-7)
    if expected[1] is None:
        assert teacher.size == 0
    else:
        assert np.abs(teacher - expected[1]).max() < 3e-4


def test_modes_are_the_flags_choices() -> None:
    assert tuple(views.VIEWS) == options.VIEWS
    assert {mode.student for mode in views.VIEWS.values()} < crops.CROPS.keys()


def test_streams_of_random_numbers_do_not_overlap() -> None:
    """Each use of a row's numbers has its own; 16 is what a Beta ratio takes."""
    lengths = {
        views.Stream.STUDENT_CROP: crops.DRAWS_PER_CROP,
        views.Stream.TEACHER_CROP: crops.DRAWS_PER_CROP,
        views.Stream.MIXUP_RATIO: 1,
        views.Stream.FIXED_CROP: crops.DRAWS_PER_CROP,
        views.Stream.BETA_MIXUP_RATIO: 16,
    }
    assert lengths.keys() == set(views.Stream)
    positions = [stream + k for stream, length in lengths.items() for k in range(length)]
    assert len(set(positions)) == len(positions)
    assert [int(stream) for stream in views.Stream] == [0, 19, 38, 39, 58], "runs would not reproduce"


@pytest.mark.parametrize("mode", ["ind/rc", "ind/ic"])
def test_independent_views_differ_and_same_views_do_not(mode: str) -> None:
    """At one size, so that only the crop can differ."""
    images, sizes = (tf.constant(a) for a in random_batch(32))
    batch_rows = views.BatchRows.of(0, 1, 32, "")

    def both(name: str) -> tuple[np.ndarray, np.ndarray]:
        batch = views.training_views(Config(image_size=8, views=name), images, sizes, batch_rows, tf.constant(0), (8,))
        return batch.student.numpy(), batch.teachers[8].numpy()

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
    expected = global_views(1, 8, **changes)
    for replicas in (2, 4, 8):
        for actual, part in zip(global_views(replicas, 8, **changes), expected, strict=True):
            assert (actual == part).all()


def test_mixup_rolls_the_global_batch_by_one_with_one_ratio() -> None:
    plain, _, ratios_without_mixup = global_views(1, 8, views="same/ic")
    mixed, _, ratios = global_views(2, 8)
    assert (ratios_without_mixup == 1.0).all()
    assert 0 < ratios[0, 0] < 1
    assert (ratios == ratios[0]).all()
    assert np.allclose(mixed, ratios[0] * plain + (1 - ratios[0]) * np.roll(plain, 1, axis=0), atol=1e-6)


def test_mixup_by_example_has_a_ratio_for_each() -> None:
    images, sizes = random_batch(6)
    student, teacher, ratios = global_views(1, 6, mixup="example")
    expected = reference.step_views("mix", images, sizes, 7, 3, 8, 12, by_example=True)
    assert np.abs(student - expected[0]).max() < 3e-4
    assert np.abs(teacher - expected[1]).max() < 3e-4
    assert np.allclose(ratios[:, 0], expected[2], atol=1e-7)
    batch_rows = views.BatchRows.of(0, 1, 3000, "roll")
    config = Config(image_size=2, mixup="example")
    images = tf.zeros([3001, 2, 2, 3], tf.uint8)
    batch = views.training_views(config, images, tf.ones([3001, 2]) * 2, batch_rows, tf.constant(0), ())
    assert stats.kstest(batch.mixup_ratios.numpy()[:, 0], "uniform").pvalue > 1e-3


def test_mixup_ratios_are_uniform_over_steps() -> None:
    draw = tf.function(lambda step: counter_rng.uniform(0, step, tf.constant([2**31 - 1]), 1)[0, 0])
    ratios = [float(draw(tf.constant(step))) for step in range(1500)]
    assert stats.kstest(ratios, "uniform").pvalue > 1e-3


def test_every_model_sees_the_same_crop() -> None:
    images = tf.constant(IMAGES)
    sizes = tf.constant([[40.0, 40.0]] * 3)
    batch_rows = views.BatchRows.of(0, 1, 3, "")
    config = Config(image_size=10, views="same/ic", seed=1)
    batch = views.training_views(config, images, sizes, batch_rows, tf.constant(0), (20,))
    alone = views.training_views(
        dataclasses.replace(config, image_size=20), images, sizes, batch_rows, tf.constant(0), ()
    ).student
    assert (batch.teachers[20].numpy() == alone.numpy()).all()
    shrunk = tf.image.resize(batch.teachers[20], [10, 10]).numpy()
    assert np.corrcoef(batch.student.numpy().ravel(), shrunk.ravel())[0, 1] > 0.8


@pytest.mark.parametrize("mode", ["fix/rs", "fix/cc", "fix/ic_ens"])
def test_fixed_views_depend_on_the_example_and_crop_alone(mode: str) -> None:
    images, sizes = random_batch(5)
    config = Config(views=mode, seed=3)
    ids = np.array([4, 0, 2], np.int32)

    def fixed(ids: np.ndarray, crop: int) -> np.ndarray:
        examples = tf.constant(images[ids]), tf.constant(sizes[ids]), tf.constant(ids)
        return views.fixed_view(config, *examples, tf.constant(crop), 9).numpy()

    def expected(i: int, crop: int) -> np.ndarray:
        if mode == "fix/rs":
            return reference.area(images[i], np.array([0.0, 0, 1, 1]), 9)
        if mode == "fix/cc":
            return reference.area(images[i], reference.central_box(*sizes[i], 0.8), 9)
        draws = reference.uniform(3, crop, i, 2 * reference.DRAWS + 1, reference.DRAWS)
        return reference.crop("inception", images[i], tuple(sizes[i]), draws, 9)

    for crop in (0, 6):
        actual = fixed(ids, crop)
        assert (actual == fixed(np.arange(5, dtype=np.int32), crop)[ids]).all()
        for view, i in zip(actual, ids, strict=True):
            assert np.abs(view - expected(i, crop)).max() < 3e-4
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
    """resize to 160 x 160, random_crop of 128 x 128, flip, [0, 1]; for other sizes in the same
    proportion.
    """
    resized = round(size * 1.25)
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (40, 48, 48, 3), np.uint8)
    config = Config(image_size=size, views="same/ic", compat=("crop",))
    batch_rows = views.BatchRows.of(0, 1, 40, "")
    batch = views.training_views(config, tf.constant(images), tf.ones([40, 2]) * 99, batch_rows, tf.constant(2), ())
    actual = value_range.to_range(batch.student, "0,1").numpy()
    resized_images = tf.image.resize(images.astype(np.float32) / 255.0, (resized, resized)).numpy()
    corners = set()
    for image, view in zip(resized_images, actual, strict=True):
        all_corners = [(y, x) for y in range(resized - size + 1) for x in range(resized - size + 1)]
        all_crops = [image[y : y + size, x : x + size] for y, x in all_corners]
        errors = [min(np.abs(view - c).max(), np.abs(view - c[:, ::-1]).max()) for c in all_crops]
        assert min(errors) < 2e-5
        corners.add(all_corners[int(np.argmin(errors))])
    assert len(corners) > 5


def test_compat_crops_reach_every_corner_equally() -> None:
    draws = counter_rng.uniform(0, tf.constant(0), tf.range(30_000), 2)
    box = crops.squashed_box(draws, 128, 160).numpy()
    top = np.round(box[:, 0] * 160).astype(int)
    assert np.allclose(box[:, 0] * 160, top, atol=1e-4)
    assert stats.chisquare(np.bincount(top, minlength=33)).pvalue > 1e-3
    assert set(top) == set(range(33))
    assert np.allclose(box[:, 2:], 0.8)


def test_compat_evaluation_is_the_examples() -> None:
    """central_crop of 0.875, then a bilinear resize, of images whose crop is a whole number of
    pixels.
    """
    images = np.random.default_rng(2).integers(0, 256, (3, 64, 64, 3), np.uint8)
    view = views.evaluation_view(Config(compat=("central",)), tf.constant(images), tf.ones([3, 2]) * 64, 16)
    cropped = tf.image.central_crop(images.astype(np.float32) / 255.0, 0.875)
    expected = tf.image.resize(cropped, (16, 16)).numpy()
    assert np.abs(value_range.to_range(view, "0,1").numpy() - expected).max() < 2e-5


def test_compat_mixup_reverses_the_batch() -> None:
    plain, _, _ = global_views(1, 8, views="same/ic")
    mixed, _, ratios = global_views(4, 8, compat=("mixup",))
    assert np.allclose(mixed, ratios[0] * plain + (1 - ratios[0]) * plain[::-1], atol=1e-6)


@pytest.mark.parametrize(("name", "low", "high"), [("-1,1", -1, 1), ("0,1", 0, 1), ("0,255", 0, 255)])
def test_ranges(name: str, low: float, high: float) -> None:
    actual = value_range.to_range(tf.constant([-1.0, 0.0, 1.0]), name).numpy()
    assert np.allclose(actual, [low, (low + high) / 2, high])


def test_half_of_the_views_are_mirrored() -> None:
    draws = counter_rng.uniform(0, tf.constant(0), tf.range(4000), crops.DRAWS_PER_CROP).numpy()
    assert abs((draws[:, -1] < 0.5).mean() - 0.5) < 0.03


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (48, 48)])
def test_whole_views_are_those_of_image_dataset_from_directory(shape: tuple[int, int], tmp_path: pathlib.Path) -> None:
    """Squashed and padded, against Keras reading the same file. Images are kept at twice the size,
    so that fine detail differs slightly.
    """
    rng, size = np.random.default_rng(3), 24
    coarse = rng.uniform(0, 255, (5, 5, 3))
    pixels = tf.image.resize(coarse, shape, "bicubic").numpy().clip(0, 255).astype(np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    stored = squash(tf.constant(pixels[None]), 2 * size)
    sizes = tf.constant([shape], tf.float32)
    for kind, more in (("squash", {}), ("pad", {"pad_to_aspect_ratio": True})):
        data = keras.utils.image_dataset_from_directory(tmp_path, image_size=(size, size), verbose=False, **more)
        expected = next(iter(data))[0].numpy()[0]
        view = (views.evaluation_view(Config(), stored, sizes, size, kind).numpy()[0] + 1) * 127.5
        assert np.abs(view - expected).mean() < 2, kind
        if kind == "pad":
            assert ((view == 0).all(-1) == (expected == 0).all(-1)).mean() > 0.95
