"""From a tensor to a number: ranges, losses of a cast, non-finite values.

Nothing here asks the device for a result: every function returns tensors on the device of its
input, and the caller decides when to read them. All take any dtype of ``formats.FORMATS``, any
shape (empty and 0-dim too) and any strides; arithmetic is in FP32, for FP64 in FP64. A ``DTensor``
is measured across its mesh; pass ``to_local()`` for one rank's part. Other dtypes and sparse layouts
are refused by ``SettingTypeError`` or ``SettingValueError``.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.formats import FP32, format_of

__all__ = [
    "ExponentHistogram",
    "NonfiniteCount",
    "NonfiniteKind",
    "amax",
    "count_nonfinite",
    "exponent_histogram",
    "nonfinite_kind",
    "saturated_fraction",
    "sqnr_db",
    "underflow_fraction",
]

NonfiniteKind: TypeAlias = Literal["inf", "nan", "both"]

# Elements per pass of the histogram. Its temporaries take about 25 bytes per element, so 2**22
# keeps them near 100 MB however large the tensor is.
_CHUNK_ELEMENTS = 2**22


def _wide(x: Tensor, argument: str = "x") -> Tensor:
    """Return ``x`` without its graph in FP32 (FP64 stays); every format casts there exactly."""
    if not isinstance(x, Tensor):
        raise SettingTypeError(f"{argument}: found a {type(x).__name__}. Pass a torch.Tensor.")
    if not x.is_floating_point():
        raise SettingTypeError(f"{argument}: found a tensor of {x.dtype}. Pass a floating-point tensor.")
    if x.layout is not torch.strided:
        raise SettingTypeError(
            f"{argument}: found a {x.layout} tensor. Pass a dense one: its coalesce().values() or its to_dense()."
        )
    format_of(x.dtype, argument=f"{argument}.dtype")
    return x.detach().to(torch.float64 if x.dtype is torch.float64 else torch.float32)


def amax(x: Tensor) -> Tensor:
    """Return the largest magnitude in ``x``.

    Args:
        x: Floating-point tensor of any shape. Not modified.

    Returns:
        FP32 scalar (FP64 for FP64) on ``x.device``, zero or above. Infinity counts as a magnitude,
        NaN anywhere gives NaN, an empty tensor gives zero.

    Raises:
        SettingTypeError: If ``x`` is not a dense floating-point tensor.

    Example:
        >>> amax(torch.tensor([1.0, -448.0], dtype=torch.float8_e4m3fn))
        tensor(448.)
    """
    wide = _wide(x)
    if wide.numel() == 0:
        return wide.new_zeros(())
    # One pass without a tensor of magnitudes; abs turns the -0.0 of an all-zero tensor into 0.0.
    low, high = torch.aminmax(wide)
    return torch.maximum(-low, high).abs()


def underflow_fraction(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Measure how much of ``x`` is flushed to zero by a cast to ``dtype``.

    Loss scaling exists to keep this small for gradients. In FP16 a magnitude at or below 2**-25
    rounds to zero; the smallest one kept is the subnormal 2**-24.

    Args:
        x: Floating-point tensor of any shape, any device. Not modified.
        dtype: Floating dtype to cast to, such as ``torch.float16``.

    Returns:
        FP32 scalar on ``x.device`` in [0, 1]: elements that are nonzero in ``x`` and zero after the
        cast, divided by the elements that are nonzero in ``x``. Zero if there are none. NaN and
        infinity count as nonzero.

    Raises:
        SettingTypeError: If ``x`` is not a dense floating-point tensor or ``dtype`` is not a dtype.
        SettingValueError: If ``dtype`` is none of ``formats.FORMATS``.

    References:
        Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2 (arXiv:1710.03740).

    Example:
        >>> underflow_fraction(torch.tensor([0.0, 2.0**-24, 2.0**-25, 1.0]), torch.float16)
        tensor(0.3333)
    """
    magnitude = _wide(x).abs()
    # Round to nearest even: the tie halfway to the smallest subnormal goes to zero.
    flushed = magnitude <= format_of(dtype).smallest_subnormal / 2
    return _share_of_nonzero(flushed, magnitude)


