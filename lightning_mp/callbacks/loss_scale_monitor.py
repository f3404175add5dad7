"""Callback that follows the loss scale and the skipped steps, and judges them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_mp.callbacks.added_hooks import add_to_hook, remove_added_hooks, without_added_hooks
from lightning_mp.callbacks.event_log import EventLog
from lightning_mp.callbacks.health_message import (
    describe_concern,
    describe_health,
    find_first_overflow,
    judged_records,
    module_of,
)
from lightning_mp.callbacks.interruption import settle_interrupted
from lightning_mp.callbacks.pictures import save_picture
from lightning_mp.callbacks.step_values import StepValues
from lightning_mp.errors import LightningMPError
from lightning_mp.loss_scale import DynamicLossScale
from lightning_mp.metrics import Health, LossScaleTrajectory, ScaleLimits, ScaleRecord, find_first_applied, judge_health
from lightning_mp.metrics.health import MIN_BAD_STEPS, find_concern
from lightning_mp.precision import MixedPrecision, StepReport
from lightning_mp.precision.notices import notice, notice_once

__all__ = ["LossScaleMonitor", "ScaleRecord"]

# Of a run that goes on elsewhere: as many attempts as the rules of health look back.
_NUM_SAVED = 100


class LossScaleMonitor(Callback):
    """Follow the loss scale, the overflows and the skipped steps, and say when they go wrong.

    Works with ``MixedPrecision`` in every precision (without loss scaling the scale is 1.0, and skips
    and non-finite gradients are what it shows), and with the ``GradScaler`` of Lightning's own plugins,
    whose overflows show as a fall of the scale. It never waits for the device between log steps.

    Logged every ``log_every_n_steps``, to any logger and to ``trainer.callback_metrics``:

    - ``loss_scale``: the factor on the loss that the latest settled step used (no unit).
    - ``skipped_steps``: updates left out since the start of training (count, resumed runs included).
    - ``overflow_rate``: share of the last 100 attempts with Inf or NaN gradients (0 to 1).

    The event log ``loss_scale.jsonl`` holds one ``ScaleRecord`` per attempt, with the scale that its
    backward used. At the end of ``fit`` the picture ``loss_scale.png`` lies beside it.

    Args:
        plot: Whether to draw the picture, where a directory is known and matplotlib is installed.
        dirpath: Directory of event log and picture; ``None`` for that of the logger.

    Attributes:
        history: Frozen records, one per attempt. A resumed run begins with those of the event log, or
            with the last 100 that the checkpoint holds.
        message: The latest advice, empty until something was wrong; fewer than 3 bad steps are no reason for advice.
            What the health, which speaks of the scale, has no word for is said too: that no step was applied in
            a run without a scale to calibrate, and that steps with Inf or NaN gradients were applied.

    Example:
        >>> LossScaleMonitor().health
        'healthy'
    """

    def __init__(self, plot: bool = True, dirpath: str | Path | None = None) -> None:
        self.plot = plot
        self.event_log = EventLog("loss_scale", dirpath)
        self.history: list[ScaleRecord] = []
        self.message = ""
        self._limits = ScaleLimits()
        self._first_applied: int | None = None
        self._num_skipped = 0
        self._values = StepValues()
        self._announced: str = "healthy"
        self._watch: _ScalerWatch | None = None
        self._plugin: MixedPrecision | None = None
        self._listener: Callable[[StepReport], None] | None = None

    @property
    def health(self) -> Health:
        """The first that applies: collapsing, stuck, thrashing, calibrating, healthy (``metrics.judge_health``)."""
        return judge_health(self.history, self._limits, first_applied=self._first_applied)

    # --- Listening -------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: on_fit_start also comes before the learning-rate finder's probing.
        self._stop_listening()
        self.event_log.open(trainer)
        self._continue_at(trainer.global_step)
        plugin = trainer.precision_plugin
        if isinstance(plugin, MixedPrecision):
            self._listen_to(plugin, trainer)
            return
        scaler = getattr(plugin, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            self._watch = _ScalerWatch(scaler)
            add_to_hook(self, "on_before_optimizer_step", self._open_step)
            self._limits = ScaleLimits(is_dynamic=True)
            return
        self._limits = ScaleLimits()
        notice_once(
            f"LossScaleMonitor: {type(plugin).__name__} has no loss scale and does not look at gradients, so that "
            "overflows and skipped steps are not available. Use MixedPrecision(...), which checks every step."
        )

    def _continue_at(self, step: int) -> None:
        logged = [ScaleRecord(**event) for event in self.event_log.read()]
        kept = [record for record in self.history if record.step < step]
        self.history = logged if len(logged) > len(kept) else kept
        if len(logged) > len(kept) or not self.history:
            self._num_skipped = sum(record.skipped for record in self.history)
        if not self.history:
            self._first_applied, self.message, self._announced = None, "", "healthy"
        elif self._first_applied is None:
            self._first_applied = find_first_applied(self.history)

    def _listen_to(self, plugin: MixedPrecision, trainer: Trainer) -> None:
        rule = plugin.scaler.rule if plugin.scaler is not None else None
        self._limits = ScaleLimits()
        if isinstance(rule, DynamicLossScale):
            self._limits = ScaleLimits(is_dynamic=True, min_scale=rule.min_scale, max_scale=rule.max_scale)

        def listen(report: StepReport) -> None:
            # A learning-rate finder that probes during training takes the callbacks away, not the plugin.
            if self in trainer.callbacks:  # type: ignore[attr-defined]
                self._add(ScaleRecord(report.step, report.loss_scale, report.found_inf, report.skipped))

        if self._first_applied is None and plugin.applied_steps > 0:
            # The run was resumed, and this monitor added to it: the scale had found its value before.
            self._first_applied = trainer.global_step - 1
        plugin.add_step_listener(listen)
        self._plugin, self._listener = plugin, listen

    def _stop_listening(self) -> None:
        if self._plugin is not None and self._listener is not None:
            self._plugin.remove_step_listener(self._listener)
        self._plugin, self._listener, self._watch = None, None, None
        remove_added_hooks(self)

    def _settle(self) -> None:
        if self._plugin is not None:
            self._plugin.settle()
        for record in self._watch.read() if self._watch is not None else ():
            self._add(record)

    def __getstate__(self) -> dict[str, Any]:
        # The copy that a launcher or deepcopy makes listens to nothing until it trains.
        return {**without_added_hooks(self.__dict__), "_plugin": None, "_listener": None, "_watch": None}

    def _add(self, record: ScaleRecord) -> None:
        self.history.append(record)
        self._num_skipped += record.skipped
        if self._first_applied is None and not record.skipped:
            self._first_applied = record.step
        if record.found_inf:
            self.event_log.append(record)
        else:
            self.event_log.defer(record)

    # --- Steps -----------------------------------------------------------------------------------

    def _open_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._watch is not None:
            self._watch.open(trainer.global_step, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._values.keys:
            self._values.drop(trainer)
        if _logs_now(trainer):
            self._settle()
            self._log(trainer, pl_module)
            self.event_log.flush()

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.history:
            return
        plugin = trainer.precision_plugin
        skipped = plugin.skipped_steps if isinstance(plugin, MixedPrecision) else self._num_skipped
        recent = self.history[-100:]
        rate = sum(record.found_inf for record in recent) / len(recent)
        values = {"loss_scale": self.history[-1].loss_scale, "skipped_steps": skipped, "overflow_rate": rate}
        self._values.log(pl_module, values)
        self._announce(trainer, pl_module)

    def _announce(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is wrong when the health turns bad, once per turn."""
        health = self.health
        recent = judged_records(health, self.history, first_applied=self._first_applied)
        if health == "thrashing" and sum(record.skipped for record in recent) < MIN_BAD_STEPS:
            return
        concern = find_concern(recent, first_applied=self._first_applied) if health == "healthy" else None
        # A scale at its cap asks for other advice once a step overflows there.
        is_overflowing = health == "stuck" and any(record.found_inf for record in recent)
        state = concern or (f"{health} with overflows" if is_overflowing else health)
        is_new = state != self._announced
        self._announced = state
        # The count in the message of a concern grows; it is announced once all the same.
        if state in ("healthy", "calibrating") or not (is_new or concern):
            return
        culprit = find_first_overflow(trainer.callbacks, since=recent[0].step)  # type: ignore[attr-defined]
        if concern is not None:
            self.message = describe_concern(concern, self.history, culprit=culprit)
        else:
            module = module_of(culprit, pl_module)
            self.message = describe_health(health, recent, self._limits, culprit=culprit, module=module)
        if is_new:
            notice(f"LossScaleMonitor: {self.message}")

    # --- End -------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle()
        # Before any callback writes a page with the message, in whatever order they stand.
        if self.history:
            self._announce(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The plugin has settled its last step in its teardown, which comes before this hook.
        self._finish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        settle_interrupted(self._settle)
        if isinstance(exception, LightningMPError):
            self._finish(trainer, pl_module)
        self._stop_listening()
        self.event_log.close()

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_listening()
        if self.history:
            self._announce(trainer, pl_module)
        self.event_log.close()
        if self.plot and self.history and self.event_log.path is not None:
            # Only rank zero draws: a sync would wait for the others forever.
            trajectory = LossScaleTrajectory(self._limits, sync_on_compute=False)
            trajectory.update_from(self.history)
            save_picture(trajectory, self.event_log.path.with_suffix(".png"), owner="LossScaleMonitor")

    # --- Checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        # Callbacks are saved before the plugin settles the step that the checkpoint comes after.
        self._settle()
        recent = [[r.step, r.loss_scale, r.found_inf, r.skipped] for r in self.history[-_NUM_SAVED:]]
        return {"version": 1, "recent": recent, "first_applied": self._first_applied, "skipped": self._num_skipped}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.history = [ScaleRecord(*values) for values in state_dict["recent"]]
        self._first_applied = state_dict["first_applied"]
        self._num_skipped = state_dict["skipped"]


def _logs_now(trainer: Trainer) -> bool:
    """Tell whether Lightning logs after this batch; its own property costs three times as much."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if every and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0:
        return True
    return bool(trainer.fast_dev_run or (every and trainer.should_stop))  # type: ignore[attr-defined]


class _ScalerWatch:
    """Derives from the scale of a ``torch.amp.GradScaler`` what became of each step.

    The scale falls if and only if gradients were non-finite, and the update is left out then. Scales
    are copied on their device and read by ``read`` alone.
    """

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler
        self._opened: tuple[int, Tensor] | None = None
        self._settled: list[tuple[int, Tensor, Tensor]] = []

    def open(self, step: int, optimizer: Optimizer) -> None:
        """Note the scale before a step; one without gradients is no attempt."""
        self.close()
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            self._opened = (step, self._scale())

    def close(self) -> None:
        """Note the scale after the step."""
        if self._opened is not None:
            self._settled.append((*self._opened, self._scale()))
            self._opened = None

    def read(self) -> list[ScaleRecord]:
        """Return the steps noted since the last call; waits for the device."""
        settled, self._settled = self._settled, []
        if not settled:
            return []
        pairs = torch.stack([torch.stack(pair[1:]) for pair in settled]).tolist()
        records = []
        for (step, _, _), (before, after) in zip(settled, pairs, strict=True):
            # GradScaler has no floor: at zero every gradient is 0/0, and the scale cannot fall further.
            overflowed = after < before or before == 0
            records.append(ScaleRecord(step, before, overflowed, overflowed))
        return records

    def _scale(self) -> Tensor:
        scale = self._scaler._scale
        return torch.tensor(self._scaler.get_scale()) if scale is None else scale.detach().clone().reshape(())
