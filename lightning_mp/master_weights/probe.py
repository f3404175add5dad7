"""Find out by trial whether an optimizer computes on stand-ins, bucket by bucket, what it computes by itself."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights.gradients import Gradients
from lightning_mp.master_weights.masters import Master
from lightning_mp.master_weights.stepping import MasterStep

__all__ = ["check_by_trial", "flatten"]

# Each parameter for itself, as read in their source and held by tests.
_TRUSTED = ("torch.optim.", "torchao.optim.", "transformer_engine.")
_NOT_COPIED = {"state", "param_groups", "step", "load_state_dict"}
_SIDE = 4
_WHOLE = _SIDE**8
# Some rules begin late, such as clipping after a warmup: after the first steps counters jump.
_STEPS = 6
_STEPS_AFTER_JUMP = 4
_JUMP = 10_000


def check_by_trial(optimizer: Optimizer, kind: type[Master], param_dtype: torch.dtype) -> None:
    """Step a small likeness of ``optimizer`` by itself and through masters, and compare the bits.

    Through masters the likeness is stepped once with all parameters in one bucket, which finds what is
    known of parameters by identity or position, and once with one parameter per bucket, which finds global
    gradient norms (LAMB of apex), learning rates estimated over all parameters (D-Adaptation, Prodigy)
    and the like. Where the likeness cannot be built or stepped, nothing is concluded. Optimizers of torch
    and torchao are not tried.

    Args:
        optimizer: Not modified; its own parameters and state take no part.
        kind: The masters that training will use.
        param_dtype: What they publish.

    Raises:
        UnsupportedError: If the results differ.
    """
    if f"{type(optimizer).__module__}.".startswith(_TRUSTED):
        return
    try:
        expected, held = _trial(optimizer)
    except Exception:
        # Any author's code runs here. What it does not accept of a likeness, such as its shapes, says
        # nothing about the real step, which raises for itself if it has to.
        return
    for bucket_numel, reason in ((_WHOLE, _BY_IDENTITY), (1, held or _BY_OTHERS)):
        try:
            found, _ = _trial(optimizer, (kind, param_dtype), bucket_numel=bucket_numel)
        except Exception as error:
            raise _refusal(optimizer, reason) from error
        if len(found) < len(expected) or not all(map(_same_bits, found, expected)):
            raise _refusal(optimizer, reason)


_BY_IDENTITY = (
    "knows its parameters by identity or keeps values of them from outside its step, so it computes something else on "
    "the FP32 tensors that stand in for them there"
)
_BY_OTHERS = (
    "updates one parameter by what it sees of the others, as a norm over all gradients does, so it cannot be stepped "
    "bucket by bucket"
)
_BY_KEEPING = (
    "keeps a list of parameters or a flat buffer from its first step (in {}), outside of param_groups and state, so it "
    "cannot be stepped bucket by bucket"
)


def _refusal(optimizer: Optimizer, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"master_weights: {type(optimizer).__qualname__} {reason}. Use an optimizer of torch.optim, or "
        "master_weights='params'."
    )


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))  # a NaN equals itself


def _trial(
    optimizer: Optimizer, masters_of: tuple[type[Master], torch.dtype] | None = None, *, bucket_numel: int = _WHOLE
) -> tuple[list[Tensor], str | None]:
    """Return FP32 values after each part of the trial, and why the optimizer may depend on its first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        likeness, params = _likeness(optimizer)
        masters: dict[nn.Parameter, Master] = {}
        if masters_of is not None:
            kind, param_dtype = masters_of
            masters = {param: kind(param, param_dtype) for param in params}
        for param in params:
            param.grad_dtype = None
        step = MasterStep(likeness, masters, Gradients(), bucket_numel=bucket_numel, before_step=_nothing)
        run = step.inner_step if masters_of is None else step.run
        before = _counters(likeness)
        values = _stage(run, params, masters, _STEPS)
        held = next(_kept(likeness), None)
        try:
            _fast_forward_(likeness, before)
            values += _stage(run, params, masters, _STEPS_AFTER_JUMP)
        except Exception:
            if masters_of is not None:
                raise
        return values, held


