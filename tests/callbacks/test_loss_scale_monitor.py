"""LossScaleMonitor tells the scale that was used, the skips, and what is wrong, whatever the run does."""

import copy
import csv
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision as LightningMixedPrecision
from torch import nn

from lightning_mp import (
    LossScaleError,
    LossScaleMonitor,
    MixedPrecision,
    OverflowFoundError,
    OverflowMonitor,
    PrecisionReport,
)
from lightning_mp.callbacks.health_message import describe_health
from lightning_mp.grad_scaler import Readback
from lightning_mp.metrics import ScaleLimits, ScaleRecord, judge_health
from lightning_mp.report.events import read_events
from tests.models import INF, Fetching, Regression, batches, trainer
from tests.spawned import EndsItsProcessGroup

BAD = {1: INF, 4: INF, 5: INF}
# By hand: the scale of attempt i is 1024 halved once per overflow before it.
USED = [1024.0, 1024.0, 512.0, 512.0, 512.0, 256.0, 128.0, 128.0]
SKIPPED = [i in BAD for i in range(8)]


def fp16(**rule):
    return MixedPrecision("fp16", loss_scale={"init_scale": 1024.0, **rule})


def fit(monitor, plugin, *, model=None, data=None, ckpt_path=None, **settings):
    run = trainer(plugin, callbacks=[monitor, *settings.pop("callbacks", [])], log_every_n_steps=1, **settings)
    run.fit(model or Regression(factors=BAD), data or batches(), ckpt_path=ckpt_path)
    return run


def columns(monitor):
    return (
        [r.step for r in monitor.history],
        [r.loss_scale for r in monitor.history],
        [r.skipped for r in monitor.history],
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("log_every_n_steps", [1, 3, 50])
def test_history_holds_the_scale_used_and_the_skip_of_every_attempt(fused, log_every_n_steps):
    monitor = LossScaleMonitor()
    run = trainer(fp16(), callbacks=[monitor], log_every_n_steps=log_every_n_steps)
    run.fit(Regression(factors=BAD, fused=fused), batches())
    assert columns(monitor) == (list(range(8)), USED, SKIPPED)
    assert [r.found_inf for r in monitor.history] == SKIPPED


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_loss_scaling_skips_and_non_finite_gradients_are_shown(precision):
    monitor = LossScaleMonitor()
    run = fit(monitor, MixedPrecision(precision))
    assert columns(monitor) == (list(range(8)), [1.0] * 8, SKIPPED)
    assert run.callback_metrics["skipped_steps"] == 3


def test_ignored_non_finite_steps_count_as_overflows_and_not_as_skips():
    monitor = LossScaleMonitor()
    run = fit(monitor, MixedPrecision("bf16", on_nonfinite="ignore"), model=Regression(factors={6: INF}))
    assert [r.found_inf for r in monitor.history][6] is True
    assert not any(r.skipped for r in monitor.history)
    assert run.callback_metrics["skipped_steps"] == 0
    assert run.callback_metrics["overflow_rate"] > 0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("none_at", [(), (2,)])
def test_lightning_plugin_shows_its_scale_and_overflows(none_at):
    monitor = LossScaleMonitor()
    plugin = LightningMixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    run = trainer(plugin, callbacks=[monitor], log_every_n_steps=3)
    run.fit(Regression(factors=BAD, none_at=none_at), batches())
    kept = [i for i in range(8) if i not in none_at]
    assert [r.loss_scale for r in monitor.history] == [USED[i] for i in kept]
    assert [r.found_inf for r in monitor.history] == [SKIPPED[i] for i in kept]


def test_plugin_that_checks_nothing_is_said_once_and_leaves_no_history(caplog):
    caplog.set_level("INFO")
    monitor = LossScaleMonitor()
    for _ in range(2):
        fit(monitor, LightningMixedPrecision("bf16-mixed", "cpu"), model=Regression())
    assert monitor.history == []
    assert caplog.text.count("has no loss scale and does not look at gradients") == 1


# --- Logging ---------------------------------------------------------------------------------------


def logged_rows(logger):
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("loss_scale")]


