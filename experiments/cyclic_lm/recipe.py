"""The recipe: prompts, arms, and the options of the trainer that all arms share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ORACLE = "openings"  # the bundled preference between three kinds of first words
CONTROL = "experiments.cyclic_lm.control:ordered"  # the same classes in an order instead of a cycle
LAST_TURN = "experiments.cyclic_lm.turns:last_turn"  # the same classes, of the last of two turns, with the partner
NEXT_PART = "experiments.cyclic_lm.turns:next_part"  # and with an environment that asks what happens next
OPTIONS_OF_ORACLE: dict[str, dict[str, object]] = {  # options that an oracle needs
    LAST_TURN: {"environment": "partner", "turns": 2},
    NEXT_PART: {"environment": "experiments.cyclic_lm.turns:what_next", "turns": 2},
}

HERE = Path(__file__).parent
PROMPTS = {  # "Begin a story about a small violin": 24 nouns with ten adjectives, 12 other nouns with two are held out
    "prompts": str(HERE / "prompts.jsonl"),
    "eval_prompts": str(HERE / "heldout.jsonl"),
}

ITERATIONS = 10
LAST = 5  # policies whose mean gap an arm is judged by
ETA = 3.0  # about the step with which exact ONPO converges fastest in a cycle of probability 0.8 (dynamics.exact_gaps)
TUNING_ETAS = (1.5, 3.0, 6.0)  # and beyond, while the best is at an end
TUNING_SEEDS = (1000,)  # whose results choose η and are not reported
SEEDS = (0, 1, 2, 3, 4)

BEST_RESPONSE_ETA = 10.0  # step of the two fits that train a best response: the target of a sure pair is 5 nats
BEST_RESPONSE_ARM = "omd_two_fits"  # one iteration of it

BEST_OF_NASH_SAMPLES = 64

LORA_LAYERS = 4  # the last ones; fits are cheap, as the backward pass ends there
LORA_MODULES = "self_attn.q_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj".split()
OPTIONS: dict[str, object] = {
    "model": "smollm2",
    "dtype": "float32",  # also on a GPU, so that its runs are of the same recipe
    "sampling_batch_size": 32,
    "tokens_per_microbatch": 1024,
    "max_new_tokens": 8,
    "prompts_per_iteration": 16,
    "responses_per_prompt": 8,
    "batch_pairs": 28,  # all pairs of a prompt: 16 optimizer steps a fit
    "learning_rate": 7e-4,
    "lora_rank": 8,
    "lora_targets": ",".join(f"layers.{i}.{m}" for i in range(30 - LORA_LAYERS, 30) for m in LORA_MODULES),
    "eval_samples": 8,
}


@dataclass(frozen=True)
class Arm:
    """A method of the comparison.

    Attributes:
        label: its name in tables and plots.
        objective: value of --objective.
        steps: names of the options that set its step, and their values for the step η of mirror descent.
        exact: whether its fits are to the target η(P − ½), so that the margin of an exact fit is known.
        options: others that differ from ``OPTIONS``.
        eta: its step where none was tuned. For the main arms it is what tuning chose in the game of ``ORACLE``.
    """

    label: str
    objective: str
    steps: Callable[[float], dict[str, float]] = lambda eta: {"eta": eta}
    exact: bool = True
    options: dict[str, object] = field(default_factory=dict)
    eta: float = ETA


ARMS = {
    "onpo": Arm("ONPO", "onpo"),
    "omd": Arm("OMD", "omd"),
    "omd_two_fits": Arm("OMD, two fits", "omd_two_fits", eta=1.5),
    "inpo": Arm("INPO", "inpo", lambda eta: {"eta": 1 / eta}, eta=1.5),
    "iterative_dpo": Arm("iterative DPO", "iterative_dpo", lambda eta: {"beta": 1 / eta}, exact=False, eta=1.5),
    "online_ipo": Arm("online IPO", "online_ipo", lambda eta: {"tau": 1 / eta}),
    "sppo": Arm("SPPO", "sppo", exact=False),
    "egpo": Arm("EGPO", "egpo", exact=False),
    "nash_md": Arm("Nash-MD", "nash_md"),
    "onpo_branches": Arm("ONPO, branches compared", "onpo", exact=False, options={"multi_turn_target": "branches"}),
    "onpo_best_worst": Arm("ONPO, best_worst pairs", "onpo", exact=False, options={"pairing": "best_worst"}),
}
MAIN_ARMS = ("onpo", "omd", "omd_two_fits", "inpo", "iterative_dpo")
BASELINE = "omd_two_fits"  # the control for ONPO: as many optimizer steps on as much data
