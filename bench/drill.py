"""Runs killed -9 at random moments and resumed, and runs with damaged files: all must end with the same bits.

    python -m bench drill [--kills 40] [--seed 0] [--tokenizer MODEL]

A small random model with a real tokenizer trains once undisturbed; then again and again, killed, or on a disk that is
full, and resumed. Processes start warm: they are forked from one that has imported everything and computed nothing
(threads do not survive a fork).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from onpo_fast import train as training
from onpo_fast.checkpoint import Checkpoints, Journal, Parts, checksum
from onpo_fast.config import Config
from onpo_fast.policy import locate
from onpo_fast.tracking import console

SMALL = {
    "prompts_per_iteration": 3, "responses_per_prompt": 3, "max_new_tokens": 6, "eval_samples": 1, "batch_pairs": 3,
    "iterations": 2, "checkpoint_steps": 1, "learning_rate": 1e-3, "eval_fraction": 0.4, "sampling_batch_size": 3,
    "tokens_per_microbatch": 1024,
}  # fmt: skip
TIMED = ("time", "seconds", "stage_seconds", "tokens_per_second", "pairs_per_second", "peak_memory_bytes")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--tokenizer", default="smollm2", help="a model whose tokenizer is taken")


def main(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as work:
        drill = Drill(Path(work), options.tokenizer)
        failures = drill.kill(options.kills, options.seed) + drill.kill_after_a_fit() + drill.damage()
        failures += drill.damage_checkpoint() + drill.fill()
    print("\n".join(failures) or "every run ended with the same bits")
    return 1 if failures else 0


def prepare(work: Path, tokenizer: str) -> None:
    """Writes a Llama of two layers with seeded random weights, the tokenizer of a real model, and ten prompts."""
    taken = AutoTokenizer.from_pretrained(**locate(tokenizer))
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(taken), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=taken.bos_token_id, eos_token_id=taken.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(work / "model")
    taken.save_pretrained(work / "model")
    prompts = "".join(json.dumps({"prompt": f"What is {i} plus {i}?"}) + "\n" for i in range(10))
    (work / "prompts.jsonl").write_text(prompts)


def small_run(work: Path, name: str) -> Config:
    """A run in ``work``, after ``prepare``."""
    return Config(model=str(work / "model"), prompts=str(work / "prompts.jsonl"), out=str(work / name), **SMALL)


class Drill:
    """An undisturbed run, and what others are held against it."""

    def __init__(self, work: Path, tokenizer: str) -> None:
        self.work = work
        Parts.BATCHES, Parts.GROUPS = 1, 2  # so that even these stages have several parts
        Checkpoints.spacing = 0  # so that every step has its state, however short it is
        prepared = finish(fork(lambda: prepare(work, tokenizer), work / "prepare.log"))
        assert prepared == 0, (work / "prepare.log").read_text()
        whole = small_run(work, "whole")
        begin = time.monotonic()
        assert finish(self.start(whole, resume=False)) == 0, self.log(whole)
        self.seconds = time.monotonic() - begin
        self.bits = bits(work / "whole")
        print(f"undisturbed: {self.seconds:.1f} s", flush=True)

    def start(self, config: Config, resume: bool = True) -> int:
        return fork(lambda: training.train(config, resume), self.log_file(config))

    def log_file(self, config: Config) -> Path:
        return self.work / f"{Path(config.out).name}.log"

    def log(self, config: Config) -> str:
        return self.log_file(config).read_text(encoding="utf-8")[-2000:]

    def verdict(self, what: str, config: Config, status: int) -> list[str]:
        """Says how a run ended; a list of one line, or none if it ended as it should."""
        same = status == 0 and bits(Path(config.out)) == self.bits
        print(f"{what}: {'the same bits' if same else 'DIFFERENT'}", flush=True)
        failures = [] if same else [f"{what}: exit status {status}\n{self.log(config)}"]
        shutil.rmtree(config.out)
        return failures

    def kill(self, kills: int, seed: int = 0) -> list[str]:
        """Runs killed at random moments until there were so many kills."""
        chance, done, runs, failures = random.Random(seed), 0, 0, []
        while done < kills:
            runs += 1
            config, moments, status = small_run(self.work, f"run_{runs}"), [], None
            while status is None:
                child = self.start(config)
                # short runs between kills, so that all stages have their turn
                moment = chance.uniform(0, self.seconds) if done < kills else float("inf")
                status = finish(child, moment)
                if status is None:
                    done += 1
                    moments.append(f"{moment:.1f}")
            failures += self.verdict(f"run {runs}, killed after {', '.join(moments) or 'nothing'} s", config, status)
        return failures

    def kill_after_a_fit(self) -> list[str]:
        """Killed between the record of a fit and the end of its states, which are to go all the same."""
        config = small_run(self.work, "between")

        def die(checkpoints: Checkpoints) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def work() -> None:
            Checkpoints.clear = die
            training.train(config, resume=True)

        assert finish(fork(work, self.log_file(config))) == -signal.SIGKILL, self.log(config)
        assert states(config), "there was no state to leave behind"
        status = finish(self.start(config))
        left = [f"left behind: {state}" for state in states(config)]
        return left + self.verdict("killed between a fit and the end of its states", config, status)

    def fill(self) -> list[str]:
        """Runs on a disk that is too small for them, resumed when there is room."""
        disk, failures = self.work / "disk", []
        disk.mkdir()
        size = sum(path.stat().st_size for path in (self.work / "whole").rglob("*") if path.is_file())
        for room in (4096, size // 10, size // 2, size * 4 // 5):
            mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)]
            if subprocess.run(mount, capture_output=True, check=False).returncode:
                print("full disks: left out, since no small file system can be mounted here", flush=True)
                break
            try:
                config = small_run(self.work, f"disk/room_{room}")
                assert finish(self.start(config)) == 1, "the disk was not full"
                assert "No space left" in self.log(config), self.log(config)
                subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(disk)], check=True)
                failures += self.verdict(f"a disk of {room} bytes, full", config, finish(self.start(config)))
            finally:
                subprocess.run(["umount", "-l", str(disk)], check=True)
        return failures

    def damage(self) -> list[str]:
        """A finished run with one file broken, for many files; resumed."""
        failures = []
        for name, harm in DAMAGES:
            config = small_run(self.work, "damaged")
            shutil.copytree(self.work / "whole", config.out)
            harm(Path(config.out) / name)
            failures += self.verdict(f"{harm.__name__} {name}", config, finish(self.start(config)))
        return failures

    def damage_checkpoint(self) -> list[str]:
        """Killed inside a fit that has two states, the newest of which is then broken: the one before is used."""
        config = small_run(self.work, "checkpoints")
        last, record = "iteration_02/policy", Journal.record

        def die_with_two(journal: Journal, *arguments, **options) -> None:
            record(journal, *arguments, **options)
            if len(journal.within(f"{last}.checkpoints")) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        def work() -> None:
            Journal.record = die_with_two
            training.train(config, resume=True)

        assert finish(fork(work, self.log_file(config))) == -signal.SIGKILL, self.log(config)
        flip(states(config, last)[-1] / "state.safetensors")
        return self.verdict("flip the newest of two checkpoints", config, finish(self.start(config)))


def states(config: Config, fit: str = "*/*") -> list[Path]:
    """Of fits, in their folders."""
    return sorted(path for path in Path(config.out).glob(f"{fit}.checkpoints/step_*") if not path.suffix)


def cut(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit, in the middle."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def append(path: Path) -> None:
    """Half of a record, as a crash leaves it."""
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"time": 1')


DAMAGES: tuple[tuple[str, Callable[[Path], None]], ...] = (
    ("iteration_01/responses.jsonl", cut),
    ("iteration_01/responses.jsonl", flip),
    ("iteration_01/preferences.jsonl", flip),
    ("iteration_02/pairs.jsonl", cut),
    ("iteration_02/logps_initial.jsonl", remove),
    ("iteration_01/auxiliary/model.safetensors", flip),
    ("iteration_01/policy/model.safetensors", cut),
    ("iteration_02/policy", remove),
    ("iteration_02/policy/config.json", remove),
    ("evaluation.json", cut),
    ("evaluation_responses.jsonl", remove),
    ("metrics.jsonl", append),
    ("journal.jsonl", cut),
    ("journal.jsonl", flip),
    ("journal.jsonl", remove),
    ("config.yaml", remove),
    ("environment.json", remove),
    ("heldout.jsonl", flip),
)


def fork(work: Callable[[], object], log: Path) -> int:
    """A process that does this and nothing else; returns its id. It prints to the log."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        console.file = sys.stdout = sys.stderr = open(descriptor, "w", encoding="utf-8", closefd=False)
        work()
        status = 0
    except BaseException as error:
        print(repr(error), flush=True)
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(child: int, seconds: float = float("inf")) -> int | None:
    """The exit status; None if the time was up before, and the process was killed -9."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)


def bits(directory: Path) -> str:
    """All that a run comes to: policies, data, evaluation, and its records but for their times."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("iteration_*/*")):
        digest.update(f"{path.relative_to(directory)} {checksum(path)}\n".encode())
    for name in ("evaluation.json", "evaluation_responses.jsonl", "heldout.jsonl"):
        digest.update(checksum(directory / name).encode())
    records = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    untimed = ({key: value for key, value in record.items() if key not in TIMED} for record in records)
    for line in sorted(json.dumps(record, sort_keys=True) for record in untimed):
        digest.update(line.encode())
    return digest.hexdigest()
