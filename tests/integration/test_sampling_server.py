"""--sampler server: a scripted server around a real tiny model, and what it may do wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import servers as faults
from support.judging import raises
from support.sampling_server import SamplingServer
from support.servers import Error, Server

from onpo_fast import signals
from onpo_fast.config import Config, ModelConfig, SamplingConfig
from onpo_fast.data import Group
from onpo_fast.distributed import World
from onpo_fast.errors import UserError
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy, score
from onpo_fast.models.resident import ResidentPolicy
from onpo_fast.sampling import StageSampler, handover, open_sampler
from onpo_fast.sampling.server import reload
from onpo_fast.sampling.server import sampler as server_sampler
from onpo_fast.sampling.server.completions import refuses_type_of_prompt
from onpo_fast.sampling.server.unfinished import UnfinishedPart, remove_unfinished
from onpo_fast.servers import RequestRefused, ServerUnavailable, retries

PROMPTS = [[{"role": "user", "content": f"What is {i} plus {i}?"}] for i in range(4)]
NEW_TOKENS = 8


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.002)
    monkeypatch.setattr(retries, "LONGEST_WAIT", 0.05)
    monkeypatch.setattr(server_sampler, "PROBES", 4)
    monkeypatch.setattr(server_sampler, "PROBE_TOKENS", 4)


@pytest.fixture(scope="module")
def other_weights(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after a step of training: its log-probs differ by hundredths of a nat."""
    directory = tmp_path_factory.mktemp("other") / "model"
    policy = load(tiny_model, Config())
    with torch.no_grad():
        policy.model.lm_head.weight *= 1.01
    policy.save(directory)
    return directory


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.tiny_models import make_family

    directory = tmp_path_factory.mktemp("untied") / "model"
    make_family("llama", directory)
    return directory


@pytest.fixture
def model(policy: Policy) -> SamplingServer:
    return SamplingServer(policy)


@pytest.fixture
def server(model: SamplingServer) -> Iterator[Server]:
    with model.serving() as running:
        yield running


class Run:
    """A trainer's side: the policy and the options."""

    def __init__(self, source: Path, url: str, directory: Path | None = None, **options) -> None:
        lora = {name: options.pop(name) for name in ("lora_rank",) if name in options}
        self.policies = ResidentPolicy(Config(model=str(source), **lora).section(ModelConfig))
        self.source, self.directory = str(source), directory
        chosen = {"sampler_reload": "true", "max_new_tokens": NEW_TOKENS, "sampler_concurrency": 4, **options}
        self.config = SamplingConfig(sampler="server", sampler_url=url, **chosen)

    def sample(self, seed=(0, 7), prompts=PROMPTS, count=3, source: Path | None = None, **arguments) -> list[Group]:
        where = self.source if source is None else source
        sampler = open_sampler(self.policies, where, self.config, self.directory, World())
        try:
            return sampler(prompts, count, seed, lambda n: None, **arguments)
        finally:
            sampler.close()


def tokens(groups: list[Group]) -> list[list[list[int]]]:
    return [[response.tokens for response in group.responses] for group in groups]


def test_the_same_seed_gives_the_same_responses(tiny_model, server, model, policy) -> None:
    """Whatever the concurrency and the part; log-probs and texts are the policy's, groups come as they complete."""
    given: dict[int, Group] = {}
    run = Run(tiny_model, server.url)
    groups = run.sample(on_group=given.__setitem__)
    assert given == dict(enumerate(groups))
    assert len(set(model.seeds)) == len(model.seeds) == 12
    assert tokens(Run(tiny_model, server.url, sampler_concurrency=1).sample()) == tokens(groups)
    assert tokens(run.sample(prompts=PROMPTS[2:], first=2, on_group=given.__setitem__)) == tokens(groups[2:])
    assert given == dict(enumerate(groups))
    assert tokens(run.sample(seed=(0, 8))) != tokens(groups)
    scored = torch.cat(score(policy, groups, 1024))
    sampled = torch.tensor([r.logp for g in groups for r in g.responses], dtype=torch.float64)
    torch.testing.assert_close(sampled, scored.double(), atol=1e-3, rtol=0)
    for group, prompt in zip(groups, PROMPTS):
        assert group.prompt_tokens == policy.renderer.render(prompt)
        for response in group.responses:
            assert response.text == policy.tokenizer.decode(response.tokens, skip_special_tokens=True)
            assert response.stop_reason == ("eos" if response.tokens[-1] == 2 else "length")
            assert response.tokens[-1] == 2 or len(response.tokens) == NEW_TOKENS


