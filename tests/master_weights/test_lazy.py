"""Lazy modules get masters in their first forward."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights import MasterWeights

MODES = ["copy", "split"]


def lazy() -> nn.Sequential:
    return nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Linear(6, 3))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    torch.manual_seed(1)  # also for what the first forward initializes
    for _ in range(steps):
        x = torch.randn(4, 5)
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def converted(mode: str, **settings: Any) -> tuple[nn.Sequential, MasterWeights, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = lazy()
    masters = MasterWeights(mode)
    masters.convert_(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    masters.attach([optimizer], **settings)
    return module, masters, optimizer


@pytest.mark.parametrize("mode", MODES)
def test_the_first_forward_takes_exact_masters_and_casts(mode: str) -> None:
    module, masters, _ = converted(mode)
    torch.manual_seed(0)
    plain = lazy()
    for net in (module, plain):
        torch.manual_seed(1)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            net(torch.ones(4, 5))
    assert module[0].weight.dtype is torch.bfloat16
    assert module[1].weight.dtype is torch.float32  # a normalization layer
    assert torch.equal(masters.value_of(module[0].weight), plain[0].weight)
    assert masters.name_of(module[0].bias) == "0.bias"
    for key, value in plain.state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)[0].weight, plain[0].weight)
    assert not module[0]._forward_pre_hooks


@pytest.mark.parametrize("accumulates", [True, False])
def test_training_gives_split_the_bits_of_copy_and_fp32_states(accumulates: bool) -> None:
    states = []
    for mode in MODES:
        module, masters, optimizer = converted(mode, accumulates=accumulates)
        train(module, optimizer)
        assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}
        before = {key: value.clone() for key, value in module.state_dict().items()}
        masters.detach()
        assert {param.dtype for param in module.parameters()} == {torch.float32}
        assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())
        states.append(before)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("mode", MODES)
def test_a_first_forward_in_inference_mode_can_be_trained_from(mode: str) -> None:
    # As after Lightning's sanity check. Parameters that stay FP32 become inference tensors, as in plain torch.
    module = nn.Sequential(nn.LazyLinear(6))
    masters = MasterWeights(mode)
    masters.convert_(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    masters.attach([optimizer])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(4, 5))
    before = masters.value_of(module[0].weight).clone()
    train(module, optimizer)
    assert not torch.equal(masters.value_of(module[0].weight), before)


@pytest.mark.parametrize("mode", MODES)
def test_detach_before_any_forward_leaves_the_module_lazy_and_without_hooks(mode: str) -> None:
    module = nn.Sequential(nn.LazyLinear(6))
    masters = MasterWeights(mode)
    masters.convert_(module)
    twin = copy.deepcopy(module)
    masters.detach()
    assert is_lazy(module[0].weight)
    for net in (module, twin):
        net(torch.ones(4, 5))
        assert net[0].weight.dtype is torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_loaded_before_the_first_forward_becomes_the_master(mode: str) -> None:
    trained = lazy()
    trained(torch.ones(4, 5))
    state = trained.state_dict()
    module, masters, _ = converted(mode)
    module.load_state_dict(state)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module.eval()(torch.ones(4, 5))
    assert torch.equal(masters.value_of(module[0].weight), trained[0].weight)
    assert module[0].weight.dtype is torch.bfloat16


def test_an_optimizer_of_lazy_parameters_is_tried_too() -> None:
    class Normed(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            params = [param for param in self.param_groups[0]["params"] if param.grad is not None]
            norm = sum(param.grad.norm() for param in params)
            for param in params:
                param.sub_(param.grad / norm)

    module = nn.Sequential(nn.LazyLinear(3))
    masters = MasterWeights("split")
    masters.convert_(module)
    with pytest.raises(UnsupportedError, match="Normed updates one parameter by what it sees of the others"):
        masters.attach([Normed(module.parameters())])
