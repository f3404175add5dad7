"""What this machine can run, and why not.

``read_facts`` looks at the machine; everything else is a pure function of the frozen ``DeviceFacts``,
so that a machine which is not at hand can be described and tested.
"""

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

__all__ = [
    "RECIPES",
    "DeviceFacts",
    "Support",
    "TransformerEngineFacts",
    "assess_auto",
    "assess_bf16",
    "assess_fp8",
    "assess_fp16",
    "assess_recipes",
    "bf16_support",
    "default_device",
    "describe_machine",
    "fp8_remedy",
    "fp8_support",
    "fp16_support",
    "read_facts",
    "read_transformer_engine",
    "resolve_auto",
]

RECIPES = ("current", "delayed", "block", "mxfp8", "nvfp4")

# Where each unit first appeared: BF16 tensor cores in Ampere, FP8 in Ada, FP8 block scaling in
# Hopper, MXFP8 and NVFP4 in Blackwell. CUDA versions, and MXFP8's end at 12.0: the checks of
# Transformer Engine 2.9 to 2.20 (transformer_engine/pytorch/quantization.py).
_BF16_CAPABILITY = (8, 0)
_TENSOR_CORE_CAPABILITY = (7, 0)
_FP8_CAPABILITY = (8, 9)
_BLOCK_CAPABILITY = (9, 0)
_BLACKWELL_CAPABILITY = (10, 0)
_MXFP8_END = (12, 0)
_FP8_CUDA = (12, 1)
_BLOCK_CUDA = (12, 9)
# 2.9 is the first release with te.autocast.
_MIN_TRANSFORMER_ENGINE = (2, 9)
# The first drivers that run CUDA 13 and CUDA 12.8 (CUDA toolkit release notes).
_CUDA_13_DRIVER = 580
_CUDA_12_8_DRIVER = 570
_DRIVER_FILE = Path("/proc/driver/nvidia/version")

_NVIDIA_NEEDED = "FP8 needs an NVIDIA GPU of compute capability 8.9 or newer (Ada, Hopper or later)"


@dataclass(frozen=True)
class Support:
    """Whether something runs, and why.

    Args:
        available: Whether it runs.
        reason: A clause that reads well after "but" or "because", without a full stop.
    """

    available: bool
    reason: str


@dataclass(frozen=True)
class TransformerEngineFacts:
    """What is known of the installed Transformer Engine.

    Args:
        version: Its version, or ``None`` if it is not installed or does not say.
        error: Why it cannot be used, or the empty string.
    """

    version: str | None
    error: str = ""


@dataclass(frozen=True)
class DeviceFacts:
    """What decides which formats a device can run.

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ``"mps"`` or another torch device type.
        device_name: What the vendor calls it.
        available: Whether torch can use a device of this type.
        compute_capability: Of an NVIDIA GPU, such as ``(9, 0)``.
        driver: Version of the NVIDIA driver, also where torch cannot use it.
        torch_version: Version of torch.
        torch_cuda: CUDA version that torch was built with.
        torch_hip: ROCm version that torch was built with.
        has_mps_bf16: Whether Metal has BF16, which came with macOS 14.
        transformer_engine: What is known of Transformer Engine.
    """

    device_type: str
    device_name: str = ""
    available: bool = True
    compute_capability: tuple[int, int] | None = None
    driver: str | None = None
    torch_version: str = torch.__version__
    torch_cuda: str | None = None
    torch_hip: str | None = None
    has_mps_bf16: bool = False
    transformer_engine: TransformerEngineFacts = TransformerEngineFacts(None, "it is not installed")

    @property
    def label(self) -> str:
        """The device in words, for reports and errors."""
        return f"{self.device_type} ({self.device_name})" if self.device_name else self.device_type


