"""GradientRangeMonitor counts exactly what FP16 would lose, at the steps asked for, in any precision."""

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision as LightningMixedPrecision
from torch import nn

from lightning_mp import GradientRangeMonitor, MixedPrecision
from lightning_mp.callbacks.gradient_range_monitor import GradientRange
from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.metrics.gradient_tally import read_tallies, suggest_scale, tally_gradients
from lightning_mp.report.events import read_events
from tests.metrics.ranks import on_two_ranks
from tests.models import INF, Fetching, Regression, batches, trainer

CPU = torch.device("cpu")


class GivenGradients(LightningModule):
    """Two parameters whose gradients are the given vectors, times a factor per step."""

    def __init__(self, first, second, *, factors=(1.0,), fused=False):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(len(first)))
        self.second = nn.Parameter(torch.zeros(len(second)))
        self.given = torch.tensor(first), torch.tensor(second)
        self.factors, self.fused = factors, fused

    def training_step(self, batch, batch_idx):
        # FP32 throughout: the gradient of the scalar product is the given vector itself.
        loss = (self.first * self.given[0]).sum() + (self.second * self.given[1]).sum()
        return loss * self.factors[min(batch_idx, len(self.factors) - 1)]

    def configure_optimizers(self):
        groups = [{"params": [self.first], "name": "first"}, {"params": [self.second]}]
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=self.fused)


# FP16 flushes the two smallest of four; at scale 1024 only 2**-36; 65536 is beyond its maximum.
FIRST = [2.0**-25, 2.0**-36, 1.0, 0.0]
SECOND = [2.0**-24, 128.0]


def measure(plugin, *, model=None, every_n_steps=100, **settings):
    monitor = GradientRangeMonitor(
        every_n_steps, dirpath=settings.pop("dirpath", None), plot=settings.pop("plot", True)
    )
    run = trainer(plugin, callbacks=[monitor], **settings)
    run.fit(model or GivenGradients(FIRST, SECOND), batches())
    return monitor, run


def scaled_plugin():
    return MixedPrecision("fp16", loss_scale=1024.0)


def lightning_plugin():
    return LightningMixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make_plugin", [scaled_plugin, lightning_plugin])
