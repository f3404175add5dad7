"""16-bit weights with FP32 masters under a real Trainer: checkpoints, and models as they are."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mp import MixedPrecision
from lightning_mp.callbacks.fp32_pin import FP32Pin
from lightning_mp.errors import SettingValueError, UnsupportedError
from tests.mastered import LR, MASTERS, Net, Save, assert_same_weights, fit, plugin
from tests.models import batches, trainer, weights


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_clip_val": 0.05}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}],
    ids=["plain", "clip-norm", "clip-value"],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_split_equals_copy_bit_for_bit_over_a_fit(settings: dict[str, Any], accumulate: int) -> None:
    copied, _ = fit("copy", accumulate_grad_batches=accumulate, **settings)
    split, _ = fit("split", accumulate_grad_batches=accumulate, **settings)
    assert_same_weights(split, copied)
    assert {torch.bfloat16, torch.float32} == split.dtypes  # norms are FP32


@pytest.mark.parametrize("mode", MASTERS)
def test_masters_follow_the_fp32_run_where_bf16_weights_stand_still(mode: str) -> None:
    # Oracle: Lightning's own bf16-mixed with FP32 weights. Gradients differ by BF16 rounding of the
    # weights (2**-9 relative), and Adam's step is lr * sign-like, so the moves agree within a few percent.
    reference, start = Net(), weights(Net())
    trainer(max_epochs=2, precision="bf16-mixed").fit(reference, batches())
    ours, _ = fit(mode)
    for left, right, first in zip(ours.parameters(), reference.parameters(), start, strict=True):
        moved, expected = left.detach() - first, right.detach() - first
        assert (moved - expected).norm() <= 0.1 * expected.norm() + 1e-12


@pytest.mark.parametrize("mode", MASTERS)
def test_fp16_trains_through_masters_with_a_loss_scale(mode: str) -> None:
    if mode == "split":
        with pytest.raises(SettingValueError, match=r"master_weights='split'.*FP16"):
            plugin("split", "fp16")
        return
    model, start = Net(), weights(Net())
    run = trainer(plugin(mode, "fp16", loss_scale=256.0), max_epochs=1, gradient_clip_val=0.5)
    run.fit(model, batches())
    assert run.precision_plugin.applied_steps == 8
    assert any(not torch.equal(param, before) for param, before in zip(model.parameters(), start, strict=True))
    assert torch.float16 in model.dtypes


def test_none_keeps_16_bit_weights_after_the_fit_and_warns_once() -> None:
    from lightning_mp.precision import masters

    masters._said_none = False
    with pytest.warns(UserWarning, match=r"master_weights='none': the optimizer updates BF16 weights directly"):
        model, _ = fit("none")
    fit("none")
    assert model.head.weight.dtype is torch.bfloat16
    assert {value.dtype for value in MixedPrecision("bf16").fp32_state_dict(model).values()} >= {torch.bfloat16}


# --- Checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*MASTERS, "none"])
@pytest.mark.filterwarnings("ignore:.*master_weights='none'.*")
@pytest.mark.filterwarnings("ignore:.*exists and is not empty.*")  # the plain run resumes there
def test_both_kinds_of_checkpoints_hold_fp32_and_load_into_plain_lightning(mode: str, tmp_path: Path) -> None:
    callbacks = [
        ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True, every_n_epochs=2),
        ModelCheckpoint(tmp_path, filename="full", every_n_train_steps=16),
    ]
    model, _ = fit(mode, callbacks=callbacks, enable_checkpointing=True)
    for name in ("weights", "full"):
        state = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert state.keys() == Net().state_dict().keys()
        loaded = Net.load_from_checkpoint(tmp_path / f"{name}.ckpt", weights_only=True)
        if mode != "none":
            assert_same_weights(loaded, model)
    plain = trainer(precision="32-true", max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
    plain.fit(Net(), batches(), ckpt_path=tmp_path / "full.ckpt")


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("mode", MASTERS)
def test_a_resumed_run_is_bit_identical_to_the_uninterrupted_one(mode: str, accumulate: int, tmp_path: Path) -> None:
    whole, _ = fit(mode, max_epochs=4, accumulate_grad_batches=accumulate)
    settings = {"accumulate_grad_batches": accumulate}
    fit(mode, max_epochs=2, callbacks=[Save(tmp_path / "half.ckpt")], **settings)
    resumed = Net()
    run = trainer(plugin(mode), max_epochs=4, accumulate_grad_batches=accumulate)
    run.fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert_same_weights(resumed, whole)
    assert {state["exp_avg"].dtype for state in run.optimizers[0].state.values()} == {torch.float32}


@pytest.mark.parametrize(("first", "second"), [("split", "copy"), ("copy", "split"), ("params", "split")])
def test_a_run_continues_in_another_mode(first: str, second: str, tmp_path: Path) -> None:
    fit(first, callbacks=[Save(tmp_path / "half.ckpt")])
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.state = copy.deepcopy(trainer.precision_plugin.fp32_state_dict(pl_module))

    start = Start()
    run = trainer(plugin(second), max_epochs=3, callbacks=[start])
    run.fit(Net(), batches(), ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(start.state[name], value) for name, value in saved.items())
    if first != "params":
        whole, _ = fit(second, max_epochs=3)
        assert_same_weights(run.lightning_module, whole)


@pytest.mark.parametrize("mode", MASTERS)
def test_evaluation_after_fit_and_a_second_fit_lose_nothing(mode: str, tmp_path: Path) -> None:
    model, run = fit(mode, callbacks=[Save(tmp_path / "best.ckpt")])
    exact = copy.deepcopy(model)
    run.validate(model, batches(), verbose=False)
    assert_same_weights(model, exact)
    run.test(model, batches(), ckpt_path=tmp_path / "best.ckpt", verbose=False)
    assert_same_weights(model, exact)
    run.predict(model, batches())
    assert_same_weights(model, exact)
    reference = copy.deepcopy(exact)
    run.fit_loop.max_epochs = 3
    run.fit(model, batches())
    assert not torch.equal(model.head.weight, reference.head.weight)
    assert {param.dtype for param in model.parameters()} == {torch.float32}


def test_learning_rate_finder_gives_the_masters_back(tmp_path: Path) -> None:
    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.state = copy.deepcopy(trainer.precision_plugin.fp32_state_dict(pl_module))

    start = Start()
    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    run = trainer(
        plugin("split"), callbacks=[finder, start], enable_checkpointing=True, default_root_dir=tmp_path, max_epochs=1
    )
    run.fit(Net(), batches())
    assert all(torch.equal(value, start.state[name]) for name, value in Net().state_dict().items())


@pytest.mark.parametrize("callback", [EMAWeightAveraging(decay=0.5), StochasticWeightAveraging(1e-2)])
def test_averaging_callbacks_are_refused_before_anything_is_cast(callback: Callback) -> None:
    model = Net()
    with pytest.raises(UnsupportedError, match=r"would average the BF16 weights of the module, not their FP32 masters"):
        trainer(plugin("split"), callbacks=[callback]).fit(model, batches())
    assert {param.dtype for param in model.parameters()} == {torch.float32}


# --- Models as they are ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MASTERS)
def test_backbone_finetuning_unfreezes_into_the_masters(mode: str) -> None:
    class Finetuned(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([param for param in self.parameters() if param.requires_grad], lr=LR)

    results = []
    for choice in (mode, "params"):
        model = Finetuned()
        callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0)
        run = trainer(plugin(choice), callbacks=[callback], max_epochs=3)
        run.fit(model, batches())
        results.append(model)
        assert len(run.optimizers[0].param_groups) == 2
    moved, expected = (model.backbone[0].weight.detach() - Net().backbone[0].weight.detach() for model in results)
    assert expected.norm() > 0
    assert (moved - expected).norm() <= 0.2 * expected.norm()
    assert torch.equal(results[0].frozen.weight, Net().frozen.weight)


@pytest.mark.parametrize("mode", MASTERS)
def test_a_model_built_in_configure_model_trains_through_masters(mode: str) -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.parts = {name: self._modules.pop(name) for name in ("head",)}

        def configure_model(self) -> None:
            if "head" not in self._modules:
                self.head = self.parts.pop("head")

    model, _ = fit(mode, Late())
    plain, _ = fit(mode)
    assert_same_weights(model.head, plain.head)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_arrives_in_half_trains_through_masters(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    reference = Net().to(dtype).float()  # what a user who reads the advice to call model.float() has
    reference.table = reference.table.to(dtype)
    fit("split", model)
    fit("split", reference)
    for (name, left), right in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_manual_optimization_with_toggled_optimizers_follows_fp32_weights() -> None:
    class Gan(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.g = nn.Linear(4, 4)
            self.d = nn.Linear(4, 1)
            self.stray: list[bool] = []

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.g.parameters(), LR), torch.optim.SGD(self.d.parameters(), 1e-3)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            x, _ = batch
            for index, optimizer in enumerate(self.optimizers()):
                self.toggle_optimizer(optimizer)
                loss = self.d(self.g(x)).float().square().mean() * (1 if index else -1)
                self.manual_backward(loss)
                self.stray.append(any(p.grad is not None for p in (self.d if index == 0 else self.g).parameters()))
                self.clip_gradients(optimizer, 0.5)
                optimizer.step()
                optimizer.zero_grad()
                self.untoggle_optimizer(optimizer)

    results = []
    for mode in ("copy", "split", "params"):
        model = Gan()
        trainer(plugin(mode), max_epochs=1).fit(model, batches())
        assert not any(model.stray)
        results.append(model)
    assert_same_weights(results[1], results[0])
    for left, right in zip(results[1].parameters(), results[2].parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("mode", MASTERS)
def test_a_weight_written_by_a_callback_is_not_undone(mode: str) -> None:
    class Zero(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            with torch.no_grad():
                pl_module.head.weight.zero_()

    model, _ = fit(mode, callbacks=[Zero()])
    assert not bool(model.head.weight.any())


@pytest.mark.filterwarnings("ignore:.*log_sparsity.*")
@pytest.mark.parametrize("mode", MASTERS)
def test_lightnings_pruning_prunes_the_masters(mode: str) -> None:
    pruning = ModelPruning("l1_unstructured", amount=0.5, use_global_unstructured=False)
    model, _ = fit(mode, callbacks=[pruning], max_epochs=3)
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    # Half of the elements, three times; what is left of 256 is 32.
    assert int((model.backbone[3].weight != 0).sum()) == 32


@pytest.mark.parametrize("mode", MASTERS)
def test_a_changing_number_of_accumulated_batches_keeps_split_and_copy_equal(mode: str) -> None:
    schedule = GradientAccumulationScheduler({0: 1, 1: 3})
    model, _ = fit(mode, callbacks=[schedule])
    other, _ = fit("copy", callbacks=[GradientAccumulationScheduler({0: 1, 1: 3})])
    assert_same_weights(model, other)


def test_an_exception_in_mid_run_gives_an_fp32_module_back() -> None:
    class Failing(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    model, run = Failing(), trainer(plugin("split"), max_epochs=1)
    with pytest.raises(ZeroDivisionError):
        run.fit(model, batches())
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert not torch.equal(model.head.weight, Net().head.weight)
    assert "step" not in {name for name in vars(run.optimizers[0]) if "master" in repr(vars(run.optimizers[0])[name])}


def test_a_skipped_step_changes_neither_weights_nor_masters() -> None:
    class Bad(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx in (0, 3, 4) else 1.0)

    for settings in ({}, {"fused": True}):
        results = []
        for mode in MASTERS:
            model = Bad(**settings)
            run = trainer(plugin(mode), max_epochs=1, gradient_clip_val=0.1)
            run.fit(model, batches())
            assert run.precision_plugin.applied_steps == 5
            assert all(bool(param.isfinite().all()) for param in model.parameters())
            results.append(model)
        assert_same_weights(results[1], results[0])


@pytest.mark.parametrize("mode", MASTERS)
def test_pinned_modules_keep_fp32_parameters_beside_masters(mode: str) -> None:
    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.dtypes = {name: param.dtype for name, param in pl_module.named_parameters()}

    look = Look()
    model, _ = fit(mode, callbacks=[FP32Pin(modules=["head"]), look])
    assert look.dtypes["head.weight"] is torch.float32
    assert look.dtypes["tied.weight"] is torch.bfloat16
    assert not torch.equal(model.head.weight, Net().head.weight)


def test_manifest_names_the_master_of_each_module() -> None:
    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.rows = {row.fqn: row for row in trainer.precision_plugin.manifest()}

    look = Look()
    fit("split", callbacks=[look])
    assert (look.rows["head"].master, look.rows["head"].param_dtype) == ("split", torch.bfloat16)
    assert (look.rows["backbone.1"].master, look.rows["backbone.1"].param_dtype) == ("params", torch.float32)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Loose(nn.Module):
    """Parameters of its own, in a list, complex, and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(8))
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.register_buffer("index", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.matrices[0] @ self.matrices[1]) * self.scale + self.phase.abs().sum()


