"""OverflowMonitor in a real Trainer: each class of overflow gives one event, and looking leaves no trace."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mp import MixedPrecision
from lightning_mp.callbacks.overflow_monitor import OverflowMonitor
from tests.models import INF, trainer

pytestmark = pytest.mark.filterwarnings("ignore:OverflowMonitor. step")

WIDTH = 4
BAD = 2


def batches(num: int = 5, bad_x: float | None = None, bad_y: float | None = None) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    items = []
    for index in range(num):
        x, y = torch.randn(2, WIDTH, generator=generator), torch.randn(2, 1, generator=generator)
        if index == BAD and bad_x is not None:
            x[0, 1] = bad_x
        if index == BAD and bad_y is not None:
            y[1, 0] = bad_y
        items.append({"x": x, "y": y})
    return DataLoader(items, batch_size=None)


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


class Fault(nn.Module):
    """Does something to its input in the bad batch only."""

    def __init__(self, kind: str | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.is_on = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_on:
            return x
        if self.kind == "divide":
            return x / (x - x.detach() + 0.0).sum()
        if self.kind == "mask":
            masked = x.masked_fill(torch.ones_like(x, dtype=torch.bool), -INF)
            return masked - masked.amax(-1, keepdim=True)
        if self.kind == "activation":
            return (x.abs() + 1.0) * 6e4 * 6e4
        if self.kind == "gradient":
            return _Blow.apply(x)
        return x


class _Blow(torch.autograd.Function):
    """Finite in forward; the gradient is multiplied by 2**10, which FP16 holds at scale 1 and not at 2**12."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2.0**10


class Net(LightningModule):
    """Three residual blocks, one of them with a fault, and a head."""

    def __init__(self, fault: str | None = None, *, bad: int = BAD, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(), Block(), nn.Sequential(nn.Linear(WIDTH, WIDTH), Fault(fault)), Block())
        self.head = nn.Linear(WIDTH, 1)
        self.fault = fault
        self.bad = bad
        self.fused = fused

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.blocks[2][1].is_on = batch_idx == self.bad
        loss = nn.functional.mse_loss(self.head(self.blocks(batch["x"])).float(), batch["y"])
        if self.fault == "loss" and batch_idx == self.bad:
            return loss * INF
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=self.fused)


def fit(
    model: LightningModule, monitor: OverflowMonitor, *, plugin: Any = None, data: Any = None, **settings: Any
) -> Any:
    used = trainer(plugin or MixedPrecision("fp16", loss_scale=2.0**10), callbacks=[monitor], **settings)
    used.fit(model, data or batches())
    return used


CLASSES = [
    ("activation", "forward", "blocks.2.1", "inf"),
    ("mask", "forward", "blocks.2.1", "nan"),
    ("divide", "forward", "blocks.2.1", "inf"),
    ("gradient", "backward", "blocks.2.1", "inf"),
    ("loss", "loss", "loss", "inf"),
]


@pytest.mark.parametrize("probe", ["replay", "always"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("fault", "phase", "fqn", "kind"), CLASSES)
def test_each_class_of_overflow_gives_one_event_that_names_it(fault, phase, fqn, kind, fused, probe) -> None:
    monitor = OverflowMonitor(probe=probe)
    model = Net(fault, fused=fused)
    fit(model, monitor, plugin=MixedPrecision("fp16", loss_scale=2.0**12))
    assert [(e.step, e.batch_idx, e.phase, e.fqn, e.kind) for e in monitor.events] == [(BAD, BAD, phase, fqn, kind)]
    event = monitor.events[0]
    assert event.count > 0
    assert event.loss_scale == 2.0**12
    assert (event.rank, event.calibrating) == (0, False)
    # Nothing of the probes stays on the model.
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
