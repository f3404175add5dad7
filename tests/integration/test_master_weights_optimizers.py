"""Optimizers that appear in mid-fit, under a real Trainer."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import optimizer as torch_hooks

from lightning_mp.errors import UnsupportedError
from tests.mastered import MASTERS, Net, fit
from tests.models import weights


class Renew(Callback):
    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1 and self.how == "setup_optimizers":
            trainer.strategy.setup_optimizers(trainer)
        elif trainer.current_epoch == 1:
            trainer.optimizers = pl_module.configure_optimizers()[0]


@pytest.mark.parametrize("how", ["setup_optimizers", "trainer.optimizers"])
@pytest.mark.parametrize("mode", MASTERS)
def test_an_optimizer_made_in_mid_fit_updates_the_masters(mode: str, how: str) -> None:
    # Steps of 1e-6 are lost in BF16 weights near 0.3, whose spacing is 2**-10.
    runs = []
    for choice in (mode, "params"):
        model, _ = fit(choice, Net(torch.optim.SGD, lr=1e-6), max_epochs=4, callbacks=[Renew(how)])
        runs.append([param.detach() - start for param, start in zip(model.parameters(), weights(Net()), strict=True)])
    for moved, expected in zip(*runs, strict=True):
        assert (moved - expected).norm() <= 0.1 * expected.norm() + 1e-7


@pytest.mark.parametrize("mode", MASTERS)
def test_a_raw_step_of_a_fresh_optimizer_is_refused_and_leaves_nothing_behind(mode: str) -> None:
    class Inner(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.loss(batch).backward()
            optimizer.step()

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    before = dict(torch_hooks._global_optimizer_pre_hooks)
    model = Inner()
    with pytest.raises(UnsupportedError, match=r"SGD.step\(\) was called past the Trainer"):
        fit(mode, model)
    assert all(torch.equal(param, start) for param, start in zip(model.parameters(), weights(Net()), strict=True))
    assert dict(torch_hooks._global_optimizer_pre_hooks) == before


class Averaging(torch.optim.Optimizer):
    """As schedule-free optimizers do: ``eval`` moves the weights between steps."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            if param.grad is not None:
                z = self.state[param].setdefault("z", param.detach().clone())
                param.lerp_(z.sub_(param.grad, alpha=self.param_groups[0]["lr"]), 0.3)

    @torch.no_grad()
    def eval(self) -> None:
        for param in self.param_groups[0]["params"]:
            param.lerp_(self.state[param]["z"], 0.5)


@pytest.mark.parametrize("through", ["self.optimizers", "trainer.optimizers"])
def test_eval_of_a_schedule_free_optimizer_reaches_the_masters(through: str) -> None:
    class Evaluating(Net):
        def on_train_epoch_end(self) -> None:
            (self.optimizers() if through == "self.optimizers" else self.trainer.optimizers[0]).eval()

    runs = [fit(mode, Evaluating(Averaging, lr=1e-6))[0] for mode in (*MASTERS, "params")]
    for copied, split, wide, start in zip(*(run.parameters() for run in runs), weights(Net()), strict=True):
        assert torch.equal(copied, split)
        assert (copied - wide).norm() <= 0.1 * (wide - start).norm() + 1e-7
