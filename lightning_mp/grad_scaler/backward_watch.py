"""Noticing backwards that nobody announced, whose gradients no loss scale was applied to."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

__all__ = ["BackwardWatch"]


class BackwardWatch:
    """Note which gradients a backward wrote outside of ``begin`` and ``end``.

    Args:
        parameters: Whose gradients to watch, by a hook on each that needs one.
    """

    def __init__(self, parameters: Iterable[Parameter] = ()) -> None:
        self._is_announced = False
        self._stray: dict[int, tuple[Parameter, Tensor | None]] = {}
        watched: list[Any] = [p for p in parameters if p.requires_grad and p.is_leaf]
        self._handles = [p.register_post_accumulate_grad_hook(self._note) for p in watched]

    def begin(self) -> None:
        """Note nothing from here on: the loss was scaled."""
        self._is_announced = True

    def end(self) -> None:
        """Note again what is written."""
        self._is_announced = False

    def _note(self, param: Tensor) -> None:
        if not self._is_announced and isinstance(param, Parameter):
            self._stray[id(param)] = (param, param.grad)

    def has_stray(self, optimizer: Optimizer) -> bool:
        """Tell whether the optimizer is about to use such a gradient; one that was cleared since is none."""
        if not self._stray:
            return False
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(param.grad is grad is not None for key, (param, grad) in self._stray.items() if key in mine)

    def forget(self, optimizer: Optimizer) -> None:
        """Drop what was noted of the optimizer's parameters: they have been stepped."""
        if self._stray:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    self._stray.pop(id(param), None)

    def remove(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()
        self._stray.clear()
