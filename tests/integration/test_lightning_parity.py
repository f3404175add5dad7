"""What users rely on in Lightning holds with our plugin: its callbacks, tuner, clipping and autocast."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision as LightningMixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mp import DynamicLossScale, MixedPrecision
from tests.models import Regression, batches, trainer, weights

PRECISIONS = ["bf16", "fp16"]


def plugin(precision: str, init_scale: float = 8.0) -> MixedPrecision:
    return MixedPrecision(precision, loss_scale={"init_scale": init_scale} if precision == "fp16" else None)


def lightnings(precision: str) -> LightningMixedPrecision:
    if precision == "bf16":
        return LightningMixedPrecision("bf16-mixed", "cpu")
    return LightningMixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))


def both(precision: str, model: Any, **settings: Any) -> tuple[Any, Any]:
    """Train two fresh models, one with our plugin and one with Lightning's, and return them."""
    models = model(), model()
    for each, precision_plugin in zip(models, (plugin(precision), lightnings(precision)), strict=True):
        made = {name: make() if callable(make) else make for name, make in settings.items()}
        trainer(precision_plugin, **made).fit(each, batches())
    return models


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    for left, right in zip(weights(ours), weights(theirs), strict=True):
        assert torch.equal(left, right)


# --- Training gives Lightning's weights bit for bit ---------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 3},
        {"callbacks": lambda: [GradientAccumulationScheduler({0: 1, 1: 4})], "max_epochs": 2},
        {"detect_anomaly": True},
        {"overfit_batches": 2, "max_epochs": 3},
        {"profiler": "simple"},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_run_is_bitwise_lightnings(precision, settings) -> None:
    assert_equal(*both(precision, Regression, **settings))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_stochastic_weight_averaging_is_bitwise_lightnings(precision) -> None:
    averaging = {"callbacks": lambda: [StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)], "max_epochs": 4}
    assert_equal(*both(precision, Regression, **averaging))


