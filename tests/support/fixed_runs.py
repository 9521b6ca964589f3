"""Runs whose final weights are known bit for bit: a tiny random model, a fixed seed, one thread.

``cd tests && python -m support.fixed_runs`` prints the SHA-256 of the final weights of every run in ``RUNS``. The
committed table, ``fixed_runs.json``, was printed by the code of commit 5d1b279. Each run is a process of its own, with
the instructions that every x86-64 processor has, so that Intel and AMD machines compute the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .tiny_models import make_model

TABLE = Path(__file__).with_name("fixed_runs.json")
RUNS = {
    "onpo": [],
    "onpo, direct second fit": ["--second_fit", "direct"],
    "onpo, fits that start from the policy": ["--fit_start", "policy"],
    "onpo, live anchor": ["--anchor", "live"],
    "onpo, sampled labels, best-worst pairs": ["--labels", "bits", "--pairing", "best_worst"],
    "omd": ["--objective", "omd"],
    "inpo": ["--objective", "inpo"],
    "ipo": ["--objective", "ipo"],
    "dpo": ["--objective", "dpo"],
}
OPTIONS = [
    "--iterations=2",
    "--prompts_per_iteration=6",
    "--responses_per_prompt=3",
    "--max_new_tokens=10",
    "--seed=7",
    "--learning_rate=1e-3",
    "--batch_pairs=6",
    "--eval_samples=1",
    "--report_to=none",
    "--device=cpu",
    "--tokens_per_microbatch=256",
    "--sampling_batch_size=8",
]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "HF_HUB_OFFLINE": "1",
}


def weights_digest(policy: Path) -> str:
    """SHA-256 of a saved policy's tensors, by name, whatever the file around them says."""
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(policy / "model.safetensors").items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def run(name: str, folder: Path) -> str:
    """Trains the run of this name in a process of its own; returns the digest of its final weights."""
    model, prompts, out = folder / "model", folder / "prompts.jsonl", folder / name.replace(" ", "_")
    if not model.exists():
        make_model(model)
        lines = (json.dumps({"prompt": f"Say {i} words about {i * i}."}) + "\n" for i in range(16))
        prompts.write_text("".join(lines))
    command = [sys.executable, "-m", "onpo_fast.train", f"--model={model}", f"--prompts={prompts}", f"--out={out}"]
    subprocess.run([*command, *OPTIONS, *RUNS[name]], env=os.environ | ENVIRONMENT, check=True, capture_output=True)
    return weights_digest(out / "iteration_02" / "policy")


def main() -> None:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        table = {name: run(name, Path(folder)) for name in RUNS}
    print(json.dumps({"torch": torch.__version__.partition("+")[0], "sha256": table}, indent=1))


if __name__ == "__main__":
    main()
