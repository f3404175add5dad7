"""Which functions and modules of torch are softmax, norm or loss, and how one call runs in FP32."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.loss import _Loss
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_mp.formats import HALF_DTYPES

__all__ = [
    "FunctionRule",
    "FunctionRules",
    "OutputRule",
    "PinKind",
    "function_rules",
    "kind_of_module",
    "names_of",
    "narrow",
    "run_function",
    "run_module",
    "unfolded",
]

PinKind: TypeAlias = Literal["softmax", "norm", "loss"]
OutputRule: TypeAlias = Literal["float32", "input"]
FunctionRule: TypeAlias = OutputRule | Literal["look inside"]
FunctionRules: TypeAlias = Mapping[Callable[..., Any], FunctionRule]

# What most arguments beside tensors are; asked first because this runs at every pinned call.
_PLAIN_TYPES = frozenset({bool, float, int, str, type(None)})

_FUNCTION_NAMES: dict[PinKind, tuple[str, ...]] = {
    "softmax": ("softmax", "log_softmax", "softmin", "gumbel_softmax"),
    "norm": (
        "batch_norm",
        "group_norm",
        "instance_norm",
        "layer_norm",
        "local_response_norm",
        "native_batch_norm",
        "native_group_norm",
        "native_layer_norm",
        "rms_norm",
    ),
    "loss": (
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "cosine_embedding_loss",
        "cross_entropy",
        "ctc_loss",
        "gaussian_nll_loss",
        "hinge_embedding_loss",
        "huber_loss",
        "kl_div",
        "l1_loss",
        "linear_cross_entropy",
        "margin_ranking_loss",
        "mse_loss",
        "multi_margin_loss",
        "multilabel_margin_loss",
        "multilabel_soft_margin_loss",
        "nll_loss",
        "poisson_nll_loss",
        "smooth_l1_loss",
        "soft_margin_loss",
        "triplet_margin_loss",
        "triplet_margin_with_distance_loss",
    ),
}
_NAMESPACES = (F, torch, torch.special, Tensor)

_MODULE_CLASSES: dict[PinKind, tuple[type[nn.Module], ...]] = {
    "softmax": (nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d),
    "norm": (
        nn.LayerNorm,
        nn.RMSNorm,
        nn.GroupNorm,
        _BatchNorm,
        _InstanceNorm,
        nn.LocalResponseNorm,
        nn.CrossMapLRN2d,
    ),
    "loss": (_Loss, nn.AdaptiveLogSoftmaxWithLoss),
}

# Batch and instance norm write these arguments in place, so what a widened copy got is written back.
_STATISTICS = ("running_mean", "running_var")
_POSITIONS_OF_STATISTICS = {
    F.batch_norm: (1, 2),
    F.instance_norm: (1, 2),
    torch.batch_norm: (3, 4),
    torch.instance_norm: (3, 4),
}

_AUTOCAST_DEVICES: tuple[str, ...] = ("cpu",)
_accelerator = torch.accelerator.current_accelerator()
if _accelerator is not None and _accelerator.type != "cpu":
    _AUTOCAST_DEVICES += (_accelerator.type,)


def kind_of_module(module: nn.Module) -> PinKind | None:
    """Return whether ``module`` is a softmax, norm or loss of ``torch.nn`` or a subclass of one."""
    for kind, classes in _MODULE_CLASSES.items():
        if isinstance(module, classes):
            return kind
    return None


def names_of(kind: PinKind) -> tuple[str, ...]:
    """Return the names under which torch offers the functions of ``kind``."""
    return _FUNCTION_NAMES[kind]


def function_rules(outputs: Mapping[PinKind, OutputRule]) -> dict[Callable[..., Any], FunctionRule]:
    """Return every function that a pin of these kinds runs in FP32, with the dtype rule of its result.

    Composites that call such functions have the rule ``"look inside"``.

    Args:
        outputs: Kind to rule. A loss is returned in FP32 whatever its rule says: it is a scalar, so
            a cast would save nothing and FP16 would overflow above 65504.
    """
    rules: dict[Callable[..., Any], FunctionRule] = dict.fromkeys(_UNFOLDED, "look inside")
    for kind, output in outputs.items():
        for name in _FUNCTION_NAMES[kind]:
            found = (getattr(namespace, name, None) for namespace in _NAMESPACES)
            rules.update({function: "float32" if kind == "loss" else output for function in found if function})
    return rules


def _never_overridden(*_: object) -> bool:
    return False


def _unfold(function: Any) -> types.FunctionType:
    """Copy a composite of ``torch.nn.functional`` so that a function mode sees the calls inside it.

    The original hands itself to the mode as one call and the mode is off inside it. The copy has the
    same code and its own globals, in which nothing is overridden; torch's module is left alone.
    """
    own_globals = {**function.__globals__, "has_torch_function": _never_overridden}
    copied = types.FunctionType(function.__code__, own_globals, function.__name__, function.__defaults__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


_UNFOLDED = {F.multi_head_attention_forward: _unfold(F.multi_head_attention_forward)}


def unfolded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a composite whose inner calls a mode sees."""
    return _UNFOLDED[function]


