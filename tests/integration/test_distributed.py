"""Two real processes give the gradients of one; and heads that something is wrapped around."""

from __future__ import annotations

import copy
import importlib.util
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from onpo_fast import linear_logprobs
from onpo_fast.models.attention import attention_arguments
from onpo_fast.models.heads import head_arguments
from onpo_fast.models.scoring import LabelledPairs, PairLossOptions, ScoringModule
from onpo_fast.objectives import Onpo
from onpo_fast.packing import pack

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
WORLD = 2
PEFT = importlib.util.find_spec("peft") is not None
needs_peft = pytest.mark.skipif(not PEFT, reason="needs peft")


def tiny(tied: bool, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def with_lora(model: LlamaForCausalLM, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = {"target_modules": ["lm_head", "q_proj"], "init_lora_weights": False}  # B = 0 would hide A's gradient
    return get_peft_model(model, LoraConfig(**{"r": 4, **targets, **options}))


def batch(rank: int | None) -> dict:
    """Two groups of three responses for a process, both processes' for None."""
    g = torch.Generator().manual_seed(2)

    def tokens(n: int) -> list[int]:
        return torch.randint(97, (n,), generator=g).tolist()

    groups = [(tokens(4), [tokens(n) for n in lengths]) for lengths in ([5, 3, 1], [2, 6, 4], [3, 3, 0], [7, 1, 2])]
    pairs = torch.tensor([[0, 1], [2, 1], [0, 2]])
    lengths = torch.tensor([len(response) for _, responses in groups for response in responses])
    anchor = -300 - 4.6 * lengths + torch.randn(12, generator=g)  # 300 cancels, unless someone rounds
    preference = torch.rand(12, generator=g)
    if rank is not None:
        groups, anchor, preference = (
            x.chunk(WORLD)[rank] if isinstance(x, Tensor) else x[2 * rank : 2 * rank + 2]
            for x in (groups, anchor, preference)
        )
    return {
        "packed": pack(groups),
        "pairs": torch.cat([pairs + 3 * k for k in range(len(groups))]),
        "ref_logps": anchor,
        "preference": preference,
    }


def documented() -> dict:
    """What the page's first snippet defines."""
    names: dict = {}
    exec(SNIPPETS[0], names)
    return names


def with_loss(model: nn.Module, kind: str) -> nn.Module:
    """The page's module; the trainer's; or the same around ``linear_logprobs``: minus the mean summed log-prob."""
    if kind == "trainer":
        return ScoringModule(model)
    names = documented()

    def tokens(hidden, weight, targets, cu_seqlens, pairs, objective, ref_logps, preference, **head):
        logps = linear_logprobs(hidden, weight, targets, **head)
        return -logps.sum() / (len(cu_seqlens) - 1)

    if kind == "tokens":
        names["fused_linear_pair_loss"] = tokens
    return names["WithLoss"](model, Onpo(eta=2.0))


def for_trainer(batch: dict) -> dict:
    """A batch as arguments of ``ScoringModule``."""
    columns = (batch["preference"].tolist(), [1.0] * len(batch["pairs"]), batch["ref_logps"].tolist())
    labelled = LabelledPairs.make(batch["pairs"].tolist(), *columns)
    return {"packed": batch["packed"], "labelled": labelled, "loss": PairLossOptions(Onpo(eta=2.0))}


def gradients(module: nn.Module, batch: dict, kind: str) -> dict[str, Tensor]:
    """After a scoring pass, a step of SGD and another backward pass, so that stale weights would show."""
    batch = for_trainer(batch) if kind == "trainer" else batch
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(2):
        if step:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            module(**batch)
        out = module(**batch)
        (out if isinstance(out, Tensor) else out.loss).backward()
    whole = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            g = parameter.grad
            name = name.removeprefix("module.")
            whole[name] = (g.full_tensor() if isinstance(g, DTensor) else g).float()
    return whole


def model_of(head: str) -> LlamaForCausalLM:
    return with_lora(tiny(tied=False)).get_base_model() if head == "lora" else tiny(tied=head == "tied")


def by_snippet(number: int) -> Callable:
    def build(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
        names = {"WithLoss": lambda model, objective: wrap(model), "model": model, "objective": None}
        exec(SNIPPETS[number], names)
        return names["trained"]

    return build


def by_own_group(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    fully_shard(model.lm_head)
    return by_snippet(2)(model, wrap)


def by_half_precision(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    return fully_shard(wrap(model), mp_policy=policy)


SCENARIOS = [
    (way, head, kind)
    for way, heads in {
        "ddp": ["untied", "tied", "lora"],
        "fsdp": ["untied", "tied", "lora"],
        "own group": ["untied"],
        "bf16": ["untied"],
    }.items()
    for head in heads
    if head != "lora" or PEFT
    for kind in ("pairs", "tokens", "trainer")
]
WAYS = {"ddp": by_snippet(1), "fsdp": by_snippet(2), "own group": by_own_group, "bf16": by_half_precision}


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def work(rank: int, directory: str) -> None:
    """One of the two processes: every scenario, then what is refused. Writes what it saw."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    try:
        seen: dict = {}
        for way, head, kind in SCENARIOS:
            module = WAYS[way](model_of(head), lambda model, kind=kind: with_loss(model, kind))
            seen[way, head, kind] = gradients(module, batch(rank), kind)
        casting = fully_shard(ScoringModule(tiny(False)), mp_policy=MixedPrecisionPolicy(torch.bfloat16))
        seen["inputs that are cast"] = refusal(lambda: casting(**for_trainer(batch(rank))))
        sharded = tiny(tied=False)
        fully_shard(sharded)
        seen["a sharded head outside"] = refusal(lambda: head_arguments(sharded))
        seen["the model alone under DDP"] = refusal(lambda: head_arguments(DistributedDataParallel(tiny(True))))
        torch.save(seen, f"{directory}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Iterator[list[dict]]:
    """What each process saw. They have two minutes, however busy the machine."""
    directory = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # FSDP2 would put its shards on a GPU
        context = torch.multiprocessing.spawn(work, (str(directory),), nprocs=WORLD, join=False)
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the processes did not finish"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(directory / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=" ".join)
def test_two_processes_give_the_gradients_of_one(scenario: tuple[str, str, str], seen: list[dict]) -> None:
    """Of the mean over all pairs, since both hold equally many."""
    way, head, kind = scenario
    want = gradients(with_loss(model_of(head), kind), batch(None), kind)
    assert "model.lm_head.weight" in want or head != "untied"
    for process in seen:
        assert process[scenario].keys() == want.keys()
        for name, gradient in want.items():
            error = float((process[scenario][name] - gradient).norm() / gradient.norm())
            # bf16 has 8 bits, and a sum of log-probs that had been rounded to it would be off by far more
            assert error < (0.05 if way == "bf16" else 1e-5), name


def test_a_loss_outside_the_wrapped_forward_is_refused(seen: list[dict]) -> None:
    for process in seen:
        assert re.search(r"Linear, is sharded here .*inside the forward", process["a sharded head outside"])
        assert re.search("DistributedDataParallel must go around", process["the model alone under DDP"])


def test_anchors_log_probs_in_half_precision_are_refused(seen: list[dict]) -> None:
    """FSDP2 casts the arguments of a forward unless it is told not to."""
    for process in seen:
        assert "ref_logps" in process["inputs that are cast"]


# ---------------------------------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------------------------------


def fused(model: nn.Module, batch: dict, head: dict) -> Tensor:
    """(N,) log-probs through ``head_arguments``."""
    packed = batch["packed"]
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    output = causal.base_model(input_ids=packed.input_ids, **attention_arguments(causal, packed))
    states = output.last_hidden_state.flatten(0, 1)[packed.rows]
    return linear_logprobs(states, targets=packed.targets, **head)


def materialised(model: nn.Module, batch: dict) -> Tensor:
    """(N,) log-probs from the model's own logits, whatever is wrapped around its head."""
    packed = batch["packed"]
    output = model(input_ids=packed.input_ids, **attention_arguments(model, packed))
    logits = output.logits.flatten(0, 1)[packed.rows]
    return F.log_softmax(logits, -1).gather(1, packed.targets[:, None])[:, 0]


def agree(model: nn.Module) -> list[str]:
    """Values and gradients, ours and the model's own; names of what has a gradient."""
    data = batch(None)
    upstream = torch.randn(len(data["packed"].targets), generator=torch.Generator().manual_seed(3))
    results = []
    for logps in (lambda: fused(model, data, head_arguments(model)), lambda: materialised(model, data)):
        model.zero_grad()
        values = logps()
        if values.requires_grad:
            values.backward(upstream)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"values": values.detach(), **found})
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-5 * value.norm(), name
    return list(ours)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_plain_head_is_taken_as_it_is(tied: bool) -> None:
    model = tiny(tied)
    arguments = head_arguments(model)
    assert arguments["weight"] is model.lm_head.weight
    assert (arguments["weight"] is model.model.embed_tokens.weight) == tied
    assert arguments["bias"] is None
    agree(model)


@needs_peft
class TestPeft:
    def test_an_untouched_head(self) -> None:
        model = with_lora(tiny(False), target_modules=["q_proj"])
        assert head_arguments(model)["weight"] is model.get_base_model().lm_head.weight
        agree(model)

    @pytest.mark.parametrize(
        "options",
        [{}, {"use_rslora": True}, {"lora_alpha": 0.5, "r": 1}],
        ids=["plain", "rank-stabilised", "rank one"],
    )
    def test_lora_is_folded_in(self, options: dict) -> None:
        names = agree(with_lora(tiny(False), **options))
        for matrix in "AB":
            assert any(f"lm_head.lora_{matrix}" in name for name in names)
        assert not any("lm_head.base_layer" in name for name in names)  # frozen

    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
    def test_lora_on_a_tied_head(self) -> None:
        agree(with_lora(tiny(True)))

    def test_bias(self) -> None:
        model = tiny(False)
        model.lm_head = nn.Linear(32, 97)
        adapted = with_lora(model, lora_bias=True, target_modules=["lm_head"])
        nn.init.normal_(adapted.get_base_model().lm_head.lora_B["default"].bias)
        assert any("lm_head.lora_B.default.bias" in name for name in agree(adapted))

    def test_two_adapters_at_once(self) -> None:
        model = with_lora(tiny(False))
        config = copy.copy(model.peft_config["default"])
        config.r, config.lora_alpha = 2, 3
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
        assert sum("lm_head" in name for name in agree(model)) == 4
        model.set_adapter("other")
        assert sum("lm_head" in name for name in agree(model)) == 2

    def test_adapters_that_are_off_or_merged(self) -> None:
        model = with_lora(tiny(False))
        base = model.get_base_model().lm_head.base_layer.weight
        with model.disable_adapter():
            assert head_arguments(model)["weight"] is base
        model.merge_adapter()
        assert head_arguments(model)["weight"] is base
        agree(model)
        with model.disable_adapter(), pytest.raises(ValueError, match="disabled and merged: call unmerge_adapter"):
            head_arguments(model)

    def test_a_saved_head(self) -> None:
        model = with_lora(tiny(False), target_modules=["q_proj"], modules_to_save=["lm_head"])
        head = model.get_base_model().lm_head
        assert head_arguments(model)["weight"] is head.modules_to_save["default"].weight
        assert any("lm_head.modules_to_save" in name for name in agree(model))
        with model.disable_adapter():
            assert head_arguments(model)["weight"] is head.original_module.weight

    def test_the_sum_is_rounded_once(self) -> None:
        """Not in autocast's precision, nor in that of a bf16 weight before the sum."""
        model = with_lora(tiny(False))
        want = head_arguments(model)["weight"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(head_arguments(model)["weight"], want)
        base = model.get_base_model().lm_head.base_layer
        base.weight.data = base.weight.data.bfloat16().float()
        want = head_arguments(model)["weight"].bfloat16()
        base.bfloat16()
        assert torch.equal(head_arguments(model)["weight"], want)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lora_dropout": 0.1}, "adapter 'default' of the LM head has dropout 0.1.*set lora_dropout to 0"),
            ({"use_dora": True}, "adapter 'default' of the LM head is a LoRA variant, DoraLinearVariant"),
        ],
        ids=["dropout", "DoRA"],
    )
    def test_lora_that_is_no_constant_term(self, options: dict, message: str) -> None:
        model = with_lora(tiny(False), **options).train()
        with pytest.raises(ValueError, match=message):
            head_arguments(model)

    def test_dropout_that_is_off(self) -> None:
        agree(with_lora(tiny(False), lora_dropout=0.1).eval())

    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
    def test_other_tuners(self) -> None:
        from peft import LoHaConfig, TrainableTokensConfig, get_peft_model

        model = get_peft_model(tiny(False), LoHaConfig(target_modules=["lm_head"]))
        with pytest.raises(ValueError, match=r"wrapped in peft's loha\.layer\.Linear; only LoRA"):
            head_arguments(model)
        model = get_peft_model(tiny(True), TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]))
        with pytest.raises(ValueError, match=r"wrapped in peft's .*TrainableTokens"):
            head_arguments(model)

    def test_a_quantised_base(self) -> None:
        model = with_lora(tiny(False))
        base = model.get_base_model().lm_head.base_layer
        base.weight = nn.Parameter(base.weight.to(torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=r"Linear, is quantised \(torch.int8\)"):
            head_arguments(model)


class Packed4bit(Tensor):
    """As quantisers have them: claims a dtype that it does not hold."""


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Identity(), "the LM head, Identity, has no weight"),
        (nn.LayerNorm(32), r"LayerNorm, has a weight of shape \(32,\), not \(V, H\)"),
        (nn.Conv1d(32, 97, 1), r"Conv1d, has a weight of shape \(97, 32, 1\)"),
        (nn.Linear(32, 97).to(torch.float8_e4m3fn), r"Linear, is quantised \(torch.float8_e4m3fn\)"),
    ],
    ids=["no weight", "one dimension", "three dimensions", "eight bits"],
)
def test_heads_that_are_not_linear(head: nn.Module, message: str) -> None:
    model = tiny(False)
    model.lm_head = head
    with pytest.raises(ValueError, match=message):
        head_arguments(model)


def test_other_refusals() -> None:
    model = tiny(False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Packed4bit))
    with pytest.raises(ValueError, match="Linear, holds a Packed4bit, not an ordinary tensor"):
        head_arguments(model)
    with pytest.raises(ValueError, match="LlamaModel has no LM head"):
        head_arguments(LlamaModel(model.config))
    with pytest.raises(ValueError, match="DataParallel must go around"):
        head_arguments(nn.DataParallel(model))
