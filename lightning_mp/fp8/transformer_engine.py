"""FP8 products by NVIDIA's Transformer Engine; the only file that imports it, inside functions.

Checked against the sources of 2.9 to 2.20 (pytorch/quantization.py, pytorch/module/linear.py,
pytorch/module/base.py). A ``te.Linear`` stands behind each converted layer, outside the module tree,
and works on the layer's own parameters.

Delayed scaling updates its scales once per optimizer step, as the emulated backend does. The library
would do it at the end of every outermost ``te.autocast`` and at the first backward in it, which gives
one entry per micro-batch and other scales to the recompute of activation checkpointing. Holding its
region depth above zero until teardown leaves the update to ``on_optimizer_step``.

The library's casts turn an infinity in an operand into the format's largest number and pass NaN on. What
the emulated backend does about it, results that are NaN, would here cost a pass over every operand in
memory: an infinity that enters a layer is not seen in its results. A NaN is.
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mp.errors import FP8UnavailableError, SettingValueError, UnsupportedError
from lightning_mp.fp8.coverage import ALIGNMENT
from lightning_mp.fp8.delayed import OPERANDS, DelayedState
from lightning_mp.fp8.emulated import EmulatedBackend
from lightning_mp.fp8.layer import LayerBackend, LayerSettings
from lightning_mp.fp8.library_casts import CastWatch, measure_library_cast, watch_casts
from lightning_mp.fp8.recipes import (
    BlockScaling,
    CurrentScaling,
    DelayedScaling,
    FP8Recipe,
    Operand,
    PassThroughRecipe,
    emulated_twin,
    operand_dtype,
)
from lightning_mp.fp8.statistics import worse_of
from lightning_mp.hardware import (
    RECIPES,
    TransformerEngineFacts,
    assess_fp8,
    assess_recipes,
    describe_machine,
    fp8_remedy,
    read_facts,
    read_transformer_engine,
)

__all__ = ["EngineBackend", "EngineSession", "check_available", "import_facts"]

_CLASS_NAMES = {
    "current": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
    "block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
    "nvfp4": "NVFP4BlockScaling",
}
_QUANTIZATION_FIELDS: dict[str, Operand] = {
    "fp8_quant_fwd_inp": "input",
    "fp8_quant_fwd_weight": "weight",
    "fp8_quant_bwd_grad": "grad",
}


def import_facts() -> TransformerEngineFacts:
    """Try to import the library and return what that showed."""
    facts = read_transformer_engine()
    if facts.error:
        return facts
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a broken build fails with OSError, RuntimeError or AttributeError too
        return TransformerEngineFacts(facts.version, f"its import failed with {type(error).__name__}: {error}")
    return facts


def check_available(recipe: FP8Recipe, device: torch.device) -> None:
    """Refuse FP8 where device, torch or the library cannot run it.

    Raises:
        FP8UnavailableError: With the reason, the remedy, and what this machine can run.
    """
    facts = read_facts(device, import_facts())
    support = assess_fp8(facts)
    if support.available and recipe.name in RECIPES:
        support = assess_recipes(facts)[recipe.name]
    if not support.available:
        remedy = fp8_remedy(facts) or "Use recipe='current', which runs here."
        raise FP8UnavailableError(
            f"precision='fp8' with recipe={recipe.name!r}, but {support.reason}. {remedy}\n{describe_machine(facts)}"
        )


def build_recipe(recipe: FP8Recipe) -> Any:
    """Return the library's object for a recipe.

    Raises:
        SettingValueError: If the library's class does not take a field.
    """
    if isinstance(recipe, PassThroughRecipe) and recipe.source is not None:
        return recipe.source
    from transformer_engine.common import recipe as library

    recipe_class = getattr(library, _CLASS_NAMES[recipe.name])
    settings = dict(recipe.settings or {}) if isinstance(recipe, PassThroughRecipe) else dict(vars(recipe))
    for key in _QUANTIZATION_FIELDS:
        settings.pop(key, None)
    if "fp8_format" in settings:
        settings["fp8_format"] = library.Format[settings["fp8_format"]]
    try:
        built = recipe_class(**settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise SettingValueError(f"recipe={recipe.name!r}: {_CLASS_NAMES[recipe.name]} says: {error}") from None
    if isinstance(recipe, (CurrentScaling, BlockScaling)):
        _set_quantization(library, built, recipe)
    return built


def _set_quantization(library: Any, built: Any, recipe: CurrentScaling | BlockScaling) -> None:
    # These are no constructor arguments of the library, and its Linear layer reads only them: without
    # this, use_power_2_scales would be without effect (2.12, _customize_quantizers_float8_current_scaling).
    for field, operand in _QUANTIZATION_FIELDS.items():
        settings = recipe.quantization(operand)
        setattr(built, field, library.QParams(power_2_scale=settings.power_2_scale, amax_epsilon=settings.amax_epsilon))


class EngineSession:
    """What the layers of one model share while the library runs them.

    Args:
        recipe: How scales are chosen.
    """

    def __init__(self, recipe: FP8Recipe) -> None:
        self.twin = emulated_twin(recipe)
        self.recipe = build_recipe(recipe)
        self.is_delayed = recipe.name == "delayed"
        self._is_held = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "EngineSession":
        return self

    def region(self) -> AbstractContextManager[Any]:
        """Return the library's region for one forward."""
        import transformer_engine.pytorch as te

        self._hold()
        return te.autocast(enabled=True, recipe=self.recipe)  # type: ignore[no-any-return]

    def layer_region(self) -> AbstractContextManager[Any]:
        """Return a region for one layer: the recompute of activation checkpointing runs outside the forward's."""
        return nullcontext() if _manager().is_fp8_enabled() else self.region()

    def end_step(self) -> None:
        """Update the scales of delayed scaling with the amax of this step."""
        # The depth stays held: in manual optimization the step stands inside the forward's region,
        # whose exit would update once more.
        if self._is_held:
            for is_forward in (True, False):
                _manager().reduce_and_update_fp8_tensors(forward=is_forward)

    def close(self) -> None:
        """Leave the library as it was, and forget the model's layers in its global buffers."""
        if self._is_held:
            _change_depth(-1)
            self._is_held = False
        if self.is_delayed:
            _manager().reset()

    def _hold(self) -> None:
        if self.is_delayed and not self._is_held:
            _change_depth(1)
            self._is_held = True