def test_shares_are_those_of_the_unscaled_gradients_whoever_unscales_them(make_plugin, fused):
    monitor, _ = measure(make_plugin(), model=GivenGradients(FIRST, SECOND, fused=fused))
    everything, first, second = monitor.history
    assert everything == GradientRange(
        step=0,
        group="all",
        histogram={-36: 1, -25: 1, -24: 1, 0: 1, 7: 1},
        flushed_unscaled=2 / 5,
        flushed=1 / 5,
        saturated=1 / 5,
        suggested_scale=2.0**7,
    )
    assert (first.group, second.group) == ("first", "group1")
    assert (first.flushed_unscaled, first.flushed, first.saturated) == (2 / 3, 1 / 3, 0.0)
    assert (second.flushed_unscaled, second.flushed, second.saturated) == (0.0, 0.0, 1 / 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_a_scale_both_shares_tell_what_fp16_would_lose(precision):
    monitor, _ = measure(MixedPrecision(precision))
    everything = monitor.history[0]
    assert everything.flushed == everything.flushed_unscaled == 2 / 5
    assert everything.saturated == 0.0


def test_suggested_scale_keeps_the_largest_gradient_and_loses_less():
    gradients = torch.randn(10_000) * 1e-6
    tally = read_tallies({"g": tally_gradients([gradients], CPU, loss_scale=1.0)}, is_sharded=False)["g"]
    scale = suggest_scale(tally.amax)
    # Oracle: the cast itself.
    scaled = (gradients * scale).half()
    assert scaled.isfinite().all()
    assert 65504 / 4 < scaled.abs().max() <= 65504 / 2
    assert tally.num_flushed_unscaled == (gradients.half() == 0).sum() > 100
    assert (scaled == 0).sum() == 0


def test_non_finite_gradients_saturate_and_do_not_spoil_the_rest():
    gradients = [torch.tensor([INF, float("nan"), 2.0, 0.0])]
    tally = read_tallies({"g": tally_gradients(gradients, CPU, loss_scale=1.0)}, is_sharded=False)["g"]
    assert (tally.num_nonfinite, tally.num_nonzero, tally.num_saturated, tally.amax) == (2, 3, 1, 2.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_every_dtype_of_gradients_is_counted(dtype):
    tally = tally_gradients([torch.ones(3, dtype=dtype)], CPU, loss_scale=1.0)
    # The imaginary parts are zeros, which no bin holds.
    assert tally.counts.sum() == 3


def test_fp64_gradients_outside_the_range_of_fp32_are_neither_zeros_nor_infinities():
    gradients = [torch.tensor([1e-60, 1e300, 1.0], dtype=torch.float64), torch.tensor([2.0])]
    tally = read_tallies({"g": tally_gradients(gradients, CPU, loss_scale=1.0)}, is_sharded=False)["g"]
    assert (tally.histogram[0], tally.histogram[-1], sum(tally.histogram)) == (1, 1, 4)
    assert (tally.num_nonfinite, tally.num_flushed, tally.num_saturated, tally.amax) == (0, 1, 1, 1e300)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_and_many_small_gradients_count_like_one_large_one():
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.tensor([1.0, 1.0]), (4,))
    small = [torch.full((7,), 2.0) for _ in range(5)]
    tally = read_tallies({"g": tally_gradients([sparse, *small], CPU, loss_scale=1.0)}, is_sharded=False)["g"]
    assert sum(tally.histogram) == 36  # 1 + 1 of the same place is one 2.0


def test_all_zero_gradients_suggest_nothing():
    monitor, run = measure(MixedPrecision("fp32"), model=GivenGradients([0.0], [0.0]))
    assert monitor.history[0].suggested_scale is None
    assert monitor.history[0].flushed == 0.0
    assert "gradient_range/suggested_scale" not in run.callback_metrics


class CastGradients(GivenGradients):
    """The gradients of 16-bit parameters pass through 16 bits, as those of matrix products do."""

    def training_step(self, batch, batch_idx):
        return sum((p.float() * g).sum() for p, g in zip((self.first, self.second), self.given, strict=True))


def test_step_that_overflowed_suggests_no_scale_until_one_fits():
    # Gradients of an FP16 copy: 10 fits FP16 at a scale of 4096 and not at 8192 (81920 > 65504), where the
    # finite rest, 2**-10, would suggest 2**24. By hand: 65504 / 10 is in [2**12, 2**13), half of it is 2**11.
    plugin = MixedPrecision("fp16", master_weights="copy", loss_scale={"init_scale": 2.0**16})
    monitor, _ = measure(plugin, model=CastGradients([10.0], [2.0**-10]), every_n_steps=1)
    suggested = {(r.step, r.group): r.suggested_scale for r in monitor.history}
    assert [suggested[step, "all"] for step in range(8)] == [None] * 4 + [2.0**11] * 4
    assert [suggested[step, "first"] for step in range(8)] == [None] * 4 + [2.0**11] * 4
    assert {suggested[step, "group1"] for step in range(8)} == {2.0**24}


@pytest.mark.filterwarnings("ignore:.*non-finite")
@pytest.mark.parametrize("bad", [INF, float("nan")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_non_finite_gradient_leaves_nothing_to_suggest_in_any_precision(precision, bad):
    monitor, run = measure(MixedPrecision(precision), model=GivenGradients([bad, 1.0], [1.0]))
    assert {r.group: r.suggested_scale for r in monitor.history} == {"all": None, "first": None, "group1": 2.0**14}
    assert "gradient_range/suggested_scale" not in run.callback_metrics
    assert run.callback_metrics["gradient_range/group1/suggested_scale"] == 2.0**14


def test_only_every_nth_step_is_measured():
    monitor, _ = measure(MixedPrecision("bf16"), every_n_steps=3)
    assert [found.step for found in monitor.history if found.group == "all"] == [0, 3, 6]


def test_accumulated_batches_are_one_step():
    monitor, _ = measure(MixedPrecision("bf16"), every_n_steps=1, accumulate_grad_batches=4)
    assert [found.step for found in monitor.history if found.group == "all"] == [0, 1]


class TwoOptimizers(GivenGradients):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD([p], lr=0.0) for p in (self.first, self.second)]


def test_each_of_two_optimizers_is_measured():
    model = TwoOptimizers(FIRST, SECOND)
    model.automatic_optimization = False
    monitor, _ = measure(scaled_plugin(), model=model, every_n_steps=10)
    names = [(found.step, found.group) for found in monitor.history]
    expected = [(0, "optimizer0/all"), (0, "optimizer0/group0"), (1, "optimizer1/all"), (1, "optimizer1/group0")]
    assert names[:4] == expected
    assert [step for step, _ in names[4:]] == [10, 10, 11, 11]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["decay", "decay"], ["decay.0", "decay.1"]),
        (["all", "rest"], ["all.0", "rest"]),
        (["head/all", None], ["head/all.0", "group1"]),
        (["group1", None], ["group1.0", "group1.1"]),
        (["a", "a", "a.0", "a.1"], ["a.0.0", "a.1.1", "a.0", "a.1"]),
    ],
)
def test_groups_of_one_name_or_named_all_count_each_and_in_the_total(tmp_path, given, expected):
    class Groups(LightningModule):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.zeros(1 + i)) for i in range(len(given))])

        def training_step(self, batch, batch_idx):
            return sum(weight.sum() for weight in self.weights)

        def configure_optimizers(self):
            named = zip(self.weights, given, strict=True)
            return torch.optim.SGD([{"params": [p]} | ({"name": n} if n else {}) for p, n in named], lr=0.0)

    monitor, _ = measure(MixedPrecision("fp32"), model=Groups(), dirpath=tmp_path)
    counted = {found.group: found.histogram[0] for found in monitor.history}
    total = sum(range(1, len(given) + 1))
    assert counted == {"all": total, **{name: 1 + i for i, name in enumerate(expected)}}


