"""What a user did that cannot work: one line on stderr, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from onpo_fast import evaluate, export, report, train
from onpo_fast.config import Config, options_needing_trust, parse, parse_run, read_run
from onpo_fast.console import say
from onpo_fast.errors import UserError, command
from onpo_fast.files import atomic_write_directory, read_jsonl, write_jsonl
from onpo_fast.journal import Journal
from onpo_fast.journal import _line as journal_line
from onpo_fast.run.lock import locked
from onpo_fast.run.resumable import ResumableStage
from onpo_fast.run.tracking import Tracker

pytestmark = pytest.mark.usefixtures("without_plots")

GOOD = "".join(f'{{"prompt": "Count to {n}."}}\n' for n in range(6))
FILES = {
    "good.jsonl": GOOD,
    "empty.jsonl": "\n\n",
    "broken.jsonl": GOOD + '{"prompt": "x"\n',
    "missing.jsonl": GOOD + '{"text": "x"}\n',
    "blank.jsonl": GOOD + '{"prompt": " "}\n',
    "roles.jsonl": GOOD + '{"prompt": [{"role": "system", "content": "x"}]}\n',
    "image.jsonl": GOOD + '{"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}\n',
    "sharegpt.jsonl": '{"conversations": [{"from": "human", "value": "x"}]}\n' * 6,
    "tools.jsonl": GOOD + '{"prompt": "x", "tools": "{"}\n',
    "robot.jsonl": GOOD + '{"prompt": [{"role": "robot", "content": "x"}]}\n',
    "all_bad.jsonl": '{"prompt": ""}\n{"prompt": 3}\n',
    "broken.json": '[{"prompt": "x"},\n {"prompt" "y"}]',
    "broken.parquet": "PAR1",
    "typo.yaml": "# a run\nseed: 1\nitarations: 3\n",
    "broken.yaml": "eta: [3\nseed: 1\n",
    "list.yaml": "- seed\n",
    "twice.yaml": "seed: 1\neta: 2.0\nseed: 2\n",
    "value.yaml": "seed: 1\n\niterations: two\n",
    "null.yaml": "eta: null\nseed: null\n",
    "labels.yaml": "labels:\n",
    "switch.yaml": "eta: 3\nskip_bad_prompts: ~\n",
    "code.yaml": 'seed: !!python/object/apply:os.system ["touch owned"]\n',
    "nothing/readme.txt": "no dataset",
    "latin.yaml": b"model: M\xfcller\n",
    "latin/config.yaml": b"model: M\xfcller\n",
    "folder/config.yaml/inside": "",
    "theirs/readme.txt": "somebody's",
    "list/journal.json": "[]",
    "null/journal.json": "null",
    "other/journal.json": '{"trips": "to the sea"}',
    "folders/journal.json/inside": "",
}


def one_line(main: Callable, arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """What the command says on stderr, after its "error: "."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said.removeprefix("error: ").strip()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        # options
        ("--respones_per_prompt 2", "there is no option --respones_per_prompt; did you mean --responses_per_prompt?"),
        ("--iter=2", "there is no option --iter; did you mean --iterations?"),
        ("--xyzzy 1", "there is no option --xyzzy (see --help)"),
        ("--iterations 0", "--iterations must be at least 1, not 0"),
        ("--iterations 2.5", "--iterations must be a whole number, not 2.5"),
        ("--iterations", "--iterations needs a value"),
        ("--responses_per_prompt 1", "--responses_per_prompt must be at least 2, not 1"),
        ("--eta -1", "--objective onpo: eta must be a positive, finite number, not -1.0"),
        ("--eta 0", "--objective onpo: eta must be a positive, finite number, not 0.0"),
        ("--eta .nan", "--objective onpo: eta must be a positive, finite number, not nan"),
        ("--eta nan", "--eta must be a number, not nan"),
        ("--eta=", "--eta must be a number, not empty"),
        ("--eta=true", "--eta must be a number, not true"),
        ("--seed null", "--seed must be a whole number, not null"),
        ("--judge_request={", "--judge_request must be a JSON object, not {"),
        ("--chat_template_kwargs=[1]", "--chat_template_kwargs must be a JSON object, not [1]"),
        ("--chat_template_kwargs=no", "--chat_template_kwargs must be a JSON object, not no"),
        *(
            (f'--chat_template_kwargs={{"{name}":true}}', f"--chat_template_kwargs must leave {name} alone: it is for")
            for name in ("tools", "tokenize", "messages", "conversation", "add_generation_prompt", "return_dict")
        ),
        ("--iterations 1 2", "one argument too many: 2 (see --help)"),
        ("--prompts=", "--prompts must not be empty"),
        ("--eval_prompts=", "--eval_prompts must not be empty"),
        ("--learning_rate 1e37", "--learning_rate must be at most 1e30"),
        ("--labels hard", "--labels must be one of soft, sampled, not hard"),
        ("--pairing random", "--pairing must be one of iid, all_pairs, best_worst, knockout, not 'random'"),
        ("--skip_bad_prompts perhaps", "--skip_bad_prompts must be true or false, not perhaps"),
        ("--oracle nowhere:f", "--oracle nowhere:f: cannot import it (ModuleNotFoundError: No module named 'nowhere')"),
        ("--oracle pair-model --oracle_model x/y --oracle_device gpu7", "--oracle_device gpu7 is not a device"),
        ("--report_to wandb", "--report_to wandb needs"),
        # YAML files
        ("--config typo.yaml", "typo.yaml, line 3: there is no option itarations; did you mean iterations?"),
        ("--config broken.yaml", "broken.yaml, line 2: not YAML"),
        ("--config list.yaml", 'list.yaml must hold options as "name: value"'),
        ("--config twice.yaml", "twice.yaml, line 3: seed is there twice, first in line 1"),
        ("--config value.yaml", "value.yaml, line 3: iterations must be a whole number, not two"),
        ("--config value.yaml --iterations 3", "value.yaml, line 3: iterations must be a whole number, not two"),
        ("--config null.yaml", "null.yaml, line 2: seed must be a whole number, not null"),
        ("--config null.yaml --seed 3", "null.yaml, line 2: seed must be a whole number, not null"),
        ("--config labels.yaml", "labels.yaml, line 1: labels must be one of soft, sampled, not null"),
        ("--config switch.yaml", "switch.yaml, line 2: skip_bad_prompts must be true or false, not null"),
        ("--config code.yaml", "code.yaml, line 1: not YAML (could not determine a constructor"),
        ("--config gone.yaml", "cannot read or write gone.yaml: No such file or directory"),
        # prompts
        ("--config latin.yaml", "latin.yaml: not UTF-8 ('utf-8' codec can't decode byte 0xfc in position 8"),
        ("--prompts gone.jsonl", "cannot read gone.jsonl: there is no such file"),
        ("--prompts \x1b[2Jgone.jsonl", r"cannot read \x1b[2Jgone.jsonl: there is no such file"),
        ("--prompts empty.jsonl", 'empty.jsonl has no prompts: each record needs a "prompt"'),
        ("--prompts broken.jsonl", "broken.jsonl, line 7: not JSON"),
        ("--prompts missing.jsonl", 'missing.jsonl, line 7: expected an object with a "prompt" (it has text;'),
        ("--prompts good.jsonl --prompt_column text", 'good.jsonl, line 1: expected an object with a "text"'),
        ("--prompts blank.jsonl", "blank.jsonl, line 7: a message is empty"),
        ("--prompts roles.jsonl", "roles.jsonl, line 7: the conversation has no turn of the user"),
        ("--prompts robot.jsonl", "robot.jsonl, line 7: the role 'robot' is not one of system, developer, user, assi"),
        ("--prompts image.jsonl", "image.jsonl, line 7: a message has a part of the type 'image': only text is read"),
        ("--prompts sharegpt.jsonl", 'sharegpt.jsonl, line 1: "conversations" is in ShareGPT\'s format: its messages'),
        ("--prompts tools.jsonl", 'tools.jsonl, line 7: "tools" is text that is not JSON (Expecting property name'),
        *(
            (f"--prompts {name}", f"cannot read {name}: it cannot be read a second time; save it to a file first")
            for name in ("/dev/zero", "/dev/stdin", "-")
        ),
        ("--prompts broken.json", "broken.json, line 2: not JSON"),
        ("--prompts broken.parquet", "cannot read broken.parquet: "),
        ("--prompts nothing", "cannot read nothing as a directory that datasets.save_to_disk wrote"),
        ("--prompts org/name", "cannot read org/name: it is not a file or directory here, and as a dataset: "),
        ("--prompts all_bad.jsonl --skip_bad_prompts", "all_bad.jsonl has no prompts: 2 bad prompts skipped, the"),
        # models
        ("--model org/name", "cannot load the tokenizer of org/name: it is no directory here, and as a hub's id: "),
        ("--model ./gone", "cannot load the model ./gone: there is no such directory"),
        ("--model good.jsonl", "cannot load the model good.jsonl: it is a file, where a model is a directory"),
        ("--model nothing", "nothing is not a model directory: it has no config.json"),
        ("--device gpu", "--device gpu is not a device"),
    ],
)
def test_training(here: Path, line: str, message: str, capsys, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    before = sorted(here.rglob("*"))
    said = one_line(train.main, [*line.split(), "--out", "out"], capsys)
    assert said.startswith(message), said
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("main", "line", "message"),
    [
        (evaluate.main, "nothing", "nothing is not a run directory: it has no config.yaml"),
        (evaluate.main, "nothing --out x", "there is no option --out"),
        (report.main, "", "the following arguments are required: DIR"),
        *(
            (main, "--nope", "there is no option --nope (see --help)")
            for main in (evaluate.main, report.main, export.main)
        ),
        (train.main, "--out=", "--out must not be empty"),
        (train.main, "--out good.jsonl", "--out good.jsonl is a file: give a directory"),
        (train.main, "--resume --out=", "--resume needs --out"),
        (report.main, "nothing more", "one argument too many: more"),
        (export.main, "nothing", "nothing is not a run directory: it has no config.yaml"),
        (export.main, "nothing --iteration 2", "there is no option --iteration; did you mean --iterations?"),
        *(
            (main, "latin", "latin/config.yaml is not the configuration of a run: latin/config.yaml: not UTF-8 (")
            for main in (evaluate.main, export.main)
        ),
        (report.main, "latin", "latin/config.yaml: not UTF-8 ("),
        *(
            (main, "folder", "cannot read or write folder/config.yaml: Is a directory")
            for main in (evaluate.main, report.main, export.main)
        ),
        # runs to go on with
        (train.main, "--resume", "--resume needs --out"),
        (train.main, "--resume --out gone", "gone has no run to continue; to start one there, give its options too"),
        (train.main, "--resume --force --out=theirs", "theirs has no run to continue"),
        (train.main, "--resume --out theirs --seed 1", "--out theirs is not empty, and has no run to go on with: give"),
        (train.main, "--resume --out latin", "latin/config.yaml is not the configuration of a run: "),
        (train.main, "--resume --out folder", "cannot read or write folder/config.yaml: Is a dir"),
        *(
            (
                train.main,
                f"--resume --out {name} --seed 1",
                f"{name}/journal.json is damaged (not the journal of a run)",
            )
            for name in ("list", "null", "other")
        ),
        (train.main, "--resume --out folders", "cannot read or write folders/journal.json: Is a directory"),
    ],
)
def test_other_commands(here: Path, main: Callable, line: str, message: str, capsys) -> None:
    before = sorted(here.rglob("*"))
    assert one_line(main, line.split(), capsys).startswith(message)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a file"), "cannot read or write a file: Permission den"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a.partial", None, "a"), "cannot read or write a: Is "),
        (OSError(errno.ENOSPC, "No space left on device", "a file"), "no space left for a file: free some space, and "),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left for a file: free some space, and "),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a file"), "no space left in the disk quota for a file: free "),
        (OSError(errno.EFBIG, "File too large", "a file"), "a file would exceed the maximum size of a file: raise "),
        (OSError(errno.EIO, "Input/output error", b"bytes"), "cannot read or write bytes: Input/output error"),
        (OSError(errno.EBADF, "Bad file descriptor"), "the operating system refused an operation: Bad file"),
    ],
)
def test_what_the_system_refuses(error: OSError, message: str, capsys) -> None:
    def fail(argv: list[str]) -> None:
        raise error

    assert one_line(command(fail), [], capsys).startswith(message)
    with pytest.raises(OSError, match=error.strerror):
        command(fail)(["--debug"])


