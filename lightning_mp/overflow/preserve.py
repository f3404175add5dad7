"""Running a model once more without a trace: random numbers, buffers and attributes come back."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

__all__ = ["RandomState", "eager", "preserved"]


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
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        return RandomState(torch.get_rng_state(), cuda)

    def restore_(self) -> None:
        """Make torch's generators continue from these states."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back, after the block, what a training step changes besides gradients.

    That is: the random states of torch, Python and NumPy; buffers; and of every module inside ``model``
    its attributes, with the contents of those that are tensors, lists, dicts and sets. The states of
    torchmetrics are such attributes. Gradients and parameters are the caller's.
    """
    rng, python_rng = RandomState.now(), random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_rng = numpy.random.get_state() if numpy is not None else None
    undo = [put_back for module in _all_modules(model) for put_back in _remember(module)]
    try:
        yield
    finally:
        for put_back in undo:
            put_back()
        rng.restore_()
        random.setstate(python_rng)
        if numpy is not None:
            numpy.random.set_state(numpy_rng)


def eager() -> AbstractContextManager[Any]:
    """Return a context in which compiled modules run as written: hooks of compiled ones do not fire."""
    # Nothing is compiled as long as nobody loaded the compiler, and loading it takes a second.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


def _all_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules inside, and those in lists and dicts of theirs, such as metrics."""
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in found:
            continue
        found[id(module)] = module
        waiting += module.children()
        for value in module.__dict__.values():
            items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            waiting += [item for item in items if isinstance(item, nn.Module)]
    return list(found.values())


def _remember(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Yield functions that put the contents back, then one for the attributes themselves."""
    attributes = dict(module.__dict__)
    for value in [*attributes.values(), *module._buffers.values()]:
        put_back = _contents_of(value)
        if put_back is not None:
            yield put_back

    def put_attributes_back() -> None:
        module.__dict__.clear()
        module.__dict__.update(attributes)

    yield put_attributes_back


def _contents_of(value: Any) -> Callable[[], None] | None:
    if isinstance(value, Parameter):
        return None
    if isinstance(value, Tensor):
        return _tensor_contents(value)
    # Exact types: a subclass may refuse or count such changes.
    if type(value) is list:
        items = list(value)
        return lambda: value.__setitem__(slice(None), items)
    if type(value).__name__ in ("dict", "OrderedDict", "set", "defaultdict"):
        return partial(_refill, value, value.copy())
    return None


def _refill(value: Any, items: Any) -> None:
    value.clear()
    value.update(items)


def _tensor_contents(value: Tensor) -> Callable[[], None]:
    kept = value.detach().clone()

    def put_back() -> None:
        # Not by the version counter: batch norm moves its statistics without raising it (torch 2.13).
        if not torch.equal(value, kept):
            with torch.no_grad():
                value.copy_(kept)

    return put_back
