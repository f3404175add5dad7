"""Learning-rate schedulers that advance on applied steps only.

A scheduler keeps its identity, its state and its type's behavior: its class is swapped for a
subclass whose ``step`` asks first, and swapped back at the end. ``optimizer.step`` never tells a
scheduler that an update was left out, so without this the learning rate runs ahead of the weights.

While the outcome is on its way from the device, the scheduler advances as if the update had been
applied, so that whoever reads or sets a learning rate meanwhile finds what Lightning gives; before the
next update it is taken back if it was not. One that cannot be taken back waits for the outcome.
"""

import copyreg
import math
from collections.abc import Callable, Iterable
from typing import Any

from lightning_mp.errors import UnsupportedError
from lightning_mp.precision.steps import Attempt, StepLedger
from lightning_mp.precision.undo import SchedulerUndo, can_undo

__all__ = ["SchedulerHold", "hold_schedulers", "take_back"]

_HOLD = "_lightning_mp_hold"


class SchedulerHold:
    """Holds one scheduler until the outcome of the step that it follows is known.

    With ``frequency=k`` a scheduler advances after every k applied steps: a skipped one moves the
    advance to a later step, and k of them drop it.

    Args:
        scheduler: Any object with ``step()``; one that has an ``optimizer`` follows that one's steps.
        ledger: Where outcomes are settled.
        frequency: Attempts between two advances.
        is_active: Whether a call of ``step()`` now belongs to an optimizer step.
        settles_now: Whether something is about to read the learning rate.
    """

    def __init__(
        self,
        scheduler: Any,
        ledger: StepLedger,
        *,
        frequency: int = 1,
        is_active: Callable[[], bool] = lambda: True,
        settles_now: Callable[[], bool] = lambda: False,
    ) -> None:
        self.scheduler = scheduler
        self.frequency = frequency
        self.owed = 0
        self.drops = 0
        self._ledger = ledger
        self._is_active = is_active
        self._settles_now = settles_now
        self._waiting: tuple[int, Callable[[], None]] | None = None
        self._original = type(scheduler)
        self._can_undo = can_undo(scheduler)
        self._hold()

    def _hold(self) -> None:
        held = type(self._original.__name__, (_Held, self._original), {_HOLD: self, "__module__": __name__})
        try:
            self.scheduler.__class__ = held
        except TypeError as error:
            raise UnsupportedError(
                f"hold_schedulers=True cannot hold {self._original.__name__}: {error}. "
                "Pass MixedPrecision(..., hold_schedulers=False) to let it advance on skipped steps too."
            ) from None

    def state(self) -> list[int]:
        """Return what a resumed run needs: steps owed, advances to drop, applied steps waited for."""
        return [self.owed, self.drops, self._waiting[0] if self._waiting is not None else 0]

    def load_state(self, state: list[int]) -> None:
        """Continue from what ``state`` returned."""
        self.owed, self.drops, left = state
        # A waiting advance was asked for without arguments, unless it was a metric that is gone by now.
        self._waiting = (left, self._advance) if left else None

    def _advance(self) -> None:
        self._original.step(self.scheduler)

    def release(self) -> None:
        """Give the scheduler its own class back."""
        self.scheduler.__class__ = self._original

    def settle(self) -> None:
        """Settle the pending attempt: somebody reads the scheduler."""
        self._ledger.settle_for_reading()

    def request(self, advance: Callable[[], None]) -> None:
        """Advance now, later or not at all, as the latest attempt of the scheduler's optimizer ends."""
        attempt = self._attempt()
        if attempt is None or self._is_over(attempt) or not self._is_active():
            self._ledger.settle_for_reading()
            advance()
            return
        attempt.claimed_by.add(id(self))
        if attempt.found_inf is None or attempt.report is not None:
            self._resolve(advance, skipped=attempt.report is not None and attempt.report.skipped)
            return
        expects_no_skip = self._can_undo and not (self.owed or self.drops or self._waiting)
        undo = SchedulerUndo(self.scheduler, advance) if expects_no_skip else None
        attempt.scheduler_requests.append((self, advance, undo))
        if self._settles_now():
            self._ledger.settle()

    def settled(self, attempt: Attempt) -> None:
        """Take note of an outcome, and resolve what waited for it."""
        if attempt.report is None or self._attempt_key() not in (None, id(attempt.optimizer)):
            return
        if self.frequency > 1:
            self._note(skipped=attempt.report.skipped)
        for hold, advance, undo in attempt.scheduler_requests:
            if hold is not self:
                continue
            if undo is None or attempt.report.skipped:
                self._resolve(advance, skipped=attempt.report.skipped)

    def _is_over(self, attempt: Attempt) -> bool:
        """Tell whether this scheduler has followed an attempt of an earlier batch already."""
        return id(self) in attempt.claimed_by and attempt.batch != self._ledger.batch

    def _note(self, *, skipped: bool) -> None:
        if not skipped:
            if self._waiting is not None:
                left, advance = self._waiting
                self._waiting = (left - 1, advance)
                if left == 1:
                    self._waiting = None
                    advance()
            return
        self.owed += 1
        if self.owed == self.frequency:
            self.owed = 0
            if self._waiting is not None:
                self._waiting = None
            else:
                self.drops += 1

    def _resolve(self, advance: Callable[[], None], *, skipped: bool) -> None:
        if self.frequency == 1:
            if not skipped:
                advance()
        elif self.drops:
            self.drops -= 1
        elif self.owed:
            self._waiting = (self.owed, advance)
        else:
            advance()

    def _attempt_key(self) -> int | None:
        optimizer = getattr(self.scheduler, "optimizer", None)
        return None if optimizer is None else id(optimizer)

    def _attempt(self) -> Attempt | None:
        key = self._attempt_key()
        if key is not None:
            return self._ledger.latest.get(key)
        return max(self._ledger.latest.values(), key=lambda a: a.step, default=None)


