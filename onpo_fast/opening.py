"""Opening a run: everything that a mistake can break is checked first, then the run's identity, then it is written."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import config as configuration
from . import oracles
from .config import Config, FitConfig, ModelConfig, OracleConfig
from .config.combined import NO_RESULT_DEPENDS_ON_THEM
from .console import counted, progress, say
from .data import Messages, Skipped, prompts_digest, prompts_of_iteration, split_prompts, write_prompts
from .device import device_of
from .distributed import World
from .errors import UserError
from .externals import load_environment, load_oracle, try_oracle
from .files import PARTIAL, atomic_write_text, checksum
from .fit import check_backend
from .journal import Journal, JournalElsewhere
from .memory.watch import with_token_budget
from .models.checkpoint import base_of, count_parameters, locate
from .models.optimizers import check_optimizer
from .models.policy import Policy
from .models.precision import choose_weights
from .models.rendering import PINNED_DATE
from .models.resident import ResidentPolicy, Source
from .models.sharding import check_shardable
from .multi_turn.environment import CheckedEnvironment
from .objectives import Sppo
from .pairing import PAIRINGS
from .run.cache import StageCache
from .run.fingerprint import changes, model_fingerprint
from .run.lock import LOCK, RunLock, locked
from .run.outputs import EVALUATION, HELD_OUT, INITIAL, iteration_folder
from .run.tracking import Tracker, check_reporter, environment
from .sampling.vllm.process import check_python

MANY_PROMPTS = 2000  # rendering more takes seconds, and shows its progress
RENDERED_AGAIN = 32  # prompts whose tokens are counted to find the longest
JOURNALS = Journal.FILES + Journal.EARLIER_FILES


@dataclass
class OpenRun:
    """A run directory that this process works on, until ``close`` or the end of a ``with``.

    Only rank 0 has the lock, the journal and the tracker.

    Attributes:
        config: its options, with those resolved that depend on the device.
        cache: makes its stages resumable.
        policies: loads policies, one at a time.
        initial: where π_1 is.
        prompts: those to train on.
        held_out: those to evaluate on.
        oracle: who prefers what.
        oracle_files: ``oracles.fingerprint`` of the oracle.
        environment: what answers the policy between its turns; None: it has one turn.
        family: what transformers calls the policy's architecture.
        vocabulary: rows of the policy's embedding.
        compute_dtype: of the policy's computation.
    """

    config: Config
    directory: Path
    lock: RunLock | None
    journal: Journal | JournalElsewhere
    tracker: Tracker | None
    cache: StageCache
    policies: ResidentPolicy
    initial: Source
    prompts: list[Messages]
    held_out: list[Messages]
    oracle: oracles.Oracle
    oracle_name: str
    oracle_files: dict[str, str]
    environment: CheckedEnvironment | None
    family: str
    vocabulary: int
    device: torch.device
    compute_dtype: torch.dtype

    def __enter__(self) -> OpenRun:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def world(self) -> World:
        """The ranks that work on the run."""
        return self.cache.world

    def make_room_for_oracle(self) -> None:
        """Drops the policy if the oracle loads a model: at most one is in memory."""
        if oracles.holds_model(self.oracle):
            self.policies.drop()

    def close(self) -> None:
        """Lets another process have the run. Frees the policy."""
        self.policies.drop()
        if self.lock is not None:
            self.lock.release()


# what the other ranks have from rank 0, which has checked it
TOLD = (
    "config",
    "initial",
    "prompts",
    "held_out",
    "oracle_name",
    "oracle_files",
    "family",
    "vocabulary",
    "compute_dtype",
)


def open_run(config: Config, resume: bool = False, force: bool = False, world: World | None = None) -> OpenRun:
    """Opens a new run, or with ``resume`` the one in ``config.out``.

    Everything that a mistake can break is checked first. Then the directory is locked and what a run has from its
    first moment on is written: config.yaml, the journal, the held-out prompts, the environment.

    Args:
        force: go on although the model, the oracle or the rendering of prompts has changed.
        world: the ranks of the run. Rank 0 opens it, and tells the others what they need to know of it.

    Raises:
        UserError: if anything does not fit: a directory, an oracle, a prompt, the model; or if the run in the directory
            began with something else.
    """
    world = world or World()
    config, reason = world.from_main(_with_weights, config, world.size)
    run = _open(config, resume, force, world, reason) if world.is_main else None
    told = world.from_main(lambda: {name: getattr(run, name) for name in TOLD})
    return run or OpenRun(
        directory=(directory := Path(config.out)),
        lock=None,
        journal=(journal := JournalElsewhere(directory)),
        tracker=None,
        cache=StageCache(journal, None, None, world),
        policies=ResidentPolicy(config.section(ModelConfig), told["initial"]),
        oracle=load_oracle(config, directory),
        environment=load_environment(config),
        device=device_of(config.device),
        **told,
    )


def _open(config: Config, resume: bool, force: bool, world: World, reason: str) -> OpenRun:
    checked = _check(config, resume, world.size)
    lock = locked(Path(config.out), "--out ")
    try:
        return _begin(config, checked, lock, resume, force, world, reason)
    except BaseException:  # whoever keeps the exception would keep the lock
        lock.release()
        raise


def _with_weights(config: Config, ranks: int = 1) -> tuple[Config, str]:
    """Resolves --weights auto; returns the options with its value, and where that is from.

    A run that is resumed keeps the value that it began with, float32 if it began before there was a choice.
    """
    began = Journal(Path(config.out)).note("options")
    if began is not None and config.weights in ("auto", before := began.get("weights", "fp32")):
        return replace(config, weights=before), "as the run began"
    if config.weights != "auto":
        return config, "--weights"
    sections = config.section(ModelConfig), config.section(FitConfig)
    weights, reason = choose_weights(*sections, lambda: count_parameters(base_of(config.model)), ranks)
    return replace(config, weights=weights), reason


@dataclass
class _Checked:
    """What a run starts with, checked before anything is written."""

    oracle: oracles.Oracle
    environment: CheckedEnvironment | None
    to_judge: bool  # whether the oracle is still needed
    policies: ResidentPolicy
    skipped: Skipped | None
    prompts: list[Messages]
    held_out: list[Messages]
    rendering: str  # SHA-256 of the tokens of all prompts


def _check(config: Config, resume: bool, ranks: int) -> _Checked:
    directory = Path(config.out)
    check_directory(directory, resume)
    oracle, environment = load_oracle(config, directory), load_environment(config)
    check_sampler(config)
    check_reporter(config.report_to)
    check_backend(config.loss_backend, config.device)
    weights = "fp32" if config.lora_rank else config.weights  # adapters are float32
    check_optimizer(weights, config.optimizer, ranks)
    check_ranks(config, ranks)
    if not resume:
        check_token_budget(config)
    policies = ResidentPolicy(config.section(ModelConfig))
    to_judge = anything_to_judge(directory, config.iterations)
    skipped = Skipped() if config.skip_bad_prompts else None
    prompts = _read_prompts(config, policies, oracle if to_judge else None, skipped)
    if ranks > 1 and config.lora_rank is None:  # the base of adapters stays whole on every rank
        check_shardable(policies(config.model))
    if environment is not None and to_judge:
        environment.probe(min(prompts[0], key=oracles.length))
    return _Checked(oracle, environment, to_judge, policies, skipped, *prompts)


def _begin(
    config: Config, checked: _Checked, lock: RunLock, resume: bool, force: bool, world: World, reason: str
) -> OpenRun:
    """Writes what a run has from its first moment on, if it may go on in the directory."""
    directory, oracle, policy = Path(config.out), checked.oracle, checked.policies(config.model)
    check_directory(directory, resume)
    if policy.device.type == "cuda":  # on a CPU the first fit says what it takes
        longest = _longest_prompt(policy, [*checked.prompts, *checked.held_out], config)
        config = with_token_budget(config, policy, longest)
    journal = Journal(directory)
    journal.before_record.append(lock.check)
    if journal.mended:
        say(f"the first file of the journal in {directory} is damaged or gone: its copy is taken")
    inputs = _inputs(config, policy, checked)
    _check_inputs(config, journal, inputs, force)
    # before config.yaml: from its first file on, a run can say what it began with
    journal.begin({"options": asdict(config), **inputs})
    atomic_write_text(directory / configuration.CONFIG_FILE, config.to_yaml())
    if checked.to_judge and oracles.keeps_files(oracle):  # it may write into the directory from here on
        shortest = min([*checked.prompts, *checked.held_out], key=oracles.length)
        try_oracle(config, oracle, [shortest], in_directory=True)
    initial = _keep_initial(config.model, policy, checked.policies, journal)
    write_prompts(directory / HELD_OUT, checked.held_out)
    atomic_write_text(directory / "environment.json", json.dumps(environment(policy.device), indent=1) + "\n")
    tracker = Tracker(directory, config.report_to, asdict(config))
    journal.before_record.append(tracker.sync)
    _log_prompts(tracker, checked)
    _say_what_starts(config, policy, checked, reason)
    return OpenRun(
        config=config,
        directory=directory,
        lock=lock,
        journal=journal,
        tracker=tracker,
        cache=StageCache(journal, tracker, config_key(config, inputs["model"]), world),
        policies=checked.policies,
        initial=initial,
        prompts=checked.prompts,
        held_out=checked.held_out,
        oracle=oracle,
        oracle_name=config.oracle,
        oracle_files=inputs["oracle"],
        environment=checked.environment,
        family=policy.family,
        vocabulary=policy.vocabulary,
        device=policy.device,
        compute_dtype=policy.compute_dtype,
    )


def check_sampler(config: Config) -> None:
    """Raises ``UserError`` if the program that samples is one to be started, and is not there."""
    if config.sampler == "vllm":
        check_python(config.vllm_python)


def check_token_budget(config: Config) -> None:
    """Raises ``UserError`` if a micro-batch has fewer tokens than a response may have."""
    budget = config.tokens_per_microbatch
    if budget is not None and budget < config.max_new_tokens:
        raise UserError(
            f"--tokens_per_microbatch {budget} is less than one response of --max_new_tokens {config.max_new_tokens}: "
            "raise it, or allow shorter responses"
        )


def check_ranks(config: Config, ranks: int) -> None:
    """Raises ``UserError`` if a step of a fit has fewer prompts than there are ranks: one would never have any."""
    responses = config.responses_per_prompt
    undecided = np.full((responses, responses), 0.5)
    pairs = len(PAIRINGS[config.pairing](undecided, np.random.default_rng(0)))
    if isinstance(config.make_objective(), Sppo):
        pairs = responses
    prompts = min(-(-config.batch_pairs // pairs), config.prompts_per_iteration)
    if prompts < ranks:
        raise UserError(
            f"--batch_pairs {config.batch_pairs} with {pairs} pairs a prompt and --prompts_per_iteration "
            f"{config.prompts_per_iteration} make steps of {prompts} prompts, fewer than the {ranks} ranks: raise "
            "them, or start fewer ranks"
        )


def _longest_prompt(policy: Policy, prompts: list[Messages], config: Config) -> int:
    """Returns the most tokens of a prompt, of those with most characters.

    With several turns it is that of the last one, whose prompt has the turns before it. What the environment says is
    taken to be as long as they are.
    """
    longest = sorted(prompts, key=oracles.length)[-RENDERED_AGAIN:]
    tokens = max(len(policy.renderer.render(prompt)) for prompt in longest)
    if config.has_turns:
        tokens += 2 * config.max_new_tokens * (config.turns - 1)
        if policy.renderer.context:
            tokens = min(tokens, policy.renderer.context - config.max_new_tokens)
    return tokens


def config_key(config: Config, model: dict[str, str] | None) -> object:
    """What every result of a run depends on: its options and the model's fingerprint."""
    return {name: value for name, value in asdict(config).items() if name not in NO_RESULT_DEPENDS_ON_THEM}, model


