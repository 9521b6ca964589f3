"""What a judge's answer is read as: reasoning, formats of verdicts, log-probs where the verdict was said."""

from __future__ import annotations

import json
import math
import time

import pytest

from onpo_fast.oracles.verdicts import preference_of, read_answer, top_logprobs, verdict

REASONING = "I compare. Response B is longer, so [[B]]. **Verdict: B**\n"  # a verdict that is none


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        ("<think>", "</think>"),
        ("", "</think>"),  # the template has opened it
        ("<THINK>", "</Think>"),
        ('<think duration="3">', "</think>"),
        ("<thinking>", "</thinking>"),
        ("<thought>", "</thought>"),
        ("<Thoughts>", "</Thoughts>"),
        ("<reasoning>", "</reasoning>"),
        ("<reason>", "</reason>"),
        ("<reflection>", "</reflection>"),
        ("<analysis>", "</analysis>"),
        ("<scratchpad>", "</scratchpad>"),
        ("<inner_monologue>", "</inner_monologue>"),
        ("<longcat_think>", "</longcat_think>"),
        ("<seed:think>", "</seed:think>"),
        ("", "</seed:think>"),
        ("[THINK]", "[/THINK]"),
        ("◁think▷", "◁/think▷"),
        ("", "◁/think▷"),
        ("<|begin_of_thought|>", "<|end_of_thought|>\n<|begin_of_solution|>"),
        ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
        ("<|think|>", "<|/think|>"),
        ("<|inner_prefix|>", "<|inner_suffix|>"),
        ("<unused94>thought\n", "<unused95>"),
        ("<|channel>thought\n", "<channel|>"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>"),
        ("", "<|channel|>final<|message|>"),
        ("analysisThe user asks. ", "assistantfinal"),
        ("Here is my thought process: ", "Here is my response: "),
        ('<details type="reasoning">', "</details>"),
        ("<think>I <reflection>doubt</reflection> that. ", "</think>"),
        ("<think>The response holds a <think> tag. ", "</think>"),
        ("<think>x</think>A? <think>", "</think>"),
    ],
)
def test_reasoning_is_not_read(begin: str, end: str) -> None:
    reasoned = begin + REASONING + end
    for said in ("A", "\n\nA", "**A**", "[[A]]", "Response A", '{"winner": "A"}', "A<|return|>", "A</s>"):
        reading = read_answer(reasoned + said)
        assert (reading.verdict, reading.unclosed_reasoning) == ("A", False), said
        assert reading.letter_index == len(reasoned) + said.index("A")
    assert verdict(reasoned) is None
    assert verdict(reasoned + "\n\n") is None
    if begin:
        reading = read_answer(begin + REASONING)
        assert (reading.verdict, reading.unclosed_reasoning) == (None, True)


@pytest.mark.parametrize(
    "said",
    [
        "<think>A</think><think>B",
        "<think>The <reflection>B</reflection> A",
        "<|channel|>analysis<|message|>A<|end|>",
        "<|channel|>commentary to=functions.f <|message|>A<|call|>",
    ],
)
def test_reasoning_alone_has_no_verdict(said: str) -> None:
    assert verdict(said) is None


