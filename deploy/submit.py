"""Renders a job spec, checks it, and has gcloud submit it to Vertex AI. See deploy/submit.sh.

Exit codes: 0 submitted, or printed with --dry-run; 1 Google's side refused; 2 a mistake in what was given.
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

from deploy import check, cost, plainyaml, specs
from deploy.plainyaml import YamlError
from deploy.specs import SettingError

HERE = pathlib.Path(__file__).resolve().parent
SETTINGS_FILE = HERE / "settings.ini"
ACTIVE = ("QUEUED", "PENDING", "RUNNING", "UPDATING", "PAUSED", "CANCELLING")
# (what Google's answer holds, what to do about it); the first that fits.
ADVICE = (
    (r"SERVICE_DISABLED|has not been used in project|it is disabled",
     "enable the service: gcloud services enable aiplatform.googleapis.com --project={project}"),
    (r"actAs|serviceAccountUser",
     "you may not run jobs as that account: grant yourself roles/iam.serviceAccountUser on it (docs/deploy.md)"),
    (r"PERMISSION_DENIED|\b403\b|does not have permission",
     "you lack a role on {project}: submitting needs roles/aiplatform.user (docs/deploy.md)"),
    (r"RESOURCE_EXHAUSTED|\b429\b|[Qq]uota",
     "not enough quota in {region}: ask for the named quota on the console's page IAM & Admin > Quotas, or take another region"),
    (r"NOT_FOUND|\b404\b", "project, region, service account or TensorBoard does not exist under that name"),
    (r"active account|gcloud auth login|[Rr]eauthentication|UNAUTHENTICATED|\b401\b|invalid_grant",
     "log in first: gcloud auth login"),
    (r"\b50[0-9]\b|INTERNAL|UNAVAILABLE",
     "Google's side failed, and gcloud tried again by itself: look whether a job came of it before you submit again: "
     "gcloud ai custom-jobs list --project={project} --region={region}"),
    (r"INVALID_ARGUMENT|\b400\b", "the service refuses a value that looks right here; its message names the field"),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    try:
        return _main(_parser().parse_args(arguments[:cut]), arguments[cut + 1 :])
    except (SettingError, YamlError, Mistake) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


class Mistake(ValueError):
    """Something is wrong in what was given."""


class Refused(Exception):
    """Google's side refused, or gcloud did not work."""


class Parser(argparse.ArgumentParser):
    """Says mistakes in a line, with the nearest option, and leaves the exit to the caller."""

    def error(self, message: str) -> NoReturn:
        """
        Raises:
            Mistake: always.
        """
        if match := re.search(r"unrecognized arguments: (--?([\w-]+)\S*)", message):
            if match[2].replace("-", "_") in specs.SETTINGS:
                message = f"{match[1]} is a setting: write --set {match[2].replace('-', '_')}=..."
            elif match[2] in check.trainer_flags() | check.EVERY_VERBS:
                message = f"{match[1]} is a flag of the trainer: write it after --"
            else:
                message = f"there is no {match[1]}{check.near(match[2], [o.lstrip('-') for o in self._option_string_actions])}"
        raise Mistake(message)


def _parser() -> argparse.ArgumentParser:
    settings = "\n".join(
        f"  {name:16} {s.help}{'' if s.default in (None, '', []) else f' [{str(s.default).lower()}]'}"
        for name, s in specs.SETTINGS.items()
    )
    parser = Parser(
        prog="deploy/submit.sh",
        usage="deploy/submit.sh SPEC [--dry-run] [--set NAME=VALUE]... [-- TRAINER FLAGS]",
        description="Renders a spec, checks it, and submits it with gcloud. The same command with the same run goes on with it.",
        epilog=f"specs: {', '.join(specs.names())}, or a file\nstudies: {', '.join(_studies())}, or a file\n\n"
        f"settings:\n{settings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("spec", metavar="SPEC", help="a name of deploy/specs, or a file")
    parser.add_argument("--dry-run", action="store_true", help="print the job and the command; call nothing")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting; over those of the file"
    )
    parser.add_argument("--settings", metavar="FILE", help="file of settings [deploy/settings.ini, if it is there]")
    parser.add_argument("--spot", action="store_true", help="the same as --set spot=true")
    parser.add_argument("--study", metavar="STUDY", help="search hyperparameters: a name of deploy/studies, or a file")
    parser.add_argument("--price", help="of a chip, GPU or machine an hour, to say what the job may cost")
    parser.add_argument("--beside", action="store_true", help="submit even if a job of this run is active")
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that settings come from."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting; over those of the file"
    )
    parser.add_argument("--settings", metavar="FILE", help="file of settings [deploy/settings.ini, if it is there]")
    parser.add_argument("--spot", action="store_true", help="the same as --set spot=true")


