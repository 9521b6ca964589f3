"""The loss in bounded memory, on any device, from PyTorch's own matrix products.

The idea. In a pairwise loss the gradient by the log-prob of every token of a response is one scalar, the response's
coefficient c, which is known once the response's preference group has been through the head. So rows are worked on in
chunks that hold whole groups. The logits of a chunk are exponentiated in place and give the log-probs, the margins and
c, and the same exponentials then enter the two products of the backward pass. Nothing is computed twice: three matrix
products for the policy and one for the anchor, against four and one for a loss that works token by token.

The softmax gradient is never formed. With E = exp(logit − max), s = Σ E and r = s − E[target], the gradient by a
token's logits is c·(onehot − E/s) = −(c/s)·(E with −r at the target). So E[target] is overwritten with −r (exact where
p(target) is close to 1, where 1 − p would cancel), and the scales −c/s multiply the rows of the [n, H] operands:

    dX = −(c/s) · (E W)          dW += Eᵀ (−(c/s) · X)          db += Eᵀ (−(c/s))

A group larger than the workspace is computed in several blocks of rows. Its dX is linear in c and is scaled at the end.
If the group is a single pair (one unknown scalar, c_winner = −c_loser) and a second [V, H] fits the workspace, its dW
is summed unscaled; otherwise its logits are computed a second time.

Sums are in fp32 for fp32, bf16 and fp16 inputs and in float64 for float64. Log-probs and their sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .groups import PairLayout, ResponseGroup, Rows, split_into_chunks
from .head import Head
from .problem import (
    Gradients,
    NeedsGradient,
    PairProblem,
    PairResult,
    TokenProblem,
    accumulation_dtype,
)

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
CPU_COLUMNS = 4096  # vocabulary entries that a CPU multiplies, or converts from bf16, at a time


def default_workspace(device: torch.device, mode: str = "auto") -> int:
    """Return the bytes for logits in flight. A GPU needs large products; a CPU prefers what fits its caches."""
    workspace = 2**30 if device.type == "cuda" else 144 * 2**20
    return workspace // 8 if mode == "lean" else workspace


# ---------------------------------------------------------------------------------------------------------------------
# One block of rows through the head
# ---------------------------------------------------------------------------------------------------------------------


class _Block:
    """The exponentials of one block of rows, from which its log-probs and its gradients are computed."""

    def __init__(self, hidden: Tensor, head: Head, targets: Tensor, buffer: Tensor, gradients: bool) -> None:
        self.hidden, self.head = hidden, head
        logits = _logits(hidden, head.weight, buffer[: len(hidden)])
        if head.bias is not None:
            logits.add_(head.bias)
        slope = None  # d logit / d (h·w + b) without its constant factor, which is self.scale
        self.scale = head.logit_scale / head.temperature
        if head.softcap is not None:
            logits.mul_(head.logit_scale / head.softcap).tanh_()
            slope = logits.square().neg_().add_(1) if gradients else None
            logits.mul_(head.softcap / head.temperature)
        elif self.scale != 1:
            logits.mul_(self.scale)

        index = targets[:, None]
        peak = logits.amax(1, keepdim=True)
        # A response's log-prob is a sum over tokens, in which the rounding errors of the log-sum-exps average out and
        # those of the targets' logits add up. So the latter are computed again in float64: H products a row.
        above_peak = _target_logits(hidden, head, targets)[:, None] - peak.double()
        exp = logits.sub_(peak).exp_()
        exp.scatter_(1, index, 0)
        others = exp.sum(1, keepdim=True)
        # log1p keeps the log-probs of tokens with p close to 1 exact
        self.logps = (above_peak - torch.log1p(others.double() + above_peak.expm1()))[:, 0]  # float64
        self.total = others + above_peak.exp().to(others.dtype)
        if gradients:
            exp.scatter_(1, index, -others)
            if slope is not None:
                exp.mul_(slope)
            # tensor cores take both operands in one dtype: bf16 has the range of fp32, fp16 could not hold -others
            self.exp = exp.bfloat16() if hidden.is_cuda and hidden.dtype == torch.bfloat16 else exp

    def row_scale(self, coefficients: Tensor | float) -> Tensor:
        """Return −c·scale/s, (n, 1), from the gradients c by the rows' log-probs, (n, 1)."""
        return -coefficients * self.scale / self.total

    def hidden_gradient(self, row_scale: Tensor) -> Tensor:
        """Return dX, (n, H), in the accumulation dtype."""
        out = torch.zeros(self.hidden.shape, dtype=self.total.dtype, device=self.hidden.device)
        for v in _columns(self.head.weight, self.exp):
            _add_product(out, self.exp[:, v], self.head.weight[v])
        return out.mul_(row_scale)

    def add_weight_gradient(self, out: Tensor, row_scale: Tensor) -> None:
        """out (V, H) += Eᵀ (row_scale · X)."""
        _add_product(out, self.exp.T, (self.hidden * row_scale).to(self.exp.dtype))

    def add_bias_gradient(self, out: Tensor, row_scale: Tensor) -> None:
        """out (V,) += Eᵀ row_scale."""
        out.addmv_(self.exp.to(out.dtype).T, row_scale[:, 0])


