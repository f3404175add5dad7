"""Manual optimization under a loss scale: each gradient is unscaled once, the scale moves once a batch."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from lightning_mp import DynamicLossScale, MixedPrecision, UnsupportedError
from tests.models import INF, batches, batches_without, trainer, weights

# FP16 rounds what flows between the two layers to 11 bits; a scale that is a power of two adds nothing.
FP16 = {"rtol": 2**-8, "atol": 2e-4}


class Two(LightningModule):
    """Two linear layers, an optimizer for each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1)
        self.seen = 0

    def loss(self, batch, layers=None):
        x, y = batch
        return nn.functional.mse_loss(self.b(self.a(x)).float(), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.a.parameters(), 0.05), torch.optim.SGD(self.b.parameters(), 0.05)


def fit_both(make, data=None, **settings):
    """Train the same model with our plugin in FP16 and with Lightning in FP32; return both and the plugin."""
    plugin = MixedPrecision("fp16", loss_scale=settings.pop("loss_scale", 1024.0))
    ours, reference = make(), make()
    trainer(plugin, **settings).fit(ours, data or batches())
    trainer(**settings).fit(reference, data or batches())
    return ours, reference, plugin


def assert_same_weights(ours, reference, **tolerance):
    for p, q in zip(weights(ours), weights(reference), strict=True):
        torch.testing.assert_close(p, q, **(tolerance or FP16))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_manual_clipping_sees_real_gradients(algorithm):
    class Clips(Two):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, 0.05, algorithm)
            optimizer.step()

    ours, reference, plugin = fit_both(Clips)
    assert_same_weights(ours, reference)
    assert plugin.applied_steps == 8


def test_overflow_of_one_optimizer_leaves_the_other_exact_and_moves_the_scale_once():
    class BothThenBoth(Two):
        """Both backwards, then both steps; the loss of ``a`` overflows in batch 1."""

        def training_step(self, batch, batch_idx):
            opt_a, opt_b = self.optimizers()
            bad = batch_idx == 1
            opt_a.zero_grad()
            opt_b.zero_grad()
            self.toggle_optimizer(opt_a)
            self.manual_backward(self.loss(batch) * (INF if bad and self.injects else 1.0))
            self.untoggle_optimizer(opt_a)
            self.toggle_optimizer(opt_b)
            self.manual_backward(self.loss(batch))
            self.untoggle_optimizer(opt_b)
            if not bad or self.injects:
                opt_a.step()
            opt_b.step()

    scales = []
    plugin = MixedPrecision("fp16", loss_scale=DynamicLossScale(init_scale=1024.0))
    plugin.add_step_listener(lambda r: scales.append(r.loss_scale))
    ours, reference = BothThenBoth(), BothThenBoth()
    ours.injects, reference.injects = True, False
    trainer(plugin).fit(ours, batches(4))
    trainer().fit(reference, batches(4))
    assert_same_weights(ours, reference)
    assert scales == [1024.0] * 4 + [512.0] * 4
    assert plugin.skipped_steps == 1


def test_optimizer_that_steps_every_other_batch_keeps_its_gradients_through_a_change_of_scale():
    class Slow(Two):
        """``b`` accumulates over two batches; ``a`` steps in each and makes the scale grow every batch."""

        def training_step(self, batch, batch_idx):
            opt_a, opt_b = self.optimizers()
            self.manual_backward(self.loss(batch))
            opt_a.step()
            opt_a.zero_grad()
            if batch_idx % 2:
                opt_b.step()
                opt_b.zero_grad()

    scale = DynamicLossScale(init_scale=16.0, growth_interval=1)
    ours, reference, plugin = fit_both(Slow, loss_scale=scale)
    assert plugin.scaler.get_scale() == 16.0 * 2**8
    assert_same_weights(ours, reference)


def test_parameters_shared_by_two_optimizers_are_unscaled_once():
    class Shared(Two):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.02), torch.optim.SGD(self.a.parameters(), 0.02)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            first.zero_grad()
            self.manual_backward(self.loss(batch))
            first.step()
            second.step()

    ours, reference, _ = fit_both(Shared)
    assert_same_weights(ours, reference)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_left_from_an_earlier_backward_add_up_as_in_fp32(set_to_none):
    class Leaves(Two):
        """Steps after each backward but clears the gradients every other batch only."""

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            if batch_idx % 2 == 0:
                optimizer.zero_grad(set_to_none=set_to_none)
            self.manual_backward(self.loss(batch))
            optimizer.step()

    ours, reference, _ = fit_both(Leaves)
    assert_same_weights(ours, reference)


