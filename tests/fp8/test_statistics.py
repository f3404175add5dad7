"""What a cast does, measured: against counts written out by hand."""

import math

import pytest
import torch

from lightning_mp.fp8.quantize import amax_of, quantize_blocks, quantize_tensor, scale_from_amax
from lightning_mp.fp8.recipes import QuantizationSettings
from lightning_mp.fp8.statistics import measure_cast, worse_of

E4M3FN = torch.float8_e4m3fn


def measured(x: torch.Tensor, scale: float) -> list[float]:
    return measure_cast(x, quantize_tensor(x, torch.tensor(scale), E4M3FN)).tolist()


def test_shares_count_nonzero_elements_before_the_cast() -> None:
    # At scale 1: 500 and infinity lie beyond 448, 2**-10 is flushed, 1 and 448 are exact.
    x = torch.tensor([[0.0, 1.0, 448.0, 500.0, math.inf, 2.0**-10]])
    amax, scale, saturated, flushed, _ = measured(x, 1.0)
    assert (amax, scale) == (math.inf, 1.0)
    assert saturated == pytest.approx(2 / 5)
    assert flushed == pytest.approx(1 / 5)


def test_sqnr_is_that_of_the_values_after_the_cast() -> None:
    # 17 becomes 16 and 3 stays: signal 17**2 + 3**2, noise 1.
    assert measured(torch.tensor([[17.0, 3.0]]), 1.0)[4] == pytest.approx(10 * math.log10(298.0), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_from_the_tensors_own_amax_saturates_nothing(dtype) -> None:
    # amax * (448 / amax) is off by two roundings for some amax, and must not count.
    for _ in range(200):
        x = torch.randn(1, 8).to(dtype)
        scale = scale_from_amax(amax_of(x), E4M3FN, QuantizationSettings())
        assert measure_cast(x, quantize_tensor(x, scale, E4M3FN))[2].item() == 0.0


def test_blocks_report_the_scale_of_the_largest_block() -> None:
    x = torch.cat([torch.full((1, 128), 7.0), torch.full((1, 128), 448.0)], 1)
    quantized = quantize_blocks(x, (1, 128), E4M3FN, QuantizationSettings(power_2_scale=True))
    amax, scale, saturated, flushed, sqnr = measure_cast(x, quantized).tolist()
    assert (amax, scale, saturated, flushed, sqnr) == (448.0, 1.0, 0.0, 0.0, math.inf)


def test_worse_of_two_calls_is_kept_number_by_number() -> None:
    first, second = torch.tensor([1.0, 2.0, 0.1, 0.5, 30.0]), torch.tensor([2.0, 1.0, 0.2, 0.4, 20.0])
    assert worse_of(first, second).tolist() == pytest.approx([2.0, 1.0, 0.2, 0.5, 20.0])
    assert torch.equal(worse_of(None, first), first)
