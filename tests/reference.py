"""Slow and obvious versions of what the package computes, element by element in Python's floats.

Nothing here imports the package. Python's floats are FP64, so every value of the smaller formats and
every product of two FP32 values is exact.
"""

import math
from collections import Counter

import torch
from torch import Tensor


def values(x: Tensor) -> list[float]:
    """Return every element as a Python float, in order."""
    return [float(value) for value in x.detach().to(torch.float64).reshape(-1).tolist()]


def amax(x: Tensor) -> float:
    largest = 0.0
    for value in values(x):
        if math.isnan(value):
            return math.nan
        largest = max(largest, abs(value))
    return largest


def underflow_fraction(x: Tensor, dtype: torch.dtype) -> float:
    """Cast one element after the other and look at the result."""
    nonzero = [value for value in values(x) if value != 0]
    flushed = [value for value in nonzero if torch.tensor(value, dtype=torch.float64).to(dtype).double() == 0]
    return len(flushed) / len(nonzero) if nonzero else 0.0


def saturated_fraction(x: Tensor, largest: float) -> float:
    nonzero = [value for value in values(x) if value != 0]
    return sum(abs(value) > largest for value in nonzero) / len(nonzero) if nonzero else 0.0


def sqnr_db(reference: Tensor, quantized: Tensor) -> float:
    pairs = list(zip(values(reference), values(quantized), strict=True))
    signal = math.fsum(r * r for r, _ in pairs)
    noise = math.fsum((r - q) ** 2 for r, q in pairs)
    return 10 * math.log10(signal / noise)


def exponents(x: Tensor) -> Counter[int]:
    """Count ``floor(log2(|x|))`` of the finite nonzero elements, exactly: hex() writes 0x1.mmmp+e."""
    found: Counter[int] = Counter()
    for value in values(x):
        if value != 0 and math.isfinite(value):
            mantissa, exponent = abs(value).hex().split("p")
            # A subnormal of FP64 is written 0x0.mmm; none of the smaller formats has one.
            assert mantissa.startswith("0x1")
            found[int(exponent)] += 1
    return found
