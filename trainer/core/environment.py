"""Environment variables: what Vertex AI sets, and what TensorFlow reads when it is imported.

Vertex AI passes a container its output folders (AIP_...), its cluster (CLUSTER_SPEC, TF_CONFIG) and
its trial of a hyperparameter study as variables. TensorFlow's TPU wheel reads variables at import
to decide whether and how it loads libtpu, so this module must not import TensorFlow.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import posixpath
import socket
import time
from collections import deque
from typing import Any

from trainer.core.errors import ConfigError, DataError

_CLOUD_VARIABLES = (
    "AIP_CHECKPOINT_DIR",
    "AIP_MODEL_DIR",
    "AIP_TENSORBOARD_LOG_DIR",
    "CLOUD_ML_JOB_ID",
    "CLOUD_ML_PROJECT_ID",
    "CLUSTER_SPEC",
    "KUBERNETES_SERVICE_HOST",
)
# PCI devices: TPU v2 or v3, v4, v5p, v5e, v6e, 7x. Google's network cards have the same vendor.
_PCI_VENDOR = "0x1ae0"
_TPU_DEVICES = {"0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
LIBTPU_LOCKFILE = "/tmp/libtpu_lockfile"
MAX_REPORTED = 100  # metrics kept in the file, as Vertex AI's own library does


def in_cloud() -> bool:
    """Whether this process runs in a container of Vertex AI or Kubernetes, judged by variables."""
    return any(name in os.environ for name in _CLOUD_VARIABLES)


def tpu_address(tpu: str) -> str:
    """The TPU to connect to.

    Args:
        tpu: the flag `--tpu`.

    Returns:
        "none", "local", "grpc://...", a name, or "" for TensorFlow's own search.
    """
    named = os.environ.get("KUBE_GOOGLE_CLOUD_TPU_ENDPOINTS") or os.environ.get("TPU_NAME", "")
    # TensorFlow would query the metadata server for a TPU named "local".
    return "local" if tpu == "" and named == "local" else tpu


def for_tensorflow(tpu: str) -> None:
    """Sets the variables that TensorFlow's TPU wheel reads at import, unless the user has set them.

    A local TPU needs the PJRT interface of libtpu. Without one, libtpu must not be loaded: it would
    query a missing metadata server for more than a minute, and lock the TPU against other
    processes.

    Args:
        tpu: the flag `--tpu`; "none" for a verb without it.

    Raises:
        ConfigError: another user's lock file of libtpu would make TensorFlow's import abort.
    """
    if importlib.util.find_spec("libtpu") is None:
        return
    if tpu_address(tpu) != "local":
        os.environ.setdefault("TPU_LOAD_LIBRARY", "0")
        return
    if os.path.exists(LIBTPU_LOCKFILE) and not os.access(LIBTPU_LOCKFILE, os.R_OK | os.W_OK):
        raise ConfigError(
            f"--tpu={tpu}: {LIBTPU_LOCKFILE} belongs to another user, so libtpu cannot start: end the process that uses the TPU, "
            "then delete the file"
        )
    import libtpu

    os.environ.setdefault("PJRT_DEVICE", "TPU")
    os.environ.setdefault("NEXT_PLUGGABLE_DEVICE_USE_C_API", "true")
    os.environ.setdefault("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", libtpu.get_library_path())
    if not has_tpu() and not _metadata_server_is_reachable():
        # No device and no metadata server: libtpu fails at once instead of retrying the server.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


def has_tpu() -> bool:
    """Whether this machine has a TPU, by its device files or by the PCI bus."""
    if glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"):
        return True
    for device in glob.glob("/sys/bus/pci/devices/*"):
        try:
            with open(f"{device}/vendor") as vendor, open(f"{device}/device") as model:
                if vendor.read().strip() == _PCI_VENDOR and model.read().strip() in _TPU_DEVICES:
                    return True
        except OSError:
            continue
    return False


def _metadata_server_is_reachable() -> bool:
    host = os.environ.get("GCE_METADATA_HOST") or os.environ.get("GCE_METADATA_IP") or "169.254.169.254"
    name, _, port = host.partition(":")
    return reachable(name, int(port or 80), 2.0)


def reachable(host: str, port: int, seconds: float) -> bool:
    """Whether a server accepts TCP connections.

    Args:
        host: name or address.
        port: TCP port.
        seconds: timeout.
    """
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return True
    except OSError:
        return False


def _json_variable(name: str) -> dict[str, Any]:
    """The JSON object in a variable; {} if it is not set.

    Raises:
        ConfigError: the variable holds something else.
    """
    text = os.environ.get(name, "")
    if not text:
        return {}
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise ConfigError(f"the variable {name} is not a JSON object: {error}") from None
    return value


def trial() -> str:
    """This process's trial of a hyperparameter study; empty outside of a study."""
    if number := os.environ.get("CLOUD_ML_TRIAL_ID", ""):
        return number
    try:
        return str(_json_variable("CLUSTER_SPEC").get("task", {}).get("trial", "") or "")
    except ConfigError:
        return ""


