"""Noticing backwards that nobody announced, whose gradients no loss scale was applied to."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd import Variable
from torch.nn import Parameter
from torch.optim import Optimizer

__all__ = ["BackwardWatch"]


class _End:
    """Called by autograd at the end of a backward, which holds the only reference: it dies with one that fails."""

    def __init__(self, running: set[int]) -> None:
        self._running = running
        running.add(id(self))

    def __call__(self) -> None:
        self._running.discard(id(self))

    __del__ = __call__


class BackwardWatch:
    """Note which gradients a backward wrote outside of ``announced``.

    Args:
        parameters: Whose gradients to watch, by a hook on each that needs one.

    Attributes:
        is_on: Whether there are any.
    """

    def __init__(self, parameters: Iterable[Parameter] = ()) -> None:
        self._is_announced = False
        self._running: set[int] = set()  # backwards of scaled losses
        self._stray: dict[int, tuple[Tensor, Tensor | None]] = {}
        watched: list[Any] = [p for p in parameters if p.requires_grad and p.is_leaf]
        self.is_on = bool(watched)
        self._handles = [p.register_post_accumulate_grad_hook(self._note) for p in watched]

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Note nothing new in this block: the loss was scaled."""
        self._drop_cleared()
        self._is_announced = True
        try:
            yield
        finally:
            self._is_announced = False

    def announce_running(self) -> None:
        """Note nothing new until the end of the backward that is running: call it from a hook in there."""
        self._drop_cleared()
        # A backward inside of it, as of a reentrant checkpoint, is one of the same loss.
        Variable._execution_engine.queue_callback(_End(self._running))

    def _note(self, param: Tensor) -> None:
        is_announced = self._is_announced or bool(self._running)
        # A gradient that an announced backward adds to one of those stays one, also as another tensor.
        if not is_announced or id(param) in self._stray:
            self._stray[id(param)] = (param, param.grad)

    def _drop_cleared(self) -> None:
        """Forget gradients that were dropped, or set to zero in place, since. Waits for the device."""
        for key, (param, grad) in list(self._stray.items()):
            if grad is None or param.grad is not grad or not bool(grad.any()):
                del self._stray[key]

    def has_stray(self, optimizer: Optimizer) -> bool:
        """Tell whether the optimizer is about to use such a gradient; one that was cleared since is none."""
        if self._stray:
            self._drop_cleared()
        return any(id(p) in self._stray for group in optimizer.param_groups for p in group["params"])

    def forget(self, optimizer: Optimizer) -> None:
        """Drop what was noted of the optimizer's parameters: they have been stepped."""
        if self._stray:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    self._stray.pop(id(param), None)

    def remove(self) -> None:
        """Take the hooks off."""
        self.is_on = False
        while self._handles:
            self._handles.pop().remove()
        self._stray.clear()
