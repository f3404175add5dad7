"""The region a training step runs in."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

__all__ = ["TrainStepRegion"]


class TrainStepRegion:
    """Enter the autocast region, and tell when the step's batch is over.

    A plain class rather than a generator: entering and leaving cost a tenth.
    """

    __slots__ = ("_autocast", "_on_enter", "_on_exit")

    def __init__(
        self,
        autocast: AbstractContextManager[Any] | None,
        on_enter: Callable[[], None],
        on_exit: Callable[[bool], None],
    ) -> None:
        self._autocast = autocast
        self._on_enter = on_enter
        self._on_exit = on_exit

    def __enter__(self) -> None:
        self._on_enter()
        if self._autocast is not None:
            self._autocast.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._autocast is not None:
            self._autocast.__exit__(kind, error, trace)
        self._on_exit(error is None)
