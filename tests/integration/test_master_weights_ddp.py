"""Two gloo ranks under Lightning's DDP strategy: one set of masters, bit for bit."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_mp import MixedPrecision
from lightning_mp.errors import UnsupportedError
from tests.models import batches, trainer
from tests.spawned import free_port

WORLD = 2


class Net(LightningModule):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 1))
        self.grad_dtypes: set[torch.dtype] = set()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        # Ranks see different batches: the sampler deals them out.
        return nn.functional.mse_loss(self.net(batch[0]).float(), batch[1])

    def on_after_backward(self) -> None:
        self.grad_dtypes |= {param.grad.dtype for param in self.parameters()}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]).float(), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class EqualRanks(Callback):
    """Fail where the FP32 values of the ranks differ in a bit."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        state = trainer.precision_plugin.fp32_state_dict(pl_module)
        flat = torch.cat([value.flatten() for value in state.values()])
        everywhere = [torch.empty_like(flat) for _ in range(WORLD)]
        dist.all_gather(everywhere, flat)
        assert torch.equal(*everywhere)


def fit(rank: int, mode: str, folder: Path, *, accumulate: int = 1, strategy: Any = None, **settings: Any) -> Net:
    model = Net(seed=rank)  # unseeded runs start apart; DDP takes rank 0's weights
    run = trainer(
        MixedPrecision("bf16", master_weights=mode, **settings),
        max_epochs=2,
        devices=WORLD,
        strategy=strategy or DDPStrategy(process_group_backend="gloo"),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        callbacks=[EqualRanks()],
        default_root_dir=folder,
    )
    run.fit(model, batches())
    assert run.precision_plugin.applied_steps == run.global_step
    if mode != "params":
        assert model.grad_dtypes == {torch.float32}
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    exact = copy.deepcopy(model.state_dict())
    run.validate(model, batches(), verbose=False)
    assert all(torch.equal(value, exact[name]) for name, value in model.state_dict().items())
    return model


class Sparse(LightningModule):
    def __init__(self, optimizer: type[torch.optim.Optimizer], accumulate: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = optimizer is torch.optim.SGD
        self.optimizer_class, self.accumulate = optimizer, accumulate
        self.table = nn.Embedding(20, 16, sparse=True)
        self.head = nn.Linear(16, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        rows = (batch[0][:, 0].abs() * 4).long() % 20  # some twice in a batch, some on both ranks
        loss = nn.functional.mse_loss(self.head(self.table(rows)).float(), batch[1])
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        if (batch_idx + 1) % self.accumulate == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
        return None

    def configure_optimizers(self) -> Any:
        if self.automatic_optimization:
            return torch.optim.SGD(self.parameters(), 0.05)
        return self.optimizer_class(self.table.parameters(), 0.05), torch.optim.SGD(self.head.parameters(), 0.05)


def fit_sparse(plugin: Any, folder: Path, optimizer: type[torch.optim.Optimizer], accumulate: int = 1) -> Sparse:
    model = Sparse(optimizer, accumulate)
    settings = {"accumulate_grad_batches": accumulate} if model.automatic_optimization else {}
    if plugin is None:
        settings["precision"] = "bf16-mixed"
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer(plugin, devices=WORLD, strategy=strategy, default_root_dir=folder, **settings).fit(model, batches())
    return model


def check_sparse_tables(folder: Path) -> None:
    for optimizer in (torch.optim.SGD, torch.optim.SparseAdam):
        for accumulate in (1, 2):
            reference = fit_sparse(None, folder, optimizer, accumulate)
            for mode in ("params", "copy", "split"):
                model = fit_sparse(MixedPrecision("bf16", master_weights=mode), folder, optimizer, accumulate)
                for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
                    # Sums over ranks and batches in another order: FP32 ulps.
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    reference = fit_sparse(None, folder, torch.optim.SGD)
    for mode, reduce_dtype in (("params", "bf16"), ("copy", "bf16"), ("none", "fp32")):
        plugin = MixedPrecision("bf16", master_weights=mode, reduce_dtype=reduce_dtype)
        model = fit_sparse(plugin, folder, torch.optim.SGD)
        for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
            # BF16 rounds gradients on their way, and under "none" the weights.
            torch.testing.assert_close(found.float(), expected, rtol=2.0**-7, atol=2.0**-8)


def worker(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(WORLD),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
    )
    start = Net(seed=0)
    for accumulate in (1, 3):
        reference = fit(rank, "params", folder, accumulate=accumulate)
        copied = fit(rank, "copy", folder, accumulate=accumulate)
        split = fit(rank, "split", folder, accumulate=accumulate)
        for left, right in zip(split.parameters(), copied.parameters(), strict=True):
            assert torch.equal(left, right)
        for first, left, right in zip(start.parameters(), split.parameters(), reference.parameters(), strict=True):
            # Adam moves by lr per step whatever the size of gradients; BF16 weights perturb a few signs.
            expected = right.detach() - first.detach()
            assert (left.detach() - right.detach()).norm() <= 0.15 * expected.norm()
    fit(rank, "split", folder, reduce_dtype="bf16")
    check_sparse_tables(folder)
    with pytest.raises(UnsupportedError, match=r"static_graph=True cannot accumulate gradients"):
        fit(rank, "split", folder, accumulate=2, strategy=DDPStrategy(process_group_backend="gloo", static_graph=True))
    dist.destroy_process_group()


def test_two_ranks_train_one_set_of_masters_that_equals_in_copy_and_split(tmp_path: Path) -> None:
    mp.spawn(worker, (free_port(), tmp_path), nprocs=WORLD)
