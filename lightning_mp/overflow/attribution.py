"""From what the probes noted to the module that went non-finite first.

Minus infinity alone is how masks are written. A batch item or the output of a module without
parameters of its own that holds nothing worse is therefore taken for a mask: ``softmax`` of a fully
masked row is named, not the mask. It was none if a layer that takes no masks turns it into Inf or NaN.

What a module made non-finite and another finite again, as a sigmoid does, is harmless unless it went
elsewhere too, as in ``x * sigmoid(x)``: the autograd graph tells.
"""

from bisect import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from lightning_mp.overflow.event import Finding, make_finding
from lightning_mp.overflow.graph import nodes_before
from lightning_mp.overflow.probes import ModuleCall
from lightning_mp.overflow.statistics import Statistics, TensorStats, Wanted, named_tensors
from lightning_mp.selection import is_normalization

__all__ = ["Observation", "describe_item", "find_beside", "find_culprit"]

# What of torch.nn is given masked scores: minus infinity is zero probability to them. Not what takes logarithms of
# probabilities, as NLLLoss: there it does harm only where somebody made the probability of the target zero.
_MASKED = (
    *(nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax, nn.AdaptiveLogSoftmaxWithLoss),
    nn.CrossEntropyLoss,
    *(nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer),
    *(nn.TransformerDecoder, nn.TransformerDecoderLayer),
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(eq=False)
class Observation:
    """What one pass over a batch showed; places are those of ``statistics``, which must be read.

    Args:
        model: The module that was probed.
        calls: Its module calls.
        statistics: The numbers.
        batch: Places by path of the batch's item.
        loss: Places of the unscaled loss.
        loss_nodes: Its nodes in the autograd graph.
        param_grads: Places of the gradients by parameter.
        shared: Parameters that several calls used, of whose gradients each call has its own part.
        backward_starts: Place from which on gradients are those of a loss, one per loss in order.
        leading: Nodes of the autograd graph; backward is only looked at where calls made one of them. ``None``
            for everywhere.
    """

    model: nn.Module
    calls: Sequence[ModuleCall]
    statistics: Statistics
    batch: dict[str, Wanted] = field(default_factory=dict)
    loss: Wanted = field(default_factory=list)
    loss_nodes: list[Any] = field(default_factory=list)
    param_grads: dict[Tensor, Wanted] = field(default_factory=dict)
    shared: Collection[Tensor] = frozenset()
    backward_starts: list[int] = field(default_factory=list)
    leading: set[Any] | None = None

    def add_batch(self, batch: Any) -> None:
        """Measure the tensors of the batch; a batch that is one tensor has the path ``"batch"``."""
        for path, tensor in named_tensors(batch):
            self.batch[path or "batch"] = self.statistics.add([tensor])

    def add_loss(self, loss: Tensor) -> None:
        """Measure the loss, or one more of several."""
        places = self.statistics.add([loss])
        self.loss = [*self.loss, *places]
        self.backward_starts += places
        self.loss_nodes.append(loss.grad_fn)

    @property
    def is_loss_finite(self) -> bool:
        """Whether the loss, if any, is finite."""
        return self.stats(self.loss).is_finite

    @property
    def are_grads_finite(self) -> bool:
        """Whether the gradients of parameters are finite, as far as they were measured."""
        return all(self.stats(wanted).is_finite for wanted in self.param_grads.values())

    def stats(self, wanted: Wanted) -> TensorStats:
        """Return the numbers at these places together."""
        return self.statistics.of(wanted)


def find_culprit(seen: Observation, *, innocent: Collection[ModuleCall] = ()) -> Finding | None:
    """Name what went non-finite first: batch, module in forward, loss, or module in backward.

    A non-finite forward that does not reach the loss, as behind ``torch.where``, is named only if
    backward shows nothing or goes wrong in what was computed with it; an item of the batch, only if
    gradients are non-finite.

    Args:
        seen: The pass.
        innocent: Calls of ``find_beside`` whose non-finite values are known to have done no harm.
    """
    calls = _read_forward(seen, innocent)
    forward = _find_in_forward(calls)
    if not seen.is_loss_finite:
        return forward or _find_loss(calls)
    call = _find_in_backward(seen)
    if call is not None:
        return forward if _is_explained(calls, call) else _describe_backward(seen, call)
    is_harmless = forward is not None and forward.phase == "batch" and seen.param_grads and seen.are_grads_finite
    return None if is_harmless else forward


def find_beside(seen: Observation) -> list[ModuleCall]:
    """Return the calls for whose sake ``find_culprit`` blames forward, although the graph knows no way to the loss.

    They may be a frozen teacher whose values are the target, or a statistic that is only logged while the
    loss goes wrong by itself: one pass cannot tell. The first of them that does harm is to blame.
    """
    found = _read_forward(seen, ())
    if seen.is_loss_finite or found.proven is not None:
        return []
    beside = [suspect.call for suspect in found.apart]
    if not any(seen.stats(wanted).is_bad for wanted in seen.batch.values()):
        apart = (call for call in seen.calls if found.before_loss.isdisjoint(call.output_nodes))
        beside += [call for call in apart if seen.stats(call.inputs).is_bad and call not in beside]
    return beside


def describe_item(seen: Observation, path: str) -> Finding:
    """Return the finding that blames an item of the batch."""
    stats = seen.stats(seen.batch[path])
    return make_finding("batch", path, stats, {"input": stats})


# --- Forward -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Suspect:
    """A call that returned something non-finite, and the one whose fault it is; ``None`` if none of them."""

    call: ModuleCall
    maker: ModuleCall | None


@dataclass
class _Forward:
    """What was found in the calls, in the order in which they returned: a module inside comes before its parent.

    The first call that turned finite values non-finite is the culprit, a parent only if nothing inside it is.
    """

    seen: Observation
    innocent: Collection[ModuleCall] = ()
    culprit: _Suspect | None = None
    masks: list[ModuleCall] = field(default_factory=list)
    lost: list[_Suspect] = field(default_factory=list)
    absorbers: list[ModuleCall] = field(default_factory=list)
    apart: list[_Suspect] = field(default_factory=list)
    """Those of whose values the graph knows no way to the loss: named if no other is found."""

    @property
    def proven(self) -> _Suspect | None:
        """The first whose values came to the loss."""
        return self.culprit or self.find_used(self.lost, self.seen.loss_nodes)

    @property
    def named(self) -> _Suspect | None:
        """The one to blame."""
        return self.proven or next(iter(self.apart), None)

    @cached_property
    def before_loss(self) -> set[Any]:
        """The nodes that the loss was computed from."""
        return nodes_before(self.seen.loss_nodes, without=set())

    def add(self, call: ModuleCall) -> None:
        entered, left = self.seen.stats(call.inputs), self.seen.stats(call.outputs)
        if not entered.is_finite and left.is_finite and left.amax is not None:
            self._absorb(call, entered)
        elif self.culprit is None and not entered.is_bad and not left.is_finite:
            self._suspect(call, entered, left)

    def _absorb(self, call: ModuleCall, entered: TensorStats) -> None:
        """Drop what this call made finite again, as a sigmoid does; ``find_used`` knows where else it went."""
        self.absorbers.append(call)
        if self.culprit is not None and _covers(entered, self.seen.stats(self.culprit.call.outputs)):
            self.lost.append(self.culprit)
            self.culprit = None
        elif self.culprit is None and not entered.is_bad:
            self.lost += [_Suspect(mask, mask) for mask in self.masks]
            self.masks.clear()

    def _suspect(self, call: ModuleCall, entered: TensorStats, left: TensorStats) -> None:
        if entered.is_finite and not left.is_bad and next(call.module.parameters(recurse=False), None) is None:
            if not any(mask.is_inside(call) for mask in self.masks):
                self.masks.append(call)
        elif left.is_bad and not entered.is_finite and not _takes_masks(call):
            self._accuse(_Suspect(call, self._find_mask(call, entered)))
        elif left.is_bad or entered.is_finite:
            inside = [suspect for suspect in self.lost if suspect.call.is_inside(call)]
            self._accuse(self.find_used(inside, call.output_nodes) or _Suspect(call, call))

    def _find_mask(self, call: ModuleCall, entered: TensorStats) -> ModuleCall | None:
        """Return the module whose minus infinity came to this call: by the graph, or by its count where it has none."""
        reached = nodes_before(call.output_nodes, without=set()) if self.masks else set()
        for mask in reversed(self.masks):
            if not reached.isdisjoint(mask.output_nodes):
                return mask
            if not mask.output_nodes and self.seen.stats(mask.outputs).count == entered.count:
                return mask
        return None

    def _accuse(self, suspect: _Suspect) -> None:
        """Take the suspect for the culprit unless it may be a statistic, a detached value or an unused head.

        A frozen part of the model has no graph either. It is named by a call around it whose values have, and if
        nobody else made anything non-finite.
        """
        if suspect.call in self.innocent:
            return
        if self.before_loss.isdisjoint(suspect.call.output_nodes):
            self.apart.append(suspect)
        else:
            self.culprit = next((each for each in self.apart if each.call.is_inside(suspect.call)), suspect)

    def find_used(self, suspects: Sequence[_Suspect], nodes: Sequence[Any]) -> _Suspect | None:
        """Return the first whose values came to ``nodes`` of the graph without what made them finite."""
        finite = {node for call in self.absorbers for node in call.output_nodes}
        reached = nodes_before(nodes, without=finite) if suspects else set()
        return next((s for s in suspects if not reached.isdisjoint(s.call.output_nodes)), None)


def _read_forward(seen: Observation, innocent: Collection[ModuleCall]) -> _Forward:
    calls = _Forward(seen, innocent)
    for call in sorted((c for c in seen.calls if c.finished is not None), key=lambda c: c.finished or 0):
        calls.add(call)
    return calls


def _find_in_forward(found: _Forward) -> Finding | None:
    seen = found.seen
    culprit = found.named
    if culprit is not None:
        return _describe_handed(seen, culprit.call) if culprit.maker is None else _describe_forward(seen, culprit.maker)
    items = {path: seen.stats(wanted) for path, wanted in seen.batch.items()}
    bad = next((path for path, stats in items.items() if stats.is_bad), None)
    if bad is None and found.masks:
        return _describe_forward(seen, found.masks[0])
    path = bad or next((path for path, stats in items.items() if not stats.is_finite), None)
    return None if path is None else describe_item(seen, path)


def _takes_masks(call: ModuleCall) -> bool:
    """Tell whether NaN out of minus infinity is this module's own fault, as a softmax's of a fully masked row.

    Not of a linear layer, a norm or an activation: what they get is no mask. Code of the user's may
    compute a softmax, but not of the one input of a module that has weights of its own.
    """
    module = call.module
    if isinstance(module, _MASKED):
        return True
    if is_normalization(module) or any(cls.__module__.startswith("torch.nn.") for cls in _bases(module)):
        return False
    return len(call.inputs) > 1 or next(module.parameters(recurse=False), None) is None


def _bases(module: nn.Module) -> list[type]:
    return [cls for cls in type(module).__mro__ if cls is not nn.Module and cls not in _CONTAINERS]


def _covers(entered: TensorStats, left: TensorStats) -> bool:
    """Tell whether every sort of non-finite value that left one module entered another."""
    return not entered.is_finite and not (
        (left.num_nan and not entered.num_nan)
        or (left.num_positive_inf and not entered.num_positive_inf and not entered.num_nan)
    )


def _describe_handed(seen: Observation, call: ModuleCall) -> Finding:
    """Name where the minus infinity came from that this call was handed: the batch, or code between modules."""
    entered = seen.stats(call.inputs)
    items = {path: stats for path, wanted in seen.batch.items() if not (stats := seen.stats(wanted)).is_finite}
    path = next((path for path, stats in items.items() if stats.count == entered.count), next(iter(items), None))
    if path is not None:
        return describe_item(seen, path)
    fqn = type(seen.model).__name__ if call.parent is None else _fqn(seen, call.parent)
    return make_finding("forward", fqn, entered, {"output": entered})


def _describe_forward(seen: Observation, call: ModuleCall) -> Finding:
    left = seen.stats(call.outputs)
    amaxes = {"input": seen.stats(call.inputs), "output": left, "weight": _weight_stats(call.module)}
    if isinstance(call.module, nn.modules.loss._Loss):
        return make_finding("loss", "loss", left, amaxes)
    return make_finding("forward", _fqn(seen, call), left, amaxes)


def _find_loss(found: _Forward) -> Finding:
    """Name the loss, or the model's own code if a module was handed something non-finite that no module made."""
    seen = found.seen
    made = [stats for stats in (seen.stats(suspect.call.outputs) for suspect in found.lost) if stats.is_bad]
    others = (call for call in seen.calls if call not in found.innocent)
    handed = (stats for stats in (seen.stats(call.inputs) for call in others) if stats.is_bad)
    entered = next((stats for stats in handed if not any(_covers(stats, each) for each in made)), None)
    if entered is not None:
        return make_finding("forward", type(seen.model).__name__, entered, {"output": entered})
    loss = seen.stats(seen.loss)
    return make_finding("loss", "loss", loss, {"output": loss})


# --- Backward ------------------------------------------------------------------------------------


def _is_explained(found: _Forward, call: ModuleCall) -> bool:
    """Tell whether the gradient went wrong in this call because of what forward made non-finite.

    A layer that is handed Inf multiplies its gradient by it, though a tanh made its output finite.
    """
    suspect = found.named
    if suspect is not None and suspect.call is call:
        return True
    entered = found.seen.stats(call.inputs)
    if entered.is_finite or (not entered.is_bad and _takes_masks(call)):
        return False
    if suspect is None or suspect.maker is None or not suspect.call.output_nodes:
        return _find_in_forward(found) is not None
    return not nodes_before(call.output_nodes, without=set()).isdisjoint(suspect.call.output_nodes)


def _find_in_backward(seen: Observation) -> ModuleCall | None:
    reached = [call for call in seen.calls if call.backward_started is not None and _leads(seen, call)]
    reached.sort(key=lambda call: call.backward_started or 0)
    culprits = [call for call in reached if _overflows_in_backward(seen, call)]
    call = _innermost_first(culprits)
    # Nothing before the first non-finite gradient explains it: it was made between modules.
    unexplained = next((c for c in reached if not seen.stats(c.output_grads).is_finite), None)
    if call is None or (unexplained is not None and _is_earlier(unexplained, call)):
        call = _innermost_of(unexplained, reached, seen) if unexplained is not None else call
    return call


def _leads(seen: Observation, call: ModuleCall) -> bool:
    return seen.leading is None or not seen.leading.isdisjoint(call.output_nodes)


def _is_earlier(first: ModuleCall, second: ModuleCall) -> bool:
    return (first.backward_started or 0) < (second.backward_started or 0) and not first.is_inside(second)


def _overflows_in_backward(seen: Observation, call: ModuleCall) -> bool:
    return seen.stats(call.output_grads).is_finite and not seen.stats(_outgoing(seen, call)).is_finite


def _outgoing(seen: Observation, call: ModuleCall) -> Wanted:
    alone = (p for p in call.module.parameters(recurse=False) if p not in seen.shared)
    own = [*call.param_grads, *(place for p in alone for place in seen.param_grads.get(p, []))]
    # A module that is used for several losses has gradients of each: those of the call's own backward count.
    backwards = {bisect(seen.backward_starts, place) for place in call.output_grads}
    return [*call.input_grads, *(place for place in own if bisect(seen.backward_starts, place) in backwards)]


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
