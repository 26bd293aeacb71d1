"""Measure any classifier on a split: top-1, top-5, each class; with --teacher also how far the two
agree.

    python -m trainer.evaluate --model=saved_model:RUN/export/saved_model --data=DATA --split=test

--model takes whatever --teacher of trainer.task takes, and SavedModels from encoded images, as the
job exports them, which do their own preprocessing. Every image counts once. Value range and outputs
are found as the job finds a teacher's; a bad model is measured, with a warning. JSON goes to
standard output, progress to standard error.

Exit codes: 0 done; 2 bad flags; 3 bad data or model.
"""

from __future__ import annotations

import dataclasses
import json
import math
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

    from trainer.data.dataset import Dataset
    from trainer.data.store import ImageStore
    from trainer.models.teachers import Teacher
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
        "model_range", "auto", f"Value range that the model takes: {', '.join(options.RANGES)} or auto.", **define
    )
    flags.DEFINE_enum("model_view", "auto", options.TEACHER_VIEWS, "Its own view, as --teacher_view.", **define)
    flags.DEFINE_string("model_output", "", "Name or number of the output to use, as --teacher_output.", **define)
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
        teacher_output=(values.model_output,) if values.model_output else (),
        teacher_outputs=values.model_outputs,
        teacher_view=(values.model_view,),
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
        model, split, images, not_finite (images for which an output is not), top1, top5, per_class,
        interval (95 %, of top1), chance; value_range, outputs and view as they were found; with a
        teacher teacher_top1, teacher_top5, agreement_top1, kl. own_view_top1 and
        teacher_own_view_top1 if that view is not the central crop. Without labels there are no
        accuracies. A figure that is not finite is None.

    Raises:
        ConfigError, DataError: as the main job does; also if there are neither labels nor teachers.
    """
    from trainer.data.dataset import Dataset
    from trainer.models import saved_models
    from trainer.run import accelerator
    from trainer.run.evaluator import describe_split, per_class, top_k

    dataset = Dataset.load(model_config.data[0])
    examples = dataset.split(split, "split").examples
    hardware = accelerator.resolve(model_config.tpu)
    (name,) = model_config.teacher
    kind, _, path = name.partition(":")
    logits: np.ndarray | None = None
    if kind == "saved_model" and path and saved_models.is_servable(path, "model"):
        logits = _servable_logits(path, dataset, split, console)
        model_config = _without_teacher(model_config)
    result, found, own = _evaluate(model_config, teacher_config, hardware, dataset, split, logits, console)
    renamed = {"student_top1": "top1", "student_top5": "top5"}
    metrics = {renamed.get(key, key): value for key, value in result.metrics().items()}
    if not metrics:
        raise DataError(
            f"{split} of {dataset.folder} has no labels, so there is no accuracy to measure: give a --teacher to "
            "measure agreement"
        )
    rows = result.labels >= 0
    if own is not None and rows.any():
        metrics["own_view_top1"] = top_k(own[rows], result.labels[rows], 1)
    classes = per_class(result.student_logits, result.labels, dataset.classes)
    where = describe_split(f"{split} of {dataset.folder}", result.labels)
    _print_summary(f"{name} on {where}", metrics, classes, console)
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    facts = {"model": name, "split": split, "images": examples} | _reliability(name, result, console)
    return facts | finite | (found or {}) | {"per_class": classes}


def _reliability(name: str, result: EvalResult, console: Console) -> dict[str, Any]:
    """How sure the accuracy is, with warnings."""
    import numpy as np

    from trainer.run.teacher_statistics import Accuracy, right

    not_finite = int((~np.isfinite(result.student_logits).all(axis=1)).sum())
    if not_finite:
        console.warning(
            f"{name} gives outputs that are not finite (NaN or infinite) on {not_finite:,} of {len(result.labels):,} "
            "images, which count as wrong"
        )
    facts: dict[str, Any] = {"not_finite": not_finite}
    rows = result.labels >= 0
    if rows.any():
        logits, labels = result.student_logits[rows], result.labels[rows]
        accuracy = Accuracy.of(right(logits, labels), labels, logits.shape[1])
        facts |= {"interval": accuracy.interval, "chance": accuracy.chance}
        console.info(f"{name}: {accuracy}")
        if not accuracy.above_chance:
            console.warning(f"{name} is not better than chance on these images")
    return facts


def _print_summary(
    title: str, metrics: dict[str, float], classes: dict[str, dict[str, float]], console: Console
) -> None:
    labels = {
        "top1": "top-1",
        "top5": "top-5",
        "own_view_top1": "on its own view",
        "teacher_top1": "teacher's top-1",
        "teacher_own_view_top1": "on its own view",
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
    default = Config()
    return dataclasses.replace(
        config,
        teacher=(),
        teacher_image_size=(),
        teacher_output=(),
        teacher_range=default.teacher_range,
        teacher_view=default.teacher_view,
    )


def _evaluate(
    model_config: Config,
    teacher_config: Config,
    hardware: Accelerator,
    dataset: Dataset,
    split: str,
    logits: np.ndarray | None,
    console: Console,
) -> tuple[EvalResult, dict[str, Any] | None, np.ndarray | None]:
    """The model's logits (computed unless `logits` holds them) and its teachers'; what was found
    about the model; and its logits on its own view, if that is another.
    """
    from trainer.data.store import MemoryStore
    from trainer.models import teachers
    from trainer.run.evaluator import EvalResult, Evaluator
    from trainer.run.teacher_check import Pictures, judge

    count = len(dataset.classes)
    with hardware.strategy.scope():
        try:
            models = teachers.load(model_config, count)
        except FunmatchError as error:
            text = str(error).replace("--teacher_image_size", "--image_size")
            raise type(error)(text.replace("--teacher", "--model")) from error
        loaded = teachers.load(teacher_config, count)
    count = models[0].classes if models else count if logits is None else logits.shape[1]
    if loaded and loaded[0].classes != count:
        raise DataError(
            f"--teacher={loaded[0].name} has {loaded[0].classes} classes and the --model has {count}: they must be the same"
        )
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
        return EvalResult(store.labels, logits, None), None, None

    def make(images: ImageStore) -> Evaluator:
        return Evaluator(config, hardware.strategy, images, jit_compile=hardware.jit_compile(config.jit_compile))

    pictures = Pictures.of(split, store, dataset.classes, make)
    evaluator = pictures.evaluator if pictures.whole else make(store)
    found = judge(model_config, models, pictures, console, refuse=False, role="model")
    models = tuple(decision.apply(model) for decision, model in zip(found, models, strict=True))
    decisions = judge(teacher_config, loaded, pictures, console, refuse=False)
    loaded = tuple(decision.apply(teacher) for decision, teacher in zip(decisions, loaded, strict=True))

    def progress(done: int, total: int) -> None:
        console.progress(f"evaluate {split}", done, total)

    def own_view(measured: tuple[Teacher, ...]) -> np.ndarray | None:
        kinds = tuple(teacher.view for teacher in measured)
        return evaluator.teacher_logits(measured, kinds, progress) if set(kinds) - {"central"} else None

    if logits is None:
        logits = evaluator.teacher_logits(models, progress=progress)
    reference = evaluator.teacher_logits(loaded, progress=progress) if loaded else None
    result = EvalResult(store.labels, logits, reference, own_view_logits=own_view(loaded))
    facts = {name: getattr(found[0], name) for name in ("value_range", "outputs", "view")} if found else None
    return result, facts, own_view(models)


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
