"""What an overflow was: the finding of the engine, and the event that users read."""

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lightning_mp.numerics import NonfiniteKind
from lightning_mp.overflow.statistics import TensorStats

__all__ = ["Finding", "OverflowEvent", "OverflowPhase", "describe_event", "make_finding"]

OverflowPhase: TypeAlias = Literal["batch", "forward", "loss", "backward"]


@dataclass(frozen=True)
class Finding:
    """Where values first went non-finite; the fields are those of ``OverflowEvent``."""

    phase: OverflowPhase
    fqn: str
    kind: NonfiniteKind
    count: int
    amax: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OverflowEvent:
    """One step whose gradients were Inf or NaN, and what caused it.

    Args:
        step: Index of the optimizer step, attempts counted, as in ``StepReport``.
        batch_idx: Index of the batch in its epoch.
        rank: Global rank whose batch it was. Of a parameter that is named by reduced gradients, which
            are the same on all ranks, the first rank.
        phase: ``"batch"``, ``"forward"``, ``"loss"`` or ``"backward"``.
        fqn: Module or parameter; the item's path for ``"batch"``, ``"loss"`` for the loss. What the
            LightningModule computes outside its submodules has its class name.
        kind: ``"inf"``, ``"nan"`` or ``"both"``.
        count: Non-finite elements: in the output for ``"forward"``, in the gradients of input and
            parameters for ``"backward"``; 0 where they were not counted.
        amax: Largest magnitudes, where known: ``"input"``, ``"output"``, ``"weight"`` of the module and
            ``"grad"``, the gradient of its output (of a parameter: its own gradient), multiplied by
            the loss scale unless it is a parameter's. Infinity counts as a magnitude, NaN gives NaN.
        loss_scale: Loss scale that the step's backward used.
        calibrating: Whether a dynamic scale had no applied step yet.
    """

    step: int
    batch_idx: int
    rank: int
    phase: OverflowPhase
    fqn: str
    kind: NonfiniteKind
    count: int
    amax: dict[str, float]
    loss_scale: float
    calibrating: bool


def make_finding(phase: OverflowPhase, fqn: str, nonfinite: TensorStats, amaxes: dict[str, TensorStats]) -> Finding:
    """Build a finding from the numbers of what is non-finite, and of what explains it."""
    known = {name: stats.amax for name, stats in amaxes.items() if stats.amax is not None}
    return Finding(phase, fqn, nonfinite.kind or "inf", nonfinite.count, known)


def describe_event(event: OverflowEvent) -> str:
    """Return the sentence about an event that warnings and errors carry."""
    values = {"inf": "Inf", "nan": "NaN", "both": "Inf and NaN"}[event.kind]
    # A module that computes the loss may have been handed masked scores.
    is_input_finite = math.isfinite(event.amax.get("input", 0.0))
    where = {
        "batch": f"item {event.fqn!r} of the batch holds {values}",
        "forward": f"{event.fqn} made {values} in forward",
        "loss": f"the loss is {values}" + (" while all activations are finite" if is_input_finite else ""),
        "backward": f"the gradient went {values} in {event.fqn}",
    }[event.phase]
    amaxes = ", ".join(f"{name} {value:.3g}" for name, value in event.amax.items())
    details = "; ".join(filter(None, [f"{event.count} elements" if event.count else "", amaxes and f"amax {amaxes}"]))
    return (
        f"step {event.step}, batch {event.batch_idx}, rank {event.rank}: {where}"
        f"{f' ({details})' if details else ''}, loss scale {event.loss_scale:g}."
    )
