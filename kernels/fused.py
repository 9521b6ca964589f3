"""The loss from Triton kernels and cuBLAS: which work happens when, in which memory.

Floor, in matrix products of 2·N·H·V FLOP: logits of the policy and of the reference, dX and dW. On one H100 at 728
TFLOP/s, N = 8192, H = 4096, V = 151936: 14 ms each. Bytes are few beside that: reading the head once a pass is 1.2 GB,
0.4 ms; writing E and reading it twice, bf16, 7.5 GB, 2.5 ms; the exponentials take 0.7 ms of the special-function
units. So the products decide, and each mode is a choice of which to repeat:

- **fast**, four products. Chunks hold whole preference groups. A chunk's logits become E = exp(logit − target's logit)
  as they leave the tensor cores; their sums give log-probs, margins and each response's coefficient c; and E is still
  there for the two products of the backward pass. With s = Σ E and −(s − E[target]) written over E[target],

      dX = −(c/s)·(E W)          dW += Eᵀ (−(c/s)·X)

  where dX and, if one chunk is all, dW are plain cuBLAS products; over several chunks dW is carried (see
  ``weight_gradient.py``). Workspace: E, 2·V bytes a row in bf16. A quarter of the free memory is allowed for it, so
  that on a GPU with room one chunk is the rule.
- **lean**, five products. Log-probs first, from the forward alone; then the vocabulary slice by slice: logits again,
  made into softmax minus one-hot, and the two products. Each slice of dW is written once; only dX is summed, in fp32.
  Workspace: a slice, X scaled and dX in fp32: about 10·H bytes a token in bf16, and no less than 6·H.

Scoring is the forward alone; per-token gradients (``token_gradients``) are lean's second half.

Nothing waits for the device, and every sum has a fixed order.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .bias_gradient import add_bias_gradient
from .exponentials import Pass
from .groups import Group, Layout, chunks
from .head import BITS, Head
from .launch import aligned, empty_rows
from .on_device import PerStream, capturing, to_device
from .row_sums import RowSums, merge, segment_sums, shifts
from .target_logits import target_logits
from .weight_gradient import add_weight_gradient, carry_for

logger = logging.getLogger("onpo_fast")

FREE_SHARE = 4  # the workspace of fast may be a quarter of the free memory: one chunk spares dW's sums between chunks
DEFAULT_WORKSPACE = 2**30  # bytes, where the free memory is not known
LEAN_WORKSPACE = 2**27  # bytes for a vocabulary slice of lean, or the hidden states' size where that is more
SCORED_ROWS = 8192  # at a time: bounds what the pieces of the log-sum-exp take
FEW_ROWS = 512  # in a chunk: the head would be read, and dW read and written, too often for the work between
FP16_SCALE = 2.0**14  # of probabilities: 1 and the smallest that count are both in fp16's range
COLUMN_TILE = 128  # vocabulary entries of the narrowest tile; a wider one makes fewer pieces


# ---------------------------------------------------------------------------------------------------------------------
# Scoring, and gradients by recomputation
# ---------------------------------------------------------------------------------------------------------------------


def token_logps(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """(N, H), (N,) -> (N,) float64: the forward alone, O(N) memory."""
    hidden, head = aligned(hidden), _aligned_head(head)
    logps = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
    for start in range(0, len(hidden), SCORED_ROWS):
        rows = slice(start, start + SCORED_ROWS)
        logps[rows] = _softmax(hidden[rows], head, targets[rows])[1].logps
    return logps


def _softmax(
    hidden: Tensor, head: Head, targets: Tensor, store: Tensor | None = None
) -> tuple[Tensor, RowSums]:  # fmt: skip
    """The targets' logits, (n,) float64 bits, and what the rows' softmax comes down to.

    ``store``, (m ≤ n, V), is filled with E of the first m rows, 0 in the target's column.
    """
    own = target_logits(hidden, head, targets)
    first_shift = own.float()
    through = Pass(hidden, head, targets, sums=True, store=store)
    shift = shifts(through.exponentials(first_shift), first_shift)
    through.recompute_moved(shift, first_shift)
    return own, merge(through.partial.sums, own, shift)


def response_logps(hidden: Tensor, head: Head, targets: Tensor, layout: Layout, workspace: int | None) -> Tensor:
    """(N, H), (N,) -> (S,) float64: summed over responses."""
    return segment_sums(token_logps(hidden, head, targets), _edges(layout, hidden.device))


@PerStream
def _edges(layout: Layout, device: torch.device) -> Tensor:
    """(S + 1,) int64: the response boundaries."""
    return to_device(torch.tensor(layout.edges, dtype=torch.int64), device)


def token_gradients(
    hidden: Tensor,  # (N, H)
    head: Head,
    targets: Tensor,  # (N,)
    logps: Tensor,  # (N,) float64, from token_logps
    upstream: Tensor,  # (N,)
    wanted: tuple[bool, bool, bool],  # gradients for hidden, weight, bias
    dtypes: tuple[torch.dtype | None, ...],  # of the leaves
    workspace: int | None,  # bytes
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ upstream·logp by hidden, weight and bias: three products, the logits again among them."""
    gradients = _Gradients(hidden, head, wanted, dtypes)
    if len(hidden):
        _recompute(gradients, aligned(hidden), _aligned_head(head), targets, logps, upstream, workspace)
    else:
        gradients.zero()
    return gradients.finished()


