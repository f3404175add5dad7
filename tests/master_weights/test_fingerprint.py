"""Any change of a BF16 tensor shows in its fingerprint, in the block where it is."""

import pytest
import torch

from lightning_mp.master_weights.fingerprint import changed_elements, fingerprints

SIZES = [0, 1, 3, 4, 5, 255, 256, 257, 260, 1000, 1027, 2**15, 2**15 + 1, 2**15 + 130, 2**15 + 256]


def fingerprint(flat: torch.Tensor) -> torch.Tensor:
    alone = fingerprints([flat])[0]
    among = fingerprints([torch.ones(3).bfloat16(), flat, torch.ones(2**15).bfloat16()])[1]
    assert torch.equal(alone, among)
    return alone


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("numel", SIZES)
def test_a_change_of_one_element_is_found_in_its_block_of_256_and_nowhere_else(numel: int, offset: int) -> None:
    flat = torch.randn(numel + offset).bfloat16()[offset:]
    before = fingerprint(flat)
    assert torch.equal(fingerprint(flat), before)
    for index in range(0, numel, 1 + numel // 50):
        changed = torch.empty(numel + offset, dtype=torch.bfloat16)[offset:].copy_(flat)
        bits = changed.view(torch.int16)
        bits[index] ^= 1 << (index % 16)
        mask = changed_elements(before, fingerprint(changed), flat)
        assert mask.shape == flat.shape
        assert bool(mask[index])
        assert int(mask.sum()) <= 256


@pytest.mark.parametrize("numel", SIZES)
def test_a_fingerprint_does_not_depend_on_where_the_tensor_lies(numel: int) -> None:
    flat = torch.randn(numel).bfloat16()
    for offset in (1, 2, 4):
        moved = torch.zeros(numel + offset, dtype=torch.bfloat16)
        moved[offset:] = flat
        assert torch.equal(fingerprint(moved[offset:]), fingerprint(flat))


def test_elements_that_change_places_are_found() -> None:
    flat = torch.randn(1024).bfloat16()
    before = fingerprint(flat)
    for left, right in ((0, 1), (0, 4), (0, 255), (0, 256), (3, 1023)):
        swapped = flat.clone()
        swapped[left], swapped[right] = flat[right], flat[left]
        assert not torch.equal(fingerprint(swapped), before)


@pytest.mark.parametrize("rows", [64, 4096])
@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize(("old", "new"), [(2.0, 0.0), (1.0, float("inf")), (1.0, -1.0), (0.0, -0.0), (0.5, 0.25)])
def test_a_column_that_is_written_shows_in_every_block(width: int, rows: int, old: float, new: float) -> None:
    # Their differences are the same power of two in every row, at the same place of every word.
    table = torch.randn(rows, width).bfloat16()
    for column in {0, width // 2, width - 2, width - 1} - {-1}:
        table[:, column] = old
        before = fingerprint(table.view(-1))
        table[:, column] = new
        assert bool((fingerprint(table.view(-1)) != before).all())


def test_a_fingerprint_takes_a_64th_of_what_it_stands_for() -> None:
    assert fingerprint(torch.zeros(2**16, dtype=torch.bfloat16)).nbytes == 2**17 // 64
