"""Google Cloud's machines, in one table: job specs are checked against it and filled in from it.

Every row names the page that it was taken from and the date on which that page was read. A
machine type without a row is not refused: `machine_notes` reports that it was not checked. To
support another machine, add its row here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class Source(NamedTuple):
    """A page of Google's documentation, and the date on which it was read."""

    page: str
    date: str


_TRAINING = "docs.cloud.google.com/gemini-enterprise-agent-platform/machine-learning/training"
VERTEX_MACHINES = Source(f"{_TRAINING}/configure-compute", "2026-11-24")
VERTEX_TPU = Source(f"{_TRAINING}/training-with-tpu-vm", "2026-11-24")
TPU_ZONES = Source("docs.cloud.google.com/tpu/docs/types-zones", "2026-11-24")
TPU_HARDWARE = Source("docs.cloud.google.com/tpu/docs/v3, v4, v5e, v5p and v6e", "2026-11-24")
TPU_VM = Source("docs.cloud.google.com/tpu/docs/create-tpu-vm", "2026-11-24")
GKE = Source("nodeSelector of public GKE manifests", "2026-11-25")
# Of GPUs and families: written down on that day, the page was not.
UNRECORDED = Source("no page recorded", "2026-11-24")


class Tpu(NamedTuple):
    """A generation of Cloud TPU. A field without a value is one that no source gave.

    Attributes:
        name: the generation, such as v5e.
        sources: where the row is from.
        cores_per_chip: TensorFlow replicas on a chip.
        machine_prefix: start of its machine types on Vertex AI.
        accelerator: `acceleratorType` beside the machine type cloud-tpu, whose count is in cores.
        chips_per_machine: chips of one cloud-tpu machine.
        tensorflow: whether Vertex AI trains TensorFlow models on it.
        vm_accelerator: accelerator type of a TPU VM, before the number of chips.
        vm_runtime: software version of a TPU VM.
        gke_accelerator: value of the node label cloud.google.com/gke-tpu-accelerator.
        regions: regions with a zone of it. Only North America was read.
    """

    name: str
    sources: tuple[Source, ...]
    cores_per_chip: int | None = None
    machine_prefix: str = ""
    accelerator: str = ""
    chips_per_machine: int | None = None
    tensorflow: bool | None = None
    vm_accelerator: str = ""
    vm_runtime: str = ""
    gke_accelerator: str = ""
    regions: tuple[str, ...] = ()


TPUS = {
    row.name: row
    for row in (
        Tpu(
            name="v2",
            sources=(VERTEX_MACHINES,),
            cores_per_chip=2,
            machine_prefix="cloud-tpu",
            accelerator="TPU_V2",
            chips_per_machine=4,
            tensorflow=True,
        ),
        Tpu(
            name="v3",
            sources=(VERTEX_MACHINES, TPU_HARDWARE),
            cores_per_chip=2,
            machine_prefix="cloud-tpu",
            accelerator="TPU_V3",
            chips_per_machine=4,
            tensorflow=True,
        ),
        # The page of Vertex AI's machines lists neither v4 nor v5p.
        Tpu(name="v4", sources=(TPU_ZONES, TPU_HARDWARE), cores_per_chip=2, regions=("us-central2",)),
        Tpu(
            name="v5e",
            sources=(VERTEX_MACHINES, TPU_ZONES, TPU_HARDWARE, TPU_VM, GKE),
            cores_per_chip=1,
            machine_prefix="ct5lp-",
            tensorflow=True,
            vm_accelerator="v5litepod-",
            vm_runtime="v2-alpha-tpuv5-lite",
            gke_accelerator="tpu-v5-lite-podslice",
            regions=("us-central1", "us-south1", "us-west1", "us-west4"),
        ),
        Tpu(name="v5p", sources=(TPU_ZONES, TPU_HARDWARE), cores_per_chip=2, regions=("us-central1", "us-east5")),
        # The page of machines names the nightly TensorFlow for v6e. That of TPU training excludes
        # TensorFlow from v6e on.
        Tpu(
            name="v6e",
            sources=(VERTEX_TPU, TPU_ZONES, TPU_HARDWARE),
            cores_per_chip=1,
            machine_prefix="ct6e-",
            tensorflow=False,
            regions=("us-central1", "us-east1", "us-east5"),
        ),
        Tpu(name="7x", sources=(VERTEX_MACHINES, VERTEX_TPU), machine_prefix="tpu7x-", tensorflow=False),
    )
}


class TpuMachine(NamedTuple):
    """A machine type of Vertex AI with TPU chips.

    Attributes:
        machine_type: its name.
        tpu: its generation, a key of TPUS.
        chips: chips of one machine.
        topologies: values of `tpuTopology`. A topology with more chips than `chips` is several
            machines.
        source: where the row is from.
    """

    machine_type: str
    tpu: str
    chips: int
    topologies: tuple[str, ...]
    source: Source