def _recompute(
    gradients: _Gradients,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    logps: Tensor,
    upstream: Tensor,
    workspace: int | None,
) -> None:
    """The vocabulary slice by slice. Every slice of the weight's gradient is complete when it is written."""
    rows, features = hidden.shape
    own = target_logits(hidden, head, targets)
    normaliser = own - logps * BITS  # the log-sum-exp: E is then the softmax itself
    shift = normaliser.float()
    # rounding the shift divides E by this factor, which the row scales give back; 1 in a row that is not finite, whose
    # NaN would otherwise reach all rows through the largest scale in fp16
    rounding = (shift - normaliser).exp2().nan_to_num(nan=1.0, posinf=1.0)
    target_values = (logps.expm1() / rounding).float()  # p − 1, without cancellation
    scale = (upstream * rounding).float() * -(head.logit_scale / head.temperature)
    if hidden.dtype == torch.float16:  # which could hold neither small probabilities nor small coefficients on X's rows
        shift, target_values = shift - math.log2(FP16_SCALE), target_values * FP16_SCALE
        largest = scale.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        scale, gradients.factor = scale / largest, largest / FP16_SCALE
    scaled = _scaled_rows(hidden, scale, hidden.dtype) if gradients.weight is not None else None
    total = None
    if gradients.hidden is not None:
        total = torch.zeros(rows, features, dtype=torch.float32, device=hidden.device)

    width = lean_width(rows, features, len(head.weight), hidden.element_size(), workspace)
    buffer = empty_rows(rows, width, hidden.dtype, hidden.device)
    for start in range(0, len(head.weight), width):
        tokens = slice(start, min(start + width, len(head.weight)))
        part = head._replace(
            weight=head.weight[tokens], bias=None if head.bias is None else head.bias[tokens].contiguous()
        )
        e = buffer[:, : len(part.weight)]
        Pass(hidden, part, targets, sums=False, store=e, target_values=target_values, first_token=start).exponentials(
            shift
        )
        if total is not None:
            _add_product(total, e, part.weight)
        if scaled is not None:
            _product(e.T, scaled, gradients.weight[tokens])
        if gradients.bias is not None:
            add_bias_gradient(gradients.bias[tokens], e, scale)
    if total is not None:
        torch.mul(total, scale[:, None], out=gradients.hidden[:rows])


def lean_width(rows: int, features: int, vocabulary: int, itemsize: int, workspace: int | None) -> int:
    """Vocabulary entries a slice. Wide slices pay: each reads and writes the fp32 sum of dX once."""
    if workspace is None:
        room = max(LEAN_WORKSPACE, rows * features * itemsize)
    else:
        room = workspace - rows * features * (4 + itemsize)
    width = room // max(rows * itemsize, 1) // 256 * 256
    return max(min(width, vocabulary), min(256, vocabulary))


def _aligned_head(head: Head) -> Head:
    return head._replace(weight=aligned(head.weight), bias=None if head.bias is None else head.bias.contiguous())


