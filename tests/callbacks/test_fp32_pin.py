"""FP32Pin in a Trainer: with our plugin and Lightning's own, in every stage, and gone afterwards."""

import logging
import os
import re
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_mp.callbacks.fp32_pin import FP32Pin
from lightning_mp.callbacks.overflow_monitor import OverflowMonitor
from lightning_mp.errors import SettingValueError, UnmatchedPatternError, UnsupportedError
from lightning_mp.pinning.functions import names_of
from lightning_mp.pinning.swap import role_of
from lightning_mp.precision import MixedPrecision

PLUGINS = {
    "ours bf16": lambda: {"plugins": [MixedPrecision("bf16")]},
    "ours fp16": lambda: {"plugins": [MixedPrecision("fp16")]},
    "lightning bf16": lambda: {"precision": "bf16-mixed"},
    "lightning fp16": lambda: {"plugins": [_lightning_fp16()]},
}
BF16_PLUGINS = ["ours bf16", "lightning bf16"]


def _lightning_fp16():
    from lightning.pytorch.plugins import MixedPrecision as LightningMixedPrecision

    return LightningMixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


class Attention(nn.Module):
    """Attention written out; its softmax is reached through a dictionary, which no code scan sees."""

    def __init__(self):
        super().__init__()
        self.functions = {"soft": torch.softmax}
        self.query = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.seen = []

    def forward(self, x):
        h = self.query(x)
        weights = self.functions["soft"](h @ h.mT, -1)
        self.seen.append(weights.dtype)
        return self.norm(weights @ h)


class Model(LightningModule):
    def __init__(self, *, late=False, use_reentrant=None):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.losses = []
        if not late:
            self.build()

    def build(self):
        torch.manual_seed(0)
        self.attention = Attention()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        if self.use_reentrant is None or not self.training:
            return self.head(self.attention(x))
        return self.head(checkpoint(self.attention, x, use_reentrant=self.use_reentrant))

    def loss(self, batch):
        x, y = batch
        loss = F.cross_entropy(self(x.requires_grad_(not x.is_inference())), y)
        self.losses.append(loss.dtype)
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.loss(batch)

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).softmax(-1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), getattr(self, "lr", 0.1))


class LateModel(Model):
    def __init__(self):
        super().__init__(late=True)

    def configure_model(self):
        if not hasattr(self, "head"):
            self.build()


def data(num=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num * 4, 4, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(num * 4) % 3), batch_size=4)


def trainer(*callbacks, max_epochs=1, **settings):
    return Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=settings.pop("devices", 1),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )


def assert_nothing_is_left(model):
    assert [name for name, module in model.named_modules() if role_of(module) is not None] == []
    assert type(model).__mro__[0].__name__ in globals() or "<locals>" in type(model).__qualname__
    assert not [name for name in vars(model) if name.endswith("_step")]
    assert not [cls for m in model.modules() for cls in type(m).__mro__ if cls.__name__ == "_Swapped"]


