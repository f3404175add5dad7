"""A step that is skipped changes nothing; every count and learning rate is the truth."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_mp import DynamicLossScale, LossScaleError, MixedPrecision, OverflowFoundError, UnsupportedError
from lightning_mp.grad_scaler import Readback
from tests.models import INF, Regression, batches, batches_without, trainer, weights

BAD = {1: INF, 4: INF, 5: INF}
OPTIMIZERS = [
    pytest.param(torch.optim.AdamW, {"fused": False}, id="adamw-loop"),
    pytest.param(torch.optim.AdamW, {"foreach": True}, id="adamw-foreach"),
    pytest.param(torch.optim.AdamW, {"fused": True}, id="adamw-fused"),
    pytest.param(torch.optim.Adam, {"fused": True}, id="adam-fused"),
    pytest.param(torch.optim.SGD, {"momentum": 0.9, "fused": True}, id="sgd-fused"),
    pytest.param(torch.optim.SGD, {"momentum": 0.9}, id="sgd-loop"),
    pytest.param(torch.optim.Adagrad, {"fused": True}, id="adagrad-fused"),
]


class OverflowsInBackward(Regression):
    """Has a finite loss with infinite gradients at the bad batches."""

    def __init__(self, bad, *, fused):
        super().__init__(fused=fused)
        self.bad = bad

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if batch_idx in self.bad:
            loss.register_hook(lambda grad: grad * INF)
        return loss


def plain_loop(model, data, *, clip=None, dtype=None, scheduler=None):
    """Train by hand in plain torch: the oracle of a run that never saw the bad batches."""
    optimizer = model.optimizer_class(model.parameters(), **model.settings)
    schedule = scheduler(optimizer) if scheduler else None
    rates = []
    for batch in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model.loss(batch)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule:
            schedule.step()
    return optimizer, rates


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("optimizer", "settings"), OPTIMIZERS)
def test_skipped_steps_leave_weights_state_and_schedule_as_if_never_seen(precision, optimizer, settings):
    plugin = MixedPrecision(precision, loss_scale=256.0 if precision == "fp16" else None)
    model = Regression(factors=BAD, optimizer=optimizer, scheduler=lambda o: lr_scheduler.StepLR(o, 1, 0.9), **settings)
    reference = Regression(optimizer=optimizer, **settings)
    run = trainer(plugin)
    run.fit(model, batches())
    assert (plugin.applied_steps, plugin.skipped_steps) == (5, 3)
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 5
    assert run.global_step == 8
    expected, _ = plain_loop(
        reference,
        batches_without(BAD),
        dtype={"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision],
        scheduler=lambda o: lr_scheduler.StepLR(o, 1, 0.9),
    )
    # 256 is a power of two and no gradient here leaves FP16's range, so scaling is exact but for
    # FP16 rounding of scaled against unscaled activations' gradients: subnormals only.
    tolerance = {"rtol": 0, "atol": 0} if precision != "fp16" else {"rtol": 1e-3, "atol": 1e-5}
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)
        state, wanted = run.optimizers[0].state[p], expected.state[q]
        assert set(state) == set(wanted)
        for name, value in wanted.items():
            if value is not None:
                torch.testing.assert_close(state[name], value, **tolerance)


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda e: 1 / (e + 1)),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
}


class RecordsRates(Regression):
    """Notes the learning rate that every applied update used, by a hook on the optimizer."""

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        self.rates = []
        configured[0][0].register_step_pre_hook(self.note)
        return configured

    def note(self, optimizer, args, kwargs):
        flag = getattr(optimizer, "found_inf", None)
        if flag is None or flag.item() == 0:
            self.rates.append(float(optimizer.param_groups[0]["lr"]))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_applied_step_uses_the_rate_of_a_run_without_the_bad_steps(kind, fused):
    bad = dict.fromkeys((0, 1, 5, 6, 11), INF)
    model = RecordsRates(factors=bad, scheduler=SCHEDULERS[kind], fused=fused)
    trainer(MixedPrecision("bf16")).fit(model, batches(16))
    _, expected = plain_loop(Regression(), batches_without(bad, 16), dtype=torch.bfloat16, scheduler=SCHEDULERS[kind])
    assert model.rates == expected


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("frequency", [2, 3])
def test_scheduler_with_a_frequency_advances_after_that_many_applied_steps(frequency, fused):
    bad = dict.fromkeys((1, 4, 5, 6), INF)
    model = RecordsRates(
        factors=bad, scheduler=lambda o: lr_scheduler.StepLR(o, 1, 0.5), frequency=frequency, fused=fused
    )
    trainer(MixedPrecision("bf16")).fit(model, batches(18))
    assert model.rates == [0.01 * 0.5 ** (n // frequency) for n in range(14)]


class Hand(RecordsRates):
    """Sets the learning rate, or a scheduler's field, in a hook; also records what every batch's start reads."""

    hook = "on_train_batch_start"

    def __init__(self, hook, **settings):
        super().__init__(**settings)
        self.hook, self.read = hook, []

    def turn(self, hook):
        if hook == self.hook and self.trainer.global_step in (2, 3, 5):
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = 1e-4 * self.trainer.global_step
            if self.trainer.global_step == 5:
                self.lr_schedulers().last_epoch = 0

    def on_train_batch_start(self, batch, batch_idx):
        # A ChainedScheduler has no epoch of its own.
        epoch = getattr(self.lr_schedulers(), "last_epoch", None)
        self.read.append((self.trainer.optimizers[0].param_groups[0]["lr"], epoch))
        self.turn("on_train_batch_start")

    def on_train_batch_end(self, *args):
        self.turn("on_train_batch_end")


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("frequency", [1, 2])
def test_learning_rate_set_by_hand_holds_as_in_lightning_whatever_is_still_on_its_way(kind, hook, frequency):
    settings = {"scheduler": SCHEDULERS[kind], "fused": True, "frequency": frequency}
    model, reference = Hand(hook, **settings), Hand(hook, **settings)
    trainer(MixedPrecision("fp32"), log_every_n_steps=1000).fit(model, batches(12))
    trainer(log_every_n_steps=1000).fit(reference, batches(12))
    assert model.rates == reference.rates
    assert model.read == reference.read


def test_learning_rate_set_by_hand_survives_a_skip_that_is_known_later():
    class SetsOnce(RecordsRates):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 4:  # batch 3 was skipped on the device, and the host does not know yet
                self.trainer.optimizers[0].param_groups[0]["lr"] = 1e-4

    model = SetsOnce(factors={3: INF}, scheduler=lambda o: lr_scheduler.LambdaLR(o, lambda e: 1 / (e + 1)), fused=True)
    trainer(MixedPrecision("bf16"), log_every_n_steps=1000).fit(model, batches(6))
    expected = [1e-2, 1e-2 / 2, 1e-2 / 3, 1e-4, 1e-2 / 5]
    torch.testing.assert_close(model.rates, expected, rtol=1e-12, atol=0)


class Stateful(lr_scheduler.LRScheduler):
    """Draws from an iterator at each step: nobody can take that back."""

    def __init__(self, optimizer):
        self.rates = iter([1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5])
        super().__init__(optimizer)

    def get_lr(self):
        return [next(self.rates) for _ in self.optimizer.param_groups]


class Tracing(lr_scheduler.LRScheduler):
    """Keeps lists, dicts and tensors that it changes in place, and a tensor for a learning rate."""

    def __init__(self, optimizer):
        self.trace, self.seen, self.total = [], {}, torch.zeros(())
        super().__init__(optimizer)

    def get_lr(self):
        self.trace.append(self.last_epoch)
        self.seen[self.last_epoch] = len(self.trace)
        self.total.add_(1)
        return [base / (1 + len(self.trace) + float(self.total)) for base in self.base_lrs]


class Nested(lr_scheduler.LRScheduler):
    """Counts in a list inside a dict, and in a set."""

    def __init__(self, optimizer):
        self.seen, self.epochs = {"epochs": []}, set()
        super().__init__(optimizer)

    def get_lr(self):
        self.seen["epochs"].append(self.last_epoch)
        self.epochs.add(len(self.epochs))
        return [base * 0.8 ** (len(self.seen["epochs"]) + len(self.epochs)) for base in self.base_lrs]


class Plan:
    """A method of it is a function with a memory."""

    calls = 0

    def factor(self, epoch):
        self.calls += 1
        return 0.8**self.calls


def by_iterator(optimizer):
    factors = iter([0.8**k for k in range(20)])
    return lr_scheduler.LambdaLR(optimizer, lambda epoch: next(factors))


def by_partial(optimizer):
    factors = iter([0.8**k for k in range(20)])
    return lr_scheduler.LambdaLR(optimizer, functools.partial(lambda factors, epoch: next(factors), factors))


def by_method(optimizer):
    return lr_scheduler.LambdaLR(optimizer, Plan().factor)


@pytest.mark.parametrize("kind", [Nested, by_iterator, by_partial, by_method])
def test_scheduler_with_a_memory_is_as_if_it_never_saw_a_skipped_step(kind):
    bad = {0: INF, 3: INF, 4: INF}
    model = RecordsRates(factors=bad, scheduler=kind, fused=True)
    trainer(MixedPrecision("bf16"), log_every_n_steps=1000).fit(model, batches(8))
    _, expected = plain_loop(Regression(), batches_without(bad), dtype=torch.bfloat16, scheduler=kind)
    assert model.rates == expected


class Several(RecordsRates):
    """Two schedulers of one optimizer, the second after steps or after epochs."""

    def __init__(self, second, interval, **settings):
        super().__init__(scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.8), **settings)
        self.second = {"interval": interval}
        self.make_second = second

    def configure_optimizers(self):
        (optimizer,), configs = super().configure_optimizers()
        return [optimizer], [*configs, {"scheduler": self.make_second(optimizer), **self.second}]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("second", "interval"),
    [
        (lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 8), "step"),
        (lambda o: lr_scheduler.StepLR(o, 1, 0.1), "epoch"),
    ],
)
def test_schedulers_that_share_an_optimizer_are_as_if_they_never_saw_a_skipped_step(second, interval, fused):
    bad = {3: INF, 7: INF}
    model, clean = Several(second, interval, factors=bad, fused=fused), Several(second, interval, fused=fused)
    run, expected = (trainer(p, max_epochs=1, log_every_n_steps=1000) for p in (MixedPrecision("fp32"), None))
    run.fit(model, batches(8))
    expected.fit(clean, batches_without(bad))
    assert model.rates == clean.rates
    rates = [r.optimizers[0].param_groups[0]["lr"] for r in (run, expected)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("frequency", [1, 2, 3, 4])
def test_frequency_counts_batches_under_accumulation(frequency, fused):
    settings = {"scheduler": lambda o: lr_scheduler.ExponentialLR(o, 0.8), "fused": fused, "frequency": frequency}
    bad = dict.fromkeys((2, 3), INF)  # one whole step
    model, clean = RecordsRates(factors=bad, **settings), RecordsRates(**settings)
    trainer(MixedPrecision("fp32"), accumulate_grad_batches=2, log_every_n_steps=1000).fit(model, batches(14))
    trainer(accumulate_grad_batches=2).fit(clean, batches_without(bad, 14))
    assert model.rates == clean.rates


@pytest.mark.parametrize("kind", [Stateful, Tracing])
def test_scheduler_of_the_users_own_is_as_if_it_never_saw_a_skipped_step(kind):
    bad = {0: INF, 3: INF, 4: INF}
    model = RecordsRates(factors=bad, scheduler=kind, fused=True)
    run = trainer(MixedPrecision("bf16"), log_every_n_steps=1000)
    run.fit(model, batches(8))
    _, expected = plain_loop(Regression(), batches_without(bad), dtype=torch.bfloat16, scheduler=kind)
    assert model.rates == expected
    if kind is Tracing:
        found = run.lr_scheduler_configs[0].scheduler
        assert (found.trace, list(found.seen), float(found.total)) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], 6.0)


def test_learning_rate_that_is_a_tensor_goes_back_in_place():
    model = RecordsRates(
        factors={1: INF}, lr=torch.tensor(1e-2), fused=True, scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.5)
    )
    trainer(MixedPrecision("bf16"), log_every_n_steps=1000).fit(model, batches(4))
    torch.testing.assert_close(model.rates, [1e-2, 5e-3, 2.5e-3], rtol=1e-6, atol=0)


def test_run_that_a_skipped_step_ends_leaves_the_schedule_of_the_applied_ones():
    model = Regression(factors={3: INF}, fused=True, scheduler=lambda o: lr_scheduler.StepLR(o, 1, 0.5))
    run = trainer(MixedPrecision("bf16", on_nonfinite="raise"), log_every_n_steps=1000)
    with pytest.raises(OverflowFoundError, match="step 3"):
        run.fit(model, batches(8))
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 3
    assert run.optimizers[0].param_groups[0]["lr"] == 1e-2 / 8


def test_schedulers_advance_on_skipped_steps_where_asked():
    model = Regression(factors={3: INF}, scheduler=lambda o: lr_scheduler.StepLR(o, 1, 0.5))
    run = trainer(MixedPrecision("bf16", hold_schedulers=False))
    run.fit(model, batches())
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 8


def test_scheduler_is_its_own_class_after_fit_and_after_an_exception():
    class Fails(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.fails:
                raise KeyError("stop")

    for fails in (False, True):
        model = Fails(scheduler=lambda o: lr_scheduler.StepLR(o, 1))
        model.fails = fails
        run = trainer(MixedPrecision("bf16"))
        if fails:
            with pytest.raises(KeyError, match="stop"):
                run.fit(model, batches())
        else:
            run.fit(model, batches())
        assert type(run.lr_scheduler_configs[0].scheduler) is lr_scheduler.StepLR


class CountsReads(Regression):
    """Notes at each batch how often a result of the device was read before it."""

    def on_train_batch_start(self, batch, batch_idx):
        self.reads = [*getattr(self, "reads", []), Readback.count]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fused_optimizer_is_settled_once_per_step_and_one_step_late(precision):
    outcomes = []
    plugin = MixedPrecision(precision, loss_scale=256.0 if precision == "fp16" else None)
    model = CountsReads(factors={2: INF}, fused=True, scheduler=lambda o: lr_scheduler.StepLR(o, 1, 0.9))
    plugin.add_step_listener(lambda report: outcomes.append((report.step, plugin._ledger.attempts)))
    before = Readback.count
    trainer(plugin, gradient_clip_val=0.5, log_every_n_steps=1000).fit(model, batches(10))
    # Attempt n is read when attempt n + 1 is about to open (n + 1 are open by then): never in its own step.
    assert outcomes == [(n, n + 1) for n in range(10)]
    assert Readback.count - before == 10
    assert [r - before for r in model.reads] == [0, 0, *range(1, 9)]


def test_fused_optimizer_is_settled_within_a_log_step():
    plugin = MixedPrecision("bf16")
    model = CountsReads(fused=True)
    before = Readback.count
    trainer(plugin, log_every_n_steps=1).fit(model, batches(4))
    assert [r - before for r in model.reads] == [0, 1, 2, 3]


def test_reading_a_count_settles_what_is_pending():
    class Reads(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            plugin = self.trainer.precision_plugin
            assert plugin.applied_steps + plugin.skipped_steps == batch_idx + 1
            assert plugin.last_step.step == batch_idx
            assert plugin.last_step.skipped == (batch_idx in self.factors)

    trainer(MixedPrecision("bf16")).fit(Reads(factors={0: INF, 3: INF}, fused=True), batches())


def test_last_step_reports_the_scale_that_the_backward_used():
    reports = []
    plugin = MixedPrecision("fp16", loss_scale=DynamicLossScale(init_scale=1024.0))
    plugin.add_step_listener(reports.append)
    trainer(plugin, gradient_clip_val=1.0).fit(Regression(factors={1: INF}), batches(3))
    assert [r.loss_scale for r in reports] == [1024.0, 1024.0, 512.0]
    assert [r.skipped for r in reports] == [False, True, False]
    assert [r.loss_nonfinite for r in reports] == [False, True, False]
    assert reports[0].grad_norm > 0
    assert plugin.consecutive_skips == 0


def test_grad_norm_is_the_unscaled_norm_before_clipping():
    plugin = MixedPrecision("fp16", loss_scale=1024.0)
    model, reference = Regression(), Regression()
    trainer(plugin, gradient_clip_val=0.01, max_steps=1).fit(model, batches())
    with torch.autocast("cpu", dtype=torch.float16):
        loss = reference.loss(next(iter(batches())))
    loss.backward()
    expected = torch.stack([p.grad.norm() for p in reference.parameters()]).norm().item()
    assert math.isclose(plugin.last_step.grad_norm, expected, rel_tol=2**-9)  # FP16 activations' ulp


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fused", [False, True])
def test_nonfinite_step_raises_before_the_next_update_and_names_the_parameter(precision, fused):
    plugin = MixedPrecision(precision, on_nonfinite="raise")
    model = Regression(factors={3: INF}, fused=fused)
    reference = Regression(fused=fused)
    trainer(plugin).fit(reference, batches_without({3, 4, 5, 6, 7}))
    with pytest.raises(OverflowFoundError, match=r"step 3 .*first in layer\.bias.*unscaled loss was non-finite"):
        trainer(MixedPrecision(precision, on_nonfinite="raise")).fit(model, batches())
    for p, q in zip(weights(model), weights(reference), strict=True):
        assert torch.equal(p, q)


class InfiniteDerivative(Regression):
    """A finite loss whose gradient is NaN: zero times the infinite derivative of a square root at zero."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (0 * self.layer.weight).sum().sqrt()


