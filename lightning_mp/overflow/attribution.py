"""From what the probes noted to the module that went non-finite first.

Minus infinity alone is how masks are written. A batch item or the output of a module without
parameters that holds nothing worse is therefore taken for a mask, and named only if nothing else is
found: ``softmax`` of a fully masked row is named, not the mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_mp.overflow.event import Finding, make_finding
from lightning_mp.overflow.probes import ModuleCall
from lightning_mp.overflow.statistics import Statistics, TensorStats, Wanted, named_tensors

__all__ = ["Observation", "find_culprit"]


@dataclass(eq=False)
class Observation:
    """What one pass over a batch showed; places are those of ``statistics``, which must be read.

    Args:
        model: The module that was probed.
        calls: Its module calls.
        statistics: The numbers.
        batch: Places by path of the batch's item.
        loss: Places of the unscaled loss.
        param_grads: Places of the gradients by parameter.
    """

    model: nn.Module
    calls: Sequence[ModuleCall]
    statistics: Statistics
    batch: dict[str, Wanted] = field(default_factory=dict)
    loss: Wanted = field(default_factory=list)
    param_grads: dict[Tensor, Wanted] = field(default_factory=dict)

    def add_batch(self, batch: Any) -> None:
        """Measure the tensors of the batch; a batch that is one tensor has the path ``"batch"``."""
        for path, tensor in named_tensors(batch):
            self.batch[path or "batch"] = self.statistics.add([tensor])

    def stats(self, wanted: Wanted) -> TensorStats:
        """Return the numbers at these places together."""
        return self.statistics.of(wanted)


def find_culprit(seen: Observation) -> Finding | None:
    """Name what went non-finite first: batch, module in forward, loss, or module in backward.

    A non-finite forward that does not reach the loss, as behind ``torch.where``, is named only if
    backward shows nothing.
    """
    forward = _find_in_forward(seen)
    if not seen.stats(seen.loss).is_finite:
        return forward or _find_loss(seen)
    return _find_in_backward(seen) or forward


# --- Forward -------------------------------------------------------------------------------------


def _find_in_forward(seen: Observation) -> Finding | None:
    culprit, mask = _first_overflow(seen)
    if culprit is not None:
        return _describe_forward(seen, culprit)
    items = {path: seen.stats(wanted) for path, wanted in seen.batch.items()}
    bad = next((path for path, stats in items.items() if stats.is_bad), None)
    if bad is None and mask is not None:
        return _describe_forward(seen, mask)
    path = bad or next((path for path, stats in items.items() if not stats.is_finite), None)
    if path is None:
        return None
    return make_finding("batch", path, items[path], {"input": items[path]})


def _first_overflow(seen: Observation) -> tuple[ModuleCall | None, ModuleCall | None]:
    """Return the first call that turned finite values non-finite, and the first that looks like a mask.

    Calls are looked at in the order in which they returned, so that a module inside comes before its
    parent, and a parent is only found if nothing inside it is. A culprit whose values a later module
    turns finite again, as a sigmoid does, is dropped.
    """
    culprit: ModuleCall | None = None
    mask: ModuleCall | None = None
    for call in sorted((c for c in seen.calls if c.finished is not None), key=lambda c: c.finished or 0):
        entered, left = seen.stats(call.inputs), seen.stats(call.outputs)
        if culprit is not None:
            if left.is_finite and left.amax is not None and _covers(entered, seen.stats(culprit.outputs)):
                culprit = None
        elif not entered.is_bad and not left.is_finite:
            if left.is_bad or (entered.is_finite and _has_parameters(call.module)):
                culprit = call
            elif entered.is_finite and mask is None:
                mask = call
    return culprit, mask


def _covers(entered: TensorStats, left: TensorStats) -> bool:
    """Tell whether every sort of non-finite value that left one module entered another."""
    return not entered.is_finite and not (
        (left.num_nan and not entered.num_nan)
        or (left.num_positive_inf and not entered.num_positive_inf and not entered.num_nan)
    )


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _describe_forward(seen: Observation, call: ModuleCall) -> Finding:
    left = seen.stats(call.outputs)
    amaxes = {"input": seen.stats(call.inputs), "output": left, "weight": _weight_stats(call.module)}
    if isinstance(call.module, nn.modules.loss._Loss):
        return make_finding("loss", "loss", left, amaxes)
    return make_finding("forward", _fqn(seen, call), left, amaxes)


def _find_loss(seen: Observation) -> Finding:
    """Name the loss, or the model's own code if a module was handed something non-finite."""
    loss = seen.stats(seen.loss)
    entered = next((s for s in (seen.stats(c.inputs) for c in seen.calls) if s.is_bad), None)
    if entered is not None:
        return make_finding("forward", type(seen.model).__name__, entered, {"output": entered})
    return make_finding("loss", "loss", loss, {"output": loss})


# --- Backward ------------------------------------------------------------------------------------


def _find_in_backward(seen: Observation) -> Finding | None:
    reached = [call for call in seen.calls if call.backward_started is not None]
    reached.sort(key=lambda call: call.backward_started or 0)
    culprits = [call for call in reached if _overflows_in_backward(seen, call)]
    call = _innermost_first(culprits)
    # Nothing before the first non-finite gradient explains it: it was made between modules.
    unexplained = next((c for c in reached if not seen.stats(c.output_grads).is_finite), None)
    if call is None or (unexplained is not None and _is_earlier(unexplained, call)):
        call = _innermost_of(unexplained, reached, seen) if unexplained is not None else call
    return None if call is None else _describe_backward(seen, call)


def _is_earlier(first: ModuleCall, second: ModuleCall) -> bool:
    return (first.backward_started or 0) < (second.backward_started or 0) and not first.is_inside(second)


def _overflows_in_backward(seen: Observation, call: ModuleCall) -> bool:
    return seen.stats(call.output_grads).is_finite and not seen.stats(_outgoing(seen, call)).is_finite


def _outgoing(seen: Observation, call: ModuleCall) -> Wanted:
    own = [place for p in call.module.parameters(recurse=False) for place in seen.param_grads.get(p, [])]
    return [*call.input_grads, *own]


def _innermost_first(culprits: list[ModuleCall]) -> ModuleCall | None:
    if not culprits:
        return None
    inside = [call for call in culprits if call.is_inside(culprits[0])]
    return _innermost_first(inside) or culprits[0]


def _innermost_of(outer: ModuleCall, reached: list[ModuleCall], seen: Observation) -> ModuleCall:
    """Return the innermost call whose output is that of ``outer``, as the last of a Sequential."""
    inside = [c for c in reached if c.is_inside(outer) and not seen.stats(c.output_grads).is_finite]
    return _innermost_of(inside[0], reached, seen) if inside else outer


def _describe_backward(seen: Observation, call: ModuleCall) -> Finding:
    arrived = seen.stats(call.output_grads)
    nonfinite = arrived if not arrived.is_finite else seen.stats(_outgoing(seen, call))
    amaxes = {
        "input": seen.stats(call.inputs),
        "output": seen.stats(call.outputs),
        "weight": _weight_stats(call.module),
        "grad": arrived,
    }
    return make_finding("backward", _fqn(seen, call), nonfinite, amaxes)


# --- Both ----------------------------------------------------------------------------------------


def _fqn(seen: Observation, call: ModuleCall) -> str:
    return call.fqn or type(seen.model).__name__


def _weight_stats(module: nn.Module) -> TensorStats:
    statistics = Statistics()
    wanted = statistics.add(module.parameters(recurse=False))
    statistics.read()
    return statistics.of(wanted)
