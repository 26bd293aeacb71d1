"""Curves of a run as SVG, in the page's colours."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np

from trainer.output import formatting

_CURVE_POINTS = 500  # of one line; longer histories are averaged in buckets

# Colours that matplotlib writes, and the CSS variables that replace them (light, dark, print).
_INK = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--student)",
    "#050505": "var(--teacher)",
}
_TEXT, _MUTED, _LINE, _STUDENT, _TEACHER = _INK


def curves(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The panels that have something to show: {title, last, caption, label, svg}."""
    train, evaluations = formatting.rows(history, "train"), formatting.rows(history, "eval")
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
        form = formatting.percent if scale == "share" else formatting.real
        endings = [f"{line['name'] or 'evaluation'} {form(_ending(line))}" for line in lines]
        if name == "Learning rate":
            endings = [f"peak {formatting.real(max(value for _, value in lines[0]['points']))}"]
        first = min(line["points"][0][0] for line in lines)
        last = max(line["points"][-1][0] for line in lines)
        drawn.append(
            {
                "title": name,
                "last": "; ".join(endings),
                "caption": caption,
                "label": f"Line chart of {name}, steps {first:,.0f} to {last:,.0f}: {'; '.join(endings)}.",
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
