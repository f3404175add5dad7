"""FP32 as a BF16 value plus 16 further bits, exactly, and back.

The working weight is ``hi = (bits + 0x8000) >> 16``: round to nearest, ties away from zero. The
further bits are the low 16 bits of the FP32 value, so that ``(hi << 16) + lo`` with ``lo`` read as
signed restores every finite value. Round to nearest even cannot be inverted from 16 further bits:
65,537 FP32 values map to each even BF16 value.
"""

import torch
from torch import Tensor

from lightning_mp.errors import SettingTypeError, UnsupportedError

__all__ = ["flat_view", "join_", "publish_", "restore_written_", "round_", "split_"]

# One BF16 ulp is 2**16 steps of the FP32 bit pattern; half of it turns truncation into rounding.
_HALF_ULP = 0x8000
_BF16_NAN = 0x7FC0


def split_(block: Tensor, values: list[Tensor], his: list[Tensor], los: list[Tensor]) -> None:
    """Write the BF16 working weights of FP32 values to ``his`` and their 16 further bits to ``los``.

    A NaN stays a NaN in its working weight; of its payload only the low 16 bits survive. A finite
    magnitude that rounds above the largest BF16 gives infinity there and is still restored exactly.

    Args:
        block: FP32, one-dimensional: the memory that all ``values`` are views of. Overwritten.
        values: FP32, one-dimensional views of ``block``. Overwritten.
        his: BF16, as many elements each. Overwritten.
        los: int16, as many elements each. Overwritten.

    References:
        Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training" (arXiv:1905.12322), section 3.

    Example:
        >>> value = torch.tensor([1.0 + 2.0**-8 + 2.0**-23])
        >>> hi, lo = torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int16)
        >>> split_(value, [value], [hi], [lo])
        >>> hi, lo
        (tensor([1.0078], dtype=torch.bfloat16), tensor([-32767], dtype=torch.int16))
    """
    bits = [value.view(torch.int32) for value in values]
    torch._foreach_copy_(los, bits)  # keeps the low 16 bits
    round_(block)
    torch._foreach_copy_([hi.view(torch.int16) for hi in his], bits)


def join_(his: list[Tensor], los: list[Tensor], out: list[Tensor]) -> None:
    """Write the FP32 values whose halves :func:`split_` gave to ``out``.

    On devices other than the CPU, where a write to a weight may go unseen, :func:`restore_written_` follows.

    Args:
        his: BF16, one-dimensional.
        los: int16, as many elements each.
        out: FP32, as many elements each. Overwritten.

    Example:
        >>> out = torch.empty(1)
        >>> join_([torch.tensor([1.0], dtype=torch.bfloat16)], [torch.tensor([1], dtype=torch.int16)], [out])
        >>> (out - 1.0).item() == 2.0**-23
        True
    """
    torch._foreach_copy_(out, his)
    torch._foreach_add_([value.view(torch.int32) for value in out], los)
    if out and out[0].device.type != "cpu":
        restore_written_(out, his)


def restore_written_(values: list[Tensor], his: list[Tensor]) -> None:
    """Replace each NaN that two halves made which do not belong together by its working weight.

    Halves of one value give a NaN only where the working weight is one. Beside further bits of before, a
    zero or an infinity that was written to the weight would be a NaN too.

    Args:
        values: FP32, as :func:`join_` made them. Modified in place.
        his: BF16, as many elements each: the working weights that they were made of.

    Example:
        >>> zero, value = torch.zeros(1, dtype=torch.bfloat16), torch.empty(1)
        >>> join_([zero], [torch.tensor([-1], dtype=torch.int16)], [value])
        >>> restore_written_([value], [zero])
        >>> value
        tensor([0.])
    """
    for value, hi in zip(values, his, strict=True):
        torch.where(value.isnan(), hi, value, out=value)


def round_(block: Tensor) -> None:
    """Replace FP32 values by the bits of their BF16 working weights, as int32, in place.

    Args:
        block: FP32, one-dimensional. Afterwards ``block.view(torch.int32)`` holds the 16 bits of each
            working weight, sign-extended.
    """
    # The addition carries a NaN whose upper mantissa bits are all set (CUDA makes such ones) into
    # the sign, which would publish it as zero. On the CPU a sum finds out first whether there is one.
    is_nan = block.isnan() if block.device.type != "cpu" or bool(block.sum().isnan()) else None
    bits = block.view(torch.int32).add_(_HALF_ULP).bitwise_right_shift_(16)
    if is_nan is not None:
        bits.masked_fill_(is_nan, _BF16_NAN)


def publish_(value: Tensor, hi: Tensor) -> None:
    """Write the working weight of an FP32 master to ``hi``.

    To BF16 ties round away from zero, the rounding that :func:`split_` can invert, so that every
    mode publishes the same weight. To FP16 ties round to even, as torch casts.

    Args:
        value: FP32, one-dimensional. Not modified.
        hi: BF16 or FP16, as many elements, same device. Overwritten.

    Raises:
        SettingTypeError: If ``value`` is not FP32.
    """
    if value.dtype is not torch.float32:
        raise SettingTypeError(f"value: found dtype {value.dtype}; a master weight is torch.float32.")
    if hi.dtype is not torch.bfloat16:
        hi.copy_(value)
        return
    block = value.clone()
    round_(block)
    hi.view(torch.int16).copy_(block.view(torch.int32))


def flat_view(tensor: Tensor) -> Tensor:
    """View a dense tensor as one dimension in the order of its memory, whatever its strides.

    Raises:
        UnsupportedError: If the tensor has gaps or shares elements, as a slice or an expanded one has.

    Example:
        >>> flat_view(torch.arange(6).view(2, 3).t())
        tensor([0, 1, 2, 3, 4, 5])
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    if not _is_dense(tensor):
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