_SLICES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
TPU_MACHINES = {
    row.machine_type: row
    for row in (
        TpuMachine("ct5lp-hightpu-1t", "v5e", 1, ("1x1",), VERTEX_MACHINES),
        TpuMachine("ct5lp-hightpu-4t", "v5e", 4, _SLICES, VERTEX_MACHINES),
        TpuMachine("ct5lp-hightpu-8t", "v5e", 8, ("2x4",), VERTEX_MACHINES),
        TpuMachine("ct6e-standard-1t", "v6e", 1, ("1x1",), VERTEX_MACHINES),
        TpuMachine("ct6e-standard-4t", "v6e", 4, _SLICES, VERTEX_MACHINES),
        TpuMachine("ct6e-standard-8t", "v6e", 8, ("2x4",), VERTEX_MACHINES),
        # From 2x2x1 to 8x8x16; the steps between were not noted.
        TpuMachine("tpu7x-standard-4t", "7x", 4, ("2x2x1", "8x8x16"), VERTEX_MACHINES),
    )
}


class GpuMachine(NamedTuple):
    """A machine type that comes with GPUs: so many of one kind, neither more nor fewer."""

    machine_type: str
    gpu: str
    gpus: int
    source: Source


# Of several machine types with the same GPUs, the first is the one that specs use.
GPU_MACHINES = {
    row.machine_type: row
    for row in (
        GpuMachine("g2-standard-12", "NVIDIA_L4", 1, UNRECORDED),
        GpuMachine("g2-standard-4", "NVIDIA_L4", 1, UNRECORDED),
        GpuMachine("g2-standard-8", "NVIDIA_L4", 1, UNRECORDED),
        GpuMachine("g2-standard-16", "NVIDIA_L4", 1, UNRECORDED),
        GpuMachine("g2-standard-32", "NVIDIA_L4", 1, UNRECORDED),
        GpuMachine("g2-standard-24", "NVIDIA_L4", 2, UNRECORDED),
        GpuMachine("g2-standard-48", "NVIDIA_L4", 4, UNRECORDED),
        GpuMachine("g2-standard-96", "NVIDIA_L4", 8, UNRECORDED),
        GpuMachine("a2-highgpu-1g", "NVIDIA_TESLA_A100", 1, UNRECORDED),
        GpuMachine("a2-highgpu-2g", "NVIDIA_TESLA_A100", 2, UNRECORDED),
        GpuMachine("a2-highgpu-4g", "NVIDIA_TESLA_A100", 4, UNRECORDED),
        GpuMachine("a2-highgpu-8g", "NVIDIA_TESLA_A100", 8, UNRECORDED),
        GpuMachine("a2-megagpu-16g", "NVIDIA_TESLA_A100", 16, UNRECORDED),
        GpuMachine("a2-ultragpu-1g", "NVIDIA_A100_80GB", 1, UNRECORDED),
        GpuMachine("a2-ultragpu-2g", "NVIDIA_A100_80GB", 2, UNRECORDED),
        GpuMachine("a2-ultragpu-4g", "NVIDIA_A100_80GB", 4, UNRECORDED),
        GpuMachine("a2-ultragpu-8g", "NVIDIA_A100_80GB", 8, UNRECORDED),
        GpuMachine("a3-highgpu-1g", "NVIDIA_H100_80GB", 1, UNRECORDED),
        GpuMachine("a3-highgpu-2g", "NVIDIA_H100_80GB", 2, UNRECORDED),
        GpuMachine("a3-highgpu-4g", "NVIDIA_H100_80GB", 4, UNRECORDED),
        GpuMachine("a3-highgpu-8g", "NVIDIA_H100_80GB", 8, UNRECORDED),
        GpuMachine("a3-megagpu-8g", "NVIDIA_H100_MEGA_80GB", 8, UNRECORDED),
        GpuMachine("a3-ultragpu-8g", "NVIDIA_H200_141GB", 8, UNRECORDED),
        GpuMachine("a4-highgpu-8g", "NVIDIA_B200", 8, UNRECORDED),
    )
}


class Family(NamedTuple):
    """A machine family without GPUs of its own, and the GPUs that can be attached to it."""

    name: str
    gpus: tuple[str, ...]
    gpu_counts: tuple[int, ...]
    source: Source


