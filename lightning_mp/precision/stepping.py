"""From the loss to the update: the order in which backward, unscaling, clipping and the step happen."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.core.optimizer import do_nothing_closure
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_mp.casting import clear_cast_weights
from lightning_mp.closures import NEW_STEPS, EvaluatedClosure
from lightning_mp.errors import UnsupportedError
from lightning_mp.grad_scaler import (
    BackwardWatch,
    GradientUnscaler,
    LossScaler,
    Readback,
    gradient_amaxes,
    step_unless,
    supports_skip_on_device,
)
from lightning_mp.master_weights import Gradients, has_step_hooks
from lightning_mp.precision.checks import ignores_closure, is_closure_repeating, takes_closure
from lightning_mp.precision.ranks import any_rank_
from lightning_mp.precision.repeats import step_with_repeats
from lightning_mp.precision.shared_casts import SharedCasts
from lightning_mp.precision.steps import Attempt, StepLedger

__all__ = ["OptimizerStepper", "unwrap"]

# Whether a weight was written in the batch: 8 us on a CPU. Code that does so does it again.
_BATCHES_BETWEEN_LOOKS = 8


class OptimizerStepper:
    """Runs optimizer steps under a loss scale, or under a check of the gradients alone.

    Args:
        scaler: The loss scaler, or ``None``.
        ledger: Where outcomes are settled.
        on_nonfinite: ``"skip"``, ``"raise"`` or ``"ignore"``.
        is_manual: Whether the user calls backward and step.
        optimizers: All optimizers of the run.
        is_sharded: Whether ranks hold different shards of the gradients.
        is_distributed: Whether ranks have losses of their own and must decide alike.
        is_log_step: Tells whether what was counted is about to be logged.
    """

    def __init__(
        self,
        scaler: LossScaler | None,
        ledger: StepLedger,
        *,
        on_nonfinite: str = "skip",
        is_manual: bool = False,
        optimizers: list[Optimizer] | None = None,
        is_sharded: bool = False,
        is_distributed: bool = False,
        is_log_step: Callable[[], bool] = bool,
    ) -> None:
        self.scaler = scaler
        self.ledger = ledger
        self.unscaler = GradientUnscaler(scaler, is_manual=is_manual, is_sharded=is_sharded)
        self.is_in_batch = False
        self.is_stepping = False
        self.gradients: Gradients | None = None  # reads and clips those of 16-bit parameters
        self.shared_casts: SharedCasts | None = None  # of FP32 parameters in an autocast region
        self._watched_casts: SharedCasts | None = None  # the same in a batch that is looked at
        self._on_nonfinite = on_nonfinite
        self._is_manual = is_manual
        self._is_distributed = is_distributed
        self._optimizers = optimizers or []
        self._is_log_step = is_log_step
        self._attempt: Attempt | None = None
        self._loss: Tensor | None = None
        self._is_loss_stale = False
        self._batch_found_inf: list[Tensor] = []
        self._seen_optimizers: dict[int, int] = {}
        self._has_no_closure = False
        self._last_hook: RemovableHandle | None = None
        self._has_scaled_by_hand = False
        self.backward_watch = BackwardWatch(
            p for o in self._optimizers for group in o.param_groups for p in group["params"] if is_manual and scaler
        )
        if scaler is not None and self.backward_watch.is_on:
            scaler.driver = self

    # --- Backward --------------------------------------------------------------------------------

    def before_backward(self, loss: Tensor) -> Tensor:
        """Return the loss to call backward on."""
        self._remember_loss(loss)
        self.unscaler.before_backward()
        return loss if self.scaler is None else self.scaler.multiply(loss)

    def before_scaled_backward(self, loss: Tensor) -> None:
        """Count, inside of it, a backward of what user code multiplied by the scale: ``scaler.scale(loss)``."""
        self._has_scaled_by_hand = True
        self._remember_loss(loss)
        self.unscaler.before_backward()
        self.backward_watch.announce_running()

    def after_backward(self) -> None:
        """Forget cast weights: a user may change weights between two backwards of one batch."""
        if self.is_in_batch:
            clear_cast_weights()

    def _remember_loss(self, loss: Tensor) -> None:
        loss = loss.detach() if loss.dim() == 0 else loss.detach().sum()
        if self._is_loss_stale or self._loss is None:
            self._loss, self._is_loss_stale = loss, False
        else:
            # Non-finite losses stay non-finite in the sum: Inf - Inf is NaN.
            self._loss = self._loss + loss

    # --- Step ------------------------------------------------------------------------------------

    def step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        after_closure: Callable[[Optimizer], None],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the closure, then unscale, hooks and clipping, then the update or none.

        Args:
            optimizer: The optimizer itself, not Lightning's wrapper.
            closure: Forward and backward; in manual optimization it does nothing.
            after_closure: Hooks and clipping, which see unscaled gradients.
            kwargs: Further arguments of ``optimizer.step``.

        Returns:
            What ``optimizer.step`` returns; ``None`` for a step that the host skipped.
        """
        self.is_stepping = True  # until the caller has its result
        if self._watched_casts is not None:
            self._watched_casts.check()
        self._has_no_closure = closure is do_nothing_closure
        if self._last_hook is not None:
            self.release_hook()
        if is_closure_repeating(optimizer):
            return step_with_repeats(self.ledger, self.unscaler, optimizer, closure, after_closure, kwargs)
        result = closure()
        if self.ledger.pending is not None:
            self.ledger.settle()
        if self._is_manual:
            self._prepare_by_hand(optimizer)
        attempt = self.ledger.open(optimizer)
        attempt.found_inf = self.unscaler.unscale_(optimizer)
        if attempt.found_inf is None:
            after_closure(optimizer)
            return self._apply(optimizer, result, kwargs)
        try:
            return self._guarded_step(attempt, attempt.found_inf, after_closure, result, kwargs)
        finally:
            self._finish(attempt, attempt.found_inf)

    def release_hook(self) -> None:
        """Take off the hook that came last in the latest step, if there was one."""
        if self._last_hook is not None:
            self._last_hook.remove()
            self._last_hook = None

    def _guarded_step(
        self,
        attempt: Attempt,
        found_inf: Tensor,
        after_closure: Callable[[Optimizer], None],
        result: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        optimizer = attempt.optimizer
        attempt.loss = self._loss if not self._is_distributed else self._agreed_loss(found_inf)
        if self.scaler is not None:
            attempt.loss_scale = self.scaler.scale_tensor(found_inf.device).clone()
        if self.ledger.wants_culprit:
            attempt.amaxes = gradient_amaxes(optimizer)
        self._attempt = attempt
        after_closure(optimizer)
        self._attempt = None
        skip_flag = found_inf if self._on_nonfinite != "ignore" else self._skip_flag(found_inf, attempt.loss)
        if skip_flag is not None and not supports_skip_on_device(optimizer):
            skipped = not self.ledger.count_if_applied(attempt) and self.ledger.account(attempt).skipped
            output = None if skipped else self._apply(optimizer, result, kwargs)
            self.ledger.on_settled(attempt)
            return output
        attempt.readback = Readback(attempt.tensors())
        self.ledger.pending = attempt
        if skip_flag is None:
            return self._apply(optimizer, result, kwargs)
        output = step_unless(skip_flag, optimizer, self._with_closure(optimizer, result, kwargs))
        return result if output is None and self.scaler is None else output

    def _skip_flag(self, found_inf: Tensor, loss: Tensor | None) -> Tensor | None:
        """Return what says whether to skip under ``on_nonfinite="ignore"``, or ``None`` if nothing can make it skip."""
        if self.scaler is None or not self.scaler.is_dynamic:
            return None
        if loss is None:
            return found_inf
        return found_inf * loss.isfinite().to(found_inf.device, torch.float32)

    def _agreed_loss(self, found_inf: Tensor) -> Tensor | None:
        """Return the loss, NaN where that of another rank is not finite and ranks decide by it.

        They do under a dynamic scale, unless every overflow is skipped.
        """
        loss = self._loss
        decides = self._on_nonfinite != "skip" and self.scaler is not None and self.scaler.is_dynamic
        if loss is None or not decides:
            return loss
        flag = any_rank_(1 - loss.isfinite().to(found_inf.device, torch.float32))
        return torch.where(flag != 0, torch.nan, loss.to(found_inf.device))

    def _apply(self, optimizer: Optimizer, result: Any, kwargs: dict[str, Any]) -> Any:
        output = optimizer.step(**self._with_closure(optimizer, result, kwargs))
        return result if output is None and self.scaler is None and ignores_closure(optimizer) else output

    def _with_closure(self, optimizer: Optimizer, result: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Add a closure for an optimizer that does something of its own with it."""
        if ignores_closure(optimizer) or (self.scaler is not None and not takes_closure(optimizer)):
            return kwargs
        if self._has_no_closure:
            return kwargs if self.scaler is not None else {**kwargs, "closure": do_nothing_closure}
        steps = self._seen_optimizers[id(optimizer)] = self._seen_optimizers.get(id(optimizer), 0) + 1
        closure = EvaluatedClosure(result, optimizer, is_new=steps <= NEW_STEPS)
        # A wrapper may take no hooks. None is added without need, because masters make gradients FP32 for hooks.
        if hasattr(optimizer, "_optimizer_step_pre_hooks") and has_step_hooks(optimizer):
            # What step hooks do to gradients is theirs to do. This one runs last.
            self._last_hook = optimizer.register_step_pre_hook(lambda *_: closure.look())
        return {**kwargs, "closure": closure}

    def _finish(self, attempt: Attempt, found_inf: Tensor) -> None:
        self._attempt = None
        self._is_loss_stale = True
        if self._is_manual:
            self.backward_watch.forget(attempt.optimizer)
        if self.gradients is not None:
            self.gradients.forget_all()
        self.unscaler.finish(attempt.optimizer)
        if self.is_in_batch:
            self._forget_casts()
            self._batch_found_inf.append(found_inf)
        elif self.scaler is not None:
            self.scaler.update_(found_inf)
        if self.ledger.pending is not None and self._is_log_step():
            self.ledger.settle()

    def _forget_casts(self) -> None:
        clear_cast_weights()
        if self._watched_casts is not None:
            self._watched_casts.begin()

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divide the optimizer's gradients by the loss scale now, once.

        Args:
            optimizer: The optimizer, or Lightning's wrapper of it.

        Raises:
            UnsupportedError: As in manual optimization for gradients of a loss that was not scaled.
        """
        optimizer = unwrap(optimizer)
        self._prepare_by_hand(optimizer)
        self.unscaler.unscale_(optimizer)

    def _prepare_by_hand(self, optimizer: Optimizer) -> None:
        """Refuse gradients of a loss that was never scaled; make those that user code left in FP16 FP32.

        Raises:
            UnsupportedError: If there is a loss scale and ``loss.backward()`` was called.
        """
        if not self._is_manual or self.scaler is None:
            return
        if self.backward_watch.has_stray(optimizer) or self.unscaler.has_unannounced_gradients(optimizer):
            raise UnsupportedError(
                "precision='fp16': the optimizer has gradients of a loss that was not multiplied by the loss scale. "
                "Call self.manual_backward(loss) rather than loss.backward() in training_step. For gradients of your "
                "own, as from torch.autograd.grad, take those of trainer.precision_plugin.scaler.scale(loss)."
            )
        if self._has_scaled_by_hand and self.gradients is not None:
            # Under DDP those of masters arrive in FP16, where a quotient may be flushed to zero.
            self.gradients.widen_(param for group in optimizer.param_groups for param in group["params"])

    # --- Batch -----------------------------------------------------------------------------------

    def enter_batch(self) -> None:
        """Note that ``training_step`` runs: steps from here on belong to one batch."""
        self.ledger.batch += 1
        self.is_in_batch = True
        if self.ledger.batch % _BATCHES_BETWEEN_LOOKS == 1 and self.shared_casts is not None:
            self._watched_casts = self.shared_casts
            self._watched_casts.begin()

    def exit_batch(self, succeeded: bool) -> None:
        """Move the scale once for all optimizers that stepped within ``training_step``."""
        self.is_in_batch = False
        if self._watched_casts is not None:
            watched, self._watched_casts = self._watched_casts, None
            if succeeded:
                watched.check()
        found, self._batch_found_inf = self._batch_found_inf, []
        if not found or not succeeded or self.scaler is None or not self.scaler.is_dynamic:
            return
        scale = self.scaler.scale_tensor(found[0].device)
        before = scale.clone()
        self.scaler.update_(torch.stack([f.to(scale.device) for f in found]).amax())
        self.unscaler.rescale_pending_(self._optimizers, scale / before)

    # --- Clipping --------------------------------------------------------------------------------

    def clip_by_norm(self, model: nn.Module | None, params: list[nn.Parameter], clip_val: float) -> None:
        """Clip the 2-norm of the gradients in place, and note it for the report of this step."""
        params = [p for p in params if p.grad is not None]
        if type(model).__name__ == "FullyShardedDataParallel":
            norm = model.clip_grad_norm_(clip_val)  # type: ignore[union-attr, operator]
        elif not params:
            return
        elif any(hasattr(p, "to_local") for p in params):
            norm = nn.utils.clip_grad_norm_(params, clip_val)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        elif self.gradients is not None:
            norm = self.gradients.norm(params)
            self.gradients.clip_with_norm_(params, clip_val, self._harmless(norm))
        else:
            norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
            nn.utils.clip_grads_with_norm_(params, clip_val, self._harmless(norm))
        if self._attempt is not None:
            self._attempt.grad_norm = norm

    def _harmless(self, norm: Tensor) -> Tensor:
        """Return zero for the norm of a step that is skipped anyway, so that its gradients stay.

        Dividing by an Inf or NaN norm would spread what is non-finite to all of them, and nobody
        could name the first.
        """
        attempt = self._attempt
        if attempt is None or attempt.found_inf is None or self._on_nonfinite == "ignore":
            return norm
        return torch.where(attempt.found_inf.to(norm.device) == 0, norm, torch.zeros_like(norm))


def unwrap(optimizer: Any) -> Optimizer:
    """Return the optimizer behind a LightningOptimizer, which imitates its class."""
    inner: Optimizer = optimizer.__dict__.get("_optimizer", optimizer)
    return inner
