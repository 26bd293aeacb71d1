"""deploy/tpu_vm.sh."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from aiplatform_stub import Stub
from deploy_jobs import ACCOUNT, TRAINER, command

from deploy import tpu_vm

pytest_plugins = ["deploy_fixtures"]


def test_a_tpu_vm_runs_the_job_at_its_start(vertex: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    line = command("create", "--zone=us-west4-a", "--spot", service_account=ACCOUNT)
    assert tpu_vm.main([*line, "--", "--seed=7"]) == 0
    (request,) = vertex.requests
    assert request.path == "/v2/projects/my-project/locations/us-west4-a/queuedResources"
    assert request.body["spot"] == {}
    assert request.body["queueingPolicy"] == {"validUntilDuration": "86400s"}
    (node_spec,) = request.body["tpu"]["nodeSpec"]
    node = node_spec["node"]
    assert (node_spec["nodeId"], node["acceleratorType"]) == ("flowers-1", "v5litepod-4")
    assert node["runtimeVersion"] == "v2-alpha-tpuv5-lite"
    assert node["serviceAccount"]["email"] == ACCOUNT
    script = node["metadata"]["startup-script"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    (run,) = [shlex.split(text) for text in script.splitlines() if text.startswith("docker run")]
    image = "us-west4-docker.pkg.dev/my-project/funmatch/funmatch:tpu-latest"
    assert run[run.index(image) + 1 :] == ["--tpu=local", *TRAINER, "--seed=7"]
    assert "deploy/tpu_vm.sh delete --zone=us-west4-a" in capsys.readouterr().err


def test_mistakes_and_actions_of_a_tpu_vm(capsys: pytest.CaptureFixture[str]) -> None:
    def error_of(*arguments: str) -> str:
        assert tpu_vm.main(list(arguments)) == 2
        return capsys.readouterr().err

    assert "did you mean create?" in error_of(*command("creat", "--zone=us-west4-a"))
    assert "--zone=us-west1-c is not in region = us-west4" in error_of(*command("create", "--zone=us-west1-c"))
    assert "did you mean temperature?" in error_of(*command("create", "--zone=us-west4-a"), "--", "--tempreature=1")
    assert "--zone" in error_of(*command("create"))
    assert tpu_vm.main(command("create", "--zone=europe-west4-b", "--dry-run", region=None)) == 0
    assert "note: europe-west4 is not among the regions" in capsys.readouterr().err
    for action, word in [("state", "describe"), ("logs", "docker logs"), ("delete", "--force")]:
        assert tpu_vm.main(command(action, "--zone=us-west4-a", "--dry-run")) == 0
        assert word in capsys.readouterr().out
    # A value cannot run as a command on the machine.
    script = tpu_vm.startup("host/image:1", ["--data=gs://b/$(reboot); reboot"])
    assert shlex.split(script.splitlines()[-1])[-1] == "--data=gs://b/$(reboot); reboot"
