"""Renders a job spec, checks it, and submits it to Vertex AI with gcloud. See deploy/submit.sh.

Exit codes: 0 submitted, or printed with --dry-run; 1 Google Cloud refused; 2 a mistake in
settings, flags or spec.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NoReturn

from deploy import check, cost, specs, trainer_flags, yaml_file
from deploy.errors import CloudError, UserError
from deploy.hardware import near

HERE = pathlib.Path(__file__).resolve().parent
SETTINGS_FILE = HERE / "settings.ini"
ACTIVE = ("QUEUED", "PENDING", "RUNNING", "UPDATING", "PAUSED", "CANCELLING")
# (pattern of Google's answer, what to do about it); the first match counts.
ADVICE = (
    (r"SERVICE_DISABLED|has not been used in project|it is disabled",
     "enable the service: gcloud services enable aiplatform.googleapis.com --project={project}"),
    (r"actAs|serviceAccountUser",
     "you may not run jobs as that account: grant yourself roles/iam.serviceAccountUser on it (docs/deploy.md)"),
    (r"PERMISSION_DENIED|\b403\b|does not have permission",
     "you lack a role on {project}: submitting needs roles/aiplatform.user (docs/deploy.md)"),
    (r"RESOURCE_EXHAUSTED|\b429\b|[Qq]uota",
     "not enough quota in {region}: request the named quota on the console's page IAM & Admin > Quotas, or use another region"),
    (r"NOT_FOUND|\b404\b", "project, region, service account or TensorBoard does not exist under that name"),
    (r"active account|gcloud auth login|[Rr]eauthentication|UNAUTHENTICATED|\b401\b|invalid_grant",
     "log in first: gcloud auth login"),
    (r"\b50[0-9]\b|INTERNAL|UNAVAILABLE",
     "Google Cloud failed, and gcloud retried. See whether a job exists before you submit again: "
     "gcloud ai custom-jobs list --project={project} --region={region}"),
    (r"INVALID_ARGUMENT|\b400\b", "the service refuses a value that passed the checks here; its message names the field"),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code."""
    arguments, extra = split_arguments(sys.argv[1:] if argv is None else argv)
    try:
        return _main(_parser().parse_args(arguments), extra)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CloudError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before `--`, for the script, and those after it, for the trainer."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


class Parser(argparse.ArgumentParser):
    """Raises mistakes as one line with the nearest option. The caller decides about the exit."""

    def error(self, message: str) -> NoReturn:
        """
        Raises:
            UserError: always.
        """
        if match := re.search(r"unrecognized arguments: (--?([\w-]+)\S*)", message):
            option, name = match[1], match[2]
            if name.replace("-", "_") in specs.SETTINGS:
                message = f"{option} is a setting: write --set {name.replace('-', '_')}=..."
            elif name in trainer_flags.task_flags() | trainer_flags.COMMON_FLAGS:
                message = f"{option} is a flag of the trainer: write it after --"
            else:
                message = f"there is no {option}{near(name, [o.lstrip('-') for o in self._option_string_actions])}"
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    settings = "\n".join(
        f"  {name:16} {s.help}{'' if s.default in (None, '', []) else f' [{str(s.default).lower()}]'}"
        for name, s in specs.SETTINGS.items()
    )
    parser = Parser(
        prog="deploy/submit.sh",
        usage="deploy/submit.sh SPEC [--dry-run] [--set NAME=VALUE]... [-- TRAINER FLAGS]",
        description="Renders a spec, checks it, and submits it with gcloud. The same command with the same run resumes it.",
        epilog=f"specs: {', '.join(specs.names())}, or a file\nstudies: {', '.join(_studies())}, or a file\n\n"
        f"settings:\n{settings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("spec", metavar="SPEC", help="a name in deploy/specs, or a file")
    parser.add_argument("--dry-run", action="store_true", help="print the job and the command; call nothing")
    add_settings(parser)
    parser.add_argument("--study", metavar="STUDY", help="search hyperparameters: a name in deploy/studies, or a file")
    parser.add_argument("--price", help="of a chip, GPU or machine an hour; prints what the job may cost")
    parser.add_argument("--beside", action="store_true", help="submit even if a job of this run is active")
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `setting_sources` reads."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting; overrides the file's"
    )
    parser.add_argument("--settings", metavar="FILE", help="file of settings [deploy/settings.ini, if it exists]")
    parser.add_argument("--spot", action="store_true", help="the same as --set spot=true")


