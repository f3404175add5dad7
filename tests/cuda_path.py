"""The code as it is on CUDA, run without a device: tensors that hold no numbers, and a watch over what would wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["HostWaitError", "Watch", "on_fake_cuda"]

aten = torch.ops.aten
# What asks the device for a number, or for the size of its result.
WAITING = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.bincount}
COPIES = {aten.copy_, aten._to_copy}


class HostWaitError(AssertionError):
    """An operation would have made the host wait for the device."""


class Watch(TorchDispatchMode):
    """Refuse, while armed, what would wait for the device; and always what CUDA has no kernel for.

    Attributes:
        is_armed: Whether a wait is an error; not in a setup, which may wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_armed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        result = None if packet in WAITING and self.is_armed else func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        is_on_cuda = any(tensor.is_cuda for tensor in tensors)
        if not is_on_cuda:
            return func(*args, **kwargs) if result is None else result
        if packet is aten._amp_foreach_non_finite_check_and_unscale_ and args[0][0].dtype is torch.bfloat16:
            # torch 2.11 has it for FP16, FP32 and FP64; pytorch/pytorch#127176.
            raise NotImplementedError(f"{func} not implemented for 'BFloat16'")
        if self.is_armed and (packet in WAITING or (packet in COPIES and _waits(tensors, args, kwargs))):
            raise HostWaitError(f"{func} waits for the device")
        return result


def _waits(tensors: list[Tensor], args: Any, kwargs: Any) -> bool:
    is_asynchronous = kwargs.get("non_blocking", len(args) > 2 and args[2] is True)
    return len({tensor.device.type for tensor in tensors}) > 1 and not is_asynchronous


@contextmanager
def on_fake_cuda() -> Iterator[Watch]:
    """Run the block with tensors that know device, dtype and shape but hold no numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        yield watch
