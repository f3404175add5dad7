"""The moment at which a training step begins, after all that hooks do before it."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden

__all__ = ["StepStart", "runs_code_before_step"]

_HOOK = "on_train_batch_start"


def runs_code_before_step(trainer: Trainer, module: LightningModule, callback: Callback) -> bool:
    """Tell whether a hook runs between ``on_train_batch_start`` of ``callback`` and the training step."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    later = callbacks[callbacks.index(callback) + 1 :] if callback in callbacks else callbacks
    return (
        is_overridden(_HOOK, module)
        or any(is_overridden(_HOOK, each, parent=Callback) for each in later)
        or type(trainer.strategy).on_train_batch_start is not Strategy.on_train_batch_start
    )


class StepStart:
    """Calls ``action`` whenever the region of a training step is made, which is just before the step.

    The method is set on the plugin, and taken off by ``remove``: a hook that comes as late does not exist.
    """

    def __init__(self, plugin: Precision, action: Callable[[], None]) -> None:
        self._plugin = plugin
        self._action = action
        self._own = plugin.train_step_context
        vars(plugin)["train_step_context"] = self._begin

    def _begin(self) -> Any:
        self._action()
        return self._own()

    def remove(self) -> None:
        """Leave the plugin as it was."""
        if vars(self._plugin).get("train_step_context") == self._begin:
            del vars(self._plugin)["train_step_context"]