class Backboned(Regression):
    """A backbone that is frozen at first, and joins the optimizer later."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss([self.backbone(batch[0]), batch[1]])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), lr=1e-2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_backbone_finetuning_is_bitwise_lightnings(precision) -> None:
    finetuning = {"callbacks": lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=1)], "max_epochs": 3}
    assert_equal(*both(precision, Backboned, **finetuning))


class Manual(Regression):
    """Manual optimization with clipping by value or norm."""

    def __init__(self, algorithm: str = "norm") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.algorithm = algorithm

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm=self.algorithm)
        optimizer.step()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_manual_clipping_is_that_of_automatic_optimization(precision, algorithm) -> None:
    """Lightning clips gradients that are still multiplied by the scale, so its automatic mode is the reference."""
    manual, automatic = Manual(algorithm), Regression()
    trainer(plugin(precision)).fit(manual, batches())
    clipping = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}
    trainer(lightnings(precision), **clipping).fit(automatic, batches())
    assert_equal(manual, automatic)


# --- Tuner and other callbacks ------------------------------------------------------------------------


class Tunable(Regression):
    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.lr, self.batch_size = 1e-3, batch_size

    def train_dataloader(self) -> Any:
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return batches(1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_learning_rate_finder_leaves_no_trace(precision, tmp_path) -> None:
    model, found = Tunable(), plugin(precision)
    before = weights(model)
    run = trainer(found, default_root_dir=tmp_path)
    suggestion = Tuner(run).lr_find(model, num_training=20).suggestion()
    assert model.lr == suggestion
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    run.fit(model)
    assert found.applied_steps == run.global_step == 32
    fresh = Tunable()
    fresh.lr = suggestion
    trainer(plugin(precision)).fit(fresh)
    assert_equal(model, fresh)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_batch_size_finder_leaves_no_trace(precision, tmp_path) -> None:
    model, found = Tunable(), plugin(precision)
    run = trainer(found, default_root_dir=tmp_path)
    size = Tuner(run).scale_batch_size(model, max_trials=3, steps_per_trial=2)
    assert size == 8
    run.fit(model)
    assert found.applied_steps == 64 // size
    fresh = Tunable(size)
    trainer(plugin(precision)).fit(fresh)
    assert_equal(model, fresh)


def test_learning_rate_monitor_logs_the_rate_that_was_used(tmp_path) -> None:
    factors = {2: float("inf")}
    model = Regression(factors=factors, scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), lr=1.0)
    used = []

    class Used(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            used.append(optimizer.param_groups[0]["lr"])

    logger = CSVLogger(tmp_path)
    monitors = [LearningRateMonitor(logging_interval="step"), Used()]
    run = trainer(plugin("fp16"), logger=logger, callbacks=monitors, log_every_n_steps=1)
    run.fit(model, batches())
    assert used == [1.0, 0.5, 0.25, 0.25, 0.125, 0.0625, 0.03125, 0.015625]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_best_checkpoint_is_restored_exactly(precision, tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path, monitor="val_loss")
    run = trainer(plugin(precision), max_epochs=3, callbacks=[saver], enable_checkpointing=True)
    model = Regression()
    run.fit(model, batches(), batches(2))
    (result,) = run.validate(Regression(lr=5.0), batches(2), ckpt_path="best", verbose=False)
    assert result["val_loss"] == pytest.approx(float(saver.best_model_score), rel=1e-6)


# --- Autocast -----------------------------------------------------------------------------------------


class Stages(LightningModule):
    """Notes the dtype of its layer's output in each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.seen: dict[str, set[torch.dtype]] = {}

    def note(self, stage: str, batch: list[Tensor]) -> Tensor:
        y = self.layer(batch[0])
        self.seen.setdefault(stage, set()).add(y.dtype)
        return y.float().sum()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.note("train", batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.note("validate", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.note("test", batch)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.note("predict", batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_every_stage_runs_under_autocast_and_nothing_after_it(precision, dtype) -> None:
    model, run = Stages(), trainer(plugin(precision))
    run.fit(model, batches(), batches())
    run.test(model, batches(), verbose=False)
    run.predict(model, batches())
    assert model.seen == {stage: {dtype} for stage in ("validate", "train", "test", "predict")}
    assert model.layer(torch.ones(1, 4)).dtype is torch.float32


class NoGradFirst(Regression):
    """Calls its layer without gradients before it calls it with them."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        with torch.no_grad():
            self.layer(batch[0])
        return super().loss(batch)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_forward_without_gradients_does_not_take_them_from_the_next_one(precision) -> None:
    ours, plain = NoGradFirst(), Regression()
    for model in (ours, plain):
        trainer(plugin(precision)).fit(model, batches())
    assert_equal(ours, plain)
    assert not torch.equal(ours.layer.weight, NoGradFirst().layer.weight)


class Repeats(Regression):
    """Calls its layer many times in one step and counts the casts of the weight that autograd holds."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.repeats, self.held = repeats, 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        held: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.shape in ((1, 4), (4, 1)) and tensor.dtype is torch.bfloat16:
                held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            x, y = batch
            x = x.requires_grad_()
            loss = sum(nn.functional.mse_loss(self.layer(x).float(), y) for _ in range(self.repeats))
        self.held = len(held)
        return loss


def test_repeated_calls_share_one_cast_of_the_weight() -> None:
    held = []
    for repeats in (1, 20):
        model = Repeats(repeats)
        trainer(plugin("bf16")).fit(model, batches(1))
        held.append(model.held)
    assert held == [1, 1]


# --- Strategies ---------------------------------------------------------------------------------------


def test_fsdp_strategy_takes_the_plugin() -> None:
    strategy = FSDPStrategy()
    strategy.precision_plugin = MixedPrecision("bf16", reduce_dtype="fp32", device="cpu")
    config = strategy.mixed_precision_config
    assert (config.param_dtype, config.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_rule_is_dynamic_by_default_in_fp16() -> None:
    run = trainer(MixedPrecision("fp16"), limit_train_batches=1)
    run.fit(Regression(), batches())
    assert run.precision_plugin.scaler.rule == DynamicLossScale()
