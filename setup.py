"""Packaging.

The folder ``kernels/`` is installed as ``onpo_fast.kernels``: the PyPI package ``kernels`` owns that name.
"""

from setuptools import setup

setup(
    name="onpo_fast",
    version="0.1.0",
    description="Optimistic Nash Policy Optimization: self-play alignment with a fused linear pairwise loss",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # The link onpo_fast/kernels serves a checkout and an editable install; package_dir serves wheels.
    packages=[
        "onpo_fast",
        "onpo_fast.config",
        "onpo_fast.games",
        "onpo_fast.integrations",
        "onpo_fast.kernels",
        "onpo_fast.memory",
        "onpo_fast.models",
        "onpo_fast.oracles",
        "onpo_fast.oracles.verdicts",
        "onpo_fast.prompts",
        "onpo_fast.reports",
        "onpo_fast.run",
        "onpo_fast.sampling",
        "onpo_fast.sampling.local",
        "onpo_fast.sampling.server",
        "onpo_fast.sampling.vllm",
        "onpo_fast.servers",
    ],
    package_dir={"onpo_fast.kernels": "kernels"},
    package_data={"onpo_fast": ["games/*.jinja", "reports/*.jinja"], "onpo_fast.prompts": ["*.jsonl"]},
    entry_points={"console_scripts": ["onpo-fast = onpo_fast.__main__:main"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "huggingface_hub",
        "safetensors",
        "filelock",
        "gguf",  # the embedded model is a GGUF file, which
        "accelerate",  # transformers loads with this
        "jsonargparse>=4.40",
        "docstring-parser",  # the docstrings of the options are their --help
        "pyyaml",
        "numpy",
        "scipy",
        "rich",
        "tensorboard",
        "matplotlib",
        "jinja2",
    ],
    extras_require={
        "data": ["datasets>=4"],  # parquet, saved datasets, datasets of the hub, the export of pairs
        "lora": ["peft>=0.20"],
        "wandb": ["wandb>=0.20"],
        "gpu": ["liger-kernel>=0.8.5", "flash-attn", "torchao>=0.18"],
        "server": ["openai>=3,<4", "tenacity>=9"],  # a server that samples, and
        "judge": ["openai>=3,<4", "tenacity>=9"],  # one that judges
        "trl": ["trl>=1.16,<2", "datasets"],  # which wants Python 3.11
        "bench-gpu": ["cut-cross-entropy", "quack-kernels"],
        "bench": ["pytest", "pytest-benchmark", "trl>=1.16,<2; python_version >= '3.11'", "liger-kernel>=0.8.5"],
        "dev": [
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "ruff",
            "datasets",
            "kernels",
            "peft",
            "torchao>=0.18",
            "hypothesis",
            "triton>=3.6",
            "wandb>=0.20",
            "openai>=3,<4",
            "tenacity>=9",
            "fastapi",
            "uvicorn",  # the judge, and `transformers serve` to test it on
        ],
    },
)
