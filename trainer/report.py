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
import json
import math
import numbers
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from trainer.errors import ConfigError

_DASH = "–"  # noqa: RUF001 - shown where a figure is missing
_EXTRA = ("jinja2", "matplotlib", "PIL")
_PICTURE_SIDE = 256  # pixels; larger pictures are shrunk to keep the page small
_CURVE_POINTS = 500  # of one line; longer histories are averaged in buckets
_MATRIX_CLASSES = 40  # the most classes whose confusion matrix can be read
_PAIRS = 12  # rows of the tables of confusions
_WORST = 10  # rows of the table of classes

# Colours that matplotlib writes, and the CSS variables that replace them (light, dark, print).
_INK = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--student)",
    "#050505": "var(--teacher)",
}
_TEXT, _MUTED, _LINE, _STUDENT, _TEACHER = _INK


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


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The first choice of each model on every example of the final split.

    Attributes:
        labels: int [n], the true classes in 0..len(classes)-1; None where they are unknown.
        teacher: int [n]; None without a teacher.
        student: int [n].
        classes: names, by class index.
    """

    labels: np.ndarray | None
    teacher: np.ndarray | None
    student: np.ndarray
    classes: list[str]

    def __post_init__(self) -> None:
        sizes = {np.shape(x) for x in (self.labels, self.teacher, self.student) if x is not None}
        if len(sizes) > 1 or len(next(iter(sizes))) != 1:
            raise ValueError(f"predictions must have one and the same length, got {sorted(sizes)}")


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
    environment.filters.update(percent=_percent, count=_count, css=lambda share: f"{100 * _clip(share):.1f}%")
    page = environment.from_string(_PAGE).render(
        title=title,
        headline=_headline(config, history, result, predictions),
        curves=_curves(history),
        train_cards=[_card(sample) for sample in train_samples],
        eval_cards=[_card(sample) for sample in eval_samples],
        differing=sum(_differ(sample) for sample in eval_samples),
        confusions=None if predictions is None else _confusions(predictions),
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


# --- figures in words -----------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    """A finite float, or None for anything else."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def _clip(share: Any) -> float:
    return min(1.0, max(0.0, _number(share) or 0.0))


def _percent(share: Any) -> str:
    value = _number(share)
    return _DASH if value is None else f"{100 * value:.1f}%"


def _points(difference: float) -> str:
    """A difference of two shares, in percentage points with its sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _count(value: Any) -> str:
    number = _number(value)
    return _DASH if number is None else f"{number:,.0f}"


def _real(value: Any) -> str:
    """A number of any size with three or four figures, and thousands marked."""
    number = _number(value)
    if number is None:
        return _DASH
    size = abs(number)
    if size == 0:
        return "0"
    if size >= 100:
        return f"{number:,.0f}"
    if size >= 10:
        return f"{number:.1f}"
    return f"{number:.3f}" if size >= 0.001 else f"{number:.1e}"


def _duration(seconds: Any) -> str:
    number = _number(seconds)
    if number is None or number < 0:
        return _DASH
    if number < 59.95:
        return f"{number:.1f} s"
    minutes, rest = divmod(round(number), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


# --- headline and cost ----------------------------------------------------------------------------


def _rows(history: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Rows of one kind by rising step; of rows with one step (and split), the last."""
    rows = {}
    for row in history:
        if row.get("kind") == kind and _number(row.get("step")) is not None:
            rows[float(row["step"]), str(row.get("split", ""))] = row
    return [rows[key] for key in sorted(rows)]


