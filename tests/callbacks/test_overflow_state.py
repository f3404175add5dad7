"""A replay starts from what the step started from: modules' state, random numbers; and what it logs goes nowhere."""

import warnings
from collections import OrderedDict, deque
from typing import Any

import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision as LightningMixedPrecision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_mp import MixedPrecision, OverflowMonitor
from lightning_mp.overflow import WrittenState
from tests.models import INF, trainer

pytestmark = pytest.mark.filterwarnings("ignore:OverflowMonitor. step")

WIDTH = 4


def data(num: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader([torch.randn(2, WIDTH, generator=generator) for _ in range(num)], batch_size=None)


class Carries(LightningModule):
    """Reads what the step before has left, and leaves what it computed: Inf in the bad batch.

    A replay that starts from what the bad step left names ``read``, which adds the state, and not ``up``.
    """

    def __init__(self, carrier: str, *, bad: int, first: int = 0, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.read, self.up, self.head = nn.Linear(WIDTH, WIDTH), Read(), Up(), nn.Linear(WIDTH, 1)
        self.load, self.store = CARRIERS[carrier]
        self.bad, self.first, self.fused = bad, first, fused
        self.inner = Holder()
        self.register_buffer("bank", torch.zeros(2, WIDTH))
        self.hidden: Any = torch.zeros(2, WIDTH)
        self.pair = (torch.zeros(2, WIDTH), 0)
        self.table: dict[str, Any] = {"h": {"now": torch.zeros(2, WIDTH)}}
        self.history = [torch.zeros(2, WIDTH)]
        self.recent = deque([torch.zeros(2, WIDTH)], maxlen=2)
        self.count = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        h = self.up(self.read(self.enter(batch).tanh(), self.load(self)), batch_idx == self.bad)
        if self.global_step >= self.first or batch_idx >= self.first:
            self.store(self, h)
        self.count += 1
        return self.head(h).float().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=self.fused)


class Holder(nn.Module):
    """A module inside that keeps state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(2, WIDTH))
        self.hidden = torch.zeros(2, WIDTH)


class Read(nn.Module):
    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return x + state.tanh() * 0.1 + (state - state)


class Up(nn.Module):
    def forward(self, x: Tensor, is_bad: bool) -> Tensor:
        return x * (INF if is_bad else 0.5)


def set_hidden(model: Any, h: Tensor) -> None:
    model.hidden = h.detach()


def set_hidden_with_graph(model: Any, h: Tensor) -> None:
    model.hidden = h


def set_pair(model: Any, h: Tensor) -> None:
    model.pair = (h.detach(), model.pair[1] + 1)


def set_table(model: Any, h: Tensor) -> None:
    model.table["h"]["now"] = h.detach()


def set_table_anew(model: Any, h: Tensor) -> None:
    model.table = {"h": {"now": h.detach()}}


def set_history(model: Any, h: Tensor) -> None:
    model.history[0] = h.detach()


def append_recent(model: Any, h: Tensor) -> None:
    model.recent.append(h.detach())


def fill_bank(model: Any, h: Tensor) -> None:
    model.bank.copy_(h.detach())


def fill_row_of_bank(model: Any, h: Tensor) -> None:
    model.bank[model.count % 2] = h.detach()[0]


def replace_bank(model: Any, h: Tensor) -> None:
    model.bank = h.detach().float()


def fill_inner_bank(model: Any, h: Tensor) -> None:
    model.inner.bank.copy_(h.detach())


def set_inner_hidden(model: Any, h: Tensor) -> None:
    model.inner.hidden = h.detach()


def fill_hidden(model: Any, h: Tensor) -> None:
    model.hidden.copy_(h.detach())


CARRIERS: dict[str, tuple[Any, Any]] = {
    "attribute": (lambda m: m.hidden, set_hidden),
    "attribute with its graph": (lambda m: m.hidden.detach(), set_hidden_with_graph),
    "attribute in place": (lambda m: m.hidden, fill_hidden),
    "pair": (lambda m: m.pair[0], set_pair),
    "nested dict": (lambda m: m.table["h"]["now"], set_table),
    "new nested dict": (lambda m: m.table["h"]["now"], set_table_anew),
    "list": (lambda m: m.history[0], set_history),
    "deque": (lambda m: m.recent[-1], append_recent),
    "buffer": (lambda m: m.bank, fill_bank),
    "row of a buffer": (lambda m: m.bank, fill_row_of_bank),
    "new buffer": (lambda m: m.bank, replace_bank),
    "buffer inside": (lambda m: m.inner.bank, fill_inner_bank),
    "attribute inside": (lambda m: m.inner.hidden, set_inner_hidden),
}


def fit(
    model: LightningModule, monitor: OverflowMonitor | None, num: int = 8, plugin: Any = None, **settings: Any
) -> Any:
    callbacks = [] if monitor is None else [monitor]
    used = trainer(settings.pop("plugin", None) or MixedPrecision("bf16"), callbacks=callbacks, **settings)
    used.fit(model, data(num))
    return used


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [0, 3, 6])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_module_that_overflowed_is_named_though_the_step_left_infinity_in_its_state(carrier, bad, fused) -> None:
    monitor = OverflowMonitor()
    fit(Carries(carrier, bad=bad, fused=fused), monitor, num=bad + 1)
    (event,) = monitor.events
    assert (event.step, event.phase, event.fqn, event.kind) == (bad, "forward", "up", "inf")


@pytest.mark.parametrize("carrier", CARRIERS)
def test_state_after_a_replay_is_that_of_a_run_without_the_monitor(carrier) -> None:
    ends = []
    for monitor in (None, OverflowMonitor()):
        model = Carries(carrier, bad=5)
        fit(model, monitor, num=6)
        state = [model.hidden, model.pair, model.table, model.history, list(model.recent), model.bank, model.count]
        ends.append(str([*state, model.inner.bank, model.inner.hidden, *model.parameters()]))
    assert len(monitor.events) == 1
    assert ends[0] == ends[1]


def test_finite_state_of_before_the_step_decides_what_the_replay_does() -> None:
    class Alternates(Carries):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            # The third call overflows; a replay with a count of three would not.
            self.count += 1
            return self.head(self.up(self.enter(batch), self.count == 3)).float().mean()

    monitor = OverflowMonitor()
    fit(Alternates("attribute", bad=-1), monitor, num=5)
    assert [(e.step, e.phase, e.fqn) for e in monitor.events] == [(2, "forward", "up")]


def test_late_state_that_nobody_kept_names_a_parameter_and_says_so_once(caplog) -> None:
    class Twice(Carries):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.hidden.isfinite().all():
                return
            self.hidden = torch.zeros(2, WIDTH)
            self.bad = 12

    monitor = OverflowMonitor()
    with caplog.at_level("INFO"):
        fit(Twice("attribute", bad=9, first=9), monitor, num=14)
    assert [(e.step, e.phase) for e in monitor.events] == [(9, "backward"), (12, "forward")]
    assert monitor.events[1].fqn == "up"
    said = [record.message for record in caplog.records if "hidden holds Inf or NaN" in record.message]
    assert len(said) == 1
    assert "probe='always'" in said[0]


def test_statistics_that_hold_infinity_and_steer_nothing_keep_no_module_from_being_named() -> None:
    class Notes(Carries):
        def __init__(self) -> None:
            super().__init__("attribute", bad=-1)
            self.norm = nn.BatchNorm1d(WIDTH)
            self.error = torchmetrics.MeanMetric()
            self.average, self.losses = torch.zeros(()), [torch.zeros(())] * 100

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.head(self.up(self.norm(self.enter(batch)), batch_idx in (6, 7))).float().mean()
            self.error.update(loss.detach())
            self.average = 0.9 * self.average + 0.1 * loss.detach()
            self.losses.append(loss.detach())
            return loss

    monitor = OverflowMonitor()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics about NaN
        fit(Notes(), monitor)
    assert [(e.step, e.phase, e.fqn) for e in monitor.events] == [(6, "forward", "up"), (7, "forward", "up")]


class Unreadable(dict):
    """Refuses to be looked at."""

    def __len__(self) -> int:
        raise RuntimeError("no looking")


def test_container_that_cannot_be_read_ends_no_run_and_keeps_no_module_from_being_named(caplog) -> None:
    model = Carries("attribute", bad=3)
    model.strange = Unreadable(a=1)
    monitor = OverflowMonitor()
    with caplog.at_level("INFO"):
        fit(model, monitor)
    assert 3 in [e.step for e in monitor.events]
    assert any("cannot be read (RuntimeError: no looking)" in record.message for record in caplog.records)


class Ordered(LightningModule):
    """Carries its state in an ordered dict, whose order is part of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.up = nn.Linear(WIDTH, WIDTH), Up()
        self.table: Any = OrderedDict(first=torch.zeros(2, WIDTH))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        state = self.table.popitem(last=False)[1]
        h = self.up(self.enter(batch).tanh() + (state - state), batch_idx == 3)
        self.table[f"of {batch_idx}"] = h.detach()
        return h.float().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_ordered_dict_is_whole_after_a_replay() -> None:
    model, monitor = Ordered(), OverflowMonitor()
    fit(model, monitor, num=4)
    assert [e.step for e in monitor.events] == [3]
    assert list(model.table) == list(reversed(list(reversed(model.table)))) == ["of 3"]
    assert len(model.table) == 1


# --- What it costs -------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """Counts the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def written_by(model: nn.Module, step: Any) -> WrittenState:
    written = WrittenState(model)
    written.begin()
    step(model)
    written.end([])
    return written


def test_step_that_writes_no_state_keeps_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    model.add_module("error", torchmetrics.MeanMetric())

    def step(model: nn.Module) -> None:
        model[:4](torch.ones(2, 4)).sum().backward()
        model.error.update(1.0)
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    assert written_by(model, step).keep() == []


def test_attribute_that_is_replaced_is_kept_by_reference_and_one_written_in_place_as_a_copy() -> None:
    model = Holder()

    def step(model: Any) -> None:
        model.hidden = torch.ones(2, WIDTH)
        model.bank.add_(1)

    written = written_by(model, step)
    with Ops() as ops:
        kept = {place.name: value for place, value in written.keep()}
    assert kept["hidden"] is model.hidden
    assert kept["bank"] is not model.bank
    assert kept["bank"].tolist() == model.bank.tolist()
    assert [name for name in ops.names if "clone" in name] == ["aten.clone"]


def test_large_buffer_that_is_written_in_place_is_not_copied() -> None:
    model = Holder()
    model.register_buffer("queue", torch.zeros(2**20))
    written = written_by(model, lambda model: model.queue.add_(1))
    with Ops() as ops:
        kept = written.keep()
    assert ops.names == []
    assert [place.name for place, _ in kept] == ["queue"]


def test_many_writes_cost_no_more_than_a_few() -> None:
    model = nn.ModuleList([Holder() for _ in range(200)])

    def step(model: Any) -> None:
        for each in model:
            each.hidden = torch.ones(2, WIDTH)
            each.bank.add_(1)

    written = written_by(model, step)
    with Ops() as ops:
        assert len(written.keep()) <= 64
    assert len([name for name in ops.names if "clone" in name]) <= 8


def test_state_that_is_kept_holds_no_graph() -> None:
    model = Holder()

    def step(model: Any) -> None:
        model.hidden = torch.ones(2, WIDTH, requires_grad=True).exp()

    written = written_by(model, step)
    step(model)
    ((place, kept),) = written.keep()
    assert place.name == "hidden"
    assert kept.grad_fn is None
    assert torch.equal(kept, model.hidden)


# --- Random numbers ------------------------------------------------------------------------------


class Drops(LightningModule):
    """Overflows where its dropout keeps the first element."""

    def __init__(self, *, draws: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.up, self.draws = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1), draws
        self.masks: list[list[float]] = []
        self.real: list[list[float]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.draws:
            self.ratio = torch.rand(3)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        mask = nn.functional.dropout(torch.ones(32), 0.5)
        self.mask = mask.tolist()
        return self.up(self.enter(batch).tanh() * (INF if mask[0] > 0 else 1.0)).float().mean()

    def on_after_backward(self) -> None:
        # A replay does not come here.
        self.real.append(self.mask)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Draws(Callback):
    """Draws random numbers before each step."""

    def on_train_batch_start(self, *args: Any) -> None:
        torch.rand(5)


def start_hook(plugin: Any) -> bool:
    return "train_step_context" in vars(plugin)


@pytest.mark.parametrize("who", ["module", "callback before", "callback after", "both"])
def test_random_numbers_drawn_before_the_step_shift_no_mask_of_the_replay_or_the_saved_batch(who, tmp_path) -> None:
    model = Drops(draws=who in ("module", "both"))
    monitor = OverflowMonitor(save_batch=True, dirpath=tmp_path)
    others = [Draws()] if who != "module" else []
    callbacks = [*others, monitor] if who == "callback before" else [monitor, *others]
    plugin = MixedPrecision("bf16")
    used = trainer(plugin, callbacks=callbacks)
    torch.manual_seed(3)
    used.fit(model, data(10))
    bad = [step for step, mask in enumerate(model.real) if mask[0] > 0]
    assert 0 < len(bad) < 10
    assert [(e.step, e.phase, e.fqn) for e in monitor.events] == [(step, "forward", "Drops") for step in bad]
    for step in bad:
        saved = torch.load(tmp_path / f"overflow-step{step}-rank0.pt")
        torch.set_rng_state(saved["rng"]["cpu"])
        model.training_step(saved["batch"], saved["batch_idx"])
        assert model.mask == model.real[step]
    assert not start_hook(plugin)


def test_plugin_gets_no_hook_where_nothing_runs_before_the_step_and_none_stays_after_an_exception() -> None:
    seen: list[bool] = []

    class Looks(Carries):
        def on_before_backward(self, loss: Tensor) -> None:
            seen.append(start_hook(self.trainer.precision_plugin))

    fit(Looks("attribute", bad=-1), OverflowMonitor(), num=1)

    class Fails(Looks):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                raise RuntimeError("stop here")

    plugin = MixedPrecision("bf16")
    with pytest.raises(RuntimeError, match="stop here"):
        fit(Fails("attribute", bad=-1), OverflowMonitor(), plugin=plugin)
    assert seen == [False, True]
    assert not start_hook(plugin)


def test_lightnings_plugin_is_left_as_it_was() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = LightningMixedPrecision("16-mixed", "cpu", scaler)
    model, monitor = Drops(draws=True), OverflowMonitor()
    fit(model, monitor, plugin=plugin)
    bad = [step for step, mask in enumerate(model.real) if mask[0] > 0]
    assert [e.step for e in monitor.events if e.fqn == "Drops"] == bad
    assert not start_hook(plugin)


# --- Logs ----------------------------------------------------------------------------------------


class Criterion:
    """Logs by a method that it was given."""

    def __init__(self, log: Any) -> None:
        self.log = log

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        self.log("total", x.mean(), on_step=True, on_epoch=True, reduce_fx="sum", batch_size=2)
        return y.float().mean()


class Logs(LightningModule):
    """Logs in every way but by the logger's experiment."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1)
        self.criterion = Criterion(self.log)
        self.say = self.log_dict

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.logger.log_metrics({"mine": float(batch_idx)}, step=self.global_step)
        self.loggers[0].log_hyperparams({"batch": batch_idx})
        self.say({"a": batch.mean(), "b": 1.0}, on_epoch=True)
        self.log("plain", batch.sum())
        return self.criterion(self.layer(batch), batch) / (0.0 if batch_idx in (1, 2) else 1.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Rows(CSVLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__("unused")
        self.rows: list[tuple[Any, ...]] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        kept = {name: value for name, value in metrics.items() if "overflow" not in name}
        self.rows += [(step, kept)] if kept else []

    def log_hyperparams(self, params: Any = None) -> None:
        self.rows.append((params,))

    def save(self) -> None:
        """Write nothing."""


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_whatever_a_step_logs_is_logged_once(accumulate, fused) -> None:
    class Fused(Logs):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.1, fused=fused)

    ends = []
    for monitor in (None, OverflowMonitor()):
        torch.manual_seed(0)
        logger = Rows()
        settings = {"log_every_n_steps": 1, "max_epochs": 2, "accumulate_grad_batches": accumulate}
        used = fit(Fused(), monitor, num=5, logger=logger, **settings)
        metrics = {name: value.item() for name, value in used.callback_metrics.items() if "overflow" not in name}
        ends.append(str((logger.rows, metrics)))
        assert not [name for name in vars(logger) if name.startswith("log_")]
    assert {e.fqn for e in monitor.events} == {"loss"}
    assert len(monitor.events) == 4
    assert ends[0] == ends[1]


def test_loggers_get_their_methods_back_where_the_replay_fails() -> None:
    class Fails(Logs):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if "log_metrics" in vars(self.logger):
                raise RuntimeError("not twice")
            return loss

    logger = Rows()
    monitor = OverflowMonitor()
    fit(Fails(), monitor, num=4, logger=logger)
    assert [row[1]["mine"] for row in logger.rows if "mine" in row[-1]] == [0.0, 1.0, 2.0, 3.0]
    assert not [name for name in vars(logger) if name.startswith("log_")]
    assert [e.phase for e in monitor.events] == ["backward", "backward"]


def test_replay_sets_no_attribute_by_the_modules_own_setattr() -> None:
    class Counts(Logs):
        num_set = 0

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            self.__dict__["num_set"] = self.num_set + 1

    counts = []
    # The same hooks, around which Lightning sets attributes, with and without a replay.
    for monitor in (OverflowMonitor(probe="gradients"), OverflowMonitor()):
        model = Counts()
        fit(model, monitor, num=3, logger=Rows())
        counts.append(model.num_set)
        assert len(monitor.events) == 2
    assert monitor.events[0].fqn == "loss"
    assert counts[0] == counts[1]
