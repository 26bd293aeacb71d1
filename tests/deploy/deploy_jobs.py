"""Settings for a job, and the job that each spec must make of them."""

from __future__ import annotations

import copy
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from deploy import submit

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
    """A command line with every setting that has no default; a change to None leaves one out."""
    values = {name: value for name, value in (SETTINGS | changes).items() if value is not None}
    pairs = [f"--set={name}={value}" for name, value in values.items()]
    return [spec, "--settings=/dev/null", *pairs, *more]


def dry(capsys: pytest.CaptureFixture[str], spec: str, *more: str, **changes: str | None) -> dict[str, Any]:
    """The job that --dry-run prints."""
    cut = more.index("--") if "--" in more else len(more)
    assert submit.main([*command(spec, *more[:cut], **changes), "--dry-run", *more[cut:]]) == 0
    return json.loads(capsys.readouterr().out)


def one_machine(machine: dict[str, Any], hardware: str, *args: str, disk: int = 200, hours: int = 24) -> dict[str, Any]:
    """The expected job on one machine, written out."""
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


def three_machines() -> dict[str, Any]:
    """Three machines with an A100 each: a chief and two workers."""
    a100 = {"machineType": "a2-highgpu-1g", "acceleratorType": "NVIDIA_TESLA_A100", "acceleratorCount": 1}
    job = one_machine(a100, "gpu")
    (chief,) = job["workerPoolSpecs"]
    job["workerPoolSpecs"] = [chief, chief | {"replicaCount": 2}]
    job["scheduling"]["restartJobOnWorkerRestart"] = True
    return job


EXPECTED_JOBS = {
    "v5e, 1 chip": (
        ["vertex-tpu-v5e", "--set=chips=1"],
        one_machine({"machineType": "ct5lp-hightpu-1t", "tpuTopology": "1x1"}, "tpu", "--tpu=local"),
    ),
    "v5e, 4 chips": (
        ["vertex-tpu-v5e"],
        one_machine({"machineType": "ct5lp-hightpu-4t", "tpuTopology": "2x2"}, "tpu", "--tpu=local"),
    ),
    "v5e, 8 chips": (
        ["vertex-tpu-v5e", "--set=chips=8"],
        one_machine({"machineType": "ct5lp-hightpu-8t", "tpuTopology": "2x4"}, "tpu", "--tpu=local"),
    ),
    "v3-8": (
        ["vertex-tpu-v3"],
        one_machine(
            {"machineType": "cloud-tpu", "acceleratorType": "TPU_V3", "acceleratorCount": 8}, "tpu", "--tpu=local"
        ),
    ),
    "GPU": (
        ["vertex-gpu"],
        one_machine({"machineType": "g2-standard-12", "acceleratorType": "NVIDIA_L4", "acceleratorCount": 1}, "gpu"),
    ),
    "GPUs of 3 machines": (
        ["vertex-gpu-machines", "--set=gpu=NVIDIA_TESLA_A100", "--set=machines=3"],
        three_machines(),
    ),
    "CPU": (["vertex-cpu"], one_machine({"machineType": "n1-standard-8"}, "cpu", disk=100, hours=1)),
}


STUDY = yaml.safe_load((ROOT / "deploy/studies/learning-rate.yaml").read_text())


def arrived(job: dict[str, Any]) -> dict[str, Any]:
    """A job in the JSON of Google's services, where 64-bit integers are strings."""
    job = copy.deepcopy(job)
    for pool in job["workerPoolSpecs"]:
        pool["replicaCount"] = str(pool["replicaCount"])
    return job


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A function that sets the field at a dotted path, or deletes it for None."""

    def edit(job: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parents:
            job = job.setdefault(part, {}) if isinstance(job, dict) else job[part]
        if value is None:
            del job[last]
        else:
            job[last] = value

    return edit
