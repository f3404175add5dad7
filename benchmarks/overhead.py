"""Measure the Python overhead per training step of ``MixedPrecision`` against Lightning's own plugins.

Two Trainers train the same model in the same process, one with our plugin and one with Lightning's
(``Precision`` for FP32, ``MixedPrecision`` for BF16 and FP16), by turns: a few steps of the one, a few of the other.
Each pair of neighboring blocks gives one ratio of median step times, ours over Lightning's; the table shows the
median and the quartiles of these ratios. The ratio uses the CPU time of the thread, which other processes on the
machine hardly change; the ratio of wall times stands beside it. Each side computes with one thread, both on the same
core where the system allows to choose one.

Cases: a tiny model with AdamW and fused AdamW; the same with ``FP32Pin``, ``OverflowMonitor`` and
``LossScaleMonitor`` on our side only; and with these callbacks two models whose step takes 5 ms or more: blocks of many
parameters and few rows, in which our plugin's own look for non-finite gradients shows, and the GPT of the main job.
Rows that end in "callbacks / none" have our plugin on both sides, so that they show what the callbacks cost. The cost
of ``import lightning_mp`` after ``import lightning.pytorch`` is measured in fresh interpreters.

Run: ``python -m benchmarks.overhead [--rounds 4] [--blocks 20] [--only plain|callbacks|import] [--out FILE]``.
Writes ``benchmarks/results/overhead-<device>.json`` unless ``--out`` names another file.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision as LightningMixedPrecision
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn

import lightning_mp
from examples.quickstart import VOCABULARY, ByteGPT
from lightning_mp import MixedPrecision

BLOCK_STEPS = 32
DROPPED_STEPS = 4  # of each block
WARMUP_BLOCKS = 3
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h
RATIO_TARGET = 1.00
TINY_CALLBACKS_TARGET = 1.15
SLOW_CALLBACKS_TARGET = 1.05
IMPORT_TARGET_S = 0.15
LIGHTNING_NAMES = {"bf16": "bf16-mixed", "fp16": "16-mixed"}


class TinyModel(LightningModule):
    """Two small linear layers with a norm between them: nearly all of a step is Python."""

    width = 32
    batch_size = 4

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.net = self.make_net()

    def make_net(self) -> nn.Module:
        """Build the network from ``width`` inputs to two classes."""
        return nn.Sequential(nn.Linear(self.width, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 2))

    def make_batch(self) -> tuple[Tensor, Tensor]:
        """Return random inputs and classes of one batch."""
        return torch.randn(self.batch_size, self.width), torch.randint(2, (self.batch_size,))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, target = batch
        return F.cross_entropy(self.net(x), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=self.fused or None)


class Residual(nn.Module):
    """A feed-forward block behind a norm, and a softmax gate: each kind of operation that FP32Pin pins."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ffn(self.norm(x))
        return x + y * F.softmax(y, dim=-1)


class SlowModel(TinyModel):
    """Two feed-forward blocks, large enough that a step takes over 5 ms on one CPU core."""

    width = 256
    batch_size = 64

    def make_net(self) -> nn.Module:
        return nn.Sequential(*(Residual(self.width) for _ in range(2)), nn.Linear(self.width, 2))


class MainJob(ByteGPT):
    """The GPT of ``make demo``, in its size; only the text is random."""

    batch_size = 8

    def __init__(self, *, fused: bool) -> None:
        if not fused:
            raise ValueError("fused=False: the main job trains with fused AdamW.")
        super().__init__(width=128, depth=3, heads=4, context=128, steps=10_000)

    def make_batch(self) -> Tensor:
        """Return random bytes, one more than the context, of one batch."""
        return torch.randint(VOCABULARY, (self.batch_size, self.context + 1))