def _headline(
    config: dict[str, Any],
    history: list[dict[str, Any]],
    result: dict[str, Any],
    predictions: Predictions | None,
) -> dict[str, Any]:
    """The sentence, the two bars and the tiles at the top."""
    train, evaluations = _rows(history, "train"), _rows(history, "eval")
    source, note = result, ""
    if _number(result.get("student_top1")) is None and evaluations:
        source = evaluations[-1]
        note = (
            f"This run has no final result; these figures are of its last evaluation, at step {_count(source['step'])}."
        )
    student, teacher, agreement, kl = (
        _number(source.get(key)) for key in ("student_top1", "teacher_top1", "agreement_top1", "kl")
    )
    last = train[-1] if train else {}
    steps = result.get("steps", last.get("step"))
    rate = result.get("images_per_second", last.get("images_per_second"))
    gap = student - teacher if student is not None and teacher is not None else None

    sentence = "No accuracy was measured."
    if student is not None:
        sentence = f"The student names {_percent(student)} of the pictures correctly"
        if gap is None:
            sentence += "; there was no teacher to compare it with."
        else:
            size = _points(abs(gap)).lstrip("+")
            word = "level with" if size == "0.0" else f"{size} points {'below' if gap < 0 else 'above'}"
            sentence += f", {word} the teacher's {_percent(teacher)}."

    tiles = []
    if gap is not None:
        tiles.append(("Gap to the teacher", f"{_points(gap)} points", _gap_interval(predictions)))
    if agreement is not None:
        tiles.append(("Agreement", _percent(agreement), "of pictures get the same first answer"))
    if kl is not None:
        tiles.append(("KL divergence", f"{_real(kl)} nats", "teacher to student, temperature 1"))
    of = _number(config.get("steps"))
    made = _number(steps)
    more = f"of {_count(of)}" if of and made is not None and of > made else ""
    tiles.append(("Steps", _count(steps), more))
    tiles.append(("Speed", _real(rate), "images trained on in a second"))
    tiles.append(("Wall time", _duration(result.get("wall_seconds", last.get("wall_seconds"))), ""))
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
    train = _rows(history, "train")
    last = train[-1] if train else {}
    steps = _number(result.get("steps", last.get("step")))
    batch = _number(config.get("batch_size"))
    seen = _number(result.get("images"))
    if seen is None and steps is not None and batch is not None:
        seen = steps * batch
    rows = [("Images seen in training", _count(seen))]
    examples = _number(result.get("examples"))
    if seen is not None and examples:
        rows.append((f"Passes over the {examples:,.0f} training images", f"{seen / examples:,.1f}"))
    rate = result.get("images_per_second", last.get("images_per_second"))
    rows.append(("Images a second", _real(rate)))
    rows.append(("Wall time", _duration(result.get("wall_seconds", last.get("wall_seconds")))))
    for key in sorted(cost):
        name = "Chip-hours" if key == "chip_hours" else key.replace("_", " ").capitalize()
        value = _number(cost[key])
        rows.append((name, _text(cost[key]) if value is None else f"{value:,.2f}"))
    return rows


def _settings(table: dict[str, Any]) -> list[tuple[str, str]]:
    return [(str(key), _text(table[key])) for key in sorted(table, key=str)]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


# --- curves ---------------------------------------------------------------------------------------


