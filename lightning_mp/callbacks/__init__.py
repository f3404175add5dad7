"""Callbacks: they read and log, and never steer the numerics."""

from lightning_mp.callbacks.gradient_range_monitor import GradientRangeMonitor
from lightning_mp.callbacks.loss_scale_monitor import LossScaleMonitor
from lightning_mp.callbacks.overflow_monitor import OverflowEvent, OverflowMonitor
from lightning_mp.callbacks.precision_summary import PrecisionSummary

__all__ = ["GradientRangeMonitor", "LossScaleMonitor", "OverflowEvent", "OverflowMonitor", "PrecisionSummary"]
