"""The embedded population, the user's own function, and what no preference can be."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from onpo_fast import evaluate, oracles, sampling, train
from onpo_fast.config import Config
from onpo_fast.data import Group, Response
from onpo_fast.errors import UserError

pytestmark = pytest.mark.usefixtures("without_plots")

PROMPT = [{"role": "user", "content": "How do I water tomatoes in summer?"}]


def group(*texts: str) -> Group:
    return Group(PROMPT, [1], [Response(text, [1], "eos", -1.0) for text in texts])


def test_population_is_a_preference() -> None:
    texts = ["Water tomatoes in the morning.", "You can do it! Enjoy your garden, friend!", "", "x " * 300]
    matrix = oracles.judge(oracles.load("population"), [group(*texts)], "population")[0]
    np.testing.assert_allclose(matrix + matrix.T, 1)
    np.testing.assert_allclose(np.diag(matrix), 0.5)
    again = oracles.Population()(PROMPT, texts)
    np.testing.assert_allclose(matrix, again, rtol=1e-12)


def test_population_can_go_in_circles() -> None:
    """A short, a warm and a thorough response beat each other in a circle: no score explains that."""
    short = "Daily."
    warm = "You will love your garden, dear friend! Happy you asked!"
    thorough = "Water tomatoes deeply in summer, early each day and at the roots, about two centimetres a week."
    matrix = oracles.Population()(PROMPT, [short, warm, thorough])
    assert oracles.cyclic_triples([matrix]) == (1, 1), matrix
    assert oracles.cyclic_triples([np.array([[0.5, 0.9, 0.9], [0.1, 0.5, 0.9], [0.1, 0.1, 0.5]])]) == (0, 1)
    assert oracles.cyclic_triples([np.full((2, 2), 0.5)]) == (0, 0)


@pytest.fixture
def oracle_module(tmp_path, monkeypatch):
    """Makes a module with the given source importable."""

    def make(source: str) -> str:
        name = f"oracle_{abs(hash(source))}"
        (tmp_path / f"{name}.py").write_text(source)
        return f"{name}:prefer"

    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield make
    sys.path[:] = before


def test_a_function_of_the_users(oracle_module) -> None:
    name = oracle_module(
        "def prefer(prompt, responses):\n"
        "    assert prompt[-1]['role'] == 'user'\n"
        "    return [[1.0 * (len(a) > len(b)) if len(a) != len(b) else 0.5 for b in responses] for a in responses]\n"
    )
    (matrix,) = oracles.judge(oracles.load(name), [group("a", "abc", "ab")], name)
    np.testing.assert_allclose(matrix, [[0.5, 0, 0], [1, 0.5, 1], [1, 0, 0.5]])


@pytest.mark.parametrize("many", [False, True])
def test_an_oracle_may_write_into_what_it_is_given(many: bool) -> None:
    def prefer(prompt: list, responses: list[str]) -> np.ndarray:
        prompt.clear()
        count = len([responses.pop() for _ in range(len(responses))])
        return np.full((count, count), 0.5)

    class Batched(oracles.BatchOracle):
        def many(self, groups, progress=lambda n: None):
            return [prefer(*one) for one in groups]

    first = group("a", "b", "c")
    (matrix,) = oracles.judge(Batched() if many else prefer, [first], "f")
    assert matrix.shape == (3, 3)
    assert first.prompt


def test_the_diagonal_is_not_read() -> None:
    matrix = oracles.checked([[float("nan"), 0.2], [0.8, 7]], 2, "here")
    np.testing.assert_allclose(matrix, [[0.5, 0.2], [0.8, 0.5]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_of_any_precision(dtype: torch.dtype) -> None:
    scores = torch.randn(4, generator=torch.Generator().manual_seed(0), requires_grad=True).to(dtype)
    matrix = oracles.checked(torch.sigmoid((scores[:, None] - scores[None, :]).float()).to(torch.float16), 4, "here")
    np.testing.assert_array_equal(matrix + matrix.T, np.ones((4, 4)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [[0.5]]", "expected a 2×2 matrix"),
        ("return [[0.5, float('nan')], [0.5, 0.5]]", r"P\(0 ≻ 1\) is nan"),
        ("return [[0.5, 1.2], [-0.2, 0.5]]", r"P\(0 ≻ 1\) is 1.2, not a probability"),
        ("return [[0.5, 0.9], [0.9, 0.5]]", r"P\(0 ≻ 1\) \+ P\(1 ≻ 0\) is 1.8, not 1"),
        ("return 'yes'", "not a matrix of numbers"),
        ("return [[0.5, 0.9], [0.9]]", "not a matrix of numbers .its rows have different lengths"),
        ("raise KeyError('boom')", r"it raised KeyError: 'boom' \(.*\.py, line 2\)"),
        ("return __import__('json').loads('x')", r"it raised JSONDecodeError: .* \(.*\.py, line 2\)"),
    ],
)
def test_bad_answers_name_the_oracle_and_the_prompt(oracle_module, body: str, message: str) -> None:
    name = oracle_module(f"def prefer(prompt, responses):\n    {body}\n")
    with pytest.raises(UserError, match=f"{name}, prompt 0 .*{message}"):
        oracles.judge(oracles.load(name), [group("a", "b")], name)


@pytest.mark.parametrize("name", ["no_such_module:f", "json:no_such_function", "json", "json:__name__", ":f"])
def test_oracles_that_cannot_be_had(name: str) -> None:
    with pytest.raises(UserError, match=f"--oracle {name}"):
        oracles.load(name)


# ---------------------------------------------------------------------------------------------------------------------
# Panels, and oracles that are asked about many groups at once
# ---------------------------------------------------------------------------------------------------------------------

LONGER = (
    "def prefer(prompt, responses):\n"
    "    return [[1.0 * (len(a) > len(b)) if len(a) != len(b) else 0.5 for b in responses] for a in responses]\n"
)


def test_a_panel_is_the_weighted_mean(oracle_module) -> None:
    name = oracle_module(LONGER)
    texts = ["Daily.", "You will love your garden, dear friend!", "Water tomatoes deeply in summer."]
    population = oracles.Population()(PROMPT, texts)
    longer = np.array([[0.5, 0, 0], [1, 0.5, 1], [1, 0, 0.5]])
    done: list[int] = []
    for expression in (f"0.7*population+0.3*{name}", f" 7 * population + 3*{name} "):  # weights are made to sum to 1
        matrices = oracles.judge(oracles.load(expression), [group(*texts)] * 3, expression, done.append)
        np.testing.assert_allclose(matrices[2], 0.7 * population + 0.3 * longer, rtol=1e-12)
    assert sum(done) == 6
    (half,) = oracles.judge(oracles.load(f"population+{name}"), [group(*texts)], "panel")
    np.testing.assert_allclose(half, (population + longer) / 2)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("0*population+1*population", "positive and finite, not 0"),
        ("-1*population+2*population", "positive and finite, not -1"),
        ("nan*population", "positive and finite, not nan"),
        ("x*population", "the weight 'x' is not a number"),
        ("0.5*population+", "expected WEIGHT"),
        ("0.5*population+0.5*nobody", 'judge or "module:function"'),
        ("population=x", "expected population"),
        ("openings=x", "expected openings$"),
        ("judge", "--oracle judge needs --judge_url"),
    ],
)
def test_panels_that_cannot_be(expression: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        oracles.load(expression)


def test_a_member_that_errs_is_named(oracle_module) -> None:
    name = oracle_module("def prefer(prompt, responses):\n    return [[0.5, 2], [-1, 0.5]]\n")
    with pytest.raises(UserError, match=f"--oracle panel, member {name}, prompt 0 .* is 2.0, not a probability"):
        oracles.judge(oracles.load(f"population+{name}"), [group("a", "b")], "panel")


class Batched(oracles.BatchOracle):
    """One of a user's own: prefers the first, and counts."""

    def __init__(self, answers: int | None = None) -> None:
        self.answers, self.released = answers, 0

    def many(self, groups, progress=lambda n: None):
        progress(len(groups))
        return [np.triu(np.ones((len(t), len(t)))) for _, t in groups][: self.answers]

    def release(self) -> None:
        self.released += 1

    def take_counters(self) -> dict[str, int]:
        return {"asked": 2, "failures": 0}


