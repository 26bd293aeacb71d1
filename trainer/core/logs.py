"""Lines on standard error: text, or one JSON object a line for a cloud's log service.

Vertex AI and GKE read a container's output line by line. A line of JSON with `severity` and
`message` becomes a structured entry; any other line on standard error becomes an error.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from types import TracebackType
from typing import Any

from trainer.core import environment

FORMATS = ("auto", "text", "json")

current_format = "auto"


def set_format(log_format: str) -> None:
    """Sets the format of this process's lines: one of `FORMATS`.

    With JSON, the traceback of an uncaught exception becomes one line too.
    """
    global current_format
    current_format = log_format
    if as_json():
        sys.excepthook = _report_bug


def as_json() -> bool:
    """Whether lines are JSON; with "auto", in a cloud's container unless on a terminal."""
    if current_format == "auto":
        return environment.in_cloud() and not sys.stderr.isatty()
    return current_format == "json"


def write(severity: str, message: str, **fields: Any) -> None:
    """One line of JSON on standard error.

    Args:
        severity: a severity of Cloud Logging: INFO, WARNING, ERROR or CRITICAL.
        message: text of the entry.
        **fields: step, metrics and the like. JSON has no inf and nan: they are written as strings.
    """
    entry = {"severity": severity, "message": message} | {name: _plain(value) for name, value in fields.items()}
    if trial := environment.trial():
        entry["trial"] = trial
    # A single write, so that lines of several threads do not mix.
    sys.stderr.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stderr.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Logs an uncaught exception; Error Reporting reads the traceback from `message`."""
    write("CRITICAL", "".join(traceback.format_exception(kind, error, trace)).rstrip(), pid=os.getpid())