class Batches:
    """The batches of one run, made before it: a DataLoader's own work would dilute the ratio."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Baton:
    """Lets two threads run by turns, so that both sides meet the same machine."""

    def __init__(self, first: int) -> None:
        self._turns = [threading.Semaphore(int(side == first)) for side in (0, 1)]
        self._both = threading.Barrier(2)

    def wait_for_both(self) -> None:
        """Block until both sides have set up their run."""
        self._both.wait()

    def take(self, side: int) -> None:
        """Block until it is the turn of ``side``."""
        self._turns[side].acquire()

    def pass_on(self, side: int) -> None:
        """End the turn of ``side``."""
        self._turns[1 - side].release()

    def leave(self, side: int) -> None:
        """End the run of ``side``, also after an error: the other side never waits again."""
        self._both.abort()
        self._turns[1 - side].release(1_000_000)


class StepClock(Callback):
    """Runs one side in blocks of steps, by turns with the other, and times every step."""

    def __init__(self, baton: Baton, side: int) -> None:
        self.baton = baton
        self.side = side
        self.starts: list[tuple[int, int]] = []
        self.ends: list[tuple[int, int]] = []

    def on_train_start(self, *args: Any) -> None:
        self.baton.wait_for_both()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.ends.append((time.thread_time_ns(), time.perf_counter_ns()))
        if batch_idx % BLOCK_STEPS == 0:
            if batch_idx:
                self.baton.pass_on(self.side)
            self.baton.take(self.side)
        self.starts.append((time.thread_time_ns(), time.perf_counter_ns()))

    def blocks_us(self, clock: int) -> list[float]:
        """Return the median step of each block in microseconds, of CPU time (0) or wall time (1)."""
        steps = [(end[clock] - start[clock]) / 1e3 for start, end in zip(self.starts, self.ends[1:], strict=False)]
        blocks = [steps[first : first + BLOCK_STEPS] for first in range(0, len(steps), BLOCK_STEPS)]
        # The other side has used the caches before a block; the last one runs beside the other's teardown.
        return [statistics.median(block[DROPPED_STEPS:]) for block in blocks[WARMUP_BLOCKS:-1]]


@dataclass(frozen=True)
class Case:
    """One comparison: a model, a precision and what our side has switched on."""

    model: type[TinyModel | MainJob]
    precision: str
    fused: bool
    callbacks: bool
    target: float
    against_ours: bool = False
    """Whether the other side has our plugin too, without callbacks."""

    @property
    def name(self) -> str:
        """Return the row's label."""
        parts = [self.model.__name__, self.precision, "fused AdamW" if self.fused else "AdamW"]
        if self.callbacks:
            parts.append("callbacks / none" if self.against_ours else "callbacks")
        return ", ".join(parts)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarize two or more values."""
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.q1:.3f}, {self.q3:.3f}]"


def ours(case: Case) -> tuple[Precision, list[Callback]]:
    """Return our plugin and, where the case asks for them, the callbacks."""
    return MixedPrecision(case.precision), [*monitors()] if case.callbacks else []


def theirs(case: Case, device: str) -> tuple[Precision, list[Callback]]:
    """Return Lightning's plugin for the same precision, or ours without callbacks."""
    if case.against_ours:
        return MixedPrecision(case.precision), []
    if case.precision == "fp32":
        return Precision(), []
    return LightningMixedPrecision(LIGHTNING_NAMES[case.precision], device), []


def has_monitors() -> bool:
    """Say whether this version of the package has the three callbacks."""
    return all(hasattr(lightning_mp, name) for name in ("FP32Pin", "OverflowMonitor", "LossScaleMonitor"))


def monitors() -> list[Callback]:
    """Return the three callbacks whose cost design.md bounds."""
    return [lightning_mp.FP32Pin(), lightning_mp.OverflowMonitor(), lightning_mp.LossScaleMonitor()]


def fit(case: Case, plugin: Precision, callbacks: list[Callback], args: argparse.Namespace) -> None:
    """Train the case's model once."""
    model = case.model(fused=case.fused)
    # A step of the main job is long, and noise a small part of it.
    blocks = max(args.blocks // 5, 2) if case.model is MainJob else args.blocks
    num_batches = (WARMUP_BLOCKS + blocks + 1) * BLOCK_STEPS
    trainer = Trainer(
        plugins=[plugin],
        callbacks=callbacks,
        accelerator=args.accelerator,
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Batches([model.make_batch() for _ in range(num_batches)]))


def time_pair(case: Case, args: argparse.Namespace, *, first: int) -> tuple[StepClock, StepClock]:
    """Train both sides by turns, ours (0) or Lightning's (1) first, and return their clocks, ours first."""
    seed_everything(1, verbose=False)
    gc.collect()
    baton = Baton(first)
    clocks = StepClock(baton, 0), StepClock(baton, 1)
    sides = [ours(case), theirs(case, args.accelerator)]

    def run(side: int) -> None:
        plugin, callbacks = sides[side]
        torch.set_num_threads(1)
        try:
            fit(case, plugin, [clocks[side], *callbacks], args)
        finally:
            baton.leave(side)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, side) for side in (0, 1)]
    # A side that fails breaks the barrier for the other one, whose error then says nothing.
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return clocks


