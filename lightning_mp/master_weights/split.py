"""FP32 as a BF16 value plus 16 further bits, exactly, and back.

The working weight is ``hi = (bits + 0x8000) >> 16``: round to nearest, ties away from zero. The
further bits are the low 16 bits of the FP32 value, so that ``(hi << 16) + lo`` with ``lo`` read as
signed restores every finite value. Round to nearest even cannot be inverted from 16 further bits:
65,537 FP32 values map to each even BF16 value.
"""

import torch
from torch import Tensor

from lightning_mp.errors import SettingTypeError, UnsupportedError

__all__ = ["flat_view", "join_", "publish_", "split_"]

# One BF16 ulp is 2**16 steps of the FP32 bit pattern; half of it turns truncation into rounding.
_HALF_ULP = 0x8000
_BF16_NAN = 0x7FC0


def split_(value: Tensor, hi: Tensor, lo: Tensor) -> None:
    """Write the BF16 working weight of ``value`` to ``hi`` and its 16 further bits to ``lo``.

    A NaN stays a NaN in ``hi``; of its payload only the low 16 bits survive. A finite magnitude that
    rounds above the largest BF16 gives infinity in ``hi`` and is still restored exactly.

    Args:
        value: FP32, any shape, contiguous. Not modified.
        hi: BF16, same shape and device, contiguous. Overwritten.
        lo: int16, same shape and device, contiguous. Overwritten.

    Raises:
        SettingTypeError: If ``value`` is not FP32 or ``hi`` is not BF16.

    References:
        Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training" (arXiv:1905.12322), section 3.

    Example:
        >>> value = torch.tensor([1.0 + 2.0**-8 + 2.0**-23])
        >>> hi, lo = torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int16)
        >>> split_(value, hi, lo)
        >>> hi, lo
        (tensor([1.0078], dtype=torch.bfloat16), tensor([-32767], dtype=torch.int16))
    """
    publish_(value, hi)
    lo.copy_(value.view(torch.int32))  # keeps the low 16 bits


def join_(hi: Tensor, lo: Tensor, out: Tensor) -> None:
    """Write the FP32 value whose halves :func:`split_` gave to ``out``.

    Args:
        hi: BF16, any shape, contiguous.
        lo: int16, same shape and device, contiguous.
        out: FP32, same shape and device, contiguous. Overwritten.

    Example:
        >>> out = torch.empty(1)
        >>> join_(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1], dtype=torch.int16), out)
        >>> (out - 1.0).item() == 2.0**-23
        True
    """
    out.copy_(hi)
    # The int32 copy is faster than letting add_ convert int16 element by element.
    out.view(torch.int32).add_(lo.to(torch.int32))


def publish_(value: Tensor, hi: Tensor) -> None:
    """Write the working weight of an FP32 master to ``hi``.

    To BF16 ties round away from zero, the rounding that :func:`split_` can invert, so that every
    mode publishes the same weight. To FP16 ties round to even, as torch casts.

    Args:
        value: FP32, any shape, contiguous. Not modified.
        hi: BF16 or FP16, same shape and device, contiguous. Overwritten.

    Raises:
        SettingTypeError: If ``value`` is not FP32.
    """
    if value.dtype is not torch.float32:
        raise SettingTypeError(f"value: found dtype {value.dtype}; a master weight is torch.float32.")
    if hi.dtype is not torch.bfloat16:
        hi.copy_(value)
        return
    bits = value.view(torch.int32).add(_HALF_ULP).bitwise_right_shift_(16)
    hi.view(torch.int16).copy_(bits)
    # The addition carries a NaN whose upper mantissa bits are all set (CUDA makes such ones) into
    # the sign, which would publish it as zero. On the CPU a sum finds out first whether there is one.
    if value.device.type != "cpu" or bool(value.sum().isnan()):
        hi.view(torch.int16).masked_fill_(value.isnan(), _BF16_NAN)


def flat_view(tensor: Tensor) -> Tensor:
    """View a dense tensor as one dimension in the order of its memory, whatever its strides.

    Raises:
        UnsupportedError: If the tensor has gaps or shares elements, as a slice or an expanded one has.

    Example:
        >>> flat_view(torch.arange(6).view(2, 3).t())
        tensor([0, 1, 2, 3, 4, 5])
    """
    if not tensor.is_contiguous() and not _is_dense(tensor):
        raise UnsupportedError(
            f"master_weights: a weight of shape {tuple(tensor.shape)} was given memory with strides {tensor.stride()}, "
            "which has gaps or shares elements. Assign weight.data = value.contiguous()."
        )
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