def test_requests_ask_for_the_policy_itself(tiny_model, server, model) -> None:
    """Whatever defaults the server has, such as those of a generation_config.json."""
    Run(tiny_model, server.url, temperature=0.5, top_p=0.9).sample(count=1)
    body = model.asked[-1]
    expected = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "logprobs": 1}
    expected |= {"presence_penalty": 0, "frequency_penalty": 0, "stop_token_ids": [2], "ignore_eos": True}
    assert body.items() >= {**expected, "max_tokens": NEW_TOKENS, "model": "m"}.items()
    assert 0 <= body["seed"] < 2**63
    model.models[0]["owned_by"] = "sglang"  # which would stop at nothing
    Run(tiny_model, server.url).sample(count=1)
    assert model.asked[-1]["ignore_eos"] is False


@pytest.mark.parametrize("fault", ["break_off", "hang_up", "flood", "trickle", Error(503), b"{}", "malformed"])
def test_a_request_that_fails_is_tried_again(tiny_model, server, model, fault) -> None:
    """Nothing else is asked twice, and the responses are the same."""
    groups = Run(tiny_model, server.url).sample()
    model.asked.clear()
    answer = getattr(faults, fault) if isinstance(fault, str) and fault != "malformed" else fault
    spoilt = []

    def before(number: int, body: dict) -> object:
        return answer if number == begin + 7 and fault != "malformed" else None

    def change(reply: dict) -> dict:
        if fault == "malformed" and len(model.asked) == 7:
            spoilt.append(reply["choices"][0]["token_ids"].append(5))
        return reply

    begin, model.before, model.change = model.number, before, change
    assert tokens(Run(tiny_model, server.url, sampler_timeout=3.0).sample()) == tokens(groups)
    assert model.number - begin == 4 + 12 + 1
    assert sorted(set(model.seeds)) == sorted(model.seeds) or spoilt


