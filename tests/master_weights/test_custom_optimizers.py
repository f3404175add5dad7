"""Optimizers as people write them compute on masters what they compute on FP32 parameters, bit for bit."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights import MasterWeights

MODES = ["copy", "split"]


class Custom(Optimizer):
    """Walks over its parameters; what it does to one is the subclass's."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.buffers: dict[Any, torch.Tensor] = {}
        self.prepare()

    def prepare(self) -> None:
        """Do what the constructor does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, group["lr"])

    def update(self, param: nn.Parameter, lr: float) -> None:
        raise NotImplementedError


class ByParameter(Custom):
    """Momentum in a dict of its own."""

    def update(self, param: nn.Parameter, lr: float) -> None:
        buffer = self.buffers.setdefault(param, torch.zeros_like(param))
        param.sub_(buffer.mul_(0.9).add_(param.grad), alpha=lr)


class ById(Custom):
    def update(self, param: nn.Parameter, lr: float) -> None:
        buffer = self.buffers.setdefault(id(param), torch.zeros_like(param))
        param.sub_(buffer.mul_(0.9).add_(param.grad), alpha=lr)


class ByAttribute(Custom):
    """Reads what the constructor set on the parameter, and counts there."""

    def prepare(self) -> None:
        for param in self.param_groups[0]["params"]:
            if param.dim() > 1:
                param.lr_mult = 0.3

    def update(self, param: nn.Parameter, lr: float) -> None:
        param.seen = getattr(param, "seen", 0) + 1
        param.sub_(param.grad, alpha=lr * getattr(param, "lr_mult", 1.0) / param.seen)


class Anchored(Custom):
    """Pulls towards where the weights were when it was made."""

    def prepare(self) -> None:
        for param in self.param_groups[0]["params"]:
            self.state[param]["anchor"] = param.detach().clone()
            self.state[param]["start"] = torch.full_like(param, 0.1)

    def update(self, param: nn.Parameter, lr: float) -> None:
        param.lerp_(self.state[param]["anchor"], 0.1).sub_(param.grad * self.state[param]["start"], alpha=lr)


class ScheduleFree(Custom):
    """As AdamWScheduleFree: ``eval`` and ``train`` move the weights between steps, once each."""

    def prepare(self) -> None:
        self.param_groups[0]["train_mode"] = True

    def update(self, param: nn.Parameter, lr: float) -> None:
        z = self.state[param].setdefault("z", param.detach().clone())
        param.lerp_(z.sub_(param.grad, alpha=lr), 0.3)

    @torch.no_grad()
    def switch(self, *, to_train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != to_train:
                for param in group["params"]:
                    if "z" in self.state[param]:
                        param.lerp_(self.state[param]["z"], 0.5 if to_train else -0.5)
                group["train_mode"] = to_train

    def eval(self) -> None:
        self.switch(to_train=False)

    def train(self) -> None:
        self.switch(to_train=True)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(4, 2))


def steps(module: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for seed in range(first, last):
        generator = torch.Generator().manual_seed(seed)
        for param in module.parameters():
            grad = torch.randn(param.shape, generator=generator)
            param.grad = None if seed == 1 and param.shape == (4,) else grad
        optimizer.step()


def assert_follows(module: nn.Module, masters: MasterWeights, reference: nn.Module) -> None:
    for param, expected in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(masters.value_of(param), expected)


@pytest.mark.parametrize("bucket_numel", [1, 100, 2**22])
@pytest.mark.parametrize("cls", [ByParameter, ById, ByAttribute, Anchored, ScheduleFree])
@pytest.mark.parametrize("mode", MODES)
def test_a_custom_optimizer_follows_itself_on_fp32_parameters(mode: str, cls: Any, bucket_numel: int) -> None:
    module, reference = build(), build()
    masters = MasterWeights(mode, bucket_numel=bucket_numel)
    masters.convert_(module)
    optimizer, plain = cls(module.parameters()), cls(reference.parameters())
    masters.attach([optimizer])
    steps(module, optimizer, 0, 5)
    steps(reference, plain, 0, 5)
    assert_follows(module, masters, reference)
    assert not torch.equal(reference[0].weight, build()[0].weight)


@pytest.mark.parametrize("bucket_numel", [1, 2**22])
@pytest.mark.parametrize("mode", MODES)
def test_eval_and_train_of_a_schedule_free_optimizer_move_the_masters_once(mode: str, bucket_numel: int) -> None:
    module, reference = build(), build()
    masters = MasterWeights(mode, bucket_numel=bucket_numel)
    masters.convert_(module)
    optimizer, plain = ScheduleFree(module.parameters()), ScheduleFree(reference.parameters())
    masters.attach([optimizer])
    for start in (0, 3):
        steps(module, optimizer, start, start + 3)
        steps(reference, plain, start, start + 3)
        for name in ("eval", "eval", "train"):
            before = reference[0].weight.detach().clone()
            getattr(optimizer, name)()
            getattr(plain, name)()
            assert_follows(module, masters, reference)
            assert torch.equal(module[0].weight, masters.value_of(module[0].weight).bfloat16())
    assert not torch.equal(before, reference[0].weight)
    masters.detach()
    assert not {"step", "train", "eval"} & set(vars(optimizer))


@pytest.mark.parametrize("mode", MODES)
def test_what_an_optimizer_notes_on_a_parameter_is_the_modules(mode: str) -> None:
    module = build()
    masters = MasterWeights(mode)
    masters.convert_(module)
    optimizer = ByAttribute(module.parameters())
    masters.attach([optimizer])
    steps(module, optimizer, 0, 3)
    assert [param.seen for param in module.parameters()] == [3, 3, 3, 2, 3, 3]


class Polyak(torch.optim.Optimizer):
    """Steps by the loss that its closure returns."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.sub_(param.grad, alpha=group["lr"] * min(1.0, float(loss)))
        return loss


