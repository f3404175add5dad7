"""Ranks that replay a batch together: a collective inside it takes place on all of them or on none."""

from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["RanksPartedError", "Together"]

_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd"})
_NO_COLLECTIVES = frozenset({"_c10d_functional::wait_tensor", "_c10d_functional_autograd::wait_tensor"})


class RanksPartedError(RuntimeError):
    """A replay came to a collective while that of another rank had ended."""


class Together:
    """Keeps the ranks at the same place while the block runs, in which each computes a batch of its own.

    A replay may raise on one rank only, and the collectives of a ``training_step`` (``all_gather``,
    synchronized batch norm) would then meet other calls on the other ranks, which ends the process. So
    before each collective, and at the end of the block, the ranks exchange where they stand. If some have
    ended while others are at a collective, those raise instead. One process needs and does nothing.
    """

    def __init__(self) -> None:
        is_distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._watch = _WatchCollectives(self) if is_distributed else None
        self._has_parted = False

    def __enter__(self) -> "Together":
        if self._watch is not None:
            self._watch.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is not None:
            self._watch.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def any_rank(self, is_true: bool) -> bool:
        """Tell whether it is true on any rank, once the block has ended on all; also if the ranks parted in it."""
        if self._watch is None:
            return is_true
        is_any = not self._has_parted and any(self._meet(at_collective=False, is_true=is_true))
        # All are here now, and together again.
        has_parted, self._has_parted = self._has_parted, False
        return is_any or has_parted

    def reach_collective(self) -> None:
        """Go on if every rank is at a collective.

        Raises:
            RanksPartedError: If some have ended.
        """
        if not self._has_parted:
            self._meet(at_collective=True, is_true=False)
        if self._has_parted:
            raise RanksPartedError("the replay of another rank ended before a collective of this one's")

    def _meet(self, *, at_collective: bool, is_true: bool) -> list[bool]:
        places: list[tuple[bool, bool]] = [(False, False)] * dist.get_world_size()
        dist.all_gather_object(places, (at_collective, is_true))
        self._has_parted = len({place for place, _ in places}) > 1
        return [answer for _, answer in places]


class _WatchCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True

    def __init__(self, together: Together) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._together = together

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func.name())
        if name.partition("::")[0] in _COLLECTIVES and name not in _NO_COLLECTIVES:
            self._together.reach_collective()
        return func(*args, **(kwargs or {}))
