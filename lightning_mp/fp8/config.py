"""``FP8Config``: the settings of the FP8 path as one frozen value."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.fp8.recipes import parse_recipe
from lightning_mp.selection import Selector

__all__ = ["FP8Config"]

_BACKENDS = ("auto", "transformer_engine", "emulated")
_FLAGS = ("skip_output_head", "fp8_in_eval", "cache_weights")


@dataclass(frozen=True)
class FP8Config:
    """Which layers run in FP8, and how.

    Args:
        recipe: How scales are chosen: ``"current"``, ``"delayed"``, ``"block"``, ``"mxfp8"``,
            ``"nvfp4"``, a dict with that ``name`` and the recipe's own fields under Transformer
            Engine's names, or a Transformer Engine recipe object.
        backend: ``"transformer_engine"``, ``"emulated"`` (the same numbers on any device, slowly, but NaN
            where an operand is infinite, which the library saturates), or ``"auto"``: Transformer Engine,
            or an error that says what is missing.
        exclude: Classes and dotted-name patterns of modules that stay out; what they contain too.
        include: Classes and dotted-name patterns of modules to convert; ``None`` for all.
        skip_output_head: Whether the Linear that shares an embedding's weight, else the last one in
            registration order, stays in 16 bits.
        fp8_in_eval: Whether modules in evaluation mode use FP8 as well. If not, that goes for training steps
            too: a frozen backbone that was put in ``eval()`` runs in BF16. Delayed scaling learns its scales
            in training mode only.
        cache_weights: Whether a weight is cast once per optimizer step, not once per forward. In evaluation
            Transformer Engine casts it at each forward.

    Raises:
        SettingTypeError: If a setting has a type that is not allowed.
        SettingValueError: If a setting has a value that is not allowed.

    Example:
        >>> FP8Config(recipe={"name": "delayed", "margin": 1}).backend
        'auto'
    """

    recipe: Any = "current"
    backend: str = "auto"
    exclude: tuple[Selector, ...] = ()
    include: tuple[Selector, ...] | None = None
    skip_output_head: bool = True
    fp8_in_eval: bool = False
    cache_weights: bool = True

    def __post_init__(self) -> None:
        recipe = dict(self.recipe) if isinstance(self.recipe, Mapping) else self.recipe
        parse_recipe(recipe)
        object.__setattr__(self, "recipe", recipe)
        if self.backend not in _BACKENDS:
            raise SettingValueError(
                f"backend={self.backend!r} is not known.{_nearest(self.backend, _BACKENDS)} "
                f"Allowed: {_list(_BACKENDS)}."
            )
        object.__setattr__(self, "exclude", _selectors("exclude", self.exclude))
        if self.include is not None:
            object.__setattr__(self, "include", _selectors("include", self.include))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise SettingTypeError(f"{name}={getattr(self, name)!r} is not allowed; it must be True or False.")

    @classmethod
    def parse(cls, value: Any) -> "FP8Config":
        """Return the settings for what a user wrote: ``None``, a recipe's name, a dict of fields, or a value.

        Raises:
            SettingTypeError: If it is none of these.
            SettingValueError: If a key is not known.

        Example:
            >>> FP8Config.parse({"recipe": "block"}).recipe
            'block'
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(recipe=value)
        if not isinstance(value, Mapping):
            raise SettingTypeError(
                f"fp8={value!r} has type {type(value).__name__}. Pass an FP8Config, a dict of its fields, or a "
                "recipe's name."
            )
        allowed = [field.name for field in fields(cls)]
        for key in value:
            if key not in allowed:
                raise SettingValueError(
                    f"fp8: {key!r} is not known.{_nearest(key, allowed)} Allowed: {_list(allowed)}."
                )
        return cls(**value)


def _selectors(argument: str, value: Any) -> tuple[Selector, ...]:
    """Return a tuple; one pattern or class may stand alone, and YAML brings lists."""
    given = (value,) if isinstance(value, (str, type)) else value
    items: tuple[Any, ...] | None = tuple(given) if isinstance(given, Iterable) else None
    if items is None or not all(isinstance(item, (str, type)) for item in items):
        raise SettingTypeError(f"{argument}={value!r} is not allowed; pass classes and dotted-name patterns.")
    return items


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _nearest(word: Any, allowed: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(str(word), list(allowed), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
