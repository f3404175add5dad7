"""Three pictures of the JSON file: speed-up by model, memory by mode, FP8 by width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.contenders import REFERENCE
from benchmarks.gpu.tables import FULL, LLAMA, find_contender, find_model, time_ratio

Report = dict[str, Any]
BARS = ("Lightning transformer-engine", "ours fp16 copy", "ours bf16 split", "ours fp8 current split")
COLORS = ("#9aa0a6", "#e8a33d", "#3b7dd8", "#2f9e6e")
MEMORY = (
    "Lightning 32-true", REFERENCE, "Lightning bf16-true", "Lightning transformer-engine", "ours bf16 params",
    "ours bf16 copy", "ours bf16 split", "ours fp8 current params", "ours fp8 current split",
)  # fmt: skip
LIGHTNING, OURS = "#9aa0a6", "#3b7dd8"


def draw_all(report: Report, folder: Path) -> list[Path]:
    """Draw what the report has figures for, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    if any(model["label"] == FULL for model in report.get("models", [])):
        drawn.append(draw_speedup(report, folder / "speedup.png"))
    if _memory_rows(report):
        drawn.append(draw_memory(report, folder / "memory.png"))
    if report.get("widths"):
        drawn.append(draw_widths(report, folder / "fp8-width.png"))
    return drawn


def draw_speedup(report: Report, path: Path) -> Path:
    """Draw throughput over Lightning bf16-mixed as groups of bars, one group per model."""
    models = [model for model in report["models"] if model["label"] == FULL]
    figure, axes = _figure(8, 4)
    width = 0.8 / len(BARS)
    for index, (name, color) in enumerate(zip(BARS, COLORS, strict=True)):
        ratios = [time_ratio(model, REFERENCE, name) for model in models]
        places = [place + (index - (len(BARS) - 1) / 2) * width for place in range(len(models))]
        axes.bar(places, [ratio or 0 for ratio in ratios], width * 0.92, color=color, label=name)
        for place, ratio in zip(places, ratios, strict=True):
            axes.text(place, (ratio or 0) + 0.01, "-" if ratio is None else f"{ratio:.2f}", ha="center", fontsize=7)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(models)), [model["name"] for model in models])
    axes.set_ylabel(f"throughput over {REFERENCE}")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _save(figure, path, report)


def _memory_rows(report: Report) -> list[Report]:
    model = find_model(report, LLAMA) or next((m for m in report.get("models", []) if m["label"] == FULL), None)
    rows = [find_contender(model, name) for name in MEMORY]
    return [{**row, "model": model["name"]} for row in rows if row and model]


def draw_memory(report: Report, path: Path) -> Path:
    """Draw the peak memory of each mode on the Llama-shaped blocks, or on the first model that was measured."""
    rows = _memory_rows(report)
    values = [row["peak_bytes"] / 2**30 for row in rows]
    unit = "GiB"
    if max(values) < 0.1:  # a rehearsal's models
        values, unit = [value * 1024 for value in values], "MiB"
    return draw_bars([row["name"] for row in rows], values, f"peak memory, {unit} ({rows[0]['model']})", path, report)


def draw_bars(names: Sequence[str], values: Sequence[float], label: str, path: Path, report: Report) -> Path:
    """Draw one horizontal bar per name, ours in another color."""
    figure, axes = _figure(8, 0.36 * len(names) + 1.2)
    colors = [LIGHTNING if name.startswith("Lightning") else OURS for name in names]
    axes.barh(range(len(names)), values, 0.7, color=colors)
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:.3g}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.margins(x=0.08)
    return _save(figure, path, report)


def draw_widths(report: Report, path: Path) -> Path:
    """Draw how many times faster one Linear is in FP8 than in BF16, by width."""
    rows = report["widths"]["milliseconds"]
    figure, axes = _figure(8, 4)
    recipes = [key for key in rows[0] if key not in ("width", "bf16")]
    for recipe, color in zip(recipes, COLORS[1:], strict=False):
        axes.plot([r["width"] for r in rows], [r["bf16"] / r[recipe] for r in rows], "o-", color=color, label=recipe)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["width"] for row in rows], [str(row["width"]) for row in rows], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel(f"width of a square Linear, {report['widths']['rows']} rows")
    axes.set_ylabel("times faster than BF16, forward and backward")
    if recipes:
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, path, report)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # No pyplot: it would keep every figure and choose a backend for the process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path, report: Report) -> Path:
    where = f"{report['device']}, {report['date']}"
    if report.get("kind") == "rehearsal":
        where = f"REHEARSAL with tiny models, no measurement. {where}"
    figure.supxlabel(where, fontsize=7, color="#606060", x=0.99, ha="right")
    figure.savefig(path, dpi=120)
    return path
