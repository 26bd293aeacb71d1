"""Small files and models for the tests of several packages."""

from __future__ import annotations

import io
import pathlib
import tarfile
import zipfile
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf
from conftest import CLASSES, IMAGE
from PIL import Image

from trainer.data.order import ExampleSampler
from trainer.method import views
from trainer.models import bit
from trainer.run.job import Job


def state(job: Job) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in job.state().items()}


def first_batch(job: Job) -> views.Views:
    """The views of a job's first step."""
    ids = ExampleSampler(0, len(job.train_store), 8).batches(0, 1)[0]
    rows = views.BatchRows.of(0, 1, 8, views.mixup_partner(job.config))
    batch_ids = ids[rows.rows.numpy()]
    sizes = () if job.targets else tuple({t.size for t in job.teachers})
    images = tf.constant(job.train_store.images[batch_ids]), tf.constant(job.train_store.sizes[batch_ids])
    return views.training_views(job.config, *images, rows, tf.constant(0), sizes)


def shaken(classes: int = CLASSES, root_pool: str = "zero") -> keras.Model:
    """A small BiT with random values in all weights."""
    model = bit.bit("tiny", classes, IMAGE, root_pool=root_pool)
    rng = np.random.default_rng(3)
    model.set_weights([w + rng.normal(0, 0.2, w.shape).astype(np.float32) for w in model.get_weights()])
    return model


def parts(model: keras.Model) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Name and weights of each layer that has weights."""
    for layer in model.layers:
        if layer.weights:
            yield layer.name, {w.name: np.asarray(w) for w in layer.weights}


def native_layout(model: keras.Model, prefix: str = "") -> dict[str, np.ndarray]:
    """The weights as in big_vision's files, where norms have shape [1, 1, 1, channels]."""
    names = {"gamma": "scale", "beta": "bias"}
    weights = {}
    for name, w in parts(model):
        norm = {names.get(k, k): v[None, None, None] for k, v in w.items()}
        if name == "root_conv":
            weights["root_block/conv_root/kernel"] = w["kernel"]
        elif name == "final_norm":
            weights |= {f"norm-pre-head/{k}": v for k, v in norm.items()}
        elif name == "head":
            weights |= {f"head/{k}": v for k, v in w.items()}
        else:
            block, unit, part = name.split("_")[:3]
            number = {"a": 1, "b": 2, "c": 3}.get(part)
            if name.endswith("norm"):
                weights |= {f"{block}/{unit}/gn{number}/{k}": v for k, v in norm.items()}
            else:
                weights[f"{block}/{unit}/conv{number or '_proj'}/kernel"] = w["kernel"]
    return {prefix + k: v for k, v in weights.items()}


def image(number: int, size: tuple[int, int] = (9, 7), kind: str = "JPEG", **options: object) -> bytes:
    """A small encoded image, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def put(root: pathlib.Path, *names: str, first: int = 0) -> None:
    for number, name in enumerate(names, first):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image(number))


def tree(path: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file()}


def make_archive(path: pathlib.Path, content: dict[str, bytes], kind: str) -> pathlib.Path:
    """A well-formed archive."""
    if kind in ("zip", "stored"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if kind == "zip" else zipfile.ZIP_STORED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, {"tar": "w:"}.get(kind, f"w:{kind[4:]}")) as archive:  # type: ignore[call-overload]
        for name, data in content.items():
            archive.addfile(entry(name, len(data)), io.BytesIO(data))
    return path


def entry(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


def batch_normalized(path: pathlib.Path, widths: tuple[int, ...] = (8, 12), dropout: float = 0.0) -> str:
    """A file of a small classifier with batch normalisations of momentum 0.999; its path."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((IMAGE, IMAGE, 3))
    x = inputs
    for width in widths:
        x = keras.layers.Conv2D(width, 3, strides=2, use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.999)(x))
    x = keras.layers.Dropout(dropout)(keras.layers.GlobalAveragePooling2D()(x))
    keras.Model(inputs, keras.layers.Dense(CLASSES)(x)).save(path)
    return str(path)
