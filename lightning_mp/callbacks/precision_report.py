"""Callback that writes one self-contained HTML page about the precision of a run."""

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_mp.__about__ import __version__
from lightning_mp.callbacks.event_log import EventLog, logs_of, run_directory
from lightning_mp.callbacks.fp32_pin import FP32Pin
from lightning_mp.callbacks.loss_scale_monitor import LossScaleMonitor
from lightning_mp.callbacks.run_manifest import describe_coverage, describe_precision, is_fp8_run, read_manifest
from lightning_mp.errors import LightningMPError, SettingValueError
from lightning_mp.loss_scale import DynamicLossScale
from lightning_mp.memory import estimate_memory
from lightning_mp.pinning import PinReport
from lightning_mp.precision import MixedPrecision
from lightning_mp.precision.notices import notice
from lightning_mp.report.page import FILENAME, write_page
from lightning_mp.report.summary import as_events, describe_totals, dtype_name, find_misaligned, group_manifest

__all__ = ["PrecisionReport"]

_ESTIMATED_OPTIMIZERS = {"AdamW": "adamw", "Adam": "adam", "SGD": "sgd", "AdamW8bit": "adamw8bit"}
_STRATEGIES = {"DDPStrategy": "ddp", "FSDPStrategy": "fsdp", "ModelParallelStrategy": "fsdp2"}


