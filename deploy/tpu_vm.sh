#!/usr/bin/env bash
# The job on a TPU VM of your own (Cloud TPU v5e, as a queued resource) in place of Vertex AI.
#
#     deploy/tpu_vm.sh create --zone=ZONE [--dry-run] [--spot] [--set NAME=VALUE]... [-- TRAINER FLAGS]
#     deploy/tpu_vm.sh state|logs|delete --zone=ZONE [--dry-run] [--set NAME=VALUE]...
#
# The machine runs the image at each of its starts, so a restart resumes the run. It is billed
# until it is deleted.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=deploy/python.sh
. "$root/deploy/python.sh"
PYTHONPATH=$root exec "$python" -m deploy.tpu_vm "$@"
