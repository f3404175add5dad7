"""Whether the forwards of one ``training_step`` may share the casts of its weights."""

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_mp.casting import is_autocast_cache_safe
from lightning_mp.precision.notices import notice
from lightning_mp.precision.weight_writes import may_write_weights

__all__ = ["SharedCasts"]


class SharedCasts:
    """Autocast's cache: each FP32 weight is cast once in a ``training_step``, for all of its forwards.

    K calls of one layer then save one cast of its weight for backward rather than K. A weight that is written
    between two of them would not be seen by the second, so code that may write weights gets no cache, and a write
    that is found by a tensor's version, of which every eighth batch is asked, ends the sharing.

    Args:
        module: The LightningModule in training.
        on_end: Called when sharing ends.
    """

    def __init__(self, module: LightningModule, on_end: Callable[[], None]) -> None:
        self.is_allowed = is_autocast_cache_safe() and not may_write_weights(module)
        self._weights = [
            weight
            for child in module.modules()
            # An embedding with a largest norm writes its weight itself, and autocast does not cast it.
            if getattr(child, "max_norm", None) is None
            for weight in child.parameters(recurse=False)
            # What was made in inference mode has no version, and cannot be written outside of it.
            if weight.dtype is torch.float32 and not nn.parameter.is_lazy(weight) and not weight.is_inference()
        ]
        self._on_end = on_end
        self._versions = 0

    def begin(self) -> None:
        """Note the weights as they are: what was cast before is forgotten."""
        if self.is_allowed:
            self._versions = sum([weight._version for weight in self._weights])

    def check(self) -> None:
        """End the sharing if a weight was written since ``begin``."""
        if not self.is_allowed or self._versions == sum([weight._version for weight in self._weights]):
            return
        self.is_allowed = False
        self._on_end()
        notice(
            "training_step wrote weights between its forwards, which share the cast of a weight. In this step, and in "
            "up to 7 before it, a forward after the write may have used the values from before it; from the next step "
            "on each forward casts its weights anew. That is so from the first step if training_step, or what it "
            "calls, names the write: weight.add_, .data, parameters()."
        )
