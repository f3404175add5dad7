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

The FP32 master of a 16-bit weight is what the library casts (``library_casts.cast_weight_from``), while the
module holds the 16-bit parameter, which gradients belong to. The master's values exist for the time of the
cast only, where they are not the master itself.
"""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mp.errors import FP8UnavailableError, SettingValueError, UnsupportedError
from lightning_mp.fp8.coverage import ALIGNMENT
from lightning_mp.fp8.delayed import OPERANDS, DelayedState
from lightning_mp.fp8.emulated import EmulatedBackend
from lightning_mp.fp8.layer import LayerBackend, LayerSettings, version_of
from lightning_mp.fp8.library_casts import CastWatch, cast_weight_from, measure_library_cast, watch_casts
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
_UNTRACED = "Transformer Engine's layers run outside the graphs of torch.compile; use fullgraph=False"
_REMEDY = "Exclude the layers in FP8Config(exclude=...), or use precision='bf16'."
_SECOND_DERIVATIVE = (
    "backward with create_graph=True reached a layer in FP8. Transformer Engine's layers have no second derivative: "
    f"their part of it would be missing without an error. {_REMEDY}"
)
_SECOND_BACKWARD = (
    "A second backward through one forward (retain_graph=True) reached a layer in FP8, and Transformer Engine frees "
    f"what the first one needs. Add up the losses and go backward once, or run the forward again. {_REMEDY}"
)
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
    if isinstance(settings.get("fp8_format"), str):
        settings["fp8_format"] = _format(library, recipe.name, settings["fp8_format"])
    try:
        built = recipe_class(**settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise SettingValueError(f"recipe={recipe.name!r}: {_CLASS_NAMES[recipe.name]} says: {error}") from None
    if isinstance(recipe, (CurrentScaling, BlockScaling)):
        _set_quantization(library, built, recipe)
    return built


def _format(library: Any, recipe_name: str, format_name: str) -> Any:
    if format_name not in library.Format.__members__:
        allowed = ", ".join(map(repr, library.Format.__members__))
        raise SettingValueError(f"recipe={recipe_name!r}: fp8_format={format_name!r} is not known. Allowed: {allowed}.")
    return library.Format[format_name]


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
        self.engines: list[Any] = []
        # Traced, its bookkeeping would be compiled frame by frame around a library that is not traced at all.
        self.compute_untraced = torch._dynamo.disable(EngineBackend.compute, reason=_UNTRACED)  # type: ignore[no-untyped-call]
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
            _forget(self.engines)
        self.engines = []

    def _hold(self) -> None:
        if self.is_delayed and not self._is_held:
            _change_depth(1)
            self._is_held = True


def _manager() -> Any:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    return FP8GlobalStateManager


def _state() -> Any:
    """Return what holds the library's global state, which moved into an object of its own after 2.12."""
    return getattr(_manager(), "quantization_state", _manager())


def _change_depth(by: int) -> None:
    holder = _state()
    name = "AUTOCAST_DEPTH" if holder is _manager() else "autocast_depth"
    if not hasattr(holder, name):
        raise UnsupportedError(
            "recipe='delayed' needs to know the depth of Transformer Engine's region, which this version keeps "
            "elsewhere. Use recipe='current', or Transformer Engine 2.9 to 2.20."
        )
    setattr(holder, name, getattr(holder, name) + by)


def _forget(engines: Iterable[Any]) -> None:
    """Take modules out of the library's global buffers, which keep each module that ever ran.

    Its own ``reset`` would take all modules out, and one that is out never comes back: the scales of a module
    that a model brings itself would stand still in its next run. A list that is shared with such a module stays,
    because modules know their places in it.
    """
    ours = {id(meta.scale) for engine in engines for meta in _metas(engine) or ()}
    state = _state()
    for key, scales in list(state.global_scale_buffer.items()):
        if all(id(scale) in ours for scale in scales):
            for buffer in (state.global_amax_buffer, state.global_amax_history_buffer, state.global_scale_buffer):
                del buffer[key]