@pytest.mark.parametrize(
    ("error", "message"),
    [  # as tokenizers, safetensors and pyarrow say it
        (Exception("No space left on device (os error 28)"), "no space left for run/policy: free some space"),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), "no space left in the disk quota for run/p"),
        (Exception("File too large (os error 27)"), "run/policy would exceed the maximum size of a file"),
        (RuntimeError("write failed: Input/output error"), "cannot read or write run/policy: Input/output error"),
        (OSError(errno.EFBIG, "File too large"), "run/policy would exceed"),
    ],
)
def test_what_libraries_make_of_the_system_s_errors(here: Path, error: Exception, message: str, capsys) -> None:
    def fill(directory: Path) -> None:
        (directory / "file").write_text("half")
        raise error

    def save(argv: list[str]) -> None:
        atomic_write_directory(Path("run/policy"), fill)

    assert one_line(command(save), [], capsys).startswith(message)
    assert not list(Path("run").iterdir())

    def other(directory: Path) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        atomic_write_directory(Path("run/policy"), other)


@pytest.mark.parametrize("main", [train.main, evaluate.main, export.main, report.main])
def test_a_nul_character(here: Path, main: Callable, capsys) -> None:
    for line in (["a\0b"], ["--out", "a\0b"], ["--out=a\0b", "--resume"]):
        assert one_line(main, line, capsys).startswith("an argument holds a NUL character")


