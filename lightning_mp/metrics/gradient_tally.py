"""Counting what FP16 loses of gradients, on their device, with one read at the end."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mp.formats import FP16
from lightning_mp.loss_scale import DynamicLossScale
from lightning_mp.numerics import exponent_histogram

__all__ = ["DeviceTally", "GradientTally", "read_tallies", "suggest_scale", "tally_gradients", "total_tally"]

# Gradients are measured joined to pieces of this many elements: 16 MB in FP32.
_PIECE_ELEMENTS = 2**22


@dataclass(frozen=True, eq=False)
class DeviceTally:
    """Counts that are still on the device.

    Args:
        counts: int64 of shape (281,): the histogram, then the further counts of ``GradientTally`` in order.
        amax: FP32 scalar, the largest finite magnitude.
    """

    counts: Tensor
    amax: Tensor


@dataclass(frozen=True)
class GradientTally:
    """Counts of gradients, read from the device.

    Args:
        histogram: Elements by exponent, in the order of ``ExponentHistogram.exponents``.
        num_nonfinite: Elements that are Inf or NaN.
        num_flushed_unscaled: Nonzero elements that FP16 flushes to zero.
        num_flushed: The same after multiplication by the loss scale.
        num_saturated: Elements beyond the maximum of FP16 after multiplication by the loss scale.
        amax: Largest finite magnitude.
    """

    histogram: list[int]
    num_nonfinite: int
    num_flushed_unscaled: int
    num_flushed: int
    num_saturated: int
    amax: float

    @property
    def num_nonzero(self) -> int:
        """Elements that are not zero, Inf and NaN included."""
        return sum(self.histogram) + self.num_nonfinite


def tally_gradients(
    gradients: Iterable[Tensor], device: torch.device, *, loss_scale: float, factor: float = 1.0
) -> DeviceTally:
    """Count on the device of the gradients; nothing is read, nothing is changed.

    Args:
        gradients: Tensors of any floating-point or complex dtype, dense or sparse. Of a ``DTensor`` the part of this
            rank is counted.
        device: Where the counts are to lie.
        loss_scale: The loss scale for ``num_flushed`` and ``num_saturated``.
        factor: What gradients are to be multiplied by before they count.
    """
    # The empty piece stands for a rank without gradients.
    pieces = chain(_pieces(gradients), [torch.zeros(0, dtype=torch.float32, device=device)])
    parts = [_tally_piece(piece if factor == 1.0 else piece * factor, loss_scale) for piece in pieces]
    counts = torch.stack([part.counts.to(device) for part in parts]).sum(0)
    return DeviceTally(counts, torch.stack([part.amax.to(device) for part in parts]).amax())


def _pieces(gradients: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield flat tensors of FP32, or FP64 where gradients are, small ones joined."""
    waiting: list[Tensor] = []
    size = 0
    for gradient in gradients:
        flat = _flat(gradient)
        if waiting and (size + flat.numel() > _PIECE_ELEMENTS or flat.device != waiting[0].device):
            yield torch.cat(waiting)
            waiting, size = [], 0
        waiting.append(flat)
        size += flat.numel()
    if waiting:
        yield torch.cat(waiting)


def _flat(gradient: Tensor) -> Tensor:
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    dense = local.coalesce().values() if local.is_sparse else local
    real = torch.view_as_real(dense) if dense.is_complex() else dense
    # FP64 is left as it is: cast, its small values would be zeros and its large ones infinities.
    wide = real if real.dtype is torch.float64 else real.float()
    return wide.detach().reshape(-1)


def _tally_piece(piece: Tensor, loss_scale: float) -> DeviceTally:
    found = exponent_histogram(piece)
    magnitude = piece.abs()
    nonzero = magnitude != 0
    # Round to nearest even: the tie halfway to the smallest subnormal goes to zero.
    half = FP16.smallest_subnormal / 2
    further = torch.stack(
        [
            found.num_nonfinite,
            (nonzero & (magnitude <= half)).sum(),
            (nonzero & (magnitude <= half / loss_scale)).sum(),
            (magnitude > FP16.max / loss_scale).sum(),
        ]
    )
    finite = torch.where(magnitude.isfinite(), magnitude, 0.0)
    amax = finite.amax() if piece.numel() else piece.new_zeros(())
    return DeviceTally(torch.cat([found.counts, further]), amax)


def read_tallies(tallies: Mapping[str, DeviceTally], *, is_sharded: bool) -> dict[str, GradientTally]:
    """Wait for the device, twice for all tallies together, and return them as numbers.

    Args:
        tallies: What was counted, by name; the same names on every rank if sharded.
        is_sharded: Whether ranks hold different gradients, so that the counts of all ranks add up.
    """
    device = next(iter(tallies.values())).counts.device
    counts = torch.stack([tally.counts.to(device) for tally in tallies.values()])
    amaxes = torch.stack([tally.amax.to(device) for tally in tallies.values()])
    if is_sharded and dist.is_initialized():
        # One dtype on all ranks, also on one that holds no FP64 gradient.
        amaxes = amaxes.double()
        dist.all_reduce(counts)
        dist.all_reduce(amaxes, op=dist.ReduceOp.MAX)
    rows = zip(tallies, counts.tolist(), amaxes.tolist(), strict=True)
    return {name: _as_numbers(row, amax) for name, row, amax in rows}


def _as_numbers(row: list[int], amax: float) -> GradientTally:
    *histogram, num_nonfinite, num_flushed_unscaled, num_flushed, num_saturated = row
    return GradientTally(histogram, num_nonfinite, num_flushed_unscaled, num_flushed, num_saturated, amax)


def total_tally(tallies: Iterable[GradientTally]) -> GradientTally:
    """Add up the tallies of one or more groups."""
    parts = list(tallies)
    return GradientTally(
        histogram=[sum(column) for column in zip(*(part.histogram for part in parts), strict=True)],
        num_nonfinite=sum(part.num_nonfinite for part in parts),
        num_flushed_unscaled=sum(part.num_flushed_unscaled for part in parts),
        num_flushed=sum(part.num_flushed for part in parts),
        num_saturated=sum(part.num_saturated for part in parts),
        amax=max(part.amax for part in parts),
    )


def suggest_scale(amax: float) -> float | None:
    """Return the largest power of two that leaves ``amax`` a factor of 2 to 4 below the maximum of FP16.

    The factor is for steps with larger gradients than the measured one.

    Args:
        amax: Largest finite magnitude of the unscaled gradients.

    Returns:
        The scale, at most ``DynamicLossScale().max_scale``; ``None`` if ``amax`` is zero.

    Example:
        >>> suggest_scale(1.0), suggest_scale(0.0)
        (16384.0, None)
    """
    if amax == 0:
        return None
    # frexp writes x as m * 2**e with m in [0.5, 1): e - 1 is floor(log2(x)).
    exponent = math.frexp(FP16.max / amax)[1] - 1
    return min(DynamicLossScale().max_scale, math.ldexp(1.0, exponent - 1))
