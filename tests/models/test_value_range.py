"""What a model's first layers and its network tell about the value range that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import pytest

from trainer.models import bit, value_range

layers = keras.layers
IMAGENET = ([0.485, 0.456, 0.406], [0.229**2, 0.224**2, 0.225**2])


def network(prepare: Callable[[Any], Any]) -> keras.Model:
    inputs = keras.Input((32, 32, 3))
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(layers.Conv2D(2, 3)(prepare(inputs))))


def chain(*parts: keras.Layer) -> Callable[[Any], Any]:
    def prepare(x: Any) -> Any:
        for part in parts:
            x = part(x)
        return x

    return prepare


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda: chain(layers.Rescaling(1 / 255)), "0,255"),
        (lambda: chain(layers.Rescaling(1 / 127.5, -1)), "0,255"),
        (lambda: chain(layers.Rescaling(2.0, -1.0)), "0,1"),
        (lambda: chain(layers.Rescaling(0.5, 0.5)), "-1,1"),
        (lambda: chain(layers.Rescaling(255.0)), "0,1"),
        (lambda: chain(layers.Rescaling(1.0)), ""),
        (lambda: chain(layers.Resizing(16, 16), layers.RandomFlip(), layers.Rescaling(1 / 255)), "0,255"),
        (
            lambda: chain(
                keras.Sequential([layers.RandomFlip(), layers.RandomRotation(0.1)]), layers.Rescaling(1 / 255)
            ),
            "0,255",
        ),
        (lambda: chain(keras.Sequential([layers.RandomFlip(), layers.Rescaling(1 / 255)])), "0,255"),
        (lambda: chain(layers.Normalization(mean=[123, 117, 104], variance=[3364, 3249, 3249])), "0,255"),
        (lambda: chain(layers.Normalization(mean=IMAGENET[0], variance=IMAGENET[1])), "0,1"),
        (lambda: chain(layers.Normalization(mean=0.13, variance=0.31**2)), ""),  # dark images: not sure
        (
            lambda: chain(layers.Rescaling(1 / 255), layers.Normalization(mean=IMAGENET[0], variance=IMAGENET[1])),
            "0,255",
        ),
        (lambda: keras.applications.mobilenet_v2.preprocess_input, "0,255"),
        (lambda: keras.applications.vgg16.preprocess_input, "0,255"),
        (lambda: keras.applications.densenet.preprocess_input, "0,255"),
        (lambda: lambda x: x / 255.0, "0,255"),
        (lambda: lambda x: x, ""),
    ],
)
def test_what_comes_before_the_first_kernel_tells_the_range(prepare: Callable, expected: str) -> None:
    evidence = value_range.inspect(network(prepare()))
    assert (evidence.value_range, evidence.strength) == (expected, "layers" if expected else "none")


@pytest.mark.parametrize(
    ("name", "options", "expected", "strength"),
    [
        ("EfficientNetB0", {}, "0,255", "layers"),
        ("EfficientNetV2B0", {}, "0,255", "layers"),
        ("ConvNeXtTiny", {}, "0,255", "layers"),
        ("MobileNetV3Small", {}, "0,255", "layers"),
        ("MobileNetV2", {}, "-1,1", "convention"),
        ("MobileNet", {}, "-1,1", "convention"),
        ("ResNet50V2", {}, "-1,1", "convention"),
        ("ResNet50", {}, "", "none"),
        ("VGG16", {"include_top": False}, "", "none"),
    ],
)
def test_networks_of_keras_applications_are_known(name: str, options: dict, expected: str, strength: str) -> None:
    """Alone, and as a part of another model."""
    model = getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), **options)
    outer = keras.Sequential([keras.Input((64, 64, 3)), layers.RandomFlip(), model])
    for tried in (model, outer):
        evidence = value_range.inspect(tried)
        assert (evidence.value_range, evidence.strength) == (expected, strength)
    if not expected:
        assert "preprocess_input, which no range gives" in evidence.reason


def test_a_bit_takes_minus_1_to_1_whatever_its_file_holds() -> None:
    model = bit.bit("tiny", 5, 24)
    assert value_range.inspect(model).strength == "certain"
    folded = value_range.inspect(bit.fold(model))  # as `funmatch teacher` saves it
    assert (folded.value_range, folded.strength) == ("-1,1", "convention")
    rescaled = keras.Sequential([keras.Input((24, 24, 3)), layers.Rescaling(2.0, -1.0), bit.bit("tiny", 5, None)])
    assert value_range.inspect(rescaled).value_range == "0,1"
    assert value_range.inspect(object()) is value_range.NONE