def test_two_steps_after_one_backward_both_apply_it():
    class Twice(Two):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            optimizer.step()

    ours, reference, plugin = fit_both(Twice)
    assert_same_weights(ours, reference)
    assert plugin.applied_steps == 16


def test_user_can_unscale_before_reading_gradients():
    norms = []

    class Reads(Two):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.trainer.precision_plugin.unscale_gradients(optimizer)
            norms.append(self.b.weight.grad.norm().item())
            optimizer.step()

    ours, reference, _ = fit_both(Reads)
    assert_same_weights(ours, reference)
    assert norms[:8] == pytest.approx(norms[8:], rel=2**-7)


def test_backward_outside_manual_backward_is_refused_in_fp16():
    class Direct(Two):
        def training_step(self, batch, batch_idx):
            first, _ = self.optimizers()
            first.zero_grad()
            self.loss(batch).backward()
            first.step()

    with pytest.raises(UnsupportedError, match=r"self\.manual_backward\(loss\) rather than loss\.backward\(\)"):
        trainer(MixedPrecision("fp16")).fit(Direct(), batches())
    trainer(MixedPrecision("bf16")).fit(Direct(), batches())


def test_direct_backward_is_refused_before_clipping_too():
    class Direct(Two):
        def training_step(self, batch, batch_idx):
            first, _ = self.optimizers()
            first.zero_grad()
            self.loss(batch).backward()
            self.clip_gradients(first, 0.5, "norm")

    with pytest.raises(UnsupportedError, match="manual_backward"):
        trainer(MixedPrecision("fp16")).fit(Direct(), batches())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_value_clipping_cannot_hide_an_infinite_gradient(precision):
    class Clips(Two):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch) * (INF if batch_idx == 1 else 1.0))
            self.clip_gradients(optimizer, 0.5, "value")
            optimizer.step()

    plugin = MixedPrecision(precision)
    model = Clips()
    trainer(plugin).fit(model, batches(3))
    assert plugin.skipped_steps == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_step_without_gradients_is_no_attempt():
    class Empty(Two):
        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            first.zero_grad()
            second.zero_grad()
            if batch_idx % 2:
                self.manual_backward(self.loss(batch))
            first.step()
            second.step()

    ours, reference, plugin = fit_both(Empty)
    assert_same_weights(ours, reference)
    assert (plugin.applied_steps, plugin.skipped_steps) == (8, 0)


@pytest.mark.parametrize("fused", [False, True])
def test_scheduler_stepped_by_hand_is_held_within_training_step_only(fused):
    class Scheduled(Two):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), 0.1, fused=fused)
            return [optimizer], [lr_scheduler.StepLR(optimizer, 1, 0.5), lr_scheduler.StepLR(optimizer, 1, 0.5)]

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch) * (INF if batch_idx in (1, 3) else 1.0))
            optimizer.step()
            self.lr_schedulers()[0].step()

        def on_train_epoch_end(self):
            self.lr_schedulers()[1].step()

    run = trainer(MixedPrecision("bf16"))
    run.fit(Scheduled(), batches(4))
    assert [c.scheduler.last_epoch for c in run.lr_scheduler_configs] == [2, 1]


def test_forward_after_a_step_sees_the_new_weights_within_one_training_step():
    outputs = []

    class Rereads(Two):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1.0)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            optimizer.step()
            outputs.append((loss.item(), self.loss(batch).item()))

    trainer(MixedPrecision("bf16"), max_steps=1).fit(Rereads(), batches())
    assert outputs[0][0] != outputs[0][1]


def test_gradient_accumulation_by_hand_equals_fp32():
    class Accumulates(Two):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.02)

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch) / 4)
            if batch_idx % 4 == 3:
                optimizer = self.optimizers()
                self.clip_gradients(optimizer, 0.1, "norm")
                optimizer.step()
                optimizer.zero_grad()

    ours, reference, _ = fit_both(Accumulates, loss_scale={"init_scale": 256.0, "growth_interval": 1})
    assert_same_weights(ours, reference)


