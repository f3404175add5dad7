import math

import pytest
import torch

from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.numerics import (
    ExponentHistogram,
    amax,
    count_nonfinite,
    exponent_histogram,
    nonfinite_kind,
    saturated_fraction,
    sqnr_db,
    underflow_fraction,
)
from tests import reference

INF, NAN = math.inf, math.nan
ADMITTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
# Maxima written by hand; formats.py is code under test.
MAXIMUM = {
    torch.float64: (2 - 2.0**-52) * 2.0**1023,
    torch.float32: (2 - 2.0**-23) * 2.0**127,
    torch.bfloat16: (2 - 2.0**-7) * 2.0**127,
    torch.float16: 65504.0,
    torch.float8_e4m3fn: 448.0,
    torch.float8_e5m2: 57344.0,
}
all_dtypes = pytest.mark.parametrize("dtype", ADMITTED, ids=str)
all_targets = pytest.mark.parametrize("target", ADMITTED, ids=str)

MEASURES = {
    "amax": amax,
    "underflow_fraction": lambda x: underflow_fraction(x, torch.float16),
    "saturated_fraction": lambda x: saturated_fraction(x, torch.float16),
    "sqnr_db": lambda x: sqnr_db(x, x),
    "exponent_histogram": lambda x: exponent_histogram(x).counts,
    "count_nonfinite": lambda x: count_nonfinite(x).num_inf,
}
all_measures = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)


def spread(dtype: torch.dtype, *, lowest: int = -40, highest: int = 20) -> torch.Tensor:
    """Values over 60 binary exponents with zeros among them, as ``dtype`` holds them."""
    scale = 2.0 ** torch.linspace(lowest, highest, 256, dtype=torch.float64)
    values = (torch.randn(256, dtype=torch.float64) * scale).clamp(-MAXIMUM[dtype], MAXIMUM[dtype])
    values[::17] = 0
    return values.to(dtype)


@all_dtypes
def test_amax_is_the_largest_magnitude_in_every_format(dtype) -> None:
    x = spread(dtype)
    assert amax(x).item() == reference.amax(x)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], 0.0), ([-0.0, 0.0], 0.0), ([1.0, -3.0], 3.0), ([1.0, -INF], INF), ([2.0**-149], 2.0**-149)],
)
def test_amax_of_edge_values(values, expected) -> None:
    found = amax(torch.tensor(values))
    assert (found.item(), math.copysign(1, found.item())) == (expected, 1)


def test_amax_of_a_tensor_with_nan_is_nan() -> None:
    assert math.isnan(amax(torch.tensor([1.0, NAN, INF])).item())


def test_amax_of_fp16_maximum_is_not_rounded() -> None:
    assert amax(torch.tensor([65504.0, -1.0], dtype=torch.float16)).item() == 65504.0


@all_dtypes
@all_targets
def test_underflow_fraction_equals_the_share_that_torch_casts_to_zero(dtype, target) -> None:
    x = spread(dtype)
    # One division of two counts in FP32: half an ulp.
    assert underflow_fraction(x, target).item() == pytest.approx(reference.underflow_fraction(x, target), rel=2**-23)


@pytest.mark.parametrize(
    ("target", "threshold"),
    [
        (torch.float16, 2.0**-25),
        (torch.bfloat16, 2.0**-134),
        (torch.float8_e4m3fn, 2.0**-10),
        (torch.float8_e5m2, 2.0**-17),
    ],
    ids=str,
)
def test_tie_below_the_smallest_subnormal_is_flushed_and_the_next_fp32_value_is_not(target, threshold) -> None:
    tie = torch.tensor([threshold, -threshold])
    assert underflow_fraction(tie, target).item() == 1
    assert underflow_fraction(torch.nextafter(tie, 2 * tie), target).item() == 0


def test_underflow_fraction_counts_nonfinite_values_as_nonzero_and_kept() -> None:
    assert underflow_fraction(torch.tensor([NAN, INF, 1e-30, 0.0]), torch.float16).item() == pytest.approx(1 / 3)


def test_scaled_gradients_flush_less() -> None:
    # 2**-26 is flushed in FP16; times a loss scale of 4 it is the subnormal 2**-24.
    gradient = torch.full((8,), 2.0**-26)
    assert underflow_fraction(gradient, torch.float16).item() == 1
    assert underflow_fraction(gradient * 4, torch.float16).item() == 0


