"""Random draws of tokens: the kernel beside the numpy form, which it equals bit for bit under the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from support.tiny_models import make_model

from onpo_fast.config import Config, SamplingConfig
from onpo_fast.kernels import noise, sampled_tokens
from onpo_fast.models.loading import load
from onpo_fast.sampling import LocalSampler, draw


@triton.jit
def gumbel_kernel(keys, out, position, start, count, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    value = sampled_tokens.gumbel(tl.load(keys + row), position, start, BLOCK)
    tl.store(out + row * count + at, value, mask=at < count)


def random_keys(rows: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(1))


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same bits under the interpreter; a GPU's logarithm may differ in the last one."""
    if got.is_cuda:
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize(("position", "start"), [(0, 0), (1, 4), (16, 151936), (2**31 - 1, 8192)])
@pytest.mark.parametrize("count", [1, 997, 4096])
def test_noise(position: int, start: int, count: int, device: str) -> None:
    keys = random_keys(5)
    out = torch.empty(5, count, device=device)
    gumbel_kernel[(5,)](keys.to(device), out, position, start, count, BLOCK=max(4, triton.next_power_of_2(count)))
    same(out, torch.from_numpy(noise.gumbel(keys.numpy(), position, start, count)))


@pytest.mark.parametrize("restricted", [False, True], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 2), (4, 4099), (1, 16384), (5, 49152), (2, 151_937)])
def test_tokens_and_log_probs(rows: int, vocabulary: int, dtype: torch.dtype, restricted: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    wide = torch.randn(rows, vocabulary + 3, generator=generator).mul(4).to(dtype)
    logits = wide[:, 3:]  # rows that are not back to back, and no address aligned
    logits[:, 1::3] = -torch.inf
    logits[0, 1:] = -torch.inf  # one finite logit
    allowed = torch.rand(rows, vocabulary, generator=generator) < 0.5 if restricted else None
    if restricted:
        allowed[:, 0] = True
    on_device = None if allowed is None else allowed.to(device)
    keys = random_keys(rows)
    for position, temperature in ((0, 1.0), (1, 0.7)):
        tokens, logps = sampled_tokens.draw(wide.to(device)[:, 3:], keys.to(device), position, temperature, on_device)
        want, want_logps = noise.draw(logits, keys, position, temperature, allowed)
        assert torch.equal(tokens.cpu(), want)
        torch.testing.assert_close(logps.cpu(), want_logps, rtol=1e-5, atol=1e-5)  # summed in another order
        drawn = logits.gather(1, want[:, None])[:, 0]
        assert drawn.isfinite().all()
        assert want[0] == 0
        if restricted:
            assert allowed.gather(1, want[:, None]).all()


def test_columns_apart_and_one_row_for_all(device: str) -> None:
    wide = torch.randn(6, 2000, generator=torch.Generator().manual_seed(0))
    keys = random_keys(6)
    for view in (lambda x: x[:, ::2], lambda x: x[:1].expand(6, -1)):
        tokens, logps = sampled_tokens.draw(view(wide.to(device)), keys.to(device), 2)
        want, want_logps = noise.draw(view(wide), keys, 2)
        assert torch.equal(tokens.cpu(), want)
        torch.testing.assert_close(logps.cpu(), want_logps, rtol=1e-5, atol=1e-5)  # summed in another order


def test_every_row_at_its_own_position(device: str) -> None:
    logits, keys = torch.randn(5, 3000, generator=torch.Generator().manual_seed(0)), random_keys(5)
    positions = torch.tensor([7, 0, 2**31 - 1, 7, 130])
    want, want_logps = noise.draw(logits, keys, positions)
    columns = torch.stack([positions, keys, positions + 1, keys + 1], 1).to(device)  # as the decode loop passes them
    for streams, places in ((keys.to(device), positions.to(device)), (columns[:, 1], columns[:, 0])):
        tokens, logps = sampled_tokens.draw(logits.to(device), streams, places)
        assert torch.equal(tokens.cpu(), want)
        torch.testing.assert_close(logps.cpu(), want_logps, rtol=1e-5, atol=1e-5)  # summed in another order
    for row, position in enumerate(positions.tolist()):
        r = slice(row, row + 1)
        assert noise.draw(logits[r], keys[r], position)[0] == want[row]


def test_nan_is_never_drawn(device: str) -> None:
    logits = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(0))
    logits[0, 7] = logits[1, 17_000] = float("nan")
    keys = random_keys(3)
    tokens, logps = sampled_tokens.draw(logits.to(device), keys.to(device), 0)
    want, want_logps = noise.draw(logits, keys, 0)
    assert torch.equal(tokens.cpu(), want)
    assert logits.gather(1, want[:, None]).isfinite().all()
    assert logps.isnan().tolist() == want_logps.isnan().tolist() == [True, True, False]


def test_no_rows(device: str) -> None:
    empty = torch.zeros(0, 7, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    tokens, logps = sampled_tokens.draw(*empty, 0)
    assert tokens.shape == logps.shape == (0,)


def test_a_row_without_a_finite_logit_is_not_a_number(device: str) -> None:
    tokens, logps = sampled_tokens.draw(torch.full((1, 100), -torch.inf, device=device), random_keys(1).to(device), 0)
    want, want_logps = noise.draw(torch.full((1, 100), -torch.inf), random_keys(1), 0)
    assert tokens.item() == want.item() == 0
    assert logps.isnan().all()
    assert want_logps.isnan().all()


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_whole_sampler_draws_the_same_tokens(
    top_p: float, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that come and go, on the same device with the kernel and with numpy."""
    prompts = [[{"role": "user", "content": text}] for text in ("Hi", "Name a fruit.", "Is it far?")]
    make_model(tmp_path / "model")
    policy = load(tmp_path / "model", Config(device=device))
    config = SamplingConfig(max_new_tokens=6, sampling_batch_size=4, top_p=top_p)
    drawn = []
    for function in (sampled_tokens.draw, noise.draw):
        used = []
        monkeypatch.setattr(draw, "draw_function", lambda device, f=function, u=used: lambda *a: u.append(f) or f(*a))
        groups = LocalSampler(policy, config)(prompts, 3, [0, 7])
        assert len(used) >= 6
        drawn.append([response.tokens for group in groups for response in group.responses])
    assert drawn[0] == drawn[1]
    assert len({tuple(tokens) for tokens in drawn[0]}) == 9