def _manager() -> Any:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    return FP8GlobalStateManager


def _change_depth(by: int) -> None:
    manager = _manager()
    # The state moved into an object of its own after 2.12.
    holder, name = (manager, "AUTOCAST_DEPTH")
    if not hasattr(manager, name):
        holder, name = getattr(manager, "quantization_state", None), "autocast_depth"
    if not hasattr(holder, name):
        raise UnsupportedError(
            "recipe='delayed' needs to know the depth of Transformer Engine's region, which this version keeps "
            "elsewhere. Use recipe='current', or Transformer Engine 2.9 to 2.20."
        )
    setattr(holder, name, getattr(holder, name) + by)


class EngineDelayedState:
    """Delayed-scaling state of one layer, kept by the library, read and written as plain tensors.

    The library has three columns forward (input, weight, output) and two backward (output gradient,
    input gradient); ours are input, weight, output gradient.
    """

    def __init__(self, recipe: DelayedScaling) -> None:
        self._saved = DelayedState(recipe)
        self._is_pending = False

    def state_dict(self, engine: Any = None) -> dict[str, Tensor]:
        """Return copies of the tensors, on the CPU."""
        metas = None if engine is None else _metas(engine)
        if metas is None or self._is_pending:
            return self._saved.state_dict()
        forward, backward = metas
        scale = torch.cat([forward.scale[:2], backward.scale[:1]])
        history = torch.cat([forward.amax_history[:, :2], backward.amax_history[:, :1]], 1)
        return {"scale": scale.cpu().clone(), "amax_history": history.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Continue from saved tensors at the next forward; return whether they fit the history's length."""
        self._is_pending = self._saved.load_state_dict(dict(state))
        return self._is_pending

    def apply(self, engine: Any) -> None:
        """Write loaded tensors into the library's, in place: it keeps pointers to them."""
        if not self._is_pending:
            return
        engine.init_fp8_metadata(num_gemms=1)
        forward, backward = engine.fp8_meta["scaling_fwd"], engine.fp8_meta["scaling_bwd"]
        forward.scale[:2].copy_(self._saved.scale[:2])
        forward.amax_history[:, :2].copy_(self._saved.amax_history[:, :2])
        backward.scale[:1].copy_(self._saved.scale[2:])
        backward.amax_history[:, :1].copy_(self._saved.amax_history[:, 2:])
        self._is_pending = False


def _metas(engine: Any) -> tuple[Any, Any] | None:
    meta = engine.fp8_meta
    return (meta["scaling_fwd"], meta["scaling_bwd"]) if "scaling_fwd" in meta and "scaling_bwd" in meta else None


class EngineBackend(LayerBackend):
    """FP8 products of one layer, computed by a ``te.Linear`` on the layer's own parameters.

    Args:
        settings: What the layers of an engine share.
        session: What they share while the library runs them.
    """

    def __init__(self, settings: LayerSettings, session: EngineSession) -> None:
        super().__init__(settings)
        self.session = session
        self.delayed = _BoundState(self) if isinstance(session.twin, DelayedScaling) else None
        self.engine: Any = None
        self._cast_from: tuple[Any, ...] | None = None
        self._kept_for: tuple[bool, ...] | None = None
        self._watches: list[CastWatch] = []

    def forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Return what the layer makes of ``x`` of shape ``(..., in_features)``."""
        engine = self._bind(layer)
        rows = x.reshape(-1, x.shape[-1])
        num_rows = rows.shape[0]
        missing = -num_rows % ALIGNMENT if num_rows else ALIGNMENT
        padded = nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        with self.session.layer_region(), self._history(layer, engine):
            if self.settings.step.collects:
                self._watches = self._watches or watch_casts(engine, self.session.twin, self._seen(layer), self._keep)
            y = engine(padded, is_first_microbatch=self._is_first_use(layer.weight, padded))
        if self.settings.step.collects:
            self._measure_the_rest(engine, layer, rows, y)
        return y[:num_rows].reshape(*x.shape[:-1], layer.out_features)  # type: ignore[no-any-return]

    @contextmanager
    def _history(self, layer: nn.Linear, engine: Any) -> Iterator[None]:
        """Bring loaded history in, and keep the amax of evaluation out: the library's casts note it in any mode."""
        if self.delayed is None:
            yield
            return
        self.delayed.apply(engine)
        self.settings.step.has_amax |= layer.training
        if layer.training:
            yield
            return
        with torch.inference_mode(False):
            engine.init_fp8_metadata(num_gemms=1)
        entry = engine.fp8_meta["scaling_fwd"].amax_history[0]
        before = entry.clone()
        yield
        entry.copy_(before)
        # A weight that was cast here has not told its amax.
        self._cast_from = None

    def _bind(self, layer: nn.Linear) -> Any:
        """Return the library's module, on the parameters that the layer has now.

        Raises:
            UnsupportedError: If the weight became the result of a parametrization.
        """
        if layer._parameters.get("weight") is None:
            raise UnsupportedError(
                "backend='transformer_engine' casts weights that are parameters, and since conversion the weight of "
                f"Linear({layer.extra_repr()}) has become the result of a parametrization or a hook. Register it "
                "before fit, where such a layer stays in 16 bits, or exclude the layer in FP8Config(exclude=...)."
            )
        if self.engine is None:
            self.engine = _build_engine(layer)
        engine = self.engine
        engine._parameters["weight"] = layer._parameters["weight"]
        if layer.bias is not None:
            engine._parameters["bias"] = layer._parameters["bias"]
        engine.training = layer.training
        return engine

    def _is_first_use(self, weight: Tensor, x: Tensor) -> bool | None:
        """Tell whether the weight must be cast; ``None`` keeps no cast weight."""
        if not self.settings.cache_weights:
            self.weight_casts += 1
            return None
        needs_transpose = torch.is_grad_enabled() and x.requires_grad
        version = None if weight.is_inference() else weight._version
        key = (weight, weight.data_ptr(), version, needs_transpose)
        cast = self._cast_from
        is_known = cast is not None and cast[0] is weight and cast[1:] == key[1:]
        if is_known and version is not None:
            return False
        self._drop_unfit(needs_transpose, torch.is_inference_mode_enabled())
        self._cast_from = key
        self.weight_casts += 1
        return True

    def _drop_unfit(self, *kept_for: bool) -> None:
        """Make the library build its cast weight anew where the one it keeps cannot serve this call.

        What it cast for evaluation has no transpose, and in inference mode it cannot be saved for backward.
        The library casts into the memory that it keeps and sees to the transpose of some recipes only (2.12,
        get_weight_workspace).
        """
        if self._kept_for not in (None, kept_for):
            getattr(self.engine, "_fp8_workspaces", {}).pop("weight", None)
        self._kept_for = kept_for

    def invalidate_weight(self) -> None:
        self._cast_from = None

    def end_step(self, *, has_amax: bool) -> None:
        self._cast_from = None
        self.stop_measuring()

    def stop_measuring(self) -> None:
        while self._watches:
            self._watches.pop().stop()

    # --- Statistics ------------------------------------------------------------------------------

    def _seen(self, layer: nn.Linear) -> tuple[Operand, ...]:
        """Return the operands whose casts the library shows."""
        fuses_grad = layer.bias is not None and not isinstance(self.session.twin, BlockScaling)
        return ("input", "weight") if fuses_grad else OPERANDS

    def _measure_the_rest(self, engine: Any, layer: nn.Linear, x: Tensor, y: Tensor) -> None:
        """Measure the weight that the library keeps, and with the emulated recipe the casts that it does not show."""
        twin = self.session.twin
        if isinstance(twin, PassThroughRecipe):
            return
        shadow = EmulatedBackend(self.settings, twin)
        if self.delayed is not None and shadow.delayed is not None:
            shadow.delayed.load_state_dict(self.delayed.state_dict())
        shadow.measured = self.measured
        hidden = set(OPERANDS) - {watch.operand for watch in self._watches}
        kept = getattr(engine, "_fp8_workspaces", {}).get("weight")
        with torch.no_grad():
            if "input" in hidden:
                shadow.quantize(x, "input", is_recorded=False)
            if "weight" in hidden:
                shadow.quantize(layer.weight, "weight", is_recorded=False)
            elif kept is not None:
                dtype = operand_dtype(twin.fp8_format, "weight")
                self._keep("weight", measure_library_cast(layer.weight, kept, dtype))
        if "grad" in hidden and y.requires_grad:
            y.register_hook(lambda grad: _measure_grad(shadow, grad))  # type: ignore[no-untyped-call]

    def _keep(self, operand: Operand, measured: Tensor) -> None:
        self.measured[operand] = worse_of(self.measured.get(operand), measured)


def _measure_grad(shadow: EmulatedBackend, grad: Tensor) -> None:
    with torch.no_grad():
        shadow.quantize(grad, "grad", is_recorded=False)


class _BoundState(EngineDelayedState):
    """The delayed-scaling state of a backend's current module."""

    def __init__(self, backend: EngineBackend) -> None:
        super().__init__(backend.session.twin)  # type: ignore[arg-type]
        self._backend = backend

    def state_dict(self, engine: Any = None) -> dict[str, Tensor]:
        return super().state_dict(self._backend.engine)


def _build_engine(layer: nn.Linear) -> Any:
    import transformer_engine.pytorch as te

    # On "meta" it allocates nothing; the layer's parameters take the place of its own.
    return te.Linear(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        params_dtype=layer.weight.dtype,
        device="meta",
    )
