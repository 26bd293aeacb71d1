"""One job as Vertex AI starts it, `--check`, and the exported model behind a serving interface."""

from __future__ import annotations

import base64
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, IMAGE, here
from tensorflow.core.protobuf import saved_model_pb2

from trainer.core import environment, logs
from trainer.data.dataset import Dataset
from trainer.data.records import EncodedSplit
from trainer.io import files

CANARY = "canary-5e1f2c"
# What a container may hold that must not come out of it.
SECRETS = ["KAGGLE_KEY", "KAGGLE_API_TOKEN", "GOOGLE_AUTH_TOKEN", "GOOGLE_AUTH_TOKEN_FOR_TESTING", "HF_TOKEN"]
JOB = [
    *("--student=bit-tiny", f"--image_size={IMAGE}", "--store_size=32", "--steps=4", "--batch_size=4"),
    *("--eval_every=2", "--checkpoint_every=2", "--learning_rate=0.003"),
]


@pytest.fixture(scope="module")
def run(
    data: str, teacher_file: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, list[dict[str, Any]]]:
    """The folder of a study's trial that ran as on Vertex AI, and the lines of its log."""
    base = tmp_path_factory.mktemp("vertex") / "study" / "7"
    home = tmp_path_factory.mktemp("home")
    (home / ".kaggle").mkdir()
    (home / ".kaggle" / "kaggle.json").write_text(json.dumps({"username": "someone", "key": CANARY}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "current_format", "auto")
        patch.setattr(
            environment, "reported_metrics", type(environment.reported_metrics)(maxlen=environment.MAX_REPORTED)
        )
        patch.setenv("HOME", str(home))
        for name in SECRETS:
            patch.setenv(name, CANARY)
        for name, folder in (("CHECKPOINT", "checkpoints"), ("MODEL", "model"), ("TENSORBOARD_LOG", "logs")):
            patch.setenv(f"AIP_{name}_DIR", f"{base}/{folder}/")
        patch.setenv("CLOUD_ML_HP_METRIC_FILE", str(base.parent / "output.metrics"))
        task = {"type": "workerpool0", "index": 0, "trial": "7"}
        patch.setenv("CLUSTER_SPEC", json.dumps({"cluster": {"workerpool0": ["a:2222"]}, "task": task}))
        done = here("task", f"--data={data}", f"--teacher=keras:{teacher_file}", *JOB)
        mistake = here("task", f"--data={data}", "--teacher=keras:/no/such.keras", *JOB, f"--workdir={base}/other")
    assert done.returncode == 0, done.stderr
    assert mistake.returncode == 3
    return base, [json.loads(line) for line in (done.stderr + mistake.stderr).splitlines()]


def test_everything_is_where_vertex_looks_for_it(run: tuple[pathlib.Path, list[dict[str, Any]]]) -> None:
    base, _ = run
    assert {path.name for path in base.iterdir()} >= {"checkpoints", "model", "logs", "result.json"}
    assert (base / "model" / "saved_model.pb").exists()
    assert list((base / "checkpoints").glob("checkpoint-0000000004.json"))
    assert list((base / "logs").glob("events.out.tfevents.*"))
    assert not (base / "tensorboard").exists()
    metrics = [json.loads(line) for line in (base.parent / "output.metrics").read_text().splitlines()]
    assert [(entry["trial"], entry["global_step"]) for entry in metrics] == [("7", "2"), ("7", "4")]
    rows = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row["student_top1"] for row in rows if row["kind"] == "eval"]
    assert [float(entry["student_top1"]) for entry in metrics] == evaluated


def test_each_line_is_an_entry(run: tuple[pathlib.Path, list[dict[str, Any]]]) -> None:
    _, lines = run
    assert all({"severity", "message", "trial"} <= line.keys() for line in lines)
    assert [line["severity"] for line in lines if "/no/such.keras" in line["message"]] == ["ERROR"]
    (last,) = [line for line in lines if line["message"] == "train at step 4"]
    assert last["step"] == 4
    assert last["metrics"]["loss"] > 0


def test_no_secret_comes_out(run: tuple[pathlib.Path, list[dict[str, Any]]]) -> None:
    base, lines = run
    written = [path for path in base.parent.rglob("*") if path.is_file()]
    assert len(written) > 12
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]
    assert CANARY not in json.dumps(lines)


def rest(folder: pathlib.Path, request: str) -> dict[str, Any]:
    """What TensorFlow Serving's REST interface does with a request, by its documentation.

    A JSON object {"b64": TEXT} stands for bytes, in row format (`instances`; the name may be left
    out for a single input) and in columnar format (`inputs`). An output whose name ends in
    `_bytes` goes back the same way; other strings as text.
    """

    def decode(value: Any) -> Any:
        if isinstance(value, dict) and value.keys() == {"b64"}:
            return base64.b64decode(value["b64"], validate=True)
        return value

    body, signature = json.loads(request), tf.saved_model.load(str(folder)).signatures["serving_default"]
    (name,) = signature.structured_input_signature[1]
    if "instances" in body:
        rows = [row if isinstance(row, dict) and name in row else {name: row} for row in body["instances"]]
        given = [decode(row[name]) for row in rows]
    else:
        given = [decode(value) for value in body["inputs"][name]]
    outputs = {key: value.numpy() for key, value in signature(**{name: tf.constant(given)}).items()}
    assert not [key for key in outputs if key.endswith("_bytes")]
    plain = {
        key: np.vectorize(bytes.decode, otypes=[object])(value).tolist() if value.dtype == object else value.tolist()
        for key, value in outputs.items()
    }
    if "inputs" in body:
        return json.loads(json.dumps({"outputs": plain}))
    return json.loads(
        json.dumps({"predictions": [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]})
    )


