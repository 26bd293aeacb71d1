"""Writes a SavedModel as the Keras example's teachers were made: Keras 2, a subclassed model of
hub.KerasLayer and Dense.

Run in an environment with `requirements.txt` of this folder: make_teacher.py FOLDER CLASSES SIDE.
Beside the folder, FOLDER.npz has pictures in [0, 1] and what the model says of them. The feature
vector inside has the structure, the names and the input range of google/bit/m-r101x3/1, at the size
of our smallest BiT.
"""

from __future__ import annotations

import sys

import numpy as np
import tensorflow as tf
import tensorflow_hub as hub
import tf_keras as keras

UNITS, FILTERS, GROUPS = (1, 1, 1), 16, 8


class StandardizedConv2D(keras.layers.Conv2D):
    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        mean, variance = tf.nn.moments(kernel, [0, 1, 2], keepdims=True)
        return super().convolution_op(inputs, (kernel - mean) / tf.sqrt(variance + 1e-10))


class GroupNorm(keras.layers.Layer):
    def build(self, shape: tf.TensorShape) -> None:
        self.gamma = self.add_weight("gamma", (1, 1, 1, shape[-1]), initializer="ones")
        self.beta = self.add_weight("beta", (1, 1, 1, shape[-1]), initializer="zeros")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        shape = tf.shape(x)
        grouped = tf.reshape(x, [shape[0], shape[1], shape[2], GROUPS, x.shape[-1] // GROUPS])
        mean, variance = tf.nn.moments(grouped, [1, 2, 4], keepdims=True)
        return tf.reshape((grouped - mean) / tf.sqrt(variance + 1e-5), shape) * self.gamma + self.beta


def conv(filters: int, size: int, stride: int, name: str) -> StandardizedConv2D:
    return StandardizedConv2D(filters, size, stride, padding="valid", use_bias=False, name=name)


class Unit(keras.layers.Layer):
    def __init__(self, filters: int, stride: int, project: bool, name: str) -> None:
        super().__init__(name=name)
        self.a_norm, self.a = GroupNorm(name="a/group_norm"), conv(filters, 1, 1, "a/standardized_conv2d")
        self.b_norm, self.b = GroupNorm(name="b/group_norm"), conv(filters, 3, stride, "b/standardized_conv2d")
        self.c_norm, self.c = GroupNorm(name="c/group_norm"), conv(4 * filters, 1, 1, "c/standardized_conv2d")
        self.proj = conv(4 * filters, 1, stride, "a/proj/standardized_conv2d") if project else None

    def call(self, x: tf.Tensor) -> tf.Tensor:
        y = tf.nn.relu(self.a_norm(x))
        shortcut = x if self.proj is None else self.proj(y)
        y = tf.nn.relu(self.b_norm(self.a(y)))
        y = self.b(tf.pad(y, [[0, 0], [1, 1], [1, 1], [0, 0]]))
        return shortcut + self.c(tf.nn.relu(self.c_norm(y)))


class FeatureVector(keras.Model):
    def __init__(self) -> None:
        super().__init__(name="resnet")
        self.root = conv(FILTERS, 7, 2, "root_block/standardized_conv2d")
        self.units = [
            Unit(FILTERS * 2**block, 2 if unit == 0 and block else 1, unit == 0, f"block{block + 1}/unit{unit + 1:02d}")
            for block, count in enumerate(UNITS)
            for unit in range(count)
        ]
        self.norm = GroupNorm(name="group_norm")

    def call(self, images: tf.Tensor) -> tf.Tensor:
        x = self.root(tf.pad(images * 2 - 1, [[0, 0], [3, 3], [3, 3], [0, 0]]))
        x = tf.nn.max_pool2d(tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]), 3, 2, "VALID")
        for unit in self.units:
            x = unit(x)
        return tf.reduce_mean(tf.nn.relu(self.norm(x)), [1, 2])


class MyBiTModel(keras.Model):
    def __init__(self, classes: int, module: keras.layers.Layer) -> None:
        super().__init__()
        self.head = keras.layers.Dense(classes, kernel_initializer="zeros")
        self.bit_model = module

    def call(self, images: tf.Tensor) -> tf.Tensor:
        return self.head(self.bit_model(images))


def main(folder: str, classes: int, side: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, (classes, side, side, 3)).astype(np.float32)
    features = FeatureVector()
    features(images)
    for variable in features.variables:
        variable.assign_add(rng.normal(0, 0.2, variable.shape).astype(np.float32))
    features.save(f"{folder}-features", save_format="tf")
    model = MyBiTModel(classes, hub.KerasLayer(f"{folder}-features", trainable=True))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images, np.arange(classes), verbose=0)
    model.head.set_weights([rng.normal(0, 0.3, w.shape).astype(np.float32) for w in model.head.get_weights()])
    model.save(folder)
    np.savez(f"{folder}.npz", images=images, logits=model(images).numpy())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
