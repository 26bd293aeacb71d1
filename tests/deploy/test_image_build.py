"""deploy/build.sh and deploy/smoke.sh."""

from __future__ import annotations

import io
import os
import pathlib
import re
import subprocess
import sys
import tarfile

import pytest
from aiplatform_stub import Stub, uploaded
from deploy_jobs import ROOT

from deploy import build, specs
from trainer import __version__

pytest_plugins = ["deploy_fixtures"]


def test_dry_run_prints_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--settings=/dev/null", "--set=project=my-project", "--set=region=us-west4", "--dry-run"]
    image = "us-west4-docker.pkg.dev/my-project/funmatch/funmatch:tpu-3"
    assert build.main(["tpu", *line, "--set=version=3"]) == 0
    login, docker_build, push = capsys.readouterr().out.splitlines()
    assert login == "gcloud auth configure-docker us-west4-docker.pkg.dev --quiet"
    assert f"docker build --target=tpu --tag={image} --build-arg=VERSION={__version__} " in docker_build
    assert push == f"docker push {image}"
    assert build.main(["tpu", *line, "--cloud", "--set=version=3"]) == 0
    assert f"--substitutions=_IMAGE={image},_TARGET=tpu," in capsys.readouterr().out
    assert build.main(["tpv", *line]) == 2
    assert "cpu, tpu or gpu" in capsys.readouterr().err
    # Every target is one of the Dockerfile's, and every spec's image is a target.
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert set(build.TARGETS) <= set(stages)
    assert {specs.load(name)["defaults"]["hardware"] for name in specs.names()} <= set(build.TARGETS)


def test_build_logs_in_builds_pushes_and_prints_the_digest(
    fakes: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [
        "gpu",
        "--settings=/dev/null",
        "--set=image=host/p/funmatch:gpu-1",
        "--set=project=my-project",
        "--set=region=r-r1",
    ]
    assert build.main(line) == 0
    assert [call.split()[:2] for call in fakes.read_text().splitlines()] == [
        ["gcloud", "auth"],
        ["docker", "build"],
        ["docker", "push"],
        ["docker", "image"],
    ]
    assert capsys.readouterr().out == f"image = host/p/funmatch@sha256:{'0' * 64}\n"
    monkeypatch.setenv("FAIL", "push*")
    assert build.main(line) == 1
    output = capsys.readouterr()
    assert (output.out, output.err.splitlines()[-1]) == ("", "error: docker push exited with 1")


@pytest.mark.slow
def test_cloud_build_uploads_only_the_sources_of_an_image(vertex: Stub) -> None:
    line = ["--settings=/dev/null", "--set=project=my-project", "--set=region=us-west4", "--cloud"]
    assert build.main(["tpu", *line, "--set=build_account=b@my-project.iam.gserviceaccount.com"]) == 0
    (request,) = [r.body for r in vertex.requests if r.path.endswith("/builds")]
    image = "us-west4-docker.pkg.dev/my-project/funmatch/funmatch:tpu-latest"
    assert request["substitutions"] | {"_REVISION": ""} == {
        "_IMAGE": image,
        "_TARGET": "tpu",
        "_VERSION": __version__,
        "_REVISION": "",
    }
    assert request["serviceAccount"] == "projects/my-project/serviceAccounts/b@my-project.iam.gserviceaccount.com"
    assert request["images"] == ["${_IMAGE}"]
    assert "--target=${_TARGET}" in request["steps"][0]["args"]
    (upload,) = [r.body for r in vertex.requests if "/upload/" in r.path and r.body]
    with tarfile.open(fileobj=io.BytesIO(uploaded(upload)), mode="r:gz") as tar:
        names = {name.split("/")[0] for name in tar.getnames()} - {"."}
    expected = {".dockerignore", "Dockerfile", "LICENSE", "README.md", "recipes", "requirements", "setup.py", "trainer"}
    assert names == expected


def test_smoke_locks_the_container_down_and_builds_a_missing_image(
    fakes: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [ROOT / "deploy/smoke.sh", f"--out={tmp_path}/out", "--preset=tiny"]
    assert subprocess.run(line, check=False, capture_output=True).returncode == 0
    assert not any(call.startswith("docker build") for call in fakes.read_text().splitlines())
    run = fakes.read_text().splitlines()[-1].split()
    for flag in (
        "--read-only",
        "--network none",
        "--cap-drop ALL",
        "--rm",
        "--tmpfs /tmp",
        f"--volume {tmp_path}/out:/work",
    ):
        assert f" {flag} " in " ".join(run)
    assert run[run.index("funmatch:cpu") :] == [
        "funmatch:cpu",
        "-m",
        "trainer.smoke",
        "--workdir=/work",
        "--preset=tiny",
    ]
    monkeypatch.setenv("FAIL", "image inspect*")
    assert subprocess.run(line, check=False, capture_output=True).returncode == 0
    assert "docker build --target cpu --tag funmatch:cpu" in fakes.read_text()


@pytest.mark.slow
def test_the_smoke_run_in_plain_python(tmp_path: pathlib.Path) -> None:
    line = [ROOT / "deploy/smoke.sh", "--python", f"--out={tmp_path}/out", "--preset=tiny"]
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, env=os.environ | {"PYTHON": sys.executable}
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/distill/report.html").is_file()


def test_the_smoke_run_names_what_is_missing(tmp_path: pathlib.Path) -> None:
    script = ROOT / "deploy/smoke.sh"
    for line, message in [
        (["--workdir=x"], "set the folder of the results with --out=FOLDER"),
        (["--docker", f"--out={tmp_path}"], "no Docker engine answers"),
    ]:
        environment = os.environ | {"DOCKER_HOST": f"unix://{tmp_path}/none"}
        done = subprocess.run([script, *line], capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 2
        assert message in done.stderr