@pytest.mark.parametrize("option", ["out", "model", "prompts", "eval_prompts", "judge_cache"])
def test_a_nul_character_in_a_file_of_options(here: Path, option: str, capsys) -> None:
    (here / "nul.yaml").write_text(f'{option}: "a\\0b"\n')
    assert f"--{option} holds a NUL character" in one_line(train.main, ["--config", "nul.yaml"], capsys)


def test_a_message_of_any_length_is_one_line_that_fits(capsys) -> None:
    def fail(argv: list[str]) -> None:
        raise UserError("the beginning " + "x\x1b[2J\n" * 100_000 + " the end")

    said = one_line(command(fail), [], capsys)
    assert len(said) < 10_000  # escapes count after it is cut
    assert said.startswith("the beginning x")
    assert said.endswith("the end")
    assert "\x1b" not in said


def test_what_is_printed_of_a_name_cannot_steer_the_terminal(capsys) -> None:
    say("into run\x1b[31m :smile: [bold]x\n\x9b2J")
    assert capsys.readouterr().out == "into run\\x1b[31m :smile: [bold]x \\x9b2J\n"


def test_a_run_at_work_is_not_evaluated(here: Path, capsys) -> None:
    """It would write the same files. A report is only read, and its page is written whole."""
    run = here / "run"
    lock = locked(run)
    (run / "config.yaml").write_text(Config(out="run").to_yaml())
    before = sorted(run.rglob("*"))
    assert one_line(evaluate.main, ["run"], capsys) == "run is in use by another process"
    assert sorted(run.rglob("*")) == before
    report.main(["run"])
    assert (run / "report.html").exists()
    lock.release()


def test_an_interrupted_command_says_nothing(capsys) -> None:
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        command(interrupted)([])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------------------
# Model directories
# ---------------------------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def adapter(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{}")


def truncated(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").unlink()  # a link
    (directory / "model.safetensors").write_bytes(data[:100_000])


def configured(directory: Path, **values) -> None:
    old = json.loads((directory / "config.json").read_text())
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps({**old, **values}))


def narrow(directory: Path, rows: int = 200) -> None:
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:rows].clone()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def small_vocabulary(directory: Path) -> None:
    narrow(directory)
    configured(directory, vocab_size=200)


def endless_token(directory: Path) -> None:
    (directory / "generation_config.json").unlink(missing_ok=True)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 10**30}))


