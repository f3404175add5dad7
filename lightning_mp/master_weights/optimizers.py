"""Which optimizers can work on masters: the ones that treat each parameter for itself."""

from collections.abc import Iterable, Iterator
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights.probe import check_independence

__all__ = ["check_optimizer", "upcast_state_"]

_BRINGS_MASTERS = {
    "flashoptim": "FlashOptim splits weights into masters itself",
    "bitsandbytes": "bitsandbytes keeps its state by parameter position and is not tested beside masters",
    "deepspeed": "DeepSpeed optimizers hold their own masters",
}
_KEEPS_SETTINGS = {"defaults", "state", "param_groups"}
_FIX = "Use an optimizer of torch.optim, or master_weights='params'."


def check_optimizer(optimizer: Optimizer, mastered: Iterable[nn.Parameter]) -> None:
    """Refuse an optimizer that cannot be stepped part by part on stand-ins for its parameters.

    Args:
        optimizer: Not modified.
        mastered: The parameters that have masters.

    Raises:
        UnsupportedError: If the optimizer brings its own masters, wraps another optimizer, holds
            parameters or flat buffers outside of ``param_groups`` and ``state``, demands a closure, or
            updates a parameter by what it sees of others.
    """
    name = type(optimizer).__qualname__
    package = type(optimizer).__module__.partition(".")[0]
    if package in _BRINGS_MASTERS:
        raise UnsupportedError(
            f"master_weights: {_BRINGS_MASTERS[package]} ({name}). Use it with master_weights='params' or 'none', "
            "or use an optimizer of torch.optim."
        )
    if getattr(optimizer, "master_weights", None):
        raise UnsupportedError(
            f"master_weights: {name} was built with master_weights={optimizer.master_weights!r} and keeps masters "  # type: ignore[attr-defined]
            "of its own. Build it with master_weights=False, or use master_weights='none' here."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(f"master_weights: LBFGS mixes all parameters in one direction vector. {_FIX}")
    if _demands_closure(optimizer):
        raise UnsupportedError(
            f"master_weights: {name}.step demands a closure, which it may call between two updates, when the model's "
            f"weights are not the masters. {_FIX}"
        )
    _check_attributes(optimizer, set(mastered))
    check_independence(optimizer)


def upcast_state_(optimizer: Optimizer, mastered: Iterable[nn.Parameter]) -> None:
    """Turn state that was made from 16-bit parameters, as Adagrad's in its constructor, into FP32."""
    for param in mastered:
        state = optimizer.state.get(param)
        if not state:
            continue
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dtype is param.dtype:
                state[key] = value.to(torch.float32)
        if isinstance(optimizer, torch.optim.Adagrad) and state["step"] == 0:
            # A filled value such as 0.1 was rounded to 16 bits when the constructor wrote it.
            state["sum"].fill_(optimizer.defaults["initial_accumulator_value"])


def _demands_closure(optimizer: Optimizer) -> bool:
    closure = signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty


def _check_attributes(optimizer: Optimizer, mastered: set[nn.Parameter]) -> None:
    name = type(optimizer).__qualname__
    for key, attribute in vars(optimizer).items():
        if key in _KEEPS_SETTINGS:
            continue
        for item in _flatten(attribute):
            if isinstance(item, Optimizer):
                raise UnsupportedError(
                    f"master_weights: {name}.{key} holds another optimizer ({type(item).__qualname__}), whose "
                    f"parameters cannot be replaced in the step. {_FIX}"
                )
            if isinstance(item, Tensor) and (item in mastered or (item.is_floating_point() and item.numel() > 1)):
                raise UnsupportedError(
                    f"master_weights: {name}.{key} holds parameters or a flat buffer outside of param_groups and "
                    f"state, so it would update 16-bit weights. {_FIX}"
                )


def _flatten(value: Any, depth: int = 3) -> Iterator[Any]:
    """Yield ``value`` and what its containers hold, a few levels down."""
    yield value
    if depth == 0:
        return
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _flatten(item, depth - 1)
