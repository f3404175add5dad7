"""Numbers that tell, block by block, whether the bits of a BF16 tensor are still those that were published."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["changed_elements", "fingerprints"]

_WORDS = 64
_PER_WORD = 4  # BF16 values in an int64
_BLOCK = _WORDS * _PER_WORD
# Odd factors: words that change places show. Sums wrap, so that the upper half of a word, whose products lose their
# upper bits, counts once more by itself: else a column of width 4 that goes from 2.0 to 0 keeps 2 bits.
_FACTORS, _FACTORS_OF_UPPER = (
    torch.randint(-(2**62), 2**62, (2, _WORDS), generator=torch.Generator().manual_seed(0), device="cpu") * 2 + 1
)
# 256 KB of words: their upper halves are made and used within the cache.
_NUM_BLOCKS = 512
_ZEROS = torch.zeros(_BLOCK, dtype=torch.bfloat16, device="cpu")
# Smaller tensors are copied into one block first, because each call of torch costs more than they do.
_SMALL = 2**15


def fingerprints(flats: Sequence[Tensor]) -> list[Tensor]:
    """Return for each tensor a number per 256 elements: the weighted sum of their bits, four elements at a time.

    Args:
        flats: BF16, one-dimensional, on one device. Not modified.

    Returns:
        int64, one-dimensional, on the same device.
    """
    small = [index for index, flat in enumerate(flats) if flat.numel() < _SMALL]
    found = {index: _direct(flat) for index, flat in enumerate(flats) if flat.numel() >= _SMALL}
    if small:
        found.update(zip(small, _together([flats[index] for index in small]), strict=True))
    return [found[index] for index in range(len(flats))]


def changed_elements(left: Tensor, right: Tensor, flat: Tensor) -> Tensor:
    """Mark the elements of ``flat`` that lie in a block whose two fingerprints differ."""
    sizes = torch.tensor(_sizes(flat), device=left.device)
    return (left != right).repeat_interleave(sizes).to(flat.device)


def _sizes(flat: Tensor) -> list[int]:
    """Return how many elements each number of the fingerprint stands for."""
    numel = flat.numel()
    sizes = [_BLOCK] * (numel // _BLOCK)
    rest, tail = numel % _BLOCK, 0
    if numel >= _SMALL:
        rest, tail = rest - rest % _PER_WORD, rest % _PER_WORD
    return sizes + [part for part in (rest, tail) if part]


def _together(flats: list[Tensor]) -> Sequence[Tensor]:
    zeros = _ZEROS.to(flats[0].device)
    parts = []
    for flat in flats:
        parts.append(flat.detach())
        if flat.numel() % _BLOCK:
            parts.append(zeros[flat.numel() % _BLOCK :])
    counts = [-(-flat.numel() // _BLOCK) for flat in flats]
    return _weighted(torch.cat(parts).view(torch.int64)).split_with_sizes(counts)


def _direct(flat: Tensor) -> Tensor:
    bits = flat.detach()
    if bits.storage_offset() % _PER_WORD != 0:
        bits = bits.clone()  # the same numbers wherever a parameter lies: cuDNN's layers move theirs
    whole = bits.numel() // _PER_WORD * _PER_WORD
    if whole == bits.numel():
        return _weighted(bits.view(torch.int64))
    words = _weighted(bits[:whole].view(torch.int64))
    return torch.cat([words, _weighted(bits[whole:].view(torch.int16).to(torch.int64))])


def _weighted(words: Tensor) -> Tensor:
    factors = [each.to(words.device) for each in (_FACTORS, _FACTORS_OF_UPPER)]
    whole = words.numel() // _WORDS * _WORDS
    found = words.new_empty(-(-words.numel() // _WORDS))
    for start in range(0, whole, _NUM_BLOCKS * _WORDS):
        blocks = words[start : min(start + _NUM_BLOCKS * _WORDS, whole)].view(-1, _WORDS)
        at = start // _WORDS
        found[at : at + len(blocks)] = _sums(blocks, factors)
    if whole < words.numel():
        rest = words[whole:].view(1, -1)
        found[-1:] = _sums(rest, [each[: rest.numel()] for each in factors])
    return found


def _sums(blocks: Tensor, factors: Sequence[Tensor]) -> Tensor:
    upper = blocks >> 32
    if blocks.device.type == "cpu":
        return torch.addmv(torch.mv(blocks, factors[0]), upper, factors[1])
    return (blocks * factors[0] + upper * factors[1]).sum(1)  # only the CPU multiplies matrices of int64