@pytest.mark.parametrize(
    ("precision", "loss_scale", "advice", "absent"),
    [
        ("fp32", None, "a derivative that is infinite", ("scale", "BF16")),
        ("bf16", None, "a derivative that is infinite", ("scale", "Use BF16")),
        ("fp16", 8.0, "Use a smaller loss_scale, loss_scale='dynamic', or BF16", ("min_scale",)),
    ],
)
def test_advice_names_only_settings_that_the_run_has(precision, loss_scale, advice, absent):
    plugin = MixedPrecision(precision, loss_scale=loss_scale, on_nonfinite="raise")
    with pytest.raises(OverflowFoundError, match="unscaled loss was finite") as caught:
        trainer(plugin).fit(InfiniteDerivative(), batches())
    assert advice in str(caught.value)
    assert not any(word in str(caught.value).replace("unscaled", "") for word in absent)


def test_nonfinite_last_step_raises_at_the_end_of_fit():
    plugin = MixedPrecision("bf16", on_nonfinite="raise")
    with pytest.raises(OverflowFoundError, match="step 7"):
        trainer(plugin).fit(Regression(factors={7: INF}, fused=True), batches())


def test_nonfinite_step_is_applied_where_ignored_but_still_reported():
    plugin = MixedPrecision("bf16", on_nonfinite="ignore")
    model = Regression(factors={7: INF})
    trainer(plugin).fit(model, batches())
    assert not all(torch.isfinite(p).all() for p in model.parameters())
    assert plugin.last_step.found_inf
    assert not plugin.last_step.skipped
    assert (plugin.applied_steps, plugin.skipped_steps) == (8, 0)


