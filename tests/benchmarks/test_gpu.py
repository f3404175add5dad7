"""``python -m benchmarks.gpu``, rehearsed on the CPU from the command line to the page."""

import json

import pytest
import torch

from benchmarks import page
from benchmarks.gpu.__main__ import main, merge, put_model
from benchmarks.gpu.contenders import CONTENDERS, REFERENCE, Contender
from benchmarks.gpu.measure import Plan, measure_model
from benchmarks.gpu.models import MODELS, shrunk

CPU = torch.device("cpu")
FP8 = "ours fp8 current split"
TWO = ["--rehearse", "--rounds", "2", "--steps", "2", "--warmup", "1", "--batches", "full"]


@pytest.fixture
def _float32_precision_is_restored():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


pytestmark = [
    pytest.mark.usefixtures("_float32_precision_is_restored"),
    pytest.mark.filterwarnings("ignore"),  # a peer's warnings are no matter of ours
]


def test_rehearsal_goes_from_the_command_line_to_a_page_with_three_plots(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.__main__.REHEARSED_WIDTHS", (32,))
    out = tmp_path / "run.json"
    main([*TWO, "--models", "gpt2-124m", "--contenders", FP8, "--commit", "abc", "--out", str(out)])
    found = json.loads(out.read_text())
    assert (found["kind"], found["device"], found["commit"]) == ("rehearsal", "CPU", "abc")
    (model,) = found["models"]
    rows = {row["name"]: row for row in model["contenders"]}
    assert set(rows) == {REFERENCE, FP8}  # the one that all are compared with runs unasked
    for row in rows.values():
        assert (row["status"], row["num_steps"], len(row["round_ms"])) == ("measured", 4, 2)
        assert row["median_ms"] > 0
    # 16 bytes per parameter against 14; activations of the other are gone in both.
    assert rows[FP8]["peak_bytes"] < rows[REFERENCE]["peak_bytes"]

    page.main(["--json", str(out), "--out", str(tmp_path / "page")])
    text = (tmp_path / "page" / "BENCHMARKS.md").read_text()
    assert "no figure on this page is a measurement" in text
    for name in ("speedup", "memory", "fp8-width"):
        plot = tmp_path / "page" / page.PLOTS / f"{name}.png"
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert f"({page.PLOTS}/{name}.png)" in text


def test_rehearsal_is_not_for_the_page_of_the_repository(tmp_path, capsys) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"kind": "rehearsal"}')
    with pytest.raises(SystemExit):
        page.main(["--json", str(path)])
    assert "do not belong on BENCHMARKS.md" in capsys.readouterr().err


def test_benchmarks_page_is_what_the_command_writes_from_the_committed_files(tmp_path) -> None:
    page.write(page.newest_report(), tmp_path)
    found, committed = tmp_path / "BENCHMARKS.md", page.ROOT / "BENCHMARKS.md"
    assert found.read_text() == committed.read_text(), "run `python -m benchmarks.page` and commit what it writes"
    plots = sorted(path.name for path in (tmp_path / page.PLOTS).iterdir())
    assert plots == sorted(path.name for path in (page.ROOT / page.PLOTS).iterdir())


def test_page_shows_the_newest_measured_file_and_the_overhead_on_a_cpu(tmp_path) -> None:
    times = {"ours_us": {"median": 311.4}, "other_us": {"median": 320.0}, "ratio": {"median": 0.973}}
    case = {"case": "TinyModel, bf16, AdamW", "target": 1.0, **times}
    head = {"device": "some CPU", "date": "2026-11-24T01:02:03+00:00", "torch": "2.13.0"}
    (tmp_path / "overhead-cpu.json").write_text(json.dumps({**head, "cases": [case]}))
    assert page.newest_report(tmp_path) is None
    text = page.page(None, tmp_path, [])
    assert "| TinyModel, bf16, AdamW | 311 | 320 | 0.973 | <= 1.00 | reached |" in text
    assert "some CPU, 2026-11-24, torch 2.13.0" in text
    for kind, date in (("measured", "2026-11-01"), ("measured", "2026-11-02"), ("rehearsal", "2026-11-03")):
        (tmp_path / f"{date}.json").write_text(json.dumps({"kind": kind, "date": date}))
    assert page.newest_report(tmp_path) == {"kind": "measured", "date": "2026-11-02"}


def test_contender_that_cannot_run_or_fails_or_has_no_time_is_listed_with_the_reason() -> None:
    conv = shrunk(MODELS[4])  # no Linear but the head: nothing for FP8
    broken = Contender("broken", "lightning", "no-such-precision", "bf16")
    chosen = [c for c in CONTENDERS if c.name in (FP8, "Transformer Engine loop, current")]
    plan = Plan(CPU, rounds=2, steps=1, warmup=1, deadline=float("inf"))
    rows = measure_model(conv, [*chosen, broken], plan)["contenders"]
    assert [(row["name"], row["status"]) for row in rows] == [
        (FP8, "cannot run"), ("Transformer Engine loop, current", "cannot run"), ("broken", "failed"),
    ]  # fmt: skip
    assert "precision='fp8' would run none" in rows[0]["reason"]
    assert "no-such-precision" in rows[2]["reason"]
    late = Plan(CPU, rounds=2, steps=1, warmup=1, deadline=0.0)
    (row,) = measure_model(conv, CONTENDERS[:1], late)["contenders"]
    assert (row["status"], row["reason"]) == ("not measured", "the time limit came first")


def test_out_of_memory_is_recorded_as_such(monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("benchmarks.gpu.measure.run_segment", fail)
    plan = Plan(CPU, rounds=3, steps=1, warmup=1, deadline=float("inf"))
    (row,) = measure_model(shrunk(MODELS[2]), CONTENDERS[:1], plan)["contenders"]
    assert (row["status"], row["reason"]) == ("out of memory", "batch 4 does not fit")


def test_file_of_another_device_is_not_continued(tmp_path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"kind": "measured", "device": "NVIDIA H200", "widths": 1, "date": "2026-11-01"}))
    new = {"kind": "measured", "device": "NVIDIA H200", "date": "2026-11-02"}
    assert merge(new, path) == {**new, "widths": 1}
    with pytest.raises(SystemExit, match="another kind or device"):
        merge({**new, "kind": "rehearsal"}, path)


def test_entry_without_figures_does_not_replace_one_with_figures() -> None:
    def entry(status: str) -> dict:
        return {"name": "gpt2-124m", "label": "full batch", "contenders": [{"status": status}]}

    found = {"commit": "abc"}
    for status in ("not measured", "measured", "not measured"):
        put_model(found, entry(status))
    (model,) = found["models"]
    assert model == {**entry("measured"), "commit": "abc"}


def test_names_of_contenders_are_unique_and_an_unknown_one_is_refused(tmp_path) -> None:
    names = [contender.name for contender in CONTENDERS]
    assert len(set(names)) == len(names)
    with pytest.raises(SystemExit, match="not known"):
        main([*TWO, "--contenders", "ours bf17", "--out", str(tmp_path / "run.json")])