def test_a_batch_oracle() -> None:
    oracle = Batched()
    first, second = oracles.judge(oracle, [group("a", "b"), group("a", "b", "c")], "mine")
    np.testing.assert_array_equal(first, [[0.5, 1], [0, 0.5]])
    assert second.shape == (3, 3)
    assert oracle.released == 1
    panel = oracles.Panel([(1, "a", oracle), (1, "b", oracle), (1, "c", oracles.Population())])
    assert oracles.take_counters(panel) == {"asked": 4, "failures": 0}
    with pytest.raises(UserError, match="--oracle mine: it gave 1 matrices for 2 prompts"):
        oracles.judge(Batched(1), [group("a", "b")] * 2, "mine")


# ---------------------------------------------------------------------------------------------------------------------
# What else a user's function may do
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise SystemExit", "it raised SystemExit"),
        ("return torch.full((2, 2), 0.5 + 0j)", "not a matrix of numbers .it is complex."),
        ("return [[0.5, 1j], [0, 0]]", "not a matrix of numbers .it is complex."),
        ("return torch.ones(2, 2, 2).to_sparse()", "expected a 2×2 matrix, got shape .2, 2, 2."),
        ("return torch.eye(2).to_mkldnn()", "not a matrix of numbers"),
    ],
)
def test_odd_answers_are_one_line(oracle_module, body: str, message: str) -> None:
    name = oracle_module(f"import torch\ndef prefer(prompt, responses):\n    {body}\n")
    with pytest.raises(UserError, match=f"{name}, prompt 0 .*{message}"):
        oracles.judge(oracles.load(name), [group("a", "b")], name)


