#!/bin/sh
# Installs a part of a lock for an image, and cuts what an image does not need. The Dockerfile runs it, in the stages with pip.
#
#     install.sh common cpu.txt    all but TensorFlow and what belongs to its flavour, into /opt/venv: the same for each flavour
#     install.sh flavour tpu.txt   the rest, into /opt/flavour, laid out to be copied over /opt/venv
set -eu
part=$1 lock=/src/requirements/$2 flavour='^(tensorflow|tensorflow-tpu|libtpu|nvidia-[a-z0-9-]+)=='
case $part in
    common) prefix=/opt/venv pattern="keep = !/$flavour/" ;;
    flavour) prefix=/opt/flavour pattern="keep = /$flavour/" ;;
    *) exit 2 ;;
esac
awk "/^[a-z]/ {$pattern} keep" "$lock" >/tmp/part.txt
pip="/opt/venv/bin/python -m pip"
$pip install --no-build-isolation --no-compile --no-deps --require-hashes --prefix="$prefix" -r /tmp/part.txt

# A fifth of the environment serves only those who build against it: C++ headers, static libraries, symbol tables, libclang
# (of TensorFlow's documentation tools) and the packages' own tests. Only TensorFlow's own libraries are stripped: those
# that wheel repair tools have patched (NumPy's) do not survive it, and libtpu and CUDA come stripped.
site=$(echo "$prefix"/lib/python3*/site-packages)
rm -rf "$site"/tensorflow/include "$site"/clang/native
find "$site" -type d -name tests -prune -exec rm -rf {} +
find "$site" -name '*.a' -delete
find "$prefix" -type d -name __pycache__ -prune -exec rm -rf {} +
[ "$part" = flavour ] || exit 0
strip --strip-unneeded "$site"/tensorflow/*.so.2

# Compiles the modules that every start needs, which saves half of the start's time, and shows that nothing needed was cut.
# TPU_LOAD_LIBRARY=0: without it, libtpu waits for a TPU's metadata server, which a building machine does not have.
touch /tmp/before
export PYTHONPATH="$site"
$pip check
TF_CPP_MIN_LOG_LEVEL=3 TPU_LOAD_LIBRARY=0 CUDA_VISIBLE_DEVICES=-1 /opt/venv/bin/python -c \
    'import google.cloud.storage, jinja2, keras, matplotlib.pyplot, PIL.Image, rich.progress, tensorflow'
cd /opt/venv
find lib -name '*.pyc' -newer /tmp/before >/tmp/compiled
tar -c -T /tmp/compiled | tar -x -C "$prefix"
/opt/venv/bin/python /src/requirements/sbom.py /src/requirements/build.txt "$lock" >"$prefix/sbom.cdx.json"
