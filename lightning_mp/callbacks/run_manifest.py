"""The precision manifest of a run, whoever's plugin it uses."""

from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_mp.formats import HALF_DTYPES
from lightning_mp.loss_scale import DynamicLossScale, LossScaleRule
from lightning_mp.policy import PrecisionPolicy
from lightning_mp.precision import ManifestRow, MixedPrecision
from lightning_mp.precision.manifest import build_manifest

__all__ = ["describe_coverage", "describe_precision", "is_fp8_run", "read_manifest"]

_SAME_AS_OURS = ("32-true", "16-mixed", "bf16-mixed")


def read_manifest(trainer: Trainer, pl_module: LightningModule) -> list[ManifestRow]:
    """Return which module computes in what, as of now.

    Without ``MixedPrecision`` it is read from the name of the plugin's precision: autocast by torch's
    rules, or, as for ``bf16-true``, everything in the dtype that the parameters have.
    """
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision):
        return plugin.manifest()
    precision = str(plugin.precision)
    if precision in _SAME_AS_OURS:
        return _without_masters(build_manifest(pl_module, PrecisionPolicy.parse(precision)))
    rows = _without_masters(build_manifest(pl_module, PrecisionPolicy.parse("fp32")))
    reason = f"precision={precision!r}: computes as stored"
    return [replace(row, compute_dtype=row.param_dtype, reason=reason) for row in rows]


def _without_masters(rows: list[ManifestRow]) -> list[ManifestRow]:
    """Say that 16-bit parameters have no FP32 values behind them: only ``MixedPrecision`` keeps those."""
    return [replace(row, master="none") if row.param_dtype in HALF_DTYPES else row for row in rows]


def is_fp8_run(trainer: Trainer) -> bool:
    """Tell whether matrix products are to run in FP8."""
    return str(trainer.precision_plugin.precision).startswith("transformer-engine")


def describe_coverage(trainer: Trainer) -> str:
    """Return how much of the model runs in FP8, empty where no plugin of ours knows."""
    plugin = trainer.precision_plugin
    engine = plugin.fp8_engine if isinstance(plugin, MixedPrecision) else None
    return "" if engine is None else engine.coverage.shares


def describe_precision(trainer: Trainer) -> dict[str, Any]:
    """Return the settings of the run that decide its precision, as plain values."""
    plugin = trainer.precision_plugin
    settings: dict[str, Any] = {
        "plugin": type(plugin).__name__,
        "precision": str(plugin.precision),
        "device": str(trainer.strategy.root_device.type),
        "num_ranks": trainer.world_size,
    }
    if isinstance(plugin, MixedPrecision):
        policy = plugin.policy
        settings["precision"] = policy.precision
        settings["master_weights"] = policy.master_weights
        settings["on_nonfinite"] = policy.on_nonfinite
        settings["reduce_dtype"] = policy.reduce_dtype
        settings["loss_scale"] = _describe_rule(plugin.scaler.rule) if plugin.scaler is not None else "none"
    return settings


def _describe_rule(rule: LossScaleRule) -> str:
    if isinstance(rule, DynamicLossScale):
        return f"dynamic from {rule.init_scale:g}"
    return f"static {rule.init_scale:g}"
