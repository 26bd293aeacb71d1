"""Lines for a cloud's log service: one JSON object each, whatever happens."""

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
    monkeypatch.setattr(logs, "_chosen", "json")


def test_auto_is_json_in_a_clouds_container_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_chosen", "auto")
    for name in logs.environment._CLOUD:
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
    console, journal = Console(), MetricWriter(str(tmp_path))
    console.warning("it is slow")
    console.info("two\n\nlines")
    console.progress("train", 5, 10, "loss 1")
    journal.add("train", 5, {"loss": 1.5, "grad_norm": math.inf})
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


def test_mistakes_and_stops_have_their_severity() -> None:
    done = funmatch("task", "--tempreature=2", CLUSTER_SPEC="{}")
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["severity"] == "ERROR"
    assert "temperature" in json.loads(line)["message"]
    done = funmatch("task", "--log_format=json")
    told = json.loads(
        done.stderr.splitlines()[-1]
    )  # what comes before is TensorFlow's, which the tests' environment keeps
    assert (told["severity"], told["exit_code"]) == ("ERROR", 2)
    assert told["message"].startswith("--data is missing")
    done = funmatch("task", "--log_format=text", CLUSTER_SPEC="{}")
    assert done.stderr.splitlines()[-1].startswith("error: --data is missing")


def test_a_bug_is_one_line_too() -> None:
    code = "from trainer.core import logs; logs.set_format('json'); [][1]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    told = json.loads(line)
    assert told["severity"] == "CRITICAL"
    assert told["message"].startswith("Traceback")
    assert "IndexError" in told["message"]
    assert told["pid"] != os.getpid()
