# The gateway, its administration and its migrations: neither torch nor vLLM.
#   docker build -f docker/gateway.Dockerfile -t reft-serve-gateway:0.2.0 .
# Pin the base by its digest: --build-arg PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY requirements/build.txt requirements/gateway.txt requirements/
RUN pip install --no-deps --require-hashes -r requirements/build.txt && python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-deps --require-hashes -r requirements/gateway.txt
COPY pyproject.toml README.md LICENSE ./
COPY reft_serve reft_serve
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/venv/bin/pip install --no-deps /wheels/*.whl && /opt/venv/bin/pip uninstall --yes pip \
    && rm -rf /opt/venv/lib/python3.*/site-packages/reft_serve/demo/model

FROM ${PYTHON_IMAGE}
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="reft-serve-gateway" \
      org.opencontainers.image.description="OpenAI-compatible gateway for many ReFT adapters over one base model" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 reft && useradd --uid 10001 --gid reft --no-create-home --home-dir /tmp reft \
    && install -d -o reft -g reft /var/lib/reft-serve/adapters /var/lib/reft-serve/blobs
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
# All that it writes; the rest of the file system may be read-only.
VOLUME ["/var/lib/reft-serve/adapters", "/var/lib/reft-serve/blobs", "/tmp"]
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health/live', timeout=4)"]
ENTRYPOINT ["reft-serve"]
CMD ["gateway", "--host", "0.0.0.0", "--port", "8080"]
