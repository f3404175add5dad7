"""Gradients of 16-bit parameters under DDP: accumulated and reduced in FP32.

DDP's reducer works on buckets of the parameters' dtype and refuses gradients of another. So the
gradients of one backward stay in 16 bits while it runs; a communication hook upcasts each bucket, adds
what was accumulated before, and reduces that. Between backwards ``param.grad`` is FP32, so that
``zero_grad``, clipping and the step need to know nothing. A parameter with hooks of others has an FP32
gradient for them, whose value is kept while DDP gets one in 16 bits.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights.param_hooks import enclose_hooks, has_hooks, hooks_made

__all__ = ["FP32Reducer"]


class FP32Reducer:
    """Accumulate and reduce the gradients of 16-bit parameters in FP32.

    Args:
        ddp: Wraps the converted module. Its communication hook is taken for its lifetime.
        params: The 16-bit parameters.
        reduce_dtype: Dtype in which gradients travel between ranks.
        accumulates: Whether several backwards feed a step.

    Raises:
        UnsupportedError: If DDP has a communication hook already, or a static graph meets accumulation.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        params: Iterable[nn.Parameter],
        *,
        reduce_dtype: torch.dtype = torch.float32,
        accumulates: bool = True,
    ) -> None:
        _check_ddp(ddp, accumulates=accumulates)
        self.ddp = ddp
        self._params = list(params)
        self._reduce_dtype = reduce_dtype
        self._is_active = True
        self._accumulated: dict[nn.Parameter, Tensor] = {}
        self._reduced: dict[nn.Parameter, Tensor | None] = {}
        self._arrived: set[nn.Parameter] = set()
        self._exact: dict[nn.Parameter, Tensor] = {}  # of parameters with hooks, before they were rounded for DDP
        self._hooked: list[nn.Parameter] = []
        self._hooks_made = -1
        for param in self._params:
            param.grad = None
            param.grad_dtype = None  # of the parameter's dtype while backward runs, FP32 between
        self._handles: dict[nn.Parameter, list[RemovableHandle]] = {
            param: [param.register_post_accumulate_grad_hook(self._take)]  # type: ignore[no-untyped-call]
            for param in self._params
        }
        ddp.register_comm_hook(None, self._reduce)

    def begin_backward(self) -> None:
        """Set aside what earlier backwards left in ``param.grad``: DDP must find 16-bit gradients only."""
        self._arrived.clear()
        self._exact.clear()
        if self._hooks_made != hooks_made():
            self._find_hooked()
        for param in self._params:
            if param.grad is not None:
                self._accumulated[param] = param.grad.to(torch.float32)
                param.grad = None
            # A parameter that was multiplied with FP32 activations has an FP32 gradient unless told so.
            param.grad_dtype = param.dtype
        for param in self._hooked:
            param.grad_dtype = torch.float32

    def finish_backward(self) -> None:
        """Put the reduced gradients, or without a reduction the accumulated ones, into ``param.grad``."""
        for param in self._params:
            param.grad_dtype = None
        results = {**self._accumulated, **self._reduced}
        for param, grad in results.items():
            param.grad = grad
        self._accumulated.clear()
        self._reduced.clear()
        self._arrived.clear()

    def remove(self) -> None:
        """Leave gradients to DDP again. The communication hook stays, as DDP cannot forget one."""
        self._is_active = False
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles = {}

    def _find_hooked(self) -> None:
        """Find the parameters with hooks of others, which are to see what was accumulated, and to be heard by DDP."""
        self._hooked = [param for param in self._params if has_hooks(param, besides=self._handles[param])]
        for param in self._hooked:
            self._handles[param] = enclose_hooks(param, self._handles[param], first=self._add_earlier, last=self._take)
        self._hooks_made = hooks_made()

    def _add_earlier(self, param: nn.Parameter) -> None:
        if param in self._accumulated and param.grad is not None:
            param.grad = self._accumulated.pop(param).add_(param.grad)

    def _take(self, param: nn.Parameter) -> None:
        self._arrived.add(param)
        grad = param.grad
        if grad is None:
            return
        if self.ddp.require_backward_grad_sync:
            # On a reducing backward the gradient is DDP's; taking it here would make ranks diverge.
            if grad.dtype is not param.dtype:
                self._exact[param] = grad.to(torch.float32)
                param.grad_dtype = None
                param.grad = grad.to(param.dtype)
            return
        grad = grad.to(torch.float32)
        if param in self._accumulated:
            grad = self._accumulated[param].add_(grad)
        self._accumulated[param] = grad
        param.grad = None

    def _reduce(
        self,
        _: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]  # DDP insists on this annotation
    ) -> torch.futures.Future[Tensor]:
        """Reduce one bucket: the hook that DDP calls when the gradients of a bucket are there."""
        if bucket.buffer().dtype is torch.float32 or not self._is_active:
            return self._reduce_plain(bucket)
        params = bucket.parameters()
        if bucket.buffer().is_sparse:
            return self._reduce_sparse(bucket, params[0])
        flat, views = self._upcast(bucket, params)
        flat.div_(self.ddp.process_group.size())
        sent = flat
        if self.ddp.find_unused_parameters:
            # One number per parameter: how many ranks have a gradient. With none it stays None, as in FP32.
            present = [param in self._arrived or param in self._accumulated for param in params]
            sent = torch.cat([flat, _sent_to(flat.device, present)])
        sent = sent.to(self._reduce_dtype)
        for param in params:
            self._accumulated.pop(param, None)

        def keep(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            received = future.value()[0]
            if received.data_ptr() != flat.data_ptr():  # FP32 was reduced in place
                flat.copy_(received[: flat.numel()])
            found = received[flat.numel() :].tolist() if self.ddp.find_unused_parameters else [1.0] * len(params)
            for param, view, count in zip(params, views, found, strict=True):
                self._reduced[param] = view if count else None
            buffer: Tensor = bucket.buffer()
            return buffer

        return self._all_reduce(sent).then(keep)

    def _reduce_sparse(self, bucket: Any, param: nn.Parameter) -> torch.futures.Future[Tensor]:
        """Reduce a sparse gradient, which is a bucket of its own and has the indices of one batch."""
        buffer: Tensor = bucket.buffer()
        grad = self._exact.pop(param, buffer).to(torch.float32, copy=True)
        if param in self._accumulated:
            grad = grad + self._accumulated.pop(param)

        def keep(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            self._reduced[param] = future.value()[0].to(torch.float32)
            return buffer

        # Rows that occur more than once add up here, before anything is rounded to the reduce dtype.
        sent = grad.coalesce().div_(self.ddp.process_group.size()).to(self._reduce_dtype)
        return self._all_reduce(sent).then(keep)

    def _all_reduce(self, tensor: Tensor) -> "torch.futures.Future[list[Tensor]]":
        work = dist.all_reduce(tensor, group=self.ddp.process_group, async_op=True)
        future: torch.futures.Future[list[Tensor]] = work.get_future()
        return future

    def _upcast(self, bucket: Any, params: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
        """Return the bucket in FP32 with the accumulated gradients added, and a view per parameter."""
        flat = bucket.buffer().to(torch.float32)
        views = []
        start = 0
        for param in params:
            # DDP stores each gradient with its parameter's strides.
            view = flat.as_strided(param.shape, param.stride(), start)
            start += param.numel()
            if param in self._exact:
                view.copy_(self._exact.pop(param))
            if param in self._accumulated:
                view.add_(self._accumulated[param])
            views.append(view)
        return flat, views

    def _reduce_plain(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Average a bucket of FP32 parameters as DDP does, in the dtype that was asked for."""
        buffer: Tensor = bucket.buffer()
        summed = buffer.coalesce() if buffer.is_sparse else buffer
        sent = summed.to(self._reduce_dtype if self._is_active else buffer.dtype).div_(self.ddp.process_group.size())

        def keep(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            return buffer if future.value()[0] is buffer else buffer.copy_(future.value()[0])

        return self._all_reduce(sent).then(keep)


def _sent_to(device: torch.device, present: list[bool]) -> Tensor:
    """Return ones and zeros on the device, which the host does not wait for."""
    host = torch.tensor(present, dtype=torch.float32)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _check_ddp(ddp: DistributedDataParallel, *, accumulates: bool) -> None:
    if ddp._comm_hooks:
        raise UnsupportedError(
            "master_weights: DDP has a communication hook already, and it takes a single one; masters need it to "
            "reduce gradients in FP32. Remove ddp_comm_hook, or use master_weights='params'. To halve the traffic, "
            "use reduce_dtype='bf16'."
        )
    if ddp.static_graph and accumulates:
        raise UnsupportedError(
            "master_weights: DDP with static_graph=True cannot accumulate gradients over several backwards "
            "(torch itself fails there). Use static_graph=False or accumulate_grad_batches=1."
        )
