"""Trains a language model by self-play: Algorithm 1 of ONPO (arXiv 2502.16852), or a method it is compared with.

    python -m onpo_fast.train --help
    python -m onpo_fast.train --resume --out DIR

A policy plays itself. In each iteration it responds to prompts, an oracle says how likely each response beats each
other one, and two least-squares fits take the optimistic mirror-descent step:

    π′_{t+1} = argmin_π E (D(π) − D(π′_t)     − η/2)²        D(π) = log π(y_w) − log π(y_l)
    π_{t+1}  = argmin_π E (D(π) − D(π′_{t+1}) − η/2)²        on the same pairs (y_w, y_l) from π_t

``algorithms`` has these lines, ``language_game`` makes the comparisons and fits that they ask for.
"""

from __future__ import annotations

import shlex

from rich.table import Table

from . import algorithms
from . import config as configuration
from .config import AlgorithmConfig, Config, FitConfig, RunConfig, SamplingConfig
from .errors import command, printable
from .evaluate import Evaluator, summary
from .language_game import LanguageGame
from .report import write_report
from .reports.hub import check_upload, push_policy
from .reports.model_card import write_model_cards
from .run import signals
from .run.opening import OpenRun, open_run
from .run.outputs import finished_policies
from .run.tracking import console, say


def train(config: Config, resume: bool = False, force: bool = False) -> dict:
    """Runs the algorithm and returns the evaluation. Every file is in ``config.out``, which must be new or empty.

    Args:
        resume: go on with the run that is there, to the end that it would have had, bit for bit where the device
            computes the same bits twice, as a CPU does with the same number of threads.
        force: go on although options, the model or the oracle changed.

    Raises:
        UserError: if something does not fit; names the option, file or line.
        Stopped: if a signal asked the run to stop.
    """
    if config.push_to_hub is not None:
        check_upload(config.push_to_hub)  # before hours of training
    with open_run(config, resume, force) as run:
        config = run.config
        game = LanguageGame(
            run,
            config.make_objective(),
            config.section(AlgorithmConfig),
            config.section(SamplingConfig),
            config.section(FitConfig),
            config.section(RunConfig),
        )
        play = algorithms.named(config.objective).play
        if config.refresh_reference is not None:
            play = algorithms.refreshing(play, config.refresh_reference)
        policies = play(game, run.initial)
        next(policies)  # π_1
        for t in range(1, config.iterations + 1):
            game.begin_iteration(t)
            next(policies)  # π_{t+1}
            game.end_iteration()
        return finish(run, config, game)


def finish(run: OpenRun, config: Config, game: LanguageGame) -> dict:
    """Evaluates all policies, writes the report and the model cards, and uploads the last policy if asked."""
    evaluator = Evaluator(
        run.cache,
        run.policies,
        run.oracle,
        config.oracle,
        run.oracle_files,
        config.section(SamplingConfig),
        config.section(FitConfig),
        config.section(RunConfig),
        game.truncation,
    )
    policies = {"π_1": run.initial, **finished_policies(run.directory, run.journal)}
    result = evaluator.evaluate_once(policies, run.held_out)
    run.tracker.close()
    write_model_cards(run.directory, run.journal)
    report = write_report(run.directory)
    table = Table("row against column", *result["policies"], title="Win rates on held-out prompts")
    for name, row in zip(result["policies"], result["win_rate"]):
        table.add_row(name, *(f"{rate:.3f}" for rate in row))
    console.print(table)
    say(summary(result))
    say(f"report: {report}")
    if config.push_to_hub is not None:
        url = push_policy(run.directory, config.push_to_hub, with_code=config.trust_remote_code, journal=run.journal)
        say(f"uploaded: {url}")
    return result


@command
def main(argv: list[str]) -> None:
    config, resume = configuration.parse_run(argv)
    signals.listen()
    try:
        train(config, resume, force="--force" in argv)
    except signals.Stopped as stopped:
        directory = printable(shlex.quote(config.out))
        trust = " --trust_run" if configuration.options_needing_trust(config) else ""
        console.print(f"{stopped}; to go on: python -m onpo_fast.train --resume --out {directory}{trust}")
        raise SystemExit(stopped.exit_status) from None


if __name__ == "__main__":
    main()
