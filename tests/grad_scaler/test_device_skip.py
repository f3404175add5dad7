"""Skipping on the device: fused optimizers leave out the update, and everything else is told apart."""

import pytest
import torch
from torch import nn

from lightning_mp.grad_scaler import Readback, step_unless, supports_skip_on_device


def stepped(optimizer_class, **settings):
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(5))
    optimizer = optimizer_class([param], lr=0.1, **settings)
    param.grad = torch.ones(5)
    optimizer.step()
    return param, optimizer


@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adagrad, {"fused": True}),
        (torch.optim.SGD, {"fused": True}),
        (torch.optim.SGD, {"fused": True, "momentum": 0.9}),
    ],
)
def test_flagged_step_leaves_weight_and_state_as_they_are(optimizer_class, settings):
    param, optimizer = stepped(optimizer_class, **settings)
    if optimizer_class is torch.optim.Adagrad and not hasattr(optimizer, "_step_supports_amp_scaling"):
        assert not supports_skip_on_device(optimizer)  # torch 2.11 does not say so of it: it gets the host read
        return
    assert supports_skip_on_device(optimizer)
    before = param.detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[param].items() if v is not None}
    param.grad = torch.full((5,), float("nan"))
    step_unless(torch.ones(()), optimizer, {})
    assert torch.equal(param, before)
    assert all(torch.equal(optimizer.state[param][k], v) for k, v in state.items())
    assert not hasattr(optimizer, "found_inf")
    param.grad = torch.ones(5)
    step_unless(torch.zeros(()), optimizer, {})
    assert not torch.equal(param, before)


@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [(torch.optim.AdamW, {}), (torch.optim.AdamW, {"foreach": True}), (torch.optim.RMSprop, {})],
)
def test_other_optimizers_need_the_host(optimizer_class, settings):
    assert not supports_skip_on_device(stepped(optimizer_class, **settings)[1])


def test_fused_sgd_with_momentum_needs_the_host_until_it_has_stepped():
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], 0.1, momentum=0.9, fused=True)
    param.grad = torch.ones(3)
    assert not supports_skip_on_device(optimizer)
    optimizer.step()
    assert supports_skip_on_device(optimizer)


def test_optimizer_that_takes_a_grad_scaler_needs_the_host():
    class Unscales(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure=None, grad_scaler=None):
            return super().step(closure)

    assert not supports_skip_on_device(Unscales([nn.Parameter(torch.ones(1))], 0.1))


def test_every_read_is_counted():
    before = Readback.count
    assert Readback.read_all([torch.tensor(1.0), torch.tensor(2.0)]) == [1.0, 2.0]
    assert Readback([torch.tensor(3.0), torch.tensor(4.0)]).wait() == [3.0, 4.0]
    assert Readback.count == before + 2


@pytest.mark.gpu
def test_read_that_was_asked_for_does_not_stall_the_host():
    values = [torch.tensor(3.0, device="cuda"), torch.tensor(4.0, device="cuda")]
    Readback(values).wait()  # pinned memory is allocated once, which synchronizes
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = Readback(values)
        assert pending.wait() == [3.0, 4.0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
