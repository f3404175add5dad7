"""The metrics count right alone, over ranks, and in a LightningModule, and draw what they counted."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.formats import FP16
from lightning_mp.metrics import (
    FP8LayerStats,
    GradientExponentHistogram,
    LossScaleTrajectory,
    OverflowRate,
    ScaleLimits,
    ScaleRecord,
    UnderflowFraction,
)
from tests.metrics.ranks import on_two_ranks
from tests.models import Regression, batches, trainer

RECORDS = [ScaleRecord(step, 1024.0 / 2 ** min(step, 3), step < 3, step < 3) for step in range(6)]


# --- Alone -----------------------------------------------------------------------------------------


def test_overflow_rate_counts_bools_and_tensors_of_flags():
    rate = OverflowRate()
    rate.update(True)
    rate.update(torch.tensor([0.0, 1.0, 0.0]))
    rate.update(torch.tensor(0.0))
    assert rate.compute() == pytest.approx(2 / 5)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_rates_without_data_are_zero():
    assert OverflowRate().compute() == 0
    assert UnderflowFraction(torch.float16).compute() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_underflow_fraction_is_what_a_cast_loses_weighted_by_elements(dtype):
    x = torch.tensor([0.0, 2.0**-24, 2.0**-25, 2.0**-26, -(2.0**-30), 1.0, 2.0], dtype=dtype)
    lost = UnderflowFraction(torch.float16)
    lost.update(x)
    lost.update(torch.ones(4, dtype=dtype))
    # Oracle: the cast itself. Three of six nonzero values vanish, then none of four.
    assert int((x.half() == 0).sum() - (x == 0).sum()) == 3
    assert lost.compute() == pytest.approx(3 / 10)


def test_underflow_fraction_counts_exactly_beyond_the_integers_of_fp32():
    lost = UnderflowFraction(torch.float16)
    lost.num_nonzero += 2**40
    lost.num_flushed += 2**39
    lost.update(torch.tensor([2.0**-30]))
    assert (lost.num_flushed.item(), lost.num_nonzero.item()) == (2**39 + 1, 2**40 + 1)


def test_underflow_fraction_refuses_what_is_no_float():
    with pytest.raises(SettingTypeError, match="int64"):
        UnderflowFraction(torch.float16).update(torch.ones(2, dtype=torch.int64))
    with pytest.raises(SettingValueError, match="int8"):
        UnderflowFraction(torch.int8)


def test_histogram_places_subnormals_and_sums_tensors():
    histogram = GradientExponentHistogram()
    histogram.update([torch.tensor([2.0**-149, 3.0, 0.0]), torch.tensor([2.0, float("inf"), float("nan")])])
    found = histogram.compute()
    counts = dict(zip(found["exponents"].tolist(), found["counts"].tolist(), strict=True))
    assert {e: c for e, c in counts.items() if c} == {-149: 1, 1: 2}
    assert (found["num_zeros"].item(), found["num_nonfinite"].item()) == (1, 2)


def test_trajectory_returns_what_was_added_in_order_of_steps():
    trajectory = LossScaleTrajectory()
    trajectory.update_from(RECORDS[3:])
    trajectory.update_from(RECORDS[:3])
    assert trajectory.records() == RECORDS


def test_trajectory_keeps_large_steps_and_scales_exactly():
    record = ScaleRecord(2**40 + 1, 2.0**32, False, False)
    trajectory = LossScaleTrajectory()
    trajectory.update_from([record])
    assert trajectory.records() == [record]


def test_reset_forgets():
    trajectory, stats = LossScaleTrajectory(), FP8LayerStats(["a"])
    trajectory.update_from(RECORDS)
    stats.update(0, "a", "input", amax=1.0, scale=1.0, saturated=0.0, flushed=0.0, sqnr_db=30.0)
    for metric in (trajectory, stats):
        metric.reset()
        assert len(metric.rows()["step"]) == 0


def test_fp8_grid_holds_each_layer_operand_and_step():
    stats = FP8LayerStats(["a", "b"])
    stats.update(10, "b", "grad", amax=2.0, scale=4.0, saturated=0.5, flushed=torch.tensor(0.25), sqnr_db=30.0)
    stats.update(20, "a", "input", amax=1.0, scale=2.0, saturated=0.0, flushed=0.0, sqnr_db=25.0)
    found = stats.compute()
    assert found["step"].tolist() == [10, 20]
    assert found["flushed"][1, 2, 0] == 0.25
    assert found["sqnr_db"][0, 0, 1] == 25.0
    assert found["amax"].isnan().sum() == 2 * 3 * 2 - 2


def test_fp8_stats_name_what_they_do_not_know():
    stats = FP8LayerStats(["a"])
    with pytest.raises(SettingValueError, match=r"fqn='c' is not known. Known: a"):
        stats.update(0, "c", "input", amax=1.0, scale=1.0, saturated=0.0, flushed=0.0, sqnr_db=1.0)


# --- In a MetricCollection -------------------------------------------------------------------------


def test_underflow_of_several_dtypes_in_a_collection_is_what_each_finds_alone():
    dtypes = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    together = MetricCollection({f"to_{str(dtype)[6:]}": UnderflowFraction(dtype) for dtype in dtypes})
    # No format flushes anything of the first update, after which a collection looks for equal states.
    x = torch.tensor([2.0**-12, 2.0**-20, 2.0**-30, 1.0])
    for each in (torch.tensor([1.0, 2.0]), x):
        together.update(each)
    # Oracle: the cast itself.
    expected = {f"to_{str(dtype)[6:]}": (x.to(dtype).float() == 0).sum().item() / 6 for dtype in dtypes}
    assert len(set(expected.values())) == 4
    found = together.compute()
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)


def test_fp8_stats_of_several_layers_in_a_collection_keep_their_own_places():
    # Both hold layer index 0 and the same values after the first update.
    together = MetricCollection({"ab": FP8LayerStats(["a", "b"]), "abc": FP8LayerStats(["a", "b", "c"])})
    operands = MetricCollection({"few": FP8LayerStats(["a", "b"], ["input"]), "all": FP8LayerStats(["a", "b"])})
    values = {"amax": 1.0, "scale": 1.0, "saturated": 0.0, "flushed": 0.0, "sqnr_db": 30.0}
    for collection in (together, operands):
        collection.update(0, "a", "input", **values)
        collection.update(1, "b", "input", **values)
        assert len(collection.compute_groups) == 2
    with pytest.raises(SettingValueError, match="fqn='c'"):
        together.update(2, "c", "input", **values)


def test_trajectories_in_a_collection_keep_their_own_limits():
    # Rows do not depend on the limits, so that these may share them.
    limits = {"dynamic": ScaleLimits(is_dynamic=True), "static": ScaleLimits()}
    together = MetricCollection({name: LossScaleTrajectory(each) for name, each in limits.items()})
    for r in RECORDS:
        together.update(r.step, r.loss_scale, r.found_inf, r.skipped)
    together.compute()
    for name, trajectory in together.items():
        assert (trajectory.limits, trajectory.records()) == (limits[name], RECORDS)


def _copies(metric):
    metric.persistent(True)
    loaded = copy.deepcopy(metric)
    loaded.reset()
    loaded.load_state_dict(metric.state_dict())
    return [copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), loaded]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_metrics_with_settings_are_copied_and_restored():
    lost, stats = UnderflowFraction(torch.float16), FP8LayerStats(["a", "b"])
    lost.update(torch.tensor([2.0**-30, 1.0]))
    stats.update(3, "b", "grad", amax=2.0, scale=1.0, saturated=0.0, flushed=0.0, sqnr_db=30.0)
    assert [(each.compute().item(), each.num_flushed.item()) for each in _copies(lost)] == [(0.5, 1)] * 3
    assert [each.compute()["amax"][1, 2].item() for each in _copies(stats)] == [2.0] * 3


def test_states_of_before_they_carried_settings_are_restored():
    lost, stats = UnderflowFraction(torch.float16), FP8LayerStats(["a", "b"])
    lost.load_state_dict({"num_flushed": torch.tensor(3), "num_nonzero": torch.tensor(4)})
    rows = {"step": 3, "layer": 1, "operand": 2, "amax": 2.0, "scale": 1.0, "saturated": 0.0, "flushed": 0.0}
    stats.load_state_dict({f"{k}_rows": [torch.tensor([v])] for k, v in (rows | {"sqnr_db": 30.0}).items()})
    assert lost.num_flushed == 3
    assert stats.rows()["amax"].tolist() == [2.0]
    assert stats.rows()["layer"].tolist() == [1]


def test_state_of_another_dtype_is_refused():
    other = UnderflowFraction(torch.bfloat16)
    other.persistent(True)
    with pytest.raises(RuntimeError, match="num_flushed_bfloat16"):
        UnderflowFraction(torch.float16).load_state_dict(other.state_dict())


# --- Over ranks ------------------------------------------------------------------------------------


def _sync_all(rank):
    rate, lost, histogram = OverflowRate(), UnderflowFraction(torch.float16), GradientExponentHistogram()
    for flag in ([True, False], [False] * 6)[rank]:
        rate.update(flag)
    lost.update((torch.tensor([2.0**-30, 1.0]), torch.ones(6))[rank])
    histogram.update(torch.full((rank + 1,), 4.0))
    return rate.compute().item(), lost.compute().item(), histogram.compute()["counts"].sum().item()


def test_counts_add_up_over_ranks():
    assert on_two_ranks(_sync_all) == [pytest.approx((1 / 8, 1 / 8, 3))] * 2


def _sync_trajectory(rank):
    trajectory = LossScaleTrajectory()
    trajectory.update_from(RECORDS)
    synced = trajectory.records()
    return synced, [len(column) for column in trajectory.rows().values()]


def test_trajectory_of_ranks_that_saw_the_same_steps_has_each_step_once():
    # Unsynced again after compute, each rank holds its own six rows.
    assert on_two_ranks(_sync_trajectory) == [(RECORDS, [6] * 4)] * 2


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def _sync_uneven(rank):
    trajectory = LossScaleTrajectory()
    if rank == 1:
        trajectory.update_from(RECORDS)
    return trajectory.records()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_trajectory_of_a_rank_without_steps_syncs():
    assert on_two_ranks(_sync_uneven) == [RECORDS] * 2


def _sync_fp8(rank):
    stats = FP8LayerStats(["a"])
    stats.update(0, "a", "input", amax=1.0 + rank, scale=1.0, saturated=0.0, flushed=0.5 * rank, sqnr_db=30.0)
    found = stats.compute()
    return found["amax"][0, 0, 0].item(), found["flushed"][0, 0, 0].item()


def test_fp8_stats_take_the_largest_amax_and_the_mean_share_over_ranks():
    assert on_two_ranks(_sync_fp8) == [(2.0, 0.25)] * 2


# --- In a LightningModule --------------------------------------------------------------------------


class WithMetrics(Regression):
    """Logs metrics as any user of torchmetrics does."""

    def __init__(self):
        super().__init__()
        self.rate = OverflowRate()
        self.lost = UnderflowFraction(torch.float16)
        self.trajectory = LossScaleTrajectory()

    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            self.lost.update(parameter.grad)
        self.rate.update(self.global_step % 4 == 0)
        self.trajectory.update(self.global_step, 1.0, False, False)
        self.log("rate", self.rate, on_epoch=True)
        self.log("lost", self.lost, on_epoch=True)


def test_metrics_are_logged_and_checkpointed_like_any_other(tmp_path):
    model = WithMetrics()
    run = trainer(max_epochs=1)
    run.fit(model, batches())
    assert run.callback_metrics["rate_epoch"] == pytest.approx(2 / 8)
    assert len(model.trajectory.records()) == 8
    assert not any("rows" in key for key in model.state_dict())


# --- Pictures --------------------------------------------------------------------------------------


def _metrics():
    rate, lost, histogram = OverflowRate(), UnderflowFraction(torch.float16), GradientExponentHistogram()
    rate.update(True)
    lost.update(torch.tensor([2.0**-30, 1.0]))
    histogram.update(torch.randn(100) * 1e-6)
    trajectory = LossScaleTrajectory(ScaleLimits(is_dynamic=True))
    trajectory.update_from(RECORDS)
    stats = FP8LayerStats(["a", "b"])
    for step in (0, 100):
        stats.update(step, "b", "grad", amax=1.0, scale=1.0, saturated=0.1, flushed=0.2, sqnr_db=30.0)
    return [rate, lost, histogram, trajectory, stats]


@pytest.mark.parametrize("metric", _metrics(), ids=lambda metric: type(metric).__name__)
def test_plot_draws_into_new_or_given_axes(metric):
    from matplotlib.figure import Figure

    figure, axes = metric.plot()
    figure.canvas.draw()
    assert axes.has_data()
    own = Figure()
    assert metric.plot(ax=own.add_subplot())[0] is own


def test_trajectory_picture_shows_scale_skips_and_health():
    trajectory = LossScaleTrajectory(ScaleLimits(is_dynamic=True))
    trajectory.update_from(RECORDS)
    _, axes = trajectory.plot()
    scale, skips = axes.get_lines()
    assert list(scale.get_ydata()) == [1024.0, 512.0, 256.0, 128.0, 128.0]
    assert list(skips.get_xdata()) == [0, 1, 2]
    assert axes.get_yscale() == "log"
    assert {"calibrating", "healthy", "skipped (3)"} <= {t.get_text() for t in axes.get_legend().get_texts()}


def test_histogram_picture_marks_what_each_format_loses():
    histogram = GradientExponentHistogram()
    histogram.update(torch.tensor([2.0**-30, 2.0**-30, 1.0, 1.0]))
    _, axes = histogram.plot()
    texts = [text.get_text() for text in axes.texts]
    assert [t for t in texts if t.startswith("FP16")] == ["FP16 (thin: subnormal), 50% below"]
    assert [t for t in texts if t.startswith("BF16")] == ["BF16 (thin: subnormal), 0% below"]
    bars = {round(bar.get_x() + bar.get_width() / 2 - 0.5): bar.get_height() for bar in axes.patches}
    assert (bars[-30], bars[0]) == (50.0, 50.0)
    assert min(bars) <= FP16.min_subnormal_exponent


@pytest.mark.parametrize("exponent", [-149, -148, -25, 15, 126, 127])
def test_histogram_picture_shows_the_extremes_of_fp32(exponent):
    histogram = GradientExponentHistogram()
    histogram.update(torch.tensor([2.0**exponent, 1.0]))
    _, axes = histogram.plot(loss_scale=2.0**16)
    bars = {round(bar.get_x() + bar.get_width() / 2 - 0.5): bar.get_height() for bar in axes.patches}
    assert bars[exponent] == 50.0
    assert sum(bars.values()) == 100.0


def test_heat_map_shows_the_worst_operand():
    stats = FP8LayerStats(["a"])
    stats.update(0, "a", "input", amax=1.0, scale=1.0, saturated=0.1, flushed=0.2, sqnr_db=30.0)
    stats.update(0, "a", "grad", amax=1.0, scale=1.0, saturated=0.3, flushed=0.0, sqnr_db=20.0)
    shown = {field: stats.plot(field=field)[1].get_images()[0].get_array().item() for field in ("saturated", "sqnr_db")}
    assert shown == pytest.approx({"saturated": 0.3, "sqnr_db": 20.0})
    assert stats.plot(field="sqnr_db", operand="input")[1].get_images()[0].get_array().item() == 30.0


def test_plot_without_matplotlib_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-mp\[plot\]'"):
        _metrics()[0].plot()


def test_metrics_load_without_matplotlib():
    code = "import sys; import torchmetrics; sys.modules['matplotlib'] = None; import lightning_mp.metrics"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_metrics_are_modules_that_follow_their_owner():
    model = WithMetrics()
    assert {name for name, child in model.named_children() if isinstance(child, nn.Module)} >= {"rate", "lost"}
