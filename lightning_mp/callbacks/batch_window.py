"""The batches that may have to be blamed for a step."""

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_mp.overflow import KeptState, Observation, Probes, RandomState, eager

__all__ = ["BatchWindow", "HeldBatch"]


class HeldBatch:
    """A batch that may have to be replayed, with the random states and the modules' state from before its step."""

    __slots__ = ("_probes", "_watching", "batch", "batch_idx", "has_begun", "rng", "seen", "state")

    def __init__(self, batch: Any, batch_idx: int) -> None:
        self.batch = batch
        self.batch_idx = batch_idx
        self.rng = RandomState.now()
        self.has_begun = False
        self.state: KeptState = []
        self.seen: Observation | None = None

    def begin(self) -> None:
        """Take the random states again, where hooks ran since the batch was started."""
        self.rng = RandomState.now()
        self.has_begun = True

    def watch(self, model: LightningModule, *, watches_parameters: bool) -> None:
        """Probe the real step of this batch; compiled modules run as written until ``unwatch``."""
        probes = Probes(model, tells_aliases_apart=False, watches_parameters=watches_parameters)
        self._probes = probes
        self._watching = ExitStack()
        self._watching.enter_context(eager())
        self._watching.enter_context(probes)
        self.seen = Observation(
            model, probes.calls, probes.statistics, param_grads=probes.param_grads, shared=probes.shared
        )
        self.seen.add_batch(self.batch)

    def note_loss(self, loss: Tensor) -> None:
        """Measure the loss of a probed step, just before its backward."""
        if self.seen is not None:
            self.seen.add_loss(loss)
            self._probes.watch_uses(loss)

    def unwatch(self) -> None:
        """Take the hooks off the model; what they noted stays."""
        if self.seen is not None:
            self._watching.close()


class BatchWindow:
    """Holds the batches of the step that is next or running, and those of the step before it.

    Attributes:
        step: Index of the step that is next or running, as its report will have it.
        running: The batch that was started and has not ended.
    """

    def __init__(self) -> None:
        self.step = -1
        self.running: HeldBatch | None = None
        self._batches: list[HeldBatch] = []
        self._previous: list[HeldBatch] = []

    def start(self, held: HeldBatch, step: int, *, keeps_earlier: bool = True) -> None:
        """Begin with a batch of ``step``; ``keeps_earlier`` tells whether earlier ones of this step can be blamed."""
        if self.running is not None:
            self.drop_running()
        if step != self.step:
            self._previous, self._batches, self.step = self._batches, [], step
        elif not keeps_earlier:
            self._batches = []
        self._batches.append(held)
        self.running = held

    def end(self) -> None:
        """Note that the running batch was computed, if there is one."""
        running, self.running = self.running, None
        if running is not None and running.seen is not None:
            running.unwatch()

    def drop_running(self) -> None:
        """Forget a batch that was started and never computed: ``on_train_batch_start`` may return -1."""
        running = self.running
        self.end()
        if self._batches and self._batches[-1] is running:
            self._batches.pop()

    def keep_last(self) -> None:
        """Forget what came before the last batch: those gradients are gone."""
        del self._batches[:-1]

    def of(self, step: int) -> list[HeldBatch]:
        """Return the batches whose gradients the step of this index, the latest or the one before, was made of."""
        return self._batches if step >= self.step else self._previous

    def __len__(self) -> int:
        """Return how many batches the next step has so far."""
        return len(self._batches)