_N1_GPUS = ("NVIDIA_TESLA_T4", "NVIDIA_TESLA_P4", "NVIDIA_TESLA_P100", "NVIDIA_TESLA_V100")
FAMILIES = {
    row.name: row
    for row in (
        Family("n1", _N1_GPUS, (1, 2, 4, 8), UNRECORDED),
        Family("n2", (), (), UNRECORDED),
        Family("n2d", (), (), UNRECORDED),
        Family("n4", (), (), UNRECORDED),
        Family("e2", (), (), UNRECORDED),
        Family("c2", (), (), UNRECORDED),
        Family("c2d", (), (), UNRECORDED),
        Family("c3", (), (), UNRECORDED),
        Family("c3d", (), (), UNRECORDED),
        Family("c4", (), (), UNRECORDED),
        Family("m1", (), (), UNRECORDED),
        Family("m3", (), (), UNRECORDED),
    )
}
# The N1 machine that specs use for so many T4. N1 machines and GPUs are combined freely, so this
# is our choice.
N1_FOR_T4 = {1: "n1-standard-8", 2: "n1-standard-16", 4: "n1-standard-32"}

_MACHINE_TYPE = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)+", re.ASCII)
_TOPOLOGY = re.compile(r"[1-9][0-9]*(x[1-9][0-9]*)+", re.ASCII)


