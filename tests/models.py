"""Small models and data that the integration tests train."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

INF = float("inf")


def batches(num: int = 8, batch_size: int = 4, features: int = 4) -> DataLoader[Any]:
    """Return a fixed regression problem, always in the same order."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num * batch_size, features, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size)


def batches_without(bad: Iterable[int], num: int = 8) -> DataLoader[Any]:
    """Return ``batches(num)`` with the batches at the indices ``bad`` left out."""
    kept = [batch for index, batch in enumerate(batches(num)) if index not in set(bad)]
    x, y = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=len(kept[0][0]))


class Regression(LightningModule):
    """A linear model whose loss is multiplied by a factor in chosen batches.

    Args:
        factors: Batch index to factor on the loss; ``inf`` makes the gradients non-finite.
        optimizer: Class of the optimizer.
        scheduler: Builds a step-interval scheduler for the optimizer; ``None`` for no scheduler.
        none_at: Batches in which ``training_step`` returns None.
        settings: Arguments of the optimizer.
    """

    def __init__(
        self,
        *,
        factors: dict[int, float] | None = None,
        optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
        scheduler: Any = None,
        none_at: Iterable[int] = (),
        frequency: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.factors = factors or {}
        self.none_at = set(none_at)
        self.optimizer_class = optimizer
        self.scheduler = scheduler
        self.frequency = frequency
        self.settings = {"lr": 1e-2, **settings}
        self.seen_batches = 0

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layer(x).float(), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        index, self.seen_batches = self.seen_batches, self.seen_batches + 1
        if index in self.none_at:
            return None
        return self.loss(batch) * self.factors.get(index, 1.0)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_class(self.parameters(), **self.settings)
        if self.scheduler is None:
            return optimizer
        config = {"scheduler": self.scheduler(optimizer), "interval": "step", "frequency": self.frequency}
        return [optimizer], [config]


class Fetching(Regression):
    """Fetches its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Tensor | None:  # type: ignore[override]
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


def trainer(plugin: Any = None, **settings: Any) -> Trainer:
    """Return a quiet Trainer on the CPU."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(plugins=[] if plugin is None else [plugin], **{**defaults, **settings})


def weights(module: nn.Module) -> list[Tensor]:
    """Return copies of all parameters."""
    return [p.detach().clone() for p in module.parameters()]
