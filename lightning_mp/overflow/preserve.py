"""Running a model once more without a trace: random numbers, buffers and attributes come back."""

import operator
import random
import sys
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

__all__ = ["RandomState", "dict_class", "eager", "preserved", "write_"]

_HAS_CUDA = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]  # true for ROCm too


class RandomState(NamedTuple):
    """States of torch's generators: the CPU's, and that of one CUDA device if it is used.

    Args:
        cpu: What ``torch.get_rng_state`` returns.
        cuda: What ``torch.cuda.get_rng_state`` returns for the current device, or ``None``.
    """

    cpu: Tensor
    cuda: Tensor | None = None

    @staticmethod
    def now() -> "RandomState":
        """Take the states; nothing is asked of the device."""
        uses_cuda = _HAS_CUDA and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        cuda = torch.cuda.get_rng_state() if uses_cuda else None
        return RandomState(torch.default_generator.get_state(), cuda)

    def restore_(self) -> None:
        """Make torch's generators continue from these states."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back, after the block, what a training step changes besides gradients.

    That is: the random states of torch, Python and NumPy; buffers; and of every module inside ``model``
    its attributes. Of those that are lists, dicts, sets and deques (subclasses too, and nested), tensors,
    NumPy arrays, and generators of torch, Python and NumPy, the contents come back. The states of
    torchmetrics are such attributes. Objects of other classes keep what the block wrote to them, and
    gradients and parameters are the caller's. What did not change is not written. A value that cannot be
    read or written is left as it is, with a warning, and keeps nothing else from coming back.
    """
    undo: list[Callable[[], object]] = [RandomState.now().restore_, partial(random.setstate, random.getstate())]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        undo.append(partial(numpy.random.set_state, numpy.random.get_state()))
    failures: list[str] = []
    undo += _remember(model, failures)
    try:
        yield
    finally:
        for put_back in undo:
            try:
                put_back()
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")
        if failures:
            warnings.warn(_failure_text(model, failures), RuntimeWarning, stacklevel=3)


def _failure_text(model: nn.Module, failures: list[str]) -> str:
    return (
        f"{len(failures)} of the values that {type(model).__name__} and its modules hold could not be put back after a "
        f"batch was computed once more, which may have changed them. The first failed with {failures[0]}"
    )


def eager() -> AbstractContextManager[Any]:
    """Return a context in which compiled modules run as written: hooks of compiled ones do not fire."""
    # Nothing is compiled as long as nobody loaded the compiler, and loading it takes a second.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


def _remember(model: nn.Module, failures: list[str]) -> Iterator[Callable[[], None]]:
    """Yield what puts back the contents of everything that is found from ``model`` on; note what cannot be read."""
    # By identity, and held: what a freed value leaves behind could be another one's.
    seen: dict[int, Any] = {}
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        try:
            waiting += _items_of(value)
            put_back = _contents_of(value)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
            continue
        if put_back is not None:
            yield put_back


def _items_of(value: Any) -> list[Any]:
    """Return what ``value`` holds, as far as that has contents to put back."""
    cls = type(value)
    if issubclass(cls, nn.Module):
        # A scripted module holds its buffers and children elsewhere.
        return _with_contents([*value.__dict__.values(), *value.buffers(recurse=False), *value.children()])
    if issubclass(cls, dict):
        return _with_contents(dict_class(value).values(value))
    return _with_contents(value) if issubclass(cls, (list, tuple, set, frozenset, deque)) else []


# By identity: metaclasses may compare as they like.
_PLAIN_TYPES = frozenset(map(id, (bool, int, float, complex, str, bytes, type(None))))


def _with_contents(items: Collection[Any]) -> list[Any]:
    # By type, of which a table of a million numbers has one.
    if _PLAIN_TYPES.issuperset(map(id, map(type, items))):
        return []
    types = dict(zip(map(id, map(type, items)), map(type, items), strict=True))
    wanted = {key for key, cls in types.items() if issubclass(cls, _classes_with_contents())}
    return [item for item in items if id(type(item)) in wanted] if wanted else []


def _classes_with_contents() -> tuple[type, ...]:
    numpy = sys.modules.get("numpy")
    return (
        *(Tensor, nn.Module, dict, list, tuple, set, frozenset, deque, torch.Generator, random.Random),
        *((numpy.random.RandomState, numpy.random.Generator, numpy.ndarray) if numpy is not None else ()),
    )


