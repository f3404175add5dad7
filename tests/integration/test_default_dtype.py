"""A run under another default dtype gives the bits of the usual one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_mp import (
    FP8Monitor,
    FP32Pin,
    GradientRangeMonitor,
    LossScaleMonitor,
    MixedPrecision,
    OverflowMonitor,
    PrecisionSummary,
)
from tests.models import batches, trainer, weights


class Net(LightningModule):
    def __init__(self, *, fused: bool = False, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = not manual
        self.fused = fused
        self.net = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 16), nn.Linear(16, 1))
        self.batch = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = nn.functional.mse_loss(self.net(batch[0]).float(), batch[1])
        self.batch += 1
        if self.batch == 3:
            loss = loss * 1e36
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 0.5, "norm")
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01, fused=self.fused)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"}]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def train(
    dtype: torch.dtype, model: Net, settings: dict[str, Any], callbacks: Any = (), **trainer_settings: Any
) -> Any:
    data = batches(6, features=16)
    with default_dtype(dtype):
        plugin = MixedPrecision(**settings)
        run = trainer(plugin, callbacks=[make() for make in callbacks], **trainer_settings)
        run.fit(model, data)
    return weights(model), plugin.applied_steps, plugin.skipped_steps


PLUGINS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "loss_scale": {"init_scale": 1024.0, "growth_interval": 2}},
    "fp16-hysteresis": {"precision": "fp16", "loss_scale": {"init_scale": 64.0, "hysteresis": 2}},
    "fp16-static": {"precision": "fp16", "loss_scale": 64.0},
    "bf16-copy": {"precision": "bf16", "master_weights": "copy"},
    "bf16-split": {"precision": "bf16", "master_weights": "split"},
    "fp16-copy": {"precision": "fp16", "master_weights": "copy", "loss_scale": 64.0},
    "fp8-current": {"precision": "fp8", "fp8": {"backend": "emulated", "recipe": "current"}},
    "fp8-delayed": {"precision": "fp8", "fp8": {"backend": "emulated", "recipe": "delayed"}},
    "fp8-block": {"precision": "fp8", "fp8": {"backend": "emulated", "recipe": "block"}},
}


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("settings", PLUGINS.values(), ids=PLUGINS)
@pytest.mark.parametrize("kind", ["plain", "fused", "manual"])
def test_another_default_dtype_changes_no_bit(settings: dict[str, Any], kind: str, default: torch.dtype) -> None:
    flags = {} if kind == "plain" else {kind: True}
    expected, *counts = train(torch.float32, Net(**flags), settings)
    found, *found_counts = train(default, Net(**flags), settings)
    assert found_counts == counts
    assert counts[0] >= 4
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


CALLBACKS = (FP32Pin, OverflowMonitor, LossScaleMonitor, GradientRangeMonitor, PrecisionSummary)


@pytest.mark.filterwarnings("ignore:OverflowMonitor")  # the third batch is made to overflow in FP16
@pytest.mark.parametrize("name", ["bf16", "fp16", "bf16-split", "fp8-current"])
def test_callbacks_work_under_another_default_dtype(name: str, tmp_path: Any) -> None:
    callbacks = (*CALLBACKS, FP8Monitor) if name.startswith("fp8") else CALLBACKS
    results = [
        train(dtype, Net(), PLUGINS[name], callbacks, gradient_clip_val=0.5, default_root_dir=tmp_path)
        for dtype in (torch.float32, torch.float64)
    ]
    assert results[0][1:] == results[1][1:]
    assert all(torch.equal(left, right) for left, right in zip(results[0][0], results[1][0], strict=True))


class Net64(Net):
    def __init__(self) -> None:
        super().__init__()
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return super().training_step([x.double() for x in batch], batch_idx)


@pytest.mark.parametrize(("precision", "lightning"), [("fp32", "32-true"), ("bf16", "bf16-mixed")])
def test_a_model_of_fp64_parameters_trains_as_in_lightning(precision: str, lightning: str) -> None:
    ours, reference = Net64(), Net64()
    with default_dtype(torch.float64):
        trainer(MixedPrecision(precision)).fit(ours, batches(6, features=16))
        trainer(precision=lightning).fit(reference, batches(6, features=16))
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    assert all(torch.equal(left, right) for left, right in zip(weights(ours), weights(reference), strict=True))
