"""Runs whose final weights are known bit for bit: a tiny random model, a fixed seed, one thread.

``cd tests && python -m support.fixed_runs [NAME …]`` prints the SHA-256 of the final weights of these runs, or of all
in ``RUNS``. The committed table, ``fixed_runs.json``, was printed by the commit that last changed it. Runs use the
instructions that every x86-64 processor has, so that Intel and AMD machines compute the same bits. Each is a process of
its own, forked from one that has imported everything, which takes longer than the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
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


def digests(*names: str) -> dict:
    """Trains these runs, or all, under ``ENVIRONMENT``; returns a table as ``fixed_runs.json`` has it."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    line = [sys.executable, "-m", "support.fixed_runs", *names]
    done = subprocess.run(line, cwd=tests, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def _fork(arguments: list[str]) -> int:
    """Trains in a forked process, whose output goes to stderr; returns its exit status."""
    from onpo_fast import train

    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        os.dup2(2, 1)
        train.main(arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def main(names: list[str]) -> None:
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        print(json.dumps(digests(*names), indent=1))
        return

    import torch

    table = {}
    with tempfile.TemporaryDirectory() as folder:
        model, prompts = Path(folder, "model"), Path(folder, "prompts.jsonl")
        make_model(model)
        lines = (json.dumps({"prompt": f"Say {i} words about {i * i}."}) + "\n" for i in range(16))
        prompts.write_text("".join(lines))
        for name in names or RUNS:
            out = Path(folder, name.replace(" ", "_"))
            arguments = [f"--model={model}", f"--prompts={prompts}", f"--out={out}", *OPTIONS, *RUNS[name]]
            if status := _fork(arguments):
                sys.exit(f"the run {name} ended with exit status {status}")
            table[name] = weights_digest(out / "iteration_02" / "policy")
    print(json.dumps({"torch": torch.__version__.partition("+")[0], "sha256": table}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
