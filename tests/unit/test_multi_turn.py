"""Conversations of several turns: trees, targets, environments."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from onpo_fast import oracles
from onpo_fast.conversations import Prompt
from onpo_fast.data import Group, Response
from onpo_fast.errors import UserError
from onpo_fast.games import multiturn
from onpo_fast.games.solution import rewards
from onpo_fast.multi_turn import environment, partners
from onpo_fast.multi_turn.conversation import Conversation, Transcript
from onpo_fast.multi_turn.tree import comparisons, grow, labels, play

PROMPT = [{"role": "user", "content": "Hi"}]


class Dice:
    """A policy over the words a and b: probabilities after every history, for two turns."""

    def __init__(self, policy: list[np.ndarray], seed: int) -> None:
        self.policy, self.rng = policy, np.random.default_rng(seed)
        self.asked: list[tuple[int, int, int, bool]] = []

    def __call__(self, states, count, turn, learning) -> list[Group]:
        self.asked.append((len(states), count, turn, learning))
        return [self._group(state, count) for state in states]

    def _group(self, state, count: int) -> Group:
        history = [message["content"] for message in state if message["role"] == "assistant"]
        row = int("".join(str("ab".index(word)) for word in history) or "0", 2)
        drawn = self.rng.random(count) < self.policy[len(history)][row, 1]
        return Group(state, [1], [Response("ab"[int(one)], [int(one)], "eos", 0.0) for one in drawn])


def ask(conversations, turn: int) -> list[dict]:
    """An environment."""
    return [{"role": "user", "content": "?"}] * len(conversations)


def final(transcript: Transcript) -> int:
    """The index of a final state."""
    said = [message["content"] for message in transcript.messages if message["role"] == "assistant"]
    return int("".join(str("ab".index(word)) for word in said), 2)


def test_a_tree_has_the_prompts_that_were_sampled_and_nobody_is_asked_after_the_end() -> None:
    other = [{"role": "user", "content": "Hello"}]
    asked = []

    def act(states, count: int, turn: int, learning: bool) -> list[Group]:
        return [Group(other, [1], [Response("a", [1], "eos", 0.0)] * count)]  # which a file had

    def answer(conversations, turn: int) -> list[None]:
        asked.append(turn)
        return [None] * len(conversations)

    (tree,) = grow([PROMPT, PROMPT], 4, 3, act, answer)
    assert all(conversation.prompt == other for conversation in tree.conversations)
    assert [state.turn for state in tree.states] == asked == [1]
    assert play([PROMPT], 4, 2, act, answer)
    assert asked == [1, 1]


def test_an_oracle_may_change_the_messages_that_it_is_given() -> None:
    def careless(prompt, responses):
        for response in responses:
            response.messages.clear()
        return np.full((2, 2), 0.5)

    texts = [Transcript([{"role": "assistant", "content": word}]) for word in "ab"]
    oracles.judge(careless, [Group(PROMPT, [1], [Response(text, [1], "eos", 0.0) for text in texts])], "mine")
    assert [text.messages[0]["content"] for text in texts] == ["a", "b"]


@pytest.mark.parametrize(("target", "biased"), [("unbiased", False), ("branches", True)])
def test_the_targets_of_a_state_are_those_of_the_exact_step(target: str, biased: bool) -> None:
    """In the mean over trees, for each state and pair of different actions: η(Q(s, a) − Q(s, b)) with η = 1."""
    rng = np.random.default_rng(0)
    upper = np.triu(rng.random((4, 4)), 1)
    P = upper + np.tril(1 - upper.T, -1) + np.eye(4) / 2
    policy = [np.array([[0.6, 0.4]]), np.array([[0.5, 0.5], [0.3, 0.7]])]
    trees = grow([PROMPT] * 8000, 2, 3, Dice(policy, 1), ask)
    found = {(0, 0): [], (1, 0): [], (1, 1): []}  # by the number of words said and the state's index
    for tree in trees:
        finals = [final(conversation.transcript) for conversation in tree.conversations]
        preferences = P[np.ix_(finals, finals)]
        asked = np.full_like(preferences, np.nan)
        for i, j in comparisons(tree, target):
            asked[i, j], asked[j, i] = preferences[i, j], preferences[j, i]
        np.fill_diagonal(asked, 0.5)
        for state in tree.states:
            own = labels(tree, state, asked, target)
            assert np.isfinite(own).all()
            words = [response.text for response in state.group.responses]
            history = [m["content"] for m in state.group.prompt if m["role"] == "assistant"]
            place = (state.turn - 1, int("".join(str("ab".index(w)) for w in history) or "0", 2))
            found[place] += [
                2 * (own[i, j] - 0.5) for i, a in enumerate(words) for j, b in enumerate(words) if (a, b) == ("a", "b")
            ]
    values = multiturn.action_values(rewards(P, multiturn.distribution(policy)), policy)
    for (turn, row), targets in found.items():
        exact = values[turn][row, 0] - values[turn][row, 1]
        close = abs(np.mean(targets) - exact) < 0.02
        assert close != (biased and turn > 0), (turn, row, np.mean(targets), exact)


def test_what_a_tree_costs() -> None:
    """K + (H − 1)(K − 1) conversations a prompt, in two stages a turn; the trunk is compared with an opponent once."""
    dice = Dice([np.full((2**h, 2), 0.5) for h in range(3)], 0)
    trees = grow([PROMPT] * 5, 3, 4, dice, ask)
    assert all(len(tree.conversations) == 4 + 2 * 3 for tree in trees)
    assert all(len(conversation.responses) == 3 for tree in trees for conversation in tree.conversations)
    assert dice.asked == [(5, 4, 1, True), (5, 4, 2, True), (15, 1, 2, False), (5, 4, 3, True), (30, 1, 3, False)]
    assert all(len(comparisons(tree, "unbiased")) == 6 + 2 * 3**2 for tree in trees)
    assert all(len(comparisons(tree, "branches")) == 3 * 6 for tree in trees)


def test_conversations_that_end_early_have_no_later_states() -> None:
    dice = Dice([np.full((2**h, 2), 0.5) for h in range(2)], 0)

    def replies(conversations, turn):
        return [None if one.responses[0].text == "a" else {"role": "user", "content": "?"} for one in conversations]

    for tree in grow([PROMPT] * 20, 2, 3, dice, replies):
        trunk = tree.conversations[0].responses
        assert len(tree.states) == len(trunk) == (1 if trunk[0].text == "a" else 2)
        assert all(len(one.responses) == (1 if one.responses[0].text == "a" else 2) for one in tree.conversations)


def test_one_turn_is_the_text_of_its_response() -> None:
    conversation = Conversation(PROMPT).with_response(Response("Fine.", [1], "eos", 0.0))
    assert conversation.transcript == "Fine."
    conversation = conversation.with_reply({"role": "user", "content": "Why?"})
    conversation = conversation.with_response(Response("So.", [1], "eos", 0.0))
    assert conversation.transcript == "Fine.\n\nUser: Why?\n\nAssistant: So."
    assert conversation.transcript.messages[-1] == {"role": "assistant", "content": "So."}
    assert conversation.state == [*PROMPT, *conversation.transcript.messages]


def conversation(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_the_partner_ends_after_three_replies() -> None:
    said = ["Tell me something."]
    for answers in (partners.ASKS_BACK, partners.WANTS_LESS, partners.CHANGES):
        said.append("All right.")
        reply = partners.partner(conversation(*said), 5)
        assert reply in answers
        assert reply == partners.partner(conversation(*said), 5)
        said.append(reply)
    assert partners.partner(conversation(*said, "All right."), 5) is None


@pytest.mark.parametrize(
    ("texts", "goes_on"),
    [
        (["The first word is apple.", "Eagle! It begins with e."], True),
        (["The first word is apple.", "Stone"], False),
        (["The first word is apple.", "eagle", "engine", "Eagle"], False),  # said before
        (["The first word is apple.", "123"], False),
    ],
)
def test_the_word_game(texts: list[str], goes_on: bool) -> None:
    reply = partners.word_game(conversation(*texts), 3)
    assert (reply is not None) == goes_on
    if reply:
        assert reply[0] == partners.chain_of(conversation(*texts))[-1][-1]
        assert reply not in partners.chain_of(conversation(*texts))


def fails(messages, seed):
    raise KeyError("state")


async def is_async(messages, seed):
    return None


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (fails, "raised KeyError: 'state'"),
        (lambda messages, seed: 3, "returned '3' (int)"),
        (lambda messages, seed: {"role": "assistant", "content": "x"}, "expected a text, a message"),
        (lambda messages, seed: "  ", "a message is empty"),
        (lambda messages, seed: {"role": "user", "content": 3}, "content"),
        (is_async, "async"),
    ],
)
def test_an_environment_that_cannot_be_used(function, words: str) -> None:
    with pytest.raises(UserError, match="--environment mine: ") as caught:
        environment.CheckedEnvironment("mine", function, 5.0)(conversation("Hi", "Yes"), 0)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_environment_that_never_answers() -> None:
    import threading

    hangs = threading.Event()
    with pytest.raises(UserError, match=r"no answer in 0\.1 s"):
        environment.CheckedEnvironment("mine", lambda messages, seed: hangs.wait(), 0.1)(conversation("Hi", "Yes"), 0)
    hangs.set()


def test_an_environment_cannot_change_the_conversation() -> None:
    def changes(messages, seed):
        messages[0]["content"] = "changed"
        return "Go on."

    messages = conversation("Hi", "Yes")
    assert environment.CheckedEnvironment("mine", changes, 5.0)(messages, 0) == {"role": "user", "content": "Go on."}
    assert messages == conversation("Hi", "Yes")


@pytest.mark.parametrize("name", ["nothing", "no_such_module:function", "json:loads_", "json:__doc__"])
def test_environments_that_do_not_exist(name: str) -> None:
    with pytest.raises(UserError, match=f"--environment {name}"):
        environment.load(name, 1.0)


def test_a_transcript_can_be_copied() -> None:
    transcript = Transcript([{"role": "assistant", "content": "a"}, {"role": "user", "content": "Why?"}])
    for one in (copy.copy(transcript), copy.deepcopy(transcript), pickle.loads(pickle.dumps(transcript))):
        assert one == transcript == "a\n\nUser: Why?"
        assert one.messages == transcript.messages


def test_what_an_oracle_does_to_messages_stays_with_it() -> None:
    conversation = Conversation(PROMPT, (Response("a", [1], "eos", 0.0),), ({"role": "user", "content": "Why?"},))
    conversation.transcript.messages[1]["content"] = "changed"
    assert conversation.messages[1]["content"] == "Why?"


class Unprintable:
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize("answer", [Unprintable(), {"role": np.array([1, 2]), "content": "x"}, {"role": ["user"]}])
def test_what_is_no_message(answer: object) -> None:
    own = environment.CheckedEnvironment("mine:f", lambda messages, seed: answer, 5.0)
    with pytest.raises(UserError, match="--environment mine:f: it returned"):
        own(Prompt([*PROMPT, {"role": "assistant", "content": "a"}], "", None), 0)
