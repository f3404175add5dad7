"""The tables, made of the JSON file alone, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.contenders import BASELINE, DEFAULT_SAMPLING, REFERENCE
from benchmarks.gpu.measure import MIN_STEPS

Report = dict[str, Any]
NONE = "-"
NOT_MEASURED = "not measured"
FULL = "full batch"
LLAMA = "llama-8b-blocks"
SPEEDUPS = (
    "Lightning 16-mixed", REFERENCE, "Lightning transformer-engine", "ours fp16 copy", "ours bf16 split",
    "ours fp8 current split",
)  # fmt: skip


# --- Arithmetic ----------------------------------------------------------------------------------------------------


def find_model(report: Report, name: str, label: str = FULL) -> Report | None:
    """Return a model's entry, if it was measured."""
    return next((m for m in report.get("models", []) if (m["name"], m["label"]) == (name, label)), None)


def find_contender(model: Report | None, name: str) -> Report | None:
    """Return a contender's entry, if it ran to figures."""
    rows = model["contenders"] if model else []
    return next((row for row in rows if row["name"] == name and row["status"] == "measured"), None)


def throughput(model: Report, row: Report) -> float:
    """Return tokens or images per second."""
    return float(model["units_per_step"] / row["median_ms"] * 1e3)


def time_ratio(model: Report | None, left: str, right: str) -> float | None:
    """Return the step time of ``left`` over that of ``right``, of medians over all steps."""
    a, b = find_contender(model, left), find_contender(model, right)
    return a["median_ms"] / b["median_ms"] if a and b else None


def utilization(model: Report, row: Report, ceiling_tflops: float | None) -> float | None:
    """Return the model's FLOPs per second as a share of a ceiling."""
    if not ceiling_tflops:
        return None
    return float(model["flops_per_step"] / (row["median_ms"] / 1e3) / (ceiling_tflops * 1e12))


def monitored_ratio(model: Report | None, name: str) -> float | None:
    """Return a contender's mean step time with all monitors on, one step in 100 a sample, over that without."""
    watched, sampled = (time_ratio(model, f"{name}, {kind}", name) for kind in ("monitors", "monitors sample"))
    if watched is None or sampled is None:
        return None
    return watched + (sampled - watched) / DEFAULT_SAMPLING


def optimizer_ratio(report: Report, kind: str = "fused") -> float | None:
    """Return the optimizer stage's time of split masters over Lightning's bf16-mixed."""
    sides = report.get("optimizer", {}).get("sides", {}).get(kind)
    return sides["split"] / sides["lightning bf16-mixed"] if sides else None


# --- Targets -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One line of design.md, section 6.

    Args:
        what: In words.
        bound: What to reach.
        at_most: Whether less is better.
        found: What was measured, ``None`` if it was not.
    """

    what: str
    bound: float
    at_most: bool
    found: float | None

    @property
    def verdict(self) -> str:
        """Say whether it was reached."""
        if self.found is None:
            return NOT_MEASURED
        is_reached = self.found <= self.bound if self.at_most else self.found >= self.bound
        return "reached" if is_reached else "not reached"


def targets(report: Report) -> list[Target]:
    """Hold what was measured against the targets, on the Llama-shaped blocks at the full batch."""
    model = find_model(report, LLAMA)

    def time(left: str, right: str) -> float | None:
        return time_ratio(model, left, right)

    def inverse(value: float | None) -> float | None:
        return 1 / value if value else None

    loops = ("Transformer Engine loop, current", "Transformer Engine loop, delayed")
    return [
        Target("BF16 step time, ours split / Lightning bf16-mixed", 0.92, True, time("ours bf16 split", REFERENCE)),
        Target(
            "FP16 step time, ours copy / Lightning 16-mixed", 0.92, True, time("ours fp16 copy", "Lightning 16-mixed")
        ),
        Target(
            "FP8 tokens/s, ours current split / Lightning bf16-mixed", 1.5, False,
            inverse(time("ours fp8 current split", REFERENCE)),
        ),
        Target(
            "FP8 step time, ours current params / hand-written loop", 1.02, True,
            time("ours fp8 current params", loops[0]),
        ),
        Target(
            "FP8 step time, ours delayed params / hand-written loop", 1.02, True,
            time("ours fp8 delayed params", loops[1]),
        ),
        Target("All monitors on, BF16", 1.02, True, monitored_ratio(model, "ours bf16 split")),
        Target("All monitors on, FP8", 1.02, True, monitored_ratio(model, "ours fp8 current split")),
        Target("Optimizer stage, split / Lightning bf16-mixed, fused AdamW", 0.75, True, optimizer_ratio(report)),
    ]  # fmt: skip


# --- Markdown ------------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are figures."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def figure(value: float | None, form: str = ".2f", missing: str = NONE) -> str:
    """Format a figure that may be missing."""
    return missing if value is None else format(value, form)


def model_table(report: Report, model: Report) -> str:
    """Return the table of one model and batch: every contender, those without figures with the reason."""
    reference = find_contender(model, REFERENCE)
    ceilings = report.get("ceilings", {})
    rows = []
    for row in model["contenders"]:
        if row["status"] != "measured":
            rows.append([row["name"], f"{row['status']}: {row['reason']}", *[NONE] * 5])
            continue
        own = utilization(model, row, ceilings.get(row["format"]))
        of_bf16 = utilization(model, row, ceilings.get("bf16"))
        mark = "" if row["num_steps"] >= MIN_STEPS else f" ({row['num_steps']} steps only)"
        rows.append([
            row["name"] + mark,
            figure(throughput(model, row), ",.0f"),
            figure(reference["median_ms"] / row["median_ms"] if reference else None, ".3f"),
            figure(row["median_ms"]),
            figure(of_bf16, ".1%"),
            figure(own, ".1%"),
            figure(row["peak_bytes"] / 2**30),
        ])  # fmt: skip
    unit = model["unit"]
    header = ["contender", f"{unit}/s", "over bf16-mixed", "step, ms", "MFU of BF16", "MFU of its format", "peak, GiB"]
    flops = model["flops_per_step"] / 1e12
    title = (
        f"### {model['name']}, {model['label']}\n\n{model['layers']} layers, {model['num_params'] / 1e6:,.0f}M "
        f"parameters, batch {model['batch']} of {model['length']} {'tokens' if unit == 'tokens' else 'pixels a side'}, "
        f"{flops:.3g} TFLOP a step, commit {model.get('commit') or 'unknown'}.\n\n"
    )
    return title + markdown(header, rows)


def speedup_table(report: Report) -> str:
    """Return throughput over Lightning's FP32 without TF32, by model."""
    rows = []
    for model in report.get("models", []):
        ratios = [time_ratio(model, BASELINE, name) for name in SPEEDUPS]
        tf32 = time_ratio(model, BASELINE, f"{BASELINE}, TF32")
        rows.append([f"{model['name']}, {model['label']}", *(figure(r) for r in (tf32, *ratios))])
    return markdown(["over FP32 (TF32 off)", "FP32 with TF32", *SPEEDUPS], rows)