class ForgetsOnce(Two):
    """A backward of its own beside one through ``manual_backward``: for the other optimizer, or for the same."""

    def __init__(self, order, *, shares):
        super().__init__()
        self.order, self.shares = order, shares

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        x, _ = batch
        losses = [self.a(x).float().pow(2).mean(), (self.a if self.shares else self.b)(x).float().mean()]
        for index in self.order:
            if index == 0:
                self.manual_backward(losses[0])
            else:
                losses[1].backward()
        first.step()
        second.step()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("shares", [False, True])
def test_one_forgotten_manual_backward_among_others_is_refused(order, shares):
    with pytest.raises(UnsupportedError, match=r"Call self\.manual_backward\(loss\) rather than loss\.backward\(\)"):
        trainer(MixedPrecision("fp16", loss_scale=1024.0)).fit(ForgetsOnce(order, shares=shares), batches())


def test_backward_whose_gradients_are_cleared_before_the_scaled_one_is_allowed():
    class Adversarial(Two):
        """Perturbs its input by the sign of a gradient that it takes by itself."""

        def training_step(self, batch, batch_idx):
            x, y = batch
            x = x.clone().requires_grad_()
            self.loss((x, y)).backward()
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(self.loss(((x + 0.125 * x.grad.sign()).detach(), y)))
            for optimizer in self.optimizers():
                optimizer.step()

    ours, reference, plugin = fit_both(Adversarial)
    assert plugin.applied_steps == 16
    assert_same_weights(ours, reference)


def test_no_hook_is_left_on_parameters():
    model = ForgetsOnce((0,), shares=False)
    trainer(MixedPrecision("fp16", loss_scale=8.0)).fit(model, batches(2))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


class Raw(Two):
    """Steps an optimizer past the plugin."""

    def __init__(self, width=4):
        super().__init__()
        self.a = nn.Linear(width, width)
        self.head = nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.manual_backward(self.head(self.a(batch[0])).float().mean())
        optimizer.step()
        optimizer.zero_grad()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
@pytest.mark.parametrize("masters", ["params", "copy"])
def test_step_past_the_plugin_is_refused_where_it_would_use_scaled_gradients_or_old_scales(precision, masters):
    width = 16 if precision == "fp8" else 4
    plugin = MixedPrecision(
        precision, master_weights=masters, fp8={"backend": "emulated", "recipe": "delayed"} if width == 16 else None
    )
    model = Raw(width)
    with pytest.raises(UnsupportedError, match=r"SGD\.step\(\) was called .* Step what self\.optimizers\(\) returns"):
        trainer(plugin).fit(model, batches(2, features=width))


@pytest.mark.parametrize("masters", ["params", "copy", "split"])
def test_step_past_the_plugin_updates_as_in_fp32_where_nothing_is_scaled(masters):
    ours, reference = Raw(), Raw()
    trainer(MixedPrecision("bf16", master_weights=masters)).fit(ours, batches(4))
    trainer().fit(reference, batches(4))
    # BF16 keeps 8 bits of what flows through the layers.
    assert_same_weights(ours, reference, rtol=2**-6, atol=2**-8)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("out of memory")


