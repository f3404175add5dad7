"""The autocast region: gradients survive a nested no-grad use, and a weight is cast once."""

import pytest
import torch
from torch import nn

from lightning_mp.casting import autocast_region, clear_cast_weights, is_autocast_cache_safe


def test_nested_no_grad_use_of_a_weight_keeps_its_gradient():
    # On a torch that fails here the cache must stay off: that is what the question is asked for.
    layer = nn.Linear(4, 4)
    with autocast_region("cpu", torch.bfloat16, cache_weights=is_autocast_cache_safe()):
        with torch.no_grad():
            layer(torch.ones(1, 4))
        layer(torch.ones(1, 4)).float().sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.skipif(not is_autocast_cache_safe(), reason="this torch loses gradients with the cache on")
def test_repeated_calls_save_one_cast_of_the_weight():
    layer, saved = nn.Linear(64, 64, bias=False), {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def bytes_for(calls, *, cache):
        saved.clear()
        x = torch.ones(1, 64, requires_grad=True)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            autocast_region("cpu", torch.bfloat16, cache_weights=cache),
        ):
            outputs = [layer(x) for _ in range(calls)]
        assert len(outputs) == calls
        return sum(saved.values())

    one_weight = 64 * 64 * 2
    assert bytes_for(8, cache=True) - bytes_for(1, cache=True) < one_weight
    assert bytes_for(8, cache=False) - bytes_for(1, cache=False) >= 7 * one_weight


def test_cleared_weights_are_cast_again():
    layer, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    with autocast_region("cpu", torch.bfloat16, cache_weights=True):
        before = layer(x)
        with torch.no_grad():
            layer.weight.add_(1)
        clear_cast_weights()
        assert not torch.equal(layer(x), before)
