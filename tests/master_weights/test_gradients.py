"""Clipping works on FP32 values, also where gradients are stored in 16 bits."""

import pytest
import torch
from torch import nn

from lightning_mp.errors import LightningMPError, UnsupportedError
from lightning_mp.master_weights.gradients import Gradients, total_grad_norm


def params_with_grads(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in ((64, 33), (17,), (5, 5)):
        param = nn.Parameter(torch.zeros(shape, dtype=dtype))
        param.grad = torch.randn(shape, generator=generator).bfloat16().to(dtype)
        params.append(param)
    return params


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_norm_of_bf16_gradients_is_that_of_their_fp64_values(norm_type: float) -> None:
    params = params_with_grads(torch.bfloat16)
    exact = torch.cat([param.grad.double().flatten() for param in params])
    expected = torch.linalg.vector_norm(exact, norm_type)
    # FP32 sums of 2000 terms: a few FP32 ulps. A BF16 sum would be off by 2**-9 and more.
    torch.testing.assert_close(Gradients().norm(params, norm_type).double(), expected, rtol=1e-6, atol=0.0)


def deferring() -> Gradients:
    gradients = Gradients()
    gradients.defers = True
    return gradients


@pytest.mark.parametrize("max_norm", [0.5, 1e4])
@pytest.mark.parametrize("defers", [True, False])
def test_clipping_bf16_gradients_gives_the_bits_of_clipping_fp32_ones(max_norm: float, defers: bool) -> None:
    stored, wide = params_with_grads(torch.bfloat16), params_with_grads(torch.float32)
    gradients = Gradients()
    gradients.defers = defers
    before = [param.grad.clone() for param in stored]
    norm = gradients.clip_norm_(stored, max_norm)
    expected_norm = torch.nn.utils.clip_grad_norm_(wide, max_norm)
    assert norm.item() == expected_norm.item()
    for param, kept, oracle in zip(stored, before, wide, strict=True):
        assert torch.equal(gradients.fp32(param), oracle.grad)
        # Never rounded to 16 bits: as it was while the clip waits, else FP32 for all to see.
        assert torch.equal(param.grad, kept if defers else oracle.grad)


def test_a_clipped_gradient_that_is_changed_or_replaced_counts_as_it_stands() -> None:
    stored, wide = params_with_grads(torch.bfloat16), params_with_grads(torch.float32)
    gradients = Gradients()
    gradients.clip_norm_(stored, 0.01)
    torch.nn.utils.clip_grad_norm_(wide, 0.01)
    for params in (stored, wide):
        params[0].grad.add_(1e-5)
        params[1].grad = params[1].grad * 0.3
    assert all(torch.equal(gradients.fp32(a), b.grad) for a, b in zip(stored, wide, strict=True))


def test_widening_makes_waiting_clips_visible_in_fp32() -> None:
    stored, wide = params_with_grads(torch.bfloat16), params_with_grads(torch.float32)
    gradients = deferring()
    gradients.clip_value_(stored, 0.3)
    torch.nn.utils.clip_grad_value_(wide, 0.3)
    gradients.widen_(stored)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(stored, wide, strict=True))
    gradients.widen_(stored)
    assert all(torch.equal(gradients.fp32(a), b.grad) for a, b in zip(stored, wide, strict=True))


def test_clipping_fp32_gradients_works_in_place_as_torch_does() -> None:
    ours, theirs = params_with_grads(torch.float32), params_with_grads(torch.float32)
    Gradients().clip_norm_(ours, 0.5)
    torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


def test_clips_of_value_and_norm_follow_each_other() -> None:
    stored, wide = params_with_grads(torch.bfloat16), params_with_grads(torch.float32)
    gradients = deferring()
    for _ in range(2):
        gradients.clip_value_(stored, 0.3)
        torch.nn.utils.clip_grad_value_(wide, 0.3)
        norm = gradients.clip_norm_(stored, 0.7)
        assert norm.item() == torch.nn.utils.clip_grad_norm_(wide, 0.7).item()
    assert all(torch.equal(gradients.fp32(a), b.grad) for a, b in zip(stored, wide, strict=True))


def test_a_clip_is_not_applied_to_a_later_gradient() -> None:
    params = params_with_grads(torch.bfloat16)
    gradients = deferring()
    gradients.clip_norm_(params, 0.01)
    gradients.forget_all()  # the step was skipped, or the next backward begins
    fresh = params_with_grads(torch.bfloat16, seed=1)
    for param, other in zip(params, fresh, strict=True):
        param.grad = other.grad.clone()
    assert all(torch.equal(gradients.fp32(a), b.grad.float()) for a, b in zip(params, fresh, strict=True))


def test_a_gradient_zeroed_and_filled_again_can_be_clipped_again() -> None:
    params = params_with_grads(torch.bfloat16)
    gradients = deferring()
    gradients.clip_norm_(params, 0.01)
    for param in params:
        param.grad.zero_().add_(1.0)
    norm = gradients.clip_value_(params, 0.5), gradients.norm(params, float("inf"))
    assert norm[1].item() == 0.5


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_a_gradient_changed_while_its_clip_waits_is_refused_with_the_fix(change: str) -> None:
    params = params_with_grads(torch.bfloat16)
    gradients = deferring()
    gradients.clip_norm_(params, 0.01)
    if change == "in place":
        params[1].grad.add_(1.0)
    else:
        params[1].grad = params[1].grad * 1.0
    with pytest.raises(UnsupportedError, match=r"\(17,\) was changed after gradient_clip_val clipped it.*pre-hook"):
        gradients.fp32(params[1])


def test_error_if_nonfinite_raises_before_anything_is_clipped() -> None:
    params = params_with_grads(torch.float32)
    params[0].grad[0, 0] = float("nan")
    before = [param.grad.clone() for param in params]
    with pytest.raises(LightningMPError, match=r"norm of order 2.0 is nan, so it cannot be clipped to 1.0"):
        Gradients().clip_norm_(params, 1.0, error_if_nonfinite=True)
    assert all(torch.equal(a.grad[1:], b[1:]) for a, b in zip(params[:1], before, strict=False))


def test_norm_spans_dtypes_sparse_gradients_and_nothing() -> None:
    indices, entries = torch.tensor([[0, 0, 2]]), torch.ones(3, 1)
    sparse = torch.sparse_coo_tensor(indices, entries, (4, 1), check_invariants=True)
    assert total_grad_norm([sparse, torch.tensor([2.0], dtype=torch.float64)]).item() == pytest.approx(3.0, rel=2**-23)
    assert total_grad_norm([]).item() == 0.0
