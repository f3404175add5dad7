"""Lazy modules: masters of their parameters are taken in the first forward, which gives these a shape."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

__all__ = ["take_when_initialized"]

_Take = Callable[[nn.Module, dict[nn.Parameter, str]], None]


def take_when_initialized(root: nn.Module, kept: Collection[nn.Parameter], take: _Take) -> list[RemovableHandle]:
    """Call ``take`` for each module below ``root`` as soon as its first forward has given its parameters a shape.

    Args:
        root: The root. Its lazy modules get a forward pre-hook, which runs after their own and removes itself.
        kept: Parameters to leave out.
        take: Gets the module and its new parameters with their dotted names, before the forward computes.

    Returns:
        The hooks' handles.
    """
    handles = []
    for fqn, module in root.named_modules():
        own = {param: f"{fqn}.{name}".lstrip(".") for name, param in module.named_parameters(recurse=False)}
        lazy = {param: name for param, name in own.items() if _is_lazy(param) and param not in kept}
        if lazy:
            hook = _TakeOnce(lazy, take)
            hook.handle = module.register_forward_pre_hook(hook)
            handles.append(hook.handle)
    return handles


class _TakeOnce:
    """The forward pre-hook of one module. Copies of it do nothing."""

    def __init__(self, params: dict[nn.Parameter, str], take: _Take | None) -> None:
        self._params = params
        self._take = take
        self.handle: RemovableHandle | None = None

    def __call__(self, module: nn.Module, _: Any) -> None:
        if self._take is None or any(_is_lazy(param) for param in self._params):
            return
        if self.handle is not None:
            self.handle.remove()
        # The first forward may be Lightning's sanity check, in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self._take(module, self._params)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_TakeOnce":
        return _TakeOnce({}, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _TakeOnce, ({}, None)


def _is_lazy(param: nn.Parameter) -> bool:
    return bool(is_lazy(param))  # torch's own answer narrows the type for mypy
