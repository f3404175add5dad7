"""What the plugin does between a loss and the next batch: backward, the step, clipping."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights import MasterWeights
from lightning_mp.precision.dispatch import call_hooks, is_module_hook_overridden
from lightning_mp.precision.masters import forward_switches
from lightning_mp.precision.region import StepRegions
from lightning_mp.precision.stepping import unwrap

__all__ = ["TrainingHooks"]


class TrainingHooks(StepRegions, Precision):  # type: ignore[misc]  # Lightning types its contexts as generators
    """The part of the plugin that Lightning calls around backward and the optimizer's step."""

    _masters: MasterWeights | None
    _model: nn.Module | None
    _is_first_step: bool

    # --- Backward and step -----------------------------------------------------------------------

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        if module is None:
            raise UnsupportedError(
                "MixedPrecision is a plugin for lightning.pytorch.Trainer, and Fabric has no hooks and steps to guard. "
                "Use Fabric(precision='bf16-mixed'), or train with Trainer(plugins=[MixedPrecision(...)])."
            )
        tensor = self._stepper.before_backward(tensor)
        call_hooks(module.trainer, module, "on_before_backward", tensor)
        if self._masters is not None:
            self._masters.begin_backward()  # after the hooks, which may clear gradients or register hooks on weights
        return tensor

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        watch = self._stepper.backward_watch
        if not watch.is_on:
            model.backward(tensor, *args, **kwargs)
            return
        with watch.announced():
            model.backward(tensor, *args, **kwargs)

    def post_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        if self._masters is not None:
            self._masters.finish_backward()
        self._stepper.after_backward()
        call_hooks(module.trainer, module, "on_after_backward")
        return tensor.detach()

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        if self._is_first_step:
            self._is_first_step = False
            self._ledger.begin(model.trainer.global_step)
            if self._masters is not None:
                forward_switches(model.trainer.strategy._lightning_optimizers)
        if self._masters is not None:
            self._masters.adopt(optimizer)  # one made in mid-fit; others are known
        result = self._stepper.step(optimizer, closure, lambda o: self._after_closure(model, o), kwargs)
        self._stepper.is_stepping = False
        if self._fp8 is not None:
            self._fp8.on_optimizer_step()
        return result

    def _after_closure(self, model: LightningModule, optimizer: Optimizer) -> None:  # type: ignore[override]
        trainer = model.trainer
        call_hooks(trainer, model, "on_before_optimizer_step", optimizer)
        clip_val = trainer.gradient_clip_val
        is_by_user = is_module_hook_overridden(model, "configure_gradient_clipping")
        if not (clip_val or is_by_user):
            return
        gradients = self._stepper.gradients
        if gradients is None or is_by_user:
            self._clip_gradients(model, optimizer, clip_val, gradient_clip_algorithm=trainer.gradient_clip_algorithm)
            return
        gradients.defers = True  # only the step comes after it
        try:
            self._clip_gradients(model, optimizer, clip_val, gradient_clip_algorithm=trainer.gradient_clip_algorithm)
        finally:
            gradients.defers = False

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divide the optimizer's gradients by the loss scale now, once; the step knows that it is done."""
        self._stepper.unscale_gradients(optimizer)

    # --- Clipping --------------------------------------------------------------------------------

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        optimizer = unwrap(optimizer)
        if clip_val > 0:
            self._stepper.unscale_gradients(optimizer)
        Precision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        self._stepper.clip_by_norm(self._model, list(self.main_params(optimizer)), clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        if self._masters is None:
            Precision.clip_grad_by_value(self, optimizer, clip_val)
        else:
            self._masters.gradients.clip_value_(self.main_params(optimizer), clip_val)
