"""A monitor's subclass may override any hook: what the monitor does there by itself runs beside it."""

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision as LightningMixedPrecision

from lightning_mp import LossScaleMonitor, MixedPrecision, OverflowMonitor
from lightning_mp.callbacks.added_hooks import add_to_hook, remove_added_hooks
from tests.models import INF, Regression, batches, trainer

pytestmark = pytest.mark.filterwarnings("ignore:OverflowMonitor. step")

HOOKS = ("on_before_backward", "on_before_optimizer_step")
NUM = 8
BAD = 3


class Counts(Callback):
    """Counts its calls; as the first base of a monitor's subclass it overrides what the monitor has."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.calls: Counter[str] = Counter()

    def on_before_backward(self, *args: Any) -> None:
        self.calls["on_before_backward"] += 1
        super().on_before_backward(*args)

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.calls["on_before_optimizer_step"] += 1
        super().on_before_optimizer_step(*args)


class CountingOverflow(Counts, OverflowMonitor): ...


class CountingScale(Counts, LossScaleMonitor): ...


class ManualRegression(Regression):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def foreign() -> LightningMixedPrecision:
    return LightningMixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


MODES = {
    "automatic": (Regression, lambda: MixedPrecision("bf16")),
    "manual": (ManualRegression, lambda: MixedPrecision("bf16")),
    "ignore": (Regression, lambda: MixedPrecision("bf16", on_nonfinite="ignore")),
    "foreign": (Regression, foreign),
    "foreign manual": (ManualRegression, foreign),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("probe", ["replay", "gradients", "always"])
@pytest.mark.parametrize("mode", MODES)
def test_overrides_of_a_subclass_run_once_per_hook_and_the_monitors_see_as_much(mode, probe, fused) -> None:
    make_model, make_plugin = MODES[mode]
    seen = []
    for overflow, scale in ((OverflowMonitor, LossScaleMonitor), (CountingOverflow, CountingScale)):
        monitors = [overflow(probe=probe), scale(plot=False)]
        model = make_model(factors={BAD: INF}, fused=fused)
        # Before a step that is ignored the weights are finite; after it none is.
        used = trainer(make_plugin(), callbacks=monitors, max_steps=BAD + 1 if mode == "ignore" else -1)
        used.fit(model, batches(NUM))
        seen.append((monitors[0].events, repr(monitors[0].events), monitors[1].history))
    assert [(e.step, e.batch_idx) for e in seen[0][0]] == [(BAD, BAD)]
    assert seen[0][1:] == seen[1][1:]  # an amax may be NaN, which is not itself
    num = BAD + 1 if mode == "ignore" else NUM
    for monitor in monitors:
        assert monitor.calls == dict.fromkeys(HOOKS, num)


@pytest.mark.parametrize("probe", ["replay", "always"])
def test_nothing_is_left_on_the_monitor_after_fit_and_its_copies_belong_to_no_run(probe) -> None:
    class Copies(Callback):
        def on_train_batch_end(self, trainer, *_):
            self.copies = [copy.deepcopy(monitor) for monitor in trainer.callbacks[:2]]

    copies = Copies()
    monitors = [OverflowMonitor(probe=probe), LossScaleMonitor(plot=False)]
    trainer(foreign(), callbacks=[*monitors, copies]).fit(Regression(), batches(2))
    for monitor in (*monitors, *copies.copies):
        assert not [name for name in vars(monitor) if name.startswith("on_") and name != "on_overflow"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda monitor: pickle.loads(pickle.dumps(monitor))])
@pytest.mark.parametrize("base", [CountingOverflow, CountingScale])
def test_copy_of_a_subclass_keeps_what_it_is_and_drops_what_belongs_to_the_run(base, duplicate) -> None:
    class Copies(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == BAD:
                self.copied = duplicate(trainer.callbacks[0])

    copies, monitor = Copies(), base()
    monitor.color = "red"
    trainer(foreign(), callbacks=[monitor, copies]).fit(Regression(factors={BAD: INF}), batches(NUM))
    copied = copies.copied
    assert type(copied) is base
    assert copied.color == "red"
    assert copied.calls["on_before_optimizer_step"] == BAD + 1
    # Of the run it holds no model, no batch and no trainer: it is as small as a few lines, and trains on its own.
    assert len(pickle.dumps(copied)) < 4096
    trainer(foreign(), callbacks=[copied]).fit(Regression(factors={0: INF}), batches(2))
    assert copied.calls["on_before_optimizer_step"] == BAD + 1 + 2
    found = copied.events if base is CountingOverflow else [r for r in copied.history if r.found_inf]
    assert [f.step for f in found] == [0]
    assert monitor.calls["on_before_optimizer_step"] == NUM


def test_neither_monitor_makes_the_plugin_call_hooks_in_automatic_optimization() -> None:
    class Looks(Callback):
        def on_train_batch_end(self, trainer, *_):
            self.overridden = [
                (type(c).__name__, name)
                for c in trainer.callbacks[:2]
                for name in HOOKS
                if name in vars(c) or getattr(type(c), name) is not getattr(Callback, name)
            ]

    looks = Looks()
    monitors = [OverflowMonitor(), LossScaleMonitor(plot=False)]
    trainer(MixedPrecision("bf16"), callbacks=[*monitors, looks]).fit(Regression(), batches(2))
    assert looks.overridden == []


def test_hook_that_a_user_set_on_the_object_runs_too_and_comes_back() -> None:
    calls = []
    callback = Callback()
    own = callback.on_before_backward = lambda *args: calls.append("own")
    add_to_hook(callback, "on_before_backward", lambda *args: calls.append("added"))
    callback.on_before_backward(None, None, None)
    remove_added_hooks(callback)
    assert callback.on_before_backward is own
    assert calls == ["added", "own"]
