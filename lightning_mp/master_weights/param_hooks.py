"""Hooks that others registered on a parameter: they read or change its gradient inside of backward."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["enclose_hooks", "has_hooks", "hooks_made"]


def hooks_made() -> int:
    """Return a number that grows with each hook that anybody registers on anything.

    While it stays the same no parameter got one, and no parameter needs to be asked.
    """
    return RemovableHandle.next_id


def has_hooks(param: nn.Parameter, *, besides: Iterable[RemovableHandle] = ()) -> bool:
    """Tell whether ``param`` has tensor hooks, or post-accumulate hooks besides those given.

    Example:
        >>> weight = nn.Linear(2, 2).weight
        >>> has_hooks(weight)
        False
        >>> handle = weight.register_hook(lambda grad: grad * 2)
        >>> has_hooks(weight)
        True
    """
    if param._backward_hooks:
        return True
    own = {handle.id for handle in besides}
    return any(key not in own for key in _hooks_after(param))


def enclose_hooks(
    param: nn.Parameter,
    own: Iterable[RemovableHandle],
    *,
    first: Callable[[nn.Parameter], None],
    last: Callable[[nn.Parameter], None],
) -> list[RemovableHandle]:
    """Replace post-accumulate hooks by one before and one after those of others; return their handles.

    Args:
        param: A leaf that requires a gradient.
        own: Handles of the hooks to replace.
        first: Called before the hooks of others, which keep their handles and their order.
        last: Called after them.
    """
    for handle in own:
        handle.remove()
    others = dict(_hooks_after(param))
    _hooks_after(param).clear()
    before: RemovableHandle = param.register_post_accumulate_grad_hook(first)  # type: ignore[no-untyped-call]
    _hooks_after(param).update(others)
    after: RemovableHandle = param.register_post_accumulate_grad_hook(last)  # type: ignore[no-untyped-call]
    return [before, after]


def _hooks_after(param: nn.Parameter) -> dict[int, Any]:
    """Return the post-accumulate hooks, which autograd calls in the order of this dict."""
    hooks: dict[int, Any] | None = getattr(param, "_post_accumulate_grad_hooks", None)
    return {} if hooks is None else hooks
