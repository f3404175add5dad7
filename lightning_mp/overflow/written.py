"""What a training step writes to the modules, so that a replay starts from what was there before it."""

import math
import sys
from collections import deque
from collections.abc import Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from lightning_mp.overflow.preserve import dict_class, write_
from lightning_mp.overflow.statistics import Statistics

__all__ = ["KeptState", "StateLostError", "WrittenState"]

# What a step without overflow may cost, 1 % of it, rules these limits. A clone takes 2 us, a reference 0.1 us.
_MAX_PLACES = 64
_MAX_CLONES = 8
# Of a table with more entries no copy is taken, and a step that fills it changes one among many.
_MAX_ENTRIES = 1000
_MAX_LIST = 64
# Copied in microseconds.
_MIN_CLONED_BYTES = 2**16
# Referred to, not copied: what a reference keeps alive one step longer.
_MIN_HELD_BYTES = 2**24
# A step with Adam moves each parameter about ten times: forward, backward, and seven times in the update.
# A copy moves its tensor twice, so that a 20th of the parameters costs one percent.
_SHARE_OF_PARAMETERS = 20

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
# Parameters, children, hooks and flags, which every module has.
_OF_TORCH = frozenset(nn.Module().__dict__)
_ABSENT: Any = object()
_LOST: Any = object()


class StateLostError(RuntimeError):
    """The step put NaN or Inf into what it starts from, and nobody kept what was there before."""


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a step writes: an entry of a dict, or a list, set or deque as a whole.

    Args:
        name: Dotted name, for messages.
        holder: The container, as the ``__dict__`` or the buffers of a module.
        key: The entry of a dict.
        in_place: Whether the tensors there are written to, rather than replaced.
    """

    name: str
    holder: Any
    key: Hashable
    in_place: bool

    @property
    def identity(self) -> tuple[int, Hashable]:
        return id(self.holder), self.key if isinstance(self.holder, dict) else None

    @property
    def value(self) -> Any:
        if isinstance(self.holder, dict):
            return dict.get(self.holder, self.key, _ABSENT)
        return list(self.holder) if len(self.holder) <= _MAX_LIST else _LOST

    @property
    def is_log(self) -> bool:
        """Whether this is a list that grows with the run: nobody's state, and what it holds is no fault of its own."""
        return not isinstance(self.holder, dict) and len(self.holder) > _MAX_LIST

    def put(self, value: Any) -> None:
        """Have ``value`` there again, or a copy: a replay may write to it once more."""
        holder, now = self.holder, self.value
        if self.in_place and isinstance(now, Tensor) and isinstance(value, Tensor) and _is_alike(now, value):
            with torch.no_grad():
                write_(now, value)
            return
        value = tree_map_only(Tensor, _copied, value)
        if isinstance(holder, list):
            list.__setitem__(holder, slice(None), value)
        elif not isinstance(holder, dict):
            holder.clear()
            (holder.update if isinstance(holder, set) else holder.extend)(value)
        elif value is not _ABSENT:
            dict_class(holder).__setitem__(holder, self.key, value)
        elif dict.__contains__(holder, self.key):
            dict_class(holder).__delitem__(holder, self.key)


# By container: its name, itself, what it held, and the versions of its tensors.
_Seen: TypeAlias = list[tuple[str, Any, Any, dict[Hashable, int]]]
# What a place held before a step.
KeptState: TypeAlias = list[tuple[_Place, Any]]