def own_code(directory: Path) -> None:
    configured(directory, model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})
    (directory / "mine.py").write_text("open('owned', 'w').close()\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.safetensors"), "broken has no weights: expected model.safetensors"),
        (without("chat_template.jinja"), "the tokenizer of broken has no chat template"),
        (without("tokenizer.json"), "cannot load the tokenizer of broken: "),
        (without("config.json"), "broken is not a model directory: it has no config.json"),
        (pickled, "broken has its weights in pytorch_model.bin: only safetensors are read"),
        (adapter, "broken has both a model and an adapter: keep the files of one of them"),
        (truncated, "cannot load the model broken: "),
        (lambda directory: configured(directory, num_hidden_layers=3), "broken lacks 9 of the weights that its config"),
        (narrow, "the weights of broken do not fit its config.json: model.embed_tokens.weight is (200, 32) where it"),
        (small_vocabulary, "the tokenizer of broken does not fit its model: it has tokens up to 258, and the "),
        (own_code, "cannot load the model broken: it comes with Python code"),
        (
            lambda directory: configured(directory, num_hidden_layers=-1),
            "cannot load the model broken: its config.json says num_hidden_layers: -1",
        ),
        (endless_token, "the generation_config.json of broken has the eos_token_id 1000000000000000000000000000000"),
    ],
    ids=[
        "weights",
        "template",
        "tokenizer",
        "config",
        "pickle",
        "adapter",
        "truncated",
        "layers",
        "shapes",
        "rows",
        "code",
        "negative",
        "eos",
    ],
)
def test_model_directories(here: Path, tiny_model: Path, change: Callable, message: str, capsys) -> None:
    shutil.copytree(tiny_model, "broken", copy_function=lambda source, target: Path(target).symlink_to(source))
    change(here / "broken")
    before = sorted(here.rglob("*"))
    said = one_line(train.main, ["--model", "broken", "--out", "out"], capsys)
    assert said.startswith(message), said
    assert sorted(here.rglob("*")) == before


