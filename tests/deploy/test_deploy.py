"""Job specs: what is sent is what was meant, what is wrong is refused before it is sent, and what Google says is passed on.

The real gcloud runs against a Vertex AI of this machine (aiplatform_stub). Where gcloud is missing these tests fail: that it
sends what we mean is the point.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from aiplatform_stub import Stub, error, uploaded
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy import build, check, cost, gke, make_schema, plainyaml, setup, specs, submit, tpu_vm
from trainer import __version__
from trainer.core import errors

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SETTINGS = {
    "project": "my-project",
    "region": "us-west4",
    "bucket": "my-bucket",
    "run": "flowers-1",
    "data": "gs://my-bucket/data/flowers",
    "teacher": "bit:R152x2_T_flowers128",
    "recipe": "flowers102_fast",
}
ACCOUNT = "job@my-project.iam.gserviceaccount.com"
BOARD = "projects/123/locations/us-west4/tensorboards/456"
TRAINER = [
    "--recipe=flowers102_fast",
    "--data=gs://my-bucket/data/flowers",
    "--teacher=bit:R152x2_T_flowers128",
    "--workdir=gs://my-bucket/runs/flowers-1",
]


def command(spec: str, *more: str, **changes: str | None) -> list[str]:
    """A command line with all that must be given."""
    chosen = {name: value for name, value in (SETTINGS | changes).items() if value is not None}
    pairs = [f"--set={name}={value}" for name, value in chosen.items()]
    return [spec, "--settings=/dev/null", *pairs, *more]


@pytest.fixture(scope="module")
def service() -> Iterator[Stub]:
    stub = Stub()
    yield stub
    stub.close()


@pytest.fixture
def vertex(service: Stub, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """The stub, and a gcloud that talks to it and to nothing else, with no configuration and a token that is none."""
    assert shutil.which("gcloud"), "gcloud is missing: install the Google Cloud CLI (Debian: google-cloud-cli)"
    (tmp_path / "token").write_text("no-token")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("CLOUDSDK_AUTH_ACCESS_TOKEN_FILE", str(tmp_path / "token"))
    for name in ("AIPLATFORM", "ARTIFACTREGISTRY", "CLOUDBUILD", "CONTAINERANALYSIS", "ONDEMANDSCANNING", "TPU"):
        monkeypatch.setenv(f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{name}", service.url)
    monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE", f"{service.url}storage/v1/")
    # Nothing outside is asked: no usage report, no look for updates or for a machine of Google's.
    monkeypatch.setenv("CLOUDSDK_CORE_DISABLE_USAGE_REPORTING", "1")
    monkeypatch.setenv("CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK", "1")
    monkeypatch.setenv("CLOUDSDK_CORE_CHECK_GCE_METADATA", "false")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    service.reset()
    return service


@pytest.fixture
def no_gcloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any call of gcloud is a failure of the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("gcloud was called")

    monkeypatch.setattr(submit.subprocess, "run", refuse)


def dry(capsys: pytest.CaptureFixture[str], spec: str, *more: str, **changes: str | None) -> dict[str, Any]:
    """The job that --dry-run prints."""
    cut = more.index("--") if "--" in more else len(more)
    assert submit.main([*command(spec, *more[:cut], **changes), "--dry-run", *more[cut:]]) == 0
    return json.loads(capsys.readouterr().out)


def machine(machine: dict[str, Any], hardware: str, *args: str, disk: int = 200, hours: int = 24) -> dict[str, Any]:
    """The job that is meant, written out."""
    return {
        "workerPoolSpecs": [
            {
                "machineSpec": machine,
                "replicaCount": 1,
                "diskSpec": {"bootDiskType": "pd-ssd", "bootDiskSizeGb": disk},
                "containerSpec": {
                    "imageUri": f"us-west4-docker.pkg.dev/my-project/funmatch/funmatch:{hardware}-latest",
                    "args": [*args, *TRAINER],
                },
            }
        ],
        "scheduling": {"timeout": f"{hours * 3600}s", "strategy": "STANDARD"},
        "baseOutputDirectory": {"outputUriPrefix": "gs://my-bucket/runs/flowers-1"},
    }


def machines() -> dict[str, Any]:
    """Three machines with an A100 each: a chief and two workers."""
    a100 = {"machineType": "a2-highgpu-1g", "acceleratorType": "NVIDIA_TESLA_A100", "acceleratorCount": 1}
    job = machine(a100, "gpu")
    (chief,) = job["workerPoolSpecs"]
    job["workerPoolSpecs"] = [chief, chief | {"replicaCount": 2}]
    job["scheduling"]["restartJobOnWorkerRestart"] = True
    return job


MEANT = {
    "v5e, 1 chip": (
        ["vertex-tpu-v5e", "--set=chips=1"],
        machine({"machineType": "ct5lp-hightpu-1t", "tpuTopology": "1x1"}, "tpu", "--tpu=local"),
    ),
    "v5e, 4 chips": (
        ["vertex-tpu-v5e"],
        machine({"machineType": "ct5lp-hightpu-4t", "tpuTopology": "2x2"}, "tpu", "--tpu=local"),
    ),
    "v5e, 8 chips": (
        ["vertex-tpu-v5e", "--set=chips=8"],
        machine({"machineType": "ct5lp-hightpu-8t", "tpuTopology": "2x4"}, "tpu", "--tpu=local"),
    ),
    "v3-8": (
        ["vertex-tpu-v3"],
        machine({"machineType": "cloud-tpu", "acceleratorType": "TPU_V3", "acceleratorCount": 8}, "tpu", "--tpu=local"),
    ),
    "GPU": (
        ["vertex-gpu"],
        machine({"machineType": "g2-standard-12", "acceleratorType": "NVIDIA_L4", "acceleratorCount": 1}, "gpu"),
    ),
    "GPUs of 3 machines": (["vertex-gpu-machines", "--set=gpu=NVIDIA_TESLA_A100", "--set=machines=3"], machines()),
    "CPU": (["vertex-cpu"], machine({"machineType": "n1-standard-8"}, "cpu", disk=100, hours=1)),
}


def test_every_spec_is_among_those_that_are_sent() -> None:
    assert {arguments[0] for arguments, _ in MEANT.values()} == set(specs.names())


def arrived(job: dict[str, Any]) -> dict[str, Any]:
    """A job as JSON of Google's services, in which a whole number of 64 bits is a text."""
    found = copy.deepcopy(job)
    for pool in found["workerPoolSpecs"]:
        pool["replicaCount"] = str(pool["replicaCount"])
    return found


