"""Parameters that share memory without being the same object: casting one would untie them."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_mp.errors import UnsupportedError

__all__ = ["check_overlap"]


def check_overlap(module: nn.Module, cast: Collection[nn.Parameter]) -> None:
    """Refuse a parameter whose memory another parameter or a buffer of ``module`` reads too.

    One ``Parameter`` object under several names is no such case, nor are views of one block that have no
    element in common.

    Args:
        module: The root. Not modified.
        cast: The parameters that would get memory of their own.

    Raises:
        UnsupportedError: If two tensors have elements in common and one of them is to be cast.
    """
    blocks: dict[tuple[torch.device, int], dict[str, Tensor]] = {}
    named = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    for name, tensor in named.items():
        if is_lazy(tensor):
            continue
        if tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.numel() > 0:
            key = (tensor.device, tensor.untyped_storage().data_ptr())
            blocks.setdefault(key, {})[name] = tensor
    for tensors in blocks.values():
        if len(tensors) > 1 and any(tensor in cast for tensor in tensors.values()):
            _check_block(tensors, cast)


def _check_block(tensors: Mapping[str, Tensor], cast: Collection[nn.Parameter]) -> None:
    names = list(tensors)
    for index, name in enumerate(names):
        for other in names[:index]:
            pair = tensors[other], tensors[name]
            if any(tensor in cast for tensor in pair) and _have_common_bytes(*pair):
                raise UnsupportedError(
                    f"master_weights: {other!r} and {name!r} share memory but are two objects, so casting would untie "
                    "them. Tie the object (decoder.weight = encoder.weight), compute with it directly "
                    "(F.linear(x, encoder.weight.t())), or use master_weights='params'."
                )


def _have_common_bytes(left: Tensor, right: Tensor) -> bool:
    (first, end), (other_first, other_end) = _byte_range(left), _byte_range(right)
    if end <= other_first or other_end <= first:
        return False
    if left.dtype is not right.dtype:
        return True
    # Ranges may interleave without a common element, as two column slices do: mark one, look at the other.
    start = min(left.storage_offset(), right.storage_offset())
    marks = torch.zeros((max(end, other_end) // left.element_size()) - start, dtype=torch.bool)
    marks.as_strided(left.shape, left.stride(), left.storage_offset() - start).fill_(True)
    return bool(marks.as_strided(right.shape, right.stride(), right.storage_offset() - start).any())


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    first = int(tensor.storage_offset())
    steps = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return first * tensor.element_size(), int(first + sum(steps) + 1) * tensor.element_size()
