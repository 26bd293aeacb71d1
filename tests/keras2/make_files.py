"""Writes models of Keras 2 as `.h5` and `.keras`, with what they say of pictures in FOLDER/*.npy.

Run in an environment with `requirements.txt` of this folder: make_files.py FOLDER CLASSES SIDE.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tf_keras as keras

L = keras.layers


def tutorial(classes: int, side: int) -> keras.Model:
    """Transfer learning as in tutorials: augmentation, a nested network, dropout, a classifier."""
    inputs = keras.Input((side, side, 3))
    x = keras.Sequential([L.RandomFlip("horizontal"), L.RandomRotation(0.2)])(inputs)
    x = L.Rescaling(2.0, offset=0.5)(x)
    base = keras.applications.MobileNetV2(
        weights=None, include_top=False, alpha=0.35, input_shape=(side, side, 3), pooling="avg"
    )
    return keras.Model(inputs, L.Dense(classes, name="head")(L.Dropout(0.2)(base(x, training=False))))


def chain(classes: int, side: int) -> keras.Model:
    """A Sequential whose softmax is TensorFlow's function."""
    layers = [L.Conv2D(4, 3, activation=tf.nn.relu), L.Flatten(), L.Dense(classes, activation=tf.nn.softmax)]
    return keras.Sequential([keras.Input((side, side, 3)), *layers])


def operations(classes: int, side: int) -> keras.Model:
    """TensorFlow operations between the layers."""
    inputs = keras.Input((side, side, 3))
    return keras.Model(inputs, L.Dense(classes)(L.Flatten()(inputs / 2 + 1)))


def main(folder: str, classes: int, side: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (4, side, side, 3)).astype(np.float32)
    np.save(f"{folder}/images.npy", images)
    builders: tuple[Callable[[int, int], keras.Model], ...] = (tutorial, chain, operations)
    for build in builders:
        model = build(classes, side)
        for variable in model.weights:
            if "variance" not in variable.name and "seed" not in variable.name:
                variable.assign(rng.normal(0, 0.3, variable.shape))
        for end in ("h5", "keras"):
            model.save(f"{folder}/{build.__name__}.{end}")
        np.save(f"{folder}/{build.__name__}.npy", model(images, training=False).numpy())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
