"""Invalid jobs are refused, and what the hardware table does not know is a note."""

from __future__ import annotations

import copy
import datetime
from typing import Any

import pytest
from deploy_jobs import BOARD, EXPECTED_JOBS, STUDY, change

from deploy import check, hardware, make_schema

POOL = "workerPoolSpecs.0"
MACHINE = f"{POOL}.machineSpec"
# A valid job, the path and new value of a field that makes it invalid, and a part of the message.
INVALID_JOBS = [
    ("v5e, 4 chips", f"{MACHINE}.tpu_topology", "2x2", "MachineSpec has no such field; did you mean tpuTopology?"),
    ("v5e, 4 chips", "workerPoolSpec", [], "CustomJobSpec has no such field; did you mean workerPoolSpecs?"),
    ("v5e, 4 chips", "labels", {}, "CustomJobSpec has no such field"),
    ("v5e, 4 chips", "scheduling.timeOut", "9s", "did you mean timeout?"),
    ("v5e, 4 chips", f"{MACHINE}.machineType", "ct5lp-hightpu-2t", "did you mean ct5lp-hightpu-"),
    ("v5e, 4 chips", f"{MACHINE}.machineType", "ct6e-standard-4t", "no TensorFlow on ct6e-standard-4t"),
    ("v5e, 4 chips", f"{MACHINE}.tpuTopology", "2x3", "ct5lp-hightpu-4t is 2x2 or 2x4"),
    ("v5e, 4 chips", f"{MACHINE}.tpuTopology", "4x4", "use ct5lp-hightpu-1t with 1x1 or ct5lp-hightpu-4t with 2x2 or"),
    ("v5e, 4 chips", f"{MACHINE}.tpuTopology", "4", "4 is not a topology, such as 2x4"),
    ("v5e, 4 chips", f"{MACHINE}.tpuTopology", None, "ct5lp-hightpu-4t is 2x2"),
    ("v5e, 4 chips", f"{MACHINE}.acceleratorType", "TPU_V5_LITEPOD", "takes tpuTopology, not acceleratorType"),
    ("v5e, 4 chips", f"{MACHINE}.acceleratorType", "TPU_V6E", '"TPU_V6E" is none of'),
    ("v5e, 4 chips", f"{POOL}.replicaCount", 2, "replicaCount: must be 1 on a TPU"),
    ("v5e, 4 chips", f"{POOL}.replicaCount", "1", "must be an integer"),
    ("v5e, 4 chips", f"{POOL}.replicaCount", 0, "must be at least 1"),
    ("v5e, 4 chips", f"{POOL}.containerSpec", None, "needs one of containerSpec and pythonPackageSpec"),
    ("v5e, 4 chips", f"{POOL}.containerSpec.imageUri", None, "imageUri: is missing"),
    ("v5e, 4 chips", f"{POOL}.containerSpec.imageUri", "gs://b/i", "must be HOST/PATH:TAG"),
    ("v5e, 4 chips", f"{POOL}.containerSpec.env", [{"name": "AIP_MODEL_DIR", "value": "x"}], "is set by Vertex AI"),
    ("v5e, 4 chips", f"{POOL}.containerSpec.env", [{"name": "A", "value": 8}], 'must be a string, is 8: write "8"'),
    ("v5e, 4 chips", f"{POOL}.pythonPackageSpec", {"pythonModule": "x"}, "has containerSpec and pythonPackageSpec"),
    ("v5e, 4 chips", "scheduling.strategy", "SPOTS", "did you mean SPOT?"),
    ("v5e, 4 chips", "scheduling.strategy", "ON_DEMAND", "write STANDARD"),
    ("v5e, 4 chips", "scheduling.strategy", "FLEX_START", "documented for GPUs"),
    ("v5e, 4 chips", "scheduling.timeout", "24h", "must be seconds with an s"),
    ("v5e, 4 chips", "scheduling.timeout", 86400, "must be a string"),
    ("v5e, 4 chips", "scheduling.maxWaitDuration", "60s", "needs strategy FLEX_START, not STANDARD"),
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
    ("GPU", f"{MACHINE}.machineType", "a4-highgpu-1g", "there is no a4-highgpu-1g; did you mean a4-highgpu-8g?"),
    ("GPU", f"{MACHINE}.machineType", "N1-Standard-8", "is not a machine type, such as n1-standard-8"),
    ("GPU", f"{MACHINE}.tpuTopology", "2x2", "g2-standard-12 has no TPU"),
    ("v5e, 4 chips", f"{MACHINE}.machineType", "ct6e-standard-2t", "no TensorFlow on ct6e-standard-2t"),
    ("v5e, 4 chips", f"{MACHINE}.machineType", "tpu7x-standard-4t", "no TensorFlow on tpu7x-standard-4t"),
    ("GPU", f"{MACHINE}.acceleratorType", "TPU_V3", "belongs to the machine type cloud-tpu"),
    ("GPU", f"{POOL}.replicaCount", 2, "further machines go into a second pool"),
    ("CPU", f"{MACHINE}.tpuTopology", "2x2", "has no TPU"),
    ("CPU", "scheduling", {"disableRetries": True, "restartJobOnWorkerRestart": True}, "overrides"),
]


@pytest.mark.parametrize(("name", "path", "value", "message"), INVALID_JOBS)
def test_an_invalid_job_is_refused(name: str, path: str, value: Any, message: str) -> None:
    job = copy.deepcopy(EXPECTED_JOBS[name][1])
    assert list(check.custom_job(job, "us-west4")) == []
    change(path, value)(job)
    lines = list(check.custom_job(job, "us-west4"))
    assert message in " | ".join(lines)
    assert all("\n" not in line for line in lines)


