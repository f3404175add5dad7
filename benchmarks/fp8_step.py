"""Time a training step in FP8: our wrapper against a hand-written Transformer Engine loop, and against BF16.

Three copies of one stack of MLP blocks train by turns in one process, a few steps each:

- ``bf16``: ``nn.Linear`` in an autocast region;
- ``library``: ``te.Linear`` in ``te.autocast``, written by hand, with ``is_first_microbatch`` for its weight cache;
- ``ours``: ``nn.Linear`` converted by ``FP8Engine``.

Each round gives one ratio of step times; the table shows the median and the quartiles. Steps are timed with CUDA
events, on a CPU (where only ``bf16`` and the emulated backend run, to try the script) with a clock.

Run: ``python -m benchmarks.fp8_step [--recipe current] [--width 4096] [--rows 8192] [--accumulate 1]``.
Writes ``benchmarks/results/fp8_step-<device>.json`` unless ``--out`` names another file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_mp
from lightning_mp.fp8 import FP8Config, FP8Engine

WRAPPER_TARGET = 1.02
WARMUP_STEPS = 10


class Block(nn.Module):
    """Two linear layers of the shape of a transformer's MLP, with a residual."""

    def __init__(self, linear: Callable[..., nn.Module], width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x: Tensor, **settings: Any) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x), **settings)), **settings)


class Side:
    """One of the compared ways to train; ``step`` runs the micro-batches of one optimizer step."""

    def __init__(self, args: argparse.Namespace, linear: Callable[..., nn.Module] = nn.Linear) -> None:
        torch.manual_seed(0)
        self.args = args
        self.blocks = nn.ModuleList(Block(linear, args.width) for _ in range(args.depth)).to(args.device)
        self.optimizer = torch.optim.AdamW(self.blocks.parameters(), fused=True)

    def forward(self, x: Tensor, **settings: Any) -> Tensor:
        with torch.autocast(self.args.device, dtype=torch.bfloat16):
            for block in self.blocks:
                x = block(x, **settings)
        return x.float().square().mean()

    def step(self, x: Tensor) -> None:
        for micro_batch in range(self.args.accumulate):
            self.run(x, is_first=micro_batch == 0).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, x: Tensor, *, is_first: bool) -> Tensor:
        return self.forward(x)


class Library(Side):
    """Transformer Engine, written by hand."""

    def __init__(self, args: argparse.Namespace) -> None:
        import transformer_engine.pytorch as te

        from lightning_mp.fp8.recipes import parse_recipe
        from lightning_mp.fp8.transformer_engine import build_recipe

        super().__init__(args, te.Linear)
        self.region, self.recipe = te.autocast, build_recipe(parse_recipe(args.recipe))

    def run(self, x: Tensor, *, is_first: bool) -> Tensor:
        with self.region(enabled=True, recipe=self.recipe):
            return self.forward(x, is_first_microbatch=is_first)


class Ours(Side):
    """Layers converted by the engine."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        backend = "transformer_engine" if args.device == "cuda" else "emulated"
        self.engine = FP8Engine(FP8Config(recipe=args.recipe, backend=backend, skip_output_head=False))
        self.engine.check_available(torch.device(args.device))
        self.engine.convert_(self.blocks)

    def run(self, x: Tensor, *, is_first: bool) -> Tensor:
        with self.engine.autocast_context():
            return self.forward(x)

    def step(self, x: Tensor) -> None:
        super().step(x)
        self.engine.on_optimizer_step()


def time_steps(side: Side, x: Tensor, count: int) -> float:
    """Return the milliseconds per step of ``count`` steps."""
    if x.device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            side.step(x)
        return (time.perf_counter() - start) * 1e3 / count
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        side.step(x)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Time all sides by turns and return milliseconds and ratios."""
    sides: dict[str, Side] = {"bf16": Side(args), "ours": Ours(args)}
    if args.device == "cuda":
        sides["library"] = Library(args)
    x = torch.randn(args.rows, args.width, device=args.device)
    for side in sides.values():
        time_steps(side, x, min(WARMUP_STEPS, args.steps))
    rounds = [{name: time_steps(side, x, args.steps) for name, side in sides.items()} for _ in range(args.rounds)]
    pairs = [("ours", "bf16"), *([("ours", "library"), ("library", "bf16")] if "library" in sides else [])]
    return {
        "milliseconds": {name: statistics.median(r[name] for r in rounds) for name in sides},
        "ratios": {f"{a}/{b}": statistics.quantiles([r[a] / r[b] for r in rounds], n=4) for a, b in pairs},
    }


def main() -> None:
    """Compare, print the table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="current", choices=["current", "delayed", "block"])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8192, help="tokens per micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per optimizer step")
    parser.add_argument("--steps", type=int, default=10, help="steps of a side in one turn")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = compare(args)
    for name, milliseconds in found["milliseconds"].items():
        print(f"{name:<8} {milliseconds:9.2f} ms per step")
    for name, (low, middle, high) in found["ratios"].items():
        target = f"  (to reach: <= {WRAPPER_TARGET})" if name == "ours/library" else ""
        print(f"{name:<13} {middle:.3f} [{low:.3f}, {high:.3f}]{target}")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    out = args.out or Path(__file__).parent / "results" / f"fp8_step-{device.replace(' ', '-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    versions = {"torch": torch.__version__, "lightning_mp": lightning_mp.__version__}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record = {"date": now, "device": device, "versions": versions, **settings, **found}
    out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
