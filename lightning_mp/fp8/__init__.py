"""FP8 for the Linear layers of a model: settings, conversion, and the two backends."""

from lightning_mp.fp8.config import FP8Config
from lightning_mp.fp8.coverage import Coverage, LayerRow
from lightning_mp.fp8.engine import FP8Engine
from lightning_mp.fp8.layer import FP8Linear
from lightning_mp.fp8.statistics import OperandStatistics

__all__ = ["Coverage", "FP8Config", "FP8Engine", "FP8Linear", "LayerRow", "OperandStatistics"]
