"""Compare the validation loss of FP8 with that of BF16 and FP32 after the same training, over several seeds.

Trains the model of ``examples/quickstart.py`` at its default size: real text, 500 steps, the same batches and initial
weights for each precision of a seed. FP8 runs on Transformer Engine on a GPU that has it, emulated elsewhere.

Run: ``python -m benchmarks.fp8_quality [--seeds 1 2 3] [--steps 500] [--recipes current delayed block] [--out FILE]``.
Takes about 25 minutes on two cores. Writes ``benchmarks/results/fp8-quality-<device>.json`` unless ``--out`` names
another file, and ends with exit code 1 if a recipe's mean loss is more than 1% away from BF16's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import lightning_mp

ROOT = Path(__file__).parents[1]
MAX_DIFFERENCE = 0.01


def load_quickstart() -> ModuleType:
    """Import the example, which is no package."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "examples" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module
    spec.loader.exec_module(module)
    return module


def train(quickstart: ModuleType, name: str, seed: int, steps: int, folder: str) -> float:
    """Return the validation loss in nats per byte after training in ``name``, a precision or an FP8 recipe."""
    precision = name if name in ("fp32", "bf16") else "fp8"
    argv = ["--precision", precision, "--seed", str(seed), "--steps", str(steps), "--out", folder]
    if precision == "fp8":
        argv += ["--recipe", name]
    return float(quickstart.train(precision, quickstart.parse_args(argv)).val_loss)


def summarize(losses: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return per run its losses, their mean, and the difference of the means from BF16's as a share."""
    reference = statistics.mean(losses["bf16"])
    return {
        name: {"losses": found, "mean": statistics.mean(found), "difference": statistics.mean(found) / reference - 1}
        for name, found in losses.items()
    }


def print_table(summary: dict[str, dict[str, Any]], seeds: Sequence[int]) -> None:
    print(f"{'validation loss, nats/byte':28}", *(f"seed {seed:>3}" for seed in seeds), "    mean  against bf16")
    for name, row in summary.items():
        print(
            f"{name:28}", *(f"{loss:8.4f}" for loss in row["losses"]), f"{row['mean']:8.4f}  {row['difference']:+.2%}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--recipes", nargs="+", default=["current", "delayed", "block"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    quickstart = load_quickstart()
    quickstart.quiet_lightning()
    names = ["fp32", "bf16", *args.recipes]
    with tempfile.TemporaryDirectory() as folder:
        losses = {name: [train(quickstart, name, seed, args.steps, folder) for seed in args.seeds] for name in names}
    summary = summarize(losses)
    print_table(summary, args.seeds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {"torch": torch.__version__, "lightning_mp": lightning_mp.__version__}
    now = datetime.now(timezone.utc).date().isoformat()
    backend = "transformer_engine" if device == "cuda" else "emulated"
    record = {"date": now, "device": device, "backend": backend, "versions": versions, "steps": args.steps}
    path = args.out or ROOT / "benchmarks" / "results" / f"fp8-quality-{device}.json"
    path.write_text(json.dumps({**record, "seeds": args.seeds, "runs": summary}, indent=2) + "\n")
    print(f"written: {path}")
    missed = [name for name in args.recipes if abs(summary[name]["difference"]) > MAX_DIFFERENCE]
    print(f"within {MAX_DIFFERENCE:.0%} of bf16: " + ("every recipe" if not missed else f"not {', '.join(missed)}"))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
