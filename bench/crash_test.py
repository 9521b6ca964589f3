"""Kills and resumes runs, and damages their files; every run must end with the same bits as an undisturbed one.

    python -m bench crash_test [--kills 40] [--errors 24] [--seed 0] [--tokenizer MODEL]

A small random model with a real tokenizer is trained once undisturbed, then many times with disturbances, each followed
by a resume:

- kill -9 at random times of a whole run, of the evaluation, of runs with conversations and with selected pairs, and of
  judging by a chat server in another process, whose answers depend on the question alone;
- a file-system error (full disk or broken disk) in one of the calls that rename, flush or open a file for writing;
- a limit on the size of files, and a disk that is too small;
- a damaged file in a finished run.

A run that meets a file-system error must end with one line and exit status 2. Processes are forked from one that has
imported everything, to save time, and has computed nothing, because threads do not survive a fork.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from matplotlib.figure import Figure
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from bench.digest import run_contents
from onpo_fast import train as training
from onpo_fast.arguments import at_least
from onpo_fast.config import Config
from onpo_fast.console import console
from onpo_fast.errors import command
from onpo_fast.journal import Journal
from onpo_fast.models.checkpoint import locate
from onpo_fast.run.fit_states import FitStates
from onpo_fast.run.resumable import ResumableStage

from .hash_judge import judge_server

SMALL_RUN_OPTIONS = {
    "prompts_per_iteration": 3,
    "responses_per_prompt": 3,
    "max_new_tokens": 6,
    "eval_samples": 1,
    "batch_pairs": 3,
    "iterations": 2,
    "checkpoint_steps": 1,
    "learning_rate": 1e-3,
    "eval_fraction": 0.4,
    "sampling_batch_size": 3,
    "tokens_per_microbatch": 1024,
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kills",
        type=at_least(0),
        default=40,
        help="Number of kills, shared out among a whole run, the evaluation, judging by a chat server, "
        "conversations of two turns, and selected pairs (default: %(default)s).",
    )
    parser.add_argument(
        "--errors",
        type=at_least(0),
        default=24,
        help="Number of file-system errors to inject, one per run (default: %(default)s).",
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        help="Random seed for the kill times and the failing calls (default: %(default)s).",
    )
    parser.add_argument(
        "--tokenizer", default="smollm2", help="Model whose tokenizer the test's model uses (default: %(default)s)."
    )


def main(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as work:
        test = CrashTest(Path(work), options.tokenizer)
        kinds = (
            test.kill,
            test.kill_in_the_evaluation,
            test.kill_while_judging,
            test.kill_between_turns,
            test.kill_selecting,
        )
        failures = []
        for index, kill in enumerate(kinds):
            failures += kill((options.kills + len(kinds) - 1 - index) // len(kinds), options.seed)
        failures += test.kill_after_a_fit() + test.damage() + test.damage_checkpoint()
        failures += test.fail(options.errors, options.seed) + test.limit() + test.fill()
    print("\n".join(failures) or "every run ended with the same bits")
    return 1 if failures else 0


def write_small_model(work: Path, tokenizer: str) -> None:
    """Writes a Llama of two layers with seeded random weights, the tokenizer of another model, and ten prompts."""
    taken = AutoTokenizer.from_pretrained(**locate(tokenizer))
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(taken),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=taken.bos_token_id,
        eos_token_id=taken.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(work / "model")
    taken.save_pretrained(work / "model")
    prompts = "".join(json.dumps({"prompt": f"What is {i} plus {i}?"}) + "\n" for i in range(10))
    (work / "prompts.jsonl").write_text(prompts)


def small_config(work: Path, name: str) -> Config:
    """Configuration of a run in ``work``, where ``write_small_model`` was called."""
    return Config(
        model=str(work / "model"), prompts=str(work / "prompts.jsonl"), out=str(work / name), **SMALL_RUN_OPTIONS
    )


def _leave_empty(figure: Figure, file: TextIO, **options: object) -> None:
    """Stands in for the drawing of a report's plots: half of the time of so small a run, and no run reads them."""
    file.write("<svg></svg>")


