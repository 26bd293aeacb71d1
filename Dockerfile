# docker build --target cpu -t funmatch:cpu .
#
# Builds with the classic builder of Docker 20.10 as well as with BuildKit. Two stages per flavour: one that has pip and
# the network, and one that receives the finished environment. What pip needs on this machine (a proxy's certificates, an
# index) comes as build arguments that exist in the first stage only, so neither they nor a secret in them reach the image.

ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS packages-cpu
ARG PIP_CERT
ARG PIP_DEFAULT_TIMEOUT
ARG PIP_EXTRA_INDEX_URL
ARG PIP_INDEX_URL
ARG PIP_TRUSTED_HOST
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/venv
COPY requirements/build.txt requirements/cpu.txt /src/requirements/
RUN /opt/venv/bin/pip install --require-hashes -r /src/requirements/build.txt \
 && /opt/venv/bin/pip install --no-build-isolation --no-compile --require-hashes -r /src/requirements/cpu.txt \
 && /opt/venv/bin/pip check
# A fifth of the environment serves only those who build against it: C++ headers, static libraries, symbol tables, libclang
# (of TensorFlow's documentation tools) and the packages' own tests. The import after it compiles the modules that every
# start needs, which saves half of the start's time, and shows that nothing needed was cut. Only TensorFlow's own libraries
# are stripped: those that wheel repair tools have patched (NumPy's) do not survive it.
RUN apt-get update \
 && apt-get install -y --no-install-recommends binutils \
 && cd /opt/venv/lib/python3*/site-packages \
 && strip --strip-unneeded tensorflow/*.so.2 \
 && rm -rf tensorflow/include clang/native \
 && find . -type d -name tests -prune -exec rm -rf {} + \
 && find . -name '*.a' -delete \
 && find /opt/venv -type d -name __pycache__ -prune -exec rm -rf {} + \
 && TF_CPP_MIN_LOG_LEVEL=3 /opt/venv/bin/python -c \
    'import google.cloud.storage, jinja2, keras, matplotlib.pyplot, PIL.Image, rich.progress, tensorflow'

# This project alone, laid out to be copied over any flavour's environment: a change to it moves kilobytes, not gigabytes.
FROM packages-cpu AS program
COPY . /src
RUN /opt/venv/bin/pip install --no-build-isolation --no-deps --prefix=/opt/program /src \
 && mkdir -p /opt/recipes \
 && if [ -d /src/recipes ]; then cp -R /src/recipes /opt; fi

# What every flavour shares: who runs, and where. /tmp is HOME because it is the one place that is writable under any user,
# and under `--read-only --tmpfs /tmp`; Keras, Matplotlib and others keep their settings and caches there.
# TF_CPP_MIN_LOG_LEVEL is left to the program: it is quiet unless a user sets it.
FROM ${BASE} AS runtime
RUN groupadd --gid 10001 funmatch \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin funmatch \
 && install -d -o 10001 -g 10001 /workspace
ENV HOME=/tmp \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /workspace
ENTRYPOINT ["python", "-m", "trainer.task"]

# A further flavour is a `packages-NAME` stage with its own lock, and a stage like this one. It goes above this one: the
# last stage is what `docker build .` makes.
FROM runtime AS cpu
COPY --from=packages-cpu /opt/venv /opt/venv
COPY --from=program /opt/program /opt/venv
COPY --from=program /opt/recipes /workspace/recipes
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="funmatch" \
      org.opencontainers.image.description="Function matching knowledge distillation in TensorFlow, on the CPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 10001:10001
