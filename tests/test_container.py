"""The CPU image: made of the locks alone, runs as nobody in particular, needs only a workdir.

Uses the Docker engine that answers (DOCKER_HOST or the default one); where none does and
DOCKER_HOST is not set, it starts one of its own with container_engine.sh and stops it at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE = "python:3.11-slim-bookworm"
# What pip may need on this machine. It reaches the build as arguments and must not reach the image.
PIP_VARIABLES = [
    "PIP_CERT",
    "PIP_DEFAULT_TIMEOUT",
    "PIP_EXTRA_INDEX_URL",
    "PIP_INDEX_URL",
    "PIP_TRUSTED_HOST",
]
# Stands for a secret in those variables: pip only compares host names with it.
CANARY = "canary-d1f0a7.invalid"
# As little as a container can be given: the workdir and a /tmp in memory are all it can write.
LOCKED_DOWN = [
    "--read-only",
    "--network=none",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--tmpfs=/tmp",
]
# On the real base image. Without the Dockerfile's cuts it is more than this.
LARGEST_IMAGE = 2.2e9

pytestmark = [pytest.mark.docker, pytest.mark.timeout(2400)]


class Engine(NamedTuple):
    """A Docker engine that answers, and the base image it builds on."""

    environment: dict[str, str]
    base: str

    def run(self, *command: str, check: bool = True, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Run a command with this engine; show all that it wrote if it fails."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            pytest.fail(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done


def answers(environment: dict[str, str]) -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], env=environment, capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The engine that answers, or one that lives as long as this fixture."""
    environment = dict(os.environ)
    if answers(environment):
        yield Engine(environment, f"{BASE} of the engine that was running")
        return
    if "DOCKER_HOST" in environment:
        pytest.fail(f"no Docker engine answers at DOCKER_HOST={environment['DOCKER_HOST']}")
    # The engine ends when its input does: at the end of this block, or with this process.
    with subprocess.Popen(
        [ROOT / "tests" / "container_engine.sh"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # A Ctrl-C is for pytest, which then lets the engine go.
    ) as own:
        assert own.stdin is not None
        assert own.stdout is not None
        try:
            said = dict(own.stdout.readline().strip().partition("=")[::2] for _ in range(2))
            if set(said) != {"DOCKER_HOST", "BASE"}:
                pytest.fail("container_engine.sh started no engine; it says why above")
            yield Engine(environment | {"DOCKER_HOST": said["DOCKER_HOST"]}, said["BASE"])
        finally:
            own.stdin.close()
            own.wait(timeout=120)


@pytest.fixture(scope="session")
def image(engine: Engine) -> Iterator[str]:
    """The CPU image, made as `make image` makes it."""
    tag = "funmatch-test:cpu"
    arguments = {name: os.environ[name] for name in PIP_VARIABLES if name in os.environ}
    arguments["PIP_TRUSTED_HOST"] = f"{arguments.get('PIP_TRUSTED_HOST', '')} {CANARY}".strip()
    flags = " ".join(f"--build-arg '{name}={value}'" for name, value in arguments.items())
    # The test's own engine has no bridge, so the build shares the host's network.
    engine.run("make", "image", f"IMAGE={tag}", f"BUILD_FLAGS=--network=host {flags}", timeout=1800)
    yield tag
    engine.run("docker", "rmi", "--force", tag)


def in_image(engine: Engine, image: str, python: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a line of Python in the image, locked down."""
    return engine.run("docker", "run", "--rm", *LOCKED_DOWN, *flags, "--entrypoint=python", image, "-c", python)


def test_image_is_small_and_says_what_it_is(engine: Engine, image: str, capsys: pytest.CaptureFixture[str]) -> None:
    (seen,) = json.loads(engine.run("docker", "inspect", image).stdout)
    with capsys.disabled():
        print(f"\nimage: {seen['Size'] / 1e9:.2f} GB on {engine.base}")
    assert seen["Size"] < LARGEST_IMAGE
    assert seen["Config"]["Entrypoint"] == ["python", "-m", "trainer.task"]
    # With a default command, a job submitted without flags could end well and have done nothing.
    assert not seen["Config"]["Cmd"]
    version = re.search(r'__version__ = "(.+)"', (ROOT / "trainer" / "__init__.py").read_text())
    assert version is not None
    labels = seen["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == version[1]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_image_runs_as_an_ordinary_user(engine: Engine, image: str) -> None:
    (seen,) = json.loads(engine.run("docker", "inspect", image).stdout)
    assert seen["Config"]["User"] == "10001:10001"
    who = "import os; print(os.getuid(), os.getgid(), os.access('/workspace', os.W_OK))"
    plain = engine.run("docker", "run", "--rm", "--entrypoint=python", image, "-c", who)
    assert plain.stdout.split() == ["10001", "10001", "True"]


def test_the_program_cannot_change_itself(engine: Engine, image: str) -> None:
    find = "find /opt/venv /workspace/recipes -writable -not -type l"
    seen = engine.run("docker", "run", "--rm", "--entrypoint=sh", image, "-c", find)
    assert seen.stdout == ""


def test_image_holds_what_the_lock_names(engine: Engine, image: str) -> None:
    lock = (ROOT / "requirements" / "cpu.txt").read_text()
    locked = dict(re.findall(r"^([a-z0-9.-]+)==([^ ]+) \\$", lock, re.MULTILINE))
    ask = "import importlib.metadata as m, json;print(json.dumps({d.name: d.version for d in m.distributions()}))"
    seen = json.loads(in_image(engine, image, ask).stdout)
    there = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in seen.items()}
    assert {name: there.get(name) for name in locked} == locked
    # The rest is this project and its installer; above all not a second TensorFlow.
    assert there.keys() - locked.keys() == {"funmatch", "pip"}


def test_nothing_of_the_building_machine_is_left(engine: Engine, image: str) -> None:
    told = engine.run("docker", "history", "--no-trunc", image).stdout
    told += engine.run("docker", "inspect", image).stdout
    # The official base image has a PYTHON_PIP_VERSION of its own.
    assert not re.search(r"(?<!PYTHON_)PIP_", told)
    assert CANARY not in told
    # /proc is left out: it holds this command line.
    look = f"grep -rlsF {CANARY} / --exclude-dir=proc --exclude-dir=sys --exclude-dir=dev; :"
    seen = engine.run(*("docker", "run", "--rm", "--user=0", "--entrypoint=sh", image, "-c", look))
    assert seen.stdout == ""


@pytest.mark.parametrize("user", [[], ["--user=4242:4242"]], ids=["own user", "any user"])
def test_help_needs_no_network_and_no_disk(engine: Engine, image: str, user: list[str]) -> None:
    seen = engine.run("docker", "run", "--rm", *LOCKED_DOWN, *user, image, "--help")
    assert "--workdir" in seen.stdout


def test_training_operations_survive_the_cuts(engine: Engine, image: str) -> None:
    """What the Dockerfile removes is not needed to prepare, train, compile, plot or export."""
    work = """
import importlib, keras, numpy as np, tensorflow as tf
for name in ["array_record", "google.cloud.storage", "h5py", "matplotlib.pyplot", "PIL.Image",
             "tensorboard.main", "tensorflow_datasets"]:
    importlib.import_module(name)
x = np.random.rand(8, 32, 32, 3).astype("float32")
model = keras.Sequential([keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(2)])
model.compile("adam", "mse", jit_compile=True)
model.fit(x, np.zeros((8, 2)), verbose=0)
model.export("/tmp/saved", verbose=False)
assert tf.lite.TFLiteConverter.from_saved_model("/tmp/saved").convert()
assert tf.io.decode_jpeg(tf.io.encode_jpeg(tf.zeros([8, 8, 3], tf.uint8))).shape == (8, 8, 3)
print("trained and exported")
"""
    assert "trained and exported" in in_image(engine, image, work).stdout


def test_the_whole_job_runs_locked_down(engine: Engine, image: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    engine.run(
        *("docker", "run", "--rm", *LOCKED_DOWN, f"--volume={tmp_path}:/work"),
        *("--entrypoint=python", image, "-m", "trainer.smoke"),
        *("--preset=tiny", "--workdir=/work/smoke"),
    )
    report = tmp_path / "smoke" / "distill" / "report.html"
    assert report.stat().st_size > 0
    assert report.stat().st_uid == 10001
