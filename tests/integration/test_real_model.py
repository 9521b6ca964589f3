"""What only a real model and its tokenizer show: SmolLM2-135M-Instruct, loaded from its GGUF file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onpo_fast import data
from onpo_fast.config import Config, SamplingConfig
from onpo_fast.errors import UserError
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy, score
from onpo_fast.packing import pack
from onpo_fast.sampling import LocalSampler
from onpo_fast.sampling.draw import Draw

PACKED = [
    ([10, 11, 12], [[20, 21, 22, 23], [30], [], [40, 41]]),
    ([10, 50, 51, 52, 53], [[60, 61], [70, 71, 72]]),
]


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def hidden_alone(policy: Policy, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Hidden states that predict the response, from a call on a row of its own."""
    hidden = policy.model.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
    return hidden[len(prompt) - 1 : len(prompt) + len(response) - 1]


@torch.no_grad()
@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_hidden_states_of_the_real_model(real_policy: Policy, layout: str) -> None:
    packed = pack(PACKED, layout)
    got = real_policy.scoring.hidden_states(packed)
    want = torch.cat([hidden_alone(real_policy, prompt, y) for prompt, responses in PACKED for y in responses])
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4 * float(want.std()))
    assert packed.targets.tolist() == [t for _, responses in PACKED for y in responses for t in y]
    assert packed.cu_seqlens.tolist() == [0, 4, 5, 5, 7, 9, 12]
    assert packed.cu_seqlens.dtype == torch.int32


def test_some_responses_end_by_themselves(real_policy: Policy) -> None:
    prompt = [[{"role": "user", "content": "Answer with one word: is water wet?"}]]
    sampler = LocalSampler(real_policy, SamplingConfig(max_new_tokens=24, sampling_batch_size=8))
    reasons = {r.stop_reason for r in sampler(prompt, 12, [0])[0].responses}
    assert "eos" in reasons


def test_greedy_tokens_are_those_of_transformers(real_policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token, of prompts of different lengths in fewer rows."""

    def greedy(self: Draw, logits: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> tuple:
        best = logits.argmax(1)
        return best, logits.log_softmax(1).gather(1, best[:, None])[:, 0]

    monkeypatch.setattr(Draw, "__call__", greedy)
    prompts = [
        [user(text)] for text in ("Name a fruit.", "Why is the sky blue?", "Is water wet?", "Count to five. " * 9)
    ]
    for group in LocalSampler(real_policy, SamplingConfig(max_new_tokens=32, sampling_batch_size=3))(prompts, 1, [0]):
        row = torch.tensor([group.prompt_tokens])
        want = real_policy.model.generate(
            row, do_sample=False, max_new_tokens=32, eos_token_id=real_policy.eos_tokens, pad_token_id=0
        )
        assert group.responses[0].tokens == want[0, row.shape[1] :].tolist()


def test_the_number_of_rows_changes_no_token(real_policy: Policy) -> None:
    """64 responses at once, 7, and one; the log-probs are the scorer's."""
    prompts = [[user(text)] for text in ("Name a fruit.", "Why is the sky blue?", "Is water wet?", "Count. " * 9)]

    def sample(size: int, prompts: list[data.Messages]) -> list[data.Group]:
        return LocalSampler(real_policy, SamplingConfig(max_new_tokens=3, sampling_batch_size=size))(prompts, 16, [5])

    groups = sample(64, prompts)
    want = [[r.tokens for r in group.responses] for group in groups]
    assert len({tuple(tokens) for group in want for tokens in group}) > 32
    assert [[r.tokens for r in group.responses] for group in sample(7, prompts)] == want
    assert [r.tokens for r in sample(1, prompts[:1])[0].responses] == want[0]
    for group, scores in zip(groups, score(real_policy, groups, 4000)):
        torch.testing.assert_close(torch.tensor([r.logp for r in group.responses]).double(), scores, rtol=0, atol=1e-3)


def test_a_prompt_of_megabytes_is_never_tokenised_whole(real_policy, monkeypatch) -> None:
    asked = []
    encode = type(real_policy.tokenizer)._encode_plus

    def watched(self, text, *arguments, **options):
        asked.append(len(text))
        return encode(self, text, *arguments, **options)

    monkeypatch.setattr(type(real_policy.tokenizer), "_encode_plus", watched)
    for text in ("word " * 10**6, "x" * 5 * 10**6, "\u4e16" * 10**6):
        with pytest.raises(UserError, match="has more than 8190 tokens: with --max_new_tokens 2 it exceeds the"):
            real_policy.renderer.render(data.Prompt([user(text)]), 2)
    assert max(asked) == 2**16
    skipped = data.Skipped()
    assert real_policy.renderer.usable([[user("Hi")], [user("word " * 10**6)]], 2, skipped) == [[user("Hi")]]
    assert skipped.count == 1
    blanks = [user("Hi" + " " * 200_000)]  # many characters, few tokens
    assert len(real_policy.renderer.render(blanks, 2)) < 8190


def test_pieces_do_not_refuse_what_fits(real_policy) -> None:
    """The limit is met to 1%, whatever the text."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(data.__file__).parent.glob("*.py")))
    for sample in (text[:300_000], text.replace(" ", "")[:200_000], "\u4e16\u754c " * 50_000, " " * 200_000):
        count = len(real_policy.tokenizer.encode(sample, add_special_tokens=False))
        assert not real_policy.renderer.has_more_tokens(sample, count)
        assert real_policy.renderer.has_more_tokens(sample, int(0.97 * count) - 300)


@pytest.mark.long
def test_a_run_of_the_default_model(tmp_path: Path) -> None:
    """As a user starts it, from the file in the wheel; no library writes to stderr, beside the lines of errors."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "What is {i} plus {i}?"}}\n' for i in range(6)))
    options = ["--iterations=1", "--prompts_per_iteration=2", "--responses_per_prompt=2", "--max_new_tokens=6"]
    line = [sys.executable, "-m", "onpo_fast.train", "--prompts=prompts.jsonl", "--out=out", "--eval_samples=1"]
    done = subprocess.run([*line, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "π_2 wins against π_1 in" in done.stdout
    records = [json.loads(record) for record in (tmp_path / "out/metrics.jsonl").read_text("utf-8").splitlines()]
    (iteration,) = [record for record in records if record["stage"] == "iteration"]
    assert abs(iteration["kl_to_initial"]) < 1e-3
    first = [record for record in records if record["stage"] == "fit" and record["step"] == 1]
    assert [record["fit"] for record in first] == ["auxiliary", "policy"]
    assert all(abs(record["margin"]) < 1e-3 for record in first)
    assert (tmp_path / "out/report.html").is_file()
    fitted = load(tmp_path / "out/iteration_01/policy", Config())
    assert fitted.tokenizer.chat_template
