"""The advice that goes with an unhealthy loss scale."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lightning_mp.metrics.health import (
    COLLAPSE_ATTEMPTS,
    THRASHING_ATTEMPTS,
    Concern,
    Health,
    ScaleLimits,
    ScaleRecord,
    largest_fall,
    settled_records,
)

__all__ = ["describe_concern", "describe_health", "find_first_overflow", "judged_records", "module_of"]


def judged_records(
    health: Health, records: Sequence[ScaleRecord], *, first_applied: int | None
) -> Sequence[ScaleRecord]:
    """Return the attempts that a state is judged by, of which its message speaks."""
    if health == "collapsing":
        return settled_records(records, first_applied, COLLAPSE_ATTEMPTS)
    if health == "thrashing":
        return settled_records(records, first_applied, THRASHING_ATTEMPTS)
    return records[-THRASHING_ATTEMPTS:]


def find_first_overflow(callbacks: Iterable[Any], *, since: int) -> str | None:
    """Return the name that ``OverflowMonitor`` found for the first overflow at ``since`` or later."""
    for callback in callbacks:
        # By name, since siblings do not import each other; of subclasses too.
        if any(cls.__name__ == "OverflowMonitor" for cls in type(callback).__mro__):
            named = (e.fqn for e in callback.events if e.step >= since and not e.calibrating)
            return next(named, None)
    return None


def module_of(name: str | None, model: nn.Module) -> str | None:
    """Return the module to pin for a culprit: itself, or the owner of a parameter; ``None`` for others."""
    if not name:
        return None
    if name in dict(model.named_parameters()):
        return name.rpartition(".")[0] or None
    return name if name in dict(model.named_modules()) else None


def describe_health(
    health: Health,
    records: Sequence[ScaleRecord],
    limits: ScaleLimits,
    *,
    culprit: str | None = None,
    module: str | None = None,
) -> str:
    """Return what was seen and what to try, in one line.

    Args:
        health: What ``judge_health`` found.
        records: The attempts that it was judged by, as ``judged_records`` gives them.
        limits: Between what the scale moves.
        culprit: Full dotted name of the module or parameter that overflowed first, where known.
        module: The module to pin for it, where there is one.
    """
    where = _where(culprit)
    pin = f"pin it with FP32Pin(modules=[{module!r}])" if module else "pin the module with FP32Pin(modules=[...])"
    if health == "collapsing":
        fall = largest_fall(records)
        return (
            f"collapsing: {_overflows(records)} overflowed and the scale fell from {fall.highest:g} to "
            f"{fall.lowest:g}; {where}; try BF16, or {pin}"
        )
    is_at_cap = health == "stuck" and records[-1].loss_scale >= limits.max_scale
    if is_at_cap and any(record.found_inf for record in records):
        return (
            f"stuck: the scale is at its cap, max_scale={limits.max_scale:g}, and {_overflows(records)} overflowed; "
            f"{where}; try a lower max_scale or a smaller hysteresis, or set a static loss_scale"
        )
    if is_at_cap:
        return (
            f"stuck: the scale is at its cap, max_scale={limits.max_scale:g}, because no step overflows; check that "
            "the loss is connected to the parameters and that gradients are not zero (GradientRangeMonitor shows "
            "them), or set a static loss_scale"
        )
    if health == "stuck":
        return (
            f"stuck: the scale is at its floor, min_scale={limits.min_scale:g}, and {_overflows(records)} overflowed; "
            f"{where}; a non-finite loss cannot be scaled away: check the data, try BF16, or {pin}"
        )
    if health == "thrashing" and limits.is_dynamic:
        return (
            f"thrashing: {_skips(records)} were skipped and the scale moves between {_lowest(records):g} and "
            f"{max(r.loss_scale for r in records):g}; {where}; try a larger growth_interval, a lower learning rate, "
            f"BF16, or {pin}"
        )
    if health == "thrashing":
        return (
            f"thrashing: {_skips(records)} were skipped for Inf or NaN gradients, which no scale explains; {where}; "
            "check the data and the learning rate"
        )
    return health


def describe_concern(concern: Concern, records: Sequence[ScaleRecord], *, culprit: str | None = None) -> str:
    """Return what ``find_concern`` found and what to try, in one line."""
    where = _where(culprit)
    if concern == "no step applied":
        return (
            f"no step was applied: {len(records)} of {len(records)} steps were skipped for Inf or NaN gradients, which "
            f"no scale explains; {where}; check the data and the initial weights"
        )
    recent = records[-THRASHING_ATTEMPTS:]
    return (
        f"non-finite steps were applied: {_overflows(recent)} had Inf or NaN gradients, and their updates make the "
        f"weights NaN; {where}; use on_nonfinite='skip' or 'raise'"
    )


def _where(culprit: str | None) -> str:
    return f"first overflow in {culprit}" if culprit else "add OverflowMonitor() to name the module that overflows"


def _lowest(records: Sequence[ScaleRecord]) -> float:
    return min(record.loss_scale for record in records)


def _overflows(records: Sequence[ScaleRecord]) -> str:
    return f"{sum(record.found_inf for record in records)} of the last {len(records)} steps"


def _skips(records: Sequence[ScaleRecord]) -> str:
    return f"{sum(record.skipped for record in records)} of the last {len(records)} steps"
