"""The student as others load it: a SavedModel (JPEG bytes, or image tensors) and a `.keras` file without our code.

Both signatures contain the whole of evaluation's preprocessing, so what is served is what was measured.
"""

from __future__ import annotations

import json
import os
import tempfile
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


class Servable(tf.Module):
    """A student with its preprocessing.

    Signatures, each returning logits float32 [n, classes], probabilities float32 [n, classes], top_classes string [n, k] and
    top_probabilities float32 [n, k], k = min(5, classes):
        serving_default: image_bytes string [n], encoded JPEG, PNG, BMP or GIF, any size.
        images: images uint8 [n, height, width, 3], any one size.
    """

    def __init__(self, model: keras.Model, classes: tuple[str, ...], config: Config) -> None:
        super().__init__(name="funmatch_student")
        self.model = model
        self._names = tf.constant(list(classes))
        self._config, self._store = config, config.store_size
        self._top = min(TOP, len(classes))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")], autograph=False)
    def serve_bytes(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        """The signature `serving_default`."""

        def one(encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            image = records.decode(encoded)
            return store.squash(image, self._store), tf.cast(tf.shape(image)[:2], tf.float32)

        spec = (
            tf.TensorSpec([self._store, self._store, 3], tf.uint8),
            tf.TensorSpec([2], tf.float32),
        )
        return self._classify(*tf.map_fn(one, image_bytes, fn_output_signature=spec))

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
        best, which = tf.math.top_k(probabilities, self._top)
        return {
            "logits": logits,
            "probabilities": probabilities,
            "top_classes": tf.gather(self._names, which),
            "top_probabilities": best,
        }


def single_device_copy(model: keras.Model) -> keras.Model:
    """The model outside of any strategy, float32 throughout, weight standardisation folded in."""
    config = model.get_config()
    copy = type(model).from_config(_alone(config))
    copy.set_weights(model.get_weights())
    return bit.fold(copy)


def _alone(value: Any) -> Any:
    """A model's configuration with every dtype policy of its layers set to float32, and no normalisation over replicas."""
    if isinstance(value, dict):
        if value.get("class_name") == "DTypePolicy":
            return value | {"config": {"name": "float32"}}
        return {key: False if key == "synchronized" else _alone(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_alone(item) for item in value)
    return value


def write(
    folder: str,
    model: keras.Model,
    classes: tuple[str, ...],
    config: Config,
    card: dict[str, Any],
) -> None:
    """Writes saved_model/, model.keras, classes.json and MODEL_CARD.md into `folder`, on a disk or gs://.

    Args:
        folder: made if it is not there.
        model: the trained student.
        classes: class names in the order of the logits.
        config: resolved; sizes, value range and central crop that evaluation used.
        card: facts for the card, by name.

    Raises:
        DataError: it cannot be written.
    """
    copy = single_device_copy(model)
    servable = Servable(copy, classes, config)
    signatures = {"serving_default": servable.serve_bytes, "images": servable.serve_images}
    with tempfile.TemporaryDirectory() as local:
        # TensorFlow writes under other names and renames, and what it had begun when it was killed would lie there for ever.
        try:
            tf.saved_model.save(servable, local, signatures=signatures)
        except (tf.errors.OpError, OSError) as error:
            raise DataError(f"cannot write the exported model in {local}: {files.reason(error)}") from error
        files.copy_tree(local, files.join(folder, "saved_model"), "the exported model", "saved_model.pb")
    save_keras(copy, files.join(folder, "model.keras"))
    names = json.dumps(list(classes), ensure_ascii=False, indent=1) + "\n"
    files.write(files.join(folder, "classes.json"), names.encode(), "the class names")
    files.write(files.join(folder, "MODEL_CARD.md"), _card(card, config).encode(), "the model card")


def clean(folder: str) -> None:
    """Deletes what a crash while `write` wrote to a disk left behind; only for the folder's one writer."""
    for part in ("", "saved_model", "saved_model/variables"):
        files.remove_temporary(files.join(folder, part))


def save_keras(model: keras.Model, path: str) -> None:
    """Writes a `.keras` file whole or not at all, on a disk or gs://.

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


def _card(facts: dict[str, Any], config: Config) -> str:
    side, (low, high) = config.image_size, config.student_range.split(",")
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""# Image classifier made by funmatch

With a teacher in the table, it learned that teacher's outputs on cropped and mixed images by function matching (Beyer et al. 2021,
arXiv 2106.05237). Without one, it learned from labels.

| fact | value |
|---|---|
{rows}

## Use
`model.keras` takes float32 images [n, {side}, {side}, 3] in [{low}, {high}] and returns logits; `keras.saving.load_model` needs
nothing of funmatch. `saved_model` takes encoded images (`serving_default`, `image_bytes`) or uint8 images of any size
(`images`) and does the preprocessing itself. Class names are in `classes.json`, in the order of the logits.

## Limits
Accuracy was measured on the split named above and says nothing about other images. A distilled model
repeats what its teacher knows, errors included.
"""