class Constants(torch.optim.SGD):
    """Keeps coefficients in a tensor."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, lr=lr)
        self.coefficients = torch.tensor([0.5, 2.0, -1.0])

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            param.sub_(param.grad, alpha=self.param_groups[0]["lr"] * self.coefficients[1].item())


@pytest.mark.parametrize("mode", ["copy", "split"])
@pytest.mark.parametrize("optimizer_class", [Polyak, Constants])
@pytest.mark.parametrize("bucket_numel", [8, 2**22])
def test_rule_that_uses_the_loss_or_constants_of_its_own_equals_fp32(mode, optimizer_class, bucket_numel):
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    expected = copy.deepcopy(module)
    masters = MasterWeights(mode, bucket_numel=bucket_numel)
    masters.convert_(module)
    optimizer, plain = optimizer_class(module.parameters()), optimizer_class(expected.parameters())
    masters.attach([optimizer])
    for step in range(4):
        for param, twin in zip(module.parameters(), expected.parameters(), strict=True):
            param.grad = torch.randn(param.shape)
            twin.grad = param.grad.clone()
        loss = torch.tensor(0.25 + step)
        optimizer.step(lambda loss=loss: loss)
        plain.step(lambda loss=loss: loss)
    masters.detach()
    for param, twin in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(param, twin)


class Tilted(torch.optim.SGD):
    """Takes its gradient elsewhere: what was computed before the step is none of it."""

    def step(self, closure=None):
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.add_(1.0)
        with torch.enable_grad():
            closure()
        return super().step()


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_closure_that_is_evaluated_after_a_change_of_the_stand_ins_is_refused(mode):
    module = nn.Linear(4, 4)
    masters = MasterWeights(mode)
    masters.convert_(module)
    optimizer = Tilted(module.parameters(), lr=0.1)
    masters.attach([optimizer])
    for param in module.parameters():
        param.grad = torch.ones(param.shape)
    with pytest.raises(UnsupportedError, match=r"Tilted\.step changes weights or gradients before"):
        optimizer.step(lambda: torch.zeros(()))