class PrecisionReport(Callback):
    """Write a page about the run when ``fit`` ends: one HTML file that needs nothing else.

    It shows the settings, applied and skipped steps, the trajectory of the loss scale with its health,
    overflow events, the range of the gradients, FP8 layers, pins, what computes in what, and memory
    estimated and measured. What the monitors among the Trainer's callbacks recorded goes in; the page says
    which callback records what is missing. It is written after an error of this package too.

    What it records itself lies in the event log ``run.jsonl``, so that ``lightning-mp report RUN`` can rebuild
    the page of a run that was killed.

    Args:
        dirpath: Directory of page and log; ``None`` for that of the logger, and without one the Trainer's
            ``default_root_dir``.
        filename: Name of the page.

    Attributes:
        path: The page that was written last, on rank zero.

    Raises:
        SettingValueError: If ``filename`` is no plain name that ends in ``.html``.

    Example:
        >>> PrecisionReport(filename="bf16.html").filename
        'bf16.html'
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str = FILENAME) -> None:
        if Path(filename).name != filename or not filename.endswith(".html"):
            raise SettingValueError(
                f"filename={filename!r} is not allowed; it must be a plain name that ends in '.html'. "
                "Name the directory in dirpath."
            )
        self.dirpath = dirpath
        self.filename = filename
        self.path: Path | None = None
        self.event_log = EventLog("run", dirpath)
        self._memory: dict[str, int] = {}
        self._started = 0.0
        self._has_pins = False
        self._is_open = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.event_log.open(trainer)
        self._is_open, self._has_pins, self._memory = True, False, {}
        self._started = time.monotonic()
        if trainer.is_global_zero:
            self.event_log.append(_describe_start(trainer, pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._has_pins:
            self._keep_pins(trainer)

    def _keep_pins(self, trainer: Trainer) -> None:
        """Record what the first batch showed of the pins; without FP32Pin there is nothing to wait for."""
        pins = [callback for callback in trainer.callbacks if isinstance(callback, FP32Pin)]  # type: ignore[attr-defined]
        reports = [report for pin in pins for report in pin.reports.values()]
        self._has_pins = bool(reports) or not pins
        if reports:
            step = max(trainer.global_step - 1, 0)
            described = [_describe_pins(report) for report in reports]
            self.event_log.append({"event": "pins", "step": step, "reports": described})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before teardown, which gives masters and casts back.
        self._memory = _measure_memory(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, error=None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._is_open and isinstance(exception, LightningMPError):
            self._finish(trainer, error=exception)
        self.event_log.close()

    def _finish(self, trainer: Trainer, *, error: BaseException | None) -> None:
        if not self._is_open or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._is_open = False
        seconds = time.monotonic() - self._started
        self.event_log.append(_describe_end(trainer, seconds, self._memory, error))
        self.event_log.close()
        directory = run_directory(trainer, self.dirpath) or Path(trainer.default_root_dir)
        # Of two monitors of one class the first is shown, as when the page is rebuilt.
        ours = [log for log in logs_of(trainer.callbacks) if log.name != self.event_log.name]  # type: ignore[attr-defined]
        logs = {log.name: log.read() for log in (*reversed(ours), self.event_log)}
        try:
            self.path = write_page(logs, directory / self.filename)
        # The training is done, and the logs can be shown later.
        except Exception as error:
            notice(
                f"PrecisionReport: {self.filename} was not written: {type(error).__name__}: {error}. "
                f"The event logs stay; lightning-mp report {directory} builds the page from them."
            )
            return
        notice(f"PrecisionReport: wrote {self.path}")


def _names_of_monitors(callbacks: Iterable[Any]) -> list[str]:
    """Return the class names of the callbacks that record, those of their bases too."""
    recording = [callback for callback in callbacks if logs_of([callback])]
    return sorted({cls.__name__ for callback in recording for cls in type(callback).__mro__})


def _describe_start(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    rows = read_manifest(trainer, pl_module)
    is_fp8 = is_fp8_run(trainer)
    misaligned = find_misaligned(pl_module, rows, is_fp8=is_fp8)
    versions = {"lightning_mp": __version__, "torch": torch.__version__, "lightning": lightning.__version__}
    return {
        "event": "start",
        "step": trainer.global_step,
        "model": type(pl_module).__name__,
        "settings": describe_precision(trainer),
        "versions": versions,
        "monitors": _names_of_monitors(trainer.callbacks),  # type: ignore[attr-defined]
        "checks_gradients": _checks_gradients(trainer.precision_plugin),
        "limits": _describe_limits(trainer.precision_plugin),
        "totals": describe_totals(rows, misaligned, is_fp8=is_fp8, coverage=describe_coverage(trainer)),
        "groups": [asdict(group) for group in group_manifest(rows, pl_module)],
        "manifest": as_events(rows),
        "estimate": _estimate_memory(trainer, pl_module),
    }


def _checks_gradients(plugin: Any) -> bool:
    scaler = getattr(plugin, "scaler", None)
    return isinstance(plugin, MixedPrecision) or (scaler is not None and bool(scaler.is_enabled()))


def _describe_limits(plugin: Any) -> dict[str, Any] | None:
    rule = getattr(getattr(plugin, "scaler", None), "rule", None)
    if isinstance(rule, DynamicLossScale):
        return {"is_dynamic": True, "min_scale": rule.min_scale, "max_scale": rule.max_scale}
    return {"is_dynamic": False} if isinstance(plugin, MixedPrecision) else None


def _describe_pins(report: PinReport) -> dict[str, Any]:
    calls = [
        {"fqn": call.fqn, "name": call.name, "dtype": dtype_name(call.dtype), "count": count}
        for call, count in report.calls.items()
    ]
    return {
        "step": report.step,
        "modules": dict(report.modules),
        "calls": calls,
        "below_fp32": [f"{call.name} in {call.fqn or 'the model'}" for call in report.below_fp32],
        "fused_attention": list(report.fused_attention),
    }


def _describe_end(
    trainer: Trainer, seconds: float, memory: dict[str, int], error: BaseException | None
) -> dict[str, Any]:
    plugin = trainer.precision_plugin
    # After an error the plugin may still hold the step that caused it, and reading a count would raise again.
    counts = plugin if isinstance(plugin, MixedPrecision) and error is None else None
    monitors = [c for c in trainer.callbacks if isinstance(c, LossScaleMonitor)]  # type: ignore[attr-defined]
    return {
        "event": "end",
        "step": trainer.global_step,
        "applied_steps": counts.applied_steps if counts is not None else None,
        "skipped_steps": counts.skipped_steps if counts is not None else None,
        "seconds": round(seconds, 3),
        "memory": memory,
        "message": str(error) if error is not None else next((m.message for m in monitors if m.message), ""),
        "error": type(error).__name__ if error is not None else None,
    }


def _estimate_memory(trainer: Trainer, pl_module: LightningModule) -> dict[str, int] | None:
    """Return the planner's bytes by component, or ``None`` where it has no rule for this run."""
    optimizer = _estimated_optimizer(trainer)
    plugin = trainer.precision_plugin
    if optimizer is None or not isinstance(plugin, MixedPrecision):
        return None
    names = [_STRATEGIES[c.__name__] for c in type(trainer.strategy).__mro__ if c.__name__ in _STRATEGIES]
    try:
        estimate = estimate_memory(
            pl_module,
            precision=plugin.policy.precision,
            master_weights=plugin.policy.master_weights,  # type: ignore[arg-type]
            optimizer=optimizer,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            strategy=names[0] if names else "auto",  # type: ignore[arg-type]
            world_size=trainer.world_size,
        )
    except LightningMPError as error:
        notice(f"PrecisionReport: no memory estimate: {error}")
        return None
    components = {name: value for name, value in asdict(estimate).items() if name != "num_params"}
    return {**components, "total": estimate.total}


def _estimated_optimizer(trainer: Trainer) -> str | None:
    if len(trainer.optimizers) != 1:
        return None
    name = _ESTIMATED_OPTIMIZERS.get(type(trainer.optimizers[0]).__name__)
    has_momentum = any(group.get("momentum") for group in trainer.optimizers[0].param_groups)
    return "sgd-momentum" if name == "sgd" and has_momentum else name


def _measure_memory(trainer: Trainer, pl_module: LightningModule) -> dict[str, int]:
    """Return the bytes that are there between two steps, each storage once, and the peak of the device."""
    params = list(pl_module.parameters())
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    found = {
        "weights": _num_bytes(params),
        "gradients": _num_bytes(param.grad for param in params),
        "optimizer_state": _num_bytes(value for state in states for value in state.values()),
    }
    device = trainer.strategy.root_device
    if device.type == "cuda":
        found["peak of the device"] = torch.cuda.max_memory_allocated(device)
    return found


def _num_bytes(values: Iterable[Any]) -> int:
    tensors = [value for value in values if isinstance(value, Tensor)]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in local)}
    return sum(storages.values())
