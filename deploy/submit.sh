#!/usr/bin/env bash
# Renders a job spec, checks it and submits it to Vertex AI with gcloud.
#
#     deploy/submit.sh SPEC [--dry-run] [--spot] [--study=STUDY] [--set NAME=VALUE]... [-- TRAINER FLAGS]
#
# deploy/submit.sh --help lists specs and settings; docs/deploy.md walks through it. Needs Python
# 3.9 or newer with PyYAML (python3 -m pip install pyyaml), and gcloud unless --dry-run.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=deploy/python.sh
. "$root/deploy/python.sh"
PYTHONPATH=$root exec "$python" -m deploy.submit "$@"
