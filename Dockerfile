# docker build --target cpu -t funmatch:cpu .        (or tpu, or gpu; `make image FLAVOUR=tpu`)
#
# Builds with the classic builder of Docker 20.10 as well as with BuildKit. Stages that have pip and the network make parts
# of an environment: what the flavours share, what each adds, and this project. Stages that make an image only receive
# these. What pip needs on this machine (a proxy's certificates, an index) comes as build arguments that exist in the
# former only, so neither they nor a secret in them reach an image.
# The classic builder makes every stage above its target, so the flavours stand in the order of how often they are made.

# A release names its base by digest: `make image BASE=python:3.11-slim-bookworm@sha256:...`.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS tools
ARG PIP_CERT
ARG PIP_DEFAULT_TIMEOUT
ARG PIP_EXTRA_INDEX_URL
ARG PIP_INDEX_URL
ARG PIP_TRUSTED_HOST
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN apt-get update \
 && apt-get install -y --no-install-recommends binutils \
 && python -m venv /opt/venv
COPY requirements/build.txt requirements/install.sh requirements/sbom.py /src/requirements/
RUN /opt/venv/bin/pip install --require-hashes -r /src/requirements/build.txt

FROM tools AS common
COPY requirements/cpu.txt /src/requirements/
RUN sh /src/requirements/install.sh common cpu.txt

# This project alone, laid out to be copied over any flavour's environment: a change to it moves kilobytes, not gigabytes.
FROM tools AS program
COPY . /src
RUN /opt/venv/bin/pip install --no-build-isolation --no-deps --prefix=/opt/program /src \
 && mkdir -p /opt/recipes \
 && if [ -d /src/recipes ]; then cp -R /src/recipes /opt; fi

# What every flavour shares: who runs, and where. /tmp is HOME because it is the one place that is writable under any user,
# and under `--read-only --tmpfs /tmp`; Keras, Matplotlib and others keep their settings and caches there.
# TF_CPP_MIN_LOG_LEVEL is left to the program: it is quiet unless a user sets it. So are the variables that a TPU needs: the
# program sets them when a TPU is asked for, and an image that set them could not run on a CPU.
FROM ${BASE} AS runtime
RUN groupadd --gid 10001 funmatch \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin funmatch \
 && install -d -o 10001 -g 10001 /workspace
ENV HOME=/tmp \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /workspace
COPY --from=common /opt/venv /opt/venv
ENTRYPOINT ["python", "-m", "trainer.task"]

# A further flavour is two stages like these.
FROM common AS packages-cpu
COPY requirements/cpu.txt /src/requirements/
RUN sh /src/requirements/install.sh flavour cpu.txt

FROM runtime AS cpu
COPY --from=packages-cpu /opt/flavour /opt/venv
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

FROM common AS packages-tpu
COPY requirements/tpu.txt /src/requirements/
RUN sh /src/requirements/install.sh flavour tpu.txt

FROM runtime AS tpu
COPY --from=packages-tpu /opt/flavour /opt/venv
COPY --from=program /opt/program /opt/venv
COPY --from=program /opt/recipes /workspace/recipes
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="funmatch" \
      org.opencontainers.image.description="Function matching knowledge distillation in TensorFlow, on Cloud TPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 10001:10001

FROM common AS packages-gpu
COPY requirements/gpu.txt /src/requirements/
RUN sh /src/requirements/install.sh flavour gpu.txt

FROM runtime AS gpu
COPY --from=packages-gpu /opt/flavour /opt/venv
COPY --from=program /opt/program /opt/venv
COPY --from=program /opt/recipes /workspace/recipes
# NVIDIA's container runtime hands the driver in where it sees these.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="funmatch" \
      org.opencontainers.image.description="Function matching knowledge distillation in TensorFlow, on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 10001:10001

# What `docker build .` makes.
FROM cpu
