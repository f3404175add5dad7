"""The step before an exception is in both monitors, and the exception is what the user sees."""

import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision as LightningMixedPrecision
from lightning.pytorch.strategies import DDPStrategy

from lightning_mp import LossScaleMonitor, MixedPrecision, OverflowMonitor
from tests.models import INF, Regression, batches, trainer
from tests.spawned import free_port

pytestmark = pytest.mark.filterwarnings("ignore:OverflowMonitor. step")

BAD = 3


class ByIndex(Regression):
    """Overflows whenever the bad batch is computed, so that a replay shows it again."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch) * (INF if batch_idx == BAD else 1.0)


class Stops(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == BAD + 1:
            raise RuntimeError("the disk is full")


def run(monitors: list[Any], plugin: Any, *, fused: bool = True, **settings: Any) -> None:
    used = trainer(plugin, callbacks=[*monitors, Stops()], log_every_n_steps=50, **settings)
    with pytest.raises(RuntimeError, match="the disk is full"):
        used.fit(ByIndex(fused=fused), batches())


def foreign() -> LightningMixedPrecision:
    return LightningMixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


@pytest.mark.parametrize("is_scale_first", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make_plugin", [lambda: MixedPrecision("bf16"), foreign], ids=["ours", "foreign"])
@pytest.mark.parametrize("probe", ["replay", "gradients", "always"])
def test_step_before_an_exception_is_in_both_monitors(probe, make_plugin, fused, is_scale_first) -> None:
    overflow, scale = OverflowMonitor(probe=probe), LossScaleMonitor(plot=False)
    run([scale, overflow] if is_scale_first else [overflow, scale], make_plugin(), fused=fused)
    (event,) = overflow.events
    assert (event.step, event.batch_idx) == (BAD, BAD)
    # Nothing of the step is gone yet.
    assert (event.phase, event.fqn) == (("backward", "layer.bias") if probe == "gradients" else ("loss", "loss"))
    assert [(r.step, r.skipped) for r in scale.history] == [(i, i == BAD) for i in range(BAD + 1)]


@pytest.mark.parametrize("is_scale_first", [False, True])
@pytest.mark.parametrize("by", ["plugin", "monitor"])
def test_settlement_that_would_raise_hides_no_exception_and_no_record(by, is_scale_first, caplog) -> None:
    caplog.set_level("INFO")
    overflow = OverflowMonitor(on_overflow="raise" if by == "monitor" else "log")
    scale = LossScaleMonitor(plot=False)
    plugin = MixedPrecision("bf16", on_nonfinite="raise" if by == "plugin" else "skip")
    run([scale, overflow] if is_scale_first else [overflow, scale], plugin)
    assert [e.step for e in overflow.events] == [BAD]
    assert [r.step for r in scale.history] == list(range(BAD + 1))
    said = "while the run was being interrupted: on_nonfinite='raise'" if by == "plugin" else "OverflowMonitor: step 3"
    assert said in caplog.text


def alone_worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_RANK=str(rank), NODE_RANK="0"
    )
    warnings.simplefilter("ignore")

    class StopsOnOneRank(Callback):
        """The other rank takes part in nothing until the first has settled, and would wait with it forever."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == BAD + 1:
                if rank == 1:
                    raise RuntimeError("the disk is full")
                store.wait([f"settled-{probe}"])
                raise KeyError("the other rank is gone")

    store = dist.FileStore(f"{folder}/store", 2)
    for probe in ("replay", "gradients", "always"):
        overflow, scale = OverflowMonitor(probe=probe), LossScaleMonitor(plot=False)
        used = trainer(
            MixedPrecision("bf16"),
            callbacks=[overflow, scale, StopsOnOneRank()],
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo"),
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        with pytest.raises((RuntimeError, KeyError), match=r"the disk is full|the other rank is gone"):
            used.fit(ByIndex(fused=True), batches())
        assert [(e.step, e.rank) for e in overflow.events] == [(BAD, rank)], (probe, overflow.events)
        assert [r.step for r in scale.history] == list(range(BAD + 1)), (probe, scale.history)
        if rank == 1:
            store.set(f"settled-{probe}", "yes")
        dist.barrier()
    dist.destroy_process_group()


def test_rank_that_ends_by_itself_settles_without_waiting_for_the_other(tmp_path) -> None:
    mp.spawn(alone_worker, (free_port(), str(tmp_path)), nprocs=2)
