"""torchmetrics behind the monitors, usable alone in any LightningModule."""

from lightning_mp.metrics.exponents import GradientExponentHistogram
from lightning_mp.metrics.fp8_layers import FP8LayerStats
from lightning_mp.metrics.health import Health, ScaleLimits, ScaleRecord, find_first_applied, health_spans, judge_health
from lightning_mp.metrics.overflow_rate import OverflowRate
from lightning_mp.metrics.trajectory import LossScaleTrajectory
from lightning_mp.metrics.underflow import UnderflowFraction

__all__ = [
    "FP8LayerStats",
    "GradientExponentHistogram",
    "Health",
    "LossScaleTrajectory",
    "OverflowRate",
    "ScaleLimits",
    "ScaleRecord",
    "UnderflowFraction",
    "find_first_applied",
    "health_spans",
    "judge_health",
]
