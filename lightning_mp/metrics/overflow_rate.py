"""The share of optimizer steps with non-finite gradients."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mp.metrics.figures import INK, new_axes

__all__ = ["OverflowRate"]


class OverflowRate(Metric):
    """Measure the share of optimizer steps whose gradients held Inf or NaN, in [0, 1].

    Over ranks the steps add up, so that the rate is their mean; without any step it is zero.

    Args:
        kwargs: Settings of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Example:
        >>> rate = OverflowRate()
        >>> for found_inf in (True, False, False, False):
        ...     rate.update(found_inf)
        >>> rate.compute()
        tensor(0.2500)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    num_overflows: Tensor
    num_attempts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("num_overflows", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_attempts", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, found_inf: bool | Tensor) -> None:
        """Count one step, or each element of a tensor.

        Args:
            found_inf: A bool, or a tensor of any shape and dtype (nonzero: yes), such as a scaler's
                ``found_inf``. It is not read on the host.
        """
        flags = torch.as_tensor(found_inf, device=self.device)
        self.num_overflows += flags.count_nonzero()
        self.num_attempts += flags.numel()

    def compute(self) -> Tensor:
        """Return the rate as an FP32 scalar."""
        return self.num_overflows.float() / self.num_attempts.clamp(min=1).float()

    def plot(self, val: Tensor | list[Tensor] | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw one value as a dot, or a list of them as a line.

        Args:
            val: What ``compute`` or ``forward`` returned, once or several times; computed if ``None``.
            ax: Axes to draw into.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        return plot_shares(self.compute() if val is None else val, ax, label="overflow rate")


def plot_shares(val: Tensor | list[Tensor], ax: Any, *, label: str) -> tuple[Any, Any]:
    """Draw values in [0, 1] in percent."""
    figure, axes = new_axes(ax, size=(6.0, 3.5))
    values = [100 * float(v) for v in (val if isinstance(val, list) else [val])]
    axes.plot(range(len(values)), values, color=INK, marker="o" if len(values) < 50 else None)
    axes.set_ylim(-2, 102)
    axes.set_ylabel(f"{label} (%)")
    axes.set_xlabel("value")
    axes.grid(alpha=0.3)
    if len(values) == 1:
        axes.set_xticks([])
        axes.set_xlabel("")
        axes.annotate(f"{values[0]:.3g} %", (0, values[0]), xytext=(8, 4), textcoords="offset points")
    return figure, axes