class Hidden(Two):
    """A forgotten backward in places where only its gradient tells."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if self.where == "before a graph of gradients":
            self.loss(batch).backward()
            self.manual_backward(self.loss(batch), create_graph=True)
        else:
            with contextlib.suppress(RuntimeError):
                self.manual_backward(Failing.apply(self.loss(batch)))
            self.loss(batch).backward()
        optimizer.step()


# torch warns that a graph of gradients may leak memory.
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("where", ["before a graph of gradients", "after a backward that failed"])
def test_forgotten_manual_backward_is_refused_wherever_it_hides(where):
    with pytest.raises(UnsupportedError, match=r"Call self\.manual_backward"):
        trainer(MixedPrecision("fp16", loss_scale=1024.0)).fit(Hidden(where), batches())


def test_gradients_set_to_zero_in_place_are_cleared_too():
    class Adversarial(Two):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            x, y = batch[0].clone().requires_grad_(), batch[1]
            self.loss((x, y)).backward()
            optimizer.zero_grad(set_to_none=False)
            self.manual_backward(self.loss(((x + 0.125 * x.grad.sign()).detach(), y)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    ours, reference, plugin = fit_both(Adversarial)
    assert plugin.applied_steps == 8
    assert_same_weights(ours, reference)


class Inner(torch.optim.Optimizer):
    """Hands its closure to several optimizers inside."""

    def __init__(self, params, lr):
        params = list(params)
        self.inner = [torch.optim.SGD(params[:1], lr), torch.optim.SGD(params[1:], lr)]
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for optimizer in self.inner:
            loss = optimizer.step(closure)
        return loss


def test_optimizer_gets_no_closure_where_the_user_gave_none():
    class Wrapped(Two):
        def configure_optimizers(self):
            return Inner(self.parameters(), 0.05)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    ours, reference, plugin = fit_both(Wrapped)
    assert plugin.applied_steps == 8
    assert_same_weights(ours, reference)


@pytest.mark.parametrize("fused", [False, True])
def test_scheduler_stepped_twice_per_update_is_held_twice(fused):
    class Twice(Two):
        def __init__(self, bad):
            super().__init__()
            self.bad = bad

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), 0.05, fused=fused)
            return [optimizer], [lr_scheduler.ExponentialLR(optimizer, 0.8)]

        def training_step(self, batch, batch_idx):
            optimizer, scheduler = self.optimizers(), self.lr_schedulers()
            self.manual_backward(self.loss(batch) * (INF if batch_idx in self.bad else 1.0))
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            scheduler.step()

    model, run = Twice((3, 5)), trainer(MixedPrecision("fp32"), log_every_n_steps=1000)
    run.fit(model, batches(8))
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 12
    torch.testing.assert_close(run.optimizers[0].param_groups[0]["lr"], 0.05 * 0.8**12, rtol=1e-12, atol=0)


class ByHand(Two):
    """Takes gradients without ``manual_backward``: of a loss times ``plugin.scaler.scale``, in FP32 of the loss."""

    def __init__(self, way, factors=()):
        super().__init__()
        self.way, self.factors = way, dict(factors)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)

    def training_step(self, batch, batch_idx):
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = scaler.scale if scaler is not None else (lambda losses: losses)
        optimizer, params = self.optimizers(), list(self.parameters())
        loss = self.loss(batch) * self.factors.get(batch_idx, 1.0)
        if self.way == "backward":
            optimizer.zero_grad()
            scale(loss).backward()
        elif self.way == "several losses at once":
            optimizer.zero_grad()
            torch.autograd.backward(scale([loss / 2, loss / 2]))
        elif self.way == "gradients assigned":
            for p, g in zip(params, torch.autograd.grad(scale(loss), params), strict=True):
                p.grad = g
        elif self.way == "two tasks of one graph":
            halves = [torch.autograd.grad(scale(task), params, retain_graph=True) for task in (loss / 4, loss * 3 / 4)]
            for p, g, h in zip(params, *halves, strict=True):
                p.grad = g + h
        elif self.way == "added to gradients that were stepped":
            for p, g in zip(params, torch.autograd.grad(scale(loss), params), strict=True):
                p.grad = g if p.grad is None or batch_idx % 2 == 0 else p.grad.add_(g)
        elif self.way == "accumulated over batches":
            scale(loss / 2).backward()
            if batch_idx % 2 == 0:
                return
        elif self.way == "of a checkpointed part":
            optimizer.zero_grad()
            hidden = checkpoint(self.a, batch[0].clone().requires_grad_(), use_reentrant=True)
            scale(nn.functional.mse_loss(self.b(hidden).float(), batch[1])).backward()
        optimizer.step()
        if self.way == "accumulated over batches":
            optimizer.zero_grad()


WAYS = (
    "backward",
    "several losses at once",
    "gradients assigned",
    "two tasks of one graph",
    "added to gradients that were stepped",
    "accumulated over batches",
    "of a checkpointed part",
)


@pytest.mark.parametrize("masters", ["params", "copy"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_a_loss_that_the_scaler_scaled_train_as_in_fp32(way, masters):
    plugin = MixedPrecision("fp16", master_weights=masters, loss_scale={"init_scale": 64.0, "growth_interval": 2})
    ours, reference = ByHand(way), ByHand(way)
    trainer(plugin).fit(ours, batches())
    trainer().fit(reference, batches())
    assert_same_weights(ours, reference, **({} if masters == "params" else {"rtol": 2**-7, "atol": 2**-10}))
    assert plugin.applied_steps == (4 if way == "accumulated over batches" else 8)
    assert plugin.scaler.get_scale() > 64.0


@pytest.mark.parametrize("way", ["backward", "gradients assigned"])
def test_overflow_of_a_loss_scaled_by_hand_is_skipped_and_explained_by_the_loss(way):
    plugin = MixedPrecision("fp16", loss_scale={"init_scale": 1024.0})
    reports = []
    plugin.add_step_listener(reports.append)
    ours, reference = ByHand(way, {1: INF, 3: 1e4}), ByHand(way)
    trainer(plugin).fit(ours, batches(4))
    trainer().fit(reference, batches_without((1, 3), 4))
    assert [r.skipped for r in reports] == [False, True, False, True]
    # In batch 3 the loss itself is finite, and the scale is to blame.
    assert [r.loss_nonfinite for r in reports] == [False, True, False, False]
    assert plugin.scaler.get_scale() == 256.0
    assert_same_weights(ours, reference)


class Recipe(Two):
    """Drives ``plugin.scaler`` as torch's documentation drives a ``GradScaler``."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)

    def training_step(self, batch, batch_idx):
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        if "manual_backward" in self.calls or scaler is None:
            self.manual_backward(loss)
        else:
            scaler.scale(loss).backward()
        if "unscale_" in self.calls:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.parameters(), 0.05)
        if "step" in self.calls and scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()


