"""Callbacks: they read and log, and never steer the numerics."""

from lightning_mp.callbacks.fp8_monitor import FP8Monitor, FP8Record
from lightning_mp.callbacks.fp32_pin import FP32Pin
from lightning_mp.callbacks.gradient_range_monitor import GradientRangeMonitor
from lightning_mp.callbacks.loss_scale_monitor import LossScaleMonitor
from lightning_mp.callbacks.overflow_monitor import OverflowEvent, OverflowMonitor
from lightning_mp.callbacks.precision_report import PrecisionReport
from lightning_mp.callbacks.precision_summary import PrecisionSummary

__all__ = [
    "FP32Pin",
    "FP8Monitor",
    "FP8Record",
    "GradientRangeMonitor",
    "LossScaleMonitor",
    "OverflowEvent",
    "OverflowMonitor",
    "PrecisionReport",
    "PrecisionSummary",
]
