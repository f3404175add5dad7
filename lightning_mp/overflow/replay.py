"""Computing a batch once more under probes, leaving nothing changed."""

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_mp.overflow.attribution import Observation, describe_item, find_beside, find_culprit
from lightning_mp.overflow.event import Finding
from lightning_mp.overflow.preserve import RandomState, eager, preserved
from lightning_mp.overflow.probes import ModuleCall, Probes
from lightning_mp.overflow.statistics import make_finite_, named_tensors
from lightning_mp.overflow.together import Together
from lightning_mp.overflow.written import KeptState, WrittenState

__all__ = ["copy_containers", "replay"]

_T = TypeVar("_T")

# Containers of one batch: 1 ms of copying.
_MAX_COPIES = 4096
_MAX_COPY_DEPTH = 50
_COPIED = (list, tuple, dict)
# Of items one by one, where they cannot be made finite together: enough for the usual handful.
_MAX_SINGLE_PASSES = 6


def replay(
    model: nn.Module,
    step: Callable[[Any], Tensor | None],
    batch: Any,
    *,
    rng: RandomState,
    loss_scale: float,
    region: Callable[[], AbstractContextManager[Any]],
    silenced: tuple[str, ...] = (),
    state: tuple[WrittenState, KeptState] | None = None,
    together: Together | None = None,
) -> Finding | None:
    """Compute ``batch`` once more and name what went non-finite first.

    Random states, buffers, attributes of modules, gradients and the batch are afterwards what they
    were. Parameters that ``step`` itself writes to are not protected.

    A non-finite item of the batch is named if the loss is finite once finite values stand in the place of
    all such items, and is not while this one stays. Else it did no harm, as labels that are masked out.
    That takes one further pass and the binary logarithm of the number of such items, such as 8 for 100.
    A module that the graph does not join to the loss is named if the loss is finite with finite values in
    place of what it made, as of a frozen teacher, and not as of a statistic that is logged: some passes too.

    Args:
        model: The bare module, not a wrapper that reduces gradients.
        step: Computes the loss of a batch, as the optimizer sees it before scaling.
        batch: The batch; ``step`` gets a copy.
        rng: States of torch's generators when the step began.
        loss_scale: Factor on the loss that its backward used.
        region: The autocast region of the step.
        silenced: Methods of ``model`` that do nothing meanwhile, such as ``"log"``.
        state: What steps of the model write, and what was there before this one.
        together: Keeps the ranks together: each computes as many passes as the one that needs most.

    Returns:
        The finding; ``None`` if the batch computes without anything non-finite.

    Raises:
        StateLostError: If the step began with a state that is gone, and what it left there instead is not finite.
        Exception: Whatever ``step`` or its backward raises on the batch as it is, such as by reentrant
            checkpointing, which knows no ``torch.autograd.grad``. If it raises on finite values, as where NaN
            is padding, then the item in whose place they stand stays as suspicious as it was.
    """
    together = together or Together()
    passes = _passes(batch)
    wanted, finding, is_done = next(passes), None, False
    first: Observation | None = None
    while True:
        seen: Observation | None = None
        error: Exception | None = None
        try:
            with together:
                seen = _compute(model, step, wanted, rng, loss_scale, region, silenced, state)
        except Exception as raised:
            error = raised
        if together.any_rank(error is not None) and first is None:
            if error is not None:
                raise error
            return None if seen is None else find_culprit(seen)
        first = first or seen
        if not is_done:
            try:
                wanted = passes.send(seen)
            except StopIteration as stopped:
                wanted, finding, is_done = _Pass(batch), stopped.value, True
        if not together.any_rank(not is_done):
            return finding


class _Pass(NamedTuple):
    """What to compute: a batch, and calls whose outputs get finite values."""

    batch: Any
    mended: Collection[int] = ()


_Passes: TypeAlias = "Generator[_Pass, Observation | None, _T]"


