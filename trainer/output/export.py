"""Exports the student: a SavedModel that takes encoded images or uint8 images, and a `.keras`
file.

Neither needs this package. The SavedModel contains evaluation's preprocessing, so that a served
model has the measured accuracy. A new format is a row of `EXPORTERS`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from trainer.core.config import Config
from trainer.core.errors import DataError
from trainer.data import records, store
from trainer.io import files
from trainer.method import views
from trainer.models import bit, keras_files, value_range

TOP = 5

# Names in the card's table of metrics whose own do not say what they are.
CARD_NAMES = {
    "kl": "kl (nats)",
    "constant_kl": "kl of the best constant answer (nats)",
    "constant_agreement": "agreement of the best constant answer",
    "constant_top1": "top-1 of the best constant answer",
}


class Servable(tf.Module):
    """A student with its preprocessing.

    Signatures:
        serving_default: image_bytes string [n], encoded JPEG, PNG, BMP or GIF of any sizes.
        images: images uint8 [n, height, width, 3] of any one size.

    Each returns logits and probabilities, float32 [n, classes], and top_classes, string, and
    top_probabilities, float32, [n, min(5, classes)].
    """

    def __init__(self, model: keras.Model, classes: tuple[str, ...], config: Config) -> None:
        """
        Args:
            model: float32, outside of any strategy, see `single_device_copy`.
            classes: class names in the order of the logits.
            config: resolved; sizes, value range and central crop of evaluation.
        """
        super().__init__(name="funmatch_student")
        self.model = model
        self._names = tf.constant(list(classes))
        self._config, self._store = config, config.store_size
        self._top = min(TOP, len(classes))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")], autograph=False)
    def serve_bytes(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        """The signature `serving_default`."""

        def decode(encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            image = records.decode(encoded)
            return store.squash(image, self._store), tf.cast(tf.shape(image)[:2], tf.float32)

        spec = (
            tf.TensorSpec([self._store, self._store, 3], tf.uint8),
            tf.TensorSpec([2], tf.float32),
        )
        return self._classify(*tf.map_fn(decode, image_bytes, fn_output_signature=spec))

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, "images")], autograph=False)
    def serve_images(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """The signature `images`."""
        original = tf.cast(tf.shape(images)[1:3], tf.float32)
        sizes = tf.tile(original[None], [tf.shape(images)[0], 1])
        squares = tf.ensure_shape(store.squash(images, self._store), [None, self._store, self._store, 3])
        return self._classify(squares, sizes)

    def _classify(self, squares: tf.Tensor, sizes: tf.Tensor) -> dict[str, tf.Tensor]:
        config = self._config
        view = value_range.to_range(
            views.evaluation_view(config, squares, sizes, config.image_size), config.student_range
        )
        logits = tf.cast(self.model(view, training=False), tf.float32)
        probabilities = tf.nn.softmax(logits)
        top_probabilities, indices = tf.math.top_k(probabilities, self._top)
        return {
            "logits": logits,
            "probabilities": probabilities,
            "top_classes": tf.gather(self._names, indices),
            "top_probabilities": top_probabilities,
        }


def single_device_copy(model: keras.Model) -> keras.Model:
    """A copy outside of any strategy, in float32, with standardised kernels (`bit.fold`)."""
    copy = type(model).from_config(_single_device_config(model.get_config()))
    copy.set_weights(model.get_weights())
    return bit.fold(copy)


def _single_device_config(value: Any) -> Any:
    """A model's configuration, or part of it, in float32, without synchronized normalisation."""
    if isinstance(value, dict):
        if value.get("class_name") == "DTypePolicy":
            return value | {"config": {"name": "float32"}}
        return {key: False if key == "synchronized" else _single_device_config(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_single_device_config(item) for item in value)
    return value


def write(
    folder: str,
    model: keras.Model,
    classes: tuple[str, ...],
    config: Config,
    card: dict[str, Any],
) -> None:
    """Writes what each of `EXPORTERS` writes, classes.json and MODEL_CARD.md into `folder`.

    Args:
        folder: on a disk or gs://; created if it does not exist.
        model: the trained student.
        classes: class names in the order of the logits.
        config: resolved; sizes, value range and central crop of evaluation.
        card: facts for the card, by name.

    Raises:
        DataError: it cannot be written.
    """
    servable = Servable(single_device_copy(model), classes, config)
    for name, export in EXPORTERS.items():
        export(servable, files.join(folder, name))
    names = json.dumps(list(classes), ensure_ascii=False, indent=1) + "\n"
    files.write(files.join(folder, "classes.json"), names.encode(), "the class names")
    files.write(files.join(folder, "MODEL_CARD.md"), _card(card, config).encode(), "the model card")


def clean(folder: str) -> None:
    """Deletes temporary files that a crash of `write` left on a disk; for the only writer."""
    for part in ("", "saved_model", "saved_model/variables"):
        files.remove_temporary(files.join(folder, part))


def save_saved_model(servable: Servable, path: str) -> None:
    """Writes a SavedModel folder, saved_model.pb last, on a disk or gs://.

    Raises:
        DataError: it cannot be written.
    """
    signatures = {"serving_default": servable.serve_bytes, "images": servable.serve_images}
    with tempfile.TemporaryDirectory() as local:
        # TensorFlow writes under temporary names of its own, which a killed process would leave.
        try:
            tf.saved_model.save(servable, local, signatures=signatures)
        except (tf.errors.OpError, OSError) as error:
            raise DataError(f"cannot write the exported model in {local}: {files.reason(error)}") from error
        files.copy_tree(local, path, "the exported model", "saved_model.pb")


def save_keras(model: keras.Model, path: str) -> None:
    """Writes a `.keras` file atomically, on a disk or gs://.

    Raises:
        DataError: it cannot be written, or it would load only where this package is installed.
    """
    if custom := keras_files.custom_classes(model):
        raise DataError(
            f"cannot write {path}: {', '.join(custom)} is not part of Keras, so the file would load only with this package; "
            "build the student of plain Keras layers"
        )
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "model.keras")
        model.save(local)
        with open(local, "rb") as file:
            files.write(path, file.read(), "a model")


# Writers by the name of the file or folder that they write.
EXPORTERS: dict[str, Callable[[Servable, str], None]] = {
    "saved_model": save_saved_model,
    "model.keras": lambda servable, path: save_keras(servable.model, path),
}


def _card(facts: dict[str, Any], config: Config) -> str:
    side, (low, high) = config.image_size, config.student_range.split(",")
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    limits = "Accuracy was measured on the split named above and may differ on other images."
    if "agreement_top1" in facts and "student_top1" not in facts:
        limits = (
            "No image of the split named above has a label: agreement with the teacher was measured, and accuracy is not "
            "known."
        )
    return f"""# Image classifier trained by funmatch

If the table names a teacher, the model was trained to match that teacher's outputs on cropped and mixed images (function
matching, Beyer et al. 2021, arXiv 2106.05237). Otherwise it was trained on labels.

| fact | value |
|---|---|
{rows}

## Use
`model.keras` takes float32 images [n, {side}, {side}, 3] in [{low}, {high}] and returns logits; `keras.saving.load_model` loads
it without funmatch. `saved_model` takes encoded images (`serving_default`, `image_bytes`) or uint8 images of any size
(`images`) and does the preprocessing itself. Class names are in `classes.json`, in the order of the logits.

## Limits
{limits} A distilled model also learns its teacher's errors.
"""
