"""The rules of loss scaling: frozen settings, and the pure step from one state to the next.

A rule never holds the scale itself. ``rule.next(state, found_inf=...)`` returns the state for the
next step, from Python numbers to Python numbers or from tensors to tensors on their device, so that
a scale can be updated without asking the host. What is done with the scale is in ``grad_scaler``.
"""

import difflib
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_mp.errors import SettingTypeError, SettingValueError

__all__ = ["DynamicLossScale", "LossScaleRule", "LossScaleState", "StaticLossScale", "parse_loss_scale"]

_FP32 = torch.finfo(torch.float32)
# The inverse of a smaller scale is infinite in FP32, or is on devices that flush subnormals to zero.
_SCALE_RANGE = f"a finite number above zero, from {_FP32.tiny:.4g} to {_FP32.max:.4g}"


@dataclass(frozen=True)
class LossScaleState:
    """What changes from step to step: numbers on the host, or 0-dim tensors on a device.

    Args:
        scale: Factor on the loss, FP32.
        growth_tracker: Clean steps since the scale last changed or was asked to grow.
        hysteresis_left: The scale is lowered on this overflow from here on (1: on the next one).
    """

    scale: float | Tensor
    growth_tracker: int | Tensor
    hysteresis_left: int | Tensor


@dataclass(frozen=True)
class StaticLossScale:
    """Multiply the loss by the same factor at every step.

    Args:
        scale: The factor: above zero, a normal FP32 number. A power of two loses no bit.

    Raises:
        SettingTypeError: If ``scale`` is not a number.
        SettingValueError: If ``scale`` is not above zero, or FP32 cannot hold it and its inverse.
    """

    scale: float

    def __post_init__(self) -> None:
        _check_number("scale", self.scale, "StaticLossScale")
        _check(_FP32.tiny <= self.scale <= _FP32.max, "StaticLossScale", "scale", self.scale, _SCALE_RANGE)
        object.__setattr__(self, "scale", float(self.scale))

    @property
    def init_scale(self) -> float:
        """The scale of the first step."""
        return self.scale

    def initial_state(self) -> LossScaleState:
        """Return the state before the first step."""
        return LossScaleState(self.scale, 0, 1)

    def next(self, state: LossScaleState, *, found_inf: bool | Tensor) -> LossScaleState:
        """Return ``state``: a static scale stays."""
        return state


@dataclass(frozen=True)
class DynamicLossScale:
    """Lower the loss scale when gradients overflow, raise it after a clean interval.

    With ``hysteresis=1`` and bounds that are not reached this is the rule of
    ``torch.amp.GradScaler``. Unlike there, the scale cannot fall to zero or rise without end.

    Args:
        init_scale: Scale of the first step.
        growth_factor: Factor on the scale after ``growth_interval`` clean steps in a row; above 1.
        backoff_factor: Factor on the scale after an overflow; between 0 and 1.
        growth_interval: Clean steps in a row before the scale grows.
        min_scale: Floor of the scale.
        max_scale: Cap of the scale.
        hysteresis: The scale backs off on this overflow (1: on the first) and on every further one
            until the count is refilled.
        hysteresis_refill: ``"growth"`` refills the count when the scale grows (Megatron-LM);
            ``"clean_step"`` on any clean step, so that only overflows in a row count.
        floor_patience: ``LossScaleError`` on this overflow in a row whose backward used
            ``min_scale``.

    Raises:
        SettingTypeError: If a field has the wrong type.
        SettingValueError: If a field is out of range, or the bounds exclude each other.

    References:
        Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2 (arXiv:1710.03740).

    Example:
        >>> rule = DynamicLossScale(init_scale=8.0, growth_interval=1)
        >>> state = rule.next(rule.initial_state(), found_inf=True)
        >>> state.scale, rule.next(state, found_inf=False).scale
        (4.0, 8.0)
    """

    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_scale: float = 1.0
    max_scale: float = 2.0**32
    hysteresis: int = 1
    hysteresis_refill: Literal["growth", "clean_step"] = "growth"
    floor_patience: int = 20

    def __post_init__(self) -> None:
        owner = "DynamicLossScale"
        for name in ("init_scale", "growth_factor", "backoff_factor", "min_scale", "max_scale"):
            value = getattr(self, name)
            _check_number(name, value, owner)
            if name.endswith("scale"):
                _check(_FP32.tiny <= value <= _FP32.max, owner, name, value, _SCALE_RANGE)
            else:
                _check(0 < value <= _FP32.max, owner, name, value, "a finite number above zero")
            object.__setattr__(self, name, float(value))
        for name in ("growth_interval", "hysteresis", "floor_patience"):
            value = getattr(self, name)
            _check_count(name, value, owner)
            _check(value >= 1, owner, name, value, "an integer of at least 1")
        _check(self.growth_factor > 1, owner, "growth_factor", self.growth_factor, "above 1, so that the scale grows")
        _check(self.backoff_factor < 1, owner, "backoff_factor", self.backoff_factor, "below 1, so that it backs off")
        _check(
            self.min_scale <= self.max_scale, owner, "min_scale", self.min_scale, f"at most max_scale={self.max_scale}"
        )
        _check(
            self.min_scale <= self.init_scale <= self.max_scale,
            owner,
            "init_scale",
            self.init_scale,
            f"between min_scale={self.min_scale} and max_scale={self.max_scale}",
        )
        refills = ("growth", "clean_step")
        _check(
            self.hysteresis_refill in refills, owner, "hysteresis_refill", self.hysteresis_refill, f"one of {refills}"
        )

    def initial_state(self) -> LossScaleState:
        """Return the state before the first step."""
        return LossScaleState(self.init_scale, 0, self.hysteresis)

    def next(self, state: LossScaleState, *, found_inf: bool | Tensor) -> LossScaleState:
        """Return the state after a step whose gradients were checked.

        Args:
            state: Numbers, or 0-dim tensors of one device (scale FP32, the counts int32).
            found_inf: Whether a gradient was Inf or NaN: a bool, or a 0-dim tensor (nonzero: yes).

        Returns:
            The next state, of the kind that ``state`` has. The scale lies in
            ``[min_scale, max_scale]`` and is rounded to FP32, as torch's own update rounds.
        """
        if isinstance(state.scale, Tensor):
            return self._next_on_device(state, torch.as_tensor(found_inf, device=state.scale.device) != 0)
        scale, tracker, left = float(state.scale), int(state.growth_tracker), int(state.hysteresis_left)
        if found_inf:
            lowered = self._bounded(scale * self.backoff_factor) if left == 1 else scale
            return LossScaleState(lowered, 0, max(1, left - 1))
        grows = tracker + 1 == self.growth_interval
        if grows or self.hysteresis_refill == "clean_step":
            left = self.hysteresis
        return LossScaleState(
            self._bounded(scale * self.growth_factor) if grows else scale, 0 if grows else tracker + 1, left
        )

    def _next_on_device(self, state: LossScaleState, found_inf: Tensor) -> LossScaleState:
        scale, tracker, left = map(torch.as_tensor, (state.scale, state.growth_tracker, state.hysteresis_left))
        # torch's kernel multiplies the FP32 scale by a double and rounds once; MPS has no double.
        exact = scale if scale.device.type == "mps" else scale.double()
        lowered = (exact * self.backoff_factor).clamp(self.min_scale, self.max_scale).to(scale.dtype)
        raised = (exact * self.growth_factor).clamp(self.min_scale, self.max_scale).to(scale.dtype)
        grows = tracker + 1 == self.growth_interval
        refills = torch.ones_like(grows) if self.hysteresis_refill == "clean_step" else grows
        zero = torch.zeros_like(tracker)
        return LossScaleState(
            torch.where(
                found_inf,
                torch.where(left == 1, lowered, scale),
                torch.where(grows, raised, scale),
            ),
            torch.where(found_inf | grows, zero, tracker + 1),
            torch.where(
                found_inf, (left - 1).clamp(min=1), torch.where(refills, torch.full_like(left, self.hysteresis), left)
            ),
        )

    def _bounded(self, scale: float) -> float:
        return min(self.max_scale, max(self.min_scale, _round_to_fp32(min(scale, self.max_scale))))


