"""Naming the parameter whose gradient went non-finite first."""

from torch import nn

from lightning_mp.grad_scaler import Readback, gradient_amaxes
from lightning_mp.precision.steps import Attempt

__all__ = ["first_nonfinite_parameter"]


def first_nonfinite_parameter(module: nn.Module, attempt: Attempt) -> str | None:
    """Name the last parameter in registration order whose gradient is Inf or NaN.

    Backward runs from the loss to the inputs, so the layer next to the loss comes first. ``None`` if
    no gradient is non-finite any more.
    """
    params, amaxes = attempt.amaxes if attempt.amaxes is not None else gradient_amaxes(attempt.optimizer)
    if not params:
        return None
    finite = [abs(a) < float("inf") for a in Readback.read(amaxes)]
    bad = {id(p) for p, is_finite in zip(params, finite, strict=True) if not is_finite}
    names = [n for n, p in module.named_parameters() if id(p) in bad]
    return names[-1] if names else None
