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


THIRD = torch.tensor(1 / 3)  # in BF16 it is off by 2**-9 of itself


class Masks(LightningModule):
    """Changes gradients inside of backward, by hooks on weights that are registered at ``moment``."""

    def __init__(self, kind: str, moment: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
        self.kind, self.moment = kind, moment
        self.handles: list[Any] = []
        self.seen: set[torch.dtype] = set()
        self.others: set[torch.dtype] = set()
        self.register(moment == "init")

    def register(self, now: bool = True) -> None:
        if not now or self.handles:
            return
        for weight in (self.net[0].weight, self.net[2].weight):
            if self.kind == "tensor hook":
                self.handles.append(weight.register_hook(self.mask))
            else:
                self.handles.append(weight.register_post_accumulate_grad_hook(getattr(self, self.kind)))

    def mask(self, grad: Tensor) -> Tensor:
        self.seen.add(grad.dtype)
        return grad * THIRD

    def assigns(self, weight: Tensor) -> None:
        weight.grad = self.mask(weight.grad)

    def writes(self, weight: Tensor) -> None:
        self.seen.add(weight.grad.dtype)
        weight.grad.mul_(THIRD)

    def reads(self, weight: Tensor) -> None:
        assert weight.grad.numpy().dtype == "float32"  # NumPy has no BF16
        self.seen.add(weight.grad.dtype)

    def on_train_start(self) -> None:
        self.register(self.moment == "train start")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]).float(), batch[1])
        self.register(self.moment == "training step")
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        self.register(self.moment == "before backward")

    def on_after_backward(self) -> None:
        self.others.add(self.net[0].bias.grad.dtype)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


@pytest.mark.parametrize("moment", ["init", "train start", "training step", "before backward"])
@pytest.mark.parametrize("kind", ["tensor hook", "assigns", "writes", "reads"])
@pytest.mark.parametrize("clip", [None, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("mode", MASTERS)
def test_hooks_on_weights_change_fp32_gradients(mode: str, kind: str, moment: str, clip: float | None) -> None:
    ours, reference = Masks(kind, moment), Masks(kind, moment)
    trainer(MixedPrecision("bf16", master_weights=mode), gradient_clip_val=clip).fit(ours, batches())
    trainer(precision="bf16-mixed", gradient_clip_val=clip).fit(reference, batches())
    assert ours.seen == {torch.float32}
    assert ours.others == {torch.bfloat16}  # a weight without a hook pays nothing
    # The same BF16 products on both sides; a mask in BF16 would move each update by 2**-9 of a gradient.
    for found, expected in zip(weights(ours), weights(reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["tensor hook", "writes"])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=["one-backward", "two-backwards"])
def test_hooks_on_weights_work_without_masters_and_over_several_backwards(kind: str, settings: Any) -> None:
    model = Masks(kind, "init")
    trainer(MixedPrecision("bf16", master_weights="none"), **settings).fit(model, batches())
    assert model.seen == {torch.float32}
    ours, reference = Masks(kind, "init"), Masks(kind, "init")
    trainer(MixedPrecision("bf16", master_weights="copy"), **settings).fit(ours, batches())
    trainer(precision="bf16-mixed", **settings).fit(reference, batches())
    for found, expected in zip(weights(ours), weights(reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_hook_that_is_removed_is_not_called_again() -> None:
    class RemovesOne(Masks):
        def on_train_batch_end(self, *_: Any) -> None:
            self.handles[0].remove()

    ours, reference = RemovesOne("writes", "init"), RemovesOne("writes", "init")
    trainer(MixedPrecision("bf16", master_weights="copy")).fit(ours, batches())
    trainer(precision="bf16-mixed").fit(reference, batches())
    for found, expected in zip(weights(ours), weights(reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