def _main(options: argparse.Namespace, extra: list[str]) -> int:
    try:
        price = cost.parse_price(options.price) if options.price else 0.0
    except ValueError as error:
        raise UserError(str(error)) from None
    spec = specs.load(options.spec)
    settings = specs.resolve(spec, list(setting_sources(options)))
    kind, job = _job(options, spec, settings, extra)
    if errors := list(_errors(kind, job, settings)):
        raise UserError("\nerror: ".join(errors))
    trial = _custom_job(job)
    for note in check.notes(trial, str(settings["region"])):
        _print_error(f"note: {note}")
    if price:
        _print_error(f"cost: {cost.maximum(trial, price, int(job.get('maxTrialCount', 1)))}")
    if options.dry_run:
        print(json.dumps(job, indent=1))
        _print_error(f"would run: {shlex.join(create(kind, settings, 'JOB.json'))}")
        _print_error("nothing was submitted")
        return 0
    if not options.beside:
        _require_no_active_job(kind, settings)
    _report(kind, settings, _submit(kind, job, settings))
    return 0


def _print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def setting_sources(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    """The settings of the file, then those of the command line, as `specs.resolve` takes them.

    Raises:
        UserError: the file cannot be read, or an argument is not NAME=VALUE.
    """
    path = pathlib.Path(options.settings) if options.settings else SETTINGS_FILE
    if options.settings or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"--settings={path}: cannot be read: {error}") from None
        yield str(path), specs.read_settings(text, str(path))
    values: dict[str, str] = {}
    for argument in options.set:
        name, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"--set {argument}: must be NAME=VALUE")
        values[name] = value
    if options.spot:
        values["spot"] = "true"
    yield "--set", values


def _studies() -> list[str]:
    return sorted(path.stem for path in (HERE / "studies").glob("*.yaml"))


def _job(
    options: argparse.Namespace, spec: dict[str, Any], settings: specs.Settings, extra: list[str]
) -> tuple[str, dict[str, Any]]:
    """The kind of job, as gcloud names it, and the job itself."""
    if not options.study:
        return "custom-jobs", specs.render(spec, settings, extra)
    is_file = options.study.endswith((".yaml", ".yml", ".json")) or "/" in options.study
    path = pathlib.Path(options.study) if is_file else HERE / "studies" / f"{options.study}.yaml"
    if not path.is_file():
        raise UserError(f"there is no study {options.study}{near(options.study, _studies())}")
    study = yaml_file.load(path, path.name)
    if not isinstance(study, dict) or "trialJobSpec" in study:
        raise UserError(
            f"{path}: must hold studySpec, maxTrialCount and parallelTrialCount; the spec is the trial's job"
        )
    with contextlib.suppress(KeyError, IndexError, TypeError):  # the checker refuses such a study
        extra = [*extra, f"--hp_metric={study['studySpec']['metrics'][0]['metricId']}"]
    return "hp-tuning-jobs", study | {"trialJobSpec": specs.render(spec, settings, extra)}


def _custom_job(job: dict[str, Any]) -> dict[str, Any]:
    """The CustomJobSpec: that of a study's trials, or the job itself."""
    trial: dict[str, Any] = job.get("trialJobSpec", job)
    return trial


def _errors(kind: str, job: dict[str, Any], settings: specs.Settings) -> Iterator[str]:
    check_job = check.custom_job if kind == "custom-jobs" else check.tuning_job
    errors = list(check_job(job, str(settings["region"])))
    yield from errors
    if errors:
        return
    pools = _custom_job(job)["workerPoolSpecs"]
    for arguments in {tuple(pool["containerSpec"].get("args", [])) for pool in pools if "containerSpec" in pool}:
        yield from trainer_flags.errors(list(arguments), job.get("studySpec"))