def _target_logits(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Return the logits of the targets alone, (n,) float64."""
    logits = (hidden.double() * head.weight[targets].double()).sum(1)
    if head.bias is not None:
        logits += head.bias[targets]
    logits *= head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * (logits / head.softcap).tanh()
    return logits / head.temperature


def _columns(weight: Tensor, buffer: Tensor) -> Iterator[slice]:
    """Yield the vocabulary in one slice, or in several if the weight has to be converted to another dtype."""
    step = CPU_COLUMNS if weight.dtype != buffer.dtype else max(len(weight), 1)
    for start in range(0, len(weight), step):
        yield slice(start, start + step)


def _logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out (n, V) = X Wᵀ, multiplied and summed in out's dtype."""
    if hidden.is_cuda and hidden.dtype != out.dtype:
        return torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out=out)
    rows = hidden.to(out.dtype).contiguous()
    for start in range(0, len(weight), CPU_COLUMNS):
        v = slice(start, start + CPU_COLUMNS)
        part = weight[v].to(out.dtype)
        if HAS_ONEDNN and rows.dtype == torch.float32 and rows.numel() and part.is_contiguous():
            # as exact as mm, and 1.7 times as fast on AMD CPUs, where mm calls MKL
            out[:, v] = torch.ops.mkldnn._linear_pointwise(rows, part, None, "none", [], "")
        else:
            torch.mm(rows, part.T, out=out[:, v])
    return out


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, summed in out's dtype."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs of tokens and responses
# ---------------------------------------------------------------------------------------------------------------------


def _buffer(rows: int, head: Head, dtype: torch.dtype, workspace: int) -> Tensor:
    """Return (n, V) scratch memory for the logits of at most ``rows`` rows, and of at least one."""
    vocabulary = len(head.weight)
    # a softcap keeps its slope beside the logits, low precision on a GPU keeps a copy in the input's dtype
    copies = 2 if head.softcap is not None or (head.weight.is_cuda and head.weight.dtype != dtype) else 1
    fit = workspace // max(copies * vocabulary * dtype.itemsize, 1)
    return torch.empty(max(1, min(rows, fit)), vocabulary, dtype=dtype, device=head.weight.device)


def token_logps(problem: TokenProblem) -> Tensor:
    """Compute the log-prob of every target: (N,) float64. The forward pass alone."""
    workspace = problem.workspace or default_workspace(problem.hidden.device)
    return _token_logps(problem.hidden, problem.head, problem.targets, workspace)


def _token_logps(hidden: Tensor, head: Head, targets: Tensor, workspace: int) -> Tensor:
    logps = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
    buffer = _buffer(len(hidden), head, accumulation_dtype(hidden.dtype), workspace)
    for start in range(0, len(hidden), len(buffer)):
        rows = slice(start, start + len(buffer))
        logps[rows] = _Block(hidden[rows], head, targets[rows], buffer, gradients=False).logps
    return logps


