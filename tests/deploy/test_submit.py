"""deploy/submit.sh sends the expected job and prints what Google answers.

The real gcloud runs against a Vertex AI stub on this machine. Without gcloud these tests fail,
because what it sends is what they test.
"""

from __future__ import annotations

import copy
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import yaml
from aiplatform_stub import Stub, error
from deploy_jobs import ACCOUNT, BOARD, EXPECTED_JOBS, ROOT, arrived, command, dry

from deploy import cost, specs, submit

pytest_plugins = ["deploy_fixtures"]


def test_every_spec_has_an_expected_job() -> None:
    assert {arguments[0] for arguments, _ in EXPECTED_JOBS.values()} == set(specs.names())


# These differ from the others in a setting only. Their jobs are also compared in the dry run
# below.
SLOW = ("v5e, 1 chip", "v5e, 8 chips", "CPU")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in EXPECTED_JOBS])
def test_gcloud_sends_the_expected_job(name: str, vertex: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    (spec, *more), job = EXPECTED_JOBS[name]
    assert submit.main(command(spec, "--beside", *more)) == 0
    (request,) = vertex.requests
    assert request.method == "POST"
    assert request.path == "/v1/projects/my-project/locations/us-west4/customJobs"
    assert request.token == "no-token"
    assert request.body == {
        "displayName": "flowers-1",
        "labels": {"program": "funmatch", "run": "flowers-1", "recipe": "flowers102_fast"},
        "jobSpec": arrived(job),
    }
    output = capsys.readouterr()
    name = "projects/my-project/locations/us-west4/customJobs/1"
    assert output.out.strip() == name
    assert f"stream-logs {name}" in output.err
    assert f"cancel {name}" in output.err
    assert "gcloud storage ls gs://my-bucket/runs/flowers-1" in output.err


def test_optional_settings_arrive(vertex: Stub) -> None:
    more = ["--spot", f"--set=service_account={ACCOUNT}", f"--set=tensorboard={BOARD}", "--set=hours=2"]
    assert submit.main([*command("vertex-tpu-v5e", "--beside", *more), "--", "--epochs=9", "--seed=7"]) == 0
    job = vertex.requests[0].body["jobSpec"]
    assert job["scheduling"] == {"timeout": "7200s", "strategy": "SPOT"}
    assert job["serviceAccount"] == ACCOUNT
    assert job["tensorboard"] == BOARD
    assert job["workerPoolSpecs"][0]["containerSpec"]["args"][-2:] == ["--epochs=9", "--seed=7"]


def test_a_study_is_sent_with_the_spec_as_its_trial(vertex: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(command("vertex-tpu-v5e", "--beside", "--study=learning-rate")) == 0
    (request,) = vertex.requests
    assert request.path == "/v1/projects/my-project/locations/us-west4/hyperparameterTuningJobs"
    study = yaml.safe_load((ROOT / "deploy/studies/learning-rate.yaml").read_text())
    output = capsys.readouterr()
    expected = study | {
        "displayName": "flowers-1",
        "labels": {"program": "funmatch", "run": "flowers-1", "recipe": "flowers102_fast"},
        "trialJobSpec": arrived(EXPECTED_JOBS["v5e, 4 chips"][1]),
    }
    expected["trialJobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"].append("--hp_metric=student_top1")
    assert request.body == expected
    assert "hp-tuning-jobs stream-logs" in output.err


def test_a_second_job_of_a_run_is_refused_until_the_first_has_ended(
    vertex: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "projects/my-project/locations/us-west4/customJobs/1"
    other = {"name": "projects/my-project/locations/us-west4/customJobs/2", "displayName": "flowers-2"}
    vertex.jobs = [
        {"name": name, "displayName": "flowers-1", "state": "JOB_STATE_RUNNING"},
        other | {"state": "JOB_STATE_RUNNING"},
    ]
    assert submit.main(command("vertex-tpu-v5e")) == 1
    output = capsys.readouterr().err
    assert f"the run flowers-1 has a job already ({name}, JOB_STATE_RUNNING)" in output
    assert len(vertex.jobs) == 2
    vertex.jobs[0]["state"] = "JOB_STATE_FAILED"
    assert submit.main(command("vertex-tpu-v5e")) == 0  # the same command resumes
    assert len(vertex.jobs) == 3
    assert "resumes from the last checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "message", "advice"),
    [
        (
            error(403, "PERMISSION_DENIED", "Permission 'aiplatform.customJobs.create' denied on resource"),
            "aiplatform.customJobs.create",
            "roles/aiplatform.user",
        ),
        (error(404, "NOT_FOUND", "The TensorBoard is not there"), "The TensorBoard is not there", "does not exist"),
        (
            error(429, "RESOURCE_EXHAUSTED", "quota metrics exceed quota limits: custom_model_training_tpu_v5e"),
            "custom_model_training_tpu_v5e",
            "not enough quota in us-west4",
        ),
    ],
)
def test_a_refusal_of_google_is_printed_with_advice(
    answer: Any, message: str, advice: str, vertex: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    vertex.refusal = answer
    assert submit.main(command("vertex-tpu-v5e", "--beside")) == 1
    output = capsys.readouterr()
    assert output.out == ""
    lines = [line for line in output.err.splitlines() if line.startswith(("error:", "hint:"))]
    assert message in lines[0]
    assert advice in lines[1]
    assert "Traceback" not in output.err
    assert len(vertex.requests) == 1


@pytest.mark.slow  # gcloud retries for half a minute
def test_a_failure_of_google_is_reported(vertex: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    vertex.refusal = error(500, "INTERNAL", "Internal error encountered.")
    assert submit.main(command("vertex-tpu-v5e", "--beside")) == 1
    output = capsys.readouterr().err
    assert "error: INTERNAL (500): Internal error encountered." in output
    assert "See whether a job exists" in output


def test_gcloud_itself_accepts_typos(vertex: Stub, tmp_path: pathlib.Path) -> None:
    """The reason for the checker. If this fails, gcloud has become stricter."""
    job = copy.deepcopy(EXPECTED_JOBS["v5e, 4 chips"][1])
    job["workerPoolSpecs"][0]["machineSpec"]["tpu_topology"] = "2x2"
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [
            *("gcloud", "ai", "custom-jobs", "create", "--project=my-project", "--region=us-west4"),
            *("--display-name=x", f"--config={tmp_path}/job.json"),
        ],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
    assert vertex.requests[0].body["jobSpec"]["workerPoolSpecs"][0]["machineSpec"]["tpu_topology"] == "2x2"


@pytest.mark.usefixtures("no_gcloud")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vertex-tpu-v5"], "did you mean vertex-tpu-v5e?"),
        (["./nowhere.yaml"], "there is no file ./nowhere.yaml"),
        (["vertex-gpu", "--dryrun"], "there is no --dryrun; did you mean dry-run?"),
        (["vertex-gpu", "--region=us-west4"], "is a setting: write --set region=..."),
        (["vertex-gpu", "--epochs=3"], "is a flag of the trainer: write it after --"),
        (["vertex-gpu", "--set", "chpis=4"], "there is no setting chpis; did you mean chips?"),
        (["vertex-gpu", "--set", "region"], "must be NAME=VALUE"),
        (["vertex-gpu", "--settings=/no/such"], "cannot be read"),
        (["vertex-gpu", "--study=learning"], "did you mean learning-rate?"),
        (["vertex-gpu", "--price=cheap"], "must be a number"),
        (["vertex-tpu-v5e", "--set=chips=2"], "has 1, 4 or 8"),
        (["vertex-gpu", "--set=gpu=NVIDIA_L40"], "did you mean NVIDIA_L4?"),
        (["vertex-gpu", "--set=gpus=3"], "a machine has 1, 2, 4 or 8 of NVIDIA_L4"),
        (["vertex-gpu-machines", "--set=machines=1"], "vertex-gpu is for one"),
        (["vertex-gpu", "--set=run=Flowers_1"], "run = Flowers_1"),
        (["vertex-gpu", "--set=data=/home/me/data"], "data = /home/me/data"),
        (["vertex-gpu", "--set=project=12345678"], "project = 12345678"),
        (["vertex-gpu", "--set=data="], "not set: data"),
        (["vertex-gpu", "--set=recipe="], "--recipe, --steps or --epochs is missing"),
        (["vertex-gpu", "--set=teacher="], "--teacher is missing"),
        (["vertex-gpu", "--set=teacher=keras:/home/me/t.keras"], "copy it to gs:// first"),
        (["vertex-gpu", "--set=recipe=flower102_fast"], "flowers102_fast"),
        (["vertex-gpu", "--", "--tempreature=2"], "did you mean temperature?"),
        (["vertex-gpu", "--", "--workdir=runs/1"], "copy it to gs:// first"),
        (["vertex-gpu", "--", "--views=mixed"], "did you mean mix?"),
        (["vertex-gpu", "--", "--log_format=jsn"], "did you mean json?"),
        (["vertex-gpu", "--log_format=json"], "is a flag of the trainer: write it after --"),
        (["vertex-gpu", "--", "--steps=many"], "must be an integer"),
        (["vertex-gpu", "--", "--seed"], "needs a value"),
        (["vertex-gpu", "--", "epochs=3"], "must be --name=value"),
        (["vertex-gpu", "--", "--temperature=-1"], "it must be above 0"),
        (["vertex-gpu", "--", "--steps=3", "--epochs=3"], "give one of the two"),
        (["vertex-gpu", "--", "--flagfile=my.flags"], "recipes/*.flags only"),
    ],
)
def test_a_mistake_is_one_line_and_calls_nothing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, *more = arguments
    assert submit.main(command(spec, *more)) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert output.out == ""
    assert all(line.startswith("error: ") for line in lines), output.err
    assert any(message in line for line in lines), output.err


@pytest.mark.usefixtures("no_gcloud")
def test_dry_run_prints_job_command_and_cost_and_calls_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for (spec, *more), job in EXPECTED_JOBS.values():
        assert dry(capsys, spec, *more) == job
    assert submit.main(command("vertex-tpu-v5e", "--dry-run", "--price=1.5", "--set=hours=10")) == 0
    output = capsys.readouterr().err
    assert "cost: at most 4 chips x 10 h x 1.5 = 60.00" in output
    assert "would run: gcloud ai custom-jobs create --project=my-project --region=us-west4" in output
    assert "nothing was submitted" in output
    assert submit.main(command("vertex-tpu-v5e", "--dry-run", "--price=1.5", "--study=learning-rate")) == 0
    assert "at most 12 trials x 4 chips x 24 h x 1.5 = 144.00 = 1,728.00" in capsys.readouterr().err


def test_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost.units(EXPECTED_JOBS["v5e, 8 chips"][1]) == (8, "chip")
    assert cost.units(EXPECTED_JOBS["v3-8"][1]) == (4, "chip")
    assert cost.units(EXPECTED_JOBS["GPU"][1]) == (1, "GPU")
    assert cost.units(EXPECTED_JOBS["GPUs of 3 machines"][1]) == (3, "GPU")
    assert cost.units(EXPECTED_JOBS["CPU"][1]) == (1, "machine")
    # 3,600 s x 1,000 images/s = 36,000 steps of 100.
    speed = ["--steps=36000", "--batch_size=100", "--images_per_second=1000"]
    assert cost.main(["--chips=4", "--price=1.25", *speed]) == 0
    assert capsys.readouterr().out == "1.00 h x 4 x 1.25 = 5.00\n"
    assert cost.main(["--price=1"]) == 2


def run_without_packages(path: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs deploy.submit without site-packages (-I -S), and with these folders on sys.path."""
    code = f"import sys; sys.path += {path!r}; from deploy import submit; sys.exit(submit.main(sys.argv[1:]))"
    line = [sys.executable, "-I", "-S", "-c", code, *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_submitting_needs_only_pyyaml(tmp_path: pathlib.Path) -> None:
    (tmp_path / "yaml").symlink_to(pathlib.Path(yaml.__file__).parent)
    path = [str(ROOT), str(tmp_path)]
    done = run_without_packages(path, *command("vertex-tpu-v5e", "--dry-run"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == EXPECTED_JOBS["v5e, 4 chips"][1]
    done = run_without_packages(path, *command("vertex-tpu-v5e"), "--", "--tempreature=2")
    assert (done.returncode, "did you mean temperature?" in done.stderr) == (2, True)


def test_without_pyyaml_one_line_names_the_command_that_installs_it(tmp_path: pathlib.Path) -> None:
    done = run_without_packages([str(ROOT)], *command("vertex-tpu-v5e", "--dry-run"))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "`python3 -m pip install pyyaml` or `pip install 'funmatch[deploy]'`" in line
    # A job in JSON needs no PyYAML.
    (tmp_path / "job.json").write_text(json.dumps(EXPECTED_JOBS["GPU"][1]))
    done = run_without_packages([str(ROOT)], *command(f"{tmp_path}/job.json", "--dry-run"))
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("no_gcloud")
def test_a_machine_that_the_table_does_not_know_is_a_note(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = copy.deepcopy(EXPECTED_JOBS["CPU"][1])
    job["workerPoolSpecs"][0]["machineSpec"]["machineType"] = "c4a-standard-8"
    (tmp_path / "job.json").write_text(json.dumps(job))
    assert submit.main(command(f"{tmp_path}/job.json", "--dry-run")) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == job
    assert "note: machine type c4a-standard-8 is not in deploy/hardware.py, so it was not checked" in output.err


def test_the_script_works_in_any_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps(EXPECTED_JOBS["GPU"][1]))
    done = subprocess.run(
        [ROOT / "deploy/submit.sh", *command("./job.json", "--dry-run")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == EXPECTED_JOBS["GPU"][1]