A, B, TIE = "A", "B", "TIE"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("[[A]]", A),
        ("[A]", A),
        ("I pick [B].", B),
        ("[[Response B]]", B),
        ("[[A>B]]", A),
        ("[[A>>B]]", A),
        ("[[B>A]]", B),
        ("[[B>>A]]", B),
        ("[[A<B]]", B),
        ("[[A=B]]", TIE),
        ("[[C]]", TIE),
        ("[[Tie]]", TIE),
        ("Assistant A is slightly better: [[A>B]]", A),
        ("Assistant B is not worse: [[A≫B]]", A),
        ("A > B", A),
        (r"\boxed{A}", A),
        (r"$$\boxed{\text{B}}$$", B),
        (r"So $\boxed{\text{Response }A}$, as B is long.", A),
        (r"\boxed{\textbf{B}}", B),
        ('{"verdict": "A"}', A),
        ('{"winner": "Response B"}', B),
        ('{"choice": "a"}', A),
        ('{"preference": "model_b"}', B),
        ('{"answer": "tie"}', TIE),
        ('{"better_response": "A", "worse_response": "B"}', A),
        ('{"verdict": {"reason": "long", "winner": "B"}}', B),
        ('```json\n{"reasoning": "B is {better} in style", "verdict": "A"}\n```', A),
        ('{"reason": "B says {\\"verdict\\": \\"B\\"}", "verdict": "A"}', A),
        ('{"verdict": "A", "reason": "the winner is B in length only"}', A),
        ('Response A and B.\n\n{"better":\n  "B"}\nDone.', B),
        ("{'winner': 'B'}", B),
        ('{"reason": "Response A is', None),
        ('{"A": 3, "B": 5}', None),
        ('{"verdict": "A", "winner": "B"}', None),
        ("<answer>A</answer>", A),
        ("<verdict>\nResponse B\n</verdict>", B),
        ("<answer></answer>", None),
        ("Response A is short. Response B is long.\n\n**B**", B),
        ("Response A is short. Response B is long.\n**Verdict: A**", A),
        ("Response A is short. Response B is long.\nFinal verdict: B", B),
        ("Response A is short. Response B is long.\nAnswer: B", B),
        ("Response A is short. Response B is long.\n\n## Verdict\n\n**Response B**", B),
        ("Response A is short. Response B is long.\n\nOverall, Response B is better.", B),
        ("**Verdict:** A\n\nResponse B is long.", A),
        ("Verdict: A > B", A),
        ("Winner: tie", TIE),
        ("Tie.\n\nResponse A and B say the same.", TIE),
        ("A. Response B is too long.", A),
        ("**Response B**\n\nResponse A is too short.", B),
        ("A is better than B.", A),
        ("Response B is better, as it does not ramble.", B),
    ],
)
def test_formats(said: str, expected: str | None) -> None:
    reading = read_answer(said)
    assert reading.verdict == expected
    if expected in ("A", "B") and "<B" not in said:  # there the letter is certain, and says nothing
        assert said[reading.letter_index].upper() == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("[[A]], I thought at first. But now [[B]]", B),
        ("Verdict: A\n\nOn a second look:\nVerdict: B", B),
        ("A.\n\nNo. Final verdict: B", B),
        ("[[A]]\nResponse B is better organised, but wrong.", A),
        ("[[A]] or [[B]]", None),
        ("[[A]] is better than [[B]]", None),
        ("[[A or B]]", None),
        ("Verdict: A or B", None),
        ("Which is the better response: A or B?", None),
        ("A, B or tie?", None),
        ("A\nB", None),
        ("A.\nIt is short.\nTherefore Response B is better.", None),
        ("Response [A] is better than Response [B]", None),
        ("A: concise.\nB: verbose.", None),
        ("A: 7/10, B: 9/10", None),
    ],
)
def test_several_verdicts(said: str, expected: str | None) -> None:
    """The last explicit one counts; what contradicts itself is none."""
    assert verdict(said) == expected


