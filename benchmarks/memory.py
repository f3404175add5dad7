"""Count the bytes per parameter that training keeps, at rest and at the peak inside the optimizer step.

Each case trains the same stack of dense layers with AdamW for a few steps under a real ``Trainer``. At rest means
after a step, before gradients are cleared; activations are gone then. The peak is the most that lives between the end
of backward and the end of the step, clipping included.

On a CPU the bytes are those of all live tensor storages, found by the garbage collector (so that nothing a plugin
holds can hide), and inside the step by a dispatch mode that follows every new storage to its end. On CUDA they come
from the caching allocator. The bytes that ``estimate_memory`` predicts stand beside them.

Run: ``python -m benchmarks.memory [--device cpu|cuda] [--width 1024] [--layers 24] [--out FILE]``.
Writes ``benchmarks/results/memory-<device>.json`` unless ``--out`` names another file.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_mp
from lightning_mp import MixedPrecision
from lightning_mp.memory import estimate_memory

STEPS = 3
COMPONENTS = ("weights", "masters", "gradients", "optimizer_state", "other")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    precision: str
    master_weights: str | None = None  # None: Lightning's own plugin
    optimizer: str = "adamw"
    accumulate: int = 1
    target: float | None = None


CASES = (
    Case("Lightning 32-true", "32-true"),
    Case("Lightning bf16-mixed", "bf16-mixed"),
    Case("Lightning bf16-true", "bf16-true"),
    Case("params", "bf16", "params"),
    Case("copy", "bf16", "copy"),
    Case("copy, 4 backwards per step", "bf16", "copy", accumulate=4),
    Case("split", "bf16", "split", target=14.0),
    Case("split, 4 backwards per step", "bf16", "split", accumulate=4, target=16.0),
    Case("split, 8-bit Adam", "bf16", "split", "adamw8bit", target=8.1),
    Case("none", "bf16", "none"),
)


class Dense(LightningModule):
    """A stack of square linear layers; a forward of a few rows, so that activations are small."""

    def __init__(self, width: int, layers: int, optimizer: str) -> None:
        super().__init__()
        self.width = width
        self.optimizer_name = optimizer
        self.net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch.to(self.net[0].weight.dtype)).float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer_name == "adamw8bit":
            from torchao.optim import AdamW8bit

            return AdamW8bit(self.parameters(), lr=1e-3)
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Rows:
    """Batches that nobody keeps."""

    def __init__(self, num: int, width: int) -> None:
        self.num, self.width = num, width

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.num):
            yield torch.randn(2, self.width)


class NewStorages(TorchDispatchMode):
    """Follow the storages that operations make inside the region, and remember the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage._cdata for storage in _storages_in((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages_in(result):
            if storage._cdata not in known and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


class Meter(Callback):
    """Measure at rest after each step, and the peak from the end of backward on."""

    def __init__(self, baseline: set[int], start: int) -> None:
        self.baseline = baseline
        self.start = start
        self.rest: dict[str, int] = {}
        self.peak = 0
        self.mode: NewStorages | None = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        elif trainer.global_step == STEPS - 1:
            self.mode = NewStorages()
            self.mode.__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
        self.rest = self._components(trainer, pl_module)
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
            self.rest["other"] = torch.cuda.memory_allocated() - self.start - sum(self.rest.values())
            self.peak = torch.cuda.max_memory_allocated() - self.start
        elif self.mode is not None:
            self.peak = sum(self.rest.values()) + self.mode.peak
            self.mode = None

    def _components(self, trainer: Trainer, module: LightningModule) -> dict[str, int]:
        masters = getattr(trainer.precision_plugin, "_masters", None)
        kept = [] if masters is None else [t for master in masters.masters.values() for t in master.tensors()]
        states = [v for o in trainer.optimizers for state in o.state.values() for v in state.values()]
        seen = set(self.baseline)
        found = {
            "weights": _count(module.parameters(), seen),
            "masters": _count(kept, seen),
            "gradients": _count((p.grad for p in module.parameters() if p.grad is not None), seen),
            "optimizer_state": _count((v for v in states if isinstance(v, Tensor)), seen),
        }
        found["other"] = _count(_live_tensors(), seen) if module.device.type == "cpu" else 0
        return found


def _live_tensors() -> Iterator[Tensor]:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at some objects of torch warns that they are deprecated
        for item in gc.get_objects():
            if issubclass(type(item), Tensor):
                yield item
                if item.is_leaf and item.grad is not None:
                    yield item.grad


def _storages_in(value: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        parts = getattr(value, "tensor_attrs", None)  # a torchao subclass holds its bytes in these
        if parts is not None:
            for part in parts:
                yield from _storages_in(getattr(value, part))
        elif value.layout is torch.strided and value.device.type != "meta":
            yield value.untyped_storage()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _storages_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _storages_in(item)


def _count(tensors: Any, seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        for storage in _storages_in(tensor):
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                total += storage.nbytes()
    return total


def measure(case: Case, *, device: str, width: int, layers: int) -> dict[str, Any]:
    """Train one case and return bytes per parameter."""
    gc.collect()
    start = torch.cuda.memory_allocated() if device == "cuda" else 0
    meter = Meter({s._cdata for t in _live_tensors() for s in _storages_in(t)}, start)
    module = Dense(width, layers, case.optimizer)
    num_params = sum(param.numel() for param in module.parameters())
    plugin = None
    if case.master_weights is not None:
        plugin = MixedPrecision(case.precision, master_weights=case.master_weights)
    trainer = Trainer(
        accelerator=device,
        devices=1,
        max_steps=STEPS,
        precision=None if plugin else case.precision,
        plugins=[plugin] if plugin else [],
        callbacks=[meter],
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # torchao compiles its step; eagerly it keeps the same states, and no compiler's memory is counted.
    with torch.compiler.set_stance("force_eager"):
        trainer.fit(module, Rows(STEPS * case.accumulate, width))
    row = {name: meter.rest[name] / num_params for name in COMPONENTS}
    row |= {"rest": sum(row.values()), "peak": meter.peak / num_params if meter.peak else None}
    row["estimate"] = _estimate(case, module)
    row["target"] = case.target
    return {"name": case.name, "num_params": num_params, **row}


def _estimate(case: Case, module: nn.Module) -> float | None:
    if case.master_weights is None:
        return None
    return estimate_memory(
        module,
        precision=case.precision,
        master_weights=case.master_weights,  # type: ignore[arg-type]
        optimizer=case.optimizer,
        accumulate_grad_batches=case.accumulate,
    ).bytes_per_param


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = [measure(case, device=arguments.device, width=arguments.width, layers=arguments.layers) for case in CASES]
    print(table(rows))
    out = arguments.out or Path(__file__).parent / "results" / f"memory-{arguments.device}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"environment": environment(arguments.device), "rows": rows}, indent=2) + "\n")
    missed = [row["name"] for row in rows if row["target"] is not None and row["rest"] > row["target"] * 1.005]
    off = [row["name"] for row in rows if row["estimate"] and abs(row["estimate"] / row["rest"] - 1) > 0.02]
    print(f"over target: {missed or 'none'}; estimate off by more than 2%: {off or 'none'}")


def table(rows: list[dict[str, Any]]) -> str:
    names = (*COMPONENTS, "rest", "peak", "estimate", "target")
    lines = [f"{'bytes per parameter':<28}" + "".join(f"{name:>17}" for name in names)]
    for row in rows:
        cells = ("-" if row[name] is None else f"{row[name]:.2f}" for name in names)
        lines.append(f"{row['name']:<28}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def environment(device: str) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "lightning_mp": lightning_mp.__version__,
        "cases": [asdict(case) for case in CASES],
    }


if __name__ == "__main__":
    main()
