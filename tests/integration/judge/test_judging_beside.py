"""A judge that is asked while the policy samples: the same bits as afterwards, and nothing asked twice."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.judging import asked, raises, shorter
from support.servers import Error, serving

from onpo_fast import oracles, train
from onpo_fast.config import Config
from onpo_fast.judging_beside import JudgingBeside
from onpo_fast.language_game import LanguageGame
from onpo_fast.run.resumable import ResumableStage
from onpo_fast.sampling.gathering import Gathering
from onpo_fast.servers import RequestRefused

pytestmark = pytest.mark.usefixtures("without_plots")

PROMPTS, RESPONSES = 16, 32  # in an iteration: 8 parts that are judged, 2 that are sampled
OUTPUTS = ("responses.jsonl", "preferences.jsonl", "pairs.jsonl", "policy/model.safetensors")


class Events:
    """What has happened: ("iteration", t), ("sampled", None) for a response, ("asked", key of a question)."""

    def __init__(self) -> None:
        self.all: list[tuple[str, object]] = []
        self.reply: Callable[[dict], object] = shorter
        self.before_response: Callable[[int], None] = lambda count: time.sleep(0.01)

    def answer(self, body: dict) -> object:
        if set(asked(body)) != set(oracles.PROBE_TEXTS):
            self.all.append(("asked", body["messages"][0]["content"]))
            time.sleep(0.01)
        return self.reply(body)

    def of_iteration(self, t: int) -> list[str]:
        """The names of the events of an iteration."""
        begin = self.all.index(("iteration", t))
        names = [name for name, _ in self.all[begin + 1 :]]
        return names[: names.index("iteration")] if "iteration" in names else names

    @property
    def questions(self) -> list[object]:
        return [what for name, what in self.all if name == "asked"]


@pytest.fixture
def events(monkeypatch) -> Events:
    """Slows sampling down, makes parts small, and notes what happens."""
    events = Events()
    add, begin = Gathering.add, LanguageGame.begin_iteration

    def added(self, *arguments):
        if ("iteration", 2) in events.all:
            events.before_response(events.of_iteration(2).count("sampled"))
        events.all.append(("sampled", None))
        return add(self, *arguments)

    def begun(self, t: int) -> None:
        events.all.append(("iteration", t))
        begin(self, t)

    monkeypatch.setattr(Gathering, "add", added)
    monkeypatch.setattr(LanguageGame, "begin_iteration", begun)
    monkeypatch.setattr(ResumableStage, "GROUPS_BESIDE", 2)
    return events


@pytest.fixture
def run(tiny_model, tmp_path, write_lines) -> Callable[..., Path]:
    """Trains for two iterations with a judge, and returns the run directory."""
    prompts = write_lines("prompts.jsonl", *({"prompt": f"What is {i} plus {i}?"} for i in range(5 * PROMPTS // 2)))

    def train_with(url: str, name: str, **options) -> Path:
        config = Config(
            model=str(tiny_model),
            prompts=str(prompts),
            out=str(tmp_path / name),
            oracle="population + judge",
            judge_url=url,
            judge_model="m",
            iterations=2,
            prompts_per_iteration=PROMPTS,
            responses_per_prompt=2,
            sampling_batch_size=2,
            max_new_tokens=4,
            eval_samples=1,
            learning_rate=1e-3,
            report_to="none",
        )
        train.train(config, **options)
        return tmp_path / name

    return train_with


def outputs(directory: Path) -> dict[str, bytes]:
    return {f"{t}/{name}": (directory / f"iteration_0{t}/{name}").read_bytes() for t in (1, 2) for name in OUTPUTS}


def judged(directory: Path) -> list[dict]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["stage"] == "judge"]


def test_the_same_bits_as_afterwards(run, events: Events, monkeypatch) -> None:
    with serving(events.answer) as server:
        beside = run(server.url, "beside")
        first, second = events.of_iteration(1), events.of_iteration(2)
        assert "asked" not in first[: len(first) - first[::-1].index("sampled")]  # the sampler is checked before
        assert second.index("asked") < RESPONSES - 1
        events.all.clear()
        monkeypatch.setattr(LanguageGame, "judges_beside", False)
        afterwards = run(server.url, "afterwards")
    assert outputs(beside) == outputs(afterwards)
    for one, other in zip(judged(beside), judged(afterwards), strict=True):
        for name in ("requests", "answered", "cached", "cyclic_triples", "comparisons"):
            assert one[name] == other[name]
    assert judged(beside)[1]["hidden_seconds"] > 0
    assert "hidden_seconds" not in judged(beside)[0] | judged(afterwards)[1]


def test_a_run_that_dies_while_it_samples_and_judges_asks_nothing_twice(run, events: Events, tmp_path: Path) -> None:
    def die(count: int) -> None:
        time.sleep(0.02)
        if count == RESPONSES - 5:
            raise RuntimeError("killed")

    with serving(events.answer) as server:
        whole = outputs(run(server.url, "whole"))
        events.all.clear()
        events.before_response = die
        with pytest.raises(RuntimeError, match="killed"):
            run(server.url, "cut")
        parts = list((tmp_path / "cut/iteration_02/preferences.jsonl.parts").iterdir())
        assert parts
        events.before_response = lambda count: None
        cut = run(server.url, "cut", resume=True)
    assert outputs(cut) == whole
    assert len(events.questions) == len(set(events.questions))


def test_a_judge_that_fails_stops_sampling(run, events: Events, tmp_path: Path) -> None:
    refused = threading.Event()

    def refuse(body: dict) -> object:
        if ("iteration", 2) not in events.all or events.of_iteration(2).count("asked") <= 6:
            return shorter(body)
        refused.set()
        return Error(401)

    def wait(count: int) -> None:
        if count == RESPONSES // 2:
            assert refused.wait(30)
        time.sleep(0.05)

    with serving(events.answer) as server:
        events.reply, events.before_response = refuse, wait
        with raises(RequestRefused, "member judge", "401"):
            run(server.url, "run")
        assert 0 < events.of_iteration(2).count("sampled") < RESPONSES
        assert list((tmp_path / "run/iteration_02/preferences.jsonl.parts").iterdir())
        (stopped,) = [record for record in judged(tmp_path / "run") if record.get("stopped")]
        assert stopped["failures"] >= 1
        events.reply, events.before_response = shorter, lambda count: None
        directory = run(server.url, "run", resume=True)
    (second,) = [record for record in judged(directory) if record["iteration"] == 2 and not record.get("stopped")]
    assert second["comparisons"] == PROMPTS


@pytest.mark.parametrize("error", [SystemExit, RuntimeError])
def test_a_thread_that_ends_is_not_waited_for(run, events: Events, error: type, monkeypatch) -> None:
    """Whatever has ended it: the oracle's exit, or no error at all."""
    judge = oracles.judge

    def leave(*arguments):
        if threading.current_thread().name == "judge":
            raise SystemExit
        return judge(*arguments)

    if error is SystemExit:
        monkeypatch.setattr(oracles, "judge", leave)
    else:
        monkeypatch.setattr(JudgingBeside, "_work", lambda self: None)
    with serving(events.answer) as server, pytest.raises(error):
        run(server.url, "run")
