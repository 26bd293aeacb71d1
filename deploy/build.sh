#!/usr/bin/env bash
# Builds an image and pushes it to Artifact Registry, here with Docker or, with --cloud, on Cloud
# Build.
#
#     deploy/build.sh tpu [--cloud] [--dry-run] [--set NAME=VALUE]...
#
# cpu, tpu and gpu are targets of the Dockerfile. Settings come from deploy/settings.ini as for
# deploy/submit.sh. At the end it prints the image with its digest: pass that as --set image=...
# so that every restart runs the same bytes.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=deploy/python.sh
. "$root/deploy/python.sh"
PYTHONPATH=$root exec "$python" -m deploy.build "$@"