class CrashTest:
    """Compares disturbed runs with one undisturbed run."""

    def __init__(self, work: Path, tokenizer: str) -> None:
        self.work = work
        ResumableStage.SAMPLING_BATCHES, ResumableStage.GROUPS = 1, 2  # so that these stages have several parts
        FitStates.spacing = 0  # so that every step saves a state
        Figure.savefig = _leave_empty
        prepared = finish(fork(lambda: write_small_model(work, tokenizer), work / "prepare.log"))
        assert prepared == 0, (work / "prepare.log").read_text()
        whole = small_config(work, "whole")
        begin = time.monotonic()
        assert finish(self.start(whole, resume=False)) == 0, self.log(whole)
        self.seconds = time.monotonic() - begin
        self.contents = run_contents(work / "whole")
        print(f"undisturbed: {self.seconds:.1f} s", flush=True)

    def start(self, config: Config, resume: bool = True, first: Callable[[], object] = lambda: None) -> int:
        """Starts a process that calls ``first`` and then trains as the command line does; returns its id."""

        def work(argv: list[str]) -> None:
            first()
            training.train(config, resume)

        return fork(lambda: command(work)([]), self.log_file(config))

    def log_file(self, config: Config) -> Path:
        return self.work / f"{Path(config.out).name}.log"

    def log(self, config: Config) -> str:
        return self.log_file(config).read_text(encoding="utf-8")[-2000:]

    def verdict(self, what: str, config: Config, status: int, expected: list[str] | None = None) -> list[str]:
        """Prints how a run ended. Returns a list of one failure, or an empty one if it holds what is ``expected``."""
        wanted = Counter(expected or self.contents)
        found = Counter(run_contents(Path(config.out)) if status == 0 else [])
        same = status == 0 and found == wanted
        print(f"{what}: {'the same bits' if same else 'DIFFERENT'}", flush=True)
        unlike = [f"expected: {line}" for line in (wanted - found).elements()] if status == 0 else []
        unlike += [f"found: {line}" for line in (found - wanted).elements()]
        failures = [] if same else ["\n".join([f"{what}: exit status {status}", *unlike, self.log(config)])]
        shutil.rmtree(config.out)
        return failures

    def kill(self, kills: int, seed: int = 0) -> list[str]:
        """Kills whole runs at random times, ``kills`` times in all."""
        return self._kill(kills, seed, "run", self.seconds, self.contents)

    def _kill(
        self,
        kills: int,
        seed: int,
        title: str,
        seconds: float,
        expected: list[str],
        begin: Path | None = None,
        **options,
    ) -> list[str]:
        """Kills runs with ``options`` at random times; each starts from a copy of the directory ``begin``, if given."""
        chance, done, runs, failures = random.Random(f"{title} {seed}"), 0, 0, []
        while done < kills:
            runs += 1
            config = replace(small_config(self.work, f"{title}_{runs}"), **options)
            if begin:
                shutil.copytree(begin, config.out)
            moments, status = [], None
            while status is None:
                child = self.start(config)
                # random times within the length of a run, so that kills hit all stages
                moment = chance.uniform(0, seconds) if done < kills else float("inf")
                status = finish(child, moment)
                if status is None:
                    done += 1
                    moments.append(f"{moment:.1f}")
            what = f"{title} {runs}, killed after {', '.join(moments) or 'nothing'} s ({done} of {kills} kills)"
            failures += self.verdict(what, config, status, expected)
        return failures

    def kill_in_the_evaluation(self, kills: int, seed: int = 0) -> list[str]:
        """Kills runs that have finished everything but the evaluation."""
        if not kills:
            return []
        begin = self.work / "unevaluated"
        shutil.copytree(self.work / "whole", begin)
        journal = Journal(begin)
        journal.forget("evaluation.json", "evaluation_responses.jsonl")
        records = (begin / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [record for record in records if json.loads(record)["stage"] != "evaluate"]
        (begin / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
        return self._kill(kills, seed, "evaluation", self.seconds / 2, self.contents, begin)

    def kill_while_judging(self, kills: int, seed: int = 0) -> list[str]:
        """Kills runs whose oracle is a chat server, which takes most of their time."""
        with judge_server() as url:
            options = {"oracle": "judge", "judge_url": url, "judge_model": "hash", "judge_concurrency": 2}
            return self._kill_others(kills, seed, "judged", **options)

    def kill_between_turns(self, kills: int, seed: int = 0) -> list[str]:
        """Kills runs whose responses are conversations of two turns."""
        return self._kill_others(kills, seed, "conversations", environment="partner", turns=2)

    def kill_selecting(self, kills: int, seed: int = 0) -> list[str]:
        """Kills runs that ask the oracle about some pairs, for which they compute features of the responses."""
        return self._kill_others(kills, seed, "selected", select=4, selection="variance")

    def _kill_others(self, kills: int, seed: int, title: str, **options) -> list[str]:
        """Kills whole runs with other options at random times, and compares them with one that is undisturbed."""
        if not kills:
            return []
        whole = replace(small_config(self.work, title), **options)
        begin = time.monotonic()
        assert finish(self.start(whole, resume=False)) == 0, self.log(whole)
        seconds = time.monotonic() - begin
        print(f"undisturbed, {title}: {seconds:.1f} s", flush=True)
        return self._kill(kills, seed, title, seconds, run_contents(Path(whole.out)), **options)

    def fail(self, errors: int, seed: int = 0) -> list[str]:
        """Makes one file-system call of a run fail, then resumes the run."""
        counted = small_config(self.work, "counted")
        assert finish(self.start(counted, first=lambda: fail_at(None, 0, self.work / "calls"))) == 0, self.log(counted)
        shutil.rmtree(counted.out)
        calls = json.loads((self.work / "calls").read_text())
        print(f"calls of a run: {', '.join(f'{count} of {name}' for name, count in calls.items())}", flush=True)
        chance, failures = random.Random(f"errors {seed}"), []
        for number in range(errors):
            name = sorted(calls)[number % len(calls)]
            at, code = chance.randrange(calls[name]), (errno.ENOSPC, errno.EIO)[number // len(calls) % 2]
            config = small_config(self.work, f"error_{number}")
            what = f"{errno.errorcode[code]} at call {at + 1} of {name} ({number + 1} of {errors})"
            child = self.start(config, first=lambda: fail_at(name, at, code=code))  # noqa: B023
            failures += self.refused(what, config, finish(child))
            failures += self.verdict(what, config, finish(self.start(config)))
        return failures

    def limit(self) -> list[str]:
        """Starts runs under a limit on the size of files, then resumes them without it."""
        failures = []
        sizes = sorted({path.stat().st_size for path in (self.work / "whole").rglob("*") if path.is_file()})
        for size in (4096, 3 * 4096, sizes[-1] // 2, sizes[-1] - 1):  # the log, a file too, is smaller
            config, what = small_config(self.work, f"limit_{size}"), f"files of {size} bytes at most"
            child = self.start(config, first=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))  # noqa: B023
            failures += self.refused(what, config, finish(child))
            failures += self.verdict(what, config, finish(self.start(config)))
        return failures

    def refused(self, what: str, config: Config, status: int) -> list[str]:
        """Returns a failure unless the run ended with one error line and status 2, or succeeded despite the error."""
        said = [line for line in self.log(config).splitlines() if line.startswith("error: ")]
        if status == 0 or (status == 2 and len(said) == 1 and "Traceback" not in self.log(config)):
            return []
        return [f"{what}: exit status {status}\n{self.log(config)}"]

    def kill_after_a_fit(self) -> list[str]:
        """Kills a run after a fit is recorded and before its states are deleted; the resumed run must delete them."""
        config = small_config(self.work, "between")

        def die(states: FitStates) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def work() -> None:
            FitStates.clear = die
            training.train(config, resume=True)

        assert finish(fork(work, self.log_file(config))) == -signal.SIGKILL, self.log(config)
        assert states(config), "there was no state to leave behind"
        status = finish(self.start(config))
        left = [f"left behind: {state}" for state in states(config)]
        return left + self.verdict("killed between a fit and the end of its states", config, status)

    def fill(self) -> list[str]:
        """Starts runs on a disk that is too small, then resumes them with enough space."""
        disk, failures = self.work / "disk", []
        disk.mkdir()
        size = sum(path.stat().st_size for path in (self.work / "whole").rglob("*") if path.is_file())
        for room in (4096, size // 10, size // 2, size * 4 // 5):
            mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)]
            if subprocess.run(mount, capture_output=True, check=False).returncode:
                print("full disks: left out, since no small file system can be mounted here", flush=True)
                break
            try:
                config = small_config(self.work, f"disk/room_{room}")
                assert finish(self.start(config)) == 2, "the disk was not full"
                assert "no space left" in self.log(config), self.log(config)
                subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(disk)], check=True)
                failures += self.verdict(f"a disk of {room} bytes, full", config, finish(self.start(config)))
            finally:
                subprocess.run(["umount", "-l", str(disk)], check=True)
        return failures

    def damage(self) -> list[str]:
        """Damages one file of a finished run and resumes it, for every entry of ``DAMAGES``."""
        failures = []
        for name, harm in DAMAGES:
            config = small_config(self.work, "damaged")
            shutil.copytree(self.work / "whole", config.out)
            harm(Path(config.out) / name)
            failures += self.verdict(f"{harm.__name__} {name}", config, finish(self.start(config)))
        return failures

    def damage_checkpoint(self) -> list[str]:
        """Kills a fit that has two states and damages the newest; the resumed run must use the older one."""
        config = small_config(self.work, "checkpoints")
        last, record = "iteration_02/policy", Journal.record

        def die_with_two(journal: Journal, *arguments, **options) -> None:
            record(journal, *arguments, **options)
            if len(journal.within(f"{last}.checkpoints")) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        def work() -> None:
            Journal.record = die_with_two
            training.train(config, resume=True)

        assert finish(fork(work, self.log_file(config))) == -signal.SIGKILL, self.log(config)
        flip(states(config, last)[-1] / "rank_00000.safetensors")
        return self.verdict("flip the newest of two checkpoints", config, finish(self.start(config)))


