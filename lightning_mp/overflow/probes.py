"""Hooks on every module that note what goes in and out, forward and backward, without host syncs."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from lightning_mp.overflow.aliases import separate_aliases
from lightning_mp.overflow.graph import Edge, edge_of, edges_of_leaf, edges_to, nodes_before, uses_of
from lightning_mp.overflow.statistics import Statistics, Wanted, make_finite_, named_tensors
from lightning_mp.selection import clean_fqn

__all__ = ["ModuleCall", "Probes"]


@dataclass(eq=False, slots=True)
class ModuleCall:
    """One call of one module: places of its numbers in the ``Statistics``.

    Args:
        fqn: Dotted name under which it was called; empty for the model itself.
        module: The module.
        parent: The call from within which it was called.
        inputs: Its tensors among arguments.
        outputs: What it returned.
        output_nodes: Nodes of the autograd graph that made what it returned.
        output_grads: Gradients that came in during backward.
        input_grads: Gradients that went out, from this call alone.
        param_grads: Gradients from this call alone of parameters that other calls use too.
        nested: Edges of the autograd graph that lead to arguments inside containers.
        nodes: Numbers, in the order of their making, of the nodes of the autograd graph that it made.
        finished: Position among the ends of all calls; ``None`` if it did not return.
        backward_started: Position of its first incoming gradient in the backward pass.
    """

    fqn: str
    module: nn.Module
    parent: "ModuleCall | None"
    inputs: Wanted = field(default_factory=list)
    outputs: Wanted = field(default_factory=list)
    output_nodes: list[Any] = field(default_factory=list)
    output_grads: Wanted = field(default_factory=list)
    input_grads: Wanted = field(default_factory=list)
    param_grads: Wanted = field(default_factory=list)
    nested: list[Edge] = field(default_factory=list)
    nodes: range = range(0)
    finished: int | None = None
    backward_started: int | None = None

    def is_inside(self, other: "ModuleCall") -> bool:
        """Tell whether this call happened during ``other``."""
        parent = self.parent
        while parent is not None and parent is not other:
            parent = parent.parent
        return parent is other


class Probes:
    """Notes every module call of a model while the block runs, and the gradients of those calls.

    Arguments that need a gradient are handed on as views: the gradient of such a view is what this call
    alone sends back, where the tensor itself would add up all its uses, as in a residual block. What is inside
    containers, and parameters that several calls use, are told apart by ``watch_uses``.

    Args:
        model: The module to watch, with all inside it.
        tells_aliases_apart: Whether names of a shared module within one parent are told apart. Stand-ins
            do it, on which an attribute that a ``forward`` sets is lost: not for a real step.
        watches_parameters: Whether gradients of parameters are measured as they arrive in backward, each
            time: before a reduction over ranks, and without those of earlier batches. Not for sharded ones.
        mended: Places in ``calls`` of those whose outputs get a finite value for each that is not.

    Attributes:
        calls: In the order in which they began.
        param_grads: Places of the gradients by parameter, where those are watched.
        shared: Parameters that several calls used: each call has its own part of their gradients.
        statistics: Holds the numbers; the caller reads it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tells_aliases_apart: bool = True,
        watches_parameters: bool = False,
        mended: Collection[int] = (),
    ) -> None:
        self.calls: list[ModuleCall] = []
        self.param_grads: dict[Tensor, Wanted] = {}
        self.shared: set[Tensor] = set()
        self.statistics = Statistics()
        self._model = model
        self._tells_aliases_apart = tells_aliases_apart
        self._watches_parameters = watches_parameters
        self._mended = mended
        self._names: dict[int, list[str]] = {}
        self._active: list[ModuleCall] = []
        self._handles: list[Any] = []
        self._restore: Callable[[], None] | None = None
        self._watched_edges: set[tuple[Any, int, int]] = set()
        self._clock = 0

    def __enter__(self) -> "Probes":
        self._restore = separate_aliases(self._model) if self._tells_aliases_apart else None
        modules: dict[int, nn.Module] = {}
        for name, module in self._model.named_modules(remove_duplicate=False):
            # Scripted modules take no hooks: what they do wrong shows in their parent.
            if not isinstance(module, torch.jit.ScriptModule):
                modules[id(module)] = module
            self._names.setdefault(id(module), []).append(clean_fqn(name, self._model))
        for module in modules.values():
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        for parameter in self._model.parameters() if self._watches_parameters else ():
            if parameter.requires_grad and not is_lazy(parameter):
                handle = parameter.register_hook(partial(self._note_parameter, parameter))  # type: ignore[no-untyped-call]
                self._handles.append(handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watched_edges.clear()
        self._active.clear()
        if self._restore is not None:
            self._restore()

    def watch_uses(self, loss: Tensor) -> None:
        """Measure, in the backward of this loss, what each call alone sends to what several calls use.

        That is: parameters of modules that are called twice, tied ones, and arguments inside containers.
        """
        users = edges_to(nodes_before([loss.grad_fn], without=set()))
        for node in list(users):
            parameter = getattr(node, "variable", None)  # of nodes that accumulate gradients
            edges = edges_of_leaf(node, users) if parameter is not None else []
            uses = [(use, self._maker(use.node)) for use in edges] if len(edges) > 1 else []
            if parameter is not None and len({id(call) for _, call in uses}) > 1:
                self.shared.add(parameter)
                for use, call in uses:
                    if call is not None:
                        self._watch_edge(use, call, call.param_grads)
        for call in self.calls:
            for edge in call.nested:
                for use in uses_of(edge, users):
                    if use.node._sequence_nr() in call.nodes:
                        self._watch_edge(use, call, call.input_grads)

    def _maker(self, node: Any) -> ModuleCall | None:
        """Return the innermost call that made this node of the graph."""
        number = node._sequence_nr()
        return next((call for call in reversed(self.calls) if number in call.nodes), None)

    def _watch_edge(self, use: Edge, call: ModuleCall, grads: Wanted) -> None:
        key = (use.node, use.slot, id(grads))
        if key in self._watched_edges:
            return
        self._watched_edges.add(key)

        def note(sent: tuple[Tensor | None, ...], came: tuple[Tensor | None, ...]) -> None:
            grad = sent[use.slot]
            if grad is not None:
                grads.extend(self.statistics.add([grad]))

        self._handles.append(use.node.register_hook(note))

    def _note_parameter(self, parameter: Tensor, grad: Tensor) -> None:
        self.param_grads.setdefault(parameter, []).extend(self.statistics.add([grad]))

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _name(self, module: nn.Module) -> str:
        """Return the name by which the innermost running call knows the module."""
        names = self._names[id(module)]
        for call in reversed(self._active):
            prefix = f"{call.fqn}." if call.fqn else ""
            inside = [name for name in names if name.startswith(prefix)]
            if inside:
                return min(inside, key=lambda name: name.count("."))
        return names[0]

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if _is_recomputing():
            return None
        call = ModuleCall(self._name(module), module, self._active[-1] if self._active else None)
        self.calls.append(call)
        self._active.append(call)
        tensors = [tensor for _, tensor in named_tensors([args, kwargs])]
        call.inputs = self.statistics.add(tensors)
        call.nodes = range(_next_number(), _next_number())
        if not torch.is_grad_enabled():
            return None
        views: dict[int, Tensor] = {}

        def view(value: Any) -> Any:
            # A plain tensor only, and one view per tensor: attention asks whether query is key.
            if type(value) is not Tensor or not value.requires_grad or value.is_nested:
                return value
            if id(value) not in views:
                views[id(value)] = value.view_as(value)
            return views[id(value)]

        args = tuple(view(value) for value in args)
        kwargs = {name: view(value) for name, value in kwargs.items()}
        for tensor in views.values():
            self._watch(tensor, call, call.input_grads)
        others = {id(t): t for t in tensors if t.requires_grad and id(t) not in views}
        # A nested tensor that is a leaf has no edge to ask for (torch 2.13).
        call.nested = [edge_of(t) for t in others.values() if t.grad_fn is not None or not t.is_nested]
        return args, kwargs

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if _is_recomputing():
            return None
        # A call that ended by an exception which somebody caught is still on the stack.
        while self._active and self._active[-1].module is not module:
            self._active.pop()
        if not self._active:
            return None
        call = self._active.pop()
        if self._mended and self.calls.index(call) in self._mended:
            output = tree_map_only(Tensor, _finite, output)
        call.finished = self._tick()
        call.nodes = range(call.nodes.start, _next_number())
        tensors = [tensor for _, tensor in named_tensors(output)]
        call.outputs = self.statistics.add(tensors)
        call.output_nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        for tensor in {id(t): t for t in tensors if t.requires_grad}.values():
            self._watch(tensor, call, call.output_grads)
        return output if self._mended else None

    def _watch(self, tensor: Tensor, call: ModuleCall, grads: Wanted) -> None:
        def note(grad: Tensor) -> None:
            if grads is call.output_grads and call.backward_started is None:
                call.backward_started = self._tick()
            grads.extend(self.statistics.add([grad]))

        # Taken off in the end: a hook holds these calls, and they hold the graph that holds the hook. No garbage
        # collector sees through it, so that all activations of the batch would stay.
        self._handles.append(tensor.register_hook(note))  # type: ignore[no-untyped-call]


def _finite(tensor: Tensor) -> Tensor:
    finite = tensor.detach().clone()
    if not make_finite_(finite):
        return tensor
    return torch.where(tensor.isfinite(), tensor, finite) if tensor.requires_grad else finite


def _next_number() -> int:
    """Return the number that the next node of the autograd graph gets on this thread."""
    return torch._C._autograd._get_sequence_nr()


def _is_recomputing() -> bool:
    """Tell whether the autograd engine runs, as when activation checkpointing computes a second time."""
    return torch._C._current_graph_task_id() != -1
