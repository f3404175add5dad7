"""What the pictures share: matplotlib on demand, and colors that stay apart for every eye."""

from pathlib import Path
from typing import Any

__all__ = ["CONCERN_COLOR", "HEALTH_COLORS", "INK", "MARK", "RANGE_COLORS", "has_matplotlib", "new_axes", "save_figure"]

# Okabe and Ito's palette ("Color Universal Design", 2008).
INK = "#0072b2"
MARK = "#d55e00"
CONCERN_COLOR = "#e69f00"
HEALTH_COLORS: dict[str, str] = {
    "collapsing": "#d55e00",
    "stuck": "#cc79a7",
    "thrashing": "#e69f00",
    "calibrating": "#999999",
    "healthy": "#009e73",
}
RANGE_COLORS = {"FP16": "#d55e00", "BF16": "#009e73", "FP8 E4M3FN": "#cc79a7", "FP8 E5M2": "#e69f00"}


def has_matplotlib() -> bool:
    """Tell whether pictures can be drawn here."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def new_axes(ax: Any = None, *, size: tuple[float, float] = (8.0, 4.0)) -> tuple[Any, Any]:
    """Return a figure and its axes: those of ``ax``, or new ones that no window manager knows.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib. Install it: pip install 'lightning-mp[plot]'") from error
    if ax is not None:
        return ax.get_figure(), ax
    # Not from pyplot, which would keep every figure alive and choose a backend with a window.
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, readable on a screen and on paper."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
