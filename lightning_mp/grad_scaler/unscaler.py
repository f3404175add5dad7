"""Dividing each gradient by the loss scale exactly once, and finding the non-finite ones."""

import math
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_mp.grad_scaler.scaler import LossScaler

__all__ = ["GradientUnscaler", "find_nonfinite_", "gradient_amaxes"]

_UNSCALED = "_lightning_mp_unscaled"
_NUM_ZEROS = 64


class GradientUnscaler:
    """Divide gradients by the loss scale exactly once, and find the non-finite ones.

    Under manual optimization several backwards and steps mix within a batch. A gradient that was
    unscaled carries a mark: a second optimizer that shares its parameter does not divide it again,
    and before a further backward adds to it, it is multiplied back.

    Args:
        scaler: The loss scaler; ``None`` only checks.
        is_manual: Whether gradients are to be marked.
        is_sharded: Whether ranks hold different shards, so that ``found_inf`` must be agreed on.
    """

    def __init__(self, scaler: LossScaler | None, *, is_manual: bool = False, is_sharded: bool = False) -> None:
        self._scaler = scaler
        self._marks = is_manual and scaler is not None
        self._is_sharded = is_sharded
        self._found_inf: dict[int, Tensor | None] = {}
        self._marked: list[Parameter] = []
        self._ones: dict[torch.device, Tensor] = {}
        self._zeros: dict[torch.device, list[Tensor]] = {}
        self._backwards = 0
        self._backwards_at_step: dict[int, int] = {}

    def before_backward(self) -> None:
        """Prepare for a backward: gradients that it may add to are scaled again."""
        self._backwards += 1
        self._found_inf.clear()
        for param in self._marked:
            grad = param.grad
            if grad is not None and getattr(grad, _UNSCALED, False) and self._scaler is not None:
                _values(grad).mul_(self._scaler.scale_tensor(grad.device).to(grad.device))
                delattr(grad, _UNSCALED)
        self._marked.clear()

    def unscale_(self, optimizer: Optimizer) -> Tensor | None:
        """Unscale the optimizer's gradients in place, unless that was done since the last backward.

        Args:
            optimizer: Whose parameters' gradients to divide by the scale.

        Returns:
            0-dim FP32 tensor, nonzero if a gradient was Inf or NaN before clipping could hide it;
            ``None`` if no parameter has a gradient.
        """
        key = id(optimizer)
        if key not in self._found_inf:
            self._found_inf[key] = self._unscale_all_(optimizer)
        return self._found_inf[key]

    def finish(self, optimizer: Optimizer) -> None:
        """Forget the optimizer's result: its step is over."""
        self._found_inf.pop(id(optimizer), None)
        self._backwards_at_step[id(optimizer)] = self._backwards

    def has_unannounced_gradients(self, optimizer: Optimizer) -> bool:
        """Tell whether gradients are there that no backward through this object made.

        They were never multiplied by the scale, as after ``loss.backward()``.
        """
        if self._scaler is None or self._backwards != self._backwards_at_step.get(id(optimizer), 0):
            return False
        return any(not getattr(p.grad, _UNSCALED, False) for p in _params(optimizer) if p.grad is not None)

    def rescale_pending_(self, optimizers: Iterable[Optimizer], ratio: Tensor) -> None:
        """Multiply gradients that still wait for their step by new scale over old scale.

        An optimizer that steps every other batch accumulates under one scale only if what it holds
        follows the scale. Exact for factors that are powers of two.
        """
        seen = set()
        for optimizer in optimizers:
            for param in _params(optimizer):
                grad = param.grad
                if grad is not None and id(param) not in seen and not getattr(grad, _UNSCALED, False):
                    seen.add(id(param))
                    _values(grad).mul_(ratio.to(grad.device))

    def _unscale_all_(self, optimizer: Optimizer) -> Tensor | None:
        known: list[Tensor] = []
        if self._marks:
            fresh, known = self._mark_fresh(optimizer)
        else:
            fresh = []
            for group in optimizer.param_groups:
                for param in group["params"]:
                    grad = param.grad
                    if grad is None:
                        continue
                    # Most are what _values would return: asked here, because the call costs more than the question.
                    is_plain = type(grad) is Tensor and grad.dtype is torch.float32 and grad.layout is torch.strided
                    fresh.append(grad if is_plain else _values(grad))
        if not fresh and not known:
            return None
        device = (fresh or known)[0].device
        zeros = self._zeros.get(device)
        found_inf = zeros.pop() if zeros else self._new_zero(device)
        self._check_and_multiply_(fresh, found_inf, scaled=self._scaler is not None)
        if known:
            self._check_and_multiply_(known, found_inf, scaled=False)
        if self._is_sharded and dist.is_initialized():
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
        return found_inf

    def _mark_fresh(self, optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
        """Mark gradients that are still scaled; return them, and those that were marked before."""
        fresh, known = [], []
        for param in _params(optimizer):
            grad = param.grad
            if grad is None:
                continue
            if getattr(grad, _UNSCALED, False):
                known.append(_values(grad))
                continue
            setattr(grad, _UNSCALED, True)
            self._marked.append(param)
            fresh.append(_values(grad))
        return fresh, known

    def _check_and_multiply_(self, grads: list[Tensor], found_inf: Tensor, *, scaled: bool) -> None:
        for device, group in _by_device_and_dtype(grads):
            factor = self._inverse_scale(device) if scaled else self._ones.get(device)
            if factor is None:
                factor = self._ones[device] = torch.ones((), dtype=torch.float32, device=device)
            found = found_inf if device == found_inf.device else self._new_zero(device)
            if device.type == "cuda" and group[0].dtype is torch.bfloat16:
                # torch's kernel does not know BF16 on CUDA (seen in 2.11; pytorch/pytorch#127176).
                find_nonfinite_(group, found)
                if scaled:
                    torch._foreach_mul_(group, factor)
            else:
                torch._amp_foreach_non_finite_check_and_unscale_(group, found, factor)
            if found is not found_inf:
                # The sum of two ones would not do: torch's fused optimizers skip at exactly 1.
                torch.maximum(found_inf, found.to(found_inf.device), out=found_inf)

    def _new_zero(self, device: torch.device) -> Tensor:
        """Return a fresh zero, 0-dim FP32. They are made many at a time: on CUDA each would be a kernel of its own."""
        zeros = self._zeros.get(device)
        if not zeros:
            zeros = self._zeros[device] = list(torch.zeros(_NUM_ZEROS, dtype=torch.float32, device=device).unbind())
        return zeros.pop()

    def _inverse_scale(self, device: torch.device) -> Tensor:
        scale = self._scaler.scale_tensor(device)  # type: ignore[union-attr]
        # In double and rounded once, as torch does: 1/scale in FP32 is exact for powers of two only.
        inverse = scale.reciprocal() if scale.device.type == "mps" else scale.double().reciprocal().float()
        return inverse.to(device, non_blocking=True)


def find_nonfinite_(grads: list[Tensor], found_inf: Tensor) -> None:
    """Set ``found_inf`` to one if an element is Inf or NaN; the gradients are only read.

    Args:
        grads: Strided, of one floating dtype and one device.
        found_inf: 0-dim FP32 tensor on that device.
    """
    filled = [grad for grad in grads if grad.numel() > 0]
    if filled:
        # The largest magnitude is exact in FP32, and NaN where there is one. A sum could overflow.
        largest = torch.stack(list(torch._foreach_norm(filled, math.inf, dtype=torch.float32)))
        torch._amp_foreach_non_finite_check_and_unscale_([largest], found_inf, torch.ones_like(found_inf))


def gradient_amaxes(optimizer: Optimizer) -> tuple[list[Parameter], Tensor]:
    """Measure the largest magnitude of each gradient of the optimizer, without asking the host.

    Returns:
        The parameters that have a non-empty gradient, in ``param_groups`` order, and an FP32 tensor
        of shape (number of them,) with Inf or NaN where a gradient has one.
    """
    params = [p for p in _params(optimizer) if p.grad is not None and _values(p.grad).numel() > 0]
    if not params:
        return [], torch.zeros(0, dtype=torch.float32)
    amaxes = [_values(p.grad).abs().amax().float() for p in params]  # type: ignore[arg-type]
    return params, torch.stack([a.to(amaxes[0].device) for a in amaxes])


def _params(optimizer: Optimizer) -> Iterator[Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _by_device_and_dtype(grads: list[Tensor]) -> list[tuple[torch.device, list[Tensor]]]:
    """Return the tensors in groups that one kernel can treat; nearly always there is one."""
    if not grads:
        return []
    device, dtype = grads[0].device, grads[0].dtype
    for grad in grads:
        if grad.dtype is not dtype or grad.device != device:
            break
    else:
        return [(device, grads)]
    same = [grad for grad in grads if grad.dtype is dtype and grad.device == device]
    rest = [grad for grad in grads if grad.dtype is not dtype or grad.device != device]
    return [(device, same), *_by_device_and_dtype(rest)]


def _values(grad: Tensor) -> Tensor:
    """Return the real, dense, local tensor that holds the gradient's numbers."""
    if type(grad) is Tensor and grad.dtype is torch.float32 and grad.layout is torch.strided:
        return grad
    if hasattr(grad, "to_local"):
        grad = grad.to_local()
    if grad.is_sparse:
        # Duplicate indices add up only when coalesced: an FP16 sum can overflow then.
        grad = grad._values()
    return torch.view_as_real(grad) if grad.is_complex() else grad
