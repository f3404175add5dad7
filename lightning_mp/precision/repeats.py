"""Steps of optimizers that evaluate their closure several times, such as LBFGS."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_mp.grad_scaler import GradientUnscaler
from lightning_mp.precision.steps import StepLedger

__all__ = ["step_with_repeats"]


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
        attempt.outcome = attempt.numbers = None
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
