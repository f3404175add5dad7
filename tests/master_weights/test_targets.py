"""Which modules are taken for target networks, and who is told of averages in 16 bits."""

import copy
from typing import Any

import torch
from torch import nn

from lightning_mp.master_weights import MasterWeights, frozen_twins


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))


class Pair(nn.Module):
    def __init__(self, *, freeze: bool) -> None:
        super().__init__()
        self.online = net()
        self.target = copy.deepcopy(self.online).requires_grad_(not freeze)
        self.other = nn.Linear(3, 3).requires_grad_(False)


def test_a_frozen_module_with_the_structure_of_a_trained_one_is_found_at_any_depth() -> None:
    root = nn.Module()
    root.inner = Pair(freeze=True)
    assert list(frozen_twins(root)) == ["inner.target"]
    assert frozen_twins(Pair(freeze=True))["target"][0].weight.shape == (8, 4)


def test_repeated_layers_trained_copies_and_16_bit_ones_are_not_found() -> None:
    blocks = nn.ModuleList([net().requires_grad_(False), net()])
    assert not frozen_twins(blocks)
    assert not frozen_twins(nn.Sequential(net().requires_grad_(False), net()))
    assert not frozen_twins(Pair(freeze=False))
    assert not frozen_twins(Pair(freeze=True).bfloat16())


def run(write_every: int, steps: int, write: Any) -> list[str]:
    module = Pair(freeze=False)
    masters = MasterWeights("split")
    told: list[str] = []
    masters.tell = told.append
    masters.convert_(module)
    optimizer = torch.optim.SGD(module.online.parameters(), lr=0.1)
    masters.attach([optimizer])
    for step in range(steps):
        for param in module.online.parameters():
            param.grad = torch.ones(param.shape)
        optimizer.step()
        if step % write_every == 0:
            with torch.no_grad():
                for online, target in zip(module.online.parameters(), module.target.parameters(), strict=True):
                    write(online, target)
    return told


def average(online: nn.Parameter, target: nn.Parameter) -> None:
    target.lerp_(online, 0.01)


def assign_average(online: nn.Parameter, target: nn.Parameter) -> None:
    target.data = torch.lerp(target.data, online.data, 0.01)


def test_an_average_in_16_bits_is_told_once_with_the_fix() -> None:
    for write in (average, assign_average):
        told = run(1, 100, write)
        assert len(told) == 1
        assert "parameters that no optimizer updates are written between steps, target." in told[0]
        assert "FP32Pin(modules=('target', 'target.*'))" in told[0]


def test_copies_now_and_then_and_weights_that_are_updated_are_not_told() -> None:
    assert not run(50, 200, lambda online, target: target.copy_(online))
    assert not run(1, 100, lambda online, target: online.clamp_(-0.5, 0.5))