@pytest.mark.parametrize("plugin", PLUGINS)
def test_softmax_norm_and_loss_are_fp32_in_every_stage_and_plain_afterwards(plugin):
    model, pin = Model(), FP32Pin()
    run = trainer(pin, max_epochs=2, **PLUGINS[plugin]())
    run.fit(model, data(), data())
    assert_nothing_is_left(model)
    run.validate(model, data(), verbose=False)
    run.test(model, data(), verbose=False)
    predictions = run.predict(model, data())
    assert_nothing_is_left(model)
    assert set(model.attention.seen) == {torch.float32}
    assert set(model.losses) == {torch.float32}
    assert {p.dtype for p in predictions} == {torch.float32}


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_without_the_callback_softmax_is_bf16_on_cpu(plugin):
    model = Model()
    trainer(**PLUGINS[plugin]()).fit(model, data())
    assert set(model.attention.seen) == {torch.bfloat16}


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_recomputation_is_pinned(plugin, use_reentrant):
    model, plain = Model(use_reentrant=use_reentrant), Model()
    for net in (model, plain):
        trainer(FP32Pin(), **PLUGINS[plugin]()).fit(net, data())
    # Three batches, each with a forward and a recomputation.
    assert model.attention.seen == [torch.float32] * 6
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_recomputation_inside_a_manual_step_is_pinned_from_the_first_batch(plugin, use_reentrant):
    class Manual(Model):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    model = Manual(use_reentrant=use_reentrant)
    trainer(FP32Pin(), **PLUGINS[plugin]()).fit(model, data())
    assert model.attention.seen == [torch.float32] * 6


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_model_that_configure_model_builds_is_pinned(plugin):
    model = LateModel()
    run = trainer(FP32Pin(modules=["head"]), **PLUGINS[plugin]())
    run.fit(model, data())
    run.test(model, data(), verbose=False)
    assert set(model.attention.seen) == {torch.float32}
    assert_nothing_is_left(model)


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception_in_a_batch(plugin, error):
    class Fails(Model):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise error
            return super().training_step(batch, batch_idx)

    model, run = Fails(), trainer(FP32Pin(), **PLUGINS[plugin]())
    with pytest.raises((RuntimeError, SystemExit)):
        run.fit(model, data())
    assert_nothing_is_left(model)
    again = trainer(FP32Pin(), limit_train_batches=1, **PLUGINS[plugin]())
    again.fit(model, data())
    assert set(model.attention.seen) == {torch.float32}


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_nothing_is_left_after_an_exception_during_setup(plugin):
    class Fails(Model):
        def configure_optimizers(self):
            raise RuntimeError("as the user's code does")

    model = Fails()
    with pytest.raises(RuntimeError, match="as the user"):
        trainer(FP32Pin(), **PLUGINS[plugin]()).fit(model, data())
    assert_nothing_is_left(model)


