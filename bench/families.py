"""Compares tiny random models of every family, in all that a run does with a model, with plain transformers.

    python -m bench families [--only NAME …] [--json FILE] [--page docs/models.md]

A checkpoint of each family in bench/zoo.py is loaded, responses are scored in padded batches, the first gradient of a
fit is computed, responses are sampled, and the policy is saved and loaded again. The results are compared with plain
transformers, which is given every prompt and response alone in a row. The verdict on a family is "exact", "refused"
with the error line, or "WRONG", which makes the exit status 1. Without --only, the table is written to docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from onpo_fast.arguments import at_least
from onpo_fast.batches import plan_steps
from onpo_fast.config import Config
from onpo_fast.data import Group, Pair, Response, read_groups
from onpo_fast.errors import UserError, one_line
from onpo_fast.fit import fit
from onpo_fast.models.loading import load
from onpo_fast.models.policy import Policy, score
from onpo_fast.objectives import Onpo
from onpo_fast.sampling import make_sampler
from onpo_fast.sources import quiet
from onpo_fast.train import train

from .crash_test import fork
from .families_page import LENGTHS, MAX_GRADIENT_ERROR, MAX_LOGP_ERROR, PAGE, FamilyResult, describe, make_page, summary
from .tiny_checkpoints import SPECIAL, Family, build
from .zoo import FAMILIES

MAX_SECONDS = 120.0  # time limit of a family
MAX_BYTES = 4 * 2**30  # memory limit of a family

CONVERSATIONS = [
    [{"role": "user", "content": text}]
    for text in ("Hi", "Name a colour, please", "Tell me about the weather in Paris, and do be brief, please.")
]
PAIRS = [Pair(g, w, lo, p) for g in range(3) for w, lo, p in ((0, 1, 1.0), (2, 0, 0.7), (1, 2, 0.9))]
ETA = 2.0  # nats; the target margin of a pair with preference 1 is half of it
TOKENS = 4096  # tokens per microbatch, enough for all rows at once


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=FAMILIES, help="Families of bench/zoo.py to check (default: all)."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON file to which the results are also written.")
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="Markdown page to which the table is written (default: docs/models.md; none with --only).",
    )
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=os.cpu_count(),
        help="Families checked at a time (default: one per core).",
    )


def main(options: argparse.Namespace) -> int:
    begin, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(1)  # set before the first computation, since threads do not survive the forks
    try:
        rows = check_all(options.only or list(FAMILIES), options.jobs)
    finally:
        torch.set_num_threads(threads)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    page = options.page or (None if options.only else PAGE)
    if page:
        page.write_text(make_page(rows), encoding="utf-8")
    print(f"{summary(rows)}, in {time.monotonic() - begin:.0f} s" + (f"; written to {page}" if page else ""))
    return 1 if any(row.verdict.startswith("WRONG") for row in rows) else 0


def check_all(names: Sequence[str], jobs: int) -> list[FamilyResult]:
    """Checks every family in a process of its own, ``jobs`` at a time; prints a line for each when it is done."""
    rows: dict[str, FamilyResult] = {}
    running: dict[int, tuple[str, float]] = {}  # process id -> family, start time
    waiting = list(names)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)

        def start(name: str) -> None:
            def child() -> None:
                resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
                row = check(name, FAMILIES[name], work / name)
                (work / f"{name}.json").write_text(json.dumps(asdict(row)), encoding="utf-8")

            running[fork(child, work / f"{name}.log")] = name, time.monotonic()

        while waiting or running:
            while waiting and len(running) < jobs:
                start(waiting.pop(0))
            time.sleep(0.02)
            for process, (name, started) in list(running.items()):
                ended, status = os.waitpid(process, os.WNOHANG)
                if not ended and time.monotonic() - started < MAX_SECONDS:
                    continue
                if not ended:
                    os.kill(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                del running[process]
                result = work / f"{name}.json"
                if result.exists():
                    rows[name] = FamilyResult(**json.loads(result.read_text(encoding="utf-8")))
                else:
                    why = (
                        f"exit status {os.waitstatus_to_exitcode(status)}" if ended else f"more than {MAX_SECONDS:g} s"
                    )
                    rows[name] = FamilyResult(
                        name, FAMILIES[name].about, verdict=f"WRONG: its process ended with {why}"
                    )
                print(f"{len(rows):3} of {len(names)}: {describe(rows[name])}", flush=True)
    return [rows[name] for name in names]


def check(name: str, family: Family, work: Path) -> FamilyResult:
    """Builds a tiny checkpoint in ``work`` and compares what a run does with it to plain transformers."""
    row, begin, faults = FamilyResult(name, family.about), time.monotonic(), []
    if not family.exists:
        row.verdict = "absent"
        return row
    source = work / name
    try:
        with quiet():
            build(family, source)
            faults.extend(_faults(row, family, source, work))
        row.verdict = f"WRONG: {'; '.join(faults)}" if faults else "exact"
    except UserError as error:
        row.verdict = "refused: " + one_line(str(error)).replace(str(source), "MODEL")
    except Exception as error:  # any failure is a result of the table
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"traceback {type(error).__name__} ({Path(where.filename).name}, line {where.lineno}): {error}"
        row.verdict = f"WRONG: {'; '.join([*faults, one_line(what)[:300]])}"
    row.seconds = time.monotonic() - begin
    return row


def _faults(row: FamilyResult, family: Family, source: Path, work: Path) -> Iterator[str]:
    """Fills the row and yields what is wrong.

    Raises:
        UserError: if the family is refused.
    """
    config = Config(
        model=str(source),
        device="cpu",
        max_new_tokens=max(map(max, LENGTHS)),
        sampling_batch_size=6,
        tokens_per_microbatch=TOKENS,
        batch_pairs=len(PAIRS),
        max_grad_norm=1e9,
        warmup_ratio=0.0,
    )
    policy = load(source, config)
    row.layout = policy.layout
    if not family.causal:
        real_run(source, work)
        yield "it is taken, and is no causal language model"
        return
    groups = make_groups(policy)
    plain = load_plain(source)
    exact, exact_gradient = plain_results(plain, groups)

    scores = score(policy, groups, TOKENS)
    row.logps = difference(scores, exact)
    if not row.logps <= MAX_LOGP_ERROR:
        yield f"log-probs are off by {row.logps:.2g} nats"

    gradients = []
    for seed in (1, 2):  # two seeds, so that randomness in a fit shows as two gradients
        torch.manual_seed(seed)
        gradients.append(first_gradient(policy, groups, scores, config))
    row.gradient = max(relative_error(gradient, exact_gradient) for gradient in gradients)
    if not row.gradient <= MAX_GRADIENT_ERROR:
        yield f"the gradient of a fit has a relative error of {row.gradient:.2g}"
    if twice := relative_error(*gradients):
        yield f"two fits from the same weights have different gradients (by {twice:.2g} of their norm)"

    yield from _sampling_faults(row, policy, plain, config, work)

    saved = work / "saved"
    policy.save(saved)
    yield from compare_files(family, source, saved)
    try:
        again = score(load(saved, config), groups, TOKENS)
    except UserError as error:
        yield "the saved policy cannot be loaded: " + one_line(str(error)).replace(str(saved), "SAVED")
        return
    row.saved = max(difference(again, scores), difference(plain_logps(load_plain(saved), groups), exact))
    if not row.saved <= MAX_LOGP_ERROR:
        yield f"log-probs change by {row.saved:.2g} nats when it is saved and loaded"


def _sampling_faults(
    row: FamilyResult, policy: Policy, plain: PreTrainedModel, config: Config, work: Path
) -> Iterator[str]:
    """Compares the sampler's log-probs with the scorer's. If they differ, a run must refuse the model or avoid it.

    Raises:
        UserError: if the run refuses the model.
    """
    drawn = make_sampler(policy, config)(CONVERSATIONS, 2, [0], lambda done: None)
    row.sampled = difference(logps_of(drawn), score(policy, drawn, TOKENS))
    if not row.sampled <= MAX_LOGP_ERROR:  # a run must refuse the model, or sample in another way
        alone = row.sampled
        drawn = real_run(Path(config.model), work)
        row.sampled = difference(logps_of(drawn), plain_logps(plain, drawn))
        if row.sampled <= MAX_LOGP_ERROR:
            row.notes.append(f"batches of prompts would be off by {alone:.2g} nats, so a run samples in another way")
        else:
            yield f"sampled log-probs are off by {row.sampled:.2g} nats, and a run goes on"


# ---------------------------------------------------------------------------------------------------------------------
# What a run does
# ---------------------------------------------------------------------------------------------------------------------


def make_groups(policy: Policy) -> list[Group]:
    """Makes prompts of three lengths, each with three seeded random responses that end with the EOS token."""
    chance = random.Random(0)
    eos = policy.tokenizer.eos_token_id
    groups = []
    for messages, lengths in zip(CONVERSATIONS, LENGTHS):
        tokens = [[chance.randrange(len(SPECIAL), 259) for _ in range(n - 1)] + [eos] for n in lengths]
        responses = [Response(policy.tokenizer.decode(t), t, "eos", 0.0) for t in tokens]
        groups.append(Group(messages, policy.renderer.render(messages), responses))
    return groups


def first_gradient(
    policy: Policy, groups: Sequence[Group], anchor: Sequence[Tensor], config: Config
) -> dict[str, Tensor]:
    """Gradient that a one-step fit passes to the optimizer, by parameter name. The weights are not changed.

    Raises:
        UserError: if ``fit`` refuses the model.
    """
    found: dict[str, Tensor] = {}

    def take(optimizer: torch.optim.Optimizer, *arguments) -> None:
        for name, parameter in policy.model.named_parameters():
            if parameter.grad is not None:
                found[name], parameter.grad = parameter.grad, None

    hook = register_optimizer_step_pre_hook(take)
    try:
        batches = plan_steps(PAIRS, 1, len(PAIRS), [0])
        fit(policy, groups, batches, anchor, Onpo(eta=ETA), config, lambda metrics: None)
    finally:
        hook.remove()
    return found


def real_run(source: Path, work: Path) -> list[Group]:
    """Runs one iteration of ``onpo_fast.train`` with all its checks; returns the responses it trained on.

    Raises:
        UserError: if the run refuses the model.
    """
    prompts = work / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": messages}) + "\n" for messages in CONVERSATIONS))
    held_out = work / "heldout.jsonl"
    held_out.write_text(json.dumps({"prompt": "What?"}) + "\n")
    out = work / "run"
    train(
        Config(
            model=str(source),
            device="cpu",
            prompts=str(prompts),
            eval_prompts=str(held_out),
            out=str(out),
            iterations=1,
            prompts_per_iteration=len(CONVERSATIONS),
            responses_per_prompt=2,
            eval_samples=1,
            max_new_tokens=max(map(max, LENGTHS)),
            sampling_batch_size=6,
            tokens_per_microbatch=TOKENS,
            batch_pairs=len(PAIRS),
            report_to="none",
        )
    )
    return list(read_groups(out / "iteration_01" / "responses.jsonl"))


def logps_of(groups: Sequence[Group]) -> list[Tensor]:
    """Summed log-probs from the sampler: one (K,) float64 tensor per group, in nats."""
    return [torch.tensor([r.logp for r in group.responses], dtype=torch.float64) for group in groups]


# ---------------------------------------------------------------------------------------------------------------------
# What plain transformers does
# ---------------------------------------------------------------------------------------------------------------------


def load_plain(source: Path) -> PreTrainedModel:
    """Loads the model class that the checkpoint names, in float32.

    Raises:
        ValueError: if weights are missing, left over or of another shape.
    """
    named = (AutoConfig.from_pretrained(source).architectures or [""])[0]
    model, found = getattr(transformers, named, AutoModelForCausalLM).from_pretrained(
        source, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, found[kind])):
            raise ValueError(f"plain transformers has {len(keys)} {kind.replace('_', ' ')}, as {keys[0]}")
    model.config.get_text_config().use_cache = False
    for parameter in model.parameters():  # transformers 5.17 leaves dequantised parameters in bfloat16
        parameter.data = parameter.data.float()
    return model.eval().requires_grad_(True)


def row_logps(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """Summed log-prob of a response that is alone in a row: () float64, in nats. Differentiable."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()


