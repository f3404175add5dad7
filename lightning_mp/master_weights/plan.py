"""Which parameters of a module are cast to 16 bits, and which stay as they are."""

from collections.abc import Collection, Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from lightning_mp.errors import UnsupportedError
from lightning_mp.formats import HALF_DTYPES
from lightning_mp.master_weights.masters import cast_param_
from lightning_mp.master_weights.overlap import check_overlap
from lightning_mp.selection import is_normalization

__all__ = ["kept_params", "params_to_cast", "widen_norms_"]

_CAST_DTYPES = (torch.float32, *HALF_DTYPES)


def params_to_cast(
    module: nn.Module, *, keep_fp32: Collection[nn.Parameter | nn.Module] = ()
) -> dict[nn.Parameter, str]:
    """Name the parameters that become 16-bit, each once, in registration order.

    Normalization layers stay FP32 (they are tiny, and CPU norms refuse mixed dtypes), and so do the
    originals of parametrized weights (their functions mix them with FP32 buffers outside of autocast)
    and what ``keep_fp32`` holds. FP64, complex, integer and FP8 parameters are left as they are; buffers are
    no parameters. Those that are not initialized yet are left out.

    Args:
        module: The root. Tied parameters count once, and stay FP32 if any owner must.
        keep_fp32: Parameters, and modules with all parameters below them, to leave alone.

    Returns:
        Parameter to its first dotted name.

    Raises:
        UnsupportedError: If a parameter holds no dense memory, or shares it with another tensor of the module.
    """
    kept = kept_params(module, keep_fp32)
    found: dict[nn.Parameter, str] = {}
    for name, param in module.named_parameters():
        if param in kept or param.dtype not in _CAST_DTYPES or is_lazy(param):
            continue
        if param.layout is not torch.strided or param.device.type == "meta" or _is_subclass(param):
            raise UnsupportedError(
                f"master_weights: parameter {name!r} is {_kind_of(param)}; masters need plain dense tensors with "
                "memory. Materialize it before the fit, pin it with FP32Pin, or use master_weights='params'."
            )
        found[param] = name
    check_overlap(module, found)
    return found


def widen_norms_(module: nn.Module) -> None:
    """Make normalization layers that arrive in 16 bits FP32, running statistics included, in place.

    They compute in FP32 in every mode, and torch refuses 16-bit statistics beside FP32 weights.
    """
    for child in module.modules():
        if not is_normalization(child):
            continue
        for param in child.parameters(recurse=False):
            if param.dtype in HALF_DTYPES:
                cast_param_(param, torch.float32)
        for buffer in child.buffers(recurse=False):
            if buffer.dtype in HALF_DTYPES:
                buffer.data = buffer.data.to(torch.float32)


def kept_params(module: nn.Module, keep_fp32: Collection[nn.Parameter | nn.Module]) -> set[nn.Parameter]:
    """Return the parameters that are not cast, whatever their dtype: of normalization layers, and what is asked for."""
    return set(_kept_params(module, keep_fp32))


def _kept_params(module: nn.Module, keep_fp32: Collection[nn.Parameter | nn.Module]) -> Iterator[nn.Parameter]:
    for kept in keep_fp32:
        if isinstance(kept, nn.Module):
            yield from kept.parameters()
        else:
            yield kept
    for child in module.modules():
        if is_normalization(child) or isinstance(child, ParametrizationList):
            yield from child.parameters(recurse=False)
        for hook in child._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                yield child._parameters[f"{hook.name}_orig"]  # type: ignore[misc]


def _is_subclass(param: nn.Parameter) -> bool:
    # A Parameter made from a tensor subclass (DTensor, a quantized tensor) has that class's type.
    return type(param.data) is not torch.Tensor


def _kind_of(param: nn.Parameter) -> str:
    if param.device.type == "meta":
        return "on the meta device"
    if param.layout is not torch.strided:
        return f"of layout {param.layout}"
    return f"a {type(param.data).__name__}"
