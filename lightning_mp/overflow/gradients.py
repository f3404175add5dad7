"""Naming a parameter by its gradient, where nothing more can be known."""

from collections.abc import Iterable

from torch.nn import Parameter

from lightning_mp.overflow.event import Finding, make_finding
from lightning_mp.overflow.statistics import Statistics

__all__ = ["find_in_gradients"]


def find_in_gradients(named_parameters: Iterable[tuple[str, Parameter]]) -> Finding | None:
    """Name the parameter whose gradient went non-finite first in the backward pass.

    Backward runs from the loss to the inputs, so that is the last of them in registration order.

    Args:
        named_parameters: As ``module.named_parameters()`` gives them.

    Returns:
        The finding, with the amax of gradient and parameter; ``None`` if all gradients are finite.
    """
    statistics = Statistics()
    places = [(name, p, statistics.add([p.grad])) for name, p in named_parameters if p.grad is not None]
    statistics.read()
    for name, parameter, wanted in reversed(places):
        stats = statistics.of(wanted)
        if not stats.is_finite:
            weight = Statistics()
            weight_places = weight.add([parameter])
            weight.read()
            return make_finding("backward", name, stats, {"grad": stats, "weight": weight.of(weight_places)})
    return None
