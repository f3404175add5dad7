"""Unscaling: once per gradient, exact for powers of two, and nothing non-finite goes unseen."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_mp.grad_scaler import GradientUnscaler, LossScaler, gradient_amaxes
from lightning_mp.loss_scale import StaticLossScale

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


def params_with(*grads):
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params, torch.optim.SGD(params, 0.1)


@settings(deadline=None)
@given(values=st.lists(FINITE, min_size=1, max_size=8), power=st.integers(-8, 20))
def test_unscaled_gradient_is_the_quotient_rounded_once(values, power):
    grad = torch.tensor(values)
    params, optimizer = params_with(grad.clone())
    GradientUnscaler(LossScaler(StaticLossScale(2.0**power))).unscale_(optimizer)
    assert torch.equal(params[0].grad, (grad.double() / 2.0**power).float())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("scaled", [True, False])
def test_one_bad_element_anywhere_is_found(bad, place, scaled):
    grads = [torch.ones(3), torch.ones(2, 2, dtype=torch.float64), torch.ones(1)]
    grads[place].view(-1)[-1] = bad
    _, optimizer = params_with(*grads)
    scaler = LossScaler(StaticLossScale(4)) if scaled else None
    assert GradientUnscaler(scaler).unscale_(optimizer).item() == 1.0


def test_check_without_a_scaler_changes_no_bit():
    grad = torch.randn(100) * 1e-40  # subnormals: a product with one must not flush them
    params, optimizer = params_with(grad.clone())
    assert GradientUnscaler(None).unscale_(optimizer).item() == 0.0
    assert torch.equal(params[0].grad, grad)


def test_optimizer_without_gradients_is_told_apart_from_clean_ones():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    assert GradientUnscaler(None).unscale_(optimizer) is None


def test_complex_sparse_and_empty_gradients_are_checked():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1, 1])).sum().backward()
    values, real = embedding.weight.grad._values().clone(), torch.ones(2)
    params, optimizer = params_with(torch.ones(2, dtype=torch.complex64) * (1 + 2j), torch.zeros(0), real)
    optimizer.add_param_group({"params": [embedding.weight]})
    unscaler = GradientUnscaler(LossScaler(StaticLossScale(2)))
    assert unscaler.unscale_(optimizer).item() == 0.0
    assert torch.equal(params[0].grad, torch.full((2,), 0.5 + 1j))
    assert torch.equal(embedding.weight.grad._values(), values / 2)
    params[0].grad[0] = complex(0, math.inf)
    unscaler.before_backward()
    assert unscaler.unscale_(optimizer).item() == 1.0


def test_second_call_since_a_backward_divides_nothing():
    params, optimizer = params_with(torch.full((2,), 8.0))
    unscaler = GradientUnscaler(LossScaler(StaticLossScale(4)))
    first, second = unscaler.unscale_(optimizer), unscaler.unscale_(optimizer)
    assert first is second
    assert params[0].grad.tolist() == [2.0, 2.0]


def test_scale_beyond_the_reciprocals_range_still_unscales():
    params, optimizer = params_with(torch.full((1,), 2.0**100))
    GradientUnscaler(LossScaler(StaticLossScale(2.0**100))).unscale_(optimizer)
    assert params[0].grad.item() == 1.0


def test_amaxes_name_the_parameters_that_have_gradients():
    params, optimizer = params_with(torch.tensor([1.0, -3.0]), torch.zeros(0), torch.tensor([math.nan, 1.0]))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    named, amaxes = gradient_amaxes(optimizer)
    assert [p is q for p, q in zip(named, (params[0], params[2]), strict=True)] == [True, True]
    assert amaxes[0].item() == 3.0
    assert math.isnan(amaxes[1].item())