@all_dtypes
@all_targets
def test_saturated_fraction_equals_a_count_by_hand(dtype, target) -> None:
    x = spread(dtype)
    expected = reference.saturated_fraction(x, MAXIMUM[target])
    assert saturated_fraction(x, target).item() == pytest.approx(expected, rel=2**-23)


@pytest.mark.parametrize("target", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_maximum_is_not_saturated_and_the_next_fp32_value_is(target) -> None:
    limit = torch.tensor([MAXIMUM[target], -MAXIMUM[target]])
    assert saturated_fraction(limit, target).item() == 0
    assert saturated_fraction(torch.nextafter(limit, 2 * limit), target).item() == 1


def test_bf16_value_just_above_the_fp16_maximum_is_saturated() -> None:
    # 65504 has no BF16 value: compared in BF16 the limit would become 65536 itself.
    assert saturated_fraction(torch.tensor([65536.0], dtype=torch.bfloat16), torch.float16).item() == 1


@all_targets
def test_infinity_is_saturated_in_every_format_and_nan_in_none(target) -> None:
    assert saturated_fraction(torch.tensor([INF, -INF, NAN, 1.0, 0.0]), target).item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sqnr_agrees_with_a_float64_reference(dtype) -> None:
    x = torch.randn(64, 33, dtype=torch.float64).to(dtype)
    quantized = x.float().to(torch.float8_e4m3fn)
    # 20 * log10(1 + 1e-5) is 1e-4 dB: FP32 sums of 2112 squares stay far inside.
    assert sqnr_db(x, quantized).item() == pytest.approx(reference.sqnr_db(x, quantized), abs=1e-4)


@pytest.mark.parametrize("factor", [2.0**-120, 2.0**-60, 1.0, 2.0**60, 2.0**120])
def test_sqnr_does_not_depend_on_the_range(factor) -> None:
    # Squares of 2**-120 vanish in FP32 and squares of 2**120 overflow.
    x = torch.randn(100)
    noisy = x + torch.randn(100) / 128
    # The parts of the sum reach 20 * log10(2**120) = 722 dB, where an FP32 ulp is 6e-5 dB.
    assert sqnr_db(x * factor, noisy * factor).item() == pytest.approx(sqnr_db(x, noisy).item(), abs=1e-3)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], INF),
        ([0.0, 0.0], [0.0, 0.0], INF),
        ([], [], INF),
        ([0.0, 0.0], [0.0, 1.0], -INF),
        ([1.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, INF], [1.0, 2.0], NAN),
        ([1.0, 2.0], [1.0, INF], NAN),
        ([NAN, 2.0], [NAN, 2.0], NAN),
    ],
)
def test_sqnr_of_edge_values(before, after, expected) -> None:
    assert sqnr_db(torch.tensor(before), torch.tensor(after)).item() == pytest.approx(expected, nan_ok=True)


def test_sqnr_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(SettingValueError, match=r"^quantized: its shape \(1,\) differs from \(3,\) of reference"):
        sqnr_db(torch.ones(3), torch.ones(1))


@all_dtypes
def test_exponent_histogram_equals_a_count_by_hand(dtype) -> None:
    x = spread(dtype, lowest=-140 if dtype in (torch.float32, torch.bfloat16) else -40)
    found = exponent_histogram(x)
    by_exponent = dict(zip(found.exponents, found.counts.tolist(), strict=True))
    assert {exponent: count for exponent, count in by_exponent.items() if count} == reference.exponents(x)


@all_dtypes
def test_exponent_histogram_fields_add_up_to_the_number_of_elements(dtype) -> None:
    x = spread(dtype)
    found = exponent_histogram(x)
    assert int(found.counts.sum() + found.num_zeros + found.num_nonfinite) == x.numel()


def test_exponent_histogram_is_exact_at_powers_of_two_and_just_below() -> None:
    powers = torch.tensor([2.0**exponent for exponent in ExponentHistogram.exponents])
    assert exponent_histogram(powers).counts.tolist() == [1] * 277
    below = exponent_histogram(torch.nextafter(powers[24:], torch.tensor(0.0))).counts
    # The value below 2**e has exponent e - 1, from the normal range on.
    assert below.tolist() == [0] * 23 + [1] * 253 + [0]


