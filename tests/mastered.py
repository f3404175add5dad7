"""The model and the fits that the integration tests of master weights share."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_mp import MixedPrecision
from tests.models import batches, trainer

MASTERS = ["copy", "split"]
# A slow learning rate: most updates are below half a BF16 ulp of the weights.
LR = 1e-4


class Net(LightningModule):
    """A backbone with a norm, a tied pair, a frozen layer and a buffer; FP32 in every place that matters."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16))
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.tied = nn.Linear(16, 16, bias=False)
        self.again = nn.Linear(16, 16, bias=False)
        self.again.weight = self.tied.weight
        self.head = nn.Linear(16, 1)
        self.register_buffer("table", torch.randn(3))
        self.optimizer_class = optimizer
        self.settings = {"lr": LR, **settings}
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        h = self.frozen(self.backbone(x))
        return self.head(self.again(torch.relu(self.tied(h))))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]).float(), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.dtypes = {param.dtype for param in self.parameters()}
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        params = [param for param in self.parameters() if param.requires_grad]
        optimizer = self.optimizer_class(params, **self.settings)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9), "interval": "step"}]


def plugin(mode: str, precision: str = "bf16", **settings: Any) -> MixedPrecision:
    return MixedPrecision(precision, master_weights=mode, **settings)


def fit(mode: str, model: LightningModule | None = None, **settings: Any) -> tuple[LightningModule, Trainer]:
    model = Net() if model is None else model
    run = trainer(plugin(mode), **{"max_epochs": 2, **settings})
    run.fit(model, batches())
    return model, run


class Save(Callback):
    """Write a full checkpoint before the module is given back."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    for (name, left), right in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert left.dtype is right.dtype is torch.float32, name
        assert torch.equal(left.view(torch.int32), right.view(torch.int32)), name
