"""Watch one batch: which module calls which pinned function, and in what dtype the kernels ran."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mp.errors import UnsupportedError
from lightning_mp.formats import HALF_DTYPES
from lightning_mp.pinning.functions import FunctionRules, PinKind
from lightning_mp.pinning.mode import CHECKPOINT_FILE, FunctionPins, checkpoint_text

__all__ = ["Observation", "PinReport", "PinnedCall", "watch_batch"]

_CALL = nn.Module._call_impl.__code__

# What the kernels of each kind have in their names, in the ATen operators that autograd runs.
_KERNEL_NAMES: dict[PinKind, tuple[str, ...]] = {
    "softmax": ("softmax",),
    "norm": ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"),
    "loss": ("_loss", "cross_entropy", "nll_loss"),
}


_CASTS = frozenset({"aten::_to_copy", "aten::copy_", "aten::detach", "aten::clone"})
# `x.to(dtype)` as inference mode hands it over, in one piece: aten::to.dtype, aten::to.other and the like.
_WHOLE_CASTS = "aten::to."


@dataclass(frozen=True)
class PinnedCall:
    """A pinned function or a kernel of a pinned kind that ran in the watched batch.

    Args:
        fqn: Full dotted name of the module in whose ``forward`` it ran; for what a step calls itself,
            the name of the step.
        name: Name of the function, or of the ATen operator.
        dtype: Dtype that it computed in.
    """

    fqn: str
    name: str
    dtype: torch.dtype


@dataclass
class Observation:
    """What was seen in one batch.

    Args:
        calls: Pinned functions, with how often each ran.
        kernels: Kernels of the pinned kinds, with how often each ran.
        fused_attention: Modules that called ``scaled_dot_product_attention``, whose softmax is inside.
        nested: Pairs of a module and one that ran directly inside it.
        reached: Names of all modules in which torch was called.
    """

    calls: Counter[PinnedCall] = field(default_factory=Counter)
    kernels: Counter[PinnedCall] = field(default_factory=Counter)
    fused_attention: set[str] = field(default_factory=set)
    nested: set[tuple[str, str]] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    in_fused_attention: bool = False

    @property
    def below_fp32(self) -> list[PinnedCall]:
        """Kernels that computed in FP16 or BF16 although their kind or their module is pinned."""
        return sorted((k for k in self.kernels if k.dtype in HALF_DTYPES), key=lambda k: (k.fqn, k.name))


@dataclass(frozen=True)
class PinReport:
    """What was pinned and what ran in the first batch of one step.

    Args:
        step: Name of the step, such as ``"training_step"``.
        modules: Class names of the pinned modules by full dotted name.
        callers: Names of the modules and steps whose own calls of functions are pinned.
        calls: Pinned functions that ran, with how often.
        not_reached: Pinned modules that the batch did not run.
        without_match: Kinds of which the model has no module and ran no function.
        other_norms: Class names of norms that are none of torch.nn and that nothing pins.
        below_fp32: What computed in 16 bits despite the pin.
        fused_attention: Callers of ``scaled_dot_product_attention``, whose softmax is not pinned.
    """

    step: str
    modules: Mapping[str, str]
    callers: tuple[str, ...]
    calls: Mapping[PinnedCall, int]
    not_reached: tuple[str, ...]
    without_match: tuple[PinKind, ...]
    other_norms: tuple[str, ...]
    below_fp32: tuple[PinnedCall, ...]
    fused_attention: tuple[str, ...]


class _Frames:
    """Tell from the Python stack which modules a call of torch is in."""

    def __init__(self, names: Mapping[int, str], step: tuple[CodeType, str] | None) -> None:
        self._names = names
        self._step = step

    def owners(self, frame: FrameType | None) -> Iterator[tuple[str, FrameType | None]]:
        """Yield the known modules around ``frame``, innermost first, each with a checkpoint inside it.

        A name is followed by the frame in ``torch.utils.checkpoint`` that lies between the call and the
        ``forward`` of that module, or by ``None``.
        """
        checkpoint = None
        last = None
        while frame is not None:
            if frame.f_code.co_filename == CHECKPOINT_FILE:
                checkpoint = frame
            if self._step is not None and frame.f_code is self._step[0]:
                yield self._step[1], checkpoint
                return
            name = self._name_of(frame)
            if name is not None and name != last:
                yield name, checkpoint
                last, checkpoint = name, None
            frame = frame.f_back

    def hook_holder(self, frame: FrameType | None) -> nn.Module | None:
        """Return the innermost known module around ``frame`` if it has been called and is not in its ``forward``."""
        while frame is not None and self._name_of(frame) is None:
            frame = frame.f_back
        is_called = frame is not None and frame.f_code is _CALL
        return frame.f_locals[_CALL.co_varnames[0]] if frame is not None and is_called else None

    def _name_of(self, frame: FrameType) -> str | None:
        code = frame.f_code
        if code is not _CALL and code.co_name != "forward":
            return None
        if not code.co_varnames:
            return None
        return self._names.get(id(frame.f_locals.get(code.co_varnames[0])))


class _WatchFunctions(FunctionPins):
    """Pin every function wherever it is called, and note who called it."""

    def __init__(
        self, rules: FunctionRules, frames: _Frames, seen: Observation, adopt: Callable[[str, nn.Module | None], bool]
    ) -> None:
        super().__init__(rules)
        self._frames = frames
        self._seen = seen
        self._adopt = adopt

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        owners = list(self._frames.owners(sys._getframe(1)))
        self._seen.reached.update(name for name, _ in owners)
        self._seen.nested.update((outer, inner) for (inner, _), (outer, _) in pairwise(owners))
        if func is F.scaled_dot_product_attention:
            return self._attend(owners, func, args, kwargs or {})
        if owners and self.rules.get(func, "look inside") != "look inside":
            fqn, checkpoint = owners[0]
            if checkpoint is not None:
                raise UnsupportedError(checkpoint_text(func.__name__, fqn))
            holder = self._frames.hook_holder(sys._getframe(1))
            # The hooks of a compiled wrapper are pinned by who calls it.
            if not self._adopt(fqn, holder) and len(owners) > 1:
                self._adopt(owners[1][0], None)
            self._seen.calls[PinnedCall(fqn, func.__name__, _wide_dtype(args, kwargs or {}))] += 1
        return super().__torch_function__(func, types, args, kwargs)

    def _attend(
        self,
        owners: list[tuple[str, FrameType | None]],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self._seen.fused_attention.add(owners[0][0] if owners else "")
        self._seen.in_fused_attention = True
        try:
            return func(*args, **kwargs)
        finally:
            self._seen.in_fused_attention = False


class _WatchKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note in what dtype kernels compute; this sees below every function."""

    supports_higher_order_operators = True

    def __init__(self, kinds: tuple[PinKind, ...], pinned: frozenset[str], frames: _Frames, seen: Observation) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parts = tuple(part for kind in kinds for part in _KERNEL_NAMES[kind])
        self._pinned = pinned
        self._frames = frames
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func.name())
        is_cast = name in _CASTS or name.startswith(_WHOLE_CASTS)
        if not self._seen.in_fused_attention and "backward" not in name and not is_cast:
            self._note(name, args, result)
        return result

    def _note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        fqn = next((name for name, _ in self._frames.owners(sys._getframe(2))), "")
        if any(part in name for part in self._parts):
            dtype = next((a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()), torch.float32)
            self._seen.kernels[PinnedCall(fqn, name, dtype)] += 1
        elif fqn in self._pinned and isinstance(result, Tensor) and result.dtype in HALF_DTYPES:
            self._seen.kernels[PinnedCall(fqn, name, result.dtype)] += 1


