"""Two gloo ranks in FP8: the same weights, the same scales and the same demotions on both."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mp import FP8Monitor, MixedPrecision
from tests.models import trainer
from tests.spawned import EndsItsProcessGroup

STEPS = 4


class Net(LightningModule):
    """Rank 1 alone has an input that one scale cannot span, and in step 1 an Inf: in its loss, or in an FP8 operand."""

    def __init__(self, bad: str) -> None:
        super().__init__()
        self.bad = bad
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16, bias=False))
        self.head = nn.Linear(16, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0]
        if self.global_rank == 1:
            x = torch.cat([torch.full_like(x[:, :1], 2.0**20), x[:, 1:] * 2.0**-10], 1)
        is_bad = self.global_rank == 1 and batch_idx == 1
        if is_bad and self.bad == "input":
            x = x.index_fill(1, torch.tensor(3), torch.inf)
        out = self.body(x)
        if is_bad and self.bad == "grad":
            out.register_hook(lambda grad: grad.index_fill(1, torch.tensor(3), torch.inf))
        loss = self.head(out * 1e-6).float().square().mean()
        return loss * (torch.inf if is_bad and self.bad == "loss" else 1.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class EqualRanks(Callback):
    """Fail where weights, scales or demotions of the ranks differ."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        engine = trainer.precision_plugin.fp8_engine
        scales = [layer["scale"] for layer in engine.state_dict()["delayed"].values()]
        flat = torch.cat([*(p.detach().float().flatten() for p in pl_module.parameters()), *scales])
        mine = (flat.tolist(), engine.demoted)
        found: list[Any] = [None, None]
        dist.all_gather_object(found, mine)
        assert found[0] == found[1]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        plugin = trainer.precision_plugin
        assert (plugin.applied_steps, plugin.skipped_steps) == (STEPS - 1, 1)
        assert plugin.fp8_engine.recipe.name == "block" or "body.0" in plugin.fp8_engine.demoted


@pytest.mark.parametrize(
    ("recipe", "master_weights", "bad"),
    [
        ("current", "params", "loss"),
        ("delayed", "params", "loss"),
        ("current", "split", "input"),
        ("delayed", "split", "loss"),
        ("current", "params", "grad"),
        ("block", "params", "input"),
    ],
)
def test_ranks_agree_bit_for_bit(recipe, master_weights, bad, tmp_path) -> None:
    plugin = MixedPrecision("fp8", fp8={"recipe": recipe, "backend": "emulated"}, master_weights=master_weights)
    monitor = FP8Monitor(every_n_steps=1, demote=True, patience=2, plot=False)
    data = TensorDataset(torch.randn(STEPS * 2 * 4, 16, generator=torch.Generator().manual_seed(1)))
    run = trainer(
        plugin,
        devices=2,
        strategy="ddp_spawn",
        callbacks=[monitor, EqualRanks(), EndsItsProcessGroup()],
        default_root_dir=tmp_path,
    )
    # A failed assertion of a rank comes back as an exception here.
    run.fit(Net(bad), DataLoader(data, batch_size=4))


class Branches(LightningModule):
    """In each step another rank alone runs the layer that is in FP8, in the last one neither."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always = nn.Linear(16, 16)
        self.sometimes = nn.Linear(16, 16)
        self.head = nn.Linear(16, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = self.always(batch[0])
        if batch_idx < STEPS - 1 and (batch_idx + self.global_rank) % 2:
            x = x + self.sometimes(x * 2.0**batch_idx)
        return self.head(x).float().square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class EqualHistories(Callback):
    """Fail where histories of the ranks differ, or hold another number of updates than steps with a call."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        history = trainer.precision_plugin.fp8_engine.state_dict()["delayed"]["sometimes"]["amax_history"]
        found: list[Any] = [None, None]
        dist.all_gather_object(found, history.tolist())
        assert found[0] == found[1]
        assert int((history[:, 0] != 0).sum()) == STEPS - 1
        assert trainer.precision_plugin.applied_steps == STEPS


def test_layer_that_one_rank_alone_runs_has_one_history_on_both(tmp_path) -> None:
    fp8 = {"recipe": {"name": "delayed", "amax_history_len": 16}, "backend": "emulated", "include": ["sometimes"]}
    data = TensorDataset(torch.randn(STEPS * 2 * 4, 16, generator=torch.Generator().manual_seed(1)))
    # A rank that waits for the other in vain fails after the timeout.
    strategy = DDPStrategy(
        start_method="spawn", find_unused_parameters=True, process_group_backend="gloo", timeout=timedelta(seconds=60)
    )
    run = trainer(
        MixedPrecision("fp8", fp8=fp8),
        devices=2,
        strategy=strategy,
        callbacks=[EqualHistories(), EndsItsProcessGroup()],
        default_root_dir=tmp_path,
    )
    run.fit(Branches(), DataLoader(data, batch_size=4))
