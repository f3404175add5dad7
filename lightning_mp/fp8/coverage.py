"""Which layers of a model can run in FP8, and why the others do not."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from lightning_mp.fp8.config import FP8Config
from lightning_mp.fp8.layer import ConvertedLinear
from lightning_mp.selection import is_transposed_linear, named_inner_modules, select_modules

__all__ = ["ALIGNMENT", "CONVERTED", "PINNED", "Coverage", "LayerRow", "brings_transformer_engine", "plan_layers"]

# Transformer Engine's FP8 products need both dimensions of every operand to be multiples of 16
# (pytorch/utils.py, assert_dim_for_fp8_exec; backward turns rows into the dimension summed over).
ALIGNMENT = 16
CONVERTED = "FP8"
PINNED = "pinned to FP32"
_ATTENTION = "nn.MultiheadAttention multiplies by its in_proj_weight itself"
_OTHERS = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class LayerRow:
    """One Linear layer of a model, or what else multiplies by weights of its own, convolutions aside.

    Args:
        fqn: Full dotted name, the first one of a shared layer.
        converted: Whether it runs in FP8.
        reason: Why, or why not.
        in_features: Width of its input; 0 where it is not known yet.
        out_features: Width of its output.
        is_linear: Whether it is a Linear layer.
        flops: Multiplications per row of input; ``None``: ``in_features`` by ``out_features``.
    """

    fqn: str
    converted: bool
    reason: str
    in_features: int
    out_features: int
    is_linear: bool = True
    flops: int | None = None

    @property
    def num_multiplications(self) -> int:
        """Multiplications per row of input, which for a recurrent layer is one step in time."""
        return self.in_features * self.out_features if self.flops is None else self.flops


@dataclass(frozen=True)
class Coverage:
    """How much of a model runs in FP8.

    Args:
        num_converted: Linear layers in FP8.
        num_layers: Linear layers in all.
        flops_share: Share of the multiplications of all Linear, bilinear and recurrent layers and of the input
            projections of ``nn.MultiheadAttention``, per row of input, in [0, 1].
        has_convolutions: Whether there are convolutions, whose multiplications depend on the size of the input
            and are not counted.
    """

    num_converted: int
    num_layers: int
    flops_share: float
    has_convolutions: bool = False

    @classmethod
    def of(cls, rows: Iterable[LayerRow], *, has_convolutions: bool = False) -> "Coverage":
        """Count over rows."""
        rows = list(rows)
        num_layers = sum(row.is_linear for row in rows)
        converted = [row for row in rows if row.converted]
        total = sum(row.num_multiplications for row in rows)
        share = sum(row.num_multiplications for row in converted) / total if total else 0.0
        return cls(len(converted), num_layers, share, has_convolutions)

    @property
    def shares(self) -> str:
        """Both shares as text."""
        aside = " without convolutions" if self.has_convolutions else ""
        layers, flops = f"{self.num_converted} of {self.num_layers} Linear layers", f"{self.flops_share:.1%}"
        return f"{layers}, {flops} of GEMM FLOPs{aside}"

    def __str__(self) -> str:
        return f"{self.shares}, in FP8"


def brings_transformer_engine(model: nn.Module) -> bool:
    """Tell whether the model already holds layers of Transformer Engine."""
    return any(c.__module__.startswith("transformer_engine.") for m in model.modules() for c in type(m).__mro__)


def plan_layers(
    model: nn.Module, config: FP8Config, *, keep: Collection[nn.Module] = ()
) -> list[tuple[LayerRow, nn.Module]]:
    """Decide for each Linear layer whether it can run in FP8.

    Args:
        model: The model, not modified.
        config: Which layers are wanted.
        keep: Modules that stay in FP32, with what they contain.

    Returns:
        A row and the layer for each ``nn.Linear``, in registration order, each object once; then a row and
        the module for each other one that multiplies by weights of its own: ``nn.MultiheadAttention``,
        recurrent and bilinear layers, and the ``Conv1D`` of Hugging Face.

    Raises:
        UnmatchedPatternError: If an item of ``include`` or ``exclude`` selects nothing.
    """
    excluded = _inside(select_modules(model, config.exclude, argument="exclude").values() if config.exclude else ())
    included = None
    if config.include is not None:
        included = _inside(select_modules(model, config.include, argument="include").values())
    layers = _first_names(model, nn.Linear)
    heads = _output_heads(model, layers) if config.skip_output_head else {}
    kept, is_foreign = _inside(keep), brings_transformer_engine(model)
    planned: list[tuple[LayerRow, nn.Module]] = []
    for fqn, layer in layers.items():
        reason = (
            ("the model brings layers of Transformer Engine and is left as it is" if is_foreign else "")
            or (PINNED if layer in kept else "")
            or _ineligible(layer)
            or ("excluded" if layer in excluded else "")
            or ("not in include" if included is not None and layer not in included else "")
            or heads.get(layer, "")
        )
        row = LayerRow(fqn, not reason, reason or CONVERTED, layer.in_features, layer.out_features)
        planned.append((row, layer))
    for fqn, attention in _first_names(model, nn.MultiheadAttention).items():
        width = attention.embed_dim
        # Query, key and value: three products of width by their own.
        reason = PINNED if attention in kept else _ATTENTION
        row = LayerRow(fqn, False, reason, width, width + attention.kdim + attention.vdim, is_linear=False)
        planned.append((row, attention))
    others = _first_names(model, _OTHERS) | _first_names(model, nn.Module, is_transposed_linear)
    for fqn, module in others.items():
        reason = PINNED if module in kept else f"{type(module).__name__}: only Linear layers run in FP8"
        planned.append((LayerRow(fqn, False, reason, 0, 0, is_linear=False, flops=_num_weights(module)), module))
    return planned


def _num_weights(module: nn.Module) -> int:
    """Return the elements of the weight matrices, each of which multiplies one element per row of input."""
    if isinstance(module, nn.RNNBase):
        return sum(weight.numel() for layer in module.all_weights for weight in layer if weight.dim() > 1)
    # By name: parametrizations keep the parameters elsewhere.
    names = [name for name in ("weight", "weight_ih", "weight_hh") if hasattr(module, name)]
    return sum(getattr(module, name).numel() for name in names)


def _first_names(
    model: nn.Module, kind: type[_Module] | tuple[type[_Module], ...], holds: Callable[[nn.Module], bool] | None = None
) -> dict[str, _Module]:
    first_names: dict[_Module, str] = {}
    for fqn, module in named_inner_modules(model).items():
        if isinstance(module, kind) and (holds is None or holds(module)):
            first_names.setdefault(module, fqn)
    return {fqn: module for module, fqn in first_names.items()}


def _inside(modules: Iterable[nn.Module]) -> set[nn.Module]:
    return {inner for module in modules for inner in module.modules()}


def _output_heads(model: nn.Module, layers: dict[str, nn.Linear]) -> dict[nn.Module, str]:
    """Return the layers that share an embedding's weight, else the last one."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tied = [layer for layer in layers.values() if id(layer._parameters.get("weight")) in embeddings]
    if tied:
        return dict.fromkeys(tied, "output head: it shares the weight of an embedding (skip_output_head)")
    last = list(layers.values())[-1:]
    return dict.fromkeys(last, "output head: the last Linear layer (skip_output_head)")


def _ineligible(layer: nn.Linear) -> str:
    """Say what keeps a layer from FP8 whatever the settings; empty if nothing does."""
    if isinstance(layer, nn.LazyLinear):
        return "a LazyLinear without a shape at setup (run a batch through the model before fit)"
    if type(layer).__name__.startswith("FSDP") and hasattr(layer, "reshard"):
        return "sharded by itself (call fully_shard on the block that holds it, not on the layer)"
    # By identity: a stand-in of FP32Pin is equal to its class and does more.
    if type(layer) is not nn.Linear and type(layer) is not ConvertedLinear:
        return f"a {type(layer).__name__}, which is a subclass of nn.Linear with ways of its own"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook and is no parameter"
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}"
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
    odd = {name: size for name, size in sizes.items() if size % ALIGNMENT or not size}
    return "; ".join(
        f"{name}={size} is not a multiple of {ALIGNMENT} ({max(-(-size // ALIGNMENT), 1) * ALIGNMENT} would be)"
        for name, size in odd.items()
    )