def _wide_dtype(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype:
    given = next((a.dtype for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), torch.float32)
    return torch.float64 if given is torch.float64 else torch.float32


@contextmanager
def watch_batch(
    rules: FunctionRules,
    kinds: tuple[PinKind, ...],
    *,
    names: Mapping[int, str],
    pinned: frozenset[str],
    step: tuple[CodeType, str] | None,
    adopt: Callable[[str, nn.Module | None], bool],
) -> Iterator[Observation]:
    """Pin every function of ``rules`` in this block and note what runs.

    Compiled modules run eagerly meanwhile: a compiled graph would hide who calls what.

    Args:
        rules: Functions to pin.
        kinds: Kinds of kernels whose dtype is noted.
        names: Identity of each module of the model to its full dotted name.
        pinned: Names of the modules whose every kernel should be FP32.
        step: Code and name of a method that is no ``forward`` and counts like one.
        adopt: Called with the name of a module the moment it calls a pinned function, and with the module whose
            hook may have done so. Tells whether that will be pinned; else the module around it is adopted.

    Raises:
        UnsupportedError: If a bare function under activation checkpointing calls a pinned one.
    """
    seen = Observation()
    frames = _Frames(names, step)
    with ExitStack() as stack:
        # Importing dynamo takes seconds; where nothing was compiled it is not loaded.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_WatchKernels(kinds, pinned, frames, seen))
        stack.enter_context(_WatchFunctions(rules, frames, seen, adopt))
        yield seen
