"""What ``load_state_dict`` would refuse, found before it has loaded anything.

torch copies key by key and raises at the end, which leaves half of a checkpoint in the module. While a
module has masters the same faults are looked for first: keys that are missing or unexpected, other shapes,
and what cannot become a master. Modules that change what they load (a ``_load_from_state_dict`` or load hooks
of their own) are left to torch with all that is below them.
"""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.overrides import is_tensor_like

from lightning_mp.errors import UnsupportedError

__all__ = ["OwnHook", "check_load", "fits"]

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


def check_load(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    mastered: Collection[nn.Parameter],
    own_hook: OwnHook,
) -> None:
    """Refuse a ``state_dict`` that torch would refuse, or that cannot become masters; call it in a load pre-hook.

    Args:
        module: The module that the hook belongs to.
        state_dict: What the hook got.
        prefix: The prefix of the keys of ``module`` in it.
        mastered: Parameters that have masters.
        own_hook: The calling hook: hooks of ``module`` before it have changed ``state_dict`` already.

    Raises:
        UnsupportedError: With all faults, in torch's words where torch has the same ones.
    """
    expected: dict[str, Tensor | None] = {}
    optional: set[str] = set()
    unknown: list[str] = []  # prefixes under which only the modules themselves know
    names_count = _is_strict()
    for fqn, child in module.named_modules(prefix=prefix.removesuffix("."), remove_duplicate=False):
        start = f"{fqn}." if fqn else ""
        if any(start.startswith(each) for each in unknown):
            continue
        if _changes_what_it_loads(child, own_hook if child is module else None):
            unknown.append(start)
            continue
        # A post-hook may take any key from the lists of missing and unexpected ones.
        names_count = names_count and not _has_foreign(child._load_state_dict_post_hooks.values())
        expected.update((start + name, value) for name, value in _own_entries(child))
        if _may_lack_counter(child, state_dict, fqn):
            optional.add(f"{start}num_batches_tracked")
    faults: list[str] = []
    if names_count:
        faults += _name_faults(expected, optional, state_dict, prefix, unknown)
    faults += _entry_faults(expected, state_dict, mastered)
    if faults:
        raise UnsupportedError(
            f"master_weights: the checkpoint does not fit {type(module).__name__}; nothing was loaded.\n\t"
            + "\n\t".join(faults)
            + "\nBuild the model with the checkpoint's sizes and names. With strict=False keys may be missing or "
            "unexpected; one that does not fit has to be dropped from the checkpoint."
        )


def fits(value: Tensor, param: Tensor) -> bool:
    """Whether torch copies ``value`` into ``param``, whose shapes may differ for one element only."""
    return value.shape == param.shape or (param.dim() == 0 and value.shape == (1,))


def _is_strict() -> bool:
    """Whether the running ``load_state_dict`` raises for missing keys.

    torch tells its load hooks ``strict=True`` in every load, so the caller's own value is read from the
    frame of ``Module.load_state_dict``. A loader that works without it is not strict.
    """
    frame = sys._getframe(1)
    while frame.f_code is not nn.Module.load_state_dict.__code__:
        if frame.f_back is None:
            return False
        frame = frame.f_back
    root = frame.f_locals["self"]
    return bool(frame.f_locals["strict"]) and not _has_foreign(root._load_state_dict_post_hooks.values())


def _changes_what_it_loads(module: nn.Module, own_hook: OwnHook | None) -> bool:
    loads = module._load_from_state_dict
    if getattr(loads, "__func__", loads) not in _TORCHS_LOADS:
        return True
    wrapped: Iterable[Any] = module._load_state_dict_pre_hooks.values()
    hooks = [each.hook for each in wrapped]
    # Those before own_hook have run.
    return _has_foreign(hooks[hooks.index(own_hook) :] if own_hook in hooks else hooks)


def _has_foreign(hooks: Iterable[Any]) -> bool:
    return any(not isinstance(getattr(hook, "__self__", hook), OwnHook) for hook in hooks)


def _own_entries(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Yield what ``module`` itself loads: its parameters, persistent buffers, and extra state as None."""
    for name, value in (*module._parameters.items(), *module._buffers.items()):
        if value is not None and name not in module._non_persistent_buffers_set:
            yield name, value
    if type(module).set_extra_state is not nn.Module.set_extra_state:
        yield _EXTRA_STATE, None


def _may_lack_counter(module: nn.Module, state_dict: Mapping[str, Any], fqn: str) -> bool:
    metadata = getattr(state_dict, "_metadata", None) or {}
    return isinstance(module, _NormBase) and (metadata.get(fqn, {}).get("version") or 0) < 2


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
    if not fits(value, target):
        return (
            f"size mismatch for {key}: copying a param with shape {value.shape} from checkpoint, the shape in current "
            f"model is {target.shape}."
        )
    return None


def _describe(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