def _stage(
    run: Callable[[], Any], params: list[nn.Parameter], masters: Mapping[nn.Parameter, Master], steps: int
) -> list[Tensor]:
    for _ in range(steps):
        for size, param in enumerate(params, start=1):
            param.grad = size * torch.randn(param.shape, dtype=torch.float32)
        run()
    return [masters[param].value().clone() if masters else param.detach().clone() for param in params]


def _kept(likeness: Optimizer) -> Iterator[str]:
    """Name what holds parameters, or tensors larger than one of them, after the first steps."""
    params = {param for group in likeness.param_groups for param in group["params"]}
    for name, attribute in vars(likeness).items():
        if name in _NOT_COPIED:
            continue
        for item in flatten(attribute):
            if isinstance(item, Tensor) and (item in params or item.numel() > 1):
                yield _BY_KEEPING.format(f"{type(likeness).__qualname__}.{name}")


def flatten(value: Any, depth: int = 4) -> Iterator[Any]:
    """Yield ``value`` and what its containers hold, keys included, a few levels down."""
    yield value
    if depth == 0:
        return
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from flatten(item, depth - 1)


# --- A small likeness ------------------------------------------------------------------------------


def _likeness(optimizer: Optimizer) -> tuple[Optimizer, list[nn.Parameter]]:
    """Return an optimizer of the same class and settings, and its small CPU parameters."""
    likeness = object.__new__(type(optimizer))
    hooks: dict[str, Any] = {key: OrderedDict() for key in vars(optimizer) if key.endswith("_hooks")}
    copied = {key: value for key, value in vars(optimizer).items() if key not in _NOT_COPIED and key not in hooks}
    memo: dict[int, Any] = {}
    groups = [_small_group(group, memo) for group in optimizer.param_groups]
    vars(likeness).update(copy.deepcopy(copied, memo), **hooks)
    likeness.param_groups = groups
    likeness.state = defaultdict(dict)
    for group, original in zip(groups, optimizer.param_groups, strict=True):
        for param, source in zip(group["params"], _examples(original), strict=True):
            if source in optimizer.state:
                likeness.state[param] = {
                    key: _small_state(value, source, param) for key, value in optimizer.state[source].items()
                }
    return likeness, [param for group in groups for param in group["params"]]


def _examples(group: dict[str, Any]) -> list[nn.Parameter]:
    """Return two parameters that stand for a group, or one twice."""
    params: list[nn.Parameter] = group["params"][:2]
    return (params * 2)[:2]


def _small_group(group: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    settings = copy.deepcopy({key: value for key, value in group.items() if key != "params"}, memo)
    params = []
    for source in _examples(group):
        shape = (_SIDE,) * (2 if is_lazy(source) else source.dim())
        param = nn.Parameter(torch.randn(shape, dtype=torch.float32))
        attributes = {name: value for name, value in vars(source).items() if not name.startswith("__")}
        vars(param).update(copy.deepcopy(attributes, memo))
        memo.setdefault(id(source), param)
        params.append(param)
    return {"params": params, **settings}


def _small_state(value: Any, source: nn.Parameter, param: nn.Parameter) -> Any:
    """Return what a constructor would have made for ``param`` where it made ``value`` for ``source``."""
    if not isinstance(value, Tensor) or value.shape != source.shape or value.dim() == 0:
        return copy.deepcopy(value)
    first = value.flatten()[0]
    if bool((value == first).all()):
        dtype = param.dtype if value.is_floating_point() else value.dtype
        return torch.full(param.shape, first.item(), dtype=dtype)
    return param.detach().clone()


def _counters(likeness: Optimizer) -> list[tuple[Any, Any, float]]:
    """Return where numbers stand: in the attributes, the groups and the state."""
    places = [vars(likeness), *likeness.param_groups, *likeness.state.values()]
    return [(place, key, float(value)) for place in places for key, value in place.items() if _is_number(value)]


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dim() == 0 and not value.is_complex()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fast_forward_(likeness: Optimizer, before: list[tuple[Any, Any, float]]) -> None:
    """Let what counted the steps so far have counted many more."""
    known = {(id(place), key): value for place, key, value in before}
    for place, key, value in _counters(likeness):
        if value - known.get((id(place), key), 0.0) != _STEPS:
            continue
        if isinstance(place[key], Tensor):
            place[key].add_(_JUMP)
        else:
            place[key] += _JUMP


def _nothing() -> None:
    """Stand in for what the engine does before a step."""