def test_a_prompt_longer_than_the_context(here: Path, tiny_model: Path, capsys) -> None:
    (here / "long.jsonl").write_text(GOOD + json.dumps({"prompt": "long " * 9000}) + "\n" + '{"prompt": ""}\n')
    arguments = [
        "--model",
        str(tiny_model),
        "--prompts",
        "long.jsonl",
        "--out",
        "out",
        "--iterations",
        "1",
        "--max_new_tokens",
        "2",
        "--responses_per_prompt",
        "2",
        "--eval_samples",
        "1",
    ]
    (here / "long_only.jsonl").write_text((here / "long.jsonl").read_text().replace('{"prompt": ""}\n', ""))
    said = one_line(train.main, [*arguments, "--prompts", "long_only.jsonl"], capsys)
    assert "it exceeds the model's context of 512 tokens" in said
    assert not (here / "out").exists()
    train.main([*arguments, "--skip_bad_prompts"])
    assert "2 bad prompts skipped, the first: long.jsonl, line 8: a message is empty" in capsys.readouterr().out
    records = [json.loads(line) for line in (here / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (prompts,) = [record for record in records if record["stage"] == "prompts"]
    assert (prompts["train"] + prompts["held_out"], prompts["skipped"]) == (6, 2)


def test_responses_that_are_all_the_same(here: Path, tiny_model: Path, capsys) -> None:
    """A policy that says one thing leaves nothing to compare: a clean stop, with the responses there to look at."""
    said = one_line(
        train.main,
        [
            "--model",
            str(tiny_model),
            "--prompts",
            "good.jsonl",
            "--out",
            "out",
            "--max_new_tokens",
            "3",
            "--temperature",
            "1e-6",
            "--prompts_per_iteration",
            "2",
        ],
        capsys,
    )
    assert said.startswith("iteration 1: no pair to learn from")
    assert (here / "out/iteration_01/responses.jsonl").exists()
    assert not (here / "out/iteration_01/pairs.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------------------
# A run directory from a stranger
# ---------------------------------------------------------------------------------------------------------------------

EVIL = "evil.py", "open('owned', 'w').close()\ndef f(prompt, responses): return [[0.5] * len(responses)] * 2\n"


def strangers_run(here: Path, journal: bool = True, file: bool = True, **options: object) -> Path:
    """A run directory with these options, in its journal or its config.yaml."""
    run = here / "run"
    run.mkdir()
    config = Config(out="run", **options)
    if file:
        (run / "config.yaml").write_text(config.to_yaml())
    if journal:
        Journal(run).begin({"options": vars(config)})
    (here / EVIL[0]).write_text(EVIL[1])
    return run


SERVER = {"sampler": "server", "sampler_reload": "./evil", "sampler_url": "http://x/v1"}
ASKED = [  # options; what the refusal says of one, and what it says to add
    ({"oracle": "evil:f"}, "oracle asks to run the Python code of evil:f", "--oracle evil:f"),
    ({"oracle": "population+2*evil:f"}, "oracle asks to run the Python code of p", "--oracle 'population+2*evil:f'"),
    ({"trust_remote_code": True}, "trust_remote_code asks to run the Python code that comes", "--trust_remote_code"),
    (
        {"oracle": "judge", "judge_url": "http://x/v1"},
        "judge_url asks to send conversations to",
        "--judge_url http://x/v1",
    ),
    ({"judge_request": {"a": 1}}, 'judge_request asks to send {"a": 1} with', """--judge_request '{"a": 1}'"""),
    ({"judge_key_variable": "SOME_SECRET"}, "judge_key_variable asks for a key from", "--judge_key_variable NAME"),
    (
        {"sampler_key_variable": "SOME_SECRET", **SERVER},
        "sampler_url asks to send prompts to",
        "--sampler_url http://x/v1 --sampler_reload ./evil --sampler_key_variable NAME",
    ),
    (
        SERVER,
        "sampler_url asks to send prompts to http://x/v1; run",
        "--sampler_url http://x/v1 --sampler_reload ./evil",
    ),
    ({"judge_prompt": "secret.txt"}, "judge_prompt asks to read secret.txt", "--judge_prompt secret.txt"),
    ({"judge_cache": "/x/y"}, "judge_cache asks to write /x/y", "--judge_cache /x/y"),
]


@pytest.mark.parametrize(("options", "message", "remedy"), ASKED)
@pytest.mark.parametrize("where", ["file", "journal", "both"])
def test_what_a_run_directory_asks_for(
    here: Path, options: dict, message: str, remedy: str, where: str, capsys, monkeypatch
) -> None:
    """Each command that would obey it names the file and its line, and does nothing."""
    run = strangers_run(here, journal=where != "file", file=True, **options)
    name, *_ = list(options)[-1:]
    lines = (run / "config.yaml").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.startswith(f"{name}:"))
    there = f"run/config.yaml, line {line}"
    if where == "journal":
        (run / "config.yaml").write_text("seed: 0\n")
        there = "run/journal.jsonl"
    monkeypatch.delattr("onpo_fast.oracles.load")
    monkeypatch.delattr("onpo_fast.models.resident.load")
    commands = [(evaluate.main, ["run"])]
    if where != "journal":  # where a config.yaml that lacks options is refused
        commands.append((train.main, ["--resume", "--out", "run"]))
    if name == "trust_remote_code":
        commands.append((export.main, ["run", "--alpaca", "good.jsonl"]))
    before = sorted(here.rglob("*"))
    for main, arguments in commands:
        said = one_line(main, arguments, capsys)
        assert said.startswith(f"{there}: {message}"), said
        assert f"give {remedy} on the command line, or --trust_run if you trust whoever made run" in said
        assert "SOME_SECRET" not in said
    assert sorted(here.rglob("*")) == before


SAMPLED_ELSEWHERE = [
    {**SERVER, "sampler_key_variable": "SOME_TOKEN", "sampler_concurrency": 3},
    {**SERVER, "sampler_reload": "vllm"},
    {"sampler": "vllm", "vllm_python": sys.executable, "vllm_options": {"enforce_eager": True}},
]


@pytest.mark.parametrize("options", SAMPLED_ELSEWHERE)
def test_an_evaluation_takes_what_its_refusal_asks_for(here: Path, options: dict, capsys, monkeypatch) -> None:
    """And other options of the program that samples, or another program."""
    strangers_run(here, **options)
    seen: list[Config] = []
    monkeypatch.setattr(evaluate, "check_sampler", seen.append)
    monkeypatch.setattr(evaluate, "locked", lambda directory: sys.exit(0))

    def accepted(*flags: str) -> Config:
        with pytest.raises(SystemExit) as ended:
            evaluate.main(["run", *flags])
        assert ended.value.code == 0, capsys.readouterr().err
        return seen[-1]

    said = one_line(evaluate.main, ["run"], capsys)
    remedy = shlex.split(said.partition(", give ")[2].partition(" on the command line")[0])
    flags = ["SOME_TOKEN" if flag == "NAME" else flag for flag in remedy]
    assert options.items() <= vars(accepted(*flags)).items()
    other = ["--sampler_timeout", "5"] if options["sampler"] == "server" else ["--vllm_options", '{"seed_": 1}']
    changed = accepted(*flags, *other)
    assert (changed.sampler_timeout, changed.vllm_options) in ((5.0, None), (600.0, {"seed_": 1}))
    local = accepted("--sampler", "local")
    assert local == replace(Config(out="run"), sampling_batch_size=local.sampling_batch_size)
    wrong = ["--sampler", "server", "--sampler_url", "x", "--sampler_reload", "vllm"]
    assert one_line(evaluate.main, ["run", *wrong], capsys).startswith("--sampler_url")


def test_a_command_is_shown_whole(here: Path, capsys) -> None:
    command = "true " + 150 * "#" + "; ./evil"
    strangers_run(here, **{**SERVER, "sampler_reload": command})
    assert one_line(evaluate.main, ["run"], capsys).count(command) == 2
    shutil.rmtree("run")
    strangers_run(here, **{**SERVER, "sampler_reload": "true " + 5000 * "#" + "; ./evil"})
    said = one_line(evaluate.main, ["run"], capsys)
    assert "#" not in said
    assert "--sampler_reload VALUE" in said


def test_a_run_reports_to_nobody_unasked(here: Path, capsys) -> None:
    strangers_run(here, report_to="wandb")
    assert options_needing_trust(Config()) == []
    mixed = Config(report_to="none", oracle="0.5*population+reward-model=x", oracle_model="org/name")
    assert options_needing_trust(mixed) == []
    theirs = Config(report_to="wandb", oracle="evil:f")
    assert options_needing_trust(theirs) == ["oracle", "report_to"]  # then "to go on" has the flag
    said = one_line(train.main, "--resume --out run".split(), capsys)
    assert "report_to asks to report to Weights & Biases with your key. If you want that, give --report_to w" in said
    assert read_run(Path("run"), names=evaluate.ASKS).report_to == "wandb"  # whose numbers stay in the directory


@pytest.mark.parametrize(("options", "message", "remedy"), ASKED)
def test_what_is_given_or_allowed_is_obeyed(here: Path, options: dict, message: str, remedy: str) -> None:
    """On the command line, in a file that it names, or all of it."""
    strangers_run(here, **options)
    texts = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in options.items()}
    remedies = [f"--{name}={text}" for name, text in texts.items()]
    mine = "".join(f"{name}: {json.dumps(value)}\n" for name, value in options.items())
    (here / "mine.yaml").write_text(mine)
    line = ["--resume", "--out", "run"]
    for added in (remedies, ["--trust_run"], ["--config", "mine.yaml"]):
        name = next(iter(options))
        if added[0] == "--config" and name.endswith("_key_variable"):
            with pytest.raises(UserError, match=rf"^mine.yaml, line 1: {name} must end in _API_KEY or _TOK"):
                parse_run([*line, *added])
            continue
        config, _ = parse_run([*line, *added])
        assert {name: getattr(config, name) for name in options} == options
    for flags in (remedies, ["--trust_run"]):
        assert {name: getattr(read_run(Path("run"), flags), name) for name in options} == options


@pytest.mark.parametrize("file", ["run/config.yaml", "run/../run/other.yaml", "link.yaml"])
def test_the_runs_own_file_gives_nothing(here: Path, file: str) -> None:
    """Named or not, by whatever name; also where it lies elsewhere, and the run has a link to it."""
    run = strangers_run(here, oracle="evil:f")
    (run / "other.yaml").write_text("oracle: evil:f\n")
    Path("link.yaml").symlink_to("run/other.yaml")
    with pytest.raises(UserError, match="asks to run the Python code of evil:f"):
        parse_run(["--resume", "--out", "run", "--config", file])
    (run / "config.yaml").rename("elsewhere.yaml")
    (run / "config.yaml").symlink_to(here / "elsewhere.yaml")
    with pytest.raises(UserError, match=r"^run/config.yaml, line \d+: oracle asks to run"):
        parse_run(["--resume", "--out", "run"])


def test_a_file_names_no_other_secret(here: Path, capsys) -> None:
    """A configuration is often another's; the command line is the user's."""
    lines = "judge_url: http://localhost:1/v1\njudge_key_variable: AWS_SECRET_ACCESS_KEY\noracle: judge\n"
    (here / "theirs.yaml").write_text(lines)
    said = one_line(train.main, ["--config", "theirs.yaml", "--out", "out"], capsys)
    assert said.startswith("theirs.yaml, line 2: judge_key_variable must end in _API_KEY or _TOKEN. Give anot")
    assert "AWS" not in said
    for added in (["--judge_key_variable", "AWS_SECRET_ACCESS_KEY"], ["--trust_run"]):
        assert parse(["--config", "theirs.yaml", *added]).judge_key_variable == "AWS_SECRET_ACCESS_KEY"
    (here / "theirs.yaml").write_text("judge_key_variable: THEIR_API_KEY\n")
    assert parse(["--config", "theirs.yaml"]).judge_key_variable == "THEIR_API_KEY"


def test_pairs_are_exported_whatever_a_run_asks_for(here: Path, capsys) -> None:
    strangers_run(here, trust_remote_code=True, oracle="evil:f")
    assert one_line(export.main, ["run"], capsys) == "run has no pairs yet"
    said = one_line(export.main, ["run", "--trust_remote_code"], capsys)
    assert said.startswith("--trust_remote_code goes with --alpaca")


@pytest.mark.parametrize("name", ["config.yaml", "journal.jsonl", "journal.json"])
@pytest.mark.parametrize(
    "content",
    [
        None,
        "/dev/zero",
        *(
            c.encode()
            for c in (
                "seed: " + 5000 * "1",
                "seed: 0x" + 5000 * "f",
                "a: &a [*a]",
                "judge_request: &a {b: *a}",
                300_000 * "[",
                '{"options": {"checksum": null, "note": {"seed": "x"}}}',
                '{"options": {"checksum": null, "note": {"eta": true}}}',
                '{"options": {"checksum": null, "note": {"seed": ' + 400 * "1" + "}}}",
                100_000 * '{"a":',
                "NaN",
                "\\0",
            )
        ),
    ],
)
def test_odd_files_are_one_line(here: Path, name: str, content: bytes | str | None, capsys) -> None:
    strangers_run(here)
    file = here / "run" / name
    for journal in Journal.FILES[name == "config.yaml" :]:
        (here / "run" / journal).unlink()
    file.unlink(missing_ok=True)
    if name != "config.yaml" and content is not None:
        (here / "run/config.yaml").unlink()
    if content is None:
        os.mkfifo(file)
    elif isinstance(content, str):
        file.symlink_to(content)
    else:
        file.write_bytes(content)
    for main, arguments in ((train.main, "--resume --out run --device cpu".split()), (evaluate.main, ["run"])):
        said = one_line(main, arguments, capsys)
        assert "run" in said
        assert len(said) < 2000


# ---------------------------------------------------------------------------------------------------------------------
# As processes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["report", "evaluate", "export", "train --resume --out"])
def test_nothing_is_imported_from_where_a_user_stands(tmp_path: Path, command: str) -> None:
    """A run's folder with files of the names that Python, or what is installed, would be looked for under."""
    names = {*sys.stdlib_module_names, *(one.split(".")[0] for one in sys.modules)} - {"onpo_fast"}
    for name in filter(str.isidentifier, names):
        (tmp_path / f"{name}.py").write_text(f"open('owned', 'a').write('{name} ')\n")
    words = [sys.executable, "-m", *f"onpo_fast.{command} .".split()]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert not (tmp_path / "owned").exists(), (tmp_path / "owned").read_text()
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--no_such_flag 1", "error: there is no option --no_such_flag (see --help)"),
        ("--model nothing", "error: nothing is not a model directory"),
    ],
)
def test_a_process(here: Path, line: str, message: str) -> None:
    words = [sys.executable, "-m", "onpo_fast.train", *line.split(), "--out", "out"]
    done = subprocess.run(words, cwd=here, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert not (here / "out").exists()


def test_what_may_be_a_key_is_not_said_back(here: Path, capsys) -> None:
    """In the place of its variable's name, whether it can be one or, in a run that goes on, has changed."""
    assert "sk-" not in one_line(train.main, ["--judge_key_variable", "sk-1-secret"], capsys)
    options = vars(Config()) | {"out": "run"}
    (here / "run").mkdir()
    Journal(here / "run").begin({"options": options})
    said = one_line(train.main, ["--resume", "--out", "run", "--judge_key_variable", "sk_secret"], capsys)
    assert said.startswith("run began with other options: --judge_key_variable. Nothing is finished there: add --force")
    (here / "run" / "iteration_01").mkdir()
    said = one_line(train.main, ["--resume", "--out", "run", "--judge_key_variable", "sk_secret"], capsys)
    assert said.startswith("run began with other options: --judge_key_variable. Leave")


def test_debug_shows_the_traceback(here: Path) -> None:
    with pytest.raises(UserError):
        train.main(["--eta", "0", "--debug"])


def test_switches_need_no_value() -> None:
    config = parse(["--skip_bad_prompts", "--trust_remote_code", "--seed", "1", "--gradient_checkpointing"])
    assert (config.skip_bad_prompts, config.trust_remote_code, config.gradient_checkpointing) == (True, True, True)
    assert not parse(["--gradient_checkpointing", "false"]).gradient_checkpointing
    assert not Config().trust_remote_code


# ---------------------------------------------------------------------------------------------------------------------
# What counts as given on the command line, and what a file of options may hold
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [["--out", "oracle"], ["--out=oracle"]])
def test_the_name_of_a_directory_gives_no_option(here: Path, where: list[str], capsys) -> None:
    """Nor does any other value that reads like an option."""
    strangers_run(here, oracle="evil:f").rename("oracle")
    said = one_line(train.main, ["--resume", *where], capsys)
    assert "oracle asks to run the Python code of evil:f" in said
    Path("oracle").rename("--oracle=evil:f")
    said = one_line(train.main, ["--resume", "--out=--oracle=evil:f"], capsys)
    assert "oracle asks to run the Python code of evil:f" in said
    assert one_line(train.main, ["--resume", "--out", "--oracle=evil:f"], capsys)  # no value, and no --out
    assert not (here / "owned").exists()