LossScaleRule: TypeAlias = DynamicLossScale | StaticLossScale


def parse_loss_scale(value: Any) -> LossScaleRule | None:
    """Turn what a user writes for ``loss_scale`` into a rule.

    Args:
        value: ``None``, ``"dynamic"``, a number or its text (static), a rule, or a mapping with the
            fields of ``DynamicLossScale``, or with ``scale`` alone for a static one.

    Returns:
        The rule; ``None`` for ``None``.

    Raises:
        SettingTypeError: If ``value`` is none of these.
        SettingValueError: If a word, a key or a field is not allowed.
    """
    if value is None or isinstance(value, DynamicLossScale | StaticLossScale):
        return value
    if isinstance(value, str):
        return _parse_word(value)
    if isinstance(value, Mapping):
        return _parse_mapping(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return StaticLossScale(float(value))
    raise SettingTypeError(
        f"loss_scale={value!r} is a {type(value).__name__}. Allowed: None, 'dynamic', a number (static), "
        "DynamicLossScale(...), StaticLossScale(...), or a dict of the fields of one of them."
    )


def loss_scale_settings(rule: LossScaleRule) -> dict[str, Any]:
    """Return the rule's fields as plain values, as ``parse_loss_scale`` reads them."""
    return asdict(rule)


def _parse_word(word: str) -> LossScaleRule:
    if word == "dynamic":
        return DynamicLossScale()
    try:
        return StaticLossScale(float(word))
    except ValueError as error:
        if isinstance(error, SettingValueError):
            raise
        raise SettingValueError(
            f"loss_scale={word!r} is not known. Allowed: 'dynamic', or a number for a static scale."
        ) from None


def _parse_mapping(settings: Mapping[str, Any]) -> LossScaleRule:
    if set(settings) == {"scale"}:
        return StaticLossScale(settings["scale"])
    allowed = [f.name for f in fields(DynamicLossScale)]
    for key in settings:
        if key not in allowed:
            nearest = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise SettingValueError(
                f"loss_scale has the key {key!r}, which is no field of DynamicLossScale.{hint} "
                f"Allowed: {', '.join(allowed)}; or 'scale' alone for a static scale."
            )
    return DynamicLossScale(**settings)


def _round_to_fp32(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def _check_number(name: str, value: Any, owner: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SettingTypeError(f"{owner}: {name}={value!r} is a {type(value).__name__}; it must be a number.")
    if math.isnan(value):
        raise SettingValueError(f"{owner}: {name}={value!r} is not a number; it must be finite.")


def _check_count(name: str, value: Any, owner: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingTypeError(f"{owner}: {name}={value!r} is a {type(value).__name__}; it must be an integer.")


def _check(condition: bool, owner: str, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise SettingValueError(f"{owner}: {name}={value!r} is not allowed; it must be {allowed}.")
