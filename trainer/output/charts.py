"""Curves of a run as SVG, in the colours of the report."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np

from trainer.output import formatting

_CURVE_POINTS = 500  # per line; longer histories are averaged in buckets

# Placeholder colours for matplotlib, and the CSS variables that replace them.
_CSS_VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--student)",
    "#050505": "var(--teacher)",
}
_TEXT, _MUTED, _LINE, _STUDENT, _TEACHER = _CSS_VARIABLES


def curves(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The charts of a run, without those that have no values.

    Args:
        history: rows of metrics.jsonl.

    Returns:
        For each chart its `title`, `last` (values as text), `caption`, `label` (for screen readers)
        and `svg`.
    """
    train, evaluations = formatting.rows(history, "train"), formatting.rows(history, "eval")
    splits = sorted({str(row.get("split", "")) for row in evaluations})
    several_splits = len(splits) > 1

    def training_line(key: str) -> dict[str, Any]:
        return {"points": _points_of(train, key), "name": "training views", "noisy": True}

    def evaluation_lines(key: str, model: str) -> list[dict[str, Any]]:
        lines = []
        for split in splits:
            rows = [row for row in evaluations if str(row.get("split", "")) == split]
            teacher = model == "teacher"
            name = ", ".join(part for part in (model, split if several_splits or not model else "") if part)
            lines.append({"points": _points_of(rows, key), "name": name, "teacher": teacher})
        return lines

    def constant_lines(key: str) -> list[dict[str, Any]]:
        return [line | {"constant": True} for line in evaluation_lines(f"constant_{key}", "best constant")]

    panels = [
        (
            "Loss",
            [training_line("loss") | {"name": "loss"}],
            "real",
            "The training loss; the pale line is each log row, the strong one its running mean.",
        ),
        (
            "Top-1 accuracy" + (f", {splits[0]}" if splits and not several_splits else ""),
            [
                *evaluation_lines("student_top1", "student"),
                *evaluation_lines("teacher_top1", "teacher"),
                *constant_lines("top1"),
            ],
            "share",
            "Share of images whose most likely class is the true one; the teacher's line is dashed.",
        ),
        (
            "Agreement",
            [training_line("agreement"), *evaluation_lines("agreement_top1", ""), *constant_lines("agreement")],
            "share",
            "Share of images with the same top-1 class in both models; it is lower on training views "
            "with mixup than on evaluation images. Dotted: one answer for all images.",
        ),
        (
            "KL divergence",
            [training_line("kl"), *evaluation_lines("kl", ""), *constant_lines("kl")],
            "real",
            "KL divergence from the teacher's to the student's probabilities, in nats at temperature 1. "
            "Dotted: one answer for all images.",
        ),
        (
            "Learning rate",
            [training_line("learning_rate") | {"name": "learning rate", "noisy": False}],
            "plain",
            "The learning rate of each step; the figure above is its peak.",
        ),
        (
            "Speed",
            [training_line("images_per_second") | {"name": "images/s"}],
            "plain",
            "Training images per second; dips are waits for data or checkpoints.",
        ),
    ]
    end = max((float(row["step"]) for row in train + evaluations), default=0.0)
    charts = []
    for number, (name, lines, scale, caption) in enumerate(panels):
        lines = [line for line in lines if line["points"]]
        if not lines:
            continue
        format_value = formatting.percent if scale == "share" else formatting.real
        last_values = [f"{line['name'] or 'evaluation'} {format_value(_last_value(line))}" for line in lines]
        if name == "Learning rate":
            last_values = [f"peak {formatting.real(max(value for _, value in lines[0]['points']))}"]
        first_step = min(line["points"][0][0] for line in lines)
        last_step = max(line["points"][-1][0] for line in lines)
        charts.append(
            {
                "title": name,
                "last": "; ".join(last_values),
                "caption": caption,
                "label": f"Line chart of {name}, steps {first_step:,.0f} to {last_step:,.0f}: {'; '.join(last_values)}.",
                "svg": _draw(f"c{number}", lines, scale, end),
            }
        )
    return charts


def _last_value(line: dict[str, Any]) -> float:
    """The last value, of the running mean where there is one."""
    values = np.array([value for _, value in line["points"]])
    return float((_running_mean(values) if line.get("noisy") else values)[-1])


def _points_of(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Pairs (step, value) of the rows that have a value."""
    pairs = ((float(row["step"]), formatting.number(row.get(key))) for row in rows)
    return [(step, value) for step, value in pairs if value is not None]


def _tick(value: Any, _position: Any = None) -> str:
    """The label of an axis: 0, 0.001, 250, 20k, 1.5M."""
    number = formatting.number(value)
    if number is None:
        return formatting.DASH
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a 25th of the values; float [n] -> float [n].

    Near the ends the window is shorter and stays centred, so that a steep start is not distorted.
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    index, reach = np.arange(len(values)), len(values) // 50
    back = np.minimum(index, reach)
    ahead = np.minimum(back, len(values) - 1 - index)
    return (total[index + ahead + 1] - total[index - back]) / (back + ahead + 1)


def _draw(prefix: str, lines: list[dict[str, Any]], scale: str, end: float) -> Any:
    """Draws one chart as inline SVG.

    Args:
        prefix: start of the SVG's ids, which must be unique in the report.
        lines: each with `points` (step, value) and `name`; of training also `noisy`, of evaluation
            also `teacher`, of the best constant answer also `constant`.
        scale: of the values: "share", "real" (logarithmic if they span a factor of 20) or "plain".
        end: last step of the axis.

    Returns:
        A `markupsafe.Markup`.
    """
    import matplotlib
    from markupsafe import Markup
    from matplotlib import ticker
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's matplotlibrc
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
            if noisy is not None:  # a training metric
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
            elif line.get("constant"):
                axes.plot(
                    steps,
                    shown,
                    color=_MUTED,
                    linewidth=1.4,
                    linestyle=":",
                    marker="." if len(shown) == 1 else "",
                    label=line["name"],
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
    """Converts matplotlib's SVG file for inlining: unique ids, colours and font of the report."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", svg)
    svg = re.sub(r"\bfont: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg)
    for colour, variable in _CSS_VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", svg).strip()
