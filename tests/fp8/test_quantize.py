"""From a tensor to FP8: scale, rounding and saturation by Transformer Engine's rules.

The oracle is the published rule, computed value by value in Python's floats or written out by hand.
"""

import math

import pytest
import torch

from lightning_mp.fp8.quantize import (
    Quantized,
    amax_of,
    cast_scaled,
    quantize_blocks,
    quantize_tensor,
    scale_from_amax,
)
from lightning_mp.fp8.recipes import QuantizationSettings

E4M3FN, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP32_MAX = torch.finfo(torch.float32).max
BF16_MAX = torch.finfo(torch.bfloat16).max
PLAIN, POWER_2 = QuantizationSettings(), QuantizationSettings(power_2_scale=True)


def nearest(value: float, mantissa_bits: int, min_exponent: int, largest: float) -> float:
    """Round to the nearest value of a format, ties to even, saturating."""
    if math.isnan(value) or value == 0:
        return value
    magnitude = abs(value)
    exponent = max(math.frexp(magnitude)[1] - 1, min_exponent) if math.isfinite(magnitude) else 0
    ulp = 2.0 ** (exponent - mantissa_bits)
    rounded = largest if math.isinf(magnitude) else min(round(magnitude / ulp) * ulp, largest)
    return math.copysign(rounded, value)


NAMED_E4M3FN = {
    "zero": (0.0, 0.0),
    "smallest subnormal": (2.0**-9, 2.0**-9),
    "half the smallest subnormal, tie to zero": (2.0**-10, 0.0),
    "just above that tie": (2.0**-10 * 1.001, 2.0**-9),
    "largest subnormal": (7 * 2.0**-9, 7 * 2.0**-9),
    "smallest normal": (2.0**-6, 2.0**-6),
    "largest below one": (0.9375, 0.9375),
    "one": (1.0, 1.0),
    "one ulp above one": (1.125, 1.125),
    "tie at one, to even": (1.0625, 1.0),
    "tie above, to even": (1.1875, 1.25),
    "largest": (448.0, 448.0),
    "half an ulp above the largest": (464.0, 448.0),
    "twice the largest": (896.0, 448.0),
    "infinity": (math.inf, 448.0),
}
NAMED_E5M2 = {
    "zero": (0.0, 0.0),
    "smallest subnormal": (2.0**-16, 2.0**-16),
    "half the smallest subnormal, tie to zero": (2.0**-17, 0.0),
    "largest subnormal": (3 * 2.0**-16, 3 * 2.0**-16),
    "smallest normal": (2.0**-14, 2.0**-14),
    "one": (1.0, 1.0),
    "tie at one, to even": (1.125, 1.0),
    "tie above, to even": (1.375, 1.5),
    "largest": (57344.0, 57344.0),
    "half an ulp above the largest": (61440.0, 57344.0),
    "infinity": (math.inf, 57344.0),
}
CASES = [(E4M3FN, name, *pair) for name, pair in NAMED_E4M3FN.items()]
CASES += [(E5M2, name, *pair) for name, pair in NAMED_E5M2.items()]


