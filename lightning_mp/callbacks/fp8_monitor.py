"""Callback that watches what FP8 does to each layer, and may move a layer back to 16 bits."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_mp.callbacks.event_log import EventLog, gather_events
from lightning_mp.callbacks.pictures import save_picture
from lightning_mp.callbacks.step_values import StepValues
from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.fp8 import FP8Engine, OperandStatistics
from lightning_mp.metrics import FP8LayerStats
from lightning_mp.precision import MixedPrecision
from lightning_mp.precision.notices import notice, notice_once

__all__ = ["FP8Monitor", "FP8Record"]


@dataclass(frozen=True)
class FP8Record:
    """What FP8 did to one operand of one layer in one step; the worst of its calls and of all ranks.

    Args:
        step: Index of the attempt, from zero.
        fqn: Full dotted name of the layer.
        operand: ``"input"``, ``"weight"`` or ``"grad"``.
        amax: Largest magnitude before the cast.
        scale: Factor into FP8; of block scaling the smallest.
        saturated: Share of the nonzero elements beyond the format's maximum, in [0, 1].
        flushed: Share of the nonzero elements that became zero, in [0, 1].
        sqnr_db: Signal-to-quantization-noise ratio in dB.
        demoted: Whether the layer was moved back to 16 bits after this step.
    """

    step: int
    fqn: str
    operand: str
    amax: float
    scale: float
    saturated: float
    flushed: float
    sqnr_db: float
    demoted: bool = False


class FP8Monitor(Callback):
    """Measure every N steps what the casts to FP8 do, layer by layer and operand by operand.

    A measurement covers the batches of one step: those that are accumulated for it, and in manual
    optimization all that ``training_step`` does for any optimizer. Validation in between is left out.
    Between measured steps nothing is computed and the device is not read. On Transformer Engine its own casts are
    measured; the output gradient of a layer with a bias, whose cast it does not show, is cast a second time with
    the emulated recipe. Emulated layers inside ``torch.compile`` are not measured.

    Each measured value goes to the loggers once, with the step it was measured at, whatever
    ``log_every_n_steps`` is, and to ``trainer.callback_metrics``: the worst over layers and operands.

    - ``fp8/saturated``, ``fp8/flushed``: shares of nonzero elements (0 to 1).
    - ``fp8/sqnr_db``: signal-to-quantization-noise ratio in dB.
    - ``fp8/demoted_layers``: layers moved back to 16 bits so far.

    The event log ``fp8.jsonl`` holds one ``FP8Record`` per layer, operand and measured step. At the end
    of ``fit`` the picture ``fp8.png`` (layers by steps) lies beside it.

    Args:
        every_n_steps: Attempts between two measurements; the first attempt is measured.
        demote: Whether a layer that stays unhealthy runs in 16 bits from then on. Checkpoints remember it.
        max_saturated: A layer is unhealthy if a larger share of an operand saturates.
        max_flushed: A layer is unhealthy if a larger share of an operand is flushed to zero.
        patience: Measurements in a row that a layer must be unhealthy to be moved.
        plot: Whether to draw the picture, where a directory is known and matplotlib is installed.
        dirpath: Directory of event log and picture; ``None`` for that of the logger.

    Attributes:
        history: What was measured, in order.

    Raises:
        SettingTypeError: If a number has a wrong type.
        SettingValueError: If a number is out of its range.

    Example:
        >>> FP8Monitor(every_n_steps=50, demote=True).history
        []
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        demote: bool = False,
        max_saturated: float = 0.01,
        max_flushed: float = 0.5,
        patience: int = 5,
        plot: bool = True,
        dirpath: str | Path | None = None,
    ) -> None:
        self.every_n_steps = _parse_count("every_n_steps", every_n_steps)
        self.demote = demote
        self.max_saturated = _parse_share("max_saturated", max_saturated)
        self.max_flushed = _parse_share("max_flushed", max_flushed)
        self.patience = _parse_count("patience", patience)
        self.plot = plot
        self.event_log = EventLog("fp8", dirpath)
        self.history: list[FP8Record] = []
        self._values = StepValues()
        self._unhealthy: dict[str, int] = {}
        self._counted: dict[str, weakref.ref[nn.Linear]] = {}
        self._measured_step: int | None = None
        self._next_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _engine(trainer) is None:
            notice_once("FP8Monitor has nothing to watch: this run is not in FP8. Use MixedPrecision('fp8').")
        self.event_log.open(trainer)
        logged = [FP8Record(**event) for event in self.event_log.read()]
        kept = [record for record in self.history if record.step < trainer.global_step]
        self.history = logged if len(logged) > len(kept) else kept
        if trainer.global_step == 0:
            self._unhealthy = {}
        self._measured_step = None
        self._next_step = -(-trainer.global_step // self.every_n_steps) * self.every_n_steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        engine, step = _engine(trainer), trainer.global_step
        if engine is not None and self._measured_step is None and step >= self._next_step:
            engine.collect_statistics()
            self._measured_step = step
            self._next_step = (step // self.every_n_steps + 1) * self.every_n_steps

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        engine = _engine(trainer)
        if engine is not None and self._measured_step is not None:
            engine.stop_statistics()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        engine = _engine(trainer)
        if engine is not None and self._measured_step is not None:
            engine.resume_statistics()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._values.keys:
            self._values.drop(trainer)
        engine, step = _engine(trainer), self._measured_step
        if engine is None or step is None or trainer.global_step <= step:
            return
        self._measured_step = None
        engine.stop_statistics()
        found = _worst_over_ranks(engine.statistics())
        if not found:
            notice_once("FP8Monitor measured nothing: no layer ran in FP8 uncompiled in a measured step.")
            return
        demoted = self._judge(engine, found)
        for row in found:
            record = FP8Record(step=step, **vars(row), demoted=row.fqn in demoted)
            self.history.append(record)
            self.event_log.append(record)
        values = {
            "fp8/saturated": max(row.saturated for row in found),
            "fp8/flushed": max(row.flushed for row in found),
            "fp8/sqnr_db": min(row.sqnr_db for row in found),
            "fp8/demoted_layers": float(len(engine.demoted)),
        }
        # At once: log steps would write what was measured last, or nothing.
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=step)
        self._values.log(pl_module, values, logger=False)

    def _judge(self, engine: FP8Engine, found: list[OperandStatistics]) -> set[str]:
        """Count unhealthy measurements in a row, and move the layers whose count is full."""
        reasons: dict[str, str] = {}
        for row in found:
            reasons[row.fqn] = reasons.get(row.fqn, "") or self._complaint(row)
        self._follow_names(engine)
        self._unhealthy = {fqn: self._unhealthy.get(fqn, 0) + 1 for fqn, reason in reasons.items() if reason}
        self._counted = {fqn: weakref.ref(engine.layers[fqn]) for fqn in self._unhealthy if fqn in engine.layers}
        if not self.demote:
            return set()
        full = {fqn for fqn, count in self._unhealthy.items() if count >= self.patience}
        for fqn in sorted(full):
            reason = f"{reasons[fqn]} at {self.patience} measurements in a row"
            engine.demote(fqn, reason)
            notice(f"FP8Monitor moved {fqn} back to 16 bits: {reason}.")
            del self._unhealthy[fqn]
        return full

    def _follow_names(self, engine: FP8Engine) -> None:
        """Keep counts with their layers, where modules were inserted before them since."""
        now = {id(layer): fqn for fqn, layer in engine.layers.items()}
        names = {fqn: now.get(id(layer())) for fqn, layer in self._counted.items()}
        # A count from a checkpoint has a name only.
        moved = [(names.get(fqn, fqn), count) for fqn, count in self._unhealthy.items()]
        self._unhealthy = {fqn: count for fqn, count in moved if fqn is not None}

    def _complaint(self, row: OperandStatistics) -> str:
        if row.saturated > self.max_saturated:
            return f"{row.saturated:.1%} of its {row.operand} saturated (bound {self.max_saturated:.1%})"
        if row.flushed > self.max_flushed:
            return f"{row.flushed:.1%} of its {row.operand} flushed to zero (bound {self.max_flushed:.1%})"
        return ""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.event_log.close()
        path = self.event_log.path
        if not self.plot or path is None or not self.history:
            return
        metric = FP8LayerStats(list(dict.fromkeys(record.fqn for record in self.history)), sync_on_compute=False)
        for record in self.history:
            values = {name: getattr(record, name) for name in ("amax", "scale", "saturated", "flushed", "sqnr_db")}
            metric.update(record.step, record.fqn, record.operand, **values)
        save_picture(metric, path.with_suffix(".png"), owner="FP8Monitor")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.event_log.close()

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled, and the layers of a copy are others.
        return {**self.__dict__, "_counted": {}}

    def state_dict(self) -> dict[str, Any]:
        return {"unhealthy": dict(self._unhealthy)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counted = {}
        self._unhealthy = {str(fqn): int(count) for fqn, count in state_dict.get("unhealthy", {}).items()}


def _engine(trainer: Trainer) -> FP8Engine | None:
    plugin = trainer.precision_plugin
    return plugin.fp8_engine if isinstance(plugin, MixedPrecision) else None


def _worst_over_ranks(mine: Iterable[OperandStatistics]) -> list[OperandStatistics]:
    """Merge what the ranks saw, so that all of them judge alike."""
    worst: dict[tuple[str, str], OperandStatistics] = {}
    for row in gather_events(list(mine)):
        first = worst.setdefault((row.fqn, row.operand), row)
        worst[row.fqn, row.operand] = replace(
            first,
            amax=max(first.amax, row.amax),
            scale=min(first.scale, row.scale),
            saturated=max(first.saturated, row.saturated),
            flushed=max(first.flushed, row.flushed),
            sqnr_db=min(first.sqnr_db, row.sqnr_db),
        )
    return list(worst.values())


def _parse_count(argument: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingTypeError(f"{argument}={value!r} is not allowed; it must be an integer.")
    if value < 1:
        raise SettingValueError(f"{argument}={value} is not allowed; it must be at least 1.")
    return value


def _parse_share(argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SettingTypeError(f"{argument}={value!r} is not allowed; it must be a number from 0 to 1.")
    if not 0 <= value <= 1:
        raise SettingValueError(f"{argument}={value} is not allowed; it must be a number from 0 to 1.")
    return float(value)
