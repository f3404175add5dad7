"""The arithmetic of the tables, by hand."""

import pytest

from benchmarks.gpu.contenders import REFERENCE
from benchmarks.gpu.tables import (
    all_tables,
    find_contender,
    first_paying_width,
    model_table,
    optimizer_ratio,
    optimizer_table,
    targets,
    throughput,
    time_ratio,
    utilization,
)


def row(name: str, median_ms: float, *, num_steps: int = 24, form: str = "bf16") -> dict:
    return {
        "name": name, "format": form, "status": "measured", "reason": "", "num_steps": num_steps,
        "median_ms": median_ms, "round_ms": [median_ms], "peak_bytes": 3 * 2**30,
    }  # fmt: skip


def missing(name: str, status: str = "out of memory", reason: str = "batch 2 does not fit") -> dict:
    return {"name": name, "format": "fp32", "status": status, "reason": reason, "num_steps": 0}


def report(*rows: dict, **parts) -> dict:
    model = {
        "name": "llama-8b-blocks", "label": "full batch", "batch": 2, "length": 4096, "layers": 16,
        "num_params": 3_500_000_000, "unit": "tokens", "units_per_step": 8192, "flops_per_step": 2 * 10**14,
        "contenders": list(rows),
    }  # fmt: skip
    ceilings = {"fp32": None, "tf32": None, "fp16": None, "bf16": 800.0, "fp8": 1600.0, "copy_tb_s": 4.3, "size": 8192}
    return {"kind": "measured", "ceilings": ceilings, "models": [model], **parts}


def verdicts(found: dict) -> dict[str, tuple]:
    return {t.what: (t.found, t.verdict) for t in targets(found)}


def test_throughput_ratio_and_utilization_are_the_quotients_that_they_say() -> None:
    found = report(row(REFERENCE, 500.0), row("ours fp8 current split", 250.0, form="fp8"))
    model = found["models"][0]
    fast = find_contender(model, "ours fp8 current split")
    assert throughput(model, fast) == 32768.0  # 8192 tokens in a quarter of a second
    assert time_ratio(model, "ours fp8 current split", REFERENCE) == 0.5
    # 2e14 FLOP in 0.25 s are 800 TFLOP/s: all of BF16's ceiling, half of FP8's.
    assert utilization(model, fast, 800.0) == 1.0
    assert utilization(model, fast, 1600.0) == 0.5
    assert utilization(model, fast, None) is None
    assert "| ours fp8 current split | 32,768 | 2.000 | 250.00 | 100.0% | 50.0% | 3.00 |" in model_table(found, model)


def test_contender_without_figures_stands_in_the_table_with_its_reason() -> None:
    found = report(row(REFERENCE, 500.0), missing("Lightning 32-true"), row("ours bf16 split", 450.0, num_steps=8))
    text = model_table(found, found["models"][0])
    assert "| Lightning 32-true | out of memory: batch 2 does not fit |" in text
    assert "| ours bf16 split (8 steps only) |" in text


@pytest.mark.parametrize(("milliseconds", "verdict"), [(460.0, "reached"), (461.0, "not reached"), (400.0, "reached")])
def test_target_of_a_time_is_reached_up_to_its_bound(milliseconds, verdict) -> None:
    found = verdicts(report(row(REFERENCE, 500.0), row("ours bf16 split", milliseconds)))
    what = "BF16 step time, ours split / Lightning bf16-mixed"
    assert found.pop(what) == (milliseconds / 500.0, verdict)
    assert all(entry == (None, "not measured") for entry in found.values())


@pytest.mark.parametrize(("milliseconds", "verdict"), [(320.0, "reached"), (340.0, "not reached")])
def test_target_of_a_throughput_is_reached_from_its_bound_on(milliseconds, verdict) -> None:
    found = verdicts(report(row(REFERENCE, 480.0), row("ours fp8 current split", milliseconds)))
    what = "FP8 tokens/s, ours current split / Lightning bf16-mixed"
    assert found[what] == (pytest.approx(480.0 / milliseconds), verdict)


def test_monitors_cost_what_an_ordinary_step_costs_and_a_hundredth_of_a_sampled_one() -> None:
    name = "ours bf16 split"
    rows = [row(name, 100.0), row(f"{name}, monitors", 101.0), row(f"{name}, monitors sample", 151.0)]
    # 99 steps of 101 ms and one of 151 ms: 101.5 on average.
    assert verdicts(report(*rows))["All monitors on, BF16"] == (pytest.approx(1.015), "reached")
    assert verdicts(report(*rows[:2]))["All monitors on, BF16"] == (None, "not measured")


def test_optimizer_stage_is_held_against_lightnings() -> None:
    stage = {"params": 1e9, "sides": {"fused": {"lightning bf16-mixed": 8.0, "split": 6.0}}}
    assert optimizer_ratio({"optimizer": stage}) == 0.75
    assert optimizer_ratio({}) is None
    what = "Optimizer stage, split / Lightning bf16-mixed, fused AdamW"
    assert verdicts(report(optimizer=stage))[what] == (0.75, "reached")


def test_optimizer_stage_says_which_path_ran() -> None:
    stage = {"params": 1e9, "sides": {"fused": {"split": 6.0}}, "paths": {"fused": {"split": "fused kernel"}}}
    assert optimizer_table({"optimizer": stage}).endswith("\n\n- AdamW fused, split: fused kernel")


def test_fp8_pays_from_the_width_after_which_it_never_loses_again() -> None:
    def widths(*pairs: tuple[float, float]) -> dict:
        rows = [{"width": 512 << i, "bf16": a, "current": b} for i, (a, b) in enumerate(pairs)]
        return {"widths": {"rows": 8192, "milliseconds": rows}}

    assert first_paying_width(widths((1, 2), (1, 0.9), (1, 1.1), (1, 0.9), (1, 0.8))) == 4096
    assert first_paying_width(widths((1, 0.9), (1, 0.8))) == 512
    assert first_paying_width(widths((1, 0.9), (1, 1.0))) is None
    assert first_paying_width({"widths": {"rows": 1, "milliseconds": [{"width": 512, "bf16": 1.0}]}}) is None


def test_rehearsal_reaches_no_target() -> None:
    found = {**report(row(REFERENCE, 500.0), row("ours bf16 split", 100.0)), "kind": "rehearsal"}
    assert "| 0.200 | rehearsal |" in all_tables(found)
    assert "reached" not in all_tables(found)
