"""Reading what the device found out."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Readback"]


class Readback:
    """The one place that reads a result of the device. ``count`` says how often it did.

    A ``Readback`` object is a read that was asked for and not waited for: on CUDA the values travel
    to pinned memory behind the work that produces them, and ``wait`` blocks on an event that is by
    then one step old.

    Args:
        values: 0-dim FP32 tensors of one device that nobody writes to any more.
    """

    count: ClassVar[int] = 0

    def __init__(self, values: Sequence[Tensor]) -> None:
        self._values = values
        self._event: torch.cuda.Event | None = None
        if values[0].is_cuda:
            packed = torch.stack(list(values))
            host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            host.copy_(packed, non_blocking=True)
            self._values = host.unbind()
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(packed.device))  # the copy's, also on another device

    def wait(self) -> list[float]:
        """Return the values as numbers once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self.read_all(self._values)

    @classmethod
    def read(cls, values: Tensor) -> list[float]:
        """Return the numbers of a 1-dim tensor, now."""
        cls.count += 1
        numbers: list[float] = values.tolist()
        return numbers

    @classmethod
    def read_all(cls, values: Sequence[Tensor]) -> list[float]:
        """Return the numbers of 0-dim tensors of one device, now: one read."""
        if values[0].is_cpu:
            cls.count += 1
            return list(map(Tensor.item, values))
        return cls.read(torch.stack(list(values)))
