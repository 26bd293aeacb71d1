#!/bin/sh
# Installs a part of a lock for an image, and deletes what an image does not need. The Dockerfile
# runs it, in the stages with pip.
#
#     install.sh common cpu.txt         all but the flavour's packages, into /opt/venv
#     install.sh flavour tpu.txt        TensorFlow and its libraries, into /opt/flavour
#     install.sh select PART LOCKFILE   only prints the part of a lock
#
# The common part is the same for each flavour. /opt/flavour is laid out to be copied over
# /opt/venv.
set -eu
usage="usage: install.sh [select] common|flavour LOCK"

# Prints the requirements of a lock file ($2) that belong to a part ($1), with their hashes.
select_part() {
    awk -v part="$1" '
        /^[a-z]/ { own = /^(tensorflow|tensorflow-tpu|libtpu|nvidia-[a-z0-9-]+)==/ ? "flavour" : "common" }
        own == part' "$2"
}

if [ "${1:-}" = select ] && [ $# -eq 3 ]; then
    select_part "$2" "$3"
    exit
fi
[ $# -eq 2 ] || { echo "$usage" >&2; exit 2; }
part=$1 lock=/src/requirements/$2
case $part in
    common) prefix=/opt/venv ;;
    flavour) prefix=/opt/flavour ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
select_part "$part" "$lock" >/tmp/part.txt
pip="/opt/venv/bin/python -m pip"
$pip install --no-build-isolation --no-compile --no-deps --require-hashes --prefix="$prefix" -r /tmp/part.txt

# A fifth of the environment is only for building against it: C++ headers, static libraries,
# symbol tables, libclang (of TensorFlow's documentation tools) and the packages' own tests. Only
# TensorFlow's own libraries are stripped: stripping breaks those that wheel repair tools have
# patched (NumPy's), and libtpu and CUDA come stripped.
site=$(echo "$prefix"/lib/python3*/site-packages)
rm -rf "$site"/tensorflow/include "$site"/clang/native
find "$site" -type d -name tests -prune -exec rm -rf {} +
find "$site" -name '*.a' -delete
find "$prefix" -type d -name __pycache__ -prune -exec rm -rf {} +
[ "$part" = flavour ] || exit 0
strip --strip-unneeded "$site"/tensorflow/*.so.2

# Compiles the modules that every start imports, which halves the time of a start, and shows that
# nothing needed was deleted. TPU_LOAD_LIBRARY=0: without it, libtpu waits for a TPU's metadata
# server, which a building machine does not have.
touch /tmp/before
export PYTHONPATH="$site"
$pip check
TF_CPP_MIN_LOG_LEVEL=3 TPU_LOAD_LIBRARY=0 CUDA_VISIBLE_DEVICES=-1 /opt/venv/bin/python -c \
    'import google.cloud.storage, jinja2, keras, matplotlib.pyplot, PIL.Image, rich.progress, tensorflow'
cd /opt/venv
find lib -name '*.pyc' -newer /tmp/before >/tmp/compiled
tar -c -T /tmp/compiled | tar -x -C "$prefix"
/opt/venv/bin/python /src/requirements/sbom.py /src/requirements/build.txt "$lock" >"$prefix/sbom.cdx.json"