def test_keys_reach_the_logger_at_log_steps_with_the_counts_of_that_step(tmp_path):
    logger = CSVLogger(tmp_path)
    run = trainer(fp16(), callbacks=[LossScaleMonitor(plot=False)], logger=logger, log_every_n_steps=2)
    run.fit(Regression(factors=BAD), batches())
    found = [
        (float(r["loss_scale"]), float(r["skipped_steps"]), float(r["overflow_rate"])) for r in logged_rows(logger)
    ]
    expected = [(1024.0, 1, 1 / 2), (512.0, 1, 1 / 4), (256.0, 3, 3 / 6), (128.0, 3, 3 / 8)]
    # The file holds FP32 values.
    assert [pytest.approx(values, rel=1e-6) for values in expected] == found


@pytest.mark.parametrize("make_logger", [lambda path: TensorBoardLogger(path), lambda path: False])
def test_keys_reach_callback_metrics_with_any_logger_and_none(tmp_path, make_logger):
    run = fit(LossScaleMonitor(plot=False), fp16(), logger=make_logger(tmp_path))
    found = {name: run.callback_metrics[name].item() for name in ("loss_scale", "skipped_steps", "overflow_rate")}
    assert found == {"loss_scale": 128.0, "skipped_steps": 3.0, "overflow_rate": 3 / 8}


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_step_that_fetches_its_batches_itself_is_logged_too():
    monitor = LossScaleMonitor()
    run = fit(monitor, fp16(), model=Fetching(factors=BAD))
    assert columns(monitor)[0] == list(range(8))
    assert run.callback_metrics["skipped_steps"] == 3


def test_monitor_reads_nothing_of_the_device_by_itself():
    counts = []
    for callbacks in ([], [LossScaleMonitor()]):
        before = Readback.count
        trainer(fp16(), callbacks=callbacks, log_every_n_steps=50).fit(Regression(fused=True), batches())
        counts.append(Readback.count - before)
    assert counts[0] == counts[1]


# --- Files -----------------------------------------------------------------------------------------


