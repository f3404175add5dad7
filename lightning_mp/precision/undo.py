"""Taking back one ``scheduler.step()``: what it may change is noted before, and put back if its update was left out."""

import types
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["SchedulerUndo", "can_undo"]

_VALUES = (
    bool,
    int,
    float,
    str,
    bytes,
    type,
    types.NoneType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    partial,
    weakref.ReferenceType,
    Optimizer,
)


def can_undo(scheduler: Any) -> bool:
    """Tell whether a step of ``scheduler`` can be taken back exactly.

    That is so for a scheduler of torch's kind that holds numbers, functions, tensors, containers of these
    and further such schedulers. Who holds anything else, as an iterator or a random generator, may change it.
    """
    return all(_is_known(value) for part in _parts(scheduler) for value in vars(part).values()) and isinstance(
        scheduler, LRScheduler
    )


class SchedulerUndo:
    """Advance a scheduler now, and be able to take it back.

    Args:
        scheduler: One that ``can_undo``. It is advanced.
        advance: What advances it.
    """

    def __init__(self, scheduler: Any, advance: Callable[[], None]) -> None:
        self._attributes = [(part, dict(vars(part)), list(_contents(part))) for part in _parts(scheduler)]
        self._groups = scheduler.optimizer.param_groups
        self._before = [_settings(group) for group in self._groups]
        advance()
        self._after = [_settings(group) for group in self._groups]

    def apply_(self) -> None:
        """Put back what the step changed, except settings of the optimizer that somebody changed since."""
        for part, attributes, contents in self._attributes:
            vars(part).clear()
            vars(part).update(attributes)
            for put_back in contents:
                put_back()
        for group, before, after in zip(self._groups, self._before, self._after, strict=False):
            for key, value in before.items():
                if _is_same(group.get(key), after.get(key)) and not _is_same(value, after.get(key)):
                    _put_back_(group, key, value)


def _parts(scheduler: Any) -> Iterator[Any]:
    """Yield a scheduler and those inside it, as in a ``SequentialLR``."""
    yield scheduler
    for value in vars(scheduler).values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, LRScheduler):
                yield from _parts(item)


def _is_known(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_known(item) for item in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_known(item) for item in value)
    return isinstance(value, (*_VALUES, Tensor, LRScheduler))


def _contents(part: Any) -> Iterator[Callable[[], None]]:
    """Yield what puts back the contents of attributes that a step may change in place."""
    for value in vars(part).values():
        if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
            yield partial(_refill_dict, value, dict(value))
        elif type(value) is list:
            yield partial(value.__setitem__, slice(None), list(value))
        elif isinstance(value, Tensor):
            yield partial(_refill_tensor, value, value.detach().clone())


def _refill_dict(target: dict[Any, Any], items: dict[Any, Any]) -> None:
    target.clear()
    target.update(items)


def _refill_tensor(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return what a parameter group holds besides its parameters; a tensor by its value of now."""
    settings = dict(group)
    del settings["params"]
    if isinstance(settings.get("lr"), Tensor):
        settings = {key: value.clone() if isinstance(value, Tensor) else value for key, value in settings.items()}
    return settings


def _is_same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left, right)
    return bool(left == right)


def _put_back_(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(value, Tensor) and isinstance(group[key], Tensor):
        _refill_tensor(group[key], value)
    else:
        group[key] = value