def _contents_of(value: Any) -> Callable[[], None] | None:
    if isinstance(value, Parameter) or is_lazy(value):
        return None
    if isinstance(value, Tensor):
        return _tensor_contents(value)
    if isinstance(value, nn.Module):
        return partial(_refill_dict, value.__dict__, dict(value.__dict__))
    if isinstance(value, dict):
        return partial(_refill_dict, value, dict(dict_class(value).items(value)))
    if isinstance(value, list):
        return partial(_refill_list, value, list(value))
    if isinstance(value, set | deque):
        return partial(_refill, value, list(value))
    return _state_of(value)


# Methods of the built-in classes, since those of a subclass may count or refuse what is written. What did
# not change is not written at all.


def _refill_dict(value: dict[Any, Any], kept: dict[Any, Any]) -> None:
    base = dict_class(value)
    if _are_same(base.keys(value), kept) and _are_same(base.values(value), kept.values()):
        return
    base.clear(value)
    for key, item in kept.items():
        base.__setitem__(value, key, item)


def dict_class(value: dict[Any, Any]) -> Any:
    """Return the built-in class whose methods write to a dict of any subclass."""
    return OrderedDict if isinstance(value, OrderedDict) else dict


def _refill_list(value: list[Any], kept: list[Any]) -> None:
    if not _are_same(value, kept):
        list.__setitem__(value, slice(None), kept)


def _refill(value: Any, kept: list[Any]) -> None:
    if _are_same(value, kept):
        return
    base: Any = set if isinstance(value, set) else deque
    base.clear(value)
    (base.update if base is set else base.extend)(value, kept)


def _are_same(value: Collection[Any], kept: Collection[Any]) -> bool:
    return len(value) == len(kept) and all(map(operator.is_, value, kept))


def _state_of(value: Any) -> Callable[[], None] | None:
    """Return what puts back the state of a generator or the numbers of an array; ``None`` for anything else."""
    if isinstance(value, torch.Generator):
        return partial(_set_state, value, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, numpy.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, numpy.ndarray) and value.flags.writeable:
        return partial(value.__setitem__, ..., value.copy())
    return None


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _tensor_contents(value: Tensor) -> Callable[[], None] | None:
    if value.is_meta:
        # No numbers.
        return None
    storage, kept = value.detach(), value.detach().clone()

    def put_back() -> None:
        # What a validation stored may only be written as it was made.
        with torch.inference_mode(value.is_inference()), torch.no_grad():
            is_plain = value.layout is torch.strided and not value.is_nested
            if is_plain and (
                value.shape != kept.shape or value.dtype != kept.dtype or value.data_ptr() != storage.data_ptr()
            ):
                value.data = storage
            # Not by the version counter: batch norm moves its statistics without raising it (torch 2.13).
            if not _have_same_bits(value, kept):
                write_(value, kept)

    return put_back


# NaN differs from itself as a number, not in its bits. By bytes of an element.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _have_same_bits(value: Tensor, kept: Tensor) -> bool:
    return all(torch.equal(_bits(a), _bits(b)) for a, b in zip(_parts(value), _parts(kept), strict=True))


def _parts(value: Tensor) -> list[Tensor]:
    """Return the dense tensors in which ``value`` keeps its numbers and their places."""
    if value.is_nested:
        return [value.values(), value.offsets()] if value.layout is torch.jagged else [*value.unbind()]  # type: ignore[attr-defined]
    if value.layout is torch.sparse_coo:
        return [value._indices(), value._values()]
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [value.crow_indices(), value.col_indices(), value.values()]
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [value.ccol_indices(), value.row_indices(), value.values()]
    return [value]


def _bits(value: Tensor) -> Tensor:
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    return value.resolve_neg().view(_BITS[value.itemsize]) if value.is_floating_point() else value


def write_(value: Tensor, kept: Tensor) -> None:
    """Give ``value``, which may be expanded, the numbers of ``kept``."""
    if value.layout is torch.strided and not value.is_nested:
        # Once: torch refuses to write where `expand` repeats a place.
        repeated = [dim for dim, stride in enumerate(value.stride()) if stride == 0 and value.shape[dim] > 1]
        for dim in repeated:
            value, kept = value.narrow(dim, 0, 1), kept.narrow(dim, 0, 1)
    value.copy_(kept)
