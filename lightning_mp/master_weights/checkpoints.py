"""FP32 values under the usual keys: hooks on the modules that own mastered parameters.

Saving shows the masters in place of the 16-bit parameters. Loading gives them what torch has copied, whatever
hooks made of it. Because the hooks sit on the modules, every way to a checkpoint goes through them: Lightning's two
kinds, ``save_pretrained``, a submodule's ``state_dict``, the learning rate finder's restore. A copy made
by ``copy.deepcopy`` or ``torch.save(module)`` is a plain FP32 module with the masters' values.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights.load_check import OwnHook, RunningLoad, check_load, fits
from lightning_mp.master_weights.masters import Master, NoMaster, cast_param_

__all__ = ["install_hooks", "install_own_hooks"]


def install_hooks(module: nn.Module, masters: Mapping[nn.Parameter, Master]) -> list[RemovableHandle]:
    """Make ``state_dict`` and ``load_state_dict`` of ``module`` and its submodules speak FP32.

    Args:
        module: The root whose parameters have masters.
        masters: Parameter to master. The mapping is read at each call.

    Returns:
        Handles; removing them leaves the modules as they were.
    """
    handles: list[Any] = []
    for child in module.modules():
        checker = _Checker(masters)
        handles.append(child.register_load_state_dict_pre_hook(checker))  # type: ignore[no-untyped-call]
        handles += install_own_hooks(child, masters)
    return handles


def install_own_hooks(module: nn.Module, masters: Mapping[nn.Parameter, Master]) -> list[Any]:
    """Do for the parameters that ``module`` itself owns what :func:`install_hooks` does for all."""
    own = [masters[param] for param in module.parameters(recurse=False) if param in masters]
    if not own:
        return []
    hooks = _ModuleHooks(module, masters)
    return [
        *(_FP32Pickle(master) for master in own if not isinstance(master, NoMaster)),
        module._register_state_dict_hook(hooks.save),  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(hooks.load),  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(hooks.loaded),  # type: ignore[no-untyped-call]
    ]


class _ModuleHooks(OwnHook):
    """The hooks of one module, over the parameters that it owns itself."""

    def __init__(self, module: nn.Module | None, masters: Mapping[nn.Parameter, Master]) -> None:
        self._module = module
        self._masters = masters
        self._source: tuple[dict[str, Any], str] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_ModuleHooks":
        for _, master in self._owned():
            _copy_as_fp32(master, memo)
        return _ModuleHooks(None, {})

    def __reduce__(self) -> tuple[Any, ...]:
        return _ModuleHooks, (None, {})

    def save(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        for name, master in self._owned():
            found = state_dict.get(prefix + name)
            # With keep_vars the caller asks for the parameters themselves.
            if found is not None and found is not master.param:
                state_dict[prefix + name] = master.value()

    def load(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        if RunningLoad.find() is not None:
            # Not yet: hooks after this one, and the module itself, may change what is loaded.
            self._source = (state_dict, prefix)
            return
        for name, master in self._owned():
            value = state_dict.get(prefix + name)
            # What torch does not take is left to it, and to its message.
            if isinstance(value, Tensor) and fits(value, master.param):
                master.assign(value.view(master.param.shape))
                # torch copies this next; the checkpoint's own value would round ties to even.
                state_dict[prefix + name] = master.param.detach()

    def loaded(self, module: nn.Module, _: Any) -> None:
        source, self._source = self._source, None
        if source is None:
            return
        state_dict, prefix = source
        for name, master in self._owned():
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and fits(value, master.param):
                master.assign(_loaded_value(value.detach().view(master.param.shape), master.param.detach()))

    def _owned(self) -> list[tuple[str, Master]]:
        if self._module is None:
            return []
        masters = self._masters
        params = self._module.named_parameters(recurse=False, remove_duplicate=False)
        return [(name, masters[param]) for name, param in params if param in masters]


class _Checker(OwnHook):
    """Refuse a checkpoint before anything of it is loaded into the outermost module with such a hook."""

    def __init__(self, masters: Mapping[nn.Parameter, Master]) -> None:
        self._masters = masters

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Checker":
        return _Checker({})

    def __reduce__(self) -> tuple[Any, ...]:
        return _Checker, ({},)

    def __call__(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *_: Any,
    ) -> None:
        running = RunningLoad.find()
        if running is not None and _is_checked_above(running.root, prefix):
            return
        if local_metadata.get("assign_to_params_buffers", False):
            raise UnsupportedError(
                "master_weights: load_state_dict(assign=True) would replace the parameters that have masters. "
                "Use assign=False during the fit."
            )
        if running is not None:  # others collect faults and go on
            check_load(module, state_dict, prefix, self._masters, own_hook=self, is_strict=running.is_strict)


def _is_checked_above(root: nn.Module, prefix: str) -> bool:
    """Tell whether a module above the one with the keys ``prefix`` checks this load."""
    module: nn.Module | None = root
    for name in prefix.split(".")[:-1]:
        if module is None:
            return False
        hooks: Iterable[Any] = module._load_state_dict_pre_hooks.values()
        if any(isinstance(each.hook, _Checker) for each in hooks):
            return True
        module = module._modules.get(name)
    return False


def _loaded_value(value: Tensor, param: Tensor) -> Tensor:
    """Return ``value`` in FP32 where ``param`` still holds what torch copied from it, else what was written since."""
    copied = torch.empty_like(param).copy_(value)
    if torch.equal(copied.reshape(-1).view(torch.int16), param.reshape(-1).view(torch.int16)):
        return value
    is_copied = (copied == param) | (copied.isnan() & param.isnan())
    return torch.where(is_copied, value.to(param.device, torch.float32), param.to(torch.float32))


class _FP32Pickle:
    """Let a parameter be pickled with its master's value, as the plain FP32 parameter that it stands for."""

    def __init__(self, master: Master) -> None:
        self._master = master
        # pickle asks the object itself; a copy by copy.deepcopy does not carry attributes over.
        vars(master.param)["__reduce_ex__"] = self

    def __call__(self, _: int) -> tuple[Any, ...]:
        param = self._master.param
        described: tuple[Any, ...] = (self._master.value(), param.requires_grad, OrderedDict())
        attributes = {name: value for name, value in vars(param).items() if name != "__reduce_ex__"}
        if attributes:
            return torch._utils._rebuild_parameter_with_state, (*described, attributes)
        return torch._utils._rebuild_parameter, described

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FP32Pickle":
        return self

    def remove(self) -> None:
        """Let the parameter be pickled as it is."""
        vars(self._master.param).pop("__reduce_ex__", None)


def _copy_as_fp32(master: Master, memo: dict[int, Any]) -> None:
    """Let the copy that ``memo`` describes hold a plain FP32 parameter with the master's value."""
    clone = copy.deepcopy(master.param, memo)
    if clone.dtype is not torch.float32 and not isinstance(master, NoMaster):
        cast_param_(clone, torch.float32)
        clone.data = master.value().clone()