def near(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean X?` with the candidate most like the word, or an empty text."""
    names = list(candidates)
    matches = difflib.get_close_matches(word, names, 1, 0.55)
    if not matches:  # tpu_topology differs from tpuTopology in case and separators only
        by_letters = {_letters(name): name for name in names}
        matches = [by_letters[_letters(word)]] if _letters(word) in by_letters else []
    return f"; did you mean {matches[0]}?" if matches else ""


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def chips_of(topology: str) -> int:
    """Chips of a topology: 8 for 2x4."""
    chips = 1
    for side in topology.split("x"):
        chips *= int(side)
    return chips


def tpu_of(machine_type: str) -> Tpu | None:
    """The generation of a machine type; v2 for cloud-tpu, where the accelerator decides."""
    for tpu in TPUS.values():
        if tpu.machine_prefix and machine_type.startswith(tpu.machine_prefix):
            return tpu
    return None


def is_tpu(machine: dict[str, Any]) -> bool:
    """Whether a MachineSpec has TPU chips."""
    return tpu_of(machine.get("machineType", "")) is not None or "tpuTopology" in machine


def tpu_machines(generation: str) -> dict[int, TpuMachine]:
    """The machine types of a generation by their number of chips."""
    return {row.chips: row for row in TPU_MACHINES.values() if row.tpu == generation}


def one_machine_topology(row: TpuMachine) -> str:
    """The topology of a single machine of this type."""
    return next(topology for topology in row.topologies if chips_of(topology) == row.chips)


def machines_by_gpu() -> dict[str, dict[int, str]]:
    """The machine type that specs use for each kind and number of GPUs."""
    machines: dict[str, dict[int, str]] = {"NVIDIA_TESLA_T4": dict(N1_FOR_T4)}
    for row in GPU_MACHINES.values():
        machines.setdefault(row.gpu, {}).setdefault(row.gpus, row.machine_type)
    return machines


def machine_errors(machine: dict[str, Any], path: str) -> Iterator[str]:
    """Contradictions between a MachineSpec and the table, a line each.

    Args:
        machine: a MachineSpec whose fields have the right types.
        path: where it stands in the spec, for the messages.
    """
    machine_type = machine.get("machineType", "")
    if not machine_type:
        yield f"{path}.machineType: is missing"
    elif not _MACHINE_TYPE.fullmatch(machine_type):
        yield f"{path}.machineType: {machine_type!r} is not a machine type, such as n1-standard-8"
    elif not _TOPOLOGY.fullmatch(machine.get("tpuTopology", "1x1")):
        yield f"{path}.tpuTopology: {machine['tpuTopology']} is not a topology, such as 2x4"
    elif tpu := tpu_of(machine_type):
        yield from _tpu_errors(machine, tpu, path)
    else:
        yield from _gpu_errors(machine, path)
        if "tpuTopology" in machine and not _is_unknown(machine_type):
            yield f"{path}.tpuTopology: {machine_type} has no TPU"


def _tpu_errors(machine: dict[str, Any], tpu: Tpu, path: str) -> Iterator[str]:
    machine_type, topology = machine["machineType"], machine.get("tpuTopology")
    if tpu.tensorflow is False:
        usable = [row.machine_type for row in TPU_MACHINES.values() if TPUS[row.tpu].tensorflow]
        yield f"{path}.machineType: Vertex AI runs no TensorFlow on {machine_type}; use {', '.join(usable)}"
    elif tpu.accelerator:
        yield from _cloud_tpu_errors(machine, path)
    elif machine_type not in TPU_MACHINES:
        yield f"{path}.machineType: there is no {machine_type}{near(machine_type, TPU_MACHINES)}"
    else:
        row = TPU_MACHINES[machine_type]
        if "acceleratorType" in machine or "acceleratorCount" in machine:
            yield f"{path}: {machine_type} takes tpuTopology, not acceleratorType and acceleratorCount"
        if topology not in row.topologies:
            yield f"{path}.tpuTopology: {machine_type} is {' or '.join(row.topologies)}, not {topology}"
        elif chips_of(topology) > row.chips:
            usable = [f"{m.machine_type} with {one_machine_topology(m)}" for m in tpu_machines(tpu.name).values()]
            yield (
                f"{path}.tpuTopology: {topology} is several machines, on which funmatch's image does not run; "
                f"use {' or '.join(usable)}"
            )


def _cloud_tpu_errors(machine: dict[str, Any], path: str) -> Iterator[str]:
    by_accelerator = {tpu.accelerator: tpu for tpu in TPUS.values() if tpu.accelerator}
    accelerator, count = machine.get("acceleratorType", ""), machine.get("acceleratorCount")
    if "tpuTopology" in machine:
        yield f"{path}.tpuTopology: cloud-tpu takes acceleratorType and acceleratorCount instead"
    if accelerator not in by_accelerator:
        yield f"{path}.acceleratorType: cloud-tpu is {' or '.join(by_accelerator)}, not {accelerator or 'nothing'}"
        return
    tpu = by_accelerator[accelerator]
    cores = (tpu.cores_per_chip or 0) * (tpu.chips_per_machine or 0)
    if count != cores:
        yield f"{path}.acceleratorCount: cloud-tpu has {cores} cores on one machine, and funmatch runs on one, not {count}"


def _gpu_errors(machine: dict[str, Any], path: str) -> Iterator[str]:
    machine_type, gpu = machine["machineType"], machine.get("acceleratorType", "")
    count = machine.get("acceleratorCount")
    family = FAMILIES.get(machine_type.partition("-")[0])
    if gpu.startswith("TPU_"):
        yield f"{path}.acceleratorType: {gpu} belongs to the machine type cloud-tpu, not to {machine_type}"
    elif bool(gpu) != (count is not None):
        yield f"{path}: acceleratorType and acceleratorCount come together"
    elif machine_type in GPU_MACHINES:
        row = GPU_MACHINES[machine_type]
        if (gpu, count) != (row.gpu, row.gpus):
            yield f"{path}: {machine_type} has {row.gpus} x {row.gpu}, not {f'{count} x {gpu}' if gpu else 'nothing'}"
    elif _series(machine_type) in map(_series, GPU_MACHINES):
        yield f"{path}.machineType: there is no {machine_type}{near(machine_type, GPU_MACHINES)}"
    elif family is None or not gpu:
        return
    elif not family.gpus:
        yield f"{path}: {machine_type} takes no GPU; n1 machines do, and g2, a2, a3 and a4 come with theirs"
    elif gpu not in family.gpus:
        yield f"{path}.acceleratorType: an {family.name} machine takes {', '.join(family.gpus)}, not {gpu}"
    elif count not in family.gpu_counts:
        yield f"{path}.acceleratorCount: {count} is not one of {', '.join(map(str, family.gpu_counts))}"


def _series(machine_type: str) -> str:
    """The machine type without its size: a2-highgpu of a2-highgpu-1g.

    Of a series in the table, every size is.
    """
    return machine_type.rpartition("-")[0]


def _is_unknown(machine_type: str) -> bool:
    """Whether the table has neither the machine type nor its series, family or TPU generation."""
    return (
        tpu_of(machine_type) is None
        and machine_type.partition("-")[0] not in FAMILIES
        and _series(machine_type) not in map(_series, GPU_MACHINES)
    )


def machine_notes(machine: dict[str, Any], region: str) -> Iterator[str]:
    """What the table does not know of a MachineSpec in a region, a line each."""
    machine_type = machine.get("machineType", "")
    if not machine_type:
        return
    if _is_unknown(machine_type):
        suggestion = near(machine_type, [*TPU_MACHINES, *GPU_MACHINES, *N1_FOR_T4.values(), "cloud-tpu"])
        yield f"machine type {machine_type} is not in deploy/hardware.py, so it was not checked{suggestion}"
    elif tpu := tpu_of(machine_type):
        yield from region_notes(tpu.name, region)


def region_notes(generation: str, region: str) -> Iterator[str]:
    """A line if a region is not among those in which a TPU generation is known to be."""
    regions = TPUS[generation].regions
    if regions and region not in regions:
        yield f"{region} is not among the regions where Cloud TPU {generation} is listed ({', '.join(regions)})"