@pytest.mark.parametrize("fused", [False, True])
def test_overflow_of_scaled_gradients_is_skipped_under_a_dynamic_scale_whatever_is_asked(fused):
    # The loss is finite, the scaled one is Inf: only the scale is to blame.
    for on_nonfinite in ("skip", "raise", "ignore"):
        scale = DynamicLossScale(init_scale=2.0**100, max_scale=2.0**120, backoff_factor=2.0**-92)
        plugin = MixedPrecision("fp16", loss_scale=scale, on_nonfinite=on_nonfinite)
        model = Regression(factors={0: 2.0**30}, fused=fused, lr=1e-3)
        trainer(plugin).fit(model, batches(3))
        assert (plugin.applied_steps, plugin.skipped_steps) == (2, 1)
        assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_scale_never_dies_and_says_why_it_cannot_go_on(fused):
    scale = {"init_scale": 4.0, "floor_patience": 3}
    model = Regression(factors=dict.fromkeys(range(300), float("nan")), fused=fused)
    plugin = MixedPrecision("fp16", loss_scale=scale)
    before = weights(model)
    with pytest.raises(LossScaleError) as caught:
        trainer(plugin).fit(model, batches(20))
    text = str(caught.value)
    assert "min_scale=1.0" in text
    assert "floor_patience=3" in text
    assert "layer.bias" in text
    assert "unscaled loss was non-finite already" in text
    # 4 and 2 overflow above the floor; the third overflow at 1 is step 4.
    assert "step 4" in text
    assert plugin.scaler.get_scale() == 1.0
    assert all(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))