class EngineDelayedState:
    """Delayed-scaling state of one layer, kept by the library, read and written as plain tensors.

    The library has three columns forward (input, weight, output) and two backward (output gradient,
    input gradient); ours are input, weight, output gradient.
    """

    def __init__(self, recipe: DelayedScaling, backend: "EngineBackend") -> None:
        self._saved = DelayedState(recipe)
        self._is_pending = False
        self._backend = backend

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the tensors, on the CPU."""
        metas = _metas(self._backend.engine)
        if metas is None or self._is_pending:
            return self._saved.state_dict()
        forward, backward = metas
        scale = torch.cat([forward.scale[:2], backward.scale[:1]])
        history = torch.cat([forward.amax_history[:, :2], backward.amax_history[:, :1]], 1)
        return {"scale": scale.cpu().clone(), "amax_history": history.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Continue from saved tensors; return whether they fit the history's length.

        What a layer that has run continues from must be in place before the next update of the scales.
        """
        fits = self._is_pending = self._saved.load_state_dict(dict(state))
        if fits and _metas(self._backend.engine) is not None:
            self._write()
        return fits

    def prepare(self) -> Any:
        """Make the library build its tensors, with what was loaded; return those of the forward."""
        engine = self._backend.engine
        if self._is_pending or _metas(engine) is None:
            with torch.inference_mode(False):
                engine.init_fp8_metadata(num_gemms=1)
                if self._is_pending:
                    self._write()
        return engine.fp8_meta["scaling_fwd"]

    def _write(self) -> None:
        """Write loaded tensors into the library's, in place: it keeps pointers to them."""
        meta = self._backend.engine.fp8_meta
        forward, backward = meta["scaling_fwd"], meta["scaling_bwd"]
        forward.scale[:2].copy_(self._saved.scale[:2])
        forward.amax_history[:, :2].copy_(self._saved.amax_history[:, :2])
        backward.scale[:1].copy_(self._saved.scale[2:])
        backward.amax_history[:, :1].copy_(self._saved.amax_history[:, 2:])
        self._is_pending = False


