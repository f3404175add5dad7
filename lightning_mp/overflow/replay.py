"""Computing a batch once more under probes, leaving nothing changed."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_mp.overflow.attribution import Observation, find_culprit
from lightning_mp.overflow.event import Finding
from lightning_mp.overflow.preserve import RandomState, eager, preserved
from lightning_mp.overflow.probes import Probes
from lightning_mp.overflow.statistics import named_tensors

__all__ = ["copy_containers", "replay"]


def replay(
    model: nn.Module,
    step: Callable[[Any], Tensor | None],
    batch: Any,
    *,
    rng: RandomState,
    loss_scale: float,
    region: Callable[[], AbstractContextManager[Any]],
    silenced: tuple[str, ...] = (),
) -> Finding | None:
    """Compute ``batch`` once more and name what went non-finite first.

    Random states, buffers, attributes of modules, gradients and the batch are afterwards what they
    were. Parameters that ``step`` itself writes to are not protected.

    Args:
        model: The bare module, not a wrapper that reduces gradients.
        step: Computes the loss of a batch, as the optimizer sees it before scaling.
        batch: The batch; ``step`` gets a copy.
        rng: States of torch's generators when the step began.
        loss_scale: Factor on the loss that its backward used.
        region: The autocast region of the step.
        silenced: Methods of ``model`` that do nothing meanwhile, such as ``"log"``.

    Returns:
        The finding; ``None`` if the batch computes without anything non-finite.

    Raises:
        Exception: Whatever ``step`` or its backward raises, such as by reentrant checkpointing, which
            knows no ``torch.autograd.grad``.
    """
    with preserved(model), eager(), torch.inference_mode(False), torch.enable_grad():
        for name in silenced:
            model.__dict__[name] = _do_nothing
        rng.restore_()
        with Probes(model) as probes:
            seen = Observation(model, probes.calls, probes.statistics)
            seen.add_batch(batch)
            with region():
                loss = step(_cloned(batch))
            if loss is None:
                return None
            seen.add_loss(loss)
            if loss.requires_grad and any(p.requires_grad for p in model.parameters()):
                _backward(model, loss, loss_scale, seen)
    seen.statistics.read()
    return find_culprit(seen)


def _backward(model: nn.Module, loss: Tensor, loss_scale: float, seen: Observation) -> None:
    """Take gradients without touching ``.grad``, the hooks of a reducer, or accumulators."""
    parameters = [p for p in model.parameters() if p.requires_grad and not is_lazy(p)]
    # A 0-dim FP32 tensor, as a scaler has: times a number an FP16 loss would stay FP16, and 65536 is Inf there.
    scaled = loss * torch.full((), loss_scale, device=loss.device)
    grads = torch.autograd.grad(scaled, parameters, allow_unused=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            seen.param_grads[parameter] = seen.statistics.add([grad])


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a method that must leave no trace."""


def copy_containers(value: Any) -> Any:
    """Return ``value`` with its lists and dicts copied and its tensors shared.

    A ``training_step`` that pops an item from its batch leaves such a copy whole.
    """
    if type(value) in (list, tuple):
        return type(value)([copy_containers(item) for item in value])
    if type(value) is dict:
        return {key: copy_containers(item) for key, item in value.items()}
    return value


def _cloned(batch: Any) -> Any:
    """Return a copy of the batch whose tensors are its own, where its containers are plain."""
    if isinstance(batch, Tensor):
        return batch.detach().clone().requires_grad_(batch.requires_grad)
    if type(batch) in (list, tuple):
        return type(batch)([_cloned(item) for item in batch])
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*[_cloned(item) for item in batch])
    if type(batch) is dict:
        return {key: _cloned(item) for key, item in batch.items()}
    if isinstance(batch, Mapping) or any(True for _ in named_tensors(batch)):
        # A library's own batch: it knows best how to copy itself, if it does.
        return batch.clone() if hasattr(batch, "clone") else batch
    return batch