def test_a_sparse_tensor_is_a_matrix() -> None:
    matrix = oracles.checked(torch.tensor([[0.0, 1.0], [0.0, 0.0]]).to_sparse(), 2, "here")
    np.testing.assert_array_equal(matrix, [[0.5, 1], [0, 0.5]])


@pytest.mark.filterwarnings("error")
def test_async_oracles_are_named(oracle_module) -> None:
    with pytest.raises(UserError, match="prefer: it is async"):
        oracles.load(oracle_module("async def prefer(prompt, responses): return [[0.5]]\n"))

    class Awaited:
        async def __call__(self, prompt, responses): ...

    class AwaitedBatch:
        async def many(self, groups, progress): ...

    for oracle in (Awaited(), AwaitedBatch()):
        with pytest.raises(UserError, match=r"--oracle mine.*: it is async"):
            oracles.judge(oracle, [group("a", "b")], "mine")


def test_a_module_that_exits_is_named(oracle_module) -> None:
    with pytest.raises(UserError, match=r"cannot import it \(SystemExit: 0\)"):
        oracles.load(oracle_module("import sys; sys.exit(0)\n"))


# ---------------------------------------------------------------------------------------------------------------------
# In a run
# ---------------------------------------------------------------------------------------------------------------------

COUNTING = """
from pathlib import Path

class Counting:
    requests = 0

    def __call__(self, prompt, responses):
        self.requests += 1
        if Path("down").exists() and self.requests == 2:
            raise RuntimeError("down")
        return [[0.5] * len(responses)] * len(responses)

    def take_counters(self):
        taken, self.requests = self.requests, 0
        return {"requests": taken}

prefer = Counting()
"""


def test_what_was_asked_is_counted_however_it_ended(oracle_module, tiny_model, tmp_path, monkeypatch) -> None:
    """An oracle that dies halfway, in a run and in an evaluation; one that is asked again by hand."""
    monkeypatch.chdir(tmp_path)
    name = oracle_module(COUNTING)
    prompts = "".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in range(5))
    Path("prompts.jsonl").write_text(prompts)
    options = Config(
        model=str(tiny_model),
        prompts="prompts.jsonl",
        eval_fraction=0.4,
        oracle=name,
        out="run",
        iterations=1,
        prompts_per_iteration=3,
        responses_per_prompt=2,
        max_new_tokens=4,
        eval_samples=1,
        report_to="none",
    )

    def rows(stage: str) -> list[tuple[int, bool]]:
        records = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
        return [(row["requests"], row.get("stopped", False)) for row in records if row["stage"] == stage]

    Path("down").touch()
    with pytest.raises(UserError, match="it raised RuntimeError: down"):
        train.train(options)
    assert rows("judge") == [(2, True)]
    real = evaluate.Evaluator.evaluate
    monkeypatch.setattr(evaluate.Evaluator, "evaluate", lambda *given: (Path("down").touch(), real(*given))[1])
    Path("down").unlink()
    with pytest.raises(UserError, match="it raised RuntimeError: down"):
        train.train(options, resume=True)
    assert (rows("judge"), rows("evaluate")) == ([(2, True), (3, False)], [(2, True)])
    monkeypatch.setattr(evaluate.Evaluator, "evaluate", real)
    Path("down").unlink()
    train.train(options, resume=True)
    evaluate.main(["run", "--trust_run"])
    assert (rows("judge"), rows("evaluate")) == ([(2, True), (3, False)], [(2, True), (2, False), (2, False)])


