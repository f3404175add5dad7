import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lightning_mp.hardware import (
    RECIPES,
    DeviceFacts,
    TransformerEngineFacts,
    assess_auto,
    assess_bf16,
    assess_fp8,
    assess_fp16,
    assess_recipes,
    bf16_support,
    default_device,
    describe_machine,
    fp8_remedy,
    fp8_support,
    fp16_support,
    read_facts,
    read_transformer_engine,
    resolve_auto,
)
from lightning_mp.hardware.facts import read_driver, read_nvml

ENGINE = TransformerEngineFacts("2.9.0")
CPU = DeviceFacts("cpu", torch_version="2.13.0+cpu")


def gpu(name: str, capability: tuple[int, int], *, cuda: str = "12.9", engine: TransformerEngineFacts = ENGINE):
    return DeviceFacts(
        "cuda",
        name,
        compute_capability=capability,
        driver="580.65.06",
        torch_version="2.13.0",
        torch_cuda=cuda,
        transformer_engine=engine,
    )


V100, T4 = gpu("V100", (7, 0)), gpu("T4", (7, 5))
A100, L4, H200 = gpu("A100", (8, 0)), gpu("L4", (8, 9)), gpu("H200", (9, 0))
B200, RTX5090 = gpu("B200", (10, 0)), gpu("RTX 5090", (12, 0))
ROCM = DeviceFacts("cuda", "MI300X", torch_version="2.13.0", torch_hip="7.0")
MAC = DeviceFacts("mps", has_mps_bf16=True)
OLD_MAC = DeviceFacts("mps", has_mps_bf16=False)
NO_GPU = DeviceFacts("cuda", available=False, torch_version="2.13.0+cpu")


@pytest.mark.parametrize(
    ("facts", "chosen"),
    [
        (CPU, "bf16"),
        (V100, "fp16"),
        (T4, "fp16"),
        (A100, "bf16"),
        (L4, "bf16"),
        (H200, "bf16"),
        (B200, "bf16"),
        (ROCM, "bf16"),
        (MAC, "bf16"),
        (OLD_MAC, "fp16"),
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_auto_chooses_bf16_where_the_device_has_it_and_fp16_elsewhere(facts, chosen) -> None:
    assert assess_auto(facts)[0] == chosen
    assert assess_bf16(facts).available is (chosen == "bf16")


def test_auto_gives_the_capability_as_its_reason() -> None:
    assert assess_auto(T4)[1] == "this device has compute capability 7.5; BF16 needs 8.0 or newer (Ampere)"


@pytest.mark.parametrize("assess", [assess_bf16, assess_fp16, assess_fp8])
def test_cuda_without_a_device_has_nothing_and_says_so(assess) -> None:
    found = assess(NO_GPU)
    assert not found.available
    assert found.reason.startswith("torch 2.13.0+cpu finds no cuda device")


@pytest.mark.parametrize("assess", [assess_bf16, assess_fp16])
def test_unknown_device_type_is_not_supported_by_name(assess) -> None:
    found = assess(DeviceFacts("hpu"))
    assert (found.available, found.reason) == (False, "the device type is 'hpu'; cpu, cuda and mps are supported")


def test_fp16_runs_everywhere_and_says_where_it_is_slow() -> None:
    assert all(assess_fp16(facts).available for facts in (CPU, V100, H200, ROCM, MAC))
    assert "hundreds of times slower" in assess_fp16(CPU).reason
    assert "without FP16 tensor cores" in assess_fp16(gpu("P100", (6, 0))).reason


@pytest.mark.parametrize(
    ("facts", "available"),
    [
        (A100, ()),
        (L4, ("current", "delayed")),
        (H200, ("current", "delayed", "block")),
        (B200, ("current", "delayed", "block", "mxfp8", "nvfp4")),
        (RTX5090, ("current", "delayed", "block", "nvfp4")),
        (CPU, ()),
        (ROCM, ()),
        (MAC, ()),
    ],
    ids=lambda value: getattr(value, "label", None),
)
def test_recipes_follow_the_rules_of_transformer_engine(facts, available) -> None:
    found = assess_recipes(facts)
    assert tuple(found) == RECIPES
    assert tuple(name for name in RECIPES if found[name].available) == available
    assert assess_fp8(facts).available is bool(available)


def test_block_scaling_needs_cuda_12_9() -> None:
    found = assess_recipes(replace(H200, torch_cuda="12.8"))["block"]
    assert (found.available, found.reason) == (
        False,
        "torch is built with CUDA 12.8; block scaling needs 12.9 or newer",
    )


def test_cuda_versions_compare_as_numbers() -> None:
    # As text, and as a float, 12.10 would come before 12.9.
    assert assess_recipes(replace(H200, torch_cuda="12.10"))["block"].available


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (A100, r"^this device has compute capability 8\.0; FP8 needs 8\.9 or newer$"),
        (CPU, r"^the device is cpu; FP8 needs an NVIDIA GPU of compute capability 8\.9 or newer"),
        (ROCM, r"^torch is built for ROCm 7\.0; FP8 needs an NVIDIA GPU"),
        (replace(H200, torch_cuda="11.8"), r"is built with CUDA 11\.8; FP8 needs 12\.1 or newer$"),
        (replace(CPU, driver="580.65.06"), r"is a CPU build, though NVIDIA driver 580\.65\.06 is installed$"),
        (
            replace(H200, transformer_engine=TransformerEngineFacts(None, "it is not installed")),
            r"^Transformer Engine cannot be used: it is not installed$",
        ),
        (
            replace(H200, transformer_engine=TransformerEngineFacts("2.9.0", "libcudnn.so.9 was not found")),
            r"^Transformer Engine cannot be used: libcudnn\.so\.9 was not found$",
        ),
    ],
)
def test_missing_fp8_names_the_first_thing_that_is_missing(facts, reason) -> None:
    found = assess_fp8(facts)
    assert not found.available
    with pytest.raises(RuntimeError, match=reason):
        raise RuntimeError(found.reason)


