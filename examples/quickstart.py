"""Train a small byte-level GPT on real English text, in FP32 and in mixed precision, and compare.

Shows that ``Trainer(plugins=[MixedPrecision(...)])`` is all it takes, that BF16 and FP16 reach the loss
of FP32, what the plugin counted on the way (steps applied and skipped, the loss scale), and the callbacks that keep
softmax, norms and the loss in FP32, watch for overflow and write a report page per run.

Run it with ``make demo``, or::

    python examples/quickstart.py                         # FP32 and BF16, and FP16 on a GPU
    python examples/quickstart.py --precision bf16        # one run
    python examples/quickstart.py --precision fp8 --recipe delayed    # emulated where there is no GPU
    python examples/quickstart.py --precision fp16 --steps 3 --batch-size 2 --width 32 --depth 1 --context 32

Needs no download: the text is the standard library's ``pydoc_data.topics``, 465 kB. The default run takes
about three minutes on two CPU cores and uses a GPU where there is one. FP16 on a CPU is hundreds of times
slower than FP32, so the last line above keeps it small.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_mp import (
    FP8Monitor,
    FP32Pin,
    GradientRangeMonitor,
    LossScaleMonitor,
    MixedPrecision,
    OverflowMonitor,
    PrecisionReport,
)

VOCABULARY = 256  # every byte is a token
STEPS = 500
LEARNING_RATE = 1e-3
WARMUP_STEPS = 20
ROTARY_BASE = 1000.0  # 10000 in the paper, for contexts longer than this one
# Nats per byte by which the validation loss in BF16 or FP16 may differ from FP32's after the same batches. Over seeds
# 1 to 3 BF16 lies within 0.0006 of FP32, and FP8 within 0.012; the seeds lie 0.02 apart. Training itself gains 4 nats.
LOSS_TOLERANCE = 0.02


class Attention(nn.Module):
    """Causal self-attention with several heads and rotary positions (Su et al., arXiv:2104.09864)."""

    rotation: Tensor

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        pairs = torch.arange(width // heads // 2) / (width // heads // 2)
        angles = torch.arange(context)[:, None] / ROTARY_BASE**pairs
        self.register_buffer("rotation", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return y

    def rotate(self, x: Tensor) -> Tensor:
        """Turn each pair of features by an angle that grows with the position; same shape and dtype."""
        cos, sin = self.rotation[:, : x.shape[-2]].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a norm and a residual connection."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, context)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.ffn(self.ffn_norm(x))
        return y


class ByteGPT(LightningModule):
    """A GPT over bytes whose output head shares the embedding's weight."""

    def __init__(self, *, width: int, depth: int, heads: int, context: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.context = context
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width, heads, context) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.embedding(tokens)))
        return F.linear(x, self.embedding.weight)

    def loss(self, batch: Tensor) -> Tensor:
        """Return the cross-entropy of each next byte in nats, a scalar."""
        logits = self(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def learning_rate_factor(self, step: int) -> float:
        """Return the share of the learning rate at ``step``: a linear warm-up, then half a cosine."""
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))

    @torch.no_grad()
    def generate(self, prompt: bytes, num_bytes: int, *, temperature: float = 0.7) -> bytes:
        """Return ``prompt`` continued by ``num_bytes`` sampled bytes."""
        tokens = torch.tensor([list(prompt)], device=self.device)
        for _ in range(num_bytes):
            logits = self(tokens[:, -self.context :])[0, -1]
            drawn = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            tokens = torch.cat([tokens, drawn[None]], dim=1)
        return bytes(tokens[0].tolist())


class Windows(Dataset[Tensor]):
    """Stretches of ``context + 1`` bytes of a text, one per start."""

    def __init__(self, text: bytes, starts: Tensor, context: int) -> None:
        self.tokens = torch.tensor(list(text))
        self.starts = starts
        self.context = context

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.starts[index])
        return self.tokens[start : start + self.context + 1]


class StateMemory(Callback):
    """Records the peak bytes of parameters, gradients and optimizer state, counted between steps."""

    peak_bytes = 0

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        live = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self._tensors(trainer)}
        self.peak_bytes = max(self.peak_bytes, sum(storage.nbytes() for storage in live.values()))

    def _tensors(self, trainer: Trainer) -> Iterator[Tensor]:
        for parameter in trainer.lightning_module.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        for optimizer in trainer.optimizers:
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


@dataclass(frozen=True)
class Result:
    """What one training run reached and counted."""

    precision: str
    untrained_loss: float
    val_loss: float
    applied_steps: int
    skipped_steps: int
    loss_scale: float | None
    state_bytes: int
    cuda_peak_bytes: int | None
    seconds: float
    sample: str
    report: Path | None

    def cells(self) -> dict[str, str]:
        """Return what the table shows of this run, by column."""
        cells = {
            "precision": self.precision,
            "nats/byte": f"{self.val_loss:.4f}",
            "applied": str(self.applied_steps),
            "skipped": str(self.skipped_steps),
            "loss scale": "none" if self.loss_scale is None else f"{self.loss_scale:g}",
            "states MiB": f"{self.state_bytes / 2**20:.1f}",
        }
        if self.cuda_peak_bytes is not None:
            cells["CUDA peak MiB"] = f"{self.cuda_peak_bytes / 2**20:.1f}"
        return {**cells, "seconds": f"{self.seconds:.1f}"}


def load_text() -> tuple[bytes, bytes]:
    """Return the training text and, its last tenth, the validation text."""
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    split = len(text) * 9 // 10
    return text[:split], text[split:]


def unigram_entropy(text: bytes) -> float:
    """Return the nats per byte of a model that knows only how often each byte occurs in ``text``."""
    counts = Counter(text)
    return -sum(count / len(text) * math.log(count / len(text)) for count in counts.values())


