"""Measure any classifier on a split: top-1, top-5, each class; with --teacher also how far the two agree.

    python -m trainer.evaluate --model=saved_model:RUN/export/saved_model --data=DATA --split=test

--model takes whatever --teacher of trainer.task takes, and SavedModels from encoded images, as the job exports them, which do
their own preprocessing. Every image counts once. JSON goes to standard output, what is for people to standard error.
Exit codes: 0 done; 2 bad flags; 3 bad data or model.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from trainer import cli
from trainer.core import options
from trainer.core.config import Config
from trainer.core.errors import ConfigError, FunmatchError
from trainer.core.flags import from_flags

if TYPE_CHECKING:
    import numpy as np

    from trainer.core.console import Console
    from trainer.data.dataset import Dataset
    from trainer.run.accelerator import Accelerator
    from trainer.run.evaluator import EvalResult
from trainer.core.flags import SHARED, shared_flags

_ENCODED = 64  # encoded images in one call


def define_flags(values: flags.FlagValues) -> None:
    """The verb's flags: some of the main job's, and its own."""
    shared_flags(values, *SHARED, batch_size=64)
    own: dict[str, Any] = {"flag_values": values, "module_name": "evaluate"}
    flags.DEFINE_string("model", "", "What to measure: KIND:PATH as for --teacher.", **own)
    flags.DEFINE_string("split", "test", "Split of --data.", **own)
    flags.DEFINE_integer(
        "image_size", 0, "Side in pixels that the model takes; 0: what its file says, else 128.", **own
    )
    flags.DEFINE_string(
        "model_range", "auto", f"Value range that the model takes: {' or '.join(options.RANGES)}.", **own
    )
    flags.DEFINE_enum("model_outputs", "auto", options.OUTPUTS, "What it returns, as --teacher_outputs.", **own)


def main(argv: list[str] | None = None) -> int:
    """The verb; returns an exit code."""
    return cli.run(__doc__, define_flags, _main, argv)


def _main(values: Any) -> None:
    from trainer.core.console import Console

    if not values.model:
        raise ConfigError("--model is missing: for example --model=keras:RUN/export/model.keras")
    if len(values.data) != 1:
        raise ConfigError(
            f"--data is given {len(values.data)} times: one folder or gs:// prefix that `python -m trainer.prepare` wrote"
        )
    size = values.image_size or Config().image_size
    asked = from_flags(values, steps=1, image_size=size)
    measured = from_flags(
        values,
        steps=1,
        image_size=size,
        teacher=(values.model,),
        teacher_image_size=(values.image_size,) if values.image_size else (),
        teacher_range=Config().teacher_range if values.model_range == "auto" else (values.model_range,),
        teacher_outputs=values.model_outputs,
        teacher_sha256=(),
    )
    console = Console()
    result = run(measured, asked, values.split, console)
    print(json.dumps(result, indent=1))


def run(measured: Config, asked: Config, split: str, console: Console) -> dict[str, Any]:
    """Measures a model.

    Args:
        measured: its `teacher` is the model.
        asked: its teachers are what the model is compared with; none: it is not.
        split: of its data.
        console: where people read.

    Returns:
        model, split, images, top1, top5, per_class; with a teacher teacher_top1, teacher_top5, agreement_top1, kl.

    Raises:
        ConfigError, DataError: as the main job does.
    """
    from trainer.data.dataset import Dataset
    from trainer.models import saved_models
    from trainer.run import accelerator
    from trainer.run.evaluator import per_class

    dataset = Dataset.load(measured.data[0])
    examples = dataset.split(split, "split").examples
    hardware = accelerator.resolve(measured.tpu)
    (name,) = measured.teacher
    kind, _, path = name.partition(":")
    logits: np.ndarray | None = None
    if kind == "saved_model" and path and saved_models.is_servable(path, "model"):
        logits = _encoded(path, dataset, split, console)
        measured = _no_teacher(measured)
    outcome = _outcome(measured, asked, hardware, dataset, split, logits, console)
    named = {"student_top1": "top1", "student_top5": "top5"}
    found = {named.get(key, key): value for key, value in outcome.metrics().items()}
    classes = per_class(outcome.student, outcome.labels, dataset.classes)
    told = ", ".join(
        f"{word} {value:.4f} nats" if key == "kl" else f"{word} {value:.2%}"
        for key, word in (
            ("top1", "top-1"),
            ("top5", "top-5"),
            ("teacher_top1", "teacher's top-1"),
            ("agreement_top1", "agreement"),
            ("kl", "KL"),
        )
        if (value := found.get(key)) is not None
    )
    console.info(f"{name} on {split} of {dataset.folder} ({examples:,} images): {told}")
    worst = sorted(classes.items(), key=lambda item: item[1]["top1"])[:5]
    if worst:
        console.info("lowest: " + ", ".join(f"{c} {100 * w['top1']:.1f}% of {w['images']}" for c, w in worst))
    return {"model": name, "split": split, "images": examples} | found | {"per_class": classes}


def _no_teacher(chosen: Config) -> Config:
    import dataclasses

    return dataclasses.replace(chosen, teacher=(), teacher_image_size=(), teacher_range=Config().teacher_range)


def _outcome(
    measured: Config,
    asked: Config,
    hardware: Accelerator,
    dataset: Dataset,
    split: str,
    logits: np.ndarray | None,
    console: Console,
) -> EvalResult:
    """The model's logits, those given or computed, and its teachers'."""
    import dataclasses

    import tensorflow as tf

    from trainer.data.store import MemoryStore
    from trainer.models import teachers
    from trainer.run.evaluator import EvalResult, Evaluator

    count = len(dataset.classes)
    with hardware.strategy.scope():
        try:
            models = teachers.load(measured, count)
        except FunmatchError as error:
            text = str(error).replace("--teacher_image_size", "--image_size")
            raise type(error)(text.replace("--teacher", "--model")) from error
        loaded = teachers.load(asked, count)
    for teacher in (*models, *loaded):
        for note in teacher.notes:
            console.info(note)
    size = models[0].size if models else loaded[0].size if loaded else measured.image_size
    largest = max((t.size for t in (*models, *loaded)), default=size)
    settings = dataclasses.replace(
        _no_teacher(measured), image_size=size, student_range="-1,1", store_size=measured.store_size or 2 * largest
    )
    settings = dataclasses.replace(settings, ensemble=asked.ensemble).resolve(1)
    store = MemoryStore(
        dataset,
        dataset.split(split, "split"),
        settings.store_size,
        lambda done, total: console.progress(f"decode {split}", done, total),
    )
    evaluator = Evaluator(settings, hardware.strategy, store, jit_compile=hardware.jit_compile(settings.jit_compile))

    def model(images: tf.Tensor, *, training: bool) -> tf.Tensor:
        del training
        # Of a model that was asked already, what is said here is not used.
        return models[0].logits(images) if models else tf.zeros([tf.shape(images)[0], count])

    if logits is not None and not loaded:
        return EvalResult(store.labels, logits, None)
    found = evaluator.run(model, loaded)
    return found if logits is None else EvalResult(store.labels, logits, found.teacher)


def _encoded(path: str, dataset: Dataset, split: str, console: Console) -> np.ndarray:
    """What a SavedModel says of the encoded images of a split: float32 [n, classes]."""
    import numpy as np

    from trainer.core.errors import DataError
    from trainer.data.records import EncodedSplit
    from trainer.models import saved_models

    model = saved_models.SavedServable(path, "model")
    if model.classes not in (None, len(dataset.classes)):
        raise DataError(
            f"--model=saved_model:{path} knows {model.classes} classes; --data={dataset.folder} has {len(dataset.classes)}"
        )
    encoded = EncodedSplit(dataset, dataset.split(split, "split"))
    parts = []
    for start in range(0, len(encoded), _ENCODED):
        ids = range(start, min(start + _ENCODED, len(encoded)))
        parts.append(model([encoded.record(example).encoded for example in ids]))
        console.progress("evaluate", ids.stop, len(encoded))
    return np.concatenate(parts)


if __name__ == "__main__":
    sys.exit(main())
