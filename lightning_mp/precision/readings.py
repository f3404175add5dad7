"""What users and callbacks read of a run's steps."""

from collections.abc import Callable

from lightning_mp.precision.steps import StepLedger, StepReport

__all__ = ["StepReadings"]


class StepReadings:
    """The part of the plugin that answers questions about steps; reading one settles what is pending."""

    _ledger: StepLedger

    @property
    def last_step(self) -> StepReport | None:
        """The latest optimizer step that had gradients; reading it waits for the device."""
        self._ledger.settle_for_reading()
        return self._ledger.last_step

    @property
    def applied_steps(self) -> int:
        """Optimizer steps whose update was applied."""
        self._ledger.settle_for_reading()
        return self._ledger.applied_steps

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were left out because of Inf or NaN gradients."""
        self._ledger.settle_for_reading()
        return self._ledger.skipped_steps

    @property
    def consecutive_skips(self) -> int:
        """Skipped steps in a row up to now."""
        self._ledger.settle_for_reading()
        return self._ledger.consecutive_skips

    def settle(self) -> None:
        """Wait for the outcome of the latest step, count it, and let held schedulers advance.

        Listeners are told, which may talk to other ranks: under a distributed strategy call it on all of them.

        Raises:
            OverflowFoundError: If ``on_nonfinite="raise"`` and that step was non-finite.
            LossScaleError: If the loss scale has been at its floor for too long.
        """
        if self._ledger.pending is not None:
            self._ledger.settle()

    def add_step_listener(self, listener: Callable[[StepReport], str | None]) -> None:
        """Call ``listener`` with the report of each settled step, in order, on every rank.

        It runs before the update that follows. What it returns, if anything, names the culprit in
        the message of an error that this step raises.
        """
        self._ledger.listeners.append(listener)

    def remove_step_listener(self, listener: Callable[[StepReport], str | None]) -> None:
        """Stop calling ``listener``; nothing happens if it is not known."""
        if listener in self._ledger.listeners:
            self._ledger.listeners.remove(listener)
