"""Momentum encoders and target networks beside 16-bit weights, under a real Trainer."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from tests.mastered import MASTERS, fit


class Momentum(LightningModule):
    """The online network is 0.1 away from its copy and stays there; the copy follows it."""

    def __init__(self, *, freeze: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.online = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.target = copy.deepcopy(self.online).requires_grad_(not freeze)

    def on_fit_start(self) -> None:
        with torch.no_grad():
            for param in self.online.parameters():
                param.add_(0.1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.online(batch[0]).float(), batch[1])

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        for online, target in zip(self.online.parameters(), self.target.parameters(), strict=True):
            target.mul_(0.999).add_(online, alpha=0.001)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.online.parameters(), lr=0.0)


@pytest.mark.parametrize("mode", MASTERS)
def test_a_frozen_copy_is_averaged_into_in_fp32(mode: str) -> None:
    model, _ = fit(mode, Momentum(freeze=True), max_epochs=40)  # 320 steps
    distance = (model.online[0].weight - model.target[0].weight).mean().item()
    # The online weights that it reads are BF16: near 0.5 up to 2**-10 from the masters, of either sign.
    assert distance == pytest.approx(0.1 * 0.999**320, abs=1e-3)


@pytest.mark.parametrize("mode", MASTERS)
def test_an_average_in_16_bits_warns_and_names_the_network(mode: str) -> None:
    with pytest.warns(UserWarning, match=r"target.0.weight first.*FP32Pin\(modules=\('target', 'target.\*'\)\)"):
        fit(mode, Momentum(freeze=False), max_epochs=6)