@torch.no_grad()
def plain_logps(model: PreTrainedModel, groups: Sequence[Group]) -> list[Tensor]:
    """Summed log-probs under plain transformers: one (K,) float64 tensor per group, in nats."""
    return [torch.stack([row_logps(model, group.prompt_tokens, r.tokens) for r in group.responses]) for group in groups]


def plain_results(model: PreTrainedModel, groups: Sequence[Group]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Summed log-probs and the gradient of a fit's first step under plain transformers.

    Returns one (K,) float64 tensor per group, in nats, and the gradient of the mean ONPO loss of ``PAIRS`` at the
    anchor, by parameter name.
    """
    logps = [torch.stack([row_logps(model, g.prompt_tokens, r.tokens) for r in g.responses]) for g in groups]
    losses = []
    for pair in PAIRS:
        log_ratios = logps[pair.group] - logps[pair.group].detach()
        margin = log_ratios[pair.winner] - log_ratios[pair.loser]
        losses.append((margin - ETA * (pair.preference - 0.5)).square())
    torch.stack(losses).mean().backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [one.detach() for one in logps], gradient


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons
# ---------------------------------------------------------------------------------------------------------------------


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest absolute difference in nats; NaN if a value is NaN."""
    return float((torch.cat(list(ours)) - torch.cat(list(theirs))).abs().max())


def relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative error ‖ours − theirs‖ / ‖theirs‖ over all parameters; a missing gradient counts as 0.

    A model with a vision tower may be trained as its language model alone, whose parameters have shorter names.
    """
    ours, theirs = (
        {name.replace("language_model.", ""): g.double() for name, g in one.items()} for one in (ours, theirs)
    )
    square = 0.0
    for name in ours.keys() | theirs.keys():
        square += float((ours.get(name, 0.0) - theirs.get(name, torch.zeros(()))).square().sum())
    return math.sqrt(square / sum(float(gradient.square().sum()) for gradient in theirs.values()))


def compare_files(family: Family, source: Path, saved: Path) -> Iterator[str]:
    """Yields differences between the saved, untrained policy and its source: files, tensor names and values."""
    names = {path.name for path in source.iterdir()} - {path.name for path in saved.iterdir()}
    if lost := sorted(name for name in names if not name.endswith((".safetensors", ".safetensors.index.json"))):
        yield f"files are not saved: {', '.join(lost)}"
    before, after = tensors(source), tensors(saved)
    if family.quantise:  # saved without scales; the log-probs compare the values
        before = {name.removesuffix("_blocks"): None for name in before if not name.endswith(("_scales", "_scale_inv"))}
    if before.keys() != after.keys():
        lost, more = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
        yield (
            f"of {len(before)} tensors {len(lost)} are not saved{f' (as {lost[0]})' if lost else ''}, and "
            f"{len(more)} are new{f' (as {more[0]})' if more else ''}"
        )
    for name, tensor in after.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            yield f"{name} is saved in {str(tensor.dtype).removeprefix('torch.')}"
            return
        if before.get(name) is not None and not torch.equal(before[name], tensor):
            yield f"{name} is not saved as it was"
            return


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in a directory, by name."""
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}
