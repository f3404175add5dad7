"""The closure that an optimizer gets whose gradients were computed before its step."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mp.errors import UnsupportedError

__all__ = ["NEW_STEPS", "EvaluatedClosure"]

#: Steps in which an optimizer is new: some look ahead every few steps only.
NEW_STEPS = 8


class EvaluatedClosure:
    """The closure of a step whose gradients were computed and checked before it: it only gives the loss.

    That is the same as evaluating it inside ``step`` if ``step`` does so once, before it changes anything.

    Args:
        result: What the evaluation returned.
        optimizer: Who is about to step.
        is_new: Whether this optimizer takes its first steps: writes that leave no other trace, as those
            through ``param.data``, are then looked for in the values.
    """

    __slots__ = ("_is_new", "_is_used", "_optimizer", "_result", "_seen")

    def __init__(self, result: Any, optimizer: Optimizer, *, is_new: bool) -> None:
        self._result = result
        self._optimizer = optimizer
        self._is_new = is_new
        self._is_used = False
        self.look()

    def look(self) -> None:
        """Take what weights and gradients are now for what they were when the closure was evaluated."""
        self._seen = _traces(self._optimizer, with_values=self._is_new)

    def __call__(self) -> Any:
        """Return the result.

        Raises:
            UnsupportedError: If the optimizer asks for a second evaluation, or has changed weights or
                gradients before the first.
        """
        if self._is_used:
            raise UnsupportedError(self._text("evaluates its closure several times"))
        if _traces(self._optimizer, with_values=self._is_new) != self._seen:
            raise UnsupportedError(self._text("changes weights or gradients before it evaluates its closure"))
        self._is_used = True
        return self._result

    def _text(self, what: str) -> str:
        name = type(self._optimizer).__name__
        return (
            f"{name}.step {what}, and its signature says that it needs none (closure=None), so the gradients were "
            f"computed and checked once, before the step. Declare the closure as required, except in FP16: "
            f"class Repeating({name}): def step(self, closure): return super().step(closure)."
        )


def _traces(optimizer: Optimizer, *, with_values: bool) -> list[tuple[Any, ...]]:
    """Return what differs once a parameter or its gradient was written, replaced or cleared."""
    traces: list[tuple[Any, ...]] = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            grad = param.grad
            trace: tuple[Any, ...] = (param._version, id(grad), None if grad is None else grad._version)
            if with_values:
                trace += tuple(None if t is None else _sum_of(t) for t in (param, grad))
            traces.append(trace)
    return traces


def _sum_of(tensor: Tensor) -> str:
    if tensor.layout is not torch.strided:
        return ""
    values = tensor.detach()
    values = torch.view_as_real(values) if values.is_complex() else values
    # As text, because NaN differs from itself. Of two sums a change can hardly keep both.
    return f"{values.sum().tolist()} {values.square().sum().tolist()}"
