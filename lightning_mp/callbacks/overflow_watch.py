"""What the overflow monitor needs around a step: reports for a foreign scaler, the loss again, a saved batch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_mp.callbacks.batch_window import HeldBatch
from lightning_mp.grad_scaler import Readback
from lightning_mp.precision import StepReport
from lightning_mp.precision.notices import notice_once

__all__ = ["ScalerWatch", "parameters_of", "reason_against_replay", "save_batch", "shards_parameters", "training_loss"]


@dataclass
class _OpenStep:
    step: int
    before: Any


class ScalerWatch:
    """Makes step reports for the ``torch.amp.GradScaler`` of a plugin that makes none.

    Its scale falls if and only if gradients were non-finite. Both scales travel to the host behind the
    step and are read one step later.

    Args:
        scaler: The plugin's scaler.
        listener: What a ``MixedPrecision`` would call.
    """

    def __init__(self, scaler: Any, listener: Callable[[StepReport], Any]) -> None:
        self._scaler = scaler
        self._listener = listener
        self._open: _OpenStep | None = None
        self._pending: tuple[int, Readback] | None = None

    def before_step(self, step: int) -> None:
        """Settle the previous step and note the scale before this one."""
        self.settle()
        scale = self._scaler._scale
        if scale is not None:
            self._open = _OpenStep(step, scale.detach().clone())

    def after_step(self) -> None:
        """Ask for the scale after the step, without waiting for it."""
        if self._open is not None:
            opened, self._open = self._open, None
            self._pending = (opened.step, Readback([opened.before.float(), self._scaler._scale.detach().float()]))

    def settle(self) -> None:
        """Report the step that is pending, if any."""
        self.after_step()
        if self._pending is None:
            return
        (step, readback), self._pending = self._pending, None
        before, after = readback.wait()
        # GradScaler has no floor: at zero every gradient is 0/0, and the scale cannot fall further.
        found_inf = after < before or before == 0
        self._listener(StepReport(step, before, found_inf, found_inf))


def parameters_of(optimizer: Optimizer) -> Iterator[Parameter]:
    """Return the parameters that the optimizer steps."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def shards_parameters(trainer: Trainer) -> bool:
    """Tell whether each rank holds a part of the parameters, whose gradients exist inside the strategy only."""
    return isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy)


def reason_against_replay(trainer: Trainer, model: LightningModule) -> str | None:
    """Tell why a batch of this run cannot be replayed; ``None`` if it can."""
    if not model.automatic_optimization:
        return "manual optimization runs its own backwards and steps"
    if is_param_in_hook_signature(model.training_step, "dataloader_iter", explicit=True):
        return "a training_step that takes dataloader_iter fetches its batches itself"
    if shards_parameters(trainer):
        return f"{type(trainer.strategy).__name__} shards the parameters, and their gradients exist inside it only"
    return None


def training_loss(trainer: Trainer, model: LightningModule, batch_idx: int, batch: Any) -> Tensor | None:
    """Compute the loss of a batch as the loop hands it to backward, before scaling."""
    takes_index = is_param_in_hook_signature(model.training_step, "batch_idx", min_args=2)
    output: Any = model.training_step(*((batch, batch_idx) if takes_index else (batch,)))
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return None if loss is None else loss / trainer.accumulate_grad_batches


def save_batch(directory: Path, held: HeldBatch, report: StepReport, rank: int) -> None:
    """Write what a replay outside training needs; say once if it cannot be written."""
    path = directory / f"overflow-step{report.step}-rank{rank}.pt"
    content = {
        "batch": held.batch,
        "batch_idx": held.batch_idx,
        "step": report.step,
        "rng": {"cpu": held.rng.cpu, "cuda": held.rng.cuda},
        "loss_scale": report.loss_scale,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    # A batch that cannot be pickled or a full disk is no reason to end a run.
    except Exception as error:
        notice_once(f"OverflowMonitor: save_batch=True, but {path.name} was not written: {error}")
