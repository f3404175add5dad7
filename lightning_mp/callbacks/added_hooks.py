"""Hooks that one callback object gets for one run, beside those that its class has."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback

__all__ = ["add_to_hook", "remove_added_hooks", "without_added_hooks"]


class _AddedHook:
    """Runs something of ours, then the hook that it stands in front of."""

    def __init__(self, callback: Callback, name: str, first: Callable[..., None]) -> None:
        self.replaced = vars(callback).get(name)
        self._first = first
        self._own = getattr(callback, name)

    def __call__(self, *args: Any) -> None:
        self._first(*args)
        self._own(*args)


def add_to_hook(callback: Callback, name: str, first: Callable[..., None]) -> None:
    """Have ``first`` run before the hook ``name`` of this object, which a subclass may override as ever.

    It is set on the object: a hook that a monitor's class overrides costs every run 15 us a step, because
    the plugin calls no hook that nobody overrides.
    """
    setattr(callback, name, _AddedHook(callback, name, first))


def remove_added_hooks(callback: Callback) -> None:
    """Leave the object as it was before ``add_to_hook``."""
    kept = without_added_hooks(vars(callback))
    vars(callback).clear()
    vars(callback).update(kept)


def without_added_hooks(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a callback as a copy of it should have them, which belongs to no run."""
    kept = {}
    for name, value in attributes.items():
        if not isinstance(value, _AddedHook):
            kept[name] = value
        elif value.replaced is not None:
            kept[name] = value.replaced
    return kept