def token_gradients(problem: TokenProblem, logps: Tensor, upstream: Tensor) -> Gradients:
    """Compute the gradients of Σ upstream·logps, with ``upstream`` (N,). Computes the logits again."""
    hidden, head, targets = problem.hidden, problem.head, problem.targets
    sums = _GradientSums(hidden, head, problem.needs_gradient)
    buffer = _buffer(len(hidden), head, sums.dtype, problem.workspace or default_workspace(hidden.device))
    for start in range(0, len(hidden), len(buffer)):
        rows = slice(start, start + len(buffer))
        block = _Block(hidden[rows], head, targets[rows], buffer, gradients=True)
        sums.add(block, rows, upstream[rows, None].to(sums.dtype))
    return sums.as_tuple()


def response_logps(problem: TokenProblem, layout: PairLayout) -> Tensor:
    """Compute the log-probs summed over each response: (S,) float64.

    Rows go through the head in the blocks of ``pair_loss``, so that equal weights give equal bits.
    """
    hidden, head, targets = problem.hidden, problem.head, problem.targets
    workspace = problem.workspace or default_workspace(hidden.device, problem.mode)
    buffer = _buffer(len(hidden), head, accumulation_dtype(hidden.dtype), workspace)
    sums = torch.zeros(len(layout.edges) - 1, dtype=torch.float64, device=hidden.device)
    unpaired, paired = _by_pairs(layout)
    for chunk in (*split_into_chunks(unpaired, len(buffer)), *split_into_chunks(paired, len(buffer))):
        responses = [r for group in chunk for r in group.responses]
        rows, lengths = layout.rows(responses, hidden.device), layout.lengths(responses, hidden.device)
        own_hidden, own_targets = hidden[rows], targets[rows]
        blocks = [
            _Block(own_hidden[block], head, own_targets[block], buffer, gradients=False).logps
            for block in _blocks(chunk, len(buffer), hidden.shape[1])
        ]
        sums[responses] = _response_sums(torch.cat(blocks), lengths)
    return sums


def _blocks(chunk: list[ResponseGroup], capacity: int, features: int) -> list[slice]:
    """Return the blocks in which a chunk's rows go through the head: one, if it fits a buffer of ``capacity`` rows."""
    rows = sum(group.tokens for group in chunk)
    size = capacity
    if rows > capacity and _leaves_room(chunk[0], capacity, features):
        size -= features
    return [slice(start, start + size) for start in range(0, max(rows, 1), size)]


