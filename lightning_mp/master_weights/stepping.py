"""An optimizer that updates masters: they stand in for its parameters inside ``step`` only.

Between steps ``param_groups`` and ``state`` hold the module's own parameters, so that whatever else
works on the optimizer works as in FP32. ``optimizer.step`` of the instance is replaced while attached;
the author's ``step`` runs unchanged, once per bucket, on FP32 stand-ins. User hooks, the profiler and
schedulers see one step. ``load_state_dict`` runs on FP32 placeholders, because torch casts loaded
state to the dtype of the parameter.
"""

import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mp.closures import NEW_STEPS, EvaluatedClosure
from lightning_mp.formats import HALF_DTYPES
from lightning_mp.master_weights.fused_adam import FusedAdam
from lightning_mp.master_weights.gradients import Gradients
from lightning_mp.master_weights.masters import CopyMaster, Master, NoMaster
from lightning_mp.master_weights.scratch import Scratch
from lightning_mp.master_weights.split_master import SplitMaster
from lightning_mp.master_weights.strangers import has_step_hooks

__all__ = ["MasterStep"]

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")

# Schedule-free optimizers average the weights in these.
_SWITCHES = ("train", "eval")

_Bucket = list[tuple[int, nn.Parameter]]


class MasterStep:
    """Replace ``step``, ``load_state_dict`` and, where it has them, ``train`` and ``eval`` of one optimizer.

    Args:
        optimizer: Any optimizer that treats each parameter for itself.
        masters: Parameter to master. The mapping is read at every step. Parameters without a master
            are updated directly.
        gradients: Gives the FP32 gradients.
        bucket_numel: Elements that stand in at once; a larger parameter is a bucket of its own.
        before_step: Called at the start of each step, before gradients are read.
        tell: Called with a text where 16-bit parameters without a master are stepped, once.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        masters: Mapping[nn.Parameter, Master],
        gradients: Gradients,
        *,
        bucket_numel: int,
        before_step: Callable[[], None],
        tell: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.optimizer = optimizer
        self._tell = tell
        self._has_told = False
        self._masters = masters
        self._gradients = gradients
        self._bucket_numel = bucket_numel
        self._before_step = before_step
        switches = [name for name in _SWITCHES if callable(getattr(optimizer, name, None))]
        self._own = {name: vars(optimizer).get(name) for name in ("step", "load_state_dict", *switches)}
        self._switches = {
            name: self._own[name] or MethodType(getattr(type(optimizer), name), optimizer) for name in switches
        }
        #: The author's step without hooks and schedulers' wrappers.
        self.inner_step = self._find_step()
        self._inner_load = self._own["load_state_dict"] or MethodType(type(optimizer).load_state_dict, optimizer)
        #: Updates what it can by one kernel, unless ``step`` is not the class's own.
        self.fused = FusedAdam(optimizer, masters, gradients) if self._has_own_step() else None
        self._installed: dict[str, Any] = {}
        author: Any = type(optimizer)
        self._takes_closure = not author.__module__.startswith("torch.optim.") and _has_closure(author)
        self._num_steps = 0

    def install(self) -> None:
        """Replace the methods of the instance."""

        def step(optimizer: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            return self.run(closure, **kwargs)

        def load_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            self._load_state_dict(state_dict)

        hooked: Any = Optimizer.profile_hook_step(step)

        def prepared(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if has_step_hooks(optimizer):
                self._show_gradients()
            return hooked(optimizer, *args, **kwargs)

        # `run` sets what a scheduler's wrapper would set.
        prepared._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        self._installed = {
            "step": MethodType(prepared, self.optimizer),
            "load_state_dict": MethodType(load_state_dict, self.optimizer),
        }
        for name in self._switches:
            self._installed[name] = partial(self._switch, name)
        vars(self.optimizer).update(self._installed)
        if self.fused is not None:
            self.fused.prepare()

    def remove(self) -> None:
        """Give the instance its own methods back, unless someone else replaced ours since."""
        attributes = vars(self.optimizer)
        for name, ours in self._installed.items():
            if attributes.get(name) is not ours:
                continue
            if self._own[name] is None:
                del attributes[name]
            else:
                attributes[name] = self._own[name]

    def _find_step(self) -> Callable[..., Any]:
        """Return the step to call per bucket: without hooks and schedulers' wrappers, which come once."""
        own = self._own["step"]
        if own is not None and not self._has_own_step():
            replaced: Callable[..., Any] = own  # by the user
            return replaced
        step: Any = type(self.optimizer).step
        return MethodType(step.__wrapped__ if getattr(step, "hooked", False) else step, self.optimizer)

    def _has_own_step(self) -> bool:
        own = self._own["step"]
        return own is None or hasattr(own, "_wrapped_by_lr_sched")

    def _show_gradients(self) -> None:
        """Let step hooks find the gradients that the step will use, in FP32, to read and to change."""
        self._before_step()
        params = (param for group in self.optimizer.param_groups for param in group["params"])
        self._gradients.widen_(param for param in params if param in self._masters)

    def run(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step once, without hooks: the closure, then the author's step on the stand-ins of each bucket."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._before_step()
        vars(self.optimizer)["_opt_called"] = True
        done = () if self.fused is None or kwargs else self.fused.step_()
        result = None
        buckets = list(self._buckets(lambda param: param.grad is not None and param not in done))
        if not done or buckets[0]:
            result = self._on_stand_ins(partial(self._author_step, loss, kwargs), buckets)
            self._num_steps += 1
        return result if loss is None else loss

    def _author_step(self, loss: Any, kwargs: dict[str, Any]) -> Any:
        if loss is not None and self._takes_closure:
            # A rule may use the loss, as Polyak's step size does.
            closure = EvaluatedClosure(loss, self.optimizer, is_new=self._num_steps < NEW_STEPS)
            return self.inner_step(closure=closure, **kwargs)
        return self.inner_step(**kwargs)

    def _switch(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method that moves weights between steps, on the stand-ins of all parameters."""
        call = partial(self._switches[name], *args, **kwargs)
        return self._on_stand_ins(call, list(self._buckets(lambda _: True)))

    def _on_stand_ins(self, call: Callable[[], Any], buckets: list[_Bucket]) -> Any:
        result = None
        shared = _SharedState(self.optimizer) if len(buckets) > 1 else None
        scratch = Scratch()
        with _without_hooks(self.optimizer):
            for index, bucket in enumerate(buckets):
                if shared is not None and index > 0:
                    shared.rewind_()
                result = self._call_on_bucket(bucket, scratch, call)
        return result

    def _buckets(self, concerns: Callable[[nn.Parameter], bool]) -> Iterator[_Bucket]:
        """Yield the parameters concerned, a bucket's worth of one device at a time; one empty if there are none."""
        bucket: _Bucket = []
        numel = 0
        for index, group in enumerate(self.optimizer.param_groups):
            for param in group["params"]:
                if not concerns(param):
                    continue
                is_full = numel + param.numel() > self._bucket_numel
                if bucket and (is_full or param.device != bucket[0][1].device):
                    yield bucket
                    bucket, numel = [], 0
                bucket.append((index, param))
                numel += param.numel()
        yield bucket

    def _call_on_bucket(self, bucket: _Bucket, scratch: Scratch, call: Callable[[], Any]) -> Any:
        optimizer, state = self.optimizer, self.optimizer.state
        own_params = [group["params"] for group in optimizer.param_groups]
        stand_ins = self._stand_ins([param for _, param in bucket], scratch)
        try:
            for index, group in enumerate(optimizer.param_groups):
                group["params"] = [stand_ins[param] for number, param in bucket if number == index]
            optimizer.state = _state_for(state, stand_ins)
            return call()
        finally:
            # After an error too: what the optimizer wrote to masters so far must not look like a
            # write from outside to the parameters.
            _return_state(optimizer.state, state, stand_ins)
            optimizer.state = state
            for group, params in zip(optimizer.param_groups, own_params, strict=True):
                group["params"] = params
            self._publish(stand_ins, scratch)

    def _stand_ins(self, params: list[nn.Parameter], scratch: Scratch) -> dict[nn.Parameter, nn.Parameter]:
        """Return what the optimizer updates instead of each parameter, with its gradient."""
        stand_ins = {param: param for param in params}
        mastered = [param for param in params if param in self._masters]
        if len(mastered) < len(params):
            self._look_at_strangers(params)
        masters = [self._masters[param] for param in mastered]
        if not masters:
            return stand_ins
        loaded = type(masters[0]).load_all(masters, scratch)
        if isinstance(masters[0], NoMaster):
            grads = [self._gradients.in_dtype(param) for param in mastered]
        else:
            grads = self._gradients.fp32_all(mastered, scratch)
        for param, stand_in, grad in zip(mastered, loaded, grads, strict=True):
            stand_in.grad = grad
            stand_ins[param] = stand_in
        return stand_ins

    def _look_at_strangers(self, params: list[nn.Parameter]) -> None:
        """Say once that 16-bit parameters are stepped which were made after masters were taken."""
        if self._has_told or isinstance(next(iter(self._masters.values()), None), NoMaster):
            return
        narrow = [param for param in params if param not in self._masters and param.dtype in HALF_DTYPES]
        if narrow:
            self._has_told = True
            self._tell(
                f"master_weights: {type(self.optimizer).__name__} steps a {narrow[0].dtype} parameter of shape "
                f"{tuple(narrow[0].shape)} that was made during the fit and has no FP32 master, so that small updates "
                "are rounded away. Make it before the fit, or in FP32: nn.Parameter(weight.detach().float())."
            )

    def _publish(self, stand_ins: dict[nn.Parameter, nn.Parameter], scratch: Scratch) -> None:
        mastered = [param for param in stand_ins if param in self._masters]
        for param in mastered:
            self._gradients.used(param, stand_ins[param].grad)
            stand_ins[param].grad = None
        if mastered:
            masters = [self._masters[param] for param in mastered]
            type(masters[0]).store_all(masters, [stand_ins[param] for param in mastered], scratch)

    def _load_state_dict(self, state_dict: dict[str, Any]) -> None:
        optimizer = self.optimizer
        own_params = [group["params"] for group in optimizer.param_groups]
        placeholders = {param: self._placeholder(param) for params in own_params for param in params}
        for group in optimizer.param_groups:
            group["params"] = [placeholders[param] for param in group["params"]]
        try:
            self._inner_load(state_dict)
        finally:
            for group, params in zip(optimizer.param_groups, own_params, strict=True):
                group["params"] = params
            owners: dict[Any, nn.Parameter] = {placeholder: param for param, placeholder in placeholders.items()}
            loaded: dict[Any, Any] = dict(optimizer.state)
            optimizer.state = defaultdict(dict, {owners.get(key, key): loaded[key] for key in loaded})

    def _placeholder(self, param: nn.Parameter) -> nn.Parameter:
        """Return a parameter of the same shape that is FP32 and takes no memory."""
        if not isinstance(self._masters.get(param), (CopyMaster, SplitMaster)):
            return param
        scalar = torch.zeros((), dtype=torch.float32, device=param.device)
        return nn.Parameter(scalar.expand(param.shape), requires_grad=param.requires_grad)


def _has_closure(optimizer_class: Any) -> bool:
    return "closure" in signature(optimizer_class.step).parameters


class _SharedState:
    """What an optimizer counts besides its per-parameter state, as ``group["step"]`` of some.

    Each bucket starts from the values before the step, so that counters advance once.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = [_snapshot(group, _is_setting) for group in optimizer.param_groups]
        self._state = _snapshot(optimizer.state, _is_shared)
        self._attributes = _snapshot(vars(optimizer), _is_counter)

    def rewind_(self) -> None:
        for group, saved in zip(self._optimizer.param_groups, self._groups, strict=True):
            _rewind_(group, saved, _is_setting)
        _rewind_(self._optimizer.state, self._state, _is_shared)
        _rewind_(vars(self._optimizer), self._attributes, _is_counter)


def _is_setting(key: Any, _: Any) -> bool:
    return bool(key != "params")


def _is_shared(key: Any, _: Any) -> bool:
    return not isinstance(key, Tensor)


def _is_counter(_: Any, value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_Concerns = Callable[[Any, Any], bool]


def _snapshot(values: Mapping[Any, Any], concerns: _Concerns) -> dict[Any, tuple[Any, Any]]:
    """Pair each value with a copy of it where it could be changed in place."""
    return {key: (value, _copy_of(value)) for key, value in values.items() if concerns(key, value)}


def _copy_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, dict)):
        return value.copy()
    return value


def _rewind_(values: dict[Any, Any], saved: dict[Any, tuple[Any, Any]], concerns: _Concerns) -> None:
    for key in [key for key, value in values.items() if key not in saved and concerns(key, value)]:
        del values[key]
    for key, (value, before) in saved.items():
        if isinstance(value, Tensor):
            value.detach().copy_(before)
            values[key] = value
        else:
            values[key] = _copy_of(before)


def _state_for(
    state: Mapping[Any, Any], stand_ins: dict[nn.Parameter, nn.Parameter]
) -> defaultdict[Any, dict[str, Any]]:
    """Return the optimizer state under the stand-ins, and what belongs to no parameter."""
    shown: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    shown.update({stand_in: state[param] for param, stand_in in stand_ins.items() if param in state})
    shown.update({key: value for key, value in state.items() if _is_shared(key, value)})
    return shown


def _return_state(shown: Mapping[Any, Any], state: Any, stand_ins: dict[nn.Parameter, nn.Parameter]) -> None:
    """Put what the step left under the stand-ins back under the parameters."""
    state.update({param: shown[stand_in] for param, stand_in in stand_ins.items() if stand_in in shown})
    state.update({key: value for key, value in shown.items() if _is_shared(key, value)})


@contextmanager
def _without_hooks(optimizer: Optimizer) -> Iterator[None]:
    """Hide user step hooks: a step that calls ``super().step()`` would run them once per bucket."""
    attributes = vars(optimizer)
    hooks = {name: attributes[name] for name in _HOOKS}
    attributes.update({name: OrderedDict() for name in _HOOKS})
    try:
        yield
    finally:
        attributes.update(hooks)
