"""vLLM's own offline throughput: run by a Python that has vLLM, without this package.

    PYTHON bench/vllm_offline.py RESULT < JOB

JOB is a JSON object: "model" (a directory), "dtype", "prompts" (token ids), "n" responses to each, "max_tokens",
"stop_token_ids", "times". RESULT is the file that the result is written to, as JSON. vLLM samples at temperature 1,
without penalties and truncation, all requests at once.
"""

import json
import resource
import sys
import time


def main() -> None:
    job = json.load(sys.stdin)
    began = time.perf_counter()
    from vllm import LLM, SamplingParams
    from vllm import __version__ as version

    llm = LLM(model=job["model"], dtype=job["dtype"], skip_tokenizer_init=True, seed=0)
    ready = time.perf_counter()
    requests = [{"prompt_token_ids": tokens} for tokens in job["prompts"]]
    common = {"temperature": 1.0, "detokenize": False, "ignore_eos": True, "stop_token_ids": job["stop_token_ids"]}
    llm.generate(requests[:1], SamplingParams(max_tokens=4, **common), use_tqdm=False)  # warm-up
    runs = []
    for i in range(job["times"]):
        params = SamplingParams(n=job["n"], max_tokens=job["max_tokens"], seed=i, logprobs=0, **common)
        start = time.perf_counter()
        outputs = llm.generate(requests, params, use_tqdm=False)
        lengths = [len(one.token_ids) for output in outputs for one in output.outputs]
        runs.append({"seconds": time.perf_counter() - start, "tokens": sum(lengths), "lengths": lengths})
    largest = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result = {"version": version, "start_seconds": ready - began, "runs": runs, "peak_bytes": max(largest)}
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
