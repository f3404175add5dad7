"""The trajectory of the loss scale over a run."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mp.metrics.figures import CONCERN_COLOR, HEALTH_COLORS, INK, MARK, new_axes
from lightning_mp.metrics.health import ScaleLimits, ScaleRecord, shown_spans
from lightning_mp.metrics.rows import RowsMetric

__all__ = ["LossScaleTrajectory", "change_points"]


class LossScaleTrajectory(RowsMetric):
    """Collect scale, findings and skips of every optimizer step.

    After a sync over ranks each step is there once: ranks share one scale, and a step is skipped on
    all of them.

    Args:
        limits: Between what the scale moves, for the health that ``plot`` shows.
        kwargs: Settings of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Example:
        >>> trajectory = LossScaleTrajectory()
        >>> trajectory.update(step=0, loss_scale=65536.0, found_inf=True, skipped=True)
        >>> trajectory.update(step=1, loss_scale=32768.0, found_inf=False, skipped=False)
        >>> trajectory.compute()["loss_scale"]
        tensor([65536., 32768.])
    """

    row_dtypes = {  # noqa: RUF012  (torchmetrics reads class attributes of metrics as settings too)
        "step": torch.int64,
        "loss_scale": torch.float32,
        "found_inf": torch.int64,
        "skipped": torch.int64,
    }

    def __init__(self, limits: ScaleLimits | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.limits = limits or ScaleLimits()

    def update(
        self,
        step: int | Sequence[int] | Tensor,
        loss_scale: float | Sequence[float] | Tensor,
        found_inf: bool | Sequence[bool] | Tensor,
        skipped: bool | Sequence[bool] | Tensor,
    ) -> None:
        """Add one step, or several of them as sequences or 1-dim tensors of one length."""
        self.add_rows(step=step, loss_scale=loss_scale, found_inf=found_inf, skipped=skipped)

    def update_from(self, records: Sequence[ScaleRecord]) -> None:
        """Add what a ``LossScaleMonitor`` recorded."""
        if records:
            self.update(
                [r.step for r in records],
                [r.loss_scale for r in records],
                [r.found_inf for r in records],
                [r.skipped for r in records],
            )

    def compute(self) -> dict[str, Tensor]:
        """Return 1-dim tensors ``step`` (ascending), ``loss_scale``, ``found_inf`` and ``skipped`` (bool)."""
        rows = self.rows()
        steps, place = torch.unique(rows["step"], return_inverse=True)
        merged = {"step": steps}
        for name in ("loss_scale", "found_inf", "skipped"):
            values = rows[name]
            empty = torch.zeros(len(steps), dtype=values.dtype, device=values.device)
            merged[name] = empty.scatter_reduce(0, place, values, "amax", include_self=False)
        return {
            **merged,
            "found_inf": merged["found_inf"] != 0,
            "skipped": merged["skipped"] != 0,
        }

    def records(self) -> list[ScaleRecord]:
        """Return the steps as records."""
        return _records(self.compute())

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw the scale on a logarithmic axis, skipped steps as marks, and the health as bands.

        Args:
            val: What ``compute`` returned; computed if ``None``.
            ax: Axes to draw into.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        figure, axes = new_axes(ax)
        records = _records(self.compute() if val is None else val)
        _draw_health(axes, records, self.limits)
        line = change_points(records)
        axes.plot(
            [r.step for r in line], [r.loss_scale for r in line], color=INK, drawstyle="steps-post", label="scale"
        )
        bad = [r for r in records if r.found_inf]
        skipped, kept = [r for r in bad if r.skipped], [r for r in bad if not r.skipped]
        for marked, sign, label in ((skipped, "x", "skipped"), (kept, "o", "non-finite, applied")):
            if marked:
                place = [r.step for r in marked], [r.loss_scale for r in marked]
                axes.plot(*place, sign, color=MARK, label=f"{label} ({len(marked)})", zorder=3)
        _dress(axes, records)
        return figure, axes


def _dress(axes: Any, records: Sequence[ScaleRecord]) -> None:
    axes.set_yscale("log", base=2)
    scales = [r.loss_scale for r in records if r.loss_scale > 0]
    if scales:
        axes.set_ylim(min(scales) / 4, max(scales) * 4)
    axes.set_xlabel("step (attempts of the optimizer)")
    axes.set_ylabel("loss scale used")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", framealpha=0.9)


def _draw_health(axes: Any, records: Sequence[ScaleRecord], limits: ScaleLimits) -> None:
    named = set()
    spans = shown_spans(records, limits)
    for index, (first, last, health) in enumerate(spans):
        end = spans[index + 1][0] if index + 1 < len(spans) else last + 1
        label = None if health in named else health
        axes.axvspan(first, end, color=HEALTH_COLORS.get(health, CONCERN_COLOR), alpha=0.18, linewidth=0, label=label)
        named.add(health)


def change_points(records: Sequence[ScaleRecord]) -> list[ScaleRecord]:
    """Return the records between which the scale is constant, with the last one: all that a line needs."""
    previous = math.nan
    found = []
    for record in records:
        if record.loss_scale != previous:
            found.append(record)
        previous = record.loss_scale
    return [*found, *records[-1:]]


def _records(columns: dict[str, Tensor]) -> list[ScaleRecord]:
    # torchmetrics makes scalars of tensors with one element.
    names = ("step", "loss_scale", "found_inf", "skipped")
    lists = (columns[name].reshape(-1).tolist() for name in names)
    return [ScaleRecord(*values) for values in zip(*lists, strict=True)]
