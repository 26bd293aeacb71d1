"""Prints a Kubernetes Job. See deploy/gke.sh."""

from __future__ import annotations

import json
import sys

from deploy import specs, submit, trainer_flags
from deploy.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Prints the Job as JSON, which kubectl reads too. Returns 0, or 2 for a mistake."""
    arguments, extra = submit.split_arguments(sys.argv[1:] if argv is None else argv)
    parser = submit.Parser(
        prog="deploy/gke.sh",
        usage="deploy/gke.sh [--spot] [--set NAME=VALUE]... [-- TRAINER FLAGS] | kubectl apply -f -",
        description="Prints a Kubernetes Job for a GKE cluster with Cloud TPU v5e.",
        allow_abbrev=False,
    )
    submit.add_settings(parser)
    try:
        options = parser.parse_args(arguments)
        spec = specs.load(str(specs.HERE / "manifests" / "gke-tpu-v5e.yaml"))
        job = specs.render(spec, specs.resolve(spec, list(submit.setting_sources(options))), extra)
        (container,) = job["spec"]["template"]["spec"]["containers"]
        if errors := trainer_flags.errors(container["args"]):
            raise UserError("\nerror: ".join(errors))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(job, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
