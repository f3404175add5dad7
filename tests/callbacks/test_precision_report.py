"""PrecisionReport writes one page with what all monitors saw, also after an error and a resume."""

from html import unescape

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision as LightningMixedPrecision
from lightning.pytorch.plugins.precision import Precision

from lightning_mp import (
    GradientRangeMonitor,
    LossScaleError,
    LossScaleMonitor,
    MixedPrecision,
    OverflowMonitor,
    PrecisionReport,
)
from lightning_mp.callbacks.fp32_pin import FP32Pin
from lightning_mp.errors import SettingValueError
from lightning_mp.report import build_report
from lightning_mp.report.events import read_events
from tests.models import INF, Regression, batches, trainer

BAD = {1: INF, 4: INF}


def fit(plugin, report, *callbacks, model=None, **settings):
    run = trainer(plugin, callbacks=[report, *callbacks], **settings)
    run.fit(model or Regression(factors=BAD), batches())
    return run


def test_page_lies_beside_the_files_of_the_logger_and_shows_the_monitors(tmp_path):
    logger = CSVLogger(tmp_path)
    report = PrecisionReport()
    fit(MixedPrecision("bf16"), report, LossScaleMonitor(), GradientRangeMonitor(2), FP32Pin(), logger=logger)
    assert str(report.path) == f"{logger.log_dir}/precision_report.html"
    html = report.path.read_text(encoding="utf-8")
    for expected in (
        "<b>6</b>",
        "steps applied of 8",
        "mse_loss in FP32",
        "Exponents of",
        "Regression",
        "optimizer state",
    ):
        assert expected in html
    # Rebuilt from the logs alone it is the same page.
    assert build_report(logger.log_dir).read_text(encoding="utf-8") == html


def test_monitors_that_write_elsewhere_or_nowhere_are_shown_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = PrecisionReport(dirpath=tmp_path / "page", filename="p.html")
    fit(MixedPrecision("bf16"), report, LossScaleMonitor(), GradientRangeMonitor(dirpath=tmp_path / "elsewhere"))
    html = (tmp_path / "page" / "p.html").read_text(encoding="utf-8")
    assert "steps applied of 8" in html
    assert "Exponents of" in html


@pytest.mark.parametrize("is_first", [True, False])
def test_page_holds_the_advice_whatever_the_order_of_the_callbacks(tmp_path, is_first):
    monitor, report = LossScaleMonitor(), PrecisionReport(dirpath=tmp_path)
    callbacks = [report, monitor] if is_first else [monitor, report]
    run = trainer(MixedPrecision("bf16"), callbacks=callbacks)
    run.fit(Regression(factors=dict.fromkeys([3, 5, 7], INF)), batches())
    assert monitor.message.startswith("thrashing: 3 of the last 7 steps were skipped")
    assert monitor.message in unescape(report.path.read_text(encoding="utf-8"))


class Watches(OverflowMonitor):
    """A subclass, which the page knows as its base."""


@pytest.mark.parametrize(
    ("plugin", "checks"),
    [
        (Precision(), False),
        (LightningMixedPrecision("bf16-mixed", "cpu"), False),
        (LightningMixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0)), True),
        (MixedPrecision("bf16"), True),
    ],
)
def test_page_says_where_the_plugin_gave_the_monitors_nothing_to_see(tmp_path, plugin, checks):
    report = PrecisionReport(dirpath=tmp_path)
    fit(plugin, report, OverflowMonitor(), model=Regression())
    html = report.path.read_text(encoding="utf-8")
    assert "<code>OverflowMonitor</code> was on and found nothing to show." in html
    assert ("looks at no gradient" in html) is not checks


def test_monitor_that_was_on_and_found_nothing_is_not_asked_for(tmp_path):
    report = PrecisionReport(dirpath=tmp_path)
    zero = Regression(factors=dict.fromkeys(range(8), 0.0))
    fit(MixedPrecision("bf16"), report, Watches(), GradientRangeMonitor(1), model=zero)
    html = report.path.read_text(encoding="utf-8")
    for name in ("OverflowMonitor", "GradientRangeMonitor"):
        assert f"<code>{name}</code> was on and found nothing to show." in html
        assert f"Add <code>{name}()</code>" not in html
    assert "Add <code>LossScaleMonitor()</code>" in html


def test_picture_or_page_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("gradient_range.png", "loss_scale.png"):
        (tmp_path / name).mkdir()
    report = PrecisionReport(dirpath=tmp_path)
    monitors = GradientRangeMonitor(1, dirpath=tmp_path), LossScaleMonitor(dirpath=tmp_path)
    run = trainer(MixedPrecision("bf16"), callbacks=[*monitors, report])
    run.fit(Regression(), batches())
    assert report.path == tmp_path / "precision_report.html"
    assert "GradientRangeMonitor: gradient_range.png was not drawn: IsADirectoryError" in caplog.text
    assert "LossScaleMonitor: loss_scale.png was not drawn: IsADirectoryError" in caplog.text
    report.path.unlink()
    report.path.mkdir()
    fit(MixedPrecision("bf16"), blocked := PrecisionReport(dirpath=tmp_path))
    assert blocked.path is None
    assert f"IsADirectoryError: [Errno 21] Is a directory: '{report.path}'. The event logs stay" in caplog.text


def test_without_any_directory_the_page_goes_to_the_default_root_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = PrecisionReport()
    fit(MixedPrecision("bf16"), report, default_root_dir=tmp_path / "root")
    assert report.path == tmp_path / "root" / "precision_report.html"
    assert "<b>6</b><span>steps applied</span>" in report.path.read_text(encoding="utf-8")


