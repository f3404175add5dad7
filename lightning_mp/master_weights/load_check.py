"""What ``load_state_dict`` would refuse, found before it has loaded anything.

torch copies key by key and raises at the end, which leaves half of a checkpoint in the module. While a
module has masters the same faults are looked for first: keys that are missing or unexpected, other shapes,
and what cannot become a master. Modules that change what they load (a ``_load_from_state_dict`` or load hooks
of their own) are left to torch with all that is below them; the hooks of ``torch.nn.utils``, as of weight norm,
are tried on a copy.
"""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.overrides import is_tensor_like

from lightning_mp.errors import UnsupportedError

__all__ = ["OwnHook", "RunningLoad", "check_load", "fits"]

# These add the counter that checkpoints of torch 0.4 lack, or only complain.
_TORCHS_LOADS = (
    nn.Module._load_from_state_dict,
    _NormBase._load_from_state_dict,
    _InstanceNorm._load_from_state_dict,
)
_EXTRA_STATE = "_extra_state"
_NUM_SHOWN = 10


class OwnHook:
    """Marks load hooks of ours, or what they are methods of: they change no key."""


class RunningLoad(NamedTuple):
    """The ``load_state_dict`` that is running.

    Args:
        root: The module that it was called on.
        is_strict: Whether it raises for missing and unexpected keys.
    """

    root: nn.Module
    is_strict: bool

    @staticmethod
    def find() -> "RunningLoad | None":
        """Find it from inside a load hook; ``None`` under a loader that works without torch's.

        torch tells its load hooks ``strict=True`` in every load, so the caller's own value is read from
        the frame of ``Module.load_state_dict``.
        """
        frame = sys._getframe(1)
        while frame.f_code is not nn.Module.load_state_dict.__code__:
            if frame.f_back is None:
                return None
            frame = frame.f_back
        root = frame.f_locals["self"]
        forgives = _has_foreign(root._load_state_dict_post_hooks.values())
        return RunningLoad(root, bool(frame.f_locals["strict"]) and not forgives)


def check_load(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    mastered: Collection[nn.Parameter],
    *,
    own_hook: OwnHook,
    is_strict: bool,
) -> None:
    """Refuse a ``state_dict`` that torch would refuse, or that cannot become masters; call it in a load pre-hook.

    Args:
        module: The module that the hook belongs to.
        state_dict: What the hook got.
        prefix: The prefix of the keys of ``module`` in it.
        mastered: Parameters that have masters.
        own_hook: The calling hook: hooks of ``module`` before it have changed ``state_dict`` already.
        is_strict: Whether keys must match.

    Raises:
        UnsupportedError: With all faults, in torch's words where torch has the same ones.
    """
    metadata = getattr(state_dict, "_metadata", None) or {}
    state_dict = dict(state_dict)
    expected: dict[str, Tensor | None] = {}
    optional: set[str] = set()
    unknown: list[str] = []  # prefixes under which only the modules themselves know
    for fqn, child in module.named_modules(prefix=prefix.removesuffix("."), remove_duplicate=False):
        start = f"{fqn}." if fqn else ""
        if any(start.startswith(each) for each in unknown):
            continue
        if not _try_hooks(child, state_dict, start, metadata.get(fqn, {}), own_hook if child is module else None):
            unknown.append(start)
            continue
        # A post-hook may take any key from the lists of missing and unexpected ones.
        is_strict = is_strict and not _has_foreign(child._load_state_dict_post_hooks.values())
        expected.update((start + name, value) for name, value in _own_entries(child))
        if isinstance(child, _NormBase) and (metadata.get(fqn, {}).get("version") or 0) < 2:
            optional.add(f"{start}num_batches_tracked")
    faults: list[str] = []
    if is_strict:
        faults += _name_faults(expected, optional, state_dict, prefix, unknown)
    faults += _entry_faults(expected, state_dict, mastered)
    if faults:
        raise UnsupportedError(
            f"master_weights: the checkpoint does not fit {type(module).__name__}; nothing was loaded into it.\n\t"
            + "\n\t".join(faults)
            + "\nBuild the model with the checkpoint's sizes and names. With strict=False keys may be missing or "
            "unexpected; one that does not fit has to be dropped from the checkpoint."
        )


