"""The job on a TPU VM of your own. See deploy/tpu_vm.sh."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile

from deploy import check, specs, submit
from deploy.plainyaml import YamlError
from deploy.specs import SettingError

ACTIONS = ("create", "state", "logs", "delete")
# What Cloud TPU calls one v5e machine and its system (docs.cloud.google.com/tpu/docs/create-tpu-vm).
RUNTIME = "v2-alpha-tpuv5-lite"
STARTUP = """#!/bin/bash
# Runs at each start of the machine. On a finished run the trainer says so and ends.
set -u
gcloud auth configure-docker {host} --quiet
docker pull --quiet {image}
docker rm --force funmatch 2>/dev/null
# A TPU's devices belong to root. There is no restart on failure: exit codes 2, 3 and 4 would fail again.
docker run --detach --name funmatch --privileged --network host --user 0:0 {image} {arguments}
"""


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code: 0, 1 if Google's side refused, 2 for a mistake."""
    arguments = sys.argv[1:] if argv is None else argv
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = submit.Parser(
        prog="deploy/tpu_vm.sh",
        usage="deploy/tpu_vm.sh create|state|logs|delete --zone=ZONE [--dry-run] [--set NAME=VALUE]... [-- TRAINER FLAGS]",
        description="Runs the job on a TPU VM (v5e) of your own, which is billed until it is deleted.",
        allow_abbrev=False,
    )
    parser.add_argument("action", help=", ".join(ACTIONS))
    parser.add_argument("--zone", required=True, help="such as us-west4-a")
    parser.add_argument("--dry-run", action="store_true", help="print; call nothing")
    submit.add_settings(parser)
    try:
        return _main(parser.parse_args(arguments[:cut]), arguments[cut + 1 :])
    except (SettingError, YamlError, submit.Mistake) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except submit.Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _main(chosen: argparse.Namespace, extra: list[str]) -> int:
    if chosen.action not in ACTIONS:
        raise submit.Mistake(
            f"there is no {chosen.action}{check.near(chosen.action, ACTIONS)}; there are {', '.join(ACTIONS)}"
        )
    spec = specs.load("vertex-tpu-v5e")
    given = list(submit.given(chosen))
    region = chosen.zone.rpartition("-")[0]
    given.insert(0, ("--zone", {"region": region}))
    if chosen.action != "create":
        settings = specs.settle(spec | {"job": {}}, given, needed=("project", "run"))
        return _other(chosen, settings)
    settings = specs.settle(spec, given)
    if settings["region"] != region:
        raise submit.Mistake(f"--zone={chosen.zone} is not in region = {settings['region']}: the data would travel")
    container = specs.render(spec, settings, extra)["workerPoolSpecs"][0]["containerSpec"]
    wrong = list(check.arguments(container["args"])) or list(check.configuration(container["args"], {}))
    if wrong:
        raise submit.Mistake("\nerror: ".join(wrong))
    script = startup(container["imageUri"], container["args"])
    command = create(settings, chosen.zone, "STARTUP.sh")
    if chosen.dry_run:
        print(script)
        print(f"would run: {shlex.join(command)}", file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "startup.sh")
        with open(path, "w", encoding="utf-8") as file:
            file.write(script)
        submit.gcloud(create(settings, chosen.zone, path), settings)
    again = f"--zone={chosen.zone} --set run={settings['run']}"
    print(f"asked for {settings['run']}; it is billed from when it is there until it is deleted", file=sys.stderr)
    for action in ACTIONS[1:]:
        print(f"  {action:8} deploy/tpu_vm.sh {action} {again}", file=sys.stderr)
    return 0


def startup(image: str, arguments: list[str]) -> str:
    """The machine's start-up script."""
    return STARTUP.format(host=image.partition("/")[0], image=shlex.quote(image), arguments=shlex.join(arguments))


def create(settings: specs.Settings, zone: str, script: str) -> list[str]:
    """The command that asks for the machine."""
    account = settings["service_account"]
    return [
        *("gcloud", "compute", "tpus", "queued-resources", "create", str(settings["run"])),
        *(f"--project={settings['project']}", f"--zone={zone}", f"--node-id={settings['run']}"),
        *(f"--accelerator-type=v5litepod-{settings['chips']}", f"--runtime-version={RUNTIME}"),
        *(["--spot"] if settings["spot"] else []),
        *([f"--service-account={account}"] if account else []),
        *("--scopes=https://www.googleapis.com/auth/cloud-platform", f"--valid-until-duration={settings['hours']}h"),
        *("--labels=program=funmatch", f"--metadata-from-file=startup-script={script}", "--async"),
    ]


def other(action: str, settings: specs.Settings, zone: str) -> list[str]:
    """The command for another action than create."""
    run, where = str(settings["run"]), [f"--project={settings['project']}", f"--zone={zone}"]
    tpus = ["gcloud", "compute", "tpus"]
    return {
        "state": [*tpus, "queued-resources", "describe", run, *where, "--format=value(state.state)"],
        "logs": [*tpus, "tpu-vm", "ssh", run, *where, "--command=sudo docker logs --follow --tail=100 funmatch"],
        "delete": [*tpus, "queued-resources", "delete", run, *where, "--force", "--quiet"],
    }[action]


def _other(chosen: argparse.Namespace, settings: specs.Settings) -> int:
    command = other(chosen.action, settings, chosen.zone)
    if chosen.dry_run:
        print(shlex.join(command))
        return 0
    if not shutil.which("gcloud"):
        raise submit.Refused("gcloud is not on PATH: install the Google Cloud CLI, or see the command with --dry-run")
    return 1 if subprocess.run(command, check=False).returncode else 0


if __name__ == "__main__":
    sys.exit(main())
