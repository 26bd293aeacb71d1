"""What goes to standard error: lines for people, or one JSON object a line for a cloud's log service.

Vertex AI and GKE read a container's output line by line. A line of JSON with `severity` and `message` becomes a structured entry;
any other line on standard error becomes an error, whatever it says. No TensorFlow: mistakes in flags are told this way too.
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

_chosen = "auto"


def set_format(form: str) -> None:
    """Sets the format for this process: one of `FORMATS`. In JSON, a bug's traceback becomes one line too."""
    global _chosen
    _chosen = form
    if as_json():
        sys.excepthook = _report_bug


def as_json() -> bool:
    """Whether lines are JSON. auto: not on a terminal, and in a cloud's container."""
    if _chosen == "auto":
        return environment.in_cloud() and not sys.stderr.isatty()
    return _chosen == "json"


def write(severity: str, message: str, **fields: Any) -> None:
    """One line of JSON on standard error.

    Args:
        severity: of Cloud Logging: INFO, WARNING, ERROR or CRITICAL.
        message: what a person reads.
        **fields: step, metrics and the like. A number that is not finite is no JSON, and is told as text.
    """
    entry = {"severity": severity, "message": message} | {name: _plain(value) for name, value in fields.items()}
    if trial := environment.trial():
        entry["trial"] = trial
    # In one write, so that lines of several threads do not mix.
    sys.stderr.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stderr.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An exception that nothing caught. Error Reporting finds the traceback in `message`."""
    write("CRITICAL", "".join(traceback.format_exception(kind, error, trace)).rstrip(), pid=os.getpid())
