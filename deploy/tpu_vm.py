"""Runs the job on a TPU VM of your own. See deploy/tpu_vm.sh."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile

from deploy import hardware, specs, submit, trainer_flags
from deploy.errors import CloudError, UserError

ACTIONS = ("create", "state", "logs", "delete")
STARTUP = """#!/bin/bash
# Runs at each start of the machine. If the run is finished, the trainer reports that and ends.
set -u
gcloud auth configure-docker {host} --quiet
docker pull --quiet {image}
docker rm --force funmatch 2>/dev/null
# A TPU's devices belong to root. There is no restart on failure: exit codes 2, 3 and 4 would fail
# again.
docker run --detach --name funmatch --privileged --network host --user 0:0 {image} {arguments}
"""


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code: 0, 1 if Google Cloud refused, 2 for a mistake."""
    arguments, extra = submit.split_arguments(sys.argv[1:] if argv is None else argv)
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
        return _main(parser.parse_args(arguments), extra)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CloudError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _main(options: argparse.Namespace, extra: list[str]) -> int:
    if options.action not in ACTIONS:
        raise UserError(
            f"there is no action {options.action}{hardware.near(options.action, ACTIONS)}; there are {', '.join(ACTIONS)}"
        )
    spec = specs.load("vertex-tpu-v5e")
    region = options.zone.rpartition("-")[0]
    sources = [("--zone", {"region": region}), *submit.setting_sources(options)]
    if options.action != "create":
        settings = specs.resolve(spec | {"job": {}}, sources, required=("project", "run"))
        return _follow(options, settings)
    settings = specs.resolve(spec, sources)
    if settings["region"] != region:
        raise UserError(f"--zone={options.zone} is not in region = {settings['region']}, where the data is")
    container = specs.render(spec, settings, extra)["workerPoolSpecs"][0]["containerSpec"]
    if errors := trainer_flags.errors(container["args"]):
        raise UserError("\nerror: ".join(errors))
    for note in hardware.region_notes(str(settings["tpu"]), region):
        print(f"note: {note}", file=sys.stderr)
    script = startup(container["imageUri"], container["args"])
    if options.dry_run:
        print(script)
        print(f"would run: {shlex.join(create(settings, options.zone, 'STARTUP.sh'))}", file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "startup.sh")
        with open(path, "w", encoding="utf-8") as file:
            file.write(script)
        submit.run_gcloud(create(settings, options.zone, path), settings)
    print(f"requested {settings['run']}; it is billed from its creation until it is deleted", file=sys.stderr)
    for action in ACTIONS[1:]:
        print(
            f"  {action:8} deploy/tpu_vm.sh {action} --zone={options.zone} --set run={settings['run']}", file=sys.stderr
        )
    return 0


def startup(image: str, arguments: list[str]) -> str:
    """The machine's start-up script, which runs an image with the trainer's arguments."""
    return STARTUP.format(host=image.partition("/")[0], image=shlex.quote(image), arguments=shlex.join(arguments))


def create(settings: specs.Settings, zone: str, script: str) -> list[str]:
    """The command that requests the machine.

    Args:
        settings: of the run.
        zone: where the machine is to be.
        script: path of the start-up script.
    """
    account, tpu = settings["service_account"], hardware.TPUS[str(settings["tpu"])]
    return [
        *("gcloud", "compute", "tpus", "queued-resources", "create", str(settings["run"])),
        *(f"--project={settings['project']}", f"--zone={zone}", f"--node-id={settings['run']}"),
        *(f"--accelerator-type={tpu.vm_accelerator}{settings['chips']}", f"--runtime-version={tpu.vm_runtime}"),
        *(["--spot"] if settings["spot"] else []),
        *([f"--service-account={account}"] if account else []),
        *("--scopes=https://www.googleapis.com/auth/cloud-platform", f"--valid-until-duration={settings['hours']}h"),
        *("--labels=program=funmatch", f"--metadata-from-file=startup-script={script}", "--async"),
    ]


def follow(action: str, settings: specs.Settings, zone: str) -> list[str]:
    """The command for an action other than create.

    Args:
        action: state, logs or delete.
        settings: of the run.
        zone: where the machine is.
    """
    run, where = str(settings["run"]), [f"--project={settings['project']}", f"--zone={zone}"]
    tpus = ["gcloud", "compute", "tpus"]
    return {
        "state": [*tpus, "queued-resources", "describe", run, *where, "--format=value(state.state)"],
        "logs": [*tpus, "tpu-vm", "ssh", run, *where, "--command=sudo docker logs --follow --tail=100 funmatch"],
        "delete": [*tpus, "queued-resources", "delete", run, *where, "--force", "--quiet"],
    }[action]


def _follow(options: argparse.Namespace, settings: specs.Settings) -> int:
    command = follow(options.action, settings, options.zone)
    if options.dry_run:
        print(shlex.join(command))
        return 0
    if not shutil.which("gcloud"):
        raise CloudError("gcloud is not on PATH: install the Google Cloud CLI, or print the command with --dry-run")
    return 1 if subprocess.run(command, check=False).returncode else 0


if __name__ == "__main__":
    sys.exit(main())
