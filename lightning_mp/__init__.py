"""Mixed-precision training for PyTorch Lightning: fast, small and visible."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_mp.__about__ import __version__
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
from lightning_mp.precision import MixedPrecision

if TYPE_CHECKING:
    from lightning_mp import metrics
    from lightning_mp.callbacks import (
        FP8Monitor,
        FP32Pin,
        GradientRangeMonitor,
        LossScaleMonitor,
        OverflowMonitor,
        PrecisionReport,
        PrecisionSummary,
    )
    from lightning_mp.memory import MemoryEstimate, estimate_memory

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

# Imported at first use: half of the import time is theirs, and a run with the plugin alone needs none.
_LAZY = {
    **dict.fromkeys(
        (
            "FP32Pin",
            "FP8Monitor",
            "GradientRangeMonitor",
            "LossScaleMonitor",
            "OverflowMonitor",
            "PrecisionReport",
            "PrecisionSummary",
        ),
        "lightning_mp.callbacks",
    ),
    **dict.fromkeys(("MemoryEstimate", "estimate_memory"), "lightning_mp.memory"),
}


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return import_module("lightning_mp.metrics")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
