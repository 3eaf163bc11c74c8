# The command in an image. CPU by default: torch without its CUDA libraries (over 3 GB less); TORCH=cuda keeps them.
FROM python:3.11-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# OpenCV's two system libraries; everything else comes as wheels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/wsi-idc
COPY requirements.lock pyproject.toml README.md LICENSE ./
ARG TORCH=cpu
# What the commands need, at the versions of the lock, without the development tools that it has too.
# Compiled here, once: the user below cannot write, and each start would compile half a second's worth again.
RUN pip install --no-cache-dir "$(grep '^uv==' requirements.lock)" \
    && if [ "$TORCH" = cuda ]; then set --; else set -- --torch-backend cpu; fi \
    && uv pip install --system --no-cache --compile-bytecode --constraint requirements.lock "$@" -r pyproject.toml
COPY wsi_idc ./wsi_idc
RUN pip install --no-cache-dir --no-deps . \
    && useradd --create-home --uid 1000 wsi

USER 1000
WORKDIR /data
ENTRYPOINT ["wsi-idc"]
CMD ["--help"]
