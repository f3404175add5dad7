"""The function mode that runs pinned functions in FP32."""

import sys
from collections.abc import Callable, Collection
from types import CodeType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import is_grad_enabled
from torch.overrides import TorchFunctionMode

from lightning_mp.errors import UnsupportedError
from lightning_mp.pinning.functions import FunctionRules, run_function, unfolded

__all__ = ["CHECKPOINT_FILE", "FunctionPins", "checkpoint_text"]

CHECKPOINT_FILE = torch.utils.checkpoint.__file__


class FunctionPins(TorchFunctionMode):
    """Run the functions that ``rules`` names in FP32 while this mode is entered.

    Every call of torch passes through an entered mode, at about 1.2 us each on CPU. It is therefore
    entered only in the ``forward`` of modules that call such functions, and left inside the others.

    Args:
        rules: Function to the dtype rule of its result.
        entered_by: Code that enters the mode again when it is recomputed. A pinned call between reentrant activation
            checkpointing and such code is refused, as its recomputation would not be pinned. Empty: nobody looks.
    """

    def __init__(self, rules: FunctionRules, entered_by: Collection[CodeType] = ()) -> None:
        super().__init__()
        self.rules = rules
        self.entered_by = entered_by

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = self.rules.get(func)
        if rule is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        if rule != "look inside":
            # Reentrant checkpointing runs a forward without gradients. The other kind finds out by itself: it compares
            # what was recomputed, and raises.
            if not is_grad_enabled():
                self._refuse_bare_checkpoint(func)
            return run_function(func, args, kwargs or {}, rule)
        with self:
            return unfolded(func)(*args, **(kwargs or {}))

    def _refuse_bare_checkpoint(self, func: Callable[..., Any]) -> None:
        # In this order: torch.compile traces the first question, and the second would break its graph.
        if not self.entered_by or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        frame = sys._getframe(1).f_back
        checkpoint = False
        while frame is not None and frame.f_code not in self.entered_by:
            checkpoint |= frame.f_code.co_filename == CHECKPOINT_FILE
            frame = frame.f_back
        if checkpoint and frame is not None:
            raise UnsupportedError(checkpoint_text(func.__name__, type(frame.f_locals["module"]).__name__))


def checkpoint_text(function: str, where: str) -> str:
    """Say why a pinned function that is checkpointed outside a module is refused, and what to do."""
    return (
        f"{function} is called in {where or 'the model'} by a bare function under torch.utils.checkpoint.checkpoint. "
        "Its recomputation in backward runs outside the module, where FP32Pin does not reach. Put that code into the "
        "forward of an nn.Module that is a submodule of the model, and checkpoint the module. If it is the forward of "
        "one already, name that module in FP32Pin(modules=...)."
    )