def _metas(engine: Any) -> tuple[Any, Any] | None:
    meta = {} if engine is None else engine.fp8_meta
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
        self.delayed = EngineDelayedState(session.twin, self) if isinstance(session.twin, DelayedScaling) else None
        self.engine: Any = None
        self._cast_from: tuple[Any, ...] | None = None
        self._kept_for: tuple[bool, bool] | None = None
        self._watches: list[CastWatch] = []

    def forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Return what the layer makes of ``x`` of shape ``(..., in_features)``."""
        if torch.compiler.is_compiling():
            return self.session.compute_untraced(self, layer, x)  # type: ignore[no-any-return]
        return self.compute(layer, x)

    def compute(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Return what the layer makes of ``x``, outside any graph of ``torch.compile``."""
        engine = self._bind(layer)
        rows = x.reshape(-1, x.shape[-1])
        num_rows = rows.shape[0]
        missing = -num_rows % ALIGNMENT if num_rows else ALIGNMENT
        padded = nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        with self.session.layer_region(), self._history(layer):
            if self.settings.step.collects:
                self._watches = self._watches or watch_casts(engine, self.session.twin, self._seen(layer), self._keep)
            y = self._call(engine, layer, padded)
        if y.grad_fn is not None:
            y.grad_fn.register_prehook(_FirstBackwardOnly())
        if self.settings.step.collects:
            self._measure_the_rest(engine, layer, rows, y)
        return y[:num_rows].reshape(*x.shape[:-1], layer.out_features)

    def _call(self, engine: Any, layer: nn.Linear, x: Tensor) -> Tensor:
        is_first, weight = self._is_first_use(layer, x), layer.weight
        feed: AbstractContextManager[None] = nullcontext()
        if self.settings.step.weight_source is not None and weight.dtype is not torch.float32:
            feed = cast_weight_from(engine, lambda: self.values_of(weight), is_due=is_first is not False)
        try:
            with feed:
                return engine(x, is_first_microbatch=is_first)  # type: ignore[no-any-return]
        except BaseException:
            # Perhaps it came before the cast: what is kept may be of an earlier step.
            self.invalidate_weight()
            raise

    @contextmanager
    def _history(self, layer: nn.Linear) -> Iterator[None]:
        """Bring loaded history in, and keep the amax of evaluation out: the library's casts note it in any mode."""
        if self.delayed is None:
            yield
            return
        forward = self.delayed.prepare()
        self.settings.step.has_amax |= layer.training
        if layer.training:
            yield
            return
        entry = forward.amax_history[0]
        before = entry.clone()
        yield
        entry.copy_(before)

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
            self.session.engines.append(self.engine)
        engine = self.engine
        engine._parameters["weight"] = layer._parameters["weight"]
        if layer.bias is not None:
            engine._parameters["bias"] = layer._parameters["bias"]
        engine.training = layer.training
        return engine

    def _is_first_use(self, layer: nn.Linear, x: Tensor) -> bool | None:
        """Tell whether the weight must be cast; ``None`` keeps no cast weight.

        Evaluation casts at each call, for itself alone: averaged weights are swapped in and out through
        ``weight.data``, which leaves the version as it is, and delayed scaling wants the amax of training.
        """
        if not self.settings.cache_weights:
            self.weight_casts += 1
            return None
        weight, cast = layer.weight, self._cast_from
        needs_transpose = torch.is_grad_enabled() and x.requires_grad
        is_inference = torch.is_inference_mode_enabled()
        version = version_of(weight)
        key = (weight.data_ptr(), version, is_inference)
        is_known = cast is not None and cast[0] is weight and cast[2:] == key and cast[1] >= needs_transpose
        if is_known and version is not None and layer.training:
            return False
        has_transpose = self._drop_unfit(needs_transpose, is_inference)
        self._cast_from = (weight, has_transpose, *key) if layer.training else None
        self.weight_casts += 1
        return True

    def _drop_unfit(self, needs_transpose: bool, is_inference: bool) -> bool:
        """Make the library build its cast weight anew where the one it keeps cannot serve this call.

        What it cast for evaluation has no transpose, and in inference mode it cannot be saved for backward.
        The library casts into the memory that it keeps, and sees to the transpose of some recipes only (2.12,
        get_weight_workspace).

        Returns:
            Whether what it casts now has a transpose: into memory that has one it writes both.
        """
        kept = self._kept_for
        if kept is None or kept[0] < needs_transpose or kept[1] is not is_inference:
            getattr(self.engine, "_fp8_workspaces", {}).pop("weight", None)
            kept = self._kept_for = (needs_transpose, is_inference)
        return kept[0]

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
                shadow.quantize(self.values_of(layer.weight), "weight", is_recorded=False)
            elif kept is not None:
                dtype = operand_dtype(twin.fp8_format, "weight")
                self._keep("weight", measure_library_cast(self.values_of(layer.weight), kept, dtype))
        if "grad" in hidden and y.requires_grad:
            y.register_hook(lambda grad: _measure_grad(shadow, grad))  # type: ignore[no-untyped-call]

    def _keep(self, operand: Operand, measured: Tensor) -> None:
        self.measured[operand] = worse_of(self.measured.get(operand), measured)


def _measure_grad(shadow: EmulatedBackend, grad: Tensor) -> None:
    with torch.no_grad():
        shadow.quantize(grad, "grad", is_recorded=False)


class _FirstBackwardOnly:
    """Refuses, before the backward of one call, what the library would get wrong or fail at without a word of it."""

    __slots__ = ("_is_done",)

    def __init__(self) -> None:
        self._is_done = False

    def __call__(self, grads: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            raise UnsupportedError(_SECOND_DERIVATIVE)
        if self._is_done:
            raise UnsupportedError(_SECOND_BACKWARD)
        self._is_done = True


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
