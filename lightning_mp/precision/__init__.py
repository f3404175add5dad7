"""``MixedPrecision``, the Precision plugin, and what it reports."""

from lightning_mp.precision.manifest import ManifestRow
from lightning_mp.precision.plugin import MixedPrecision
from lightning_mp.precision.steps import StepReport

__all__ = ["ManifestRow", "MixedPrecision", "StepReport"]