def _leaves_room(group: ResponseGroup, capacity: int, features: int) -> bool:
    """Return whether the blocks of a group leave the last H rows of the buffer to its unscaled dW."""
    return len(group.pairs) == 1 and capacity - features >= max(1, capacity // 4)


def _by_pairs(layout: PairLayout) -> tuple[list[ResponseGroup], list[ResponseGroup]]:
    """Return the groups without pairs and those with pairs."""
    return [g for g in layout.groups if not g.pairs], [g for g in layout.groups if g.pairs]


def _response_sums(logps: Tensor, lengths: Tensor) -> Tensor:
    """Sums over consecutive rows: (n,), (S,) -> (S,) float64. An empty response has 0."""
    if len(lengths) == 0:
        return logps.new_zeros(0, dtype=torch.float64)
    return torch.segment_reduce(logps, "sum", lengths=lengths, unsafe=True, initial=0)


class _GradientSums:
    """Gradients of hidden states, weight and bias as sums in the accumulation dtype, each only if it is needed."""

    def __init__(self, hidden: Tensor, head: Head, needs_gradient: NeedsGradient) -> None:
        self.dtype = accumulation_dtype(hidden.dtype)
        tensors = (hidden, head.weight, head.bias)
        self.hidden, self.weight, self.bias = (
            torch.zeros(tensor.shape, dtype=self.dtype, device=hidden.device) if needed else None
            for tensor, needed in zip(tensors, needs_gradient)
        )

    def add(self, block: _Block, rows: Rows, coefficients: Tensor) -> None:
        """Add a block whose coefficients (n, 1) are known."""
        scale = block.row_scale(coefficients)
        if self.hidden is not None:
            self.hidden[rows] = block.hidden_gradient(scale)
        self.add_head(block, scale)

    def add_head(self, block: _Block, row_scale: Tensor) -> None:
        """Add a block's share of the gradients of weight and bias."""
        if self.weight is not None:
            block.add_weight_gradient(self.weight, row_scale)
        if self.bias is not None:
            block.add_bias_gradient(self.bias, row_scale)

    def as_tuple(self) -> Gradients:
        return self.hidden, self.weight, self.bias


# ---------------------------------------------------------------------------------------------------------------------
# The pairwise loss
# ---------------------------------------------------------------------------------------------------------------------


def pair_loss(problem: PairProblem) -> PairResult:
    """Compute the loss and its gradients, a chunk of preference groups at a time."""
    return _Evaluation(problem).run()


def scale_in_place(gradients: Gradients, factor: Tensor) -> None:
    """Multiply by a scalar. On a CPU, where reading it is free, a factor of 1 saves a pass over a [V, H] tensor."""
    if factor.device.type == "cpu" and factor == 1:
        return
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(factor)


class _Evaluation:
    """One evaluation of the loss. ``run`` gives the order of the work."""

    def __init__(self, problem: PairProblem) -> None:
        self.problem = problem
        self.hidden, self.head, self.targets = problem.hidden, problem.head, problem.targets
        device = self.hidden.device
        self.workspace = problem.workspace or default_workspace(device, problem.mode)
        self.pair_share = problem.pair_weight / problem.pair_weight.sum()
        self.pairs = problem.layout.pairs.to(device)
        self.ref_logps = problem.ref_logps
        if self.ref_logps is None:
            anchor = TokenProblem(problem.ref_hidden, self.head, self.targets, workspace=self.workspace)
            self.ref_logps = response_logps(anchor, problem.layout)
        self.gradients = _GradientSums(self.hidden, self.head, problem.needs_gradient)
        self.logps = torch.zeros(len(problem.layout.edges) - 1, dtype=torch.float64, device=device)
        self.margins = torch.zeros(len(self.pairs), dtype=torch.float64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def run(self) -> PairResult:
        unpaired, paired = _by_pairs(self.problem.layout)
        if unpaired:
            self._score(unpaired)
        if any(self.problem.needs_gradient):
            self.buffer = _buffer(len(self.hidden), self.head, self.gradients.dtype, self.workspace)
            for chunk in split_into_chunks(paired, len(self.buffer)):
                if sum(group.tokens for group in chunk) <= len(self.buffer):
                    self._add_chunk(chunk)
                else:
                    self._add_group_in_blocks(chunk[0])
        else:
            self._score(paired)
            self._coefficients([p for group in paired for p in group.pairs])
        return PairResult(self.loss, self.logps, self.ref_logps, self.margins, self.gradients.as_tuple())

    def _rows(self, responses: list[int]) -> tuple[Rows, Tensor]:
        """Return the rows of these responses, and the lengths of the responses."""
        layout, device = self.problem.layout, self.hidden.device
        return layout.rows(responses, device), layout.lengths(responses, device)

    def _score(self, groups: list[ResponseGroup]) -> None:
        """Compute the log-probs of these groups' responses alone."""
        responses = [r for group in groups for r in group.responses]
        rows, lengths = self._rows(responses)
        token_logps = _token_logps(self.hidden[rows], self.head, self.targets[rows], self.workspace)
        self.logps[responses] = _response_sums(token_logps, lengths)

    def _coefficients(self, pairs: list[int]) -> Tensor:
        """Compute margins and loss of these pairs; return their d loss / d log-prob of every response, (S,)."""
        objective = self.problem.objective
        winner, loser = self.pairs[pairs].T
        ratio = self.logps - self.ref_logps
        margins = ratio[winner] - ratio[loser]
        preference, share = self.problem.preference[pairs], self.pair_share[pairs]
        self.margins[pairs] = margins
        self.loss += (objective.loss(margins, preference) * share).sum()
        derivative = objective.derivative(margins, preference) * share
        return torch.zeros_like(self.logps).index_add_(0, winner, derivative).index_add_(0, loser, -derivative)

    def _add_chunk(self, chunk: list[ResponseGroup]) -> None:
        """Compute a chunk that fits the buffer: its exponentials are still there when the coefficients are known."""
        responses = [r for group in chunk for r in group.responses]
        rows, lengths = self._rows(responses)
        block = _Block(self.hidden[rows], self.head, self.targets[rows], self.buffer, gradients=True)
        self.logps[responses] = _response_sums(block.logps, lengths)
        coefficients = self._coefficients([p for group in chunk for p in group.pairs])[responses]
        per_row = coefficients.to(self.gradients.dtype).repeat_interleave(lengths, output_size=len(block.logps))
        self.gradients.add(block, rows, per_row[:, None])

    def _add_group_in_blocks(self, group: ResponseGroup) -> None:
        """Compute one group that is larger than the buffer, in blocks of rows."""
        device, dtype = self.hidden.device, self.gradients.dtype
        rows, lengths = self._rows(group.responses)
        hidden, targets = self.hidden[rows], self.targets[rows]
        needs_hidden, needs_weight, needs_bias = self.problem.needs_gradient

        # A single pair has one unknown scalar, so its dW can be summed unscaled. It has as many elements as H rows of
        # logits and is kept in the buffer's last H rows.
        unscaled_head_grads = None
        features = hidden.shape[1]
        if needs_weight and _leaves_room(group, len(self.buffer), features):
            unscaled_weight_grad = self.buffer[-features:].view(self.head.weight.shape).zero_()
            unscaled_head_grads = _GradientSums(hidden[:0], self.head, (False, False, needs_bias))
            unscaled_head_grads.weight = unscaled_weight_grad
            winner = int(self.problem.layout.pairs[group.pairs[0], 0])
            signs = torch.tensor([1.0 if r == winner else -1.0 for r in group.responses], dtype=dtype, device=device)
            signs = signs.repeat_interleave(lengths, output_size=len(hidden))[:, None]
        blocks = _blocks([group], len(self.buffer), features)

        def block_of(block_rows: slice) -> _Block:
            return _Block(hidden[block_rows], self.head, targets[block_rows], self.buffer, gradients=True)

        logps = torch.empty(len(hidden), dtype=torch.float64, device=device)
        unscaled_hidden_grad = torch.empty(hidden.shape, dtype=dtype, device=device) if needs_hidden else None
        for block_rows in blocks:
            block = block_of(block_rows)
            logps[block_rows] = block.logps
            if unscaled_hidden_grad is not None:
                unscaled_hidden_grad[block_rows] = block.hidden_gradient(block.row_scale(1.0))
            if unscaled_head_grads is not None:
                unscaled_head_grads.add_head(block, block.row_scale(signs[block_rows]))

        self.logps[group.responses] = _response_sums(logps, lengths)
        coefficients = self._coefficients(group.pairs)
        per_row = coefficients[group.responses].to(dtype).repeat_interleave(lengths, output_size=len(hidden))[:, None]
        if unscaled_hidden_grad is not None:
            self.gradients.hidden[rows] = unscaled_hidden_grad.mul_(per_row)
        if unscaled_head_grads is not None:
            coefficient = coefficients[winner].to(dtype)
            self.gradients.weight.addcmul_(unscaled_weight_grad, coefficient)
            if needs_bias:
                self.gradients.bias.addcmul_(unscaled_head_grads.bias, coefficient)
        elif needs_weight or needs_bias:
            for block_rows in blocks:
                block = block_of(block_rows)
                self.gradients.add_head(block, block.row_scale(per_row[block_rows]))