def _main(chosen: argparse.Namespace, extra: list[str]) -> int:
    try:
        price = cost.price(chosen.price) if chosen.price else 0.0
    except ValueError as error:
        raise Mistake(str(error)) from None
    spec = specs.load(chosen.spec)
    settings = specs.settle(spec, list(given(chosen)))
    kind, job = _job(chosen, spec, settings, extra)
    trial = job["trialJobSpec"] if kind == "hp-tuning-jobs" else job
    if wrong := list(_wrong(kind, job, settings)):
        raise Mistake("\nerror: ".join(wrong))
    for note in check.notes(trial, str(settings["region"])):
        _say(f"note: {note}")
    if price:
        _say(f"cost: {cost.most(trial, price, int(job.get('maxTrialCount', 1)))}")
    if chosen.dry_run:
        print(json.dumps(job, indent=1))
        _say(f"would run: {shlex.join(create(kind, settings, 'JOB.json'))}")
        _say("nothing was submitted")
        return 0
    if not chosen.beside:
        _require_no_other(kind, settings)
    _report(kind, settings, _submit(kind, job, settings))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def given(chosen: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    """Settings of the file, then those of the command line, for `specs.settle`.

    Raises:
        SettingError: a file that cannot be read, or no NAME=VALUE.
    """
    path = pathlib.Path(chosen.settings) if chosen.settings else SETTINGS_FILE
    if chosen.settings or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise SettingError(f"--settings={path}: cannot be read: {error}") from None
        yield str(path), specs.read_settings(text, str(path))
    pairs: dict[str, str] = {}
    for text in chosen.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingError(f"--set {text}: must be NAME=VALUE")
        pairs[name] = value
    if chosen.spot:
        pairs["spot"] = "true"
    yield "--set", pairs


def _studies() -> list[str]:
    return sorted(path.stem for path in (HERE / "studies").glob("*.yaml"))


def _job(
    chosen: argparse.Namespace, spec: dict[str, Any], settings: specs.Settings, extra: list[str]
) -> tuple[str, dict[str, Any]]:
    """The kind of job, as gcloud names it, and the job itself."""
    if not chosen.study:
        return "custom-jobs", specs.render(spec, settings, extra)
    own = chosen.study.endswith((".yaml", ".yml", ".json")) or "/" in chosen.study
    path = pathlib.Path(chosen.study) if own else HERE / "studies" / f"{chosen.study}.yaml"
    if not path.is_file():
        raise SettingError(f"there is no study {chosen.study}{check.near(chosen.study, _studies())}")
    study = plainyaml.load(path.read_text(encoding="utf-8"), path.name)
    if not isinstance(study, dict) or "trialJobSpec" in study:
        raise SettingError(
            f"{path}: must hold studySpec, maxTrialCount and parallelTrialCount; the spec is the trial's job"
        )
    with contextlib.suppress(KeyError, IndexError, TypeError):  # of a study that the checker will refuse
        extra = [*extra, f"--hp_metric={study['studySpec']['metrics'][0]['metricId']}"]
    return "hp-tuning-jobs", study | {"trialJobSpec": specs.render(spec, settings, extra)}


def _wrong(kind: str, job: dict[str, Any], settings: specs.Settings) -> Iterator[str]:
    region = str(settings["region"])
    found = list((check.custom_job if kind == "custom-jobs" else check.tuning_job)(job, region))
    yield from found
    if found:
        return
    trial = job if kind == "custom-jobs" else job["trialJobSpec"]
    for args in {
        tuple(pool["containerSpec"].get("args", [])) for pool in trial["workerPoolSpecs"] if "containerSpec" in pool
    }:
        wrong = list(check.arguments(list(args)))
        if kind == "hp-tuning-jobs":
            wrong += check.study_flags(job["studySpec"], list(args))
        yield from wrong
        if not wrong:
            yield from check.configuration(list(args), job.get("studySpec", {}))


def create(kind: str, settings: specs.Settings, path: str) -> list[str]:
    """The command that submits the job in a file."""
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


def gcloud(command: list[str], settings: specs.Settings) -> str:
    """What gcloud says on stdout.

    Raises:
        Refused: with its own words, and what to do.
    """
    program = shutil.which("gcloud")
    if not program:
        raise Refused("gcloud is not on PATH: install the Google Cloud CLI, or see the job with --dry-run")
    done = subprocess.run(
        [program, *command[1:]],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
    )
    if done.returncode == 0:
        return done.stdout.strip()
    told = " ".join(line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("Using "))
    told = told.removeprefix("ERROR: ") or f"gcloud exited with {done.returncode}"
    if inner := re.search(r"HttpError accessing.*content <(\{.*\})>", told):
        with contextlib.suppress(ValueError, KeyError):
            answer = json.loads(inner[1])["error"]
            told = f"{answer['status']} ({answer['code']}): {answer['message']}"
    advice = next((text for pattern, text in ADVICE if re.search(pattern, told)), "")
    raise Refused(told + ("\nhint: " + advice.format(**settings) if advice else ""))


def active(kind: str, settings: specs.Settings) -> list[str]:
    """The command that lists the jobs of this run which have not ended."""
    states = " ".join(f"JOB_STATE_{state}" for state in ACTIVE)
    return [
        *("gcloud", "ai", kind, "list", f"--project={settings['project']}", f"--region={settings['region']}"),
        f"--filter=displayName={settings['run']} AND state=({states})",
        "--format=value(name,state)",
    ]


def followers(kind: str, settings: specs.Settings, name: str) -> list[tuple[str, list[str]]]:
    """What a submitted job can be followed with."""
    where = [f"--project={settings['project']}", f"--region={settings['region']}"]
    return [
        ("logs", ["gcloud", "ai", kind, "stream-logs", name]),
        ("state", ["gcloud", "ai", kind, "describe", name, "--format=value(state,error.message)"]),
        ("cancel", ["gcloud", "ai", kind, "cancel", name]),
        ("all", ["gcloud", "ai", kind, "list", *where, "--filter=labels.program=funmatch"]),
        ("results", ["gcloud", "storage", "ls", str(settings.get("workdir") or settings.get("output", "gs://"))]),
    ]


def _require_no_other(kind: str, settings: specs.Settings) -> None:
    """Two jobs that write one run's checkpoints would spoil each other's.

    Raises:
        Refused: a job of this name has not ended.
    """
    if found := gcloud(active(kind, settings), settings):
        name, _, state = found.splitlines()[0].partition("\t")
        raise Refused(
            f"the run {settings['run']} has a job already ({name}, {state}): wait for it, cancel it "
            f"(gcloud ai {kind} cancel {name}), or choose another run"
        )


def _submit(kind: str, job: dict[str, Any], settings: specs.Settings) -> str:
    """The new job's name."""
    with tempfile.TemporaryDirectory() as folder:
        # JSON is YAML in which nothing can be read in two ways.
        path = os.path.join(folder, f"{settings['run']}.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(job, file)
        return gcloud(create(kind, settings, path), settings)


def _report(kind: str, settings: specs.Settings, name: str) -> None:
    print(name)
    _say(f"submitted {name}")
    for what, line in followers(kind, settings, name):
        _say(f"  {what:8} {shlex.join(line)}")
    _say(f"The same command with run = {settings['run']} goes on from its last checkpoint, after an end of any kind.")


if __name__ == "__main__":
    sys.exit(main())
