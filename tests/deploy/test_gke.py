"""deploy/gke.sh."""

from __future__ import annotations

import json

import pytest
from deploy_jobs import TRAINER, command

from deploy import gke
from trainer.core import errors


def test_the_job_for_gke(capsys: pytest.CaptureFixture[str]) -> None:
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
    # A failure that would repeat ends the Job; a stop by signal (75) does not.
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [errors.EXIT_CONFIG, errors.EXIT_DATA, errors.EXIT_DIVERGED]
    assert gke.main([*command("x")[1:], "--", "--tempreature=1"]) == 2
