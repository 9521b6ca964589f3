"""Predicts the peak memory of an optimizer step by part, and finds settings that fit a device.

Weights, gradients and optimizer states are counted from the parameters' shapes, the rest by a forward and backward pass
on fake tensors (``counting``). What is not in it: memory of the CUDA context and of libraries, and fragmentation; on a
GPU a plan may therefore take ``USABLE`` of the memory only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from importlib.util import find_spec

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config.sections import MOST_TOKENS, ModelConfig
from ..loss import LossShape, footprint
from ..models.adapters import Adapter
from ..models.execution import checkpoint_layers
from ..models.heads import logit_options
from ..models.precision import weights_dtype
from ..packing import Layout, Packed, TokenGroup, microbatches, pack, row_length
from .counting import ACTIVATIONS, GRADIENTS, HEAD, LOSS, FakeModel, LiveStorages

WEIGHTS, STATES, GATHERED, ANCHOR, PROCESS, ALLOCATOR = (
    "weights",
    "optimizer",
    "gathered",
    "live anchor",
    "process",
    "allocator",
)
PARTS = (WEIGHTS, GRADIENTS, STATES, ACTIVATIONS, LOSS, HEAD, GATHERED, ANCHOR, PROCESS, ALLOCATOR)  # in this order
# bytes a parameter of both moments: codes, and a float32 scale for 256 or 128 of them
QUANTISED = {"adamw-8bit": 2 * (1 + 4 / 256), "adamw-4bit": 2 * (0.5 + 4 / 128)}
BUDGETS = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, MOST_TOKENS)
USABLE = 0.92  # share of a GPU's memory: the CUDA context, libraries and fragmentation take the rest


@dataclass(frozen=True)
class Settings:
    """What the memory of an optimizer step depends on, beside the model and its micro-batch.

    Attributes:
        weights: "fp32" or "bf16-sr".
        ranks: that take part.
        compute_dtype: of matrix products.
    """

    weights: str = "fp32"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    lora_rank: int | None = None
    ranks: int = 1
    compute_dtype: torch.dtype = torch.float32
    live_anchor: bool = False
    loss_mode: str = "auto"
    lora_targets: str = "all-linear"

    @property
    def shards(self) -> int:
        """The number of parts that weights, gradients and states are in: with LoRA each rank has all of them."""
        return self.ranks if self.lora_rank is None else 1

    def changes_from(self, other: Settings) -> str:
        """Returns the flags that turn other settings into these."""
        flags = [
            f"--{name} {value}"
            for name in ("weights", "optimizer", "lora_rank")
            if (value := getattr(self, name)) != getattr(other, name)
        ]
        if self.gradient_checkpointing and not other.gradient_checkpointing:
            flags.append("--gradient_checkpointing")
        if self.ranks != other.ranks:
            flags.append(f"torchrun with {self.ranks} processes")
        return " ".join(flags)


@dataclass(frozen=True)
class Plan:
    """Predicted bytes of one process, by part, in the steps after the first; each dict is one moment.

    Attributes:
        backward: at the peak of the forward and backward pass of the largest micro-batch.
        update: while the optimizer takes its step.
        tokens: of that micro-batch, padding included.
        several: whether an optimizer step has several micro-batches.
        loading: while the whole model is float32, on every rank: when it is loaded and checked, and at the start and
            end of a fit.
    """

    settings: Settings
    backward: Mapping[str, int]
    update: Mapping[str, int]
    tokens: int
    several: bool
    loading: int = 0

    @property
    def at_peak(self) -> Mapping[str, int]:
        """The moment with the most memory."""
        return max(self.backward, self.update, key=lambda parts: sum(parts.values()))

    @property
    def total(self) -> int:
        """Peak bytes."""
        return sum(self.at_peak.values())

    @property
    def total_of_first_step(self) -> int:
        """Peak bytes of a fit's first step, whose backward passes have no optimizer states beside them yet.

        The allocator has nothing to keep before the second micro-batch, nor when the states are made.
        """
        backward = sum(self.backward.values()) - self.backward.get(STATES, 0)
        kept = self.backward.get(ALLOCATOR, 0)
        return max(backward if self.several else backward - kept, sum(self.update.values()) - kept)


@dataclass
class Planner:
    """Makes plans for a model and its data.

    Attributes:
        build: makes the model with weights of this dtype; called where new tensors have no data.
        layout: of micro-batches.
        masked: whether attention takes a mask, as sdpa and eager do; flash and flex attention keep nothing of its size.
        device: that the fit is on; its memory is not touched.
        backend: of the loss, "triton" or "torch".
        memory: bytes of the device, by which the Triton backend chooses its workspace; None if unknown.
        baseline: other bytes by part, such as ``PROCESS`` on a CPU.
    """

    build: Callable[[torch.dtype], PreTrainedModel]
    layout: Layout = "shared"
    masked: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    backend: str = "triton"
    memory: int | None = None
    baseline: Mapping[str, int] = field(default_factory=dict)

    def plan(self, settings: Settings, groups: list[TokenGroup], several: bool = True) -> Plan:
        """Plans for a largest micro-batch of these groups.

        Args:
            several: whether an optimizer step has several micro-batches.

        Raises:
            CannotCount: if the family does not run on fake tensors.
        """
        model = self._model(settings)
        weights, trained = _bytes(model.model.parameters()), model.parameters(trained=True)
        gradients, sharded = _bytes(trained), settings.shards
        states = sum(map(lambda one: _state_bytes(one, settings.optimizer), trained))
        fixed = {WEIGHTS: weights // sharded, STATES: states // sharded, **self.baseline}
        if settings.live_anchor:
            fixed[ANCHOR] = weights
        update = {**fixed, GRADIENTS: gradients // sharded}
        update[STATES] += self._temporaries(trained, settings)
        if sharded > 1:
            fixed[GATHERED] = _gathered(model.model)
        packed = pack(groups, self.layout)
        backward = fixed | self._largest_moment(model, packed, groups, settings, several, sum(fixed.values()))
        if sharded > 1:
            backward[GRADIENTS] = gradients // sharded
        if self.device.type == "cpu":
            backward[ALLOCATOR] = update[ALLOCATOR] = _kept_by_allocator(settings.weights, backward, trained)
        loading = 4 * sum(one.numel() for one in model.parameters()) + sum(self.baseline.values())
        return Plan(settings, _ordered(backward), _ordered(update), packed.input_ids.numel(), several, loading)

    def _largest_moment(
        self, model: FakeModel, packed: Packed, groups: list[TokenGroup], settings: Settings, several: bool, fixed: int
    ) -> dict[str, int]:
        """Returns the bytes by part at the peak of a forward and backward pass; ``fixed`` are there all the time."""
        shape = self._loss_shape(model, groups, settings)
        key = (*self._key(settings), packed.input_ids.shape, settings.shards > 1, several)
        if key not in self._counts:
            dtype = footprint(shape, self.backend, self.device).gradient_dtype
            self._counts[key] = model.count(packed, dtype, self.masked, several, settings.shards > 1)
        counted = self._counts[key]
        free = None if self.memory is None else max(self.memory - fixed - sum(counted.at_loss.values()), 0)
        at_loss = counted.at_loss + Counter({LOSS: footprint(shape, self.backend, self.device, free).workspace})
        return dict(max(counted.at_peak, at_loss, key=lambda parts: sum(parts.values())))

    def largest(self, settings: Settings, group: TokenGroup, tokens: int, several: bool = True) -> Plan:
        """Plans for micro-batches of so many tokens, filled with such groups; of one group if that is larger."""
        many = [group] * (1 + tokens // row_length(*group))
        return self.plan(settings, [group] * len(next(microbatches(many, self.layout, tokens))), several)

    def choose_tokens(self, settings: Settings, group: TokenGroup) -> Plan | None:
        """Plans for the most tokens that fit ``memory``, at most ``MOST_TOKENS``; None if not even one group fits.

        Args:
            group: the largest that there may be. It is the least that a micro-batch holds.
        """
        best = self.largest(settings, group, 1)
        if not self.fits(best):
            return None
        budgets = [budget for budget in BUDGETS if budget > best.tokens]
        first, last = 0, len(budgets)  # the budgets up to ``first`` fit, those from ``last`` on do not
        while first < last:
            middle = (first + last) // 2
            plan = self.largest(settings, group, budgets[middle])
            if self.fits(plan):
                best, first = replace(plan, tokens=budgets[middle]), middle + 1
            else:
                last = middle
        return best

    def fits(self, plan: Plan) -> bool:
        """Returns whether a plan fits the memory: its step what may be used, and the model in float32 all of it."""
        return self.memory is None or (plan.total <= self.usable and self.loads(plan))

    def loads(self, plan: Plan) -> bool:
        """Returns whether the whole model in float32, as it is loaded and checked, fits the memory."""
        return self.memory is None or plan.loading <= self.memory

    def count_parameters(self) -> int:
        """Returns the number of parameters of the model."""
        return sum(one.numel() for one in self._model(Settings()).parameters())

    @property
    def usable(self) -> int:
        """Bytes of ``memory`` that a plan may take."""
        return round(self.memory * (USABLE if self.device.type == "cuda" else 1))

    def alternatives(self, settings: Settings, group: TokenGroup) -> Iterator[Plan]:
        """Yields plans that fit: one change of the settings where that is enough, else several."""
        single, changed = False, settings
        for change in _changes(settings, self.device):
            if change is None:
                continue
            if (plan := self.choose_tokens(allowed(replace(settings, **change)), group)) is not None:
                single = True
                yield plan
            changed = replace(changed, **{name: value for name, value in change.items() if name != "ranks"})
        if not single:
            for ranks in (settings.ranks, 2 * settings.ranks, 4 * settings.ranks, 8 * settings.ranks):
                plan = self.choose_tokens(allowed(replace(changed, ranks=ranks)), group)
                if plan is not None:
                    yield plan
                    return

    def _model(self, settings: Settings) -> FakeModel:
        return self._models(*self._key(settings))

    @staticmethod
    def _key(settings: Settings) -> tuple[str, bool, tuple[int, str] | None, torch.dtype]:
        """Returns what a model on fake tensors depends on."""
        adapters = None if settings.lora_rank is None else (settings.lora_rank, settings.lora_targets)
        return settings.weights, settings.gradient_checkpointing, adapters, settings.compute_dtype

    @cached_property
    def _counts(self) -> dict[tuple, LiveStorages]:
        return {}

    @cached_property
    def _models(self) -> Callable[..., FakeModel]:
        @lru_cache(maxsize=4)
        def make(
            weights: str, checkpointing: bool, adapters: tuple[int, str] | None, compute: torch.dtype
        ) -> FakeModel:
            def prepare(model: PreTrainedModel) -> None:
                if checkpointing:
                    checkpoint_layers(model)
                if adapters is not None:
                    add_adapters(model, *adapters)

            return FakeModel(lambda: self.build(weights_dtype(weights)), self.layout, compute, prepare)

        return make

    def _loss_shape(self, model: FakeModel, groups: list[TokenGroup], settings: Settings) -> LossShape:
        head = model.model.get_output_embeddings().weight
        tokens = [sum(map(len, responses)) for _, responses in groups]
        softcap = logit_options(model.model.config)["softcap"] is not None
        return LossShape(
            tokens,
            tuple(head.shape),
            settings.compute_dtype,
            head.dtype,
            softcap,
            head.requires_grad,
            settings.loss_mode,
        )

    def _temporaries(self, trained: list[nn.Parameter], settings: Settings) -> int:
        """Returns the bytes that an optimizer takes beside its states while it updates the largest weight."""
        largest = max((one.numel() for one in trained), default=0) // settings.shards
        if self.device.type == "cuda":  # a fused or compiled step has none, but for quantised moments in float32
            return 0 if settings.optimizer == "adamw" else 2 * 4 * largest
        plain = settings.optimizer == "adamw" and settings.weights == "fp32"
        return (2 if plain else EAGER_COPIES) * 4 * largest


EAGER_COPIES = 10  # float32 copies of a weight, its gradient and moments in torchao's step, which is eager on a CPU
# What glibc keeps of freed memory, in gaps between the tensors of its heap, as a share of what it holds there, by
# weights: torchao's eager step leaves more gaps (measured: docs/tuning.md). Larger tensors go back to the system.
KEPT = {"fp32": 0.31, "bf16-sr": 0.85}
LARGEST_IN_HEAP = 32 * 2**20  # bytes


def _kept_by_allocator(weights: str, parts: Mapping[str, int], trained: list[nn.Parameter]) -> int:
    """Returns the bytes that a process on a CPU holds beside its tensors."""
    sizes = [one.numel() * one.element_size() for one in trained]
    small = sum(size for size in sizes if size < LARGEST_IN_HEAP) / max(sum(sizes), 1)
    held = small * (parts.get(GRADIENTS, 0) + parts.get(STATES, 0)) + parts.get(ACTIVATIONS, 0)
    return round(KEPT[weights] * held)


def _changes(settings: Settings, device: torch.device) -> list[dict[str, object] | None]:
    """Returns changes of the settings that save memory."""
    half = {"weights": "bf16-sr", "compute_dtype": torch.bfloat16}
    return [
        None if settings.gradient_checkpointing else {"gradient_checkpointing": True},
        None if settings.weights == "bf16-sr" else half,
        {"optimizer": "adamw-8bit"} if settings.optimizer == "adamw" else None,
        {"lora_rank": 16} if settings.lora_rank is None and find_spec("peft") else None,
        *({"ranks": settings.ranks * more} for more in (2, 4, 8) if device.type == "cuda"),
    ]


def allowed(settings: Settings) -> Settings:
    """Returns the settings without what does not work on several ranks: quantised moments of bfloat16 weights."""
    if settings.shards > 1 and settings.weights == "bf16-sr":
        return replace(settings, optimizer="adamw")
    return settings


def add_adapters(model: PreTrainedModel, rank: int, targets: str) -> None:
    """Puts LoRA layers into the model, in place, and freezes the rest."""
    Adapter(model, "", ModelConfig(lora_rank=rank, lora_targets=targets)).switch(on=True)


def _bytes(tensors: object) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def _state_bytes(parameter: nn.Parameter, optimizer: str) -> int:
    per_value = QUANTISED.get(optimizer, 2 * parameter.element_size())
    return round(parameter.numel() * per_value)


def _gathered(model: PreTrainedModel) -> int:
    """Returns the bytes of weights and gradients that FSDP2 holds whole: the root's, and those of two blocks.

    The root holds embeddings, final norm and head. One block is computed while the next is gathered, and the gradient
    of one is whole until it is reduced, in float32.
    """
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    within = {id(one) for block in blocks for one in block.parameters()}
    root = _bytes(one for one in model.parameters() if id(one) not in within)
    largest = max((_bytes(block.parameters()) for block in blocks), default=0)
    trained = ([one.numel() for one in block.parameters() if one.requires_grad] for block in blocks)
    gradient = max((4 * sum(sizes) for sizes in trained), default=0)
    return root + 2 * largest + gradient


def _ordered(parts: Mapping[str, int]) -> dict[str, int]:
    return {part: parts[part] for part in PARTS if parts.get(part)}
