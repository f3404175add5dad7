"""OverflowMonitor in a real Trainer: each class of overflow gives one event, and looking leaves no trace."""

import copy
import json
import os
import random
import warnings
import weakref
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchmetrics
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision as LightningMixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_mp import MixedPrecision, OverflowFoundError, OverflowMonitor
from lightning_mp.callbacks import OverflowEvent
from lightning_mp.errors import SettingValueError
from lightning_mp.grad_scaler import Readback
from tests.models import INF, trainer
from tests.spawned import free_port

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


@pytest.mark.parametrize(("data", "item"), [({"bad_x": float("nan")}, "x"), ({"bad_y": INF}, "y")])
def test_item_of_a_nonfinite_batch_is_named_by_its_path(data, item) -> None:
    monitor = OverflowMonitor()
    fit(Net(), monitor, data=batches(**data))
    event = only(monitor)
    assert (event.phase, event.fqn, event.count, event.step) == ("batch", item, 1, BAD)


def only(monitor: OverflowMonitor) -> OverflowEvent:
    (event,) = monitor.events
    return event


def test_event_of_a_forward_overflow_explains_itself_by_amaxes() -> None:
    model = Net()
    with torch.no_grad():
        model.blocks[1].second.weight.fill_(6e4)
        model.blocks[1].first.weight.fill_(1.0)
    monitor = OverflowMonitor()
    fit(model, monitor, data=batches(1))
    event = only(monitor)
    assert (event.phase, event.fqn, event.kind) == ("forward", "blocks.1.second", "inf")
    assert event.amax["weight"] == 6e4
    assert event.amax["output"] == INF
    # Finite itself, and large enough to explain an output above 65504.
    assert 65504 / 6e4 / WIDTH < event.amax["input"] < INF


