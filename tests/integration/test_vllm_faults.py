"""--sampler vllm against engines that die, hang or return what they were not asked for."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from support import small_runs
from support.vllm_engines import ends, make_uniform, parts, start_run, wait_for, write_engine, write_vllm

from onpo_fast import signals
from onpo_fast.config import Config, ModelConfig, SamplingConfig
from onpo_fast.data import read_groups
from onpo_fast.errors import UserError
from onpo_fast.models.resident import ResidentPolicy
from onpo_fast.opening import open_run
from onpo_fast.sampling import open_sampler
from onpo_fast.sampling.vllm import process as vllm_process
from onpo_fast.sampling.vllm.process import child_environment

PROMPTS = [[{"role": "user", "content": f"What is {i} plus {i}?"}] for i in range(4)]


@pytest.fixture(scope="module")
def policies(tiny_model: Path) -> ResidentPolicy:
    return ResidentPolicy(Config(model=str(tiny_model)).section(ModelConfig))


def sampler_of(policies: ResidentPolicy, python: str, directory: Path, **options):
    config = SamplingConfig(max_new_tokens=6, sampling_batch_size=4, sampler="vllm", vllm_python=python, **options)
    return open_sampler(policies, policies.initial, config, directory)


def sample(policies: ResidentPolicy, python: str, directory: Path, **options) -> list:
    sampler = sampler_of(policies, python, directory, **options)
    try:
        return sampler(PROMPTS, 3, [5], lambda n: None)
    finally:
        sampler.close()


def test_responses_come_by_prompt_as_they_end(policies, tmp_path) -> None:
    """They arrive in another order; a part of the prompts gets the responses that it has in the whole."""
    python = write_engine(tmp_path / "python")
    sampler, done, seen = sampler_of(policies, python, tmp_path), [], {}
    whole = sampler(PROMPTS, 3, [5], done.append, on_group=seen.__setitem__)
    assert policies.policy is None  # its memory is the engine's
    process = sampler.process.process
    part = sampler(PROMPTS[2:], 3, [5], done.append, first=2)
    assert sampler.process.process is process  # one engine for all parts of a stage
    sampler.close()
    sampler.close()
    assert process.poll() is not None
    assert part == whole[2:]
    assert seen == dict(enumerate(whole))
    assert list(seen) == [3, 2, 1, 0]
    assert sum(done) == 4 * 3 + 2 * 3
    assert len({tuple(r.tokens) for group in whole for r in group.responses}) == 12  # a seed for each response
    endings = {(r.stop_reason, r.tokens[-1] == 2) for group in whole for r in group.responses}
    assert endings == {("eos", True), ("length", False)}
    policy = policies(policies.initial)
    for group in whole:
        for response in group.responses:
            assert response.text == policy.tokenizer.decode(response.tokens, skip_special_tokens=True)
            assert response.logp == pytest.approx(-5.5 * len(response.tokens))
    assert "loading" in (tmp_path / "vllm.log").read_text()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("response['tokens'][0] = 272", "vocabulary"),
        ("response['tokens'][0] = -1", "vocabulary"),
        ("response['tokens'][0] = 3.0", "integers"),
        ("response['tokens'][0] = 10**400", "vocabulary"),
        ("send(index=10**400, **response)", "not asked for"),
        ("with_parent.sendall(b'1' * 5000 + b'\\n')", "no message"),
        ("response['tokens'] = []; response['logps'] = []", "0 tokens"),
        ("response['tokens'] += [5]; response['logps'] += [-1.0]; response['reason'] = 'length'", "tokens"),
        ("response.update(tokens=[5], logps=[-1.0], reason='length')", "cut off at 1"),
        ("response.update(tokens=[5], logps=[-1.0], reason='stop')", "end-of-sequence"),
        ("response.update(tokens=[2, 5], logps=[-1.0, -1.0])", "end-of-sequence"),
        ("response.update(tokens=[2], logps=[-1.0], reason='length')", "end"),
        ("response['reason'] = 'abort'", "abort"),
        ("response['logps'].pop()", "log-prob"),
        ("response['logps'][0] = float('nan')", "log-prob"),
        ("response['logps'][0] = None", "log-prob"),
        ("response['logps'][0] = -(10**400)", "log-prob"),
        ("if index == 3: send(index=4, **response)", "not asked for"),
        ("send(index=99, **response)", "not asked for"),
        ("with_parent.sendall(b'hello\\n')", "no message"),
        ("with_parent.sendall(b'[1]\\n')", "no message"),
        ("send(kind='sample', error='RuntimeError: no more')", "failed while it sampled: RuntimeError: no more"),
        ("with_parent.sendall(b'[' * 100000 + b'\\n')", "no message"),
        ("with_parent.close(); lines.close(); time.sleep(60)", "vllm.log"),
        ("sys.exit(3)", "status 3"),
        ("os.kill(os.getpid(), 9)", "SIGKILL"),
    ],
)
def test_what_was_not_asked_for_stops_the_run(fault: str, message: str, policies, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(vllm_process, "END_SECONDS", 1)
    with pytest.raises(UserError, match=message) as raised:
        sample(policies, write_engine(tmp_path / "python", change=fault), tmp_path)
    assert "vLLM" in str(raised.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("send(kind='import', error=\"No module named 'vllm'\"); time.sleep(60)", "--vllm_python.*make vllm-env"),
        ("send(kind='start', error='ValueError: no such architecture'); time.sleep(60)", "no such architecture"),
        ("send(kind='start', error='CUDA out of memory'); time.sleep(60)", "--vllm_options.*kv_cache_memory_bytes"),
        ("print('the last words', flush=True); sys.exit(1)", "status 1.*the last words.*vllm.log"),
        ("send(ready='0'); time.sleep(60)", "max_model_len"),
        ("send(ready='0', max_model_len=20); time.sleep(60)", "max_model_len"),
    ],
)
def test_an_engine_that_does_not_start(fault: str, message: str, policies, tmp_path) -> None:
    with pytest.raises(UserError, match=message):
        sample(policies, write_engine(tmp_path / "python", at_start=fault), tmp_path)


def test_a_python_without_vllm(policies, tmp_path) -> None:
    with pytest.raises(UserError, match=r"cannot import vLLM.*--vllm_python.*make vllm-env"):
        sample(policies, sys.executable, tmp_path)
    with pytest.raises(UserError, match=r"--vllm_python .*nowhere"):
        sample(policies, str(tmp_path / "nowhere"), tmp_path)


def test_a_run_finds_at_once_that_there_is_no_vllm(policies, tmp_path, write_lines) -> None:
    prompts = write_lines("prompts.jsonl", *({"prompt": f"What is {i}?"} for i in range(10)))
    (tmp_path / "fails").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "fails").chmod(0o755)
    files = {"model": str(policies.initial), "prompts": str(prompts), "out": str(tmp_path / "run")}
    for python in (sys.executable, str(tmp_path / "nowhere"), str(tmp_path / "fails"), str(tmp_path)):
        with pytest.raises(UserError, match=r"--vllm_python"):
            open_run(Config(sampler="vllm", vllm_python=python, **files))
        assert not (tmp_path / "run").exists()
    vllm_process.check_python(write_vllm(tmp_path / "vllm"))


def test_an_engine_that_hangs(policies, tmp_path, monkeypatch) -> None:
    """One that is slow says that it is alive."""
    monkeypatch.setattr(vllm_process, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(vllm_process, "GRACE_SECONDS", 0.1)
    slow = "for _ in range(3 * (index == 5)): send(alive=True); time.sleep(0.2)"
    assert len(sample(policies, write_engine(tmp_path / "slow", change=slow), tmp_path)) == 4
    hangs = [{"change": "time.sleep(60 * (index == 5))"}]
    monkeypatch.setattr(vllm_process, "START_SECONDS", 0.5)
    hangs.append({"at_start": "time.sleep(60)"})
    for number, fault in enumerate(hangs):
        with pytest.raises(UserError, match="--resume"):
            sample(policies, write_engine(tmp_path / f"hangs{number}", **fault), tmp_path)


def test_a_signal_ends_the_wait_and_the_engine(policies, tmp_path, monkeypatch) -> None:
    sampler = sampler_of(policies, write_engine(tmp_path / "python", change="time.sleep(60)"), tmp_path)
    sampler(PROMPTS[:0], 3, [5], lambda n: None)  # starts it
    monkeypatch.setattr(signals, "_asked_by", signal.SIGTERM)
    with pytest.raises(signals.Stopped):
        sampler(PROMPTS, 3, [5], lambda n: None)
    pid = sampler.process.process.pid
    sampler.close()
    assert ends(pid)


def test_the_log_is_bounded(policies, tmp_path, monkeypatch) -> None:
    """What vLLM prints on stdout and stderr is no message."""
    monkeypatch.setattr(vllm_process, "LOG_BYTES", 1000)
    rubbish = "print('{\"index\": 0}\\n' * 100, flush=True); os.write(2, b'\\xff\\x00' * 5000 + b'\\n')"
    groups = sample(policies, write_engine(tmp_path / "python", change=rubbish), tmp_path)
    assert len(groups) == 4
    assert (tmp_path / "vllm.log").stat().st_size == 1000


@pytest.mark.parametrize("there", ["fifo", "link to a device", "link to a file", "folder"])
def test_a_log_that_cannot_be_written_is_replaced_or_left_out(there: str, policies, tmp_path) -> None:
    log, elsewhere = tmp_path / "vllm.log", tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    if there == "fifo":
        os.mkfifo(log)
    elif there == "folder":
        log.mkdir()
    else:
        log.symlink_to("/dev/full" if there == "link to a device" else elsewhere)
    talks = "print('x' * 100000, flush=True)"
    assert len(sample(policies, write_engine(tmp_path / "python", change=talks), tmp_path)) == 4
    assert elsewhere.read_text() == "mine"
    assert log.is_dir() if there == "folder" else log.stat().st_size > 100_000


def test_a_full_disk_under_the_log_stops_nothing(policies, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(vllm_process, "_open_log", lambda path: open("/dev/full", "wb", buffering=0))
    talks = "print('x' * 100000, flush=True)"
    assert len(sample(policies, write_engine(tmp_path / "python", change=talks), tmp_path)) == 4


def test_the_memory_hint_is_for_the_device(policies, tmp_path) -> None:
    fault = "send(kind='start', error='No available memory for the cache blocks'); time.sleep(60)"
    process = vllm_process.VllmProcess(write_engine(tmp_path / "python", at_start=fault), torch.device("cuda:0"), None)
    try:
        with pytest.raises(UserError, match=r"--vllm_options.*gpu_memory_utilization"):
            process.start({"arguments": {"model": ""}})
    finally:
        process.close()


def test_the_environment_of_the_engine(monkeypatch) -> None:
    for name in (
        "OPENAI_API_KEY",
        "HF_TOKEN",
        "MY_SECRET",
        "OPENAI_CUSTOM_HEADERS",
        "PYTHONPATH",
        "RANK",
        "MASTER_PORT",
    ):
        monkeypatch.setenv(name, "x")
    for name, url in (
        ("http_proxy", "me:x@host:1"),
        ("HTTPS_PROXY", "http://me:x@host:1"),
        ("DATABASE", "db://x@host"),
    ):
        monkeypatch.setenv(name, url)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("no_proxy", "localhost")
    environment = child_environment(torch.device("cpu"))
    assert "x" not in environment.values()
    assert not {"http_proxy", "HTTPS_PROXY", "DATABASE"} & environment.keys()
    assert {"TOKENIZERS_PARALLELISM": "false", "no_proxy": "localhost"}.items() <= environment.items()
    wanted = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}
    assert wanted.items() <= environment.items()
    for visible, gpu in ((None, "1"), ("5,7", "7"), ("GPU-a, GPU-b", "GPU-b")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert child_environment(torch.device("cuda:1"))["CUDA_VISIBLE_DEVICES"] == gpu


def test_what_vllm_is_told(policies, tmp_path) -> None:
    write = f"open({str(tmp_path / 'settings')!r}, 'w').write(json.dumps(settings))"
    options = {"max_num_batched_tokens": 64, "enable_prefix_caching": False}
    python = write_engine(tmp_path / "python", at_start=write)
    sample(policies, python, tmp_path, temperature=0.7, top_p=0.9, vllm_options=options)
    settings = json.loads((tmp_path / "settings").read_text())
    arguments, sampling = settings["arguments"], settings["sampling"]
    assert Path(arguments["model"]).samefile(policies.initial)
    assert (arguments["dtype"], arguments["max_num_seqs"], arguments["trust_remote_code"]) == ("float32", 4, False)
    assert options.items() <= arguments.items()
    assert (sampling["temperature"], sampling["top_p"], sampling["max_tokens"]) == (0.7, 0.9, 6)
    assert (sampling["stop_token_ids"], sampling["ignore_eos"], sampling["logprobs"]) == ([2], True, 0)
    assert settings["adapter"] is None


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"objective": "nash_md"}, "--objective nash_md"),
        ({"temperature": 0.001}, "--temperature"),
        ({"temperature": 2.5}, "--temperature"),
        ({"vllm_options": {"model": "x"}}, "--vllm_options"),
        ({"vllm_options": {"tensor_parallel_size": 2}}, "--vllm_options"),
        ({"vllm_options": {"trust_remote_code": True}}, "--vllm_options"),
    ],
)
def test_options_that_vllm_cannot_have(options: dict, flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        Config(sampler="vllm", **options)
    Config(sampler="vllm", objective="egpo")  # it mixes anchors, and samples from one policy


def prepare(work: Path, model: Path) -> None:
    """As ``small_runs.prepare``, with the policy that ``write_vllm`` samples from."""
    small_runs.prepare(work, model)
    make_uniform(work / "model")


# in each iteration; the policy stays what it is
TWO_PARTS = (
    "--iterations=1",
    "--prompts_per_iteration=4",
    "--eval_fraction=0.2",
    "--sampling_batch_size=1",
    "--learning_rate=1e-12",
)


def test_nothing_is_lost_where_the_trainer_is_killed(tiny_model, tmp_path, monkeypatch) -> None:
    """SIGKILL in the second part ends vLLM and what it has started; --resume samples what is missing, and no more."""
    prepare(tmp_path, tiny_model)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    pids, second, numbers = (tmp_path / name for name in ("pids", "second", "numbers"))
    worker = f"""
