"""The images hold what the locks name, run as any user, need only a workdir, and hold no secret.

The GPU image is not built here: with CUDA's libraries it is several times larger. Its lock is
tested in test_supply.py.

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

ROOT = Path(__file__).resolve().parents[2]
BASE = "python:3.11-slim-bookworm"
# What pip may need on this machine. It reaches the build as arguments and must not reach the
# image.
PIP_VARIABLES = [
    "PIP_CERT",
    "PIP_DEFAULT_TIMEOUT",
    "PIP_EXTRA_INDEX_URL",
    "PIP_INDEX_URL",
    "PIP_TRUSTED_HOST",
]
# Stands for a secret in those variables (pip only compares host names with it), in files beside
# the code, and in variables of a running container.
CANARY = "canary-d1f0a7.invalid"
PLANTED = [
    ".env",
    ".config/gcloud/application_default_credentials.json",
    "kaggle.json",
    "recipes/kaggle.json",
    "requirements/pip.conf",
    "trainer/kaggle.json",
    "trainer/models/token.txt",
]
# As little as a container can be given: the workdir and a /tmp in memory are all it can write.
LOCKED_DOWN = [
    "--read-only",
    "--network=none",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--tmpfs=/tmp",
]
# On the real base image. Without the Dockerfile's cuts it is more than this.
LARGEST_IMAGE = {"cpu": 2.3e9, "tpu": 2.1e9}
FLAVOURS = sorted(LARGEST_IMAGE)

pytestmark = [pytest.mark.docker, pytest.mark.timeout(2400)]


class Engine(NamedTuple):
    """A Docker engine that answers, and the base image it builds on."""

    environment: dict[str, str]
    base: str

    def run(
        self, *command: str, check: bool = True, timeout: float = 900, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        """Run a command with this engine; show all that it wrote if it fails."""
        done = subprocess.run(
            command,
            cwd=cwd,
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
            values = dict(own.stdout.readline().strip().partition("=")[::2] for _ in range(2))
            if set(values) != {"DOCKER_HOST", "BASE"}:
                pytest.fail("container_engine.sh started no engine; it says why above")
            yield Engine(environment | {"DOCKER_HOST": values["DOCKER_HOST"]}, values["BASE"])
        finally:
            own.stdin.close()
            own.wait(timeout=120)


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's files as they are now, with secrets lying about in it."""
    folder = tmp_path_factory.mktemp("context") / "project"
    skipped = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "smoke", "runs", "*_cache", "__pycache__", ".hypothesis"
    )
    shutil.copytree(ROOT, folder, ignore=skipped, symlinks=True)
    for name in PLANTED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"username": "someone", "key": CANARY}))
    return folder


@pytest.fixture(scope="session")
def images(engine: Engine, context: Path) -> Iterator[dict[str, str]]:
    """The images by flavour, built by `make image`. Stages that they share are built once."""
    arguments = {name: os.environ[name] for name in PIP_VARIABLES if name in os.environ}
    arguments["PIP_TRUSTED_HOST"] = f"{arguments.get('PIP_TRUSTED_HOST', '')} {CANARY}".strip()
    flags = " ".join(f"--build-arg '{name}={value}'" for name, value in arguments.items())
    tags = {flavour: f"funmatch-test:{flavour}" for flavour in FLAVOURS}
    for flavour, tag in tags.items():
        # The test's own engine has no bridge, so the build shares the host's network.
        engine.run(
            *("make", "image", f"FLAVOUR={flavour}", f"IMAGE={tag}", f"BUILD_FLAGS=--network=host {flags}"),
            timeout=1800,
            cwd=context,
        )
    yield tags
    engine.run("docker", "rmi", "--force", *tags.values())


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def image(images: dict[str, str], flavour: str) -> str:
    """Each of the images in turn."""
    return images[flavour]


