"""Numbers as text, and rows of metrics.jsonl, for the report."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np

DASH = "–"  # noqa: RUF001 - shown for a missing number


def number(value: Any) -> float | None:
    """A finite float, or None for anything else."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def clip(share: Any) -> float:
    """A share clipped to 0..1; 0 for anything that is not a number."""
    return min(1.0, max(0.0, number(share) or 0.0))


def percent(share: Any) -> str:
    """A share in 0..1 as a percentage."""
    value = number(share)
    return DASH if value is None else f"{100 * value:.1f}%"


def points(difference: float) -> str:
    """A difference of two shares, in percentage points with its sign."""
    signed = f"{100 * difference:+.1f}"
    return "0.0" if float(signed) == 0 else signed.replace("-", "\N{MINUS SIGN}")


def count(value: Any) -> str:
    """An integer with thousands separators."""
    value = number(value)
    return DASH if value is None else f"{value:,.0f}"


def real(value: Any) -> str:
    """A number with three or four significant digits, and thousands separators."""
    value = number(value)
    if value is None:
        return DASH
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.3f}" if size >= 0.001 else f"{value:.1e}"


def duration(seconds: Any) -> str:
    """Seconds as seconds, minutes or hours."""
    value = number(seconds)
    if value is None or value < 0:
        return DASH
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def rows(history: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Rows of one kind by ascending step; of rows with the same step and split, the last.

    Args:
        history: rows of metrics.jsonl.
        kind: "train" or "eval".
    """
    latest = {}
    for row in history:
        if row.get("kind") == kind and number(row.get("step")) is not None:
            latest[float(row["step"]), str(row.get("split", ""))] = row
    return [latest[key] for key in sorted(latest)]


def text(value: Any) -> str:
    """The value of an option: a string as it is, anything else as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