child = subprocess.Popen(["sleep", "100"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
"""
    hang = f"""
if number == 7:
    open({str(second)!r}, "w").close()
    time.sleep(100)
"""
    run = start_run(tmp_path, write_vllm(tmp_path / "hangs", worker, hang), *TWO_PARTS)
    wait_for(second, run)
    kept = parts(tmp_path / "run")
    assert len(kept) == 1
    run.kill()
    run.communicate()
    assert all(ends(int(pid)) for pid in pids.read_text().split())
    assert not list((tmp_path / "temporary").glob("onpo_vllm_*"))
    count = f"open({str(numbers)!r}, 'a').write(f'{{number}}\\n')"
    good = write_vllm(tmp_path / "good", at_step=count)
    resumed = start_run(tmp_path, good, *TWO_PARTS, "--resume")
    output, _ = resumed.communicate()
    assert resumed.returncode == 0, output
    assert not list((tmp_path / "temporary").glob("onpo_vllm_*"))
    assert numbers.read_text().splitlines()[:6] == ["5", "4", "3", "2", "1", "0"]  # those of the second part
    whole = read_groups(tmp_path / "run" / "iteration_01" / "responses.jsonl")
    assert len(whole) == 4
    (tmp_path / "first.jsonl").write_bytes(next(iter(kept.values())))
    assert read_groups(tmp_path / "first.jsonl") == whole[:2]
    policies = ResidentPolicy(Config(model=str(tmp_path / "model")).section(ModelConfig))
    prompts = [group.prompt for group in whole]
    sampler = sampler_of(policies, good, tmp_path)
    try:
        assert sampler(prompts, 3, [0, 0, 1], lambda n: None) == whole  # as if it had never been killed
    finally:
        sampler.close()


def test_nothing_is_lost_where_the_engine_dies(tiny_model, tmp_path, monkeypatch) -> None:
    prepare(tmp_path, tiny_model)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what a process leaves that dies at once
    dies = write_vllm(tmp_path / "dies", at_step="os._exit(9) if number == 7 else None")
    run = start_run(tmp_path, dies, *TWO_PARTS)
    output, _ = run.communicate()
    assert run.returncode == 2
    assert output.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in output
    assert len(parts(tmp_path / "run")) == 1


def test_ctrl_c_while_vllm_samples(tiny_model, tmp_path) -> None:
    prepare(tmp_path, tiny_model)
    pid, here = tmp_path / "pid", tmp_path / "here"
    hang = f"open({str(here)!r}, 'w').close(); time.sleep(100)"
    write = f"open({str(pid)!r}, 'w').write(str(os.getpid()))"
    run = start_run(tmp_path, write_vllm(tmp_path / "hangs", write, hang))
    wait_for(here, run)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=30)
    assert run.returncode == 130, output
    assert "to go on" in output
    assert ends(int(pid.read_text()))
