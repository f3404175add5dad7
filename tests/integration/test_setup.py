"""What setup decides, refuses and says; what an exception leaves behind; what the manifest shows."""

import gc
import logging
import pickle
import weakref

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.strategies import DeepSpeedStrategy, SingleDeviceXLAStrategy, XLAStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import lr_scheduler

from lightning_mp import FP32Pin, MixedPrecision, OverflowMonitor, UnsupportedError
from lightning_mp.errors import SettingValueError
from lightning_mp.hardware import Support
from lightning_mp.policy import PrecisionPolicy
from lightning_mp.precision.checks import check_strategy
from tests.models import Regression, batches, trainer, weights

RANK_ZERO = "lightning.pytorch.utilities.rank_zero"


def test_auto_takes_bf16_on_this_cpu_and_says_why(caplog):
    caplog.set_level(logging.INFO, RANK_ZERO)
    plugin = MixedPrecision("auto")
    trainer(plugin).fit(Regression(), batches())
    assert plugin.precision == "bf16-mixed"
    line = next(m for m in caplog.messages if "chosen by 'auto'" in m)
    assert "precision='bf16'" in line
    assert "on cpu" in line


def test_setup_says_what_runs(caplog):
    caplog.set_level(logging.INFO, RANK_ZERO)
    trainer(MixedPrecision("fp16", loss_scale=8)).fit(Regression(), batches())
    line = next(m for m in caplog.messages if "master_weights=" in m)
    assert "precision='fp16' on cpu, master_weights='params'" in line
    assert "StaticLossScale(scale=8.0)" in line


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy])
def test_strategy_with_a_precision_of_its_own_is_refused_with_the_fix(strategy):
    # None of their libraries can be installed here: an object of the real class without its __init__.
    policy = PrecisionPolicy.parse("bf16")
    with pytest.raises(UnsupportedError, match=rf"cannot run under {strategy.__name__}.*remove the plugin"):
        check_strategy(object.__new__(strategy), policy)


def test_lightnings_own_message_stands_for_precision_beside_the_plugin():
    with pytest.raises((ValueError, MisconfigurationException), match=r"[Rr]eceived both `precision=32-true`"):
        trainer(MixedPrecision("bf16"), precision="32-true")


def test_device_that_is_not_the_trainers_is_refused():
    with pytest.raises(SettingValueError, match=r"device='cuda' is set, and the Trainer runs on 'cpu'"):
        trainer(MixedPrecision("bf16", device="cuda")).fit(Regression(), batches())


def test_bf16_on_a_device_without_it_is_refused(monkeypatch):
    # The answer of a V100, which no machine here has; hardware.py's own tests hold how it is found.
    absent = Support(available=False, reason="a Tesla V100 (compute capability 7.0) has no BF16")
    monkeypatch.setattr("lightning_mp.precision.plugin.bf16_support", lambda device: absent)
    with pytest.raises(UnsupportedError, match=r"precision='bf16', but a Tesla V100 .*MixedPrecision\('fp16'\)"):
        trainer(MixedPrecision("bf16")).fit(Regression(), batches())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_model_that_arrives_in_half_precision_is_refused_with_the_fix(dtype):
    with pytest.raises(UnsupportedError, match=r"2 trainable parameters arrive in 16 bits \(first: layer.weight"):
        trainer(MixedPrecision("bf16")).fit(Regression().to(dtype), batches())


