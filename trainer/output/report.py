"""One self-contained page about a run: `report.html`.

`render` turns what a run leaves behind (configuration, rows of metrics.jsonl, result, a few
pictures with both opinions, top-1 predictions) into HTML that needs no network, no script and no
other file. Curves are SVG, pictures are PNG, all inline. Equal input gives equal text. Whatever is
missing is left out; nothing is made up.

The libraries that draw (the extra `report`) are imported on the first call; TensorFlow never is.
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
_PICTURE_SIDE = 256  # pixels; larger pictures are shrunk to keep the page small


@dataclasses.dataclass(frozen=True)
class Sample:
    """A picture and what the two models say about it.

    Attributes:
        image: uint8 [h, w, 3], RGB, as the models see it.
        caption: where the picture comes from, in words.
        teacher: (class name, probability in 0..1), best first, up to 3; empty without a teacher.
        student: the same of the student.
        truth: the name of the true class; None where it is unknown or, as in a mixed picture, has
            no meaning.
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
) -> str:
    """The page.

    Args:
        title: name of the run.
        config: every setting, as in config.json.
        history: rows of metrics.jsonl, `kind` "train" or "eval". Accuracies and agreements are
            shares in 0..1, KL is in nats at temperature 1. Of rows with the same step (a resumed
            run) the last counts.
        result: result.json; any key may be missing. Without accuracies, the last evaluation stands
            in for them.
        train_samples: pictures as training made them.
        eval_samples: pictures of the final split.
        predictions: for the confusions; None leaves them out.
        cost: more rows for the table of costs, such as {"chip_hours": 1.5}.

    Returns:
        HTML that is complete in itself and can be encoded as UTF-8.

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
        curves=charts.curves(history),
        train_cards=[_card(sample) for sample in train_samples],
        eval_cards=[_card(sample) for sample in eval_samples],
        differing=sum(_differ(sample) for sample in eval_samples),
        confusions=None if predictions is None else confusions.confusions(predictions),
        cost={
            "title": "",
            "caption": "What the run took; images seen are steps times batch, each crop counted.",
            "columns": ["What", "How much"],
            "words": 1,
            "rows": _cost(config, history, result, cost or {}),
            "empty": "",
        },
        settings=[
            ("Configuration", _settings(config)),
            ("Versions", _settings(result.get("versions") or {})),
        ],
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a path may hold half a character


# --- headline and cost ----------------------------------------------------------------------------


def _headline(
    config: dict[str, Any],
    history: list[dict[str, Any]],
    result: dict[str, Any],
    predictions: Predictions | None,
) -> dict[str, Any]:
    """The sentence, the two bars and the tiles at the top."""
    train, evaluations = formatting.rows(history, "train"), formatting.rows(history, "eval")
    source, note = result, ""
    if formatting.number(result.get("student_top1")) is None and evaluations:
        source = evaluations[-1]
        note = f"This run has no final result; these figures are of its last evaluation, at step {formatting.count(source['step'])}."
    student, teacher, agreement, kl = (
        formatting.number(source.get(key)) for key in ("student_top1", "teacher_top1", "agreement_top1", "kl")
    )
    last = train[-1] if train else {}
    steps = result.get("steps", last.get("step"))
    rate = result.get("images_per_second", last.get("images_per_second"))
    gap = student - teacher if student is not None and teacher is not None else None

    sentence = "No accuracy was measured."
    if student is not None:
        sentence = f"The student names {formatting.percent(student)} of the pictures correctly"
        if gap is None:
            sentence += "; there was no teacher to compare it with."
        else:
            size = formatting.points(abs(gap)).lstrip("+")
            word = "level with" if size == "0.0" else f"{size} points {'below' if gap < 0 else 'above'}"
            sentence += f", {word} the teacher's {formatting.percent(teacher)}."

    tiles = []
    if gap is not None:
        tiles.append(("Gap to the teacher", f"{formatting.points(gap)} points", _gap_interval(predictions)))
    if agreement is not None:
        tiles.append(("Agreement", formatting.percent(agreement), "of pictures get the same first answer"))
    if kl is not None:
        tiles.append(("KL divergence", f"{formatting.real(kl)} nats", "teacher to student, temperature 1"))
    of = formatting.number(config.get("steps"))
    made = formatting.number(steps)
    more = f"of {formatting.count(of)}" if of and made is not None and of > made else ""
    tiles.append(("Steps", formatting.count(steps), more))
    tiles.append(("Speed", formatting.real(rate), "images trained on in a second"))
    tiles.append(("Wall time", formatting.duration(result.get("wall_seconds", last.get("wall_seconds"))), ""))
    bars = [("Student", "student", student)] if student is not None else []
    if teacher is not None:
        bars.append(("Teacher", "teacher", teacher))
    return {"sentence": sentence, "note": note, "bars": bars, "tiles": tiles}


def _gap_interval(predictions: Predictions | None) -> str:
    """How sure the gap is: both models saw the same pictures, so the differences are paired."""
    if predictions is None or predictions.labels is None or predictions.teacher is None:
        return "student minus teacher"
    right = [np.equal(x, predictions.labels) for x in (predictions.student, predictions.teacher)]
    size = len(right[0])
    if size < 2:
        return "student minus teacher"
    difference = right[0].astype(np.float64) - right[1]
    margin = 1.96 * float(difference.std(ddof=1)) / math.sqrt(size)
    return f"student minus teacher; ±{100 * margin:.1f} at 95%, on {size:,} pictures"


def _cost(
    config: dict[str, Any],
    history: list[dict[str, Any]],
    result: dict[str, Any],
    cost: dict[str, Any],
) -> list[tuple[str, str]]:
    """What the run took: rows of (what, how much)."""
    train = formatting.rows(history, "train")
    last = train[-1] if train else {}
    steps = formatting.number(result.get("steps", last.get("step")))
    batch = formatting.number(config.get("batch_size"))
    seen = formatting.number(result.get("images"))
    if seen is None and steps is not None and batch is not None:
        seen = steps * batch
    rows = [("Images seen in training", formatting.count(seen))]
    examples = formatting.number(result.get("examples"))
    if seen is not None and examples:
        rows.append((f"Passes over the {examples:,.0f} training images", f"{seen / examples:,.1f}"))
    rate = result.get("images_per_second", last.get("images_per_second"))
    rows.append(("Images a second", formatting.real(rate)))
    rows.append(("Wall time", formatting.duration(result.get("wall_seconds", last.get("wall_seconds")))))
    for key in sorted(cost):
        name = "Chip-hours" if key == "chip_hours" else key.replace("_", " ").capitalize()
        value = formatting.number(cost[key])
        rows.append((name, formatting.text(cost[key]) if value is None else f"{value:,.2f}"))
    return rows


def _settings(table: dict[str, Any]) -> list[tuple[str, str]]:
    return [(str(key), formatting.text(table[key])) for key in sorted(table, key=str)]


# --- pictures with opinions -----------------------------------------------------------------------


def _differ(sample: Sample) -> bool:
    return bool(sample.teacher and sample.student and sample.teacher[0][0] != sample.student[0][0])


def _card(sample: Sample) -> dict[str, Any]:
    """A picture, what is written beside it, and a text that says the same."""
    verdicts = []
    if sample.teacher and sample.student:
        differ = _differ(sample)
        verdicts.append(("≠ they disagree", "bad") if differ else ("= they agree", "good"))
    opinions = []
    for name, answers in (("Student", sample.student), ("Teacher", sample.teacher)):
        if not answers:
            continue
        mark = ""
        if sample.truth is not None:
            mark = "✓ right" if answers[0][0] == sample.truth else "✗ wrong"
        opinions.append(
            {
                "name": name,
                "kind": name.lower(),
                "mark": mark,
                "tone": "good" if mark.startswith("✓") else "bad",
                "answers": answers[:3],
            }
        )
    said = "; ".join(f"{o['name']}: {o['answers'][0][0]} {formatting.percent(o['answers'][0][1])}" for o in opinions)
    truth = "" if sample.truth is None else f" True class: {sample.truth}."
    height, width = np.shape(sample.image)[:2]
    return {
        "source": _png(sample.image),
        "alt": f"{sample.caption or 'Picture'}.{truth} {said}".strip(),
        "small": max(height, width) < 96,
        "caption": sample.caption,
        "truth": sample.truth,
        "verdicts": verdicts,
        "opinions": opinions,
    }


def _png(image: np.ndarray) -> str:
    """A data: address of uint8 [h, w, 3]."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image, np.uint8), "RGB")
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
