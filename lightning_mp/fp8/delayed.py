"""The state of delayed scaling: scales, and the amax of earlier steps they come from.

Facts from Transformer Engine 2.12 (pytorch/quantization.py, common/recipe/delayed_scaling.cu): scales
start at 1; entry 0 of the history collects the amax of the step under way; an update first takes the
amax over the history, that entry included, then moves every entry one place down, entry 0 to the
end, and clears entry 0. An amax of zero, infinity or NaN leaves a scale as it is.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_mp.formats import FP32
from lightning_mp.fp8.recipes import DelayedScaling, Operand, operand_dtype

__all__ = ["OPERANDS", "DelayedState"]

OPERANDS: tuple[Operand, ...] = ("input", "weight", "grad")
_FORWARD, _BACKWARD = slice(0, 2), slice(2, 3)


class DelayedState:
    """Scales and amax history of one layer.

    Args:
        recipe: The settings.

    Attributes:
        scale: FP32 of shape ``(3,)``: input, weight, grad.
        amax_history: FP32 of shape ``(amax_history_len, 3)``.
    """

    def __init__(self, recipe: DelayedScaling) -> None:
        self._recipe = recipe
        self.scale = torch.ones(len(OPERANDS), dtype=torch.float32)
        self.amax_history = torch.zeros(recipe.amax_history_len, len(OPERANDS), dtype=torch.float32)

    def scale_of(self, operand: Operand, device: torch.device) -> Tensor:
        """Return the scale of an operand, 0-dim; the state moves to ``device`` where it is not there."""
        if self.scale.device != device:
            with torch.inference_mode(False):
                self.scale, self.amax_history = self.scale.to(device), self.amax_history.to(device)
        # A copy: an update between forward and backward must not reach what forward saved.
        return self.scale[OPERANDS.index(operand)].clone()

    def record(self, operand: Operand, amax: Tensor) -> None:
        """Take note of the amax of a tensor of this step; the largest of several calls counts."""
        entry = self.amax_history[0, OPERANDS.index(operand)]
        torch.fmax(entry, amax, out=entry)

    def update(self) -> None:
        """Compute the scales of the next step, and begin its entry in the history."""
        for columns, operand in ((_FORWARD, "input"), (_BACKWARD, "grad")):
            history = self.amax_history[:, columns]
            self.scale[columns] = self._next_scale(history, self.scale[columns], operand)  # type: ignore[arg-type]
        self.amax_history = torch.roll(self.amax_history, -1, 0)
        self.amax_history[0] = 0.0

    def _next_scale(self, history: Tensor, scale: Tensor, operand: Operand) -> Tensor:
        recipe = self._recipe
        if callable(recipe.amax_compute_algo):
            amax = recipe.amax_compute_algo(history)
        else:
            amax = history.amax(0) if recipe.amax_compute_algo == "max" else history[0]
        fp8_max = torch.finfo(operand_dtype(recipe.fp8_format, operand)).max
        if recipe.scaling_factor_compute_algo is not None:
            return recipe.scaling_factor_compute_algo(amax, scale, fp8_max, recipe)
        # A number divided by a tensor is reciprocal times number in torch, which rounds twice.
        computed = torch.full_like(amax, fp8_max * 2.0**-recipe.margin) / amax
        computed = torch.where(torch.isinf(computed), FP32.max, computed)
        return torch.where((amax > 0) & torch.isfinite(amax), computed, scale)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the tensors, on the CPU."""
        return {"scale": self.scale.cpu().clone(), "amax_history": self.amax_history.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Continue from saved tensors; return whether they fit the history's length."""
        history = state["amax_history"]
        if history.shape != self.amax_history.shape:
            return False
        device = self.scale.device
        self.scale, self.amax_history = state["scale"].to(device).clone(), history.to(device).clone()
        return True
