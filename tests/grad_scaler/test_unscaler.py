"""Unscaling: once per gradient, exact for powers of two, and nothing non-finite goes unseen."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_mp.grad_scaler import GradientUnscaler, LossScaler, gradient_amaxes
from lightning_mp.grad_scaler.unscaler import find_nonfinite_
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


# torch's check does not know BF16 on CUDA; there the largest magnitudes are looked at.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALVES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1, 7, 70_000])  # a part of a chunk of torch's kernels, and several
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_of_many_is_found_by_the_largest_magnitude(device, dtype, size, bad):
    for place in {0, size // 2, size - 1}:
        grads = [torch.ones(3, 2, dtype=dtype, device=device), torch.zeros(0, dtype=dtype, device=device)]
        grads.append(torch.full((size,), torch.finfo(dtype).max, dtype=dtype, device=device))
        found = torch.zeros((), device=device)
        find_nonfinite_(grads, found)
        assert found.item() == 0.0  # the largest magnitudes of all are finite, and their sum is not
        grads[-1][place] = bad
        kept = grads[-1].clone()
        find_nonfinite_(grads, found)
        assert found.item() == 1.0
        assert torch.equal(grads[-1].isfinite(), kept.isfinite())
        find_nonfinite_(grads[:2], found)
        assert found.item() == 1.0  # it is not taken back


def test_no_gradient_at_all_is_finite():
    found = torch.zeros(())
    find_nonfinite_([torch.zeros(0)], found)
    assert found.item() == 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_gradients_of_every_dtype_are_checked_and_divided_on_cuda_as_on_the_cpu(dtype, scale, bad):
    found, grads = [], []
    for device in ("cpu", "cuda"):
        params = [nn.Parameter(torch.zeros(5, dtype=dtype, device=device)) for _ in range(2)]
        params[0].grad = torch.full((5,), 6.0, dtype=dtype, device=device)
        params[1].grad = torch.tensor([1.0, 2.0, bad, 3.0, 8.0], dtype=dtype, device=device)
        scaler = None if scale is None else LossScaler(StaticLossScale(scale), device)
        found.append(GradientUnscaler(scaler).unscale_(torch.optim.SGD(params, 0.1)).item())
        grads += [[param.grad.cpu() for param in params]]
    assert found == [float(not math.isfinite(bad))] * 2
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


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
