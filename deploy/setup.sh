#!/usr/bin/env bash
# Creates, once for a project, what the settings name: services, bucket, repository, and accounts
# with no more rights than needed.
#
#     deploy/setup.sh --user=you@example.com [--dry-run] [--set NAME=VALUE]...
#
# --dry-run prints the gcloud commands. What exists already is left as it is, so it can be run
# again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=deploy/python.sh
. "$root/deploy/python.sh"
PYTHONPATH=$root exec "$python" -m deploy.setup "$@"
