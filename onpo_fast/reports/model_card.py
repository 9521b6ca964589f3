"""Model cards: a README.md in every saved policy, in the form that the Hugging Face Hub reads.

A card is computed from the files of the run directory and from the license in the base model's own card, which is read
from the model's folder (a relative --model: from the working directory) or from the Hub's local cache. It has neither
dates nor paths: the same files give the same bytes. Text that a config, a dataset or a model brings along is put into
code spans, where it is not Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub
import jinja2

from ..algorithms import Algorithm, named
from ..config import AlgorithmConfig, EnvironmentConfig, FitConfig, SamplingConfig
from ..errors import UserError, one_line
from ..files import MIB, MODEL_CARD, atomic_write_text, read_regular
from ..journal import Journal
from ..models.checkpoint import ADAPTER_CONFIG
from ..run.outputs import EVALUATION, INITIAL
from ..sources import FILES, HUB_ID
from .formatting import json_text, percent
from .reading import read_json_object
from .run_data import RunData

PAPER = "https://arxiv.org/abs/2502.16852"
SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model that --model smollm2 loads
POLICY_FOLDER = re.compile(r"iteration_([0-9]{2,9})/(policy|auxiliary)")
RESOURCE_OPTIONS = {  # they change memory and speed, not what is computed
    *("sampling_batch_size", "tokens_per_microbatch", "max_skipped_steps", "loss_backend", "loss_mode", "anchor")
}
LORA_OPTIONS = ("lora_rank", "lora_alpha", "lora_targets")
SHOWN_ELSEWHERE = {"objective", "algorithm", "iterations"}
LICENSE = re.compile(r"""^license:[ \t]*["']?([\w.-]{1,60})["']?[ \t]*$""", re.MULTILINE)


def write_model_cards(directory: Path, journal: Journal | None = None) -> list[Path]:
    """Write the cards of all saved policies of a run; returns their paths.

    Call it after the evaluation, whose win rates the cards then have.

    Args:
        directory: the run directory.
        journal: of the run; read from the directory by default.

    Raises:
        UserError: if a file of the run is damaged.
    """
    journal = journal or Journal(directory)
    run = RunData.read(directory, examples=False)
    return [_write(run, journal, folder) for folder in saved_policies(journal)]


def write_model_card(directory: Path, folder: str, journal: Journal | None = None) -> Path:
    """Write the card of one policy; returns its path.

    Call it after the journal has recorded the policy, which is not evaluated yet.

    Args:
        directory: the run directory.
        folder: the policy's in the run directory, as "iteration_01/policy".
        journal: of the run; read from the directory by default.
    """
    run = RunData.read(directory, examples=False, evaluated=False)
    return _write(run, journal or Journal(directory), folder)


def saved_policies(journal: Journal) -> list[str]:
    """The folders of saved policies that the journal has and that exist, in the order in which they were made."""
    folders = [name for name in journal.entries if POLICY_FOLDER.fullmatch(name) or name == INITIAL]
    return [name for name in folders if (journal.directory / name).is_dir()]


def _write(run: RunData, journal: Journal, folder: str) -> Path:
    path, text = run.directory / folder / MODEL_CARD, model_card(run, journal, folder)
    if not (path.is_file() and path.read_text(encoding="utf-8", errors="replace") == text):
        atomic_write_text(path, text)
    return path


def model_card(run: RunData, journal: Journal, folder: str, repository: str | None = None) -> str:
    """The text of a policy's card: a YAML header and Markdown.

    Args:
        run: the run's data; its examples are not needed.
        journal: of the run. The evaluation counts only if the journal has it.
        folder: the policy's in the run directory: "iteration_NN/policy", "iteration_NN/auxiliary" or "initial".
        repository: ORG/NAME on the Hub, for the code that loads it.
    """
    policy, iterations = _policy_name(folder)
    base = _BaseModel(run, journal)
    algorithm = _algorithm(run)
    architecture, has_code = _architecture(run.directory / folder)
    is_adapter = (run.directory / folder / ADAPTER_CONFIG).is_file()
    body = (
        _environment()
        .get_template("model_card.md.jinja")
        .render(
            title=f"{policy}: {base.name} after self-play" if iterations else f"{policy}: {base.name}",
            summary=_summary(policy, iterations, folder, base, is_adapter),
            repository=repository,
            loading=_loading(repository, architecture, has_code, is_adapter),
            precision=_precision(run, run.directory / folder),
            method=_method(run, algorithm),
            parameters=list(_parameters(run, algorithm)),
            training=list(_training(run, journal, iterations)),
            evaluation=_evaluation(run, journal, policy),
            software=list(_software(run)),
            max_new_tokens=_code(run.config.get("max_new_tokens")),
            license_note=base.license_note,
        )
    )
    return f"---\n{_header(run, base, algorithm, architecture, is_adapter)}\n---\n\n{body}"


# --- The header -------------------------------------------------------------------------------------------------------


def _header(run: RunData, base: _BaseModel, algorithm: Algorithm | None, architecture: str, is_adapter: bool) -> str:
    """The YAML that the Hub reads."""
    name = _algorithm_name(run) if algorithm else None
    prompts = _hub_id(str(run.config.get("prompts") or "").partition(":")[0])
    relation = {"base_model_relation": "adapter" if is_adapter else "finetune"} if base.hub_id else {}
    data = huggingface_hub.ModelCardData(
        base_model=base.hub_id,
        datasets=[prompts] if prompts else None,
        library_name="peft" if is_adapter else "transformers",
        license=base.license,
        pipeline_tag="text-generation" if architecture == "AutoModelForCausalLM" else "image-text-to-text",
        tags=[
            "onpo_fast",
            "preference-optimization",
            "self-play",
            *(["lora"] if is_adapter else []),
            *([name] if name else []),
        ],
        **relation,
    )
    return data.to_yaml()


class _BaseModel:
    """What is known of the model that the run started from.

    Attributes:
        name: for people, escaped.
        hub_id: ORG/NAME on the Hub; None for a local model.
        revision: the commit on the Hub, if the run recorded it.
        license: the identifier that its card has; None if unknown.
    """

    def __init__(self, run: RunData, journal: Journal) -> None:
        source = str(run.config.get("model", "smollm2"))
        recorded = journal.note("model") or {}
        self.revision, self.license = None, None
        if source == "smollm2":
            self.hub_id, self.license = SMOLLM2_ID, "apache-2.0"
        elif recorded.keys() - {"commit"}:  # checksums of the files of a directory
            self.hub_id = None
        else:
            self.hub_id = _hub_id(source)
            commit = recorded.get("commit")
            self.revision = commit if isinstance(commit, str) and re.fullmatch("[0-9a-f]{7,64}", commit) else None
        self.name = _code(self.hub_id or Path(source).name or source)
        if self.license is None:
            self.license = _read_license(source, self.hub_id, self.revision)

    @property
    def license_note(self) -> str:
        if self.license is None:
            return "The license of the base model applies. The run did not find out which one it is."
        return f"The license of the base model applies: {_code(self.license)}."


def _read_license(source: str, hub_id: str | None, revision: str | None) -> str | None:
    """The license in the header of a model's card, from its directory or the Hub's local cache."""
    if hub_id:
        found = huggingface_hub.try_to_load_from_cache(hub_id, MODEL_CARD, revision=revision)
        path = Path(found) if isinstance(found, str) else None
    else:
        path = Path(source, MODEL_CARD)
    try:
        if path is None or not path.is_file():
            return None
        text = read_regular(path, MIB).decode("utf-8", "replace")
    except (UserError, OSError, ValueError):  # without its card a model has no known license
        return None
    header = re.match(r"---\s*\n(.*?\n)---", text, re.DOTALL)
    found = LICENSE.search(header[1]) if header else None
    return found[1] if found else None


def _architecture(policy: Path) -> tuple[str, bool]:
    """The class of transformers that loads a policy, and whether the policy comes with Python code."""
    names = read_json_object(policy / "config.json").get("architectures")
    first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    kind = "AutoModelForImageTextToText" if first.endswith("ForConditionalGeneration") else "AutoModelForCausalLM"
    return kind, any(policy.glob("*.py"))


# --- The body ---------------------------------------------------------------------------------------------------------


def _policy_name(folder: str) -> tuple[str, int]:
    """The policy's name, as "π_2", and the number of iterations that it took."""
    if folder == INITIAL:
        return "π_1", 0
    found = POLICY_FOLDER.fullmatch(folder)
    if not found:
        raise ValueError(f"{folder!r} is not a policy's folder in a run directory")
    iterations = int(found[1])
    return f"{'π′' if found[2] == 'auxiliary' else 'π'}_{iterations + 1}", iterations


def _summary(policy: str, iterations: int, folder: str, base: _BaseModel, is_adapter: bool) -> str:
    origin = f"{base.name}, revision {_code(base.revision)}" if base.revision else base.name
    if not iterations:
        return f"The start policy π_1 of a self-play run: {origin}, with its weights converted to plain ones."
    after = _count(iterations, "iteration")
    started = f"Fine-tuned from {origin} by self-play with `onpo_fast`: policy {policy}, after {after}."
    if is_adapter:
        started += " It is a LoRA adapter: the weights of that model are not repeated here."
    if folder.endswith("auxiliary"):
        return f"{started} It is an intermediate result of the method (an auxiliary policy), not the policy to use."
    return started


def _loading(repository: str | None, architecture: str, has_code: bool, is_adapter: bool) -> str:
    path = repr(repository or "path/of/this/directory").replace("'", '"')
    trust = ", trust_remote_code=True" if has_code else ""
    return (
        f"from transformers import {architecture}, AutoTokenizer{'  # which need peft here' if is_adapter else ''}\n"
        f"tokenizer = AutoTokenizer.from_pretrained({path}{trust})\n"
        f"model = {architecture}.from_pretrained({path}{trust})"
    )


def _precision(run: RunData, policy: Path) -> str:
    """The dtype of the saved weights, and how to load them."""
    if (policy / ADAPTER_CONFIG).is_file():
        base = "bfloat16" if run.config.get("weights") == "bf16-sr" else "float32"
        return f"The adapter is float32. In training the model under it was {base}."
    if read_json_object(policy / "config.json").get("dtype") == "bfloat16":
        return "The weights are bfloat16, as training ended with them: computing in bfloat16 rounds them no further."
    return (
        "The weights are float32. At small learning rates, such as 5e-7, training changes them by less than bfloat16 "
        "rounds: load them in float32 to measure this policy."
    )


def _algorithm_name(run: RunData) -> Any:
    return run.config.get("algorithm", run.config.get("objective"))


def _algorithm(run: RunData) -> Algorithm | None:
    """The run's algorithm; None if this version has none of that name."""
    name = _algorithm_name(run)
    try:
        return named(name) if isinstance(name, str) else None
    except ValueError:
        return None


def _method(run: RunData, algorithm: Algorithm | None) -> str:
    name = _code(_algorithm_name(run))
    about = f": {_with_links(algorithm.about)}" if algorithm else ""
    said, compared = "the policy answers prompts", "the responses of a prompt"
    if run.config.get("environment") is not None:
        said, compared = "the policy converses with an environment", "the conversations from a prompt"
    return (
        f"Algorithm {name}{about}. In each iteration {said}, an oracle compares {compared}, and the policy is fitted "
        f"to the preferences. Trained with `onpo_fast`, a trainer for Optimistic Nash Policy Optimization "
        f"([arXiv 2502.16852]({PAPER})). Parameters:"
    )


def _with_links(text: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _parameters(run: RunData, algorithm: Algorithm | None) -> Iterator[str]:
    """The options that decide what is computed, as lines of YAML."""
    unused: set[str] = set()
    if algorithm:
        used = {field.name for field in fields(algorithm.objective)} | ({"tau"} if algorithm.mixes else set())
        unused = {"eta", "tau", "beta"} - used
    if run.config.get("select") is None:
        unused.add("selection")
    skipped = RESOURCE_OPTIONS | SHOWN_ELSEWHERE | unused
    sections = [AlgorithmConfig, SamplingConfig, FitConfig]
    if run.config.get("environment") is not None:
        sections.append(EnvironmentConfig)
    names = [field.name for section in sections for field in fields(section)]
    if run.config.get("lora_rank") is not None:
        names += LORA_OPTIONS
    for name in names:
        value = run.config.get(name)
        if value is not None and name not in skipped:
            text = value if isinstance(value, str) else json_text(value)
            yield f"{name}: {one_line(text, 200)}"  # a fence cannot be closed after a name


def _training(run: RunData, journal: Journal, iterations: int) -> Iterator[str]:
    config = run.config
    source = config.get("prompts")
    prompts = run.iterations("prompts").get(0, {})
    counts = f": {prompts['train']:,} to train on and {prompts['held_out']:,} held out" if prompts else ""
    yield f"Prompts: {'those bundled with `onpo_fast`' if source is None else _code(public_name(str(source)))}{counts}"
    digest = (journal.note("prompts") or {}).get("sha256")
    if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest):
        yield f"SHA-256 of the prompts: `{digest}`"
    yield f"Oracle: {_oracle(config)}"
    yield f"Iterations: {iterations} of {_code(config.get('iterations'))}"
    responses = run.sum_up_to(iterations, "sample", "responses")
    pairs = run.sum_up_to(iterations, "pair", "pairs")
    yield f"Sampled responses: {responses:,.0f}; preference pairs: {pairs:,.0f}"
    fits = [fit for fit in run.fits if fit.iteration <= iterations]
    steps, skipped = sum(len(fit.rows) for fit in fits), sum(len(fit.skipped_steps) for fit in fits)
    yield f"Optimizer steps: {steps:,} in {_count(len(fits), 'fit')}, {skipped:,} of them skipped"
    yield f"Seed: {_code(config.get('seed'))}"


def _oracle(config: dict[str, Any]) -> str:
    """The oracle and the model that it asks."""
    name = config.get("oracle")
    text = _code(_public_oracle(name))
    for kind, option in (("judge", "judge_model"), ("pair-model", "oracle_model"), ("reward-model", "oracle_model")):
        model = config.get(option)
        if isinstance(name, str) and isinstance(model, str) and kind in name and f"{kind}=" not in name:
            return f"{text}, model {_code(public_name(model))}"
    return text


def _public_oracle(name: object) -> object:
    """An oracle's name without the folders of local models: 0.7*judge+0.3*pair-model=/home/me/model."""
    if not isinstance(name, str):
        return name
    return re.sub(r"=([^+]+)", lambda found: f"={public_name(found[1].strip())}", name)


def _evaluation(run: RunData, journal: Journal, policy: str) -> str:
    if policy.startswith("π′"):
        return "Auxiliary policies are not evaluated."
    result = run.evaluation if journal.note(EVALUATION) is not None else {}
    if policy not in result.get("policies", ()):
        return "Not evaluated yet."
    if policy == result["policies"][0]:
        return "This is the policy that the others of the run are compared with."
    index = result["policies"].index(policy)
    rate, (low, high) = result["win_rate"][index][0], result["interval"][index][0]
    shown = "does not contain" if low > 0.5 or high < 0.5 else "contains"
    return (
        f"Win rate against the start policy π_1: **{percent(rate)}** ({100 * result['confidence']:g} % interval "
        f"{percent(low)} to {percent(high)}, which {shown} 50 %), judged by the oracle "
        f"{_code(_public_oracle(result['oracle']))} on {_count(result['prompts'], 'held-out prompt')} with "
        f"{_count(result['samples_per_prompt'], 'response')} of each policy to each prompt."
    )


def _software(run: RunData) -> Iterator[str]:
    environment = run.environment
    for name in ("onpo_fast", "torch", "transformers", "python"):
        if environment.get(name):
            commit = environment.get("commit")
            suffix = f", commit {_code(commit)}" if name == "onpo_fast" and commit else ""
            yield f"{name} {_code(environment[name])}{suffix}"
    if environment.get("device"):
        yield f"Device: {_code(environment['device'])}"


# --- Names and escaping -----------------------------------------------------------------------------------------------


def public_name(source: str) -> str:
    """A model or dataset for other people: a Hub id as it is, a path without its folders."""
    split = source.partition(":")[0]
    return source if _hub_id(split) else Path(source).name or source


def _hub_id(source: str) -> str | None:
    """The source if it has the form ORG/NAME; None otherwise.

    The file system is not asked: what exists now need not be what the run has read.
    """
    is_path = source.endswith(FILES) or source.startswith((".", "~"))
    return source if HUB_ID.fullmatch(source) and not is_path else None


def _code(value: object) -> str:
    """A value as a Markdown code span, in which nothing of it is markup."""
    text = value if isinstance(value, str) else json_text(value)
    return f"`{one_line(text, 200).replace('`', chr(39)) or ' '}`"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown: values are escaped by _code
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