def test_model_in_half_precision_is_evaluated_but_not_in_fp32():
    half = Regression().to(torch.bfloat16)
    (found,) = trainer(MixedPrecision("bf16")).validate(half, batches(), verbose=False)
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    expected = nn.functional.mse_loss(half.layer(x.bfloat16()).float(), y)
    assert found["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(UnsupportedError, match=r"Call model\.float\(\) before"):
        trainer(MixedPrecision("fp32")).validate(half, batches(), verbose=False)


def test_frozen_half_precision_parameters_are_left_alone():
    class Adapted(Regression):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(4, 4).bfloat16().requires_grad_(False)

        def loss(self, batch):
            return nn.functional.mse_loss(self.layer(self.base(batch[0])).float(), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.layer.parameters(), 0.1)

    model = Adapted()
    trainer(MixedPrecision("bf16")).fit(model, batches())
    assert model.base.weight.dtype is torch.bfloat16


def test_frozen_and_unused_parameters_train_as_without_the_plugin():
    class Partly(Regression):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.unused = nn.Linear(4, 4)

    ours, reference = Partly(), Partly()
    reference.load_state_dict(ours.state_dict())
    trainer(MixedPrecision("bf16")).fit(ours, batches())
    trainer(precision="bf16-mixed").fit(reference, batches())
    assert all(torch.equal(p, q) for p, q in zip(weights(ours), weights(reference), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_fit_equals_lightnings_own_plugin(precision):
    # Without an overflow ours is the same arithmetic: bit for bit, FP16 too with the same scale.
    ours, reference = Regression(), Regression()
    scale = {"init_scale": 2.0**16} if precision == "fp16" else None
    trainer(MixedPrecision(precision, loss_scale=scale), gradient_clip_val=0.5).fit(ours, batches(12))
    if precision == "fp16":
        from lightning.pytorch.plugins import MixedPrecision as LightningMixedPrecision

        run = trainer(LightningMixedPrecision("16-mixed", "cpu"), gradient_clip_val=0.5)
    else:
        run = trainer(precision={"fp32": "32-true", "bf16": "bf16-mixed"}[precision], gradient_clip_val=0.5)
    run.fit(reference, batches(12))
    assert all(torch.equal(p, q) for p, q in zip(weights(ours), weights(reference), strict=True))


class Fails(Regression):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise KeyError("in the middle")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_exception_in_the_middle_leaves_nothing_behind_and_fit_can_go_on(precision, fused):
    # conftest.py checks default dtype, grad mode and autocast state after each test.
    plugin = MixedPrecision(precision, loss_scale=64 if precision == "fp16" else None)
    model = Fails(fused=fused, scheduler=lambda o: lr_scheduler.StepLR(o, 1))
    run = trainer(plugin)
    with pytest.raises(KeyError, match="in the middle"):
        run.fit(model, batches())
    assert type(run.lr_scheduler_configs[0].scheduler) is lr_scheduler.StepLR
    assert not run.optimizers[0]._optimizer_state_dict_pre_hooks
    assert not model._forward_hooks
    assert plugin.applied_steps + plugin.skipped_steps == 2
    trainer(plugin).fit(Regression(fused=fused), batches(3))
    assert plugin.applied_steps == 3


def test_manifest_shows_what_each_module_stores_and_computes_in():
    plugin = MixedPrecision("bf16")
    with pytest.raises(UnsupportedError, match="manifest\\(\\) needs a model"):
        plugin.manifest()

    class Normed(Regression):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.bilinear = nn.Bilinear(4, 4, 2)
            self.tied = nn.Linear(4, 1, bias=False)
            self.tied.weight = self.layer.weight

    trainer(plugin).fit(Normed(), batches())
    rows = {row.fqn: row for row in plugin.manifest()}
    assert list(rows) == ["layer", "norm", "bilinear", "tied"]
    assert (rows["layer"].num_params, rows["layer"].param_dtype) == (5, torch.float32)
    assert rows["layer"].compute_dtype is torch.bfloat16
    assert rows["norm"].compute_dtype is None
    # Asked of torch: autocast leaves this product in the dtype of its inputs and its FP32 weight.
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Bilinear(4, 4, 2)(torch.ones(4), torch.ones(4)).dtype is torch.float32
    assert rows["bilinear"].compute_dtype is None
    assert rows["tied"].num_params == 0
    assert {row.master for row in rows.values()} == {"params"}
    with pytest.raises(AttributeError):
        rows["norm"].pinned = True


def test_hooks_see_what_the_documentation_says():
    seen = {}

    class Looks(Regression):
        def on_before_backward(self, loss):
            seen["loss"] = loss.item()

        def on_after_backward(self):
            seen["scaled"] = self.layer.bias.grad.item()

        def on_before_optimizer_step(self, optimizer):
            seen["unscaled"] = self.layer.bias.grad.item()

    trainer(MixedPrecision("fp16", loss_scale=256), max_steps=1).fit(Looks(), batches())
    reference = Regression()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = reference.loss(next(iter(batches())))
    assert seen["loss"] == loss.item() * 256
    assert seen["scaled"] == seen["unscaled"] * 256


def test_hook_on_a_callback_object_is_called():
    from lightning.pytorch.callbacks import LambdaCallback

    seen = []
    callback = LambdaCallback(on_before_backward=lambda *a: seen.append("backward"))
    callback.on_before_optimizer_step = lambda *a: seen.append("step")
    trainer(MixedPrecision("bf16"), callbacks=[callback], max_steps=1).fit(Regression(), batches())
    assert seen == ["backward", "step"]


def test_profiler_sees_the_hooks():
    run = trainer(MixedPrecision("bf16"), profiler="simple", max_steps=1)
    run.fit(Regression(), batches())
    assert any("on_before_optimizer_step" in name for name in run.profiler.recorded_durations)


def test_validate_test_and_predict_run_in_the_compute_dtype():
    dtypes = []

    class Observes(Regression):
        def validation_step(self, batch, batch_idx):
            dtypes.append(self.layer(batch[0]).dtype)

        def test_step(self, batch, batch_idx):
            dtypes.append(self.layer(batch[0]).dtype)

        def predict_step(self, batch, batch_idx):
            output = self.layer(batch[0])
            dtypes.append(output.dtype)
            return output

    run, model = trainer(MixedPrecision("bf16")), Observes()
    run.validate(model, batches(1), verbose=False)
    run.test(model, batches(1), verbose=False)
    run.predict(model, batches(1))
    assert dtypes == [torch.bfloat16] * 3


def test_plugin_survives_a_pickle_before_fit():
    import pickle

    plugin = pickle.loads(pickle.dumps(MixedPrecision("fp16", loss_scale=8)))
    trainer(plugin).fit(Regression(), batches(2))
    assert plugin.applied_steps + plugin.skipped_steps == 2


class Wide(Regression):
    """Wide enough for FP8."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.layer = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 1))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
@pytest.mark.parametrize("masters", ["params", "copy"])
def test_plugin_kept_for_its_counts_holds_neither_model_nor_optimizer(precision, masters):
    plugin = MixedPrecision(
        precision, master_weights=masters, fp8={"backend": "emulated"} if precision == "fp8" else None
    )
    model = Wide(scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1), fused=True)
    run = trainer(plugin, callbacks=[FP32Pin(), OverflowMonitor()])
    run.fit(model, batches(2, features=32))
    references = [weakref.ref(model), weakref.ref(run.optimizers[0])]
    assert len(pickle.dumps(plugin)) < 100_000
    del model, run
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert plugin.applied_steps + plugin.skipped_steps == 2
    with pytest.raises(UnsupportedError, match="while it is in use"):
        plugin.manifest()


def test_fabric_is_refused_with_the_fix():
    fabric = Fabric(accelerator="cpu", plugins=[MixedPrecision("bf16")])
    model = nn.Linear(4, 1)
    model, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(UnsupportedError, match=r"Use Fabric\(precision='bf16-mixed'\)"):
        fabric.backward(model(torch.ones(1, 4)).sum())
