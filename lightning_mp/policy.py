"""The settings of a run as one frozen value, parsed from what a user writes and checked as a whole."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.fp8 import FP8Config
from lightning_mp.loss_scale import DynamicLossScale, LossScaleRule, parse_loss_scale

__all__ = ["PrecisionPolicy"]

_ALIASES = {
    "fp32": ("32", "32-true"),
    "fp16": ("16", "16-mixed"),
    "bf16": ("bf16-mixed",),
    "fp8": ("fp8-mixed", "transformer-engine"),
    "auto": (),
}
_COMPUTE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
_LIGHTNING_NAMES = {"fp32": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed", "fp8": "transformer-engine"}
_MASTER_WEIGHTS = ("params", "copy", "split", "none")
_REDUCE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ON_NONFINITE = ("skip", "raise", "ignore")


@dataclass(frozen=True)
class PrecisionPolicy:
    """What a run computes in and how its steps are guarded.

    Build it with ``PrecisionPolicy.parse``, which accepts what users write and refuses settings that
    exclude each other.

    Args:
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"fp8"``, or ``"auto"`` until a device is known.
        loss_scale: The rule asked for; ``None`` leaves it to the precision.
        master_weights: Where the FP32 values that the optimizer updates live.
        fp8: Settings of the FP8 path; only with ``precision="fp8"``.
        reduce_dtype: Name of the dtype in which gradients travel between ranks.
        on_nonfinite: What happens to a step with Inf or NaN gradients.
        hold_schedulers: Whether step-interval schedulers wait for applied steps.
        device: Device type asked for; ``None`` follows the Trainer.
    """

    precision: str
    loss_scale: LossScaleRule | None = None
    master_weights: str = "params"
    fp8: FP8Config | None = None
    reduce_dtype: str = "fp32"
    on_nonfinite: str = "skip"
    hold_schedulers: bool = True
    device: str | None = None

    @classmethod
    def parse(
        cls,
        precision: str | int,
        *,
        loss_scale: Any = None,
        master_weights: str = "params",
        fp8: Any = None,
        reduce_dtype: str = "fp32",
        on_nonfinite: str = "skip",
        hold_schedulers: bool = True,
        device: str | torch.device | None = None,
    ) -> "PrecisionPolicy":
        """Return the policy for what a user wrote.

        Raises:
            SettingTypeError: If a setting has a type that is not allowed.
            SettingValueError: If a setting is not known, or two of them exclude each other.
        """
        if not isinstance(hold_schedulers, bool):
            raise SettingTypeError(f"hold_schedulers={hold_schedulers!r} is not allowed; it must be True or False.")
        policy = cls(
            precision=_parse_precision(precision),
            loss_scale=parse_loss_scale(loss_scale),
            master_weights=_parse_choice("master_weights", master_weights, _MASTER_WEIGHTS),
            fp8=_parse_fp8(precision, fp8),
            reduce_dtype=_parse_choice("reduce_dtype", reduce_dtype, tuple(_REDUCE_DTYPES)),
            on_nonfinite=_parse_choice("on_nonfinite", on_nonfinite, _ON_NONFINITE),
            hold_schedulers=hold_schedulers,
            device=_parse_device(device),
        )
        policy._check(loss_scale)
        return policy

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of matrix products, before FP8."""
        return _COMPUTE_DTYPES[self.precision]

    @property
    def reduce_torch_dtype(self) -> torch.dtype:
        """Dtype in which gradients travel between ranks."""
        return _REDUCE_DTYPES[self.reduce_dtype]

    @property
    def lightning_precision(self) -> str:
        """The name that Lightning uses for this precision."""
        return _LIGHTNING_NAMES[self.precision]

    @property
    def active_loss_scale(self) -> LossScaleRule | None:
        """The loss-scaling rule in force: dynamic for FP16 unless another is asked for, else none."""
        if self.precision != "fp16":
            return None
        return self.loss_scale or DynamicLossScale()

    def resolve(self, precision: str) -> "PrecisionPolicy":
        """Return the policy with ``"auto"`` replaced by the precision that a device gets."""
        return replace(self, precision=precision)

    def _check(self, loss_scale: Any) -> None:
        if self.loss_scale is not None and self.precision not in ("fp16", "auto"):
            raise SettingValueError(
                f"loss_scale={loss_scale!r} is set beside precision={self.precision!r}, which needs no loss "
                "scale: its gradients have the range of FP32. Remove loss_scale, or use precision='fp16'."
            )
        if self.fp8 is not None and self.precision != "fp8":
            raise SettingValueError(
                f"fp8={self.fp8!r} is set beside precision={self.precision!r}, which runs no FP8. "
                "Remove fp8, or use precision='fp8'."
            )
        if self.master_weights != "params" and self.precision == "fp32":
            raise SettingValueError(
                f"master_weights={self.master_weights!r} is set beside precision='fp32', whose parameters are FP32 "
                "themselves. Use master_weights='params', or a 16-bit precision."
            )
        if self.master_weights == "split" and self.precision in ("fp16", "auto"):
            raise SettingValueError(
                f"master_weights='split' is set beside precision={self.precision!r}. FP32 is a BF16 value plus 16 "
                "further bits, but no FP16 value plus 16 bits. Use master_weights='copy', or precision='bf16'."
            )


def _parse_fp8(precision: str | int, value: Any) -> FP8Config | None:
    """Return the settings, the default ones for FP8 where none are given."""
    if value is None and _parse_precision(precision) != "fp8":
        return None
    return FP8Config.parse(value)


def _parse_precision(value: str | int) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise SettingTypeError(
            f"precision={value!r} is a {type(value).__name__}; it must be one of {_known_precisions()}."
        )
    for name, aliases in _ALIASES.items():
        if str(value) == name or str(value) in aliases:
            return name
    hint = _nearest(str(value).lower(), [n for name, aliases in _ALIASES.items() for n in (name, *aliases)])
    if str(value).endswith("-true"):
        hint = " For 16-bit weights use MixedPrecision('bf16', master_weights='split') or 'none'."
    raise SettingValueError(f"precision={value!r} is not known.{hint} Allowed: {_known_precisions()}.")


def _known_precisions() -> str:
    names = [f"{name!r} ({', '.join(aliases)})" if aliases else repr(name) for name, aliases in _ALIASES.items()]
    return ", ".join(names)


def _parse_choice(argument: str, value: Any, allowed: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise SettingTypeError(
            f"{argument}={value!r} is a {type(value).__name__}; it must be one of {', '.join(map(repr, allowed))}."
        )
    if value not in allowed:
        raise SettingValueError(
            f"{argument}={value!r} is not known.{_nearest(value, allowed)} Allowed: {', '.join(map(repr, allowed))}."
        )
    return value


def _parse_device(device: str | torch.device | None) -> str | None:
    if device is None:
        return None
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise SettingValueError(
            f"device={device!r} is not a torch device. Allowed: None (the Trainer's), 'cpu', 'cuda', 'mps'. "
            f"torch says: {error}"
        ) from None


def _nearest(word: str, allowed: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(word, allowed, n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