def test_event_log_and_picture_lie_beside_the_files_of_the_logger(tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = LossScaleMonitor()
    fit(monitor, fp16(), logger=logger)
    events = read_events(Path(logger.log_dir) / "loss_scale.jsonl")
    assert [ScaleRecord(**event) for event in events] == monitor.history
    assert list(events[0]) == ["step", "loss_scale", "found_inf", "skipped"]
    assert (Path(logger.log_dir) / "loss_scale.png").read_bytes().startswith(b"\x89PNG")


def test_no_directory_no_plot_and_fast_dev_run_leave_no_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(LossScaleMonitor(), fp16())
    fit(LossScaleMonitor(dirpath=tmp_path), fp16(), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []
    fit(LossScaleMonitor(plot=False, dirpath=tmp_path), fp16())
    assert [path.name for path in tmp_path.iterdir()] == ["loss_scale.jsonl"]


def test_missing_matplotlib_is_said_and_stops_nothing(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    fit(LossScaleMonitor(dirpath=tmp_path), fp16())
    assert "pip install 'lightning-mp[plot]'" in caplog.text
    assert not (tmp_path / "loss_scale.png").exists()


# --- Second day ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint", "ignore:.*not resumable")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("same_directory", [True, False])
def test_resumed_run_continues_history_counts_and_log(tmp_path, fused, same_directory):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    model = Regression(factors=BAD, fused=fused)
    fit(LossScaleMonitor(dirpath=tmp_path / "a"), fp16(), model=model, callbacks=[keep], enable_checkpointing=True)
    second = LossScaleMonitor(dirpath=tmp_path / ("a" if same_directory else "b"))
    rest = Regression(factors={0: INF}, fused=fused)  # batch 5 of the run
    run = fit(second, fp16(), model=rest, ckpt_path=tmp_path / "step=5.ckpt")
    assert columns(second) == (list(range(8)), USED, SKIPPED)
    assert run.callback_metrics["skipped_steps"] == 3
    steps = [event["step"] for event in read_events(second.event_log.path)]
    assert steps == (list(range(8)) if same_directory else [5, 6, 7])


def test_checkpoint_keeps_only_plain_types(tmp_path):
    run = fit(LossScaleMonitor(), fp16())
    run.save_checkpoint(tmp_path / "c.ckpt")
    state = torch.load(tmp_path / "c.ckpt", weights_only=True)["callbacks"]["LossScaleMonitor"]
    assert json.loads(json.dumps(state))["recent"][1] == [1, 1024.0, True, True]


def test_second_fit_of_one_trainer_continues_and_listens_once():
    monitor = LossScaleMonitor()
    run = fit(monitor, fp16())
    run.fit_loop.max_epochs = 2
    run.fit(Regression(), batches())
    assert [r.step for r in monitor.history] == list(range(16))


def test_new_run_with_the_same_monitor_starts_a_new_history():
    monitor = LossScaleMonitor()
    fit(monitor, fp16())
    fit(monitor, fp16(), model=Regression(factors={0: INF}))
    assert [r.skipped for r in monitor.history] == [True] + [False] * 7


def test_nothing_is_left_on_the_plugin_after_fit_and_after_an_exception():
    class Stop(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("stop")

    plugin = fp16()
    fit(LossScaleMonitor(), plugin)
    assert plugin._ledger.listeners == []
    with pytest.raises(RuntimeError, match="stop"):
        fit(LossScaleMonitor(), plugin, callbacks=[Stop()])
    assert plugin._ledger.listeners == []


class FinderModel(Regression):
    lr = 1e-3

    def configure_optimizers(self):
        self.settings["lr"] = self.lr
        return super().configure_optimizers()


class FindDuringTraining(LearningRateFinder):
    def on_fit_start(self, *args, **kwargs): ...

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint", "ignore:.*not resumable")
@pytest.mark.parametrize("finder_class", [LearningRateFinder, FindDuringTraining])
def test_probing_of_the_learning_rate_finder_leaves_no_trace(tmp_path, finder_class):
    monitor = LossScaleMonitor(plot=False, dirpath=tmp_path)
    finder = finder_class(num_training_steps=5, early_stop_threshold=None)
    settings = {"max_epochs": 2, "default_root_dir": tmp_path / "root"}
    fit(monitor, fp16(), model=FinderModel(), callbacks=[finder], **settings)
    assert [r.step for r in monitor.history] == list(range(16))
    assert [event["step"] for event in read_events(tmp_path / "loss_scale.jsonl")] == list(range(16))


def test_copy_made_while_listening_listens_to_nothing():
    class CopyMonitor(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.copied = copy.deepcopy(trainer.callbacks[0])

    copier = CopyMonitor()
    fit(LossScaleMonitor(), fp16(), callbacks=[copier])
    assert copier.copied._plugin is None


class Histories(Callback):
    """Writes what each rank holds at the end."""

    def __init__(self, dirpath):
        self.dirpath = dirpath

    def on_fit_end(self, trainer, pl_module):
        found = [[r.step, r.loss_scale, r.skipped] for r in trainer.callbacks[0].history]
        (self.dirpath / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


class BadOnRankOne(Regression):
    def training_step(self, batch, batch_idx):
        return self.loss(batch) * (INF if batch_idx == 2 and self.global_rank == 1 else 1.0)


def test_two_ranks_hold_one_history_and_rank_zero_writes_it(tmp_path):
    monitor = LossScaleMonitor(dirpath=tmp_path)
    settings = {"strategy": "ddp_spawn", "devices": 2, "use_distributed_sampler": False, "limit_train_batches": 5}
    run = trainer(
        fp16(), callbacks=[monitor, Histories(tmp_path), EndsItsProcessGroup()], log_every_n_steps=1, **settings
    )
    run.fit(BadOnRankOne(fused=True), batches())
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1] == [[i, 1024.0 if i < 3 else 512.0, i == 2] for i in range(5)]
    assert [event["step"] for event in read_events(tmp_path / "loss_scale.jsonl")] == list(range(5))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_another_monitor_ends_the_run_for_is_in_the_history(fused):
    monitor = LossScaleMonitor(plot=False)
    run = trainer(MixedPrecision("bf16"), callbacks=[OverflowMonitor(on_overflow="raise"), monitor])
    with pytest.raises(OverflowFoundError):
        run.fit(Regression(factors={3: INF}, fused=fused), batches())
    assert [(record.step, record.skipped) for record in monitor.history] == [(i, i == 3) for i in range(4)]


# --- Health ----------------------------------------------------------------------------------------


def test_calibration_is_told_from_collapse():
    monitor = LossScaleMonitor()
    model = Regression(factors=dict.fromkeys(range(8), INF))
    fit(monitor, fp16(), model=model)
    assert monitor.health == "calibrating"
    assert monitor.message == ""


def test_collapse_is_announced_with_numbers_culprit_and_advice(caplog):
    caplog.set_level("INFO")

    class OverflowMonitor(Callback):
        """Stands for the callback that names culprits: it only holds what that one would have found."""

        class Event:
            step, fqn, calibrating = 4, "layer.weight", False

        events = (Event(),)

    monitor = LossScaleMonitor()
    model = Regression(factors=dict.fromkeys(range(4, 14), INF))
    fit(monitor, fp16(), model=model, data=batches(14), callbacks=[OverflowMonitor()])
    assert monitor.health == "collapsing"
    assert monitor.message == (
        "collapsing: 9 of the last 12 steps overflowed and the scale fell from 1024 to 4; first overflow in "
        "layer.weight; try BF16, or pin it with FP32Pin(modules=['layer'])"
    )
    assert caplog.text.count("LossScaleMonitor: collapsing") == 1


def test_run_that_dies_at_the_floor_keeps_its_last_record_and_picture(tmp_path):
    monitor = LossScaleMonitor(dirpath=tmp_path)
    model = Regression(factors=dict.fromkeys(range(8), INF), fused=True)
    plugin = fp16(init_scale=2.0, floor_patience=3)
    with pytest.raises(LossScaleError):
        fit(monitor, plugin, model=model)
    assert [r.loss_scale for r in monitor.history] == [2.0, 1.0, 1.0, 1.0]
    assert monitor.health == "stuck"
    assert (tmp_path / "loss_scale.png").exists()


def test_short_run_that_ends_before_a_log_step_is_judged_at_its_end():
    monitor = LossScaleMonitor()
    run = trainer(MixedPrecision("bf16"), callbacks=[monitor], log_every_n_steps=50)
    run.fit(Regression(factors=BAD), batches())
    assert monitor.message.startswith("thrashing: 3 of the last 7 steps were skipped for Inf or NaN gradients")


def test_one_skip_in_few_steps_is_no_reason_for_advice():
    monitor = LossScaleMonitor()
    fit(monitor, MixedPrecision("bf16"), model=Regression(factors={1: INF}), limit_train_batches=3)
    assert (monitor.health, monitor.message) == ("thrashing", "")


@pytest.mark.parametrize("plugin", [MixedPrecision("bf16"), MixedPrecision("fp16", loss_scale=1024.0)])
def test_run_without_a_dynamic_scale_that_never_applied_a_step_says_so(plugin, tmp_path, caplog):
    caplog.set_level("INFO")
    monitor, report = LossScaleMonitor(dirpath=tmp_path), PrecisionReport(tmp_path)
    fit(monitor, plugin, model=Regression(factors=dict.fromkeys(range(8), INF)), callbacks=[report])
    # The words of the contract speak of the scale, which is none or does not move.
    assert monitor.health == "healthy"
    assert monitor.message.startswith("no step was applied: 8 of 8 steps were skipped for Inf or NaN gradients")
    html = report.path.read_text(encoding="utf-8")
    assert ">no step applied</b>" in html
    assert monitor.message.split(";")[0] in html
    assert 'class="band concern"' in html
    assert caplog.text.count("LossScaleMonitor: no step was applied") == 1


def test_ignored_non_finite_steps_are_said():
    monitor = LossScaleMonitor()
    model = Regression(factors=dict.fromkeys(range(1, 8), INF))
    fit(monitor, MixedPrecision("bf16", on_nonfinite="ignore"), model=model)
    assert monitor.message.startswith("non-finite steps were applied: 7 of the last 8 steps had Inf or NaN gradients")


def test_two_skips_before_the_first_applied_step_are_no_reason_for_advice():
    monitor = LossScaleMonitor()
    fit(monitor, MixedPrecision("bf16"), model=Regression(factors={0: INF, 1: INF}))
    assert monitor.message == ""


def test_scale_at_its_cap_is_stuck():
    monitor = LossScaleMonitor()
    fit(monitor, fp16(max_scale=1024.0), model=Regression())
    assert monitor.health == "stuck"
    assert "max_scale=1024" in monitor.message


def test_advice_at_the_cap_is_renewed_once_a_step_overflows_there():
    monitor = LossScaleMonitor()
    plugin = fp16(init_scale=4.0, max_scale=8.0, growth_interval=2, hysteresis=5)
    fit(monitor, plugin, model=Regression(factors=dict.fromkeys([3, 4, 5], INF)), limit_train_batches=6)
    # It was stuck since step 2, without an overflow; hysteresis holds the scale through the three that follow.
    assert [(r.loss_scale, r.skipped) for r in monitor.history[2:]] == [(8.0, False), *[(8.0, True)] * 3]
    assert monitor.health == "stuck"
    assert "max_scale=8, and 1 of the last 4 steps overflowed" in monitor.message


class Names(OverflowMonitor):
    """A subclass of the monitor whose events name culprits."""


class Pair(Regression):
    """Overflows once in one layer, and from step 70 on in the other."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        culprit = {10: self.layer}.get(batch_idx, self.other if batch_idx >= 70 else None)
        x, y = batch
        out = self.layer(x) * (INF if culprit is self.layer else 1.0)
        out = out + self.other(x) * (INF if culprit is self.other else 1.0)
        return nn.functional.mse_loss(out.float(), y)


def test_advice_speaks_of_the_fall_and_the_culprit_that_were_judged():
    # Calibration from 2**20 fell further, and the layer that overflowed at step 10 has nothing to do with the fall.
    monitor, names = LossScaleMonitor(), Names(on_overflow="log", probe="gradients")
    fit(monitor, fp16(init_scale=2.0**20), model=Pair(), data=batches(80), callbacks=[names])
    assert monitor.health == "collapsing"
    # Said at the ninth overflow in a row, when the scale that it used had fallen by 2**8.
    before, then = monitor.history[69].loss_scale, monitor.history[78].loss_scale
    assert before / then == 2.0**8
    assert f"9 of the last 50 steps overflowed and the scale fell from {before:g} to {then:g};" in monitor.message
    assert "first overflow in other." in monitor.message


def test_calibration_does_not_count_for_what_is_said_of_a_collapse():
    factors = dict.fromkeys([0, 1, *range(3, 13)], INF)
    monitor = LossScaleMonitor()
    fit(monitor, fp16(init_scale=2.0**14), model=Regression(factors=factors), data=batches(13))
    assert monitor.message.startswith(
        "collapsing: 9 of the last 9 steps overflowed and the scale fell from 4096 to 16;"
    )


def test_monitor_added_to_a_resumed_run_does_not_take_it_for_calibrating(tmp_path):
    first = trainer(fp16(), log_every_n_steps=1)
    first.fit(Regression(), batches(4))
    first.save_checkpoint(tmp_path / "last.ckpt")
    monitor = LossScaleMonitor()
    resumed = trainer(fp16(), callbacks=[monitor], log_every_n_steps=1, max_epochs=2)
    resumed.fit(Regression(factors={0: INF}), batches(4), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.precision_plugin.applied_steps == 7
    assert monitor.history[0].skipped
    assert judge_health(monitor.history[:1], monitor._limits, first_applied=monitor._first_applied) != "calibrating"


@pytest.mark.parametrize(
    ("health", "records", "words"),
    [
        ("stuck", [ScaleRecord(0, 1.0, True, True)], "at its floor, min_scale=1"),
        ("thrashing", [ScaleRecord(0, 8.0, True, True), ScaleRecord(1, 4.0, False, False)], "between 4 and 8"),
    ],
)
def test_advice_names_what_was_seen(health, records, words):
    message = describe_health(health, records, ScaleLimits(is_dynamic=True, min_scale=1.0))
    assert message.startswith(health)
    assert words in message
    assert "OverflowMonitor()" in message