def _scaled_rows(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, H), (n,) -> (n, H), multiplied in fp32 and rounded once."""
    out = empty_rows(*rows.shape, dtype, rows.device)
    return torch.mul(rows, scale[:, None], out=out)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, summed in fp32 (but for what cuBLAS may do between the parts of a long sum, where PyTorch lets it)."""
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
    """Uninitialised; the rows of a matrix start on aligned addresses."""
    return torch.empty(shape, dtype=dtype, device=device) if len(shape) == 1 else empty_rows(*shape, dtype, device)


class _Gradients:
    """Gradients of hidden states, weight and bias, each only if it is wanted.

    bf16 for bf16 leaves, rounded once from fp32; fp32 for the others: autocast's leaves are, and a later loss
    scale may need the range that fp16 has not.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        wanted: tuple[bool, bool, bool],
        dtypes: tuple[torch.dtype | None, ...],
    ) -> None:
        shapes = hidden.shape, head.weight.shape, (len(head.weight),)
        own = (dtypes[0], dtypes[1], torch.float32)  # a bias is small
        self.hidden, self.weight, self.bias = (
            _empty(shape, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32, hidden.device) if want else None
            for shape, dtype, want in zip(shapes, own, wanted)
        )
        if self.bias is not None:
            self.bias.zero_()
        self.factor: Tensor | None = None  # still to be multiplied with

    def zero(self) -> None:
        for gradient in (self.hidden, self.weight):
            if gradient is not None:
                gradient.zero_()

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        gradients = self.hidden, self.weight, self.bias
        if self.factor is not None:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(self.factor)
        return tuple(gradient if gradient is None else gradient.contiguous() for gradient in gradients)


# ---------------------------------------------------------------------------------------------------------------------
# The pairwise loss
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How one evaluation of the loss runs."""

    mode: str  # "fast" or "lean"
    chunks: list[list[Group]]  # of the groups that have pairs
    workspace: int  # bytes beside inputs and gradients, about
    reason: str