def test_a_server_that_is_gone_and_comes_back(tiny_model, model, tmp_path) -> None:
    """Its port refuses connections meanwhile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    died = threading.Event()

    def before(number: int, body: dict) -> object:
        if died.is_set() and not back.is_set():
            return faults.hang_up
        if number == 9:
            died.set()
            return faults.hang_up
        return None

    back, model.before = threading.Event(), before
    run = Run(tiny_model, f"http://127.0.0.1:{port}/v1")
    result: list = []
    with model.serving(port):
        thread = threading.Thread(target=lambda: result.append(run.sample()))
        thread.start()
        assert died.wait(20)
    time.sleep(0.05)
    back.set()
    with model.serving(port):
        thread.join(30)
    assert len(result[0]) == 4
    assert len(set(model.seeds)) == len(model.seeds) == 12


def test_a_server_that_stays_away_loses_nothing(tiny_model, server, model, tmp_path) -> None:
    """What has come is in the run directory, and only the rest is asked for."""
    whole = Run(tiny_model, server.url).sample()
    model.asked.clear()
    begin = model.number
    model.before = lambda number, body: Error(503) if number >= begin + 11 else None
    with raises(ServerUnavailable, "3 tries"):
        Run(tiny_model, server.url, tmp_path, sampler_retries=2).sample()
    answered = model.seeds
    assert len(answered) == 7
    model.before = lambda number, body: None
    groups = Run(tiny_model, server.url, tmp_path).sample()
    assert tokens(groups) == tokens(whole)
    assert [r.logp for g in groups for r in g.responses] == [r.logp for g in whole for r in g.responses]
    assert len(model.seeds) == len(set(model.seeds)) == 12


def test_what_is_saved_is_not_trusted(tiny_model, server, model, tmp_path) -> None:
    """Lines cut off by a crash or of other requests are dropped; changed ones are found by the check."""
    run = Run(tiny_model, server.url, tmp_path)
    file = tmp_path / "unfinished_responses_0.jsonl"
    lines: list[str] = []
    whole = run.sample(on_group=lambda index, group: lines.extend(file.read_text().splitlines(keepends=True)))
    lines = lines[-12:]
    model.asked.clear()
    file.write_text("".join(lines[:5]) + "[]\n\n" + lines[5][: len(lines[5]) // 2])
    assert tokens(run.sample()) == tokens(whole)
    assert len(model.seeds) == 7
    huge = [lines[0].replace('"logp": -', f'"logp": -{10**400}'), lines[1].replace('"tokens": [', '"tokens": [true, ')]
    file.write_text("".join(huge + lines[2:]))
    model.asked.clear()
    assert tokens(run.sample()) == tokens(whole)
    assert len(model.seeds) == 2
    file.write_text(lines[0].replace('"logp": -', '"logp": -9') + "".join(lines[1:]))
    with pytest.raises(UserError, match="log-probs"):
        run.sample()


def test_a_part_that_is_not_recorded_is_not_asked_for_again(tiny_model, server, model, tmp_path) -> None:
    """Its responses stay until the stage's check, which comes when all parts are recorded; evaluating leaves them."""
    run = Run(tiny_model, server.url, tmp_path)
    file = tmp_path / "unfinished_responses_0.jsonl"
    whole = run.sample()
    assert file.exists()
    sampler = open_sampler(run.policies, run.source, run.config, tmp_path, World(), evaluation=True)
    sampler(PROMPTS, 1, (0, 9))
    sampler.close()
    remove_unfinished(tmp_path, evaluation=True)
    assert [path.name for path in tmp_path.glob("unfinished*")] == [file.name]
    model.asked.clear()
    stage = StageSampler(
        run.policies,
        run.source,
        run.config,
        lambda: open_sampler(run.policies, run.source, run.config, tmp_path, World()),
        tmp_path,
    )
    with stage:
        assert stage(PROMPTS, 3, (0, 7), lambda n: None) == whole
        assert len(model.asked) == 4  # the probes
        stage.check(whole)
    assert not file.exists()


def test_another_fit_at_the_same_path(tiny_model, other_weights, server, model, tmp_path) -> None:
    """What the old weights have said is not used."""
    source = tmp_path / "policy"
    shutil.copytree(tiny_model, source)
    Run(source, server.url, tmp_path).sample()
    shutil.rmtree(source)
    shutil.copytree(other_weights, source)
    model.load(source)
    model.asked.clear()
    Run(source, server.url, tmp_path).sample()
    assert len(model.seeds) == 12


def test_a_file_that_cannot_be_written(tiny_model, server, tmp_path) -> None:
    part = UnfinishedPart(tmp_path / "unfinished_responses_0.jsonl")
    part.begin([])
    part.close()
    part._file = open("/dev/full", "w")
    for act in (lambda: part.add("a", [1], -1.0), part.close):
        with pytest.raises(OSError, match="No space") as error:
            act()
        assert error.value.filename == str(part.path)


def test_a_share_without_prompts(tiny_model, server, model) -> None:
    """As that of a rank may be."""
    assert Run(tiny_model, server.url).sample(prompts=[]) == []
    assert not model.asked


def test_stale_weights_are_found_before_anything_is_asked_for(tiny_model, other_weights, server, model) -> None:
    """The reload command does nothing."""
    run = Run(tiny_model, server.url)
    run.sample()
    model.asked.clear()
    with pytest.raises(UserError, match="log-probs"):
        run.sample(source=other_weights)
    assert len(model.asked) == 4
    model.load(other_weights)
    run.sample(source=other_weights)


