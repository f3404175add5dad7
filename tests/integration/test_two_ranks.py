"""The plain plugin on two gloo ranks: one scale, one decision, and the update of one process on all the data."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mp import DynamicLossScale, MixedPrecision, OverflowFoundError, OverflowMonitor
from tests.models import trainer
from tests.spawned import free_port

WORLD = 2
STEPS = 6
BAD = 2
SCALE = DynamicLossScale(init_scale=16.0)


def data() -> Tensor:
    """Return inputs of shape ``(ranks, steps, batch, features)``."""
    return torch.randn(WORLD, STEPS, 4, 4, generator=torch.Generator().manual_seed(1))


class Net(LightningModule):
    """Each batch is a step's number; a rank takes its own inputs, and one process those of all ranks.

    Args:
        bad_rank: Rank whose loss is infinite in step ``BAD``; ``None``: no rank's.
        is_alone: Whether this process stands for all ranks.
        has_unused: Whether a layer gets no gradients.
        fused: Whether the optimizer is fused, so that it skips on the device.
    """

    def __init__(
        self, *, bad_rank: int | None = None, is_alone: bool = False, has_unused: bool = False, fused: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        if has_unused:
            self.unused = nn.Linear(2, 2)
        self.bad_rank, self.is_alone, self.fused = bad_rank, is_alone, fused
        self.grads: list[list[Tensor]] = []
        self.learning_rates: list[float] = []
        self.finite_shards: list[bool] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        step = int(batch)
        x = data()[:, step].flatten(0, 1) if self.is_alone else data()[self.global_rank, step]
        loss = nn.functional.mse_loss(self.net(x).float(), x[:, :2])
        return loss * (torch.inf if step == BAD and self.bad_rank == self.global_rank else 1.0)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.grads.append([p.grad.detach().clone() for p in self.net.parameters()])
        self.learning_rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, fused=self.fused or None)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Sharded(Net):
    """An infinite gradient in the first row of a weight, which rank 0 holds."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if not self.is_alone:
            for layer in (self.net[0], self.net[2], self):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        step = int(batch)
        x = data()[:, step].flatten(0, 1) if self.is_alone else data()[self.global_rank, step]
        hidden = self.net[1](self.net[0](x))
        loss = nn.functional.mse_loss(self.net[2](hidden).float(), x[:, :2])
        if step == BAD and self.bad_rank is not None:
            # The loss stays finite, and so do the gradients of all but the first row of the last layer.
            y = self.net[2](hidden.detach())
            y.register_hook(lambda grad: torch.where(torch.tensor([True, False]), torch.inf, grad))
            loss = loss + 0.0 * y.float().sum()
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.learning_rates.append(optimizer.param_groups[0]["lr"])
        grads = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in self.parameters()]
        self.finite_shards.append(all(bool(grad.isfinite().all()) for grad in grads))


def fit(model: Net, plugin: MixedPrecision, *, strategy: Any = None, steps: Iterable[int] = range(STEPS), **settings):
    run = trainer(
        plugin,
        devices=1 if model.is_alone else WORLD,
        strategy="auto" if model.is_alone else strategy or DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
        **settings,
    )
    run.fit(model, DataLoader(list(steps), batch_size=1))
    return plugin


def values(model: nn.Module) -> list[Tensor]:
    found = [p.detach() for p in model.parameters()]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in found]


def assert_same_on_all_ranks(mine: Any) -> None:
    everywhere: list[Any] = [None] * WORLD
    dist.all_gather_object(everywhere, mine)
    assert all(other == everywhere[0] for other in everywhere)


def check_overflow(rank: int, precision: str, **settings: Any) -> None:
    """One rank overflows: both skip, as if the step had not been there."""
    loss_scale = SCALE if precision == "fp16" else None
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters="has_unused" in settings)
    bad = Net(bad_rank=1, **settings)
    plugin = fit(bad, MixedPrecision(precision, loss_scale=loss_scale), strategy=strategy)
    assert (plugin.applied_steps, plugin.skipped_steps, plugin.last_step.step) == (STEPS - 1, 1, STEPS - 1)
    if precision == "fp16":
        assert plugin.scaler.get_scale() == SCALE.init_scale / 2
    assert_same_on_all_ranks(([v.tolist() for v in values(bad)], bad.learning_rates, plugin.state_dict()))

    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters="has_unused" in settings)
    good = Net(**settings)
    steps = [step for step in range(STEPS) if step != BAD]
    fit(good, MixedPrecision(precision, loss_scale=loss_scale), strategy=strategy, steps=steps)
    for left, right in zip(values(bad), values(good), strict=True):
        assert torch.equal(left, right)
    assert bad.learning_rates[:BAD] + bad.learning_rates[BAD + 1 :] == good.learning_rates


def check_loss_of_one_rank(rank: int, precision: str, on_nonfinite: str, *, fused: bool) -> None:
    """An infinite loss on rank 1 alone is what no scale explains, on both ranks."""
    loss_scale = SCALE if precision == "fp16" else None
    plugin = MixedPrecision(precision, loss_scale=loss_scale, on_nonfinite=on_nonfinite)
    model = Net(bad_rank=1, fused=fused)
    if on_nonfinite == "raise":
        # Without a dynamic scale nothing hangs on whose loss it was, and ranks do not ask each other.
        knows = rank == 1 or precision == "fp16"
        cause = "unscaled loss was non-finite already" if knows else "loss of this rank was finite.* on another rank"
        with pytest.raises(OverflowFoundError, match=f"step {BAD} .* {cause}"):
            fit(model, plugin, steps=range(STEPS))
        # A step that the device skipped is known one batch later.
        assert_same_on_all_ranks((plugin.applied_steps, plugin.skipped_steps, plugin.consecutive_skips))
        return
    fit(model, plugin, steps=range(BAD + 1))
    assert (plugin.applied_steps, plugin.skipped_steps) == (BAD + 1, 0)
    assert plugin.last_step.loss_nonfinite
    assert not any(v.isfinite().all() for v in values(model))


