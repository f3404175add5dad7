"""How scales are chosen: the recipes as frozen values under Transformer Engine's field names.

``current``, ``delayed`` and ``block`` are described here in full, because the emulated backend
computes them. Everything else (``mxfp8``, ``nvfp4``, a recipe object of another class) is a
``PassThroughRecipe``: Transformer Engine alone knows what it means.

The facts follow transformer_engine/common/recipe/__init__.py, version 2.12.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.formats import FP8_E4M3FN, FP8_E5M2, FP32

__all__ = [
    "RECIPE_NAMES",
    "BlockScaling",
    "CurrentScaling",
    "DelayedScaling",
    "FP8Recipe",
    "Operand",
    "PassThroughRecipe",
    "QuantizationSettings",
    "describe_recipe",
    "emulated_twin",
    "operand_dtype",
    "parse_recipe",
]

Operand: TypeAlias = Literal["input", "weight", "grad"]

_FORMATS = ("HYBRID", "E4M3")
_OPERANDS: tuple[Operand, ...] = ("input", "weight", "grad")
# Beyond these the maximum of an FP8 format times 2**-margin is no normal FP32 number.
_MIN_MARGIN = math.ceil(math.log2(FP8_E5M2.max / FP32.max))
_MAX_MARGIN = math.floor(math.log2(FP8_E4M3FN.max / FP32.smallest_normal))
_FLAGS = ("use_power_2_scales", "reduce_amax", "use_f32_scales")
_BLOCK_DIMS = (1, 2)
_ALGORITHMS = ("max", "most_recent")


@dataclass(frozen=True)
class QuantizationSettings:
    """How the scale of one operand is rounded and bounded.

    Args:
        power_2_scale: Whether the scale is lowered to a power of two.
        amax_epsilon: Smallest amax that a scale is computed from.
    """

    power_2_scale: bool = False
    amax_epsilon: float = 0.0

    def __post_init__(self) -> None:
        self.__dict__["_text"] = repr(self.amax_epsilon)

    @property
    def epsilon_text(self) -> str:
        """``amax_epsilon`` for code that is compiled: a number is a symbol under ``torch.compile(dynamic=True)``."""
        text: str = self.__dict__["_text"]
        return text


_PLAIN, _POWER_OF_TWO = QuantizationSettings(), QuantizationSettings(power_2_scale=True)


@dataclass(frozen=True)
class CurrentScaling:
    """One scale per tensor, from the tensor's own amax.

    Args:
        fp8_format: ``"HYBRID"`` (E4M3FN forward, E5M2 for gradients) or ``"E4M3"`` (E4M3FN for all).
        use_power_2_scales: Whether all scales are powers of two.
        fp8_quant_fwd_inp: Settings of the input's scale.
        fp8_quant_fwd_weight: Settings of the weight's scale.
        fp8_quant_bwd_grad: Settings of the output gradient's scale.
    """

    fp8_format: str = "HYBRID"
    use_power_2_scales: bool = False
    fp8_quant_fwd_inp: QuantizationSettings | None = None
    fp8_quant_fwd_weight: QuantizationSettings | None = None
    fp8_quant_bwd_grad: QuantizationSettings | None = None

    name = "current"

    def quantization(self, operand: Operand) -> QuantizationSettings:
        """Return how the scale of ``operand`` is computed."""
        chosen = _by_operand(self, operand)
        return (_POWER_OF_TWO if self.use_power_2_scales else _PLAIN) if chosen is None else chosen


@dataclass(frozen=True)
class DelayedScaling:
    """One scale per tensor, from the amax of earlier steps.

    Args:
        margin: The scale is lowered by ``2**margin``.
        fp8_format: ``"HYBRID"`` or ``"E4M3"``.
        amax_history_len: Steps whose amax is remembered.
        amax_compute_algo: ``"max"`` over the history, ``"most_recent"``, or a function of the history: FP32 of
            shape ``(amax_history_len, num_tensors)`` on any device, to shape ``(num_tensors,)``.
        scaling_factor_compute_algo: A function ``(amax, scale, fp8_max, recipe) -> scale``, or ``None``.
        reduce_amax: Whether ranks share their amax.
    """

    margin: int = 0
    fp8_format: str = "HYBRID"
    amax_history_len: int = 1024
    amax_compute_algo: str | Callable[[Tensor], Tensor] = "max"
    scaling_factor_compute_algo: Callable[..., Tensor] | None = None
    reduce_amax: bool = True

    name = "delayed"


@dataclass(frozen=True)
class BlockScaling:
    """One scale per block of 1x128 or 128x128 elements, from the block's own amax.

    Args:
        fp8_format: ``"E4M3"`` (E4M3FN for all) or ``"HYBRID"``.
        use_f32_scales: Whether scales are any FP32 value; else powers of two.
        x_block_scaling_dim: 1 for blocks of 1x128 in the input, 2 for 128x128.
        w_block_scaling_dim: The same for the weight.
        grad_block_scaling_dim: The same for the output gradient.
        fp8_quant_fwd_inp: Settings of the input's scales.
        fp8_quant_fwd_weight: Settings of the weight's scales.
        fp8_quant_bwd_grad: Settings of the output gradient's scales.
    """

    fp8_format: str = "E4M3"
    use_f32_scales: bool = False
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_quant_fwd_inp: QuantizationSettings | None = None
    fp8_quant_fwd_weight: QuantizationSettings | None = None
    fp8_quant_bwd_grad: QuantizationSettings | None = None

    name = "block"

    def quantization(self, operand: Operand) -> QuantizationSettings:
        """Return how the scales of ``operand`` are computed."""
        chosen = _by_operand(self, operand)
        return (_PLAIN if self.use_f32_scales else _POWER_OF_TWO) if chosen is None else chosen

    def block_dim(self, operand: Operand) -> int:
        """Return 1 for blocks of 1x128 in ``operand``, 2 for 128x128."""
        dims = {
            "input": self.x_block_scaling_dim,
            "weight": self.w_block_scaling_dim,
            "grad": self.grad_block_scaling_dim,
        }
        return dims[operand]


@dataclass(frozen=True)
class PassThroughRecipe:
    """A recipe that only Transformer Engine can run.

    Args:
        name: ``"mxfp8"``, ``"nvfp4"``, or the class of the object.
        settings: Fields for Transformer Engine's class of that name.
        source: The user's recipe object, handed on as it is.
    """

    name: str
    settings: Mapping[str, Any] | None = None
    source: Any = None


FP8Recipe: TypeAlias = CurrentScaling | DelayedScaling | BlockScaling | PassThroughRecipe

_EmulatedRecipe: TypeAlias = CurrentScaling | DelayedScaling | BlockScaling
_EMULATED: dict[str, type[_EmulatedRecipe]] = {
    "current": CurrentScaling,
    "delayed": DelayedScaling,
    "block": BlockScaling,
}
_PASSED_THROUGH = ("mxfp8", "nvfp4")
RECIPE_NAMES = (*_EMULATED, *_PASSED_THROUGH)
_ENGINE_CLASSES = {
    "Float8CurrentScaling": "current",
    "DelayedScaling": "delayed",
    "Float8BlockScaling": "block",
    "MXFP8BlockScaling": "mxfp8",
    "NVFP4BlockScaling": "nvfp4",
}
_QUANTIZATION_FIELDS = ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad")


def _by_operand(recipe: CurrentScaling | BlockScaling, operand: Operand) -> QuantizationSettings | None:
    settings = {
        "input": recipe.fp8_quant_fwd_inp,
        "weight": recipe.fp8_quant_fwd_weight,
        "grad": recipe.fp8_quant_bwd_grad,
    }
    return settings[operand]


def operand_dtype(fp8_format: str, operand: Operand) -> torch.dtype:
    """Return the FP8 dtype of an operand: E5M2 for gradients of HYBRID, else E4M3FN.

    Example:
        >>> operand_dtype("HYBRID", "grad"), operand_dtype("E4M3", "grad")
        (torch.float8_e5m2, torch.float8_e4m3fn)
    """
    is_wide = fp8_format == "HYBRID" and operand == "grad"
    return torch.float8_e5m2 if is_wide else torch.float8_e4m3fn


def parse_recipe(value: Any) -> FP8Recipe:
    """Return the recipe for what a user wrote.

    Args:
        value: A name, a dict with ``name`` and the recipe's fields, or a Transformer Engine recipe.

    Raises:
        SettingTypeError: If it is none of these, or a field has a wrong type.
        SettingValueError: If the name, a field or a field's value is not known.

    Example:
        >>> parse_recipe({"name": "delayed", "amax_history_len": 16}).amax_history_len
        16
    """
    if isinstance(value, (CurrentScaling, DelayedScaling, BlockScaling, PassThroughRecipe)):
        return value
    if isinstance(value, str):
        return _from_fields(value, {})
    if isinstance(value, Mapping):
        settings = dict(value)
        if "name" not in settings:
            raise SettingValueError(
                f"recipe={settings!r} has no 'name'. Add one of {_list(RECIPE_NAMES)}, such as "
                "{'name': 'delayed', 'amax_history_len': 16}."
            )
        return _from_fields(settings.pop("name"), settings)
    return _from_engine_object(value)


def _from_fields(name: Any, settings: dict[str, Any]) -> FP8Recipe:
    if not isinstance(name, str) or name not in RECIPE_NAMES:
        raise SettingValueError(f"recipe={name!r} is not known.{_nearest(name, RECIPE_NAMES)} Allowed: "
                                f"{_list(RECIPE_NAMES)}, or a Transformer Engine recipe object.")  # fmt: skip
    if name in _PASSED_THROUGH:
        return PassThroughRecipe(name, settings)
    recipe_class = _EMULATED[name]
    allowed = [field.name for field in fields(recipe_class)]
    for key in settings:
        if key not in allowed:
            raise SettingValueError(
                f"recipe: {key!r} is no field of the {name!r} recipe.{_nearest(key, allowed)} "
                f"Allowed: {_list(allowed)}."
            )
    parsed: dict[str, Any] = {
        key: _parse_quantization(key, v) if key in _QUANTIZATION_FIELDS else v for key, v in settings.items()
    }
    recipe: _EmulatedRecipe = recipe_class(**parsed)
    _check(recipe)
    return recipe


def _parse_quantization(field: str, value: Any) -> QuantizationSettings | None:
    if value is None or isinstance(value, QuantizationSettings):
        return value
    allowed = ("power_2_scale", "amax_epsilon")
    if not isinstance(value, Mapping) or not set(value) <= set(allowed):
        raise SettingValueError(f"recipe: {field}={value!r} is not allowed; pass a dict with {_list(allowed)}.")
    for key, setting in value.items():
        label = f"{field}.{key}"
        if key == "power_2_scale":
            _check_flag(label, setting)
        else:
            _check_epsilon(label, setting)
    return QuantizationSettings(**value)


def _check_flag(field: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise SettingTypeError(f"recipe: {field}={value!r} is a {type(value).__name__}; it must be True or False.")


def _check_epsilon(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SettingTypeError(f"recipe: {field}={value!r} is a {type(value).__name__}; it must be a number.")
    if not 0 <= value <= FP32.max:
        raise SettingValueError(f"recipe: {field}={value} is not allowed; it must be from 0 to {FP32.max:.3g}.")


def _from_engine_object(value: Any) -> FP8Recipe:
    """Read a Transformer Engine recipe by the name of its class, without importing the library.

    A class that is derived from a recipe of the library is that recipe: the library asks with ``isinstance``.
    """
    classes = [c.__name__ for c in type(value).__mro__]
    if "Recipe" not in classes:
        raise SettingTypeError(
            f"recipe={value!r} has type {type(value).__name__}. Pass one of {_list(RECIPE_NAMES)}, a dict with that "
            "name and the recipe's fields, or a Transformer Engine recipe object."
        )
    known = [_ENGINE_CLASSES[name] for name in classes if name in _ENGINE_CLASSES]
    return PassThroughRecipe((*known, classes[0])[0], source=value)


def emulated_twin(recipe: FP8Recipe) -> FP8Recipe:
    """Return what a Transformer Engine recipe object means to the emulated backend.

    An object of a class that is not emulated comes back unchanged.
    """
    if not isinstance(recipe, PassThroughRecipe) or recipe.source is None or recipe.name not in _EMULATED:
        return recipe
    source, recipe_class = recipe.source, _EMULATED[recipe.name]
    read = {f.name: getattr(source, f.name) for f in fields(recipe_class) if hasattr(source, f.name)}
    read["fp8_format"] = getattr(read.get("fp8_format"), "name", recipe_class().fp8_format)
    for field in _QUANTIZATION_FIELDS:
        if field in read:
            read[field] = QuantizationSettings(bool(read[field].power_2_scale), float(read[field].amax_epsilon))
    twin: _EmulatedRecipe = recipe_class(**read)
    _check(twin)
    return twin


def _check(recipe: CurrentScaling | DelayedScaling | BlockScaling) -> None:
    for field in _FLAGS:
        if hasattr(recipe, field):
            _check_flag(field, getattr(recipe, field))
    if recipe.fp8_format not in _FORMATS:
        raise SettingValueError(
            f"recipe: fp8_format={recipe.fp8_format!r} is not known.{_nearest(recipe.fp8_format, _FORMATS)} "
            f"Allowed: {_list(_FORMATS)}."
        )
    if isinstance(recipe, DelayedScaling):
        _check_delayed(recipe)
    if isinstance(recipe, BlockScaling):
        _check_block(recipe)


def _check_delayed(recipe: DelayedScaling) -> None:
    for field in ("margin", "amax_history_len"):
        value = getattr(recipe, field)
        if isinstance(value, bool) or not isinstance(value, int):
            raise SettingTypeError(f"recipe: {field}={value!r} is a {type(value).__name__}; it must be an int.")
    if not _MIN_MARGIN <= recipe.margin <= _MAX_MARGIN:
        raise SettingValueError(
            f"recipe: margin={recipe.margin} is not allowed: a scale is the format's maximum times 2**-margin, divided "
            f"by amax, and that product would leave FP32. Use a margin from {_MIN_MARGIN} to {_MAX_MARGIN}."
        )
    if recipe.amax_history_len < 1:
        raise SettingValueError(f"recipe: amax_history_len={recipe.amax_history_len} is not allowed; it must be >= 1.")
    function = recipe.scaling_factor_compute_algo
    if function is not None and not callable(function):
        raise SettingTypeError(
            f"recipe: scaling_factor_compute_algo={function!r} is a {type(function).__name__}; it must be a function "
            "(amax, scale, fp8_max, recipe) -> scale, or None."
        )
    if function is not None:
        _check_scaling_function(function, recipe)
    algorithm = recipe.amax_compute_algo
    if not callable(algorithm) and algorithm not in _ALGORITHMS:
        raise SettingValueError(
            f"recipe: amax_compute_algo={algorithm!r} is not known.{_nearest(algorithm, _ALGORITHMS)} "
            f"Allowed: {_list(_ALGORITHMS)}, or a function of the history."
        )
    if callable(algorithm):
        _check_amax_function(algorithm, recipe.amax_history_len)


def _check_amax_function(function: Callable[[Tensor], Tensor], length: int) -> None:
    """Refuse a function that cannot take a history, by a call with one."""
    # No square: a function that takes the amax of each row would pass.
    history = torch.ones(length, 2 if length != 2 else 3, device="cpu")
    _check_result(
        f"amax_compute_algo={function!r} is not allowed: given a history of shape {tuple(history.shape)}, one row per "
        "step,",
        "It must return one amax per column, such as lambda history: history.mean(0).",
        lambda: function(history),
        history.shape[1:],
    )


def _check_scaling_function(function: Callable[..., Tensor], recipe: DelayedScaling) -> None:
    """Refuse a function that cannot take amax and scales, by a call with them."""
    amax, scale = torch.full((2,), 2.0, device="cpu"), torch.ones(2, device="cpu")
    _check_result(
        f"scaling_factor_compute_algo={function!r} is not allowed: given amax and scale of shape (2,), 448.0 and the "
        "recipe,",
        "It must return one scale per amax, such as lambda amax, scale, fp8_max, recipe: fp8_max / amax.",
        lambda: function(amax, scale, 448.0, recipe),
        amax.shape,
    )


def _check_result(complaint: str, remedy: str, call: Callable[[], Any], shape: torch.Size) -> None:
    failure: Exception | None = None
    try:
        result = call()
    except Exception as error:
        failure, found = error, f"raised {type(error).__name__}: {error}"
    else:
        if isinstance(result, Tensor) and result.shape == shape:
            return
        found = f"returned {f'shape {tuple(result.shape)}' if isinstance(result, Tensor) else repr(result)}"
    raise SettingValueError(f"recipe: {complaint} it {found}. {remedy}") from failure


def _check_block(recipe: BlockScaling) -> None:
    dims = {operand: recipe.block_dim(operand) for operand in _OPERANDS}
    if any(dim not in _BLOCK_DIMS or isinstance(dim, bool) for dim in dims.values()):
        raise SettingValueError(f"recipe: block dimensions {dims} are not allowed; each must be 1 or 2.")
    if sum(dim == 2 for dim in dims.values()) > 1:
        raise SettingValueError(
            f"recipe: block dimensions {dims} are not allowed: a product of two operands in 128x128 blocks does not "
            "exist. Leave at most one of them at 2."
        )


def describe_recipe(recipe: FP8Recipe) -> dict[str, Any]:
    """Return the recipe as plain values, for a checkpoint and for messages."""
    if isinstance(recipe, PassThroughRecipe):
        shown = repr(recipe.source) if recipe.source is not None else dict(recipe.settings or {})
        return {"name": recipe.name, "settings": shown if isinstance(shown, str) else _plain(shown)}
    return {"name": recipe.name, **_plain(asdict(replace(recipe)))}


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {
        key: _plain(value) if isinstance(value, dict) else value if isinstance(value, plain) else repr(value)
        for key, value in settings.items()
    }


def _list(names: Any) -> str:
    return ", ".join(map(repr, names))


def _nearest(word: Any, allowed: Any) -> str:
    nearest = difflib.get_close_matches(str(word), list(allowed), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
