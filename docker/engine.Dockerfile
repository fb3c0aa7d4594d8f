# An engine on NVIDIA GPUs: vLLM's own image, and our plugin beside it. vLLM brings all that the plugin needs.
#   docker build -f docker/engine.Dockerfile -t reft-serve-engine:0.2.0 .
# Pin the bases by their digests: --build-arg VLLM_IMAGE=vllm/vllm-openai:v0.32.0@sha256:... (and PYTHON_IMAGE)
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY requirements/build.txt requirements/
RUN pip install --no-deps --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY reft_serve reft_serve
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${VLLM_IMAGE}
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="reft-serve-engine" \
      org.opencontainers.image.description="vLLM with the reft-serve plugin: many ReFT adapters over one base model" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 0
RUN groupadd --gid 10001 reft && useradd --uid 10001 --gid reft --no-create-home --home-dir /var/cache/reft-serve reft \
    && install -d -o reft -g reft /var/lib/reft-serve/adapters /var/cache/reft-serve /models
COPY --from=build /wheels /tmp/wheels
# The second line fails the build where vLLM has stopped to bring something that the plugin imports.
RUN python3 -m pip install --no-cache-dir --no-deps /tmp/wheels/*.whl && rm -r /tmp/wheels \
    && python3 -c "import reft_serve.cli.serve, reft_serve.engine.launch.plan, reft_serve.adapters.importers.detection"
ENV HOME=/var/cache/reft-serve VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 PYTHONUNBUFFERED=1
USER 10001:10001
VOLUME ["/var/lib/reft-serve/adapters", "/var/cache/reft-serve", "/tmp"]
EXPOSE 8000
# The first start loads and compiles the model.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20m --retries=6 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["reft-serve"]
CMD ["serve", "/models/base", "--host", "0.0.0.0", "--port", "8000", "--enable-lora", "--shutdown-timeout", "60"]
