"""The function mode that runs pinned functions in FP32, and how a forward enters and leaves it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode

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
            return func(*args, **(kwargs or {}))
        if rule != "look inside":
            return run_function(func, args, kwargs or {}, rule)
        with self:
            return unfolded(func)(*args, **(kwargs or {}))


def _entered_mode() -> TorchFunctionMode | None:
    """Return the mode that the next call of torch goes to first."""
    mode: TorchFunctionMode | None = _get_current_function_mode()  # type: ignore[no-untyped-call]
    return mode


def call_with(mode: FunctionPins, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``forward`` with functions pinned; a mode that is on already is not entered twice."""
    if not torch.compiler.is_compiling() and isinstance(_entered_mode(), FunctionPins):
        return forward(*args, **kwargs)
    with mode:
        return forward(*args, **kwargs)


def call_without(mode: FunctionPins, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``forward`` with ``mode`` off, where its calls need no look. Traced code pays nothing for a mode."""
    if torch.compiler.is_compiling() or _entered_mode() is not mode:
        return forward(*args, **kwargs)
    # By hand: a context manager written as a generator costs twice as much as all the rest here.
    mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    try:
        return forward(*args, **kwargs)
    finally:
        mode.__enter__()  # type: ignore[no-untyped-call]
