"""The report of a run: one self-contained HTML file, `report.html`.

`render` makes it from the configuration, the rows of metrics.jsonl, the result, sample images with
predictions, and the top-1 predictions of the final split. The file needs no network, no script and
no other file: curves are inline SVG, images inline PNG. Equal input gives equal text. Missing input
is left out.

The libraries of the extra `report` are imported at the first call; TensorFlow is never imported.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib
import io
import math
import pathlib
from typing import Any

import numpy as np

from trainer.core.errors import ConfigError
from trainer.output import charts, confusions, formatting
from trainer.output.confusions import Predictions

_TEMPLATE = pathlib.Path(__file__).parent / "report.html"
_EXTRA = ("jinja2", "matplotlib", "PIL")
_FIGURES = ("student_top1", "teacher_top1", "agreement_top1", "kl")
_MAX_IMAGE_SIDE = 256  # pixels; larger images are shrunk to keep the file small


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image and the predictions of the two models.

    Attributes:
        image: uint8 [h, w, 3], RGB, as the models see it.
        caption: where the image comes from.
        teacher: (class name, probability in 0..1), best first, up to 3; empty without a teacher.
        student: the same for the student.
        truth: name of the true class; None if it is unknown or meaningless, as for mixup.
    """

    image: np.ndarray
    caption: str
    teacher: list[tuple[str, float]]
    student: list[tuple[str, float]]
    truth: str | None = None


def render(
    *,
    title: str,
    config: dict[str, Any],
    history: list[dict[str, Any]],
    result: dict[str, Any],
    train_samples: list[Sample],
    eval_samples: list[Sample],
    predictions: Predictions | None,
    cost: dict[str, Any] | None = None,
    eval_choice: str = "",
    warning: str = "",
) -> str:
    """Renders the report.

    Args:
        title: name of the run.
        config: all options, as in config.json.
        history: rows of metrics.jsonl, `kind` "train" or "eval". Accuracies and agreements are
            shares in 0..1, KL is in nats at temperature 1. If a resumed run
            has several rows of one step, the last counts.
        result: result.json; any key may be missing. Without accuracy, agreement and KL, those of
            the last evaluation are shown.
        train_samples: training views.
        eval_samples: images of the final split.
        eval_choice: a sentence on how they were chosen.
        warning: what else the reader must know about the result; empty: nothing.
        predictions: of the final split, for the section on confusions; None leaves it out.
        cost: more rows for the table of costs, such as {"chip_hours": 1.5}.

    Returns:
        The HTML text, which can be encoded as UTF-8.

    Raises:
        ConfigError: a library of the extra `report` is not installed.
    """
    for name in _EXTRA:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"the report needs {name}, which is not installed: pip install funmatch[report]"
            ) from error
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=formatting.percent, count=formatting.count, css=lambda share: f"{100 * formatting.clip(share):.1f}%"
    )
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        headline=_headline(config, history, result, predictions),
        warning=warning,
        eval_choice=eval_choice,
        curves=charts.curves(history),
        train_cards=[_card(sample) for sample in train_samples],
        eval_cards=[_card(sample) for sample in eval_samples],
        labelled_cards=any(sample.truth is not None for sample in eval_samples),
        disagreements=sum(_disagree(sample) for sample in eval_samples),
        confusions=None if predictions is None else confusions.confusions(predictions),
        cost={
            "title": "",
            "caption": "Cost of the run; images seen are steps times batch size.",
            "columns": ["Quantity", "Value"],
            "text_columns": 1,
            "rows": _cost(config, history, result, cost or {}),
            "empty": "",
        },
        settings=[
            ("Configuration", _settings(config)),
            ("Versions", _settings(result.get("versions") or {})),
        ],
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # paths may have unpaired surrogates


# --- headline and cost ----------------------------------------------------------------------------


