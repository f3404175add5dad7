"""Callback that holds gradients against what each 16-bit and 8-bit format can represent."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_mp.callbacks.event_log import EventLog
from lightning_mp.callbacks.pictures import save_picture
from lightning_mp.callbacks.step_values import StepValues
from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.metrics import GradientExponentHistogram
from lightning_mp.metrics.gradient_tally import GradientTally, read_tallies, suggest_scale, tally_gradients, total_tally
from lightning_mp.numerics import ExponentHistogram
from lightning_mp.precision import MixedPrecision

__all__ = ["GradientRange", "GradientRangeMonitor"]

_LOGGED = ("flushed_unscaled", "flushed", "saturated", "suggested_scale")
_ALL = "all"


@dataclass(frozen=True)
class GradientRange:
    """What the unscaled gradients of one step looked like, in one parameter group or in all.

    Shares are of the nonzero gradients, and speak of FP16, the format that needs loss scaling.

    Args:
        step: Index of the attempt, from zero.
        group: ``"all"``, or the ``"name"`` of a parameter group, else ``"group0"``, ``"group1"``, ...; with
            several optimizers after ``"optimizer0/"``, ``"optimizer1/"``, ... Where several groups have one
            name, or a group has the name ``"all"``, its index follows: ``"decay.0"``, ``"decay.1"``.
        histogram: Elements by exponent ``floor(log2(|g|))``; exponents without elements are left out.
        flushed_unscaled: Share that FP16 flushes to zero without a loss scale (magnitude at or below 2**-25).
        flushed: The same at the loss scale of this step.
        saturated: Share beyond 65504 at the loss scale of this step, infinities included.
        suggested_scale: Largest power of two that leaves the largest gradient a factor of 2 to 4 below
            65504, at most ``DynamicLossScale().max_scale``. ``None`` where the largest gradient is not known:
            without nonzero gradients, and with an Inf or NaN among them, as after an overflow.
    """

    step: int
    group: str
    histogram: dict[int, int]
    flushed_unscaled: float
    flushed: float
    saturated: float
    suggested_scale: float | None


class GradientRangeMonitor(Callback):
    """Measure the exponents of gradients every N steps against FP16, BF16, E4M3FN and E5M2.

    Works with any precision plugin; gradients are unscaled here whatever the plugin, and measured
    before clipping. FP32 and BF16 runs tell what FP16 would lose and which loss scale would keep it. In
    an FP16 run the backward pass has flushed values already, which arrive as zeros and are not
    nonzero gradients any more: ``flushed`` is a lower bound there.

    The device is read at measured steps only. Under FSDP and FSDP2 the shards of
    all ranks are added up; what a further mesh dimension replicates counts once per copy.

    Each measured value goes to the loggers once, with the step it was measured at, whatever
    ``log_every_n_steps`` is, and to ``trainer.callback_metrics``: for all parameters as
    ``gradient_range/<field>`` and, where there are several parameter groups, as
    ``gradient_range/<group>/<field>``. With several optimizers, which step at different numbers, there is
    no total: each has ``gradient_range/optimizer0/all/<field>`` and, where it has several groups,
    ``gradient_range/optimizer0/<group>/<field>``, counted as in ``trainer.optimizers``. Fields:

    - ``flushed_unscaled``, ``flushed``, ``saturated``: shares of nonzero gradients (0 to 1), see
      ``GradientRange``.
    - ``suggested_scale``: a loss scale for FP16 (no unit); left out where it is ``None``, as at a step that
      overflowed.

    The event log ``gradient_range.jsonl`` holds one ``GradientRange`` per group and measured step. At the
    end of ``fit`` the picture ``gradient_range.png`` of all measured steps lies beside it.

    Args:
        every_n_steps: Attempts between two measurements; the first attempt is measured.
        plot: Whether to draw the picture, where a directory is known and matplotlib is installed.
        dirpath: Directory of event log and picture; ``None`` for that of the logger.

    Attributes:
        history: What was measured, in order.

    Raises:
        SettingTypeError: If ``every_n_steps`` is not an integer.
        SettingValueError: If ``every_n_steps`` is below 1.

    References:
        Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2 (arXiv:1710.03740).

    Example:
        >>> GradientRangeMonitor(every_n_steps=50).history
        []
    """

    def __init__(self, every_n_steps: int = 100, plot: bool = True, dirpath: str | Path | None = None) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int):
            raise SettingTypeError(f"every_n_steps={every_n_steps!r} is not allowed; it must be an integer.")
        if every_n_steps < 1:
            raise SettingValueError(f"every_n_steps={every_n_steps} is not allowed; it must be at least 1.")
        self.every_n_steps = every_n_steps
        self.plot = plot
        self.event_log = EventLog("gradient_range", dirpath)
        self.history: list[GradientRange] = []
        self._unlogged: dict[str, float] = {}
        self._values = StepValues()
        self._loss_scale = 1.0
        self._seen: dict[int, int] = {}
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.event_log.open(trainer)
        step = trainer.global_step
        logged = [_from_event(event) for event in self.event_log.read()]
        kept = [found for found in self.history if found.step < step]
        self.history = logged if len(logged) > len(kept) else kept
        self._unlogged = {}
        self._seen, self._first_step = {}, step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._is_due(trainer.global_step, optimizer):
            return
        sharded = _is_sharded(trainer, optimizer)
        param_groups = optimizer.param_groups
        groups = dict(zip(_group_names(param_groups), map(_gradients, param_groups), strict=True))
        # A rank whose shards have no gradients still takes part in adding up.
        if not sharded and not any(groups.values()):
            return
        plugin = trainer.precision_plugin
        self._loss_scale = _read_loss_scale(plugin)
        factor = 1.0 / self._loss_scale if _arrives_scaled(plugin, optimizer) else 1.0
        device = trainer.strategy.root_device
        on_device = {
            name: tally_gradients(gradients, device, loss_scale=self._loss_scale, factor=factor)
            for name, gradients in groups.items()
        }
        tallies = read_tallies(on_device, is_sharded=sharded)
        prefix = _prefix(trainer.optimizers, optimizer)
        everything = _describe(total_tally(tallies.values()), trainer.global_step, prefix + _ALL)
        groups_found = [_describe(tally, trainer.global_step, prefix + name) for name, tally in tallies.items()]
        for found in (everything, *groups_found):
            self.history.append(found)
            self.event_log.append(found)
        self._publish(trainer, [everything, *groups_found] if len(groups_found) > 1 else [everything])

    def _publish(self, trainer: Trainer, measured: list[GradientRange]) -> None:
        """Write to the loggers at once: ``log`` would write at log steps, what was measured last or nothing."""
        values = {name: value for found in measured for name, value in _logged_values(found)}
        self._unlogged |= values
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=measured[0].step)

    def _is_due(self, step: int, optimizer: Optimizer) -> bool:
        """Tell whether a multiple of ``every_n_steps`` lies after this optimizer's last step, up to ``step``.

        With several optimizers ``global_step`` counts the steps of all, so each meets some numbers only.
        """
        last = self._seen.get(id(optimizer), self._first_step - 1)
        self._seen[id(optimizer)] = step
        return step // self.every_n_steps > last // self.every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._values.keys:
            self._values.drop(trainer)
        if self._unlogged:
            self._values.log(pl_module, self._unlogged, logger=False)
            self._unlogged = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.event_log.close()
        path = self.event_log.path
        if not self.plot or path is None or not self.history:
            return
        metric = GradientExponentHistogram(sync_on_compute=False)
        for found in self.history:
            if found.group.rpartition("/")[2] == _ALL:
                metric.update(_to_counts(found.histogram))
        name = "GradientRangeMonitor"
        save_picture(metric, path.with_suffix(".png"), owner=name, loss_scale=self._loss_scale)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.event_log.close()


def _gradients(group: dict[str, Any]) -> list[Tensor]:
    return [p.grad for p in group["params"] if p.grad is not None]


def _group_names(groups: list[dict[str, Any]]) -> list[str]:
    """Return a name of its own for each group, none of which reads as that of all."""
    given = [str(group.get("name", f"group{index}")) for index, group in enumerate(groups)]
    names: list[str] = []
    for index, name in enumerate(given):
        is_plain = given.count(name) == 1 and name.rpartition("/")[2] != _ALL
        unique = name if is_plain else f"{name}.{index}"
        while unique in names or (unique in given and not is_plain):
            unique = f"{unique}.{index}"
        names.append(unique)
    return names


def _prefix(optimizers: list[Optimizer], optimizer: Optimizer) -> str:
    if len(optimizers) == 1:
        return ""
    return f"optimizer{next(i for i, each in enumerate(optimizers) if each is optimizer)}/"


def _read_loss_scale(plugin: Any) -> float:
    scaler = getattr(plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _arrives_scaled(plugin: Any, optimizer: Optimizer) -> bool:
    """Tell whether Lightning's own plugin leaves unscaling to the optimizer, as for fused ones."""
    scaler = getattr(plugin, "scaler", None)
    handled = getattr(optimizer, "_step_supports_amp_scaling", False)
    return scaler is not None and handled and not isinstance(plugin, MixedPrecision)


