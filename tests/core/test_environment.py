"""Variables of Vertex AI and of TPUs: what they mean, and what the program sets for TensorFlow before it is imported."""

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
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("AIP_", "CLOUD_ML_", "CLUSTER_SPEC", "TF_CONFIG", "TPU_", "PJRT_", "KUBE", "NEXT_PLUGG")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(environment, "_metrics", type(environment._metrics)(maxlen=environment._REPORTED))


@pytest.fixture
def libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package libtpu that is installed, on a machine without TPU and metadata server."""
    module = types.ModuleType("libtpu")
    module.get_library_path = lambda: "/opt/libtpu.so"  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("libtpu", None)
    monkeypatch.setitem(sys.modules, "libtpu", module)
    monkeypatch.setattr(environment, "reachable", lambda *_: False)
    monkeypatch.setattr(environment, "has_tpu", lambda: False)
    monkeypatch.setattr(environment, "_LOCKFILE", "/nowhere/libtpu_lockfile")
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("tpu", ["none", "my-tpu", "grpc://10.0.0.2:8470", ""])
def test_libtpu_is_not_loaded_where_no_tpu_of_this_machine_is_asked_for(tpu: str) -> None:
    environment.for_tensorflow(tpu)
    assert {name: os.environ.get(name) for name in TPU_VARIABLES} == {
        "TPU_LOAD_LIBRARY": "0",
        "PJRT_DEVICE": None,
        "NEXT_PLUGGABLE_DEVICE_USE_C_API": None,
        "TF_PLUGGABLE_DEVICE_LIBRARY_PATH": None,
    }


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("given", [("local", None), ("", "local")], ids=["flag", "TPU_NAME"])
def test_a_local_tpu_gets_the_pjrt_variables(given: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    if given[1]:
        monkeypatch.setitem(os.environ, "TPU_NAME", given[1])
    environment.for_tensorflow(given[0])
    assert {name: os.environ.get(name) for name in [*TPU_VARIABLES, "TPU_SKIP_MDS_QUERY"]} == {
        "TPU_LOAD_LIBRARY": None,
        "PJRT_DEVICE": "TPU",
        "NEXT_PLUGGABLE_DEVICE_USE_C_API": "true",
        "TF_PLUGGABLE_DEVICE_LIBRARY_PATH": "/opt/libtpu.so",
        "TPU_SKIP_MDS_QUERY": "1",
    }


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("there", ["has_tpu", "reachable"])
def test_the_metadata_server_is_asked_where_it_or_a_tpu_is(there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, there, lambda *_: True)
    environment.for_tensorflow("local")
    assert "TPU_SKIP_MDS_QUERY" not in os.environ


@pytest.mark.usefixtures("libtpu")
def test_a_variable_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TF_PLUGGABLE_DEVICE_LIBRARY_PATH", "/mine.so")
    environment.for_tensorflow("local")
    assert os.environ["TF_PLUGGABLE_DEVICE_LIBRARY_PATH"] == "/mine.so"


@pytest.mark.usefixtures("libtpu")
def test_a_lock_of_another_user_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock").touch()
    monkeypatch.setattr(environment, "_LOCKFILE", str(tmp_path / "lock"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read anything
    with pytest.raises(ConfigError, match="belongs to another user"):
        environment.for_tensorflow("local")


def test_nothing_is_set_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    environment.for_tensorflow("local")
    assert not {*TPU_VARIABLES} & set(os.environ)


def test_tensorflow_is_imported_after_the_variables_are_set(tmp_path: pathlib.Path) -> None:
    """Through the real command line: packages that stand for both wheels say what they saw when they were imported."""
    (tmp_path / "libtpu.py").write_text("def get_library_path(): return '/stand-in/libtpu.so'")
    (tmp_path / "tensorflow.py").write_text(
        "import os\nraise SystemExit(os.environ.get('TF_PLUGGABLE_DEVICE_LIBRARY_PATH', 'unset') + "
        "os.environ.get('TPU_LOAD_LIBRARY', 'unset'))"
    )
    for flag, saw in (("--tpu=local", "/stand-in/libtpu.sounset"), ("--tpu=none", "unset0")):
        done = subprocess.run(
            [sys.executable, "-m", "trainer.task", "--data=d", "--workdir=w", "--steps=1", "--teacher=keras:t", flag],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
            check=False,
        )
        assert done.stderr.strip().endswith(saw), done.stderr


def chosen(**given: str) -> Config:
    return task.on_vertex(Config(**given))


def test_vertex_folders_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", "gs://b/runs/1/checkpoints/")
    monkeypatch.setenv("AIP_MODEL_DIR", "gs://b/runs/1/model/")
    monkeypatch.setenv("AIP_TENSORBOARD_LOG_DIR", "gs://b/runs/1/logs/")
    config = chosen()
    # So that WORKDIR/checkpoints is the very folder that Vertex AI named.
    assert (config.workdir, config.model_dir, config.tensorboard_dir) == (
        "gs://b/runs/1",
        "gs://b/runs/1/model",
        "gs://b/runs/1/logs",
    )
    given = {"workdir": "gs://c/w", "model_dir": "gs://c/m", "tensorboard_dir": "gs://c/t"}
    assert task.on_vertex(Config(**given)) == Config(**given)  # type: ignore[arg-type]


def test_without_vertex_nothing_changes() -> None:
    assert chosen(workdir="w") == Config(workdir="w")


@pytest.mark.parametrize("folder", ["gs://b/mine/", "gs://b/mine"])
def test_a_checkpoint_folder_of_another_name_is_the_workdir(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", folder)
    assert chosen().workdir == "gs://b/mine"


def test_trials_do_not_share_a_workdir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_SPEC", json.dumps({"task": {"type": "workerpool0", "index": 0, "trial": "7"}}))
    assert environment.trial() == "7"
    assert chosen(workdir="gs://b/study").workdir == "gs://b/study/trial-7"
    # What Vertex AI itself names is a trial's own already; and so is what carries the trial's name.
    assert chosen(workdir="gs://b/study/trial-7").workdir == "gs://b/study/trial-7"
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", "gs://b/study/7/checkpoints/")
    assert chosen().workdir == "gs://b/study/7"
    monkeypatch.setenv("CLOUD_ML_TRIAL_ID", "9")
    assert environment.trial() == "9"


def test_the_metric_is_reported_as_vertex_reads_it(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(DataError, match="cannot tell the study"):
        environment.report_metric("student_top1", 0.5, 1)


def test_outside_of_a_study_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "makedirs", lambda *_, **__: pytest.fail("it wrote"))
    environment.report_metric("student_top1", 0.5, 1)


def test_machines_of_tf_config_and_of_vertex(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_one_machine_in_cluster_spec_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"cluster": {"workerpool0": ["a-0:2222"]}, "task": {"type": "workerpool0", "index": 0, "trial": ""}}
    monkeypatch.setenv("CLUSTER_SPEC", json.dumps(spec))
    assert environment.cluster() == ({}, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "not JSON"),
        (json.dumps({"cluster": {"chief": ["a:1"], "ps": ["b:1"]}, "task": {"type": "chief", "index": 0}}), "has ps"),
        (json.dumps({"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}), "'worker' 2"),
    ],
)
def test_wrong_clusters_are_named(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ConfigError, match=said):
        environment.cluster()
