"""What a cast to FP8 does to a tensor, measured on request."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mp.fp8.quantize import Quantized, amax_of, spread_blocks
from lightning_mp.fp8.recipes import Operand
from lightning_mp.numerics import sqnr_db, underflow_fraction

__all__ = ["ROUNDING", "OperandStatistics", "measure_cast", "worse_of"]

# amax * (fp8_max / amax) is off by up to two FP32 roundings, and that is no saturation.
ROUNDING = 1 + 2.0**-22


@dataclass(frozen=True)
class OperandStatistics:
    """What the casts of one step did to one operand of one layer.

    Args:
        fqn: Full dotted name of the layer.
        operand: ``"input"``, ``"weight"`` or ``"grad"``.
        amax: Largest magnitude before the cast.
        scale: Factor into FP8; of block scaling the smallest, that of the largest block.
        saturated: Share of the nonzero elements beyond the format's maximum, in [0, 1].
        flushed: Share of the nonzero elements that became zero, in [0, 1].
        sqnr_db: Signal-to-quantization-noise ratio in dB.
    """

    fqn: str
    operand: Operand
    amax: float
    scale: float
    saturated: float
    flushed: float
    sqnr_db: float


def measure_cast(x: Tensor, quantized: Quantized) -> Tensor:
    """Return amax, scale, saturated share, flushed share and SQNR in dB, FP32 of shape ``(5,)``.

    Nothing is read from the device. Saturation is counted before the cast.
    """
    dtype = quantized.data.dtype
    scale = quantized.scale_inv.reciprocal() if quantized.scale is None else quantized.scale
    scaled = x.detach().float()
    if quantized.block is None:
        scaled = scaled * scale
    else:
        scaled = scaled * spread_blocks(scale, quantized.block, (x.shape[0], x.shape[1]))
    magnitude = scaled.abs()
    num_nonzero = (magnitude > 0).sum().clamp(min=1)
    saturated = (magnitude > torch.finfo(dtype).max * ROUNDING).sum() / num_nonzero
    measured = (
        amax_of(x),
        scale.amin(),
        saturated,
        underflow_fraction(scaled, dtype),
        sqnr_db(x.detach().float(), quantized.dequantize()),
    )
    return torch.stack([value.float() for value in measured])


def worse_of(first: Tensor | None, second: Tensor) -> Tensor:
    """Return the worse of two measurements, number by number: larger amax and shares, smaller scale and SQNR."""
    if first is None:
        return second
    return torch.where(first.new_tensor([True, False, True, True, False]).bool(), first.maximum(second),
                       first.minimum(second))  # fmt: skip
