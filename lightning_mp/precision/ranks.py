"""What several ranks change: shards, and the dtype in which gradients travel."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["any_rank_", "compress_reduction", "is_sharded"]


def is_sharded(model: nn.Module, optimizers: list[Optimizer]) -> bool:
    """Tell whether ranks hold different shards: FSDP, or parameters that are DTensors."""
    if type(model).__name__ == "FullyShardedDataParallel":
        return True
    return any(hasattr(p, "to_local") for o in optimizers for group in o.param_groups for p in group["params"])


def any_rank_(flag: Tensor) -> Tensor:
    """Make ``flag``, a tensor of zeros and ones, the same on all ranks, in place: one where any rank has one."""
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag


def compress_reduction(model: nn.parallel.DistributedDataParallel, dtype: torch.dtype) -> None:
    """Let DDP reduce gradients in ``dtype``, BF16 or FP16, with any backend: torch's own hooks refuse BF16 on gloo."""
    group = model.process_group

    def reduce_bucket(
        state: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]  # DDP insists on this annotation
    ) -> torch.futures.Future[Tensor]:
        buffer: Tensor = bucket.buffer()
        # A sparse gradient has a row as often as it was looked up: they add up in FP32.
        summed = buffer.coalesce() if buffer.is_sparse else buffer
        # Divided in FP32 and before the sum, so that the sum over many ranks stays in range.
        sent = (summed / group.size()).to(dtype)
        future = dist.all_reduce(sent, group=group, async_op=True).get_future()
        return future.then(lambda done: buffer.copy_(done.value()[0]))  # type: ignore[no-any-return]

    model.register_comm_hook(None, reduce_bucket)