@pytest.mark.parametrize(
    "said",
    [
        "Response B is worse.",
        "B is worse than A.",
        "A is not better.",
        "Response A isn't the better one.",
        "I do not prefer Response A.",
        "Response B could be better.",
        "The correct answer is B, which Response A gives.",
        "Verdict: not A",
        "Verdict: A good answer",
        "Neither A nor B",
    ],
)
def test_what_speaks_against_a_response_is_no_verdict_for_it(said: str) -> None:
    assert verdict(said) is None


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (r"Response A is better: it ends with \boxed{B}.", None),
        (
            "Response A's final answer is B, which is correct. Response B's final answer is C.\n\nTherefore A wins.",
            A,
        ),
        ("Response A is better because its output is <answer>B</answer>, as the user wanted.", None),
        ('Response A is better. Its code prints {"result": "B"} as asked.', None),
        ("Response A is better. \\boxed{B}", None),
        ("Response B is better in style.\nResponse A is right.\n\n\\boxed{A}", A),
        ("Response B is better in style. However, Response A is right. <answer>A</answer>", A),
        ("The answer is B, which Response A gives.", None),
        (r"Response A ends with \boxed{B}.", None),
        (r"The final answer is \boxed{B}. Response A says so, so A is better", None),
        ("Response A's answer: \\boxed{B}\nResponse B's answer: \\boxed{C}\nCorrect: \\boxed{B}", None),
        ("Response B ends with <answer>A</answer> and that is wrong.", None),
        ("The answer is B. Response A got it.", None),
        ("The best option is B. Response A says B and Response B says C.", None),
        ("The best option is B. Response A says B and Response B says C.\nTherefore, A", A),
        ("The answer is B. Response B got it.", B),
        ("Response A is better, because the user asked for a letter: the answer is B.", A),
    ],
)
def test_an_answer_quoted_from_a_response_is_no_verdict(said: str, expected: str | None) -> None:
    assert verdict(said) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Better response: A\nLess preferred response: B", A),
        ("Best response: A\nSecond-best response: B", A),
        ("Least preferred response: B", None),
        ("Less preferred response: B", None),
        ("Non-preferred response: B", None),
        ("Not-preferred response: B", None),
        ("Dispreferred response: B", None),
        ("Not the better response: B", None),
        ("Rejected: B", None),
        ("Runner-up: B", None),
        ("Weaker response: B", None),
        *(
            (json.dumps({name: "B"}), None)
            for name in (
                "least_preferred",
                "dispreferred",
                "unpreferred",
                "incorrect_response",
                "weaker_response",
                "inferior_response",
                "bad_response",
                "hallucinated_response",
                "worse_answer",
                "rejected",
                "non_winner",
            )
        ),
        ('{"winner": "A", "runner_up": "B", "second_choice": "B"}', A),
        ("<worse_response>B</worse_response>", None),
        ("<rejected>B</rejected>", None),
        ("<better_response>A</better_response><worse_response>B</worse_response>", A),
        ("<b>B</b>", B),
    ],
)
def test_the_name_of_the_loser(said: str, expected: str | None) -> None:
    assert verdict(said) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("**Verdict**: B has errors. A is correct.", None),
        ("Verdict: B is inferior to A", None),
        ("Verdict: B is worse.", None),
        ("Judgment: B contains hallucinations", None),
        ("Decision: B is disqualified.", None),
        ("Verdict: B is disqualified.", None),
        ("Response B: has errors.", None),
        ("Response B, despite its length, is wrong.", None),
        ("Verdict: A, because B is wrong.", A),
        ("Verdict: A (B is wrong)", None),
        ("Verdict: A — it is concise.", A),
        ("Answer: A, not B.", A),
        ("Verdict: Response A is better.", A),
        ("Final decision: B is the clear winner.", B),
        ("[[B]]\n\nCorrection: Response A is better.", None),
        ("B\n\nWait, I misread. The answer is A.", A),
        ("The winner is A. Had it been about style, my choice would be B.", A),
        ("The winner is A. Had it been about style, I would prefer B.", A),
        ("The winner is A. In style, however, my choice would be B.", A),
        ("B\n\nSorry, I meant A.", None),
        ("[[B]]\n\nI made a mistake; the right one is A.", None),
        ("B. No wait, A.", None),
        ("A\n\nNo errors in it.", A),
        ("Do you want me to choose A?", None),
        ("Response A claims that Response B is better.", None),
        ("I doubt that B is better.", None),
        ("Some would prefer B.", None),
        ("Would A be better?", None),
    ],
)
def test_what_follows_a_verdict_is_read(said: str, expected: str | None) -> None:
    assert verdict(said) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Response B is better in style. However it is wrong. [RESULT] A", A),
        ("Feedback: B rambles. [RESULT] B", B),
        ("Feedback: A rambles, B does not. [RESULT]: A", A),
        ("**Response B is better than Response A.**", B),
        ("I prefer Response B to Response A.", B),
        ("I'd choose A over B.", A),
        ("Overall, Response A is better than Response B because it answers, and Response B does not.", A),
        ("B wins over A", B),
        ("Response A is preferred to Response B.", A),
        ("A is not better than B", None),
        ("A is better than B in style.", None),
        ("A is better than B in style, but B is right.", None),
        ("If brevity counts, A is better than B.", None),
        ("reason: it is short\nwinner: response_a", A),
        ("Output (b)", B),
        (r"\boxed{A \succ B}", A),
        (r"\boxed{A \prec B}", B),
        (r"[[A \gg B]]", A),
        (r"[[A \ll B]]", B),
        (r"[[A \sim B]]", TIE),
        ('{"accuracy": {"winner": "A"}, "style": {"winner": "B"}, "overall_winner": "A"}', A),
        ('{"accuracy_winner": "B", "overall_winner": "A"}', A),
        ('{"criteria": [{"name": "style", "winner": "B"}], "winner": "A"}', A),
        ('{"response_a": "Option A is best", "response_b": "B wins", "winner": "A"}', A),
        ('{"answer_a": "B", "answer_b": "B", "verdict": "A"}', A),
        ('{"winner": "A"}\n{"winner": "B"}', None),
        ("1. A\n2. B", None),
        ("Ranking:\n1. Response A\n2. Response B", None),
        ("Definitely A.", A),
        ("I think it's B.", B),
        ("8 7", None),
        ("1", None),
    ],
)
def test_more_formats(said: str, expected: str | None) -> None:
    assert verdict(said) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Response B opens with `<think>` and never closes it.\n\n**Verdict: A**", A),
        ("Response B opens with '<think>'.\n\n**Verdict: A**", A),
        ("Verdict: A. Response B leaks its </think> marker", A),
        ("<verdict>A</verdict>\n<reasoning>B is wrong</reasoning>", A),
        ("<verdict>A</verdict>\n<reasoning>B is wrong</reasoning>\n[[B]]", B),
        ("It may be <verdict>A</verdict>\n<reasoning>B is wrong</reasoning>", None),
        ("<|think|>B is long<|end|><|begin|>assistant<|content|>A", A),
        ("<|think|>B is long<|end|><|begin|>assistant<|content|>Response A is better.", A),
        ("A<turn|>", A),
        ("<|turn>model\nA<turn|>", A),
    ],
)
def test_reasoning_that_is_spoken_of_or_follows(said: str, expected: str | None) -> None:
    reading = read_answer(said)
    assert (reading.verdict, reading.unclosed_reasoning) == (expected, False)
    if expected:
        assert said[reading.letter_index] == expected


