"""What bounds the models: the measured ceilings of products and copies, and one Linear layer in FP8 against BF16."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.contenders import CONTENDERS, why_not
from benchmarks.gpu.timing import free_memory, set_tf32, time_calls
from lightning_mp.fp8 import FP8Config, FP8Engine

WIDTHS = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
ROWS = 8192
GEMM_SIZE = 8192
COPY_BYTES = 4 * 2**30
RECIPES = ("current", "delayed", "block")


def ceilings(device: torch.device, *, size: int = GEMM_SIZE, copy_bytes: int = COPY_BYTES) -> dict[str, Any]:
    """Measure square products of random data in TFLOP/s and a device-to-device copy in TB/s, read plus written.

    Keys are the contenders' formats; a format that this device does not have is ``None``.
    """
    found: dict[str, Any] = {}
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "fp32": lambda: _product(size, torch.float32, device),
        "tf32": lambda: _product(size, torch.float32, device),
        "fp16": lambda: _product(size, torch.float16, device),
        "bf16": lambda: _product(size, torch.bfloat16, device),
        "fp8": lambda: _fp8_product(size, device),
    }
    for name, make in makers.items():
        if name == "tf32" and device.type != "cuda":
            found[name] = None
            continue
        set_tf32(name == "tf32")
        try:
            milliseconds = time_calls(make(), device, warmup=5, repeats=20)
            found[name] = 2 * size**3 / milliseconds / 1e9
        except (RuntimeError, NotImplementedError) as error:
            print(f"ceiling of {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            found[name] = None
        finally:
            set_tf32(False)
    source = torch.randn(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    milliseconds = time_calls(partial(target.copy_, source), device, warmup=3, repeats=20)
    found["copy_tb_s"] = 2 * copy_bytes / milliseconds / 1e9
    found["size"] = size
    return found


def _product(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    return lambda: torch.matmul(a, b, out=out)


def _fp8_product(size: int, device: torch.device) -> Callable[[], Tensor]:
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def linear_widths(
    device: torch.device, widths: tuple[int, ...] = WIDTHS, *, rows: int = ROWS, repeats: int = 30
) -> dict[str, Any]:
    """Time forward and backward of one square Linear with BF16 weights, in BF16 and in each FP8 recipe.

    The weight is cast to FP8 in every call, as in a step without accumulation.
    """
    fp8 = next(c for c in CONTENDERS if c.kind == "ours" and c.precision == "fp8")
    missing = why_not(fp8, device)
    found: list[dict[str, Any]] = []
    for width in widths:
        row: dict[str, Any] = {"width": width}
        for recipe in ("bf16", *(() if missing else RECIPES)):
            free_memory(device)
            row[recipe] = _time_linear(width, rows, recipe, device, repeats)
        found.append(row)
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    return {"rows": rows, "milliseconds": found, "reason": missing}


def _time_linear(width: int, rows: int, recipe: str, device: torch.device, repeats: int) -> float:
    torch.manual_seed(0)
    with torch.device(device):
        layer = nn.Sequential(nn.Linear(width, width, bias=False)).bfloat16()
        x = torch.randn(rows, width, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(rows, width, dtype=torch.bfloat16)
    engine = None
    if recipe != "bf16":
        backend = "transformer_engine" if device.type == "cuda" else "emulated"
        engine = FP8Engine(FP8Config(recipe=recipe, backend=backend, skip_output_head=False))
        engine.convert_(layer)

    def step() -> None:
        x.grad = layer[0].weight.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            if engine is None:
                y = layer(x)
            else:
                with engine.autocast_context():
                    y = layer(x)
        y.backward(grad)
        if engine is not None:
            engine.on_optimizer_step()

    try:
        return time_calls(step, device, warmup=5, repeats=repeats)
    finally:
        if engine is not None:
            engine.revert_()
