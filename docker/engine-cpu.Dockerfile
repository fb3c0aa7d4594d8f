# An engine without a GPU: vLLM's CPU build, our plugin, and a small model in /models/demo. For trials and for CI.
#   docker build -f docker/engine-cpu.Dockerfile -t reft-serve-engine-cpu:0.2.0 .
# Pin the base by its digest: --build-arg PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH=2.13.0
ARG TORCH_BACKEND=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_NO_CACHE=1
WORKDIR /build
COPY requirements/build.txt requirements/cpu.txt requirements/
RUN pip install --no-deps --require-hashes -r requirements/build.txt && uv venv --python /usr/local/bin/python /opt/venv \
    && uv pip install --python /opt/venv --no-deps --torch-backend "${TORCH_BACKEND}" "torch==${TORCH}+cpu" \
    && uv pip install --python /opt/venv --no-deps --require-hashes -r requirements/cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY reft_serve reft_serve
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && uv pip install --python /opt/venv --no-deps /wheels/*.whl
RUN mv /opt/venv/lib/python3.12/site-packages/reft_serve/demo/model /demo-model \
    && ln -s /models/demo /opt/venv/lib/python3.12/site-packages/reft_serve/demo/model

FROM ${PYTHON_IMAGE}
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="reft-serve-engine-cpu" \
      org.opencontainers.image.description="vLLM's CPU build with the reft-serve plugin and a small model" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# vLLM compiles kernels for the machine it finds: it needs a compiler while it runs. Debian's releases are not pinned here,
# as old ones cannot be fetched any more; the base image's digest says which they were.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ libnuma1 && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 reft && useradd --uid 10001 --gid reft --no-create-home --home-dir /var/cache/reft-serve reft \
    && install -d -o reft -g reft /var/lib/reft-serve/adapters /var/cache/reft-serve /models
COPY --from=build /opt/venv /opt/venv
COPY --from=build /demo-model /models/demo
ENV PATH=/opt/venv/bin:$PATH HOME=/var/cache/reft-serve VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 PYTHONUNBUFFERED=1
USER 10001:10001
VOLUME ["/var/lib/reft-serve/adapters", "/var/cache/reft-serve", "/tmp"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=6 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["reft-serve"]
CMD ["serve", "/models/demo", "--host", "0.0.0.0", "--port", "8000", "--enable-lora", "--shutdown-timeout", "60"]