def fail_at(name: str | None, at: int, count_in: Path | None = None, code: int = errno.EIO) -> None:
    """Makes call number ``at`` (from 0) of a function fail with the error ``code`` in this process.

    ``name`` is "os.replace", "os.fsync" or "open"; calls of "open" count only if the file is opened for writing. With
    None no call fails. ``count_in`` is a file to which the numbers of calls so far are written at each call, as JSON.
    """
    calls = {"os.replace": 0, "os.fsync": 0, "open": 0}
    opened, written = builtins.open, os.open

    def counting(mine: str, work: Callable, counts: Callable[..., bool] = lambda *arguments, **options: True):
        def call(*arguments, **options):
            if counts(*arguments, **options):
                calls[mine] += 1
                if count_in:
                    descriptor = written(count_in, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.write(descriptor, json.dumps(calls).encode())
                    os.close(descriptor)
                if mine == name and calls[mine] == at + 1:
                    raise OSError(code, os.strerror(code))
            return work(*arguments, **options)

        return call

    def for_writing(file, mode="r", *arguments, **options) -> bool:
        return set(mode) & set("wxa+") != set() and str(file) != os.devnull

    os.replace, os.fsync = counting("os.replace", os.replace), counting("os.fsync", os.fsync)
    builtins.open = counting("open", opened, for_writing)


def states(config: Config, fit: str = "*/*") -> list[Path]:
    """Folders of the saved states of fits."""
    return sorted(path for path in Path(config.out).glob(f"{fit}.checkpoints/step_*") if not path.suffix)


# The names of these four functions are printed as the kind of damage.


def cut(path: Path) -> None:
    """Removes the second half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    """Deletes a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def append(path: Path) -> None:
    """Appends half of a record, as a crash may leave it."""
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
    """Runs ``work`` in a forked process, whose output goes to the file ``log``. Returns the process id."""
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
    except SystemExit as stopped:
        status = stopped.code
    except BaseException as error:
        print(repr(error), flush=True)
    finally:
        try:
            sys.stdout.flush()
        finally:
            os._exit(status)


def finish(child: int, seconds: float = float("inf")) -> int | None:
    """Returns the exit status of a process; kills it with SIGKILL after ``seconds`` and then returns None."""
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
