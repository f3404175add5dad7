"""From a tensor to FP8 and back, with Transformer Engine's rules.

Facts from Transformer Engine 2.12: common/recipe/recipe_common.cuh (the scale),
common/recipe/current_scaling.cu (amax), common/transpose/quantize_transpose_*_blockwise.cu (blocks).
Its casts round to the nearest even value and saturate, infinity included; NaN stays NaN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mp.formats import FP32
from lightning_mp.fp8.recipes import QuantizationSettings

__all__ = [
    "BLOCK_SIZE",
    "Quantized",
    "amax_of",
    "cast_scaled",
    "quantize_blocks",
    "quantize_tensor",
    "scale_from_amax",
    "spread_blocks",
]

BLOCK_SIZE = 128

# Of an FP32 number: all but the 23 bits of the mantissa.
_SIGN_AND_EXPONENT = -(2**FP32.mantissa_bits)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix in FP8 with its scales.

    Args:
        data: FP8 values of shape ``(rows, columns)``.
        scale_inv: FP32, what the values are multiplied by to get back: 0-dim for one scale per
            tensor, else one per block.
        block: Rows and columns of a block; ``None`` for one scale per tensor.
        scale: FP32, what was multiplied with before the cast; ``None`` where it is not kept.
    """

    data: Tensor
    scale_inv: Tensor
    block: tuple[int, int] | None = None
    scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """Return the FP32 values that the FP8 values stand for."""
        return self.data.float() * self._spread(self.scale_inv)

    def factored(self, summed: int) -> tuple[Tensor, Tensor]:
        """Return an FP32 matrix and a factor on it.

        One scale per tensor is left to the product, as cuBLAS does: FP8 values are then exact in any
        mode of the FP32 product, TF32 included. Of scales per block only powers of two are, and only what
        could take a sum beyond FP32 that has a place there once it is complete.

        Args:
            summed: The dimension that the product sums over.

        Returns:
            The matrix, and the factor: 0-dim, or one element per row if ``summed`` is 1, per column if it is 0.
        """
        if self.block is None:
            return self.data.float(), self.scale_inv
        if self.scale_inv.shape[summed] == 0:
            return self.data.float(), self.scale_inv.new_ones(())
        largest = self.scale_inv.amax(summed, keepdim=True)
        # Two operands of E5M2 at its maximum, 2**16, times 2**40 and less than twice it, are 2**114: 2**14 of them
        # still have a sum in FP32. Smaller scales are left as they are, so that no product of small numbers is lost.
        # Written here, the number is a constant to the compiler; a global one is a symbol under dynamic=True.
        factor = (_power_of_two_below(largest) / 2.0**40).clamp(min=1.0)
        matrix = self.data.float() * self._spread(self.scale_inv / factor)
        kept = 1 - summed
        return matrix, factor.flatten().repeat_interleave(self.block[kept])[: self.data.shape[kept]]

    def _spread(self, of_blocks: Tensor) -> Tensor:
        if self.block is None:
            return of_blocks
        rows, columns = self.data.shape
        return spread_blocks(of_blocks, self.block, (rows, columns))


def spread_blocks(of_blocks: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Repeat one value per block over the elements of the blocks; ``shape`` cuts the edges."""
    spread = of_blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return spread[: shape[0], : shape[1]]


def amax_of(x: Tensor) -> Tensor:
    """Return the largest magnitude as FP32, 0-dim; NaN is passed over, as in the library's kernels.

    Example:
        >>> amax_of(torch.tensor([-3.0, 1.0, float("nan")]))
        tensor(3.)
    """
    if x.numel() == 0:
        return torch.zeros((), device=x.device)
    return _magnitude(x).amax()


def _magnitude(x: Tensor) -> Tensor:
    return torch.nan_to_num(x.detach().float().abs(), nan=0.0, posinf=torch.inf)


def scale_from_amax(
    amax: Tensor, dtype: torch.dtype, settings: QuantizationSettings, *, dtype_for_inf: torch.dtype = torch.float32
) -> Tensor:
    """Return the factor that moves ``amax`` to the largest magnitude of ``dtype``.

    Args:
        amax: FP32, any shape.
        dtype: FP8 dtype.
        settings: Smallest amax, and whether the scale is lowered to a power of two.
        dtype_for_inf: Whose maximum stands for a scale beyond FP32; block scaling takes the quantized
            tensor's. No number: what is no constant in the code is a symbol under ``torch.compile(dynamic=True)``.

    Returns:
        FP32 scales of the shape of ``amax``. An amax of zero, infinity or NaN gives 1.

    Example:
        >>> scale_from_amax(torch.tensor([7.0, 0.0, torch.inf]), torch.float8_e4m3fn, QuantizationSettings())
        tensor([64.,  1.,  1.])
    """
    epsilon = float(settings.epsilon_text)
    amax = torch.where(amax < epsilon, epsilon, amax).float()
    # A number divided by a tensor is reciprocal times number in torch, which rounds twice.
    scale = torch.full_like(amax, torch.finfo(dtype).max) / amax
    scale = torch.where(torch.isinf(scale), torch.finfo(dtype_for_inf).max, scale)
    if settings.power_2_scale:
        scale = _power_of_two_below(scale)
    return torch.where((amax > 0) & torch.isfinite(amax), scale, 1.0)


def _power_of_two_below(x: Tensor) -> Tensor:
    """Return the largest power of two that is not above a normal positive FP32 number."""
    bits: Tensor = x.view(torch.int32) & _SIGN_AND_EXPONENT
    return bits.view(torch.float32)


def cast_scaled(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast FP32 values to FP8: to the nearest even value, saturating; NaN stays NaN.

    Values beyond the range are clamped before the cast: what a bare cast makes of them differs
    between devices and dtypes.

    Example:
        >>> cast_scaled(torch.tensor([1e9, -torch.inf, 17.0]), torch.float8_e4m3fn).float()
        tensor([ 448., -448.,   16.])
    """
    limit = torch.finfo(dtype).max
    return scaled.clamp(-limit, limit).to(dtype)


def quantize_tensor(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Quantized:
    """Quantize with one scale for the whole tensor.

    Args:
        x: Floating-point matrix.
        scale: FP32, 0-dim.
        dtype: FP8 dtype.
    """
    return Quantized(cast_scaled(x.detach().float() * scale, dtype), scale.reciprocal(), scale=scale)


def quantize_blocks(x: Tensor, block: tuple[int, int], dtype: torch.dtype, settings: QuantizationSettings) -> Quantized:
    """Quantize with one scale per block; blocks at the edges are smaller.

    Args:
        x: Floating-point matrix.
        block: Rows and columns of a block.
        dtype: FP8 dtype.
        settings: How scales are computed.
    """
    scale = scale_from_amax(_block_amax(x, block), dtype, settings, dtype_for_inf=x.dtype)
    spread = spread_blocks(scale, block, (x.shape[0], x.shape[1]))
    return Quantized(cast_scaled(x.detach().float() * spread, dtype), scale.reciprocal(), block, scale)


def _block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    rows, columns = x.shape
    magnitude = torch.nn.functional.pad(_magnitude(x), (0, -columns % block[1], 0, -rows % block[0]))
    blocks = magnitude.reshape(-(-rows // block[0]), block[0], -(-columns // block[1]), block[1])
    return blocks.amax(dim=(1, 3))
