"""Which optimizers can work on masters: the ones that treat each parameter for itself."""

from collections.abc import Iterable, Mapping
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights.masters import Master
from lightning_mp.master_weights.probe import check_by_trial, flatten

__all__ = ["check_optimizer", "upcast_state_"]

_BRINGS_MASTERS = {
    "flashoptim": "FlashOptim splits weights into masters itself",
    "bitsandbytes": "bitsandbytes keeps its state by parameter position and is not tested beside masters",
    "deepspeed": "DeepSpeed optimizers hold their own masters",
}
_KEEPS_SETTINGS = {"defaults", "state", "param_groups"}
_FIX = "Use an optimizer of torch.optim, or master_weights='params'."


def check_optimizer(
    optimizer: Optimizer, mastered: Iterable[nn.Parameter], kind: type[Master], param_dtype: torch.dtype
) -> None:
    """Refuse an optimizer that cannot be stepped part by part on stand-ins for its parameters.

    Args:
        optimizer: Not modified.
        mastered: The parameters that have masters.
        kind: Which masters these are.
        param_dtype: What they publish.

    Raises:
        UnsupportedError: If the optimizer brings its own masters, wraps another optimizer, holds
            parameters, their ids or flat buffers outside of ``param_groups`` and ``state``, demands a
            closure, or computes something else on stand-ins bucket by bucket, as a trial shows.
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
    check_by_trial(optimizer, kind, param_dtype)


def upcast_state_(optimizer: Optimizer, masters: Mapping[nn.Parameter, Master]) -> None:
    """Turn state that was made from 16-bit parameters, as Adagrad's in its constructor, into FP32.

    A copy of the parameter becomes one of its master, and a filled value such as 0.1 that was rounded
    to 16 bits becomes the setting that it was. Other state is upcast as it is.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            master = masters.get(param)
            state = optimizer.state.get(param)
            if master is None or not state:
                continue
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dtype is param.dtype:
                    state[key] = _unrounded(value, param, master, group)


def _unrounded(value: Tensor, param: nn.Parameter, master: Master, settings: Mapping[str, Any]) -> Tensor:
    wide = value.to(torch.float32)
    if value.shape != param.shape or value.numel() == 0:
        return wide
    first = value.flatten()[0]
    is_filled = bool((value == first).all())
    if is_filled and first == 0:
        return wide
    if torch.equal(value, param):
        return master.value().clone()
    if is_filled:
        numbers = [number for number in settings.values() if isinstance(number, float)]
        fitting = [number for number in numbers if torch.tensor(number, dtype=value.dtype) == first.cpu()]
        if fitting:
            return wide.fill_(fitting[0])
    return wide


def _demands_closure(optimizer: Optimizer) -> bool:
    closure = signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty


def _is_buffer(tensor: Tensor, optimizer: Optimizer) -> bool:
    """Tell whether an attribute may hold weights: it is as large as all of them, or shaped as one of them."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not tensor.is_floating_point() or tensor.numel() < 2:
        return False
    return tensor.numel() >= sum(p.numel() for p in params) or any(tensor.shape == p.shape for p in params)


def _check_attributes(optimizer: Optimizer, mastered: set[nn.Parameter]) -> None:
    name = type(optimizer).__qualname__
    ids = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for key, attribute in vars(optimizer).items():
        if key in _KEEPS_SETTINGS:
            continue
        for item in flatten(attribute):
            if isinstance(item, Optimizer):
                raise UnsupportedError(
                    f"master_weights: {name}.{key} holds another optimizer ({type(item).__qualname__}), whose "
                    f"parameters cannot be replaced in the step. {_FIX}"
                )
            if type(item) is int and item in ids:
                raise UnsupportedError(
                    f"master_weights: {name}.{key} knows parameters by their id(), and FP32 tensors stand in for them "
                    f"in the step. Put what differs into parameter groups or an attribute of the parameter. {_FIX}"
                )
            if isinstance(item, Tensor) and (item in mastered or _is_buffer(item, optimizer)):
                raise UnsupportedError(
                    f"master_weights: {name}.{key} holds parameters or a flat buffer outside of param_groups and "
                    f"state, so it would update 16-bit weights. {_FIX}"
                )
