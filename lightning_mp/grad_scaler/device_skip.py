"""Leaving out an update by a flag on the device."""

from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["step_unless", "supports_skip_on_device"]


def supports_skip_on_device(optimizer: Optimizer) -> bool:
    """Tell whether the optimizer leaves out an update by a flag on the device, without the host.

    torch's fused optimizers read ``optimizer.found_inf``. One that takes a ``grad_scaler`` argument
    would unscale by itself, so it gets the host read. So does torch's fused SGD with momentum until
    it has stepped once: its first step leaves the momentum buffer uninitialised when it is skipped
    (torch 2.13).
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    optimizer_class: Any = type(optimizer)
    if _takes_grad_scaler(optimizer_class):
        return False
    return not (isinstance(optimizer, torch.optim.SGD) and _has_missing_momentum(optimizer))


@cache
def _takes_grad_scaler(optimizer_class: Any) -> bool:
    return "grad_scaler" in signature(optimizer_class.step).parameters


def step_unless(found_inf: Tensor, optimizer: Optimizer, kwargs: dict[str, Any]) -> Any:
    """Call ``optimizer.step``, which leaves out its update if ``found_inf`` is nonzero on the device.

    Args:
        found_inf: 0-dim FP32 tensor.
        optimizer: One that ``supports_skip_on_device``.
        kwargs: Arguments of ``optimizer.step``.

    Returns:
        What ``optimizer.step`` returns.
    """
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    try:
        return optimizer.step(**kwargs)
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def _has_missing_momentum(optimizer: Optimizer) -> bool:
    return any(
        group.get("momentum", 0) != 0 and optimizer.state.get(p, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    )