class Adapted(nn.Module):
    """A frozen layer with a low-rank update, as LoRA has it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(8, 2))
        self.up = nn.Parameter(torch.zeros(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down @ self.up


def image() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def sequence() -> Tensor:
    return torch.randn(4, 5, 8)


def tokens() -> Tensor:
    return torch.randint(0, 10, (4, 5))


MODELS: dict[str, tuple[Any, Any]] = {
    "conv and batch norm": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), image),
    "transposed conv and group norm": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.GroupNorm(2, 4)), image),
    "channels last": (lambda: nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), image),
    "recurrent": (Recurrent, sequence),
    "attention": (Attention, sequence),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), sequence),
    "embedding and rms norm": (lambda: nn.Sequential(nn.Embedding(10, 8), nn.RMSNorm(8), nn.Linear(8, 8)), tokens),
    "embedding bag": (lambda: nn.EmbeddingBag(10, 8), tokens),
    "loose parameters": (Loose, sequence),
    "low-rank adapters": (Adapted, sequence),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), sequence),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), sequence),
    "spectral norm by hook": (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), sequence),
}


# torch 2.13 on a CPU: an RMS norm with FP32 weights and a BF16 input runs unfused, under plain autocast too.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_kind_train_and_split_equals_copy(name: str) -> None:
    build, sample = MODELS[name]

    class Wrapped(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = build()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.inner(batch).float().square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([param for param in self.parameters() if param.requires_grad], LR)

    torch.manual_seed(1)
    data = DataLoader([sample() for _ in range(3)], batch_size=None)
    models = {}
    for mode in ("start", *MASTERS):
        models[mode] = Wrapped()
        if mode != "start":
            trainer(plugin(mode), max_epochs=2).fit(models[mode], data)
    moved = 0
    for left, right, first in zip(*(models[mode].parameters() for mode in ("split", "copy", "start")), strict=True):
        assert left.dtype is right.dtype is first.dtype
        assert torch.equal(left, right)
        moved += int(not torch.equal(left, first))
    assert moved > 0
    assert all(
        torch.equal(left, right)
        for left, right in zip(models["split"].buffers(), models["copy"].buffers(), strict=True)
    )
