"""FP8Monitor measures at the steps asked for, and moves a layer that stays unhealthy back to 16 bits."""

import csv
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mp import MixedPrecision
from lightning_mp.callbacks.fp8_monitor import FP8Monitor, FP8Record
from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.report.events import read_events
from tests.models import Regression, batches, trainer, weights


class Net(LightningModule):
    """Two FP8 layers; ``flushed`` makes the second one's input too wide for one scale."""

    def __init__(self, *, flushed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self.flushed = flushed
        self.collecting: list[bool] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.collecting.append(self.first._fp8.settings.step.collects)
        hidden = self.first(batch[0])
        if self.flushed:
            # One element 2**30 above the rest: one scale for the tensor turns the rest into zeros.
            hidden = torch.cat([torch.full_like(hidden[:, :1], 2.0**30), hidden[:, 1:]], 1)
        return self.head(self.second(hidden) * 1e-6).float().square().mean()

    def configure_optimizers(self) -> Any:
        # The wide input would wreck the weights, and with them every later measurement.
        return torch.optim.SGD(self.parameters(), lr=0.0 if self.flushed else 1e-3)


def loader(num: int = 24) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(num, 16, generator=torch.Generator().manual_seed(1))), batch_size=4)


def emulated(**settings: Any) -> MixedPrecision:
    return MixedPrecision("fp8", fp8={"backend": "emulated", **settings})


def fit(model: LightningModule, monitor: FP8Monitor, *, data: Any = None, **settings: Any) -> Any:
    plugin = settings.pop("plugin", None) or emulated()
    run = trainer(plugin, callbacks=[monitor], **settings)
    run.fit(model, loader() if data is None else data)
    return run


class Fetching(Net):
    """Fetches its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


# Lightning 2.6: it is experimental.
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument", "ignore:You are using the `dataloader_iter`")
def test_step_that_fetches_its_batches_itself_is_measured_too() -> None:
    monitor = FP8Monitor(every_n_steps=2, plot=False)
    run = fit(Fetching(), monitor)
    assert {record.step for record in monitor.history} == {0, 2, 4}
    assert run.callback_metrics["fp8/demoted_layers"] == 0


def test_measured_steps_are_those_asked_for_and_no_other_is_touched(tmp_path) -> None:
    model, monitor = Net(), FP8Monitor(every_n_steps=2, dirpath=tmp_path, plot=False)
    fit(model, monitor)
    assert model.collecting == [True, False, True, False, True, False]
    places = [(record.step, record.fqn, record.operand) for record in monitor.history]
    assert places == [(s, f, o) for s in (0, 2, 4) for f in ("first", "second") for o in ("input", "weight", "grad")]
    assert [FP8Record(**event) for event in read_events(tmp_path / "fp8.jsonl")] == monitor.history


def test_watching_changes_no_bit_of_the_run() -> None:
    watched, alone = Net(), Net()
    fit(watched, FP8Monitor(every_n_steps=1, plot=False))
    trainer(emulated()).fit(alone, loader())
    assert all(torch.equal(a, b) for a, b in zip(weights(watched), weights(alone), strict=True))


def test_accumulated_micro_batches_make_one_measurement() -> None:
    model, monitor = Net(), FP8Monitor(every_n_steps=2, plot=False)
    fit(model, monitor, accumulate_grad_batches=2)
    assert model.collecting == [True, True, False, False, True, True]
    assert sorted({record.step for record in monitor.history}) == [0, 2]


class Adversarial(LightningModule):
    """A generator and a discriminator, each with a layer that no loss reaches in the other's update."""

    def __init__(self, *, is_gan: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.is_gan = is_gan
        self.g = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.d = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x = batch[0]
        for optimizer in reversed(self.optimizers()):
            is_d = optimizer is self.optimizers()[1]
            fake = self.g(x) if self.is_gan or not is_d else x
            fooled = self.d(fake.detach() if is_d else fake) if self.is_gan or is_d else fake
            optimizer.zero_grad()
            self.manual_backward(fooled.float().square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.g, self.d)]