def _passes(batch: Any) -> "_Passes[Finding | None]":
    """Yield what to compute, take what each pass showed, ``None`` if it raised, and return the finding."""
    seen = yield _Pass(batch)
    if seen is None:
        return None
    innocent = yield from _find_innocent(batch, seen)
    finding = find_culprit(seen, innocent=innocent)
    if finding is None:
        return None
    stats = {path: seen.stats(wanted) for path, wanted in seen.batch.items()}
    is_item = finding.phase == "batch"
    # Minus infinity is how masks are written: only where nothing else is found is it asked whether it does harm.
    items = [path for path in stats if stats[path].is_bad or (is_item and not stats[path].is_finite)]
    if not items:
        return finding
    # Most suspicious first: the item that was named, then what is no mask of minus infinity.
    items.sort(key=lambda path: (path != finding.fqn, not stats[path].is_bad))
    again = yield from _repair(batch, items)
    if _is_cured(again, seen):
        return describe_item(seen, (yield from _find_harmful(batch, items, seen)))
    if not is_item:
        return finding
    if again is None:
        return describe_item(seen, (yield from _find_among_the_rest(batch, items, seen)))
    return find_culprit(again)


def _find_innocent(batch: Any, seen: Observation) -> "_Passes[Collection[ModuleCall]]":
    """Return those of the calls beside the way to the loss whose non-finite values do it no harm.

    Finite values in the place of what they made leave the loss as non-finite as it was.
    """
    beside = find_beside(seen)
    if not beside:
        return []
    if not (yield from _helps_to_mend(batch, seen, beside)):
        return beside
    # The first that does harm is named, so that what comes after it may stay.
    for place, call in enumerate(beside[:_MAX_SINGLE_PASSES]):
        if (yield from _helps_to_mend(batch, seen, [call])):
            return beside[:place]
    return []


def _helps_to_mend(batch: Any, seen: Observation, calls: Collection[ModuleCall]) -> "_Passes[bool]":
    again = yield _Pass(batch, [place for place, call in enumerate(seen.calls) if call in calls])
    return again is None or again.is_loss_finite


def _repair(batch: Any, paths: list[str]) -> "_Passes[Observation | None]":
    """Have the batch computed with finite values in these items; ``None`` if it cannot be."""
    repaired = _made_finite(batch, paths)
    if repaired is None:
        return None
    return (yield _Pass(repaired))


def _is_cured(again: Observation | None, seen: Observation) -> bool:
    return again is not None and (find_culprit(again) is None or (again.is_loss_finite and not seen.is_loss_finite))


def _find_harmful(batch: Any, items: list[str], seen: Observation) -> "_Passes[str]":
    """Return the first item that does harm on its own, given that finite values in all of them help.

    Each pass leaves half of those in question as they are. If each does harm only together with another,
    as Inf minus Inf, it is one of those.
    """
    suspects = items
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        again = yield from _repair(batch, [path for path in items if path not in half])
        suspects = half if again is not None and not _is_cured(again, seen) else suspects[len(half) :]
    return suspects[0]


def _find_among_the_rest(batch: Any, items: list[str], seen: Observation) -> "_Passes[str]":
    """Return the item to blame where one of them, unknown which, cannot be made finite."""
    rest = items
    for path in items[:_MAX_SINGLE_PASSES] if len(items) > 1 else ():
        again = yield from _repair(batch, [path])
        if _is_cured(again, seen):
            return path
        if again is not None:
            rest = [other for other in rest if other != path]
    # What is left may be what does the harm; finite values in the others did not help.
    return (rest or items)[0]


def _made_finite(batch: Any, paths: list[str]) -> Any:
    """Return a copy of the batch whose items hold only finite values; ``None`` where nothing can be copied."""
    copied = _cloned(batch)
    originals = dict(named_tensors(batch))
    for path, tensor in named_tensors(copied):
        if (path or "batch") not in paths:
            continue
        if tensor is originals.get(path) or not make_finite_(tensor):
            return None
    return copied


