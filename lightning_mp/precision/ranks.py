"""What several ranks change: shards, and the dtype in which gradients travel."""

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["compress_reduction", "is_sharded"]


def is_sharded(model: nn.Module, optimizers: list[Optimizer]) -> bool:
    """Tell whether ranks hold different shards: FSDP, or parameters that are DTensors."""
    if type(model).__name__ == "FullyShardedDataParallel":
        return True
    return any(hasattr(p, "to_local") for o in optimizers for group in o.param_groups for p in group["params"])


def compress_reduction(model: nn.parallel.DistributedDataParallel, dtype: torch.dtype) -> None:
    """Let DDP reduce gradients in ``dtype``, BF16 or FP16."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    hook = default_hooks.bf16_compress_hook if dtype is torch.bfloat16 else default_hooks.fp16_compress_hook
    model.register_comm_hook(None, hook)
