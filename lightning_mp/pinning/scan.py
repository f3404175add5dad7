"""Find out from the code of a method whether it may call a pinned function, also in a later branch."""

import functools
import inspect
import sys
import sysconfig
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodDescriptorType, MethodType, ModuleType
from typing import Any

from torch import nn

__all__ = ["Mentions", "find_mentions", "find_mentions_in", "holds_any", "is_other_peoples"]

# Helpers in these packages are torch's own or never reach a pinned function on the user's behalf.
_OTHER_PEOPLES_PACKAGES = frozenset({"torch", "torchmetrics", "lightning", "pytorch_lightning", "numpy", "builtins"})
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
# What torch's functions are: written in C++ or Python, or methods of Tensor.
_CALLABLE_TYPES = (BuiltinFunctionType, FunctionType, MethodDescriptorType)


@dataclass(frozen=True)
class Mentions:
    """What the code of a method, and of what it names, mentions.

    Args:
        is_found: Whether it uses one of the functions that were looked for.
        names: All names in that code; those of attributes of the instance are for ``holds_any``.
        objects: What that code names of the user's that is no code itself, such as a global object.
    """

    is_found: bool
    names: frozenset[str]
    objects: tuple[Any, ...] = ()


def find_mentions(cls: type, method: str, names: frozenset[str], functions: Container[Any] = ()) -> Mentions:
    """Tell whether ``cls.method``, or a method or function that it names, uses one of these functions.

    The first batch shows what ran; this shows what a branch that starts later will run, such as a
    loss term of the second epoch. It may say yes where nothing is called, which costs time and never
    accuracy. It follows methods of ``cls`` and what the code names through its globals, its closure and
    its defaults, under any name and in dicts and lists; what is reached through an argument is not seen.
    No object is asked for an attribute: one of the user's, such as a config, may answer in its own way.

    Args:
        cls: Class of a module.
        method: Where to start, such as ``"forward"``.
        names: Names of functions, such as ``{"softmax"}``.
        functions: The functions themselves, for code that calls them by another name.
    """
    return _Search(names, functions, cls).follow(_methods(cls, method))


def find_mentions_in(value: Any, names: frozenset[str]) -> Mentions:
    """Tell what a function, or what wraps one, mentions, as ``find_mentions`` does for a method."""
    return _Search(names, ()).follow([], [value])


def holds_any(value: Any, names: frozenset[str], functions: Container[Any]) -> bool:
    """Tell whether ``value`` is one of these functions, or calls or holds one, as an attribute of a module may."""
    return _Search(names, functions).follow([], [value]).is_found


class _Search:
    """Follows code to code, each once."""

    def __init__(self, names: frozenset[str], functions: Container[Any], cls: type = object) -> None:
        self._names = names
        self._functions = functions
        self._cls = cls
        self._objects: list[Any] = []

    def follow(self, functions: Iterable[FunctionType], values: Iterable[Any] = ()) -> Mentions:
        todo, found = list(functions), self._open(values)
        seen: set[CodeType] = set()
        mentioned: set[str] = set()
        while found is not None:
            todo += found
            if not todo:
                return Mentions(False, frozenset(mentioned), tuple(self._objects))
            function = todo.pop()
            found = []
            if function.__code__ in seen:
                continue
            seen.add(function.__code__)
            here = set(_names(function.__code__))
            mentioned |= here
            found = None if here & self._names else self._open(self._values(function, here))
        return Mentions(True, frozenset(mentioned), tuple(self._objects))

    def _values(self, function: FunctionType, mentioned: set[str]) -> Iterator[Any]:
        for name in mentioned:
            # The definitions of a name in the user's classes, and what is a property or static there.
            yield from _definitions(self._cls, name)
        yield from _named_values(function, mentioned)

    def _open(self, values: Iterable[Any]) -> list[FunctionType] | None:
        """Return the functions among ``values`` that are to be read; ``None`` if one is looked for."""
        found: list[FunctionType] = []
        for value in values:
            if not _may_be_code(type(value)) and not is_other_peoples(type(value).__module__):
                self._objects.append(value)
            for item in _contents(value):
                if _is_in(item, self._functions):
                    return None
                found.extend(_functions(item))
        return found


# Only types are asked below, and what Python itself keeps in its objects is read past their classes: getattr,
# hasattr and isinstance (by __class__) would run code of the user's.


def _is_a(value: Any, *classes: type) -> bool:
    return issubclass(type(value), classes)