RUN = {
    "iterations": 1,
    "prompts_per_iteration": 3,
    "responses_per_prompt": 2,
    "max_new_tokens": 4,
    "eval_samples": 1,
    "eval_fraction": 0.4,
    "out": "run",
    "report_to": "none",
    "prompts": "prompts.jsonl",
}

LISTENING = """
asked = []

def prefer(prompt, responses):
    asked.append((prompt, responses))
    {}
    return [[0.5] * len(responses)] * len(responses)
"""


@pytest.fixture
def prompts(tmp_path, monkeypatch) -> None:
    """Five, in prompts.jsonl where the test stands."""
    lines = (json.dumps({"prompt": f"Count to {n}{', please' * (n != 3)}."}) + "\n" for n in range(5))
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)


def test_a_function_is_tried_once_before_anything_is_sampled(oracle_module, prompts, tiny_model) -> None:
    """On the shortest prompt, also when a run goes on, unless nothing is left to judge; and by an evaluation."""
    name = oracle_module(LISTENING.format("pass"))
    config = Config(model=str(tiny_model), oracle=name, **RUN)
    train.train(config)
    asked = sys.modules[name.partition(":")[0]].asked
    assert asked[0] == ([{"role": "user", "content": "Count to 3."}], list(oracles.PROBE_TEXTS))
    tried = [responses for _, responses in asked].count(list(oracles.PROBE_TEXTS))
    assert (tried, len(asked)) == (1, 1 + 3 + 2)  # an iteration, the evaluation
    train.train(config, resume=True)
    assert len(asked) == 6
    evaluate.main(["run", "--trust_run"])
    assert len(asked) == 6 + 1 + 2
    assert asked[6][1] == list(oracles.PROBE_TEXTS)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return score(responses)", "it raised NameError: name 'score' is not defined"),
        ("return [0.5]", "expected a 2×2 matrix"),
        ("import torch; return torch.full((2, 2), torch.nan)", r"P\(0 ≻ 1\) is nan"),
    ],
)
@pytest.mark.parametrize("panel", ["{}", "population + {}"])
def test_a_function_of_no_use_leaves_nothing_behind(oracle_module, prompts, panel, body, message) -> None:
    """So that the same command line starts the run when it is mended. No policy is loaded for it."""
    name = oracle_module(LISTENING.format(body))
    with pytest.raises(UserError, match=f"--oracle .*{name}, tried before anything is sampled, prompt 0 .*{message}"):
        train.train(Config(model="org/none", oracle=panel.format(name), **RUN))
    assert not Path("run").exists()


def test_an_evaluation_by_another_oracle_says_so(oracle_module, prompts, tiny_model, capsys) -> None:
    """Nothing is mixed then: it goes on. One that is of no use stops it before anything is sampled."""
    name = oracle_module(LISTENING.format("pass  # a module of its own"))
    train.train(Config(model=str(tiny_model), oracle=name, **RUN))
    file = Path(name.partition(":")[0] + ".py")
    evaluate.main(["run", "--trust_run"])
    assert "is not what" not in capsys.readouterr().out
    file.write_text(LISTENING.format("return None"))
    del sys.modules[file.stem]
    importlib.invalidate_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "make_sampler", lambda *arguments: pytest.fail("a policy was sampled"))
        with pytest.raises(SystemExit):
            evaluate.main(["run", "--trust_run"])
    said = capsys.readouterr()
    assert f"--oracle {name} is not what run began with: {file} of {name} changed. The evaluation is" in said.out
    assert "tried before anything is sampled, prompt 0 ('Count to" in said.err


