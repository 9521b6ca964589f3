"""vLLM's own offline throughput: run by a Python that has vLLM, without this package.

    PYTHON bench/vllm_offline.py RESULT < JOB

JOB is a JSON object: "model" (a directory), "dtype", "prompts" (token ids), "n" responses to each, "max_tokens",
"stop_token_ids", "times", "cache_bytes" (of the KV cache, or null). RESULT is the file that the result is written to,
as JSON. vLLM samples at temperature 1, without penalties and truncation, all requests at once.
"""

import json
import sys
import time


def main() -> None:
    job = json.load(sys.stdin)
    began = time.perf_counter()
    import torch
    from vllm import LLM, SamplingParams
    from vllm import __version__ as version

    before = resident_bytes("VmRSS")
    arguments = {"model": job["model"], "dtype": job["dtype"], "skip_tokenizer_init": True, "seed": 0}
    if job["cache_bytes"]:
        arguments["kv_cache_memory_bytes"] = job["cache_bytes"]
    llm = LLM(**arguments)
    ready = time.perf_counter()
    requests = [{"prompt_token_ids": tokens} for tokens in job["prompts"]]
    common = {"temperature": 1.0, "detokenize": False, "ignore_eos": True, "stop_token_ids": job["stop_token_ids"]}
    llm.generate(requests[:1], SamplingParams(max_tokens=4, **common), use_tqdm=False)  # warm-up
    runs = []
    for _ in range(job["times"]):
        params = SamplingParams(n=job["n"], max_tokens=job["max_tokens"], logprobs=0, **common)
        start = time.perf_counter()
        outputs = llm.generate(requests, params, use_tqdm=False)
        lengths = [len(one.token_ids) for output in outputs for one in output.outputs]
        runs.append({"seconds": time.perf_counter() - start, "tokens": sum(lengths), "lengths": lengths})
    peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else resident_bytes("VmHWM") - before
    result = {"version": version, "start_seconds": ready - began, "runs": runs, "peak_bytes": peak}
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(result, file)


def resident_bytes(kind: str) -> int:
    """Bytes of this process in memory: now ("VmRSS"), or at most so far ("VmHWM"). Linux."""
    with open("/proc/self/status", encoding="ascii") as status:
        (line,) = (line for line in status if line.startswith(f"{kind}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
