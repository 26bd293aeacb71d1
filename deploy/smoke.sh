#!/usr/bin/env bash
# Runs the whole job on drawn images on this machine's CPU, without account or network: in the
# container image if a Docker engine answers, otherwise in plain Python.
#
#     deploy/smoke.sh [--docker|--python] [--out=smoke] [SMOKE FLAGS, such as --preset=tiny]
#
# IMAGE names the container image (funmatch:cpu), which is built if it does not exist.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
image=${IMAGE:-funmatch:cpu}
out=$PWD/smoke
how=
flags=()
for argument in "$@"; do
    case $argument in
    --docker | --python) how=${argument#--} ;;
    --out=*) out=${argument#--out=} ;;
    --workdir | --workdir=*)
        echo "error: $argument: set the folder of the results with --out=FOLDER" >&2
        exit 2
        ;;
    *) flags+=("$argument") ;;
    esac
done
if [ -z "$how" ]; then
    if docker info >/dev/null 2>&1; then how=docker; else how=python; fi
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)

if [ "$how" = docker ]; then
    docker info >/dev/null 2>&1 || { echo "error: --docker: no Docker engine answers (docker info)" >&2; exit 2; }
    if ! docker image inspect "$image" >/dev/null 2>&1; then
        echo "smoke: building $image"
        docker build --target cpu --tag "$image" "$root"
    fi
    echo "smoke: in $image, without network; results in $out"
    # The image's own user may not write into your folder, so the container runs as you.
    exec docker run --rm --read-only --network none --cap-drop ALL --security-opt no-new-privileges --tmpfs /tmp \
        --user "$(id -u):$(id -g)" --volume "$out:/work" --entrypoint python "$image" \
        -m trainer.smoke --workdir=/work ${flags[@]+"${flags[@]}"}
fi

python=
for candidate in "${PYTHON:-}" "$root/.venv/bin/python" python3; do
    if [ -n "$candidate" ] && "$candidate" -c 'import tensorflow' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: no Docker engine answers, and no Python here has TensorFlow: run \`make venv\` first, or \`make smoke\`" >&2
    exit 2
fi
echo "smoke: in $python; results in $out"
PYTHONPATH=$root exec "$python" -m trainer.smoke --workdir="$out" ${flags[@]+"${flags[@]}"}
