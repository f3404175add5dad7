"""What to pin, as one frozen value that is checked where it is written."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.pinning.functions import OutputRule, PinKind
from lightning_mp.selection import Selector

__all__ = ["PinSpec"]


@dataclass(frozen=True)
class PinSpec:
    """What to keep in FP32.

    Args:
        pins: Kinds of functions and of torch.nn modules.
        modules: Further modules, by class or by ``fnmatch`` pattern over the full dotted name, with
            everything inside them.
        output: ``"float32"`` returns FP32; ``"input"`` the dtype of the input. A loss is always FP32.

    Raises:
        SettingValueError: If a kind or the output rule is unknown, or nothing is named.
        SettingTypeError: If ``pins`` is not a collection of names.
    """

    pins: tuple[PinKind, ...] = get_args(PinKind)
    modules: tuple[Selector, ...] = ()
    output: OutputRule = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "pins", _as_tuple(self.pins, "pins"))
        object.__setattr__(self, "modules", _as_tuple(self.modules, "modules"))
        for kind in self.pins:
            _check_choice("pins", kind, get_args(PinKind))
        _check_choice("output", self.output, get_args(OutputRule))
        if not self.pins and not self.modules:
            raise SettingValueError("pins=() and modules=() name nothing to pin. Name some, or remove FP32Pin.")


def _as_tuple(value: Any, name: str) -> tuple[Any, ...]:
    if isinstance(value, (str, type)):
        return (value,)
    if not isinstance(value, Iterable):
        raise SettingTypeError(f"{name}={value!r} is a {type(value).__name__}. Pass a tuple or list.")
    return tuple(value)


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingValueError(f"{name}: {value!r} is not known. Use {', '.join(map(repr, allowed))}.")
