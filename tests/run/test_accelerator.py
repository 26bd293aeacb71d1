"""Errors while connecting to a TPU are one line each; several machines, as processes."""

from __future__ import annotations

import http.server
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
from collections.abc import Iterator

import numpy as np
import pytest
import tensorflow as tf
from conftest import IMAGE, ROOT, RecordingConsole

from trainer.core import environment
from trainer.core.errors import ConfigError, Stopped
from trainer.run import accelerator

# Errors of TensorFlow 2.19.1 and tensorflow-tpu 2.19.1 (libtpu 0.0.10) without a TPU.
NO_DEVICE = "TPU initialization failed: No ba16c7433 device found.\n\t [[{{node configure_tpu_host/_2}}]]"
NO_LIBTPU = (
    "TPUs not found in the cluster. Failed in initialization: No matching devices found for '/device:TPU_SYSTEM:0' "
    "[[{{node ConfigureDistributedTPU}}]]"
)


@pytest.fixture(autouse=True)
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Clears environment and cached strategies; records sleeps, in seconds, instead of waiting."""
    for name in ("TPU_NAME", "TPU_CONFIG", "KUBE_GOOGLE_CLOUD_TPU_ENDPOINTS", "TF_CONFIG", "CLUSTER_SPEC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(accelerator, "strategies", {})
    seconds: list[float] = []
    monkeypatch.setattr(accelerator, "sleep", seconds.append)
    return seconds


def connection_error(tpu: str) -> str:
    """The message of the error for this --tpu, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        accelerator.resolve(tpu)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"--tpu={tpu}: ")
    return text