# What differs by no more than a setting runs with the slow ones; their jobs are compared in the dry run below.
SLOW = ("v5e, 1 chip", "v5e, 8 chips", "CPU")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MEANT])
def test_gcloud_sends_what_was_meant(name: str, vertex: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    (spec, *more), job = MEANT[name]
    assert submit.main(command(spec, "--beside", *more)) == 0
    (request,) = vertex.requests
    assert request.method == "POST"
    assert request.path == "/v1/projects/my-project/locations/us-west4/customJobs"
    assert request.token == "no-token"
    assert request.body == {
        "displayName": "flowers-1",
        "labels": {"program": "funmatch", "run": "flowers-1", "recipe": "flowers102_fast"},
        "jobSpec": arrived(job),
    }
    said = capsys.readouterr()
    name = "projects/my-project/locations/us-west4/customJobs/1"
    assert said.out.strip() == name
    assert f"stream-logs {name}" in said.err
    assert f"cancel {name}" in said.err
    assert "gcloud storage ls gs://my-bucket/runs/flowers-1" in said.err


def test_optional_settings_arrive_and_typos_of_gclouds_do_not(vertex: Stub) -> None:
    more = ["--spot", f"--set=service_account={ACCOUNT}", f"--set=tensorboard={BOARD}", "--set=hours=2"]
    assert submit.main([*command("vertex-tpu-v5e", "--beside", *more), "--", "--epochs=9", "--seed=7"]) == 0
    job = vertex.requests[0].body["jobSpec"]
    assert job["scheduling"] == {"timeout": "7200s", "strategy": "SPOT"}
    assert job["serviceAccount"] == ACCOUNT
    assert job["tensorboard"] == BOARD
    assert job["workerPoolSpecs"][0]["containerSpec"]["args"][-2:] == ["--epochs=9", "--seed=7"]


def test_a_study_is_sent_with_the_spec_as_its_trial(vertex: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(command("vertex-tpu-v5e", "--beside", "--study=learning-rate")) == 0
    (request,) = vertex.requests
    assert request.path == "/v1/projects/my-project/locations/us-west4/hyperparameterTuningJobs"
    study = yaml.safe_load((ROOT / "deploy/studies/learning-rate.yaml").read_text())
    said = capsys.readouterr()
    meant = study | {
        "displayName": "flowers-1",
        "labels": {"program": "funmatch", "run": "flowers-1", "recipe": "flowers102_fast"},
        "trialJobSpec": arrived(MEANT["v5e, 4 chips"][1]),
    }
    # The trial is told what to report.
    meant["trialJobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"].append("--hp_metric=student_top1")
    assert request.body == meant
    assert "hp-tuning-jobs stream-logs" in said.err


def test_a_second_job_of_a_run_waits_for_the_end_of_the_first(vertex: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    name = "projects/my-project/locations/us-west4/customJobs/1"
    other = {"name": "projects/my-project/locations/us-west4/customJobs/2", "displayName": "flowers-2"}
    vertex.jobs = [
        {"name": name, "displayName": "flowers-1", "state": "JOB_STATE_RUNNING"},
        other | {"state": "JOB_STATE_RUNNING"},
    ]
    assert submit.main(command("vertex-tpu-v5e")) == 1
    said = capsys.readouterr().err
    assert f"the run flowers-1 has a job already ({name}, JOB_STATE_RUNNING)" in said
    assert len(vertex.jobs) == 2
    vertex.jobs[0]["state"] = "JOB_STATE_FAILED"
    assert submit.main(command("vertex-tpu-v5e")) == 0  # the same command goes on
    assert len(vertex.jobs) == 3
    assert "goes on from its last checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "told", "advice"),
    [
        (
            error(403, "PERMISSION_DENIED", "Permission 'aiplatform.customJobs.create' denied on resource"),
            "aiplatform.customJobs.create",
            "roles/aiplatform.user",
        ),
        (error(404, "NOT_FOUND", "The TensorBoard is not there"), "The TensorBoard is not there", "does not exist"),
        (
            error(429, "RESOURCE_EXHAUSTED", "quota metrics exceed quota limits: custom_model_training_tpu_v5e"),
            "custom_model_training_tpu_v5e",
            "not enough quota in us-west4",
        ),
    ],
)
def test_what_google_refuses_is_told_with_what_to_do(
    answer: Any, told: str, advice: str, vertex: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    vertex.refusal = answer
    assert submit.main(command("vertex-tpu-v5e", "--beside")) == 1
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith(("error:", "hint:"))]
    assert told in lines[0]
    assert advice in lines[1]
    assert "Traceback" not in said.err
    assert len(vertex.requests) == 1


@pytest.mark.slow  # gcloud tries again for half a minute
def test_a_failure_of_googles_is_told_as_one(vertex: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    vertex.refusal = error(500, "INTERNAL", "Internal error encountered.")
    assert submit.main(command("vertex-tpu-v5e", "--beside")) == 1
    said = capsys.readouterr().err
    assert "error: INTERNAL (500): Internal error encountered." in said
    assert "look whether a job came of it" in said


def test_gcloud_itself_lets_typos_through(vertex: Stub, tmp_path: pathlib.Path) -> None:
    """Why there is a checker. If this fails, gcloud has become stricter, and our checker may be of less use."""
    job = copy.deepcopy(MEANT["v5e, 4 chips"][1])
    job["workerPoolSpecs"][0]["machineSpec"]["tpu_topology"] = "2x2"
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [
            *("gcloud", "ai", "custom-jobs", "create", "--project=my-project", "--region=us-west4"),
            *("--display-name=x", f"--config={tmp_path}/job.json"),
        ],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
    assert vertex.requests[0].body["jobSpec"]["workerPoolSpecs"][0]["machineSpec"]["tpu_topology"] == "2x2"


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets what a path of dots names; None takes it away."""

    def apply(job: Any) -> None:
        *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in way:
            job = job.setdefault(part, {}) if isinstance(job, dict) else job[part]
        if value is None:
            del job[last]
        else:
            job[last] = value

    return apply


POOL = "workerPoolSpecs.0"
MACHINE = f"{POOL}.machineSpec"
# What is wrong with a job, and what must be said of it.
WRONG = [
    ("v5e, 4 chips", f"{MACHINE}.tpu_topology", "2x2", "MachineSpec has no such field; did you mean tpuTopology?"),
    ("v5e, 4 chips", "workerPoolSpec", [], "CustomJobSpec has no such field; did you mean workerPoolSpecs?"),
    ("v5e, 4 chips", "labels", {}, "CustomJobSpec has no such field"),
    ("v5e, 4 chips", "scheduling.timeOut", "9s", "did you mean timeout?"),
    ("v5e, 4 chips", f"{MACHINE}.machineType", "ct5lp-hightpu-2t", "did you mean ct5lp-hightpu-"),
    ("v5e, 4 chips", f"{MACHINE}.machineType", "ct6e-standard-4t", "no TensorFlow on ct6e-standard-4t"),
    ("v5e, 4 chips", f"{MACHINE}.tpuTopology", "2x3", "ct5lp-hightpu-4t is 2x2 or 2x4"),
    ("v5e, 4 chips", f"{MACHINE}.tpuTopology", "4x4", "several machines"),
    ("v5e, 4 chips", f"{MACHINE}.tpuTopology", None, "ct5lp-hightpu-4t is 2x2"),
    ("v5e, 4 chips", f"{MACHINE}.acceleratorType", "TPU_V5_LITEPOD", "takes tpuTopology, not acceleratorType"),
    ("v5e, 4 chips", f"{MACHINE}.acceleratorType", "TPU_V6E", '"TPU_V6E" is none of'),
    ("v5e, 4 chips", f"{POOL}.replicaCount", 2, "replicaCount: must be 1 on a TPU"),
    ("v5e, 4 chips", f"{POOL}.replicaCount", "1", "must be a integer"),
    ("v5e, 4 chips", f"{POOL}.replicaCount", 0, "must be at least 1"),
    ("v5e, 4 chips", f"{POOL}.containerSpec", None, "needs one of containerSpec and pythonPackageSpec"),
    ("v5e, 4 chips", f"{POOL}.containerSpec.imageUri", None, "imageUri: is missing"),
    ("v5e, 4 chips", f"{POOL}.containerSpec.imageUri", "gs://b/i", "is no HOST/PATH:TAG"),
    ("v5e, 4 chips", f"{POOL}.containerSpec.env", [{"name": "AIP_MODEL_DIR", "value": "x"}], "is set by Vertex AI"),
    ("v5e, 4 chips", f"{POOL}.containerSpec.env", [{"name": "A", "value": 8}], 'must be a string, is 8: write "8"'),
    ("v5e, 4 chips", f"{POOL}.pythonPackageSpec", {"pythonModule": "x"}, "has containerSpec and pythonPackageSpec"),
    ("v5e, 4 chips", "scheduling.strategy", "SPOTS", "did you mean SPOT?"),
    ("v5e, 4 chips", "scheduling.strategy", "ON_DEMAND", "write STANDARD"),
    ("v5e, 4 chips", "scheduling.strategy", "FLEX_START", "documented for GPUs"),
    ("v5e, 4 chips", "scheduling.timeout", "24h", "must be seconds with an s"),
    ("v5e, 4 chips", "scheduling.timeout", 86400, "must be a string"),
    ("v5e, 4 chips", "scheduling.maxWaitDuration", "60s", "goes with strategy FLEX_START only"),
    ("v5e, 4 chips", "tensorboard", BOARD, "serviceAccount: is needed beside tensorboard"),
    ("v5e, 4 chips", "tensorboard", BOARD.replace("us-west4", "us-west1"), "they must be in one region"),
    ("v5e, 4 chips", "tensorboard", "board", "must be projects/NUMBER/locations/REGION"),
    ("v5e, 4 chips", "serviceAccount", "me@example.com", "must be NAME@PROJECT.iam.gserviceaccount.com"),
    ("v5e, 4 chips", "baseOutputDirectory.outputUriPrefix", "my-bucket/runs", "must start with gs://BUCKET"),
    ("v5e, 4 chips", "workerPoolSpecs", [], "workerPoolSpecs: is missing or empty"),
    ("v3-8", f"{MACHINE}.acceleratorType", "TPU_V4_POD", "cloud-tpu is TPU_V2 or TPU_V3"),
    ("v3-8", f"{MACHINE}.acceleratorCount", 32, "cloud-tpu has 8 cores on one machine"),
    ("v3-8", f"{MACHINE}.tpuTopology", "2x2", "cloud-tpu takes acceleratorType and acceleratorCount instead"),
    ("GPU", f"{MACHINE}.acceleratorType", "NVIDIA_TESLA_T4", "g2-standard-12 has 1 x NVIDIA_L4"),
    ("GPU", f"{MACHINE}.acceleratorCount", 4, "g2-standard-12 has 1 x NVIDIA_L4, not 4"),
    ("GPU", f"{MACHINE}.acceleratorCount", None, "come together"),
    ("GPU", f"{MACHINE}.machineType", "n1-standard-8", "an n1 machine takes NVIDIA_TESLA_T4"),
    ("GPU", f"{MACHINE}.machineType", "a2-highgpu-3g", "did you mean a2-highgpu-"),
    ("GPU", f"{MACHINE}.machineType", "e2-standard-8", "takes no GPU"),
    ("GPU", f"{MACHINE}.machineType", "standard-8", "is of no family known here"),
    ("GPU", f"{MACHINE}.acceleratorType", "TPU_V3", "belongs to the machine type cloud-tpu"),
    ("GPU", f"{POOL}.replicaCount", 2, "further machines go into a second pool"),
    ("CPU", f"{MACHINE}.tpuTopology", "2x2", "has no TPU"),
    ("CPU", "scheduling", {"disableRetries": True, "restartJobOnWorkerRestart": True}, "void"),
]


@pytest.mark.parametrize(("name", "path", "value", "told"), WRONG)
def test_a_wrong_job_is_refused_and_named(name: str, path: str, value: Any, told: str) -> None:
    job = copy.deepcopy(MEANT[name][1])
    assert list(check.custom_job(job, "us-west4")) == []
    change(path, value)(job)
    found = list(check.custom_job(job, "us-west4"))
    assert told in " | ".join(found)
    assert all("\n" not in line for line in found)


def test_two_pools_are_for_machines_without_tpu() -> None:
    job = copy.deepcopy(MEANT["v5e, 4 chips"][1])
    job["workerPoolSpecs"] *= 2
    assert any("a TPU job has one pool" in line for line in check.custom_job(job, "us-west4"))
    job = copy.deepcopy(MEANT["GPU"][1])
    job["workerPoolSpecs"] *= 2
    assert list(check.custom_job(job, "us-west4")) == []


def test_a_region_that_is_none() -> None:
    found = list(check.custom_job(MEANT["GPU"][1], "us-west44"))
    assert found == ["region: us-west44 is none where Vertex AI trains; did you mean us-west4?"]


STUDY = yaml.safe_load((ROOT / "deploy/studies/learning-rate.yaml").read_text())
WRONG_STUDIES = [
    ("studySpec.metrics.0.goal", "MAXIMISE", "did you mean MAXIMIZE?"),
    ("studySpec.metrics.0.metricID", "x", "did you mean metricId?"),
    ("studySpec.metrics", [], "must hold one metric"),
    ("studySpec.parameters", [], "nothing to search"),
    ("studySpec.parameters.0.doubleValueSpec", None, "needs one of doubleValueSpec"),
    ("studySpec.parameters.0.doubleValueSpec.minValue", 9.0, "a maxValue that is not below it"),
    ("studySpec.parameters.0.doubleValueSpec.minValue", 0.0, "above 0 on a logarithmic scale"),
    ("studySpec.parameters.2.discreteValueSpec.values", [], "values: is empty"),
    ("parallelTrialCount", 99, "must be from 1 to maxTrialCount"),
    ("trialJobSpec.scheduling.strategy", "NOPE", "trialJobSpec.scheduling.strategy"),
    ("trialJobSpec.tensorboard", BOARD, "trialJobSpec.serviceAccount"),
    ("trials", [], "HyperparameterTuningJob has no such field"),
]


@pytest.mark.parametrize(("path", "value", "told"), WRONG_STUDIES)
def test_a_wrong_study_is_refused_and_named(path: str, value: Any, told: str) -> None:
    job = copy.deepcopy(STUDY | {"trialJobSpec": MEANT["v5e, 4 chips"][1]})
    assert list(check.tuning_job(job, "us-west4")) == []
    change(path, value)(job)
    assert told in " | ".join(check.tuning_job(job, "us-west4"))


def test_a_studys_metric_is_one_that_the_trainer_reports(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = copy.deepcopy(STUDY)
    study["studySpec"]["metrics"][0]["metricId"] = "accuracy"
    (tmp_path / "study.json").write_text(json.dumps(study))
    assert submit.main(command("vertex-gpu", f"--study={tmp_path}/study.json", "--dry-run")) == 2
    assert "--hp_metric=accuracy: must be one of student_top1" in capsys.readouterr().err


def test_study_parameters_are_flags_of_the_trainer(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*more: str, **parameter: Any) -> str:
        study = copy.deepcopy(STUDY)
        study["studySpec"]["parameters"] = [parameter]
        (tmp_path / "study.json").write_text(json.dumps(study))
        assert submit.main(command("vertex-gpu", f"--study={tmp_path}/study.json", "--dry-run", *more)) == 2
        return capsys.readouterr().err

    rate = {"doubleValueSpec": {"minValue": 0.1, "maxValue": 0.2}}
    assert "did you mean learning_rate?" in told(parameterId="learning-rate", **rate)
    assert "--seed is among the trainer's arguments" in told(
        "--", "--seed=1", parameterId="seed", integerValueSpec={"minValue": 1, "maxValue": 2}
    )
    assert "is a whole number" in told(parameterId="batch_size", **rate)
    assert "is no number" in told(parameterId="views", **rate)
    assert "did you mean same/ic?" in told(parameterId="views", categoricalValueSpec={"values": ["mix", "same/icc"]})
    # Both ends are tried on the trainer itself.
    assert "--min_crop_area=2" in told(parameterId="min_crop_area", doubleValueSpec={"minValue": 0.1, "maxValue": 2.0})


@pytest.mark.usefixtures("no_gcloud")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["vertex-tpu-v5"], "did you mean vertex-tpu-v5e?"),
        (["./nowhere.yaml"], "there is no file ./nowhere.yaml"),
        (["vertex-gpu", "--dryrun"], "there is no --dryrun; did you mean dry-run?"),
        (["vertex-gpu", "--region=us-west4"], "is a setting: write --set region=..."),
        (["vertex-gpu", "--epochs=3"], "is a flag of the trainer: write it after --"),
        (["vertex-gpu", "--set", "chpis=4"], "there is no setting chpis; did you mean chips?"),
        (["vertex-gpu", "--set", "region"], "must be NAME=VALUE"),
        (["vertex-gpu", "--settings=/no/such"], "cannot be read"),
        (["vertex-gpu", "--study=learning"], "did you mean learning-rate?"),
        (["vertex-gpu", "--price=cheap"], "must be a number"),
        (["vertex-tpu-v5e", "--set=chips=2"], "has 1, 4 or 8"),
        (["vertex-gpu", "--set=gpu=NVIDIA_L40"], "did you mean NVIDIA_L4?"),
        (["vertex-gpu", "--set=gpus=3"], "comes in 1, 2, 4, 8 a machine"),
        (["vertex-gpu-machines", "--set=machines=1"], "take vertex-gpu for one"),
        (["vertex-gpu", "--set=run=Flowers_1"], "run = Flowers_1"),
        (["vertex-gpu", "--set=data=/home/me/data"], "data = /home/me/data"),
        (["vertex-gpu", "--set=project=12345678"], "project = 12345678"),
        (["vertex-gpu", "--set=data="], "not given: data"),
        (["vertex-gpu", "--set=recipe="], "--recipe, --steps or --epochs is missing"),
        (["vertex-gpu", "--set=teacher="], "--teacher is missing"),
        (["vertex-gpu", "--set=teacher=keras:/home/me/t.keras"], "copy it to gs:// first"),
        (["vertex-gpu", "--set=recipe=flower102_fast"], "flowers102_fast"),
        (["vertex-gpu", "--", "--tempreature=2"], "did you mean temperature?"),
        (["vertex-gpu", "--", "--workdir=runs/1"], "copy it to gs:// first"),
        (["vertex-gpu", "--", "--views=mixed"], "did you mean mix?"),
        (["vertex-gpu", "--", "--log_format=jsn"], "did you mean json?"),
        (["vertex-gpu", "--log_format=json"], "is a flag of the trainer: write it after --"),
        (["vertex-gpu", "--", "--steps=many"], "must be an integer"),
        (["vertex-gpu", "--", "--seed"], "needs a value"),
        (["vertex-gpu", "--", "epochs=3"], "must be --name=value"),
        (["vertex-gpu", "--", "--temperature=-1"], "it must be above 0"),
        (["vertex-gpu", "--", "--steps=3", "--epochs=3"], "give one of the two"),
        (["vertex-gpu", "--", "--flagfile=my.flags"], "recipes/*.flags only"),
    ],
)
def test_a_mistake_is_a_line_and_no_call(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec, *more = arguments
    assert submit.main(command(spec, *more)) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == ""
    assert all(line.startswith("error: ") for line in lines), said.err
    assert any(told in line for line in lines), said.err


@pytest.mark.usefixtures("no_gcloud")
def test_dry_run_prints_job_command_and_cost_and_calls_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for (spec, *more), job in MEANT.values():
        assert dry(capsys, spec, *more) == job
    assert submit.main(command("vertex-tpu-v5e", "--dry-run", "--price=1.5", "--set=hours=10")) == 0
    said = capsys.readouterr().err
    assert "cost: at most 4 chips x 10 h x 1.5 = 60.00" in said
    assert "would run: gcloud ai custom-jobs create --project=my-project --region=us-west4" in said
    assert "nothing was submitted" in said
    assert submit.main(command("vertex-tpu-v5e", "--dry-run", "--price=1.5", "--study=learning-rate")) == 0
    assert "at most 12 trials x 4 chips x 24 h x 1.5 = 144.00 = 1,728.00" in capsys.readouterr().err


def test_settings_come_from_the_file_and_the_command_line_goes_over(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.ini"
    file.write_text((ROOT / "deploy/settings.example").read_text())
    arguments = [f"--settings={file}", "--dry-run", "--set=run=r", "--set=region=us-west1"]
    assert submit.main(["vertex-tpu-v5e", *arguments]) == 0
    args = json.loads(capsys.readouterr().out)["workerPoolSpecs"][0]["containerSpec"]
    assert args["imageUri"] == "us-west1-docker.pkg.dev/my-project/funmatch/funmatch:tpu-latest"
    assert "--workdir=gs://my-project-funmatch/runs/r" in args["args"]
    for text, told in [("run r", "is no `name = value`"), ("run = a\nrun = b", "a second time"), ("rum = a", "run?")]:
        file.write_text(text)
        assert submit.main(["vertex-gpu", f"--settings={file}"]) == 2
        assert told in capsys.readouterr().err


def test_no_value_can_change_what_surrounds_it(capsys: pytest.CaptureFixture[str]) -> None:
    trick = 'x"]}, replicaCount: 9 #${run}'
    job = dry(capsys, "vertex-gpu", "--", f"--final_split={trick}")
    assert job["workerPoolSpecs"][0]["containerSpec"]["args"][-1] == f"--final_split={trick}"
    assert job["workerPoolSpecs"][0]["replicaCount"] == 1


def test_a_file_of_ones_own(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plain CustomJobSpec is checked as it is; a spec with settings is filled in."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(MEANT["v5e, 4 chips"][1], default_flow_style=False))
    assert dry(capsys, str(path)) == MEANT["v5e, 4 chips"][1]
    path.write_text((ROOT / "deploy/specs/vertex-gpu.yaml").read_text().replace("${gpu}", "${gpuu}"))
    assert submit.main(command(str(path))) == 2
    assert "${gpuu}, which is no setting; did you mean gpu?" in capsys.readouterr().err
    spot = (ROOT / "deploy/specs/vertex-gpu.yaml").read_text().replace("hardware: gpu", "hardware: gpu\n  spot: true")
    path.write_text(spot)
    assert dry(capsys, str(path))["scheduling"]["strategy"] == "SPOT"
    assert dry(capsys, str(path), "--set=spot=false")["scheduling"]["strategy"] == "STANDARD"
    for text, told in [
        ("defaults: 3\njob:\n  a: 1", "must hold job"),
        ("jobs: 3", "must hold job"),
        (spot.replace("spot:", "spott:"), "the spec: there is no setting spott; did you mean spot?"),
    ]:
        path.write_text(text)
        assert submit.main(command(str(path))) == 2
        assert told in capsys.readouterr().err


def test_a_flag_given_twice_is_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--", "--tpu=none", "--workdir=gs://b/elsewhere", "--recipe=pet37_fast", "--teacher=bit:R152x2_T_pet128"]
    args = dry(capsys, "vertex-tpu-v5e", *more)["workerPoolSpecs"][0]["containerSpec"]["args"]
    assert args == ["--data=gs://my-bucket/data/flowers", *more[1:]]


def test_teachers_are_several(capsys: pytest.CaptureFixture[str]) -> None:
    job = dry(capsys, "vertex-gpu", teacher="keras:gs://b/1.keras keras:gs://b/2.keras")
    args = job["workerPoolSpecs"][0]["containerSpec"]["args"]
    assert [a for a in args if a.startswith("--teacher")] == [
        "--teacher=keras:gs://b/1.keras",
        "--teacher=keras:gs://b/2.keras",
    ]


def test_the_flags_that_the_checker_knows_are_the_trainers() -> None:
    from absl import flags

    from trainer.core.flags import define_flags

    values = flags.FlagValues()
    define_flags(values)
    known = check.trainer_flags()
    assert known.keys() == set(values)
    kinds = {"int": int, "float": float, "bool": bool}
    for name, flag in known.items():
        kind = re.sub("multi int|multi string|comma separated list of strings", "tuple", values[name].flag_type())
        assert flag.kind is kinds.get(kind, tuple if kind == "tuple" else str), name
        assert not isinstance(values[name], flags.EnumFlag) or list(flag.choices) == values[name].parser.enum_values


def test_the_trainers_help_lists_no_flag_that_the_checker_does_not_know() -> None:
    line = [sys.executable, "-m", "trainer.task", "--help"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    shown = set(re.findall(r"^  --(?:\[no\])?(\w+):", done.stdout, re.MULTILINE))
    assert shown - {"flagfile", "undefok"} == (check.trainer_flags() | check.EVERY_VERBS).keys()


@pytest.mark.parametrize("name", MEANT)
def test_the_trainer_takes_the_arguments_that_specs_send(name: str) -> None:
    """As far as the trainer goes without data and bucket: it understands every flag and misses none."""
    args = MEANT[name][1]["workerPoolSpecs"][0]["containerSpec"]["args"]
    assert list(check.configuration(args, {})) == []
    assert list(check.configuration([*args, "--log_format=json"], {})) == []
    assert list(check.configuration([*args, "--no_such=1"], {})) != []
    assert list(check.configuration([text for text in args if not text.startswith("--teacher=")], {})) != []
    assert list(check.configuration(args, STUDY["studySpec"])) == []


SMALL = ["--steps=2", "--batch_size=4", "--image_size=24", "--store_size=32", "--student=bit-tiny"]


@pytest.fixture
def at_vertex(
    data: str, teacher_file: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, Any]], subprocess.CompletedProcess[str]]:
    """Runs a job's arguments as Vertex AI would run them, with this machine's paths in place of the bucket's."""
    from conftest import here

    places = {
        "gs://my-bucket/data/flowers": data,
        "gs://my-bucket/t.keras": teacher_file,
        "gs://my-bucket/runs/flowers-1": str(tmp_path / "run"),
    }

    def run(job: dict[str, Any], trial: str = "") -> subprocess.CompletedProcess[str]:
        args = job["workerPoolSpecs"][0]["containerSpec"]["args"]
        base = job["baseOutputDirectory"]["outputUriPrefix"] + (f"/{trial}" if trial else "")
        for ours, local in places.items():
            assert sum(ours in text for text in args) == 1
            args = [text.replace(ours, local) for text in args]
            base = base.replace(ours, local)
        for name, folder in [("MODEL", "model"), ("CHECKPOINT", "checkpoints"), ("TENSORBOARD_LOG", "logs")]:
            monkeypatch.setenv(f"AIP_{name}_DIR", f"{base}/{folder}/")
        task = {"type": "workerpool0", "index": 0} | ({"trial": trial} if trial else {})
        cluster = {"cluster": {"workerpool0": ["one:2222"]}, "environment": "cloud", "task": task}
        monkeypatch.setenv("CLUSTER_SPEC", json.dumps(cluster))
        return here("task", *args)

    return run


@pytest.mark.slow
def test_what_a_spec_sends_trains_and_the_same_again_is_finished(
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
def test_what_a_study_sends_reports_the_metric_of_each_trial(
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


def test_schema_is_that_of_the_installed_gcloud() -> None:
    """Equal for the release that it was made from. A newer gcloud may know more fields, but must still know all of ours."""
    theirs = make_schema.schema(make_schema.gcloud_root())
    if theirs["gcloud"] == check.SCHEMA["gcloud"]:
        assert theirs == check.SCHEMA, "run: python3 -m deploy.make_schema > deploy/schema.json"
    for kind, fields in check.SCHEMA["types"].items():
        for name, field in fields.items():
            found = theirs["types"][kind][name]
            assert found == field or set(field["enum"]) <= set(found["enum"])
    assert set(check.SCHEMA["regions"]) <= set(theirs["regions"])


def test_cost_is_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost.units(MEANT["v5e, 8 chips"][1]) == (8, "chip")
    assert cost.units(MEANT["v3-8"][1]) == (4, "chip")
    assert cost.units(MEANT["GPU"][1]) == (1, "GPU")
    assert cost.units(MEANT["GPUs of 3 machines"][1]) == (3, "GPU")
    assert cost.units(MEANT["CPU"][1]) == (1, "machine")
    # 3,600 s x 1,000 images/s = 36,000 steps of 100.
    speed = ["--steps=36000", "--batch_size=100", "--images_per_second=1000"]
    assert cost.main(["--chips=4", "--price=1.25", *speed]) == 0
    assert capsys.readouterr().out == "1.00 h x 4 x 1.25 = 5.00\n"
    assert cost.main(["--price=1"]) == 2


def test_submitting_needs_only_python() -> None:
    """-I -S: nothing installed can be imported, as on a laptop."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from deploy import submit; sys.exit(submit.main(sys.argv[1:]))"
    )
    line = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run([*line, *command("vertex-tpu-v5e", "--dry-run")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == MEANT["v5e, 4 chips"][1]
    wrong = [*line, *command("vertex-tpu-v5e"), "--", "--tempreature=2"]
    done = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert (done.returncode, "did you mean temperature?" in done.stderr) == (2, True)


def test_the_script_finds_its_way_from_anywhere(tmp_path: pathlib.Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps(MEANT["GPU"][1]))
    done = subprocess.run(
        [ROOT / "deploy/submit.sh", *command("./job.json", "--dry-run")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == MEANT["GPU"][1]


# Images, TPU VMs, GKE, the smoke run, and what the documentation says.


def test_build_prints_what_it_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--settings=/dev/null", "--set=project=my-project", "--set=region=us-west4", "--dry-run"]
    image = "us-west4-docker.pkg.dev/my-project/funmatch/funmatch:tpu-3"
    assert build.main(["tpu", *line, "--set=version=3"]) == 0
    login, make, push = capsys.readouterr().out.splitlines()
    assert login == "gcloud auth configure-docker us-west4-docker.pkg.dev --quiet"
    assert f"docker build --target=tpu --tag={image} --build-arg=VERSION={__version__} " in make
    assert push == f"docker push {image}"
    assert build.main(["tpu", *line, "--cloud", "--set=version=3"]) == 0
    assert f"--substitutions=_IMAGE={image},_TARGET=tpu," in capsys.readouterr().out
    assert build.main(["tpv", *line]) == 2
    assert "cpu, tpu or gpu" in capsys.readouterr().err
    # Every target is one of the Dockerfile's, and what a spec asks for is what is built.
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert set(build.TARGETS) <= set(stages)
    assert {specs.load(name)["defaults"]["hardware"] for name in specs.names()} <= set(build.TARGETS)


FAKE = """#!/bin/sh
# Stands in for a program: notes how it was called, and fails where FAIL says so.
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in $FAIL) echo "ERROR: $SAYS" >&2; exit 1 ;; esac
case "$*" in *RepoDigests*) echo "host/p/funmatch@sha256:$(printf '0%.0s' $(seq 64))" ;; esac
"""


@pytest.fixture
def fakes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A docker and a gcloud that do nothing but note their arguments in this file."""
    for name in ("docker", "gcloud"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("FAIL", "nothing")
    monkeypatch.setenv("SAYS", "failed")
    return tmp_path / "calls"


def test_build_logs_in_builds_pushes_and_gives_the_digest(
    fakes: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [
        "gpu",
        "--settings=/dev/null",
        "--set=image=host/p/funmatch:gpu-1",
        "--set=project=my-project",
        "--set=region=r-r1",
    ]
    assert build.main(line) == 0
    assert [call.split()[:2] for call in fakes.read_text().splitlines()] == [
        ["gcloud", "auth"],
        ["docker", "build"],
        ["docker", "push"],
        ["docker", "image"],
    ]
    assert capsys.readouterr().out == f"image = host/p/funmatch@sha256:{'0' * 64}\n"
    monkeypatch.setenv("FAIL", "push*")
    assert build.main(line) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.splitlines()[-1]) == ("", "error: docker push exited with 1")


SETUP = [
    "--user=me@example.com",
    "--settings=/dev/null",
    "--set=project=my-project",
    "--set=region=r-r1",
    "--set=bucket=my-bucket",
]


def test_setup_makes_what_is_missing_and_stops_at_what_fails(
    fakes: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup.main(SETUP) == 0
    calls = fakes.read_text().splitlines()
    assert "service_account = funmatch-job@my-project.iam.gserviceaccount.com" in capsys.readouterr().err
    # An account stands before what is granted to it, and the job's may nothing on the project but write logs.
    (first,) = [n for n, call in enumerate(calls) if "service-accounts create funmatch-job" in call]
    granted = [n for n, call in enumerate(calls) if "--member=serviceAccount:funmatch-job@" in call]
    assert min(granted) > first
    roles = {(calls[n].split()[1], calls[n].partition("--role=")[2].split()[0]) for n in granted}
    assert roles == {
        ("storage", "roles/storage.objectUser"),
        ("storage", "roles/storage.legacyBucketReader"),
        ("projects", "roles/logging.logWriter"),
    }
    assert not any(role in call for call in calls for role in ("roles/owner", "roles/editor"))

    monkeypatch.setenv("FAIL", "storage buckets create gs://my-bucket*")
    monkeypatch.setenv("SAYS", "HTTPError 409: you already own it")
    fakes.unlink()
    assert setup.main(SETUP) == 0
    assert fakes.read_text().splitlines() == calls
    monkeypatch.setenv("SAYS", "HTTPError 409: The requested bucket name is not available, it already exists")
    fakes.unlink()
    assert setup.main(SETUP) == 1
    assert "not available" in capsys.readouterr().err
    assert len(fakes.read_text().splitlines()) == 2

    # A new account that is not known yet is tried again.
    monkeypatch.setattr(setup, "WAITS", (0.0, 0.0))
    monkeypatch.setenv("FAIL", "projects *")
    monkeypatch.setenv("SAYS", "Service account funmatch-job@my-project.iam.gserviceaccount.com does not exist.")
    fakes.unlink()
    assert setup.main(SETUP) == 1
    assert sum(" projects " in call for call in fakes.read_text().splitlines()) == 3


def test_setups_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    for more, told in [
        (["--user=me"], "must be an e-mail address"),
        (["--set=service_account=x@other.iam.gserviceaccount.com"], "is not of the project my-project"),
        (["--set=bucket="], "not given: bucket"),
    ]:
        assert setup.main([*SETUP, "--dry-run", *more]) == 2
        assert told in capsys.readouterr().err


def test_smoke_runs_the_image_with_little_and_builds_it_if_need_be(
    fakes: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [ROOT / "deploy/smoke.sh", f"--out={tmp_path}/out", "--preset=tiny"]
    assert subprocess.run(line, check=False, capture_output=True).returncode == 0
    assert not any(call.startswith("docker build") for call in fakes.read_text().splitlines())
    run = fakes.read_text().splitlines()[-1].split()
    for flag in (
        "--read-only",
        "--network none",
        "--cap-drop ALL",
        "--rm",
        "--tmpfs /tmp",
        f"--volume {tmp_path}/out:/work",
    ):
        assert f" {flag} " in " ".join(run)
    assert run[run.index("funmatch:cpu") :] == [
        "funmatch:cpu",
        "-m",
        "trainer.smoke",
        "--workdir=/work",
        "--preset=tiny",
    ]
    monkeypatch.setenv("FAIL", "image inspect*")
    assert subprocess.run(line, check=False, capture_output=True).returncode == 0
    assert "docker build --target cpu --tag funmatch:cpu" in fakes.read_text()


@pytest.mark.slow
def test_cloud_build_gets_the_sources_that_an_image_needs_and_no_more(vertex: Stub) -> None:
    line = ["--settings=/dev/null", "--set=project=my-project", "--set=region=us-west4", "--cloud"]
    assert build.main(["tpu", *line, "--set=build_account=b@my-project.iam.gserviceaccount.com"]) == 0
    (made,) = [r.body for r in vertex.requests if r.path.endswith("/builds")]
    image = "us-west4-docker.pkg.dev/my-project/funmatch/funmatch:tpu-latest"
    assert made["substitutions"] | {"_REVISION": ""} == {
        "_IMAGE": image,
        "_TARGET": "tpu",
        "_VERSION": __version__,
        "_REVISION": "",
    }
    assert made["serviceAccount"] == "projects/my-project/serviceAccounts/b@my-project.iam.gserviceaccount.com"
    assert made["images"] == ["${_IMAGE}"]
    assert "--target=${_TARGET}" in made["steps"][0]["args"]
    (sent,) = [r.body for r in vertex.requests if "/upload/" in r.path and r.body]
    with tarfile.open(fileobj=io.BytesIO(uploaded(sent)), mode="r:gz") as tar:
        names = {name.split("/")[0] for name in tar.getnames()} - {"."}
    whole = {".dockerignore", "Dockerfile", "LICENSE", "README.md", "recipes", "requirements", "setup.py", "trainer"}
    assert names == whole


def test_a_tpu_vm_is_asked_for_with_the_job_as_its_start(vertex: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    line = command("create", "--zone=us-west4-a", "--spot", service_account=ACCOUNT)
    assert tpu_vm.main([*line, "--", "--seed=7"]) == 0
    (request,) = vertex.requests
    assert request.path == "/v2/projects/my-project/locations/us-west4-a/queuedResources"
    assert request.body["spot"] == {}
    assert request.body["queueingPolicy"] == {"validUntilDuration": "86400s"}
    (wanted,) = request.body["tpu"]["nodeSpec"]
    node = wanted["node"]
    assert (wanted["nodeId"], node["acceleratorType"]) == ("flowers-1", "v5litepod-4")
    assert node["serviceAccount"]["email"] == ACCOUNT
    script = node["metadata"]["startup-script"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    (run,) = [shlex.split(text) for text in script.splitlines() if text.startswith("docker run")]
    image = "us-west4-docker.pkg.dev/my-project/funmatch/funmatch:tpu-latest"
    assert run[run.index(image) + 1 :] == ["--tpu=local", *TRAINER, "--seed=7"]
    assert "deploy/tpu_vm.sh delete --zone=us-west4-a" in capsys.readouterr().err


def test_a_tpu_vms_mistakes_and_other_actions(capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: str) -> str:
        assert tpu_vm.main(list(arguments)) == 2
        return capsys.readouterr().err

    assert "did you mean create?" in told(*command("creat", "--zone=us-west4-a"))
    assert "the data would travel" in told(*command("create", "--zone=us-west1-c"))
    assert "did you mean temperature?" in told(*command("create", "--zone=us-west4-a"), "--", "--tempreature=1")
    assert "--zone" in told(*command("create"))
    for action, word in [("state", "describe"), ("logs", "docker logs"), ("delete", "--force")]:
        assert tpu_vm.main(command(action, "--zone=us-west4-a", "--dry-run")) == 0
        assert word in capsys.readouterr().out
    # Nothing in a value runs as a command of its own on the machine.
    script = tpu_vm.startup("host/image:1", ["--data=gs://b/$(reboot); reboot"])
    assert shlex.split(script.splitlines()[-1])[-1] == "--data=gs://b/$(reboot); reboot"


def test_gke_gets_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert gke.main([*command("x")[1:], "--spot", "--set=chips=8"]) == 0
    job = json.loads(capsys.readouterr().out)
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == ("batch/v1", "Job", "flowers-1")
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "2x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["args"] == ["--tpu=local", *TRAINER]
    assert container["resources"] == {"requests": {"google.com/tpu": 8}, "limits": {"google.com/tpu": 8}}
    # What would fail again ends the Job; a stop by signal (75) does not.
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [errors.EXIT_CONFIG, errors.EXIT_DATA, errors.EXIT_DIVERGED]
    assert gke.main([*command("x")[1:], "--", "--tempreature=1"]) == 2


@pytest.mark.slow
def test_the_smoke_run_in_plain_python(tmp_path: pathlib.Path) -> None:
    line = [ROOT / "deploy/smoke.sh", "--python", f"--out={tmp_path}/out", "--preset=tiny"]
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, env=os.environ | {"PYTHON": sys.executable}
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/distill/report.html").is_file()


def test_the_smoke_run_says_what_is_missing(tmp_path: pathlib.Path) -> None:
    script = ROOT / "deploy/smoke.sh"
    for line, told in [
        (["--workdir=x"], "is --out=FOLDER"),
        (["--docker", f"--out={tmp_path}"], "no Docker engine answers"),
    ]:
        nowhere = os.environ | {"DOCKER_HOST": f"unix://{tmp_path}/none"}
        done = subprocess.run([script, *line], capture_output=True, text=True, check=False, env=nowhere)
        assert done.returncode == 2
        assert told in done.stderr


def gcloud_tree() -> dict[str, Any]:
    """Commands and flags of the installed gcloud, as it keeps them for the shell's completion."""
    path = make_schema.gcloud_root() / "data/cli/gcloud_completions.py"
    scope: dict[str, Any] = {}
    exec(path.read_text(), scope)  # noqa: S102  gcloud's own file, a single literal
    return scope["STATIC_COMPLETION_CLI_TREE"]


def gcloud_commands() -> list[list[str]]:
    """Every gcloud command that docs/deploy.md shows and that our scripts run or print."""
    text = (ROOT / "docs/deploy.md").read_text().replace("\\\n", " ")
    # Shell variables and what a reader puts in do not matter here.
    found = [shlex.split(line, comments=True) for line in re.findall(r"^ {4}(gcloud .*)$", text, re.MULTILINE)]
    settings = specs.settle(
        specs.load("vertex-gpu"), [("test", SETTINGS | {"service_account": ACCOUNT, "spot": "true"})]
    )
    settings["build_account"] = ACCOUNT
    for kind in ("custom-jobs", "hp-tuning-jobs"):
        found.append(submit.create(kind, settings, "JOB.json"))
        found.append(submit.active(kind, settings))
        found += [line for _, line in submit.followers(kind, settings, "JOB") if line[0] == "gcloud"]
    found += setup.commands(settings, "me@example.com")
    found += [line for cloud in (True, False) for line in build.commands("tpu", settings, cloud=cloud)]
    found += [
        tpu_vm.create(settings, "z", "f"),
        *(tpu_vm.other(action, settings, "z") for action in tpu_vm.ACTIONS[1:]),
    ]
    return [line for line in found if line[0] == "gcloud"]


def test_every_gcloud_command_that_is_shown_exists() -> None:
    tree, seen = gcloud_tree(), 0
    for line in gcloud_commands():
        node, flags_known = tree, set(tree["flags"])
        for word in line[1:]:
            if word in node["commands"]:
                node = node["commands"][word]
                flags_known |= set(node["flags"])
            elif word.startswith("--"):
                assert word.partition("=")[0] in flags_known, f"{shlex.join(line)}: {word}"
            else:
                assert not node["commands"], f"{shlex.join(line)}: {word}"
        seen += 1
    assert seen > 25


def test_what_the_documentation_shows_of_our_scripts_works(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every deploy/... command of docs/deploy.md, in its dry run and with the settings of the example."""
    shutil.copy(ROOT / "deploy/settings.example", tmp_path / "settings.ini")
    (tmp_path / "my-job.yaml").write_text(json.dumps(MEANT["GPU"][1]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "SETTINGS_FILE", tmp_path / "settings.ini")
    text = (ROOT / "docs/deploy.md").read_text()
    shown = re.findall(r"(?:^ {4}|`)(deploy/(?:submit|setup|build|tpu_vm|gke)\.sh [^`\n]*)", text, re.MULTILINE)
    tried = 0
    for line in (shlex.split(text.partition("|")[0], comments=True) for text in shown):
        if "..." in line or line[1].startswith("--help") or "cpu|tpu|gpu" in text.partition(line[0])[0][-1:]:
            continue
        if line[1] == "cpu":  # cpu|tpu|gpu
            line = ["deploy/build.sh", "cpu"]
        name = line[0].removeprefix("deploy/").removesuffix(".sh")
        module = {"submit": submit, "setup": setup, "build": build, "tpu_vm": tpu_vm, "gke": gke}[name]
        cut = line.index("--") if "--" in line else len(line)
        dry_run = [] if module is gke else ["--dry-run"]
        assert module.main([*line[1:cut], *dry_run, *line[cut:]]) == 0, (line, capsys.readouterr().err)
        tried += 1
    assert tried >= 8


# The YAML that specs are written in.

plain = st.recursive(
    st.one_of(st.booleans(), st.integers(-(10**6), 10**6), st.text(st.characters(codec="latin-1"), max_size=12)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("abcxyz_.-", min_size=1, max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(plain)
def test_yaml_that_pyyaml_writes_is_read_or_refused(value: Any) -> None:
    text = yaml.safe_dump(value, default_flow_style=False, width=10**6)
    try:
        found = plainyaml.load(text)
    except plainyaml.YamlError:
        return
    assert found == yaml.safe_load(text) == value
    assert json.dumps(found, sort_keys=True) == json.dumps(value, sort_keys=True)  # 1 is not True


PIECES = [
    *("a", "b: 1", "- ", "-", "key:", "key: v", " ", "  ", "    ", "\n", "\n", "\n", "\n", "# c", " # c", "'q'", '"q"'),
    *('"a\\n"', "'it''s'", "12", "1.5", "true", "no", "2x2", "86400s", "1e3", "010", "{}", "[]", '["a"]', '{"a": 1}'),
    *(":", "a:b", "gs://b/c", "${x}", "--f=1", "?", "!t", "&a", "*a", "|", ">", "0x1f", "2024-01-01", "12:30", "~"),
    *("null", "- - 1", "- k: v\n  l: w", "@", "`", "%", "x y", "a#b", "a #b", "'", '"', "é", "=", "<<", "---", "..."),
    *("1_000", ".5", "5.", "-1", "+1", "-0", "1.0e+3", "key : 1", '"k": 1', ",", "]", "}", "y", "n", "on", "OFF"),
]


@settings(max_examples=700, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=9).map("".join))
def test_yaml_is_read_as_pyyaml_reads_it_or_refused(text: str) -> None:
    try:
        found = plainyaml.load(text)
    except plainyaml.YamlError:
        return
    assert repr(found) == repr(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\na: 2", "x.yaml:2: 'a: 2' gives the key a a second time"),
        ("a: yes", 'write "yes"'),
        ("a: 010", 'write "010"'),
        ("a:\n\t- b", "x.yaml:2: holds '\\t'"),
        ("a: &b 1", "must stand in quotes"),
        ("a: b: c", "must stand in quotes"),
        ("a: [b, c]", "is no JSON"),
        ("a:\n- b\n  c", "x.yaml:3"),
        ("a:", "has no value"),
        ('{"a": 1, "a": 2}', "the key a is given twice"),
        ("a: 1\n  b: 2", "indented more"),
        ("", "is empty"),
    ],
)
def test_yaml_that_can_be_read_in_two_ways_is_refused(text: str, told: str) -> None:
    with pytest.raises(plainyaml.YamlError, match=re.escape(told)):
        plainyaml.load(text, "x.yaml")


def test_every_spec_and_study_is_plain_yaml() -> None:
    for path in sorted((ROOT / "deploy").glob("*/*.yaml")):
        assert plainyaml.load(path.read_text()) == yaml.safe_load(path.read_text()), path