MISSING = TransformerEngineFacts(None, "it is not installed")


@pytest.mark.parametrize(
    ("facts", "remedy"),
    [
        (H200, ""),
        (
            replace(H200, transformer_engine=MISSING),
            "Run: pip install --upgrade --no-build-isolation 'lightning-mp[fp8]'",
        ),
        (
            replace(H200, torch_cuda="13.0", transformer_engine=MISSING),
            "Run: pip install --upgrade --no-build-isolation 'lightning-mp[fp8]' 'transformer-engine[core_cu13]'",
        ),
        (
            replace(CPU, driver="580.65.06"),
            (
                "Run: pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130 && "
                "pip install --upgrade --no-build-isolation 'lightning-mp[fp8]' 'transformer-engine[core_cu13]'"
            ),
        ),
        (
            replace(CPU, driver="570.124.06"),
            (
                "Run: pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128 && "
                "pip install --upgrade --no-build-isolation 'lightning-mp[fp8]'"
            ),
        ),
        (
            replace(H200, torch_cuda="11.8", driver="550.54"),
            "Run: pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126",
        ),
    ],
)
def test_remedy_is_the_command_that_fits_the_machine(facts, remedy) -> None:
    assert fp8_remedy(facts) == remedy


@pytest.mark.parametrize(("facts", "instead"), [(A100, "bf16"), (T4, "fp16"), (CPU, "bf16")])
def test_remedy_without_a_command_names_what_this_device_can_run(facts, instead) -> None:
    assert fp8_remedy(facts).startswith(f'Use MixedPrecision("{instead}"), or run on Ada, Hopper or later. ')


def test_description_holds_every_fact_that_decides_fp8() -> None:
    text = describe_machine(replace(H200, torch_cuda="12.8"))
    for fact in ("cuda (H200)", "580.65.06", "9.0", "2.13.0, CUDA 12.8", "2.9.0", "current, delayed"):
        assert fact in text
    assert "block" in text
    assert "to get FP8" not in text


def test_description_of_a_machine_without_fp8_ends_with_the_remedy() -> None:
    lines = describe_machine(replace(H200, transformer_engine=MISSING)).splitlines()
    assert lines[-1].split("  ", 1)[0] == "to get FP8"
    assert lines[-1].endswith("'lightning-mp[fp8]'")


def test_facts_of_the_cpu_are_read() -> None:
    found = read_facts(torch.device("cpu"))
    assert (found.device_type, found.available, found.torch_cuda) == ("cpu", True, torch.version.cuda)
    assert found.torch_version == torch.__version__


def test_cpu_runs_both_16_bit_formats_and_no_fp8() -> None:
    cpu = torch.device("cpu")
    assert bf16_support(cpu).available
    assert fp16_support(cpu).available
    assert not fp8_support(cpu, ENGINE).available
    assert resolve_auto(cpu)[0] == "bf16"


def test_default_device_is_the_one_that_torch_has() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert default_device().type == expected


def test_driver_version_is_read_from_the_kernel_module(tmp_path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\nGCC 12.2.0\n")
    assert read_driver(file) == "570.124.06"
    assert read_driver(tmp_path / "missing") is None


def write_engine(folder, version: str | None) -> None:
    """Lay down what an installer lays down, with a package body that must not be imported."""
    (folder / "transformer_engine").mkdir()
    (folder / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('it was imported')\n")
    if version is not None:
        info = folder / f"transformer_engine-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.9.0", TransformerEngineFacts("2.9.0")),
        ("2.13.0+abc", TransformerEngineFacts("2.13.0+abc")),
        ("2.8.1", TransformerEngineFacts("2.8.1", "it is 2.8.1, and 2.9 or newer is needed")),
        (None, TransformerEngineFacts(None)),
    ],
)
def test_installed_transformer_engine_is_read_without_importing_it(version, expected, tmp_path, monkeypatch) -> None:
    write_engine(tmp_path, version)
    # The folder stands alone on the path, so that an engine of this machine is not seen.
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    assert read_transformer_engine() == expected


def test_missing_transformer_engine_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    assert read_transformer_engine() == MISSING


def test_machine_without_nvml_is_asked_through_cuda_instead() -> None:
    assert read_nvml("libnvml-that-is-not-there.so.1") == []


@pytest.mark.gpu
def test_reading_alike_gpus_leaves_cuda_uninitialized_so_that_notebooks_can_fork() -> None:
    code = """
import torch
from lightning_mp.hardware import read_facts
found = read_facts(torch.device("cuda"))
print(torch.cuda.is_initialized(), found.compute_capability)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    assert done.stdout.strip() == f"{len(names) > 1} {torch.cuda.get_device_capability()}"


@pytest.mark.gpu
def test_facts_of_a_gpu_are_what_torch_says() -> None:
    found = read_facts(torch.device("cuda"))
    assert found.device_name == torch.cuda.get_device_name()
    assert found.compute_capability == torch.cuda.get_device_capability()
    assert bf16_support(torch.device("cuda")).available is torch.cuda.is_bf16_supported(including_emulation=False)


@pytest.mark.fp8
def test_recipes_agree_with_transformer_engine_on_this_gpu() -> None:
    import transformer_engine.pytorch as te

    found = assess_recipes(read_facts(torch.device("cuda")))
    assert found["current"].available is te.is_fp8_available()
    assert found["block"].available is te.is_fp8_block_scaling_available()
    assert found["mxfp8"].available is te.is_mxfp8_available()
