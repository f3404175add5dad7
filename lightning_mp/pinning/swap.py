"""Give single modules another ``forward`` by swapping their class, and take it back.

A swapped module keeps its keys, parameters, hooks and identity, and is an instance of its own class.
It is copied and pickled as that class, and compares equal to it, so that nothing of the swap leaves the run.
"""

import copyreg
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._C import (
    _get_function_stack_at,
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)

from lightning_mp.formats import HALF_DTYPES
from lightning_mp.pinning.functions import OutputRule, run_module
from lightning_mp.pinning.mode import FunctionPins
from lightning_mp.recompile import forget_compiled
from lightning_mp.stand_in import InFront, class_behind, stand_in

__all__ = ["ENTERING", "InFP32", "Role", "Swaps", "WithFunctions", "WithoutFunctions", "original_class", "role_of"]


# Each role is one function without helpers, which enters and leaves the mode by hand, as torch.compile can trace: what
# stands around a call runs when large products have emptied the caches, where a Python call costs about 2 us.


@dataclass(frozen=True)
class InFP32:
    """The whole module computes in FP32 and keeps its parameters in FP32."""

    output: OutputRule
    withhold: Callable[[tuple[Tensor, torch.dtype]], None]
    """Told of each tensor that was asked to become 16-bit and did not."""
    mode: FunctionPins | None = None
    """Left inside the module, which only computes on what was widened here; ``None``: it stays on."""

    def __call__(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run ``forward`` in the way of this role."""
        if self.mode is None:
            return self._run(module, forward, args, kwargs)
        depth = _len_torch_function_stack()
        if not depth or _get_function_stack_at(depth - 1) is not self.mode:
            return self._run(module, forward, args, kwargs)
        _pop_torch_function_stack()
        try:
            return self._run(module, forward, args, kwargs)
        finally:
            _push_on_torch_function_stack(self.mode)

    def _run(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dtype in HALF_DTYPES:
                return _with_wide_parameters(module, forward, args, kwargs, self.output)
        return run_module(forward, args, kwargs, self.output)


@dataclass(frozen=True)
class WithFunctions:
    """The functions that the module's ``forward`` calls are pinned; a mode that is on is not entered twice."""

    mode: FunctionPins

    def __call__(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run ``forward`` in the way of this role."""
        depth = _len_torch_function_stack()
        if depth and isinstance(_get_function_stack_at(depth - 1), FunctionPins):
            return forward(*args, **kwargs)
        _push_on_torch_function_stack(self.mode)
        try:
            return forward(*args, **kwargs)
        finally:
            _pop_torch_function_stack()


@dataclass(frozen=True)
class WithoutFunctions:
    """The module calls no pinned function itself; a mode that a caller entered is left, as a needless look."""

    mode: FunctionPins

    def __call__(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run ``forward`` in the way of this role."""
        depth = _len_torch_function_stack()
        if not depth or _get_function_stack_at(depth - 1) is not self.mode:
            return forward(*args, **kwargs)
        _pop_torch_function_stack()
        try:
            return forward(*args, **kwargs)
        finally:
            _push_on_torch_function_stack(self.mode)


ENTERING: frozenset[CodeType] = frozenset({InFP32.__call__.__code__, WithFunctions.__call__.__code__})
"""Code of the roles under which a call is pinned again when it is recomputed; it has a local ``module``."""

Role: TypeAlias = InFP32 | WithFunctions | WithoutFunctions


def _with_wide_parameters(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: OutputRule,
) -> Any:
    """Run ``forward`` on FP32 values of parameters that a sharding strategy handed over in 16 bits."""
    given = dict(module._parameters)
    module._parameters.update({name: None if p is None else p.float() for name, p in given.items()})  # type: ignore[misc]
    try:
        return run_module(forward, args, kwargs, output)
    finally:
        module._parameters.update(given)


class _Swapped(InFront):
    """What a swapped module's class puts in front of its own."""

    _pinning_role: Role | None
    _pinning_original: type[nn.Module]

    def forward(self, /, *args: Any, **kwargs: Any) -> Any:
        if self._pinning_role is None:
            return super().forward(*args, **kwargs)
        return self._pinning_role(self, super().forward, args, kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        # `module.to(torch.bfloat16)`, as of Lightning's bf16-true, moves a pinned module but leaves it FP32.
        # Further arguments pass through: those of a torchmetrics.Metric differ from nn.Module's.
        role = self._pinning_role
        if isinstance(role, InFP32):
            fn = _keep_fp32(fn, role.withhold)
        return super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        rebuild, args, *rest = reduced
        original = class_behind(self._pinning_original)
        if rebuild is copyreg.__newobj__:  # type: ignore[attr-defined]
            # pickle checks that this one, which is `cls.__new__`, builds the object's own class.
            rebuild = original.__new__
        return (rebuild, tuple(original if a is type(self) else a for a in args), *rest)


def _keep_fp32(
    fn: Callable[[Tensor], Tensor], withhold: Callable[[tuple[Tensor, torch.dtype]], None]
) -> Callable[[Tensor], Tensor]:
    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if result.dtype not in HALF_DTYPES or tensor.dtype is not torch.float32:
            return result
        withhold((tensor, result.dtype))
        return tensor.to(result.device)

    return apply


def role_of(module: nn.Module) -> Role | None:
    """Return the role that ``module`` was swapped to."""
    return getattr(type(module), "_pinning_role", None)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of ``module`` before a swap."""
    return getattr(type(module), "_pinning_original", type(module))


def _own(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that ``cls`` was made for; what ``fully_shard`` derived from such a class was made for none."""
    own: type[nn.Module] = vars(cls).get("_pinning_original", cls)
    return own


# Positional only, here and wherever arguments of the user's pass through: theirs may have any name.
def _call_role(role: Role, module: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return role(module, forward, args, kwargs)


class Swaps:
    """The modules that were swapped, and how to put each back."""

    def __init__(self) -> None:
        self._shared: dict[tuple[type[nn.Module], Role | None], Any] = {}
        self._classes: list[Any] = []
        # By identity: a torchmetrics.Metric is a module whose hash changes with its state.
        self._swapped: dict[int, _Swap] = {}
        self._is_announced = True

    def swap_(self, module: nn.Module, role: Role | None, methods: Mapping[str, Any] | None = None) -> None:
        """Make ``module`` run in ``role``; an earlier role ends.

        Args:
            module: Swapped in place, with its ``forward`` if that is an attribute of the instance.
            role: ``None`` only adds ``methods``.
            methods: Further methods by name, for this module alone.
        """
        self._restore_(module)
        swapped = self._class_for(_own(type(module)), role, methods or {})
        attributes = {}
        if role is not None and "forward" in vars(module):
            attributes["forward"] = vars(module)["forward"]
            vars(module)["forward"] = functools.partial(_call_role, role, module, attributes["forward"])
        self._swapped[id(module)] = _Swap(module, swapped, attributes)
        _set_class(module, swapped)
        self._is_announced = False

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Give every module its own class back in this block, for code that asks ``type(module) is ...``."""
        lifted = [swap for swap in self._swapped.values() if type(swap.module) is swap.swapped]
        for swap in lifted:
            _set_class(swap.module, _own(swap.swapped))
        try:
            yield
        finally:
            for swap in lifted:
                if self._swapped.get(id(swap.module)) is swap and type(swap.module) is _own(swap.swapped):
                    _set_class(swap.module, swap.swapped)

    def announce(self) -> None:
        """Let compiled code notice the swaps made since the last call."""
        if not self._is_announced:
            self._is_announced = True
            forget_compiled()

    def _class_for(self, original: type[nn.Module], role: Role | None, methods: Mapping[str, Any]) -> Any:
        if not methods and (original, role) in self._shared:
            return self._shared[original, role]
        swapped = _swapped_class(original, role, methods)
        self._classes.append(swapped)
        if not methods:
            self._shared[original, role] = swapped
        becomes = getattr(original, "cls_to_become", None)
        if becomes is not None:
            # A lazy module takes this class in its first forward, when it knows its shapes.
            type.__setattr__(swapped, "cls_to_become", self._class_for(becomes, role, methods))
        return swapped

    def undo_(self) -> None:
        """Give every module its own class back."""
        self._is_announced &= not self._swapped
        for swap in list(self._swapped.values()):
            self._restore_(swap.module)
        for swapped in self._classes:
            # A class that someone derived from ours meanwhile, as fully_shard does, computes as before.
            type.__setattr__(swapped, "_pinning_role", None)
        self._shared.clear()
        self._classes.clear()
        self.announce()

    def _restore_(self, module: nn.Module) -> None:
        swap = self._swapped.pop(id(module), None)
        if swap is None:
            return
        ours = (swap.swapped, vars(swap.swapped).get("cls_to_become"))
        if any(type(module) is cls for cls in ours):
            _set_class(module, original_class(module))
        method = getattr(vars(module).get("forward"), "__func__", None)
        if any(cls is not None and method is vars(cls)["forward"] for cls in ours):
            # Lightning 2.6 redirects forward through DDP and leaves the method that it found on the instance.
            del vars(module)["forward"]
        vars(module).update(swap.attributes)


@dataclass(frozen=True)
class _Swap:
    module: nn.Module
    swapped: type[nn.Module]
    attributes: dict[str, Any]


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    # Not `module.__class__ = cls`: some wrappers forward attribute writes to what they wrap.
    object.__setattr__(module, "__class__", cls)


def _own_copy(function: Any) -> FunctionType:
    """Copy a method with a code object of its own: torch.compile counts recompilations per code object."""
    return FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, closure=function.__closure__
    )


def _swapped_class(original: type[nn.Module], role: Role | None, methods: Mapping[str, Any]) -> Any:
    namespace = {
        "_pinning_role": role,
        "_pinning_original": original,
        "forward": _own_copy(_Swapped.forward),
        **methods,
    }
    return stand_in(original, _Swapped, original, namespace=namespace)