def fits(value: Tensor, param: Tensor) -> bool:
    """Whether torch copies ``value`` into ``param``, whose shapes may differ for one element only."""
    return value.shape == param.shape or (param.dim() == 0 and value.shape == (1,))


def _try_hooks(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, own_hook: OwnHook | None
) -> bool:
    """Let torch's own hooks of ``module`` rename keys in ``state_dict``; return whether no others change them."""
    loads = module._load_from_state_dict
    wrapped: Iterable[Any] = module._load_state_dict_pre_hooks.values()
    hooks = [each.hook for each in wrapped]
    if own_hook in hooks:
        hooks = hooks[hooks.index(own_hook) + 1 :]  # those before it have run
    foreign = [hook for hook in hooks if _has_foreign([hook])]
    if getattr(loads, "__func__", loads) not in _TORCHS_LOADS or not all(map(_is_of_torch_utils, foreign)):
        return False
    for hook in foreign:
        part = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        hook(part, prefix, metadata, True, [], [], [])
        state_dict.update(part)
    return True


def _is_of_torch_utils(hook: Any) -> bool:
    home = hook if isinstance(hook, FunctionType) else type(hook)
    return str(home.__module__).startswith("torch.nn.utils.")


def _has_foreign(hooks: Iterable[Any]) -> bool:
    return any(not isinstance(getattr(hook, "__self__", hook), OwnHook) for hook in hooks)


def _own_entries(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Yield what ``module`` itself loads: its parameters, persistent buffers, and extra state as None."""
    for name, value in (*module._parameters.items(), *module._buffers.items()):
        if value is not None and name not in module._non_persistent_buffers_set:
            yield name, value
    if type(module).set_extra_state is not nn.Module.set_extra_state:
        yield _EXTRA_STATE, None


def _name_faults(
    expected: Mapping[str, Any],
    optional: Collection[str],
    state_dict: Mapping[str, Any],
    prefix: str,
    unknown: Collection[str],
) -> Iterator[str]:
    def counts(key: str) -> bool:
        return key.startswith(prefix) and not any(key.startswith(each) for each in unknown)

    missing = [key for key in expected if key not in state_dict and key not in optional and counts(key)]
    unexpected = [key for key in state_dict if key not in expected and counts(key)]
    for what, keys in (("Missing", missing), ("Unexpected", unexpected)):
        if keys:
            shown = ", ".join(f'"{key}"' for key in keys[:_NUM_SHOWN])
            more = f" and {len(keys) - _NUM_SHOWN} more" if len(keys) > _NUM_SHOWN else ""
            yield f"{what} key(s) in state_dict: {shown}{more}."


def _entry_faults(
    expected: Mapping[str, Tensor | None],
    state_dict: Mapping[str, Any],
    mastered: Collection[nn.Parameter],
) -> list[str]:
    entries = [(key, state_dict[key], target) for key, target in expected.items() if key in state_dict]
    found = [_entry_fault(*entry, mastered) for entry in entries]
    faults = [fault for fault in found if fault is not None]
    more = [f"and {len(faults) - _NUM_SHOWN} more of these"] if len(faults) > _NUM_SHOWN else []
    return faults[:_NUM_SHOWN] + more


def _entry_fault(key: str, value: Any, target: Tensor | None, mastered: Collection[nn.Parameter]) -> str | None:
    if target is None or is_lazy(target):
        return None
    if target in mastered and not (isinstance(value, Tensor) and value.is_floating_point()):
        return f"{key!r} is {_describe(value)}, and a master needs a floating-point tensor."
    if not is_tensor_like(value):  # type: ignore[no-untyped-call]
        return f"{key!r} is {_describe(value)}, and a tensor is needed."
    if value.is_meta or value.layout is not torch.strided:
        return f"{key!r} is {_describe(value)}, and a dense one with values is needed."
    if not fits(value, target):
        return (
            f"size mismatch for {key}: copying a param with shape {value.shape} from checkpoint, the shape in current "
            f"model is {target.shape}."
        )
    return None


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    kind = "meta " if value.is_meta else "" if value.layout is torch.strided else "sparse "
    return f"a {kind}tensor of {value.dtype}"