def test_a_key_of_a_dictionary_is_given_with_a_dot(here: Path) -> None:
    """But what a stranger's file has beside it is not."""
    strangers_run(here)
    config, _ = parse_run(["--resume", "--force", "--out", "run", "--judge_request.foo", "1"])
    assert config.judge_request == {"foo": "1"}
    shutil.rmtree("run")
    strangers_run(here, judge_request={"evil": 1})
    with pytest.raises(UserError, match=r'judge_request asks to send \{"evil": 1, "foo": "1"\}'):
        parse_run(["--resume", "--force", "--out", "run", "--judge_request.foo", "1"])
    config, _ = parse_run(["--resume", "--force", "--out", "run", '--judge_request={"foo": 1}'])
    assert config.judge_request == {"foo": 1}


ODD_VALUES = [  # of the option seed
    ("!!bool foo", "!!bool does not fit the value 'foo'"),
    ('!!int ""', "!!int does not fit the value ''"),
    ("!!timestamp foo", "!!timestamp does not fit the value 'foo'"),
    ('"\\ud800"', "'\\ud800' holds half of a surrogate pair"),
]


@pytest.mark.parametrize(("value", "message"), ODD_VALUES)
def test_values_unlike_their_yaml_tags(here: Path, value: str, message: str, capsys) -> None:
    (here / "odd.yaml").write_text(f"eta: 3.0\nseed: {value}\n")
    said = one_line(train.main, ["--config", "odd.yaml"], capsys)
    assert said.startswith("odd.yaml, line 2: ")
    assert message in said
    run = strangers_run(here)
    (run / "config.yaml").write_text(f"eta: 3.0\nseed: {value}\n")
    for main, arguments in (
        (train.main, ["--resume", "--out", "run"]),
        (evaluate.main, ["run"]),
        (export.main, ["run"]),
        (report.main, ["run"]),
    ):
        said = one_line(main, arguments, capsys)
        assert "run/config.yaml, line 2: " in said
        assert message in said