def test_a_function_from_another_module_is_known_by_both(oracle_module, tmp_path) -> None:
    """Of a package, and of a class; not by the standard library's files."""
    package = tmp_path / "tasteful"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from .rules import Taste, prefer\nimport functools\n\ntaste = Taste()\npartial = functools.partial(prefer)\n"
    )
    (package / "rules.py").write_text("def prefer(prompt, responses): ...\n\nclass Taste:\n    __call__ = prefer\n")

    def known(name: str) -> list[str]:
        return list(oracles.fingerprint(oracles.load(name), name, lambda path: path.name))

    for name in ("tasteful:prefer", "tasteful:taste"):
        assert known(name) == [f"tasteful/__init__.py of {name}", f"tasteful/rules.py of {name}"]
    whole = ["tasteful/__init__.py of tasteful:partial", "tasteful/rules.py of tasteful:partial"]
    assert known("tasteful:partial") == whole
    assert known("openings") == known("population") == known("operator:add") == []
    (first, _) = known("population + 2*tasteful:partial")
    assert first == "tasteful/__init__.py of member 2, tasteful:partial"


def test_the_program_that_was_started_is_no_part_of_it(monkeypatch) -> None:
    """Which may be the package's own, under the name that multiprocessing gives it, and an oracle in a checkout."""
    name = "experiments.cyclic_lm.turns:last_turn"
    module = types.ModuleType("__mp_main__")
    module.__file__ = train.__file__
    before = oracles.fingerprint(oracles.load(name), name, lambda path: path.name)
    monkeypatch.setitem(sys.modules, "__mp_main__", module)
    assert oracles.fingerprint(oracles.load(name), name, lambda path: path.name) == before
    module.__name__ = "run_it"  # as a script's own name for it
    monkeypatch.setitem(sys.modules, "run_it", module)
    assert oracles.fingerprint(oracles.load(name), name, lambda path: path.name) == before


def test_what_a_function_imports_is_part_of_it(oracle_module, tmp_path) -> None:
    """All of its package, and what is beside it: at once, inside a function, by a made name, from a folder of it."""
    for name, source in {
        "weights.py": "from inner.deep import K\n",
        "inner/__init__.py": "",
        "inner/deep.py": "import later\nK = 2\n",
        "inner/never.py": "",
        "later.py": "import json, numpy\n",
        "dynamic.py": "",
        "library/borrowed.py": "",
        "unrelated.py": "",
        "pack/__init__.py": "from . import k\n\ndef prefer(prompt, responses): ...\n",
        "pack/k.py": "import later\n",
        "pack/unused.py": "",
        "spaced/k.py": "def prefer(prompt, responses): ...\n",
        "numpy/data.txt": "",  # a folder that is no package
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    name = oracle_module(
        "import importlib, sys\nimport weights\n\ndef prefer(prompt, responses):\n"
        "    sys.path.append('library')\n    import borrowed\n    importlib.import_module('dyna' + 'mic')\n"
        "    return [[0.5] * len(responses)] * len(responses)\n"
    )

    def known(name: str, oracle: object = None) -> list[str]:
        found = oracles.fingerprint(oracle or oracles.load(name), name, lambda path: path.name)
        return [one.removesuffix(f" of {name}") for one in found]

    own = name.partition(":")[0] + ".py"
    imported = ["inner/__init__.py", "inner/deep.py", "inner/never.py", "later.py", own, "weights.py"]
    assert known(name) == sorted(imported)
    oracles.probe(oracles.load(name), name, [PROMPT], in_directory=False)
    assert known(name) == sorted([*imported, "dynamic.py", "library/borrowed.py"])
    others = {"dynamic.py", "library/borrowed.py", "inner/__init__.py", "inner/deep.py", own, "weights.py"}  # loaded
    assert set(known("pack:prefer")) - others == {"later.py", "pack/__init__.py", "pack/k.py", "pack/unused.py"}
    assert "spaced/k.py" in known("spaced.k:prefer")