def test_a_server_that_is_restarted_with_other_weights(tiny_model, other_weights, server, model, tmp_path) -> None:
    """Midway: what it said before stays, what it says after is not used."""

    def before(number: int, body: dict) -> object:
        if number == 12:
            model.load(other_weights)
            return faults.hang_up
        return None

    model.before, right = before, model.policy
    with pytest.raises(UserError, match="log-probs"):
        Run(tiny_model, server.url, tmp_path, sampler_concurrency=1).sample()
    old = model.seeds[:8]  # six of them in groups that were handed on, two in one with others
    model.policy, model.before = right, lambda number, body: None
    model.asked.clear()
    groups = Run(tiny_model, server.url, tmp_path).sample()
    assert not set(model.seeds) & set(old)
    assert len(set(model.seeds)) == 4
    assert tokens(groups) == tokens(Run(tiny_model, server.url).sample())


def test_a_restart_late_in_a_long_group(tiny_model, other_weights, server, model, tmp_path, monkeypatch) -> None:
    """The only wrong response of a group is looked at, however many tokens the others have."""
    monkeypatch.setattr(server_sampler, "PROBES", 16)
    count, new_tokens = 80, 64  # so many that a choice of 4096 tokens misses the last response
    given: list[int] = []

    def before(number: int, body: dict) -> object:
        if number == 16 + count - 1:  # the last of the first group
            model.load(other_weights)
            return faults.hang_up
        return None

    model.before = before
    run = Run(tiny_model, server.url, tmp_path, sampler_concurrency=1, max_new_tokens=new_tokens)
    with pytest.raises(UserError, match="log-probs"):
        run.sample(prompts=PROMPTS[:2], count=count, on_group=lambda index, group: given.append(index))
    assert given == []
    lines = (tmp_path / "unfinished_responses_0.jsonl").read_text().splitlines()
    assert len(lines) == count - 1
    assert sum(len(json.loads(line)["tokens"]) for line in lines) > handover.CHECKED_TOKENS
    assert model.number == 16 + count + 16  # the first that failed, and 15 after the one that took its place


@pytest.mark.parametrize(("answer", "checks"), [(Error(429), 1), (b"{}", 1), (Error(502), 2), (faults.hang_up, 2)])
def test_what_counts_as_a_restart(tiny_model, server, model, monkeypatch, answer, checks: int) -> None:
    """A server that is busy, or whose reply is malformed, has not been restarted."""
    made: list[int] = []
    check = handover.check

    def counted(policy, groups, config, **options):
        made.append(len(groups))
        return check(policy, groups, config, **options)

    monkeypatch.setattr(handover, "check", counted)
    model.before = lambda number, body: answer if number == 6 else None
    Run(tiny_model, server.url).sample()
    assert made == [4] * checks


def test_other_tokens_are_found(tiny_model, server, model) -> None:
    """A server that returns other tokens than it has drawn."""

    def change(reply: dict) -> dict:
        choice = reply["choices"][0]
        choice["token_ids"] = [token if token == 2 else (token + 1) % 250 + 3 for token in choice["token_ids"]]
        return reply

    model.change = change
    with pytest.raises(UserError, match="log-probs"):
        Run(tiny_model, server.url).sample()


def test_another_tokenizer_is_found(tiny_model, server, model) -> None:
    def change(reply: dict) -> dict:
        reply["usage"]["prompt_tokens"] += 1
        return reply

    model.change = change
    with raises(UserError, server.url, "tokenizer"):
        Run(tiny_model, server.url).sample()
    assert len(model.asked) <= 4


def test_prompts_as_text(tiny_model, server, model) -> None:
    """Where the server takes no token ids."""
    groups = Run(tiny_model, server.url).sample()
    model.text_only = True
    assert tokens(Run(tiny_model, server.url).sample()) == tokens(groups)
    assert isinstance(model.asked[-1]["prompt"], str)

    def uncounted(reply: dict) -> dict:
        del reply["usage"], reply["choices"][0]["prompt_token_ids"]
        return reply

    model.change = uncounted
    with raises(UserError, "usage.prompt_tokens"):
        Run(tiny_model, server.url).sample()

    def a_truth(reply: dict) -> dict:
        reply["usage"]["prompt_tokens"] = True
        return reply

    model.change = a_truth  # no count
    with raises(UserError, "usage.prompt_tokens"):
        Run(tiny_model, server.url).sample()


