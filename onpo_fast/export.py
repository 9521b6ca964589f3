"""Export what a run made: preference pairs, answers for AlpacaEval, a merged adapter, a policy to the Hugging Face Hub.

    python -m onpo_fast.export DIR                                 # DIR/pairs: prompt, chosen, rejected
    python -m onpo_fast.export DIR --alpaca instructions.json      # DIR/alpaca_eval_3.json: the answers of π_3
    python -m onpo_fast.export DIR --merge                         # DIR/merged_3: π_3 of a run with --lora_rank, whole
    python -m onpo_fast.export DIR --push_to_hub ORG/NAME          # the last policy, with its model card

The pairs are a directory for ``datasets.load_from_disk``, with the columns that TRL's trainers read, as lists of
messages, and with ``preference`` (the label; in conversations of several turns halfway between that of a fit and ½, and
fitted at twice the step: docs/multi-turn.md), ``iteration`` and ``group`` (the prompt's index in its iteration). Pairs
that --select drew have a ``weight`` too, without which they are no sample of all pairs. The
answers are what AlpacaEval takes as ``--model_outputs``: a JSON list of ``instruction``, ``output`` and ``generator``,
and the ``dataset`` of an instruction that has one. A merged policy is a plain Hugging Face directory in float32.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from . import config as configuration
from .arguments import CommandParser, program
from .config import ModelConfig, SamplingConfig
from .console import say
from .errors import UserError, command
from .reports.exports import export_answers, export_merged, export_pairs, policy_sources
from .reports.hub import push_policy

__all__ = ["export_answers", "export_merged", "export_pairs", "main", "push_policy"]

ASKS = ("trust_remote_code",)  # no oracle is asked: none of its options is needed
ONLY_WITH = {  # option → the kinds of export that it belongs to
    "out": ("pairs", "alpaca", "merge"),
    "iterations": ("pairs",),
    "policy": ("alpaca", "merge", "push_to_hub"),
    "max_new_tokens": ("alpaca",),
    "temperature": ("alpaca",),
    "private": ("push_to_hub",),
    "trust_remote_code": ("alpaca", "merge", "push_to_hub"),
}


@command
def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    kind = _kind(options)
    if kind == "pairs":
        _pairs(options)
    elif kind == "alpaca":
        _answers(options)
    elif kind == "merge":
        _merged(options)
    else:
        with_code = options.trust_remote_code is not None or options.trust_run
        private = True if options.private else None
        url = push_policy(options.directory, options.push_to_hub, options.policy, private, with_code)
        say(f"uploaded: {url}")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog=program("export"),
        description="Export the preference pairs of a run, answers of a policy, a merged adapter, or a policy.",
        epilog=configuration.TRUST_NOTE,
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="run directory")
    parser.add_argument(
        "--out", type=Path, help="where to write; default: DIR/pairs, DIR/alpaca_eval_N.json or DIR/merged_N"
    )
    parser.add_argument(
        "--iterations", type=int, nargs="+", metavar="T", help="export the pairs of these iterations only; default: all"
    )
    parser.add_argument(
        "--alpaca",
        metavar="INSTRUCTIONS",
        help="write a policy's answers to these instructions (JSON, JSON lines, parquet or a dataset) for AlpacaEval",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="write a policy of a run with --lora_rank as a whole model: its base with the adapter merged, in float32",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="ORG/NAME",
        help="upload a policy with its model card to this Hugging Face repository, which is created if it does not "
        "exist; the token comes from HF_TOKEN or `hf auth login`",
    )
    parser.add_argument("--private", action="store_true", help="with --push_to_hub: create the repository as private")
    parser.add_argument(
        "--policy", type=int, metavar="N", help="number of the policy: 1 for π_1, …; default: the run's last policy"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, help="with --alpaca: tokens of an answer at most; default: as in the run"
    )
    parser.add_argument("--temperature", type=float, help="with --alpaca: sampling temperature; default: as in the run")
    configuration.add_options(parser, ASKS)
    return parser


def _kind(options: argparse.Namespace) -> str:
    """What to export: "pairs", "alpaca", "merge" or "push_to_hub". ``UserError`` if an option belongs to another."""
    kinds = [name for name in ("alpaca", "merge", "push_to_hub") if getattr(options, name) not in (None, False)]
    kinds = kinds or ["pairs"]
    if len(kinds) > 1:
        raise UserError(f"give {' or '.join(f'--{kind}' for kind in kinds)}, not both")
    for name, allowed in ONLY_WITH.items():
        if getattr(options, name) not in (None, False) and kinds[0] not in allowed:
            others = [f"--{kind}" for kind in allowed if kind != "pairs"]
            if not others:
                raise UserError(f"--{name} goes with the export of pairs, not with --{kinds[0]}")
            raise UserError(f"--{name} goes with {' or '.join(others)}")
    return kinds[0]


def _pairs(options: argparse.Namespace) -> None:
    configuration.read_run(options.directory, configuration.given_options(options, ASKS), ())  # no model is loaded
    out = options.out or options.directory / "pairs"
    say(f"{export_pairs(options.directory, out, options.iterations)} pairs: {out}")


def _answers(options: argparse.Namespace) -> None:
    directory = options.directory
    config = configuration.read_run(directory, configuration.given_options(options, ASKS), ASKS)
    given = {name: getattr(options, name) for name in ("max_new_tokens", "temperature")}
    config = replace(config, **{name: value for name, value in given.items() if value is not None})
    model, sampling = config.section(ModelConfig), config.section(SamplingConfig)
    policy = max(policy_sources(directory, model)) if options.policy is None else options.policy
    out = options.out or directory / f"alpaca_eval_{policy}.json"
    count = export_answers(directory, out, options.alpaca, policy, model, sampling, config.seed)
    say(f"{count} answers of π_{policy}: {out}")


def _merged(options: argparse.Namespace) -> None:
    directory = options.directory
    config = configuration.read_run(directory, configuration.given_options(options, ASKS), ASKS)
    model = config.section(ModelConfig)
    policy = max(policy_sources(directory, model)) if options.policy is None else options.policy
    out = options.out or directory / f"merged_{policy}"
    export_merged(directory, out, policy, model)
    say(f"π_{policy} as a whole model: {out}")


if __name__ == "__main__":
    main()