@pytest.mark.parametrize("is_gan", [False, True])
@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_every_layer_and_operand_is_measured_in_a_step_of_two_optimizers(is_gan, recipe) -> None:
    monitor = FP8Monitor(every_n_steps=4, plot=False)
    fit(Adversarial(is_gan=is_gan), monitor, plugin=emulated(recipe=recipe))
    # Six batches are twelve attempts: the batches that begin with attempts 0, 4 and 8 are measured.
    assert [(record.step, record.fqn, record.operand) for record in monitor.history] == [
        (step, fqn, operand)
        for step in (0, 4, 8)
        for fqn in ("g.0", "g.2", "d.0")
        for operand in ("input", "weight", "grad")
    ]


class WideValidation(Net):
    """Its validation has inputs, and weights of its own, that flush nearly everything to zero."""

    def __init__(self, *, swaps_weights: bool) -> None:
        super().__init__()
        self.swaps_weights = swaps_weights

    def _swap(self) -> None:
        for layer in (self.first, self.second) if self.swaps_weights else ():
            layer.weight.data, self.kept[layer] = self.kept.get(layer, 2.0**20 * torch.eye(16)), layer.weight.data

    def on_validation_start(self) -> None:
        self.kept = {}
        self._swap()

    def on_validation_end(self) -> None:
        self._swap()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.second(self.first(batch[0] * torch.where(torch.arange(16) == 0, 2.0**30, 1.0)))


@pytest.mark.parametrize("recipe", ["current", "delayed", "block"])
@pytest.mark.parametrize("swaps_weights", [False, True])
def test_validation_inside_a_measured_step_is_left_out(recipe, swaps_weights) -> None:
    histories = []
    for limit in (0, 1):
        monitor = FP8Monitor(every_n_steps=1, demote=True, patience=2, plot=False)
        run = trainer(
            emulated(recipe=recipe, fp8_in_eval=True), callbacks=[monitor], accumulate_grad_batches=2,
            val_check_interval=1, limit_val_batches=limit,
        )  # fmt: skip
        run.fit(WideValidation(swaps_weights=swaps_weights), loader(), loader())
        histories.append(monitor.history)
    assert {record.operand for record in histories[0]} == {"input", "weight", "grad"}
    assert histories[0] == histories[1]


def test_values_are_those_of_the_tensors() -> None:
    model, monitor = Net(), FP8Monitor(every_n_steps=1, plot=False)
    weight = model.first.weight.detach().clone()
    fit(model, monitor)
    record = next(r for r in monitor.history if (r.step, r.fqn, r.operand) == (0, "first", "weight"))
    amax = weight.abs().max()
    scale = torch.tensor(448.0) / amax
    cast = (weight * scale).to(torch.float8_e4m3fn).float() / scale
    assert record.amax == amax.item()
    assert record.scale == pytest.approx(scale.item(), rel=1e-6)
    noise = (weight - cast).double().square().sum()
    assert record.sqnr_db == pytest.approx(10 * math.log10(weight.double().square().sum() / noise), abs=1e-3)
    assert (record.saturated, record.demoted) == (0.0, False)


def test_layer_that_stays_unhealthy_is_moved_and_the_checkpoint_remembers(tmp_path, caplog) -> None:
    model, monitor = Net(flushed=True), FP8Monitor(every_n_steps=1, demote=True, patience=3, plot=False)
    with caplog.at_level(logging.INFO):
        run = fit(model, monitor)
    demoted = [(record.step, record.fqn) for record in monitor.history if record.demoted]
    assert demoted == [(2, "second")] * 3
    assert {record.fqn for record in monitor.history if record.step > 2} == {"first"}
    assert "moved second back to 16 bits: 93.8% of its input flushed to zero (bound 50.0%)" in caplog.text
    run.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    reason = saved["MixedPrecision"]["lightning_mp"]["fp8"]["demoted"]["second"]
    assert reason.startswith("93.8% of its input flushed")


