"""Synthetic images depend only on their arguments, decode, are balanced and vary."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.ingest import synthetic

ROOT = Path(__file__).resolve().parents[2]


def _digest(seed: int, split: str, index: int, classes: int = 20, size: int = 64) -> str:
    return hashlib.sha256(synthetic.example(seed, split, index, classes, size)[0]).hexdigest()


def test_same_arguments_same_bytes_in_any_order() -> None:
    keys = [(0, "train", 0), (0, "test", 7), (3, "train", 123456), (0, "train", 1)]
    forward = {key: _digest(*key) for key in keys}
    assert forward == {key: _digest(*key) for key in reversed(keys)}


def test_global_random_state_is_neither_read_nor_moved() -> None:
    np.random.seed(1)
    first = _digest(0, "train", 5)
    after = np.random.random()
    np.random.seed(1)
    assert np.random.random() == after
    assert _digest(0, "train", 5) == first


def test_another_process_draws_the_same_bytes() -> None:
    keys = [(0, "train", 0, 20, 64), (5, "validation", 41, 7, 64), (0, "test", 3, 20, 200)]
    code = (
        "import hashlib\n"
        "from trainer.ingest import synthetic\n"
        f"for key in reversed({keys!r}):\n"
        "    print(hashlib.sha256(synthetic.example(*key)[0]).hexdigest())\n"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.split() == [_digest(*key) for key in reversed(keys)]


@pytest.mark.parametrize("other", [(1, "train", 0), (0, "test", 0), (0, "train", 20), (0, "train", 1)])
def test_other_arguments_give_other_images(other: tuple[int, str, int]) -> None:
    assert _digest(*other) != _digest(0, "train", 0)


def test_no_image_is_drawn_twice() -> None:
    digests = [_digest(0, split, index) for split in ("train", "test") for index in range(100)]
    assert len(set(digests)) == len(digests)


def test_images_of_a_species_vary() -> None:
    images = []
    for index in range(0, 200, 20):
        with Image.open(io.BytesIO(synthetic.example(0, "train", index, 20, 64)[0])) as image:
            images.append(np.asarray(image.resize((32, 32)), np.float32))
    apart = [np.abs(a - b).mean() for a, b in itertools.combinations(images, 2)]
    assert min(apart) > 8.0


def test_more_classes_leave_the_first_species_as_they_are() -> None:
    assert _digest(0, "train", 3, classes=20) == _digest(0, "train", 3, classes=102)


@pytest.mark.parametrize("size", [16, 64, 65, 256])
def test_draw_has_its_own_shape(size: int) -> None:
    aspects = []
    for index in range(24):
        rng = np.random.default_rng(index)
        image = synthetic.draw(synthetic.species(index, 0), rng, size)
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        height, width = image.shape[:2]
        assert max(height, width) == size
        # Half a pixel: the shorter side is rounded.
        assert min(height, width) >= 2 * size / 3 - 0.5
        assert image.std() > 2.0
        aspects.append(width / height)
    assert min(aspects) < 0.9
    assert max(aspects) > 1.1


def test_draw_follows_its_generator() -> None:
    kind = synthetic.species(2, 0)
    one, same, other = (synthetic.draw(kind, np.random.default_rng(seed), 48) for seed in (4, 4, 5))
    np.testing.assert_array_equal(one, same)
    assert one.shape != other.shape or (one != other).any()


@pytest.mark.parametrize("classes", [1, 7, 20])
def test_labels_are_balanced(classes: int) -> None:
    labels = [synthetic.example(0, "train", i, classes, 16)[1] for i in range(5 * classes)]
    assert np.bincount(labels, minlength=classes).tolist() == [5] * classes
    assert labels[:classes] == list(range(classes))


@pytest.mark.parametrize("size", [40, 64, 200])
def test_jpeg_decodes_to_the_stated_size(size: int) -> None:
    tf = pytest.importorskip("tensorflow")
    for index in range(6):
        data, _, (height, width) = synthetic.example(0, "test", index, 20, size)
        assert max(height, width) == size
        decoded = tf.io.decode_jpeg(data)
        assert decoded.dtype == tf.uint8
        assert tuple(decoded.shape) == (height, width, 3)
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "JPEG"
            assert image.mode == "RGB"
            assert image.size == (width, height)


def test_quality_sets_the_length_of_the_file() -> None:
    lengths = [len(synthetic.example(0, "train", 0, 20, 64, quality)[0]) for quality in (30, 90)]
    assert lengths[0] < lengths[1]


def test_species_are_a_function_of_index_and_seed() -> None:
    assert synthetic.species(7, 0) == synthetic.species(7, 0)
    assert synthetic.species(7, 0) != synthetic.species(7, 1)
    assert hash(synthetic.species(7, 0)) == hash(synthetic.species(7, 0))
    assert synthetic.species(10**9, 0).petals >= 3


@pytest.mark.parametrize("seed", [0, 1])
def test_species_differ_in_more_than_colour(seed: int) -> None:
    kinds = [synthetic.species(index, seed) for index in range(102)]
    assert len(set(kinds)) == len(kinds)
    for a, b in itertools.combinations(kinds, 2):
        differ = {
            field.name
            for field in dataclasses.fields(synthetic.Species)
            if getattr(a, field.name) != getattr(b, field.name)
        }
        assert {"width", "rise", "centre"} & differ


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_species_share_colours_and_differ_in_shape_where_they_do(seed: int) -> None:
    def family(kind: synthetic.Species) -> int:
        hue, saturation, _ = kind.base
        if saturation < 0.12:
            return -1
        hues = (0.145, 0.04, 0.92, 0.78, 0.64)
        return int(np.argmin([min(abs(hue - at), 1 - abs(hue - at)) for at in hues]))

    kinds = [synthetic.species(index, seed) for index in range(18)]
    families = [family(kind) for kind in kinds]
    assert sorted(families) == [-1] * 3 + [f for f in range(5) for _ in range(3)]
    for name in set(families):
        members = [kind for kind, other in zip(kinds, families, strict=True) if other == name]
        outlines = {(kind.petals, kind.width, kind.blunt) for kind in members}
        assert len(outlines) == len(members)


@pytest.mark.parametrize("seed", [0, 1])
def test_species_stay_within_their_stated_ranges(seed: int) -> None:
    for index in range(150):
        kind = synthetic.species(index, seed)
        assert 3 <= kind.petals <= 18
        assert 0.05 <= kind.width <= 0.46
        assert 0.35 <= kind.rise <= 1.5
        assert 1.0 <= kind.blunt <= 6.0
        assert 0.0 <= kind.notch <= 0.3
        assert kind.whorl == 0 or 0.5 < kind.whorl < 1
        assert 0.1 <= kind.centre <= 0.36
        assert kind.pattern in synthetic.PATTERNS
        assert kind.texture in synthetic.TEXTURES
        for colour in (kind.base, kind.tip, kind.mark, kind.core):
            assert all(0.0 <= part <= 1.0 for part in colour)


def test_species_names() -> None:
    assert synthetic.species_name(7) == "species_007"
    names = [synthetic.species_name(index) for index in range(102)]
    assert sorted(set(names)) == names