def optimizer_table(report: Report) -> str:
    """Return the time of the optimizer stage."""
    stage = report["optimizer"]
    names = list(next(iter(stage["sides"].values())))
    rows = [[name, *(figure(sides[name]) for sides in stage["sides"].values())] for name in names]
    header = [f"{stage['params'] / 1e6:,.0f}M parameters, ms", *(f"AdamW {kind}" for kind in stage["sides"])]
    paths = [
        f"- AdamW {kind}, {name}: {path}"
        for kind, found in stage.get("paths", {}).items()
        for name, path in found.items()
    ]
    return "\n".join([markdown(header, rows), *([""] if paths else []), *paths])


def width_table(report: Report) -> str:
    """Return one Linear layer's forward and backward, FP8 against BF16, by width."""
    rows = report["widths"]["milliseconds"]
    recipes = [key for key in rows[0] if key not in ("width", "bf16")]
    lines = [
        [str(row["width"]), figure(row["bf16"], ".3f"), *(figure(row["bf16"] / row[r], ".2f") for r in recipes)]
        for row in rows
    ]
    return markdown(["width", "BF16, ms", *(f"FP8 {r}, times BF16" for r in recipes)], lines)


def first_paying_width(report: Report, recipe: str = "current") -> int | None:
    """Return the smallest width from which on FP8 is faster than BF16, forward and backward together."""
    paying = None
    for row in reversed(report.get("widths", {}).get("milliseconds", [])):
        if recipe not in row or row[recipe] >= row["bf16"]:
            break
        paying = row["width"]
    return paying


def ceiling_table(report: Report) -> str:
    """Return the measured ceilings."""
    found = report["ceilings"]
    names = ("fp32", "tf32", "fp16", "bf16", "fp8")
    rows = [[f"{name} product of {found['size']}^3, TFLOP/s", figure(found[name], ".1f")] for name in names]
    return markdown(["ceiling", "measured"], [*rows, ["copy, read plus written, TB/s", figure(found["copy_tb_s"])]])


def target_table(report: Report) -> str:
    """Return the targets with their verdicts."""
    is_measured = report.get("kind") == "measured"
    rows = [
        [
            t.what,
            f"{'<=' if t.at_most else '>='} {t.bound:.2f}",
            figure(t.found, ".3f"),
            t.verdict if is_measured or t.found is None else "rehearsal",
        ]
        for t in targets(report)
    ]
    return markdown(["target", "to reach", "measured", ""], rows)


def all_tables(report: Report) -> str:
    """Return every table that the report has figures for."""
    parts = ["## Targets", target_table(report)]
    if report.get("models"):
        parts += ["## Speed-up over FP32", speedup_table(report), "## Models"]
        parts += [model_table(report, model) for model in report["models"]]
    if "optimizer" in report:
        parts += ["## Optimizer stage", optimizer_table(report)]
    if "widths" in report:
        width = first_paying_width(report)
        pays = "no measured width" if width is None else f"width {width} on"
        parts += ["## One Linear layer by width", f"FP8 (current) pays from {pays}.", width_table(report)]
    if "ceilings" in report:
        parts += ["## Ceilings", ceiling_table(report)]
    return "\n\n".join(parts)