@pytest.mark.parametrize(
    ("refusal", "of_type"),
    [
        ("prompt: Input should be a valid string", True),
        ("'prompt' must be a string, not list", True),
        ("token ids are not supported in prompt", True),
        (
            "This model's maximum context length is 64 tokens: reduce the length of the prompt (a list of token ids)",
            False,
        ),
        ("the prompt is longer than the maximum model length", False),
        ("the prompt is forbidden", False),
    ],
)
def test_refusals_of_prompts(refusal: str, of_type: bool) -> None:
    assert refuses_type_of_prompt(refusal) == of_type


def test_a_prompt_that_is_too_long_is_not_sent_as_text(tiny_model, server, model) -> None:
    model.before = lambda number, body: Error(400, "prompt is longer than the maximum model length")
    with raises(RequestRefused, server.url, "longer"):
        Run(tiny_model, server.url).sample()
    assert not any(isinstance(body["prompt"], str) for body in server.bodies if "prompt" in body)


def ids_as_words(reply: dict) -> dict:
    choice = reply["choices"][0]
    choice["logprobs"]["tokens"] = [f"token_id:{token}" for token in choice.pop("token_ids")]
    return reply


def test_tokens_by_their_names(tiny_model, server, model) -> None:
    """Of older versions of vLLM."""
    groups = Run(tiny_model, server.url).sample()
    model.change = ids_as_words
    assert tokens(Run(tiny_model, server.url).sample()) == tokens(groups)


def test_tokens_by_their_texts(tiny_model, server, model) -> None:
    """Only where each text is that of a single token: here those of bytes that are no characters are not."""
    model.refused = ("return_token_ids", "return_tokens_as_token_ids")
    with raises(UserError, server.url, "token ids"):
        Run(tiny_model, server.url).sample()
    reader = server_sampler.CompletionReader(None, load(tiny_model, Config()), SamplingConfig(sampling_batch_size=1))
    text = "plain <|im_end|>"
    ids = reader.tokenizer.encode(text)
    assert reader._find([reader.text_of([token]) for token in ids], text) == ids


@pytest.mark.parametrize("field", ["seed", "stop_token_ids", "ignore_eos", "skip_special_tokens", "add_special_tokens"])
def test_fields_that_are_left_out(tiny_model, server, model, field: str) -> None:
    """Where the server knows none, and samples from the same distribution without it."""
    model.refused = (field,)
    Run(tiny_model, server.url).sample()
    assert len(model.asked) == 4 + 12
    assert model.number <= 4 + 4 + 12  # once for each request at the beginning


@pytest.mark.parametrize("field", ["top_k", "repetition_penalty", "logprobs", "temperature"])
def test_fields_that_are_needed(tiny_model, server, model, field: str) -> None:
    model.refused = (field,)
    with raises(RequestRefused, server.url, field) as error:
        Run(tiny_model, server.url).sample()
    assert "sampler_request" not in str(error.value)


def no_logprobs(choice: dict) -> None:
    choice["logprobs"] = None


def cut_off(choice: dict) -> None:
    choice["finish_reason"] = "length"
    for column in (choice["token_ids"], choice["logprobs"]["token_logprobs"]):
        del column[2:]
    choice["token_ids"][:] = [7, 7]


def ended_elsewhere(choice: dict) -> None:
    choice["finish_reason"] = "stop"
    choice["token_ids"][-1] = 7


@pytest.mark.parametrize(
    ("spoil", "words"), [(no_logprobs, "log-probs"), (cut_off, "--max_new_tokens"), (ended_elsewhere, "token 7")]
)
def test_servers_that_cannot_be_used(tiny_model, server, model, spoil, words: str) -> None:
    """One line at once: no further try would help."""

    def change(reply: dict) -> dict:
        spoil(reply["choices"][0])
        return reply

    model.change = change
    with raises(UserError, server.url, words):
        Run(tiny_model, server.url).sample()
    assert model.number <= 4


