"""Binary exponents of gradients against what each format can hold."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mp.formats import BF16, FP8_E4M3FN, FP8_E5M2, FP16, Format
from lightning_mp.metrics.figures import INK, RANGE_COLORS, new_axes
from lightning_mp.numerics import ExponentHistogram, exponent_histogram

__all__ = ["SHOWN_FORMATS", "GradientExponentHistogram", "range_below", "shown_exponents"]

SHOWN_FORMATS = (FP16, BF16, FP8_E4M3FN, FP8_E5M2)


class GradientExponentHistogram(Metric):
    """Count gradients by their binary exponent ``floor(log2(|g|))``.

    Counts add up over updates and over ranks. Under DDP every rank holds the same gradients after the
    reduction, so that a sum over ranks keeps the shares.

    Args:
        kwargs: Settings of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    References:
        Micikevicius et al., "Mixed Precision Training", ICLR 2018, figure 3 (arXiv:1710.03740).

    Example:
        >>> histogram = GradientExponentHistogram()
        >>> histogram.update(torch.tensor([1.0, 1.5, 0.25, 0.0]))
        >>> found = histogram.compute()
        >>> dict(zip(found["exponents"].tolist(), found["counts"].tolist()))[0], found["num_zeros"].item()
        (2, 1)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    counts: Tensor
    num_zeros: Tensor
    num_nonfinite: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        bins = torch.zeros(len(ExponentHistogram.exponents), dtype=torch.int64)
        self.add_state("counts", bins, dist_reduce_fx="sum")
        self.add_state("num_zeros", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_nonfinite", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, gradients: Tensor | Iterable[Tensor] | ExponentHistogram) -> None:
        """Count the elements of one or more floating-point tensors, which are not read on the host.

        Args:
            gradients: A tensor, several of them, or a histogram that was counted elsewhere.
        """
        if isinstance(gradients, ExponentHistogram):
            self._add(gradients)
            return
        for gradient in [gradients] if isinstance(gradients, Tensor) else gradients:
            self._add(exponent_histogram(gradient))

    def _add(self, found: ExponentHistogram) -> None:
        self.counts += found.counts.to(self.device)
        self.num_zeros += found.num_zeros.to(self.device)
        self.num_nonfinite += found.num_nonfinite.to(self.device)

    def compute(self) -> dict[str, Tensor]:
        """Return int64 tensors: ``exponents`` and ``counts`` of shape (277,), ``num_zeros``, ``num_nonfinite``."""
        return {
            "exponents": torch.tensor(ExponentHistogram.exponents, device=self.device),
            "counts": self.counts,
            "num_zeros": self.num_zeros,
            "num_nonfinite": self.num_nonfinite,
        }

    def plot(
        self, val: dict[str, Tensor] | None = None, ax: Any = None, *, loss_scale: float | None = None
    ) -> tuple[Any, Any]:
        """Draw the share of nonzero gradients per exponent over the ranges of FP16, BF16, E4M3FN and E5M2.

        Args:
            val: What ``compute`` returned; computed if ``None``.
            ax: Axes to draw into.
            loss_scale: Draws the lower end of FP16 at this loss scale too.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        figure, axes = new_axes(ax, size=(8.0, 5.0))
        found = self.compute() if val is None else val
        counts = dict(zip(found["exponents"].tolist(), found["counts"].tolist(), strict=True))
        total = sum(counts.values()) + int(found["num_nonfinite"])
        shown = shown_exponents(counts)
        # The picture shows one exponent more on each side, which the extremes do not have.
        shares = [100 * counts.get(e, 0) / max(total, 1) for e in shown]
        axes.bar([e + 0.5 for e in shown], shares, width=0.9, color=INK)
        _draw_ranges(axes, counts, shown, max([*shares, 1.0]), total)
        if loss_scale is not None and loss_scale != 1.0:
            _draw_scaled_floor(axes, loss_scale, shown)
        axes.set_xlim(shown[0], shown[-1] + 1)
        axes.set_xlabel("exponent of the gradient, floor(log2 |g|)")
        zeros = int(found["num_zeros"])
        left_out = f"\n({zeros:,} zeros left out)" if zeros else ""
        axes.set_ylabel(f"share of {total:,} nonzero gradients (%){left_out}")
        axes.grid(alpha=0.3, axis="y")
        return figure, axes


def shown_exponents(counts: dict[int, int]) -> range:
    """Return the exponents that a picture shows: those that occur and the whole range of FP16."""
    present = [e for e, count in counts.items() if count]
    low = min([*present, FP16.min_subnormal_exponent - 2])
    high = max([*present, FP16.max_exponent + 1])
    return range(low - 1, high + 2)


def range_below(counts: dict[int, int], known: Format) -> int:
    """Count the gradients with an exponent that ``known`` flushes to zero.

    A value rounds to zero at or below half the smallest subnormal, so the exponents below that one
    are lost; of the exponent itself only the power of two is, and it is not counted.
    """
    return sum(count for exponent, count in counts.items() if exponent < known.min_subnormal_exponent - 1)


def _draw_ranges(axes: Any, counts: dict[int, int], shown: range, top: float, total: int) -> None:
    """Draw one bar per format above the histogram, thin where numbers are subnormal."""
    for row, known in enumerate(SHOWN_FORMATS):
        color, height = RANGE_COLORS[known.name], top * (1.1 + 0.13 * row)
        normal = max(known.min_exponent, shown[0])
        lowest = max(known.min_subnormal_exponent, shown[0])
        highest = min(known.max_exponent, shown[-1]) + 1
        axes.plot([lowest, normal], [height] * 2, color=color, linewidth=2.5, solid_capstyle="butt")
        axes.plot([normal, highest], [height] * 2, color=color, linewidth=8, solid_capstyle="butt")
        lost = 100 * range_below(counts, known) / max(total, 1)
        text = f"{known.name} (thin: subnormal), {lost:.3g}% below"
        axes.annotate(
            text, ((max(lowest, shown[0]) + highest) / 2, height), xytext=(0, 5), textcoords="offset points",
            ha="center", va="bottom", fontsize=8,
        )  # fmt: skip
    axes.set_ylim(0, top * (1.15 + 0.13 * len(SHOWN_FORMATS)))


def _draw_scaled_floor(axes: Any, loss_scale: float, shown: range) -> None:
    floor = FP16.min_subnormal_exponent - math.log2(loss_scale)
    if floor > shown[0]:
        axes.axvline(floor, color=RANGE_COLORS["FP16"], linestyle="--", linewidth=1)
        axes.annotate(
            f"FP16 floor at loss scale {loss_scale:g}", (floor, 0), xytext=(4, 4), textcoords="offset points",
            fontsize=8, rotation=90, va="bottom",
        )  # fmt: skip
