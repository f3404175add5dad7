"""The plugin's state in a checkpoint: GradScaler's flat keys, and ours beside them.

``scale``, ``growth_factor``, ``backoff_factor``, ``growth_interval`` and ``_growth_tracker`` are
always there, so that Lightning's own plugin loads our checkpoints in any precision. Everything else
stands under one versioned key, and only plain types, so that ``torch.load(weights_only=True)``
reads it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lightning_mp.grad_scaler import LossScaler
from lightning_mp.loss_scale import (
    DynamicLossScale,
    LossScaleState,
    StaticLossScale,
    loss_scale_settings,
    parse_loss_scale,
)
from lightning_mp.precision.steps import StepLedger

__all__ = ["LEGACY_KEYS", "dump_state", "restore_ledger", "restore_scaler", "saved_fp8", "saved_precision"]

_VERSION = 1
_EXTRAS = "lightning_mp"
_FLAT_KEYS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
LEGACY_KEYS = ("FSDPPrecision", "native_amp_scaling_state")
_COUNTS = ("attempts", "applied_steps", "skipped_steps", "consecutive_skips", "floor_overflows")
_FLAT_SETTINGS = ("growth_factor", "backoff_factor", "growth_interval")


def dump_state(
    precision: str,
    scaler: LossScaler | None,
    ledger: StepLedger,
    held: list[list[int]],
    *,
    fp8: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the state as plain values.

    Args:
        precision: Precision in force, such as ``"fp16"``.
        scaler: The loss scaler, if there is one.
        ledger: Counts of steps.
        held: Per held scheduler, the state of ``SchedulerHold``.
        fp8: State of the FP8 engine, if there is one: plain values and tensors.
    """
    # Without a scaler the flat keys are those of a fresh one: what an FP16 run should start from.
    flat = scaler.state_dict() if scaler is not None else torch.amp.GradScaler("cpu").state_dict()
    extras: dict[str, Any] = {
        "version": _VERSION,
        "precision": precision,
        "held_schedulers": held,
        **{name: getattr(ledger, name) for name in _COUNTS},
    }
    if fp8 is not None:
        extras["fp8"] = fp8
    if scaler is not None:
        extras["loss_scale"] = loss_scale_settings(scaler.rule)
        extras["hysteresis_left"] = int(scaler.state.hysteresis_left)
    return {**flat, _EXTRAS: extras}


def restore_ledger(ledger: StepLedger, state: Mapping[str, Any]) -> list[list[int]]:
    """Take over the counts, where the checkpoint has them; return the held schedulers' states."""
    extras = state.get(_EXTRAS, {})
    for name in _COUNTS:
        setattr(ledger, name, int(extras.get(name, 0)))
    ledger.keep_last(None)
    return [[int(n) for n in held] for held in extras.get("held_schedulers", [])]


def saved_precision(state: Mapping[str, Any]) -> str:
    """Return the precision that wrote the state; Lightning's own plugin writes one for FP16 only."""
    return str(state.get(_EXTRAS, {}).get("precision", "fp16"))


def saved_fp8(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of the FP8 engine; empty if the run that wrote it had none."""
    return dict(state.get(_EXTRAS, {}).get("fp8", {}))


def restore_scaler(scaler: LossScaler, state: Mapping[str, Any]) -> list[str]:
    """Continue the loss scale from a checkpoint.

    The checkpoint's settings win where it has them, as in ``torch.amp.GradScaler``; what it lacks
    keeps the value of this run. A static scale that was asked for stays.

    Returns:
        One phrase per setting that differs from what this run asked for.
    """
    if any(key not in state for key in _FLAT_KEYS) or saved_precision(state) != "fp16":
        return []
    asked = scaler.rule
    if isinstance(asked, StaticLossScale):
        same = state["scale"] == asked.scale
        return [] if same else [f"loss scale stays {asked.scale} as asked for (checkpoint: {state['scale']})"]
    rule = _saved_rule(asked, state)
    scale = min(rule.max_scale, max(rule.min_scale, float(state["scale"])))
    left = int(state.get(_EXTRAS, {}).get("hysteresis_left", rule.hysteresis))
    scaler.restore(rule, LossScaleState(scale, int(state["_growth_tracker"]), left))
    before, after = loss_scale_settings(asked), loss_scale_settings(rule)
    was_static = isinstance(parse_loss_scale(state.get(_EXTRAS, {}).get("loss_scale")), StaticLossScale)
    if was_static and scale != asked.init_scale:
        return [f"the loss scale was static and starts at {scale} from the checkpoint (init_scale={asked.init_scale})"]
    return [f"{k}={after[k]} from the checkpoint (asked for: {before[k]})" for k in after if after[k] != before[k]]


def _saved_rule(asked: DynamicLossScale, state: Mapping[str, Any]) -> DynamicLossScale:
    saved = parse_loss_scale(state.get(_EXTRAS, {}).get("loss_scale"))
    if isinstance(saved, DynamicLossScale):
        return saved
    if isinstance(saved, StaticLossScale):
        return asked
    return _replace_where_valid(asked, {key: state[key] for key in _FLAT_SETTINGS})


def _replace_where_valid(asked: DynamicLossScale, settings: dict[str, Any]) -> DynamicLossScale:
    # Factors of 1.0 are how a static scale reads in GradScaler's keys: they are no dynamic rule.
    if settings["growth_factor"] <= 1 or settings["backoff_factor"] >= 1:
        return asked
    return replace(asked, **settings)
