"""Drawing what a monitor saw at the end of a run."""

from pathlib import Path
from typing import Any

from lightning_mp.metrics.figures import has_matplotlib, save_figure
from lightning_mp.precision.notices import notice, notice_once

__all__ = ["save_picture"]


def save_picture(metric: Any, path: Path, *, owner: str, **settings: Any) -> None:
    """Write ``metric.plot(**settings)`` as PNG; say why there is none without matplotlib, or where that fails.

    Args:
        metric: A metric with ``plot``.
        path: The file to write.
        owner: Name of the callback, for the message.
        settings: Keyword arguments of ``plot``.
    """
    if not has_matplotlib():
        notice_once(f"{owner}: no picture without matplotlib. Install it: pip install 'lightning-mp[plot]'.")
        return
    try:
        figure, _ = metric.plot(**settings)
        save_figure(figure, path)
    # The training is done: neither it nor what other callbacks still write is worth less for a picture.
    except Exception as error:
        notice(f"{owner}: {path.name} was not drawn: {type(error).__name__}: {error}")