def check_directory(directory: Path, resume: bool) -> None:
    """Raises ``UserError`` if a directory holds anything but, with ``resume``, a run to go on with."""
    if resume and any((directory / name).exists() for name in (*JOURNALS, configuration.CONFIG_FILE)):
        return
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out {directory} is a file: give a directory")
    # what a run leaves that was killed before it had a journal
    beginnings = (LOCK, *(name + PARTIAL for name in JOURNALS))
    if directory.exists() and any(path.name not in beginnings for path in directory.iterdir()):
        if resume:
            raise UserError(f"--out {directory} is not empty, and has no run to go on with: give a new directory")
        raise UserError(f"--out {directory} is not empty: give a new directory, or --resume to go on with it")


def anything_to_judge(directory: Path, iterations: int) -> bool:
    """Whether a run still lacks preferences or its evaluation. If not, the oracle need not answer."""
    journal = Journal(directory)
    judged = (f"{iteration_folder(t)}/preferences.jsonl" for t in range(1, iterations + 1))
    return journal.note(EVALUATION) is None or any(journal.note(name) is None for name in judged)


def _read_prompts(
    config: Config, policies: ResidentPolicy, oracle: oracles.Oracle | None, skipped: Skipped | None
) -> tuple[list[Messages], list[Messages], str]:
    """The prompts to train on, those held out, and the SHA-256 of all their tokens, which a template's date changes.

    Each is checked against the model. The oracle, if there is one, is tried on each kind of conversation among them.
    """
    tried: set[frozenset[str]] = set()  # kinds of conversation
    rendered = hashlib.sha256()

    def usable(prompts: list[Messages]) -> list[Messages]:
        kinds = oracles.shortest_by_kind(prompts) if oracle is not None else {}
        if new := {kind: prompt for kind, prompt in kinds.items() if kind not in tried}:
            locate(base_of(config.model))  # a typo is found before minutes of loading
            if oracles.holds_model(oracle):
                policies.drop()
            try_oracle(config, oracle, list(new.values()), in_directory=False)
            tried.update(new)
        policy = policies(config.model)
        shown = progress("check the prompts", len(prompts)) if len(prompts) > MANY_PROMPTS else nullcontext()
        with shown as done:
            listed = counted(prompts, done) if done else prompts
            return policy.renderer.usable(listed, config.max_new_tokens, skipped, rendered)

    prompts, held_out = split_prompts(
        config.prompts,
        config.eval_prompts,
        config.eval_fraction,
        config.seed,
        config.prompt_column,
        skipped,
        usable,
    )
    return prompts, held_out, rendered.hexdigest()