def plan(
    groups: list[Group],  # that have pairs
    shape: tuple[int, int],  # of the head: (V, H)
    dtype: torch.dtype,
    carried: bool,  # a bf16 gradient of the weight is wanted
    mode: str,
    workspace: int | None,  # bytes
    free: int | None,  # bytes of device memory, where known
) -> Plan:
    """Chooses mode and chunks.

    Raises:
        ValueError: if ``mode`` is "fast" and the largest group does not fit ``workspace``.
    """
    vocabulary, features = shape
    tokens, largest = sum(g.tokens for g in groups), max((g.tokens for g in groups), default=0)
    size = dtype.itemsize
    # a row: E; X scaled and dX in fp32, or X beside the reference's; the pieces of both log-sum-exps
    row = size * vocabulary + (size + 4) * features + 16 * -(-vocabulary // COLUMN_TILE)
    carry = vocabulary * features // 2 if carried else 0
    width = lean_width(max(tokens, 1), features, vocabulary, size, workspace)
    lean_bytes = tokens * (size * width + (size + 4) * features)

    def lean(reason: str) -> Plan:
        return Plan("lean", [groups], lean_bytes, reason)

    if dtype == torch.float16:
        return lean("fp16 has not the range for exponentials relative to the target")
    if mode == "lean":
        return lean("as asked")
    needed = row * largest + (carry if largest < tokens else 0)
    budget = workspace
    if budget is None:
        budget = DEFAULT_WORKSPACE if free is None else free // FREE_SHARE
        if mode == "fast":
            budget = max(budget, needed)
    if row * tokens <= budget:
        return Plan("fast", [groups], row * tokens, "everything fits one chunk")
    if needed > budget:
        text = f"the largest preference group, {largest} tokens, needs {needed} bytes of workspace, beyond {budget}"
        if mode == "fast":
            raise ValueError(f"mode='fast': {text} (workspace_bytes); mode='lean' or 'auto' would recompute")
        if lean_bytes < needed:
            return lean(text)
        budget = needed  # nothing is saved by recomputing
    pieces = list(chunks(groups, (budget - carry) // row))
    sizes = [sum(group.tokens for group in piece) for piece in pieces]
    if mode == "auto" and tokens / len(pieces) < FEW_ROWS and lean_bytes <= budget:
        return lean(f"{len(pieces)} chunks of at most {max(sizes)} tokens would be too small")
    return Plan("fast", pieces, carry + row * max(sizes), "groups fit, in chunks")


class _Order:
    """Rows, responses and pairs numbered so that a chunk of groups is a range of each, groups with pairs first."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        groups = sorted(layout.groups, key=lambda group: not group.pairs)
        responses = [r for group in groups for r in group.responses]
        pairs = [p for group in groups for p in group.pairs]
        lengths = [layout.edges[r + 1] - layout.edges[r] for r in responses]
        number = {r: i for i, r in enumerate(responses)}
        ends = [(number[winner], number[loser]) for winner, loser in layout.pairs[pairs].tolist()]
        entries: list[list[tuple[int, int]]] = [[] for _ in responses]  # of a response: its pairs, with its sign
        for pair, (winner, loser) in enumerate(ends):
            entries[winner].append((pair, 1))
            entries[loser].append((pair, -1))

        self.groups = groups
        self.plans: dict[tuple, Plan] = {}  # of the calls so far: a CUDA graph takes that of the call before it
        self.edges = _running_sum(lengths)
        self.entry_edges = _running_sum([len(e) for e in entries])
        flat = [entry for e in entries for entry in e]
        columns = {
            "edges": self.edges, "entry_edges": self.entry_edges,
            "winner": [winner for winner, _ in ends], "loser": [loser for _, loser in ends],
            "entry_pair": [p for p, _ in flat], "entry_sign": [s for _, s in flat],
            "responses": responses, "pairs": pairs,
        }  # fmt: skip
        joined = torch.tensor([x for column in columns.values() for x in column], dtype=torch.int64)
        parts = to_device(joined, device).split([len(column) for column in columns.values()])
        self.on_device = dict(zip(columns, parts))
        self.responses_move = responses != list(range(len(responses)))
        self.pairs_move = pairs != list(range(len(pairs)))
        self.rows = None  # (N,) the permutation of the rows, None if they stay
        if self.responses_move:
            rows = [i for r in responses for i in range(layout.edges[r], layout.edges[r + 1])]
            self.rows = to_device(torch.tensor(rows, dtype=torch.int64), device)
        self.response_of_row = to_device(torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)), device)

    def scattered(self, values: Tensor, name: str, moved: bool) -> Tensor:
        """Values in this order, put back into the caller's."""
        return torch.empty_like(values).index_copy_(0, self.on_device[name], values) if moved else values


_order = PerStream(_Order)


def _running_sum(sizes: list[int]) -> list[int]:
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    return edges


class PairLoss:
    """One evaluation of the loss with its gradients. ``run`` fills loss, logps, ref_logps, margins and gradients."""

    def __init__(
        self,
        hidden: Tensor,  # (N, H)
        head: Head,
        targets: Tensor,  # (N,)
        layout: Layout,
        objective,
        reference: Tensor,  # (S,) float64 log-probs, or the (N, H) hidden states that go through the policy's head
        preference: Tensor,  # (P,) float64
        pair_weight: Tensor,  # (P,) float64
        wanted: tuple[bool, bool, bool],  # gradients for hidden, weight, bias
        dtypes: tuple[torch.dtype | None, ...],  # of the leaves: the gradients' own
        mode: str,
        workspace: int | None,  # bytes
    ) -> None:
        self.order = _order(layout, hidden.device)
        self.objective, self.wanted, self.dtypes = objective, wanted, dtypes
        self.mode, self.workspace = mode, workspace
        self.head = _aligned_head(head)
        self.hidden, self.targets = aligned(self._ordered(hidden)), self._ordered(targets)
        share = pair_weight / pair_weight.sum()
        if self.order.pairs_move:
            share, preference = share[self.order.on_device["pairs"]], preference[self.order.on_device["pairs"]]
        self.share, self.preference = share, preference

        # a reference that shares the head goes through it in the same product
        self.stacked = None
        responses = len(self.order.edges) - 1
        if reference.dim() == 2:
            self.stacked = aligned(self._ordered(reference))
            self.ref_logps = torch.zeros(responses, dtype=torch.float64, device=hidden.device)
        else:
            self.ref_logps = reference[self.order.on_device["responses"]] if self.order.responses_move else reference
        self.rows_logps = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
        self.ref_rows_logps = torch.empty_like(self.rows_logps) if self.stacked is not None else None
        self.logps = torch.zeros(responses, dtype=torch.float64, device=hidden.device)
        self.margins, self.losses, self.derivative = torch.zeros(
            3, len(preference), dtype=torch.float64, device=hidden.device
        )

    def run(self) -> PairLoss:
        gradients = _Gradients(self.hidden, self.head, self.wanted, self.dtypes)
        paired = [group for group in self.order.groups if group.pairs]
        rows = sum(group.tokens for group in paired)
        if not any(self.wanted) or rows == 0:
            gradients.zero()
            self._score(slice(0, len(self.hidden)))
            self._coefficients(0, len(self.logps), 0, len(self.share))
        else:
            if gradients.hidden is not None:
                gradients.hidden[rows:].zero_()  # responses without a pair
            self._score(slice(rows, len(self.hidden)))
            plan = self._plan(paired)
            if plan.mode == "fast":
                self._fast(gradients, plan.chunks)
            else:
                self._lean(gradients, slice(0, rows), sum(len(group.responses) for group in paired))
        self.logps = self._sums(self.rows_logps)
        if self.stacked is not None:
            self.ref_logps = self._sums(self.ref_rows_logps)
        self.loss = (self.losses * self.share).sum()
        self._restore(gradients)
        return self

    def _plan(self, paired: list[Group]) -> Plan:
        device, shape = self.hidden.device, tuple(self.head.weight.shape)
        carried = self.wanted[1] and self.dtypes[1] == torch.bfloat16
        key = (shape, self.hidden.dtype, carried, self.mode, self.workspace)
        if capturing(device) and key in self.order.plans:  # the free memory cannot be asked for
            return self.order.plans[key]
        free = _free_memory(device) if self.workspace is None and self.mode != "lean" else None
        chosen = plan(paired, shape, self.hidden.dtype, carried, self.mode, self.workspace, free)
        self.order.plans[key] = chosen
        logger.debug(
            "%s: %s; chunks: %d, workspace: %d bytes", chosen.mode, chosen.reason, len(chosen.chunks), chosen.workspace
        )
        return chosen

    def _ordered(self, rows: Tensor) -> Tensor:
        return rows if self.order.rows is None else rows[self.order.rows]

    def _sums(self, rows: Tensor) -> Tensor:
        """(N,) -> (S,): log-probs of responses, nats."""
        return segment_sums(rows, self.order.on_device["edges"])

    def _restore(self, gradients: _Gradients) -> None:
        """Results in the caller's order."""
        order = self.order
        self.gradients = gradients.finished()
        if order.rows is not None and self.gradients[0] is not None:
            own = self.gradients[0]
            self.gradients = (torch.empty_like(own).index_copy_(0, order.rows, own), *self.gradients[1:])
        self.logps = order.scattered(self.logps, "responses", order.responses_move)
        self.ref_logps = order.scattered(self.ref_logps, "responses", order.responses_move)
        self.margins = order.scattered(self.margins, "pairs", order.pairs_move)

    def _score(self, rows: slice) -> None:
        """Log-probs of these rows, and of the reference's where it shares the head."""
        step = SCORED_ROWS if self.stacked is None else SCORED_ROWS // 2
        for start in range(rows.start, rows.stop, step):
            part = slice(start, min(start + step, rows.stop))
            self._keep(part, _softmax(*self._through_the_head(part))[1])

    def _through_the_head(self, rows: slice) -> tuple[Tensor, Head, Tensor]:
        hidden, targets = self.hidden[rows], self.targets[rows]
        if self.stacked is None:
            return hidden, self.head, targets
        return aligned(torch.cat((hidden, self.stacked[rows]))), self.head, targets.repeat(2)

    def _keep(self, rows: slice, sums: RowSums) -> None:
        count = rows.stop - rows.start
        self.rows_logps[rows] = sums.logps[:count]
        if self.stacked is not None:
            self.ref_rows_logps[rows] = sums.logps[count:]

    def _coefficients(self, first: int, stop: int, first_pair: int, stop_pair: int) -> Tensor:
        """Margins and losses of a range of pairs; d loss / d log-prob of the range of responses they are among."""
        on_device = self.order.on_device
        edges = on_device["edges"][first : stop + 1]
        self.logps[first:stop] = segment_sums(self.rows_logps, edges)
        if self.stacked is not None:
            self.ref_logps[first:stop] = segment_sums(self.ref_rows_logps, edges)
        pairs = slice(first_pair, stop_pair)
        ratio = self.logps - self.ref_logps
        margins = ratio[on_device["winner"][pairs]] - ratio[on_device["loser"][pairs]]
        self.margins[pairs] = margins
        self.losses[pairs] = self.objective.loss(margins, self.preference[pairs])
        self.derivative[pairs] = self.objective.derivative(margins, self.preference[pairs]) * self.share[pairs]
        # a gather and a sum in order, where an index_add would let the order of additions float
        signed = self.derivative[on_device["entry_pair"]] * on_device["entry_sign"]
        return segment_sums(signed, on_device["entry_edges"][first : stop + 1])

    def _row_coefficients(self, rows: slice, coefficients: Tensor, first: int) -> Tensor:
        return coefficients[self.order.response_of_row[rows] - first]

    def _fast(self, gradients: _Gradients, pieces: list[list[Group]]) -> None:
        capacity = max(sum(group.tokens for group in piece) for piece in pieces)
        buffer = empty_rows(capacity, len(self.head.weight), self.hidden.dtype, self.hidden.device)
        carry = None
        if len(pieces) > 1 and gradients.weight is not None and gradients.weight.dtype == torch.bfloat16:
            carry = carry_for(gradients.weight)
        response = pair = row = 0
        for number, piece in enumerate(pieces):
            stop_response = response + sum(len(group.responses) for group in piece)
            stop_pair = pair + sum(len(group.pairs) for group in piece)
            rows = slice(row, row + sum(group.tokens for group in piece))
            e, total = self._exponentials(rows, buffer[: rows.stop - rows.start])
            coefficients = self._coefficients(response, stop_response, pair, stop_pair)
            scale = self._row_coefficients(rows, coefficients, response).float() / total
            scale *= -(self.head.logit_scale / self.head.temperature)
            self._add_products(gradients, rows, e, scale, carry, first=number == 0, last=number == len(pieces) - 1)
            response, pair, row = stop_response, stop_pair, rows.stop

    def _add_products(
        self, gradients: _Gradients, rows: slice, e: Tensor, scale: Tensor, carry: Tensor | None, first: bool,
        last: bool,
    ) -> None:  # fmt: skip
        """A chunk's share of the gradients, from its E and the scales −c·κ/s of its rows."""
        hidden = self.hidden[rows]
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
        """E of a chunk, complete, −(the sum of the others) in the target's column; and its rows' sums (n,)."""
        hidden, head, targets = self._through_the_head(rows)
        own, sums = _softmax(hidden, head, targets, store=e)
        targets, values = targets[: len(e)], -sums.others[: len(e)]
        if head.softcap is not None:
            tanh = own[: len(e)] / head.factors[1]
            values = values * (1 - tanh.square()).float()
        e.scatter_(1, targets[:, None], values.to(e.dtype)[:, None])
        self._keep(rows, sums)
        return e, sums.total[: len(e)]

    def _lean(self, gradients: _Gradients, rows: slice, responses: int) -> None:
        self._score(rows)
        coefficients = self._coefficients(0, responses, 0, len(self.share))
        upstream = self._row_coefficients(rows, coefficients, 0)
        _recompute(
            gradients, self.hidden[rows], self.head, self.targets[rows], self.rows_logps[rows], upstream,
            self.workspace,
        )  # fmt: skip


def _free_memory(device: torch.device) -> int | None:
    """Bytes that an allocation can have, where asking does not disturb the device."""
    if device.type != "cuda" or capturing(device):
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