class Everything(LightningModule):
    """Draws random numbers in every way and changes all that a replay must leave alone."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused = fused
        self.layer = nn.Linear(WIDTH, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 1)
        self.register_buffer("seen", torch.zeros(()))
        self.error = torchmetrics.MeanSquaredError()
        self.collection = torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.CatMetric()])
        self.running = torch.zeros(())
        self.bank = {"mean": [torch.zeros(8)]}
        self.noise = torch.Generator().manual_seed(3)
        self.augment = np.random.default_rng(3)
        self.calls = 0
        self.losses: list[float] = []
        self.draws: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        y = batch.pop("y")
        batch["x"].add_(0.0)
        self.calls += 1
        self.seen += 1
        self.running = self.running + 1
        self.draws.append(random.random() + float(np.random.rand()))
        hidden = self.norm(self.layer(batch["x"])).relu().float()
        self.bank["mean"][0].lerp_(hidden.detach().mean(0), 0.5)
        out = self.head(self.dropout(hidden + self.bank["mean"][0])).float()
        out = out + torch.rand(1, generator=self.noise) + self.augment.random()
        loss = nn.functional.mse_loss(out, y)
        self.losses.append(loss.item())
        self.error(out.detach(), y)
        self.collection.update(loss.detach())
        self.log("error", self.error, on_step=True, on_epoch=True)
        self.log_dict({"loss": loss}, on_step=True, on_epoch=True, prog_bar=True)
        return {"loss": loss * (INF if batch_idx in (1, 3) else 1.0)}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, fused=self.fused)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9), "interval": "step"}]


def end_state(model: Everything, used: Any) -> dict[str, Any]:
    return {
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "optimizer": str(used.optimizers[0].state_dict()),
        "metrics": {name: value.item() for name, value in used.callback_metrics.items() if "overflow" not in name},
        "computed": {name: value.tolist() for name, value in model.collection.compute().items()},
        "attributes": (model.calls, model.losses, model.draws, model.running.item(), model.error._update_count),
        "progress": str(used.fit_loop.state_dict()),
        "training": [m.training for m in model.modules()],
        "rng": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
    }


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_replay_leaves_everything_as_a_run_without_the_monitor_has_it(fused, accumulate) -> None:
    ends = []
    for callbacks in ([], [OverflowMonitor()]):
        model = Everything(fused=fused)
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        used = trainer(MixedPrecision("bf16"), callbacks=callbacks, max_epochs=2, accumulate_grad_batches=accumulate)
        used.fit(model, batches(6))
        ends.append(end_state(model, used))
    monitor = callbacks[0]
    assert [event.fqn for event in monitor.events] == ["loss"] * 4
    assert [event.batch_idx for event in monitor.events] == [1, 3] * 2
    for name, value in ends[0].items():
        assert ends[1][name] == value, name


def test_replay_sees_the_same_dropout_as_the_step_did() -> None:
    class Dropped(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[1] = nn.Dropout(0.5)
            self.masks: list[Tensor] = []

        def training_step(self, batch, batch_idx):
            self.blocks[1].register_forward_hook(lambda m, i, o: seen.append(o.detach().clone()))
            return super().training_step(batch, batch_idx) * INF

    seen: list[Tensor] = []
    fit(Dropped(), OverflowMonitor(), data=batches(1), plugin=MixedPrecision("bf16"))
    assert len(seen) >= 2
    assert torch.equal(seen[0], seen[-1])


def test_step_without_overflow_puts_no_hook_and_asks_nothing_of_the_device() -> None:
    counts: list[int] = []

    class Hooks(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            counts.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pl_module.modules()))

    reads = []
    for callbacks in ([Hooks()], [Hooks(), OverflowMonitor()]):
        before = Readback.count
        trainer(MixedPrecision("bf16"), callbacks=callbacks).fit(Net(fused=True), batches())
        reads.append(Readback.count - before)
    assert reads[0] == reads[1]
    assert set(counts) == {0}


def test_calibration_skips_are_labelled_and_not_alarmed() -> None:
    monitor = OverflowMonitor(on_overflow="raise")
    same = DataLoader([batches().dataset[0]] * 14, batch_size=None)
    used = fit(Net(), monitor, plugin=MixedPrecision("fp16", loss_scale={"init_scale": 2.0**22}), data=same)
    plugin = used.precision_plugin
    assert plugin.applied_steps > 0
    assert len(monitor.events) == plugin.skipped_steps > 0
    assert {(e.calibrating, e.phase) for e in monitor.events} == {(True, "backward")}


def test_raise_stops_before_the_update_and_names_the_culprit() -> None:
    model = Net("mask", bad=0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(OverflowFoundError, match=r"step 0, batch 0, rank 0: blocks\.2\.1 made NaN in forward"):
        fit(model, OverflowMonitor(on_overflow="raise"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(not m._forward_hooks for m in model.modules())


def test_warning_comes_once_per_culprit() -> None:
    class Always(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * INF

    monitor = OverflowMonitor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Always(), monitor)
    assert len(monitor.events) == 5
    assert len([w for w in caught if "OverflowMonitor" in str(w.message)]) == 1


def test_wrong_settings_are_refused_with_the_allowed_ones() -> None:
    with pytest.raises(SettingValueError, match=r"probe='hooks' is not known\. Use one of 'replay', 'gradients'"):
        OverflowMonitor(probe="hooks")
    with pytest.raises(SettingValueError, match=r"on_overflow='stop' is not known\. Use one of 'warn', 'raise'"):
        OverflowMonitor(on_overflow="stop")


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_probe_names_the_parameter(fused) -> None:
    class OneGradient(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            extra = _Blow.apply(self.blocks[1].first.bias.half() * 2.0**14).sum()
            return loss + (extra * 1.0 if batch_idx == BAD else 0.0 * loss)

    monitor = OverflowMonitor(probe="gradients")
    fit(OneGradient(fused=fused), monitor)
    event = only(monitor)
    assert (event.step, event.phase, event.fqn, event.kind) == (BAD, "backward", "blocks.1.first.bias", "inf")
    assert event.count == WIDTH
    assert event.amax["grad"] == INF


class Manual(Net):
    """Two optimizers; the gradient of the second one's parameters overflows in the bad batch."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__(fused=fused)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for index, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            factor = INF if index == 1 and batch_idx == BAD else 1.0
            self.manual_backward(Net.training_step(self, batch, -1) * factor)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        kwargs = {"lr": 1e-3, "fused": self.fused}
        return [torch.optim.AdamW(m.parameters(), **kwargs) for m in (self.blocks, self.head)]


@pytest.mark.parametrize("fused", [False, True])
def test_manual_optimization_falls_back_to_a_parameter_of_the_optimizer_that_overflowed(fused) -> None:
    monitor = OverflowMonitor()
    fit(Manual(fused=fused), monitor)
    event = only(monitor)
    # Two steps per batch: the second one of the bad batch.
    assert (event.step, event.batch_idx, event.phase, event.fqn) == (2 * BAD + 1, BAD, "backward", "head.bias")


