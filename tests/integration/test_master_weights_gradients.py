"""Gradients of 16-bit weights as hooks and callbacks find them under a real Trainer."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_mp import MixedPrecision
from tests.mastered import MASTERS, Net, fit
from tests.models import Regression, batches, trainer, weights


def replace(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.grad = param.grad * 0.5


def change(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.grad.mul_(0.5)


class Hooked(Net):
    def __init__(self, hook: Any, *, everywhere: bool) -> None:
        super().__init__(torch.optim.SGD, lr=1.0)
        self.hook = hook
        self.everywhere = everywhere
        self.handle: Any = None

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()[0][0]
        if self.everywhere:
            self.handle = register_optimizer_step_pre_hook(self.hook)
        else:
            optimizer.register_step_pre_hook(self.hook)
        return optimizer


def distance(model: nn.Module, start: list[Tensor]) -> float:
    moved = [param.detach() - first for param, first in zip(model.parameters(), start, strict=True)]
    return torch.linalg.vector_norm(torch.stack([part.norm() for part in moved])).item()


@pytest.mark.parametrize("everywhere", [False, True], ids=["own-hook", "global-hook"])
@pytest.mark.parametrize("hook", [replace, change])
@pytest.mark.parametrize("mode", [*MASTERS, "params"])
def test_a_step_hook_finds_clipped_gradients_and_what_it_makes_of_them_counts(
    mode: str, hook: Any, everywhere: bool
) -> None:
    # SGD with a learning rate of 1 moves the weights by the gradients: their norm is 0.1 times the hook's 0.5.
    model = Hooked(hook, everywhere=everywhere)
    try:
        fit(mode, model, max_steps=1, gradient_clip_val=0.1)
    finally:
        if model.handle is not None:
            model.handle.remove()
    # Weights near 0.3 keep 2**-25 of an update; 600 of them in a norm of 0.05 leave 1e-5.
    assert distance(model, weights(Net())) == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("mode", [*MASTERS, "params"])
def test_gradients_read_after_the_step_are_the_clipped_ones(mode: str) -> None:
    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            grads = [param.grad.float().norm() for param in pl_module.parameters() if param.grad is not None]
            self.norm = torch.linalg.vector_norm(torch.stack(grads)).item()

    look = Look()
    fit(mode, max_steps=1, gradient_clip_val=0.1, callbacks=[look])
    assert look.norm == pytest.approx(0.1, rel=2**-8)  # kept in BF16 here


@pytest.mark.filterwarnings("ignore:.*master_weights='none'.*")
def test_none_clips_too() -> None:
    # Oracle: an unclipped step of this model moves its weights by far more than the clip allows.
    runs = []
    for settings in ({}, {"gradient_clip_val": 0.1}):
        model, _ = fit("none", Net(torch.optim.SGD, lr=1.0), max_steps=1, **settings)
        start = [first.to(param.dtype) for first, param in zip(weights(Net()), model.parameters(), strict=True)]
        runs.append(distance(model, start))
    assert runs[0] > 1.0
    # The steps of BF16 weights near 0.3 are 2**-9 wide: 600 roundings of half of that are 0.02.
    assert runs[1] < 0.13


class OwnSGD(torch.optim.Optimizer):
    """An optimizer from outside torch, which gets a closure."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            param.sub_(param.grad, alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("mode", ["copy", "split"])
@pytest.mark.parametrize("optimizer", [OwnSGD, torch.optim.SGD])
def test_gradients_of_one_backward_stay_in_sixteen_bits_whoever_wrote_the_optimizer(mode, optimizer):
    class Model(Regression):
        def on_train_batch_end(self, *args):
            self.dtypes = {param.grad.dtype for param in self.parameters()}

    model = Model(optimizer=optimizer)
    trainer(MixedPrecision("bf16", master_weights=mode)).fit(model, batches(2))
    assert model.dtypes == {torch.bfloat16}
