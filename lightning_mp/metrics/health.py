"""How well loss scaling is doing, judged from the trajectory of the scale."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, TypeVar

__all__ = [
    "Health",
    "ScaleFall",
    "ScaleLimits",
    "ScaleRecord",
    "find_concern",
    "find_first_applied",
    "health_spans",
    "judge_health",
    "largest_fall",
    "settled_records",
    "shown_spans",
]

Health: TypeAlias = Literal["collapsing", "stuck", "thrashing", "calibrating", "healthy"]
Concern: TypeAlias = Literal["no step applied", "non-finite steps applied"]
_State = TypeVar("_State", bound=str)

COLLAPSE_ATTEMPTS = 50
COLLAPSE_FACTOR = 2.0**8
THRASHING_ATTEMPTS = 100
THRASHING_SHARE = 0.2
# One skip among the first few steps is over a fifth of them, and no reason for advice yet.
MIN_BAD_STEPS = 3
# A picture shows no more changes of health than this.
_MAX_JUDGED = 400


@dataclass(frozen=True)
class ScaleRecord:
    """One attempt of an optimizer step, as ``LossScaleMonitor.history`` and its event log hold it.

    Args:
        step: Index of the attempt, from zero.
        loss_scale: The loss scale that its backward used; 1.0 without loss scaling.
        found_inf: Whether a gradient was Inf or NaN.
        skipped: Whether the update was left out.
    """

    step: int
    loss_scale: float
    found_inf: bool
    skipped: bool


@dataclass(frozen=True)
class ScaleLimits:
    """Between what a scale moves.

    Args:
        is_dynamic: Whether the scale moves at all.
        min_scale: Its floor.
        max_scale: Its cap.
    """

    is_dynamic: bool = False
    min_scale: float = 0.0
    max_scale: float = math.inf


@dataclass(frozen=True)
class ScaleFall:
    """A fall of the scale from one value to another."""

    highest: float
    lowest: float

    @property
    def factor(self) -> float:
        """By how much; infinity for a fall to zero."""
        if self.lowest > 0:
            return self.highest / self.lowest
        return math.inf if self.highest > 0 else 1.0


def find_first_applied(records: Sequence[ScaleRecord]) -> int | None:
    """Return the ``step`` of the first attempt whose update was applied, ``None`` if there is none."""
    return next((record.step for record in records if not record.skipped), None)


def settled_records(records: Sequence[ScaleRecord], first_applied: int | None, num: int) -> list[ScaleRecord]:
    """Return the last ``num`` attempts that came after the first applied one."""
    if first_applied is None:
        return []
    return [record for record in records[-num:] if record.step > first_applied]


def largest_fall(records: Sequence[ScaleRecord]) -> ScaleFall:
    """Return the largest fall of the scale between any two of the records."""
    fall, highest = ScaleFall(1.0, 1.0), 0.0
    for record in records:
        highest = max(highest, record.loss_scale)
        candidate = ScaleFall(highest, record.loss_scale)
        if candidate.factor > fall.factor:
            fall = candidate
    return fall


def judge_health(records: Sequence[ScaleRecord], limits: ScaleLimits, *, first_applied: int | None) -> Health:
    """Return the first state that applies, in this order.

    - ``"collapsing"``: the scale fell by 2**8 or more within the last 50 attempts.
    - ``"stuck"``: the scale is at its floor and overflowed there within the last 100 attempts, or it is
      at its cap.
    - ``"thrashing"``: more than 20% of the last 100 attempts were skipped.
    - ``"calibrating"``: the scale is dynamic and no update was applied yet.
    - ``"healthy"``.

    Collapsing and thrashing look at attempts after the first applied one only: the skips before it
    are how a dynamic scale finds its value.

    Args:
        records: Attempts in order; the last 100 are enough.
        limits: Between what the scale moves.
        first_applied: ``step`` of the first applied attempt, which may be older than ``records``.

    Example:
        >>> records = [ScaleRecord(step, 2.0 ** (16 - step), True, True) for step in range(3)]
        >>> judge_health(records, ScaleLimits(is_dynamic=True), first_applied=None)
        'calibrating'
    """
    if largest_fall(settled_records(records, first_applied, COLLAPSE_ATTEMPTS)).factor >= COLLAPSE_FACTOR:
        return "collapsing"
    if _is_stuck(records, limits):
        return "stuck"
    settled = settled_records(records, first_applied, THRASHING_ATTEMPTS)
    if sum(record.skipped for record in settled) > THRASHING_SHARE * len(settled):
        return "thrashing"
    return "calibrating" if limits.is_dynamic and first_applied is None else "healthy"


def _is_stuck(records: Sequence[ScaleRecord], limits: ScaleLimits) -> bool:
    if not limits.is_dynamic or not records:
        return False
    scale = records[-1].loss_scale
    if scale > limits.min_scale:
        return scale >= limits.max_scale
    recent = records[-THRASHING_ATTEMPTS:]
    return scale >= limits.max_scale or any(r.found_inf and r.loss_scale <= limits.min_scale for r in recent)


def find_concern(records: Sequence[ScaleRecord], *, first_applied: int | None) -> Concern | None:
    """Return what is wrong with a run though the rules of ``judge_health``, which speak of the scale, call it healthy.

    - ``"no step applied"``: all attempts so far, 3 or more, were skipped. Under a dynamic scale that is
      calibrating; a run without one has nothing to calibrate.
    - ``"non-finite steps applied"``: more than 20% of the last 100 attempts, 3 or more, had non-finite
      gradients and were applied all the same, as ``on_nonfinite="ignore"`` asks for.

    Args:
        records: Attempts in order; the last 100 are enough.
        first_applied: ``step`` of the first applied attempt, which may be older than ``records``.
    """
    recent = records[-THRASHING_ATTEMPTS:]
    if first_applied is None:
        return "no step applied" if len(recent) >= MIN_BAD_STEPS else None
    num_applied = sum(record.found_inf and not record.skipped for record in recent)
    if num_applied >= MIN_BAD_STEPS and num_applied > THRASHING_SHARE * len(recent):
        return "non-finite steps applied"
    return None


def health_spans(records: Sequence[ScaleRecord], limits: ScaleLimits) -> list[tuple[int, int, Health]]:
    """Return ``(first step, last step, health)`` for each stretch of one health, for a picture.

    Long trajectories are judged at 400 places.
    """
    return _join_spans(records, partial(judge_health, limits=limits))


def shown_spans(records: Sequence[ScaleRecord], limits: ScaleLimits) -> list[tuple[int, int, Health | Concern]]:
    """Return what ``health_spans`` does, with the concern in place of ``"healthy"`` where there is one."""

    def judge(window: Sequence[ScaleRecord], *, first_applied: int | None) -> Health | Concern:
        health = judge_health(window, limits, first_applied=first_applied)
        return (find_concern(window, first_applied=first_applied) or health) if health == "healthy" else health

    return _join_spans(records, judge)


def _join_spans(records: Sequence[ScaleRecord], judge: Callable[..., _State]) -> list[tuple[int, int, _State]]:
    first_applied = find_first_applied(records)
    stride = max(1, len(records) // _MAX_JUDGED)
    spans: list[tuple[int, int, _State]] = []
    for end in range(len(records), 0, -stride):
        window = records[max(0, end - THRASHING_ATTEMPTS) : end]
        step = window[-1].step
        known = first_applied if first_applied is not None and first_applied <= step else None
        health = judge(window, first_applied=known)
        last = spans[-1][1] if spans and spans[-1][2] == health else step
        if spans and spans[-1][2] == health:
            spans.pop()
        spans.append((step, last, health))
    return spans[::-1]