def raising(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(tf.tpu.experimental, "initialize_tpu_system", fail)


def test_tensorflow_without_tpu_support() -> None:
    assert "install tensorflow-tpu and libtpu" in connection_error("local")


def test_tpu_without_a_name() -> None:
    assert "give --tpu=local" in connection_error("")


def test_without_a_metadata_server() -> None:
    assert "metadata server does not answer" in connection_error("my-tpu")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (tf.errors.NotFoundError(None, None, NO_LIBTPU), "libtpu is not loaded"),
        (tf.errors.UnknownError(None, None, NO_DEVICE), "this machine has no TPU"),
        (IndexError("list index out of range"), "was not initialised"),
    ],
)
def test_errors_of_the_tpu_wheel(error: Exception, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(error, monkeypatch)
    assert advice in connection_error("local")


def test_unreachable_address(sleeps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tf.config, "experimental_connect_to_cluster", lambda _: pytest.fail("it would wait for minutes")
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert f"nothing answers at 127.0.0.1:{port}" in connection_error(f"grpc://127.0.0.1:{port}")
    assert sleeps == list(accelerator._PAUSES)


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A metadata server with a project and a zone."""
    seen = {
        "/computeMetadata/v1/project/project-id": "p",
        "/computeMetadata/v1/instance/zone": "projects/1/zones/us-west1-c",
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = seen.get(self.path.partition("?")[0])
            self.send_response(200 if text else 404)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        yield seen
        server.shutdown()


@pytest.mark.usefixtures("cloud")
def test_named_tpu_needs_cloud_tpu_client() -> None:
    """TensorFlow's client queries the metadata server, then imports a library."""
    assert "pip install 'funmatch[tpu-client]'" in connection_error("my-tpu")


def client(monkeypatch: pytest.MonkeyPatch, outcome: Exception | None) -> list[tuple[str, int]]:
    """Installs a stand-in with the interface of cloud-tpu-client 0.7 to 0.10; returns its calls."""
    requests: list[tuple[str, int]] = []

    class Client:
        def __init__(self, tpu: str) -> None:
            self.tpu = tpu

        def wait_for_healthy(self, timeout_s: int = 1200, interval: int = 30) -> None:
            del interval
            requests.append((self.tpu, timeout_s))
            if outcome:
                raise outcome

    module = types.ModuleType("cloud_tpu_client")
    module.Client = Client  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "cloud_tpu_client", module)
    return requests


def test_job_waits_for_a_named_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = client(monkeypatch, None)
    monkeypatch.setattr(accelerator, "connect", lambda _: tf.distribute.OneDeviceStrategy("CPU:0"))
    console = RecordingConsole()
    assert accelerator.resolve("my-tpu", console).kind == "TPU"
    assert requests == [("my-tpu", 1200)]
    assert "waiting for TPU my-tpu" in console.lines[0]
    accelerator.resolve("grpc://10.0.0.2:8470")
    accelerator.resolve("local")
    assert len(requests) == 1


def test_named_tpu_that_stays_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    client(monkeypatch, RuntimeError("Timed out waiting for TPU my-tpu to become healthy"))
    assert "did not become healthy: Timed out" in connection_error("my-tpu")


def test_transient_errors_are_retried(sleeps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    outcomes: list[Exception | None] = []

    def connect(_: str) -> tf.distribute.Strategy:
        if outcomes and (error := outcomes.pop(0)):
            raise error
        return strategy

    monkeypatch.setattr(accelerator, "connect", connect)
    console = RecordingConsole()
    outcomes[:] = [
        tf.errors.UnavailableError(None, None, "Socket closed"),
        RuntimeError('TPU "my-tpu" is not yet ready; state: "CREATING"'),
        tf.errors.UnknownError(None, None, "The TPU is already in use by process with pid 8."),
    ]
    assert accelerator.resolve("local", console).strategy is strategy
    assert sleeps == [5.0, 15.0, 45.0]
    assert len(console.lines) == 3
    # One strategy per process: later jobs, as in `funmatch smoke`, reuse it.
    outcomes[:] = [AssertionError("initialised again")]
    assert accelerator.resolve("local").strategy is strategy
    sleeps.clear()
    outcomes[:] = [tf.errors.UnknownError(None, None, NO_DEVICE)]
    connection_error("grpc://10.0.0.2:8470")
    assert sleeps == []
    outcomes[:] = [RuntimeError('TPU "my-tpu" is not yet ready; state: "CREATING"')] * 4
    assert "to have the job wait for it" in connection_error("other")
    outcomes[:] = [urllib.error.URLError(OSError("x"))]
    connection_error("third")
    assert len(sleeps) == 3


def test_tpu_with_several_machines_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "TF_CONFIG", json.dumps({"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}})
    )
    assert "2 machines" in connection_error("local")


def test_precision_hints() -> None:
    one = tf.distribute.OneDeviceStrategy("CPU:0")
    accelerators = {kind: accelerator.Accelerator(one, kind, 1) for kind in ("CPU", "GPU", "TPU")}
    assert "mixed_bfloat16" in accelerators["TPU"].hints("float32")[0]
    assert "slow" in accelerators["CPU"].hints("mixed_bfloat16")[0]
    assert (
        not accelerators["CPU"].hints("float32")
        + accelerators["TPU"].hints("mixed_bfloat16")
        + accelerators["GPU"].hints("float32")
    )


def test_lost_machine_raises_stopped() -> None:
    error = accelerator.worker_lost(tf.errors.UnavailableError(None, None, "Connection reset by peer\nmore"))
    assert isinstance(error, Stopped)
    assert "(UnavailableError)" in str(error)
    assert "\n" not in str(error)


def start_machines(count: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Starts the job on `count` machines, each a process with its own port."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    hosts = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    running = []
    for index in range(count):
        cluster = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", "trainer.task", *arguments],
                cwd=ROOT,
                env=os.environ | {"TF_CONFIG": json.dumps(cluster), "CUDA_VISIBLE_DEVICES": "-1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return running


def run_machines(count: int, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Runs the job on `count` machines and waits for them."""
    done = []
    for process in start_machines(count, *arguments):
        out, err = process.communicate(timeout=240)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    (state,) = (workdir / "checkpoints").glob("state-0000000004-*.npz")
    with np.load(state) as archive:
        return {name: archive[name] for name in archive.files}


@pytest.mark.slow
def test_two_machines_give_the_weights_of_one(data: str, teacher_file: str, tmp_path: pathlib.Path) -> None:
    job = [
        *(f"--data={data}", f"--teacher=keras:{teacher_file}", "--student=bit-tiny", f"--image_size={IMAGE}"),
        *(
            "--store_size=32",
            "--steps=4",
            "--batch_size=8",
            "--learning_rate=0.003",
            "--checkpoint_every=2",
            "--eval_every=4",
        ),
    ]
    alone = run_machines(1, *job, f"--workdir={tmp_path}/one")[0]
    assert alone.returncode == 0, alone.stderr
    both = run_machines(2, *job, f"--workdir={tmp_path}/two")
    assert [done.returncode for done in both] == [0, 0], both[0].stderr + both[1].stderr
    assert "2 replicas on 2 machines" in both[0].stderr
    assert "the chief writes the results" in both[1].stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=2e-4, atol=2e-5, err_msg=name)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["kl"] == pytest.approx(results[1]["kl"], rel=1e-3)
    # If both machines wrote, TensorBoard's folder would have two files.
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == len(
        list((tmp_path / "one" / "tensorboard").iterdir())
    )
    rows = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("one", "two")]
    assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_lost_machine_stops_the_other(
    number: int, data: str, teacher_file: str, tmp_path: pathlib.Path
) -> None:
    """Stopped, both save at the same step; lost, the other one exits without waiting."""
    both = start_machines(
        2,
        *(f"--data={data}", f"--teacher=keras:{teacher_file}", "--student=bit-tiny", f"--image_size={IMAGE}"),
        *("--store_size=32", "--steps=100000", "--batch_size=8", "--checkpoint_every=10", "--eval_every=100000"),
        f"--workdir={tmp_path}/run",
    )
    try:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("run/checkpoints/checkpoint-*.json")):
            assert time.monotonic() < deadline
            assert [process.poll() for process in both] == [None, None]
            time.sleep(0.2)
        both[1].send_signal(number)
        outputs = [process.communicate(timeout=100)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert both[0].returncode == 75, outputs[0]
    if number == signal.SIGKILL:
        assert "another machine of this job does not answer any more" in outputs[0].splitlines()[-1]
        return
    assert both[1].returncode == 75, outputs[1]
    assert "stopped by a signal to another machine at step" in outputs[0]
    assert "stopped by SIGTERM at step" in outputs[1]
    steps = [re.findall(r"at step (\d+) of", text)[-1] for text in outputs]
    assert steps[0] == steps[1]
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{int(steps[0]):010d}.json").exists()


def test_cluster_agrees_with_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow's resolver reads the same cluster from TF_CONFIG."""
    cluster = {"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    assert resolver.cluster_spec().as_dict() == environment.cluster()[0]["cluster"]
    assert re.fullmatch("worker", resolver.task_type)
    assert not environment.is_chief()