def test_two_pools_are_for_machines_without_tpu() -> None:
    job = copy.deepcopy(EXPECTED_JOBS["v5e, 4 chips"][1])
    job["workerPoolSpecs"] *= 2
    assert any("a TPU job has one pool" in line for line in check.custom_job(job, "us-west4"))
    job = copy.deepcopy(EXPECTED_JOBS["GPU"][1])
    job["workerPoolSpecs"] *= 2
    assert list(check.custom_job(job, "us-west4")) == []


def test_an_unknown_region_is_refused() -> None:
    lines = list(check.custom_job(EXPECTED_JOBS["GPU"][1], "us-west44"))
    assert lines == ["region: us-west44 is not a region of Vertex AI training; did you mean us-west4?"]


@pytest.mark.parametrize(
    ("machine", "suggestion"),
    [
        ({"machineType": "c4a-standard-8"}, ""),
        ({"machineType": "standard-8"}, "n1-standard-8"),
        ({"machineType": "n1standard-8"}, "n1-standard-8"),
        ({"machineType": "a3-edgegpu-8g", "acceleratorType": "NVIDIA_H100_80GB", "acceleratorCount": 8}, "a3-"),
        ({"machineType": "ct5p-hightpu-4t", "tpuTopology": "2x2x1"}, "ct5lp-hightpu-4t"),
    ],
)
def test_an_unknown_machine_is_a_note_and_not_an_error(machine: dict[str, Any], suggestion: str) -> None:
    job = copy.deepcopy(EXPECTED_JOBS["CPU"][1])
    job["workerPoolSpecs"][0]["machineSpec"] = machine
    assert list(check.custom_job(job, "us-west4")) == []
    (note,) = [line for line in check.notes(job, "us-west4") if "not checked" in line]
    assert f"machine type {machine['machineType']} is not in deploy/hardware.py" in note
    assert suggestion in note


def test_an_unlisted_region_of_a_tpu_is_a_note() -> None:
    job = EXPECTED_JOBS["v5e, 4 chips"][1]
    assert list(check.custom_job(job, "europe-west4")) == []
    assert any("europe-west4 is not among the regions where" in line for line in check.notes(job, "europe-west4"))
    assert not any("regions" in line for line in check.notes(job, "us-west4"))


def test_known_machines_get_no_note() -> None:
    known = [*hardware.GPU_MACHINES, *hardware.TPU_MACHINES, *(f"{name}-standard-8" for name in hardware.FAMILIES)]
    for machine_type in known:
        lines = hardware.machine_notes({"machineType": machine_type}, "us-central1")
        assert not [line for line in lines if "not checked" in line]


def test_every_row_of_the_hardware_table_names_its_sources() -> None:
    for table in (hardware.TPU_MACHINES, hardware.GPU_MACHINES, hardware.FAMILIES):
        assert all(isinstance(row.source, hardware.Source) for row in table.values())
    sources = [source for tpu in hardware.TPUS.values() for source in tpu.sources]
    assert all(tpu.sources for tpu in hardware.TPUS.values())
    for source in [*sources, hardware.UNRECORDED]:
        assert datetime.date.fromisoformat(source.date)


def test_the_hardware_table_agrees_with_itself_and_with_gcloud() -> None:
    accelerators = check.SCHEMA["types"]["MachineSpec"]["acceleratorType"]["enum"]
    assert {row.gpu for row in hardware.GPU_MACHINES.values()} <= set(accelerators)
    assert {gpu for family in hardware.FAMILIES.values() for gpu in family.gpus} <= set(accelerators)
    assert {tpu.accelerator for tpu in hardware.TPUS.values() if tpu.accelerator} <= set(accelerators)
    for row in hardware.TPU_MACHINES.values():
        assert row.machine_type.startswith(hardware.TPUS[row.tpu].machine_prefix)
        assert all(hardware.chips_of(topology) >= row.chips for topology in row.topologies)
        assert hardware.one_machine_topology(row) in row.topologies
    for gpu, machines in hardware.machines_by_gpu().items():
        for count, machine_type in machines.items():
            machine = {"machineType": machine_type, "acceleratorType": gpu, "acceleratorCount": count}
            assert list(hardware.machine_errors(machine, "machineSpec")) == []


INVALID_STUDIES = [
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


@pytest.mark.parametrize(("path", "value", "message"), INVALID_STUDIES)
def test_an_invalid_study_is_refused(path: str, value: Any, message: str) -> None:
    job = copy.deepcopy(STUDY | {"trialJobSpec": EXPECTED_JOBS["v5e, 4 chips"][1]})
    assert list(check.tuning_job(job, "us-west4")) == []
    change(path, value)(job)
    assert message in " | ".join(check.tuning_job(job, "us-west4"))


def test_the_schema_is_that_of_the_installed_gcloud() -> None:
    """Equal for the release that it was generated from. A newer gcloud may have more fields."""
    theirs = make_schema.schema(make_schema.gcloud_root())
    if theirs["gcloud"] == check.SCHEMA["gcloud"]:
        assert theirs == check.SCHEMA, "run: python3 -m deploy.make_schema > deploy/schema.json"
    for kind, fields in check.SCHEMA["types"].items():
        for name, field in fields.items():
            their_field = theirs["types"][kind][name]
            assert their_field == field or set(field["enum"]) <= set(their_field["enum"])
    assert set(check.SCHEMA["regions"]) <= set(theirs["regions"])