def test_three_hundred_nan_steps_leave_the_scale_at_its_floor():
    plugin = MixedPrecision("fp16", loss_scale={"floor_patience": 1000})
    model = Regression(factors=dict.fromkeys(range(300), float("nan")))
    trainer(plugin).fit(model, batches(300))
    assert plugin.scaler.get_scale() == 1.0
    assert (plugin.skipped_steps, plugin.consecutive_skips) == (300, 300)


# Lightning 2.6 asks once whether the None was on purpose.
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_training_step_that_returns_none_has_the_effect_of_fp32(precision, accumulate):
    settings = {"none_at": (0, 3, 6, 7), "scheduler": lambda o: lr_scheduler.StepLR(o, 1, 0.9)}
    plugin = MixedPrecision(precision, loss_scale=64.0 if precision == "fp16" else None)
    model, reference = Regression(**settings), Regression(**settings)
    run, expected = trainer(plugin, accumulate_grad_batches=accumulate), trainer(accumulate_grad_batches=accumulate)
    run.fit(model, batches())
    expected.fit(reference, batches())
    for p, q in zip(weights(model), weights(reference), strict=True):
        torch.testing.assert_close(p, q, rtol=2**-9, atol=1e-4 if precision == "fp16" else 0)
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == expected.lr_scheduler_configs[0].scheduler.last_epoch
    assert run.global_step == expected.global_step
    steps = {int(s["step"]) for s in expected.optimizers[0].state.values()}
    assert plugin.applied_steps == steps.pop()
    assert plugin.skipped_steps == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lbfgs_trains_as_without_the_plugin_and_a_bad_batch_changes_nothing(precision):
    settings = {"optimizer": torch.optim.LBFGS, "lr": 0.1, "max_iter": 4}
    model, reference = Regression(**settings), Regression(**settings)
    plugin = MixedPrecision(precision)
    trainer(plugin).fit(model, batches())
    trainer(precision="32-true" if precision == "fp32" else "bf16-mixed").fit(reference, batches())
    assert all(torch.equal(p, q) for p, q in zip(weights(model), weights(reference), strict=True))

    bad = BadBatch(**settings)
    trainer(plugin).fit(bad, batches())
    good = BadBatch(**settings)
    trainer(MixedPrecision(precision)).fit(good, batches_without({2}))
    assert all(torch.equal(p, q) for p, q in zip(weights(bad), weights(good), strict=True))
    assert plugin.skipped_steps == 1


