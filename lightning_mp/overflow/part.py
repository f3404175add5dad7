"""The part of a pass that gave some of the parameters their gradients, as those of one optimizer of several."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_mp.overflow.attribution import Observation
from lightning_mp.overflow.graph import nodes_before
from lightning_mp.overflow.probes import ModuleCall

__all__ = ["part_for"]


def part_for(seen: Observation, parameters: Iterable[Tensor]) -> Observation | None:
    """Return what can have made gradients of these parameters non-finite.

    These are the losses and the module calls from which the autograd graph leads to such a parameter, and the
    calls that made values for them. Calls without a graph, as of a frozen module, belong to it too; those of
    another graph only if something non-finite came from outside, as from a generator whose output was detached.

    Args:
        seen: The pass, its statistics read, with the gradients of parameters measured.
        parameters: The parameters in question.

    Returns:
        The part; ``None`` if all gradients of ``parameters`` that the pass gave are finite.
    """
    bad = {p for p in parameters if not seen.stats(seen.param_grads.get(p, [])).is_finite}
    if not bad:
        return None
    made = [node for call in seen.calls for node in call.output_nodes]
    leading = _nodes_leading_to(bad, [*seen.loss_nodes, *made])
    losses = [(place, node) for place, node in zip(seen.loss, seen.loss_nodes, strict=False) if node in leading]
    own = [node for node in made if node in leading]
    # What made values for them, too: layers below a masked one may have finite gradients.
    related = leading | nodes_before(own, without=set())
    calls = [call for call in seen.calls if not call.output_nodes or not related.isdisjoint(call.output_nodes)]
    return replace(
        seen,
        calls=seen.calls if _is_handed(seen, calls) else calls,
        loss=[place for place, _ in losses],
        loss_nodes=[node for _, node in losses],
        leading=leading,
    )


def _is_handed(seen: Observation, calls: list[ModuleCall]) -> bool:
    """Tell whether the first NaN or infinity in these calls came in from outside, as far as forward shows any."""
    finished = sorted((call for call in calls if call.finished is not None), key=lambda call: call.finished or 0)
    came_in = ((seen.stats(call.inputs).is_bad, seen.stats(call.outputs).is_bad) for call in finished)
    return next((entered for entered, left in came_in if entered or left), False)


def _nodes_leading_to(parameters: set[Tensor], nodes: Iterable[Any]) -> set[Any]:
    """Return those of ``nodes``, and of what they were computed from, whose gradients reach the parameters."""
    users = defaultdict(list)
    leaves = []
    for node in nodes_before(list(nodes), without=set()):
        # Only nodes that accumulate gradients have one.
        if getattr(node, "variable", None) in parameters:
            leaves.append(node)
        for before, _ in node.next_functions:
            users[before].append(node)
    leading: set[Any] = set()
    while leaves:
        node = leaves.pop()
        if node not in leading:
            leading.add(node)
            leaves += users[node]
    return leading