def _headline(
    config: dict[str, Any],
    history: list[dict[str, Any]],
    result: dict[str, Any],
    predictions: Predictions | None,
) -> dict[str, Any]:
    """The summary, the accuracy bars and the tiles at the top."""
    train, evaluations = formatting.rows(history, "train"), formatting.rows(history, "eval")
    source, note = result, ""
    if all(formatting.number(result.get(key)) is None for key in _FIGURES) and evaluations:
        source = evaluations[-1]
        step = formatting.count(source["step"])
        note = f"This run has no final result; these figures are of its last evaluation, at step {step}."
    student, teacher, agreement, kl = (formatting.number(source.get(key)) for key in _FIGURES)
    images, labelled = (formatting.number(source.get(key)) for key in ("split_images", "labelled_images"))
    partly = labelled is not None and images is not None and 0 < labelled < images
    last = train[-1] if train else {}
    steps = result.get("steps", last.get("step"))
    rate = result.get("images_per_second", last.get("images_per_second"))
    gap = student - teacher if student is not None and teacher is not None else None

    summary = "No accuracy was measured."
    if student is None and agreement is not None:
        on = f"the {images:,.0f}" if images else "the"
        summary = f"The student gives the teacher's class on {formatting.percent(agreement)} of {on} images."
        note = (note + " No image has a label, so no accuracy is known.").strip()
    elif student is not None:
        which = f"the {labelled:,.0f} images (of {images:,.0f}) that have a label" if partly else "the images"
        summary = f"The student classifies {formatting.percent(student)} of {which} correctly"
        if gap is None:
            summary += "; there was no teacher to compare it with."
        else:
            size = formatting.points(abs(gap)).lstrip("+")
            comparison = "equal to" if size == "0.0" else f"{size} points {'below' if gap < 0 else 'above'}"
            summary += f", {comparison} the teacher's {formatting.percent(teacher)}."

    tiles = []
    if gap is not None:
        tiles.append(("Gap to the teacher", f"{formatting.points(gap)} points", _gap_interval(predictions)))
    if agreement is not None:
        tiles.append(("Agreement", formatting.percent(agreement), "of images have the same top-1 class"))
    if kl is not None:
        tiles.append(("KL divergence", f"{formatting.real(kl)} nats", "teacher to student, temperature 1"))
    if constant := _constant(source):
        tiles.append(("Best constant answer", *constant))
    planned = formatting.number(config.get("steps"))
    done = formatting.number(steps)
    more = f"of {formatting.count(planned)}" if planned and done is not None and planned > done else ""
    tiles.append(("Steps", formatting.count(steps), more))
    tiles.append(("Speed", formatting.real(rate), "training images per second"))
    tiles.append(("Wall time", formatting.duration(result.get("wall_seconds", last.get("wall_seconds"))), ""))
    bars = [("Student", "student", student)] if student is not None else []
    if teacher is not None:
        bars.append(("Teacher", "teacher", teacher))
    if (own := formatting.number(source.get("teacher_own_view_top1"))) is not None:
        bars.append(("Teacher, own view", "teacher", own))
        summary += f" On its own view, that of its training, the teacher reaches {formatting.percent(own)}."
    of_bars = "Top-1 accuracy: the share of images whose most likely class is the true one; a full bar is 100%."
    constant_agreement = formatting.number(source.get("constant_agreement"))
    if student is None and agreement is not None:
        bars = [("Student", "student", agreement)]
        if constant_agreement is not None:
            bars.append(("Constant", "teacher", constant_agreement))
        of_bars = (
            "Agreement: the share of images whose most likely class is the teacher's; a full bar is 100%. "
            "Constant: what a model reaches that gives one answer for all images."
        )
    return {"summary": summary, "note": note, "bars": bars, "of_bars": of_bars, "tiles": tiles}


def _constant(source: dict[str, Any]) -> tuple[str, str] | None:
    """The figures of the best constant answer, and what it is; None if it was not measured."""
    top1, agreement, kl = (formatting.number(source.get(f"constant_{name}")) for name in ("top1", "agreement", "kl"))
    if top1 is not None:
        return formatting.percent(top1), "accuracy of always answering the commonest class"
    if agreement is None and kl is None:
        return None
    figures = f"{formatting.percent(agreement)}, {formatting.real(kl)} nats"
    return figures, "agreement and KL of one answer for all images, the teacher's mean"