def make_loaders(args: argparse.Namespace) -> tuple[DataLoader[Tensor], DataLoader[Tensor]]:
    """Return the training batches, the same for every precision, and the validation batches."""
    train, val = load_text()
    generator = torch.Generator().manual_seed(args.seed)
    last_start = len(train) - args.context - 1
    train_starts = torch.randint(last_start, (args.steps * args.batch_size * args.devices,), generator=generator)
    val_starts = torch.arange(0, len(val) - args.context - 1, args.context)[: args.val_windows]
    return (
        DataLoader(Windows(train, train_starts, args.context), batch_size=args.batch_size),
        DataLoader(Windows(val, val_starts, args.context), batch_size=args.batch_size),
    )


def fp8_settings(args: argparse.Namespace) -> dict[str, str]:
    """Return the FP8 settings: Transformer Engine on a GPU, the same numbers emulated elsewhere."""
    on_cuda = args.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    return {"recipe": args.recipe, "backend": "transformer_engine" if on_cuda else "emulated"}


def train(precision: str, args: argparse.Namespace) -> Result:
    """Train one model in ``precision`` and measure it; the seed fixes weights and batches."""
    seed_everything(args.seed, verbose=False)
    train_loader, val_loader = make_loaders(args)
    model = ByteGPT(width=args.width, depth=args.depth, heads=args.heads, context=args.context, steps=args.steps)
    plugin = MixedPrecision(precision, fp8=fp8_settings(args) if precision == "fp8" else None)
    memory, report = StateMemory(), PrecisionReport()
    monitors = [OverflowMonitor(), LossScaleMonitor(), GradientRangeMonitor()]
    if precision == "fp8":
        monitors.append(FP8Monitor())
    trainer = Trainer(
        plugins=[plugin],
        accelerator=args.accelerator,
        devices=args.devices,
        max_epochs=1,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        logger=CSVLogger(args.out, name=f"quickstart-{precision}"),
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[FP32Pin(), *monitors, memory, report],
    )
    untrained = trainer.validate(model, val_loader, verbose=False)[0]["val_loss"]
    on_cuda = trainer.strategy.root_device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    trainer.fit(model, train_loader, val_loader)
    return Result(
        precision=plugin.policy.precision if precision == "auto" else precision,
        untrained_loss=untrained,
        val_loss=float(trainer.callback_metrics["val_loss"]),
        applied_steps=plugin.applied_steps,
        skipped_steps=plugin.skipped_steps,
        loss_scale=plugin.scaler.get_scale() if plugin.scaler is not None else None,
        state_bytes=memory.peak_bytes,
        cuda_peak_bytes=torch.cuda.max_memory_allocated() if on_cuda else None,
        seconds=time.perf_counter() - start,
        sample=model.generate(b"The ", args.sample_bytes).decode(errors="replace"),
        report=report.path,
    )


def print_table(results: Sequence[Result]) -> None:
    """Print one row per run, with rich where it is installed."""
    title = "Validation loss by precision (states: peak of parameters, gradients and optimizer state)"
    rows = [list(result.cells().values()) for result in results]
    columns = list(results[0].cells())
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = ["  ".join(map(str.rjust, row, widths)) for row in [columns, *rows]]
        print(title, *lines, sep="\n")
        return
    print(title)
    table = Table()
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)


def check(results: Sequence[Result], steps: int) -> None:
    """Assert what the example promises; how far the loss fell only for a run of full length."""
    unigram = unigram_entropy(load_text()[0])
    for result in results:
        assert result.applied_steps + result.skipped_steps == steps, result
        difference = abs(result.val_loss - results[0].val_loss)
        assert difference <= LOSS_TOLERANCE, f"{result.precision}: {difference:.3f} from {results[0].precision}"
        if steps >= STEPS:
            # At least one nat below byte frequencies: the model has learned words, not letters.
            assert result.val_loss < unigram - 1.0 < result.untrained_loss, result
    print(f"checked: every step was applied or skipped, and losses agree within {LOSS_TOLERANCE} nats per byte")
    if steps >= STEPS:
        print(f"checked: they are more than 1 nat below the entropy of single bytes, {unigram:.2f}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16", "fp8", "auto"], help="one (default: compare)")
    parser.add_argument(
        "--recipe", default="current", choices=["current", "delayed", "block"], help="for --precision fp8"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=128, help="bytes the model sees")
    parser.add_argument("--val-windows", type=int, default=None, help="validate on the first N windows only")
    parser.add_argument("--sample-bytes", type=int, default=120, help="length of the generated text")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of logs and report pages")
    return parser.parse_args(argv)


def quiet_lightning() -> None:
    """Leave of Lightning's messages those that come from lightning_mp."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: record.getMessage().startswith("lightning_mp"))
    # The data is in memory, runs may be short, and Lightning 2.6 tests tree specs in a way that torch 2.13 deprecates.
    for message in (".*does not have many workers.*", ".*smaller than the logging interval.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message)


@rank_zero_only
def show(results: Sequence[Result], steps: int) -> None:
    """Print the table, a sample of each model and the report pages, and check the promises."""
    print_table(results)
    for result in results:
        print(f"{result.precision} writes: {result.sample!r}")
    check(results, steps)
    for result in results:
        print(f"report of the {result.precision} run: {result.report}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one precision or the comparison, print the table and check it."""
    args = parse_args(argv)
    quiet_lightning()
    has_cuda = torch.cuda.is_available() and args.accelerator in ("auto", "cuda", "gpu")
    precisions = [args.precision] if args.precision else ["fp32", "bf16", *(["fp16"] if has_cuda else [])]
    results = [train(precision, args) for precision in precisions]
    show(results, args.steps)


if __name__ == "__main__":
    main()