def saturated_fraction(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Measure how much of ``x`` lies beyond the largest magnitude of ``dtype``.

    Read it before the cast: what a cast makes of such values depends on device and dtype (on CPU
    infinity becomes 448 in E4M3FN, and 1e9 becomes infinity in E5M2).

    Args:
        x: Floating-point tensor of any shape, any device. Not modified.
        dtype: Floating dtype to cast to, such as ``torch.float8_e4m3fn``.

    Returns:
        FP32 scalar on ``x.device`` in [0, 1]: elements with a magnitude above the maximum of
        ``dtype``, divided by the elements that are nonzero in ``x``, as in ``underflow_fraction``, so
        that the two shares add up. Zero if there are none. Infinity is beyond every maximum; NaN is not
        saturated.

    Raises:
        SettingTypeError: If ``x`` is not a dense floating-point tensor or ``dtype`` is not a dtype.
        SettingValueError: If ``dtype`` is none of ``formats.FORMATS``.

    References:
        Micikevicius et al., "FP8 Formats for Deep Learning", section 3 (arXiv:2209.05433).

    Example:
        >>> saturated_fraction(torch.tensor([0.0, 448.0, 449.0]), torch.float8_e4m3fn)
        tensor(0.5000)
    """
    magnitude = _wide(x).abs()
    # A maximum that the tensor's own dtype cannot exceed leaves infinity alone above it.
    limit = min(format_of(dtype).max, torch.finfo(magnitude.dtype).max)
    return _share_of_nonzero(magnitude > limit, magnitude)


def _share_of_nonzero(selected: Tensor, magnitude: Tensor) -> Tensor:
    nonzero = magnitude != 0
    count = (selected & nonzero).sum().float()
    return count / nonzero.sum().clamp(min=1).float()


def sqnr_db(reference: Tensor, quantized: Tensor) -> Tensor:
    r"""Return the signal-to-quantization-noise ratio in dB.

    .. math:: 10 \log_{10} \frac{\sum r_i^2}{\sum (r_i - q_i)^2}

    Sums of squares are taken relative to the largest magnitude, so that gradients near 1e-30 do not
    vanish in FP32 and activations near 1e30 do not overflow.

    Args:
        reference: The values before quantization, any shape.
        quantized: The values after it, scaled back to the range of ``reference``; same shape.

    Returns:
        FP32 scalar on the device of the inputs. Infinity where both are equal (empty too), minus
        infinity where only ``reference`` is zero, NaN where either or their difference is not finite.

    Raises:
        SettingTypeError: If one of them is not a dense floating-point tensor.
        SettingValueError: If the shapes differ.

    Example:
        >>> sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
        tensor(20.)
    """
    signal, output = _wide(reference, "reference"), _wide(quantized, "quantized")
    if signal.shape != output.shape:
        raise SettingValueError(
            f"quantized: its shape {tuple(output.shape)} differs from {tuple(signal.shape)} of reference. "
            "Pass tensors of the same shape."
        )
    signal_db, noise_db = _power_db(signal), _power_db(signal - output)
    return torch.where(noise_db == -math.inf, math.inf, signal_db - noise_db).float()


def _power_db(x: Tensor) -> Tensor:
    largest = amax(x)
    relative = x / torch.where(largest > 0, largest, 1.0)
    return 20 * torch.log10(largest) + 10 * torch.log10(relative.square().sum())


@dataclass(frozen=True, eq=False)
class ExponentHistogram:
    """How many elements have each binary exponent.

    Args:
        counts: int64 of shape ``(277,)``: elements with ``floor(log2(|x|))`` equal to the entry of
            ``exponents`` at that place.
        num_zeros: int64 scalar, elements equal to zero.
        num_nonfinite: int64 scalar, elements that are infinite or NaN.
    """

    # From the smallest subnormal of FP32 to its maximum.
    exponents: ClassVar[range] = range(FP32.min_subnormal_exponent, FP32.max_exponent + 1)

    counts: Tensor
    num_zeros: Tensor
    num_nonfinite: Tensor


def exponent_histogram(x: Tensor) -> ExponentHistogram:
    """Count the elements of ``x`` by their binary exponent ``floor(log2(|x|))``.

    The exponents are exact, subnormals included: they come from ``frexp`` and not from a logarithm.

    Args:
        x: Floating-point tensor of any shape, any device. Not modified.

    Returns:
        Counts on ``x.device``; all fields together add up to ``x.numel()``. Magnitudes of FP64
        outside the range of FP32 count in the first or last place.

    Raises:
        SettingTypeError: If ``x`` is not a dense floating-point tensor.

    References:
        Micikevicius et al., "Mixed Precision Training", ICLR 2018, figure 3 (arXiv:1710.03740).

    Example:
        >>> histogram = exponent_histogram(torch.tensor([1.0, 1.5, -2.0, 0.0, float("nan")]))
        >>> one = histogram.exponents.index(0)
        >>> histogram.counts[one : one + 2].tolist(), histogram.num_zeros.item(), histogram.num_nonfinite.item()
        ([2, 1], 1, 1)
    """
    num_bins = len(ExponentHistogram.exponents)
    flat = _wide(x).reshape(-1)
    # Two places more than exponents: zeros, then non-finite values.
    counts = torch.zeros(num_bins + 2, dtype=torch.int64, device=x.device)
    for chunk in torch.split(flat, _CHUNK_ELEMENTS):
        place = _histogram_place(chunk, num_bins)
        # bincount would ask the device for the largest place; scatter_add_ does not.
        counts.scatter_add_(0, place, torch.ones_like(place))
    return ExponentHistogram(counts[:num_bins], counts[num_bins], counts[num_bins + 1])


def _histogram_place(chunk: Tensor, num_bins: int) -> Tensor:
    # frexp writes x as m * 2**e with |m| in [0.5, 1), so floor(log2(|x|)) is e - 1.
    exponent = torch.frexp(chunk).exponent.long() - 1
    place = (exponent - ExponentHistogram.exponents[0]).clamp(0, num_bins - 1)
    place = torch.where(chunk == 0, num_bins, place)
    return torch.where(torch.isfinite(chunk), place, num_bins + 1)


@dataclass(frozen=True, eq=False)
class NonfiniteCount:
    """How many elements are not finite.

    Args:
        num_inf: int64 scalar, elements equal to plus or minus infinity.
        num_nan: int64 scalar, elements that are NaN.
    """

    num_inf: Tensor
    num_nan: Tensor


def count_nonfinite(x: Tensor) -> NonfiniteCount:
    """Count the infinities and NaNs of ``x`` apart.

    Args:
        x: Floating-point tensor of any shape, any device. Not modified.

    Returns:
        Two int64 scalars on ``x.device``, zero for an empty tensor.

    Raises:
        SettingTypeError: If ``x`` is not a dense floating-point tensor.

    Example:
        >>> found = count_nonfinite(torch.tensor([1.0, float("inf"), -float("inf"), float("nan")]))
        >>> found.num_inf.item(), found.num_nan.item()
        (2, 1)
    """
    wide = _wide(x)
    return NonfiniteCount(torch.isinf(wide).sum(), torch.isnan(wide).sum())


def nonfinite_kind(num_inf: int, num_nan: int) -> NonfiniteKind | None:
    """Name what was found, from counts that the caller has read from the device.

    Example:
        >>> nonfinite_kind(num_inf=3, num_nan=1)
        'both'
    """
    if num_inf and num_nan:
        return "both"
    if num_inf:
        return "inf"
    return "nan" if num_nan else None
