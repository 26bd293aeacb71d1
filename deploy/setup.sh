#!/usr/bin/env bash
# Makes, once for a project, what the settings name: services, bucket, repository, and accounts that may do no more than they need.
#
#     deploy/setup.sh --user=you@example.com [--dry-run] [--set NAME=VALUE]...
#
# --dry-run prints the gcloud commands. What is there already is left as it is, so that it can be run again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=deploy/python.sh
. "$root/deploy/python.sh"
PYTHONPATH=$root exec "$python" -m deploy.setup "$@"