class BadBatch(Regression):
    def training_step(self, batch, batch_idx):
        bad = torch.equal(batch[0], list(batches())[2][0])
        return self.loss(batch) * (INF if bad else 1.0)


def test_lbfgs_is_refused_in_fp16_at_setup():
    with pytest.raises(UnsupportedError, match=r"precision='fp16' cannot train with LBFGS.*bf16"):
        trainer(MixedPrecision("fp16")).fit(Regression(optimizer=torch.optim.LBFGS), batches())


class TwiceSGD(torch.optim.SGD):
    """Evaluates its closure twice, like sharpness-aware minimization, and says that it needs none."""

    def step(self, closure=None):
        for weight in (-0.5, 1.0):
            with torch.enable_grad():
                closure()
            with torch.no_grad():
                for param in self.param_groups[0]["params"]:
                    param.sub_(param.grad, alpha=weight * self.param_groups[0]["lr"])


class DeclaredTwiceSGD(TwiceSGD):
    def step(self, closure):
        return super().step(closure)


class TiltedSGD(torch.optim.SGD):
    """Takes its gradient elsewhere, as extragradient and smoothing do."""

    def step(self, closure=None):
        params = self.param_groups[0]["params"]
        with torch.no_grad():
            for param in params:
                self.move(param, 1.0)
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for param in params:
                self.move(param, -1.0)
        super().step()
        return loss

    def move(self, param, by):
        param.add_(by)