def test_memory_is_measured_by_component(tmp_path):
    fit(MixedPrecision("bf16"), PrecisionReport(tmp_path))
    end = read_events(tmp_path / "run.jsonl")[-1]
    # 5 FP32 parameters; AdamW holds two moments of each and a step count per tensor.
    assert end["memory"] == {"weights": 20, "gradients": 20, "optimizer_state": 2 * 20 + 2 * 4}
    start = read_events(tmp_path / "run.jsonl")[0]
    assert start["estimate"]["total"] == 80


def test_run_that_dies_of_overflow_still_gets_its_page(tmp_path):
    model = Regression(factors=dict.fromkeys(range(8), INF))
    plugin = MixedPrecision("fp16", loss_scale={"init_scale": 2.0, "floor_patience": 3})
    report = PrecisionReport(tmp_path)
    with pytest.raises(LossScaleError):
        fit(plugin, report, LossScaleMonitor(dirpath=tmp_path), model=model)
    html = report.path.read_text(encoding="utf-8")
    assert "stopped by LossScaleError" in html
    assert "stuck" in html
    assert "The loss scale is at its floor" in html


def test_other_errors_leave_the_log_and_no_page(tmp_path):
    class Broken(Regression):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(MixedPrecision("bf16"), PrecisionReport(tmp_path), model=Broken())
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]
    assert "has not ended, or was killed" in build_report(tmp_path).read_text(encoding="utf-8")


def test_resume_replaces_the_end_and_counts_the_start(tmp_path):
    run = fit(MixedPrecision("bf16"), PrecisionReport(tmp_path), limit_train_batches=5)
    run.save_checkpoint(tmp_path / "c.ckpt")
    second = trainer(MixedPrecision("bf16"), callbacks=[PrecisionReport(tmp_path)], max_epochs=2, limit_train_batches=3)
    second.fit(Regression(), batches(), ckpt_path=tmp_path / "c.ckpt")
    events = read_events(tmp_path / "run.jsonl")
    assert [(event["event"], event["step"]) for event in events] == [("start", 0), ("start", 5), ("end", 8)]
    assert "resumed 1 times" in (tmp_path / "precision_report.html").read_text(encoding="utf-8")


def test_rebuilt_page_holds_nothing_of_an_earlier_run_with_more_monitors(tmp_path):
    fit(MixedPrecision("bf16"), PrecisionReport(tmp_path), LossScaleMonitor(dirpath=tmp_path))
    report = PrecisionReport(tmp_path)
    fit(MixedPrecision("bf16"), report, model=Regression())
    html = report.path.read_text(encoding="utf-8")
    assert build_report(tmp_path).read_text(encoding="utf-8") == html
    assert len(read_events(tmp_path / "loss_scale-v1.jsonl")) == 8
    # A run without a report leaves none of the old settings beside its logs either.
    fit(MixedPrecision("bf16"), LossScaleMonitor(dirpath=tmp_path))
    assert not (tmp_path / "run.jsonl").exists()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resumed_run_with_fewer_monitors_keeps_their_logs(tmp_path):
    run = fit(MixedPrecision("bf16"), PrecisionReport(tmp_path), LossScaleMonitor(dirpath=tmp_path))
    run.save_checkpoint(tmp_path / "run.ckpt")
    resumed = trainer(MixedPrecision("bf16"), callbacks=[PrecisionReport(tmp_path)], max_epochs=2)
    resumed.fit(Regression(), batches(), ckpt_path=tmp_path / "run.ckpt")
    assert len(read_events(tmp_path / "loss_scale.jsonl")) == 8


def test_two_monitors_of_one_class_are_counted_once(tmp_path):
    reports = PrecisionReport(tmp_path), PrecisionReport(tmp_path, "b.html")
    fit(MixedPrecision("bf16"), *reports, *(GradientRangeMonitor(n, dirpath=tmp_path) for n in (1, 2)))
    for path in ("precision_report.html", "b.html"):
        assert "of 8 measured steps" in (tmp_path / path).read_text(encoding="utf-8")
    assert "of 8 measured steps" in build_report(tmp_path).read_text(encoding="utf-8")
    assert [event["event"] for event in read_events(tmp_path / "run.jsonl")] == ["start", "end"]


def test_fast_dev_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(MixedPrecision("bf16"), PrecisionReport(tmp_path), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_learning_rate_finder_leaves_one_start_and_one_end(tmp_path):
    class FinderModel(Regression):
        lr = 1e-3

    finder = LearningRateFinder(num_training_steps=5, early_stop_threshold=None)
    report = PrecisionReport(tmp_path)
    fit(MixedPrecision("bf16"), report, finder, model=FinderModel(), default_root_dir=tmp_path / "root")
    assert [event["event"] for event in read_events(tmp_path / "run.jsonl")] == ["start", "end"]


@pytest.mark.parametrize(
    "plugin", [None, LightningMixedPrecision("bf16-mixed", "cpu"), LightningMixedPrecision("16-mixed", "cpu")]
)
def test_plugins_of_lightning_get_a_page_too(tmp_path, plugin):
    report = PrecisionReport(tmp_path)
    fit(plugin, report, LossScaleMonitor(), model=Regression())
    assert "Parameters: 5 in FP32" in report.path.read_text(encoding="utf-8")


def test_optimizer_that_the_planner_does_not_know_leaves_the_estimate_out(tmp_path):
    fit(MixedPrecision("bf16"), PrecisionReport(tmp_path), model=Regression(optimizer=torch.optim.Rprop))
    assert read_events(tmp_path / "run.jsonl")[0]["estimate"] is None


@pytest.mark.parametrize("filename", ["a/b.html", "report.txt", ""])
def test_filename_is_a_plain_html_name(filename):
    with pytest.raises(SettingValueError, match="filename"):
        PrecisionReport(filename=filename)