PIECES = [
    "The answer is B. ",
    "[[A]] ",
    ". ",
    "{'winner': 'B'}",
    '{"winner": "B"}',
    "[RESULT] ",
    "A is better than ",
    "A, ",
    "x, the better response is ",
    "`<think>",
    "final ",
    "the, ",
    "[",
    "<",
    "[[",
    "[[A",
    "<think>",
    "</think>",
    r"\boxed{",
    "{",
    '{"a":',
    "A ",
    "A\n",
    " ",
    "verdict: ",
    "A>",
    "Response A ",
    "<answer>",
    "<answer>A</answer>",
    "<|channel|>",
    "the ",
    "not B. ",
]


def test_an_answer_that_was_cut_off() -> None:
    """It has named only one response so far."""
    for said in ("Response B opens with a", "Response B is", '{"reason": "Response B'):
        assert read_answer(said, ended=False).verdict is None
    for said in ("Response B is better because it", "B. It is", "The answer is B because"):
        assert read_answer(said, ended=False).verdict == "B"


def test_a_long_answer_is_read_at_its_ends() -> None:
    """4 MiB of anything in far less than the seconds that matching it would take, let alone the square of it."""
    for piece in PIECES:
        start = time.process_time()
        verdict(piece * (2**22 // len(piece)))
        assert time.process_time() - start < 2, piece
    long = "B is longer. " * 300_000
    assert verdict(f"<think>{long}") is None
    reading = read_answer(f"<think>{long}</think>\n[[A]]")
    assert (reading.verdict, reading.letter_index) == ("A", len(long) + 18)


def preference(said: str, *tokens: tuple[str, dict[str, float]]) -> float | None:
    """Of an answer with these tokens and the probabilities of the likely tokens there."""
    content = [
        {"token": token, "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in likely.items()]}
        for token, likely in tokens
    ]
    return preference_of(said, read_answer(said), top_logprobs({"logprobs": {"content": content}}))


NO, FIRST, SECOND = {}, {"A": 0.6, "B": 0.2}, {"A": 0.1, "B": 0.9}


@pytest.mark.parametrize(
    ("said", "tokens", "expected"),
    [
        ("A", [("A", FIRST)], 0.75),
        ("<think>B</think>A", [("<think>", NO), ("B", SECOND), ("</think>", NO), ("A", FIRST)], 0.75),
        ("A A\n</think>A", [("A", SECOND), (" A\n", SECOND), ("</think>", NO), ("A", FIRST)], 0.75),
        # the server has taken the reasoning out of the text, and a special token
        ("A", [("A", SECOND), ("</think>", NO), ("\n\n", NO), ("A", FIRST), ("<|im_end|>", NO)], 0.75),
        ("Response A", [(" Response", NO), (" A", {" A": 0.6, " B": 0.2}), ("\n", NO), ("</s>", NO)], 0.75),
        ("A because", [("▁A", {"▁A": 0.6, "▁B": 0.2}), ("▁because", NO)], 0.75),
        ("[[A]]", [("[[A", {"[[A": 0.6, "[[B": 0.2}), ("]]", NO)], 0.75),
        ("[[B>A]]", [("[[", NO), ("B", SECOND), (">", NO), ("A", {"A": 1.0}), ("]]", NO)], 0.1),
        ('{"winner": "model_b"}', [('{"winner": "model', NO), ("_b", {"_a": 0.1, "_b": 0.9}), ('"}', NO)], 0.1),
        ("“A”\n", [("“", NO), ("A", FIRST), ("”", NO)], 0.75),
        # what cannot be aligned leaves the letter
        ("A, then", [("A", FIRST), ("B", SECOND)], 1.0),
        ("<think>A</think>\nB", [("A", FIRST), ("</think>", NO)], 0.0),
        ("Response A", [("Response A", FIRST)], 1.0),
        ("A", [("A", {"B": 0.9})], 1.0),
        ("A", [], 1.0),
        ("[[A<B]]", [("[[A", FIRST), ("<", NO), ("B", {"B": 1.0}), ("]]", NO)], 0.0),
        ("B > A", [("B", SECOND), (" >", NO), (" A", {" A": 1.0})], 0.1),
        ("Tie", [("Tie", FIRST)], 0.5),
        ("<think>A", [("<think>", NO), ("A", FIRST)], None),
    ],
)
def test_log_probs_are_those_of_the_verdict(said: str, tokens: list, expected: float | None) -> None:
    found = preference(said, *tokens)
    assert found == (None if expected is None else pytest.approx(expected))


def test_tokens_that_are_parts_of_characters() -> None:
    """The text of such a token is no character; its bytes are."""
    said = "👍 A"
    likely = [{"token": "A", "logprob": math.log(0.6)}, {"token": "B", "logprob": math.log(0.2)}]
    content = [
        {"token": "bytes:\\xf0\\x9f", "bytes": [0xF0, 0x9F], "top_logprobs": []},
        {"token": "bytes:\\x91\\x8d", "bytes": [0x91, 0x8D], "top_logprobs": []},
        {"token": " A", "bytes": [32, 65], "top_logprobs": likely},
    ]
    top = top_logprobs({"logprobs": {"content": content}})
    assert preference_of(said, read_answer(said), top) == pytest.approx(0.75)
