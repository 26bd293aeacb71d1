#!/usr/bin/env bash
# Prints a Kubernetes Job for a GKE cluster with a Cloud TPU v5e node pool:
#
#     deploy/gke.sh [--spot] [--set NAME=VALUE]... [-- TRAINER FLAGS] | kubectl apply -f -
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=deploy/python.sh
. "$root/deploy/python.sh"
PYTHONPATH=$root exec "$python" -m deploy.gke "$@"
