"""Find out from the code of a method whether it may call a pinned function, also in a later branch."""

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

__all__ = ["mentions_any"]

# Helpers in these packages are torch's own or never reach a pinned function on the user's behalf.
_OTHER_PEOPLES_PACKAGES = frozenset({"torch", "torchmetrics", "lightning", "pytorch_lightning", "numpy", "builtins"})


def mentions_any(cls: type, method: str, names: frozenset[str]) -> bool:
    """Tell whether ``cls.method``, or a method or function that it names, uses one of ``names``.

    The first batch shows what ran; this shows what a branch that starts later will run, such as a
    loss term of the second epoch. It reads names only, so it may say yes where nothing is called,
    which costs time and never accuracy. It follows methods of ``cls`` and functions that the code
    names through its globals; what is reached through a dictionary or an argument is not seen.

    Args:
        cls: Class of a module.
        method: Where to start, such as ``"forward"``.
        names: Names of functions, such as ``{"softmax"}``.
    """
    seen: set[CodeType] = set()
    todo = list(_methods(cls, method))
    while todo:
        function = todo.pop()
        code = function.__code__
        if code in seen:
            continue
        seen.add(code)
        mentioned = set(_names(code))
        if mentioned & names:
            return True
        for name in mentioned:
            todo.extend(_methods(cls, name))
        todo.extend(_global_functions(function, mentioned))
    return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _methods(cls: type, name: str) -> Iterator[FunctionType]:
    """Yield the definitions of ``name`` in the classes of the user."""
    for owner in cls.__mro__:
        if name in vars(owner) and owner is not nn.Module and not _is_other_peoples(owner.__module__):
            yield from _functions(vars(owner)[name])


def _functions(value: Any) -> Iterator[FunctionType]:
    if isinstance(value, property):
        value = value.fget
    value = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) or hasattr(value, "__func__") else None
    if isinstance(value, FunctionType) and not _is_other_peoples(value.__module__):
        yield value


def _global_functions(function: FunctionType, mentioned: set[str]) -> Iterator[FunctionType]:
    """Yield what ``function`` names in its module, or as an attribute of a module imported there."""
    for name in mentioned:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType):
            if not _is_other_peoples(value.__name__):
                for attribute in mentioned:
                    yield from _functions(vars(value).get(attribute))
        elif isinstance(value, (FunctionType, MethodType)):
            yield from _functions(value)


def _is_other_peoples(module_name: str | None) -> bool:
    return (module_name or "").partition(".")[0] in _OTHER_PEOPLES_PACKAGES
