"""Write BENCHMARKS.md and its plots from the JSON files in ``benchmarks/results``.

The newest file of ``python -m benchmarks.gpu`` gives the tables; without one the page says that no GPU was measured.
The CPU figures of ``benchmarks.overhead``, ``benchmarks.memory``, ``benchmarks.optimizer_stage`` and
``benchmarks.fp8_quality`` follow, as far as their files are there.

Run: ``python -m benchmarks.page``; ``--json FILE --out FOLDER`` shows another file elsewhere, such as a rehearsal's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.plots import draw_all, draw_bars
from benchmarks.gpu.tables import all_tables, figure, markdown, target_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOTS = "benchmarks/plots"
CAPTIONS = {
    "speedup.png": "Throughput over Lightning bf16-mixed, by model",
    "memory.png": "Peak memory by mode",
    "fp8-width.png": "One Linear layer in FP8 against BF16, by width",
    "memory-cpu.png": "Bytes per parameter by mode, counted on a CPU",
}
INTRODUCTION = (
    "Written by `python -m benchmarks.page` from the files in `benchmarks/results`; do not edit. What bounds each "
    "figure, and what was predicted, stands in `benchmarks/NOTES.md`."
)
Report = dict[str, Any]


def newest_report(folder: Path = RESULTS) -> Report | None:
    """Return the newest measured GPU report, ``None`` without one."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    measured = [report for report in reports if isinstance(report, dict) and report.get("kind") == "measured"]
    return max(measured, key=lambda report: report["date"], default=None)


def page(report: Report | None, folder: Path, plots: Sequence[Path]) -> str:
    """Return the text of the page."""
    shown = [f"![{CAPTIONS[path.name]}]({PLOTS}/{path.name})" for path in plots]
    parts = [
        "# Benchmarks",
        INTRODUCTION,
    ]
    if report is None:
        parts += [
            "## GPU: not measured yet",
            "`python -m benchmarks.gpu` on a Hopper GPU fills this page. Until then there is no figure of speed here.",
            target_table({}),
        ]
    else:
        parts += [heading(report), *shown, all_tables(report)]
        shown = []
    parts += ["## CPU", "Byte counts, Python overhead and losses; they say nothing about speed on a GPU.", *shown]
    parts += [text for text in (overhead(folder), memory(folder), optimizer_stage(folder), fp8_quality(folder)) if text]
    return "\n\n".join(parts) + "\n"