def _inputs(config: Config, policy: Policy, checked: _Checked) -> dict[str, dict[str, str]]:
    """The identity of what a run works on: fingerprints of the model, the oracle, the prompts and their tokens."""
    checksum_once: Callable[[Path], str] = functools.cache(checksum)  # policy and oracle may be the same model
    commit = getattr(policy.model.config, "_commit_hash", None)
    return {
        "model": model_fingerprint(config.model, commit, checksum_once),
        "oracle": oracles.fingerprint(checked.oracle, config.oracle, checksum_once),
        "environment": checked.environment.files if checked.environment else {},
        "prompts": {"sha256": prompts_digest(checked.prompts, checked.held_out)},
        "rendering": {"sha256": checked.rendering},
    }


def _check_inputs(config: Config, journal: Journal, inputs: dict[str, dict[str, str]], force: bool) -> None:
    """Raises ``UserError`` if a run began with other prompts, tokens, π_1, oracle or environment.

    If it is forced, with other prompts alone.
    """
    directory = config.out
    began: dict[str, Any] = {name: journal.note(name) or now for name, now in inputs.items()}
    if began["prompts"] != inputs["prompts"]:
        raise UserError(f"the prompts are not those that {directory} began with: start a new run")
    if force:
        return
    if changed := changes(began["model"], inputs["model"]):
        raise UserError(
            f"--model {config.model} is not what {directory} began with: {', '.join(changed)} changed. Put it back, or "
            "add --force: finished stages stay as they are, the others use the new one"
        )
    if changed := changes(began["oracle"], inputs["oracle"]):
        raise UserError(
            f"{oracles.title(config.section(OracleConfig))} is not what {directory} began with: {', '.join(changed)} "
            "changed. Put it back, or add --force: finished stages stay as they are, the others use the new one"
        )
    if changed := changes(began["environment"], inputs["environment"]):
        raise UserError(
            f"--environment {config.environment} is not what {directory} began with: {', '.join(changed)} changed. Put "
            "it back, or add --force: finished stages stay as they are, the others use the new one"
        )
    if began["rendering"] != inputs["rendering"]:
        raise UserError(
            f"the chat template renders the prompts differently now than when {directory} began: a template that "
            f"writes today's date does that. {PINNED_DATE}; here give it with --force and the day on which the run "
            "began. With --force alone, the other stages use the new tokens"
        )


