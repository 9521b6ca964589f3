"""Runs whose final weights are known bit for bit: a tiny random model, a fixed seed, one thread.

``python tests/support/fixed_runs.py`` prints the SHA-256 of the final weights of every run in ``RUNS``. The committed
table, ``fixed_runs.json``, was printed by the code of commit 5d1b279. Each run is a process of its own, with the
instructions that every x86-64 processor has, so that Intel and AMD machines compute the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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


def make_model(directory: Path) -> None:
    """A Llama of two layers whose weights come from a generator of integers, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[2])
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randint(-100, 101, parameter.shape, generator=generator) / 256
            parameter.copy_(1 + values / 4 if parameter.dim() == 1 else values)
    model.save_pretrained(directory)


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
