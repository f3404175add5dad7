"""What became of each optimizer step: attempts, their settlement, and the counts users read."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_mp.errors import LightningMPError, LossScaleError, OverflowFoundError
from lightning_mp.grad_scaler import Readback
from lightning_mp.loss_scale import DynamicLossScale, LossScaleRule
from lightning_mp.precision.notices import notice

__all__ = ["Attempt", "StepLedger", "StepReport"]

log = logging.getLogger(__name__)

# So many skipped steps in a row are said, where no loss scale explains them.
STREAK = 20
_GONE = "a parameter whose gradient is gone by now (OverflowMonitor() names it)"


@dataclass(frozen=True)
class StepReport:
    """The outcome of one optimizer step that had gradients.

    Args:
        step: Index of the attempt, from zero. ``Trainer.global_step`` was this before the attempt.
        loss_scale: The loss scale that this step's backward used; 1.0 without loss scaling.
        found_inf: Whether a gradient was Inf or NaN before clipping.
        skipped: Whether the update was left out.
        grad_norm: 2-norm of the unscaled gradients before clipping, where clipping computed it.
        loss_nonfinite: Whether the unscaled loss was Inf or NaN already, so that no scale can help.
    """

    step: int
    loss_scale: float
    found_inf: bool
    skipped: bool
    grad_norm: float | None = None
    loss_nonfinite: bool = False


@dataclass(slots=True, eq=False)
class Attempt:
    """An optimizer step on its way: tensors of the device until it is settled."""

    step: int
    optimizer: Any
    found_inf: Tensor | None = None
    loss_scale: Tensor | None = None
    loss: Tensor | None = None
    grad_norm: Tensor | None = None
    amaxes: tuple[list[Parameter], Tensor] | None = None
    readback: Readback | None = None
    numbers: list[float] | None = None
    outcome: StepReport | None = None
    scheduler_requests: list[tuple[Any, Callable[[], None], Any]] = field(default_factory=list)
    claimed_by: set[int] = field(default_factory=set)
    batch: int = 0
    is_counted: bool = False

    @property
    def report(self) -> StepReport | None:
        """The outcome once it is known. Of a step that was applied it is made when somebody asks."""
        if self.outcome is None and self.numbers is not None:
            numbers = iter(self.numbers[1:])
            loss_scale = next(numbers) if self.loss_scale is not None else 1.0
            if self.loss is not None:
                next(numbers)
            norm = next(numbers) if self.grad_norm is not None else None
            self.outcome = StepReport(self.step, loss_scale, False, False, norm, False)
        return self.outcome

    def tensors(self) -> list[Tensor]:
        """Return found_inf, then what is known of scale, loss and norm, as 0-dim FP32 tensors of one device."""
        found_inf: Tensor = self.found_inf  # type: ignore[assignment]  # known once tensors are asked for
        known = [found_inf]
        for tensor in (self.loss_scale, self.loss, self.grad_norm):
            if tensor is not None:
                is_like = tensor.dtype is torch.float32 and tensor.device == found_inf.device
                known.append(tensor if is_like else tensor.float().to(found_inf.device))
        return known


class StepLedger:
    """Settles attempts in order, keeps the counts, and stops a run that cannot go on.

    Args:
        rule: The loss-scaling rule in force, or ``None``.
        on_nonfinite: ``"skip"``, ``"raise"`` or ``"ignore"``.
    """

    def __init__(self, rule: LossScaleRule | None, on_nonfinite: str) -> None:
        self.rule = rule
        self.on_nonfinite = on_nonfinite
        self.is_distributed = False
        self.batch = 0  # number of the training step that runs or ran last
        self.attempts = 0
        self.applied_steps = 0
        self.skipped_steps = 0
        self.consecutive_skips = 0
        self.floor_overflows = 0
        self._has_told_skip = self._has_told_streak = False
        self._last: Attempt | StepReport | None = None
        self.pending: Attempt | None = None
        self.latest: dict[int, Attempt] = {}
        self.listeners: list[Callable[[StepReport], str | None]] = []
        self.on_settled: Callable[[Attempt], None] = _ignore
        self.name_parameter: Callable[[Attempt], str | None] = _ignore

    @property
    def wants_culprit(self) -> bool:
        """Whether the next non-finite step may end the run, so that its gradients' names are needed."""
        if self.on_nonfinite == "raise":
            return True
        rule = self.rule
        return isinstance(rule, DynamicLossScale) and self.floor_overflows + 2 >= rule.floor_patience

    def decides_skip(self, *, found_inf: bool, loss_nonfinite: bool) -> bool:
        """Tell whether a step with these findings is left out."""
        if self.on_nonfinite != "ignore":
            return found_inf
        return found_inf and isinstance(self.rule, DynamicLossScale) and not loss_nonfinite

    def begin(self, step: int) -> None:
        """Number attempts from ``step`` on, the trainer's; at step zero a new run counts anew."""
        self.attempts = step
        if step == 0:
            self.applied_steps = self.skipped_steps = self.consecutive_skips = self.floor_overflows = 0
            self._last = None
            self._has_told_skip = self._has_told_streak = False

    @property
    def last_step(self) -> StepReport | None:
        """The outcome of the attempt that was counted last."""
        return self._last.report if isinstance(self._last, Attempt) else self._last

    def keep_last(self, report: StepReport | None) -> None:
        """Have this for the last step, whatever was counted: a report holds no optimizer."""
        self._last = report

    def open(self, optimizer: Any) -> Attempt:
        """Begin the next attempt."""
        attempt = Attempt(self.attempts, optimizer, batch=self.batch)
        self.attempts += 1
        self.latest[id(optimizer)] = attempt
        return attempt

    def read(self, attempt: Attempt) -> StepReport:
        """Return the outcome of an attempt, waiting for the device if needed."""
        report = attempt.report
        if report is None:
            self._wait(attempt)
            report = attempt.report
        return report  # type: ignore[return-value]

    def _wait(self, attempt: Attempt) -> bool:
        """Wait for the numbers of an attempt; return whether its gradients were non-finite."""
        readback = attempt.readback
        numbers = readback.wait() if readback is not None else Readback.read_all(attempt.tensors())
        if numbers[0] == 0:
            attempt.numbers = numbers
            return False
        rest = iter(numbers[1:])
        loss_scale = next(rest) if attempt.loss_scale is not None else 1.0
        loss = next(rest) if attempt.loss is not None else 0.0
        norm = next(rest) if attempt.grad_norm is not None else None
        loss_nonfinite = not abs(loss) < float("inf")
        skipped = self.decides_skip(found_inf=True, loss_nonfinite=loss_nonfinite)
        attempt.outcome = StepReport(attempt.step, loss_scale, True, skipped, norm, loss_nonfinite)
        return True

    def settle(self) -> None:
        """Settle the pending attempt, if there is one."""
        attempt, self.pending = self.pending, None
        if attempt is None:
            return
        is_new = not attempt.is_counted
        try:
            if not (is_new and self.count_if_applied(attempt)):
                self.account(attempt)
        finally:
            # Also where the run ends here: a checkpoint written on the way out holds what was applied.
            if is_new:
                self.on_settled(attempt)

    def count_if_applied(self, attempt: Attempt) -> bool:
        """Count an attempt with finite gradients and tell the listeners; else do nothing and return False."""
        if attempt.outcome is not None or self._wait(attempt):
            return False
        self._count_applied(attempt)
        if self.listeners:
            report = attempt.report
            for listener in tuple(self.listeners):
                listener(report)  # type: ignore[arg-type]
        return True

    def settle_for_reading(self) -> None:
        """Count the pending attempt because somebody reads a count, perhaps on one rank alone.

        Listeners may talk to the other ranks, and an error would end this one only: where there are
        others, both wait for the moment at which all ranks settle, before the next update at the latest.
        """
        if not self.is_distributed:
            self.settle()
        elif self.pending is not None and not self.pending.is_counted:
            self._count(self.pending)
            self.on_settled(self.pending)

    def account(self, attempt: Attempt) -> StepReport:
        """Count an attempt whose outcome can be read, tell the listeners, and raise where asked to.

        ``on_settled`` is left to the caller: schedulers advance after the update, not before it.

        Raises:
            OverflowFoundError: If ``on_nonfinite="raise"`` and the scale does not explain the finding.
            LossScaleError: If the scale stayed at its floor for ``floor_patience`` overflows in a row.
        """
        report = self.read(attempt) if attempt.is_counted else self._count(attempt)
        culprits, failures = [], []
        for listener in tuple(self.listeners):
            try:
                culprits.append(listener(report))
            except LightningMPError as error:  # those after it are to hear of this step too
                failures.append(error)
        if failures:
            raise failures[0]
        if report.found_inf:
            culprit = next((c for c in culprits if c), None)
            self._stop_if_asked(attempt, report, culprit)
            self._tell_skip(attempt, report, culprit)
        return report

    def _count_applied(self, attempt: Attempt) -> None:
        attempt.is_counted = True
        self._last = attempt
        self.applied_steps += 1
        self.consecutive_skips = self.floor_overflows = 0

    def _count(self, attempt: Attempt) -> StepReport:
        report = self.read(attempt)
        if not report.found_inf:
            self._count_applied(attempt)
            return report
        attempt.is_counted = True
        self._last = attempt
        self.applied_steps += not report.skipped
        self.skipped_steps += report.skipped
        self.consecutive_skips = self.consecutive_skips + 1 if report.skipped else 0
        if isinstance(self.rule, DynamicLossScale):
            at_floor = report.loss_scale <= self.rule.min_scale
            self.floor_overflows = self.floor_overflows + 1 if at_floor else 0
        return report

    def _is_explained(self, report: StepReport) -> bool:
        """Tell whether the overflow is one that a dynamic scale looks for."""
        return isinstance(self.rule, DynamicLossScale) and not report.loss_nonfinite

    def _tell_skip(self, attempt: Attempt, report: StepReport, culprit: str | None) -> None:
        """Say the first skip that no scale explains, and a streak of them: no run stands still unseen."""
        if not report.skipped or self._is_explained(report):
            return
        if not self._has_told_skip:
            self._has_told_skip = True
            # Settled later, the gradients that are there now are those of another batch.
            is_here = attempt.readback is None or attempt.amaxes is not None
            where = culprit or (self._first_parameter(attempt) if is_here else _GONE)
            notice(
                f"step {report.step} has Inf or NaN gradients, first in {where}, and its update was left out "
                f"(on_nonfinite='skip'). {self._loss_sentence(report)} Further ones are counted in "
                "plugin.skipped_steps."
            )
        if self.consecutive_skips >= STREAK and not self._has_told_streak:
            self._has_told_streak = True
            notice(
                f"{self.consecutive_skips} steps in a row had Inf or NaN gradients and were left out: nothing is "
                "learned. Gradients are judged before on_before_optimizer_step and clipping: code that repairs them "
                "belongs into on_after_backward, or needs on_nonfinite='ignore'. OverflowMonitor() names the module."
            )

    def _stop_if_asked(self, attempt: Attempt, report: StepReport, culprit: str | None) -> None:
        if self.on_nonfinite == "raise" and not self._is_explained(report):
            raise OverflowFoundError(
                f"on_nonfinite='raise': step {report.step} has Inf or NaN gradients, first in "
                f"{culprit or self._first_parameter(attempt)}. {self._loss_sentence(report)} The update was not "
                "applied. Use on_nonfinite='skip' to leave such steps out, or OverflowMonitor() to find the module."
            )
        if isinstance(self.rule, DynamicLossScale) and self.floor_overflows >= self.rule.floor_patience:
            raise LossScaleError(
                f"The loss scale is at its floor, min_scale={self.rule.min_scale}, and {self.floor_overflows} steps in "
                f"a row overflowed there (floor_patience={self.rule.floor_patience}; last: step {report.step}). First "
                f"non-finite: {culprit or self._first_parameter(attempt)}. {self._loss_sentence(report)}"
            )

    def _first_parameter(self, attempt: Attempt) -> str:
        return self.name_parameter(attempt) or _GONE

    def _loss_sentence(self, report: StepReport) -> str:
        if report.loss_nonfinite and self.rule is None:
            return "The unscaled loss was non-finite already. Look for a module or a batch that gives Inf or NaN."
        if report.loss_nonfinite:
            return (
                "The unscaled loss was non-finite already: no loss scale can help. Look for a module or a batch that "
                "gives Inf or NaN, or use BF16."
            )
        backward = "The unscaled loss was finite: the overflow is in the backward pass."
        if self.is_distributed:
            backward = "The unscaled loss of this rank was finite: the overflow is in backward, or on another rank."
        if isinstance(self.rule, DynamicLossScale):
            return f"{backward} Use BF16, or lower min_scale."
        if self.rule is not None:
            return f"{backward} Use a smaller loss_scale, loss_scale='dynamic', or BF16."
        return (
            f"{backward} Look for a derivative that is infinite, as that of a square root, a norm or a logarithm at "
            "zero is."
        )


def _ignore(attempt: Attempt) -> None:
    """Stand in until a run is attached; a function of the module, so that the ledger can be pickled."""