def _compute(
    model: nn.Module,
    step: Callable[[Any], Tensor | None],
    wanted: _Pass,
    rng: RandomState,
    loss_scale: float,
    region: Callable[[], AbstractContextManager[Any]],
    silenced: tuple[str, ...],
    state: tuple[WrittenState, KeptState] | None,
) -> Observation:
    with preserved(model), eager(), torch.inference_mode(False), torch.enable_grad():
        check: AbstractContextManager[None] = nullcontext()
        if state is not None:
            written, kept = state
            written.restore_(kept)
            check = written.checked(kept)
        for name in silenced:
            model.__dict__[name] = _do_nothing
        rng.restore_()
        with check, Probes(model, mended=wanted.mended) as probes:
            seen = Observation(model, probes.calls, probes.statistics, shared=probes.shared)
            seen.add_batch(wanted.batch)
            with region():
                loss = step(_cloned(wanted.batch))
            if loss is None:
                # Nothing was trained on this batch.
                return Observation(model, [], probes.statistics)
            seen.add_loss(loss)
            if loss.requires_grad and any(p.requires_grad for p in model.parameters()):
                probes.watch_uses(loss)
                _backward(model, loss, loss_scale, seen)
    seen.statistics.read()
    return seen


def _backward(model: nn.Module, loss: Tensor, loss_scale: float, seen: Observation) -> None:
    """Take gradients without touching ``.grad``, the hooks of a reducer, or accumulators."""
    parameters = [p for p in model.parameters() if p.requires_grad and not is_lazy(p)]
    # A 0-dim FP32 tensor, as a scaler has: times a number an FP16 loss would stay FP16, and 65536 is Inf there.
    scaled = loss * torch.full((), loss_scale, dtype=torch.float32, device=loss.device)
    grads = torch.autograd.grad(scaled, parameters, allow_unused=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            seen.param_grads[parameter] = seen.statistics.add([grad])


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a method that must leave no trace."""


def copy_containers(value: Any) -> Any:
    """Return ``value`` with its lists and dicts copied and its tensors shared.

    A ``training_step`` that pops an item from its batch leaves such a copy whole. Of containers that refer to
    many others the first 4096 are copied, each once.
    """
    return _copied(value, {}, 0) if type(value) in (list, tuple, dict) else value


def _copied(value: Any, memo: dict[int, Any], depth: int) -> Any:
    cls = type(value)
    if id(value) in memo or len(memo) >= _MAX_COPIES or depth == _MAX_COPY_DEPTH:
        return memo.get(id(value), value)
    depth += 1
    if cls is tuple:
        items = tuple([item if type(item) not in _COPIED else _copied(item, memo, depth) for item in value])
        return memo.setdefault(id(value), items)
    copied: Any = memo.setdefault(id(value), cls())
    if cls is list:
        copied += [item if type(item) not in _COPIED else _copied(item, memo, depth) for item in value]
    else:
        for key, item in value.items():
            copied[key] = item if type(item) not in _COPIED else _copied(item, memo, depth)
    return copied


def _cloned(batch: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return a copy of the batch whose tensors are its own, where its containers are plain."""
    memo = {} if memo is None else memo
    if id(batch) in memo:
        return memo[id(batch)]
    if isinstance(batch, Tensor):
        return memo.setdefault(id(batch), batch.detach().clone().requires_grad_(batch.requires_grad))
    cls = type(batch)
    if cls is list:
        copied = memo.setdefault(id(batch), [])
        copied.extend([_cloned(item, memo) for item in batch])
        return copied
    if cls is dict:
        copied = memo.setdefault(id(batch), {})
        copied.update({key: _cloned(item, memo) for key, item in batch.items()})
        return copied
    if cls is tuple:
        return tuple([_cloned(item, memo) for item in batch])
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return cls(*[_cloned(item, memo) for item in batch])
    if hasattr(batch, "clone") and (isinstance(batch, Mapping) or named_tensors(batch)):
        # A library's own batch: it knows best how to copy itself, if it does.
        return memo.setdefault(id(batch), batch.clone())
    return batch
