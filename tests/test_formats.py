import dataclasses

import pytest
import torch

from lightning_mp import formats
from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.formats import FORMATS, format_of

# Written by hand from IEEE 754 (binary64, binary32, binary16), arXiv:1905.12322 (BF16) and
# arXiv:2209.05433, table 1 (FP8): a largest mantissa of 2 - ulp times two to the largest exponent,
# except E4M3FN, whose largest mantissa is 1.75 because 1.875 encodes NaN.
# dtype: name, max, smallest normal, smallest subnormal, ulp at 1, mantissa bits, min and max exponent
EXACT = {
    torch.float64: ("FP64", (2 - 2.0**-52) * 2.0**1023, 2.0**-1022, 2.0**-1074, 2.0**-52, 52, -1022, 1023),
    torch.float32: ("FP32", (2 - 2.0**-23) * 2.0**127, 2.0**-126, 2.0**-149, 2.0**-23, 23, -126, 127),
    torch.bfloat16: ("BF16", (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133, 2.0**-7, 7, -126, 127),
    torch.float16: ("FP16", 65504.0, 2.0**-14, 2.0**-24, 2.0**-10, 10, -14, 15),
    torch.float8_e4m3fn: ("FP8 E4M3FN", 448.0, 2.0**-6, 2.0**-9, 2.0**-3, 3, -6, 8),
    torch.float8_e5m2: ("FP8 E5M2", 57344.0, 2.0**-14, 2.0**-16, 2.0**-2, 2, -14, 15),
}


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_format_holds_the_exact_values_of_its_standard(dtype) -> None:
    found = format_of(dtype)
    assert (
        found.name,
        found.max,
        found.smallest_normal,
        found.smallest_subnormal,
        found.eps,
        found.mantissa_bits,
        found.min_exponent,
        found.max_exponent,
    ) == EXACT[dtype]


def test_every_known_format_has_exact_values_in_this_file() -> None:
    assert {known.dtype for known in FORMATS} == set(EXACT)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_half_the_smallest_subnormal_flushes_to_zero_and_the_next_value_does_not(dtype) -> None:
    # Oracle: torch's own cast. The tie goes to the even neighbor, which is zero.
    smallest = format_of(dtype).smallest_subnormal
    cast = torch.tensor([smallest, smallest * 0.5], dtype=torch.float64).to(dtype).to(torch.float64)
    assert cast.tolist() == [smallest, 0.0]


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_limits_survive_a_cast_to_the_format(dtype) -> None:
    found = format_of(dtype)
    limits = [found.max, found.smallest_normal, found.smallest_subnormal, 1 + found.eps]
    assert torch.tensor(limits, dtype=torch.float64).to(dtype).to(torch.float64).tolist() == limits


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_min_subnormal_exponent_is_the_logarithm_of_the_smallest_subnormal(dtype) -> None:
    found = format_of(dtype)
    assert 2.0**found.min_subnormal_exponent == found.smallest_subnormal


def test_format_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        formats.FP16.max = 1.0


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fnuz], ids=str)
def test_dtype_without_a_format_is_refused_with_those_that_have_one(dtype) -> None:
    with pytest.raises(SettingValueError, match=rf"^compute_dtype={dtype} is not a format .* torch\.float32, "):
        format_of(dtype, argument="compute_dtype")


def test_value_that_is_no_dtype_is_refused_by_name() -> None:
    with pytest.raises(SettingTypeError, match=r"^dtype='float16' is not a torch\.dtype"):
        format_of("float16")
