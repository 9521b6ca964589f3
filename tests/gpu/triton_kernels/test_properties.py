"""Any shape, pair list and option: the Triton backend against float64, in both modes and every variant."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.loss_cases import Case, relative_error

from onpo_fast.kernels.variants import EPILOGUES, Variant, using
from onpo_fast.objectives import Dpo, Ipo, Onpo

lengths = st.lists(st.integers(0, 12), min_size=2, max_size=8).filter(lambda sizes: sum(sizes) > 0)
sizes = st.integers(1, 100)
finite = st.floats(0.3, 3.0)
EXAMPLES = 25 if torch.cuda.is_available() else 120  # on a GPU most of the time is compilation: each has its own sizes


@st.composite
def cases(draw) -> Case:
    responses = draw(lengths)
    index = st.integers(0, len(responses) - 1)
    pair = st.tuples(index, index).filter(lambda ends: ends[0] != ends[1])
    return Case(
        responses,
        draw(st.lists(pair, min_size=1, max_size=10)),
        vocabulary=draw(sizes),
        features=draw(sizes),
        bias=draw(st.booleans()),
        soft=draw(st.booleans()),
        weighted=draw(st.booleans()),
        logit_scale=draw(finite | st.just(-1.0)),
        softcap=draw(st.none() | finite),
        temperature=draw(finite),
        shared_head=draw(st.booleans()),
        spread=draw(st.floats(0.01, 1.0)),
        objective=draw(st.sampled_from([Onpo(eta=2.0), Ipo(tau=0.3), Dpo(beta=0.2)])),
    )


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases(), workspace=st.none() | st.integers(1, 2**18), epilogue=st.sampled_from(EPILOGUES))
def test_any_problem(case: Case, workspace: int | None, epilogue: str, device: str) -> None:
    want = case.exact(torch.float32)
    for mode in ("auto", "lean"):
        with using(Variant(epilogue)):
            got = case.run(torch.float32, device, backend="triton", mode=mode, workspace_bytes=workspace)
        for name, value in want.items():
            # absolute where a value is a difference of larger ones: margins of the log-probs', gradients near a minimum
            floor = 1e-5 * (1 + want["logps"].abs().max()) * (1 + value.numel() ** 0.5)
            error = (got[name].double() - value.double()).norm()
            assert error <= 3e-5 * value.double().norm() + floor, (name, relative_error(got[name], value))