def _widen(value: Any) -> Any:
    """Return FP16 and BF16 tensors, and such a ``dtype=`` argument, as FP32; the rest as it is."""
    if type(value) in _PLAIN_TYPES:
        return value
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF_DTYPES else value
    if isinstance(value, torch.dtype):
        return torch.float32 if value in HALF_DTYPES else value
    if isinstance(value, (tuple, list, dict)):
        # A shape, as of layer_norm: to walk through it as a tree takes ten times as long.
        if type(value) in (tuple, list) and all(type(item) in _PLAIN_TYPES for item in value):
            return value
        return tree_map_only(Tensor, _widen, value)
    return value


def narrow(value: Any, dtype: torch.dtype | None) -> Any:
    """Return FP32 tensors inside ``value`` as ``dtype``, if that is FP16 or BF16."""
    if dtype not in HALF_DTYPES:
        return value
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype is torch.float32 else value
    return tree_map_only(Tensor, lambda x: narrow(x, dtype), value)


def _input_dtype(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """Return the dtype of the first floating-point tensor among the arguments."""
    for value in (*args, *kwargs.values()):
        leaves = tree_leaves(value) if isinstance(value, (tuple, list, dict)) else (value,)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return leaf.dtype
    return None


def _without_autocast(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    for device_type in _AUTOCAST_DEVICES:
        if torch.is_autocast_enabled(device_type):
            break
    else:
        return function(*args, **kwargs)
    if torch.compiler.is_compiling():
        with torch.autocast(device_type, enabled=False):
            return _without_autocast(function, args, kwargs)
    # The flag alone: torch.autocast would build a context for each call, several times as slow.
    torch.set_autocast_enabled(device_type, False)
    try:
        return _without_autocast(function, args, kwargs)
    finally:
        torch.set_autocast_enabled(device_type, True)


def run_module(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: OutputRule) -> Any:
    """Run a module's ``forward`` on FP32 inputs and without autocast.

    Args:
        forward: Bound method that computes in the dtype of its inputs and parameters.
        args: Its positional arguments; FP16 and BF16 tensors are cast, also inside containers.
        kwargs: Its keyword arguments, treated alike.
        output: ``"float32"`` returns what was computed, ``"input"`` casts it to the dtype of the first
            floating-point tensor among the arguments.
    """
    wide = list(args)
    for index, value in enumerate(args):
        if type(value) is not Tensor or value.dtype in HALF_DTYPES:
            wide[index] = _widen(value)
    wide_kwargs = {name: _widen(value) for name, value in kwargs.items()} if kwargs else kwargs
    result = _without_autocast(forward, wide, wide_kwargs)
    return narrow(result, _input_dtype(args, kwargs)) if output == "input" else result


def run_function(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: OutputRule
) -> Any:
    """Run a function of torch on FP32 inputs and without autocast; see ``run_module``.

    A caller that writes ``dtype=`` gets that dtype, whatever ``output`` says; BF16 is rounded once from the
    FP32 result. An ``out=`` tensor and running statistics are written in their own dtype.
    """
    # One loop each and few calls: this runs in caches that large products have emptied.
    wide, asked = list(args), None
    for index, value in enumerate(args):
        cls = type(value)
        if cls is Tensor and value.dtype not in HALF_DTYPES:
            continue
        if cls not in _PLAIN_TYPES:
            wide[index] = _widen(value)
            if cls is torch.dtype:
                asked = value
    wide_kwargs = kwargs
    for name, value in kwargs.items():
        if type(value) not in _PLAIN_TYPES:
            wide_kwargs = {**wide_kwargs, name: _widen(value)}
    out = kwargs.get("out")
    if out is not None:
        wide_kwargs = {name: value for name, value in wide_kwargs.items() if name != "out"}
    result = _without_autocast(function, wide, wide_kwargs)
    if function in _POSITIONS_OF_STATISTICS:
        _write_back_statistics(function, args, kwargs, wide, wide_kwargs)
    if out is not None:
        return out.copy_(result)
    asked = kwargs.get("dtype") or asked
    if asked is None and output == "input":
        asked = _input_dtype(args, kwargs)
    if asked not in HALF_DTYPES:
        return result
    # Of several results, as of native_layer_norm, the later ones are statistics that stay FP32.
    return (narrow(result[0], asked), *result[1:]) if isinstance(result, tuple) else narrow(result, asked)


def _write_back_statistics(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wide: Sequence[Any],
    wide_kwargs: dict[str, Any],
) -> None:
    for position, name in zip(_POSITIONS_OF_STATISTICS[function], _STATISTICS, strict=True):
        given, widened = (
            (args[position], wide[position]) if position < len(args) else (kwargs.get(name), wide_kwargs.get(name))
        )
        if given is not None and given is not widened:
            given.copy_(widened)
