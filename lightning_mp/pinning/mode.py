"""The function mode that runs pinned functions in FP32, and how a forward enters and leaves it."""

from collections.abc import Callable
from typing import Any

import torch
from torch._C import (
    _get_function_stack_at,
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch.overrides import TorchFunctionMode

from lightning_mp.pinning.functions import FunctionRules, run_function, unfolded

__all__ = ["FunctionPins", "call_with", "call_without"]


class FunctionPins(TorchFunctionMode):
    """Run the functions that ``rules`` names in FP32 while this mode is entered.

    Every call of torch passes through an entered mode, at about 1.2 us each on CPU. It is therefore
    entered only in the ``forward`` of modules that call such functions, and left inside the others.

    Args:
        rules: Function to the dtype rule of its result.
    """

    def __init__(self, rules: FunctionRules) -> None:
        super().__init__()
        self.rules = rules

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = self.rules.get(func)
        if rule is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        if rule != "look inside":
            return run_function(func, args, kwargs or {}, rule)
        with self:
            return unfolded(func)(*args, **(kwargs or {}))


def call_with(mode: FunctionPins, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``forward`` with functions pinned; a mode that is on already is not entered twice."""
    if torch.compiler.is_compiling():
        with mode:
            return forward(*args, **kwargs)
    depth = _len_torch_function_stack()
    if depth and isinstance(_get_function_stack_at(depth - 1), FunctionPins):
        return forward(*args, **kwargs)
    # By hand, as below: what stands around a call runs when large products have emptied the caches, and
    # costs three times what it does in a loop of its own.
    _push_on_torch_function_stack(mode)
    try:
        return forward(*args, **kwargs)
    finally:
        _pop_torch_function_stack()


def call_without(mode: FunctionPins, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``forward`` with ``mode`` off, where its calls need no look. Traced code pays nothing for a mode."""
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    depth = _len_torch_function_stack()
    if not depth or _get_function_stack_at(depth - 1) is not mode:
        return forward(*args, **kwargs)
    _pop_torch_function_stack()
    try:
        return forward(*args, **kwargs)
    finally:
        _push_on_torch_function_stack(mode)