@pytest.mark.parametrize("value", ["!!bool foo", "!!int ''", "!!timestamp foo", "\ud800"])
def test_such_values_on_the_command_line(here: Path, value: str, capsys) -> None:
    for arguments in (["--seed", value], [f"--seed={value}"]):
        assert "--seed" in one_line(train.main, arguments, capsys) or value == "\ud800"


@pytest.mark.parametrize("name", ["iterations", "epochs_policy", "eval_samples", "responses_per_prompt"])
def test_counts_that_would_never_end(here: Path, name: str, capsys) -> None:
    assert f"--{name} must be at most 10" in one_line(train.main, [f"--{name}", "1000000000000"], capsys)
    run = strangers_run(here)
    options = vars(Config(out="run")) | {name: 10**12}
    Journal(run).begin({"options": options})
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(f"{name}: ", f"{name}: 1000000000000 #"))
    assert f"--{name} must be at most 10" in one_line(train.main, ["--resume", "--out", "run"], capsys)


def test_an_evaluation_takes_all_that_says_whom_to_ask(here: Path, monkeypatch) -> None:
    strangers_run(here, oracle="judge", judge_url="http://x/v1")
    read_by: list[Config] = []
    monkeypatch.setattr(evaluate, "check_oracle", lambda directory, config: (read_by.append(config), 1 / 0))
    line = "run --judge_url http://y/v1 --judge_model m --judge_max_tokens 9 --judge_retries 2 --oracle_model o "
    line += "--oracle judge+pair-model"
    with pytest.raises(ZeroDivisionError):
        evaluate.main([*line.split(), '--judge_request={"a": 1}', "--judge_timeout=2.5"])
    (config,) = read_by
    assert (config.judge_url, config.judge_model, config.judge_max_tokens) == ("http://y/v1", "m", 9)
    assert (config.judge_retries, config.oracle_model, config.judge_request) == (2, "o", {"a": 1})
    assert config.judge_timeout == 2.5


