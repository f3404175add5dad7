"""One segment: build a model, train it for a few steps the way a contender does, and time every step.

Segments of all contenders of a model follow each other in rounds, in an order that turns by some places from round to
round, in one process. Each builds its own model anew and frees it, because

- the peak memory is then the contender's own, with nothing else on the card;
- the batch may fill the card;
- Transformer Engine's amax buffers and region depth are global: two models alive at once would change each other.

Lightning's contenders and ours run a real ``Trainer.fit``; a step lasts from one ``on_train_batch_start`` to the next,
so that loops, hooks, callbacks and the fetch of the batch are part of it. The plain loops are timed at the same place.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from benchmarks.gpu.contenders import Contender, convert_for_loop, trainer_settings
from benchmarks.gpu.models import ModelSpec
from benchmarks.memory import _count, _live_tensors

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Segment:
    """What one segment gave: milliseconds of each timed step, and the peak of allocated bytes in them."""

    step_ms: list[float]
    peak_bytes: int


class StepClock:
    """Notes the start of each step, with CUDA events where there are any, and the memory of the timed ones."""

    def __init__(self, device: torch.device, warmup: int, baseline: int) -> None:
        self.device, self.warmup, self.baseline = device, warmup, baseline
        self.marks: list[Any] = []
        self.peak_bytes = 0

    def mark(self) -> None:
        """Note that a step starts."""
        if self.device.type == "cuda":
            if len(self.marks) == self.warmup:
                torch.cuda.reset_peak_memory_stats()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def finish(self) -> None:
        """Read the memory while model, gradients and states are still there."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.peak_bytes = torch.cuda.max_memory_allocated() - self.baseline
        else:
            self.peak_bytes = live_bytes() - self.baseline  # at rest; a CPU has no allocator to ask for the peak

    def segment(self) -> Segment:
        """Return the timed steps."""
        marks = self.marks[self.warmup :]
        if self.device.type == "cuda":
            step_ms = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
        else:
            step_ms = [(b - a) * 1e3 for a, b in itertools.pairwise(marks)]
        return Segment(step_ms, self.peak_bytes)


def live_bytes() -> int:
    """Return the bytes of all live CPU tensors."""
    return _count(_live_tensors(), set())


class ClockCallback(Callback):
    """Marks steps of a Trainer."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *args: Any) -> None:
        self.clock.mark()

    def on_train_end(self, *args: Any) -> None:
        self.clock.finish()


class ResidentStrategy(SingleDeviceStrategy):
    """One device, and no copy of model and states to the CPU after the run, which would cost more than the run."""

    def teardown(self) -> None:
        self.precision_plugin.teardown()
        self.accelerator.teardown()


class TrainedModule(LightningModule):
    """What a user writes around a model."""

    def __init__(self, net: nn.Module, *, fused: bool) -> None:
        super().__init__()
        self.net, self.fused = net, fused

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.net(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, fused=self.fused or None)


class Batches:
    """Two batches on the device by turns: no copy from the host is timed."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.batches[index % len(self.batches)] for index in range(self.count))


def run_segment(
    contender: Contender, spec: ModelSpec, size: int, device: torch.device, *, warmup: int, steps: int
) -> Segment:
    """Train ``warmup + steps`` steps and one more, whose start ends the last timed one."""
    free_memory(device)
    set_tf32(contender.format == "tf32")
    if contender.compile:
        torch._dynamo.reset()  # else the variants of all contenders exceed the limit of recompilations
    baseline = torch.cuda.memory_allocated() if device.type == "cuda" else live_bytes()
    clock = StepClock(device, warmup, baseline)
    torch.manual_seed(0)
    with torch.device(device):
        net = spec.build()
    if spec.shape == "conv":
        net = net.to(memory_format=torch.channels_last)
    data = Batches([spec.batch(size, device) for _ in range(2)], warmup + steps + 1)
    try:
        (train_plainly if contender.kind in ("torchao", "te") else fit)(contender, net, data, device, clock)
        return clock.segment()
    finally:
        set_tf32(False)
        reset_library()


def fit(contender: Contender, net: nn.Module, data: Batches, device: torch.device, clock: StepClock) -> None:
    """Train under a Trainer."""
    if contender.compile:
        compile_blocks(net)
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(contender, device, folder)
        callbacks = [*settings.pop("callbacks"), ClockCallback(clock)]
        trainer = Trainer(
            **settings,
            callbacks=callbacks,
            accelerator=device.type,
            devices=1,
            strategy=ResidentStrategy(torch.device(device.type, 0) if device.type == "cuda" else device),
            max_steps=data.count,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(TrainedModule(net, fused=contender.fused), data)


def train_plainly(contender: Contender, net: nn.Module, data: Batches, device: torch.device, clock: StepClock) -> None:
    """Train in a loop as one writes it by hand, with FP32 weights and BF16 autocast."""
    region = convert_for_loop(contender, net, device) or nullcontext
    if contender.compile:
        compile_blocks(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, fused=contender.fused or None)
    for batch in data:
        clock.mark()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16), region():
            loss = net(*batch)
        loss.backward()
        optimizer.step()
    clock.finish()


def compile_blocks(net: nn.Module) -> None:
    """Compile each block by itself: equal blocks share the code."""
    for block in net.blocks:
        block.compile()


def free_memory(device: torch.device) -> None:
    """Return what earlier segments held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_library() -> None:
    """Make Transformer Engine forget the models of the past, whose amax it would go on updating at every step."""
    library = sys.modules.get("transformer_engine.pytorch.quantization")
    if library is not None:
        library.FP8GlobalStateManager.reset()


def set_tf32(allowed: bool) -> None:
    """Set whether FP32 products and convolutions may round their operands to TF32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def batch_that_fits(spec: ModelSpec, device: torch.device) -> int:
    """Return the largest power of two of samples that FP32 trains within 85% of the memory, up to the model's limit.

    From the peaks of a forward and backward of one and of two samples, in FP32 without autocast, so that the largest
    contender fits and all share one batch; 16 bytes per parameter are weight, gradient and AdamW's states.
    """
    if device.type != "cuda":
        return spec.max_batch
    try:
        one, two = (peak_of_fp32(spec, size, device) for size in (1, 2))
    except torch.OutOfMemoryError:
        return 1
    with torch.device("meta"):
        num_params = sum(p.numel() for p in spec.build().parameters())
    room = 0.85 * torch.cuda.get_device_properties(device).total_memory - 16 * num_params
    most = max(1, min(spec.max_batch, int(room / max(two - one, 1))))
    return 1 << (most.bit_length() - 1)


def peak_of_fp32(spec: ModelSpec, size: int, device: torch.device) -> int:
    """Return the most bytes that lived in a forward and backward of ``size`` samples."""
    free_memory(device)
    start = torch.cuda.memory_allocated()
    with torch.device(device):
        net = spec.build()
    torch.cuda.reset_peak_memory_stats()
    net(*spec.batch(size, device)).backward()
    return torch.cuda.max_memory_allocated() - start


def time_calls(call: Callable[[], Any], device: torch.device, *, warmup: int, repeats: int) -> float:
    """Return the median milliseconds of a call."""
    for _ in range(warmup):
        call()
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    marks = [time.perf_counter()]
    for _ in range(repeats):
        call()
        marks.append(time.perf_counter())
    return statistics.median((b - a) * 1e3 for a, b in itertools.pairwise(marks))
