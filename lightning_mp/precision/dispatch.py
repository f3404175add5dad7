"""Calling the Trainer's hooks around backward and step only where somebody listens.

Lightning calls every callback and the module through a profiler context each time, 10 to 40 us per
step for hooks that nobody overrides. With a real profiler, or a hook that anybody overrides, this is
Lightning's own dispatch.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer import call

__all__ = ["call_hooks", "is_module_hook_overridden"]


def call_hooks(trainer: Trainer, module: LightningModule, name: str, *args: Any) -> None:
    """Call hook ``name`` of the callbacks, then of the module, as the base Precision plugin does."""
    profiled = type(trainer.profiler) is not PassThroughProfiler  # type: ignore[attr-defined]
    base = getattr(Callback, name)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if profiled or getattr(type(callback), name, None) is not base or name in callback.__dict__:
            call._call_callback_hooks(trainer, name, *args)
            break
    # The question of `is_module_hook_overridden`, without its call: three times in every step.
    if profiled or getattr(type(module), name) is not getattr(LightningModule, name) or name in module.__dict__:
        call._call_lightning_module_hook(trainer, name, *args)


def is_module_hook_overridden(module: LightningModule, name: str) -> bool:
    """Tell whether the module's class or the object itself defines the hook."""
    return getattr(type(module), name) is not getattr(LightningModule, name) or name in module.__dict__