def cluster() -> tuple[dict[str, Any], int]:
    """The machines of a distributed job.

    TF_CONFIG takes precedence. If only Vertex AI's CLUSTER_SPEC is set, its worker pools 0 and 1
    are the chief and the workers.

    Returns:
        The value of TF_CONFIG and the number of machines; ({}, 1) for a single machine.

    Raises:
        ConfigError: a variable is invalid, or has a parameter server or an evaluator, which this
            job does not support.
    """
    config = _json_variable("TF_CONFIG")
    if not config:
        spec = _json_variable("CLUSTER_SPEC")
        roles = {"workerpool0": "chief", "workerpool1": "worker", "workerpool2": "ps", "workerpool3": "evaluator"}
        task = spec.get("task", {})
        config = {
            "cluster": {roles.get(pool, pool): hosts for pool, hosts in spec.get("cluster", {}).items()},
            "task": {"type": roles.get(task.get("type", ""), ""), "index": task.get("index", 0)},
        }
    hosts = {role: list(names) for role, names in config.get("cluster", {}).items() if names}
    count = sum(map(len, hosts.values()))
    if count <= 1:
        return {}, 1
    if unsupported := sorted(set(hosts) - {"chief", "worker"}):
        raise ConfigError(
            f"TF_CONFIG (or CLUSTER_SPEC) has {' and '.join(unsupported)}: this job supports a chief and workers only"
        )
    task = config.get("task", {})
    role, index = task.get("type", ""), int(task.get("index", 0))
    if not 0 <= index < len(hosts.get(role, [])):
        raise ConfigError(f"TF_CONFIG gives this process the role {role!r} {index}, which its cluster does not have")
    return {"cluster": hosts, "task": {"type": role, "index": index}}, count


def is_chief() -> bool:
    """Whether this process writes the results: the chief, else the first of the workers."""
    config, count = cluster()
    if count == 1:
        return True
    role, index = config["task"]["type"], config["task"]["index"]
    return index == 0 and (role == "chief" or "chief" not in config["cluster"])


def workdir(flag: str) -> str:
    """The run's folder.

    Without the flag it is the BASE of Vertex AI's AIP_CHECKPOINT_DIR, which is BASE/checkpoints/,
    so that the workdir's checkpoints are there. With the flag, each trial of a study gets a
    subfolder, because all trials have the same command line.

    Args:
        flag: the value of `--workdir`.
    """
    if flag:
        number, parts = trial(), flag.rstrip("/").split("/")
        return flag if not number or f"trial-{number}" in parts else posixpath.join(flag, f"trial-{number}")
    folder = os.environ.get("AIP_CHECKPOINT_DIR", "").rstrip("/")
    base, _, last = folder.rpartition("/")
    return base if last == "checkpoints" and base else folder


def model_dir(flag: str) -> str:
    """The folder for the served model: `--model_dir`, else AIP_MODEL_DIR, else empty."""
    return (flag or os.environ.get("AIP_MODEL_DIR", "")).rstrip("/")


def tensorboard_dir(flag: str) -> str:
    """The folder for TensorBoard: `--tensorboard_dir`, else AIP_TENSORBOARD_LOG_DIR, else empty."""
    return (flag or os.environ.get("AIP_TENSORBOARD_LOG_DIR", "")).rstrip("/")


reported_metrics: deque[dict[str, str | float]] = deque(maxlen=MAX_REPORTED)


def reports_metrics() -> bool:
    """Whether this process is part of a hyperparameter study, which needs its metric."""
    return bool(os.environ.get("CLOUD_ML_HP_METRIC_FILE", "") or trial())


def report_metric(name: str, value: float, step: int) -> None:
    """Reports a trial's metric to Vertex AI; does nothing outside of a hyperparameter study.

    File and format are those of `cloudml-hypertune` 0.1.0.dev6: CLOUD_ML_HP_METRIC_FILE, else
    /tmp/hypertune/output.metrics, with the newest 100 metrics as lines of JSON.

    Args:
        name: the study's metricId.
        value: value of the metric.
        step: training step of the evaluation.

    Raises:
        DataError: the file cannot be written, so the study would get no metric.
    """
    if not reports_metrics():
        return
    path = os.environ.get("CLOUD_ML_HP_METRIC_FILE", "") or "/tmp/hypertune/output.metrics"
    number = os.environ.get("CLOUD_ML_TRIAL_ID", "") or trial() or "0"
    reported_metrics.append(
        {
            "timestamp": time.time(),
            "trial": number,
            name: str(float(value)),
            "global_step": str(step),
            "checkpoint_path": "",
        }
    )
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, sort_keys=True) + "\n" for entry in reported_metrics)
    except OSError as error:
        raise DataError(
            f"cannot write the study's metric to {path}: {error.strerror}; mount a writable /tmp or set CLOUD_ML_HP_METRIC_FILE"
        ) from error