class WrittenState:
    """Knows what the steps of a model were seen to write, and keeps that before the next one.

    Looking costs a walk over all modules, so it is done in a few first steps. Written are: attributes and
    buffers that got another value, entries of their lists, dicts, sets and deques, and tensors that were
    changed in place, as far as their version tells. Left out are parameters, running statistics, which
    training does not read, and metrics of torchmetrics.

    Args:
        model: The model; all modules inside it are looked at.
        ignored: Attributes of modules that a step writes without meaning.
    """

    def __init__(self, model: nn.Module, *, ignored: Collection[str] = ()) -> None:
        self._model = model
        self._ignored = frozenset(ignored)
        self._places: dict[tuple[int, Hashable], _Place] = {}
        self._before: _Seen | None = None
        self._clones: dict[int, Tensor] = {}
        num_bytes = sum(p.numel() * p.itemsize for p in model.parameters() if not is_lazy(p))
        self._max_cloned = max(_MIN_CLONED_BYTES, num_bytes // _SHARE_OF_PARAMETERS)
        self._max_held = max(_MIN_HELD_BYTES, num_bytes // _SHARE_OF_PARAMETERS)

    def begin(self) -> None:
        """Look at the state before a step, and copy what may be small enough."""
        self._before = self._look()
        self._clones = self._cloned(self._before)

    def end(self, kept: KeptState) -> KeptState:
        """Look again after the step, remember what it wrote, and return what was there before besides ``kept``."""
        if self._before is None:
            return []
        before, self._before = self._before, None
        clones, self._clones = self._clones, {}
        held = {id(holder): content for _, holder, content, _ in before}
        written = list(self._written_since(before))
        self._learn(written)
        known = {place.identity for place, value in kept if value is not _LOST}
        found: KeptState = []
        for place in written:
            content = held[id(place.holder)]
            value = content.get(place.key, _ABSENT) if isinstance(content, dict) else content
            if place.in_place:
                value = clones.get(id(value), _LOST) if isinstance(value, Tensor) else _LOST
            if place.identity not in known:
                found.append((place, value))
        return found

    def _cloned(self, seen: _Seen) -> dict[int, Tensor]:
        left = self._max_cloned
        clones: dict[int, Tensor] = {}
        for _, _, content, versions in seen:
            for key in versions:
                tensor = content[key]
                num_bytes = tensor.numel() * tensor.itemsize
                if id(tensor) not in clones and num_bytes <= left and not tensor.is_meta:
                    left -= num_bytes
                    clones[id(tensor)] = _copied(tensor)
        return clones

    def keep(self) -> KeptState:
        """Return what the step that begins may write; a replay starts from it."""
        return [(place, self._kept(place)) for place in self._places.values()] if self._places else []

    def restore_(self, kept: KeptState) -> None:
        """Put back what was kept; undoing that is the caller's."""
        reachable = {id(holder) for _, holder, _, _ in self._look()}
        for place, value in kept:
            if value is not _LOST and id(place.holder) in reachable:
                place.put(value)

    @contextmanager
    def checked(self, kept: KeptState) -> Iterator[None]:
        """Learn from a replay in the block, which starts from ``kept``, what it writes.

        Raises:
            StateLostError: If something that it writes held Inf or NaN and is not what its step began with.
        """
        before = self._look()
        is_bad = _bad_places(before)
        yield
        written = list(self._written_since(before))
        self._learn(written)
        restored = {place.identity for place, value in kept if value is not _LOST}
        for place in written:
            if place.identity in is_bad and place.identity not in restored and not place.is_log:
                raise StateLostError(f"{place.name} holds Inf or NaN that the step itself has put there")

    def _look(self) -> _Seen:
        found = _containers(self._model)
        return [(name, holder, _shallow(holder), _versions(holder)) for name, holder in found]

    def _written_since(self, before: _Seen) -> Iterator[_Place]:
        for name, holder, held, versions in before:
            if not isinstance(holder, dict):
                is_changed = len(holder) != len(held) or any(a is not b for a, b in zip(holder, held, strict=True))
                in_place = any(_versions(holder).get(key, old) != old for key, old in versions.items())
                if is_changed or in_place:
                    yield _Place(name, holder, None, in_place)
                continue
            for key in {**held, **_shallow(holder)}:
                old, now = held.get(key, _ABSENT), dict.get(holder, key, _ABSENT)
                in_place = old is now and key in versions and now._version != versions[key]
                if (old is not now or in_place) and key not in self._ignored and not isinstance(now, Parameter):
                    yield _Place(f"{name}.{key}" if name else str(key), holder, key, in_place)

    def _learn(self, written: Iterable[_Place]) -> None:
        for place in written:
            known = self._places.get(place.identity)
            if known is None and len(self._places) >= _MAX_PLACES:
                continue
            if place.in_place and sum(each.in_place for each in self._places.values()) >= _MAX_CLONES:
                continue
            if known is None or (place.in_place and not known.in_place):
                self._places[place.identity] = place

    def _kept(self, place: _Place) -> Any:
        value = place.value
        if type(value) is Tensor and value.layout is torch.strided and not value.is_nested:
            if value.nbytes > (self._max_cloned if place.in_place else self._max_held):
                return _LOST
            return _copied(value) if place.in_place else _detached(value)
        if isinstance(value, _PLAIN) or value is _ABSENT or value is _LOST:
            return value
        tensors = _few_tensors(value)
        if tensors is None:
            return _LOST
        num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        if num_bytes > (self._max_cloned if place.in_place else self._max_held):
            return _LOST
        if place.in_place:
            return tree_map_only(Tensor, _copied, value)
        return tree_map_only(Tensor, _detached, value) if any(t.grad_fn is not None for t in tensors) else value


def _containers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what can be written to with its name, nearest to the model first."""
    # Held: what a freed value leaves behind could be another one's.
    seen: dict[int, Any] = {}
    waiting: deque[tuple[str, Any]] = deque([("", model)])
    passed_over = _passed_over()
    while waiting:
        name, value = waiting.popleft()
        if id(value) in seen or isinstance(value, passed_over):
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            attributes = value.__dict__
            buffers, modules = attributes.get("_buffers", {}), attributes.get("_modules", {})
            yield name, attributes
            if not isinstance(value, _NormBase):
                yield name, buffers
            items = [*((key, item) for key, item in attributes.items() if key not in _OF_TORCH), *modules.items()]
        elif len(value) > _MAX_ENTRIES:
            continue
        else:
            if not isinstance(value, tuple | frozenset):
                yield name, value
            items = list(dict.items(value) if isinstance(value, dict) else enumerate(value))
        for key, item in items:
            if isinstance(item, (nn.Module, *_CONTAINERS)):
                waiting.append((f"{name}.{key}" if name else str(key), item))


def _passed_over() -> tuple[type, ...]:
    metrics = sys.modules.get("torchmetrics")
    return (torch.jit.ScriptModule, *((metrics.Metric,) if metrics is not None else ()))


def _shallow(holder: Any) -> Any:
    return dict(dict.items(holder)) if isinstance(holder, dict) else list(holder)


def _versions(holder: Any) -> dict[Hashable, int]:
    items = dict.items(holder) if isinstance(holder, dict) else enumerate(holder)
    return {
        key: value._version
        for key, value in items
        # A tensor of inference mode counts none.
        if isinstance(value, Tensor) and not isinstance(value, Parameter)
        if not value.is_inference() and not is_lazy(value)
    }


def _few_tensors(value: Any, left: int = 16) -> list[Tensor] | None:
    """Return the tensors of a tensor or of a few plain containers; ``None`` for anything else."""
    if isinstance(value, Tensor):
        return [value] if value.layout is torch.strided and not value.is_nested else None
    if isinstance(value, _PLAIN):
        return []
    is_named = isinstance(value, tuple) and hasattr(value, "_fields")
    if not (type(value) in (list, tuple, dict) or is_named) or len(value) > left:
        return None
    found: list[Tensor] = []
    for item in value.values() if isinstance(value, dict) else value:
        tensors = _few_tensors(item, left // 2)
        if tensors is None:
            return None
        found += tensors
    return found


def _copied(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Parameter):
        return tensor
    if not tensor.requires_grad:
        return tensor.clone()
    return tensor.detach().clone().requires_grad_(tensor.is_leaf)


def _detached(tensor: Tensor) -> Tensor:
    # A graph would keep activations alive.
    return tensor if tensor.grad_fn is None else tensor.detach()


def _is_alike(now: Tensor, kept: Tensor) -> bool:
    return now.shape == kept.shape and now.dtype == kept.dtype and now.device == kept.device


def _bad_places(seen: _Seen) -> set[tuple[int, Hashable]]:
    """Return where there is Inf or NaN."""
    statistics = Statistics()
    places, found = [], set()
    for _, holder, held, _ in seen:
        for key, value in held.items() if isinstance(held, dict) else enumerate(held):
            identity = id(holder), key if isinstance(held, dict) else None
            if isinstance(value, float) and not math.isfinite(value):
                found.add(identity)
            elif isinstance(value, Tensor) and not isinstance(value, Parameter):
                places.append((identity, statistics.add([value])))
            elif isinstance(value, tuple):
                places.append((identity, statistics.add(_few_tensors(value) or [])))
    statistics.read()
    return found | {identity for identity, wanted in places if not statistics.of(wanted).is_finite}
