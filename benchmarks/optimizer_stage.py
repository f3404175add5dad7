"""Time the optimizer stage: look for non-finite gradients, clip, update, and write the weights back.

Sides, stepped by turns on the same gradients: Lightning's bf16-mixed (FP32 weights and gradients), BF16 weights with
FP32 states updated directly (what Lightning's bf16-true does to the weights, with states that it does not have), and
ours with ``copy`` and ``split``, whose gradients stay in BF16 until the step. Each side does what its plugin does
between backward and the next forward. Medians over rounds, and ratios of neighboring rounds. What updated the
masters of ours, the fused kernel or the generic path and why, is printed and written beside them.

Run: ``python -m benchmarks.optimizer_stage [--device cpu|cuda] [--params 1e9] [--rounds 20] [--out FILE]``.
Writes ``benchmarks/results/optimizer-stage-<device>.json`` unless ``--out`` names another file.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_mp
from lightning_mp.grad_scaler import GradientUnscaler
from lightning_mp.master_weights import MasterWeights

WIDTH = {"cpu": 1024, "cuda": 4096}
DEFAULT_PARAMS = {"cpu": 2.5e7, "cuda": 1e9}
MAX_NORM = 1.0
WARMUP = 3
TARGETS = {("split", "lightning bf16-mixed"): {"cuda": 0.75}, ("split", "copy"): {"cpu": 1.10, "cuda": 1.10}}


def build(device: str, num_params: float) -> nn.Module:
    width = WIDTH[device]
    layers = max(1, round(num_params / width**2))
    with torch.device(device):
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def fill_gradients(module: nn.Module) -> None:
    for param in module.parameters():
        param.grad = (torch.randn(param.shape, device=param.device) * 1e-3).to(param.grad_dtype or param.dtype)


def lightning_mixed(device: str, num_params: float, fused: bool) -> Callable[[], None]:
    module = build(device, num_params)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=fused)
    fill_gradients(module)

    def stage() -> None:
        nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
        optimizer.step()

    return stage


def bf16_true(device: str, num_params: float, fused: bool) -> Callable[[], None]:
    module = build(device, num_params).bfloat16()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=False)
    fill_gradients(module)
    for param in module.parameters():
        optimizer.state[param] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(param, dtype=torch.float32),
            "exp_avg_sq": torch.zeros_like(param, dtype=torch.float32),
        }

    def stage() -> None:
        nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
        with torch.no_grad():
            for param in module.parameters():  # torch's AdamW refuses states of another dtype
                adamw_(param, optimizer.state[param])

    return stage


def adamw_(param: nn.Parameter, state: dict[str, Tensor], lr: float = 1e-4) -> None:
    state["step"] += 1
    step = float(state["step"])
    grad = param.grad.float()
    state["exp_avg"].lerp_(grad, 0.1)
    state["exp_avg_sq"].mul_(0.999).addcmul_(grad, grad, value=0.001)
    denominator = (state["exp_avg_sq"] / (1 - 0.999**step)).sqrt_().add_(1e-8)
    param.mul_(1 - lr * 0.01).sub_((state["exp_avg"] / denominator).mul_(lr / (1 - 0.9**step)))


def ours(mode: str) -> Callable[[str, float, bool], Callable[[], None]]:
    def make(device: str, num_params: float, fused: bool) -> Callable[[], None]:
        module = build(device, num_params)
        masters = MasterWeights(mode)  # type: ignore[arg-type]
        masters.convert_(module)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=fused)
        masters.attach([optimizer], accumulates=False)
        fill_gradients(module)
        masters.gradients.defers = True  # as in automatic optimization: only the step follows the clip
        unscaler = GradientUnscaler(None)

        def stage() -> None:
            unscaler.unscale_(optimizer)
            masters.gradients.clip_norm_(module.parameters(), MAX_NORM)
            optimizer.step()
            unscaler.finish(optimizer)

        stage.path = lambda: masters.step_path(optimizer)  # type: ignore[attr-defined]
        return stage

    return make


SIDES: dict[str, Callable[[str, float, bool], Callable[[], None]]] = {
    "lightning bf16-mixed": lightning_mixed,
    "bf16 weights, fp32 states": bf16_true,
    "copy": ours("copy"),
    "split": ours("split"),
}


def timed(stage: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    stage()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def run(
    device: str, num_params: float, rounds: int, *, fused: bool, paths: dict[str, str] | None = None
) -> dict[str, list[float]]:
    """Return the times of each side; put into ``paths`` what updated the masters of ours."""
    stages = {name: make(device, num_params, fused) for name, make in SIDES.items()}
    times: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(WARMUP + rounds):
        for name, stage in stages.items():
            times[name].append(timed(stage, device))
    if paths is not None:
        paths.update({name: stage.path() for name, stage in stages.items() if hasattr(stage, "path")})
    return {name: values[WARMUP:] for name, values in times.items()}


def ratio(times: dict[str, list[float]], left: str, right: str) -> float:
    return statistics.median(a / b for a, b in zip(times[left], times[right], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--params", type=float)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    num_params = arguments.params or DEFAULT_PARAMS[arguments.device]
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "lightning_mp": lightning_mp.__version__,
        "params": num_params,
        "rounds": arguments.rounds,
        "optimizers": {},
    }
    for kind, fused in (("fused", True), ("default", False)):
        paths: dict[str, str] = {}
        times = run(arguments.device, num_params, arguments.rounds, fused=fused, paths=paths)
        medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
        ratios = {f"{left} / {right}": ratio(times, left, right) for left, right in TARGETS}
        report["optimizers"][kind] = {"median_ms": medians, "ratios": ratios, "paths": paths}
        print(f"AdamW ({kind}), {num_params:.2g} parameters")
        for name, value in medians.items():
            print(f"  {name:<28} {value:10.2f} ms  {paths.get(name, '')}".rstrip())
        for (left, right), bounds in TARGETS.items():
            bound = bounds.get(arguments.device)
            found = ratios[f"{left} / {right}"]
            verdict = "" if bound is None else f"  <= {bound:.2f} {'met' if found <= bound else 'MISSED'}"
            print(f"  {left} / {right:<24} {found:6.3f}{verdict}")
    out = arguments.out or Path(__file__).parent / "results" / f"optimizer-stage-{arguments.device}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