def _keep_initial(model: str, policy: Policy, policies: ResidentPolicy, journal: Journal) -> Source:
    """Where π_1 is. One that was dequantised or merged is saved in the run, which so has the weights it began with."""
    if not policy.converted:
        journal.forget_records(INITIAL)  # of another model that the run began with
        return model
    kept = journal.directory / INITIAL
    if journal.note(INITIAL) is None:
        policy.save(kept)
        journal.record(INITIAL)
    policies.keep_initial(kept, policy)
    return kept


def _log_prompts(tracker: Tracker, checked: _Checked) -> None:
    counts = {
        "train": len(checked.prompts),
        "held_out": len(checked.held_out),
        "skipped": checked.skipped.count if checked.skipped else 0,
    }
    if not tracker.begin("prompts", keep=lambda record: counts.items() <= record.items()):
        tracker.log("prompts", 0, **counts)


def _say_what_starts(config: Config, policy: Policy, checked: _Checked, reason: str) -> None:
    say(
        f"{config.objective} on {config.model} ({policy.device}, {policy.attention} attention), {len(checked.prompts)} "
        f"prompts to train on and {len(checked.held_out)} held out, oracle {config.oracle}, into {config.out}"
    )
    say(f"weights {config.weights} ({reason}), optimizer {config.optimizer}")
    for note in policy.notes:
        say(note)
    if checked.skipped and checked.skipped.count:
        say(str(checked.skipped))
    for notice in policy.renderer.template_notices(checked.prompts):
        say(f"note: {notice}")
    wanted = config.prompts_per_iteration
    count = len(prompts_of_iteration(checked.prompts, 1, config.iterations, wanted))
    if count < wanted:
        say(f"{count} prompts an iteration, not {wanted}: there are no more")