class TypedNet(Model):
    """Asks for exact classes, as weight decay groups and frozen statistics are usually written."""

    def build(self):
        super().build()
        self.statistics = nn.BatchNorm1d(4)
        self.statistics.running_mean.fill_(1.0)

    def forward(self, x):
        return super().forward(self.statistics(x))

    def configure_optimizers(self):
        self.by_identity = [m for m in self.modules() if type(m) is nn.LayerNorm or type(m) is nn.BatchNorm1d]
        self.by_equality = [m for m in self.modules() if type(m) in (nn.LayerNorm, nn.BatchNorm1d)]
        return super().configure_optimizers()

    def on_train_epoch_start(self):
        for module in self.modules():
            if type(module) == nn.BatchNorm1d:  # noqa: E721
                module.eval()


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_exact_class_tests_in_the_users_hooks_hold_as_without_the_pin(plugin):
    model = TypedNet()
    trainer(FP32Pin(), **PLUGINS[plugin]()).fit(model, data())
    assert len(model.by_identity) == len(model.by_equality) == 2
    assert torch.equal(model.statistics.running_mean, torch.ones(4))
    assert_nothing_is_left(model)


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_class_that_registers_its_subclasses_trains_pinned_and_the_registry_is_as_before(plugin):
    registry = {}

    class Tasked(Model):
        def __init_subclass__(cls, *, task, **kwargs):
            super().__init_subclass__(**kwargs)
            registry[task] = cls

    class Classifier(Tasked, task="classify"):
        pass

    model = Classifier()
    trainer(FP32Pin(), **PLUGINS[plugin]()).fit(model, data())
    assert registry.keys() == {"classify"}
    assert registry["classify"] is type(model) is Classifier
    assert set(model.attention.seen) == {torch.float32}


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_module_that_a_hook_builds_like_a_pinned_one_is_plain_after_fit_and_trains_again(plugin):
    class WithTarget(Model):
        def on_fit_start(self):
            self.target = type(self.attention)()

        def training_step(self, batch, batch_idx):
            self.twin = type(self.attention.norm)(4)
            return super().training_step(batch, batch_idx) + 0 * self.target(batch[0]).float().sum()

    model = WithTarget()
    for _ in range(2):
        trainer(FP32Pin(), **PLUGINS[plugin]()).fit(model, data())
        assert_nothing_is_left(model)
        assert (type(model.target), type(model.twin)) == (Attention, nn.LayerNorm)
        assert set(model.attention.seen) == set(model.target.seen) == {torch.float32}


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_pattern_without_a_match_raises_with_the_nearest_names(plugin):
    model = Model()
    with pytest.raises(UnmatchedPatternError, match=r"modules: 'attn' matches no module of Model.*attention"):
        trainer(FP32Pin(modules=["attn"]), **PLUGINS[plugin]()).fit(model, data())
    assert_nothing_is_left(model)


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_report_says_what_was_pinned_and_what_ran_once_per_step(plugin, caplog):
    model, pin = Model(), FP32Pin(modules=["head"])
    model.unused = nn.GroupNorm(2, 4)
    with caplog.at_level(logging.INFO):
        trainer(pin, max_epochs=2, num_sanity_val_steps=0, **PLUGINS[plugin]()).fit(model, data(), data())
    report = pin.reports["training_step"]
    assert report.modules == {"attention.norm": "LayerNorm", "head": "Linear", "unused": "GroupNorm"}
    assert {(c.fqn, c.name, c.dtype) for c in report.calls} == {
        ("attention", "softmax", torch.float32),
        ("attention.norm", "layer_norm", torch.float32),
        ("training_step", "cross_entropy", torch.float32),
    }
    assert report.not_reached == ("unused",)
    assert report.below_fp32 == ()
    assert set(pin.reports) == {"training_step", "validation_step"}
    said = [record.getMessage() for record in caplog.records if "FP32Pin" in record.getMessage()]
    assert len(said) == 2
    assert "1 LayerNorm, 1 GroupNorm, 1 Linear" in said[0] or "1 Linear" in said[0]
    assert "1 x softmax in float32" in said[0]
    assert "Not reached: unused" in said[0]


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_code_that_casts_despite_the_pin_is_named_in_a_warning(plugin):
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x):
            return x.bfloat16() @ self.weight.bfloat16()

    class Stubborn(Model):
        def build(self):
            super().build()
            self.attention = Casts()

    pin = FP32Pin(modules=["attention"])
    with pytest.warns(UserWarning, match=r"despite the pin, training_step ran aten::mm in torch.bfloat16 in attention"):
        trainer(pin, **PLUGINS[plugin]()).fit(Stubborn(), data())


def test_bare_function_under_checkpointing_is_refused_before_it_trains():
    class Bare(Model):
        def forward(self, x):
            return self.head(checkpoint(lambda h: torch.softmax(self.attention.query(h), -1), x, use_reentrant=False))

    model = Bare()
    with pytest.raises(UnsupportedError, match=r"bare function under torch.utils.checkpoint.checkpoint"):
        trainer(FP32Pin(), **PLUGINS["ours bf16"]()).fit(model, data())
    assert_nothing_is_left(model)


class Growing(Model):
    """Adds modules at the start of its second epoch, as growing networks do."""

    def build(self):
        super().build()
        self.grown = nn.Sequential()
        self.outputs = []

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.grown.append(nn.LayerNorm(4))
            self.grown.append(nn.Softmax(-1))

    def forward(self, x):
        h = self.grown(self.attention.query(x))
        self.outputs.append(h.dtype)
        return self.head(h)


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_modules_that_are_added_at_the_start_of_an_epoch_are_pinned(plugin):
    model = Growing()
    trainer(FP32Pin(), max_epochs=3, **PLUGINS[plugin]()).fit(model, data(2))
    assert model.outputs == [torch.bfloat16] * 2 + [torch.float32] * 4
    assert_nothing_is_left(model)


