"""Measure any classifier on a split: top-1, top-5, each class; with --teacher also how far the two
agree.

    python -m trainer.evaluate --model=saved_model:RUN/export/saved_model --data=DATA --split=test

--model takes whatever --teacher of trainer.task takes, and SavedModels from encoded images, as the
job exports them, which do their own preprocessing. Every image counts once. JSON goes to standard
output, progress to standard error.

Exit codes: 0 done; 2 bad flags; 3 bad data or model.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from trainer import cli
from trainer.core import options
from trainer.core.config import Config
from trainer.core.console import Console
from trainer.core.errors import ConfigError, DataError, FunmatchError
from trainer.core.flags import SHARED, from_flags, shared_flags

if TYPE_CHECKING:
    import numpy as np
    import tensorflow as tf

    from trainer.data.dataset import Dataset
    from trainer.run.accelerator import Accelerator
    from trainer.run.evaluator import EvalResult

_ENCODED_BATCH = 64  # encoded images in one call of a servable SavedModel


def define_flags(values: flags.FlagValues) -> None:
    """The verb's flags: some of the main job's, and its own."""
    shared_flags(values, *SHARED, batch_size=64)
    define: dict[str, Any] = {"flag_values": values, "module_name": "evaluate"}
    flags.DEFINE_string("model", "", "What to measure: KIND:PATH as for --teacher.", **define)
    flags.DEFINE_string("split", "test", "Split of --data.", **define)
    flags.DEFINE_integer(
        "image_size", 0, "Side in pixels that the model takes; 0: what its file says, else 128.", **define
    )
    flags.DEFINE_string(
        "model_range", "auto", f"Value range that the model takes: {' or '.join(options.RANGES)}.", **define
    )
    flags.DEFINE_enum("model_outputs", "auto", options.OUTPUTS, "What it returns, as --teacher_outputs.", **define)


def main(argv: list[str] | None = None) -> int:
    """The verb; returns an exit code."""
    return cli.run(__doc__, define_flags, _main, argv)


def _main(values: flags.FlagValues) -> None:
    if not values.model:
        raise ConfigError("--model is missing: for example --model=keras:RUN/export/model.keras")
    if len(values.data) != 1:
        raise ConfigError(
            f"--data is given {len(values.data)} times: give one folder or gs:// prefix that "
            "`python -m trainer.prepare` wrote"
        )
    size = values.image_size or Config().image_size
    teacher_config = from_flags(values, steps=1, image_size=size)
    model_config = from_flags(
        values,
        steps=1,
        image_size=size,
        teacher=(values.model,),
        teacher_image_size=(values.image_size,) if values.image_size else (),
        teacher_range=Config().teacher_range if values.model_range == "auto" else (values.model_range,),
        teacher_outputs=values.model_outputs,
        teacher_sha256=(),
    )
    print(json.dumps(run(model_config, teacher_config, values.split, Console()), indent=1))


def run(model_config: Config, teacher_config: Config, split: str, console: Console) -> dict[str, Any]:
    """Measures a model.

    Args:
        model_config: its one `teacher` is the model to measure, on its data.
        teacher_config: its teachers are what the model is compared with; none: no comparison.
        split: of the data.
        console: shows progress and a summary.

    Returns:
        model, split, images, top1, top5, per_class; with a teacher teacher_top1, teacher_top5,
        agreement_top1, kl.

    Raises:
        ConfigError, DataError: as the main job does.
    """
    from trainer.data.dataset import Dataset
    from trainer.models import saved_models
    from trainer.run import accelerator
    from trainer.run.evaluator import per_class

    dataset = Dataset.load(model_config.data[0])
    examples = dataset.split(split, "split").examples
    hardware = accelerator.resolve(model_config.tpu)
    (name,) = model_config.teacher
    kind, _, path = name.partition(":")
    logits: np.ndarray | None = None
    if kind == "saved_model" and path and saved_models.is_servable(path, "model"):
        logits = _servable_logits(path, dataset, split, console)
        model_config = _without_teacher(model_config)
    result = _evaluate(model_config, teacher_config, hardware, dataset, split, logits, console)
    renamed = {"student_top1": "top1", "student_top5": "top5"}
    metrics = {renamed.get(key, key): value for key, value in result.metrics().items()}
    if result.labelled < examples:
        some = f"{result.labelled:,} of {examples:,} images" if result.labelled else "no image"
        console.info(f"{split} of {dataset.folder}: {some} with a label; accuracies {'are of those' if result.labelled else 'are not known'}")
    classes = per_class(result.student_logits, result.labels, dataset.classes)
    _print_summary(f"{name} on {split} of {dataset.folder} ({examples:,} images)", metrics, classes, console)
    return {"model": name, "split": split, "images": examples} | metrics | {"per_class": classes}


def _print_summary(
    title: str, metrics: dict[str, float], classes: dict[str, dict[str, float]], console: Console
) -> None:
    labels = {
        "top1": "top-1",
        "top5": "top-5",
        "teacher_top1": "teacher's top-1",
        "agreement_top1": "agreement",
        "kl": "KL",
    }
    parts = [
        f"{label} {metrics[key]:.4f} nats" if key == "kl" else f"{label} {metrics[key]:.2%}"
        for key, label in labels.items()
        if key in metrics
    ]
    console.info(f"{title}: {', '.join(parts)}")
    lowest = sorted(classes.items(), key=lambda item: item[1]["top1"])[:5]
    if lowest:
        console.info("lowest: " + ", ".join(f"{c} {100 * row['top1']:.1f}% of {row['images']}" for c, row in lowest))


def _without_teacher(config: Config) -> Config:
    return dataclasses.replace(config, teacher=(), teacher_image_size=(), teacher_range=Config().teacher_range)


def _evaluate(
    model_config: Config,
    teacher_config: Config,
    hardware: Accelerator,
    dataset: Dataset,
    split: str,
    logits: np.ndarray | None,
    console: Console,
) -> EvalResult:
    """The model's logits (computed unless `logits` holds them) and its teachers'."""
    import tensorflow as tf

    from trainer.data.store import MemoryStore
    from trainer.models import teachers
    from trainer.run.evaluator import EvalResult, Evaluator

    count = len(dataset.classes)
    with hardware.strategy.scope():
        try:
            models = teachers.load(model_config, count)
        except FunmatchError as error:
            text = str(error).replace("--teacher_image_size", "--image_size")
            raise type(error)(text.replace("--teacher", "--model")) from error
        count = count or (models[0].classes if models else 0 if logits is None else logits.shape[1])
        loaded = teachers.load(teacher_config, count)
    teachers.print_notes((*models, *loaded), console)
    size = models[0].size if models else loaded[0].size if loaded else model_config.image_size
    largest = max((teacher.size for teacher in (*models, *loaded)), default=size)
    config = dataclasses.replace(
        _without_teacher(model_config),
        image_size=size,
        student_range="-1,1",
        store_size=model_config.store_size or 2 * largest,
        ensemble=teacher_config.ensemble,
    ).resolve(1)
    store = MemoryStore(
        dataset,
        dataset.split(split, "split"),
        config.store_size,
        lambda done, total: console.progress(f"decode {split}", done, total),
    )
    if logits is not None and not loaded:
        return EvalResult(store.labels, logits, None)

    def model(images: tf.Tensor, *, training: bool) -> tf.Tensor:
        del training
        # Placeholder where `logits` are given: these zeros are discarded.
        return models[0].logits(images) if models else tf.zeros([tf.shape(images)[0], count])

    jit_compile = hardware.jit_compile(config.jit_compile)
    result = Evaluator(config, hardware.strategy, store, jit_compile=jit_compile).run(model, loaded)
    return result if logits is None else EvalResult(store.labels, logits, result.teacher_logits)


def _servable_logits(path: str, dataset: Dataset, split: str, console: Console) -> np.ndarray:
    """A servable SavedModel's logits on the encoded images of a split: float32 [n, classes]."""
    import numpy as np

    from trainer.data.records import EncodedSplit
    from trainer.models import saved_models

    model = saved_models.SavedServable(path, "model")
    if dataset.classes and model.classes not in (None, len(dataset.classes)):
        raise DataError(
            f"--model=saved_model:{path} has {model.classes} classes; --data={dataset.folder} has {len(dataset.classes)}"
        )
    encoded = EncodedSplit(dataset, dataset.split(split, "split"))
    parts = []
    for start in range(0, len(encoded), _ENCODED_BATCH):
        ids = range(start, min(start + _ENCODED_BATCH, len(encoded)))
        parts.append(model([encoded.record(example).encoded for example in ids]))
        console.progress("evaluate", ids.stop, len(encoded))
    return np.concatenate(parts)


if __name__ == "__main__":
    sys.exit(main())
