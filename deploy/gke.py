"""Prints a Kubernetes Job. See deploy/gke.sh."""

from __future__ import annotations

import json
import sys

from deploy import check, specs, submit
from deploy.plainyaml import YamlError
from deploy.specs import SettingError


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code: 0, or 2 for a mistake. The Job is JSON, which kubectl takes as it takes YAML."""
    arguments = sys.argv[1:] if argv is None else argv
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = submit.Parser(
        prog="deploy/gke.sh",
        usage="deploy/gke.sh [--spot] [--set NAME=VALUE]... [-- TRAINER FLAGS] | kubectl apply -f -",
        description="Prints a Kubernetes Job for a GKE cluster with Cloud TPU v5e.",
        allow_abbrev=False,
    )
    submit.add_settings(parser)
    try:
        chosen = parser.parse_args(arguments[:cut])
        spec = specs.load(str(specs.HERE / "manifests" / "gke-tpu-v5e.yaml"))
        job = specs.render(spec, specs.settle(spec, list(submit.given(chosen))), arguments[cut + 1 :])
        args = job["spec"]["template"]["spec"]["containers"][0]["args"]
        if wrong := list(check.arguments(args)) or list(check.configuration(args, {})):
            raise submit.Mistake("\nerror: ".join(wrong))
    except (SettingError, YamlError, submit.Mistake) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(job, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