class LateFunction(Model):
    """Checkpoints a method of its own from the second batch on."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.bare = use_reentrant

    def attend(self, x):
        return self.attention.query(x).softmax(-1)

    def training_step(self, batch, batch_idx):
        x = batch[0].requires_grad_()
        h = checkpoint(self.attend, x, use_reentrant=self.bare) if batch_idx else self.attend(x)
        return self.head(h).float().square().mean()


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
@pytest.mark.parametrize(("use_reentrant", "error"), [(True, UnsupportedError), (False, CheckpointError)])
def test_bare_function_that_is_checkpointed_in_a_later_batch_ends_the_run_with_the_fix(plugin, use_reentrant, error):
    model = LateFunction(use_reentrant)
    with pytest.raises(error) as caught:
        trainer(FP32Pin(), **PLUGINS[plugin]()).fit(model, data())
    said = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    if sys.version_info >= (3, 11):
        assert re.search("FP32Pin.*forward of an nn.Module that is a submodule of the model, and checkpoint", said)
    assert_nothing_is_left(model)


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_two_pins_work_together(plugin):
    model = Model()
    first, second = FP32Pin("softmax"), FP32Pin("loss", modules=["head"])
    trainer(first, second, **PLUGINS[plugin]()).fit(model, data())
    assert set(model.attention.seen) == {torch.float32}
    assert list(first.reports["training_step"].modules) == ["head"]
    assert_nothing_is_left(model)


def test_plugin_that_is_used_again_without_the_callback_pins_nothing():
    plugin, pinned, plain = MixedPrecision("bf16"), Model(), Model()
    trainer(FP32Pin(), plugins=[plugin]).fit(pinned, data())
    trainer(plugins=[plugin]).fit(plain, data())
    assert pinned.attention.seen == [torch.float32] * 3
    assert plain.attention.seen == [torch.bfloat16] * 3


def test_what_was_pinned_is_said_once_though_stages_repeat(caplog):
    pin, model = FP32Pin(), Model()
    run = trainer(pin, plugins=[MixedPrecision("bf16")])
    with caplog.at_level(logging.INFO):
        run.validate(model, data())
        run.fit(model, data(), data())
        run.validate(model, data())
    said = [record.getMessage() for record in caplog.records if "FP32Pin" in record.getMessage()]
    assert len(said) == len(set(said)) == 2
    assert sorted(pin.reports) == ["validation_step"]


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_second_fit_and_another_trainer_pin_again(plugin):
    model, pin = Model(), FP32Pin()
    for _ in range(2):
        run = trainer(pin, **PLUGINS[plugin]())
        run.fit(model, data())
        run.fit_loop.max_epochs = 2
        run.fit(model, data())
    assert model.attention.seen == [torch.float32] * 12


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_metric_that_calls_a_pinned_function_is_logged_as_ever(plugin):
    class Confidence(torchmetrics.MeanMetric):
        def __init__(self):
            super().__init__()
            self.functions = [torch.softmax]
            self.seen = []

        def update(self, logits):
            probabilities = self.functions[0](logits, -1)
            self.seen.append(probabilities.dtype)
            super().update(probabilities.amax(-1))

    class Metered(Model):
        def build(self):
            super().build()
            self.confidence = Confidence()

        def training_step(self, batch, batch_idx):
            self.confidence(self(batch[0]))
            self.log("confidence", self.confidence, on_epoch=True)
            return self.loss(batch)

    model = Metered()
    run = trainer(FP32Pin(), max_epochs=2, **PLUGINS[plugin]())
    run.fit(model, data())
    assert 1 / 3 < run.callback_metrics["confidence_epoch"] < 1
    assert set(model.confidence.seen) == {torch.float32}
    assert_nothing_is_left(model)


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_learning_rate_finder_runs_pinned_and_a_fit_follows(plugin, tmp_path):
    model = Model()
    model.lr = 0.1
    run = trainer(FP32Pin(), default_root_dir=tmp_path, **PLUGINS[plugin]())
    Tuner(run).lr_find(model, data(), num_training=4, update_attr=False)
    assert_nothing_is_left(model)
    run.fit(model, data())
    assert set(model.attention.seen) == {torch.float32}
    assert_nothing_is_left(model)


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_averaged_copy_of_the_model_carries_no_pin(plugin):
    model, averaging = Model(), EMAWeightAveraging()
    trainer(FP32Pin(), averaging, **PLUGINS[plugin]()).fit(model, data(), data())
    assert set(model.attention.seen) == {torch.float32}
    assert_nothing_is_left(model)


def test_checkpoint_of_a_pinned_run_loads_without_the_pin(tmp_path):
    class Saves(Callback):
        def on_train_batch_end(self, run, *args):
            run.save_checkpoint(tmp_path / "pinned.ckpt")

    model = Model()
    trainer(FP32Pin(), Saves(), **PLUGINS["lightning bf16"]()).fit(model, data())
    Model.load_from_checkpoint(tmp_path / "pinned.ckpt", strict=True)
    saved = torch.load(tmp_path / "pinned.ckpt", weights_only=True)["state_dict"]
    assert list(saved) == list(Model().state_dict())


class Dtypes(Callback):
    def on_train_batch_end(self, run, module, *args):
        self.seen = {name: p.dtype for name, p in module.named_parameters()}


@pytest.mark.filterwarnings("ignore:master_weights='none'")  # our own, said once per process
@pytest.mark.parametrize("master_weights", ["copy", "split", "none"])
def test_pinned_parameters_stay_fp32_in_the_sixteen_bit_weight_modes(master_weights):
    model, dtypes, pin = Model(), Dtypes(), FP32Pin(modules=["head"])
    plugin = MixedPrecision("bf16", master_weights=master_weights)
    trainer(pin, dtypes, max_epochs=2, plugins=[plugin]).fit(model, data())
    kept = {name for name, dtype in dtypes.seen.items() if dtype is torch.float32}
    assert kept == {"attention.norm.weight", "attention.norm.bias", "head.weight", "head.bias"}
    assert dtypes.seen["attention.query.weight"] is torch.bfloat16
    assert pin.reports["training_step"].below_fp32 == ()
    assert set(model.attention.seen) == {torch.float32}
    assert_nothing_is_left(model)


class ModulatedNorm(nn.LayerNorm):
    def __init__(self, size):
        super().__init__(size, elementwise_affine=False)
        self.modulation = nn.Linear(size, size)

    def forward(self, x):
        return super().forward(x) * self.modulation(x)


class Modulated(Model):
    def build(self):
        super().build()
        self.attention.norm = ModulatedNorm(4)


@pytest.mark.filterwarnings("ignore:master_weights='none'")  # our own, said once per process
@pytest.mark.parametrize("master_weights", ["params", "copy", "split", "none"])
def test_what_a_pinned_norm_holds_is_fp32_in_every_weight_mode_and_in_the_manifest(master_weights):
    class Rows(Callback):
        def on_train_batch_end(self, run, module, *args):
            self.rows = {row.fqn: row for row in plugin.manifest()}

    dtypes, rows = Dtypes(), Rows()
    plugin = MixedPrecision("bf16", master_weights=master_weights)
    trainer(FP32Pin(), dtypes, rows, plugins=[plugin]).fit(Modulated(), data())
    row = rows.rows["attention.norm.modulation"]
    assert (row.param_dtype, row.compute_dtype, row.master, row.pinned) == (
        torch.float32,
        torch.float32,
        "params",
        True,
    )


@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
@pytest.mark.parametrize("plugin", ["ours bf16", "lightning bf16"])
def test_outputs_that_the_pin_itself_casts_are_no_violation(plugin, stage, recwarn):
    model, pin = Model(), FP32Pin(output="input")
    run = trainer(pin, **PLUGINS[plugin]())
    run.fit(model, data(), data()) if stage == "fit" else getattr(run, stage)(model, data())
    assert pin.reports
    assert [call for report in pin.reports.values() for call in report.below_fp32] == []
    assert not [w for w in recwarn if "despite the pin" in str(w.message)]


def test_manifest_of_the_plugin_shows_the_pinned_modules_while_they_are():
    class Manifest(Callback):
        def on_train_batch_end(self, run, *args):
            self.rows = {row.fqn: (row.module_class, row.pinned) for row in run.precision_plugin.manifest()}

    seen, plugin = Manifest(), MixedPrecision("bf16")
    trainer(FP32Pin(modules=["head"]), seen, plugins=[plugin]).fit(Model(), data())
    assert seen.rows == {
        "attention.query": ("Linear", False),
        "attention.norm": ("LayerNorm", True),
        "head": ("Linear", True),
    }
    assert not any(row.pinned for row in plugin.manifest())


def test_pinned_linear_is_left_out_of_fp8():
    class Wide(Model):
        def build(self):
            super().build()
            self.head = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3))

    class Classes(Callback):
        def on_train_batch_end(self, run, module, *args):
            self.seen = [type(layer).__name__ for layer in module.head]

    classes, pin = Classes(), FP32Pin(modules=["head.1"])
    plugin = MixedPrecision("fp8", fp8={"backend": "emulated"})
    trainer(pin, classes, plugins=[plugin]).fit(Wide(), data())
    assert classes.seen == ["Linear", "Linear", "FP8Linear", "Linear"]
    assert pin.reports["training_step"].below_fp32 == ()


def test_overflow_that_the_monitor_replays_runs_pinned():
    class Overflows(Model):
        def loss(self, batch):
            return super().loss(batch) * 3e38

    model, monitor = Overflows(), OverflowMonitor(probe="replay")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the monitor's own alarm, tested with the monitor
        trainer(FP32Pin(), monitor, plugins=[MixedPrecision("fp16", loss_scale=1024.0)]).fit(model, data())
    assert monitor.events
    assert set(model.attention.seen) == {torch.float32}
    assert_nothing_is_left(model)


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_pins_hold_under_fsdp2_whose_class_stays(plugin):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    class Sharded(Model):
        def configure_model(self):
            for module in (self.attention, self.head, self):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    model = Sharded()
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend="gloo")
    trainer(FP32Pin(modules=["head"]), strategy=strategy, **PLUGINS[plugin]()).fit(model, data())
    torch.distributed.destroy_process_group()
    assert model.attention.seen == [torch.float32] * 3
    assert isinstance(model.attention, FSDPModule)
    assert all(role_of(module) is None for module in model.modules())


# --- Compiled --------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Mixer(nn.Module):
    """Notes no dtypes while it runs: appending to a list would recompile at every step."""

    def __init__(self):
        super().__init__()
        self.query, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.query(x)).softmax(-1)


class Compilable(Model):
    def build(self):
        super().build()
        self.attention = Mixer()

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)


# torch 2.13: dynamo looks at .grad of non-leaf inputs and hides the warning in a way that "error" undoes.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("plugin", BF16_PLUGINS)
@pytest.mark.parametrize("what", ["module", "child", "in place"])
def test_compiled_model_computes_what_the_eager_one_does(plugin, what):
    eager, model = Compilable(), Compilable()
    trainer(FP32Pin(), **PLUGINS[plugin]()).fit(eager, data())
    compiled = model
    if what == "module":
        compiled = from_compiled(torch.compile(model, backend="eager"))
    elif what == "child":
        model.attention = torch.compile(model.attention, backend="eager", fullgraph=True)
    else:
        model.attention.compile(backend="eager", fullgraph=True)
    steps = {name: value for name, value in vars(model).items() if name.endswith("_step")}
    trainer(FP32Pin(), **PLUGINS[plugin]()).fit(compiled, data())
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        # The same kernels in the same order.
        assert torch.equal(p, q)
    assert all(role_of(m) is None for m in model.modules())
    assert {name: value for name, value in vars(model).items() if name.endswith("_step")} == steps


# --- Plugins without autocast, strategies ----------------------------------------------------------


def test_half_precision_plugin_keeps_pinned_parameters_fp32_while_it_trains():
    class Plain(Model):
        def loss(self, batch):
            x, y = batch
            loss = F.cross_entropy(self(x), y)
            self.losses.append(loss.dtype)
            return loss

    model, dtypes = Plain(), Dtypes()
    norm_before = model.attention.norm.weight.clone()
    trainer(FP32Pin(output="input"), dtypes, precision="bf16-true").fit(model, data())
    assert dtypes.seen["attention.norm.weight"] is torch.float32
    assert dtypes.seen["head.weight"] is torch.bfloat16
    assert not torch.equal(model.attention.norm.weight, norm_before)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert set(model.losses) == {torch.float32}


def test_half_precision_plugin_with_fp32_outputs_is_refused_with_the_fix():
    with pytest.raises(UnsupportedError, match=r"output='float32'\) under precision='bf16-true'.*output='input'"):
        trainer(FP32Pin(), precision="bf16-true").fit(Model(), data())


def test_half_precision_plugin_with_configure_model_is_refused():
    with pytest.raises(UnsupportedError, match=r"precision='bf16-true' with configure_model"):
        trainer(FP32Pin(output="input"), precision="bf16-true").fit(LateModel(), data())


def test_fp32_run_is_bitwise_what_it_is_without_the_pin():
    pinned, plain = Model(), Model()
    trainer(FP32Pin(), precision="32-true").fit(pinned, data())
    trainer(precision="32-true").fit(plain, data())
    for p, q in zip(pinned.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("plugin", BF16_PLUGINS)
def test_pins_hold_under_ddp(plugin):
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    model = Model()
    run = trainer(FP32Pin(), strategy=DDPStrategy(process_group_backend="gloo"), **PLUGINS[plugin]())
    run.fit(model, data())
    torch.distributed.destroy_process_group()
    assert model.attention.seen == [torch.float32] * 3
    assert_nothing_is_left(model)


def test_wrong_settings_are_refused_when_the_callback_is_built():
    with pytest.raises(SettingValueError, match="pins: 'layernorm' is not known"):
        FP32Pin(pins=["layernorm"])


def test_documentation_lists_the_functions_that_are_pinned():
    listed = set(re.findall(r"``(\w+)``", FP32Pin.__doc__.partition("The functions,")[2].partition("``logsumexp``")[0]))
    assert {*names_of("softmax"), *names_of("norm")} < listed
    assert listed - {*names_of("softmax"), *names_of("norm")} < set(names_of("loss"))


def test_config_that_raises_a_key_error_for_what_it_lacks_ends_no_run():
    class DotDict(dict):
        def __getattr__(self, name):
            return self[name]

    class Configured(LightningModule):
        def __init__(self):
            super().__init__()
            self.head, self.criterion, self.cfg = nn.Linear(4, 3), nn.CrossEntropyLoss(), DotDict(factor=0.5)

        def training_step(self, batch, batch_idx):
            return self.criterion(self.head(batch[0]), batch[1]) * self.cfg.factor

        configure_optimizers = Model.configure_optimizers

    pin = FP32Pin()
    trainer(pin, plugins=[MixedPrecision("bf16")]).fit(Configured(), data())
    assert pin.reports["training_step"].modules == {"criterion": "CrossEntropyLoss"}
    assert pin.reports["training_step"].below_fp32 == ()