def test_exponent_histogram_counts_zeros_and_nonfinite_values_apart() -> None:
    found = exponent_histogram(torch.tensor([0.0, -0.0, INF, -INF, NAN, 1.0]))
    assert (found.num_zeros.item(), found.num_nonfinite.item(), found.counts.sum().item()) == (2, 3, 1)


def test_exponent_histogram_counts_fp64_outside_the_range_of_fp32_at_its_ends() -> None:
    found = exponent_histogram(torch.tensor([1e-300, 5e-324, 1e300], dtype=torch.float64))
    assert (found.counts[0].item(), found.counts[-1].item()) == (2, 1)


def test_exponent_histogram_of_several_chunks_equals_one_pass(monkeypatch) -> None:
    x = spread(torch.float32)
    whole = exponent_histogram(x).counts
    monkeypatch.setattr("lightning_mp.numerics._CHUNK_ELEMENTS", 7)
    assert torch.equal(exponent_histogram(x).counts, whole)


@all_dtypes
def test_count_nonfinite_separates_infinity_and_nan(dtype) -> None:
    x = torch.tensor([1.0, INF, -INF, NAN, 0.0]).to(dtype)
    found = count_nonfinite(x)
    # E4M3FN has no infinity; what the cast made of it is counted as the tensor holds it.
    values = reference.values(x)
    assert found.num_inf.item() == sum(math.isinf(value) for value in values)
    assert found.num_nan.item() == sum(math.isnan(value) for value in values)


@pytest.mark.parametrize(("num_inf", "num_nan", "kind"), [(0, 0, None), (2, 0, "inf"), (0, 1, "nan"), (1, 1, "both")])
def test_nonfinite_kind_names_what_was_found(num_inf, num_nan, kind) -> None:
    assert nonfinite_kind(num_inf, num_nan) == kind


@all_measures
@all_dtypes
def test_measure_accepts_empty_and_0_dim_tensors(measure, dtype) -> None:
    measure(torch.empty(0, 3).to(dtype))
    measure(torch.tensor(1.0).to(dtype))


@all_measures
def test_measure_does_not_depend_on_strides(measure) -> None:
    x = spread(torch.float32).reshape(16, 16)
    assert torch.equal(measure(x.t()), measure(x.t().contiguous()))
    assert torch.equal(measure(x[::2, ::3]), measure(x[::2, ::3].contiguous()))


@all_measures
def test_measure_leaves_input_and_graph_alone(measure) -> None:
    x = spread(torch.float32).requires_grad_()
    before = x.detach().clone()
    found = measure(x)
    assert not found.requires_grad
    assert x._version == 0
    assert torch.equal(x.detach(), before)


@all_measures
def test_measure_keeps_its_dtype_under_another_default_and_inside_autocast(measure) -> None:
    x = spread(torch.float32)
    expected = measure(x)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = measure(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@all_measures
def test_measure_refuses_sparse_tensors_with_the_fix(measure) -> None:
    with pytest.raises(SettingTypeError, match=r"found a torch\.sparse_coo tensor\. Pass a dense one: its coalesce"):
        measure(torch.eye(2).to_sparse())


@all_measures
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_measure_refuses_dtypes_that_are_not_floating_point(measure, dtype) -> None:
    with pytest.raises(SettingTypeError, match=f"found a tensor of {dtype}. Pass a floating-point tensor"):
        measure(torch.ones(2, dtype=dtype))


@all_measures
def test_measure_refuses_what_is_no_tensor(measure) -> None:
    with pytest.raises(SettingTypeError, match="found a list"):
        measure([1.0])


@pytest.mark.parametrize("measure", [underflow_fraction, saturated_fraction])
def test_share_refuses_a_target_without_a_format(measure) -> None:
    with pytest.raises(SettingValueError, match=r"^dtype=torch\.int8 is not a format"):
        measure(torch.ones(2), torch.int8)


@pytest.mark.gpu
@all_measures
@all_dtypes
def test_measure_agrees_on_cuda_without_a_host_sync(measure, dtype) -> None:
    x = spread(dtype)
    on_device = x.cuda()
    measure(on_device)  # loads kernels, which may synchronize
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = measure(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.device == on_device.device
    assert torch.equal(found.cpu(), measure(x))
