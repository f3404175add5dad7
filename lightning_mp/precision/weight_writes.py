"""Find out from the code of a ``training_step`` whether it may write weights between its forwards."""

import functools
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_mp.pinning.scan import Mentions, find_mentions, find_mentions_in, holds_any, is_other_peoples

__all__ = ["may_write_weights"]

# They change no values.
_HARMLESS = frozenset(
    {"requires_grad_", "detach_", "squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "as_strided_"}
)
# Ways past autograd, of which the version of a tensor does not tell.
_PAST_VERSIONS = frozenset({"data", "set_", "swap_tensors", "vector_to_parameters"})
# What code that writes weights calls: methods in place, the ways past autograd, and the parameters themselves,
# which `param += step` writes without a name.
_WRITERS = (
    _PAST_VERSIONS
    | {"load_state_dict", "parameters", "named_parameters"}
    | {name for space in (Tensor, torch, nn.init) for name in dir(space) if name.endswith("_") and name[-2:] != "__"}
) - _HARMLESS
_CALLS = frozenset({"forward", "__call__"})
# How far objects in objects are looked at, and how many of one container.
_MAX_DEPTH = 4
_MAX_ITEMS = 64
# What Lightning and torch keep in a module beside what the user does.
_NOT_THE_USERS = frozenset(
    {"_trainer", "_fabric", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_hparams"}
)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_NAMESPACES = (SimpleNamespace, Namespace)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def may_write_weights(module: LightningModule) -> bool:
    """Tell from the code of ``training_step``, and of what it reaches, whether it may write weights.

    It may say yes where it writes activations only, which costs memory and never accuracy. What the step names is
    read for any write. What it reaches further down, the forwards of modules, hooks and objects in objects, is read
    for writes through ``.data`` alone: others raise the version of the weight, and are found when they happen.
    """
    own = vars(module).get("training_step")
    found = find_mentions(type(module), "training_step", _WRITERS) if own is None else find_mentions_in(own, _WRITERS)
    if found.is_found:
        return True
    held = {**vars(module), **module._modules}
    for value in (held[name] for name in found.names & held.keys()):
        # An object of the user's, such as one that perturbs the weights, by those of its methods that are named.
        if any(find_mentions(type(value), name, _WRITERS).is_found for name in found.names):
            return True
        if not isinstance(value, nn.Module) and holds_any(value, _WRITERS, ()):
            return True
    return _may_write_past_versions(module, found)


def _may_write_past_versions(module: LightningModule, found: Mentions) -> bool:
    modules = list(module.modules())
    hooks = [hook for m in modules for kind in _HOOKS for hook in getattr(m, kind).values()]
    todo = [*modules, *hooks, *found.objects, *_callbacks(module, found.names)]
    seen: set[int] = set()
    methods: dict[type, set[str]] = {}
    known, read = found.names | _CALLS, set[tuple[type, str]]()
    if "getattr" in known:
        # A step may be chosen by a name that is put together: any method of the user's but the hooks.
        known |= _methods_of(type(module)) - set(dir(LightningModule))
    kept = []  # what is gone could lend its id to another object
    while todo:
        reached = list(_reachable(todo, seen))
        kept += reached
        mentions = [find_mentions_in(value, _PAST_VERSIONS) for value in reached if _is_function(value)]
        methods |= {cls: _methods_of(cls) for cls in map(type, reached) if cls not in methods}
        known = known.union(*(each.names for each in mentions))
        unread = [(cls, name) for cls, own in methods.items() for name in own & known if (cls, name) not in read]
        read.update(unread)
        mentions += [find_mentions(cls, name, _PAST_VERSIONS) for cls, name in unread]
        if any(each.is_found for each in mentions):
            return True
        known = known.union(*(each.names for each in mentions))
        todo = [value for each in mentions for value in each.objects]
    return False


def _callbacks(module: LightningModule, names: frozenset[str]) -> list[Any]:
    trainer = module._trainer
    return list(trainer.callbacks) if trainer is not None and "callbacks" in names else []  # type: ignore[attr-defined]


def _reachable(values: Iterable[Any], seen: set[int]) -> Iterator[Any]:
    """Yield the user's objects and functions, and those that they hold, each once; containers are opened."""
    todo = [(value, _MAX_DEPTH) for value in values]
    while todo:
        value, depth = todo.pop()
        cls = type(value)
        if id(value) in seen or issubclass(cls, (Tensor, type)):
            continue
        if issubclass(cls, _CONTAINERS):
            seen.add(id(value))
            todo += [(item, depth) for item in islice(_items(value), _MAX_ITEMS)]
        elif issubclass(cls, (nn.Module, *_NAMESPACES)) or _is_function(value) or not is_other_peoples(cls.__module__):
            seen.add(id(value))
            yield value
            todo += [(held, depth - 1) for held in _held_by(value)] if depth else []


def _items(container: Any) -> Iterator[Any]:
    if issubclass(type(container), dict):
        return iter(dict.values(container))
    base = next(kind for kind in _CONTAINERS if issubclass(type(container), kind))
    return iter(base.__iter__(container))


def _held_by(value: Any) -> Iterator[Any]:
    cls = type(value)
    if cls is MethodType:
        yield value.__self__
    elif issubclass(cls, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif cls is FunctionType:
        for cell in value.__closure__ or ():
            # A cell that nobody has written to yet is empty.
            with suppress(ValueError):
                yield cell.cell_contents
    else:
        # Past the user's own look-up, of which a lazy object may think what it likes.
        with suppress(AttributeError):
            attributes = object.__getattribute__(value, "__dict__")
            yield from (held for name, held in attributes.items() if name not in _NOT_THE_USERS)


def _is_function(value: Any) -> bool:
    return type(value) in (FunctionType, MethodType) or issubclass(type(value), functools.partial)


def _methods_of(cls: type) -> set[str]:
    return {name for owner in cls.__mro__ if not is_other_peoples(owner.__module__) for name in vars(owner)}
