"""FP32 to BF16 plus 16 further bits and back: every finite bit pattern is restored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mp.errors import SettingTypeError, UnsupportedError
from lightning_mp.master_weights.split import flat_view, join_, publish_, restore_written_, split_

# The low bits around which rounding changes its mind: exact ties, one below, one above, the ends.
LOW_BITS = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0xBEEF)


def from_bits(bits: torch.Tensor) -> torch.Tensor:
    return (((bits + 2**31) % 2**32) - 2**31).to(torch.int32).view(torch.float32)


def round_trip(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hi = torch.empty_like(value, dtype=torch.bfloat16)
    lo = torch.empty_like(value, dtype=torch.int16)
    block = value.clone()
    split_(block, [block], [hi], [lo])
    out = torch.empty_like(value)
    join_([hi], [lo], [out])
    return hi, out


def bits_of(value: torch.Tensor) -> torch.Tensor:
    return value.view(torch.int32)


def every_upper_half() -> torch.Tensor:
    """All 2**16 signs, exponents (subnormals included) and upper mantissas, each with the low bits above."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    return (upper[:, None] + torch.tensor(LOW_BITS)).flatten()


def test_split_restores_the_bits_of_every_finite_value_over_all_exponents() -> None:
    value = from_bits(every_upper_half())
    value = value[value.isfinite()]
    _, out = round_trip(value)
    assert torch.equal(bits_of(out), bits_of(value))
    assert int((value.abs() < torch.finfo(torch.float32).smallest_normal).sum()) > 1000  # subnormals were in it


def test_split_keeps_signed_zeros_and_infinities() -> None:
    value = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    hi, out = round_trip(value)
    assert torch.equal(bits_of(out), bits_of(value))
    assert torch.equal(hi.view(torch.int16), value.bfloat16().view(torch.int16))


def test_halves_of_one_value_are_left_as_they_were_joined() -> None:
    value = from_bits(every_upper_half())
    hi, out = round_trip(value)
    joined = out.clone()
    restore_written_([out], [hi])
    assert torch.equal(bits_of(out)[~value.isnan()], bits_of(joined)[~value.isnan()])
    assert bool(out[value.isnan()].isnan().all())


@pytest.mark.parametrize("written", [0.0, -0.0, float("inf"), -float("inf"), 1.0])
def test_value_written_beside_any_further_bits_stays_within_half_a_bf16_ulp(written: float) -> None:
    lo = torch.arange(-(2**15), 2**15).to(torch.int16)
    hi, out = torch.full(lo.shape, written, dtype=torch.bfloat16), torch.empty(lo.shape)
    join_([hi], [lo], [out])
    restore_written_([out], [hi])
    assert not bool(out.isnan().any())
    # Of one FP32 bit pattern to the next is an ulp; infinity follows the largest finite one.
    steps = bits_of(out).long() - bits_of(hi.float()).long()
    assert int(steps.abs().max()) <= 2**15


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_split_restores_any_finite_bit_pattern(patterns: list[int]) -> None:
    value = from_bits(torch.tensor(patterns, dtype=torch.int64))
    value = torch.where(value.isfinite(), value, torch.zeros_like(value))
    _, out = round_trip(value)
    assert torch.equal(bits_of(out), bits_of(value))


def test_working_weight_is_the_nearest_bf16_with_ties_away_from_zero() -> None:
    # Oracle in FP64: the two BF16 neighbours are the truncation and one BF16 ulp further out.
    value = from_bits(every_upper_half())
    value = value[value.isfinite() & (value.abs() < 1e38)]
    below = (bits_of(value) & -65536).view(torch.float32).double()
    above = ((bits_of(value) & -65536) + 65536).view(torch.float32).double()
    nearer_above = (value.double() - below).abs() >= (above - value.double()).abs()
    hi, _ = round_trip(value)
    assert torch.equal(hi.double(), torch.where(nearer_above, above, below))


def test_working_weight_differs_from_torch_rounding_only_at_exact_ties() -> None:
    value = from_bits(every_upper_half())
    value = value[value.isfinite()]
    hi, _ = round_trip(value)
    differs = hi.view(torch.int16) != value.bfloat16().view(torch.int16)
    assert bool(differs.any())
    assert set((bits_of(value[differs]) & 0xFFFF).tolist()) == {0x8000}


@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF, 0x7F800001, 0x7F80FFFF])
def test_a_nan_master_is_published_as_nan_and_stays_one(pattern: int) -> None:
    # 0x7FFFFFFF is the NaN that CUDA makes; adding the rounding bit to it gives -0.0.
    hi, out = round_trip(from_bits(torch.tensor([pattern, 0x3F800000], dtype=torch.int64)))
    assert bool(hi[0].isnan())
    assert bool(out[0].isnan())
    assert out[1].item() == 1.0


def test_fp16_is_published_with_ties_to_even() -> None:
    value = torch.tensor([1.0 + 2.0**-11, 1.0 + 3 * 2.0**-11, 70000.0])
    hi = torch.empty(3, dtype=torch.float16)
    publish_(value, hi)
    assert hi.tolist() == [1.0, 1.0 + 2.0**-9, float("inf")]


def test_publish_refuses_a_master_that_is_not_fp32() -> None:
    with pytest.raises(SettingTypeError, match=r"value: found dtype torch.float64; a master weight is torch.float32"):
        publish_(torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).t(),
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(6)[2:],
        torch.randn(()),
        torch.randn(0, 3),
    ],
    ids=["transposed", "channels_last", "offset", "scalar", "empty"],
)
def test_flat_view_writes_through_to_every_element(tensor: torch.Tensor) -> None:
    flat_view(tensor).fill_(7.0)
    assert bool((tensor == 7.0).all())
    assert flat_view(tensor).numel() == tensor.numel()


@pytest.mark.parametrize("tensor", [torch.zeros(4, 4)[:, :3], torch.zeros(3, 1).expand(3, 4)], ids=["gaps", "shared"])
def test_flat_view_refuses_memory_with_gaps_or_shared_elements(tensor: torch.Tensor) -> None:
    with pytest.raises(UnsupportedError, match=r"gaps or shares elements. Assign weight.data = value.contiguous"):
        flat_view(tensor)