class StepsByItself(Manual):
    """Steps the optimizers themselves, which BF16 allows, and counts the batches that are still alive."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__(fused=fused)
        self.seen: list[weakref.ref[Tensor]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(weakref.ref(batch["x"]))
        for optimizer in self.optimizers(use_pl_optimizer=False):
            optimizer.zero_grad()
            self.manual_backward(Net.training_step(self, batch, -1))
            optimizer.step()

    def num_alive(self) -> int:
        return sum(batch() is not None for batch in self.seen)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("probe", ["replay", "always"])
def test_batches_of_steps_past_the_plugin_are_not_held_without_end(probe, fused) -> None:
    class Fresh:
        def __len__(self):
            return 12

        def __iter__(self):
            return ({"x": torch.randn(2, WIDTH), "y": torch.randn(2, 1)} for _ in range(12))

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.num_alive = pl_module.num_alive()

    count = Count()
    used = trainer(MixedPrecision("bf16"), callbacks=[OverflowMonitor(probe=probe), count])
    model = StepsByItself(fused=fused)
    used.fit(model, Fresh())
    assert count.num_alive <= 2  # the one that the monitor holds, and the loop's
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in used.optimizers)


def test_always_probe_works_under_manual_optimization() -> None:
    monitor = OverflowMonitor(probe="always")
    fit(Manual(fused=False), monitor)
    event = only(monitor)
    assert (event.batch_idx, event.phase, event.fqn) == (BAD, "loss", "loss")


class Twins(LightningModule):
    """Two networks with an optimizer each, and a fault in each that a set of pairs (network, batch) turns on.

    Args:
        bad: Where the gradients overflow in backward.
        order: ``"apart"``: backward and step of one network, then of the other. ``"together"``: both backwards
            before both steps. ``"sum"``: one backward of the sum of both losses.
        every: Batches per step of each optimizer.
        kind: The fault, as ``Fault`` knows it.
    """

    def __init__(
        self, bad: set[tuple[str, int]], order: str = "apart", *, every: int = 1, fused: bool, kind: str = "blow"
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.g, self.d = self.network(kind), self.network(kind)
        self.bad, self.order, self.every, self.fused = bad, order, every, fused

    @staticmethod
    def network(kind: str) -> nn.Sequential:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), Blows() if kind == "blow" else Fault(kind), nn.Linear(WIDTH, 1))

    def training_step(self, batch, batch_idx):
        losses = {}
        for name, network in (("g", self.g), ("d", self.d)):
            network[1].is_on = (name, batch_idx) in self.bad
            losses[name] = network(batch["x"]).float().pow(2).mean()
            if self.order == "apart":
                self.manual_backward(losses[name])
                self.step(name, batch_idx)
        if self.order == "together":
            for loss in losses.values():
                self.manual_backward(loss)
        elif self.order == "sum":
            self.manual_backward(losses["g"] + losses["d"])
        for name in losses if self.order != "apart" else ():
            self.step(name, batch_idx)

    def step(self, name: str, batch_idx: int) -> None:
        if batch_idx % self.every == self.every - 1:
            optimizer = self.optimizers()["gd".index(name)]
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(m.parameters(), lr=1e-3, fused=self.fused) for m in (self.g, self.d)]


class Blows(nn.Module):
    """Finite in forward; its gradient is infinite where it is on."""

    is_on = False

    def forward(self, x: Tensor) -> Tensor:
        factor = INF if self.is_on else 1.0
        out = x.clone()
        out.register_hook(lambda grad: grad * factor)
        return out


# Two steps per window of batches, that of g first: of batch 0 alone 0 and 1, of batches 0 and 1 together the same.
ATTRIBUTIONS = [
    ({("d", 0)}, 1, [(1, 0, "d")]),
    ({("g", 0), ("d", 0)}, 1, [(0, 0, "g"), (1, 0, "d")]),
    ({("g", 1), ("d", 2)}, 1, [(2, 1, "g"), (5, 2, "d")]),
    ({("g", 0), ("d", 1)}, 2, [(0, 0, "g"), (1, 1, "d")]),
    ({("d", 0), ("g", 1)}, 2, [(0, 1, "g"), (1, 0, "d")]),
    ({("g", 2), ("d", 2)}, 2, [(2, 2, "g"), (3, 2, "d")]),
]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("order", ["apart", "together", "sum"])
@pytest.mark.parametrize(("bad", "every", "expected"), ATTRIBUTIONS)
def test_always_probe_names_the_batch_and_the_network_of_the_optimizer_that_overflowed(
    bad, every, expected, order, fused
) -> None:
    monitor = OverflowMonitor(probe="always")
    fit(Twins(bad, order, every=every, fused=fused), monitor, plugin=MixedPrecision("bf16"), data=batches(4))
    found = [(e.step, e.batch_idx, e.phase, e.fqn) for e in monitor.events]
    # The gradient that arrives at the fault is finite, and the one that it hands on is not.
    assert found == [(step, batch, "backward", f"{network}.1") for step, batch, network in expected]


@pytest.mark.parametrize("order", ["apart", "together", "sum"])
def test_always_probe_names_the_forward_of_the_network_whose_optimizer_overflowed(order) -> None:
    monitor = OverflowMonitor(probe="always")
    bad = {("g", 1), ("d", 1)}
    fit(Twins(bad, order, fused=False, kind="mask"), monitor, plugin=MixedPrecision("bf16"), data=batches(2))
    found = [(e.step, e.batch_idx, e.phase, e.fqn) for e in monitor.events]
    assert found == [(2, 1, "forward", "g.1"), (3, 1, "forward", "d.1")]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("probe", ["gradients", "always"])
def test_parameter_of_the_optimizer_that_overflowed_is_named_where_both_overflow(probe, fused) -> None:
    class Hooked(Twins):
        """Its fault is behind no module: the gradients of both first biases themselves are infinite in batch 1."""

        def training_step(self, batch, batch_idx):
            self.factor = INF if batch_idx == 1 else 1.0
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            for network in (self.g, self.d):
                network[0].bias.register_hook(lambda grad: grad * self.factor)
            return super().configure_optimizers()

    monitor = OverflowMonitor(probe=probe)
    fit(Hooked(set(), "together", fused=fused), monitor, plugin=MixedPrecision("bf16"), data=batches(2))
    # What the probes see is that the module's gradient arrives finite and that of its parameter is not.
    name = "0" if probe == "always" else "0.bias"
    assert [(e.step, e.fqn) for e in monitor.events] == [(2, f"g.{name}"), (3, f"d.{name}")]


@pytest.mark.parametrize("is_detached", [False, True])
def test_generator_is_named_where_the_discriminator_steps_on_its_nonfinite_output(is_detached) -> None:
    class Adversarial(Twins):
        """A generator's loss runs through both networks; the discriminator's may have a detached input."""

        @staticmethod
        def network(kind: str) -> nn.Sequential:
            return nn.Sequential(nn.Linear(WIDTH, WIDTH), Fault(kind), nn.Linear(WIDTH, WIDTH))

        def training_step(self, batch, batch_idx):
            self.g[1].is_on = ("g", batch_idx) in self.bad
            fake = self.g(batch["x"])
            self.d.requires_grad_(False)
            self.manual_backward(self.d(fake).float().pow(2).mean(), retain_graph=True)
            self.d.requires_grad_(True)
            seen = fake.detach() if is_detached else fake
            self.optimizers()[1].zero_grad()
            self.manual_backward(self.d(seen).float().pow(2).mean())
            for name in "gd":
                self.step(name, batch_idx)

    monitor = OverflowMonitor(probe="always")
    model = Adversarial({("g", 1)}, fused=False, kind="mask")
    fit(model, monitor, plugin=MixedPrecision("bf16"), data=batches(2))
    # NaN of the generator's forward reaches the parameters of both, one step each.
    assert [(e.step, e.phase, e.fqn) for e in monitor.events] == [(2, "forward", "g.1"), (3, "forward", "g.1")]


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_dataloader_iter_falls_back_to_a_parameter() -> None:
    class Fetching(Net):
        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            return Net.training_step(self, batch, batch_idx)

    monitor = OverflowMonitor()
    fit(Fetching("loss"), monitor)
    assert (only(monitor).phase, only(monitor).fqn) == ("backward", "head.bias")


@pytest.mark.parametrize("fused", [False, True])
def test_reentrant_checkpointing_falls_back_and_training_goes_on(fused) -> None:
    class Checkpointed(Net):
        def training_step(self, batch, batch_idx):
            self.blocks[2][1].is_on = batch_idx in (BAD, 4)
            hidden = checkpoint(self.blocks, batch["x"].requires_grad_(), use_reentrant=True)
            return nn.functional.mse_loss(self.head(hidden).float(), batch["y"])

    monitor = OverflowMonitor()
    used = fit(Checkpointed("gradient", fused=fused), monitor, plugin=MixedPrecision("fp16", loss_scale=2.0**12))
    assert used.global_step == 5
    assert [(e.step, e.phase) for e in monitor.events] == [(BAD, "backward"), (4, "backward")]
    # The names of the first: known where the gradients still are, as without a fused optimizer.
    names = [e.fqn for e in monitor.events]
    assert names[1].startswith("blocks.")
    assert names[0] == ("unknown" if fused else names[1])


def test_nonreentrant_checkpointing_is_replayed() -> None:
    class Checkpointed(Net):
        def training_step(self, batch, batch_idx):
            self.blocks[2][1].is_on = batch_idx == BAD
            hidden = checkpoint(self.blocks, batch["x"], use_reentrant=False)
            return nn.functional.mse_loss(self.head(hidden).float(), batch["y"])

    monitor = OverflowMonitor()
    fit(Checkpointed("gradient"), monitor, plugin=MixedPrecision("fp16", loss_scale=2.0**12))
    assert (only(monitor).phase, only(monitor).fqn) == ("backward", "blocks.2.1")


def test_exception_inside_the_replay_falls_back_and_training_goes_on() -> None:
    class Once(Net):
        def training_step(self, batch, batch_idx):
            if batch.setdefault("used", 0):
                raise KeyError("gone")
            batch["used"] = 1
            if len(seen) > batch_idx:
                raise KeyError("this batch was seen")
            seen.append(batch_idx)
            return super().training_step(batch, batch_idx)

    seen: list[int] = []
    monitor = OverflowMonitor()
    used = fit(Once("activation"), monitor)
    assert used.global_step == 5
    assert (only(monitor).phase, only(monitor).fqn) == ("backward", "head.bias")


def test_batch_of_an_accumulation_window_is_found() -> None:
    monitor = OverflowMonitor()
    fit(Net("mask", bad=1), monitor, data=batches(6), accumulate_grad_batches=3)
    event = only(monitor)
    assert (event.step, event.batch_idx, event.fqn) == (0, 1, "blocks.2.1")


class Leaves(Net):
    """Skips the rest of its first epoch at one batch, which is started and not computed."""

    def __init__(self, *args: Any, leaves_at: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.leaves_at = leaves_at

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.current_epoch == 0 and batch_idx == self.leaves_at else None


# Batch 2, with a NaN in it, ends the first epoch: that had two steps, or one of two batches. The first step of the
# second epoch overflows, by its batch 0.
@pytest.mark.parametrize(("accumulate", "step"), [(1, BAD), (2, BAD // 2)])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("probe", ["replay", "gradients", "always"])
def test_batch_that_was_started_and_not_computed_is_neither_blamed_nor_saved(
    probe, fused, accumulate, step, tmp_path
) -> None:
    class OneEpochLater(Leaves):
        def training_step(self, batch, batch_idx):
            is_bad = self.current_epoch >= 1 and batch_idx == 0
            return Net.training_step(self, batch, batch_idx) * (INF if is_bad else 1.0)

    data = batches(4, bad_x=float("nan"))
    monitor = OverflowMonitor(probe=probe, save_batch=True, dirpath=tmp_path)
    model = OneEpochLater(fused=fused, leaves_at=BAD, bad=-1)
    settings = {"max_epochs": 2, "limit_train_batches": 4, "accumulate_grad_batches": accumulate}
    used = trainer(MixedPrecision("bf16"), callbacks=[monitor], max_steps=step + 1, **settings)
    used.fit(model, data)
    last = accumulate - 1 if probe == "gradients" else 0
    assert [(e.step, e.batch_idx) for e in monitor.events] == [(step, last)]
    saved = torch.load(tmp_path / f"overflow-step{step}-rank0.pt")
    assert saved["batch_idx"] == last
    assert saved["batch"]["x"].isfinite().all()


@pytest.mark.parametrize("ends", ["epoch", "fit"])
def test_probes_of_a_batch_that_was_not_computed_are_taken_off(ends) -> None:
    class Hooks(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            counts.append(num_hooks(pl_module))

    counts: list[int] = []
    model = Leaves(leaves_at=BAD)
    epochs = 3 if ends == "epoch" else 1
    used = trainer(MixedPrecision("bf16"), callbacks=[OverflowMonitor(probe="always"), Hooks()], max_epochs=epochs)
    used.fit(model, batches())
    assert counts == [0] * epochs
    assert num_hooks(model) == 0


def num_hooks(model: nn.Module) -> int:
    of_modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return of_modules + sum(len(p._backward_hooks or {}) for p in model.parameters())


@pytest.mark.parametrize("probe", ["replay", "always"])
def test_batch_whose_gradients_were_zeroed_before_the_step_is_not_blamed(probe) -> None:
    class StepsAtOdd(Net):
        """Lightning zeroes the gradients in each closure: those of an even batch make no step."""

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx % 2 == 1:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (INF if batch_idx in (2, 3) else 1.0)

    monitor = OverflowMonitor(probe=probe)
    fit(StepsAtOdd(), monitor, plugin=MixedPrecision("bf16"), data=batches(6))
    assert [e.batch_idx for e in monitor.events] == [3]


def test_ignored_overflow_names_a_parameter_though_its_weights_are_gone() -> None:
    monitor = OverflowMonitor()
    fit(Net("loss", bad=4), monitor, plugin=MixedPrecision("bf16", on_nonfinite="ignore"))
    assert (only(monitor).step, only(monitor).fqn, only(monitor).phase) == (4, "head.bias", "backward")


def test_saved_batch_replays_outside_training(tmp_path) -> None:
    class Random(Net):
        def training_step(self, batch, batch_idx):
            batch["x"] = nn.functional.dropout(batch["x"], 0.5)
            losses.append(super().training_step(batch, batch_idx))
            return losses[-1] * (INF if batch_idx == BAD else 1.0)

    losses: list[Tensor] = []
    model = Random()
    weights = copy.deepcopy(model.state_dict())
    monitor = OverflowMonitor(save_batch=True, dirpath=tmp_path)
    fit(model, monitor, plugin=MixedPrecision("fp32"), data=batches(3))
    saved = torch.load(tmp_path / f"overflow-step{BAD}-rank0.pt", weights_only=True)
    assert set(saved) == {"batch", "batch_idx", "step", "rng", "loss_scale"}
    assert (saved["batch_idx"], saved["step"], saved["loss_scale"]) == (BAD, BAD, 1.0)
    assert weights.keys() == model.state_dict().keys()
    torch.set_rng_state(saved["rng"]["cpu"])
    in_training = losses[BAD].item()
    assert model.training_step(saved["batch"], saved["batch_idx"]).item() == INF
    # The skipped step left the weights of the bad batch, and dropout draws what it drew.
    assert losses[-1].item() == in_training


def test_event_log_and_loggers_hold_the_event(tmp_path) -> None:
    monitor = OverflowMonitor()
    logger = CSVLogger(tmp_path, name="run", version="v")
    used = fit(Net("mask"), monitor, logger=logger, log_every_n_steps=50)
    (line,) = (tmp_path / "run" / "v" / "overflow.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert set(record) == {
        *("step", "batch_idx", "rank", "phase", "fqn", "kind", "count", "amax", "loss_scale", "calibrating"),
    }
    assert (record["fqn"], record["amax"]["output"]) == ("blocks.2.1", "NaN")
    assert used.callback_metrics["overflow/blocks.2.1/nonfinite"] == only(monitor).count
    logger.save()
    assert "overflow/blocks.2.1/nonfinite" in (tmp_path / "run" / "v" / "metrics.csv").read_text()


def test_second_fit_of_the_same_callback_starts_its_events_anew() -> None:
    monitor = OverflowMonitor()
    fit(Net("mask"), monitor)
    fit(Net("loss"), monitor)
    assert only(monitor).phase == "loss"


def test_validation_between_steps_does_not_hide_the_event_of_a_fused_step() -> None:
    monitor = OverflowMonitor()
    used = trainer(MixedPrecision("bf16"), callbacks=[monitor], val_check_interval=1)
    model = Net("mask", fused=True)
    model.validation_step = lambda batch, batch_idx: None
    used.fit(model, batches(), batches(1))
    assert (only(monitor).step, only(monitor).fqn) == (BAD, "blocks.2.1")


def test_event_of_the_last_step_is_not_lost() -> None:
    monitor = OverflowMonitor()
    fit(Net("mask", bad=4, fused=True), monitor, plugin=MixedPrecision("bf16"))
    assert (only(monitor).step, only(monitor).fqn) == (4, "blocks.2.1")


def test_compiled_model_is_replayed_uncompiled() -> None:
    model = Net("mask")
    monitor = OverflowMonitor()
    fit(torch.compile(model, backend="eager"), monitor, plugin=MixedPrecision("bf16"))
    assert (only(monitor).phase, only(monitor).fqn) == ("forward", "blocks.2.1")


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("how", ["in place", "wrapped"])
@pytest.mark.parametrize("probe", ["replay", "always"])
def test_compiled_module_inside_is_looked_into_and_compiled_again_afterwards(probe, how, fullgraph, caplog) -> None:
    runs: list[bool] = []

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bad = nn.Linear(WIDTH, WIDTH), Scale()

        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return self.bad(self.layer(x), factor)

    class Scale(nn.Module):
        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return x * factor * factor

    class Compiled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()
            if how == "in place":
                self.inner.compile(backend="eager", fullgraph=fullgraph)
            else:
                self.inner = torch.compile(self.inner, backend="eager", fullgraph=fullgraph)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.inner(batch["x"], torch.tensor(1e30 if batch_idx == BAD else 1.0)).float().mean()

        def on_train_end(self) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runs.append(torch._dynamo.eval_frame._stance.stance == "default")

    torch.compiler.reset()
    monitor = OverflowMonitor(probe=probe)
    fit(Compiled(), monitor, plugin=MixedPrecision("bf16"))
    assert [(e.step, e.phase, e.fqn) for e in monitor.events] == [(BAD, "forward", "inner.bad")]
    assert runs == [True]
    assert not [record for record in caplog.records if "recompile_limit" in record.message]


def test_plugin_without_gradient_checks_gives_no_events_and_trains() -> None:
    monitor = OverflowMonitor()
    trainer(callbacks=[monitor]).fit(Net("loss"), batches())
    assert monitor.events == []


def test_boring_model_trains_without_events() -> None:
    monitor = OverflowMonitor()
    used = trainer(MixedPrecision("bf16"), callbacks=[monitor], fast_dev_run=True)
    used.fit(BoringModel())
    assert monitor.events == []


def test_copy_of_the_monitor_works_by_itself() -> None:
    original = OverflowMonitor(probe="always")
    fit(Net("mask"), original)
    copied = copy.deepcopy(original)
    fit(Net("loss"), copied)
    assert (only(copied).fqn, only(original).fqn) == ("loss", "blocks.2.1")


@pytest.mark.parametrize(("precision", "mode"), [("fp16", "copy"), ("bf16", "split")])
@pytest.mark.parametrize("probe", ["replay", "gradients"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_sixteen_bit_weights_are_replayed_and_end_as_without_the_monitor(precision, mode, probe, accumulate) -> None:
    ends = []
    for callbacks in ([], [OverflowMonitor(probe=probe)]):
        model = Net("mask")
        plugin = MixedPrecision(precision, master_weights=mode, loss_scale=2.0**8 if precision == "fp16" else None)
        trainer(plugin, callbacks=callbacks, accumulate_grad_batches=accumulate).fit(model, batches(6))
        ends.append(model)
    assert all(torch.equal(a, b) for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True))
    event = only(callbacks[0])
    assert event.fqn == ("blocks.2.1" if probe == "replay" else "head.bias")
    # A gradient does not tell which batch of a window it came from: the last one is given.
    assert event.batch_idx == (BAD if probe == "replay" or accumulate == 1 else BAD + 1)


@pytest.mark.parametrize("fused", [False, True])
def test_lightnings_own_scaler_gives_the_same_event(fused) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    monitor = OverflowMonitor()
    fit(Net("mask", fused=fused), monitor, plugin=LightningMixedPrecision("16-mixed", "cpu", scaler))
    event = only(monitor)
    assert (event.step, event.batch_idx, event.fqn, event.kind) == (BAD, BAD, "blocks.2.1", "nan")
    assert (event.loss_scale, event.calibrating) == (2.0**12, False)


def test_training_step_that_changes_its_batch_in_the_containers_is_replayed_with_the_batch_it_got() -> None:
    class Popping(Net):
        def training_step(self, batch, batch_idx):
            target = batch.pop("y")
            return super().training_step({"x": batch["x"], "y": target}, batch_idx)

    monitor = OverflowMonitor()
    fit(Popping("mask"), monitor)
    assert only(monitor).fqn == "blocks.2.1"


def test_learning_rate_finder_leaves_no_event() -> None:
    class Tunable(Net):
        lr = 1e-3

    monitor = OverflowMonitor()
    used = trainer(MixedPrecision("bf16"), callbacks=[monitor], max_steps=2, enable_checkpointing=True)
    model = Tunable("mask", bad=1)
    Tuner(used).lr_find(model, batches(), num_training=4, early_stop_threshold=None)
    assert monitor.events == []


WORLD = 2


def join_ranks(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_RANK=str(rank), NODE_RANK="0"
    )
    warnings.simplefilter("ignore")


def rank_worker(rank: int, port: int, folder: str) -> None:
    join_ranks(rank, port)

    def run(model: Net) -> tuple[OverflowMonitor, Any]:
        monitor = OverflowMonitor(save_batch=True, dirpath=folder)
        used = trainer(
            MixedPrecision("bf16"),
            callbacks=[monitor],
            devices=WORLD,
            strategy=DDPStrategy(process_group_backend="gloo"),
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        used.fit(model, batches(bad_x=float("nan") if rank == 1 else None))
        return monitor, used

    class Failing(Net):
        """Its replay fails on rank 1 only."""

        def training_step(self, batch, batch_idx):
            if rank == 1 and batch_idx in seen:
                raise KeyError("seen")
            seen.append(batch_idx)
            return super().training_step(batch, batch_idx)

    for fused in (False, True):
        monitor, used = run(Net(fused=fused))
        assert used.precision_plugin.skipped_steps == 1
        assert [(e.rank, e.step, e.phase, e.fqn) for e in monitor.events] == [(1, BAD, "batch", "x")], monitor.events
        seen: list[int] = []
        monitor, used = run(Failing("loss", bad=BAD, fused=fused))
        # Rank 0 replays and finds its loss; rank 1 cannot say more.
        assert [(e.rank, e.fqn) for e in monitor.events] == [(0, "loss")]
        assert monitor.probe == "replay"
    dist.barrier()
    names = sorted(path.name for path in Path(folder).glob("*.pt"))
    assert f"overflow-step{BAD}-rank1.pt" in names
    dist.destroy_process_group()


def test_two_ranks_name_the_culprit_of_the_rank_that_has_it(tmp_path) -> None:
    mp.spawn(rank_worker, (free_port(), str(tmp_path)), nprocs=WORLD)


class Gathering(Net):
    """Its steps gather over the ranks; the second rank's loss overflows, in the first batch of the second window."""

    # An attribute of the model would be put back after the replay.
    seen: ClassVar[list[int]] = []

    def __init__(self, *, fails: str | None = None, overflows: bool = True) -> None:
        super().__init__()
        self.fails = fails
        self.overflows = overflows
        self.seen.clear()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        again = batch_idx in self.seen and self.global_rank == 1
        self.seen.append(batch_idx)
        if again and self.seen.count(batch_idx) == {"before": 2, "repaired": 3}.get(self.fails or ""):
            raise KeyError("again")
        loss = Net.training_step(self, batch, -1)
        gathered = self.all_gather(loss.nan_to_num(0.0), sync_grads=True)
        if again and self.fails == "after":
            raise KeyError("again")
        others = self.all_gather(loss.detach().nan_to_num(0.0)) - gathered.detach()
        is_bad = self.overflows and self.global_rank == 1 and batch_idx == BAD
        return (loss + others.sum()) * (INF if is_bad else 1.0)