class TellsOnRankZero(Callback):
    """Reads on one rank what the device knows by then, as most callbacks that log do."""

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.is_global_zero:
            plugin = trainer.precision_plugin
            module.told.append((plugin.last_step.step, plugin.skipped_steps))
            module.lr_schedulers().get_last_lr()


def check_reads_on_one_rank(rank: int, precision: str, *, fused: bool) -> None:
    """What one rank reads asks nothing of the others, and changes nothing."""
    loss_scale = SCALE if precision == "fp16" else None
    runs = []
    for callbacks in ([], [TellsOnRankZero(), OverflowMonitor(on_overflow="log")]):
        model = Net(bad_rank=1, fused=fused)
        model.told = []
        fit(model, MixedPrecision(precision, loss_scale=loss_scale), callbacks=callbacks)
        runs.append((values(model), model.learning_rates))
    assert model.told == ([(step, int(step >= BAD)) for step in range(STEPS)] if rank == 0 else [])
    assert [event.rank for event in callbacks[1].events] == [1]
    for left, right in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(left, right)
    assert runs[0][1] == runs[1][1]


def check_accumulation(rank: int) -> None:
    """Two micro-batches, the first without synchronization, and an odd one at the end."""
    model, alone = Net(), Net(is_alone=True)
    fit(model, MixedPrecision("fp32"), accumulate_grad_batches=2, limit_train_batches=5)
    fit(alone, MixedPrecision("fp32"), accumulate_grad_batches=2, limit_train_batches=5)
    for left, right in zip(values(model), values(alone), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def local_gradients(rank: int) -> list[Tensor]:
    """Return a rank's gradients of the first step, before any reduction."""
    model = Net()
    x = data()[rank, 0]
    nn.functional.mse_loss(model.net(x), x[:, :2]).backward()
    return [p.grad for p in model.net.parameters()]


def check_reduce_dtype(rank: int, reduce_dtype: str) -> None:
    """The mean of what the ranks sent, in the dtype in which it travelled."""
    model = Net()
    fit(model, MixedPrecision("fp32", reduce_dtype=reduce_dtype), limit_train_batches=1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[reduce_dtype]
    for first, second, found in zip(local_gradients(0), local_gradients(1), model.grads[0], strict=True):
        expected = (first.to(dtype) / WORLD + second.to(dtype) / WORLD).float()
        assert torch.equal(found, expected)
        assert found.dtype is torch.float32


def check_shards(rank: int, precision: str) -> None:
    """An overflow that one rank's shard alone holds; clipping by the norm of all shards."""
    strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1, process_group_backend="gloo")
    model, alone = Sharded(bad_rank=0), Sharded(is_alone=True)
    loss_scale = SCALE if precision == "fp16" else None
    plugin = fit(model, MixedPrecision(precision, loss_scale=loss_scale), strategy=strategy, gradient_clip_val=0.1)
    assert not plugin.last_step.loss_nonfinite
    assert model.finite_shards == [rank != 0 or step != BAD for step in range(STEPS)]
    assert (plugin.applied_steps, plugin.skipped_steps) == (STEPS - 1, 1)
    scale = plugin.scaler.get_scale() if plugin.scaler is not None else 1.0
    assert scale == (SCALE.init_scale / 2 if precision == "fp16" else 1.0)
    assert_same_on_all_ranks((scale, model.learning_rates, plugin.last_step.found_inf))
    steps = [step for step in range(STEPS) if step != BAD]
    fit(alone, MixedPrecision("fp32"), steps=steps, gradient_clip_val=0.1)
    for left, right in zip(values(model), values(alone), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6 if precision == "fp32" else 3e-3)


def worker(rank: int, port: int, folder: Path, checks: list[tuple[Any, ...]]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank), NODE_RANK="0"
    )
    os.chdir(folder)
    for check, args, settings in checks:
        check(rank, *args, **settings)
    dist.destroy_process_group()


CHECKS = {
    "overflow": [
        (check_overflow, ("fp16",), {}),
        (check_overflow, ("bf16",), {}),
        (check_overflow, ("fp16",), {"has_unused": True}),
    ],
    "decisions": [
        (check_loss_of_one_rank, (precision, on_nonfinite), {"fused": fused})
        for precision, on_nonfinite in (("fp16", "ignore"), ("fp16", "raise"), ("bf16", "raise"))
        for fused in (False, True)
    ],
    "reads": [
        (check_reads_on_one_rank, (precision,), {"fused": fused})
        for precision in ("fp16", "bf16")
        for fused in (False, True)
    ],
    "gradients": [
        (check_accumulation, (), {}),
        (check_reduce_dtype, ("fp32",), {}),
        (check_reduce_dtype, ("bf16",), {}),
    ],
    "shards": [
        (check_shards, ("fp32",), {}),
        (check_shards, ("fp16",), {}),
    ],
}


@pytest.mark.parametrize("checks", CHECKS)
def test_two_ranks_act_as_one(checks, tmp_path) -> None:
    mp.start_processes(worker, (free_port(), tmp_path, CHECKS[checks]), nprocs=WORLD, start_method="spawn")
