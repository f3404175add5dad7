"""Ways through the autograd graph: what was computed from what."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

__all__ = ["Edge", "edge_of", "edges_of_leaf", "edges_to", "nodes_before", "uses_of"]


class Edge(NamedTuple):
    """An edge of the graph at one of its ends.

    Args:
        node: The node there.
        slot: Number of the edge among the gradients that the node sends, where it starts from it, or
            among those that it gets, where it leads to it.
    """

    node: Any
    slot: int


def nodes_before(nodes: Sequence[Any], *, without: set[Any]) -> set[Any]:
    """Return these nodes of the autograd graph and all that they were computed from."""
    reached: set[Any] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in reached and node not in without:
            reached.add(node)
            waiting += [before for before, _ in node.next_functions]
    return reached


def edges_to(nodes: Iterable[Any]) -> dict[Any, list[tuple[Edge, int]]]:
    """Return by node the edges that lead to it from any of ``nodes``, with the number of the gradient they bring."""
    users: dict[Any, list[tuple[Edge, int]]] = defaultdict(list)
    for node in nodes:
        for index, (before, number) in enumerate(node.next_functions):
            if before is not None:
                users[before].append((Edge(node, index), number))
    return users


def edge_of(tensor: Tensor) -> Edge:
    """Return the edge by which the gradient of a tensor that needs one arrives."""
    edge = get_gradient_edge(tensor)
    return Edge(edge.node, edge.output_nr)


def uses_of(edge: Edge, users: Mapping[Any, list[tuple[Edge, int]]]) -> list[Edge]:
    """Return the starts of the edges that bring the same gradient."""
    return [use for use, number in users.get(edge.node, ()) if number == edge.slot]


def edges_of_leaf(leaf: Any, users: Mapping[Any, list[tuple[Edge, int]]]) -> list[Edge]:
    """Return the starts of the edges that lead to a leaf of the graph, one per use of it.

    What several uses have between them and the leaf, as a cast that autocast keeps, is passed over.
    """
    uses: list[Edge] = []
    waiting = [leaf]
    while waiting:
        for use, _ in users.get(waiting.pop(), ()):
            is_only_from_leaf = sum(before is not None for before, _ in use.node.next_functions) == 1
            if is_only_from_leaf and len(users.get(use.node, ())) > 1:
                waiting.append(use.node)
            else:
                uses.append(use)
    return uses