def _curves(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The panels that have something to show: {title, last, caption, label, svg}."""
    train, evaluations = _rows(history, "train"), _rows(history, "eval")
    splits = sorted({str(row.get("split", "")) for row in evaluations})

    many = len(splits) > 1

    def training(key: str) -> dict[str, Any]:
        return {"points": _points_of(train, key), "name": "training views", "noisy": True}

    def evaluation(key: str, who: str) -> list[dict[str, Any]]:
        lines = []
        for split in splits:
            rows = [row for row in evaluations if str(row.get("split", "")) == split]
            teacher = who == "teacher"
            name = ", ".join(part for part in (who, split if many or not who else "") if part)
            lines.append({"points": _points_of(rows, key), "name": name, "teacher": teacher})
        return lines

    panels = [
        (
            "Loss",
            [training("loss") | {"name": "loss"}],
            "real",
            "What training lowers; the pale line is each log row, the strong one its running mean.",
        ),
        (
            "Top-1 accuracy" + (f", {splits[0]}" if splits and not many else ""),
            evaluation("student_top1", "student") + evaluation("teacher_top1", "teacher"),
            "share",
            "Share of first answers that are true; where the solid line meets the dashed one, "
            "the student has caught up with the teacher.",
        ),
        (
            "Agreement",
            [training("agreement"), *evaluation("agreement_top1", "")],
            "share",
            "Share of pictures on which both models give the same first answer; mixed training "
            "views are harder to agree on than whole pictures.",
        ),
        (
            "KL divergence",
            [training("kl"), *evaluation("kl", "")],
            "real",
            "Distance from the teacher's probabilities to the student's, in nats at temperature 1; "
            "zero is a perfect copy.",
        ),
        (
            "Learning rate",
            [training("learning_rate") | {"name": "learning rate", "noisy": False}],
            "plain",
            "The schedule as it was applied, step by step; the figure above is its peak.",
        ),
        (
            "Speed",
            [training("images_per_second") | {"name": "images/s"}],
            "plain",
            "Images trained on in a second; a dip is time lost to loading or saving.",
        ),
    ]
    end = max((float(row["step"]) for row in train + evaluations), default=0.0)
    drawn = []
    for number, (name, lines, scale, caption) in enumerate(panels):
        lines = [line for line in lines if line["points"]]
        if not lines:
            continue
        form = _percent if scale == "share" else _real
        words = [f"{line['name'] or 'evaluation'} {form(_ending(line))}" for line in lines]
        if name == "Learning rate":
            words = [f"peak {_real(max(value for _, value in lines[0]['points']))}"]
        first = min(line["points"][0][0] for line in lines)
        last = max(line["points"][-1][0] for line in lines)
        drawn.append(
            {
                "title": name,
                "last": "; ".join(words),
                "caption": caption,
                "label": f"Line chart of {name}, steps {first:,.0f} to {last:,.0f}: {'; '.join(words)}.",
                "svg": _draw(f"c{number}", lines, scale, end),
            }
        )
    return drawn


def _ending(line: dict[str, Any]) -> float:
    """The last value, of the running mean where there is one."""
    values = np.array([value for _, value in line["points"]])
    return float((_running_mean(values) if line.get("noisy") else values)[-1])


def _points_of(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) where there is a value."""
    pairs = ((float(row["step"]), _number(row.get(key))) for row in rows)
    return [(step, value) for step, value in pairs if value is not None]


def _tick(value: Any, _position: Any = None) -> str:
    """The label of an axis: 0, 0.001, 250, 20k, 1.5M."""
    number = _number(value)
    if number is None:
        return _DASH
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean over up to a 25th of all values around each; float [n] -> float [n].

    Near the start it looks ahead no further than back, so that a steep descent is not bent.
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    at, reach = np.arange(len(values)), len(values) // 50
    back = np.minimum(at, reach)
    ahead = np.minimum(back, len(values) - 1 - at)
    return (total[at + ahead + 1] - total[at - back]) / (back + ahead + 1)


def _draw(prefix: str, lines: list[dict[str, Any]], scale: str, end: float) -> Any:
    """One panel, over steps 0 to `end`, as inline SVG whose ids start with `prefix`."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib import ticker
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's matplotlibrc
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "funmatch",
                "svg.fonttype": "none",
                "text.parse_math": False,
                "axes.unicode_minus": False,
                "font.size": 9,
            }
        )
        figure = Figure(figsize=(3.9, 2.45), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        styles = iter(["o", "s", "^", "D", "v", "P"] * len(lines))
        values: list[float] = []
        for line in lines:
            steps, shown = (np.asarray(axis) for axis in zip(*line["points"], strict=True))
            noisy = line.get("noisy")
            colour = _TEACHER if line.get("teacher") else _STUDENT
            if noisy is not None and len(lines) > 1:
                colour = _MUTED
            if noisy is not None:  # a row of the training log
                smooth = _running_mean(shown) if noisy else shown
                if len(shown) > _CURVE_POINTS:
                    buckets = np.array_split(np.arange(len(shown)), _CURVE_POINTS)
                    steps, shown, smooth = (
                        np.array([axis[bucket].mean() for bucket in buckets]) for axis in (steps, shown, smooth)
                    )
                dot = "o" if len(shown) == 1 else ""
                if noisy and len(shown) >= 50:
                    axes.plot(steps, shown, color=colour, alpha=0.3, linewidth=0.8)
                axes.plot(
                    steps,
                    smooth,
                    color=colour,
                    linewidth=1.6,
                    marker=dot,
                    label=line["name"] or "evaluation",
                )
            else:
                axes.plot(
                    steps,
                    shown,
                    color=colour,
                    linewidth=1.6,
                    linestyle=(0, (5, 3)) if line.get("teacher") else "-",
                    marker=next(styles) if not line.get("teacher") or len(shown) == 1 else "",
                    markersize=3.5,
                    markevery=max(1, len(shown) // 25),
                    label=line["name"] or "evaluation",
                )
            values += shown.tolist()
        low, high = min(values), max(values)
        if scale == "share":
            margin = max(0.02, 0.08 * (high - low))
            axes.set_ylim(max(-0.01, low - margin), min(1.01, high + margin))
            axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
        else:
            if scale == "real" and low > 0 and high / low > 20:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.yaxis.set_minor_locator(ticker.NullLocator())
            elif low >= 0:
                axes.set_ylim(0, 1.08 * high if high > 0 else 1.0)
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(_tick))
        axes.set_xlim(-0.03 * max(end, 1.0), 1.03 * max(end, 1.0))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(_tick))
        axes.set_xlabel("step", color=_MUTED)
        axes.tick_params(colors=_MUTED, length=0)
        axes.grid(color=_LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_LINE)
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor=_TEXT, loc="best", fontsize=8.5)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Markup(_inline(buffer.getvalue(), prefix))


def _inline(svg: str, prefix: str) -> str:
    """Makes matplotlib's file a part of the page: own ids, the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", svg)
    svg = re.sub(r"\bfont: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg)
    for colour, variable in _INK.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", svg).strip()


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
    said = "; ".join(f"{o['name']}: {o['answers'][0][0]} {_percent(o['answers'][0][1])}" for o in opinions)
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


# --- confusions -----------------------------------------------------------------------------------


def _confusions(predictions: Predictions) -> dict[str, Any] | None:
    """Tables {title, caption, columns, rows, empty} and the matrix of who takes what for what."""
    student = np.asarray(predictions.student, np.int64)
    labels, teacher = (
        None if x is None else np.asarray(x, np.int64) for x in (predictions.labels, predictions.teacher)
    )
    if student.size == 0:
        return None
    highest = max(int(x.max()) for x in (labels, teacher, student) if x is not None)
    names = list(predictions.classes)
    names += [f"class {index}" for index in range(len(names), highest + 1)]
    tables = []
    if labels is not None:
        tables.append(_mistakes(labels, teacher, student, names))
    if teacher is not None:
        tables.append(_disagreements(labels, teacher, student, names))
    if labels is not None:
        tables.append(_worst(labels, teacher, student, names))
    if labels is not None and teacher is not None:
        tables.append(_who_is_right(labels, teacher, student))
    matrix = None
    if 1 < len(names) <= _MATRIX_CLASSES and labels is not None:
        matrix = _matrix(labels, student, names, "true class")
    elif 1 < len(names) <= _MATRIX_CLASSES and teacher is not None:
        matrix = _matrix(teacher, student, names, "teacher's answer")
    if not tables and not matrix:
        return None
    return {"size": student.size, "tables": tables, "matrix": matrix}


def _name(names: list[str], index: int) -> str:
    return names[index] if index >= 0 else f"class {index}"


def _mistakes(labels: np.ndarray, teacher: np.ndarray | None, student: np.ndarray, names: list[str]) -> dict[str, Any]:
    caption = "A row counts the pictures of one class that the student takes for another"
    columns = ["True class", "Student says", "Pictures", "Share of class"]
    if teacher is not None:
        caption += ", and how many of these mistakes the teacher makes too"
        columns.append("Teacher too")
    rows = []
    for a, b, at in _pairs(labels, student):
        row = [_name(names, a), _name(names, b), _count(at.sum())]
        row.append(_percent(at.sum() / (labels == a).sum()))
        if teacher is not None:
            row.append(_count((teacher[at] == b).sum()))
        rows.append(row)
    return {
        "title": "Most frequent mistakes of the student",
        "caption": caption + ".",
        "columns": columns,
        "words": 2,
        "rows": rows,
        "empty": "The student made no mistake.",
    }


def _disagreements(
    labels: np.ndarray | None, teacher: np.ndarray, student: np.ndarray, names: list[str]
) -> dict[str, Any]:
    caption = "A row counts the pictures that the teacher calls one class and the student another"
    columns = ["Teacher says", "Student says", "Pictures"]
    if labels is not None:
        caption += ", and who is right on how many"
        columns += ["Teacher right", "Student right"]
    caption += f"; they agree on {_percent((teacher == student).mean())} of all pictures."
    rows = []
    for a, b, at in _pairs(teacher, student):
        row = [_name(names, a), _name(names, b), _count(at.sum())]
        if labels is not None:
            row += [_count((labels[at] == a).sum()), _count((labels[at] == b).sum())]
        rows.append(row)
    return {
        "title": "Most frequent disagreements",
        "caption": caption,
        "columns": columns,
        "words": 2,
        "rows": rows,
        "empty": "They agree on every picture.",
    }


def _worst(labels: np.ndarray, teacher: np.ndarray | None, student: np.ndarray, names: list[str]) -> dict[str, Any]:
    columns = ["Class", "Pictures", "Student"]
    if teacher is not None:
        columns += ["Teacher", "Gap, points"]
    classes = []
    for index in np.unique(labels).tolist():
        at = labels == index
        own = float((student[at] == index).mean())
        row = [_name(names, index), _count(at.sum()), _percent(own)]
        if teacher is not None:
            other = float((teacher[at] == index).mean())
            row += [_percent(other), _points(own - other)]
        classes.append((own, index, row))
    rows = [row for _, _, row in sorted(classes)[:_WORST]]
    caption = f"The {len(rows)} of {len(classes):,} classes in which the student does worst"
    if teacher is not None:
        caption += "; where the teacher is weak too, it had no better to learn from"
    return {
        "title": "Classes with the lowest accuracy",
        "caption": caption + ".",
        "columns": columns,
        "words": 1,
        "rows": rows,
        "empty": "",
    }


def _who_is_right(labels: np.ndarray, teacher: np.ndarray, student: np.ndarray) -> dict[str, Any]:
    own, other, same = student == labels, teacher == labels, student == teacher
    groups = [
        ("Both right", own & other),
        ("Only the teacher right", ~own & other),
        ("Only the student right", own & ~other),
        ("Both wrong, same answer", ~own & ~other & same),
        ("Both wrong, different answers", ~own & ~other & ~same),
    ]
    return {
        "title": "Who is right",
        "caption": "Every picture is in one row; “only the student right” shows what it did not take from the teacher.",
        "columns": ["First answers", "Pictures", "Share"],
        "words": 1,
        "rows": [[name, _count(at.sum()), _percent(at.mean())] for name, at in groups],
        "empty": "",
    }


def _pairs(rows: np.ndarray, columns: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """The most frequent pairs of different classes: (row, column, bool [n] where), best first."""
    off = rows != columns
    pairs, counts = np.unique(np.stack([rows[off], columns[off]], 1), axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -counts))[:_PAIRS]
    return [(a, b, (rows == a) & (columns == b)) for a, b in pairs[order].tolist()]


def _matrix(rows: np.ndarray, columns: np.ndarray, names: list[str], meaning: str) -> dict[str, Any]:
    """The geometry of the confusion matrix, in pixels of its drawing."""
    side = len(names)
    counts = np.zeros((side, side), np.int64)
    known = (rows >= 0) & (columns >= 0)
    np.add.at(counts, (rows[known], columns[known]), 1)
    sizes = np.maximum(counts.sum(1, keepdims=True), 1)
    shares = counts / sizes
    cell = 15 if side > 25 else 22 if side > 12 else 34
    short = [name if len(name) <= 20 else name[:19] + "…" for name in names]
    margin = 12 + round(6.2 * max(map(len, short)))
    cells = []
    for a, b in np.argwhere(counts > 0).tolist():
        share = float(shares[a, b])
        count = int(counts[a, b])
        cells.append(
            {
                "x": margin + cell * b,
                "y": margin + cell * a,
                "fill": "student" if a == b else "bad",
                "opacity": f"{0.06 + 0.94 * math.sqrt(share):.3f}",
                "text": "card" if share > 0.35 else "ink",
                "count": count,
                "title": f"{names[a]} → {names[b]}: {count:,} ({_percent(share)})",
            }
        )
    labels = [{"name": short[i], "at": margin + cell * i, "mid": margin + cell * (i + 0.5)} for i in range(side)]
    right = _percent(counts.trace() / max(1, counts.sum()))
    return {
        "cell": cell,
        "margin": margin,
        "side": cell * side,
        "height": margin + cell * side + 8,
        "width": round(1.6 * margin) + cell * side + 8,  # the names above lean to the right
        "cells": cells,
        "labels": labels,
        "numbers": cell >= 22 and counts.max() < 1000,
        "diagonal": right,
        "classes": side,
        "rows": meaning,
        "angle": -90 if side > 25 else -55,
    }


# --- the page -------------------------------------------------------------------------------------

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root {
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2330; --muted: #566173; --line: #dfe3e9;
  --student: #1463c4; --teacher: #b3500b; --good: #17693a; --bad: #a3195b;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1b2129; --ink: #e8ecf2; --muted: #a3aebd; --line: #343d49;
    --student: #74b0ff; --teacher: #f2a45c; --good: #6fd39a; --bad: #ff8fc0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1180px;
  background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere; -webkit-print-color-adjust: exact; print-color-adjust: exact;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .3rem; }
h3 { font-size: 1rem; margin: 0 0 .2rem; }
p { margin: 0 0 .8rem; max-width: 75ch; }
a { color: var(--student); }
svg text { font-family: inherit; }
.note, .how, small, figcaption { color: var(--muted); font-size: .9rem; }
nav { display: flex; flex-wrap: wrap; gap: 0 1.1em; margin: .2rem 0 1.4rem; font-size: .9rem; }
.panel {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem;
  min-width: 0;
}
.lead { font-size: 1.2rem; margin-bottom: 1rem; }
.measure {
  display: grid; grid-template-columns: 5.2rem 1fr 4.6rem; gap: .8rem; align-items: center;
  margin: .45rem 0;
}
.measure b { font-size: 1.25rem; text-align: right; font-variant-numeric: tabular-nums; }
.track {
  display: block; background: var(--line); border-radius: 3px; overflow: hidden; height: 14px;
}
.fill { display: block; height: 100%; }
.student.fill { background: var(--student); }
.teacher.fill {
  background: repeating-linear-gradient(135deg, var(--teacher) 0 4px, transparent 4px 6px);
  border-right: 2px solid var(--teacher);
}
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem;
  margin: 1rem 0 0;
}
.tiles dt { color: var(--muted); font-size: .9rem; }
.tiles dd { margin: 0; }
.tiles b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(310px, 1fr)); gap: 1rem; }
figure { margin: 0; }
.curves svg { display: block; width: 100%; height: auto; margin: .4rem 0; }
.grid {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 1rem;
  padding: 0; margin: 0; list-style: none;
}
.card { padding: .75rem; font-size: .88rem; line-height: 1.35; }
.card img {
  display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 5px;
  background: var(--page);
}
.card img.small { image-rendering: pixelated; }
.card p { margin: .5rem 0 0; }
.badge {
  display: inline-block; border: 1px solid currentColor; border-radius: 99px; padding: 0 .6em;
  font-weight: 600;
}
.good { color: var(--good); } .bad { color: var(--bad); }
.who { display: flex; justify-content: space-between; font-weight: 600; margin: .6rem 0 .15rem; }
.card ol { list-style: none; margin: 0; padding: 0; }
.card li.answer {
  display: grid; grid-template-columns: 1fr auto; column-gap: .5rem; margin-bottom: .25rem;
}
.answer span:nth-child(2) { font-variant-numeric: tabular-nums; }
.answer .track { grid-column: 1 / -1; height: 6px; }
.answer .true { font-weight: 600; text-decoration: underline; text-underline-offset: 2px; }
.tables {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr));
  gap: 1rem;
}
.scroll { overflow-x: auto; }
table { overflow-wrap: break-word; border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; color: var(--muted); padding-bottom: .5rem; }
caption b { display: block; color: var(--ink); font-size: 1rem; }
th, td {
  text-align: left; padding: .28rem .5rem; border-bottom: 1px solid var(--line);
  vertical-align: top; font-weight: 400;
}
thead th { color: var(--muted); vertical-align: bottom; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.settings td { font-family: ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; }
.settings { overflow-wrap: anywhere; }
.settings tbody th { width: 34%; }
.matrix { margin-top: 1rem; }
.matrix svg {
  display: block; fill: var(--ink); max-width: 100%; min-width: 420px; height: auto;
  margin: .6rem auto; font-size: 11px;
}
.matrix text { dominant-baseline: central; }
.matrix text.in { pointer-events: none; }
.box { fill: none; stroke: var(--line); }
.eye { fill: none; stroke: var(--muted); }
details { margin-top: 1rem; }
summary { cursor: pointer; font-weight: 600; }
footer { margin-top: 3rem; }
@media print {
  :root { font-size: 10.5px; }
  body { max-width: none; padding: 0; background: #fff; font-size: 1rem; }
  nav { display: none; }
  h2 { margin-top: 1.6rem; }
  h2, summary, p.how { break-after: avoid; }
  .panel, tr, p { break-inside: avoid; }
  .panel.long { break-inside: auto; }
  .panel, .card { padding: .7rem; }
  .curves { grid-template-columns: repeat(3, 1fr); }
  .grid { grid-template-columns: repeat(6, 1fr); gap: .7rem; }
  .tiles { grid-template-columns: repeat(6, 1fr); }
  .tables { grid-template-columns: 1fr 1fr; }
  .matrix svg { max-width: 75%; }
  details::details-content { content-visibility: visible; }
}
</style>
</head>
<body>
{% macro bar(kind, share) %}
<span class="track" aria-hidden="true">
<span class="fill {{ kind }}" style="width:{{ share|css }}"></span>
</span>
{% endmacro %}
{% macro cards(list) %}
<ul class="grid">
{% for card in list %}
<li class="panel card">
<img src="{{ card.source }}" alt="{{ card.alt }}"{% if card.small %} class="small"{% endif %}>
{% if card.caption %}<p class="how">{{ card.caption }}</p>{% endif %}
{% if card.truth is not none %}<p>True class: <b>{{ card.truth }}</b></p>{% endif %}
{% for words, kind in card.verdicts %}
<p><span class="badge {{ kind }}">{{ words }}</span></p>
{% endfor %}
{% for opinion in card.opinions %}
<div class="who">
<span>{{ opinion.name }}</span>
{% if opinion.mark %}<span class="{{ opinion.tone }}">{{ opinion.mark }}</span>{% endif %}
</div>
<ol>
{% for name, share in opinion.answers %}
<li class="answer">
<span{% if name == card.truth %} class="true"{% endif %}>{{ name }}</span>
<span>{{ share|percent }}</span>
{{ bar(opinion.kind, share) }}
</li>
{% endfor %}
</ol>
{% endfor %}
</li>
{% endfor %}
</ul>
{% endmacro %}
{% macro table(t) %}
<div class="panel scroll">
<table>
<caption>{% if t.title %}<b>{{ t.title }}</b>{% endif %}{{ t.caption }}</caption>
<thead><tr>
{% for name in t.columns %}
<th scope="col"{% if loop.index > t.words %} class="n"{% endif %}>{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in t.rows %}
<tr>
<th scope="row">{{ row[0] }}</th>
{% for value in row[1:] %}
<td{% if loop.index >= t.words %} class="n"{% endif %}>{{ value }}</td>
{% endfor %}
</tr>
{% else %}
<tr><td colspan="{{ t.columns|length }}">{{ t.empty }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
<header>
<h1>{{ title }}</h1>
<p class="note">A student learns a teacher's function from crops and mixtures of images:
Beyer et al. 2021, <a href="https://arxiv.org/abs/2106.05237">arXiv:2106.05237</a>.</p>
<nav aria-label="Sections">
<a href="#result">Result</a>
{% if curves %}<a href="#curves">Curves</a>{% endif %}
{% if train_cards %}<a href="#training">Training pictures</a>{% endif %}
{% if eval_cards %}<a href="#evaluation">Evaluation pictures</a>{% endif %}
{% if confusions %}<a href="#confusions">Confusions</a>{% endif %}
<a href="#cost">Cost</a>
<a href="#settings">Settings</a>
</nav>
</header>
<main>
<section id="result" class="panel" aria-label="Result">
<p class="lead">{{ headline.sentence }}</p>
{% if headline.note %}<p class="note">{{ headline.note }}</p>{% endif %}
{% for name, kind, share in headline.bars %}
<div class="measure"><span>{{ name }}</span>{{ bar(kind, share) }}<b>{{ share|percent }}</b></div>
{% endfor %}
{% if headline.bars %}
<p class="how">Top-1 accuracy: the share of pictures whose first answer is the true class; a full
bar is 100%.</p>
{% endif %}
<dl class="tiles">
{% for name, value, more in headline.tiles %}
<div>
<dt>{{ name }}</dt>
<dd><b>{{ value }}</b>{% if more %}<small>{{ more }}</small>{% endif %}</dd>
</div>
{% endfor %}
</dl>
</section>

<section aria-labelledby="curves">
<h2 id="curves">Curves</h2>
{% if curves %}
<p class="how">Each chart runs over the training steps; the figures under its title are its last
values, of the running mean where there is one.</p>
<div class="curves">
{% for curve in curves %}
<figure class="panel">
<h3>{{ curve.title }}</h3>
<small>{{ curve.last }}</small>
<div role="img" aria-label="{{ curve.label }}">{{ curve.svg }}</div>
<figcaption>{{ curve.caption }}</figcaption>
</figure>
{% endfor %}
</div>
{% else %}
<p>No measurements were recorded.</p>
{% endif %}
</section>

{% if train_cards %}
<section aria-labelledby="training">
<h2 id="training">What the models saw in training</h2>
<p class="how">Each picture is a crop, usually mixed with a second one; the bars are
the probabilities that the models gave to their first answers, and the student's are to become the
teacher's, whatever is in the picture.</p>
{{ cards(train_cards) }}
</section>
{% endif %}

{% if eval_cards %}
<section aria-labelledby="evaluation">
<h2 id="evaluation">Evaluation pictures</h2>
<p class="how">The central crop of whole pictures, without mixing; the true class is
underlined where a model names it, and “≠ they disagree” marks two different first answers
{%- if differing %} ({{ differing }} of {{ eval_cards|length }} here){% endif %}.</p>
{{ cards(eval_cards) }}
</section>
{% endif %}

{% if confusions %}
<section aria-labelledby="confusions">
<h2 id="confusions">Confusions</h2>
<p class="how">First answers on all {{ confusions.size|count }} pictures of the final split.</p>
<div class="tables">
{% for each in confusions.tables %}
{{ table(each) }}
{% endfor %}
</div>
{% if confusions.matrix %}
{% set m = confusions.matrix %}
<figure class="panel matrix">
<h3>Confusion matrix</h3>
<figcaption>A row is a {{ m.rows }}, a column the student's answer; a stronger cell is a larger
share of its row (shades grow with the square root, so that rare mistakes show), and the outlined
diagonal is where they match.</figcaption>
<div class="scroll" role="img" aria-label="Confusion matrix of {{ m.classes }} classes: rows are the
{{ m.rows }}, columns the student's answer. {{ m.diagonal }} of the pictures lie on the diagonal.
The most frequent other cells are in the tables above.">
<svg viewBox="0 0 {{ m.width }} {{ m.height }}" width="{{ m.width }}" aria-hidden="true">
<rect x="{{ m.margin }}" y="{{ m.margin }}" width="{{ m.side }}" height="{{ m.side }}" class="box"/>
{% for label in m.labels %}
<text x="{{ m.margin - 6 }}" y="{{ label.mid }}" text-anchor="end">{{ label.name }}</text>
<text transform="translate({{ label.mid }} {{ m.margin - 6 }}) rotate({{ m.angle }})">
{{- label.name }}</text>
<rect x="{{ label.at }}" y="{{ label.at }}" width="{{ m.cell }}" height="{{ m.cell }}" class="eye"/>
{% endfor %}
{% for cell in m.cells %}
<rect x="{{ cell.x + 1 }}" y="{{ cell.y + 1 }}" width="{{ m.cell - 2 }}" height="{{ m.cell - 2 }}"
 fill="var(--{{ cell.fill }})" fill-opacity="{{ cell.opacity }}">
<title>{{ cell.title }}</title></rect>
{% if m.numbers %}
<text x="{{ cell.x + m.cell / 2 }}" y="{{ cell.y + m.cell / 2 }}" text-anchor="middle"
 class="in" fill="var(--{{ cell.text }})">{{ cell.count }}</text>
{% endif %}
{% endfor %}
</svg>
</div>
</figure>
{% endif %}
</section>
{% endif %}

<section aria-labelledby="cost">
<h2 id="cost">Cost</h2>
{{ table(cost) }}
</section>

<section aria-labelledby="settings">
<h2 id="settings">Settings and versions</h2>
<p class="how">Everything that is needed to run this again.</p>
{% for name, rows in settings %}
<details class="panel long">
<summary>{{ name }} ({{ rows|length }})</summary>
<table class="settings">
<thead><tr><th scope="col">Name</th><th scope="col">Value</th></tr></thead>
<tbody>
{% for key, value in rows %}
<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>
{% else %}
<tr><td colspan="2">Nothing was recorded.</td></tr>
{% endfor %}
</tbody></table>
</details>
{% endfor %}
</section>
</main>
<footer class="note">Made by funmatch. This page is complete in itself: it loads nothing and sends
nothing.</footer>
</body>
</html>
"""
