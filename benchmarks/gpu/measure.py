"""Measure one model: all its contenders in rounds."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.gpu.contenders import Contender, why_not
from benchmarks.gpu.models import ModelSpec, llama_layers_that_fit, training_flops
from benchmarks.gpu.timing import Segment, batch_that_fits, free_memory, run_segment
from lightning_mp import LightningMPError

MIN_STEPS = 20
TURN = 7  # places by which the order turns from round to round; no divisor of the number of contenders


@dataclass
class Entry:
    """What is known of one contender so far."""

    contender: Contender
    status: str = "measured"
    reason: str = ""
    rounds: list[Segment] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return what goes into the JSON file."""
        steps = [ms for segment in self.rounds for ms in segment.step_ms]
        status = self.status if steps or self.status != "measured" else "not measured"
        found: dict[str, Any] = {
            "name": self.contender.name,
            "format": self.contender.format,
            "status": status,
            "reason": self.reason or ("" if steps else "the time limit came first"),
            "num_steps": len(steps),
        }
        if status == "measured":
            found["median_ms"] = statistics.median(steps)
            found["round_ms"] = [statistics.median(segment.step_ms) for segment in self.rounds]
            found["peak_bytes"] = max(segment.peak_bytes for segment in self.rounds)
        return found


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Args:
        device: Where.
        rounds: How often each contender has a turn.
        steps: Timed steps of a turn.
        warmup: Steps before them.
        deadline: When to stop, by ``time.monotonic``.
    """

    device: torch.device
    rounds: int
    steps: int
    warmup: int
    deadline: float

    @property
    def is_over(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() >= self.deadline


def measure_model(
    spec: ModelSpec, contenders: Sequence[Contender], plan: Plan, *, size: int | None = None, layers: int = 0
) -> dict[str, Any]:
    """Time the contenders on one model and return its entry of the JSON file.

    Args:
        spec: The model.
        contenders: In the order of importance: the time limit cuts at the end of the first round.
        plan: How.
        size: Samples of a batch; ``None``: as many as fit.
        layers: Blocks of a model that leaves them open; 0: as many as fit.
    """
    if not spec.layers:
        memory = torch.cuda.get_device_properties(plan.device).total_memory if plan.device.type == "cuda" else 0
        spec = replace(spec, layers=layers or llama_layers_that_fit(spec, memory))
    label = "batch 1" if size == 1 else "full batch"
    size = size or (1 if plan.is_over else batch_that_fits(spec, plan.device))
    print(f"\n{spec.name}: {spec.layers} layers, {size} x {spec.length}", flush=True)
    entries = [Entry(contender) for contender in contenders]
    for round_index in range(plan.rounds):
        shift = round_index * TURN % len(entries)
        for entry in entries[shift:] + entries[:shift]:
            if entry.status == "measured" and not plan.is_over:
                take_turn(entry, spec, size, plan)
    with torch.device("meta"):
        num_params = sum(p.numel() for p in spec.build().parameters())
    return {
        "name": spec.name,
        "label": label,
        "batch": size,
        "length": spec.length,
        "layers": spec.layers,
        "num_params": num_params,
        "unit": spec.unit,
        "units_per_step": size * spec.units_per_sample,
        "flops_per_step": training_flops(spec, size),
        "contenders": [entry.record() for entry in entries],
    }


def take_turn(entry: Entry, spec: ModelSpec, size: int, plan: Plan) -> None:
    """Run one segment of a contender and note what came of it."""
    name = entry.contender.name
    missing = why_not(entry.contender, plan.device)
    if missing:
        entry.status, entry.reason = "cannot run", missing
        print(f"  {name:<40} cannot run: {missing}", flush=True)
        return
    start = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # PrecisionSummary prints its table
            segment = run_segment(entry.contender, spec, size, plan.device, warmup=plan.warmup, steps=plan.steps)
    except torch.OutOfMemoryError:
        entry.status, entry.reason = "out of memory", f"batch {size} does not fit"
    except LightningMPError as error:
        entry.status, entry.reason = "cannot run", str(error).splitlines()[0]
    except Exception as error:  # a fault of a peer, or ours: it must not end the run, and it is shown in the tables
        traceback.print_exc()
        entry.status, entry.reason = "failed", f"{type(error).__name__}: {error}".splitlines()[0][:300]
    else:
        entry.rounds.append(segment)
        middle, seconds = statistics.median(segment.step_ms), time.monotonic() - start
        print(f"  {name:<40} {middle:10.2f} ms  {segment.peak_bytes / 2**30:7.2f} GiB  ({seconds:.1f} s)", flush=True)
        return
    free_memory(plan.device)
    print(f"  {name:<40} {entry.status}: {entry.reason}", flush=True)