def create(kind: str, settings: specs.Settings, path: str) -> list[str]:
    """The command that submits a job.

    Args:
        kind: custom-jobs or hp-tuning-jobs.
        settings: of the run.
        path: the file that holds the job.
    """
    labels = {"program": "funmatch", "run": settings["run"]} | (
        {"recipe": settings["recipe"]} if settings["recipe"] else {}
    )
    return [
        *("gcloud", "ai", kind, "create", f"--project={settings['project']}", f"--region={settings['region']}"),
        f"--display-name={settings['run']}",
        f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}",
        f"--config={path}",
        "--format=value(name)",
    ]


def run_gcloud(command: list[str], settings: specs.Settings) -> str:
    """Runs a gcloud command.

    Args:
        command: `gcloud` and its arguments.
        settings: for the advice in an error.

    Returns:
        Its standard output, without surrounding white space.

    Raises:
        CloudError: with gcloud's message and advice.
    """
    program = shutil.which("gcloud")
    if not program:
        raise CloudError("gcloud is not on PATH: install the Google Cloud CLI, or print the job with --dry-run")
    done = subprocess.run(
        [program, *command[1:]],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
    )
    if done.returncode == 0:
        return done.stdout.strip()
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("Using ")]
    message = " ".join(lines).removeprefix("ERROR: ") or f"gcloud exited with {done.returncode}"
    if content := re.search(r"HttpError accessing.*content <(\{.*\})>", message):
        with contextlib.suppress(ValueError, KeyError):
            answer = json.loads(content[1])["error"]
            message = f"{answer['status']} ({answer['code']}): {answer['message']}"
    advice = next((text for pattern, text in ADVICE if re.search(pattern, message)), "")
    raise CloudError(message + ("\nhint: " + advice.format(**settings) if advice else ""))


def active(kind: str, settings: specs.Settings) -> list[str]:
    """The command that lists the jobs of this run that have not ended."""
    states = " ".join(f"JOB_STATE_{state}" for state in ACTIVE)
    return [
        *("gcloud", "ai", kind, "list", f"--project={settings['project']}", f"--region={settings['region']}"),
        f"--filter=displayName={settings['run']} AND state=({states})",
        "--format=value(name,state)",
    ]


def followers(kind: str, settings: specs.Settings, name: str) -> list[tuple[str, list[str]]]:
    """Labelled commands that follow a submitted job.

    Args:
        kind: custom-jobs or hp-tuning-jobs.
        settings: of the run.
        name: resource name of the job.
    """
    where = [f"--project={settings['project']}", f"--region={settings['region']}"]
    return [
        ("logs", ["gcloud", "ai", kind, "stream-logs", name]),
        ("state", ["gcloud", "ai", kind, "describe", name, "--format=value(state,error.message)"]),
        ("cancel", ["gcloud", "ai", kind, "cancel", name]),
        ("all", ["gcloud", "ai", kind, "list", *where, "--filter=labels.program=funmatch"]),
        ("results", ["gcloud", "storage", "ls", str(settings.get("workdir") or settings.get("output", "gs://"))]),
    ]


def _require_no_active_job(kind: str, settings: specs.Settings) -> None:
    """Refuses a second job of a run: two jobs would overwrite each other's checkpoints.

    Raises:
        CloudError: a job of this name has not ended.
    """
    if jobs := run_gcloud(active(kind, settings), settings):
        name, _, state = jobs.splitlines()[0].partition("\t")
        raise CloudError(
            f"the run {settings['run']} has a job already ({name}, {state}): wait for it, cancel it "
            f"(gcloud ai {kind} cancel {name}), or use another run"
        )


def _submit(kind: str, job: dict[str, Any], settings: specs.Settings) -> str:
    """The new job's name."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"{settings['run']}.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(job, file)
        return run_gcloud(create(kind, settings, path), settings)


def _report(kind: str, settings: specs.Settings, name: str) -> None:
    print(name)
    _print_error(f"submitted {name}")
    for label, command in followers(kind, settings, name):
        _print_error(f"  {label:8} {shlex.join(command)}")
    _print_error(
        f"The same command with run = {settings['run']} resumes from the last checkpoint, however this job ends."
    )


if __name__ == "__main__":
    sys.exit(main())
