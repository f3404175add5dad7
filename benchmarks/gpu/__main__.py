"""Measure all contenders on one GPU, print the tables and write the figures as JSON.

Run: ``python -m benchmarks.gpu [--models NAME ...] [--contenders core|all|NAME ...] [--batches full one]
[--only ceilings widths optimizer models] [--layers N] [--time-limit S] [--out FILE] [--rehearse]``.

An existing ``--out`` of the same device is continued: what it holds stays, what is measured again is replaced, and each
part names its commit. ``python -m benchmarks.page`` makes BENCHMARKS.md and its plots of the file.

``--rehearse`` runs the same code on a CPU with tiny models and emulated FP8; its figures mean nothing and its file is
marked so.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import subprocess
import time
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import optimizer_stage
from benchmarks.gpu.contenders import CONTENDERS, REFERENCE, Contender
from benchmarks.gpu.measure import Plan, measure_model
from benchmarks.gpu.micro import ceilings, linear_widths
from benchmarks.gpu.models import MODELS, shrunk
from benchmarks.gpu.tables import all_tables
from benchmarks.gpu.timing import free_memory

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("ceilings", "widths", "optimizer", "models")
PACKAGES = ("torch", "lightning", "pytorch-lightning", "torchmetrics", "transformer-engine", "torchao", "triton",
            "lightning-mp")  # fmt: skip
REHEARSED_WIDTHS = (32, 64)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[spec.name for spec in MODELS])
    parser.add_argument("--contenders", nargs="+", default=["all"], help="'all', 'core', or names")
    parser.add_argument("--batches", nargs="+", default=["full", "one"], choices=("full", "one"))
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--layers", type=int, default=0, help="blocks of llama-8b-blocks; 0: as many as fit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a turn")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds; what is left is listed so")
    parser.add_argument("--commit", help="where the tree came without its repository")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    return parser.parse_args(argv)


def choose_contenders(names: Sequence[str]) -> list[Contender]:
    """Return the contenders that were asked for, and the one that all are compared with."""
    known = {contender.name for contender in CONTENDERS}
    unknown = [name for name in names if name not in known | {"all", "core"}]
    if unknown:
        raise SystemExit(f"--contenders: {unknown} are not known. Known: all, core, {', '.join(sorted(known))}")
    wanted = {REFERENCE, *names}
    return [c for c in CONTENDERS if "all" in names or c.name in wanted or ("core" in names and c.core)]


def describe(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return device, versions, commit and settings."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    settings = {key: getattr(args, key) for key in ("rounds", "steps", "warmup", "layers")}
    found: dict[str, Any] = {
        "kind": "rehearsal" if args.rehearse else "measured",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "commit": args.commit or commit(),
        "versions": versions,
        "settings": settings,
    }
    if device.type == "cuda":
        found["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
        found["versions"]["cuda"] = torch.version.cuda
    return found


def commit() -> str:
    """Return the commit, with a mark where files differ from it."""
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")


def git(*command: str) -> str:
    """Return what git says; empty where the tree came without its repository."""
    try:
        return subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def merge(report: dict[str, Any], path: Path) -> dict[str, Any]:
    """Continue the file at ``path`` if it is of the same kind and device."""
    if not path.exists():
        return report
    before = json.loads(path.read_text())
    if (before.get("kind"), before.get("device")) != (report["kind"], report["device"]):
        raise SystemExit(f"--out {path} holds figures of another kind or device. Name another file.")
    return {**before, **report}


def put_model(report: dict[str, Any], entry: dict[str, Any]) -> None:
    """Add a model's entry, in place of an earlier one of the same name and batch unless it has no figure."""
    entry["commit"] = report["commit"]
    key = (entry["name"], entry["label"])
    models = report.get("models", [])
    is_empty = not any(row["status"] == "measured" for row in entry["contenders"])
    if is_empty and any((m["name"], m["label"]) == key for m in models):
        return
    report["models"] = [m for m in models if (m["name"], m["label"]) != key] + [entry]


def measure_optimizer(device: torch.device, num_params: float) -> dict[str, Any]:
    """Time the optimizer stage: look for non-finite gradients, clip, update, write the weights back."""
    found: dict[str, Any] = {"params": num_params, "sides": {}, "paths": {}}
    for kind, fused in (("fused", True), ("not fused", False)):
        free_memory(device)
        paths: dict[str, str] = {}
        times = optimizer_stage.run(device.type, num_params, 20, fused=fused, paths=paths)
        found["paths"][kind] = paths
        found["sides"][kind] = {name: sorted(values)[len(values) // 2] * 1e3 for name, values in times.items()}
        print(kind, {name: round(value, 2) for name, value in found["sides"][kind].items()}, paths, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for; the file is written after every part."""
    args = parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("No CUDA device: nothing to measure here. --rehearse tries the script on a CPU.")
    device = torch.device("cpu") if args.rehearse else torch.device("cuda", 0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    report = describe(args, device)
    file_name = f"{report['device'].replace(' ', '-')}-{report['date']}.json"
    out = args.out or RESULTS / (f"rehearsal/{file_name}" if args.rehearse else file_name)
    report = merge(report, out)
    deadline = time.monotonic() + args.time_limit

    def write() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")

    sizes = {"size": 128, "copy_bytes": 2**20} if args.rehearse else {}
    if "ceilings" in args.only:
        report["ceilings"] = ceilings(device, **sizes)
        print({key: value and round(value, 3) for key, value in report["ceilings"].items()}, flush=True)
        write()
    plan = Plan(device, args.rounds, args.steps, args.warmup, deadline)
    chosen = choose_contenders(args.contenders)
    for spec in MODELS if "models" in args.only else ():
        for batch in args.batches if spec.name in args.models else ():
            size = 1 if batch == "one" else None
            put_model(
                report, measure_model(shrunk(spec) if args.rehearse else spec, chosen, plan, size=size,
                                      layers=args.layers)
            )  # fmt: skip
            write()
    if "widths" in args.only and not plan.is_over:
        widths = {"widths": REHEARSED_WIDTHS, "rows": 64, "repeats": 3} if args.rehearse else {}
        report["widths"] = linear_widths(device, **widths)
        write()
    if "optimizer" in args.only and not plan.is_over:
        report["optimizer"] = measure_optimizer(device, 2e6 if args.rehearse else 1e9)
        write()
    write()
    print("\n" + all_tables(report))
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    main()