def beyond(choice: dict) -> None:
    choice["token_ids"][0] = 272


def infinite(choice: dict) -> None:
    choice["logprobs"]["token_logprobs"][0] = float("nan")


def enormous(choice: dict) -> None:
    choice["logprobs"]["token_logprobs"][0] = -(10**400)


def summed_beyond_floats(choice: dict) -> None:
    choice["logprobs"]["token_logprobs"][:] = [-1e308] * len(choice["token_ids"])


def above_zero(choice: dict) -> None:
    choice["logprobs"]["token_logprobs"][0] = 3.0


def beyond_everything(choice: dict) -> None:
    choice["token_ids"][-1] = 10**400
    choice["finish_reason"] = "length"


def fewer(choice: dict) -> None:
    choice["logprobs"]["token_logprobs"].pop()


def boolean(choice: dict) -> None:
    choice["token_ids"][0] = True


def aborted(choice: dict) -> None:
    choice["finish_reason"] = "abort"


@pytest.mark.parametrize(
    "spoil",
    [beyond, beyond_everything, infinite, enormous, summed_beyond_floats, above_zero, fewer, boolean, aborted],
)
def test_nothing_in_a_reply_is_believed(tiny_model, server, model, spoil) -> None:
    def change(reply: dict) -> dict:
        spoil(reply["choices"][0])
        return reply

    model.change = change
    with raises(ServerUnavailable, server.url, "2 tries"):
        Run(tiny_model, server.url, sampler_retries=1).sample()


def test_the_key_is_not_shown(tiny_model, server, model, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-do-not-tell")
    model.before = lambda number, body: Error(401, "Incorrect key: sk-do-not-tell")
    with raises(RequestRefused, "$OPENAI_API_KEY", "[key]") as error:
        Run(tiny_model, server.url).sample()
    assert "sk-do-not-tell" not in str(error.value)
    assert server.headers[-1]["authorization"] == "Bearer sk-do-not-tell"


def test_the_name_of_the_model(tiny_model, server, model) -> None:
    with raises(UserError, "--sampler_model x", "m"):
        Run(tiny_model, server.url, sampler_model="x").sample()
    model.models.append({"id": "adapter", "parent": "m"})
    Run(tiny_model, server.url).sample(count=1)
    assert model.asked[-1]["model"] == "m"
    Run(tiny_model, server.url, sampler_model="adapter").sample(count=1)
    assert model.asked[-1]["model"] == "adapter"
    model.models.append({"id": "other"})
    with raises(UserError, "--sampler_model NAME", "m, adapter, other"):
        Run(tiny_model, server.url).sample()
    model.models[:] = [{"id": "m", "max_model_len": 20}]
    with raises(UserError, "20 tokens", "--max_new_tokens"):
        Run(tiny_model, server.url).sample()


# The hand-over --------------------------------------------------------------------------------------------------------


def test_the_command_is_told_the_policy(tiny_model, other_weights, server, model, tmp_path, monkeypatch) -> None:
    """Once for each policy; its output is in the run directory."""
    monkeypatch.chdir(tiny_model.parent)
    command = f'echo "policy: $ONPO_POLICY" && echo "$ONPO_POLICY" >> {tmp_path}/given'
    run = Run(Path(tiny_model.name), server.url, tmp_path, sampler_reload=command)
    run.sample(count=1)
    run.sample(count=1, seed=(0, 8))
    assert (tmp_path / "given").read_text().split() == [str(tiny_model)]
    model.load(other_weights)
    run.sample(count=1, source=other_weights)
    assert (tmp_path / "given").read_text().split() == [str(tiny_model), str(other_weights)]
    assert f"policy: {other_weights}" in (tmp_path / reload.RELOAD_LOG).read_text()


def test_a_command_that_fails(tiny_model, server, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-do-not-tell")
    with raises(UserError, "--sampler_reload", "status 3", "no room for [key]") as error:
        Run(tiny_model, server.url, tmp_path, sampler_reload='echo "no room for $OPENAI_API_KEY"; exit 3').sample()
    assert "tell" not in str(error.value)
    assert not model.asked


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda log: os.symlink(log.parent / "elsewhere", log)])
def test_a_log_that_is_no_file(tiny_model, server, tmp_path, make) -> None:
    """A FIFO would wait for a reader, and a link may lead anywhere."""
    log = tmp_path / reload.RELOAD_LOG
    make(log)
    with raises(UserError, str(log), "remove it"):
        Run(tiny_model, server.url, tmp_path).sample()
    assert not (tmp_path / "elsewhere").exists()


