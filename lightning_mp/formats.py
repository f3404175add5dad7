"""Facts of the floating-point formats, read from ``torch.finfo``.

Limits are never derived from bit counts: a rule that reserves the top exponent for infinity gives
240 as the maximum of E4M3FN, which has no infinity and reaches 448.
"""

import math
from dataclasses import dataclass

import torch

from lightning_mp.errors import SettingTypeError, SettingValueError

__all__ = ["BF16", "FP16", "FP32", "FP64", "FP8_E4M3FN", "FP8_E5M2", "FORMATS", "HALF_DTYPES", "Format", "format_of"]

#: What autocast computes in.
HALF_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Format:
    """What one floating-point format can hold.

    Args:
        name: The name in prose, such as ``"FP8 E4M3FN"``.
        dtype: The torch dtype.
        max: Largest finite magnitude.
        smallest_normal: Smallest magnitude with the full number of mantissa bits.
        eps: Spacing of the format at 1, one ulp there.
    """

    name: str
    dtype: torch.dtype
    max: float
    smallest_normal: float
    eps: float

    @property
    def smallest_subnormal(self) -> float:
        """Smallest nonzero magnitude; at or below half of it a cast gives zero."""
        return self.smallest_normal * self.eps

    @property
    def mantissa_bits(self) -> int:
        """Stored mantissa bits, without the leading one."""
        return -_floor_log2(self.eps)

    @property
    def max_exponent(self) -> int:
        """``floor(log2(x))`` of the largest finite magnitude."""
        return _floor_log2(self.max)

    @property
    def min_exponent(self) -> int:
        """``log2`` of the smallest normal magnitude."""
        return _floor_log2(self.smallest_normal)

    @property
    def min_subnormal_exponent(self) -> int:
        """``log2`` of the smallest subnormal magnitude."""
        return self.min_exponent - self.mantissa_bits


def _floor_log2(x: float) -> int:
    # frexp writes x as m * 2**e with m in [0.5, 1), so e is one above the exponent.
    return math.frexp(x)[1] - 1


def _read(name: str, dtype: torch.dtype) -> Format:
    limits = torch.finfo(dtype)
    return Format(name, dtype, max=limits.max, smallest_normal=limits.smallest_normal, eps=limits.eps)


FP64 = _read("FP64", torch.float64)
FP32 = _read("FP32", torch.float32)
BF16 = _read("BF16", torch.bfloat16)
FP16 = _read("FP16", torch.float16)
FP8_E4M3FN = _read("FP8 E4M3FN", torch.float8_e4m3fn)
FP8_E5M2 = _read("FP8 E5M2", torch.float8_e5m2)

FORMATS = (FP64, FP32, BF16, FP16, FP8_E4M3FN, FP8_E5M2)
_BY_DTYPE = {known.dtype: known for known in FORMATS}


def format_of(dtype: torch.dtype, *, argument: str = "dtype") -> Format:
    """Return the facts of ``dtype``.

    Args:
        dtype: One of the dtypes of ``FORMATS``.
        argument: Name of the setting that holds ``dtype``, for the error.

    Returns:
        The same frozen value at each call.

    Raises:
        SettingTypeError: If ``dtype`` is not a ``torch.dtype``.
        SettingValueError: If ``dtype`` is none of ``FORMATS``.

    Example:
        >>> format_of(torch.float8_e4m3fn).max
        448.0
    """
    if not isinstance(dtype, torch.dtype):
        raise SettingTypeError(f"{argument}={dtype!r} is not a torch.dtype. Pass one, such as torch.bfloat16.")
    found = _BY_DTYPE.get(dtype)
    if found is None:
        known = ", ".join(str(each.dtype) for each in FORMATS)
        raise SettingValueError(f"{argument}={dtype} is not a format of this package. Use one of {known}.")
    return found