def probing_worker(rank: int, port: int, folder: str) -> None:
    join_ranks(rank, port)

    class Hooked(Net):
        """The gradient of its first weight, a leaf behind which no module is, overflows on the second rank."""

        def configure_optimizers(self) -> Any:
            self.steps = 0
            self.blocks[0].first.weight.register_hook(self.blow)
            return super().configure_optimizers()

        def blow(self, grad: Tensor) -> Tensor:
            self.steps += 1
            return grad * (INF if self.global_rank == 1 and self.steps == BAD + 1 else 1.0)

    def run(model: Net, probe: Any, **settings: Any) -> list[tuple[Any, ...]]:
        monitor = OverflowMonitor(probe=probe, save_batch=True, dirpath=Path(folder, str(len(runs))))
        strategy = DDPStrategy(process_group_backend="gloo")
        settings = {"devices": WORLD, "strategy": strategy, "use_distributed_sampler": False, **settings}
        trainer(MixedPrecision("bf16"), callbacks=[monitor], **settings).fit(model, batches(6))
        runs.append([(e.rank, e.step, e.batch_idx, e.phase, e.fqn) for e in monitor.events])
        dist.barrier()
        return runs[-1]

    runs: list[Any] = []
    only_here = BAD if rank == 1 else -1
    for accumulate in (1, 2):
        step = BAD // accumulate
        found = run(Net("mask", bad=only_here), "always", accumulate_grad_batches=accumulate)
        assert found == [(1, step, BAD, "forward", "blocks.2.1")], found
        found = run(Hooked(), "always", accumulate_grad_batches=accumulate)
        assert found == [(1, step, BAD, "backward", "blocks.0.first")], found
    found = run(Net("mask", bad=only_here), "gradients")
    assert found == [(0, BAD, BAD, "backward", "head.bias")], found
    saved = [sorted(path.name[-8:-3] for path in Path(folder, str(i)).glob("*.pt")) for i in range(len(runs))]
    assert saved == [["rank1"]] * 4 + [["rank0", "rank1"]], saved
    dist.destroy_process_group()


