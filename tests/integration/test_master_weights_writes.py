"""Weights that others write in mid-fit, under a real Trainer: split stays copy where nothing is lost."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_mp import estimate_memory
from tests.mastered import Net, assert_same_weights, fit, plugin
from tests.models import batches, trainer


class Table(LightningModule):
    def __init__(self, *, bag: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = (nn.EmbeddingBag if bag else nn.Embedding)(64, 8, max_norm=1.0)
        self.head = nn.Linear(8, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        index = (batch[0].abs() * 20).long().clamp(max=63)
        rows = self.table(index)
        return nn.functional.mse_loss(self.head(rows).float().view(len(index), -1).mean(1, keepdim=True), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("bag", [False, True])
def test_a_table_that_renormalizes_itself_trains_the_same_and_its_bytes_are_estimated(bag: bool) -> None:
    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.nbytes = trainer.precision_plugin._masters.nbytes

    copied, _ = fit("copy", Table(bag=bag))
    look = Look()
    split, _ = fit("split", Table(bag=bag), callbacks=[look])
    assert_same_weights(split, copied)
    assert estimate_memory(Table(bag=bag), master_weights="split").masters == look.nbytes == 4 * 64 * 8 + 2 * 9


class Perturbing(Net):
    """As SAM does by hand: perturb, a second backward, restore."""

    def __init__(self) -> None:
        super().__init__(torch.optim.SGD, lr=1e-4)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        params = [param for param in self.parameters() if param.grad is not None]
        with torch.no_grad():
            before = [param.clone() for param in params]
            for param in params:
                param.add_(param.grad.to(param.dtype), alpha=0.05)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            for param, value in zip(params, before, strict=True):
                param.copy_(value)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()[0]


def test_weights_that_are_perturbed_and_restored_keep_split_equal_to_copy() -> None:
    copied, _ = fit("copy", Perturbing())
    split, _ = fit("split", Perturbing())
    assert_same_weights(split, copied)


def test_weights_zeroed_in_configure_optimizers_start_from_zero() -> None:
    class Late(Net):
        def configure_optimizers(self) -> Any:
            nn.init.zeros_(self.head.weight)
            return torch.optim.SGD(self.parameters(), lr=0.0)

    model = Late()
    run = trainer(plugin("split"), max_steps=2)
    run.fit(model, batches())
    assert torch.equal(model.head.weight, torch.zeros(1, 16))
