"""Mixed-precision training for PyTorch Lightning: fast, small and visible."""

from lightning_mp import metrics
from lightning_mp.__about__ import __version__
from lightning_mp.callbacks import (
    FP8Monitor,
    FP32Pin,
    GradientRangeMonitor,
    LossScaleMonitor,
    OverflowMonitor,
    PrecisionReport,
    PrecisionSummary,
)
from lightning_mp.errors import (
    FP8UnavailableError,
    LightningMPError,
    LossScaleError,
    OverflowFoundError,
    UnmatchedPatternError,
    UnsupportedError,
)
from lightning_mp.fp8 import FP8Config
from lightning_mp.loss_scale import DynamicLossScale, StaticLossScale
from lightning_mp.memory import MemoryEstimate, estimate_memory
from lightning_mp.precision import MixedPrecision

__all__ = [
    "DynamicLossScale",
    "FP32Pin",
    "FP8Config",
    "FP8Monitor",
    "FP8UnavailableError",
    "GradientRangeMonitor",
    "LightningMPError",
    "LossScaleError",
    "LossScaleMonitor",
    "MemoryEstimate",
    "MixedPrecision",
    "OverflowFoundError",
    "OverflowMonitor",
    "PrecisionReport",
    "PrecisionSummary",
    "StaticLossScale",
    "UnmatchedPatternError",
    "UnsupportedError",
    "__version__",
    "estimate_memory",
    "metrics",
]
