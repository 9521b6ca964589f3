"""The game of conversations with several turns, as ``algorithms`` plays it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import streams
from .comparisons import Comparisons, Mixture, weights_of
from .config import EnvironmentConfig
from .console import Progress
from .data import Group, Messages
from .language_game import LanguageGame
from .models.resident import Source
from .multi_turn import files
from .multi_turn.conversation import Conversation
from .multi_turn.replies import reply_to
from .multi_turn.tree import Tree, comparisons, grow, labels
from .run.outputs import iteration_folder


class ConversationGame(LanguageGame):
    """A ``LanguageGame`` whose policy learns at every turn of a conversation.

    Groups are states with their K actions, turn by turn, so that scoring and fits are those of one turn: a conversation
    so far is the prompt, and the loss is over the tokens of the turn alone.
    """

    one_response = "first turn"
    judges_beside = False  # conversations are judged when they have ended

    def compare(self, policy: Source | Mixture, opponent: Source | None = None) -> Comparisons:
        """Conversations of a policy, compared with each other; pairs of actions at the states of each turn."""
        if opponent is not None:
            raise NotImplementedError("conversations with an opponent")
        self.comparisons += 1
        suffix = "" if self.comparisons == 1 else f"_{self.comparisons}"
        config = self.run.config.section(EnvironmentConfig)
        trees = self._play(policy, suffix, config.turns)
        preferences = self._judge(trees, suffix, config.multi_turn_target)
        states = [(tree, state, P) for tree, P in zip(trees, preferences) for state in tree.states]
        states.sort(key=lambda one: one[1].turn)  # stable: prompts stay in order within a turn
        groups = [state.group for _, state, _ in states]
        targets = [labels(tree, state, P, config.multi_turn_target) for tree, state, P in states]
        return Comparisons(groups, self.pair(groups, targets, suffix), policy, step=2, suffix=suffix)

    def _play(self, policy: Source | Mixture, suffix: str, turns: int) -> list[Tree]:
        """The iteration's conversations. Responses and replies are on disk, turn by turn."""

        def act(states: Sequence[Messages], count: int, turn: int, learning: bool) -> list[Group]:
            name = "responses" if learning else "rollouts"
            if turn > 1:
                name += f"_turn_{turn}"
            substream = (turn, int(learning)) if turn > 1 else ()
            return self.sample(
                policy, f"{name}{suffix}", streams.SAMPLING, count, prompts=states, substream=substream, turn=turn
            )

        def answer(conversations: Sequence[Conversation], turn: int) -> list[dict | None]:
            return self._answer(weights_of(policy), conversations, turn, suffix)

        return grow(self.prompts(), turns, self.algorithm.responses_per_prompt, act, answer)

    def _answer(
        self, source: Source, conversations: Sequence[Conversation], turn: int, suffix: str
    ) -> list[dict | None]:
        """The environment's messages after a turn of the policy with these weights."""

        run, seed = self.run, [self.run_config.seed, streams.ENVIRONMENT, self.t, turn]

        def compute(part: Sequence[Conversation], first: int, done: Progress) -> list[dict | None]:
            renderer, found = run.policies(source).renderer, []
            for index, conversation in enumerate(part, first):
                room = self.sampling.max_new_tokens
                found.append(reply_to(run.environment, conversation, [*seed, index], renderer, room))
                done(1)
            return found

        return run.cache.cached_in_parts(
            f"{iteration_folder(self.t)}/replies_turn_{turn}{suffix}.jsonl",
            conversations,
            files.REPLIES_AT_A_TIME,
            compute=compute,
            read=lambda path: files.read_replies(path, len(conversations)),
            read_part=lambda path, part: files.read_replies(path, len(part)),
            write=files.write_replies,
            stage="environment",
            title=f"iteration {self.t}: environment, turn {turn}",
            metrics=lambda replies, cost: {
                "seconds": cost["seconds"],
                "turn": turn,
                "replies": len(replies),
                "ended": sum(reply is None for reply in replies),
            },
            config_key=run.environment.files,
            shared=False,
        )

    def _judge(self, trees: Sequence[Tree], suffix: str, target: str) -> list[np.ndarray]:
        """The preferences between the conversations of each tree that its labels need."""
        ended = [files.as_group(tree.conversations) for tree in trees]
        name = f"{iteration_folder(self.t)}/conversations{suffix}.jsonl"  # for people: it is made of the other files
        self.run.cache.cached(name, lambda: ended, lambda path: ended, files.write_conversations, stage="environment")
        pairs = [comparisons(tree, target) for tree in trees]
        return self.judge(ended, suffix, pairs=pairs)
