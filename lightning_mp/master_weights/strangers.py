"""Optimizers that nobody attached, and that would update 16-bit weights behind the masters' back."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim import optimizer as torch_hooks
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_mp.errors import UnsupportedError

__all__ = ["StrangerGuard", "has_step_hooks"]

_OWN_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class StrangerGuard:
    """Refuse the step of an optimizer that was not attached, while installed.

    It is one of torch's global step pre-hooks: a raw ``optimizer.step()`` passes nothing else.

    Args:
        is_stranger: Tells whether an optimizer that is about to step holds mastered parameters and is
            not attached.
    """

    def __init__(self, is_stranger: Callable[[Optimizer], bool]) -> None:
        self._is_stranger = is_stranger

    def install(self) -> RemovableHandle:
        """Watch steps from now on; removing the handle ends it."""
        return register_optimizer_step_pre_hook(self)

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_stranger(optimizer):
            raise UnsupportedError(
                f"master_weights: {type(optimizer).__qualname__}.step() was called past the Trainer, on an optimizer "
                "that it does not know, so the step would update 16-bit weights instead of their FP32 masters. Return "
                "it from configure_optimizers(), or set trainer.optimizers = [...] and step what self.optimizers() "
                "gives; or use master_weights='params'."
            )


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Tell whether code of others runs before or after the step of ``optimizer``: its own hooks or global ones."""
    own = vars(optimizer)
    if own[_OWN_HOOKS[0]] or own[_OWN_HOOKS[1]] or torch_hooks._global_optimizer_post_hooks:
        return True
    return any(type(hook) is not StrangerGuard for hook in torch_hooks._global_optimizer_pre_hooks.values())
