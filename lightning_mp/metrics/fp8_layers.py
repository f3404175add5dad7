"""What FP8 does to each layer over a run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mp.errors import SettingValueError
from lightning_mp.metrics.figures import new_axes
from lightning_mp.metrics.rows import RowsMetric

__all__ = ["FP8LayerStats"]

_VALUES = ("amax", "scale", "saturated", "flushed", "sqnr_db")
# Over ranks: the largest magnitude counts; shares and decibels are averaged.
_REDUCTION = dict.fromkeys(_VALUES, "mean") | {"amax": "amax"}


class FP8LayerStats(RowsMetric):
    """Collect amax, scale, saturation, flush to zero and SQNR of each FP8 layer's operands.

    Ranks see different batches: after a sync a place holds the largest ``amax`` and the mean of the
    other values over ranks.

    Args:
        fqns: Full dotted names of the layers, in the order that pictures show them.
        operands: Names of the operands.
        kwargs: Settings of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Example:
        >>> stats = FP8LayerStats(["mlp.0", "mlp.2"])
        >>> stats.update(100, "mlp.2", "input", amax=3.0, scale=149.3, saturated=0.0, flushed=0.25, sqnr_db=31.0)
        >>> stats.compute()["flushed"].shape, stats.compute()["flushed"][1, 0, 0].item()
        (torch.Size([2, 3, 1]), 0.25)
    """

    row_dtypes = {  # noqa: RUF012
        "step": torch.int64,
        "layer": torch.int64,
        "operand": torch.int64,
        **dict.fromkeys(_VALUES, torch.float32),
    }

    def __init__(
        self, fqns: Sequence[str], operands: Sequence[str] = ("input", "weight", "grad"), **kwargs: Any
    ) -> None:
        # Rows hold indices into both.
        super().__init__(settings=(list(fqns), list(operands)), **kwargs)
        self.fqns = list(fqns)
        self.operands = list(operands)

    def update(
        self,
        step: int,
        fqn: str,
        operand: str,
        *,
        amax: float | Tensor,
        scale: float | Tensor,
        saturated: float | Tensor,
        flushed: float | Tensor,
        sqnr_db: float | Tensor,
    ) -> None:
        """Add what one operand of one layer showed at one step; tensors are not read on the host.

        Raises:
            SettingValueError: If the layer or the operand is not known.
        """
        values = {"amax": amax, "scale": scale, "saturated": saturated, "flushed": flushed, "sqnr_db": sqnr_db}
        layer = _index("fqn", fqn, self.fqns)
        self.add_rows(step=step, layer=layer, operand=_index("operand", operand, self.operands), **values)

    def compute(self) -> dict[str, Tensor]:
        """Return ``step`` of shape (steps,), and per value a tensor of shape (layers, operands, steps).

        Places without a value hold NaN.
        """
        rows = self.rows()
        steps, column = torch.unique(rows["step"], return_inverse=True)
        shape = (len(self.fqns), len(self.operands), len(steps))
        place = (rows["layer"] * shape[1] + rows["operand"]) * shape[2] + column
        grids = {}
        for name in _VALUES:
            flat = torch.full((shape[0] * shape[1] * shape[2],), torch.nan, device=place.device)
            grid = flat.scatter_reduce(0, place, rows[name], _REDUCTION[name], include_self=False)
            grids[name] = grid.reshape(shape)
        return {"step": steps, **grids}

    def plot(
        self,
        val: dict[str, Tensor] | None = None,
        ax: Any = None,
        *,
        field: str = "flushed",
        operand: str | None = None,
    ) -> tuple[Any, Any]:
        """Draw a heat map of layers by steps.

        Args:
            val: What ``compute`` returned; computed if ``None``.
            ax: Axes to draw into.
            field: ``"amax"``, ``"scale"``, ``"saturated"``, ``"flushed"`` or ``"sqnr_db"``.
            operand: One of the operands; ``None`` shows the worst of them (the least ``sqnr_db``, else the
                largest value).

        Raises:
            ImportError: If matplotlib is not installed.
            SettingValueError: If the field or the operand is not known.
        """
        _index("field", field, _VALUES)
        found = self.compute() if val is None else val
        steps = found["step"].reshape(-1).tolist()
        grid = found[field].reshape(len(self.fqns), len(self.operands), len(steps)).cpu()
        if operand is None:
            shown = _worst(grid, least=field == "sqnr_db")
        else:
            shown = grid[:, _index("operand", operand, self.operands)]
        figure, axes = new_axes(ax, size=(8.0, 1.6 + 0.28 * len(self.fqns)))
        colors = "viridis" if field == "sqnr_db" else "viridis_r"
        limits = {"vmin": 0.0, "vmax": 1.0} if field in ("saturated", "flushed") else {}
        image = axes.imshow(shown.numpy(), aspect="auto", interpolation="nearest", cmap=colors, **limits)
        axes.set_yticks(range(len(self.fqns)), self.fqns, fontsize=8)
        ticks = range(0, len(steps), max(1, len(steps) // 8))
        axes.set_xticks(list(ticks), [str(steps[tick]) for tick in ticks])
        axes.set_xlabel("step")
        figure.colorbar(image, ax=axes, label=f"{field} ({operand or 'worst operand'})")
        return figure, axes


def _index(argument: str, name: str, known: Sequence[str]) -> int:
    if name not in known:
        raise SettingValueError(f"{argument}={name!r} is not known. Known: {', '.join(known)}.")
    return list(known).index(name)


def _worst(grid: Tensor, *, least: bool) -> Tensor:
    fill = torch.inf if least else -torch.inf
    filled = torch.where(grid.isnan(), fill, grid)
    reduced = filled.amin(1) if least else filled.amax(1)
    return torch.where(grid.isnan().all(1), torch.nan, reduced)
