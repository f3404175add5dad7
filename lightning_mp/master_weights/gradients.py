"""Gradients of 16-bit parameters, read and clipped as FP32 values.

Where more than one backward feeds a step, ``Parameter.grad_dtype`` makes autograd accumulate in FP32
and clipping works in place. Where only one does, gradients may stay in 16 bits; writing a clipped value
back to 16 bits would round it. A clip puts FP32 gradients into ``param.grad`` then, or, where nobody
can look before the step, is remembered as operations that the step applies when a bucket is upcast.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mp.errors import LightningMPError, UnsupportedError
from lightning_mp.formats import HALF_DTYPES
from lightning_mp.master_weights.scratch import Scratch

__all__ = ["Gradients", "Scaling", "total_grad_norm"]

# The guard of torch.nn.utils.clip_grad_norm_ against division by zero.
_CLIP_EPS = 1e-6


class NonFiniteNormError(LightningMPError, RuntimeError):
    """The norm of the gradients is not finite and the caller asked to stop there."""


@dataclass(frozen=True)
class Scaling:
    """The multiplication by which a norm is clipped."""

    factor: Tensor

    def __call__(self, grad: Tensor) -> Tensor:
        return grad.mul_(self.factor.to(grad.device))


@dataclass
class _Pending:
    """What is still to be done to the FP32 value of one 16-bit gradient."""

    grad: Tensor
    version: int
    operations: list[Callable[[Tensor], Tensor]]


class Gradients:
    """The gradients of the mastered parameters, whatever dtype they are stored in.

    Gradients live in ``param.grad`` as always; this object only holds the clips that wait.

    Attributes:
        defers: Whether clips of 16-bit gradients wait for the step, which keeps ``param.grad`` as it is.
            Only for a clip after which nothing but the step reads or changes gradients.
        shows_clipped: Whether ``param.grad`` gets the clipped values, rounded to 16 bits, in a step that
            applied such a clip, for those who look at gradients afterwards.
    """

    def __init__(self) -> None:
        self.defers = False
        self.shows_clipped = False
        self._pending: dict[nn.Parameter, _Pending] = {}

    def fp32(self, param: nn.Parameter) -> Tensor | None:
        """Return the true FP32 gradient of ``param``: upcast, with the clips that wait applied.

        An FP32 (or FP64, or complex) gradient is returned itself.

        Raises:
            UnsupportedError: If the gradient was changed or replaced while a clip of it waited.
        """
        grad = param.grad
        if grad is None or grad.dtype not in HALF_DTYPES:
            return grad
        return self._clipped_(param, grad.to(torch.float32))

    def in_dtype(self, param: nn.Parameter) -> Tensor | None:
        """Return the gradient in the dtype of ``param``, with the clips that wait applied."""
        grad = param.grad
        if grad is None or (grad.dtype is param.dtype and param not in self._pending):
            return grad
        wide = self.fp32(param)
        return None if wide is None else wide.to(param.dtype)

    def fp32_all(self, params: list[nn.Parameter], scratch: Scratch) -> list[Tensor | None]:
        """Return the true FP32 gradients of parameters on one device, upcast into ``scratch``."""
        grads = [param.grad for param in params]
        dense = [index for index, grad in enumerate(grads) if grad is not None and _is_dense_half(grad)]
        if not dense:
            return [self.fp32(param) for param in params]
        stored = [grad for grad in (grads[index] for index in dense) if grad is not None]
        _, memory = scratch.carve("gradients", stored[0].device, [grad.numel() for grad in stored])
        # In the shape and strides of the parameter, as the optimizer's own state has.
        upcast = [
            flat.as_strided(params[index].shape, params[index].stride())
            for flat, index in zip(memory, dense, strict=True)
        ]
        torch._foreach_copy_(upcast, stored)
        is_dense = set(dense)
        results = [None if index in is_dense else self.fp32(param) for index, param in enumerate(params)]
        for index, grad in zip(dense, upcast, strict=True):
            results[index] = self._clipped_(params[index], grad)
        return results

    def _clipped_(self, param: nn.Parameter, grad: Tensor) -> Tensor:
        for operation in self._operations(param):
            operation(grad)
        return grad

    def norm(self, params: Iterable[nn.Parameter], norm_type: float = 2.0) -> Tensor:
        """Return the norm over all gradients, computed in FP32; 0-dim, on the first gradient's device."""
        stored = [param for param in params if param.grad is not None]
        grads = [self.fp32(param) if self._operations(param) else param.grad for param in stored]
        return total_grad_norm([grad for grad in grads if grad is not None], norm_type)

    def clip_norm_(
        self,
        params: Iterable[nn.Parameter],
        max_norm: float,
        *,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor:
        """Clip as ``torch.nn.utils.clip_grad_norm_``, on FP32 values; return the norm before."""
        params = list(params)
        norm = self.norm(params, norm_type)
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise NonFiniteNormError(
                f"The gradients' norm of order {norm_type} is {norm.item()}, so it cannot be clipped to {max_norm}. "
                "Pass error_if_nonfinite=False to scale by it anyway."
            )
        self.clip_with_norm_(params, max_norm, norm)
        return norm

    def clip_with_norm_(self, params: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
        """Clip as ``torch.nn.utils.clip_grads_with_norm_``: to ``max_norm``, given that the norm is ``norm``."""
        factor = (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0)
        self._apply(params, Scaling(factor))

    def clip_value_(self, params: Iterable[nn.Parameter], clip_value: float) -> None:
        """Clip as ``torch.nn.utils.clip_grad_value_``, on FP32 values."""
        self._apply(params, lambda grad: grad.clamp_(min=-clip_value, max=clip_value))

    def widen_(self, params: Iterable[nn.Parameter]) -> None:
        """Put FP32 gradients, with the clips that waited, into ``param.grad``: others may change them."""
        for param in params:
            grad = param.grad
            if grad is not None and grad.dtype in HALF_DTYPES:
                self._store(param, self.fp32(param))

    def used(self, param: nn.Parameter, clipped: Tensor | None) -> None:
        """Note that the gradient of ``param`` was used, in FP32 as ``clipped``: nothing waits for it any more."""
        entry = self._pending.pop(param, None)
        if self.shows_clipped and entry is not None and clipped is not None:
            entry.grad.copy_(clipped)

    def waiting(self, param: nn.Parameter) -> list[Callable[[Tensor], Tensor]]:
        """Return what is still to be done to the FP32 value of a 16-bit gradient, in order.

        Raises:
            UnsupportedError: If the gradient was changed or replaced while a clip of it waited.
        """
        return self._operations(param)

    def forget_all(self) -> None:
        """Drop the clips that wait: their gradients will not be used."""
        self._pending.clear()

    def _apply(self, params: Iterable[nn.Parameter], operation: Callable[[Tensor], Tensor]) -> None:
        for param in params:
            grad = param.grad
            if grad is None:
                continue
            if grad.dtype not in HALF_DTYPES:
                operation(grad)
                continue
            if not self.defers:
                self._store(param, operation(self.fp32(param)))  # type: ignore[arg-type]
                continue
            entry = self._pending.get(param)
            if entry is None or entry.grad is not grad or entry.version != grad._version:
                entry = self._pending[param] = _Pending(grad, grad._version, [])
            entry.operations.append(operation)

    def _store(self, param: nn.Parameter, grad: Tensor | None) -> None:
        if param.grad_dtype is not None:
            param.grad_dtype = None  # None allows the gradient another dtype than the parameter's
        param.grad = grad
        self._pending.pop(param, None)

    def _operations(self, param: nn.Parameter) -> list[Callable[[Tensor], Tensor]]:
        entry = self._pending.get(param)
        if entry is None:
            return []
        if entry.grad is not param.grad or entry.version != entry.grad._version:
            raise UnsupportedError(
                f"master_weights: a 16-bit gradient of shape {tuple(param.shape)} was changed after gradient_clip_val "
                "clipped it, so its clipped value is not known. Change gradients in on_before_optimizer_step, which "
                "runs before clipping, in an optimizer step pre-hook, or in configure_gradient_clipping after "
                "self.clip_gradients(...)."
            )
        return entry.operations


def _is_dense_half(grad: Tensor) -> bool:
    return grad.dtype in HALF_DTYPES and not grad.is_sparse


@torch.no_grad()
def total_grad_norm(grads: list[Tensor], norm_type: float = 2.0) -> Tensor:
    """Measure the norm over all elements of ``grads`` in FP32, whatever their dtypes.

    Args:
        grads: Dense or sparse gradients of any floating dtype, on any devices. Not modified.
        norm_type: Order of the norm; ``float("inf")`` gives the largest magnitude.

    Returns:
        0-dim tensor on the first gradient's device, FP32 (FP64 if a gradient is); zero without gradients.

    Example:
        >>> total_grad_norm([torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor([4.0])])
        tensor(5.)
    """
    if not grads:
        return torch.tensor(0.0, dtype=torch.float32)
    norms = [norm.to(grads[0].device) for norm in _norms(grads, norm_type)]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(_widest(norms)) for norm in norms]), norm_type)
    return total


def _norms(grads: list[Tensor], norm_type: float) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    batches: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, grad in enumerate(grads):
        if grad.is_sparse:
            found[index] = torch.linalg.vector_norm(grad.coalesce().values().float(), norm_type)
        else:
            batches.setdefault((grad.device, grad.dtype), []).append(index)
    for (_, dtype), indices in batches.items():
        # The dtype is that of the sum: a BF16 sum over many squares would lose most of them.
        wide = torch.float32 if dtype in HALF_DTYPES else None
        batch = torch._foreach_norm([grads[index] for index in indices], norm_type, dtype=wide)
        found.update(zip(indices, batch, strict=True))
    return [found[index] for index in range(len(grads))]


def _widest(norms: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(norm.dtype is torch.float64 for norm in norms) else torch.float32
