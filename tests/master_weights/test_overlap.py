"""Tensors that share memory without being one object are refused, and only those."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights import MasterWeights


def two(left: torch.Tensor, right: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.first = nn.Parameter(torch.ones(2))
    module.left = nn.Parameter(left)
    module.right = nn.Parameter(right)
    return module


def transposed() -> nn.Module:
    weight = torch.randn(4, 6)
    return two(weight, weight.t())


def same() -> nn.Module:
    weight = torch.randn(4, 6)
    return two(weight, weight.view(24))


def partly() -> nn.Module:
    block = torch.randn(10)
    return two(block[:6], block[5:])


def complex_view() -> nn.Module:
    weight = torch.randn(4, 2)
    return two(weight, torch.view_as_complex(weight))


def with_norm() -> nn.Module:
    module = nn.Module()
    module.left = nn.Linear(4, 4)
    module.right = nn.LayerNorm(4)
    module.right.bias.data = module.left.bias.data
    return module


@pytest.mark.parametrize("build", [transposed, same, partly, complex_view, with_norm])
@pytest.mark.parametrize("mode", ["copy", "split", "none"])
def test_parameters_that_share_memory_are_refused_with_the_fix_and_left_as_they_were(mode: str, build: Any) -> None:
    module = build()
    before = {name: (param.dtype, param.data_ptr()) for name, param in module.named_parameters()}
    with pytest.raises(UnsupportedError, match=r"'left.*' and 'right.*' share memory but are two objects.*Tie the obj"):
        MasterWeights(mode).convert_(module)
    assert {name: (param.dtype, param.data_ptr()) for name, param in module.named_parameters()} == before


def test_a_buffer_over_a_parameter_is_refused() -> None:
    module = nn.Linear(4, 4)
    module.register_buffer("seen", module.weight.detach()[0])
    with pytest.raises(UnsupportedError, match=r"'seen' and 'weight' share memory"):
        MasterWeights("copy").convert_(module)


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_views_of_one_block_without_a_common_element_are_cast(mode: str) -> None:
    # As vector_to_parameters leaves them, and as two halves of columns.
    block, wide = torch.randn(10), torch.randn(4, 6)
    for left, right in ((block[:5], block[5:]), (wide[:, :3], wide[:, 3:])):
        module = two(left, right)
        masters = MasterWeights(mode)
        masters.convert_(module)
        assert torch.equal(masters.value_of(module.left), left)
        assert torch.equal(masters.value_of(module.right), right)
        assert module.left.dtype is torch.bfloat16


def test_what_stays_fp32_may_share_memory() -> None:
    module = transposed()
    MasterWeights("copy").convert_(module, keep_fp32=[module.left, module.right])
    assert module.left.data_ptr() == module.right.data_ptr()