@pytest.mark.parametrize(
    "calls",
    [("step",), ("unscale_",), ("unscale_", "step"), ("manual_backward", "unscale_"), ("manual_backward", "step")],
    ids="-".join,
)
def test_recipe_of_torchs_grad_scaler_unscales_once(calls):
    scale = {"init_scale": 64.0, "growth_interval": 2}
    ours, reference, plugin = fit_both(lambda: Recipe(calls), loss_scale=scale)
    assert_same_weights(ours, reference)
    assert (plugin.applied_steps, plugin.scaler.get_scale()) == (8, 64.0 * 2**4)


class Mixed(Two):
    """A loss that the scaler scaled beside one that nothing scaled."""

    def __init__(self, order):
        super().__init__()
        self.order = order

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        scale = self.trainer.precision_plugin.scaler.scale
        for kind in self.order:
            if kind == "scaled":
                scale(self.loss(batch)).backward()
            elif kind == "failed":
                with pytest.raises(RuntimeError, match="out of memory"):
                    scale(Failing.apply(self.loss(batch))).backward()
            elif kind == "not taken":
                scale(self.loss(batch))
            elif kind == "assigned":
                params = list(self.parameters())
                for p, g in zip(params, torch.autograd.grad(self.loss(batch), params), strict=True):
                    p.grad = g
            else:
                self.loss(batch).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "order",
    [("scaled", "plain"), ("plain", "scaled"), ("failed", "plain"), ("not taken", "plain"), ("not taken", "assigned")],
    ids="-".join,
)
def test_unscaled_loss_is_refused_beside_one_that_the_scaler_scaled(order):
    with pytest.raises(UnsupportedError, match=r"from torch\.autograd\.grad, take those of .*scaler\.scale\(loss\)"):
        trainer(MixedPrecision("fp16", loss_scale=1024.0)).fit(Mixed(order), batches())


def test_scaler_is_torchs_own_again_after_the_fit():
    plugin = MixedPrecision("fp16", loss_scale=8.0)
    trainer(plugin).fit(ByHand("backward"), batches(2))
    assert plugin.scaler.driver is None
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.5)
    plugin.scaler.scale(weight.sum()).backward()
    plugin.scaler.step(optimizer)
    assert weight.item() == 0.5


class Tiny(LightningModule):
    """One weight whose gradient, 1.5 * 2**-24, is 2**-23 when FP16 rounds it."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def training_step(self, batch, batch_idx):
        loss = self.layer(torch.ones(1, 1)).float().sum() * 1.5 * 2.0**-24
        self.trainer.precision_plugin.scaler.scale(loss).backward()
        self.optimizers().step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 2.0**14)


def test_fp16_gradients_that_ddp_left_are_unscaled_in_fp32():
    plugin = MixedPrecision("fp16", master_weights="copy", loss_scale=1024.0)
    model = Tiny()
    try:
        trainer(plugin, max_steps=1, strategy=DDPStrategy(process_group_backend="gloo")).fit(model, batches(1))
    finally:
        dist.destroy_process_group()
    assert model.layer.weight.item() == -1.5 * 2.0**-10
