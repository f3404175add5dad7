import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_mp import __version__
from lightning_mp.cli import main
from lightning_mp.hardware import default_device, describe_machine, read_facts, resolve_auto


def test_doctor_prints_the_report_that_the_fp8_error_uses(capsys) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert printed == describe_machine(read_facts(default_device())) + "\n"
    assert torch.__version__ in printed


def test_doctor_looks_at_the_device_that_is_asked_for(capsys) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["device", "cpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_doctor_says_why_a_missing_gpu_runs_nothing(capsys) -> None:
    assert main(["doctor", "--device", "cuda"]) == 0
    assert "finds no cuda device" in capsys.readouterr().out


def test_doctor_refuses_a_device_that_torch_does_not_know(capsys) -> None:
    assert main(["doctor", "--device", "gpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lightning-mp: --device='gpu' is not a torch device.")


def test_doctor_refuses_a_gpu_beyond_the_last(capsys) -> None:
    assert main(["doctor", "--device", "cuda:99"]) == 1
    assert capsys.readouterr().err.startswith("lightning-mp: --device='cuda:99', but this machine has ")


def test_version_is_that_of_the_package(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lightning-mp {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["dokter"]])
def test_wrong_usage_exits_with_2_and_names_the_commands(argv, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert "COMMAND" in capsys.readouterr().err


def test_module_is_the_command() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "lightning_mp", "doctor", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("device")


@pytest.mark.parametrize("count", ["1e9", "1B", "1000M", "1000000000"])
def test_plan_prints_the_bytes_of_a_number_of_parameters(count, capsys) -> None:
    # 2 + 2 bytes of weight, 2 of gradient, 8 of AdamW: 14 bytes for each of 1e9 parameters.
    assert main(["plan", count, "--master-weights", "split"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["total", f"{14e9 / 2**30:.2f}", "14.00"] in rows


def test_plan_builds_a_model_without_taking_its_memory(capsys) -> None:
    assert main(["plan", "lightning.pytorch.demos.boring_classes:BoringModel", "--optimizer", "sgd"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    # 32 * 2 weights and 2 biases, 4 bytes each for value and gradient.
    assert ["total", f"{66 * 8 / 2**10:.2f}", "8.00"] in rows
    assert ["component", "KiB", "bytes/param"] in rows


def test_plan_of_auto_is_that_of_the_precision_that_this_machine_gets(capsys) -> None:
    assert main(["plan", "1e6", "--precision", "auto"]) == 0
    found = capsys.readouterr().out
    assert main(["plan", "1e6", "--precision", resolve_auto(default_device())[0]]) == 0
    assert capsys.readouterr().out == found


class ReadsItsWeights(nn.Module):
    """What a constructor on the meta device cannot do."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = torch.ones(3).max().item()


class RaisesLines(nn.Module):
    def __init__(self) -> None:
        raise OSError("no data here\nsecond line")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["plan", "seven"], "model='seven' is neither a number of parameters nor module:Class"),
        (["plan", "no_such_module:Model"], "could not be built without arguments: No module named 'no_such_module'"),
        (["plan", "torch.nn:Linear"], "model='torch.nn:Linear' could not be built without arguments"),
        (["plan", "collections:Counter"], "gives an object of Counter; it must be a torch.nn.Module"),
        (["plan", "tests.test_cli:ReadsItsWeights"], "could not be built without arguments: Tensor.item() cannot be"),
        (["plan", "tests.test_cli:RaisesLines"], "could not be built without arguments: no data here. Pass"),
        (["plan", "1.2.3B"], "model='1.2.3B' is neither a number of parameters nor module:Class"),
        (["plan", "."], "model='.' is neither"),
        (["plan", "1e999"], "model='1e999' is neither"),
        (["plan", ":A"], "model=':A' is neither"),
        (["doctor", "--device", "meta"], "--device='meta': cpu, cuda and mps are supported"),
        (["plan", "1e9", "--precision", "fp16", "--master-weights", "split"], "split"),
        (["plan", "1e9", "--optimizer", "adamm"], "adamm"),
    ],
)
def test_plan_refuses_with_one_clear_line(argv, text, capsys) -> None:
    assert main(argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert text in captured.err
    assert captured.err.startswith("lightning-mp: ")
    assert captured.err.count("\n") == 1
