"""Builds an image and pushes it. See deploy/build.sh."""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

from deploy import specs, submit
from deploy.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGETS = ("cpu", "tpu", "gpu")


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code: 0, 1 if a build or a push failed, 2 for a mistake."""
    parser = submit.Parser(
        prog="deploy/build.sh",
        usage="deploy/build.sh cpu|tpu|gpu [--cloud] [--dry-run] [--set NAME=VALUE]...",
        description="Builds one target of the Dockerfile and pushes it to Artifact Registry.",
        allow_abbrev=False,
    )
    parser.add_argument("target", help="cpu, tpu or gpu")
    parser.add_argument("--cloud", action="store_true", help="use Cloud Build instead of this machine's Docker")
    parser.add_argument("--dry-run", action="store_true", help="print the commands; call nothing")
    submit.add_settings(parser)
    try:
        options = parser.parse_args(argv)
        if options.target not in TARGETS:
            raise UserError(f"there is no target {options.target}: must be cpu, tpu or gpu")
        spec = {"defaults": {"hardware": options.target}, "job": {"image": "${image}"}}
        settings = specs.resolve(spec, list(submit.setting_sources(options)), required=("project", "region"))
        return _build(options, settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def commands(target: str, settings: specs.Settings, *, cloud: bool) -> list[list[str]]:
    """The commands that build and push an image, to be run in the project's folder.

    Args:
        target: cpu, tpu or gpu.
        settings: of the project.
        cloud: whether Cloud Build does it, not Docker.
    """
    image, region, project = str(settings["image"]), str(settings["region"]), str(settings["project"])
    version, revision = _version(), _revision()
    if cloud:
        substitutions = f"_IMAGE={image},_TARGET={target},_VERSION={version},_REVISION={revision}"
        account = settings["build_account"]
        return [
            [
                *("gcloud", "builds", "submit", ".", f"--project={project}", f"--region={region}"),
                *("--config=deploy/cloudbuild.yaml", f"--substitutions={substitutions}"),
                *([f"--service-account=projects/{project}/serviceAccounts/{account}"] if account else []),
                "--default-buckets-behavior=regional-user-owned-bucket",
            ]
        ]
    return [
        ["gcloud", "auth", "configure-docker", image.partition("/")[0], "--quiet"],
        [
            *("docker", "build", f"--target={target}", f"--tag={image}"),
            *(f"--build-arg=VERSION={version}", f"--build-arg=REVISION={revision}", "."),
        ],
        ["docker", "push", image],
    ]


def _version() -> str:
    match = re.search(r'__version__ = "([^"]+)"', (ROOT / "trainer/__init__.py").read_text(encoding="utf-8"))
    return match[1] if match else "unknown"


def _revision() -> str:
    """The commit that the image is built from, with -dirty if the tree differs from it."""
    if not shutil.which("git"):
        return "unknown"
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def _build(options: argparse.Namespace, settings: specs.Settings) -> int:
    for command in commands(options.target, settings, cloud=options.cloud):
        if options.dry_run:
            print(shlex.join(command))
            continue
        if not shutil.which(command[0]):
            remedy = "" if options.cloud or command[0] != "docker" else "; --cloud builds on Cloud Build"
            raise UserError(f"{command[0]} is not on PATH{remedy}")
        print(f"build: {shlex.join(command)}", file=sys.stderr, flush=True)
        done = subprocess.run(command, cwd=ROOT, check=False, env=os.environ | {"DOCKER_BUILDKIT": "1"})
        if done.returncode:
            print(f"error: {' '.join(command[:2])} exited with {done.returncode}", file=sys.stderr)
            return 1
    if not options.dry_run:
        _print_digest(str(settings["image"]), cloud=options.cloud)
    return 0


def _print_digest(image: str, *, cloud: bool) -> None:
    """Prints the image by digest, as the registry or the Docker engine has it."""
    if cloud:
        describe = ["gcloud", "artifacts", "docker", "images", "describe", image]
        command = [*describe, "--format=value(image_summary.fully_qualified_digest)"]
    else:
        command = ["docker", "image", "inspect", "--format={{index .RepoDigests 0}}", image]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0 and "@sha256:" in done.stdout:
        print(f"image = {done.stdout.strip()}")
        print("build: put that line into deploy/settings.ini, or pass it as --set image=...", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