# ---------------------------------------------------------------------------------------------------------------------
# Journals and other files of a run directory from a stranger, with right checksums
# ---------------------------------------------------------------------------------------------------------------------


def journal_of(*changes: dict) -> str:
    """The lines of a journal, with right checksums."""
    lines, last = [], ""
    for change in changes:
        line, last = journal_line(change, last)
        lines.append(line.decode())
    return "".join(lines)


ENTRY = {"name": "x", "checksum": None, "note": {}}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ([{"version": 1, "name": "x"}], 1),
        ([{"version": 1, "name": {}}], 1),
        ([{"version": True}], 1),
        ([ENTRY], 1),
        ([{"version": 1}, {"version": 1}, ENTRY], 2),
        ([{"version": 1}, {"forget": [], "name": "x"}, ENTRY], 2),
        ([{"version": 1}, {"forget": [], "name": "x", "checksum": 5, "note": 7}, ENTRY], 2),
        ([{"version": 1}, {"forget": [3]}, ENTRY], 2),
        ([{"version": 1}, ENTRY | {"name": ["x"]}, ENTRY], 2),
        ([{"version": 1}, ENTRY | {"checksum": 5}, ENTRY], 2),
        ([{"version": 1}, ENTRY | {"note": 7}, ENTRY], 2),
        ([{"version": 1}, ENTRY | {"more": 7}, ENTRY], 2),
        ([{"version": 1}, {"name": "x", "note": {}}, ENTRY], 2),
    ],
)
def test_lines_of_a_journal_that_are_none(tmp_path: Path, changes: list[dict], line: int) -> None:
    (tmp_path / "journal.jsonl").write_text(journal_of(*changes))
    with pytest.raises(UserError, match=f"is damaged .line {line} is not what was written"):
        Journal(tmp_path)


def test_a_journal_of_another_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text(journal_of({"version": 2, "kind": "new"}, {"output": "x"}))
    with pytest.raises(UserError, match="another version of onpo_fast"):
        Journal(tmp_path)


@pytest.mark.parametrize("name", ["journal.jsonl", "metrics.jsonl", "evaluation.json"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_file_comes_with_a_remedy(here: Path, name: str, kind: str, capsys) -> None:
    run = strangers_run(here)
    for journal in Journal.FILES if name == "journal.jsonl" else ():
        (run / journal).unlink()
    os.mkfifo(run / name) if kind == "fifo" else (run / name).symlink_to("/dev/zero")
    arguments = ["run"]
    said = one_line(evaluate.main if name == "journal.jsonl" else report.main, arguments, capsys)
    assert f"run/{name} is a " in said
    assert "remove" in said
    if name == "metrics.jsonl":
        with pytest.raises(UserError, match=r"metrics\.jsonl is a .*: remove it"):
            Tracker(run)


def test_an_output_that_is_no_file_is_made_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    (tmp_path / "policy").mkdir()
    for name in ("evaluation.json", "policy/weights"):
        (tmp_path / name).write_text("{}")
    for name in ("evaluation.json", "policy"):
        journal.record(name)
    for name in ("evaluation.json", "policy/weights"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    again = Journal(tmp_path)
    assert again.damaged("evaluation.json")
    assert again.damaged("policy")


@pytest.mark.parametrize(
    "note",
    [
        {},
        {"spent": 5},
        {"spent": {}},
        {"spent": {"seconds": "x"}},
        {"spent": {"seconds": 0}},
        {"spent": {"seconds": 1, "requests": "x"}},
        {"spent": {"seconds": 1, "stage": 2}},
        {"spent": {"seconds": float("inf")}},
        {"spent": {"seconds": -1}},
    ],
)
def test_a_part_with_another_note_is_named(tmp_path: Path, note: dict) -> None:
    parts = ResumableStage(Journal(tmp_path), "all.jsonl")

    def make() -> list[dict]:
        return parts.make([1], 1, lambda items, first: [{}], lambda file, items: read_jsonl(file), write_jsonl, str)[0]

    assert make() == [{}]
    (name,) = parts.journal.entries
    note["from"] = parts.journal.entries[name]["note"]["from"]
    parts.journal.record(name, note)
    with pytest.raises(UserError, match=r"all\.jsonl\.parts/00000000\.jsonl: its entry in journal\.jsonl is not what"):
        make()
    (tmp_path / name).unlink()
    parts.journal.checked.clear()
    assert make() == [{}]
