"""Measures the casts that Transformer Engine makes itself, without casting a second time.

Facts from Transformer Engine 2.12 (pytorch/quantized_tensor.py, pytorch/module/linear.py): a quantizer
casts in its method ``quantize_impl``; a weight that is cached is cast into the tensor that the module
keeps under ``_fp8_workspaces["weight"]``, without that method; with one scale per tensor the cast of
the output gradient of a layer with a bias is one kernel with the bias's gradient, without it as well.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_mp.fp8.delayed import OPERANDS
from lightning_mp.fp8.quantize import amax_of
from lightning_mp.fp8.recipes import FP8Recipe, Operand, PassThroughRecipe, operand_dtype
from lightning_mp.fp8.statistics import ROUNDING
from lightning_mp.numerics import sqnr_db

__all__ = ["CastWatch", "measure_library_cast", "watch_casts"]


def measure_library_cast(x: Tensor, cast: Any, dtype: torch.dtype) -> Tensor:
    """Return what ``measure_cast`` returns for a tensor of the library.

    Args:
        x: Matrix before the cast.
        cast: What the library's quantizer made of it.
        dtype: The FP8 dtype of ``cast``.
    """
    values = cast.dequantize(dtype=torch.float32).reshape(x.shape)
    amax = amax_of(x)
    is_blockwise = not hasattr(cast, "_scale_inv")
    if is_blockwise:
        # The largest power of two that keeps the largest block in range; the scales that the library keeps
        # have padding whose values mean nothing.
        scale = torch.ldexp(torch.ones_like(amax), torch.frexp(torch.finfo(dtype).max / amax).exponent - 1)
    else:
        scale = cast._scale_inv.reshape(()).reciprocal()
    x = x.detach().float()
    magnitude = x.abs()
    num_nonzero = (magnitude > 0).sum().clamp(min=1)
    flushed = ((values == 0) & (magnitude > 0)).sum() / num_nonzero
    # The scale of a block comes from its own amax, so that nothing in it saturates.
    is_beyond = magnitude * scale > torch.finfo(dtype).max * ROUNDING
    saturated = torch.zeros_like(flushed) if is_blockwise else is_beyond.sum() / num_nonzero
    return torch.stack([v.float() for v in (amax, scale, saturated, flushed, sqnr_db(x, values))])


class CastWatch:
    """Measures every cast of one quantizer of the library until ``stop``.

    Args:
        quantizer: Of this one object the method ``quantize_impl`` is shadowed.
        operand: What it casts.
        dtype: The FP8 dtype that it casts to.
        found: Told of each measurement.
    """

    def __init__(
        self, quantizer: Any, operand: Operand, dtype: torch.dtype, found: Callable[[Operand, Tensor], None]
    ) -> None:
        self.operand = operand
        self._quantizer = quantizer
        cast = quantizer.quantize_impl

        def quantize_impl(x: Tensor) -> Any:
            result = cast(x)
            with torch.no_grad():
                found(operand, measure_library_cast(x.reshape(-1, x.shape[-1]), result, dtype))
            return result

        quantizer.quantize_impl = quantize_impl

    def stop(self) -> None:
        """Leave the quantizer as it was."""
        vars(self._quantizer).pop("quantize_impl", None)


def watch_casts(
    engine: Any, recipe: FP8Recipe, operands: Iterable[Operand], found: Callable[[Operand, Tensor], None]
) -> list[CastWatch]:
    """Watch the quantizers of one ``te.Linear``.

    None under a recipe whose numbers only the library knows, and where a version of it has none.
    """
    if isinstance(recipe, PassThroughRecipe) or not hasattr(engine, "quantizers"):
        return []
    engine.init_fp8_metadata(num_gemms=1)
    quantizers = (*engine.quantizers["scaling_fwd"][:2], engine.quantizers["scaling_bwd"][0])
    by_operand = dict(zip(OPERANDS, quantizers, strict=True))
    return [CastWatch(by_operand[o], o, operand_dtype(recipe.fp8_format, o), found) for o in operands]
