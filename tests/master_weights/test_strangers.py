"""Optimizers made in mid-training update the masters, or their step is refused."""

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_hooks

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights import MasterWeights


def attached(mode: str, **settings: Any) -> tuple[nn.Linear, MasterWeights, torch.optim.Optimizer]:
    module = nn.Linear(4, 4)
    masters = MasterWeights(mode, **settings)
    masters.convert_(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    masters.attach([optimizer])
    for param in module.parameters():
        param.grad = torch.ones(param.shape)
    return module, masters, optimizer


class Own(torch.optim.Optimizer):
    """A step of its own that never calls the base class."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            param.sub_(1.0)


@pytest.mark.parametrize("make", [torch.optim.AdamW, Own])
@pytest.mark.parametrize("mode", ["copy", "split"])
def test_a_step_of_an_optimizer_that_was_never_attached_is_refused_and_changes_nothing(mode: str, make: Any) -> None:
    module, masters, _ = attached(mode)
    before = masters.value_of(module.weight).clone()
    stranger = make(module.parameters())
    with pytest.raises(UnsupportedError, match=r"step\(\) was called past the Trainer.*trainer.optimizers = \["):
        stranger.step()
    assert torch.equal(masters.value_of(module.weight), before)
    assert not stranger.state


def test_optimizers_of_other_parameters_and_attached_ones_step_freely() -> None:
    module, masters, optimizer = attached("split")
    other = nn.Linear(2, 2)
    other.weight.grad = torch.ones(2, 2)
    before, first = masters.value_of(module.weight).clone(), other.weight.detach().clone()
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    optimizer.step()
    assert torch.equal(other.weight, first - 1.0)
    assert torch.equal(masters.value_of(module.weight), before - 1e-4)


def test_none_takes_any_step() -> None:
    module, _, _ = attached("none")
    before = module.weight.detach().float()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert torch.equal(module.weight, (before - 1.0).bfloat16())


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_an_adopted_optimizer_updates_masters_and_leaves_writes_from_outside_alone(mode: str) -> None:
    module, masters, optimizer = attached(mode)
    with torch.no_grad():
        module.weight.zero_()  # not seen by a step yet
    fresh = torch.optim.SGD(module.parameters(), lr=1e-4)
    masters.adopt(fresh)
    masters.adopt(fresh)
    fresh.step()
    assert torch.equal(masters.value_of(module.weight), torch.full((4, 4), -1e-4))
    optimizer.step()  # the old one still works


def test_an_adopted_optimizer_that_cannot_carry_masters_is_refused() -> None:
    module, masters, _ = attached("split")
    with pytest.raises(UnsupportedError, match="LBFGS mixes all parameters"):
        masters.adopt(torch.optim.LBFGS(module.parameters()))


def test_no_global_hook_is_left_behind() -> None:
    before = dict(torch_hooks._global_optimizer_pre_hooks)
    _, masters, _ = attached("copy")
    masters.attach([])
    assert len(torch_hooks._global_optimizer_pre_hooks) == len(before) + 1
    masters.detach()
    assert dict(torch_hooks._global_optimizer_pre_hooks) == before


def test_an_engine_that_is_gone_without_detaching_refuses_nothing() -> None:
    module, masters, optimizer = attached("split")
    del masters, optimizer
    gc.collect()
    before = module.weight.detach().clone()
    for param in module.parameters():
        param.grad = param.grad_dtype = None
        param.grad = torch.ones_like(param)
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert torch.equal(module.weight, before - 1.0)
