"""Lines for a cloud's log service: one JSON object each, also for errors."""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import ROOT, funmatch

from trainer.core import logs
from trainer.core.console import Console
from trainer.run.metric_writer import MetricWriter


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "current_format", "json")


def test_auto_is_json_only_in_a_cloud_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "current_format", "auto")
    for name in logs.environment._CLOUD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not logs.as_json()
    monkeypatch.setenv("AIP_MODEL_DIR", "gs://b/m/")
    assert logs.as_json()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert not logs.as_json()


@pytest.mark.usefixtures("as_json")
def test_lines_have_severity_step_and_metrics(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_ML_TRIAL_ID", "4")
    console, writer = Console(), MetricWriter(str(tmp_path))
    console.warning("it is slow")
    console.info("two\n\nlines")
    console.progress("train", 5, 10, "loss 1")
    writer.add("train", 5, {"loss": 1.5, "grad_norm": math.inf})
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["severity"], line["message"]) for line in lines] == [
        ("WARNING", "it is slow"),
        ("INFO", "two"),
        ("INFO", "lines"),
        ("INFO", "train 5/10 loss 1"),
        ("INFO", "train at step 5"),
    ]
    assert lines[-1]["step"] == 5
    assert lines[-1]["metrics"] == {"loss": 1.5, "grad_norm": "inf"}
    assert {line["trial"] for line in lines} == {"4"}


def test_errors_have_a_severity() -> None:
    done = funmatch("task", "--tempreature=2", CLUSTER_SPEC="{}")
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["severity"] == "ERROR"
    assert "temperature" in json.loads(line)["message"]
    done = funmatch("task", "--log_format=json")
    entry = json.loads(done.stderr.splitlines()[-1])  # the lines before are TensorFlow's
    assert (entry["severity"], entry["exit_code"]) == ("ERROR", 2)
    assert entry["message"].startswith("--data is missing")
    done = funmatch("task", "--log_format=text", CLUSTER_SPEC="{}")
    assert done.stderr.splitlines()[-1].startswith("error: --data is missing")


def test_uncaught_exception_is_one_line() -> None:
    code = "from trainer.core import logs; logs.set_format('json'); [][1]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    entry = json.loads(line)
    assert entry["severity"] == "CRITICAL"
    assert entry["message"].startswith("Traceback")
    assert "IndexError" in entry["message"]
    assert entry["pid"] != os.getpid()