@pytest.mark.parametrize(("dtype", "name", "value", "expected"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_cast_of_named_value(dtype, name, value, expected) -> None:
    assert cast_scaled(torch.tensor([value, -value]), dtype).float().tolist() == [expected, -expected]


@pytest.mark.parametrize(
    ("dtype", "bits", "min_exponent", "largest"), [(E4M3FN, 3, -6, 448.0), (E5M2, 2, -14, 57344.0)]
)
def test_cast_rounds_like_the_written_rule_over_the_range(dtype, bits, min_exponent, largest) -> None:
    exponents = torch.randint(min_exponent - bits - 3, 18, (2000,)).float()
    x = torch.randn(2000).sign() * (1 + torch.rand(2000)) * torch.exp2(exponents)
    expected = [nearest(value, bits, min_exponent, largest) for value in x.tolist()]
    assert cast_scaled(x, dtype).float().tolist() == expected


@pytest.mark.parametrize("dtype", [E4M3FN, E5M2])
def test_nan_stays_nan(dtype) -> None:
    assert cast_scaled(torch.tensor([math.nan]), dtype).float().isnan().all()


@pytest.mark.parametrize(
    ("amax", "dtype", "settings", "expected"),
    [
        (448.0, E4M3FN, PLAIN, 1.0),
        (1.0, E4M3FN, PLAIN, 448.0),
        (1.0, E5M2, PLAIN, 57344.0),
        (1.0, E4M3FN, POWER_2, 256.0),
        (3.0, E4M3FN, POWER_2, 128.0),  # 149.3
        (0.0, E4M3FN, PLAIN, 1.0),
        (0.0, E4M3FN, POWER_2, 1.0),
        (math.inf, E4M3FN, PLAIN, 1.0),
        (math.nan, E4M3FN, PLAIN, 1.0),
        (1e-45, E4M3FN, PLAIN, FP32_MAX),
        (1e-45, E4M3FN, POWER_2, 2.0**127),
        (1e-36, E5M2, PLAIN, FP32_MAX),
        (0.5, E4M3FN, QuantizationSettings(amax_epsilon=2.0), 224.0),
        (0.0, E4M3FN, QuantizationSettings(amax_epsilon=2.0), 224.0),
        (4.0, E4M3FN, QuantizationSettings(amax_epsilon=2.0), 112.0),
        (math.nan, E4M3FN, QuantizationSettings(amax_epsilon=2.0), 1.0),
    ],
)
def test_scale_from_amax_follows_the_rule(amax, dtype, settings, expected) -> None:
    assert scale_from_amax(torch.tensor(amax), dtype, settings).item() == expected


def test_scale_is_one_rounded_fp32_division() -> None:
    amax = torch.rand(1000) * 10
    exact = 448.0 / amax.double()
    # A double holds the quotient to 2**-53, so rounding it to FP32 is the correctly rounded division.
    assert torch.equal(scale_from_amax(amax, E4M3FN, PLAIN), exact.float())


def test_amax_passes_over_nan_and_keeps_infinity() -> None:
    assert amax_of(torch.tensor([-3.0, math.nan, 2.0])).item() == 3.0
    assert amax_of(torch.tensor([-math.inf, math.nan])).item() == math.inf
    assert amax_of(torch.tensor([math.nan])).item() == 0.0
    assert amax_of(torch.empty(0, 16)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensor_round_trip_stays_within_half_an_ulp(dtype) -> None:
    x = torch.randn(32, 48).to(dtype)
    scale = scale_from_amax(amax_of(x), E4M3FN, PLAIN)
    quantized = quantize_tensor(x, scale, E4M3FN)
    error = (quantized.dequantize() - x.float()).abs()
    # Half an ulp of E4M3FN is 2**-4 of the magnitude for normals, and half of 2**-9/scale below; two
    # FP32 roundings come on top.
    bound = torch.maximum(x.float().abs() * 2.0**-4, 2.0**-10 / scale) * (1 + 2.0**-20)
    assert (error <= bound).all()
    assert torch.equal(quantized.scale_inv, 1 / scale)


def test_infinity_in_a_tensor_gives_scale_one_and_the_maximum() -> None:
    x = torch.tensor([[math.inf, 3.0, math.nan]])
    scale = scale_from_amax(amax_of(x), E4M3FN, PLAIN)
    values = quantize_tensor(x, scale, E4M3FN).dequantize()
    assert values[0, :2].tolist() == [448.0, 3.0]
    assert values[0, 2].isnan()


@pytest.mark.parametrize("block", [(1, 128), (128, 1), (128, 128)])
def test_blocks_have_scales_of_their_own_at_ragged_edges_too(block) -> None:
    x = torch.randn(144, 272) * torch.exp2(torch.arange(272.0) / 16)
    quantized = quantize_blocks(x, block, E4M3FN, POWER_2)
    rows, columns = block
    values = quantized.dequantize()
    for i in range(0, 144, rows):
        for j in range(0, 272, columns):
            tile = x[i : i + rows, j : j + columns]
            scale = 2.0 ** math.floor(math.log2(448.0 / tile.abs().max().item()))
            assert quantized.scale_inv[i // rows, j // columns].item() == 1 / scale
            expected = (tile * scale).clamp(-448, 448).to(E4M3FN).float() / scale
            assert torch.equal(values[i : i + rows, j : j + columns], expected)
        if rows == 1 and i > 3:
            break


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, FP32_MAX), (torch.bfloat16, BF16_MAX)])
def test_tiny_block_takes_the_maximum_of_its_own_dtype_as_scale(dtype, expected) -> None:
    x = torch.full((1, 16), 2.0**-130, dtype=dtype)
    quantized = quantize_blocks(x, (1, 128), E4M3FN, PLAIN)
    assert quantized.scale_inv.item() == (1 / torch.tensor(expected)).item()


def test_rows_of_zeros_change_nothing_else() -> None:
    x = torch.randn(30, 64)
    padded = torch.cat([x, torch.zeros(2, 64)])
    for block in ((1, 128), (128, 1), (128, 128)):
        short = quantize_blocks(x, block, E4M3FN, POWER_2).dequantize()
        assert torch.equal(quantize_blocks(padded, block, E4M3FN, POWER_2).dequantize()[:30], short)


def test_factor_of_a_tensor_is_left_to_the_product() -> None:
    quantized = Quantized(torch.tensor([[448.0]]).to(E4M3FN), torch.tensor(3.0))
    operand, factor = quantized.factored(1)
    assert operand.item() == 448.0
    assert factor.item() == 3.0


@pytest.mark.parametrize("block", [(1, 128), (128, 1), (128, 128)])
@pytest.mark.parametrize("settings", [PLAIN, POWER_2])
@pytest.mark.parametrize("summed", [0, 1])
def test_matrix_times_factor_is_what_the_blocks_stand_for(block, settings, summed) -> None:
    # Up to 2**50 the factor is 1; a scale beyond leaves the power of two that is too much to the product.
    magnitudes = torch.exp2(torch.arange(-40.0, 127.0, 0.5))[:, None].expand(-1, 200)
    x = magnitudes if summed == 1 else magnitudes.t()
    quantized = quantize_blocks(x, block, E4M3FN, settings)
    matrix, factor = quantized.factored(summed)
    spread = factor[:, None] if summed == 1 else factor[None, :]
    assert torch.equal(matrix.double() * spread.double(), quantized.dequantize().double())
    assert torch.equal(factor.log2(), factor.log2().round())
    assert (factor >= 1).all()
    assert factor.max() > 1
    # 448 times a scale that is at most twice 2**40.
    assert matrix.max() < 2.0**50
