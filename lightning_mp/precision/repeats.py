"""Steps of optimizers that evaluate their closure several times, such as LBFGS."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mp.errors import UnsupportedError
from lightning_mp.grad_scaler import GradientUnscaler
from lightning_mp.precision.steps import StepLedger

__all__ = ["EvaluatedClosure", "step_with_repeats"]


class EvaluatedClosure:
    """The closure of a step whose gradients were computed and checked before it: it only gives the loss.

    That is the same as evaluating it inside ``step`` if ``step`` does so once, before it changes anything.

    Args:
        result: What the evaluation returned.
        optimizer: Who is about to step.
        is_new: Whether this optimizer has not stepped yet: writes that leave no other trace, as those through
            ``param.data``, are then looked for in the values.
    """

    __slots__ = ("_is_new", "_is_used", "_optimizer", "_result", "_seen")

    def __init__(self, result: Any, optimizer: Optimizer, *, is_new: bool) -> None:
        self._result = result
        self._optimizer = optimizer
        self._is_new = is_new
        self._is_used = False
        self._seen = _traces(optimizer, with_values=is_new)

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
    # As text, because NaN differs from itself.
    return str(tensor.detach().sum().tolist()) if tensor.layout is torch.strided else ""


class _NonFiniteClosure(Exception):  # noqa: N818
    """Leaves ``optimizer.step`` from within its closure."""


def step_with_repeats(
    ledger: StepLedger,
    unscaler: GradientUnscaler,
    optimizer: Optimizer,
    closure: Callable[[], Any],
    after_closure: Callable[[Optimizer], None],
    kwargs: dict[str, Any],
) -> Any:
    """Step with a closure that is checked at each evaluation.

    A non-finite gradient at any evaluation skips the whole step: weights and optimizer state return
    to what they were before it. These optimizers read the loss on the host anyway, so the check
    does too.
    """
    ledger.settle()
    attempt = ledger.open(optimizer)
    before = _snapshot(optimizer) if ledger.on_nonfinite != "ignore" else None

    def checked() -> Any:
        result = closure()
        attempt.found_inf = unscaler.unscale_(optimizer)
        unscaler.finish(optimizer)
        after_closure(optimizer)
        attempt.report = None
        if attempt.found_inf is not None and ledger.read(attempt).skipped:
            raise _NonFiniteClosure
        return result

    output = None
    try:
        output = optimizer.step(closure=checked, **kwargs)
    except _NonFiniteClosure:
        _restore_(optimizer, before)
    if attempt.found_inf is not None:
        ledger.account(attempt)
        ledger.on_settled(attempt)
    return output


def _snapshot(optimizer: Optimizer) -> tuple[list[Tensor], dict[Any, Any]]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.detach().clone() for p in params], {p: _clone(state) for p, state in optimizer.state.items()}


def _restore_(optimizer: Optimizer, snapshot: Any) -> None:
    values, state = snapshot
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for param, value in zip(params, values, strict=True):
        param.data.copy_(value)
    optimizer.state.clear()
    optimizer.state.update(state)


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _clone(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_clone(item) for item in value)
    return value