class TiltedDataSGD(TiltedSGD):
    """The same in the way of old code, which leaves no trace in the version of the parameter."""

    def move(self, param, by):
        param.data.add_(by)


class ClearingSGD(TiltedSGD):
    """Clears the gradients first."""

    def move(self, param, by):
        if by > 0:
            param.grad = None


class FirstSGD(TiltedSGD):
    """Evaluates its closure once, before anything else."""

    def move(self, param, by):
        """Leave it where it is."""


class SeldomSGD(TiltedDataSGD):
    """Does so in every third step."""

    steps = 0

    def move(self, param, by):
        self.steps += param is self.param_groups[0]["params"][0]
        if self.steps // 2 % 3 == 2:
            super().move(param, by)


class BalancedSGD(TiltedSGD):
    """Moves weights so that their sum stays."""

    def move(self, param, by):
        param.data.view(-1)[:2].add_(by * torch.tensor([1.0, -1.0])[: param.numel()])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", [TiltedSGD, TiltedDataSGD, ClearingSGD, SeldomSGD, BalancedSGD])
def test_optimizer_that_evaluates_an_optional_closure_elsewhere_is_refused(precision, optimizer):
    name = optimizer.__name__
    text = rf"{name}\.step changes weights or gradients before .* class Repeating\({name}\): def step\(self, closure\)"
    with pytest.raises(UnsupportedError, match=text):
        trainer(MixedPrecision(precision)).fit(Regression(optimizer=optimizer), batches())


