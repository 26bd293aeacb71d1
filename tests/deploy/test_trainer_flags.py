"""The trainer's arguments in a job: checked before it is sent, and accepted by the trainer."""

from __future__ import annotations

import copy
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from deploy_jobs import EXPECTED_JOBS, ROOT, STUDY, command, dry

from deploy import submit, trainer_flags


def test_the_flags_that_the_checker_knows_are_the_trainers() -> None:
    from absl import flags

    from trainer.core.flags import define_flags

    values = flags.FlagValues()
    define_flags(values)
    known = trainer_flags.task_flags()
    assert known.keys() == set(values)
    kinds = {"int": int, "float": float, "bool": bool}
    for name, flag in known.items():
        kind = re.sub("multi int|multi string|comma separated list of strings", "tuple", values[name].flag_type())
        assert flag.type is kinds.get(kind, tuple if kind == "tuple" else str), name
        assert not isinstance(values[name], flags.EnumFlag) or list(flag.choices) == values[name].parser.enum_values


def test_auto_is_a_number_only_where_the_trainer_takes_it() -> None:
    def errors(*arguments: str) -> list[str]:
        return list(trainer_flags.argument_errors(["--steps=1", "--distance=labels", *arguments]))

    assert errors("--store_size=auto") == []
    assert errors("--store_size=large") == ["trainer flag --store_size=large: must be an integer"]
    assert errors("--image_size=auto") == ["trainer flag --image_size=auto: must be an integer"]


def test_the_trainers_help_lists_no_flag_that_the_checker_does_not_know() -> None:
    line = [sys.executable, "-m", "trainer.task", "--help"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    shown = set(re.findall(r"^  --(?:\[no\])?(\w+):", done.stdout, re.MULTILINE))
    assert shown - {"flagfile", "undefok"} == (trainer_flags.task_flags() | trainer_flags.COMMON_FLAGS).keys()


@pytest.mark.parametrize("name", EXPECTED_JOBS)
def test_the_trainer_takes_the_arguments_that_specs_send(name: str) -> None:
    """As far as that needs no data and no bucket: every flag is known, and none is missing."""

    def errors(arguments: list[str], study: dict[str, Any]) -> list[str]:
        return list(trainer_flags.configuration_errors(arguments, study))

    args = EXPECTED_JOBS[name][1]["workerPoolSpecs"][0]["containerSpec"]["args"]
    assert errors(args, {}) == []
    assert errors([*args, "--log_format=json"], {}) == []
    assert errors([*args, "--no_such=1"], {}) != []
    assert errors([argument for argument in args if not argument.startswith("--teacher=")], {}) != []
    assert errors(args, STUDY["studySpec"]) == []


def test_the_metric_of_a_study_is_one_that_the_trainer_reports(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = copy.deepcopy(STUDY)
    study["studySpec"]["metrics"][0]["metricId"] = "accuracy"
    (tmp_path / "study.json").write_text(json.dumps(study))
    assert submit.main(command("vertex-gpu", f"--study={tmp_path}/study.json", "--dry-run")) == 2
    assert "--hp_metric=accuracy: must be one of student_top1" in capsys.readouterr().err


def test_study_parameters_are_flags_of_the_trainer(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error_of(*more: str, **parameter: Any) -> str:
        study = copy.deepcopy(STUDY)
        study["studySpec"]["parameters"] = [parameter]
        (tmp_path / "study.json").write_text(json.dumps(study))
        assert submit.main(command("vertex-gpu", f"--study={tmp_path}/study.json", "--dry-run", *more)) == 2
        return capsys.readouterr().err

    rate = {"doubleValueSpec": {"minValue": 0.1, "maxValue": 0.2}}
    assert "did you mean learning_rate?" in error_of(parameterId="learning-rate", **rate)
    assert "--seed is among the trainer's arguments" in error_of(
        "--", "--seed=1", parameterId="seed", integerValueSpec={"minValue": 1, "maxValue": 2}
    )
    assert "is an integer" in error_of(parameterId="batch_size", **rate)
    assert "is not a number" in error_of(parameterId="views", **rate)
    assert "did you mean same/ic?" in error_of(
        parameterId="views", categoricalValueSpec={"values": ["mix", "same/icc"]}
    )
    # The trainer itself checks both ends of the range.
    assert "--min_crop_area=2" in error_of(
        parameterId="min_crop_area", doubleValueSpec={"minValue": 0.1, "maxValue": 2.0}
    )


SMALL = ["--steps=2", "--batch_size=4", "--image_size=24", "--store_size=32", "--student=bit-tiny"]


@pytest.fixture
def at_vertex(
    data: str, teacher_file: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, Any]], subprocess.CompletedProcess[str]]:
    """Runs a job's arguments as Vertex AI would, with local paths in place of the bucket's."""
    from conftest import here

    local_paths = {
        "gs://my-bucket/data/flowers": data,
        "gs://my-bucket/t.keras": teacher_file,
        "gs://my-bucket/runs/flowers-1": str(tmp_path / "run"),
    }

    def run(job: dict[str, Any], trial: str = "") -> subprocess.CompletedProcess[str]:
        args = job["workerPoolSpecs"][0]["containerSpec"]["args"]
        base = job["baseOutputDirectory"]["outputUriPrefix"] + (f"/{trial}" if trial else "")
        for url, path in local_paths.items():
            assert sum(url in argument for argument in args) == 1
            args = [argument.replace(url, path) for argument in args]
            base = base.replace(url, path)
        for name, folder in [("MODEL", "model"), ("CHECKPOINT", "checkpoints"), ("TENSORBOARD_LOG", "logs")]:
            monkeypatch.setenv(f"AIP_{name}_DIR", f"{base}/{folder}/")
        task = {"type": "workerpool0", "index": 0} | ({"trial": trial} if trial else {})
        cluster = {"cluster": {"workerpool0": ["one:2222"]}, "environment": "cloud", "task": task}
        monkeypatch.setenv("CLUSTER_SPEC", json.dumps(cluster))
        return here("task", *args)

    return run


@pytest.mark.slow
def test_the_arguments_of_a_spec_train_and_the_same_job_again_is_finished(
    at_vertex: Callable[..., Any], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = dry(capsys, "vertex-cpu", "--", *SMALL, teacher="keras:gs://my-bucket/t.keras")
    done = at_vertex(job)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 2
    assert (tmp_path / "run/model/saved_model.pb").is_file()
    assert list((tmp_path / "run/logs").rglob("events.*"))
    again = at_vertex(job)
    assert (again.returncode, "is finished" in again.stderr) == (0, True)


@pytest.mark.slow
def test_the_arguments_of_a_trial_train_and_report_its_metric(
    at_vertex: Callable[..., Any],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLOUD_ML_HP_METRIC_FILE", str(tmp_path / "metrics"))
    study = dry(capsys, "vertex-cpu", "--study=learning-rate", "--", *SMALL, teacher="keras:gs://my-bucket/t.keras")
    trial = study["trialJobSpec"]
    # Vertex AI adds a flag for each parameter, at the end.
    trial["workerPoolSpecs"][0]["containerSpec"]["args"] += [
        f"--{parameter['parameterId']}={value}"
        for parameter, value in zip(study["studySpec"]["parameters"], (0.001, 1e-4, 2.0), strict=True)
    ]
    done = at_vertex(trial, trial="3")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/trial-3/result.json").is_file()
    reported = json.loads((tmp_path / "metrics").read_text().splitlines()[-1])
    assert study["studySpec"]["metrics"][0]["metricId"] in reported
    assert reported["trial"] == "3"