def take_back(attempt: Attempt) -> None:
    """Undo what schedulers did for an update that was skipped, the last one first: they may share an optimizer."""
    if attempt.report is not None and attempt.report.skipped:
        for _, _, undo in reversed(attempt.scheduler_requests):
            if undo is not None:
                undo.apply_()


class EpochHold(SchedulerHold):
    """Lets a scheduler that steps after epochs do so on settled learning rates, at one wait per epoch."""

    def request(self, advance: Callable[[], None]) -> None:
        """Advance, whatever the latest update came to, once that is known."""
        self.settle()
        advance()

    def settled(self, attempt: Attempt) -> None:
        """Nothing follows an update."""


def hold_schedulers(
    configs: Iterable[Any],
    ledger: StepLedger,
    *,
    is_manual: bool,
    is_in_batch: Callable[[], bool],
    settles_now: Callable[[], bool],
    accumulate: int = 1,
) -> list[SchedulerHold]:
    """Hold the schedulers that follow optimizer steps.

    Args:
        configs: Lightning's scheduler configs.
        ledger: Where outcomes are settled.
        is_manual: Whether the user steps schedulers; any may follow steps then, within a batch.
        is_in_batch: Whether ``training_step`` runs.
        settles_now: Whether something is about to read the learning rate.
        accumulate: Batches per step: Lightning counts frequencies in batches.
    """
    holds, after_epochs = [], []
    for config in configs:
        if is_manual:
            hold = SchedulerHold(config.scheduler, ledger, is_active=is_in_batch)
        elif config.interval == "step":
            frequency = math.lcm(config.frequency, accumulate) // accumulate
            hold = SchedulerHold(config.scheduler, ledger, frequency=frequency, settles_now=settles_now)
        else:
            after_epochs.append(EpochHold(config.scheduler, ledger))
            continue
        holds.append(hold)
    return [*holds, *after_epochs]


class _Held:
    """Mixin of a held scheduler."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Ask before stepping."""
        advance = super().step  # type: ignore[misc]
        getattr(self, _HOLD).request(lambda: advance(*args, **kwargs))

    def state_dict(self) -> Any:
        """Settle before the state is read."""
        getattr(self, _HOLD).settle()
        return super().state_dict()  # type: ignore[misc]

    def get_last_lr(self) -> Any:
        """Settle before the learning rate is read."""
        getattr(self, _HOLD).settle()
        return super().get_last_lr()  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy is a scheduler of the original class, not held by anybody.
        return copyreg.__newobj__, (getattr(self, _HOLD)._original,), self.__dict__  # type: ignore[attr-defined]