def _is_sharded(trainer: Trainer, optimizer: Optimizer) -> bool:
    if type(trainer.model).__name__ == "FullyShardedDataParallel":
        return True
    return any(hasattr(p, "to_local") for group in optimizer.param_groups for p in group["params"])


def _describe(tally: GradientTally, step: int, group: str) -> GradientRange:
    nonzero = max(1, tally.num_nonzero)
    bins = zip(ExponentHistogram.exponents, tally.histogram, strict=True)
    return GradientRange(
        step=step,
        group=group,
        histogram={exponent: count for exponent, count in bins if count},
        flushed_unscaled=tally.num_flushed_unscaled / nonzero,
        flushed=tally.num_flushed / nonzero,
        saturated=tally.num_saturated / nonzero,
        # Those that overflowed are the largest: what is left of the others would suggest a scale above this one.
        suggested_scale=None if tally.num_nonfinite else suggest_scale(tally.amax),
    )


def _logged_values(found: GradientRange) -> list[tuple[str, float]]:
    prefix = "gradient_range" if found.group == _ALL else f"gradient_range/{found.group}"
    values = [(f"{prefix}/{name}", getattr(found, name)) for name in _LOGGED]
    return [(name, value) for name, value in values if value is not None]


def _from_event(event: dict[str, Any]) -> GradientRange:
    # JSON has text keys only.
    return GradientRange(**{**event, "histogram": {int(e): count for e, count in event["histogram"].items()}})


def _to_counts(histogram: dict[int, int]) -> ExponentHistogram:
    counts = torch.tensor([histogram.get(exponent, 0) for exponent in ExponentHistogram.exponents])
    return ExponentHistogram(counts, torch.tensor(0), torch.tensor(0))
