"""A tree of conversations for each prompt, from which every turn of the policy learns.

From each prompt K conversations are played to their end. The first is the *trunk*. At each later turn that it reaches,
its history is a state, drawn as the policy meets states; K actions are sampled there, of which the trunk's own is one,
and each is played to its end. The other K − 1 conversations from the prompt are independent of the trunk, and are the
opponents of what follows its states. A prompt takes K + (H − 1)(K − 1) conversations of at most H turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product

import numpy as np

from ..data import Group, Messages
from ..pairing import against_opponent
from .conversation import Conversation

# given the states, the number of responses to each, the turn (from 1) and whether they are those that are learned from
Act = Callable[[Sequence[Messages], int, int, bool], list[Group]]
# given conversations that wait for the environment and the turn that they have ended, returns its messages
Answer = Callable[[Sequence[Conversation], int], list["dict | None"]]


@dataclass
class Branches:
    """The K actions at a state, with the conversations that follow.

    Attributes:
        turn: counted from 1.
        group: the state and its actions.
        rollouts: for each action the index of its conversation in the tree.
    """

    turn: int
    group: Group
    rollouts: list[int]


@dataclass
class Tree:
    """The conversations of a prompt.

    Attributes:
        conversations: all of them. The first is the trunk, and the first K begin at the prompt.
        states: where the policy learns, turn by turn.
    """

    conversations: list[Conversation]
    states: list[Branches] = field(default_factory=list)

    @property
    def opponents(self) -> list[int]:
        """The conversations that are independent of the trunk."""
        return self.states[0].rollouts[1:]


def grow(prompts: Sequence[Messages], turns: int, branches: int, act: Act, answer: Answer) -> list[Tree]:
    """Plays the conversations of all prompts turn by turn, so that a turn is sampled in two stages at most.

    Args:
        turns: H, the most turns of the policy.
        branches: K ≥ 2.
        act: samples responses of the policy.
        answer: asks the environment.
    """
    trees: list[Tree] = []
    for turn in range(1, turns + 1):
        waiting = [[i for i, one in enumerate(tree.conversations) if not one.ended] for tree in trees]
        if turn == 1:
            groups = act(prompts, branches, turn, True)
            trees = [Tree([]) for _ in groups]
            learning = {p: Conversation(group.prompt) for p, group in enumerate(groups)}  # as they were sampled
        else:
            learning = {p: tree.conversations[0] for p, tree in enumerate(trees) if not tree.conversations[0].ended}
            groups = act([one.state for one in learning.values()], branches, turn, True) if learning else []
        spoken = []
        for (p, conversation), group in zip(learning.items(), groups, strict=True):
            tree, said = trees[p], [conversation.with_response(response) for response in group.responses]
            new = range(len(tree.conversations), len(tree.conversations) + branches - min(turn, 2) + 1)
            rollouts = list(new) if turn == 1 else [0, *new]
            tree.states.append(Branches(turn, group, rollouts))
            tree.conversations[:1] = said[:1]
            tree.conversations += said[1:]
            spoken += [(p, i) for i in rollouts]
        others = [(p, i) for p, own in enumerate(waiting) for i in own if i != 0]
        states = [trees[p].conversations[i].state for p, i in others]
        for (p, i), group in zip(others, act(states, 1, turn, False) if others else [], strict=True):
            trees[p].conversations[i] = trees[p].conversations[i].with_response(group.responses[0])
        spoken += others
        if turn < turns and spoken:
            replies = answer([trees[p].conversations[i] for p, i in spoken], turn)
            for (p, i), reply in zip(spoken, replies, strict=True):
                trees[p].conversations[i] = trees[p].conversations[i].with_reply(reply)
    return trees


def comparisons(tree: Tree, target: str) -> list[tuple[int, int]]:
    """Returns the pairs of conversations whose preference is needed, each once; see ``labels``."""

    def needed(state: Branches) -> Iterator[tuple[int, int]]:
        if state.turn > 1 and target == "unbiased":
            return product(state.rollouts, tree.opponents)
        return combinations(state.rollouts, 2)

    return list(dict.fromkeys(pair for state in tree.states for pair in needed(state)))  # the trunk is in every state


def labels(tree: Tree, state: Branches, preferences: np.ndarray, target: str) -> np.ndarray:
    """Returns the labels of all pairs of a state's actions, (K, K), which are fitted at twice the step.

    The step at a state is that of Q(s, y), how often a conversation that goes on with y wins against an independent one
    from the prompt. The other branch of a pair is such a one only at the first turn. So the label of the actions i and
    j at a later turn is ½ + (w_i − w_j)/2, with the win rates w of their conversations against the opponents: at twice
    the step, its target has the expectation η(Q(s, y_i) − Q(s, y_j)) (``games.multiturn``). "branches" compares the
    two branches at all turns, and is biased: it has the target of a game that both players begin in s.

    Args:
        preferences: P(i ≻ j) between the conversations of the tree.
        target: "unbiased" or "branches".
    """
    if state.turn > 1 and target == "unbiased":
        return against_opponent(preferences[np.ix_(state.rollouts, tree.opponents)].mean(1))
    return 0.5 + (preferences[np.ix_(state.rollouts, state.rollouts)] - 0.5) / 2


def play(prompts: Sequence[Messages], turns: int, count: int, act: Act, answer: Answer) -> list[list[Conversation]]:
    """Plays ``count`` independent conversations from each prompt to their end; see ``grow``."""
    conversations = [[Conversation(prompt)] * count for prompt in prompts]
    for turn in range(1, turns + 1):
        going = [(p, i) for p, own in enumerate(conversations) for i, one in enumerate(own) if not one.ended]
        if turn == 1:
            said = [response for group in act(prompts, count, 1, True) for response in group.responses]
        else:
            groups = act([conversations[p][i].state for p, i in going], 1, turn, False) if going else []
            said = [group.responses[0] for group in groups]
        for (p, i), response in zip(going, said, strict=True):
            conversations[p][i] = conversations[p][i].with_response(response)
        if turn < turns and going:
            for (p, i), reply in zip(going, answer([conversations[p][i] for p, i in going], turn), strict=True):
                conversations[p][i] = conversations[p][i].with_reply(reply)
    return conversations