def test_gradients_are_left_as_they_were():
    results = []
    for callbacks in ([], [GradientRangeMonitor(1)]):
        model = Regression()
        trainer(scaled_plugin(), callbacks=callbacks).fit(model, batches())
        results.append(model.layer.weight.detach())
    assert torch.equal(*results)


# --- Logging and files -----------------------------------------------------------------------------


def test_fields_are_logged_for_all_and_for_each_of_several_groups(tmp_path):
    logger = CSVLogger(tmp_path)
    _, run = measure(scaled_plugin(), logger=logger, every_n_steps=4, log_every_n_steps=2)
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    assert logged["gradient_range/flushed_unscaled"] == pytest.approx(2 / 5)
    assert logged["gradient_range/suggested_scale"] == 2.0**7
    assert logged["gradient_range/first/flushed"] == pytest.approx(1 / 3)
    assert logged["gradient_range/group1/saturated"] == pytest.approx(1 / 2)
    assert written(logger, "gradient_range/flushed") == [(0, pytest.approx(0.2)), (4, pytest.approx(0.2))]
    assert (Path(logger.log_dir) / "gradient_range.png").read_bytes().startswith(b"\x89PNG")


def written(logger, name):
    """Return the steps and values that a CSVLogger holds of one name, in its order."""
    rows = csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines())
    return [(int(row["step"]), float(row[name])) for row in rows if row[name]]


@pytest.mark.parametrize(("every_n_steps", "log_every_n_steps"), [(1, 50), (2, 3), (3, 2), (2, 2), (3, 1)])
def test_each_measured_value_is_in_every_logger_once_at_its_own_step(tmp_path, every_n_steps, log_every_n_steps):
    class LogsToo(GivenGradients):
        def training_step(self, batch, batch_idx):
            self.log("own", float(batch_idx))
            return super().training_step(batch, batch_idx)

    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    model = LogsToo([1.0], [2.0], factors=[2.0**-step for step in range(8)])
    settings = {"every_n_steps": every_n_steps, "log_every_n_steps": log_every_n_steps}
    _, run = measure(MixedPrecision("fp32"), model=model, logger=loggers, **settings)
    # By hand: the largest gradient of step s is 2**(1 - s), for which the scale is 2**(13 + s), as
    # 2**14 is for 1; the first group's is half of that, 2**-s.
    steps = range(0, 8, every_n_steps)
    for logger in loggers:
        assert written(logger, "gradient_range/suggested_scale") == [(s, 2.0 ** (13 + s)) for s in steps]
        assert written(logger, "gradient_range/first/suggested_scale") == [(s, 2.0 ** (14 + s)) for s in steps]
        own = range(log_every_n_steps - 1, 8, log_every_n_steps)
        assert log_every_n_steps > 8 or written(logger, "own") == [(s, s) for s in own]
    assert run.callback_metrics["gradient_range/suggested_scale"] == 2.0 ** (13 + steps[-1])


