"""The loss in bounded memory, on any device, from PyTorch's own matrix products.

The idea. In a pairwise loss the upstream gradient of every token of a response is one scalar, the response's
coefficient c, and c is known as soon as the response's preference group has been through the head. So work in chunks
that hold whole groups: the logits of a chunk are exponentiated in place, give the log-probs, then the margins, then c,
and are still there for the two products of the backward pass. Nothing is recomputed: three matrix products for the
policy and one for the reference, against four and one for a loss that works token by token.

The softmax gradient is never formed. With E = exp(logit − max), s = Σ E and r = s − E[target], the gradient by a
token's logits is c·(onehot − E/s) = −(c/s)·(E with −r at the target). So −r is written over E[target] (exact where
p(target) is close to 1, where 1 − p would cancel), the scales −c/s ride on the rows of the [n, H] operands, and

    dX = −(c/s) · (E W)          dW += Eᵀ (−(c/s) · X)          db += Eᵀ (−(c/s))

A group larger than the workspace goes through in several blocks. Its dX needs no coefficient until the end, being
linear in c. Its dW is either gathered apart, if the group is one pair (one unknown scalar, c_winner = −c_loser) and a
second [V, H] fits the workspace, or takes a second pass over the head.

Accumulation is fp32 for fp32, bf16 and fp16 inputs, float64 for float64. Log-probs and their sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .groups import Group, Layout, Rows, chunks
from .head import Head

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
CPU_COLUMNS = 4096  # vocabulary entries that a CPU multiplies, or converts from bf16, at a time


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def default_workspace(device: torch.device, mode: str = "auto") -> int:
    """Bytes for logits in flight: large tiles pay on a GPU, caches and small machines ask for less on a CPU."""
    workspace = 2**30 if device.type == "cuda" else 144 * 2**20
    return workspace // 8 if mode == "lean" else workspace


# ---------------------------------------------------------------------------------------------------------------------
# One block of rows through the head
# ---------------------------------------------------------------------------------------------------------------------


class _Block:
    """The exponentials of one block of rows: what its log-probs and its gradients are made of."""

    def __init__(self, hidden: Tensor, head: Head, targets: Tensor, buffer: Tensor, gradients: bool) -> None:
        self.hidden, self.head = hidden, head
        logits = _logits(hidden, head.weight, buffer[: len(hidden)])
        if head.bias is not None:
            logits.add_(head.bias)
        slope = None  # d logit / d (h·w + b) as far as it varies; the constant part is self.scale
        self.scale = head.logit_scale / head.temperature
        if head.softcap is not None:
            logits.mul_(head.logit_scale / head.softcap).tanh_()
            slope = logits.square().neg_().add_(1) if gradients else None
            logits.mul_(head.softcap / head.temperature)
        elif self.scale != 1:
            logits.mul_(self.scale)

        index = targets[:, None]
        peak = logits.amax(1, keepdim=True)
        # A response's log-prob is a sum over tokens, so the rounding of the target's logit adds up where that of the
        # log-sum-exp averages out: the target's is taken again in float64, a product of H terms a row.
        above_peak = _target_logits(hidden, head, targets)[:, None] - peak.double()
        exp = logits.sub_(peak).exp_()
        exp.scatter_(1, index, 0)
        others = exp.sum(1, keepdim=True)
        # log1p keeps the small log-probs of sure tokens exact
        self.logps = (above_peak - torch.log1p(others.double() + above_peak.expm1()))[:, 0]  # float64
        self.total = others + above_peak.exp().to(others.dtype)
        if gradients:
            exp.scatter_(1, index, -others)
            if slope is not None:
                exp.mul_(slope)
            # tensor cores want both operands in bf16, which has fp32's range; fp16 could not hold -others
            self.exp = exp.bfloat16() if hidden.is_cuda and hidden.dtype == torch.bfloat16 else exp

    def row_scale(self, coefficients: Tensor | float) -> Tensor:
        """(n, 1): −c·scale/s, from the upstream gradient (n, 1) of every row's log-prob."""
        return -coefficients * self.scale / self.total

    def hidden_gradient(self, row_scale: Tensor) -> Tensor:
        """(n, H) in the accumulation dtype."""
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
    """(n,) float64: the logits of the targets alone."""
    logits = (hidden.double() * head.weight[targets].double()).sum(1)
    if head.bias is not None:
        logits += head.bias[targets]
    logits *= head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * (logits / head.softcap).tanh()
    return logits / head.temperature


