"""Measures the casts that Transformer Engine makes itself, and gives that of a weight its master to cast.

Facts from Transformer Engine 2.9 to 2.20 (pytorch/quantized_tensor.py, pytorch/module/linear.py): a
quantizer is called by its method ``quantize`` and casts in ``quantize_impl``; a weight that is cached is
cast by the method ``quantize_`` of the tensor that the module keeps under ``_fp8_workspaces["weight"]``,
with a quantizer of that tensor's own, and first of all, where none is kept, as any other operand. (To 2.12
this stands in the module's ``get_weight_workspace``, in 2.20 in a function of ``pytorch/module/base.py``.)
With one scale per tensor the cast of the output gradient of a layer with a bias is one kernel with the
bias's gradient, without ``quantize``.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_mp.errors import UnsupportedError
from lightning_mp.fp8.delayed import OPERANDS
from lightning_mp.fp8.quantize import amax_of
from lightning_mp.fp8.recipes import FP8Recipe, Operand, PassThroughRecipe, operand_dtype
from lightning_mp.fp8.statistics import ROUNDING
from lightning_mp.numerics import sqnr_db

__all__ = ["CastWatch", "cast_weight_from", "measure_library_cast", "watch_casts"]

_NO_SUCH_CAST = (
    "master_weights: this version of Transformer Engine, or this recipe object, casts the weight of a layer in a way "
    "that FP32 masters cannot feed. Use Transformer Engine 2.9 to 2.20 and one of the recipes that have a name, or "
    "master_weights='params', whose parameters are FP32 themselves."
)


def measure_library_cast(x: Tensor, cast: Any, dtype: torch.dtype) -> Tensor:
    """Return what ``measure_cast`` returns for a tensor of the library.

    Args:
        x: Matrix before the cast.
        cast: What the library's quantizer made of it.
        dtype: The FP8 dtype of ``cast``.
    """
    values = cast.dequantize(dtype=torch.float32).reshape(x.shape)
    amax = amax_of(x)
    is_blockwise = not hasattr(cast, "_scale_inv")
    if is_blockwise:
        # The largest power of two that keeps the largest block in range; the scales that the library keeps
        # have padding whose values mean nothing.
        scale = torch.ldexp(torch.ones_like(amax), torch.frexp(torch.finfo(dtype).max / amax).exponent - 1)
    else:
        scale = cast._scale_inv.reshape(()).reciprocal()
    x = x.detach().float()
    magnitude = x.abs()
    num_nonzero = (magnitude > 0).sum().clamp(min=1)
    flushed = ((values == 0) & (magnitude > 0)).sum() / num_nonzero
    # The scale of a block comes from its own amax, so that nothing in it saturates.
    is_beyond = magnitude * scale > torch.finfo(dtype).max * ROUNDING
    saturated = torch.zeros_like(flushed) if is_blockwise else is_beyond.sum() / num_nonzero
    return torch.stack([v.float() for v in (amax, scale, saturated, flushed, sqnr_db(x, values))])


class CastWatch:
    """Measures every cast of one quantizer of the library until ``stop``.

    Args:
        quantizer: Of this one object the method ``quantize_impl`` is shadowed.
        operand: What it casts.
        dtype: The FP8 dtype that it casts to.
        found: Told of each measurement.
    """

    def __init__(
        self, quantizer: Any, operand: Operand, dtype: torch.dtype, found: Callable[[Operand, Tensor], None]
    ) -> None:
        self.operand = operand
        self._quantizer = quantizer
        cast = quantizer.quantize_impl

        def quantize_impl(x: Tensor) -> Any:
            result = cast(x)
            with torch.no_grad():
                found(operand, measure_library_cast(x.reshape(-1, x.shape[-1]), result, dtype))
            return result

        quantizer.quantize_impl = quantize_impl

    def stop(self) -> None:
        """Leave the quantizer as it was."""
        vars(self._quantizer).pop("quantize_impl", None)


def watch_casts(
    engine: Any, recipe: FP8Recipe, operands: Iterable[Operand], found: Callable[[Operand, Tensor], None]
) -> list[CastWatch]:
    """Watch the quantizers of one ``te.Linear``.

    None under a recipe whose numbers only the library knows, and where a version of it has none.
    """
    if isinstance(recipe, PassThroughRecipe) or not hasattr(engine, "quantizers"):
        return []
    engine.init_fp8_metadata(num_gemms=1)
    quantizers = (*engine.quantizers["scaling_fwd"][:2], engine.quantizers["scaling_bwd"][0])
    by_operand = dict(zip(OPERANDS, quantizers, strict=True))
    return [CastWatch(by_operand[o], o, operand_dtype(recipe.fp8_format, o), found) for o in operands]


@contextmanager
def cast_weight_from(engine: Any, values: Callable[[], Tensor], *, is_due: bool) -> Iterator[None]:
    """Let the library cast other values than the weight's own in one forward of a ``te.Linear``.

    The module keeps its parameter, which is what gradients belong to and what its backward may read. The
    values live for the time of the cast.

    Args:
        engine: Of its quantizer of the weight, and of the cast weight that it keeps, one method each is
            shadowed. Inside the library's region.
        values: Returns what to cast in place of the weight.
        is_due: Whether the forward is to cast the weight.

    Raises:
        UnsupportedError: If the library cast the weight in another way.
    """
    # As the forward would: a region with another recipe brings other quantizers.
    engine.init_fp8_metadata(num_gemms=1)
    quantizers = getattr(engine, "quantizers", {}).get("scaling_fwd") or (None, None)
    casts = ((quantizers[1], "quantize"), (getattr(engine, "_fp8_workspaces", {}).get("weight"), "quantize_"))
    shadows = [_Shadow(owner, name, engine._parameters["weight"], values) for owner, name in casts if owner is not None]
    try:
        yield
    finally:
        for shadow in shadows:
            shadow.remove()
    if is_due and not any(shadow.num_casts for shadow in shadows):
        raise UnsupportedError(_NO_SUCH_CAST)


class _Shadow:
    """Stands before one method that casts, and passes other values on where it is given the weight."""

    def __init__(self, owner: Any, name: str, weight: Tensor, values: Callable[[], Tensor]) -> None:
        self.num_casts = 0
        self._owner, self._name, self._cast = owner, name, getattr(owner, name)
        self._weight, self._values = weight, values
        setattr(owner, name, self)

    def __call__(self, x: Tensor, **settings: Any) -> Any:
        # A recipe of the user's may give one quantizer to several operands.
        if x.data_ptr() != self._weight.data_ptr():
            return self._cast(x, **settings)
        self.num_casts += 1
        return self._cast(self._values(), **settings)

    def remove(self) -> None:
        """Leave the method's owner as it was."""
        delattr(self._owner, self._name)