def in_image(engine: Engine, image: str, python: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a line of Python in the image, locked down."""
    return engine.run("docker", "run", "--rm", *LOCKED_DOWN, *flags, "--entrypoint=python", image, "-c", python)


def test_image_is_small_and_labelled(
    engine: Engine, image: str, flavour: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (seen,) = json.loads(engine.run("docker", "inspect", image).stdout)
    with capsys.disabled():
        print(f"\nimage {flavour}: {seen['Size'] / 1e9:.2f} GB on {engine.base}")
    assert seen["Size"] < LARGEST_IMAGE[flavour]
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


def test_image_holds_what_the_lock_names(engine: Engine, image: str, flavour: str) -> None:
    lock = (ROOT / "requirements" / f"{flavour}.txt").read_text()
    locked = dict(re.findall(r"^([a-z0-9.-]+)==([^ ]+) \\$", lock, re.MULTILINE))
    ask = """
import glob, importlib.metadata as m, json, trainer
bill = json.load(open("/opt/venv/sbom.cdx.json"))
files = glob.glob("**/*.py", root_dir=trainer.__path__[0], recursive=True)
print(json.dumps([{d.name: d.version for d in m.distributions()}, bill, sorted(files)]))
"""
    seen, bill, program = json.loads(in_image(engine, image, ask).stdout)
    assert program == sorted(str(path.relative_to(ROOT / "trainer")) for path in (ROOT / "trainer").rglob("*.py"))
    there = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in seen.items()}
    assert {name: there.get(name) for name in locked} == locked
    # The rest is this project and its installer; above all not a second TensorFlow.
    assert there.keys() - locked.keys() == {"funmatch", "pip"}
    # The bill of materials that the image carries is of what it holds.
    assert {part["name"]: part["version"] for part in bill["components"]} == {
        name: version for name, version in there.items() if name != "funmatch"
    }


def test_nothing_of_the_building_machine_is_left(engine: Engine, image: str) -> None:
    output = engine.run("docker", "history", "--no-trunc", image).stdout
    output += engine.run("docker", "inspect", image).stdout
    # The official base image has a PYTHON_PIP_VERSION of its own.
    assert not re.search(r"(?<!PYTHON_)PIP_", output)
    assert CANARY not in output
    # Each layer, not only the files that are seen at the end. `docker save` does not compress.
    with subprocess.Popen(["docker", "save", image], env=engine.environment, stdout=subprocess.PIPE) as saving:
        assert saving.stdout is not None
        before, size = b"", 0
        while block := saving.stdout.read(1 << 22):
            assert CANARY.encode() not in before + block
            before, size = block[-len(CANARY) :], size + len(block)
    assert size > 1e9


@pytest.mark.parametrize("user", [[], ["--user=4242:4242"]], ids=["own user", "any user"])
def test_help_needs_no_network_and_no_disk(engine: Engine, image: str, user: list[str]) -> None:
    seen = engine.run("docker", "run", "--rm", *LOCKED_DOWN, *user, image, "--help")
    assert "--workdir" in seen.stdout


def test_training_operations_survive_the_cuts(engine: Engine, image: str, flavour: str) -> None:
    """What the Dockerfile removes is not needed to prepare, train, compile, plot or export."""
    work = """
import importlib, keras, numpy as np, tensorflow as tf
for name in ["array_record", "google.cloud.storage", "h5py", "matplotlib.pyplot", "PIL.Image",
             "tensorboard.main", "tensorflow_datasets"]:
    importlib.import_module(name)
x = np.random.rand(8, 32, 32, 3).astype("float32")
model = keras.Sequential([keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(2)])
model.compile("adam", "mse", jit_compile=JIT)
model.fit(x, np.zeros((8, 2)), verbose=0)
model.export("/tmp/saved", verbose=False)
assert tf.lite.TFLiteConverter.from_saved_model("/tmp/saved").convert()
assert tf.io.decode_jpeg(tf.io.encode_jpeg(tf.zeros([8, 8, 3], tf.uint8))).shape == (8, 8, 3)
print("trained and exported")
"""
    # The TPU's wheel has no XLA for a CPU.
    work = work.replace("JIT", str(flavour == "cpu"))
    # What the program sets before it imports TensorFlow; without it libtpu waits for Google's
    # metadata server.
    assert "trained and exported" in in_image(engine, image, work, "--env=TPU_LOAD_LIBRARY=0").stdout


def test_the_whole_job_runs_locked_down(engine: Engine, image: str, tmp_path: Path) -> None:
    """On the CPU, in the TPU's image too. Secrets in its environment stay there."""
    tmp_path.chmod(0o777)
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "kaggle.json").write_text(json.dumps({"username": "someone", "key": CANARY}))
    done = engine.run(
        *("docker", "run", "--rm", *LOCKED_DOWN, f"--volume={tmp_path}:/work", "--env=KAGGLE_CONFIG_DIR=/work/secrets"),
        *(f"--env=KAGGLE_KEY={CANARY}", f"--env=GOOGLE_AUTH_TOKEN={CANARY}", "--env=AIP_MODEL_DIR=/work/model/"),
        *("--entrypoint=python", image, "-m", "trainer.smoke"),
        *("--preset=tiny", "--workdir=/work/smoke"),
    )
    report = tmp_path / "smoke" / "distill" / "report.html"
    assert report.stat().st_size > 0
    assert report.stat().st_uid == 10001
    assert CANARY not in done.stdout + done.stderr
    shutil.rmtree(secrets)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [str(path) for path in left if CANARY.encode() in path.read_bytes()]
    # AIP_... makes it a cloud's container, so each line is a log entry; and the model is where
    # Vertex AI looks for it.
    assert {json.loads(line)["severity"] for line in done.stderr.splitlines()} == {"INFO"}
    assert (tmp_path / "model" / "saved_model.pb").exists()


def test_without_a_tpu_the_tpu_image_names_the_cause(engine: Engine, images: dict[str, str], tmp_path: Path) -> None:
    """Soon, in one line, and libtpu's interface is the version that TensorFlow was built for."""
    tmp_path.chmod(0o777)
    locked = ("docker", "run", "--rm", *LOCKED_DOWN, f"--volume={tmp_path}:/work", "--env=TF_CPP_MIN_LOG_LEVEL=0")
    engine.run(
        *locked,
        *("--entrypoint=python", images["tpu"], "-m", "trainer.prepare", "--dataset=synthetic", "--out=/work/data"),
        *("--classes=2", "--size=24", "--pretrain=4", "--train=4", "--validation=4", "--test=4"),
    )
    job = ["--data=/work/data", "--workdir=/work/run", "--teacher=random:bit-tiny", "--student=bit-tiny", "--steps=1"]
    done = engine.run(*locked, images["tpu"], *job, "--tpu=local", check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "libtpu works but this machine has no TPU" in line
    assert "Traceback" not in done.stderr
    versions = re.findall(r"PJRT.*?API version[^0-9]*(\d+\.\d+)[^\n]*?(\d+\.\d+)", done.stderr)
    assert versions, done.stderr
    assert all(plugin == framework for plugin, framework in versions), versions
