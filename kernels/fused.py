"""The loss from Triton kernels and cuBLAS: which work happens when, and in which memory.

The floor, in matrix products of 2·N·H·V FLOP, is four: the logits of policy and anchor, dX and dW. On one H100 at 728
TFLOP/s with N = 8192, H = 4096, V = 151936 each takes 14 ms. Memory traffic is small beside that: reading the head once
a pass is 1.2 GB, 0.4 ms; writing E and reading it twice in bf16 is 7.5 GB, 2.5 ms; the exponentials take 0.7 ms of the
special-function units. So the number of products decides, and each mode is a choice of which to repeat:

- **fast**, four products. Chunks hold whole preference groups. A chunk's logits become E = exp(logit − target's logit)
  as they leave the tensor cores. Their sums give log-probs, margins and each response's coefficient c, and E then
  enters the two products of the backward pass. With s = Σ E and −(s − E[target]) in place of E[target],

      dX = −(c/s)·(E W)          dW += Eᵀ (−(c/s)·X)

  dX, and dW if there is one chunk, are plain cuBLAS products; several chunks add to dW with ``weight_gradient.py``.
  Workspace: E, 2·V bytes a row in bf16. A quarter of the free memory is allowed for it, so that a GPU with room usually
  needs one chunk.
- **lean**, five products. First the log-probs, from a forward pass alone; then, for one slice of the vocabulary after
  another, the logits again, turned into softmax minus one-hot, and the two products. Each slice of dW is written once;
  only dX is summed over slices, in fp32. Workspace: a slice, X scaled and dX in fp32: about 10·H bytes a token in
  bf16, and no less than 6·H.

Scoring is the forward pass alone. Per-token gradients (``token_gradients``) are the second half of lean mode.

There is no host synchronisation, and every sum has a fixed order. Planning is in ``plan.py``, the order of the rows in
``order.py``.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from .bias_gradient import add_bias_gradient
from .exponentials import HeadPass
from .groups import PairLayout, ResponseGroup
from .head import BITS, Head
from .launch import aligned, empty_rows
from .on_device import capturing
from .order import grouped_order, response_edges
from .plan import PairPlan, choose_plan, slice_width
from .problem import Gradients, LeafDtypes, NeedsGradient, PairProblem, PairResult, TokenProblem
from .rescale import rescale
from .row_sums import RowSums, merge, segment_sums, shifts
from .target_logits import target_logits
from .weight_gradient import add_weight_gradient, carry_for

logger = logging.getLogger("onpo_fast")

ROWS_PER_SCORING_PASS = 8192  # bounds the memory for the partial sums of the log-sum-exp
FP16_SCALE = 2.0**14  # factor of probabilities in fp16, whose range then holds 1 and the smallest that matter


# ---------------------------------------------------------------------------------------------------------------------
# Scoring, and gradients with the logits computed again
# ---------------------------------------------------------------------------------------------------------------------


def token_logps(problem: TokenProblem) -> Tensor:
    """Compute the log-prob of every target: (N,) float64. The forward pass alone, in O(N) memory."""
    hidden, head = aligned(problem.hidden), _aligned_head(problem.head)
    logps = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
    for start in range(0, len(hidden), ROWS_PER_SCORING_PASS):
        rows = slice(start, start + ROWS_PER_SCORING_PASS)
        logps[rows] = _softmax(hidden[rows], head, problem.targets[rows])[1].logps
    return logps


def response_logps(problem: TokenProblem, layout: PairLayout) -> Tensor:
    """Compute the log-probs summed over each response: (S,) float64."""
    return segment_sums(token_logps(problem), response_edges(layout, problem.hidden.device))


def token_gradients(problem: TokenProblem, logps: Tensor, upstream: Tensor) -> Gradients:
    """Compute the gradients of Σ upstream·logps, with ``upstream`` (N,), from three products, the logits among them."""
    gradients = _GradientBuffers(problem.hidden, problem.head, problem.needs_gradient, problem.leaf_dtypes)
    if len(problem.hidden):
        hidden, head = aligned(problem.hidden), _aligned_head(problem.head)
        _recompute(gradients, hidden, head, problem.targets, logps, upstream, problem.workspace)
    else:
        gradients.zero()
    return gradients.finished()


def _softmax(hidden: Tensor, head: Head, targets: Tensor, store: Tensor | None = None) -> tuple[Tensor, RowSums]:
    """Return the targets' logits, (n,) float64 bits, and the sums of the rows' softmax.

    ``store``, (m ≤ n, V), is filled with E of the first m rows, with 0 in the target's column.
    """
    target_logit = target_logits(hidden, head, targets)
    first_shift = target_logit.float()
    head_pass = HeadPass(hidden, head, targets, sums=True, store=store)
    shift = shifts(head_pass.exponentials(first_shift), first_shift)
    head_pass.recompute_shifted_rows(shift, first_shift)
    return target_logit, merge(head_pass.partial.sums, target_logit, shift)


def _recompute(
    gradients: _GradientBuffers,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    logps: Tensor,
    upstream: Tensor,
    workspace: int | None,
) -> None:
    """Fill the gradients, one vocabulary slice after another. Each slice of the weight's gradient is written once."""
    rows, features = hidden.shape
    target_logit = target_logits(hidden, head, targets)
    log_sum_exp = target_logit - logps * BITS  # as the shift, it makes E the softmax itself
    shift = log_sum_exp.float()
    # Rounding the shift divides E by this factor, which the row scales undo. It is 1 in a row that is not finite, whose
    # NaN would otherwise reach all rows through the largest scale in fp16.
    rounding = (shift - log_sum_exp).exp2().nan_to_num(nan=1.0, posinf=1.0)
    target_values = (logps.expm1() / rounding).float()  # p − 1, without cancellation
    scale = (upstream * rounding).float() * -(head.logit_scale / head.temperature)
    if hidden.dtype == torch.float16:  # whose range would hold neither small probabilities nor small coefficients
        shift, target_values = shift - math.log2(FP16_SCALE), target_values * FP16_SCALE
        largest = scale.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        scale, gradients.factor = scale / largest, largest / FP16_SCALE
    scaled = _scaled_rows(hidden, scale, hidden.dtype) if gradients.weight is not None else None
    total = None
    if gradients.hidden is not None:
        total = torch.zeros(rows, features, dtype=torch.float32, device=hidden.device)

    width = slice_width(rows, features, len(head.weight), hidden.element_size(), workspace)
    buffer = empty_rows(rows, width, hidden.dtype, hidden.device)
    for start in range(0, len(head.weight), width):
        tokens = slice(start, min(start + width, len(head.weight)))
        part = head._replace(
            weight=head.weight[tokens], bias=None if head.bias is None else head.bias[tokens].contiguous()
        )
        e = buffer[:, : len(part.weight)]
        HeadPass(
            hidden, part, targets, sums=False, store=e, target_values=target_values, first_token=start
        ).exponentials(shift)
        if total is not None:
            _add_product(total, e, part.weight)
        if scaled is not None:
            _product(e.T, scaled, gradients.weight[tokens])
        if gradients.bias is not None:
            add_bias_gradient(gradients.bias[tokens], e, scale)
    if total is not None:
        torch.mul(total, scale[:, None], out=gradients.hidden[:rows])


