"""Memory that the buckets of one optimizer step share, so that each does not allocate its own."""

import torch
from torch import Tensor

__all__ = ["Scratch"]

# On CUDA stand-ins start where the allocator would start a tensor (512 bytes): reductions there add in
# an order that depends on the alignment, and split must equal copy bit for bit.
_CUDA_ALIGNMENT = 128


class Scratch:
    """FP32 memory by name and device, as large as the largest bucket so far needed it."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.device], Tensor] = {}

    def carve(self, name: str, device: torch.device, sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Return uninitialized one-dimensional FP32 memory for tensors of the given sizes.

        Args:
            name: Memory of another name does not overlap. The same name gives the same memory again.
            device: Where it lies.
            sizes: Elements per tensor.

        Returns:
            The whole block, with gaps on CUDA for the alignment, and a view per tensor.
        """
        align = 1 if device.type == "cpu" else _CUDA_ALIGNMENT
        padded = [-(-size // align) * align for size in sizes]
        key = (name, device)
        memory = self._memory.get(key)
        if memory is None or memory.numel() < sum(padded):
            self._memory.pop(key, None)  # freed before the larger one is made
            memory = self._memory[key] = torch.empty(sum(padded), dtype=torch.float32, device=device)
        block = memory[: sum(padded)]
        views = block.split_with_sizes(padded)
        return block, [view if view.numel() == size else view[:size] for view, size in zip(views, sizes, strict=True)]