def _columns(weight: Tensor, buffer: Tensor) -> Iterator[slice]:
    """The vocabulary in one piece, or in several where the weight is converted on the way."""
    step = CPU_COLUMNS if weight.dtype != buffer.dtype else max(len(weight), 1)
    for start in range(0, len(weight), step):
        yield slice(start, start + step)


def _logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out (n, V) = X Wᵀ, every product and sum in out's dtype."""
    if hidden.is_cuda and hidden.dtype != out.dtype:
        return torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out=out)
    rows = hidden.to(out.dtype).contiguous()
    for start in range(0, len(weight), CPU_COLUMNS):
        v = slice(start, start + CPU_COLUMNS)
        part = weight[v].to(out.dtype)
        if HAS_ONEDNN and rows.dtype == torch.float32 and rows.numel() and part.is_contiguous():
            # float32 all the way, as mm is; on AMD cores 1.7 times as fast as mm, which asks MKL
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
# Token log-probs alone: scoring, and the differentiable per-token form
# ---------------------------------------------------------------------------------------------------------------------


def _buffer(rows: int, head: Head, dtype: torch.dtype, workspace: int) -> Tensor:
    """(n, V) scratch for the logits of at most ``rows`` rows; at least one row, however small the workspace."""
    vocabulary = len(head.weight)
    # a softcap keeps its slope beside the logits, low precision on a GPU keeps a copy in the input's dtype
    copies = 2 if head.softcap is not None or (head.weight.is_cuda and head.weight.dtype != dtype) else 1
    fit = workspace // max(copies * vocabulary * dtype.itemsize, 1)
    return torch.empty(max(1, min(rows, fit)), vocabulary, dtype=dtype, device=head.weight.device)


def token_logps(hidden: Tensor, head: Head, targets: Tensor, workspace: int | None) -> Tensor:
    """(N, H), (N,) -> (N,) float64: the forward alone."""
    workspace = workspace or default_workspace(hidden.device)
    logps = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
    buffer = _buffer(len(hidden), head, accumulation_dtype(hidden.dtype), workspace)
    for start in range(0, len(hidden), len(buffer)):
        rows = slice(start, start + len(buffer))
        logps[rows] = _Block(hidden[rows], head, targets[rows], buffer, gradients=False).logps
    return logps


