"""Callback that shows at fit start which part of the model computes in what."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mp.callbacks.run_manifest import describe_coverage, describe_precision, is_fp8_run, read_manifest
from lightning_mp.precision.notices import notice
from lightning_mp.report.summary import (
    ManifestGroup,
    check_max_depth,
    describe_totals,
    find_misaligned,
    group_manifest,
    size_text,
)

__all__ = ["PrecisionSummary"]

_COLUMNS = ("module", "class", "parameters", "bytes", "stored in", "computes in", "master", "pinned", "FP8")
_UNBOUNDED = 10_000
_RIGHT = ("parameters", "bytes", "pinned", "FP8")


class PrecisionSummary(Callback):
    """Show the precision manifest as a table when ``fit`` starts, from rank zero.

    One row per module of the first ``max_depth`` levels: parameters and bytes, the dtypes they are stored in,
    those of matrix products and pinned modules, where the FP32 master weights live, how many modules
    inside are pinned to FP32 or run in FP8. Below it the totals, FP8 coverage with the reasons, and
    the dimensions of matrix products that tensor cores run below their full rate (no multiples of 8, of 16
    under FP8), with the padded size that mends it. Works with every precision plugin.

    Shown through ``rich`` where that is installed, else as text through Lightning's logger.

    Args:
        max_depth: Levels of modules that have rows of their own; 0 shows the totals only, -1 every module.

    Attributes:
        text: What was shown, as plain text.

    Raises:
        SettingTypeError: If ``max_depth`` is not an integer.
        SettingValueError: If ``max_depth`` is below -1.

    Example:
        >>> PrecisionSummary(max_depth=2).text
        ''
    """

    def __init__(self, max_depth: int = 1) -> None:
        check_max_depth(max_depth)
        self.max_depth = max_depth
        self.text = ""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        rows = read_manifest(trainer, pl_module)
        is_fp8 = is_fp8_run(trainer)
        misaligned = find_misaligned(pl_module, rows, is_fp8=is_fp8)
        totals = describe_totals(rows, misaligned, is_fp8=is_fp8, coverage=describe_coverage(trainer))
        groups = group_manifest(rows, pl_module, max_depth=self.max_depth) if self.max_depth else []
        title = ", ".join(f"{name}={value}" for name, value in describe_precision(trainer).items())
        cells = [_cells(group) for group in groups]
        self.text = "\n".join([title, *_as_text(cells), *totals])
        if not _show_rich(title, cells, totals):
            notice(f"PrecisionSummary\n{self.text}")


def _cells(group: ManifestGroup) -> list[str]:
    return [
        group.fqn or "(the model itself)",
        group.module_class,
        f"{group.num_params:,}",
        size_text(group.num_bytes),
        group.param_dtypes,
        group.compute_dtypes or "as its input",
        group.master,
        f"{group.num_pinned}/{group.num_modules}" if group.num_pinned else "",
        f"{group.num_fp8}/{group.num_modules}" if group.num_fp8 else "",
    ]


def _shown_columns(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the columns that hold anything."""
    return [index for index in range(len(_COLUMNS)) if any(row[index] for row in rows)]


def _as_text(rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    shown = _shown_columns(rows)
    table = [[_COLUMNS[i] for i in shown], *([row[i] for i in shown] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    aligned = [str.rjust if _COLUMNS[i] in _RIGHT else str.ljust for i in shown]
    return ["  ".join(f(c, w) for f, c, w in zip(aligned, row, widths, strict=True)).rstrip() for row in table]


def _show_rich(title: str, rows: Sequence[Sequence[str]], totals: Sequence[str]) -> bool:
    """Print the table; return whether rich is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    console: Any = Console(soft_wrap=True)
    console.print(Text(f"Precision: {title}", style="bold"))
    if rows:
        table = Table()
        shown = _shown_columns(rows)
        for index in shown:
            table.add_column(_COLUMNS[index], justify="right" if _COLUMNS[index] in _RIGHT else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(row[index]) for index in shown))
        # A log file counts as 80 columns, too few for numbers to be whole.
        console.width = max(console.width, Console(width=_UNBOUNDED).measure(table).maximum)
        console.print(table)
    for line in totals:
        console.print(Text(line))
    return True
