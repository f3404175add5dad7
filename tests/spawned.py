"""What tests that start ranks share: a port to meet at, and a clean end."""

import atexit
import socket

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["EndsItsProcessGroup", "free_port"]


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
