"""Checkpoints: ours and Lightning's load each other's, and a resumed run is the uninterrupted one."""

import logging

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision as LightningMixedPrecision
from torch.optim import lr_scheduler

from lightning_mp import DynamicLossScale, MixedPrecision, StaticLossScale
from tests.models import INF, Regression, batches, trainer, weights

# Lightning 2.6 advises to pass the ModelCheckpoint that wrote the file; these tests resume without it.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

GROWS = {"init_scale": 256.0, "growth_interval": 3, "hysteresis": 2}
FLAT = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def saved(tmp_path, plugin, model=None, *, num=6, **settings):
    """Train ``num`` batches and return the path of a checkpoint."""
    run = trainer(plugin, enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path, filename="c")], **settings)
    run.fit(model or Regression(), batches(num))
    return tmp_path / "c.ckpt"


def notices(caplog):
    return [r.getMessage() for r in caplog.records if "lightning_mp: resuming" in r.getMessage()]


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    return caplog


class Shuffled(Regression):
    """Bad batches by the number of steps taken, which survives a resume."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch) * (INF if self.trainer.global_step in (2, 5, 11, 14) else 1.0)


def make(fused):
    return Shuffled(fused=fused, scheduler=lambda o: lr_scheduler.CosineAnnealingLR(o, 12), frequency=2)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resumed_run_is_bit_identical_to_the_uninterrupted_one(tmp_path, precision, fused):
    def plugin():
        scales.append([])
        made = MixedPrecision(precision, loss_scale=GROWS if precision == "fp16" else None)
        made.add_step_listener(lambda r, seen=scales[-1]: seen.append((r.step, r.loss_scale, r.skipped)))
        return made

    scales = []
    whole, first, resumed = make(fused), make(fused), make(fused)
    full = plugin()
    run = trainer(full, max_epochs=3)
    run.fit(whole, batches(6))
    path = saved(tmp_path, plugin(), first, max_epochs=2)
    last = plugin()
    run_resumed = trainer(last, max_epochs=3)
    run_resumed.fit(resumed, batches(6), ckpt_path=path)
    assert all(torch.equal(p, q) for p, q in zip(weights(whole), weights(resumed), strict=True))
    assert scales[0] == scales[1] + scales[2]
    # An advance of the scheduler was waiting when the checkpoint was written: step 11 was skipped.
    assert first.trainer.precision_plugin.state_dict()["lightning_mp"]["held_schedulers"][0][2] > 0
    assert full.state_dict() == last.state_dict()
    held = [r.lr_scheduler_configs[0].scheduler.state_dict() for r in (run, run_resumed)]
    assert held[0] == held[1]


def test_state_is_plain_and_holds_the_keys_of_grad_scaler(tmp_path):
    path = saved(tmp_path, MixedPrecision("fp16", loss_scale=GROWS))
    state = torch.load(path, weights_only=True)["MixedPrecision"]
    assert set(state) >= FLAT
    assert state["lightning_mp"]["version"] == 1
    assert state["lightning_mp"]["loss_scale"]["growth_interval"] == 3


def test_bf16_state_starts_an_fp16_run_of_lightning_afresh(tmp_path):
    path = saved(tmp_path, MixedPrecision("bf16"))
    plugin = LightningMixedPrecision("16-mixed", "cpu")
    trainer(plugin, max_epochs=2).fit(Regression(), batches(6), ckpt_path=path)
    assert plugin.scaler.get_growth_factor() == 2.0


def test_lightning_continues_our_scale(tmp_path):
    path = saved(tmp_path, MixedPrecision("fp16", loss_scale={"init_scale": 512.0, "growth_interval": 100}))
    plugin = LightningMixedPrecision("16-mixed", "cpu")
    trainer(plugin, max_epochs=1).fit(Regression(), batches(6), ckpt_path=path)
    assert plugin.scaler.get_scale() == 512.0
    assert plugin.scaler.get_growth_interval() == 100


def test_we_continue_lightnings_scale_and_keep_what_it_lacks(tmp_path, logged):
    theirs = LightningMixedPrecision(
        "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=77)
    )
    path = saved(tmp_path, theirs)
    plugin = MixedPrecision("fp16", loss_scale={"min_scale": 0.25, "init_scale": 4.0, "floor_patience": 9})
    trainer(plugin, max_epochs=1).fit(Regression(), batches(6), ckpt_path=path)
    assert plugin.scaler.get_scale() == 64.0
    assert plugin.scaler.rule == DynamicLossScale(min_scale=0.25, init_scale=4.0, floor_patience=9, growth_interval=77)
    assert len(notices(logged)) == 1
    assert "growth_interval=77 from the checkpoint (asked for: 2000)" in notices(logged)[0]


@pytest.mark.parametrize("key", ["FSDPPrecision", "native_amp_scaling_state"])
def test_legacy_state_is_read(tmp_path, key):
    path = saved(tmp_path, LightningMixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=32.0)))
    checkpoint = torch.load(path, weights_only=False)
    checkpoint[key] = checkpoint.pop("MixedPrecision")
    torch.save(checkpoint, path)
    plugin = MixedPrecision("fp16")
    trainer(plugin, max_epochs=1).fit(Regression(), batches(6), ckpt_path=path)
    assert plugin.scaler.get_scale() == 32.0


@pytest.mark.parametrize("state", [None, {}])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_missing_or_empty_state_loads(tmp_path, precision, state):
    path = saved(tmp_path, MixedPrecision("bf16"))
    checkpoint = torch.load(path, weights_only=False)
    checkpoint.pop("MixedPrecision")
    if state is not None:
        checkpoint["MixedPrecision"] = state
    torch.save(checkpoint, path)
    plugin = MixedPrecision(precision)
    trainer(plugin, max_epochs=2).fit(Regression(), batches(6), ckpt_path=path)
    assert plugin.applied_steps + plugin.skipped_steps == 6


@pytest.mark.parametrize("saved_in", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("resumed_in", ["fp32", "bf16", "fp16"])
def test_switching_precision_on_resume_gives_one_notice(tmp_path, logged, saved_in, resumed_in):
    path = saved(tmp_path, MixedPrecision(saved_in))
    plugin = MixedPrecision(resumed_in)
    trainer(plugin, max_epochs=2).fit(Regression(), batches(6), ckpt_path=path)
    assert plugin.applied_steps + plugin.skipped_steps == 12
    if saved_in == resumed_in:
        assert notices(logged) == []
    else:
        assert len(notices(logged)) == 1
        assert f"written in {saved_in!r}" in notices(logged)[0]
        assert f"continues in {resumed_in!r}" in notices(logged)[0]


def test_static_scale_that_was_asked_for_stays_on_resume(tmp_path, logged):
    path = saved(tmp_path, MixedPrecision("fp16", loss_scale=GROWS))
    plugin = MixedPrecision("fp16", loss_scale=64.0)
    trainer(plugin, max_epochs=1).fit(Regression(), batches(6), ckpt_path=path)
    assert plugin.scaler.rule == StaticLossScale(64.0)
    assert plugin.scaler.get_scale() == 64.0
    assert "loss scale stays 64.0 as asked for" in notices(logged)[0]


def test_dynamic_scale_starts_from_a_static_ones_value_with_its_own_settings(tmp_path, logged):
    path = saved(tmp_path, MixedPrecision("fp16", loss_scale=64.0))
    plugin = MixedPrecision("fp16", loss_scale=GROWS)
    trainer(plugin, max_epochs=1).fit(Regression(), batches(6), ckpt_path=path)
    assert plugin.scaler.rule == DynamicLossScale(**GROWS)
    assert plugin.scaler.get_scale() == 64.0
    (said,) = notices(logged)
    assert f"was static and starts at 64.0 from the checkpoint (init_scale={GROWS['init_scale']})" in said


def test_checkpoint_written_after_a_skip_holds_the_settled_learning_rate(tmp_path):
    """With a fused optimizer the scheduler is one step behind until the checkpoint is about to be written."""
    model = Regression(fused=True, scheduler=lambda o: lr_scheduler.StepLR(o, 1, 0.5))
    callback = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(MixedPrecision("bf16"), enable_checkpointing=True, callbacks=[callback]).fit(model, batches(3))
    for step in (1, 2, 3):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert checkpoint["lr_schedulers"][0]["last_epoch"] == step
        assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0.01 * 0.5**step
        assert checkpoint["MixedPrecision"]["lightning_mp"]["applied_steps"] == step


def test_second_fit_and_validate_in_between_continue():
    plugin = MixedPrecision("fp16", loss_scale=GROWS)
    model = Regression(scheduler=lambda o: lr_scheduler.StepLR(o, 1, 0.9))
    run = trainer(plugin)
    run.fit(model, batches(4), batches(2))
    run.validate(model, batches(2), verbose=False)
    run.fit_loop.max_epochs = 2
    run.fit(model, batches(4), batches(2))
    assert plugin.applied_steps == 8


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_are_numbered_as_the_trainer_numbers_them_after_lightnings_checkpoint(tmp_path, precision):
    run = trainer(LightningMixedPrecision({"bf16": "bf16-mixed", "fp16": "16-mixed"}[precision], "cpu"))
    run.fit(Regression(), batches(6))
    run.save_checkpoint(tmp_path / "lightning.ckpt")
    plugin = MixedPrecision(precision)
    resumed = trainer(plugin, max_epochs=2)
    resumed.fit(Regression(), batches(6), ckpt_path=tmp_path / "lightning.ckpt")
    assert plugin.last_step.step == resumed.global_step - 1 == 11


def test_plugin_that_is_used_again_counts_a_new_run_anew():
    plugin = MixedPrecision("bf16")
    trainer(plugin).fit(Regression(factors={1: INF}), batches(6))
    assert (plugin.applied_steps, plugin.skipped_steps, plugin.last_step.step) == (5, 1, 5)
    trainer(plugin).fit(Regression(), batches(4))
    assert (plugin.applied_steps, plugin.skipped_steps, plugin.last_step.step) == (4, 0, 3)
