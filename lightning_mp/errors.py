"""Everything the package raises on purpose, as one tree.

``LightningMPError`` is the root, so that one ``except`` catches all of it. Each class is a built-in
``ValueError``, ``TypeError`` or ``RuntimeError`` too, so that callers who know only those are served.
"""

__all__ = [
    "FP8UnavailableError",
    "LightningMPError",
    "LossScaleError",
    "OverflowFoundError",
    "SettingTypeError",
    "SettingValueError",
    "UnmatchedPatternError",
    "UnsupportedError",
]


class LightningMPError(Exception):
    """Root of the exceptions of lightning_mp."""


class SettingValueError(LightningMPError, ValueError):
    """A setting has a value that is not allowed."""


class SettingTypeError(LightningMPError, TypeError):
    """A setting has a type that is not allowed."""


class UnmatchedPatternError(SettingValueError):
    """A pattern or class that selects modules matched none of them."""


class UnsupportedError(LightningMPError, RuntimeError):
    """A combination of settings, model, optimizer or device that is refused."""


class FP8UnavailableError(UnsupportedError):
    """FP8 was asked for and this machine or installation cannot run it."""


class LossScaleError(LightningMPError, RuntimeError):
    """The loss scale is at its floor and gradients still overflow."""


class OverflowFoundError(LightningMPError, RuntimeError):
    """A step had non-finite gradients and the settings ask to stop there."""
