"""Which master weights a Trainer's settings ask for, and what they cannot be combined with."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights import MasterWeights, frozen_twins
from lightning_mp.policy import PrecisionPolicy
from lightning_mp.precision.dispatch import is_module_hook_overridden
from lightning_mp.precision.notices import notice

__all__ = ["attach_masters", "check_averaging", "convert_to_masters", "forward_switches", "new_masters"]

# By name: WeightAveraging and EMAWeightAveraging came with Lightning 2.6.
_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")
_HOOKS_AFTER_STEP = ("on_before_zero_grad", "on_train_batch_end", "on_train_batch_start", "on_train_epoch_end")
_NOT_USERS = ("lightning.", "pytorch_lightning.", "lightning_mp.")
_said_none = False


def new_masters(policy: PrecisionPolicy) -> MasterWeights | None:
    """Return the engine that the policy asks for; ``None`` where the parameters are the masters."""
    if policy.master_weights == "params":
        return None
    _warn_about_none(policy)
    masters = MasterWeights(policy.master_weights, param_dtype=policy.compute_dtype)  # type: ignore[arg-type]
    masters.tell = rank_zero_warn
    return masters


def convert_to_masters(masters: MasterWeights, module: nn.Module, pinned: list[nn.Parameter]) -> None:
    """Cast the module's parameters, all but the pinned ones and those of frozen copies of a trained network."""
    twins = frozen_twins(module) if masters.mode != "none" else {}
    if twins:
        names = ", ".join(twins)
        notice(f"master_weights={masters.mode!r}: {names} stay FP32: a frozen copy of a network may be averaged into.")
    masters.convert_(module, keep_fp32=[*pinned, *twins.values()])


def _warn_about_none(policy: PrecisionPolicy) -> None:
    global _said_none
    if policy.master_weights == "none" and not _said_none:
        _said_none = True
        rank_zero_warn(
            f"master_weights='none': the optimizer updates {_stored(policy)} weights directly, so updates "
            "below half a unit in the last place are lost. master_weights='split' keeps them at 2 bytes per parameter."
        )


def _stored(policy: PrecisionPolicy) -> str:
    # Under FP8 only the operands of products are FP8: weights are stored in BF16.
    return "BF16" if policy.precision == "fp8" else policy.precision.upper()


def check_averaging(callbacks: Iterable[Any], policy: PrecisionPolicy) -> None:
    """Refuse callbacks that would average 16-bit weights.

    They read ``module.parameters()``, which hold rounded values, and write averages back through them.

    Raises:
        UnsupportedError: If the weights are 16-bit and a callback averages them.
    """
    for callback in callbacks:
        if {base.__name__ for base in type(callback).__mro__} & set(_AVERAGING):
            raise UnsupportedError(
                f"master_weights={policy.master_weights!r} with {type(callback).__name__}: the callback would average "
                f"the {_stored(policy)} weights of the module, not their FP32 masters. Use "
                "master_weights='params', whose averages are FP32, or remove the callback."
            )


def attach_masters(
    masters: MasterWeights, model: nn.Module, optimizers: list[Optimizer], *, trainer: Any, policy: PrecisionPolicy
) -> None:
    """Attach the optimizers of a fit, on one device or under DDP."""
    masters.attach(
        optimizers,
        accumulates=_needs_fp32_gradients(trainer),
        ddp=model if isinstance(model, DistributedDataParallel) else None,
        reduce_dtype=policy.reduce_torch_dtype,
    )
    masters.gradients.shows_clipped = trainer is not None and _may_read_gradients_after_step(trainer)


def forward_switches(wrappers: Iterable[Any]) -> None:
    """Let ``self.optimizers().eval()`` reach the optimizer; Lightning's wrapper would run the method on itself."""
    for wrapper in wrappers:
        optimizer = vars(wrapper)["_optimizer"]
        for name in ("train", "eval"):
            if callable(getattr(optimizer, name, None)):
                vars(wrapper)[name] = lambda *args, _name=name, _on=optimizer, **kwargs: getattr(_on, _name)(
                    *args, **kwargs
                )


def _needs_fp32_gradients(trainer: Any) -> bool:
    """Tell whether several backwards feed a step, or user code may change gradients after a clip."""
    if trainer is None or trainer.accumulate_grad_batches != 1:
        return True
    module = trainer.lightning_module
    return (
        not module.automatic_optimization
        or is_module_hook_overridden(module, "configure_gradient_clipping")
        or is_module_hook_overridden(module, "optimizer_step")
        or any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)
    )


def _may_read_gradients_after_step(trainer: Any) -> bool:
    """Tell whether user code runs between a step and the ``zero_grad`` before the next one."""
    module = trainer.lightning_module
    if is_module_hook_overridden(module, "optimizer_zero_grad"):
        return True
    users = [callback for callback in trainer.callbacks if not type(callback).__module__.startswith(_NOT_USERS)]
    return any(
        is_module_hook_overridden(module, name)
        or any(getattr(type(callback), name) is not getattr(Callback, name) for callback in users)
        for name in _HOOKS_AFTER_STEP
    )