def _aligned_head(head: Head) -> Head:
    return head._replace(weight=aligned(head.weight), bias=None if head.bias is None else head.bias.contiguous())


def _scaled_rows(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, H), (n,) -> (n, H), multiplied in fp32 and rounded once."""
    out = empty_rows(*rows.shape, dtype, rows.device)
    return torch.mul(rows, scale[:, None], out=out)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, summed in fp32 (but for the reductions in lower precision that PyTorch may allow cuBLAS)."""
    if not a.is_cuda:  # interpreted
        out.copy_(a.float() @ b.float())
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, in fp32."""
    if not a.is_cuda:
        out.addmm_(a.float(), b.float())
    elif a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory; the rows of a matrix start on aligned addresses."""
    return torch.empty(shape, dtype=dtype, device=device) if len(shape) == 1 else empty_rows(*shape, dtype, device)


class _GradientBuffers:
    """Gradients of hidden states, weight and bias, each only if it is needed.

    bf16 for bf16 leaves, rounded once from fp32. fp32 for the others: the leaves are fp32 under autocast, and a loss
    scale may need more range than fp16 has.
    """

    def __init__(self, hidden: Tensor, head: Head, needs_gradient: NeedsGradient, leaf_dtypes: LeafDtypes) -> None:
        shapes = hidden.shape, head.weight.shape, (len(head.weight),)
        dtypes = (leaf_dtypes[0], leaf_dtypes[1], torch.float32)  # the bias is small
        self.hidden, self.weight, self.bias = (
            _empty(shape, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32, hidden.device)
            if needed
            else None
            for shape, dtype, needed in zip(shapes, dtypes, needs_gradient)
        )
        if self.bias is not None:
            self.bias.zero_()
        self.factor: Tensor | None = None  # scalar that ``finished`` multiplies the gradients with

    def zero(self) -> None:
        for gradient in (self.hidden, self.weight):
            if gradient is not None:
                gradient.zero_()

    def finished(self) -> Gradients:
        gradients = self.hidden, self.weight, self.bias
        if self.factor is not None:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(self.factor)
        return tuple(gradient if gradient is None else gradient.contiguous() for gradient in gradients)


