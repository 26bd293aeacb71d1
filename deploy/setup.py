"""Creates what a project needs once. See deploy/setup.sh; docs/deploy.md explains the roles."""

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
from deploy.errors import CloudError, UserError

RETRY_SECONDS = (5.0, 10.0, 20.0)
SERVICES = ("aiplatform", "artifactregistry", "cloudbuild", "iam", "logging", "storage")


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code: 0, 1 if Google Cloud refused, 2 for a mistake."""
    parser = submit.Parser(
        prog="deploy/setup.sh",
        usage="deploy/setup.sh --user=EMAIL [--dry-run] [--set NAME=VALUE]...",
        description="Creates bucket, repository and least-privilege accounts for funmatch in a project.",
        allow_abbrev=False,
    )
    parser.add_argument("--user", required=True, help="who will submit jobs: an account's e-mail address")
    parser.add_argument("--dry-run", action="store_true", help="print the commands; call nothing")
    submit.add_settings(parser)
    try:
        options = parser.parse_args(argv)
        if not re.fullmatch(r"[^@\s]+@[^@\s]+", options.user):
            raise UserError(f"--user={options.user}: must be an e-mail address")
        spec: dict[str, Any] = {"defaults": {}, "job": {}}
        settings = specs.resolve(spec, list(submit.setting_sources(options)), required=("project", "region", "bucket"))
        job, build = accounts(settings)
        for command in commands(settings, options.user):
            if options.dry_run:
                print(shlex.join(command))
            else:
                _run(command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CloudError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    outcome = "nothing was called" if options.dry_run else "everything exists"
    print(f"{outcome}. For deploy/settings.ini:", file=sys.stderr)
    print(f"service_account = {job}\nbuild_account = {build}", file=sys.stderr)
    return 0


def accounts(settings: specs.Settings) -> tuple[str, str]:
    """The accounts of jobs and of builds: those of the settings, or else funmatch-job and
    funmatch-build.

    Raises:
        UserError: an account belongs to another project.
    """
    domain = f"{settings['project']}.iam.gserviceaccount.com"
    emails = []
    for name, short in (("service_account", "funmatch-job"), ("build_account", "funmatch-build")):
        account = str(settings[name]) or f"{short}@{domain}"
        if account.partition("@")[2] != domain:
            raise UserError(
                f"{name} = {account}: is not in the project {settings['project']}, so it is not created here"
            )
        emails.append(account)
    return emails[0], emails[1]


def commands(settings: specs.Settings, user: str) -> list[list[str]]:
    """The gcloud commands, in the order in which they must run."""
    project, region, bucket = f"--project={settings['project']}", str(settings["region"]), f"gs://{settings['bucket']}"
    repository = [str(settings["repository"]), project, f"--location={region}"]
    staging = f"gs://{settings['project']}_{region}_cloudbuild"
    job, build = accounts(settings)
    member = "user" if not user.endswith(".gserviceaccount.com") else "serviceAccount"

    def grant(binding: list[str], to: str, role: str, *more: str) -> list[str]:
        return ["gcloud", *binding, f"--member={to}", f"--role=roles/{role}", *more, "--format=none"]

    def create_bucket(name: str) -> list[str]:
        private = ["--uniform-bucket-level-access", "--public-access-prevention"]
        return ["gcloud", "storage", "buckets", "create", name, project, f"--location={region}", *private]

    def on_bucket(name: str) -> list[str]:
        return ["storage", "buckets", "add-iam-policy-binding", name]

    on_project = ["projects", "add-iam-policy-binding", str(settings["project"]), "--condition=None"]
    resources = [
        ["gcloud", "services", "enable", *(f"{name}.googleapis.com" for name in SERVICES), project],
        create_bucket(bucket),
        create_bucket(staging),
        ["gcloud", "artifacts", "repositories", "create", *repository, "--repository-format=docker"],
    ]
    for account in (job, build):
        resources.append(["gcloud", "iam", "service-accounts", "create", account.partition("@")[0], project])
    jobs, builds, people = f"serviceAccount:{job}", f"serviceAccount:{build}", f"{member}:{user}"
    act_as = ["iam", "service-accounts", "add-iam-policy-binding"]
    return [
        *resources,
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
    """Runs a command. What exists already is not a failure. A new account may take a while to be
    known, so that is retried.

    Raises:
        CloudError: it failed for another reason.
    """
    program = shutil.which("gcloud")
    if not program:
        raise CloudError("gcloud is not on PATH: install the Google Cloud CLI, or print the commands with --dry-run")
    print(f"setup: {shlex.join(command)}", file=sys.stderr, flush=True)
    environment = os.environ | {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    for wait in (*RETRY_SECONDS, None):
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False, env=environment)
        message = " ".join(done.stderr.split())
        if done.returncode == 0:
            return
        # "already own" is the answer for a bucket of one's own, "not available" for one of
        # another project.
        if re.search(r"already exists|ALREADY_EXISTS|already own", message) and "not available" not in message:
            print("setup: exists already", file=sys.stderr)
            return
        if wait is None or not re.search(r"[Ss]ervice account \S+ does not exist", message):
            raise CloudError(message)
        time.sleep(wait)


if __name__ == "__main__":
    sys.exit(main())
