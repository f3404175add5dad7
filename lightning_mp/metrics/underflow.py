"""The share of values that a cast flushes to zero."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mp.formats import format_of
from lightning_mp.metrics.overflow_rate import plot_shares
from lightning_mp.numerics import amax

__all__ = ["UnderflowFraction"]


class UnderflowFraction(Metric):
    """Measure the share of nonzero values that a cast to ``dtype`` flushes to zero, in [0, 1].

    It is ``numerics.underflow_fraction`` over many tensors: elements are counted, so that a large tensor
    weighs more than a small one, over updates and over ranks. Without nonzero values it is zero.

    Several of them, of different dtypes, stay apart in one ``torchmetrics.MetricCollection``.

    Args:
        dtype: Floating dtype to cast to, such as ``torch.float16``.
        kwargs: Settings of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        SettingTypeError: If ``dtype`` is not a dtype, or ``update`` gets no dense floating-point tensor.
        SettingValueError: If ``dtype`` is none of ``formats.FORMATS``.

    References:
        Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2 (arXiv:1710.03740).

    Example:
        >>> lost = UnderflowFraction(torch.float16)
        >>> lost.update(torch.tensor([2.0**-26, 1.0]))
        >>> lost.update(torch.tensor([0.0, 1.0, 2.0]))
        >>> lost.compute()
        tensor(0.2500)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    num_nonzero: Tensor

    def __init__(self, dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.target = format_of(dtype)
        # A MetricCollection makes one metric of those whose states have equal names and values.
        self._flushed_state = f"num_flushed_{str(dtype).removeprefix('torch.')}"
        self.add_state(self._flushed_state, torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_nonzero", torch.tensor(0), dist_reduce_fx="sum")

    @property
    def num_flushed(self) -> Tensor:
        """Nonzero values so far that the cast flushes to zero, an int64 scalar."""
        counted: Tensor = getattr(self, self._flushed_state)
        return counted

    @num_flushed.setter
    def num_flushed(self, value: Tensor) -> None:
        setattr(self, self._flushed_state, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The name of this state before it carried the dtype.
        if f"{prefix}num_flushed" in state_dict:
            state_dict[prefix + self._flushed_state] = state_dict.pop(f"{prefix}num_flushed")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def update(self, x: Tensor) -> None:
        """Count the elements of ``x``, a floating-point tensor of any shape; it is not read on the host."""
        amax(x)  # refuses what is not a dense floating-point tensor
        wide = x.detach() if x.dtype is torch.float64 else x.detach().float()
        magnitude = wide.abs()
        # Round to nearest even: the tie halfway to the smallest subnormal goes to zero.
        flushed = (magnitude != 0) & (magnitude <= self.target.smallest_subnormal / 2)
        self.num_flushed += flushed.sum()
        self.num_nonzero += magnitude.count_nonzero()

    def compute(self) -> Tensor:
        """Return the share as an FP32 scalar."""
        return self.num_flushed.float() / self.num_nonzero.clamp(min=1).float()

    def plot(self, val: Tensor | list[Tensor] | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw one value as a dot, or a list of them as a line.

        Args:
            val: What ``compute`` or ``forward`` returned, once or several times; computed if ``None``.
            ax: Axes to draw into.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        return plot_shares(self.compute() if val is None else val, ax, label=f"flushed to zero in {self.target.name}")