def heading(report: Report) -> str:
    """Return device, versions and date, and what kind of run it was."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    commits = sorted({model.get("commit") or "unknown" for model in report.get("models", [])} | {report["commit"]})
    settings = report["settings"]
    text = (
        f"{report['device']}, {report['date']}, commit {', '.join(commits)}. {versions}.\n\n"
        f"Every contender had {settings['rounds']} turns of {settings['steps']} timed steps after "
        f"{settings['warmup']}, in one process per model, in an order that turned from round to round; a turn builds "
        "the model anew. Times are medians over all steps, memory is the peak of a contender alone on the card. "
        "Lightning's contenders and ours run a real `Trainer.fit`. `monitors` samples every 100 steps, none of them "
        "timed, `monitors sample` every step; their target weighs them 99 to 1. "
        "MFU counts useful FLOPs against the products measured in this run."
    )
    if report["kind"] == "rehearsal":
        text = "**REHEARSAL with tiny models on a CPU: no figure on this page is a measurement.**\n\n" + text
    return text


# --- CPU -----------------------------------------------------------------------------------------------------------


def read(folder: Path, name: str) -> Report | None:
    path = folder / name
    found: Report | None = json.loads(path.read_text()) if path.exists() else None
    return found


def fp8_quality(folder: Path) -> str:
    """Return the table of validation losses after the same training."""
    found = read(folder, "fp8-quality-cpu.json")
    if found is None:
        return ""
    rows = [
        [
            name,
            *(figure(loss, ".4f") for loss in run["losses"]),
            figure(run["mean"], ".4f"),
            f"{run['difference']:+.2%}",
        ]
        for name, run in found["runs"].items()
    ]
    header = ["nats per byte", *(f"seed {seed}" for seed in found["seeds"]), "mean", "against bf16"]
    title = (
        f"### Validation loss of FP8\n\n{found['device'].upper()}, {found['date']}, torch "
        f"{found['versions']['torch']}, backend {found['backend']}. The model of `examples/quickstart.py` after "
        f"{found['steps']} steps; to reach: within 1% of BF16."
    )
    return f"{title}\n\n{markdown(header, rows)}"


def overhead(folder: Path) -> str:
    """Return the table of the Python overhead per step."""
    found = read(folder, "overhead-cpu.json")
    if found is None:
        return ""
    rows = [
        [
            case["case"],
            figure(case["ours_us"]["median"], ".0f"),
            figure(case["other_us"]["median"], ".0f"),
            figure(case["ratio"]["median"], ".3f"),
            f"<= {case['target']:.2f}",
            "reached" if case["ratio"]["median"] <= case["target"] else "not reached",
        ]
        for case in found["cases"]
    ]
    header = ["case", "ours, us", "the other, us", "ratio of CPU time", "to reach", ""]
    title = (
        f"### Step of small models\n\n{found['device']}, {found['date'][:10]}, torch {found['torch']}. The other side "
        'is Lightning\'s own plugin without callbacks; in rows with "/ none" it is ours without callbacks.'
    )
    return f"{title}\n\n{markdown(header, rows)}"


def memory(folder: Path) -> str:
    """Return the table of bytes per parameter."""
    found = read(folder, "memory-cpu.json")
    if found is None:
        return ""
    names = ("weights", "masters", "gradients", "optimizer_state", "rest", "peak", "estimate", "target")
    rows = [[row["name"], *(figure(row[name]) for name in names)] for row in found["rows"]]
    header = ["bytes per parameter", "weights", "masters", "gradients", "states", "at rest", "peak", "estimate",
              "to reach"]  # fmt: skip
    where = found["environment"]
    title = f"### Memory by mode\n\n{where['device']}, {where['date']}, torch {where['torch']}. AdamW, one device."
    return f"{title}\n\n{markdown(header, rows)}"


def optimizer_stage(folder: Path) -> str:
    """Return the table of the optimizer stage on a CPU."""
    found = read(folder, "optimizer-stage-cpu.json")
    if found is None:
        return ""
    names = list(found["optimizers"]["fused"]["median_ms"])
    sides = found["optimizers"]
    rows = [[name, *(figure(side["median_ms"][name], ".0f") for side in sides.values())] for name in names]
    header = [f"{found['params'] / 1e6:,.0f}M parameters, ms", *(f"AdamW, {kind}" for kind in sides)]
    note = (
        f"### Optimizer stage\n\nCPU, {found['date']}, torch {found['torch']}. A CPU casts in passes of their own, "
        "which a GPU does within its bandwidth: compare copy and split with each other only."
    )
    return f"{note}\n\n{markdown(header, rows)}"


def draw_cpu(folder: Path, plots: Path) -> list[Path]:
    """Draw the byte counts, the only CPU figure that holds on a GPU too."""
    found = read(folder, "memory-cpu.json")
    if found is None:
        return []
    plots.mkdir(parents=True, exist_ok=True)
    rows = [row for row in found["rows"] if "8-bit" not in row["name"] and "backwards" not in row["name"]]
    names = [row["name"] if row["name"].startswith("Lightning") else f"ours bf16 {row['name']}" for row in rows]
    where = {"device": "CPU", "date": found["environment"]["date"]}
    label = "bytes per parameter at rest, AdamW"
    return [draw_bars(names, [row["rest"] for row in rows], label, plots / "memory-cpu.png", where)]


def write(report: Report | None, root: Path, folder: Path = RESULTS) -> Path:
    """Draw the plots and write the page under ``root``."""
    plots = draw_cpu(folder, root / PLOTS) if report is None else draw_all(report, root / PLOTS)
    target = root / "BENCHMARKS.md"
    target.write_text(page(report, folder, plots))
    return target


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the report to show (default: the newest in benchmarks/results)")
    parser.add_argument("--out", type=Path, default=ROOT, help="where BENCHMARKS.md and the plots go")
    args = parser.parse_args(argv)
    if args.json and args.out == ROOT and json.loads(args.json.read_text()).get("kind") != "measured":
        parser.error("--json names a rehearsal: its figures do not belong on BENCHMARKS.md. Name another --out.")
    report = json.loads(args.json.read_text()) if args.json else newest_report()
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"written: {write(report, args.out)}")


if __name__ == "__main__":
    main()