def default_device() -> torch.device:
    """Return the device that a Trainer picks: CUDA, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def bf16_support(device: torch.device) -> Support:
    """Tell whether ``device`` computes in BF16 with its own units; emulation on old GPUs does not count."""
    return assess_bf16(read_facts(device))


def fp16_support(device: torch.device) -> Support:
    """Tell whether ``device`` computes in FP16, and how well."""
    return assess_fp16(read_facts(device))


def fp8_support(device: torch.device, transformer_engine: TransformerEngineFacts | None = None) -> Support:
    """Tell whether ``device`` runs FP8 matrix products through Transformer Engine.

    Args:
        device: Device of the model.
        transformer_engine: What an import of it showed, if one was tried; else what is installed.
    """
    return assess_fp8(read_facts(device, transformer_engine))


def resolve_auto(device: torch.device) -> tuple[Literal["bf16", "fp16"], str]:
    """Choose what ``precision="auto"`` means on ``device``, with the reason; never FP8."""
    return assess_auto(read_facts(device))


def read_facts(device: torch.device, transformer_engine: TransformerEngineFacts | None = None) -> DeviceFacts:
    """Look at ``device``; a GPU's capability is only known once CUDA is initialized, which this does.

    Args:
        device: Any torch device.
        transformer_engine: What an import of it showed, if one was tried; else what is installed.

    Returns:
        The facts that every decision here is made from.
    """
    found = read_transformer_engine() if transformer_engine is None else transformer_engine
    usable = device.type == "cuda" and torch.cuda.is_available()
    has_mps = torch.backends.mps.is_available()
    return DeviceFacts(
        device_type=device.type,
        device_name=torch.cuda.get_device_name(device) if usable else "",
        available=usable if device.type == "cuda" else has_mps if device.type == "mps" else True,
        compute_capability=torch.cuda.get_device_capability(device) if usable and not torch.version.hip else None,
        driver=_read_driver(_DRIVER_FILE),
        torch_cuda=torch.version.cuda,
        torch_hip=torch.version.hip,
        has_mps_bf16=has_mps and torch.backends.mps.is_macos_or_newer(14, 0),
        transformer_engine=found,
    )


def _read_driver(path: Path) -> str | None:
    if not path.exists():
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", path.read_text())
    return found.group() if found else "unknown"


def read_transformer_engine() -> TransformerEngineFacts:
    """Look whether Transformer Engine is installed and new enough, without importing it."""
    if importlib.util.find_spec("transformer_engine") is None:
        return TransformerEngineFacts(None, "it is not installed")
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return TransformerEngineFacts(None)  # a source tree on the path; its import will tell
    if _numbers(version) < _MIN_TRANSFORMER_ENGINE:
        return TransformerEngineFacts(version, f"it is {version}, and 2.9 or newer is needed")
    return TransformerEngineFacts(version)


def _numbers(version: str | None) -> tuple[int, ...]:
    """Return the first two numbers of a version, so that versions compare as tuples."""
    return tuple(int(number) for number in re.findall(r"\d+", version or "")[:2])


def assess_bf16(facts: DeviceFacts) -> Support:
    """Decide whether the device computes in BF16 natively."""
    if not facts.available:
        return Support(False, _absent(facts))
    if facts.device_type == "cpu":
        return Support(True, "CPUs compute in BF16, in software where there are no instructions for it")
    if facts.device_type == "mps":
        return Support(facts.has_mps_bf16, f"BF16 on MPS {'came with' if facts.has_mps_bf16 else 'needs'} macOS 14")
    if facts.device_type != "cuda":
        return Support(False, _unknown_type(facts))
    if facts.torch_hip is not None or facts.compute_capability is None:
        return Support(True, f"{facts.label} computes in BF16 under ROCm")
    if facts.compute_capability < _BF16_CAPABILITY:
        return Support(False, f"{_capability(facts)}; BF16 needs 8.0 or newer (Ampere)")
    return Support(True, f"{_capability(facts)}, which has BF16 tensor cores")


def assess_fp16(facts: DeviceFacts) -> Support:
    """Decide whether the device computes in FP16."""
    if not facts.available:
        return Support(False, _absent(facts))
    if facts.device_type == "cpu":
        return Support(True, "CPUs compute in FP16, hundreds of times slower than in FP32: fit for tests only")
    if facts.device_type not in ("cuda", "mps"):
        return Support(False, _unknown_type(facts))
    if facts.compute_capability is not None and facts.compute_capability < _TENSOR_CORE_CAPABILITY:
        return Support(
            True, f"{_capability(facts)}, without FP16 tensor cores (they came with 7.0): it saves memory only"
        )
    return Support(True, f"{facts.label} computes in FP16")


def assess_auto(facts: DeviceFacts) -> tuple[Literal["bf16", "fp16"], str]:
    """Choose BF16 where the device has it, else FP16."""
    bf16 = assess_bf16(facts)
    return ("bf16" if bf16.available else "fp16"), bf16.reason


def assess_fp8(facts: DeviceFacts) -> Support:
    """Decide whether FP8 runs through Transformer Engine: device, then torch, then the library."""
    device = _assess_fp8_device(facts)
    if not device.available:
        return device
    if facts.transformer_engine.error:
        return Support(False, f"Transformer Engine cannot be used: {facts.transformer_engine.error}")
    return device


def _assess_fp8_device(facts: DeviceFacts) -> Support:
    if facts.device_type == "cuda" and facts.torch_hip is not None:
        return Support(False, f"torch is built for ROCm {facts.torch_hip}; {_NVIDIA_NEEDED}")
    if _is_cpu_build_beside_gpu(facts):
        return Support(
            False, f"torch {facts.torch_version} is a CPU build, though NVIDIA driver {facts.driver} is installed"
        )
    if not facts.available or facts.compute_capability is None:
        return Support(
            False, f"{_absent(facts) if not facts.available else f'the device is {facts.label}'}; {_NVIDIA_NEEDED}"
        )
    if facts.compute_capability < _FP8_CAPABILITY:
        return Support(False, f"{_capability(facts)}; FP8 needs 8.9 or newer")
    if _numbers(facts.torch_cuda) < _FP8_CUDA:
        return Support(
            False, f"torch {facts.torch_version} is built with CUDA {facts.torch_cuda}; FP8 needs 12.1 or newer"
        )
    return Support(True, f"{_capability(facts)}, which has FP8 tensor cores")


def assess_recipes(facts: DeviceFacts) -> dict[str, Support]:
    """Decide for each recipe whether Transformer Engine runs it on this device."""
    fp8 = assess_fp8(facts)
    capability = facts.compute_capability
    if not fp8.available or capability is None:
        return dict.fromkeys(RECIPES, fp8)
    return {
        "current": fp8,
        "delayed": fp8,
        "block": _assess_block(facts, capability),
        "mxfp8": _assess_mxfp8(facts, capability),
        "nvfp4": Support(capability >= _BLACKWELL_CAPABILITY, f"{_capability(facts)}; NVFP4 needs 10.0 or newer"),
    }


def _assess_block(facts: DeviceFacts, capability: tuple[int, int]) -> Support:
    if capability < _BLOCK_CAPABILITY:
        return Support(False, f"{_capability(facts)}; block scaling needs 9.0 or newer")
    has_cuda = _numbers(facts.torch_cuda) >= _BLOCK_CUDA
    return Support(has_cuda, f"torch is built with CUDA {facts.torch_cuda}; block scaling needs 12.9 or newer")


def _assess_mxfp8(facts: DeviceFacts, capability: tuple[int, int]) -> Support:
    fits = _BLACKWELL_CAPABILITY <= capability < _MXFP8_END
    return Support(fits, f"{_capability(facts)}; MXFP8 needs 10.0 or newer, below 12.0")


def _absent(facts: DeviceFacts) -> str:
    return f"torch {facts.torch_version} finds no {facts.device_type} device"


def _unknown_type(facts: DeviceFacts) -> str:
    return f"the device type is {facts.device_type!r}; cpu, cuda and mps are supported"


def _capability(facts: DeviceFacts) -> str:
    major, minor = facts.compute_capability or (0, 0)
    return f"this device has compute capability {major}.{minor}"


def _is_cpu_build_beside_gpu(facts: DeviceFacts) -> bool:
    return facts.driver is not None and facts.torch_cuda is None and facts.torch_hip is None


def fp8_remedy(facts: DeviceFacts) -> str:
    """Say what to do to get FP8 on this machine: a command where one helps, else the alternative.

    Returns:
        One or two sentences; empty if FP8 runs.
    """
    if assess_fp8(facts).available:
        return ""
    if _is_cpu_build_beside_gpu(facts):
        return f"Run: {_torch_command(facts)} && {_engine_command(_numbers(_cuda_for(facts)))}"
    if _assess_fp8_device(facts).available:
        return f"Run: {_engine_command(_numbers(facts.torch_cuda))}"
    if facts.compute_capability is not None and facts.compute_capability >= _FP8_CAPABILITY:
        return f"Run: {_torch_command(facts)}"
    return (
        f'Use MixedPrecision("{assess_auto(facts)[0]}"), or run on Ada, Hopper or later. '
        'MixedPrecision("fp8", fp8={"backend": "emulated"}) computes the same recipe here, slowly.'
    )


def _cuda_for(facts: DeviceFacts) -> str:
    """Return the newest CUDA version that this driver runs and torch has a wheel index for."""
    driver = (_numbers(facts.driver) or (0,))[0]
    if driver >= _CUDA_13_DRIVER:
        return "13.0"
    return "12.8" if driver >= _CUDA_12_8_DRIVER else "12.6"


def _torch_command(facts: DeviceFacts) -> str:
    index = f"https://download.pytorch.org/whl/cu{_cuda_for(facts).replace('.', '')}"
    return f"pip install --force-reinstall torch --index-url {index}"


def _engine_command(cuda: tuple[int, ...]) -> str:
    # Its PyTorch part is compiled against the installed torch, hence no build isolation. Its default
    # core library is for CUDA 12.
    core = " 'transformer-engine[core_cu13]'" if cuda >= (13,) else ""
    return f"pip install --upgrade --no-build-isolation 'lightning-mp[fp8]'{core}"


def describe_machine(facts: DeviceFacts) -> str:
    """Write what the machine can run, why not, and what to do, as aligned lines of text.

    ``lightning-mp doctor`` prints it and the error of ``precision="fp8"`` ends with it.
    """
    chosen, reason = assess_auto(facts)
    capability = facts.compute_capability
    rows = [
        ("device", facts.label),
        ("driver", facts.driver or ("unknown" if capability else "no NVIDIA driver found")),
        ("compute capability", f"{capability[0]}.{capability[1]}" if capability else "none"),
        ("PyTorch", f"{facts.torch_version}, {_build(facts)}"),
        ("Transformer Engine", _engine(facts.transformer_engine)),
        ("FP16", _verdict(assess_fp16(facts))),
        ("BF16", _verdict(assess_bf16(facts))),
        ("FP8", _verdict(assess_fp8(facts))),
        *_recipe_rows(facts),
        ('precision="auto"', f"{chosen}, because {reason}"),
    ]
    remedy = fp8_remedy(facts)
    if remedy:
        rows.append(("to get FP8", remedy))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _recipe_rows(facts: DeviceFacts) -> list[tuple[str, str]]:
    recipes = assess_recipes(facts)
    available = [name for name, support in recipes.items() if support.available]
    rows = [("FP8 recipes", ", ".join(available) or "none")]
    if available:
        rows += [(f"  {name}", _verdict(support)) for name, support in recipes.items() if not support.available]
    return rows


def _build(facts: DeviceFacts) -> str:
    if facts.torch_cuda is not None:
        return f"CUDA {facts.torch_cuda}"
    return f"ROCm {facts.torch_hip}" if facts.torch_hip is not None else "CPU build"


def _engine(engine: TransformerEngineFacts) -> str:
    if engine.error:
        return f"cannot be used: {engine.error}"
    return engine.version or "installed, version unknown"


def _verdict(support: Support) -> str:
    return f"{'yes' if support.available else 'no'}: {support.reason}"
