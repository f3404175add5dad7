"""A metric whose state is a table that grows by rows."""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["RowsMetric"]


class RowsMetric(Metric):
    """Base of metrics that keep rows: one list of 1-dim tensors per column, concatenated over ranks.

    Args:
        settings: What the meaning of rows depends on; metrics that differ in it do not share their states.
        kwargs: Settings of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    row_dtypes: ClassVar[Mapping[str, torch.dtype]] = {}

    def __init__(self, *, settings: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A MetricCollection makes one metric of those whose states have equal names and values.
        self._suffix = "_rows" if settings is None else f"_rows_{sha256(repr(settings).encode()).hexdigest()[:16]}"
        for name in self.row_dtypes:
            self.add_state(name + self._suffix, [], dist_reduce_fx="cat")

    def add_rows(self, **columns: Any) -> None:
        """Append values, scalars or sequences of one length, to every column."""
        for name, dtype in self.row_dtypes.items():
            values = torch.as_tensor(columns[name], dtype=dtype, device=self.device).reshape(-1)
            getattr(self, name + self._suffix).append(values)

    def rows(self) -> dict[str, Tensor]:
        """Return each column as one 1-dim tensor."""
        return {name: self._column(name) for name in self.row_dtypes}

    def _column(self, name: str) -> Tensor:
        rows = getattr(self, name + self._suffix)
        if isinstance(rows, Tensor):  # after a sync
            return rows
        return torch.cat(rows) if rows else torch.zeros(0, dtype=self.row_dtypes[name], device=self.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The names of states before they carried the settings.
        for name in self.row_dtypes:
            if f"{prefix}{name}_rows" in state_dict:
                state_dict[prefix + name + self._suffix] = state_dict.pop(f"{prefix}{name}_rows")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # torchmetrics 1.9 stands in FP32 for a rank without rows, which ranks with int64 cannot gather.
        for name in self.row_dtypes:
            setattr(self, name + self._suffix, [self._column(name)])
        super()._sync_dist(*args, **kwargs)