def test_the_model_answers_serving_requests(run: tuple[pathlib.Path, list[dict[str, Any]]], data: str) -> None:
    """As after `gcloud ai models upload`: JPEG bytes as base64 in, names and probabilities out."""
    model = run[0] / "model"
    dataset = Dataset.load(data)
    encoded = EncodedSplit(dataset, dataset.split("test", "final_split"))
    texts = [{"b64": base64.b64encode(encoded.record(example).encoded).decode()} for example in range(3)]
    named = rest(model, json.dumps({"instances": [{"image_bytes": text} for text in texts]}))["predictions"]
    assert rest(model, json.dumps({"instances": texts}))["predictions"] == named
    columns = rest(model, json.dumps({"inputs": {"image_bytes": texts}}))["outputs"]
    assert columns["top_classes"] == [row["top_classes"] for row in named]
    for row in named:
        assert set(row["top_classes"]) == set(dataset.classes)
        assert len(row["logits"]) == CLASSES
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert row["top_probabilities"] == sorted(row["probabilities"], reverse=True)
    one = rest(model, json.dumps({"instances": texts[1:2]}))["predictions"]
    np.testing.assert_allclose(one[0]["logits"], named[1]["logits"], rtol=1e-4, atol=1e-5)


def test_the_signature_is_what_serving_needs(run: tuple[pathlib.Path, list[dict[str, Any]]]) -> None:
    saved = saved_model_pb2.SavedModel.FromString((run[0] / "model" / "saved_model.pb").read_bytes())
    (graph,) = saved.meta_graphs
    assert list(graph.meta_info_def.tags) == ["serve"]
    signature = graph.signature_def["serving_default"]
    assert signature.method_name == "tensorflow/serving/predict"
    # The ending tells TensorFlow Serving that the text of a request is base64.
    assert [(name, tensor.dtype) for name, tensor in signature.inputs.items()] == [("image_bytes", 7)]
    assert signature.inputs["image_bytes"].name


def test_a_copy_is_complete_when_its_last_file_is_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("saved_model.pb", "variables/variables.index", "zz/last"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text(name)
    order: list[str] = []
    write = files.write
    monkeypatch.setattr(files, "write", lambda path, *rest: (order.append(path), write(path, *rest)))
    files.copy_tree(f"{tmp_path}/a", f"{tmp_path}/b", "a model", "saved_model.pb")
    assert (tmp_path / "b/variables/variables.index").read_text() == "variables/variables.index"
    assert len(order) == 3
    assert order[-1] == f"{tmp_path}/b/saved_model.pb"


@pytest.mark.usefixtures("gcs_here")
def test_a_copy_goes_to_a_bucket(run: tuple[pathlib.Path, list[dict[str, Any]]]) -> None:
    files.copy_tree(str(run[0] / "model"), "gs://bucket/runs/1/model", "a model", "saved_model.pb")
    inside = sorted(str(path.relative_to(run[0] / "model")) for path in (run[0] / "model").rglob("*") if path.is_file())
    assert "variables/variables.index" in inside
    for name in inside:
        assert files.read(f"gs://bucket/runs/1/model/{name}", "a model") == (run[0] / "model" / name).read_bytes()


def checked(data: str, teacher_file: str, workdir: str) -> tuple[int, str]:
    done = here("task", f"--data={data}", f"--teacher=keras:{teacher_file}", *JOB, f"--workdir={workdir}", "--check")
    return done.returncode, done.stderr


def test_check_tells_what_a_job_depends_on(data: str, teacher_file: str, tmp_path: pathlib.Path) -> None:
    code, output = checked(data, teacher_file, str(tmp_path / "r"))
    assert code == 0, output
    rows = {words[0]: line for line in output.splitlines() if line.startswith("  ") and (words := line.split())}
    assert rows.keys() == {"versions", "user", "workdir", "accelerator", "data", "teacher", "disk"}
    assert f"TensorFlow {tf.__version__}" in rows["versions"]
    assert "libtpu not installed" in rows["versions"]
    assert "wrote, read back and deleted" in rows["workdir"]
    assert "CPU, 1 replica" in rows["accelerator"]
    assert "40 images to train on" in rows["data"]
    assert "SHA-256" in rows["teacher"]
    assert "first step: loss" in output
    assert list((tmp_path / "r").iterdir()) == []


@pytest.mark.usefixtures("gcs_here")
def test_check_tries_a_bucket(data: str, teacher_file: str) -> None:
    code, output = checked(data, teacher_file, "gs://bucket/runs/1")
    assert code == 0, output
    assert "gs://bucket/runs/1: wrote, read back and deleted" in output
    assert files.names("gs://bucket/runs/1") == []
    code, output = checked(data, teacher_file, "gs://no-such-bucket/runs/1")
    assert code == 3
    assert "gs://no-such-bucket/runs/1" in next(line for line in output.splitlines() if line.startswith("error: "))


def test_a_workdir_that_reads_back_something_else(
    data: str, teacher_file: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = files.read
    monkeypatch.setattr(files, "read", lambda path, what: b"old" if "probe" in path else read(path, what))
    code, output = checked(data, teacher_file, str(tmp_path / "r"))
    assert code == 3
    assert "not what is read back" in output


def test_a_disk_without_room(
    data: str, teacher_file: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    code, output = checked(data, teacher_file, str(tmp_path / "r"))
    assert code == 3
    assert "--keep_checkpoints" in output
