"""``FP8Engine``: gives layers of a model FP8 products, and takes them back."""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mp.errors import SettingValueError, UnsupportedError
from lightning_mp.fp8 import transformer_engine
from lightning_mp.fp8.config import FP8Config
from lightning_mp.fp8.coverage import CONVERTED, Coverage, LayerRow, brings_transformer_engine, plan_layers
from lightning_mp.fp8.delayed import OPERANDS, DelayedState
from lightning_mp.fp8.emulated import EmulatedBackend
from lightning_mp.fp8.layer import ConvertedLinear, FP8Linear, LayerBackend, LayerSettings, StepFlags, without_fp8
from lightning_mp.fp8.recipes import (
    DelayedScaling,
    FP8Recipe,
    PassThroughRecipe,
    describe_recipe,
    emulated_twin,
    parse_recipe,
)
from lightning_mp.fp8.statistics import OperandStatistics
from lightning_mp.selection import named_inner_modules

__all__ = ["FP8Engine"]

_VERSION = 1


# Of an earlier conversion: its state, and the layers that it names.
_KeptState: TypeAlias = tuple[dict[str, Any], dict[str, weakref.ref[nn.Linear]]]


class FP8Engine:
    """Runs the Linear layers of one model in FP8.

    A step goes: ``with autocast_context(): forward``, backward, any number of times, then
    ``on_optimizer_step()``, whether or not the update was applied.

    Args:
        config: Which layers, which recipe, which backend.
        compute_dtype: Dtype of results and of everything that is not in FP8.

    Raises:
        SettingValueError: If the emulated backend is asked for a recipe that it does not compute.
    """

    def __init__(self, config: FP8Config, compute_dtype: torch.dtype = torch.bfloat16) -> None:
        self.config = config
        self.recipe: FP8Recipe = parse_recipe(config.recipe)
        self.is_emulated = config.backend == "emulated"
        if self.is_emulated:
            self.recipe = _require_emulated(self.recipe)
        self.rows: tuple[LayerRow, ...] = ()
        self._has_convolutions = False
        self._has_history = False
        self._step = StepFlags()
        self._settings = LayerSettings(compute_dtype, config.fp8_in_eval, config.cache_weights, self._step)
        self._layers: dict[str, nn.Linear] = {}
        self._of_rows: list[weakref.ref[nn.Module]] = []
        self._session: transformer_engine.EngineSession | None = None
        self._state: dict[str, Any] = {}
        self._is_loaded = False
        self._model: weakref.ref[nn.Module] | None = None
        # What each model that was converted goes on with, if it is converted again.
        self._states: weakref.WeakKeyDictionary[nn.Module, _KeptState] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled, and the models of another process are others.
        return {**self.__dict__, "_model": None, "_states": {}, "_of_rows": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _states=weakref.WeakKeyDictionary())

    # --- Conversion ------------------------------------------------------------------------------

    def convert_(self, module: nn.Module, *, keep: Collection[nn.Module] = ()) -> tuple[LayerRow, ...]:
        """Give the eligible layers of ``module`` FP8 products, in place.

        Layers keep their identity, parameters, hooks and names; only their class changes. Amax history
        and demotions are those of a state loaded before, else those that the same object had when it was
        reverted.

        Args:
            module: The model.
            keep: Modules that stay in FP32, with what they contain.

        Returns:
            What became of each Linear layer, and of what else multiplies by a weight; also in ``rows``.

        Raises:
            UnsupportedError: If no layer is eligible, or a compiled model is to use delayed scaling.
            UnmatchedPatternError: If an item of ``include`` or ``exclude`` selects nothing.
        """
        if self._layers:
            raise UnsupportedError("This FP8Engine holds converted layers already. Call revert_() first.")
        self.rows = ()
        if self._has_delayed_scaling:
            _refuse_compiled(module, _delayed_text)
        if not self.is_emulated:
            self._session = transformer_engine.EngineSession(self.recipe)
        planned = plan_layers(module, self.config, keep=keep)
        self.rows = tuple(row for row, _ in planned)
        self._of_rows = [weakref.ref(of_row) for _, of_row in planned]
        self._has_convolutions = any(isinstance(inner, nn.modules.conv._ConvNd) for inner in module.modules())
        if not any(row.converted for row in self.rows) and (self.is_emulated or not brings_transformer_engine(module)):
            raise UnsupportedError(_nothing_text(module, self.rows))
        for row, layer in planned:
            if row.converted and isinstance(layer, nn.Linear):
                layer.__dict__["_fp8"] = backend = self._new_backend()
                if self._has_delayed_scaling:
                    backend.refuse_tracing = _raise_when_traced(_delayed_text(row.fqn))
                layer.__class__ = ConvertedLinear
                self._layers[row.fqn] = layer
        if not self._is_loaded:
            self._state = self._state_kept_for(module)
        self._is_loaded, self._model, self._has_history = False, weakref.ref(module), False
        self._apply_state()
        return self.rows

    def follow_names_(self) -> None:
        """Call layers by the names that they have now: modules may have been inserted before them."""
        model = None if self._model is None else self._model()
        if model is None or len(self._of_rows) != len(self.rows):
            return
        names: dict[int, str] = {}
        for fqn, child in named_inner_modules(model).items():
            names.setdefault(id(child), fqn)
        now = [names.get(id(of_row())) for of_row in self._of_rows]
        is_same = now == [row.fqn for row in self.rows]
        if is_same and all(names.get(id(layer)) == fqn for fqn, layer in self._layers.items()):
            return
        found = zip(self.rows, self._of_rows, now, strict=True)
        kept = [(row, of_row, name) for row, of_row, name in found if name is not None]
        self.rows = tuple(replace(row, fqn=name) for row, _, name in kept)
        self._of_rows = [of_row for _, of_row, _ in kept]
        layers = {names[id(layer)]: layer for layer in self._layers.values() if id(layer) in names}
        for fqn, layer in self._layers.items():
            if id(layer) not in names:
                # Taken out of the model, perhaps still called from elsewhere, and another may have its name now.
                while fqn in layers or fqn in names.values():
                    fqn += " (removed)"
                layers[fqn] = layer
        self._layers = layers

    @property
    def is_converted(self) -> bool:
        """Whether layers are converted now."""
        return bool(self._layers)

    def take_weights_from(self, source: Callable[[nn.Parameter], Tensor] | None) -> None:
        """Cast the values that ``source`` returns for a weight, such as its FP32 master, instead of its own."""
        # Where a graph breaks the compiler would trace the source itself, which meets FP32 gradients of 16-bit
        # parameters there; torch 2.13 cannot trace these.
        self._step.weight_source = torch.compiler.disable(source) if source is not None else None  # type: ignore[no-untyped-call]
        # Transformer Engine's layers are in no graph.
        is_compiled = source is not None and self.is_emulated
        if is_compiled:
            # Here: defining an operator takes 12 ms, a tenth of the import of all else.
            from lightning_mp.fp8.weight_values import new_key
        for _, layer in self._converted():
            layer._fp8.weight_key = new_key(layer) if is_compiled else None
        self.invalidate_weights()

    def revert_(self) -> None:
        """Give all layers their class back. What must survive, such as amax history, is kept for the same model."""
        self._state = self.state_dict()
        model = None if self._model is None else self._model()
        if model is not None and self._layers:
            self._states[model] = self._state, {fqn: weakref.ref(layer) for fqn, layer in self._layers.items()}
        for layer in self._layers.values():
            layer.__class__ = without_fp8(type(layer))  # type: ignore[assignment]
            layer.__dict__.pop("_fp8", None)
        self._layers = {}
        self._step.collects, self._step.weight_source = False, None
        if self._session is not None:
            self._session.close()
            self._session = None

    def _state_kept_for(self, module: nn.Module) -> dict[str, Any]:
        """Return the state of an earlier conversion under the names that its layers have now."""
        if module not in self._states:
            return {}
        state, layers = self._states[module]
        now = {id(layer): fqn for fqn, layer in self._layers.items()}
        names = {fqn: now.get(id(layer())) for fqn, layer in layers.items()}

        def renamed(part: dict[str, Any]) -> dict[str, Any]:
            return {name: value for fqn, value in part.items() if (name := names.get(fqn)) is not None}

        return {**state, "demoted": renamed(state["demoted"]), "delayed": renamed(state["delayed"])}

    def check_available(self, device: torch.device) -> None:
        """Refuse a device that cannot run the backend and the recipe; the emulated backend runs anywhere.

        Raises:
            FP8UnavailableError: With the reason and the remedy.
        """
        if not self.is_emulated:
            transformer_engine.check_available(self.recipe, device)

    def _new_backend(self) -> LayerBackend:
        if self._session is not None:
            return transformer_engine.EngineBackend(self._settings, self._session)
        if isinstance(self.recipe, PassThroughRecipe):
            raise UnsupportedError(f"recipe={self.recipe.name!r} runs only on Transformer Engine.")
        return EmulatedBackend(self._settings, self.recipe)

    # --- What users read -------------------------------------------------------------------------

    @property
    def coverage(self) -> Coverage:
        """How much of the model runs in FP8 now, demoted layers not counted."""
        return Coverage.of(self.rows, has_convolutions=self._has_convolutions)

    @property
    def layers(self) -> Mapping[str, nn.Linear]:
        """The converted layers, demoted ones too, by the names that ``statistics`` and ``rows`` have for them."""
        return MappingProxyType(self._layers)

    @property
    def weight_casts(self) -> dict[str, int]:
        """How often each layer's weight was cast to FP8, by name; compiled calls are not counted."""
        return {fqn: layer._fp8.weight_casts for fqn, layer in self._converted()}

    @property
    def demoted(self) -> dict[str, str]:
        """Layers that were moved back to 16 bits, with the reason."""
        return {fqn: layer._fp8.demoted for fqn, layer in self._converted() if layer._fp8.demoted}

    @property
    def resting(self) -> set[str]:
        """Converted layers that are in evaluation mode now, which without ``fp8_in_eval`` is not in FP8."""
        is_resting = not self.config.fp8_in_eval
        return {fqn for fqn, layer in self._converted() if is_resting and not layer.training}

    def _converted(self) -> list[tuple[str, FP8Linear]]:
        return [(fqn, layer) for fqn, layer in self._layers.items() if isinstance(layer, FP8Linear)]

    @property
    def lacks_history(self) -> bool:
        """Whether delayed scaling has seen no step of this model, so that all its scales are 1."""
        return self._has_delayed_scaling and bool(self._layers) and not self._has_history

    @property
    def _has_delayed_scaling(self) -> bool:
        return self.recipe.name == "delayed"

    # --- Steps -----------------------------------------------------------------------------------

    def autocast_context(self) -> AbstractContextManager[Any]:
        """Return the region for one forward, inside torch's autocast region; emulation needs none of its own."""
        return nullcontext() if self._session is None else self._session.region()

    def on_optimizer_step(self) -> None:
        """Prepare for the next step: update delayed scales once, and cast weights anew.

        Call it after each optimizer step, a skipped one too, on every rank.
        """
        self._reduce_amax()
        # Without layers of ours the model brings the library's, whose amax this engine does not see. Among ranks,
        # where the library reduces, one that ran no layer must not stay away.
        if self._session is not None and (self._step.has_amax or not self._layers or _has_ranks()):
            self._session.end_step()
        for _, layer in self._converted():
            layer._fp8.end_step(has_amax=self._step.has_amax)
        self._has_history = self._has_history or self._step.has_amax
        self._step.has_amax = False

    def invalidate_weights(self) -> None:
        """Forget all cast weights, so that the next forward casts them anew."""
        for _, layer in self._converted():
            layer._fp8.invalidate_weight()

    def _reduce_amax(self) -> None:
        """Take the largest amax over the ranks, as the recipe asks; one rank's is news to all.

        Every rank takes part after every step: one may have run no layer of ours, as in a branch of its own.
        """
        shares = self.is_emulated and isinstance(self.recipe, DelayedScaling) and self.recipe.reduce_amax
        if not (shares and _has_ranks()):
            return
        entries = [state.amax_history[0] for state in self._delayed_states().values()]
        if not entries:
            return
        merged = torch.cat([*entries, entries[0].new_full((1,), float(self._step.has_amax))])
        dist.all_reduce(merged, op=dist.ReduceOp.MAX)
        for entry, largest in zip(entries, torch.split(merged[:-1], len(OPERANDS)), strict=True):
            entry.copy_(largest)
        self._step.has_amax = bool(merged[-1])

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Leave amax history, statistics and counts as they are, whatever is computed inside."""
        layers = [layer._fp8 for _, layer in self._converted()]
        histories = [(state, state.state_dict()) for state in self._delayed_states().values()]
        kept = [(backend, dict(backend.measured), backend.weight_casts) for backend in layers]
        flags = (self._step.has_amax, self._step.collects)
        self._step.collects = False
        try:
            yield
        finally:
            for state, saved in histories:
                state.load_state_dict(saved)
            for backend, measured, weight_casts in kept:
                backend.measured, backend.weight_casts = measured, weight_casts
                # A weight that was cast inside has not told its amax.
                backend.invalidate_weight()
            self._step.has_amax, self._step.collects = flags

    # --- Statistics and demotion -----------------------------------------------------------------

    def collect_statistics(self) -> None:
        """Measure every cast from now until ``stop_statistics``; weights are cast anew for it."""
        for _, layer in self._converted():
            layer._fp8.measured.clear()
        self._step.collects = True
        self.invalidate_weights()

    def stop_statistics(self) -> None:
        """Measure no more casts, and keep what was measured."""
        self._step.collects = False
        for _, layer in self._converted():
            layer._fp8.stop_measuring()

    def resume_statistics(self) -> None:
        """Measure casts again after ``stop_statistics``, beside what was measured."""
        self._step.collects = True

    def statistics(self) -> list[OperandStatistics]:
        """Return what was measured last, by layer and operand; the worst of all calls.

        Reading waits for the device.
        """
        self.follow_names_()
        found = []
        for fqn, layer in self._converted():
            for operand in OPERANDS:
                if operand in layer._fp8.measured:
                    found.append(OperandStatistics(fqn, operand, *layer._fp8.measured[operand].tolist()))
        return found

    def demote(self, fqn: str, reason: str) -> None:
        """Move a layer back to the compute dtype; its state remembers that.

        Raises:
            SettingValueError: If no converted layer has this name.
        """
        layer = self._layers.get(fqn)
        if not isinstance(layer, FP8Linear):
            raise SettingValueError(f"fqn={fqn!r} is no layer in FP8. Layers in FP8: {', '.join(self._layers)}.")
        layer._fp8.demoted = reason
        layer._fp8.invalidate_weight()
        self._describe(fqn, converted=False, reason=f"demoted: {reason}")

    def _promote(self, fqn: str) -> None:
        """Take a demotion back, which the state that is being loaded knows nothing of."""
        self._layers[fqn]._fp8.demoted = ""  # type: ignore[union-attr]
        self._describe(fqn, converted=True, reason=CONVERTED)

    def _describe(self, fqn: str, *, converted: bool, reason: str) -> None:
        self.rows = tuple(
            replace(row, converted=converted, reason=reason) if row.fqn == fqn else row for row in self.rows
        )

    # --- State -----------------------------------------------------------------------------------

    def _delayed_states(self) -> dict[str, DelayedState]:
        states = {fqn: getattr(layer._fp8, "delayed", None) for fqn, layer in self._converted()}
        return {fqn: state for fqn, state in states.items() if state is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values and tensors, which ``torch.load(weights_only=True)`` reads."""
        if not self._layers:
            return self._state
        self.follow_names_()
        return {
            "version": _VERSION,
            "recipe": describe_recipe(self.recipe),
            "backend": "emulated" if self.is_emulated else "transformer_engine",
            "demoted": self.demoted,
            "delayed": {fqn: state.state_dict() for fqn, state in self._delayed_states().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Continue from a saved state, now or at the next ``convert_``; an empty one changes nothing.

        Returns:
            One phrase per thing that differs between what was saved and what runs now.
        """
        if not state:
            return []
        self.follow_names_()
        self._state, self._is_loaded = dict(state), not self._layers
        return self._differences(state) + self._apply_state()

    def _differences(self, state: Mapping[str, Any]) -> list[str]:
        changes = []
        saved, now = dict(state.get("recipe", {})), describe_recipe(self.recipe)
        if saved and saved != now:
            changes.append(f"the FP8 recipe was {_short(saved, now)} and is {_short(now, saved)}")
        backend = "emulated" if self.is_emulated else "transformer_engine"
        if state.get("backend", backend) != backend:
            changes.append(f"the FP8 backend was {state['backend']!r} and is {backend!r}")
        return changes

    def _apply_state(self) -> list[str]:
        if not self._layers or not self._state:
            return []
        demoted = self._state.get("demoted", {})
        for fqn in self.demoted.keys() - demoted.keys():
            self._promote(fqn)
        for fqn in demoted.keys() & self._layers.keys():
            self.demote(fqn, demoted[fqn])
        saved = self._state.get("delayed", {})
        states = self._delayed_states()
        restarted = []
        for fqn, each in states.items():
            if fqn in saved and each.load_state_dict(saved[fqn]):
                self._has_history = True
                continue
            each.load_state_dict(DelayedState(emulated_twin(self.recipe)).state_dict())  # type: ignore[arg-type]
            restarted += [fqn] if fqn in saved else []
        self._step.has_amax = bool(states)
        self.invalidate_weights()
        return [f"the amax history of {len(restarted)} layers starts anew: its length changed"] if restarted else []


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _require_emulated(recipe: FP8Recipe) -> FP8Recipe:
    twin = emulated_twin(recipe)
    if isinstance(twin, PassThroughRecipe):
        raise SettingValueError(
            f"recipe={twin.name!r} is set beside backend='emulated', which computes 'current', 'delayed' and 'block'. "
            "Use one of these, or backend='transformer_engine' on a GPU that has the recipe."
        )
    return twin


def _refuse_compiled(module: nn.Module, text: Callable[[str], str]) -> None:
    for fqn, inner in module.named_modules():
        # Module.compile sets the first; Lightning sets the second when it unwraps a compiled LightningModule.
        marks = (getattr(inner, name, None) for name in ("_compiled_call_impl", "_compiler_ctx"))
        is_compiled = any(mark is not None for mark in marks) or any(map(_is_compiled_method, _methods(inner)))
        if is_compiled or isinstance(inner, torch._dynamo.eval_frame.OptimizedModule):
            raise UnsupportedError(text(fqn or type(module).__name__))


def _delayed_text(name: str) -> str:
    return (
        f"recipe='delayed' cannot run under torch.compile ({name} is compiled): its history changes at every step. "
        "Use recipe='current', or do not compile."
    )


def _methods(module: nn.Module) -> Iterator[Any]:
    """Yield the methods that compute: a LightningModule has some beside ``forward``."""
    for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
        yield getattr(module, name, None)


def _is_compiled_method(method: Any) -> bool:
    # torch.compile leaves the first mark on what it returns, torch.compiler.disable both (2.13).
    return hasattr(method, "_torchdynamo_orig_callable") and not getattr(method, "_torchdynamo_disable", False)


def _raise_when_traced(text: str) -> Callable[[], None]:
    """Return a function that raises in a compiled call, which tracing by itself would not let out."""

    def refuse() -> None:
        raise UnsupportedError(text)

    # Run eagerly between two graphs; with fullgraph=True the compiler refuses it and says the reason.
    return torch._dynamo.disable(refuse, reason=text)  # type: ignore[no-any-return, no-untyped-call]


def _nothing_text(module: nn.Module, rows: tuple[LayerRow, ...]) -> str:
    name = type(module).__name__
    rows = tuple(row for row in rows if row.is_linear)
    if not rows:
        return f"precision='fp8' found no Linear layer in {name}: nothing would run in FP8. Use precision='bf16'."
    shown = "; ".join(f"{row.fqn or name}: {row.reason}" for row in rows[:5])
    more = f"; and {len(rows) - 5} more" if len(rows) > 5 else ""
    return (
        f"precision='fp8' would run none of the {len(rows)} Linear layers of {name} in FP8: {shown}{more}. Change the "
        "sizes, include, exclude or skip_output_head, or use precision='bf16'."
    )


def _short(shown: dict[str, Any], other: dict[str, Any]) -> str:
    """Return the name and the fields that differ."""
    if shown.get("name") != other.get("name"):
        return repr(shown.get("name"))
    return repr({key: value for key, value in shown.items() if other.get(key) != value})
