"""Taking back one ``scheduler.step()``: what it may change is noted before, and put back if its update was left out."""

import collections
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["SchedulerUndo", "can_undo"]

_PLAIN = (bool, int, float, str, bytes, type, types.NoneType, types.BuiltinFunctionType, weakref.ReferenceType)


def can_undo(scheduler: Any) -> bool:
    """Tell whether a step of ``scheduler`` can be taken back exactly.

    That is so for a scheduler of torch's kind that holds numbers, tensors, functions of such, containers of
    these and further such schedulers. Who holds anything else, as an iterator, a random generator or a method
    of another object, may change it.
    """
    if not isinstance(scheduler, LRScheduler):
        return False
    parts = list(_parts(scheduler))
    return all(_is_known(value, parts) for part in parts for value in vars(part).values())


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


def _is_known(value: Any, parts: list[Any], depth: int = 4) -> bool:
    if isinstance(value, (*_PLAIN, Tensor, LRScheduler, Optimizer)):
        return True
    inside = _inside(value, parts) if depth > 0 else None
    return inside is not None and all(_is_known(item, parts, depth - 1) for item in inside)


def _inside(value: Any, parts: list[Any]) -> Iterable[Any] | None:
    """Return what a value is made of; ``None`` if it may be anything."""
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, types.MethodType):
        owner = value.__self__
        return [value.__func__] if isinstance(owner, type) or any(owner is part for part in parts) else None
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, dict):
        return [item for pair in value.items() for item in pair]
    return value if type(value) in (list, tuple, set, frozenset, collections.deque) else None


def _contents(part: Any) -> Iterator[Callable[[], None]]:
    """Yield what puts back the contents of attributes that a step may change in place."""
    for value in vars(part).values():
        yield from _contents_of(value)


def _contents_of(value: Any, depth: int = 4) -> Iterator[Callable[[], None]]:
    if isinstance(value, Tensor):
        yield partial(_refill_tensor, value, value.detach().clone())
        return
    if type(value) is list:
        yield partial(value.__setitem__, slice(None), list(value))
    elif isinstance(value, dict | set | collections.deque):
        yield partial(_refill, value, value.copy())
    elif type(value) is not tuple:
        return
    for item in value.values() if isinstance(value, dict) else value:
        if depth > 0 and isinstance(item, list | tuple | dict | set | collections.deque | Tensor):
            yield from _contents_of(item, depth - 1)


def _refill(target: Any, items: Any) -> None:
    target.clear()
    (target.extend if isinstance(target, collections.deque) else target.update)(items)


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