# ---------------------------------------------------------------------------------------------------------------------
# The pairwise loss
# ---------------------------------------------------------------------------------------------------------------------


def pair_loss(problem: PairProblem) -> PairResult:
    """Compute the loss and its gradients in the mode that ``choose_plan`` chooses."""
    return _Evaluation(problem).run()


def scale_in_place(gradients: Gradients, factor: Tensor) -> None:
    """Multiply by a scalar, which is compared with 1 on the device: 1 saves a pass over a [V, H] tensor."""
    for gradient in gradients:
        if gradient is not None:
            rescale(gradient, factor)


class _Evaluation:
    """One evaluation of the loss. ``run`` gives the order of the work. Everything is in the order of ``self.order``."""

    def __init__(self, problem: PairProblem) -> None:
        self.problem = problem
        device = problem.hidden.device
        order = self.order = grouped_order(problem.layout, device)
        self.head = _aligned_head(problem.head)
        self.hidden = aligned(order.order_rows(problem.hidden))
        self.targets = order.order_rows(problem.targets)
        self.pair_share = order.order_pairs(problem.pair_weight / problem.pair_weight.sum())
        self.preference = order.order_pairs(problem.preference)
        self.gradients = _GradientBuffers(self.hidden, self.head, problem.needs_gradient, problem.leaf_dtypes)

        responses = len(order.edges) - 1
        self.token_logps = torch.empty(len(self.hidden), dtype=torch.float64, device=device)
        self.logps = torch.zeros(responses, dtype=torch.float64, device=device)
        self.ref_hidden = self.ref_token_logps = None
        if problem.ref_hidden is not None:  # goes through the head in the same products as the policy's
            self.ref_hidden = aligned(order.order_rows(problem.ref_hidden))
            self.ref_token_logps = torch.empty_like(self.token_logps)
            self.ref_logps = torch.zeros_like(self.logps)
        else:
            self.ref_logps = order.order_responses(problem.ref_logps)
        pairs = len(self.preference)
        self.margins, self.losses, self.derivative = torch.zeros(3, pairs, dtype=torch.float64, device=device)

    def run(self) -> PairResult:
        paired = [group for group in self.order.groups if group.pairs]
        rows = sum(group.tokens for group in paired)
        if not any(self.problem.needs_gradient) or rows == 0:
            self.gradients.zero()
            self._score(slice(0, len(self.hidden)))
            self._coefficients(0, len(self.logps), 0, len(self.pair_share))
        else:
            if self.gradients.hidden is not None:
                self.gradients.hidden[rows:].zero_()  # responses without a pair
            self._score(slice(rows, len(self.hidden)))
            plan = self._plan(paired)
            if plan.mode == "fast":
                self._run_fast(plan.chunks)
            else:
                self._run_lean(slice(0, rows), sum(len(group.responses) for group in paired))
        return self._result()

    def _plan(self, paired: list[ResponseGroup]) -> PairPlan:
        """Choose mode and chunks. While a CUDA graph is captured, reuse the plan of an earlier call if there is one."""
        problem, plans = self.problem, self.order.plans
        device, shape, dtype = self.hidden.device, tuple(self.head.weight.shape), self.hidden.dtype
        carried = problem.needs_gradient[1] and problem.leaf_dtypes[1] == torch.bfloat16
        key = (shape, dtype, carried, problem.mode, problem.workspace)
        if capturing(device) and key in plans:
            return plans[key]
        free_memory = _free_memory(device) if problem.workspace is None and problem.mode != "lean" else None
        plan = plans[key] = choose_plan(paired, shape, dtype, carried, problem.mode, problem.workspace, free_memory)
        logger.debug(
            "%s: %s; chunks: %d, workspace: %d bytes", plan.mode, plan.reason, len(plan.chunks), plan.workspace
        )
        return plan

    def _result(self) -> PairResult:
        """Return the results in the caller's order."""
        order = self.order
        edges = order.on_device["edges"]
        logps = segment_sums(self.token_logps, edges)
        ref_logps = self.ref_logps if self.ref_hidden is None else segment_sums(self.ref_token_logps, edges)
        loss = (self.losses * self.pair_share).sum()
        hidden_grad, weight_grad, bias_grad = self.gradients.finished()
        if hidden_grad is not None:
            hidden_grad = order.restore_rows(hidden_grad)
        return PairResult(
            loss=loss,
            logps=order.restore_responses(logps),
            ref_logps=order.restore_responses(ref_logps),
            margins=order.restore_pairs(self.margins),
            gradients=(hidden_grad, weight_grad, bias_grad),
        )

    def _score(self, rows: slice) -> None:
        """Compute the log-probs of these rows, and of the anchor's if they share the head."""
        step = ROWS_PER_SCORING_PASS if self.ref_hidden is None else ROWS_PER_SCORING_PASS // 2
        for start in range(rows.start, rows.stop, step):
            part = slice(start, min(start + step, rows.stop))
            self._store_logps(part, _softmax(*self._stack_with_reference(part))[1])

    def _stack_with_reference(self, rows: slice) -> tuple[Tensor, Head, Tensor]:
        """Return what goes through the head for these rows: (n, H) hidden states, or (2n, H) with the anchor's."""
        hidden, targets = self.hidden[rows], self.targets[rows]
        if self.ref_hidden is None:
            return hidden, self.head, targets
        return aligned(torch.cat((hidden, self.ref_hidden[rows]))), self.head, targets.repeat(2)

    def _store_logps(self, rows: slice, sums: RowSums) -> None:
        count = rows.stop - rows.start
        self.token_logps[rows] = sums.logps[:count]
        if self.ref_hidden is not None:
            self.ref_token_logps[rows] = sums.logps[count:]

    def _coefficients(self, first: int, stop: int, first_pair: int, stop_pair: int) -> Tensor:
        """Compute margins and losses of a range of pairs.

        Returns d loss / d log-prob of the responses ``first`` to ``stop``, which these pairs are among.
        """
        on_device = self.order.on_device
        edges = on_device["edges"][first : stop + 1]
        self.logps[first:stop] = segment_sums(self.token_logps, edges)
        if self.ref_hidden is not None:
            self.ref_logps[first:stop] = segment_sums(self.ref_token_logps, edges)
        pairs = slice(first_pair, stop_pair)
        objective, preference = self.problem.objective, self.preference[pairs]
        ratio = self.logps - self.ref_logps
        margins = ratio[on_device["winner"][pairs]] - ratio[on_device["loser"][pairs]]
        self.margins[pairs] = margins
        self.losses[pairs] = objective.loss(margins, preference)
        self.derivative[pairs] = objective.derivative(margins, preference) * self.pair_share[pairs]
        # a gather and ordered sums, because index_add does not fix the order of its additions
        signed = self.derivative[on_device["entry_pair"]] * on_device["entry_sign"]
        return segment_sums(signed, on_device["entry_edges"][first : stop + 1])

    def _row_coefficients(self, rows: slice, coefficients: Tensor, first: int) -> Tensor:
        """Return each row's coefficient, (n,), from those of the responses from ``first`` on."""
        return coefficients[self.order.response_of_row[rows] - first]

    def _run_fast(self, chunks: list[list[ResponseGroup]]) -> None:
        capacity = max(sum(group.tokens for group in chunk) for chunk in chunks)
        buffer = empty_rows(capacity, len(self.head.weight), self.hidden.dtype, self.hidden.device)
        weight_grad, carry = self.gradients.weight, None
        if len(chunks) > 1 and weight_grad is not None and weight_grad.dtype == torch.bfloat16:
            carry = carry_for(weight_grad)
        response = pair = row = 0
        for number, chunk in enumerate(chunks):
            stop_response = response + sum(len(group.responses) for group in chunk)
            stop_pair = pair + sum(len(group.pairs) for group in chunk)
            rows = slice(row, row + sum(group.tokens for group in chunk))
            e, total = self._exponentials(rows, buffer[: rows.stop - rows.start])
            coefficients = self._coefficients(response, stop_response, pair, stop_pair)
            scale = self._row_coefficients(rows, coefficients, response).float() / total
            scale *= -(self.head.logit_scale / self.head.temperature)
            self._add_products(rows, e, scale, carry, first=number == 0, last=number == len(chunks) - 1)
            response, pair, row = stop_response, stop_pair, rows.stop

    def _add_products(
        self, rows: slice, e: Tensor, scale: Tensor, carry: Tensor | None, first: bool, last: bool
    ) -> None:
        """Add a chunk's share of the gradients, from its E and its rows' scales −c·logit_scale/(temperature·s)."""
        hidden, gradients = self.hidden[rows], self.gradients
        if gradients.hidden is not None:
            product = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
            _product(e, self.head.weight, product)
            torch.mul(product, scale[:, None], out=gradients.hidden[rows])
            del product
        if gradients.weight is not None:
            scaled = _scaled_rows(hidden, scale, hidden.dtype)
            if first and last:
                _product(e.T, scaled, gradients.weight)
            else:
                add_weight_gradient(gradients.weight, e, scaled, carry, first=first, last=last)
        if gradients.bias is not None:
            add_bias_gradient(gradients.bias, e, scale)

    def _exponentials(self, rows: slice, e: Tensor) -> tuple[Tensor, Tensor]:
        """Fill E of a chunk, (n, V), with −(the sum of the others) in the target's column; return E and sums (n,)."""
        hidden, head, targets = self._stack_with_reference(rows)
        target_logit, sums = _softmax(hidden, head, targets, store=e)
        targets, values = targets[: len(e)], -sums.others[: len(e)]
        if head.softcap is not None:
            tanh = target_logit[: len(e)] / head.factors[1]
            values = values * (1 - tanh.square()).float()
        e.scatter_(1, targets[:, None], values.to(e.dtype)[:, None])
        self._store_logps(rows, sums)
        return e, sums.total[: len(e)]

    def _run_lean(self, rows: slice, responses: int) -> None:
        self._score(rows)
        coefficients = self._coefficients(0, responses, 0, len(self.pair_share))
        _recompute(
            self.gradients,
            self.hidden[rows],
            self.head,
            self.targets[rows],
            self.token_logps[rows],
            self._row_coefficients(rows, coefficients, 0),
            self.problem.workspace,
        )


def _free_memory(device: torch.device) -> int | None:
    """Return the bytes that an allocation can have, or None if asking would disturb the device."""
    if device.type != "cuda" or capturing(device):
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
