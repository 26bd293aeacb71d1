"""Variables of Vertex AI, and those set for TensorFlow before its import."""

from __future__ import annotations

import importlib.machinery
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest
from conftest import ROOT

from trainer import task
from trainer.core import environment
from trainer.core.config import Config
from trainer.core.errors import ConfigError, DataError

TPU_VARIABLES = [
    "TPU_LOAD_LIBRARY",
    "PJRT_DEVICE",
    "NEXT_PLUGGABLE_DEVICE_USE_C_API",
    "TF_PLUGGABLE_DEVICE_LIBRARY_PATH",
]
POOLS = {"workerpool0": ["a-0:2222"], "workerpool1": ["b-0:2222", "b-1:2222"]}


@pytest.fixture(autouse=True)
def clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("AIP_", "CLOUD_ML_", "CLUSTER_SPEC", "TF_CONFIG", "TPU_", "PJRT_", "KUBE", "NEXT_PLUGG")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(
        environment, "reported_metrics", type(environment.reported_metrics)(maxlen=environment.MAX_REPORTED)
    )


@pytest.fixture
def libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed libtpu, on a machine without a TPU and a metadata server."""
    module = types.ModuleType("libtpu")
    module.get_library_path = lambda: "/opt/libtpu.so"  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("libtpu", None)
    monkeypatch.setitem(sys.modules, "libtpu", module)
    monkeypatch.setattr(environment, "reachable", lambda *_: False)
    monkeypatch.setattr(environment, "has_tpu", lambda: False)
    monkeypatch.setattr(environment, "LIBTPU_LOCKFILE", "/nowhere/libtpu_lockfile")
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("tpu", ["none", "my-tpu", "grpc://10.0.0.2:8470", ""])
def test_libtpu_is_not_loaded_without_a_local_tpu(tpu: str) -> None:
    environment.for_tensorflow(tpu)
    assert {name: os.environ.get(name) for name in TPU_VARIABLES} == {
        "TPU_LOAD_LIBRARY": "0",
        "PJRT_DEVICE": None,
        "NEXT_PLUGGABLE_DEVICE_USE_C_API": None,
        "TF_PLUGGABLE_DEVICE_LIBRARY_PATH": None,
    }


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("flag_and_name", [("local", None), ("", "local")], ids=["flag", "TPU_NAME"])
def test_a_local_tpu_gets_the_pjrt_variables(
    flag_and_name: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    flag, name = flag_and_name
    if name:
        monkeypatch.setitem(os.environ, "TPU_NAME", name)
    environment.for_tensorflow(flag)
    assert {name: os.environ.get(name) for name in [*TPU_VARIABLES, "TPU_SKIP_MDS_QUERY"]} == {
        "TPU_LOAD_LIBRARY": None,
        "PJRT_DEVICE": "TPU",
        "NEXT_PLUGGABLE_DEVICE_USE_C_API": "true",
        "TF_PLUGGABLE_DEVICE_LIBRARY_PATH": "/opt/libtpu.so",
        "TPU_SKIP_MDS_QUERY": "1",
    }


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("function", ["has_tpu", "reachable"])
def test_metadata_server_is_queried_if_it_or_a_tpu_exists(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, function, lambda *_: True)
    environment.for_tensorflow("local")
    assert "TPU_SKIP_MDS_QUERY" not in os.environ


@pytest.mark.usefixtures("libtpu")
def test_user_variable_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TF_PLUGGABLE_DEVICE_LIBRARY_PATH", "/mine.so")
    environment.for_tensorflow("local")
    assert os.environ["TF_PLUGGABLE_DEVICE_LIBRARY_PATH"] == "/mine.so"


@pytest.mark.usefixtures("libtpu")
def test_lock_of_another_user_is_an_error(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock").touch()
    monkeypatch.setattr(environment, "LIBTPU_LOCKFILE", str(tmp_path / "lock"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read anything
    with pytest.raises(ConfigError, match="belongs to another user"):
        environment.for_tensorflow("local")


def test_nothing_is_set_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    environment.for_tensorflow("local")
    assert not {*TPU_VARIABLES} & set(os.environ)


def test_tensorflow_is_imported_after_the_variables_are_set(tmp_path: pathlib.Path) -> None:
    """On the real command line, with stand-ins for both wheels that print the variables."""
    (tmp_path / "libtpu.py").write_text("def get_library_path(): return '/stand-in/libtpu.so'")
    (tmp_path / "tensorflow.py").write_text(
        "import os\nraise SystemExit(os.environ.get('TF_PLUGGABLE_DEVICE_LIBRARY_PATH', 'unset') + "
        "os.environ.get('TPU_LOAD_LIBRARY', 'unset'))"
    )
    for flag, printed in (("--tpu=local", "/stand-in/libtpu.sounset"), ("--tpu=none", "unset0")):
        done = subprocess.run(
            [sys.executable, "-m", "trainer.task", "--data=d", "--workdir=w", "--steps=1", "--teacher=keras:t", flag],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
            check=False,
        )
        assert done.stderr.strip().endswith(printed), done.stderr


def config_on_vertex(**options: str) -> Config:
    return task.on_vertex(Config(**options))


def test_vertex_folders_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", "gs://b/runs/1/checkpoints/")
    monkeypatch.setenv("AIP_MODEL_DIR", "gs://b/runs/1/model/")
    monkeypatch.setenv("AIP_TENSORBOARD_LOG_DIR", "gs://b/runs/1/logs/")
    config = config_on_vertex()
    # WORKDIR/checkpoints is AIP_CHECKPOINT_DIR.
    assert (config.workdir, config.model_dir, config.tensorboard_dir) == (
        "gs://b/runs/1",
        "gs://b/runs/1/model",
        "gs://b/runs/1/logs",
    )
    options = {"workdir": "gs://c/w", "model_dir": "gs://c/m", "tensorboard_dir": "gs://c/t"}
    assert task.on_vertex(Config(**options)) == Config(**options)  # type: ignore[arg-type]


def test_without_vertex_nothing_changes() -> None:
    assert config_on_vertex(workdir="w") == Config(workdir="w")


@pytest.mark.parametrize("folder", ["gs://b/mine/", "gs://b/mine"])
def test_checkpoint_dir_with_another_name_is_the_workdir(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", folder)
    assert config_on_vertex().workdir == "gs://b/mine"


def test_trials_do_not_share_a_workdir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_SPEC", json.dumps({"task": {"type": "workerpool0", "index": 0, "trial": "7"}}))
    assert environment.trial() == "7"
    assert config_on_vertex(workdir="gs://b/study").workdir == "gs://b/study/trial-7"
    # AIP_CHECKPOINT_DIR, and a workdir with the trial's name, belong to the trial already.
    assert config_on_vertex(workdir="gs://b/study/trial-7").workdir == "gs://b/study/trial-7"
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", "gs://b/study/7/checkpoints/")
    assert config_on_vertex().workdir == "gs://b/study/7"
    monkeypatch.setenv("CLOUD_ML_TRIAL_ID", "9")
    assert environment.trial() == "9"


def test_metric_file_has_the_format_of_vertex(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hypertune" / "output.metrics"
    monkeypatch.setenv("CLOUD_ML_HP_METRIC_FILE", str(path))
    monkeypatch.setenv("CLOUD_ML_TRIAL_ID", "3")
    for step in range(1, 103):
        environment.report_metric("student_top1", step / 200, step)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 100
    assert lines[-1].pop("timestamp") > 1.6e9
    assert lines[-1] == {"trial": "3", "student_top1": "0.51", "global_step": "102", "checkpoint_path": ""}
    assert lines[0]["global_step"] == "3"
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLOUD_ML_HP_METRIC_FILE", str(tmp_path / "file" / "output.metrics"))
    with pytest.raises(DataError, match="cannot write the study"):
        environment.report_metric("student_top1", 0.5, 1)


def test_no_metric_file_outside_of_a_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "makedirs", lambda *_, **__: pytest.fail("created a folder"))
    environment.report_metric("student_top1", 0.5, 1)


def test_cluster_of_tf_config_and_of_vertex(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.cluster() == ({}, 1)
    assert environment.is_chief()
    monkeypatch.setenv(
        "CLUSTER_SPEC", json.dumps({"cluster": POOLS, "task": {"type": "workerpool1", "index": 1, "trial": ""}})
    )
    expected = {
        "cluster": {"chief": ["a-0:2222"], "worker": ["b-0:2222", "b-1:2222"]},
        "task": {"type": "worker", "index": 1},
    }
    assert environment.cluster() == (expected, 3)
    assert not environment.is_chief()
    alone = {"cluster": {"worker": ["c:1", "d:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(alone))
    assert environment.cluster() == (alone, 2)
    assert environment.is_chief()


def test_cluster_spec_of_a_single_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"cluster": {"workerpool0": ["a-0:2222"]}, "task": {"type": "workerpool0", "index": 0, "trial": ""}}
    monkeypatch.setenv("CLUSTER_SPEC", json.dumps(spec))
    assert environment.cluster() == ({}, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        (json.dumps({"cluster": {"chief": ["a:1"], "ps": ["b:1"]}, "task": {"type": "chief", "index": 0}}), "has ps"),
        (json.dumps({"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}), "'worker' 2"),
    ],
)
def test_invalid_cluster_is_an_error(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ConfigError, match=message):
        environment.cluster()