def test_accumulated_steps_are_written_at_the_steps_of_the_history(tmp_path):
    logger = CSVLogger(tmp_path)
    measure(MixedPrecision("fp32"), logger=logger, every_n_steps=1, accumulate_grad_batches=3, log_every_n_steps=1)
    assert [step for step, _ in written(logger, "gradient_range/suggested_scale")] == [0, 1, 2]


def test_each_of_two_optimizers_is_written_at_its_own_steps(tmp_path):
    logger = CSVLogger(tmp_path)
    model = TwoOptimizers(FIRST, SECOND)
    model.automatic_optimization = False
    _, run = measure(scaled_plugin(), model=model, logger=logger, every_n_steps=10)
    fields = ("flushed_unscaled", "flushed", "saturated", "suggested_scale")
    named = {f"gradient_range/optimizer{i}/all/{field}" for i in range(2) for field in fields}
    assert set(run.callback_metrics) == named
    assert [step for step, _ in written(logger, "gradient_range/optimizer0/all/flushed")] == [0, 10]
    assert [step for step, _ in written(logger, "gradient_range/optimizer1/all/flushed")] == [1, 11]


def test_single_group_is_not_logged_twice():
    _, run = measure(MixedPrecision("bf16"), model=Regression())
    assert "gradient_range/flushed" in run.callback_metrics
    assert not any("group0" in name for name in run.callback_metrics)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_step_that_fetches_its_batches_itself_is_logged_too():
    monitor, run = measure(MixedPrecision("bf16"), model=Fetching(), every_n_steps=4)
    assert [found.step for found in monitor.history if found.group == "all"] == [0, 4]
    assert "gradient_range/flushed" in run.callback_metrics


def test_event_log_holds_the_fields_of_the_contract(tmp_path):
    monitor, _ = measure(scaled_plugin(), dirpath=tmp_path, plot=False)
    events = read_events(tmp_path / "gradient_range.jsonl")
    fields = ["step", "group", "histogram", "flushed_unscaled", "flushed", "saturated", "suggested_scale"]
    assert [list(event) for event in events] == [fields] * 3
    assert events[0]["histogram"] == {str(e): count for e, count in monitor.history[0].histogram.items()}
    assert not (tmp_path / "gradient_range.png").exists()


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint", "ignore:.*not resumable")
def test_resumed_run_continues_without_duplicates(tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    first = GradientRangeMonitor(2, dirpath=tmp_path)
    trainer(scaled_plugin(), callbacks=[first, keep], enable_checkpointing=True).fit(Regression(), batches())
    second = GradientRangeMonitor(2, dirpath=tmp_path)
    run = trainer(scaled_plugin(), callbacks=[second])
    run.fit(Regression(), batches(), ckpt_path=tmp_path / "step=5.ckpt")
    steps = [found.step for found in second.history if found.group == "all"]
    assert steps == [0, 2, 4, 6]
    assert [e["step"] for e in read_events(tmp_path / "gradient_range.jsonl") if e["group"] == "all"] == steps


def test_no_file_in_fast_dev_run_or_without_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measure(scaled_plugin(), dirpath=tmp_path, fast_dev_run=True)
    monitor, _ = measure(scaled_plugin())
    assert len(monitor.history) == 3
    assert list(tmp_path.iterdir()) == []


def _tally_shard(rank):
    tally = tally_gradients([torch.full((1 + rank,), 2.0**rank)] if rank else [], CPU, loss_scale=1.0)
    found = read_tallies({"g": tally}, is_sharded=True)["g"]
    return sum(found.histogram), found.amax


def test_shards_of_two_ranks_add_up_though_one_has_no_gradients():
    assert on_two_ranks(_tally_shard) == [(2, 2.0)] * 2


@pytest.mark.parametrize(
    ("value", "error"), [(0, SettingValueError), (1.5, SettingTypeError), (True, SettingTypeError)]
)
def test_interval_must_be_a_positive_integer(value, error):
    with pytest.raises(error, match="every_n_steps"):
        GradientRangeMonitor(every_n_steps=value)