def token_gradients(
    hidden: Tensor,  # (N, H)
    head: Head,
    targets: Tensor,  # (N,)
    upstream: Tensor,  # (N,)
    wanted: tuple[bool, bool, bool],  # gradients for hidden, weight, bias
    workspace: int | None,  # bytes
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ upstream·logp by hidden, weight and bias. An arbitrary upstream (N,) needs the logits again."""
    workspace = workspace or default_workspace(hidden.device)
    gradients = _Gradients(hidden, head, wanted)
    buffer = _buffer(len(hidden), head, gradients.dtype, workspace)
    for start in range(0, len(hidden), len(buffer)):
        rows = slice(start, start + len(buffer))
        block = _Block(hidden[rows], head, targets[rows], buffer, gradients=True)
        gradients.add(block, rows, upstream[rows, None].to(gradients.dtype))
    return gradients.as_tuple()


class _Gradients:
    """Accumulators for hidden, weight and bias in the accumulation dtype, each only if it is wanted."""

    def __init__(self, hidden: Tensor, head: Head, wanted: tuple[bool, bool, bool]) -> None:
        self.dtype = accumulation_dtype(hidden.dtype)
        tensors = (hidden, head.weight, head.bias)
        self.hidden, self.weight, self.bias = (
            torch.zeros(tensor.shape, dtype=self.dtype, device=hidden.device) if want else None
            for tensor, want in zip(tensors, wanted)
        )

    def add(self, block: _Block, rows: Rows, coefficients: Tensor) -> None:
        """Adds a block whose coefficients (n, 1) are known."""
        scale = block.row_scale(coefficients)
        if self.hidden is not None:
            self.hidden[rows] = block.hidden_gradient(scale)
        self.add_head(block, scale)

    def add_head(self, block: _Block, row_scale: Tensor) -> None:
        if self.weight is not None:
            block.add_weight_gradient(self.weight, row_scale)
        if self.bias is not None:
            block.add_bias_gradient(self.bias, row_scale)

    def as_tuple(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias


# ---------------------------------------------------------------------------------------------------------------------
# The pairwise loss
# ---------------------------------------------------------------------------------------------------------------------


def response_logps(hidden: Tensor, head: Head, targets: Tensor, layout: Layout, workspace: int | None) -> Tensor:
    """(N, H), (N,) -> (S,) float64: summed over responses."""
    lengths = layout.lengths(list(range(len(layout.edges) - 1)), hidden.device)
    return _sums(token_logps(hidden, head, targets, workspace), lengths)


def _sums(logps: Tensor, lengths: Tensor) -> Tensor:
    """Sums over consecutive rows: (n,), (S,) -> (S,) float64. An empty response sums to 0."""
    if len(lengths) == 0:
        return logps.new_zeros(0, dtype=torch.float64)
    return torch.segment_reduce(logps, "sum", lengths=lengths, unsafe=True, initial=0)


class PairLoss:
    """One evaluation of the loss with its gradients. Read ``run``: the rest are its two ways through a chunk."""

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
        dtypes: tuple[torch.dtype | None, ...],  # of the leaves; gradients come in the accumulation dtype all the same
        mode: str,
        workspace: int | None,  # bytes
    ) -> None:
        self.hidden, self.head, self.targets, self.layout = hidden, head, targets, layout
        self.objective, self.preference = objective, preference
        self.pair_share = pair_weight / pair_weight.sum()
        self.wanted, self.workspace = wanted, workspace or default_workspace(hidden.device, mode)
        self.ref_logps = reference
        if reference.dim() == 2:
            self.ref_logps = response_logps(reference, head, targets, layout, self.workspace)
        self.pairs = layout.pairs.to(hidden.device)
        self.sums = _Gradients(hidden, head, wanted)
        self.logps = torch.zeros(len(layout.edges) - 1, dtype=torch.float64, device=hidden.device)
        self.margins = torch.zeros(len(layout.pairs), dtype=torch.float64, device=hidden.device)
        self.loss = torch.zeros((), dtype=torch.float64, device=hidden.device)

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """By hidden, weight and bias."""
        return self.sums.as_tuple()

    def run(self) -> PairLoss:
        unpaired = [group for group in self.layout.groups if not group.pairs]
        paired = [group for group in self.layout.groups if group.pairs]
        if unpaired:
            self._score([r for group in unpaired for r in group.responses])
        if not any(self.wanted):
            self._score([r for group in paired for r in group.responses])
            self._coefficients([p for group in paired for p in group.pairs])
            return self
        self.buffer = _buffer(len(self.hidden), self.head, self.sums.dtype, self.workspace)
        for chunk in chunks(paired, len(self.buffer)):
            if sum(group.tokens for group in chunk) <= len(self.buffer):
                self._whole(chunk)
            else:
                self._in_blocks(chunk[0])
        return self

    def _score(self, responses: list[int]) -> None:
        rows = self.layout.rows(responses, self.hidden.device)
        lengths = self.layout.lengths(responses, self.hidden.device)
        logps = token_logps(self.hidden[rows], self.head, self.targets[rows], self.workspace)
        self.logps[responses] = _sums(logps, lengths)

    def _coefficients(self, pairs: list[int]) -> Tensor:
        """Margins and loss of these pairs; (S,) d loss / d log-prob of every response, from these pairs alone."""
        winner, loser = self.pairs[pairs].T
        ratio = self.logps - self.ref_logps
        margins = ratio[winner] - ratio[loser]
        preference, share = self.preference[pairs], self.pair_share[pairs]
        self.margins[pairs] = margins
        self.loss += (self.objective.loss(margins, preference) * share).sum()
        derivative = self.objective.derivative(margins, preference) * share
        return torch.zeros_like(self.logps).index_add_(0, winner, derivative).index_add_(0, loser, -derivative)

    def _whole(self, chunk: list[Group]) -> None:
        """Logits once: the coefficients are known while the exponentials are still there."""
        responses = [r for group in chunk for r in group.responses]
        rows = self.layout.rows(responses, self.hidden.device)
        lengths = self.layout.lengths(responses, self.hidden.device)
        block = _Block(self.hidden[rows], self.head, self.targets[rows], self.buffer, gradients=True)
        self.logps[responses] = _sums(block.logps, lengths)
        coefficients = self._coefficients([p for group in chunk for p in group.pairs])[responses]
        per_row = coefficients.to(self.sums.dtype).repeat_interleave(lengths, output_size=len(block.logps))
        self.sums.add(block, rows, per_row[:, None])

    def _in_blocks(self, group: Group) -> None:
        """One group, larger than the buffer, in blocks of rows."""
        device, dtype = self.hidden.device, self.sums.dtype
        rows = self.layout.rows(group.responses, device)
        lengths = self.layout.lengths(group.responses, device)
        hidden, targets = self.hidden[rows], self.targets[rows]
        want_hidden, want_weight, want_bias = self.wanted

        # A single pair has one unknown scalar: its dW can be gathered apart and scaled afterwards. As many numbers as
        # H rows of logits, it takes the buffer's last H rows.
        apart = None
        size = len(self.buffer)
        features = hidden.shape[1]
        if want_weight and len(group.pairs) == 1 and size - features >= max(1, size // 4):
            size -= features
            apart = _Gradients(hidden[:0], self.head, (False, False, want_bias))
            apart.weight = self.buffer[size:].view(self.head.weight.shape).zero_()
            winner = int(self.layout.pairs[group.pairs[0], 0])
            signs = torch.tensor([1.0 if r == winner else -1.0 for r in group.responses], dtype=dtype, device=device)
            signs = signs.repeat_interleave(lengths, output_size=len(hidden))[:, None]
        blocks = [slice(start, start + size) for start in range(0, len(hidden), size)]

        def block_of(block_rows: slice) -> _Block:
            return _Block(hidden[block_rows], self.head, targets[block_rows], self.buffer, gradients=True)

        logps = torch.empty(len(hidden), dtype=torch.float64, device=device)
        unscaled = torch.empty(hidden.shape, dtype=dtype, device=device) if want_hidden else None
        for block_rows in blocks:
            block = block_of(block_rows)
            logps[block_rows] = block.logps
            if unscaled is not None:
                unscaled[block_rows] = block.hidden_gradient(block.row_scale(1.0))
            if apart is not None:
                apart.add_head(block, block.row_scale(signs[block_rows]))

        self.logps[group.responses] = _sums(logps, lengths)
        coefficients = self._coefficients(group.pairs)
        per_row = coefficients[group.responses].to(dtype).repeat_interleave(lengths, output_size=len(hidden))[:, None]
        if unscaled is not None:
            self.sums.hidden[rows] = unscaled.mul_(per_row)
        if apart is not None:
            coefficient = coefficients[winner].to(dtype)
            self.sums.weight.addcmul_(apart.weight, coefficient)
            if want_bias:
                self.sums.bias.addcmul_(apart.bias, coefficient)
        elif want_weight or want_bias:
            for block_rows in blocks:
                block = block_of(block_rows)
                self.sums.add_head(block, block.row_scale(per_row[block_rows]))
