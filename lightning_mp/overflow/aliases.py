"""Telling the names of a shared module apart where its parent has it twice."""

from collections.abc import Callable

from torch import nn

__all__ = ["separate_aliases"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def separate_aliases(model: nn.Module) -> Callable[[], None]:
    """Give each further name of a module within one parent an object of its own, in place.

    A hook sees the module that is called and not its name. The stand-ins share parameters, buffers and
    children with the original; only their hooks are their own.

    Returns:
        A function that puts the originals back.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(model.modules()):
        seen: set[int] = set()
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if id(child) in seen:
                replaced.append((parent, name, child))
            seen.add(id(child))
    for parent, name, child in replaced:
        parent._modules[name] = _stand_in(child)

    def restore() -> None:
        for parent, name, child in replaced:
            parent._modules[name] = child

    return restore


def _stand_in(module: nn.Module) -> nn.Module:
    stand_in: nn.Module = object.__new__(type(module))
    stand_in.__dict__.update(module.__dict__)
    for hooks in _HOOKS:
        if hooks in stand_in.__dict__:
            stand_in.__dict__[hooks] = stand_in.__dict__[hooks].copy()
    return stand_in