def compare(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Time several pairs of runs and return the spreads of times and ratios."""
    times: dict[str, list[float]] = {"ours_us": [], "other_us": [], "ratio": [], "wall_ratio": []}
    for round_index in range(args.rounds):
        mine, others = time_pair(case, args, first=round_index % 2)
        times["ours_us"] += mine.blocks_us(0)
        times["other_us"] += others.blocks_us(0)
        times["ratio"] += [a / b for a, b in zip(mine.blocks_us(0), others.blocks_us(0), strict=True)]
        times["wall_ratio"] += [a / b for a, b in zip(mine.blocks_us(1), others.blocks_us(1), strict=True)]
    return {"case": case.name, "target": case.target, **{key: asdict(Spread.of(value)) for key, value in times.items()}}


def import_seconds(repeats: int) -> Spread:
    """Return the CPU seconds that ``import lightning_mp`` adds to ``import lightning.pytorch``, in new interpreters."""
    code = (
        "import lightning.pytorch, time; t = time.process_time(); import lightning_mp; print(time.process_time() - t)"
    )
    outputs = [subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(repeats)]
    return Spread.of([float(output) for output in outputs])


def cases(args: argparse.Namespace) -> list[Case]:
    """Return the comparisons that the command line asks for."""
    plain = [
        Case(TinyModel, precision, fused=fused, callbacks=False, target=RATIO_TARGET)
        for precision in args.precision
        for fused in (False, True)
    ]
    watched = [
        Case(TinyModel, precision, fused=False, callbacks=True, target=TINY_CALLBACKS_TARGET)
        for precision in args.precision
    ]
    # FP16 matrix products on a CPU are hundreds of times slower; a larger step would measure only them.
    watched += [
        Case(
            model, precision, model is MainJob, callbacks=True, target=SLOW_CALLBACKS_TARGET, against_ours=against_ours
        )
        for model in (SlowModel, MainJob)
        for precision in args.precision
        if precision != "fp16" or args.accelerator == "cuda"
        for against_ours in ((False,) if model is MainJob else (False, True))
    ]
    chosen = {"plain": plain, "callbacks": watched if has_monitors() else [], "import": []}
    return chosen[args.only] if args.only else plain + chosen["callbacks"]


def environment(accelerator: str) -> dict[str, Any]:
    """Return device, versions and date."""
    device = torch.cuda.get_device_name() if accelerator == "cuda" else cpu_name()
    return {
        "device": device,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "lightning_mp": lightning_mp.__version__,
    }


def cpu_name() -> str:
    """Return the CPU's model name, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_row(result: dict[str, Any]) -> None:
    """Print one comparison."""
    ratio, wall = Spread(**result["ratio"]), Spread(**result["wall_ratio"])
    verdict = "met" if ratio.median <= result["target"] else "MISSED"
    times = f"{result['ours_us']['median']:9.1f} {result['other_us']['median']:9.1f}"
    print(
        f"{result['case']:44} {times}  {ratio!s:22} {wall.median:6.3f}  <= {result['target']:.2f} {verdict}", flush=True
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="pairs of runs per case")
    parser.add_argument("--blocks", type=int, default=20, help="timed blocks per run, after the warm-up")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16", "fp16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", choices=["plain", "callbacks", "import"])
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/overhead-<device>.json)")
    return parser.parse_args(argv)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory, on both sides alike.

    Else it gives the top of the heap back to the system and takes it again: up to 1000 page faults, 1.5 ms, in each
    step of the slow model or in none, as the layout of the heap happens to be.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(name, 2**30)
        mallopt(M_ARENA_MAX, 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparisons, print the table and write the JSON file."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    if hasattr(os, "sched_setaffinity"):
        # The threads of the two sides never run at once, and would move from core to core and between their caches.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(f"{'case':44} {'ours us':>9} {'theirs us':>9}  {'ratio [quartiles]':22} {'wall':>6}  target")
    results = []
    for case in cases(args):
        results.append(compare(case, args))
        print_row(results[-1])
    if args.only in (None, "callbacks") and not has_monitors():
        print("callbacks: not in this version of lightning_mp, not measured")
    report = {
        "settings": {"rounds": args.rounds, "blocks": args.blocks, "block_steps": BLOCK_STEPS},
        **environment(args.accelerator),
        "cases": results,
    }
    if args.only in (None, "import"):
        seconds = import_seconds(repeats=5)
        report["import_s"] = asdict(seconds)
        verdict = "met" if seconds.median <= IMPORT_TARGET_S else "MISSED"
        print(f"import lightning_mp: {seconds.median:.3f} s CPU  <= {IMPORT_TARGET_S} {verdict}")
    out = args.out or Path(__file__).parent / "results" / f"overhead-{args.accelerator}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
