"""``MixedPrecision("fp8")`` under a real Trainer, through the emulated backend."""

import copy
import logging
import math
import sys
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader, TensorDataset

from lightning_mp import FP8Monitor, FP8UnavailableError, FP32Pin, MixedPrecision, OverflowMonitor, UnsupportedError
from lightning_mp.errors import SettingValueError
from lightning_mp.fp8 import FP8Config, FP8Linear
from lightning_mp.precision import notices
from tests.models import trainer, weights

WIDTH = 32
RECIPES = ["current", "delayed", "block"]


class Net(LightningModule):
    """Two eligible layers and a head; records what each forward saw."""

    def __init__(self, *, bad: tuple[int, ...] = (), lr: float = 1e-2) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.head = nn.Linear(WIDTH, 1)
        self.bad, self.lr = bad, lr
        self.seen_classes: set[str] = set()
        self.val_losses: list[float] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        self.seen_classes.add(type(self.body[0]).__name__)
        x, y = batch
        return nn.functional.mse_loss(self.head(self.body(x)).float(), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch) * (math.inf if batch_idx in self.bad else 1.0)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.val_losses.append(self.loss(batch).item())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def data(num: int = 40, batch_size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num, WIDTH, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :4].sum(1, keepdim=True)), batch_size=batch_size)


def plugin(recipe: Any = "current", *, master_weights: str = "params", **settings: Any) -> MixedPrecision:
    return MixedPrecision(
        "fp8", fp8={"recipe": recipe, "backend": "emulated", **settings}, master_weights=master_weights
    )


def fit(model: Net, precision: MixedPrecision, loader: Any = None, *, ckpt_path: Any = None, **settings: Any) -> Any:
    run = trainer(precision, **settings)
    run.fit(model, data() if loader is None else loader, ckpt_path=ckpt_path)
    return run


@pytest.mark.filterwarnings("ignore:master_weights='none'")  # said once per process
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("master_weights", ["params", "copy", "split", "none"])
def test_run_trains_in_fp8_and_leaves_an_ordinary_model(recipe, master_weights) -> None:
    model, precision = Net(), plugin(recipe, master_weights=master_weights)
    before = weights(model)
    fit(model, precision, max_epochs=2)
    assert model.seen_classes == {"FP8Linear"}
    assert precision.applied_steps == 10
    assert type(model.body[0]) is nn.Linear
    assert "_fp8" not in model.body[0].__dict__
    assert all(not torch.equal(a, b.to(a.dtype)) for a, b in zip(before, weights(model), strict=True))
    assert precision.precision == "transformer-engine"


@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_is_close_to_that_of_bf16(recipe) -> None:
    fp8, bf16 = Net(), Net()
    fit(fp8, plugin(recipe), max_epochs=12)
    fit(bf16, MixedPrecision("bf16"), max_epochs=12)
    for model in (fp8, bf16):
        trainer().validate(model, data(), verbose=False)
    start = Net()
    trainer().validate(start, data(), verbose=False)
    gained = [sum(start.val_losses) - sum(m.val_losses) for m in (fp8, bf16)]
    # What training gained, over the same batches; FP8's gradient noise of about 5% stays below 3% of it.
    assert gained[1] > 0.8 * sum(start.val_losses)
    assert gained[0] == pytest.approx(gained[1], rel=0.03)


def test_ragged_last_batch_trains_and_validates() -> None:
    model = Net()
    run = trainer(plugin(fp8_in_eval=True))
    run.fit(model, data(37), data(21))
    assert all(math.isfinite(loss) for loss in model.val_losses)


