"""What a rank that Lightning's ``ddp_spawn`` starts needs at its end."""

import atexit

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["EndsItsProcessGroup"]


class EndsItsProcessGroup(Callback):
    """Destroy the process group of a rank before its interpreter ends.

    Lightning leaves it to the interpreter, whose end now and then finds a thread of gloo still running:
    "terminate called without an active exception", after all work was done.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        atexit.register(_destroy)


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
