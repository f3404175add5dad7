"""Find the layer that overflows in FP16.

A tiny residual network trains in FP16 with ``OverflowMonitor``. In one batch a feature arrives in the
wrong unit, a thousand times too large: finite, and still finite after the first layer, but the second
layer of block 1 goes above 65504, the largest FP16 number. The loss is NaN by then, and nothing in it
tells where that began. The monitor replays the batch and names the layer, with the magnitudes that
explain it; a second run stops at the culprit, and the saved batch is replayed by hand.

    python examples/find_overflow.py

Takes a few seconds on a CPU; needs no data and writes into a temporary directory.
"""

import logging
import tempfile
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mp import MixedPrecision, OverflowFoundError, OverflowMonitor

WIDTH = 8
BAD_BATCH = 3
CULPRIT = "blocks.1.second"


class Block(nn.Module):
    """Two linear layers around a ReLU, added to their input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


class Model(LightningModule):
    """Residual blocks and a head that learn the sum of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, 1)
        with torch.no_grad():
            # A layer with large weights, as a bad initialization or a long run leaves it.
            self.blocks[1].second.weight.fill_(40.0)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        prediction = self.head(self.dropout(self.blocks(batch["features"])))
        return nn.functional.l1_loss(prediction.float(), batch["target"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def make_loader() -> DataLoader[dict[str, Tensor]]:
    """Return eight batches, one of them with features in the wrong unit."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for index in range(8):
        features = torch.randn(4, WIDTH, generator=generator)
        target = features.sum(1, keepdim=True)
        batches.append({"features": features * 1000 if index == BAD_BATCH else features, "target": target})
    return DataLoader(batches, batch_size=None)


def train(model: Model, monitor: OverflowMonitor) -> None:
    """Train one epoch in FP16 under the monitor."""
    trainer = Trainer(
        plugins=[MixedPrecision("fp16", loss_scale=128)],
        callbacks=[monitor],
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, make_loader())


def replay_by_hand(model: Model, path: Path) -> None:
    """Compute a saved batch outside training, with the dropout it had there, and look at each layer."""
    saved = torch.load(path, weights_only=True)
    found = []
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, __, output, name=name: None if output.isfinite().all() else found.append(name)
        )
    torch.set_rng_state(saved["rng"]["cpu"])
    with torch.autocast("cpu", torch.float16):
        loss = model.training_step(saved["batch"], saved["batch_idx"])
    print(f"by hand: loss {loss.item()}, first non-finite output in {found[0]}")
    assert found[0] == CULPRIT


def main() -> None:
    """Find the culprit by a warning, by an error, and by hand."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # The data is in memory, and Lightning 2.6 tests tree specs in a way that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")

    seed_everything(1, verbose=False)
    monitor = OverflowMonitor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(Model(), monitor)
    print(*(str(w.message) for w in caught if "OverflowMonitor" in str(w.message)), sep="\n")
    (event,) = monitor.events
    print(event)
    assert (event.step, event.phase, event.fqn, event.kind) == (BAD_BATCH, "forward", CULPRIT, "inf")

    with tempfile.TemporaryDirectory() as folder:
        stopper = OverflowMonitor(on_overflow="raise", save_batch=True, dirpath=folder)
        model = Model()
        try:
            train(model, stopper)
        except OverflowFoundError as error:
            print(f"stopped: {error}")
        assert [each.fqn for each in stopper.events] == [CULPRIT]
        # The run stopped before an update, so that the model still has the weights of that step.
        replay_by_hand(model, Path(folder) / f"overflow-step{BAD_BATCH}-rank0.pt")
    print(f"checked: the culprit is {CULPRIT}")


if __name__ == "__main__":
    main()