def test_probes_of_every_step_see_the_gradients_of_their_own_rank(tmp_path) -> None:
    mp.spawn(probing_worker, (free_port(), str(tmp_path)), nprocs=WORLD)


def gathering_worker(rank: int, port: int) -> None:
    join_ranks(rank, port)

    def run(model: Gathering, bad_x: float | None = None) -> OverflowMonitor:
        monitor = OverflowMonitor()
        strategy = DDPStrategy(process_group_backend="gloo")
        settings = {"devices": WORLD, "strategy": strategy, "use_distributed_sampler": False}
        used = trainer(MixedPrecision("bf16"), callbacks=[monitor], accumulate_grad_batches=2, **settings)
        used.fit(model, batches(6, bad_x=bad_x if rank == 1 else None))
        assert used.precision_plugin.skipped_steps == 1
        assert used.global_step == 3
        return monitor

    monitor = run(model := Gathering(overflows=False), bad_x=float("nan"))
    assert [(e.rank, e.batch_idx, e.phase, e.fqn) for e in monitor.events] == [(1, BAD, "batch", "x")]
    # Twice on both ranks, though one alone wants to know what a finite batch would have given.
    assert model.seen == [0, 1, 2, 3, 2, 2, 4, 5], model.seen
    # The finite batch fails on one rank before a collective of the other's: the first replay counts.
    monitor = run(model := Gathering(overflows=False, fails="repaired"), bad_x=float("nan"))
    assert [(e.rank, e.batch_idx, e.phase, e.fqn) for e in monitor.events] == [(1, BAD, "batch", "x")]
    assert model.seen == [0, 1, 2, 3, 2, 2, 4, 5], model.seen
    for fails in (None, "before", "after"):
        monitor = run(model := Gathering(fails=fails))
        # One event on both ranks alike; without a replay it is what the reduced gradients show.
        expected = (1, BAD, "loss", "loss") if fails is None else (0, BAD + 1, "backward", "head.bias")
        found = [(e.rank, e.batch_idx, e.phase, e.fqn) for e in monitor.events]
        assert found == [expected], (fails, found)
        # Both replayed the same batches: six, and the first of the window once more.
        assert model.seen == [0, 1, 2, 3, 2, 4, 5], (fails, model.seen)
    dist.destroy_process_group()


def test_two_ranks_with_collectives_in_their_step_replay_the_same_batches() -> None:
    mp.spawn(gathering_worker, (free_port(),), nprocs=WORLD)
