"""The search for the culprit of one step that went non-finite."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_mp.callbacks.batch_window import HeldBatch
from lightning_mp.callbacks.event_log import gather_events
from lightning_mp.callbacks.interruption import is_alone
from lightning_mp.callbacks.overflow_watch import parameters_of, training_loss
from lightning_mp.callbacks.quiet_logs import quiet_logs
from lightning_mp.overflow import (
    Finding,
    OverflowEvent,
    RanksPartedError,
    StateLostError,
    Together,
    WrittenState,
    find_culprit,
    find_in_gradients,
    part_for,
    replay,
)
from lightning_mp.precision import MixedPrecision, StepReport
from lightning_mp.precision.notices import notice_once

__all__ = ["Answer", "Inquiry", "Probe"]

Probe: TypeAlias = Literal["replay", "gradients", "always"]

_UNKNOWN = Finding("backward", "unknown", "inf", 0)
_PARTED = "the replay came to a collective while that of another rank had ended"


@dataclass(frozen=True)
class Answer:
    """What an inquiry found.

    Args:
        events: Of all ranks, the same on each; at least one.
        held: The batch of this rank to keep for its event, or that any of its batches may be the cause of.
        failure: Why a replay failed, on this rank or another.
    """

    events: list[OverflowEvent]
    held: HeldBatch | None
    failure: str | None


@dataclass(frozen=True)
class Inquiry:
    """What is known of a step whose gradients were non-finite.

    Args:
        trainer: In the step, or after it and before the next update.
        module: The LightningModule in training.
        plugin: Ours, or ``None``.
        report: Outcome of the step.
        method: How to look.
        batches: Those whose gradients the step was made of.
        stepped: The optimizer of the step, where there are several.
        amaxes: Largest magnitude of each gradient, if they were measured before they were lost.
        written: What steps were seen to write.
        has_gradients: Whether the gradients of the step are still there.
        calibrating: Whether a dynamic scale still looks for its value.
    """

    trainer: Trainer
    module: LightningModule
    plugin: MixedPrecision | None
    report: StepReport
    method: Probe
    batches: list[HeldBatch]
    stepped: Optimizer | None
    amaxes: tuple[list[Parameter], Tensor] | None
    written: WrittenState | None
    has_gradients: bool
    calibrating: bool

    def run(self) -> Answer:
        """Look into the step; all ranks must call this together, unless the run is being interrupted."""
        found, failure = self._find()
        held, finding = found if found is not None else (None, None)
        event = self._make_event(held, finding) if finding is not None else None
        alone = is_alone(self.trainer)
        answers = [(event, failure)] if alone else gather_events([(event, failure)])
        events = [event for event, _ in answers if event is not None]
        failures = [failure for _, failure in answers if failure is not None]
        # What made one rank end comes before that others could not go on without it.
        failure = next((failure for failure in failures if failure != _PARTED), _PARTED if failures else None)
        if not events:
            held = self.batches[-1] if self.batches else None
            event = self._make_event(held, self._find_in_gradients())
            # Reduced gradients are the same on all ranks, shards are not: the first rank that knows a name.
            every = [event] if alone else gather_events([event])
            events = [next((e for e in every if e.fqn != _UNKNOWN.fqn), every[0])]
        return Answer(events, held, failure)

    def _find(self) -> tuple[tuple[HeldBatch, Finding] | None, str | None]:
        """Return the batch and the finding of replay or probes, and why the replay failed if it did."""
        if self.method == "gradients" or (self.method == "replay" and is_alone(self.trainer)):
            return None, None
        if self.method == "replay" and not self.report.skipped:
            return None, "the update was applied (on_nonfinite='ignore'), so that its weights are gone"
        if self.method == "replay" and not self.module.training:
            return None, None
        together = Together()
        for held in self.batches:
            finding, failure = self._try_to_look_at(held, together)
            # Ranks replay the same batches: one that stopped earlier would miss the collectives of the others.
            is_done = finding is not None or failure is not None
            if together.any_rank(is_done) if self.method == "replay" else is_done:
                return (held, finding) if finding is not None else None, failure
        return None, None

    def _try_to_look_at(self, held: HeldBatch, together: Together) -> tuple[Finding | None, str | None]:
        try:
            return self._look_at(held, together), None
        except RanksPartedError:
            return None, _PARTED
        except StateLostError as error:
            # From now on it is kept.
            notice_once(
                f"OverflowMonitor: {error}, so that a replay would start from it. A parameter is named for this "
                "overflow, and later ones start from what is there before the step; probe='always' needs no replay."
            )
            return None, None
        # Watching must not end a run: whatever the user's code or the device raises is said, once.
        except Exception as error:
            return None, f"the replay failed with {type(error).__name__}: {error}"

    def _look_at(self, held: HeldBatch, together: Together) -> Finding | None:
        if held.seen is not None:
            held.seen.statistics.read()
            seen = held.seen if self.stepped is None else part_for(held.seen, parameters_of(self.stepped))
            if seen is not None and self.plugin is not None and not self.report.loss_nonfinite:
                # The loss that was noted is the scaled one, which may overflow by itself.
                seen = replace(seen, loss=[])
            return None if seen is None else find_culprit(seen)
        quiet = quiet_logs(self.trainer, self.module, held.batch)
        with quiet, nullcontext() if self.plugin is None else self.plugin.unrecorded():
            return replay(
                self.module,
                partial(training_loss, self.trainer, self.module, held.batch_idx),
                held.batch,
                rng=held.rng,
                loss_scale=self.report.loss_scale,
                region=self.trainer.precision_plugin.forward_context,
                silenced=("log", "log_dict"),
                state=None if self.written is None else (self.written, held.state),
                together=together,
            )

    def _find_in_gradients(self) -> Finding:
        named = list(self.module.named_parameters())
        if self.stepped is not None:
            stepped = set(parameters_of(self.stepped))
            named = [(name, parameter) for name, parameter in named if parameter in stepped]
        if self.amaxes is not None:
            params, amaxes = self.amaxes
            largest = dict(zip(map(id, params), amaxes.tolist(), strict=True))
            for name, parameter in reversed(named):
                value = largest.get(id(parameter), 0.0)
                if not math.isfinite(value):
                    return Finding("backward", name, "nan" if math.isnan(value) else "inf", 0, {"grad": value})
        found = find_in_gradients(named) if self.has_gradients else None
        if found is None and self.report.loss_nonfinite:
            return Finding("loss", "loss", "nan", 0)
        return found or _UNKNOWN

    def _make_event(self, held: HeldBatch | None, finding: Finding) -> OverflowEvent:
        return OverflowEvent(
            step=self.report.step,
            batch_idx=held.batch_idx if held is not None else -1,
            rank=self.trainer.global_rank,
            phase=finding.phase,
            fqn=finding.fqn,
            kind=finding.kind,
            count=finding.count,
            amax=finding.amax,
            loss_scale=self.report.loss_scale,
            calibrating=self.calibrating,
        )
