"""The options of a run: sections, help, files, other names, and run directories of earlier versions."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from onpo_fast import algorithms
from onpo_fast.config import (
    SECTIONS,
    AlgorithmConfig,
    Config,
    DataConfig,
    FitConfig,
    JudgeConfig,
    ModelConfig,
    OracleConfig,
    RunConfig,
    SamplingConfig,
    parse,
    parse_run,
    read_run,
)
from onpo_fast.config.aliases import INSTEAD, INSTEAD_OF_ALL, OTHER_NAMES, TRL_NAMES, VARIANTS
from onpo_fast.errors import UserError
from onpo_fast.journal import Journal


@pytest.fixture
def write(tmp_path: Path):
    """Writes a YAML file and returns its path."""

    def write_file(text: str, name: str = "options.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_file


# ---------------------------------------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------------------------------------


def test_a_section_has_the_values_of_the_whole() -> None:
    config = Config(learning_rate=1e-4, objective="inpo", judge_retries=3)
    for kind in SECTIONS.values():
        section = config.section(kind)
        assert vars(section) == {field.name: getattr(config, field.name) for field in fields(kind)}
    names = [field.name for kind in SECTIONS.values() for field in fields(kind)]
    assert sorted(names) == sorted(Config.__dataclass_fields__)  # each option is in one section


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        (ModelConfig, "model", ""),
        (ModelConfig, "chat_template_kwargs", {"tools": 1}),
        (DataConfig, "eval_fraction", 0.0),
        (DataConfig, "prompt_column", None),
        (SamplingConfig, "temperature", 0.0),
        (SamplingConfig, "sampling_batch_size", 0),
        (SamplingConfig, "sampler_key_variable", "sk-1"),
        (SamplingConfig, "sampler_concurrency", 0),
        (SamplingConfig, "sampler_timeout", 0.0),
        (SamplingConfig, "sampler_retries", -1),
        (SamplingConfig, "sampler_url", "http://localhost:8000/v1"),
        (SamplingConfig, "sampler_concurrency", 3),
        (SamplingConfig, "sampler", "server"),
        (OracleConfig, "oracle_max_tokens", 0),
        (JudgeConfig, "judge_key_variable", "sk-1"),
        (JudgeConfig, "judge_timeout", float("inf")),
        (JudgeConfig, "judge_max_invalid_rate", 1.5),
        (AlgorithmConfig, "labels", "hard"),
        (AlgorithmConfig, "eta", -1.0),
        (AlgorithmConfig, "responses_per_prompt", 1),
        (FitConfig, "batch_pairs", 0),
        (FitConfig, "max_skipped_steps", -1),
        (FitConfig, "weight_decay", float("nan")),
        (RunConfig, "seed", 2**63),
        (RunConfig, "out", "a\0b"),
    ],
)
def test_a_section_validates_its_own_options(section: type, option: str, value: object) -> None:
    for kind in (section, Config):
        with pytest.raises(UserError, match=option):
            kind(**{option: value})


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "http://name:password@host/v1"])
def test_an_address_that_no_server_has(url: str) -> None:
    with pytest.raises(UserError, match="--sampler_url"):
        SamplingConfig(sampler="server", sampler_url=url, sampler_reload="vllm")


def test_another_sampler_leaves_the_options_of_that_in_the_file(tmp_path: Path) -> None:
    server = {"sampler_url": "http://x/v1", "sampler_reload": "vllm", "sampler_concurrency": 3}
    file = tmp_path / "options.yaml"
    file.write_text(Config(sampler="server", **server).to_yaml())
    line = ["--config", str(file), "--out", "run", "--sampler"]
    assert parse([*line, "local"]) == Config(out="run")
    assert parse([*line, "vllm"]) == Config(out="run", sampler="vllm")
    assert parse([*line, "server"]) == Config(out="run", sampler="server", **server)
    with pytest.raises(UserError, match="--sampler_url needs --sampler server"):
        parse([*line, "local", "--sampler_url", "http://x/v1"])


def test_how_another_program_samples_may_change_in_a_run(tmp_path: Path) -> None:
    """What its errors advise; what it returns is checked."""
    for number, (before, flag, value) in enumerate(
        [
            ({"sampler": "vllm"}, "vllm_options", {"gpu_memory_utilization": 0.5}),
            ({"sampler": "server", "sampler_url": "http://x/v1", "sampler_reload": "vllm"}, "sampler_reload", "true"),
            ({"sampler": "server", "sampler_url": "http://x/v1", "sampler_reload": "vllm"}, "sampler_model", "m"),
        ]
    ):
        config = Config(out=str(tmp_path / str(number)), **before)
        Path(config.out).mkdir()
        Path(config.out, "config.yaml").write_text(config.to_yaml())
        Journal(Path(config.out)).begin({"options": vars(config)})
        line = ["--resume", "--out", config.out, f"--{flag}={value if isinstance(value, str) else json.dumps(value)}"]
        given = [f"--{name}={text}" for name, text in before.items() if name != flag]
        assert getattr(parse_run([*line, *given])[0], flag) == value


# ---------------------------------------------------------------------------------------------------------------------
# Help
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def help_text() -> str:
    from onpo_fast.config.command_line import _parser

    return _parser({}).format_help()


def test_every_option_is_described_in_its_section(help_text: str) -> None:
    groups = dict(re.findall(r"^(\w+):\n(.*?)(?=^\S|\Z)", help_text, re.MULTILINE | re.DOTALL))
    for name, kind in SECTIONS.items():
        flags = re.findall(r"^  --(\w+)", groups[name], re.MULTILINE)
        assert flags == [field.name for field in fields(kind)]
        assert kind.__doc__.split()[0] in groups[name]
    entries = re.split(r"^  --", help_text, flags=re.MULTILINE)[1:]
    for entry in entries:
        words = entry.split("\n\n")[0].split()
        assert len(words) > 4, entry
        assert words[-1].endswith((".", ")")), entry


def test_the_help_lists_algorithms_and_hides_other_names(help_text: str) -> None:
    flat = " ".join(help_text.split())
    for name, algorithm in algorithms.ALGORITHMS.items():
        assert f"- {name}: {algorithm.about}" in flat
    for name in (*VARIANTS, *OTHER_NAMES, *INSTEAD):
        assert f"\n  --{name} " not in help_text
    assert all(f"--{name} for --{option}" in flat for name, option in TRL_NAMES.items())


def test_the_whole_configuration_is_printed(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--print_config", "--eta", "3", "--out", "run"])
    assert stopped.value.code == 0
    assert Config(**yaml.safe_load(capsys.readouterr().out)) == Config(eta=3.0, out="run")


# ---------------------------------------------------------------------------------------------------------------------
# YAML files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "model: m\nlearning_rate: 1e-5\nlabels: sampled\njudge_request: {a: null}\n",
        "model: {model: m}\nfit: {learning_rate: 1e-5}\nalgorithm: {labels: sampled}\njudge_request: {a: null}\n",
        "model: {model: m}\nlearning_rate: 1e-5\njudge_request:\n  a: null\nalgorithm: {labels: 'sampled'}\n",
        "model_name_or_path: m\nfit:\n  learning_rate: 1e-5\nlabels: bits\njudge: {judge_request: {a: }}\n",
    ],
)
def test_a_file_is_flat_or_by_section(text: str, write) -> None:
    config = parse(["--config", write(text), "--out", "x"])
    expected = Config(model="m", learning_rate=1e-5, labels="sampled", judge_request={"a": None}, out="x")
    assert config == expected


def test_options_of_several_files_and_flags(write) -> None:
    first = write("fit: {learning_rate: 1e-5, batch_pairs: 7}\n", "first.yaml")
    second = write("learning_rate: 2e-5\n", "second.yaml")
    config = parse(["--config", first, "--config", second, "--batch_pairs", "8"])
    assert (config.learning_rate, config.batch_pairs) == (2e-5, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nrun:\n  seed: 2\n", "line 3: seed is there twice, first in line 1"),
        ("run:\n  seed: 2\nfit: {}\nseed: 1\n", "line 4: seed is there twice, first in line 2"),
        ("out: a\noutput_dir: b\n", "line 2: output_dir is another name of out, .* first in line 1"),
        ("fit:\n  eta: 1.0\n  seed: 3\n", "line 2: eta belongs to the section algorithm, not to fit"),
        (
            "algorithm:\n  second_fit: direct\n  learning_rate: 1.0\n",
            "line 3: learning_rate belongs to the section fit",
        ),
        ("fit:\n  learnin_rate: 1\n", "line 2: there is no option learnin_rate; did you mean learning_rate"),
        ("samplin: {}\n", "line 1: there is no option samplin; did you mean sampling"),
        ("sampling: 3\n", "line 1: sampling is a section"),
        ("fit:\n\n  batch_pairs: few\n", "line 3: batch_pairs must be a whole number, not few"),
        ("fit:\n  batch_pairs:\n", "line 2: batch_pairs must be a whole number, not null"),
        ("model: {model: {model: m}}\n", "line 1: model must be text"),
        ("seed: 1\nmax_steps: 3\n", "line 2: there is no option max_steps: .*--iterations"),
        ("[fit]: {seed: 1}\n", "line 1: not YAML"),
    ],
)
def test_errors_in_a_file_name_the_line(text: str, message: str, write) -> None:
    with pytest.raises(UserError, match=rf"options\.yaml, {message}"):
        parse(["--config", write(text)])


# ---------------------------------------------------------------------------------------------------------------------
# Other names
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_names_of_options(name: str, write) -> None:
    option = OTHER_NAMES[name]
    value = {
        "judge_max_invalid_rate": 0.25,
        "max_new_tokens": 7,
        "responses_per_prompt": 7,
        "eval_samples": 7,
        "attention": "sdpa",
        "lora_rank": 4,
        "objective": "omd",
    }.get(option, "text")
    for line in ([f"--{name}", str(value)], [f"--{name}={value}"], ["--config", write(f"{name}: {value}\n")]):
        assert getattr(parse(line), option) == value


@pytest.mark.parametrize("name", INSTEAD)
def test_what_trl_has_and_this_has_not_comes_with_a_hint(name: str, write) -> None:
    for line in ([f"--{name}", "1"], [f"--{name}=1"], ["--config", write(f"{name}: 1\n")]):
        with pytest.raises(UserError, match=name) as raised:
            parse(line)
        assert str(raised.value).endswith(INSTEAD[name])
    assert name not in (*Config.__dataclass_fields__, *OTHER_NAMES)


@pytest.mark.parametrize("name", ["ddp_timeout", "fsdp_config"])
def test_families_of_options_of_trl_have_one_hint(name: str, write) -> None:
    for line in ([f"--{name}", "1"], ["--config", write(f"{name}: 1\n")]):
        with pytest.raises(UserError, match=f"there is no option .*{name}: .*torchrun"):
            parse(line)


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("", "--num_generations 1", "--num_generations (--responses_per_prompt) must be at least 2, not 1"),
        ("", "--num_generations few", "--num_generations (--responses_per_prompt) must be a whole number, not few"),
        ("", "--algorithm onp", "--algorithm (--objective) must be one of"),
        ("seed: 1\nnum_generations: 1", "", "must be at least 2, not 1 (FILE, line 2: num_generations)"),
        ("seed: 1\nnum_generations: few", "", "FILE, line 2: num_generations must be a whole number, not few"),
        ("seed: 1\nnum_generations:", "", "FILE, line 2: num_generations must be a whole number, not null"),
        ("judge_max_nonsense: 2", "", "must be in [0, 1], not 2.0 (FILE, line 1: judge_max_nonsense)"),
        ("num_generations: 1", "--responses_per_prompt 0", "--responses_per_prompt must be at least 2, not 0"),
    ],
)
def test_errors_name_what_was_written(text: str, flags: str, message: str, write) -> None:
    path = write(text + "\n")
    line = ["--config", path, *flags.split()] if text else flags.split()
    with pytest.raises(UserError) as raised:
        parse(line)
    assert message.replace("FILE", path) in str(raised.value)


def test_two_names_of_one_option(capsys) -> None:
    with pytest.raises(UserError, match="--model and --model_name_or_path are names of one option"):
        parse(["--model", "a", "--model_name_or_path", "b"])
    with pytest.raises(UserError, match="--output_dir and --out "):
        parse(["--output_dir=a", "--out", "b"])
    assert parse(["--model", "a", "--model_name_or_path=a"]).model == "a"
    assert parse(["--model", "a", "--model", "b"]).model == "b"  # as in other programs, the last one counts


def test_dashes_for_underscores(tmp_path: Path) -> None:
    line = ["--learning-rate", "1e-4", "--num-generations=3", "--judge-request.reasoning-effort", "low"]
    config = parse(line)
    assert (config.learning_rate, config.responses_per_prompt) == (1e-4, 3)
    assert config.judge_request == {"reasoning-effort": "low"}
    assert parse_run([*line, "--resume", "--output-dir", str(tmp_path / "run"), "--trust-run"])[1]
    with pytest.raises(UserError, match="--num_train_epochs"):
        parse(["--num-train-epochs", "1"])


@pytest.mark.parametrize("flag", ["--push_to_hub", "--model", "--num_generations"])
def test_a_flag_without_its_value_says_what_it_takes(flag: str) -> None:
    for line in ([flag], [flag, "--seed", "1"]):
        with pytest.raises(UserError, match=r"needs a value: .{20}"):
            parse(line)
    with pytest.raises(UserError, match="ORG/NAME"):
        parse(["--push_to_hub"])


def test_hints_name_options_that_there_are() -> None:
    known = {*Config.__dataclass_fields__, "resume"}
    for hint in (*INSTEAD.values(), *INSTEAD_OF_ALL.values()):
        assert {flag for flag in re.findall(r"--(\w+)", hint)} <= known, hint


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*algorithms.ALGORITHMS, *algorithms.ALIASES])
def test_every_algorithm_has_its_loss(name: str) -> None:
    canonical = algorithms.ALIASES.get(name, name)
    for config in (Config(objective=name), parse(["--objective", name]), parse([f"--algorithm={name}"])):
        assert config.objective == canonical
        assert type(config.make_objective()) is algorithms.ALGORITHMS[canonical].objective


@pytest.mark.parametrize("name", ["inpo", "nash_md", "egpo"])
def test_the_reference_has_a_third_of_the_weight(name: str) -> None:
    config = Config(objective=name)
    assert config.initial_weight == pytest.approx(1 / 3)
    again = config.section(AlgorithmConfig)
    assert (again.eta, again.tau) == (config.eta, config.tau)
    assert Config(objective=name, eta=0.5).initial_weight == pytest.approx(1 / 3)
    with pytest.raises(UserError, match=f"--objective {name}: tau"):
        Config(objective=name, eta=0.5, tau=3.0)
    with pytest.raises(UserError, match="tau"):
        Config(objective=name, tau=-1.0)
    with pytest.raises(UserError, match="--anchor"):
        Config(objective=name, anchor="live")


def test_the_weight_of_the_reference() -> None:
    weights = {name: Config(objective=name).initial_weight for name in algorithms.ALGORITHMS}
    assert {name for name, weight in weights.items() if weight == 1} == {"online_ipo"}
    assert {name for name, weight in weights.items() if 0 < weight < 1} == {"inpo", "nash_md", "egpo"}
    assert Config(objective="nash_md", eta=4.0, tau=0.25).initial_weight == 1


def test_the_reference_is_refreshed_only_where_there_is_one() -> None:
    assert Config().refresh_reference is None
    for name in algorithms.ALGORITHMS:
        if name in ("inpo", "online_ipo", "nash_md", "egpo"):
            assert parse(["--objective", name, "--refresh_reference", "2"]).refresh_reference == 2
        else:
            with pytest.raises(UserError, match="--refresh_reference"):
                Config(objective=name, refresh_reference=2)
    with pytest.raises(UserError, match="--refresh_reference must be at least 1"):
        Config(objective="inpo", refresh_reference=0)


@pytest.mark.parametrize(
    ("line", "objective"),
    [
        ("--second_fit direct", "onpo_direct"),
        ("--fit_start=policy", "onpo_from_policy"),
        ("--objective onpo --second_fit=direct", "onpo_direct"),
        ("--objective onpo_direct --second_fit=direct", "onpo_direct"),
        ("--second_fit chained --fit_start anchor", "onpo"),
        ("--objective inpo --second_fit chained --fit_start anchor", "inpo"),
        ("--second_fit direct --fit_start policy", "onpo_direct_from_policy"),
        ("--objective onpo_from_policy --second_fit direct", "onpo_direct_from_policy"),
        ("--objective omd --second_fit direct", "omd"),
        ("--objective sppo --fit_start policy", "sppo"),
        ("--objective onpo_direct --second_fit chained", "onpo"),
        ("--objective onpo_direct --fit_start anchor", "onpo_direct"),
        ("--objective onpo_direct_from_policy --fit_start anchor", "onpo_direct"),
    ],
)
def test_variants_by_the_options_of_earlier_versions(line: str, objective: str, write) -> None:
    assert parse(line.split()).objective == objective
    pairs = re.findall(r"--(\w+)[ =](\w+)", line)
    assert parse(["--config", write("".join(f"{name}: {value}\n" for name, value in pairs))]).objective == objective


def test_a_value_that_no_variant_has_is_refused() -> None:
    with pytest.raises(UserError, match="--fit_start must be one of anchor, policy, not somewhere"):
        parse(["--fit_start", "somewhere"])


@pytest.mark.parametrize(
    ("file", "flags", "objective"),
    [
        ("second_fit: direct", "--objective omd", "omd"),
        ("second_fit: direct", "--objective onpo", "onpo_direct"),
        ("second_fit: chained\nfit_start: anchor", "--objective onpo_direct", "onpo_direct"),
        ("second_fit: direct", "--objective onpo_from_policy", "onpo_from_policy"),
        ("objective: omd\nsecond_fit: direct", "--objective onpo", "onpo_direct"),
        ("second_fit: direct", "--fit_start policy", "onpo_direct_from_policy"),
        ("second_fit: direct", "--second_fit chained", "onpo"),
        ("objective: onpo_direct", "--second_fit chained", "onpo"),
        ("objective: onpo_direct", "--objective onpo", "onpo"),
    ],
)
def test_flags_override_the_variants_of_a_file(file: str, flags: str, objective: str, write) -> None:
    assert parse(["--config", write(file + "\n"), *flags.split()]).objective == objective


# ---------------------------------------------------------------------------------------------------------------------
# Run directories of earlier versions
# ---------------------------------------------------------------------------------------------------------------------


def earlier_run(directory: Path, journal: bool, **changes: object) -> dict:
    """A run directory as earlier versions wrote it; returns its options."""
    newer = ("refresh_reference", "push_to_hub")
    options = {name: value for name, value in vars(Config(out=str(directory))).items() if name not in newer}
    options["judge_max_nonsense"] = options.pop("judge_max_invalid_rate")
    options |= {"second_fit": "chained", "fit_start": "anchor", **changes}
    directory.mkdir()
    (directory / "config.yaml").write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
    if journal:
        Journal(directory).begin({"options": options})
    return options


@pytest.mark.parametrize("journal", [True, False])
@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {}),
        ({"objective": "ipo"}, {"objective": "online_ipo"}),
        ({"objective": "dpo", "labels": "bits"}, {"objective": "iterative_dpo", "labels": "sampled"}),
        ({"second_fit": "direct"}, {"objective": "onpo_direct"}),
        (
            {"fit_start": "policy", "judge_max_nonsense": 0.25},
            {"objective": "onpo_from_policy", "judge_max_invalid_rate": 0.25},
        ),
        ({"second_fit": "direct", "fit_start": "policy"}, {"objective": "onpo_direct_from_policy"}),
        ({"objective": "omd", "fit_start": "policy"}, {"objective": "omd"}),
        (
            {"objective": "inpo", "second_fit": "direct", "eta": 0.05, "tau": 0.01},
            {"objective": "inpo", "eta": 0.05, "tau": 0.01},
        ),
    ],
)
def test_a_run_of_an_earlier_version_is_continued(tmp_path: Path, journal: bool, before: dict, now: dict) -> None:
    out = str(tmp_path / "run")
    options = earlier_run(tmp_path / "run", journal, **before)
    expected = replace(Config(out=out), **now)
    assert read_run(Path(out)) == expected
    line = ["--resume", "--out", out]
    assert parse_run(line) == (expected, True)
    # and the command line that it was started with can be repeated, in its old words
    given = [f"--{name}={value}" for name, value in options.items() if name in before]
    assert parse_run([*line, *given]) == (expected, True)
    # after the run has written its files again, too
    Journal(tmp_path / "run").begin({"options": vars(expected)})
    (tmp_path / "run/config.yaml").write_text(expected.to_yaml(), encoding="utf-8")
    assert parse_run([*line, *given]) == (expected, True)


@pytest.mark.parametrize("journal", [True, False])
@pytest.mark.parametrize(
    ("before", "flags", "changed"),
    [
        ({"second_fit": "direct"}, ["--second_fit", "chained"], "'onpo_direct' → 'onpo'"),
        ({"fit_start": "policy"}, ["--fit_start=anchor"], "'onpo_from_policy' → 'onpo'"),
        ({}, ["--second_fit", "direct"], "'onpo' → 'onpo_direct'"),
        ({"second_fit": "direct"}, ["--objective", "onpo_from_policy"], "'onpo_direct' → 'onpo_from_policy'"),
    ],
)
def test_another_variant_is_a_change(tmp_path: Path, journal: bool, before: dict, flags: list, changed: str) -> None:
    out = tmp_path / "run"
    earlier_run(out, journal, **before)
    for _ in range(2):
        with pytest.raises(UserError, match=f"--objective {changed}"):
            parse_run(["--resume", "--out", str(out), *flags])
        now = read_run(out)  # the run has written its files again
        Journal(out).begin({"options": vars(now)})
        (out / "config.yaml").write_text(now.to_yaml(), encoding="utf-8")


def test_what_changed_since_an_earlier_version_is_named(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    earlier_run(tmp_path / "run", journal=True, objective="inpo", eta=0.05, tau=0.01)
    line = ["--resume", "--output_dir", out]
    for flag, named in (("--judge_max_nonsense=0.1", "judge_max_invalid_rate"), ("--refresh_reference=2",) * 2):
        with pytest.raises(UserError, match=named.partition("=")[0]):
            parse_run([*line, flag])
    with pytest.raises(UserError, match="--objective 'inpo' → 'onpo'"):
        parse_run([*line, "--objective", "onpo"])


@pytest.mark.parametrize("options", [{"second_fit": 5}, {"labels": ["bits"]}, {"objective": {}}, {"fit_start": "x"}])
def test_a_journal_with_other_values_is_named(tmp_path: Path, options: dict) -> None:
    earlier_run(tmp_path / "run", journal=True)
    Journal(tmp_path / "run").begin({"options": json.loads(json.dumps(options))})
    with pytest.raises(UserError, match=next(iter(options))):
        parse_run(["--resume", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--judge_url", "http://localhost/v1"], "--judge_url is for --oracle judge, and the oracle is population"),
        (["--oracle=openings", "--judge_model=m"], "--judge_model is for --oracle judge, and the oracle is openings"),
        (["--oracle_model", "a/b"], "--oracle_model is for --oracle pair-model or reward-model"),
        (["--oracle=0.5*judge+0.5*openings", "--oracle_model=a/b"], "--oracle_model is for --oracle pair-model"),
    ],
)
def test_options_of_another_oracle_are_refused(given: list[str], message: str, tmp_path) -> None:
    """A forgotten --oracle does not train under the default one. Flags may choose another than a file's."""
    with pytest.raises(UserError, match=re.escape(message)):
        parse(given)
    file = tmp_path / "run.yaml"
    file.write_text("judge_url: http://localhost/v1\njudge_model: m\n")
    with pytest.raises(UserError, match=rf"{file}, line 1: judge_url is for --oracle judge"):
        parse(["--config", str(file)])
    assert parse(["--config", str(file), "--oracle", "openings"]).oracle == "openings"
    assert parse(["--config", str(file), "--oracle", "0.5*judge+0.5*openings"]).judge_model == "m"


@pytest.mark.parametrize("value", ["010", "4_0", "0x10", "1:30", "-01"])
@pytest.mark.parametrize(("name", "what"), [("seed", "a whole number"), ("eta", "a number")])
def test_numbers_are_what_people_read(name: str, what: str, value: str, tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: {value}\n")
    for given in ([f"--{name}={value}"], [f"--{name}", value], ["--config", str(file)]):
        with pytest.raises(UserError, match=rf"{name} must be {what}.* in plain decimal digits, not {value}"):
            parse(given)
    file.write_text("judge_prompt: 010.txt\nlearning_rate: 0.5e-3\nseed: 0\n")
    config = parse(["--config", str(file), "--eta=1e1", "--judge_timeout", "0.5"])
    assert (config.learning_rate, config.eta, config.judge_timeout, config.judge_prompt) == (5e-4, 10, 0.5, "010.txt")
