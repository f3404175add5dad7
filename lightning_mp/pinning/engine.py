"""The engine behind FP32Pin: pin a model in place, watch its first batches, and undo it."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module
from torch.nn.parameter import is_lazy

from lightning_mp.errors import UnmatchedPatternError, UnsupportedError
from lightning_mp.formats import HALF_DTYPES
from lightning_mp.pinning.functions import (
    OutputRule,
    PinKind,
    function_rules,
    kind_of_module,
    names_of,
)
from lightning_mp.pinning.mode import FunctionPins
from lightning_mp.pinning.scan import Mentions, find_mentions, holds_any
from lightning_mp.pinning.spec import PinSpec
from lightning_mp.pinning.swap import (
    ENTERING,
    InFP32,
    Role,
    Swaps,
    WithFunctions,
    WithoutFunctions,
    original_class,
    role_of,
)
from lightning_mp.pinning.watch import Observation, PinReport, watch_batch
from lightning_mp.selection import Selector, clean_fqn, is_normalization, select_modules

__all__ = ["PinnedModule", "Pins"]

# Their inference fast paths compute norm and softmax in one kernel that no module of theirs sees; with
# a function mode on, torch takes the path that calls their submodules.
_HAS_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class PinnedModule:
    """A module that computes in FP32 and keeps its parameters in FP32."""

    fqn: str
    module: nn.Module
    kind: PinKind | None
    role: InFP32


class Pins:
    """Keep softmax, norms, losses and chosen modules of one model in FP32.

    Modules get a ``forward`` that casts their inputs to FP32 and leaves autocast. Functions are pinned
    by a function mode that is entered in the ``forward`` of the modules that call them, so that the
    recomputation of activation checkpointing is pinned too. Which modules those are is read from
    their code and seen in the first batch of each step, which runs eagerly under a watch.

    Args:
        specs: What to pin; where two disagree about the output, the first decides.
        steps: Names of methods that are called from outside like a ``forward``, such as
            ``"training_step"``. The model may lack some.
        plain: Names of methods in which every module has its own class, such as ``"configure_optimizers"``:
            elsewhere ``type(module) == nn.LayerNorm`` holds and ``type(module) is nn.LayerNorm`` does not.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> pins = Pins(PinSpec(pins=("norm",)))
        >>> pins.apply_(model)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     model(torch.ones(1, 4)).dtype
        torch.float32
        >>> pins.undo_()
        >>> type(model[1]) is nn.LayerNorm
        True
    """

    def __init__(self, *specs: PinSpec, steps: Iterable[str] = (), plain: Iterable[str] = ()) -> None:
        outputs: dict[PinKind, OutputRule] = {}
        for spec in specs:
            for kind in spec.pins:
                outputs.setdefault(kind, spec.output)
        self._specs = specs
        self._outputs = outputs
        self._rules = function_rules(outputs)
        self._function_names = frozenset(name for kind in outputs for name in names_of(kind))
        self._step_names = tuple(steps)
        self._plain_names = tuple(plain)
        self._root: nn.Module | None = None
        self._clear()

    def _clear(self) -> None:
        self._mode = FunctionPins(self._rules, ENTERING)
        self._with_functions = WithFunctions(self._mode)
        self._swaps = Swaps()
        self._withheld: list[tuple[torch.Tensor, torch.dtype]] = []
        self._scans: dict[tuple[type, str, frozenset[str]], Mentions] = {}
        self._names: dict[int, str] = {}
        self._modules: dict[str, nn.Module] = {}
        self._pinned: dict[str, PinnedModule] = {}
        self._pinned_steps: set[str] = set()
        self._hooked: set[str] = set()
        self._own_steps: dict[str, Any] = {}
        self.observations: dict[str, Observation] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle what was asked for, not what is applied to a model of this process."""
        return {"specs": self._specs, "steps": self._step_names, "plain": self._plain_names}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(*state["specs"], steps=state["steps"], plain=state["plain"])  # type: ignore[misc]

    # --- What is pinned --------------------------------------------------------------------------

    @property
    def modules(self) -> dict[str, PinnedModule]:
        """The pinned modules by full dotted name."""
        return dict(self._pinned)

    @property
    def callers(self) -> list[str]:
        """Names of the modules and steps in which pinned functions are looked for."""
        found = [
            fqn
            for fqn, module in self._modules.items()
            if isinstance(role_of(module), WithFunctions) or fqn in self._hooked
        ]
        return [*sorted(self._pinned_steps), *found]

    def report(self, step: str) -> PinReport:
        """Return what is pinned and what was seen in the first batch of ``step``."""
        seen = self.observations[step]
        names = {call.name for call in seen.calls}
        kinds = {pinned.kind for pinned in self._pinned.values()}
        return PinReport(
            step=step,
            modules={fqn: type(pinned.module).__name__ for fqn, pinned in self._pinned.items()},
            callers=tuple(self.callers),
            calls=dict(seen.calls),
            not_reached=tuple(fqn for fqn in self._pinned if fqn not in seen.reached),
            without_match=tuple(k for k in self._outputs if k not in kinds and names.isdisjoint(names_of(k))),
            other_norms=tuple(dict.fromkeys(self._other_norms())),
            below_fp32=tuple(seen.below_fp32),
            fused_attention=tuple(sorted(seen.fused_attention)),
        )

    def _other_norms(self) -> Iterator[str]:
        for fqn, module in self._modules.items():
            if "norm" in self._outputs and fqn not in self._pinned and is_normalization(module):
                yield type(module).__name__

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that stay in FP32, each once."""
        own = (p for pinned in self._pinned.values() for p in pinned.module.parameters(recurse=False))
        return list({id(p): p for p in own}.values())

    # --- Apply and undo --------------------------------------------------------------------------

    def apply_(self, module: nn.Module) -> None:
        """Pin ``module`` in place. Again on the same model: pins what was added to it since.

        Raises:
            UnmatchedPatternError: If an entry of ``modules`` selects nothing.
            UnsupportedError: If it selects a scripted module.
        """
        if self._root is not None and self._root is not module:
            self.undo_()
        is_first, self._root = self._root is None, module
        # A wrapper has the name of what it wraps; the wrapped module comes later and stays.
        self._names = {id(child): clean_fqn(name, module) for name, child in module.named_modules()}
        self._modules = {self._names[id(child)]: child for child in module.modules()}
        for pinned in self._find_pinned(module, must_match=is_first):
            self._pin_(pinned)
        for fqn, child in self._modules.items():
            if role_of(child) is None and self._calls_functions(child):
                self._adopt(fqn)
            if holds_any(_hooks_of(child), self._function_names, self._rules):
                self._adopt(fqn, holder=child)
        self._take_steps_(module)
        self._swaps.announce()

    def undo_(self) -> None:
        """Leave the model as it was. Safe to call when nothing is applied."""
        for name, step in self._own_steps.items():
            vars(self._root)[name] = step
        self._swaps.undo_()
        self._give_back_dtypes_()
        self._root = None
        self._clear()

    def follow_(self) -> None:
        """Pin what was added to the model since it was looked at last, if anything was."""
        if self._root is not None and self._names.keys() != {id(child) for child in self._root.modules()}:
            self.apply_(self._root)

    def _find_pinned(self, root: nn.Module, *, must_match: bool) -> Iterable[PinnedModule]:
        found: dict[int, PinnedModule] = {}
        for spec in self._specs:
            role = InFP32(spec.output, self._withheld.append)
            inside = [child for module in _chosen(root, spec.modules, must_match) for child in module.modules()]
            for child in inside:
                fqn = self._names[id(child)]
                if isinstance(child, torch.jit.ScriptModule):
                    raise UnsupportedError(_scripted_text(fqn))
                if self._modules[fqn] is child:
                    found.setdefault(id(child), PinnedModule(fqn, child, kind_of_module(child), role))
        for child in self._modules.values():
            kind = kind_of_module(child)
            if kind in self._outputs:
                # With what it holds, such as the projection of a loss, which would refuse FP32 inputs in 16 bits.
                for pinned in self._pins_inside(child, kind):
                    found.setdefault(id(pinned.module), pinned)
        return found.values()

    def _pins_inside(self, module: nn.Module, kind: PinKind) -> Iterator[PinnedModule]:
        for child in module.modules():
            fqn = self._names[id(child)]
            if isinstance(child, torch.jit.ScriptModule) or self._modules[fqn] is not child:
                continue
            own_kind = kind_of_module(child)
            rule = own_kind if own_kind in self._outputs else kind
            output = "float32" if rule == "loss" else self._outputs[rule]
            mode = self._mode if _computes_alone(child) else None
            yield PinnedModule(fqn, child, own_kind, InFP32(output, self._withheld.append, mode))

    def _pin_(self, pinned: PinnedModule) -> None:
        if pinned.fqn in self._pinned and self._pinned[pinned.fqn].module is pinned.module:
            return
        self._pinned[pinned.fqn] = pinned
        self._swap_(pinned.module, pinned.role)
        owned = (*pinned.module.parameters(recurse=False), *pinned.module.buffers(recurse=False))
        for tensor in owned:
            if tensor.dtype in HALF_DTYPES and not is_lazy(tensor):
                self._withheld.append((tensor, tensor.dtype))
                tensor.data = tensor.data.float()

    def _give_back_dtypes_(self) -> None:
        """Narrow what was kept in FP32, unless the model around it has become FP32 meanwhile."""
        kept = {id(tensor) for tensor, _ in self._withheld}
        around = {p.dtype for p in self._root.parameters() if id(p) not in kept} if self._root is not None else set()
        for tensor, dtype in self._withheld:
            if dtype in around:
                tensor.grad = None
                tensor.data = tensor.data.to(dtype)

    def _swap_(self, module: nn.Module, role: Role | None) -> None:
        methods = self._step_methods(module) if module is self._root else {}
        if self._names[id(module)] in self._hooked:
            methods["__call__"] = self._call_method(original_class(module))
        self._swaps.swap_(module, role, methods)

    # --- Which modules call pinned functions -----------------------------------------------------

    def _calls_functions(self, module: nn.Module) -> bool:
        if isinstance(module, torch.jit.ScriptModule):
            return False
        if isinstance(module, _HAS_FAST_PATH):
            return "softmax" in self._outputs or any(isinstance(role_of(m), InFP32) for m in module.modules())
        return self._mentions(module, "forward")

    def _mentions(self, module: nn.Module, method: str) -> bool:
        # `self.softmax(x)` names a submodule, which is pinned itself.
        names = self._function_names.difference(module._modules)
        key = (original_class(module), method, names)
        if key not in self._scans:
            self._scans[key] = find_mentions(*key, self._rules)
        found = self._scans[key]
        attributes = vars(module)
        held = [attributes[name] for name in found.names if name in attributes]
        return found.is_found or any(holds_any(value, names, self._rules) for value in held)

    def _adopt(self, fqn: str, holder: nn.Module | None = None) -> bool:
        """Pin the functions that a module or step calls itself, from its next call on, with its hooks if it holds any.

        Returns:
            Whether the hooks of ``holder`` will be pinned; ``True`` without hooks.
        """
        if fqn in self._step_names:
            self._pinned_steps.add(fqn)
            return True
        module = self._modules[fqn]
        has_hooks = holder is not None and bool(_hooks_of(holder))
        if not _is_swappable(module):
            return not has_hooks
        role = role_of(module)
        is_new = has_hooks and holder is module and fqn not in self._hooked
        if is_new:
            self._hooked.add(fqn)
        if is_new or not isinstance(role, (InFP32, WithFunctions)):
            self._swap_(module, role if isinstance(role, InFP32) else self._with_functions)
        return not has_hooks or holder is module

    def _call_method(self, cls: type[nn.Module]) -> Callable[..., Any]:
        """Return the method that runs hooks and ``forward``, with functions pinned around both."""
        run = self._with_functions

        def call_pinned(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            call = functools.partial(cls.__call__, module)
            # A class that someone derived from ours computes as before after an undo.
            return call(*args, **kwargs) if role_of(module) is None else run(module, call, args, kwargs)

        return call_pinned

    def _spare(self, seen: Observation) -> None:
        """Leave the mode in modules that are called where it is on and call no pinned function."""
        callers = set(self.callers)
        for outer, inner in seen.nested:
            module = self._modules.get(inner)
            # A module without submodules makes about one call, which costs less than leaving the mode.
            if outer not in callers or module is None or role_of(module) is not None:
                continue
            if module._modules and _is_swappable(module):
                self._swap_(module, WithoutFunctions(self._mode))

    # --- Steps -----------------------------------------------------------------------------------

    def _take_steps_(self, root: nn.Module) -> None:
        self._pinned_steps.update(name for name in self._step_names if self._mentions(root, name))
        if (self._step_names or self._plain_names) and "_pinning_role" not in vars(type(root)):
            self._swap_(root, None)
        for name in self._step_names:
            # A compiled LightningModule carries its steps as attributes, which hide those of its class.
            if name in vars(root) and name not in self._own_steps:
                self._own_steps[name] = vars(root)[name]
                vars(root)[name] = functools.partial(self._run_step, name, vars(root)[name])

    def _step_methods(self, root: nn.Module) -> dict[str, Any]:
        cls = original_class(root)
        steps = {name: self._step_method(name, getattr(cls, name)) for name in self._step_names if hasattr(cls, name)}
        return steps | {
            name: self._plain_method(getattr(cls, name)) for name in self._plain_names if hasattr(cls, name)
        }

    def _plain_method(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            with self._swaps.lifted():
                return original(module, *args, **kwargs)

        return method

    def _step_method(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            if name in self.observations and name in self._pinned_steps:
                return self._with_functions(module, original, (module, *args), kwargs)
            return self._run_step(name, functools.partial(original, module), *args, **kwargs)

        return step

    def _run_step(self, name: str, step: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if name not in self.observations and not torch.compiler.is_compiling():
            with self.watch(name):
                return step(*args, **kwargs)
        if name in self._pinned_steps and self._root is not None:
            return self._with_functions(self._root, step, args, kwargs)
        return step(*args, **kwargs)

    @contextmanager
    def watch(self, step: str = "forward") -> Iterator[Observation]:
        """Pin every function in this block, whoever calls it, and learn where to pin it from now on.

        Args:
            step: Name under which ``observations`` keeps what was seen, if the block succeeds.

        Raises:
            UnsupportedError: If a bare function under activation checkpointing calls a pinned one.
        """
        if self._root is not None:
            self.apply_(self._root)
        with watch_batch(
            self._rules,
            tuple(self._outputs),
            names=self._names,
            pinned=frozenset(self._pinned),
            step=(_STEP_CODE, step),
            adopt=self._adopt,
        ) as seen:
            yield seen
        self._spare(seen)
        self._swaps.announce()
        self.observations[step] = seen


_STEP_CODE: CodeType = Pins._run_step.__code__


def _chosen(root: nn.Module, selectors: Iterable[Selector], must_match: bool) -> list[nn.Module]:
    """Return the selected modules. Of those that a run takes out of its model the selectors need no longer match."""
    chosen: dict[int, nn.Module] = {}
    for selector in selectors:
        with nullcontext() if must_match else suppress(UnmatchedPatternError):
            chosen.update({id(m): m for m in select_modules(root, [selector], argument="modules").values()})
    return list(chosen.values())


def _computes_alone(module: nn.Module) -> bool:
    """Return whether a pinned module runs no code but torch's, on what it is given and what it holds."""
    cls = original_class(module)
    return cls.__module__.startswith("torch.nn.") and "forward" not in vars(module)


def _hooks_of(module: nn.Module) -> list[Any]:
    """Return what runs around the ``forward`` of a module when it is called, also for every module alike."""
    theirs = (module._forward_pre_hooks, module._forward_hooks)
    everyones = (_module._global_forward_pre_hooks, _module._global_forward_hooks)
    return [hook for hooks in (*theirs, *everyones) for hook in hooks.values()]


def _is_swappable(module: nn.Module) -> bool:
    """Return whether a module takes another class: compiled and scripted wrappers are not what they wrap."""
    return not isinstance(module, torch.jit.ScriptModule) and not type(module).__module__.startswith("torch._dynamo")


def _scripted_text(fqn: str) -> str:
    return (
        f"modules: {fqn!r} is a scripted module, whose computation cannot be changed. Pin the module before scripting."
    )