def is_running(process: int) -> bool:
    """Whether a process runs; one that has ended may wait for its parent to notice."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_command_that_waits_is_ended(tiny_model, server, tmp_path, monkeypatch) -> None:
    """By a signal, with what it has started."""
    command = f"sleep 60 & echo $! > {tmp_path}/started; wait"
    timer = threading.Timer(1.0, lambda: monkeypatch.setattr(signals, "_asked_by", 15))
    timer.start()
    with pytest.raises(signals.Stopped):
        Run(tiny_model, server.url, tmp_path, sampler_reload=command).sample()
    number = int((tmp_path / "started").read_text())
    deadline = time.monotonic() + 10
    while is_running(number):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_command_may_leave_a_server_behind(tiny_model, server, tmp_path) -> None:
    """A process in the background that keeps the command's output open is not waited for."""
    run = Run(tiny_model, server.url, tmp_path, sampler_reload=f"sleep 600 & echo $! > {tmp_path}/started")
    run.sample(count=1)
    number = int((tmp_path / "started").read_text())
    assert is_running(number)
    os.kill(number, signal.SIGKILL)


def test_vllms_own_reload(untied, server, model) -> None:
    """The weights first, then the prefix cache until it is dropped."""
    model.load(untied)
    Run(untied, server.url, sampler_reload="vllm").sample(count=1)
    names = [name for name, _ in model.calls]
    assert names == ["collective_rpc", "reset_prefix_cache", "reset_prefix_cache"]
    assert model.calls[0][1] == {"method": "reload_weights", "kwargs": {"weights_path": str(untied)}}


def test_vllms_own_reload_is_refused_for_tied_heads(tiny_model, server, model) -> None:
    with raises(UserError, "--sampler_reload vllm", "tied", "--sampler vllm"):
        Run(tiny_model, server.url, sampler_reload="vllm").sample()
    assert not model.calls


def test_a_server_without_vllms_calls(untied) -> None:
    with faults.serving(lambda body: Error(404, "Not Found")) as server:
        with raises(UserError, "--sampler_reload vllm", "VLLM_SERVER_DEV_MODE=1"):
            Run(untied, server.url, sampler_reload="vllm").sample()
        with raises(UserError, server.url, "404"):
            Run(untied, server.url).sample()


def test_adapters_are_loaded_under_fresh_names(tiny_model, server, model, tmp_path) -> None:
    """π_1 is the server's own model."""
    pytest.importorskip("peft")
    run = Run(tiny_model, server.url, sampler_reload="vllm", lora_rank=2)
    run.sample(count=1)
    assert model.asked[-1]["model"] == "m"
    assert not model.calls
    policy = run.policies.take(run.source, "seed")
    run.policies.save(tmp_path / "policy", policy)  # of an adapter that changes nothing yet
    run.sample(count=1, source=tmp_path / "policy")
    name, body = model.calls[-1]
    assert (name, body["lora_path"]) == ("load_lora_adapter", str(tmp_path / "policy"))
    assert model.asked[-1]["model"] == body["lora_name"]
    again = Run(tiny_model, server.url, sampler_reload="vllm", lora_rank=2)
    again.sample(count=1, source=tmp_path / "policy")
    assert model.calls[-1][1]["lora_name"] != body["lora_name"]