@pytest.mark.parametrize("in_eval", [False, True])
def test_validation_is_bf16_unless_asked_otherwise(in_eval) -> None:
    fp8, bf16 = Net(), Net()
    trainer(plugin(fp8_in_eval=in_eval)).validate(fp8, data(), verbose=False)
    trainer(MixedPrecision("bf16")).validate(bf16, data(), verbose=False)
    assert (fp8.val_losses == bf16.val_losses) is not in_eval


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("master_weights", ["params", "split"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_validation_in_fp8_changes_no_bit_of_training(recipe, master_weights, accumulate) -> None:
    runs = []
    for limit in (0, 2):
        model, precision = Net(lr=0.03), plugin(recipe, master_weights=master_weights, fp8_in_eval=True)
        # The sanity check comes before the first step; with accumulation validation runs inside steps too.
        settings = {"max_epochs": 2, "limit_val_batches": limit, "val_check_interval": 1}
        trainer(precision, accumulate_grad_batches=accumulate, **settings).fit(model, data(), data(16))
        assert bool(model.val_losses) is bool(limit)
        runs.append((weights(model), precision.state_dict()["lightning_mp"]["fp8"]["delayed"]))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


@pytest.mark.parametrize("master_weights", ["params", "split"])
def test_weights_are_cast_once_per_optimizer_step_under_accumulation(master_weights) -> None:
    class Counting(Net):
        def on_train_end(self) -> None:
            self.casts = [m._fp8.weight_casts for m in self.body if isinstance(m, FP8Linear)]

    model, precision = Counting(), plugin(master_weights=master_weights)
    run = trainer(precision, accumulate_grad_batches=2, max_epochs=2, num_sanity_val_steps=0)
    run.fit(model, data(48), data(16))
    assert precision.applied_steps == 6
    assert model.casts == [6, 6]


def test_exact_masters_feed_the_cast_rather_than_their_rounded_values() -> None:
    losses = {}
    for master_weights in ("copy", "split"):

        class Recording(Net):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                backend = self.body[0]._fp8
                loss = super().training_step(batch, batch_idx)
                cast = backend._cached.quantized.rowwise.data.float()
                exact = backend.settings.step.weight_source(self.body[0].weight)
                scale = torch.tensor(448.0) / exact.abs().max()
                assert torch.equal(cast, (exact * scale).to(torch.float8_e4m3fn).float())
                self.seen.append(not torch.equal(exact, self.body[0].weight.float()))
                return loss

        model = Recording()
        model.seen = []
        fit(model, plugin(master_weights=master_weights))
        assert any(model.seen)
        losses[master_weights] = weights(model)
    # One published rounding and one exact FP32 value: both modes are the same run.
    assert all(torch.equal(a, b) for a, b in zip(losses["copy"], losses["split"], strict=True))


@pytest.mark.filterwarnings("ignore:master_weights='none'")  # said once per process
@pytest.mark.parametrize("master_weights", ["params", "none"])
def test_weights_without_masters_are_cast_without_a_copy_of_them(master_weights) -> None:
    class Recording(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.seen.append(self.body[0]._fp8.settings.step.weight_source is None)
            return super().training_step(batch, batch_idx)

    model = Recording()
    model.seen = []
    fit(model, plugin(master_weights=master_weights))
    assert model.seen
    assert all(model.seen)


def test_skipped_step_changes_no_weight_and_is_counted() -> None:
    model, precision = Net(bad=(2,)), plugin("delayed")
    fit(model, precision)
    assert (precision.applied_steps, precision.skipped_steps) == (4, 1)
    assert all(torch.isfinite(p).all() for p in model.parameters())


class Spoiled(Net):
    """An Inf enters the second FP8 layer at one micro-batch: by its input, its weight, or its output's gradient."""

    def __init__(self, operand: str, at: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.operand, self.at, self.states = operand, at, []
        self.body[0].bias = self.body[2].bias = None  # the gradient of a bias shows an Inf by itself

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.states.append(weights(self))
        is_now, (x, y) = batch_idx == self.at, batch
        hidden = self.body[1](self.body[0](x))
        if is_now and self.operand == "input":
            hidden = hidden.index_fill(1, torch.tensor(7), math.inf)
        out = self.body[2](hidden)
        if is_now and self.operand == "grad":
            out.register_hook(lambda grad: grad.index_fill(1, torch.tensor(7), math.inf))
        return nn.functional.mse_loss(self.head(out).float(), y)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at and self.operand == "weight":
            self.body[2].weight.data[7, 7] = math.inf

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("operand", ["input", "weight", "grad"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_infinity_that_the_cast_would_saturate_skips_the_step(recipe, operand, accumulate) -> None:
    model, precision = Spoiled(operand, at=2), plugin(recipe)
    fit(model, precision, max_steps=4 // accumulate, accumulate_grad_batches=accumulate)
    # Micro-batch 2 belongs to step 2, or 1 under accumulation; a weight that is Inf stays so.
    skips = {1: 2 if operand == "weight" else 1, 2: 1}[accumulate]
    assert (precision.applied_steps, precision.skipped_steps) == (4 // accumulate - skips, skips)
    # What micro-batch 3 sees is what micro-batch 2 saw.
    before, after = model.states[2], model.states[3]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(w).all() for w in weights(model)) is (operand != "weight")


@pytest.mark.parametrize(("operand", "phase"), [("weight", "forward"), ("grad", "backward"), ("batch", "batch")])
def test_monitor_names_where_the_infinity_came_in(operand, phase, tmp_path) -> None:
    model, monitor = Spoiled(operand, at=1), OverflowMonitor(on_overflow="log", dirpath=tmp_path)
    loader = data()
    if operand == "batch":
        loader.dataset.tensors[0][12, 3] = math.inf
    fit(model, plugin(), loader=loader, callbacks=[monitor], max_steps=2)
    assert [(event.step, event.phase, event.fqn) for event in monitor.events] == [
        (1, phase, "0" if operand == "batch" else "body.2")
    ]


def test_delayed_history_has_one_entry_per_step() -> None:
    precision = plugin({"name": "delayed", "amax_history_len": 8})
    fit(Net(), precision, accumulate_grad_batches=2, max_epochs=1, loader=data(48))
    history = precision.state_dict()["lightning_mp"]["fp8"]["delayed"]["body.0"]["amax_history"]
    assert [bool(row.all()) for row in history] == [False] * 5 + [True] * 3


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("master_weights", ["params", "split"])
def test_resumed_run_continues_bit_for_bit(recipe, master_weights, tmp_path) -> None:
    def precision() -> MixedPrecision:
        return plugin(recipe, master_weights=master_weights)

    straight, resumed = Net(), Net()
    fit(straight, precision(), max_epochs=4)
    fit(Net(), precision(), max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(Net().state_dict())
    fit(resumed, precision(), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))


@pytest.mark.parametrize(("before", "after"), [("fp8", "bf16"), ("bf16", "fp8"), ("fp8", "fp32"), ("fp32", "fp8")])
def test_precision_can_change_on_resume(before, after, tmp_path, caplog) -> None:
    def of(name: str) -> MixedPrecision:
        return plugin("delayed") if name == "fp8" else MixedPrecision(name)

    fit(Net(), of(before)).save_checkpoint(tmp_path / "one.ckpt")
    model, precision = Net(), of(after)
    with caplog.at_level(logging.INFO):
        fit(model, precision, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert precision.applied_steps == 10
    notices = [r.getMessage() for r in caplog.records if "resuming" in r.getMessage()]
    assert len(notices) == 1
    assert repr(before) in notices[0]


def test_recipe_can_change_on_resume_with_one_notice(tmp_path, caplog) -> None:
    fit(Net(), plugin("delayed")).save_checkpoint(tmp_path / "one.ckpt")
    with caplog.at_level(logging.INFO):
        fit(Net(), plugin("current"), max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    notices = [r.getMessage() for r in caplog.records if "resuming" in r.getMessage()]
    assert notices == ["lightning_mp: resuming: the FP8 recipe was 'delayed' and is 'current'."]


def test_second_trainer_trains_on_with_the_same_plugin() -> None:
    model, precision = Net(), plugin("delayed")
    fit(model, precision)
    fit(model, precision)
    assert precision.applied_steps == 5
    assert type(model.body[0]) is nn.Linear


@pytest.mark.parametrize("recipe", RECIPES)
def test_copy_taken_during_fit_stays_out_of_fp8_there_and_afterwards(recipe) -> None:
    class Distilled(Net):
        def on_train_start(self) -> None:
            self.target = copy.deepcopy(self.body)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            plain = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
            plain.load_state_dict(self.target.state_dict())
            self.same.append(torch.equal(self.target(batch[0]), plain(batch[0])))
            self.rows = {row.fqn: row for row in self.trainer.precision_plugin.manifest()}
            return super().training_step(batch, batch_idx)

    model = Distilled()
    model.same = []
    precision = plugin(recipe, fp8_in_eval=True)
    fit(model, precision)
    assert model.same == [True] * 5
    assert [type(m) for m in model.target] == [nn.Linear, nn.GELU, nn.Linear]
    row = model.rows["target.0"]
    assert (row.fp8, row.compute_dtype, model.rows["body.0"].fp8) == (False, torch.bfloat16, True)
    assert "target.0" not in precision.fp8_engine.weight_casts


def test_another_model_under_the_same_plugin_trains_as_under_a_new_one() -> None:
    results = []
    for precision in (plugin("delayed"), plugin("delayed")):
        if not results:
            monitor = FP8Monitor(every_n_steps=1, demote=True, max_flushed=0.0, patience=1, plot=False)
            fit(Net(lr=0.1), precision, callbacks=[monitor])
            assert precision.fp8_engine.state_dict()["demoted"]
        model = Net()
        fit(model, precision)
        state = precision.state_dict()["lightning_mp"]["fp8"]
        assert state["demoted"] == {}
        results.append((weights(model), state["delayed"]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_exception_in_the_middle_leaves_an_ordinary_model() -> None:
    class Failing(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise ValueError("stop")
            return super().training_step(batch, batch_idx)

    model = Failing()
    with pytest.raises(ValueError, match="stop"):
        fit(model, plugin("delayed"))
    assert [type(m) for m in model.body] == [nn.Linear, nn.GELU, nn.Linear]


def test_coverage_is_in_the_log_and_in_the_manifest(caplog) -> None:
    rows = []

    class Reading(Net):
        def on_train_start(self) -> None:
            rows.extend(self.trainer.precision_plugin.manifest())

    with caplog.at_level(logging.INFO):
        fit(Reading(), plugin(exclude=["body.2"]))
    assert "1 of 3 Linear layers, 49.6% of GEMM FLOPs, in FP8" in caplog.text
    found = {row.fqn: (row.fp8, row.reason) for row in rows}
    assert found["body.0"] == (True, "FP8")
    assert found["body.2"] == (False, "excluded")
    assert found["head"][0] is False


def test_manifest_after_fit_still_tells_what_ran_in_fp8() -> None:
    precision = plugin(exclude=["body.2"])
    fit(Net(), precision)
    found = {row.fqn: (row.fp8, row.reason, row.param_dtype) for row in precision.manifest()}
    assert found["body.0"] == (True, "FP8 in the last run; an ordinary layer now", torch.float32)
    assert found["body.2"] == (False, "excluded", torch.float32)
    assert found["head"][0] is False
    refused = plugin(exclude=["body"])
    with pytest.raises(UnsupportedError, match="none of the 3"):
        fit(Net(), refused)
    assert not any(row.fp8 for row in refused.manifest())


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")  # Lightning says so, rightly
def test_layer_that_the_user_put_in_evaluation_mode_is_said_to_run_in_bf16(caplog) -> None:
    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body[0].eval()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.rows = {row.fqn: row.reason for row in self.trainer.precision_plugin.manifest()}
            loss = super().training_step(batch, batch_idx)
            self.casts = self.trainer.precision_plugin.fp8_engine.weight_casts
            return loss

    model = Frozen()
    with caplog.at_level(logging.INFO):
        fit(model, plugin())
    said = "in evaluation mode, which runs in BF16 (fp8_in_eval=False)"
    assert f"in FP8. Now {said}: 1." in caplog.text
    assert model.rows["body.0"] == f"FP8 once in training mode; now {said}"
    assert model.rows["body.2"] == "FP8"
    assert model.casts == {"body.0": 0, "body.2": 5}
    model, precision = Frozen(), plugin(fp8_in_eval=True)
    fit(model, precision)
    assert model.rows["body.0"] == "FP8"
    assert model.casts["body.0"] == 5


def test_lazy_layer_stands_in_the_manifest(caplog) -> None:
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body[2] = nn.LazyLinear(WIDTH)

        def on_train_start(self) -> None:
            self.rows = {row.fqn: row for row in self.trainer.precision_plugin.manifest()}

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.body[0].parameters(), lr=self.lr)

    model = Lazy()
    fit(model, plugin(), max_steps=1)
    row = model.rows["body.2"]
    assert (row.fp8, row.num_params, row.reason[:12]) == (False, 0, "a LazyLinear")


def test_model_built_in_configure_model_is_converted() -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.body

        def configure_model(self) -> None:
            if not hasattr(self, "body"):
                self.body = nn.Sequential(nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH))

    model = Late()
    fit(model, plugin())
    assert model.seen_classes == {"FP8Linear"}


def test_missing_gpu_is_told_before_the_model_is_built() -> None:
    class Late(Net):
        def configure_model(self) -> None:
            raise AssertionError("model work began")

    if torch.cuda.is_available():
        pytest.skip("this machine may run FP8")
    with pytest.raises(FP8UnavailableError, match=r"(?s)precision='fp8'.*FP8 needs an NVIDIA GPU.*emulated"):
        fit(Late(), MixedPrecision("fp8"))


def test_model_without_eligible_layers_is_refused_with_the_reasons() -> None:
    with pytest.raises(UnsupportedError, match=r"body.0: excluded; .*head: out_features=1 is not a multiple of 16"):
        fit(Net(), plugin(exclude=["body"]))


def test_compiled_module_is_refused_with_delayed_scaling_and_runs_with_current() -> None:
    torch._dynamo.reset()
    with pytest.raises(UnsupportedError, match="recipe='current'"):
        fit(torch.compile(Net(), backend="eager"), plugin("delayed"))
    model = Net()
    fit(torch.compile(model, backend="aot_eager"), plugin("current"))
    assert model.seen_classes == {"FP8Linear"}


class Grows(Net):
    """Gets a layer in front of those in FP8 in its second step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.body.insert(0, nn.Linear(WIDTH, WIDTH))
            self.trainer.optimizers[0].add_param_group({"params": self.body[0].parameters()})


def test_layers_are_called_by_the_names_that_they_have_now() -> None:
    model, precision = Grows(), plugin("delayed")
    seen = []
    model.on_train_end = lambda: seen.append((precision.manifest(), precision.fp8_engine.state_dict()["delayed"]))
    fit(model, precision)
    for rows in (seen[0][0], precision.manifest()):
        assert {row.fqn: row.fp8 for row in rows} == {"body.0": False, "body.1": True, "body.3": True, "head": False}
    assert list(seen[0][1]) == ["body.1", "body.3"]


def test_names_are_those_without_wrappers() -> None:
    # A history saved under the name of a wrapper would be lost to a run without it.
    model, precision = Net(), plugin("delayed")
    model.body[2] = checkpoint_wrapper(model.body[2])
    seen = []
    model.on_train_end = lambda: seen.extend([precision.manifest(), precision.fp8_engine.state_dict()["delayed"]])
    fit(model, precision)
    assert [row.fqn for row in seen[0] if row.fp8] == ["body.0", "body.2._checkpoint_wrapped_module"]
    assert [row.fqn for row in precision.manifest() if row.fp8] == ["body.0", "body.2._checkpoint_wrapped_module"]
    assert list(seen[1]) == ["body.0", "body.2"]


def test_evaluation_with_delayed_scales_that_learned_nothing_is_said_once(tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(notices, "_said", set())
    said = "no amax history was loaded, so that all scales are 1"
    model, precision = Net(), plugin("delayed", fp8_in_eval=True)
    with caplog.at_level(logging.INFO):
        run = trainer(precision, num_sanity_val_steps=2)
        run.fit(model, data(), data(16))
        run.validate(model, data(16), verbose=False)
        for weights_only in (False, True):
            run.save_checkpoint(tmp_path / f"{weights_only}.ckpt", weights_only=weights_only)
        full, weights_alone = (trainer(plugin("delayed", fp8_in_eval=True)) for _ in range(2))
        full.validate(Net(), data(16), ckpt_path=tmp_path / "False.ckpt", verbose=False)
        trainer(plugin("delayed")).validate(Net(), data(16), ckpt_path=tmp_path / "True.ckpt", verbose=False)
        trainer(plugin("current", fp8_in_eval=True)).validate(Net(), data(16), verbose=False)
        assert said not in caplog.text
        weights_alone.validate(Net(), data(16), ckpt_path=tmp_path / "True.ckpt", verbose=False)
    assert caplog.text.count(said) == 1


class GradientPenalty(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(WIDTH, WIDTH)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = self.generator(batch[0])
        points = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.body(points).float().sum(), points, create_graph=True)
        return slope.float().square().sum() + self.body(x).float().mean()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11; before, the hint is logged")
def test_second_derivative_is_led_to_excluding_the_layers() -> None:
    with pytest.raises(RuntimeError, match="twice") as caught:
        fit(GradientPenalty(), plugin(skip_output_head=False))
    assert "fp8={'exclude': ('critic.*',)}" in " ".join(caught.value.__notes__)
    fit(GradientPenalty(), plugin(skip_output_head=False, exclude=["body.*"]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:`torch.jit.script` is deprecated")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11; before, the hint is logged")
@pytest.mark.parametrize(
    ("use", "cause"),
    [
        (lambda net, x: torch.vmap(net)(x), "torch.func"),
        (lambda net, x: torch.func.grad(lambda x: net(x).float().sum())(x), "torch.func"),
        (lambda net, x: torch.func.jvp(net, (x,), (x,))[0], "torch.func"),
        (lambda net, x: net(torch.nested.as_nested_tensor([x[:1], x[1:]], layout=torch.jagged)).values(), "dense"),
        (lambda net, x: net(x.to_sparse()), "dense"),
    ],
    ids=["vmap", "grad", "jvp", "jagged", "sparse"],
)
def test_what_no_fp8_layer_can_do_is_led_to_excluding_the_layers(use, cause) -> None:
    class Uses(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return use(self.body, batch[0]).float().square().mean() + self.head(batch[0]).float().mean()

    with pytest.raises(RuntimeError) as caught:
        fit(Uses(), plugin(skip_output_head=False))
    (note,) = caught.value.__notes__
    assert cause in note
    assert "fp8={'exclude': ('critic.*',)}" in note


class Compiled(Net):
    """A body that is compiled or not, weights that are written in mid-training, and validation."""

    def __init__(self, backend: Any = None, *, fullgraph: bool = False) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.run_body = (
            self.body.forward if backend is None else torch.compile(self.body, backend=backend, fullgraph=fullgraph)
        )

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.head(self.run_body(batch[0])).float(), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.losses.append(self.loss(batch))
        return self.losses[-1]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            with torch.no_grad():
                self.body[0].weight[0] = 0.25
            self.body[2].weight.data.mul_(2)


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:master_weights='none'")  # said once per process
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("recipe", ["current", "block"])
@pytest.mark.parametrize("master_weights", ["params", "copy", "split", "none"])
def test_compiled_layers_cast_the_values_that_eager_ones_cast(recipe, master_weights) -> None:
    # A cast of the 16-bit weight instead of its FP32 master moves about 1% of the FP8 values.
    runs = []
    for backend in (None, "aot_eager"):
        model = Compiled(backend, fullgraph=True)
        run = trainer(plugin(recipe, master_weights=master_weights, fp8_in_eval=True), max_epochs=2)
        run.fit(model, data(), data(16))
        runs.append([*model.losses, *map(torch.tensor, model.val_losses), *weights(model)])
    assert all(map(torch.equal, *runs))


# The compiler looks for gradients everywhere and hides what torch says to that (2.13), but not from an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
# Of the append of this test, where torch (2.11) breaks the graph.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("master_weights", ["copy", "split"])
@pytest.mark.parametrize("compiles", ["body", "module"])
def test_compiled_layers_accumulate_beside_masters(master_weights, compiles) -> None:
    # The ragged batch is compiled while FP32 gradients hang on 16-bit parameters; torch 2.13 leaves that to eager code.
    runs = []
    for backend in (None, "aot_eager"):
        model = Compiled(backend if compiles == "body" else None)
        given = torch.compile(model, backend=backend) if compiles == "module" and backend else model
        run = trainer(plugin(master_weights=master_weights), accumulate_grad_batches=3, max_epochs=2)
        run.fit(given, data(37))
        runs.append([*model.losses, *weights(model)])
    assert len(runs[0]) == len(runs[1])
    assert all(map(torch.equal, *runs))


def test_settings_are_parsed_when_the_plugin_is_made() -> None:
    assert MixedPrecision("fp8", fp8={"backend": "emulated"}).policy.fp8 == FP8Config(backend="emulated")
    assert MixedPrecision("fp8", fp8=FP8Config(recipe="block")).policy.fp8.recipe == "block"
    assert MixedPrecision("fp8").policy.fp8 == FP8Config()
    with pytest.raises(SettingValueError, match="Did you mean 'recipe'"):
        MixedPrecision("fp8", fp8={"recip": "current"})
    with pytest.raises(SettingValueError, match="'mxfp8' is set beside backend='emulated'"):
        MixedPrecision("fp8", fp8={"recipe": "mxfp8", "backend": "emulated"})


@pytest.mark.filterwarnings("ignore")  # Lightning 2.6 uses parts of jsonargparse that newer ones deprecate
def test_yaml_sets_the_plugin_and_the_monitor(tmp_path, monkeypatch) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr(sys, "argv", ["run"])
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "run.yaml").write_text("""
trainer:
  accelerator: cpu
  logger: false
  plugins:
    - class_path: lightning_mp.MixedPrecision
      init_args:
        precision: fp8
        fp8: {recipe: {name: delayed, amax_history_len: 16}, backend: emulated, exclude: [body.2]}
  callbacks:
    - class_path: lightning_mp.FP8Monitor
      init_args: {every_n_steps: 5, demote: true}
""")
    args = ["--config", str(tmp_path / "run.yaml")]
    cli = LightningCLI(Net, run=False, args=args, save_config_callback=None, seed_everything_default=0)
    recipe = {"name": "delayed", "amax_history_len": 16}
    expected = FP8Config(recipe=recipe, backend="emulated", exclude=("body.2",))
    assert cli.trainer.precision_plugin.policy.fp8 == expected


def test_pinned_layer_stays_in_fp32() -> None:
    reasons = {}

    class Reading(Net):
        def on_train_start(self) -> None:
            reasons.update({row.fqn: row.reason for row in self.trainer.precision_plugin.manifest()})

    model = Reading()
    precision = plugin()
    fit(model, precision, callbacks=[FP32Pin(modules=["body.0"])])
    assert "pinned" not in next(row.reason for row in precision.manifest() if row.fqn == "body.0")
    assert reasons["body.0"] == "pinned to FP32"
    assert reasons["body.2"] == "FP8"
    assert [type(m) for m in model.body] == [nn.Linear, nn.GELU, nn.Linear]


def test_manifest_names_the_class_that_the_user_built() -> None:
    classes = {}

    class Reading(Net):
        def on_train_start(self) -> None:
            classes.update({row.fqn: (row.module_class, row.fp8) for row in self.trainer.precision_plugin.manifest()})

    fit(Reading(), plugin())
    assert classes == {"body.0": ("Linear", True), "body.2": ("Linear", True), "head": ("Linear", False)}


class InputSpikes(Net):
    """The input of one batch is huge, and its loss infinite."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return super().training_step([x * 1e4, y] if batch_idx in self.bad else batch, batch_idx)

    def configure_optimizers(self) -> Any:
        # It skips on the device: the replay comes in the next step.
        return torch.optim.AdamW(self.parameters(), lr=self.lr, fused=True)


def test_replay_of_a_bad_batch_leaves_amax_history_and_statistics_as_they_were(tmp_path) -> None:
    states = []
    for callbacks in ([], [OverflowMonitor(on_overflow="log", dirpath=tmp_path)]):
        model, precision = InputSpikes(bad=(1,)), plugin("delayed")
        fit(model, precision, callbacks=callbacks)
        states.append((precision.state_dict()["lightning_mp"]["fp8"]["delayed"], weights(model)))
    (plain_fp8, plain_weights), (watched_fp8, watched_weights) = states
    assert callbacks[0].events[0].phase == "loss"
    torch.testing.assert_close(plain_fp8, watched_fp8, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(plain_weights, watched_weights, strict=True))
