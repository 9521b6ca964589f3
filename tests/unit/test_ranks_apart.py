"""What ranks share, without other processes: shares, micro-batches, tensors on disk, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh

from onpo_fast.batches import split
from onpo_fast.config import Config, ModelConfig
from onpo_fast.data import Group, Pair, Response
from onpo_fast.distributed import World, _is_alive, joined, rank_device
from onpo_fast.errors import UserError
from onpo_fast.models.loading import check_saved, load
from onpo_fast.models.policy import Policy
from onpo_fast.models.sharding import ShardedPolicy, check_shardable
from onpo_fast.opening import check_ranks, open_run
from onpo_fast.packing import pack
from onpo_fast.run.shards import OFFSETS, StoredShards, copy_shards, write_shards
from onpo_fast.train import continuation


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 16])
def test_every_item_has_one_rank(count: int, size: int) -> None:
    items = list(range(count))
    worlds = [World(rank, size) for rank in range(size)]
    assert [one for world in worlds for one in items[world.share(count)]] == items
    assert sorted(one for world in worlds for one in world.deal(items)) == items
    shares = [len(items[world.share(count)]) for world in worlds]
    assert max(shares) - min(shares) <= 1


def test_outside_torchrun_there_is_a_world_of_one(monkeypatch) -> None:
    """Also where a cluster sets the variables of PyTorch's own launcher."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    with joined() as world:
        assert (world.rank, world.size) == (0, 1)
        assert world.from_main(lambda one: one + 1, 2) == 3
        assert world.gather("a") == world.gather_on_all("a") == ["a"]
        assert world.largest(7) == 7


@pytest.fixture
def batch() -> tuple[list[Group], dict[int, list[Pair]]]:
    """Five groups of two responses."""
    groups = [
        Group([], [1] * (3 + g), [Response("", [4, 5], "eos", -1.0), Response("", [6], "eos", -1.0)]) for g in range(5)
    ]
    return groups, {g: [Pair(g, 0, 1, 0.7, 1.0)] for g in range(5)}


@pytest.mark.parametrize(("ranks", "expected"), [(1, 1), (2, 2), (4, 4), (5, 5), (8, 5)])
def test_micro_batches_are_enough_for_the_ranks(policy: Policy, batch, ranks: int, expected: int) -> None:
    groups, pairs = batch
    parts = split(policy, groups, pairs, 10**6, ranks)
    assert len(parts) == expected
    assert sorted(g for part in parts for g in part) == list(pairs)
    assert max(map(len, parts)) - min(map(len, parts)) <= 2


@pytest.mark.parametrize("tokens", [1, 16, 24, 32, 10**6])
def test_micro_batches_are_divided_in_order(policy: Policy, batch, tokens: int) -> None:
    groups, pairs = batch
    alone, shared = (split(policy, groups, pairs, tokens, ranks) for ranks in (1, 2))
    assert [g for part in shared for g in part] == [g for part in alone for g in part]
    assert len(alone) <= len(shared) <= len(alone) + 1
    assert len(shared) % 2 == 0 or len(shared) == len(pairs)


def test_rows_are_put_together_from_the_files_of_other_ranks(tmp_path) -> None:
    whole = torch.arange(21.0).reshape(7, 3)
    for rank, rows in enumerate((slice(0, 3), slice(3, 6), slice(6, 7))):
        offsets = json.dumps({"moment.w": {"saved_offsets": [rows.start, 0]}})
        save_file({"moment.w": whole[rows].clone()}, tmp_path / f"{rank}.safetensors", {OFFSETS: offsets})
    files = sorted(tmp_path.iterdir())
    assert torch.equal(StoredShards(files).rows_of("moment.w", torch.empty(7, 3)), whole)
    with pytest.raises(ValueError, match="lacks rows"):
        StoredShards(files[:2]).rows_of("moment.w", torch.empty(7, 3))
    with pytest.raises(ValueError, match="shape"):
        StoredShards(files).rows_of("moment.w", torch.empty(7, 4))
    with pytest.raises(ValueError, match="shape"):
        StoredShards(files).rows_of("moment.w", torch.empty(6, 3))


def test_a_process_alone_writes_the_same_format(tmp_path) -> None:
    tensors = {"model.w": torch.rand(3, 2), "step.w": torch.tensor(4.0)}
    write_shards(tmp_path / "rank_00000.safetensors", copy_shards(tensors))
    stored = StoredShards([tmp_path / "rank_00000.safetensors"])
    assert torch.equal(stored.rows_of("model.w", tensors["model.w"]), tensors["model.w"])
    assert torch.equal(stored.whole("step.w"), tensors["step.w"])


