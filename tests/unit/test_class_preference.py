"""Preferences between classes of responses, and the classes of the oracle "openings"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onpo_fast import oracles
from onpo_fast.data import Group, Response
from onpo_fast.errors import UserError
from onpo_fast.oracles import OPENINGS, ClassPreference, cyclic_preference, transitive_preference
from onpo_fast.oracles.openings import DETERMINERS, FUNCTION_WORDS, classify, first_word

PROMPT = [{"role": "user", "content": "What is a fox?"}]
DETERMINER, FUNCTION, CONTENT = range(3)


def group(*texts: str) -> Group:
    return Group(PROMPT, [1], [Response(text, [1], "eos", -1.0) for text in texts])


def by_digit(prompt: list, response: str) -> int | None:
    return int(response) if response.isdigit() else None


# --- How a response begins --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("The fox is red.", DETERMINER),
        ("THE FOX", DETERMINER),
        ("A", DETERMINER),
        ("my dear", DETERMINER),
        ("That is it.", DETERMINER),
        ("\n\n  **The** fox", DETERMINER),
        ("# This", DETERMINER),
        ("> Some say", DETERMINER),
        ("- Each fox", DETERMINER),
        ("+ Each fox", DETERMINER),
        ("_An_ old fox", DETERMINER),
        ("~~The~~ fox", DETERMINER),
        ("“The fox”", DETERMINER),
        ("«‘(The", DETERMINER),
        ("…the fox", DETERMINER),
        ("\ufeffThe fox", DETERMINER),
        ("𝐓𝐡𝐞 𝐟𝐨𝐱", DETERMINER),
        ("Ｔｈｅ fox", DETERMINER),
        ("I am", FUNCTION),
        ("I'm a fox", FUNCTION),
        ("I’m a fox", FUNCTION),
        ("It's", FUNCTION),
        ("It‘s", FUNCTION),
        ("Itʼs", FUNCTION),
        ("That's", FUNCTION),
        ("Here’s the", FUNCTION),
        ("There'll be", FUNCTION),
        ("Don't", FUNCTION),
        ("Don’t", FUNCTION),
        ("CAN'T", FUNCTION),
        ("Won't", FUNCTION),
        ("Let's", FUNCTION),
        ("What's", FUNCTION),
        ("Which fox?", FUNCTION),
        ("Yes, I think so.", FUNCTION),
        ("No.", FUNCTION),
        ("'In the", FUNCTION),
        ("when", FUNCTION),
        ("If,", FUNCTION),
        ("Foxes are", CONTENT),
        ("Today's fox", CONTENT),
        ("Don Quixote", CONTENT),
        ("Thesis", CONTENT),
        ("In-depth", CONTENT),
        ("A-level", CONTENT),
        ("so_called(x)", CONTENT),
        ("A4 paper", CONTENT),
        ("A.I. is", CONTENT),
        ("A) Paris", CONTENT),
        ("é", CONTENT),
        ("e\u0301t\u00e9", CONTENT),
        ("Лиса", CONTENT),
        ("狐狸", CONTENT),
        ("ليس", CONTENT),
        ("", None),
        (" \n", None),
        ("***", None),
        ("?!", None),
        ("1. The fox", None),
        ("- 2 foxes", None),
        ("3D", None),
        ("² The", None),
        ("½ the", None),
        ("💥 The fox", None),
        ("1️⃣ The fox", None),
        ("```\nthe\n```", None),
        ("`the`", None),
        ("<p>The fox", None),
        ("$5", None),
        ("= the", None),
    ],
)
def test_how_a_response_begins(response: str, expected: int | None) -> None:
    assert classify(PROMPT, response) == expected


def test_a_word_is_in_one_list() -> None:
    assert not DETERMINERS & FUNCTION_WORDS
    assert all(first_word(word) == word for word in DETERMINERS | FUNCTION_WORDS)


@given(st.text())
def test_any_text_has_an_opening(text: str) -> None:
    assert classify(PROMPT, text) in (None, 0, 1, 2)
    assert (first_word(text) == "") == (classify(PROMPT, text) is None)


# --- The default oracle -----------------------------------------------------------------------------------------------


def test_openings_is_a_cycle_as_its_names_are_listed() -> None:
    texts = ["The fox.", "It is a fox.", "Foxes.", "🦊"]
    (matrix,) = oracles.judge(oracles.load("openings"), [group(*texts)], "openings")
    expected = [[0.5, 0.8, 0.2, 0.8], [0.2, 0.5, 0.8, 0.8], [0.8, 0.2, 0.5, 0.8], [0.2, 0.2, 0.2, 0.5]]
    np.testing.assert_allclose(matrix, expected, rtol=1e-15)
    assert oracles.cyclic_triples([matrix]) == (1, 4)
    (panel,) = oracles.judge(oracles.load("openings+3*population"), [group(*texts)], "panel")
    np.testing.assert_allclose(panel, (matrix + 3 * oracles.Population()(PROMPT, texts)) / 4, rtol=1e-12)


def test_shares_of_classes_in_an_evaluation() -> None:
    samples = {"π_1": [group("The", "It"), group("🦊", "an")], "π_2": [group("Fox", "Foxes"), group("Red", "the")]}
    assert oracles.class_shares(OPENINGS, samples) == {
        "classes": ["determiner", "function word", "content word", "none of them"],
        "shares": [[0.5, 0.25, 0, 0.25], [0.25, 0, 0.75, 0]],
        "best_response": pytest.approx([0.65, 0.65]),
    }
    assert oracles.class_shares(oracles.Population(), samples) is None


# --- Any classes ------------------------------------------------------------------------------------------------------

PROBABILITY = st.floats(0, 1)


@given(
    count=st.integers(2, 7),
    wins=PROBABILITY.filter(lambda wins: 0 < wins < 1),
    none_loses=PROBABILITY,
    cyclic=st.booleans(),
    responses=st.lists(st.integers(0, 9), max_size=6),
)
def test_matrices_are_preferences(
    count: int, wins: float, none_loses: float, cyclic: bool, responses: list[int]
) -> None:
    make = cyclic_preference if cyclic and count > 2 else transitive_preference
    preference = make([f"c{i}" for i in range(count)], lambda prompt, i: i if i < count else None, wins, none_loses)
    full = preference.full_matrix
    assert full.shape == (count + 1, count + 1)
    np.testing.assert_array_equal(full + full.T, 1)
    assert (full >= 0).all()
    np.testing.assert_array_equal(np.diag(full), 0.5)
    np.testing.assert_array_equal(full[:-1, -1], none_loses)
    np.testing.assert_array_equal(full[:-1, :-1], preference.matrix)
    np.testing.assert_allclose(np.diag(full, 1)[:-1], wins, atol=1e-12)
    classes = np.minimum(responses, count).astype(int)
    np.testing.assert_array_equal(preference(PROMPT, responses), full[classes][:, classes])


@pytest.mark.parametrize(("count", "circles"), [(3, 1), (4, 0), (5, 5), (7, 14)])
def test_a_circle_of_classes_is_a_circle(count: int, circles: int) -> None:
    """Every class beats and loses to as many, so that the Nash policy is uniform. Odd circles have cyclic triples."""
    preference = cyclic_preference([f"c{i}" for i in range(count)], by_digit, wins=0.9)
    np.testing.assert_allclose(preference.matrix.mean(axis=1), 0.5)
    assert oracles.cyclic_triples([preference.matrix])[0] == circles


def test_the_control_has_no_circle() -> None:
    preference = transitive_preference(["gold", "silver", "bronze"], by_digit, wins=0.75)
    np.testing.assert_allclose(preference.matrix[0], [0.5, 0.75, 0.9])  # odds of 3 and of 9
    assert oracles.cyclic_triples([preference(PROMPT, ["0", "1", "2", "x", "2"])]) == (0, 10)


def test_fields_cannot_change() -> None:
    matrix = np.array([[0.5, 0.7], [0.3, 0.5]])
    preference = ClassPreference(["a", "b"], by_digit, matrix)
    matrix[0, 1] = 0.9
    assert preference.names == ("a", "b")
    assert preference.matrix[0, 1] == 0.7
    with pytest.raises(ValueError, match="read-only"):
        preference.matrix[0, 1] = 0.9
    with pytest.raises(FrozenInstanceError):
        preference.names = ("c", "d")


GOOD = {"names": ("a", "b"), "classify": by_digit, "matrix": [[0.5, 0.7], [0.3, 0.5]]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("names", ("a",)),
        ("names", ("a", "a")),
        ("names", "ab"),
        ("names", ("a", 1)),
        ("names", ("a", "")),
        ("classify", "by_digit"),
        ("matrix", [[0.5, 0.7]]),
        ("matrix", np.full((3, 3), 0.5)),
        ("matrix", [[0.5, 1.2], [-0.2, 0.5]]),
        ("matrix", [[0.5, float("nan")], [0.3, 0.5]]),
        ("matrix", [[0.5, 0.7], [0.7, 0.5]]),
        ("matrix", [[0.6, 0.7], [0.3, 0.4]]),
        ("matrix", [[0.5, 0.7], [0.3]]),
        ("matrix", [[0.5, "x"], [0.3, 0.5]]),
        ("matrix", None),
        ("none_loses", 1.5),
        ("none_loses", float("nan")),
        ("none_loses", "x"),
        ("none_loses", None),
        ("none_loses", [0.8, 0.8]),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        ClassPreference(**GOOD | {field: value})


@pytest.mark.parametrize(
    ("make", "names", "wins", "field"),
    [
        (cyclic_preference, ["a", "b"], 0.8, "names"),
        (cyclic_preference, ["a", "b", "b"], 0.8, "names"),
        (cyclic_preference, ["a", "b", "c"], 1.1, "wins"),
        (transitive_preference, ["a"], 0.8, "names"),
        (transitive_preference, ["a", "b"], 1, "wins"),
        (transitive_preference, ["a", "b"], 0, "wins"),
        (transitive_preference, ["a", "b"], "x", "wins"),
    ],
)
def test_a_wrong_argument_is_named(make: Callable, names: list[str], wins: object, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        make(names, by_digit, wins)


@pytest.mark.parametrize("index", [3, -1, 1.0, "rock", True, np.float64(1), [0]])
def test_a_class_that_there_is_not(index: object) -> None:
    preference = cyclic_preference(["rock", "paper", "scissors"], lambda prompt, response: index)
    with pytest.raises(UserError, match=r"--oracle my:rps, prompt 0 .*rock, paper, scissors: classify .* 'Dynamite'"):
        oracles.judge(preference, [group("Dynamite")], "my:rps")
    with pytest.raises(UserError, match="'Dynamite'"):
        oracles.class_shares(preference, {"π_1": [group("Dynamite")]})


def test_indices_of_numpy_are_indices() -> None:
    preference = cyclic_preference(["rock", "paper", "scissors"], lambda prompt, response: np.int64(len(response)))
    assert preference.indices(PROMPT, ["", "a", "bc"]).tolist() == [0, 1, 2]


def test_a_function_that_fails_is_reported_and_may_change_its_prompt() -> None:
    def harmful(prompt: list, response: str) -> int:
        prompt.clear()
        return {"a": 0}[response]

    preference = cyclic_preference(["rock", "paper", "scissors"], harmful)
    groups = [group("a", "a")]
    assert oracles.class_shares(preference, {"π_1": groups})["shares"] == [[1, 0, 0, 0]]
    assert groups[0].prompt == PROMPT
    with pytest.raises(UserError, match="KeyError"):
        oracles.class_shares(preference, {"π_1": [group("b")]})
