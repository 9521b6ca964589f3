"""A judge that is asked while the policy samples: the same bits as afterwards, and nothing asked twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.judging import asked, raises, shorter
from support.servers import Error, serving

from onpo_fast import oracles, train
from onpo_fast.config import Config
from onpo_fast.language_game import LanguageGame
from onpo_fast.run.resumable import ResumableStage
from onpo_fast.sampling import LocalSampler, TransformersSampler
from onpo_fast.servers import RequestRefused

pytestmark = pytest.mark.usefixtures("without_plots")

PROMPTS = 16  # in an iteration: 8 parts that are judged, 2 that are sampled, 16 batches
OUTPUTS = ("responses.jsonl", "preferences.jsonl", "pairs.jsonl", "policy/model.safetensors")


class Events:
    """What has happened: ("iteration", t), ("sampled", None) for a batch, ("asked", key of a question)."""

    def __init__(self) -> None:
        self.all: list[tuple[str, object]] = []
        self.reply: Callable[[dict], object] = shorter
        self.before_batch: Callable[[int], None] = lambda batch: time.sleep(0.02)

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
    """Slows sampling down, in batches, makes parts small, and notes what happens."""
    events = Events()
    generate, begin = TransformersSampler._generate, LanguageGame.begin_iteration

    def generated(self, *arguments):
        if ("iteration", 2) in events.all:
            events.before_batch(events.of_iteration(2).count("sampled"))
        events.all.append(("sampled", None))
        return generate(self, *arguments)

    def begun(self, t: int) -> None:
        events.all.append(("iteration", t))
        begin(self, t)

    monkeypatch.setattr(TransformersSampler, "_generate", generated)
    monkeypatch.setattr(TransformersSampler, "check", lambda self: None)
    monkeypatch.setattr(LocalSampler, "why_not", lambda self: "this test notes batches")
    monkeypatch.setattr(LanguageGame, "begin_iteration", begun)
    monkeypatch.setattr(ResumableStage, "GROUPS_BESIDE", 2)
    return events


@pytest.fixture
def run(tiny_model, tmp_path, write_lines) -> Callable[..., Path]:
    """Trains for two iterations with a judge, and returns the run directory."""
    prompts = write_lines("prompts.jsonl", *({"prompt": f"What is {i} plus {i}?"} for i in range(2 * PROMPTS + 2)))

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
        assert second.index("asked") < PROMPTS - 1
        events.all.clear()
        monkeypatch.setattr(LanguageGame, "judges_beside", False)
        afterwards = run(server.url, "afterwards")
    assert outputs(beside) == outputs(afterwards)
    for one, other in zip(judged(beside), judged(afterwards), strict=True):
        for name in ("requests", "answered", "cached", "cyclic_triples", "comparisons"):
            assert one[name] == other[name]
    assert judged(beside)[1]["hidden_seconds"] > 0.1
    assert "hidden_seconds" not in judged(beside)[0] | judged(afterwards)[1]


def test_a_run_that_dies_while_it_samples_and_judges_asks_nothing_twice(run, events: Events, tmp_path: Path) -> None:
    def die(batch: int) -> None:
        time.sleep(0.02)
        if batch == 13:
            raise MemoryError("killed")

    with serving(events.answer) as server:
        whole = outputs(run(server.url, "whole"))
        events.all.clear()
        events.before_batch = die
        with pytest.raises(Exception, match="memory"):
            run(server.url, "cut")
        parts = list((tmp_path / "cut/iteration_02/preferences.jsonl.parts").iterdir())
        assert parts
        events.before_batch = lambda batch: None
        cut = run(server.url, "cut", resume=True)
    assert outputs(cut) == whole
    assert len(events.questions) == len(set(events.questions))


def test_a_judge_that_fails_stops_sampling(run, events: Events) -> None:
    def refuse(body: dict) -> object:
        return Error(401) if events.all.count(("iteration", 2)) and len(events.questions) > questions else shorter(body)

    with serving(events.answer) as server:
        questions = PROMPTS * 2 + 8
        events.reply = refuse
        with raises(RequestRefused, "member judge", "401"):
            run(server.url, "run")
        assert 0 < events.of_iteration(2).count("sampled") < PROMPTS
        events.reply = shorter
        events.all.clear()
        directory = run(server.url, "run", resume=True)
        assert judged(directory)