def test_a_saved_policy_that_differs_from_memory_is_refused(tiny_model, tmp_path) -> None:
    """As where weights were rounded on their way to the disk."""
    config = ModelConfig(device="cpu")
    policy = load(tiny_model, config)
    policy.save(tmp_path / "policy")
    check_saved(tmp_path / "policy", policy, config)
    with torch.no_grad():
        weight = policy.model.model.layers[1].mlp.up_proj.weight
        weight += weight * 2**-9  # less than half the spacing of bfloat16
    with pytest.raises(UserError, match=r"not saved as it is in memory \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        check_saved(tmp_path / "policy", policy, config)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def test_a_sharded_policy_is_gathered_from_its_rows(tiny_model, mesh: DeviceMesh) -> None:
    """In float32 under autocast, of a tied model; not from the copies that a forward pass without backward leaves."""
    policy = load(tiny_model, ModelConfig(device="cpu", dtype="bfloat16"))
    assert policy.model.config.tie_word_embeddings
    before = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    sharded = ShardedPolicy.of(policy, mesh)
    rows = list(sharded.model.parameters())  # as the optimizer has them
    with torch.no_grad(), sharded.autocast():
        sharded.scoring(pack([([1, 2, 3], [[4, 5], [6]])], "separate"))
        for parameter in rows:
            parameter.mul_(1 + 2**-12)
    whole = sharded.whole()
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, before[name] * (1 + 2**-12)), name
    assert whole.model.get_output_embeddings().weight is whole.model.get_input_embeddings().weight


def test_weights_of_two_dtypes_are_refused_before_sampling(tiny_model, tmp_path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(9)))
    config = Config(model=str(tiny_model), prompts=str(prompts), out=str(tmp_path / "run"), batch_pairs=200)
    policy = load(tiny_model, ModelConfig(device="cpu"))
    check_shardable(policy)
    policy.model.model.norm.bfloat16()
    with pytest.raises(UserError, match="--weights bf16-sr: a model of the family llama keeps some weights"):
        check_shardable(policy)
    refuse = mock.Mock(side_effect=UserError("no"))
    with mock.patch("onpo_fast.opening.check_shardable", refuse), pytest.raises(UserError, match=r"^no$"):
        open_run(config, world=AsOneOfTwo())
    assert not (tmp_path / "run").exists()


class AsOneOfTwo(World):
    """Rank 0 of two, whose calls for the other go nowhere."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def from_main(self, function, *arguments):
        return function(*arguments)


@pytest.mark.parametrize(("size", "here", "launcher"), [(8, 8, "--nproc-per-node 8"), (16, 8, "--nnodes 2 ")])
def test_the_command_that_goes_on_has_the_nodes(monkeypatch, size: int, here: int, launcher: str) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    line = continuation(Config(out="runs/a b"), size)
    assert line.startswith(f"torchrun {launcher}")
    assert f"--nproc-per-node {here} -m onpo_fast.train --resume --out 'runs/a b'" in line


@pytest.mark.parametrize("has_proc", [True, False])
def test_a_process_is_alive_until_it_ends(monkeypatch, has_proc: bool) -> None:
    """A zombie is seen with /proc only."""
    if not has_proc:
        monkeypatch.setattr("builtins.open", mock.Mock(side_effect=FileNotFoundError))
        monkeypatch.setattr("os.path.exists", lambda path: False)
    child = os.fork()
    if child == 0:
        signal.pause()
    assert _is_alive(child)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert _is_alive(child) == (not has_proc)
    os.waitpid(child, 0)
    assert not _is_alive(child)


@pytest.mark.parametrize("device", ["cuda:1", "cpu:0"])
def test_ranks_cannot_share_a_device(device: str) -> None:
    with pytest.raises(UserError, match=f"^--device {device}: under torchrun each rank takes a GPU of its own"):
        rank_device(device, 0)


def test_more_ranks_than_gpus(monkeypatch) -> None:
    monkeypatch.setattr("onpo_fast.distributed.device_of", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="give --nproc-per-node 2"):
        rank_device("auto", 2)


@pytest.mark.parametrize(
    ("options", "prompts"),
    [
        ({"batch_pairs": 30, "responses_per_prompt": 4}, 5),
        ({"batch_pairs": 30, "responses_per_prompt": 4, "pairing": "iid"}, 15),
        ({"batch_pairs": 30, "responses_per_prompt": 4, "pairing": "best_worst"}, 30),
        ({"batch_pairs": 30, "responses_per_prompt": 4, "objective": "sppo"}, 8),
        ({"batch_pairs": 30, "prompts_per_iteration": 3}, 3),
    ],
)
def test_a_step_has_a_prompt_for_each_rank(options: dict, prompts: int) -> None:
    check_ranks(Config(**options), prompts)
    with pytest.raises(UserError, match=f"^--batch_pairs 30 .* fewer than the {prompts + 1} ranks"):
        check_ranks(Config(**options), prompts + 1)


@pytest.mark.parametrize("minutes", [0, -1, float("inf"), 1e9])
def test_a_time_out_that_cannot_be(minutes: float) -> None:
    with pytest.raises(UserError, match=r"^--rank_timeout must"):
        Config(rank_timeout=minutes)