def _slot(cls: type, name: str, value: Any) -> Any:
    """Return what ``value`` keeps in a slot that the built-in class ``cls`` gave it."""
    return cls.__dict__[name].__get__(value)


def _contents(value: Any) -> Iterator[Any]:
    """Yield ``value``, or what a plain container holds, if its type may be code."""
    items: Iterable[Any] = [value]
    if any(type(value) is cls for cls in (dict, list, tuple, set, frozenset)):
        items = list(value.values() if type(value) is dict else value)
    # By type, of which a table of millions of numbers has one. By identity: metaclasses may compare as they like.
    types = dict(zip(map(id, map(type, items)), map(type, items), strict=True))
    code = {key for key, cls in types.items() if _may_be_code(cls)}
    yield from (_inside(item) for item in items if id(type(item)) in code) if code else ()


def _may_be_code(cls: type) -> bool:
    return issubclass(cls, (property, staticmethod, classmethod)) or any("__call__" in vars(c) for c in cls.__mro__)


def _binds(cls: type) -> bool:
    return any("__get__" in vars(c) for c in cls.__mro__)


def _inside(value: Any) -> Any:
    """Return what partials and wrappers around functions hold; each once, since they may hold themselves."""
    seen: set[int] = set()
    while id(value) not in seen:
        seen.add(id(value))
        if _is_a(value, functools.partial):
            value = _slot(functools.partial, "func", value)
        for cls in (staticmethod, classmethod, MethodType):
            if _is_a(value, cls):
                value = _slot(cls, "__func__", value)
    return value


def _is_in(value: Any, functions: Container[Any]) -> bool:
    # Not every value has a hash, an array compares by element, and objects of the user's as they like.
    return _is_a(value, *_CALLABLE_TYPES) and value in functions


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _definitions(cls: type, name: str) -> Iterator[Any]:
    """Yield what ``name`` is in the classes of the user."""
    for owner in cls.__mro__:
        if owner is not nn.Module and name in vars(owner) and not is_other_peoples(owner.__module__):
            yield vars(owner)[name]


def _methods(cls: type, name: str) -> Iterator[FunctionType]:
    for definition in _definitions(cls, name):
        yield from _functions(definition)


def _functions(value: Any) -> Iterator[FunctionType]:
    if _is_a(value, property):
        value = _slot(property, "fget", value)
    value = _unwrapped(_inside(value))
    if type(value) is FunctionType and not is_other_peoples(value.__module__):
        yield value


def _unwrapped(value: Any) -> Any:
    """Return what decorators wrapped; where they wrap each other, the last one before it starts again."""
    seen: set[int] = set()
    # Whether it can be called, or bound to an object, is a question to its type.
    while (callable(value) or _binds(type(value))) and id(value) not in seen:
        seen.add(id(value))
        wrapped = inspect.getattr_static(value, "__wrapped__", None)
        if wrapped is None or id(wrapped) in seen:
            break
        value = _inside(wrapped)
    return value


def _named_values(function: FunctionType, mentioned: set[str]) -> Iterator[Any]:
    """Yield what ``function`` names in its module, as an attribute of a module imported there, or holds itself."""
    for name in mentioned:
        value = dict.get(function.__globals__, name)
        if not _is_a(value, ModuleType):
            yield value
            continue
        # Past a lazy module's own look-up, which would import it.
        members = _slot(ModuleType, "__dict__", value)
        if not is_other_peoples(members.get("__name__")):
            yield from (members.get(attribute) for attribute in mentioned)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        # A cell that nobody has written to yet is empty.
        with suppress(ValueError):
            yield cell.cell_contents


def is_other_peoples(module_name: Any) -> bool:
    """Tell whether this is the name of a module whose code is not read."""
    # A class or function may call its module anything, also None.
    if type(module_name) is not str:
        return False
    package = module_name.partition(".")[0]
    return package in _OTHER_PEOPLES_PACKAGES or _is_standard(package)


@functools.cache
def _is_standard(package: str) -> bool:
    """Tell whether a package is Python's own, and no module of the user's by its name, such as ``code.py``."""
    if package not in sys.stdlib_module_names:
        return False
    module = sys.modules.get(package)
    file = _slot(ModuleType, "__dict__", module).get("__file__") if _is_a(module, ModuleType) else None
    return file is None or Path(file).is_relative_to(_STANDARD_LIBRARY)
