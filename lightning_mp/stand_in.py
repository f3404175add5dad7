"""Classes that stand in for a module's own during a run, and pass for it.

Users compare classes, ``type(module) == nn.LayerNorm``, look them up, ``type(module) in (...)``, and
build another of the same with ``type(module)(...)``. All of this means the class that a stand-in
stands for. Only ``type(module) is nn.LayerNorm`` cannot: Python asks nobody there.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["InFront", "StandIn", "class_behind", "stand_in"]

_KEY = "_stands_for"


def class_behind(cls: type) -> type:
    """Return the class that ``cls`` stands for, or ``cls`` if it is no stand-in.

    A class that someone derived from a stand-in, as ``fully_shard`` does, stands for itself.
    """
    while _KEY in vars(cls):
        cls = vars(cls)[_KEY]
    return cls


class StandIn(type):
    """Metaclass of stand-ins: each compares, is looked up, builds and has instances like the class behind it."""

    def __eq__(cls, other: object) -> bool:
        mine, theirs = class_behind(cls), class_behind(other) if isinstance(other, type) else other
        return super().__eq__(theirs) if mine is cls else mine == theirs

    def __hash__(cls) -> int:
        mine = class_behind(cls)
        return super().__hash__() if mine is cls else hash(mine)

    def __call__(cls, /, *args: Any, **kwargs: Any) -> Any:
        mine = class_behind(cls)
        return super().__call__(*args, **kwargs) if mine is cls else mine(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        mine = class_behind(cls)
        return super().__instancecheck__(instance) if mine is cls else _is_below(type(instance), mine)

    def __subclasscheck__(cls, subclass: type) -> bool:
        # Not issubclass(subclass, mine): an ABC asks all its subclasses, a stand-in for it among them.
        mine = class_behind(cls)
        return super().__subclasscheck__(subclass) if mine is cls else _is_below(subclass, mine)


def _is_below(cls: type, above: type) -> bool:
    return any(base is above for base in cls.__mro__)


class InFront(nn.Module):
    """What a stand-in derives from before anything of the user's."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Registries of the user's know of no stand-in; of what others derive from one they do.
        if class_behind(cls) is cls:
            super().__init_subclass__(**kwargs)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # `cls.__new__(cls)`, as in a `__deepcopy__` of the user's, makes another of the module's own class.
        make, made = super().__new__, class_behind(cls)
        if made is not cls:
            return made.__new__(made, *args, **kwargs)
        return make(cls) if make is object.__new__ else make(cls, *args, **kwargs)


def stand_in(original: type[nn.Module], *bases: type[nn.Module], namespace: Mapping[str, Any], name: str = "") -> Any:
    """Return a class that passes for ``original``.

    Nothing that the user runs when a class is made sees it: neither ``__init_subclass__`` nor a metaclass.

    Args:
        original: The class to stand for.
        bases: What the class derives from: an ``InFront`` first, and ``original`` last or behind it.
        namespace: What it defines.
        name: Its name; that of ``original`` by default.
    """
    described = {key: getattr(original, key) for key in ("__module__", "__qualname__", "__doc__")}
    theirs: type = type(original)
    is_ours = any(base is StandIn for base in theirs.__mro__)
    ours = theirs if is_ours else StandIn if theirs is type else type(StandIn.__name__, (StandIn, theirs), {})
    return type.__new__(ours, name or original.__name__, bases, {**described, **namespace, _KEY: original})
