"""Settings and specs, and the jobs that they make."""

from __future__ import annotations

import json
import pathlib

import pytest
import yaml
from deploy_jobs import EXPECTED_JOBS, ROOT, command, dry

from deploy import hardware, submit, yaml_file
from deploy.errors import UserError


def test_the_command_line_overrides_the_settings_file(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.ini"
    file.write_text((ROOT / "deploy/settings.example").read_text())
    arguments = [f"--settings={file}", "--dry-run", "--set=run=r", "--set=region=us-west1"]
    assert submit.main(["vertex-tpu-v5e", *arguments]) == 0
    args = json.loads(capsys.readouterr().out)["workerPoolSpecs"][0]["containerSpec"]
    assert args["imageUri"] == "us-west1-docker.pkg.dev/my-project/funmatch/funmatch:tpu-latest"
    assert "--workdir=gs://my-project-funmatch/runs/r" in args["args"]
    for text, message in [
        ("run r", "must be `name = value`"),
        ("run = a\nrun = b", "run occurs twice"),
        ("rum = a", "run?"),
    ]:
        file.write_text(text)
        assert submit.main(["vertex-gpu", f"--settings={file}"]) == 2
        assert message in capsys.readouterr().err


def test_no_value_can_change_the_structure_of_a_spec(capsys: pytest.CaptureFixture[str]) -> None:
    trick = 'x"]}, replicaCount: 9 #${run}'
    job = dry(capsys, "vertex-gpu", "--", f"--final_split={trick}")
    assert job["workerPoolSpecs"][0]["containerSpec"]["args"][-1] == f"--final_split={trick}"
    assert job["workerPoolSpecs"][0]["replicaCount"] == 1


def test_a_spec_or_job_in_a_file(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plain CustomJobSpec is checked as it is; a spec with settings is filled in."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(EXPECTED_JOBS["v5e, 4 chips"][1], default_flow_style=False))
    assert dry(capsys, str(path)) == EXPECTED_JOBS["v5e, 4 chips"][1]
    path.write_text((ROOT / "deploy/specs/vertex-gpu.yaml").read_text().replace("${gpu}", "${gpuu}"))
    assert submit.main(command(str(path))) == 2
    assert "${gpuu}, which is not a setting; did you mean gpu?" in capsys.readouterr().err
    spot = (ROOT / "deploy/specs/vertex-gpu.yaml").read_text().replace("hardware: gpu", "hardware: gpu\n  spot: true")
    path.write_text(spot)
    assert dry(capsys, str(path))["scheduling"]["strategy"] == "SPOT"
    assert dry(capsys, str(path), "--set=spot=false")["scheduling"]["strategy"] == "STANDARD"
    for text, message in [
        ("defaults: 3\njob:\n  a: 1", "must hold a mapping `job`"),
        ("jobs: 3", "must hold a mapping `job`"),
        (spot.replace("spot:", "spott:"), "the spec: there is no setting spott; did you mean spot?"),
    ]:
        path.write_text(text)
        assert submit.main(command(str(path))) == 2
        assert message in capsys.readouterr().err


def test_the_users_flags_override_those_of_settings_and_spec(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--", "--tpu=none", "--workdir=gs://b/elsewhere", "--recipe=pet37_fast", "--teacher=bit:R152x2_T_pet128"]
    args = dry(capsys, "vertex-tpu-v5e", *more)["workerPoolSpecs"][0]["containerSpec"]["args"]
    assert args == ["--data=gs://my-bucket/data/flowers", *more[1:]]


def test_several_teachers(capsys: pytest.CaptureFixture[str]) -> None:
    job = dry(capsys, "vertex-gpu", teacher="keras:gs://b/1.keras keras:gs://b/2.keras")
    args = job["workerPoolSpecs"][0]["containerSpec"]["args"]
    assert [a for a in args if a.startswith("--teacher")] == [
        "--teacher=keras:gs://b/1.keras",
        "--teacher=keras:gs://b/2.keras",
    ]


def test_a_spec_for_another_tpu_needs_only_a_row_in_the_table(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = hardware.TPUS["v5e"]
    monkeypatch.setitem(hardware.TPUS, "v9", row._replace(name="v9", machine_prefix="ct9-"))
    machine = hardware.TPU_MACHINES["ct5lp-hightpu-4t"]._replace(machine_type="ct9-standard-4t", tpu="v9")
    monkeypatch.setitem(hardware.TPU_MACHINES, machine.machine_type, machine)
    path = tmp_path / "job.yaml"
    path.write_text((ROOT / "deploy/specs/vertex-tpu-v5e.yaml").read_text().replace("tpu: v5e", "tpu: v9"))
    pool = dry(capsys, str(path))["workerPoolSpecs"][0]
    assert pool["machineSpec"] == {"machineType": "ct9-standard-4t", "tpuTopology": "2x2"}
    path.write_text(path.read_text().replace("tpu: v9", "tpu: v5l"))
    assert submit.main(command(str(path))) == 2
    assert "tpu = v5l: deploy/hardware.py has no machine of it; did you mean v5e?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.yaml", "a: 1\na: 2", "x.yaml:1: the key a occurs twice"),
        ("x.yaml", "a: 1\nb:\n  on: 2", "x.yaml:3: the key True is not a string"),
        ("x.yaml", "a: 1\nb: [", "x.yaml:2: is not YAML"),
        ("x.yaml", "a:\n\t- b", "x.yaml:2: is not YAML"),
        ("x.yaml", "a: \x07", "x.yaml: is not YAML"),
        ("x.yaml", "# nothing", "x.yaml: is empty"),
        ("x.json", '{"a": 1, "a": 2}', "x.json: the key a occurs twice"),
        ("x.json", "a: 1", "x.json: is not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: pathlib.Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        yaml_file.load(tmp_path / name, name)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_values_that_yaml_reads_as_another_type_are_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = (ROOT / "deploy/specs/vertex-cpu.yaml").read_text()
    for machine_type in ("on", "2026-11-24", "12:30", ".nan", "~"):
        (tmp_path / "job.yaml").write_text(spec.replace("n1-standard-8", machine_type))
        assert submit.main(command(f"{tmp_path}/job.yaml", "--dry-run")) == 2
        assert "machineType: must be a string, is " in capsys.readouterr().err
