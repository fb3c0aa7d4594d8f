# A training worker. The same file makes both: CUDA as it is, CPU with --build-arg TORCH_BACKEND=cpu.
#   docker build -f docker/trainer.Dockerfile -t reft-serve-trainer:0.2.0 .
# Pin the base by its digest: --build-arg PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH=2.13.0
ARG TORCH_BACKEND=cuda
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_NO_CACHE=1
WORKDIR /build
COPY requirements/build.txt requirements/train.txt requirements/train-cpu.txt requirements/
# CUDA: the lock has torch with its libraries. CPU: torch comes from PyTorch's own index, the rest from a lock without CUDA.
RUN pip install --no-deps --require-hashes -r requirements/build.txt && uv venv --python /usr/local/bin/python /opt/venv \
    && if [ "${TORCH_BACKEND}" = cpu ]; then lock=train-cpu \
    && uv pip install --python /opt/venv --no-deps --torch-backend cpu "torch==${TORCH}+cpu"; else lock=train; fi \
    && uv pip install --python /opt/venv --no-deps --require-hashes -r "requirements/${lock}.txt"
COPY pyproject.toml README.md LICENSE ./
COPY reft_serve reft_serve
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && uv pip install --python /opt/venv --no-deps /wheels/*.whl
RUN mv /opt/venv/lib/python3.12/site-packages/reft_serve/demo/model /demo-model \
    && ln -s /models/demo /opt/venv/lib/python3.12/site-packages/reft_serve/demo/model

FROM ${PYTHON_IMAGE}
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="reft-serve-trainer" \
      org.opencontainers.image.description="Training worker of reft-serve: trains ReFT adapters on uploaded data" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 reft && useradd --uid 10001 --gid reft --no-create-home --home-dir /var/cache/reft-serve reft \
    && install -d -o reft -g reft /var/lib/reft-serve/adapters /var/lib/reft-serve/blobs /var/lib/reft-serve/work /var/cache/reft-serve /models
COPY --from=build /opt/venv /opt/venv
COPY --from=build /demo-model /models/demo
ENV PATH=/opt/venv/bin:$PATH HOME=/var/cache/reft-serve PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
VOLUME ["/var/lib/reft-serve/adapters", "/var/lib/reft-serve/blobs", "/var/lib/reft-serve/work", "/var/cache/reft-serve", "/tmp"]
EXPOSE 8090
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=6 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8090/health/live', timeout=4)"]
ENTRYPOINT ["reft-serve"]
CMD ["worker", "--host", "0.0.0.0", "--port", "8090"]
