"""The three products of a linear layer on FP8 values, on any device.

Operands are quantized with Transformer Engine's rules, and the products of the FP8 values are
accumulated in FP32::

    fprop   y  = q(x) @ q(w).T
    dgrad   dx = q(dy) @ q(w)
    wgrad   dw = q(dy).T @ q(x)

Results are rounded to the compute dtype, the bias is added before that. Formats and directions follow
Transformer Engine 2.12, pytorch/module/linear.py: operands are quantized from the dtype they arrive
in, blocks lie along the dimension that is summed over, and ``x`` and ``dy`` are quantized once per
direction from high precision, never from each other's result.

The casts saturate, so that an infinity would come out as an ordinary number and its step be applied.
Results are therefore NaN wherever the products of the operands themselves would not be finite.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lightning_mp.fp8.delayed import DelayedState
from lightning_mp.fp8.layer import LayerBackend, LayerSettings, version_of
from lightning_mp.fp8.quantize import (
    BLOCK_SIZE,
    Quantized,
    amax_of,
    quantize_blocks,
    quantize_tensor,
    scale_from_amax,
)
from lightning_mp.fp8.recipes import BlockScaling, CurrentScaling, DelayedScaling, Operand, operand_dtype
from lightning_mp.fp8.statistics import measure_cast, worse_of

__all__ = ["EmulatedBackend", "is_same", "product"]


@dataclass(frozen=True, eq=False)
class _BothWays:
    """One operand for the product along its rows and for the one along its columns.

    Args:
        rowwise: For the product that sums over columns.
        columnwise: For the product that sums over rows.
        spoiled_rows: FP32, NaN for each row that holds Inf or NaN before the cast, else -0.0.
        spoiled_columns: The same for columns.
    """

    rowwise: Quantized
    columnwise: Quantized
    spoiled_rows: Tensor
    spoiled_columns: Tensor


@dataclass(eq=False)
class _CachedWeight:
    source: Tensor
    version: int | None
    quantized: _BothWays
    is_recorded: bool
    """Whether its amax counts for delayed scaling; evaluation casts without."""
    is_measured: bool
    """Whether its statistics were kept."""


class EmulatedBackend(LayerBackend):
    """FP8 products of one layer, computed with the emulated recipe.

    Args:
        settings: What the layers of an engine share.
        recipe: How scales are chosen.
    """

    def __init__(self, settings: LayerSettings, recipe: CurrentScaling | DelayedScaling | BlockScaling) -> None:
        super().__init__(settings)
        self.recipe = recipe
        self.delayed = DelayedState(recipe) if isinstance(recipe, DelayedScaling) else None
        self._cached: _CachedWeight | None = None

    def forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Return what the layer makes of ``x`` of shape ``(..., in_features)``."""
        rows = x.reshape(-1, x.shape[-1])
        y = _Products.apply(rows, layer.weight, layer.bias, self, layer.training)  # type: ignore[no-untyped-call]
        return y.reshape(*x.shape[:-1], layer.out_features)  # type: ignore[no-any-return]

    def quantize(self, x: Tensor, operand: Operand, *, is_recorded: bool) -> _BothWays:
        """Quantize one operand; ``is_recorded``: its amax counts for delayed scaling."""
        dtype = operand_dtype(self.recipe.fp8_format, operand)
        if isinstance(self.recipe, BlockScaling):
            both = _quantize_blockwise(x, self.recipe, operand, dtype)
        else:
            both = (quantize_tensor(x, self._scale(x, operand, dtype), dtype),) * 2
        quantized = _BothWays(*both, *_spoilers(x))
        if is_recorded:
            self._record(x, operand)
        if self._is_measured():
            self._measure(x, operand, quantized)
        return quantized

    def _scale(self, x: Tensor, operand: Operand, dtype: torch.dtype) -> Tensor:
        if isinstance(self.recipe, CurrentScaling):
            return scale_from_amax(amax_of(x), dtype, self.recipe.quantization(operand))
        if self.delayed is None:
            raise TypeError(f"no scale rule for {self.recipe!r}")
        return self.delayed.scale_of(operand, x.device)

    def _record(self, x: Tensor, operand: Operand) -> None:
        if self.delayed is not None:
            self.delayed.record(operand, amax_of(x))
            self.settings.step.has_amax = True

    def _is_measured(self) -> bool:
        return not torch.compiler.is_compiling() and self.settings.step.collects

    def _measure(self, x: Tensor, operand: Operand, quantized: _BothWays) -> None:
        self.measured[operand] = worse_of(self.measured.get(operand), measure_cast(x, quantized.rowwise))

    def quantize_weight(self, weight: Tensor, *, is_recorded: bool) -> _BothWays:
        """Quantize the weight, or return what it was quantized to if not a bit of it has changed since.

        The bits are compared, not a version counter alone: ``weight.data`` is a common way to write a
        weight, and it leaves the counter as it was.
        """
        if torch.compiler.is_compiling() or not self.settings.cache_weights:
            self._count_cast()
            return self.quantize(self._values_of(weight), "weight", is_recorded=is_recorded)
        # What evaluation casts in inference mode must serve a later training step too.
        with torch.inference_mode(False), torch.no_grad():
            if self._cached is None or not self._is_of(self._cached, weight):
                self._count_cast()
                quantized = self.quantize(self._values_of(weight), "weight", is_recorded=is_recorded)
                source, version = weight.detach().clone(), version_of(weight)
                self._cached = _CachedWeight(source, version, quantized, is_recorded, self._is_measured())
            elif is_recorded and not self._cached.is_recorded:
                self._record(self._values_of(weight), "weight")
                self._cached.is_recorded = True
            if self._is_measured() and not self._cached.is_measured:
                self._measure(self._values_of(weight), "weight", self._cached.quantized)
                self._cached.is_measured = True
        return self._cached.quantized

    def _is_of(self, cached: _CachedWeight, weight: Tensor) -> bool:
        # A write of the same bits may have come with another master, as a load does.
        is_written = self.settings.step.weight_source is not None and cached.version != version_of(weight)
        return is_same(cached.source, weight) and not is_written

    def _values_of(self, weight: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            if self.weight_key is None:
                return weight
            # By its registered name: what defines it is loaded with the first engine that has masters.
            values: Tensor = torch.ops.lightning_mp.weight_values(weight, self.weight_key)
            return values
        return self.values_of(weight)

    def _count_cast(self) -> None:
        if not torch.compiler.is_compiling():
            self.weight_casts += 1

    def invalidate_weight(self) -> None:
        self._cached = None

    def end_step(self, *, has_amax: bool) -> None:
        if self.delayed is not None and has_amax:
            self.delayed.update()
        # Masters change below what the weight's own bits show, and delayed scales change by themselves.
        if (self.delayed is not None and has_amax) or self.settings.step.weight_source is not None:
            self._cached = None


def is_same(cached: Tensor, weight: Tensor) -> bool:
    """Tell whether two tensors have the same dtype, shape, device and bits; a NaN equals itself."""
    if cached.shape != weight.shape or cached.dtype != weight.dtype or cached.device != weight.device:
        return False
    bits = torch.int32 if weight.dtype is torch.float32 else torch.int16
    return torch.equal(cached.detach().contiguous().view(bits), weight.detach().contiguous().view(bits))


def _quantize_blockwise(
    x: Tensor, recipe: BlockScaling, operand: Operand, dtype: torch.dtype
) -> tuple[Quantized, Quantized]:
    settings = recipe.quantization(operand)
    if recipe.block_dim(operand) == 2:
        square = quantize_blocks(x, (BLOCK_SIZE, BLOCK_SIZE), dtype, settings)
        return square, square
    return quantize_blocks(x, (1, BLOCK_SIZE), dtype, settings), quantize_blocks(x, (BLOCK_SIZE, 1), dtype, settings)


def product(
    first: Quantized, second: Quantized, *, transpose_first: bool = False, transpose_second: bool = False
) -> Tensor:
    """Return the matrix product of two quantized matrices, accumulated in FP32."""
    (a, a_factor), (b, b_factor) = first.factored(0 if transpose_first else 1), second.factored(int(transpose_second))
    result = (a.t() if transpose_first else a) @ (b.t() if transpose_second else b)
    if a_factor.dim() == 0 and b_factor.dim() == 0:
        # cuBLASLt: D = alpha * scaleA * scaleB * (A @ B). One after the other a large amax would overflow FP32.
        return result * (a_factor * b_factor)
    # Both at least 1: one after the other overflows only where the result does.
    return result * a_factor.unsqueeze(-1) * b_factor


def _spoilers(x: Tensor) -> list[Tensor]:
    """Return what to add to a product for the rows of ``x`` and for its columns; no number changes by adding -0.0."""
    if x.numel() == 0:
        return [torch.full((size,), -0.0, device=x.device) for size in x.shape]
    magnitude = x.detach().abs()
    return [torch.where(torch.isfinite(magnitude.amax(other)), -0.0, torch.nan) for other in (1, 0)]


def _spoil(result: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the result of a product with NaN where that of the operands themselves would not be finite."""
    return result + rows[:, None] + columns


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, backend: EmulatedBackend, is_recorded: bool
    ) -> Tensor:
        dtype = backend.settings.compute_dtype
        # Autocast would round the product's operands and result to 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            q_x = backend.quantize(x, "input", is_recorded=is_recorded)
            q_w = backend.quantize_weight(weight, is_recorded=is_recorded)
            y = product(q_x.rowwise, q_w.rowwise, transpose_second=True)
            y = _spoil(y, q_x.spoiled_rows, q_w.spoiled_rows)
            if bias is not None:
                y = y + bias.to(dtype).float()
        saved_x, saved_w = q_x.columnwise, q_w.columnwise
        ctx.save_for_backward(
            saved_x.data, saved_x.scale_inv, q_x.spoiled_columns, saved_w.data, saved_w.scale_inv, q_w.spoiled_columns
        )
        ctx.blocks = (saved_x.block, saved_w.block)  # type: ignore[attr-defined]
        ctx.backend, ctx.is_recorded, ctx.x_dtype = backend, is_recorded, x.dtype  # type: ignore[attr-defined]
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_data, x_scale_inv, spoiled_x, w_data, w_scale_inv, spoiled_w = ctx.saved_tensors
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        dtype = ctx.backend.settings.compute_dtype
        dx = dw = None
        with torch.autocast(grad.device.type, enabled=False):
            if needs_x or needs_w:
                q_grad = ctx.backend.quantize(grad, "grad", is_recorded=ctx.is_recorded)
            if needs_x:
                dx = product(q_grad.rowwise, Quantized(w_data, w_scale_inv, ctx.blocks[1]))
                dx = _spoil(dx, q_grad.spoiled_rows, spoiled_w).to(dtype).to(ctx.x_dtype)
            if needs_w:
                q_x = Quantized(x_data, x_scale_inv, ctx.blocks[0])
                dw = product(q_grad.columnwise, q_x, transpose_first=True)
                dw = _spoil(dw, q_grad.spoiled_columns, spoiled_x).to(dtype)
            dbias = grad.float().sum(0).to(dtype) if needs_bias else None
        return dx, dw, dbias, None, None
