"""Makes what a project needs once. See deploy/setup.sh; docs/deploy.md gives the reason for each role."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from typing import Any

from deploy import specs, submit
from deploy.plainyaml import YamlError
from deploy.specs import SettingError

WAITS = (5.0, 10.0, 20.0)  # seconds between tries
SERVICES = ("aiplatform", "artifactregistry", "cloudbuild", "iam", "logging", "storage")


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code: 0, 1 if Google's side refused, 2 for a mistake."""
    parser = submit.Parser(
        prog="deploy/setup.sh",
        usage="deploy/setup.sh --user=EMAIL [--dry-run] [--set NAME=VALUE]...",
        description="Makes bucket, repository and least-privilege accounts for funmatch in a project.",
        allow_abbrev=False,
    )
    parser.add_argument("--user", required=True, help="who will submit jobs: an account's e-mail address")
    parser.add_argument("--dry-run", action="store_true", help="print the commands; call nothing")
    submit.add_settings(parser)
    try:
        chosen = parser.parse_args(argv)
        if not re.fullmatch(r"[^@\s]+@[^@\s]+", chosen.user):
            raise submit.Mistake(f"--user={chosen.user}: must be an e-mail address")
        spec: dict[str, Any] = {"defaults": {}, "job": {}}
        settings = specs.settle(spec, list(submit.given(chosen)), needed=("project", "region", "bucket"))
        job, build = accounts(settings)
        for command in commands(settings, chosen.user):
            if chosen.dry_run:
                print(shlex.join(command))
            else:
                _run(command)
    except (SettingError, YamlError, submit.Mistake) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except submit.Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    done = "nothing was called" if chosen.dry_run else "everything is there"
    print(f"{done}. For deploy/settings.ini:", file=sys.stderr)
    print(f"service_account = {job}\nbuild_account = {build}", file=sys.stderr)
    return 0


def accounts(settings: specs.Settings) -> tuple[str, str]:
    """The account of jobs and that of builds: those of the settings, which must be the project's own, or funmatch-job and -build.

    Raises:
        SettingError: an account of another project.
    """
    home = f"{settings['project']}.iam.gserviceaccount.com"
    found = []
    for name, short in (("service_account", "funmatch-job"), ("build_account", "funmatch-build")):
        account = str(settings[name]) or f"{short}@{home}"
        if account.partition("@")[2] != home:
            raise SettingError(
                f"{name} = {account}: is not of the project {settings['project']}, so it is not made here"
            )
        found.append(account)
    return found[0], found[1]


def commands(settings: specs.Settings, user: str) -> list[list[str]]:
    """The gcloud commands, in the order that they need."""
    project, region, bucket = f"--project={settings['project']}", str(settings["region"]), f"gs://{settings['bucket']}"
    repository = [str(settings["repository"]), project, f"--location={region}"]
    staging = f"gs://{settings['project']}_{region}_cloudbuild"
    job, build = accounts(settings)
    member = "user" if not user.endswith(".gserviceaccount.com") else "serviceAccount"

    def grant(where: list[str], who: str, role: str, *more: str) -> list[str]:
        return ["gcloud", *where, f"--member={who}", f"--role=roles/{role}", *more, "--format=none"]

    def bucket_made(name: str) -> list[str]:
        private = ["--uniform-bucket-level-access", "--public-access-prevention"]
        return ["gcloud", "storage", "buckets", "create", name, project, f"--location={region}", *private]

    def on_bucket(name: str) -> list[str]:
        return ["storage", "buckets", "add-iam-policy-binding", name]

    on_project = ["projects", "add-iam-policy-binding", str(settings["project"]), "--condition=None"]
    made = [
        ["gcloud", "services", "enable", *(f"{name}.googleapis.com" for name in SERVICES), project],
        bucket_made(bucket),
        bucket_made(staging),
        ["gcloud", "artifacts", "repositories", "create", *repository, "--repository-format=docker"],
    ]
    for account in (job, build):
        made.append(["gcloud", "iam", "service-accounts", "create", account.partition("@")[0], project])
    jobs, builds, people = f"serviceAccount:{job}", f"serviceAccount:{build}", f"{member}:{user}"
    act_as = ["iam", "service-accounts", "add-iam-policy-binding"]
    return [
        *made,
        grant(on_bucket(bucket), jobs, "storage.objectUser"),
        grant(on_bucket(bucket), jobs, "storage.legacyBucketReader"),
        grant(on_project, jobs, "logging.logWriter"),
        grant(["artifacts", "repositories", "add-iam-policy-binding", *repository], builds, "artifactregistry.writer"),
        grant(on_bucket(staging), builds, "storage.objectViewer"),
        grant(on_project, builds, "logging.logWriter"),
        grant(on_project, people, "aiplatform.user"),
        grant(on_project, people, "cloudbuild.builds.editor"),
        grant(on_bucket(staging), people, "storage.admin"),
        grant([*act_as, job], people, "iam.serviceAccountUser", project),
        grant([*act_as, build], people, "iam.serviceAccountUser", project),
    ]


def _run(command: list[str]) -> None:
    """Runs one; what is there already is no failure, and an account that was just made may take a while to be known.

    Raises:
        Refused: it failed otherwise.
    """
    program = shutil.which("gcloud")
    if not program:
        raise submit.Refused("gcloud is not on PATH: install the Google Cloud CLI, or see the commands with --dry-run")
    print(f"setup: {shlex.join(command)}", file=sys.stderr, flush=True)
    environment = os.environ | {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    for wait in (*WAITS, None):
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False, env=environment)
        told = " ".join(done.stderr.split())
        if done.returncode == 0:
            return
        # A bucket's name may be taken by another project ("not available"); of one's own the service says "already own".
        if re.search(r"already exists|ALREADY_EXISTS|already own", told) and "not available" not in told:
            print("setup: is there already", file=sys.stderr)
            return
        if wait is None or not re.search(r"[Ss]ervice account \S+ does not exist", told):
            raise submit.Refused(told)
        time.sleep(wait)


if __name__ == "__main__":
    sys.exit(main())
