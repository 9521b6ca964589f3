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

import os
import shlex

from . import algorithms, signals
from . import config as configuration
from .config import AlgorithmConfig, Config, FitConfig, RunConfig, SamplingConfig
from .console import console, say
from .conversation_game import ConversationGame
from .distributed import World, joined
from .errors import command, printable
from .evaluate import Evaluator
from .language_game import LanguageGame
from .opening import OpenRun, open_run
from .report import write_report
from .reports.hub import check_upload, push_policy
from .reports.model_card import write_model_cards
from .run.outputs import finished_policies
from .win_rates import summary, win_rate_table


def train(config: Config, resume: bool = False, force: bool = False, world: World | None = None) -> dict:
    """Runs the algorithm and returns the evaluation. Every file is in ``config.out``, which must be new or empty.

    Args:
        resume: go on with the run that is there, to the end that it would have had, bit for bit where the device
            computes the same bits twice, as a CPU does with the same number of threads.
        force: go on although options, the model or the oracle changed.
        world: the ranks of the run, all of which call this function.

    Raises:
        UserError: if something does not fit; names the option, file or line.
        Stopped: if a signal asked the run to stop.
    """
    world = world or World()
    if config.push_to_hub is not None and world.is_main:
        check_upload(config.push_to_hub, config.model if config.lora_rank else None)  # before hours of training
    with open_run(config, resume, force, world) as run:
        config = run.config
        kind = ConversationGame if config.has_turns else LanguageGame
        game = kind(
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
        environment=run.environment,
        turns=config.turns,
    )
    policies = run.world.from_main(
        lambda: {"π_1": run.initial, **finished_policies(run.directory, run.journal)},
    )
    result = evaluator.evaluate_once(policies, run.held_out)
    run.world.from_main(_publish, run, config, result)
    return result


def _publish(run: OpenRun, config: Config, result: dict) -> None:
    """Writes the report and the model cards, shows the win rates and uploads the last policy if asked."""
    run.tracker.close()
    write_model_cards(run.directory, run.journal)
    report = write_report(run.directory)
    console.print(win_rate_table(result))
    say(summary(result))
    say(f"report: {report}")
    if config.push_to_hub is not None:
        url = push_policy(run.directory, config.push_to_hub, with_code=config.trust_remote_code, journal=run.journal)
        say(f"uploaded: {url}")


def continuation(config: Config, ranks: int) -> str:
    """The command that goes on with a run; on several nodes, the one to start on each."""
    launcher = "python"
    if ranks > 1:
        ranks_here = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = ranks // ranks_here
        several = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:PORT " if nodes > 1 else ""
        launcher = f"torchrun {several}--nproc-per-node {ranks_here}"
    trust = " --trust_run" if configuration.options_needing_trust(config) else ""
    return f"{launcher} -m onpo_fast.train --resume --out {printable(shlex.quote(config.out))}{trust}"


@command
def main(argv: list[str]) -> None:
    try:
        with joined() as world:
            config, resume = world.from_main(lambda: configuration.parse_run(argv))
            signals.listen()
            world.set_up(config.device, config.rank_timeout)
            world.continuation = f"to go on: {continuation(config, world.size)}"
            train(config, resume, "--force" in argv, world)
    except signals.Stopped as stopped:
        console.print(f"{stopped}; to go on: {continuation(config, world.size)}")
        raise SystemExit(stopped.exit_status) from None


if __name__ == "__main__":
    main()
