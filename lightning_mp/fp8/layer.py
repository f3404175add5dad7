"""``FP8Linear``: the class that a converted ``nn.Linear`` has while it runs in FP8."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mp.fp8.recipes import Operand
from lightning_mp.stand_in import InFront, StandIn, class_behind, stand_in

__all__ = ["ConvertedLinear", "FP8Linear", "LayerBackend", "LayerSettings", "StepFlags", "version_of", "without_fp8"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class StepFlags:
    """What the layers of an engine share about the step under way.

    Args:
        collects: Whether casts are measured.
        has_amax: Whether an amax was recorded since the last update of delayed scaling.
        weight_source: Returns the values to cast for a weight; ``None``: its own.
    """

    collects: bool = False
    has_amax: bool = False
    weight_source: Callable[[nn.Parameter], Tensor] | None = None


@dataclass(frozen=True)
class LayerSettings:
    """What the layers of an engine share.

    Args:
        compute_dtype: Dtype of results, and of the products that are not in FP8.
        fp8_in_eval: Whether modules in evaluation mode use FP8 as well.
        cache_weights: Whether a cast weight is kept until the weight changes.
        step: Flags of the step under way.
    """

    compute_dtype: torch.dtype
    fp8_in_eval: bool
    cache_weights: bool
    step: StepFlags = field(default_factory=StepFlags)


class LayerBackend:
    """What computes the products of one converted layer.

    Attributes:
        settings: What the layers of an engine share.
        demoted: Why the layer was moved back to 16 bits; empty while it runs in FP8.
        measured: What ``statistics.measure_cast`` returned for each operand while casts are measured.
        weight_casts: How often the weight was cast to FP8, compiled calls not counted.
        weight_key: What compiled code asks ``weight_values`` with; ``None`` where a weight has no other values.
        refuse_tracing: Raises the error of a recipe that cannot be compiled; ``None`` for one that can.
    """

    def __init__(self, settings: LayerSettings) -> None:
        self.settings = settings
        self.demoted = ""
        self.measured: dict[Operand, Tensor] = {}
        self.weight_casts = 0
        self.weight_key: Tensor | None = None
        self.refuse_tracing: Callable[[], None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Stay behind: a copy of a layer is in no engine's hands."""

    def is_active(self, layer: nn.Linear, x: Tensor) -> bool:
        """Tell whether this call runs in FP8.

        What a plain layer refuses, such as FP64 beside 16 bits, a number without dimensions or rows of
        another width, is left to it to refuse. The autocast region marks where: activation checkpointing
        restores it for the recompute, in both modes, and an island without autocast stays in full precision.
        """
        if self.demoted or not (layer.training or self.settings.fp8_in_eval):
            return False
        if x.dtype not in _DTYPES or x.dim() == 0 or x.shape[-1] != layer.in_features:
            return False
        return torch.is_autocast_enabled(x.device.type)

    def forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Return what the layer makes of ``x`` of shape ``(..., in_features)``."""
        raise NotImplementedError

    def values_of(self, weight: Tensor) -> Tensor:
        """Return what to cast for a weight outside any graph: the FP32 values of its master, or its own."""
        source = self.settings.step.weight_source
        return source(weight) if source is not None and isinstance(weight, nn.Parameter) else weight

    def invalidate_weight(self) -> None:
        """Forget the cast weight."""
        raise NotImplementedError

    def end_step(self, *, has_amax: bool) -> None:
        """Prepare for the step after an optimizer step; ``has_amax``: some layer recorded an amax."""
        raise NotImplementedError

    def stop_measuring(self) -> None:
        """Take back what watches casts, if anything does."""


def version_of(weight: Tensor) -> int | None:
    """Return what grows with each write that autograd sees; ``None`` for a tensor of inference mode."""
    return None if weight.is_inference() else weight._version


def without_fp8(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a converted layer after the run.

    Others may have derived a class from ours meanwhile, as a parametrization and ``fully_shard`` do. The
    result is then derived from ``nn.Linear`` in the same way, and their class stays as it is: it may be shared.
    """
    if cls is FP8Linear or class_behind(cls) is nn.Linear:
        return nn.Linear
    if not issubclass(cls, FP8Linear):
        return cls
    # Python takes the metaclass of the bases where it is not the one of our class.
    make_class: Any = type if issubclass(type(cls), StandIn) else type(cls)
    namespace = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    bases = tuple(without_fp8(base) for base in cls.__bases__)
    name = cls.__name__.replace(FP8Linear.__name__, nn.Linear.__name__)
    plain: type[nn.Module] = make_class(name, (_Silent, *bases), namespace)
    plain.__bases__ = bases
    return plain


class _Silent(nn.Module):
    """Stands before the bases of a class while it is made, so that their ``__init_subclass__`` does not run again."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


class FP8Linear(InFront, nn.Linear):
    """An ``nn.Linear`` whose products run in FP8 inside the autocast region.

    It is never built: an engine gives ``ConvertedLinear`` to existing layers and takes it back. Parameters,
    hooks, names and the module object stay what they were. Copies and pickles are plain ``nn.Linear``
    layers: no engine would know of them, update their scales or take them back. The class passes for
    ``nn.Linear`` where it is compared, looked up or built; only ``type(layer) is nn.Linear`` does not hold.
    """

    # None where a class that was derived from this one outlives the run, or on a copy of such a layer.
    _fp8: LayerBackend = None  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        if self._fp8 is None or not self._fp8.is_active(self, input):
            return nn.functional.linear(input, self.weight, self.bias)
        if self._fp8.refuse_tracing is not None and torch.compiler.is_compiling():
            self._fp8.refuse_tracing()
        return self._fp8.forward(self, input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if class_behind(type(self)) is not nn.Linear:
            return super().__reduce_ex__(protocol)
        # Not copyreg.__newobj__: pickle checks that it builds the object's own class.
        return nn.Linear.__new__, (nn.Linear,), {name: v for name, v in self.__dict__.items() if name != "_fp8"}


ConvertedLinear: type[FP8Linear] = stand_in(nn.Linear, FP8Linear, namespace={}, name=FP8Linear.__name__)
"""The class of a converted layer: an ``FP8Linear`` that compares equal to ``nn.Linear`` and builds plain layers."""