@pytest.mark.parametrize("optimizer", [TiltedSGD, TiltedDataSGD, ClearingSGD, FirstSGD])
def test_optimizer_that_declares_its_closure_trains_as_without_the_plugin(optimizer):
    class Declared(optimizer):
        def step(self, closure):
            return super().step(closure)

    ours, lightnings = Regression(optimizer=Declared), Regression(optimizer=optimizer)
    trainer(MixedPrecision("fp32")).fit(ours, batches())
    trainer(None).fit(lightnings, batches())
    for mine, theirs in zip(weights(ours), weights(lightnings), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_optimizer_that_evaluates_an_optional_closure_first_trains_as_torchs(precision):
    plugin = MixedPrecision(precision, loss_scale=64.0 if precision == "fp16" else None)
    ours, torchs = Regression(optimizer=FirstSGD), Regression(optimizer=torch.optim.SGD)
    trainer(plugin).fit(ours, batches())
    trainer(MixedPrecision(precision, loss_scale=plugin.policy.loss_scale)).fit(torchs, batches())
    assert plugin.applied_steps == 8
    for mine, theirs in zip(weights(ours), weights(torchs), strict=True):
        assert torch.equal(mine, theirs)


class OwnSGD(torch.optim.Optimizer):
    """Evaluates an optional closure first, and calls no step of torch's, whose own hooks would run too."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.sub_(param.grad, alpha=self.param_groups[0]["lr"])
        return loss


class Hooked(Regression):
    """A step hook halves the gradients."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_pre_hook(self.halve)
        return optimizer

    @staticmethod
    def halve(optimizer, args, kwargs):
        for param in optimizer.param_groups[0]["params"]:
            param.grad.mul_(0.5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_that_a_step_hook_changed_are_no_fault_of_the_optimizer(precision):
    scale = 64.0 if precision == "fp16" else None
    ours, torchs = Hooked(optimizer=OwnSGD), Regression(optimizer=torch.optim.SGD, lr=1e-2 / 2)
    for model in (ours, torchs):
        trainer(MixedPrecision(precision, loss_scale=scale)).fit(model, batches())
    for mine, theirs in zip(weights(ours), weights(torchs), strict=True):
        assert torch.equal(mine, theirs)


class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer, as old code does, without calling the constructor of its base."""

    def __init__(self, params, lr):
        self.inner = torch.optim.Adam(params, lr=lr)
        self.param_groups, self.state, self.defaults = self.inner.param_groups, self.inner.state, self.inner.defaults

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("hooked", [False, True])
def test_optimizer_that_wraps_another_trains_as_the_other(precision, hooked, request):
    if hooked:
        request.addfinalizer(register_optimizer_step_pre_hook(lambda *_: None).remove)
    scale = 64.0 if precision == "fp16" else None
    ours, torchs = Regression(optimizer=Lookahead, factors=BAD), Regression(optimizer=torch.optim.Adam, factors=BAD)
    run = trainer(MixedPrecision(precision, loss_scale=scale))
    run.fit(ours, batches())
    trainer(MixedPrecision(precision, loss_scale=scale)).fit(torchs, batches())
    assert run.precision_plugin.skipped_steps == len(BAD)
    for mine, theirs in zip(weights(ours), weights(torchs), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_optimizer_that_repeats_an_optional_closure_is_refused_rather_than_fed_old_gradients(precision):
    run = trainer(MixedPrecision(precision))
    with pytest.raises(UnsupportedError, match=r"class Repeating\(TwiceSGD\): def step\(self, closure\)"):
        run.fit(Regression(optimizer=TwiceSGD), batches())


def test_optimizer_that_declares_its_repeated_closure_trains_as_without_the_plugin():
    ours, lightnings = Regression(optimizer=DeclaredTwiceSGD), Regression(optimizer=TwiceSGD)
    trainer(MixedPrecision("fp32")).fit(ours, batches())
    trainer(None).fit(lightnings, batches())
    for mine, theirs in zip(weights(ours), weights(lightnings), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("plugin", "is_said"),
    [
        (MixedPrecision("fp32"), True),
        (MixedPrecision("bf16"), True),
        (MixedPrecision("fp16", loss_scale=8.0), True),
        (MixedPrecision("fp16", loss_scale={"floor_patience": 50}), False),
        (MixedPrecision("bf16", on_nonfinite="ignore"), False),
    ],
)
def test_first_skip_and_first_streak_of_skips_are_said_where_no_scale_explains_them(plugin, is_said, fused, caplog):
    caplog.set_level("INFO")
    bad = dict.fromkeys([2, *range(4, 40)], INF)
    # A scale explains an infinite gradient of a finite loss, which a factor on the loss does not give.
    run = trainer(plugin, limit_train_batches=40)
    run.fit(OverflowsInBackward(bad, fused=fused), batches(40))
    single = caplog.text.count("step 2 has Inf or NaN gradients, first in")
    streak = caplog.text.count("20 steps in a row had Inf or NaN gradients and were left out")
    assert (single, streak) == (int(is_said), int(is_said))
    assert caplog.text.count("has Inf or NaN gradients") == single


def test_skip_is_said_again_in_another_run(caplog):
    caplog.set_level("INFO")
    plugin = MixedPrecision("bf16")
    for _ in range(2):
        trainer(plugin).fit(Regression(factors={1: INF}), batches())
    assert caplog.text.count("step 1 has Inf or NaN gradients, first in layer.") == 2


def test_listeners_see_every_settled_step_in_order_and_can_leave():
    seen = []
    plugin = MixedPrecision("bf16")
    plugin.add_step_listener(seen.append)
    trainer(plugin).fit(Regression(factors={2: INF}), batches(4))
    assert [(r.step, r.skipped) for r in seen] == [(0, False), (1, False), (2, True), (3, False)]
    plugin.remove_step_listener(seen.append)
    plugin.remove_step_listener(print)


def test_culprit_named_by_a_listener_stands_in_the_error():
    plugin = MixedPrecision("bf16", on_nonfinite="raise")
    plugin.add_step_listener(lambda report: "encoder.7 (forward)" if report.found_inf else None)
    with pytest.raises(OverflowFoundError, match=r"first in encoder\.7 \(forward\)"):
        trainer(plugin).fit(Regression(factors={1: INF}), batches())


def test_sparse_gradients_are_checked_and_unscaled():
    class Sparse(Regression):
        def __init__(self, **settings):
            super().__init__(optimizer=torch.optim.SparseAdam, **settings)
            self.layer = nn.Embedding(8, 1, sparse=True)

        def loss(self, batch):
            rows = (batch[0][:, 0].abs() * 7).long() % 8
            return nn.functional.mse_loss(self.layer(rows), batch[1])

    torch.manual_seed(3)
    plugin = MixedPrecision("fp16", loss_scale=1024.0)
    model, reference = Sparse(factors={1: INF}), Sparse()
    reference.load_state_dict(model.state_dict())
    trainer(plugin).fit(model, batches())
    plain_loop(reference, batches_without({1}))
    assert plugin.skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(weights(model), weights(reference), strict=True))


class OnDevice:
    """Batches that lie on the device: a DataLoader would index there with indices of the host, which synchronizes."""

    def __init__(self, data):
        self.data = [[part.cuda() for part in batch] for batch in data]

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        return iter(self.data)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "scale", "masters"),
    [
        ("bf16", None, "params"),
        ("bf16", None, "split"),
        ("fp16", 256.0, "params"),
        ("fp16", "dynamic", "params"),
        ("fp16", "dynamic", "copy"),
    ],
)
def test_no_host_sync_between_log_steps_on_cuda(precision, scale, masters):
    """Fused AdamW, clipping and a held scheduler; the data lies on the device, as copies would synchronize."""

    class Watched(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            # The first batches allocate pinned memory and optimizer state, which synchronizes.
            torch.cuda.set_sync_debug_mode("error" if 5 <= batch_idx < 45 else "default")

    plugin = MixedPrecision(precision, loss_scale=scale, master_weights=masters)
    model = Watched(factors={7: INF, 20: INF}, fused=True, scheduler=lambda o: lr_scheduler.StepLR(o, 1, 0.99))
    try:
        trainer(plugin, accelerator="cuda", gradient_clip_val=0.5, log_every_n_steps=50).fit(
            model, OnDevice(batches(60))
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert plugin.skipped_steps >= 2
    assert plugin.applied_steps + plugin.skipped_steps == 60


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("optimizer", "settings"), OPTIMIZERS)
def test_skipped_steps_leave_weights_as_if_never_seen_on_cuda(precision, optimizer, settings):
    run = {"accelerator": "cuda", "gradient_clip_val": 0.5}
    scale = 256.0 if precision == "fp16" else None
    model, reference = (
        Regression(factors=factors, optimizer=optimizer, **settings) for factors in (dict.fromkeys(BAD, INF), {})
    )
    plugin = MixedPrecision(precision, loss_scale=scale)
    trainer(plugin, **run).fit(model, batches())
    trainer(MixedPrecision(precision, loss_scale=scale), **run).fit(reference, batches_without(BAD))
    assert (plugin.applied_steps, plugin.skipped_steps) == (5, 3)
    assert all(torch.equal(p, q) for p, q in zip(weights(model), weights(reference), strict=True))
