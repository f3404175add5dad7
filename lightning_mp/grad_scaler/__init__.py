"""Scaling the loss, unscaling and checking gradients, and skipping a step on the device.

``LossScaler`` holds the scale and applies its rule in place; ``GradientUnscaler`` divides each
gradient by the scale exactly once and says whether one was non-finite; ``Readback`` is the only
place that reads a result of the device.
"""

from lightning_mp.grad_scaler.backward_watch import BackwardWatch
from lightning_mp.grad_scaler.device_skip import step_unless, supports_skip_on_device
from lightning_mp.grad_scaler.readback import Readback
from lightning_mp.grad_scaler.scaler import LossScaler
from lightning_mp.grad_scaler.unscaler import GradientUnscaler, gradient_amaxes

__all__ = [
    "BackwardWatch",
    "GradientUnscaler",
    "LossScaler",
    "Readback",
    "gradient_amaxes",
    "step_unless",
    "supports_skip_on_device",
]