def _gap_interval(predictions: Predictions | None) -> str:
    """The 95 % interval of the gap, paired because both models saw the same images."""
    if predictions is None or predictions.labels is None or predictions.teacher is None:
        return "student minus teacher"
    known = np.asarray(predictions.labels) >= 0
    student, teacher = (
        np.equal(top1, predictions.labels)[known] for top1 in (predictions.student, predictions.teacher)
    )
    size = len(student)
    if size < 2:
        return "student minus teacher"
    difference = student.astype(np.float64) - teacher
    margin = 1.96 * float(difference.std(ddof=1)) / math.sqrt(size)
    return f"student minus teacher; ±{100 * margin:.1f} at 95%, on {size:,} images"


def _cost(
    config: dict[str, Any],
    history: list[dict[str, Any]],
    result: dict[str, Any],
    cost: dict[str, Any],
) -> list[tuple[str, str]]:
    """Rows of (quantity, value)."""
    train = formatting.rows(history, "train")
    last = train[-1] if train else {}
    steps = formatting.number(result.get("steps", last.get("step")))
    batch = formatting.number(config.get("batch_size"))
    images = formatting.number(result.get("images"))
    if images is None and steps is not None and batch is not None:
        images = steps * batch
    rows = [("Images seen in training", formatting.count(images))]
    examples = formatting.number(result.get("examples"))
    if images is not None and examples:
        rows.append((f"Passes over the {examples:,.0f} training images", f"{images / examples:,.1f}"))
    rate = result.get("images_per_second", last.get("images_per_second"))
    rows.append(("Images per second", formatting.real(rate)))
    rows.append(("Wall time", formatting.duration(result.get("wall_seconds", last.get("wall_seconds")))))
    for key in sorted(cost):
        name = "Chip-hours" if key == "chip_hours" else key.replace("_", " ").capitalize()
        value = formatting.number(cost[key])
        rows.append((name, formatting.text(cost[key]) if value is None else f"{value:,.2f}"))
    return rows


def _settings(table: dict[str, Any]) -> list[tuple[str, str]]:
    return [(str(key), formatting.text(table[key])) for key in sorted(table, key=str)]


# --- images with predictions ----------------------------------------------------------------------


def _disagree(sample: Sample) -> bool:
    return bool(sample.teacher and sample.student and sample.teacher[0][0] != sample.student[0][0])


def _card(sample: Sample) -> dict[str, Any]:
    """An image with its predictions, as the template takes it."""
    agreement = []
    if sample.teacher and sample.student:
        disagree = _disagree(sample)
        agreement.append(("≠ they disagree", "bad") if disagree else ("= they agree", "good"))
    predictions = []
    for name, top in (("Student", sample.student), ("Teacher", sample.teacher)):
        if not top:
            continue
        mark = ""
        if sample.truth is not None:
            mark = "✓ right" if top[0][0] == sample.truth else "✗ wrong"
        predictions.append(
            {
                "name": name,
                "kind": name.lower(),
                "mark": mark,
                "tone": "good" if mark.startswith("✓") else "bad",
                "top": top[:3],
            }
        )
    top1 = "; ".join(f"{p['name']}: {p['top'][0][0]} {formatting.percent(p['top'][0][1])}" for p in predictions)
    truth = "" if sample.truth is None else f" True class: {sample.truth}."
    height, width = np.shape(sample.image)[:2]
    return {
        "source": _png(sample.image),
        "alt": f"{sample.caption or 'Image'}.{truth} {top1}".strip(),
        "small": max(height, width) < 96,
        "caption": sample.caption,
        "truth": sample.truth,
        "agreement": agreement,
        "predictions": predictions,
    }


def _png(image: np.ndarray) -> str:
    """uint8 [h, w, 3] as a data: URL."""
    from PIL import Image

    thumbnail = Image.fromarray(np.ascontiguousarray(image, np.uint8), "RGB")
    thumbnail.thumbnail((_MAX_IMAGE_SIDE, _MAX_IMAGE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    thumbnail.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