def test_healthy_measurement_starts_the_count_anew() -> None:
    class Alternating(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.flushed = batch_idx % 3 != 2
            return super().training_step(batch, batch_idx)

    monitor = FP8Monitor(every_n_steps=1, demote=True, patience=3, plot=False)
    fit(Alternating(flushed=True), monitor)
    assert not any(record.demoted for record in monitor.history)


def test_without_demote_nothing_is_moved() -> None:
    monitor = FP8Monitor(every_n_steps=1, patience=1, plot=False)
    fit(Net(flushed=True), monitor)
    assert not any(record.demoted for record in monitor.history)
    assert max(record.flushed for record in monitor.history) > 0.9


def test_count_survives_a_checkpoint() -> None:
    first, second = FP8Monitor(), FP8Monitor()
    first._unhealthy = {"second": 2}
    second.load_state_dict(first.state_dict())
    assert second._unhealthy == {"second": 2}


def test_worst_values_are_logged_and_the_picture_lies_beside_the_log(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    monitor = FP8Monitor(every_n_steps=2)
    logger = CSVLogger(tmp_path)
    fit(Net(flushed=True), monitor, logger=logger, log_every_n_steps=1)
    logged = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert {"fp8/saturated", "fp8/flushed", "fp8/sqnr_db", "fp8/demoted_layers"} <= set(logged[0].split(","))
    assert (tmp_path / "lightning_logs/version_0/fp8.png").stat().st_size > 1000
    assert (tmp_path / "lightning_logs/version_0/fp8.jsonl").exists()


@pytest.mark.parametrize(("every_n_steps", "log_every_n_steps"), [(1, 50), (2, 3), (3, 2), (2, 2)])
def test_each_measured_value_is_in_the_logger_once_at_its_own_step(tmp_path, every_n_steps, log_every_n_steps) -> None:
    monitor = FP8Monitor(every_n_steps, plot=False)
    logger = CSVLogger(tmp_path)
    run = fit(Net(), monitor, logger=logger, log_every_n_steps=log_every_n_steps)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = [(int(row["step"]), float(row["fp8/sqnr_db"])) for row in csv.DictReader(file) if row["fp8/sqnr_db"]]
    # Of the history, which holds every layer and operand, the worst of each measured step.
    worst = {}
    for record in monitor.history:
        worst[record.step] = min(record.sqnr_db, worst.get(record.step, float("inf")))
    assert rows == [(step, worst[step]) for step in range(0, 6, every_n_steps)]
    assert run.callback_metrics["fp8/sqnr_db"] == pytest.approx(rows[-1][1], rel=1e-6)  # in FP32 there


class Grows(LightningModule):
    """Its second layer is unhealthy for three steps; then modules are inserted, and the first one is."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        self.layers = tuple(self.body)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        first, second = self.layers
        if batch_idx == 3:
            self.body.insert(0, nn.Identity())
        wide = torch.cat([torch.full_like(batch[0][:, :1], 2.0**30), batch[0][:, 1:]], 1)
        inputs = (batch[0], wide) if batch_idx < 3 else (wide, batch[0])
        return sum(layer(x).float().mean() for layer, x in zip((first, second), inputs, strict=True))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_count_stays_with_its_layer_where_modules_are_inserted_before_it() -> None:
    monitor = FP8Monitor(every_n_steps=1, demote=True, patience=4, plot=False)
    model = Grows()
    fit(model, monitor, plugin=emulated(skip_output_head=False), max_steps=4)
    assert monitor._unhealthy == {"body.1": 1}
    assert not any(record.demoted for record in monitor.history)


def test_run_without_fp8_is_left_alone_and_told(caplog) -> None:
    monitor = FP8Monitor(every_n_steps=1)
    with caplog.at_level(logging.INFO):
        fit(Regression(), monitor, data=batches(), plugin=MixedPrecision("bf16"))
    assert monitor.history == []


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"every_n_steps": 0}, SettingValueError),
        ({"every_n_steps": 1.5}, SettingTypeError),
        ({"patience": 0}, SettingValueError),
        ({"max_saturated": -0.1}, SettingValueError),
        ({"max_flushed": 1.5}, SettingValueError),
        ({"max_flushed": "half"}, SettingTypeError),
    ],
)
def test_settings_out_of_range_are_refused(settings, error) -> None:
    with pytest.raises(error, match=next(iter(settings))):
        FP8Monitor(**settings)
