"""Which formats and FP8 recipes a device can run, decided from its facts alone."""

from dataclasses import dataclass
from typing import Literal

from lightning_mp.hardware.facts import DeviceFacts, version_numbers

__all__ = [
    "RECIPES",
    "Support",
    "assess_auto",
    "assess_bf16",
    "assess_fp8",
    "assess_fp8_device",
    "assess_fp16",
    "assess_recipes",
    "has_fp8_units",
    "is_cpu_build_beside_gpu",
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
    device = assess_fp8_device(facts)
    if not device.available:
        return device
    if facts.transformer_engine.error:
        return Support(False, f"Transformer Engine cannot be used: {facts.transformer_engine.error}")
    return device


def assess_fp8_device(facts: DeviceFacts) -> Support:
    """Decide whether GPU and torch build run FP8, before Transformer Engine is looked at."""
    if facts.device_type == "cuda" and facts.torch_hip is not None:
        return Support(False, f"torch is built for ROCm {facts.torch_hip}; {_NVIDIA_NEEDED}")
    if is_cpu_build_beside_gpu(facts):
        return Support(
            False, f"torch {facts.torch_version} is a CPU build, though NVIDIA driver {facts.driver} is installed"
        )
    if not facts.available or facts.compute_capability is None:
        return Support(
            False, f"{_absent(facts) if not facts.available else f'the device is {facts.label}'}; {_NVIDIA_NEEDED}"
        )
    if facts.compute_capability < _FP8_CAPABILITY:
        return Support(False, f"{_capability(facts)}; FP8 needs 8.9 or newer")
    if version_numbers(facts.torch_cuda) < _FP8_CUDA:
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


def has_fp8_units(facts: DeviceFacts) -> bool:
    """Tell whether the GPU itself has FP8 tensor cores, whatever software is installed."""
    return facts.compute_capability is not None and facts.compute_capability >= _FP8_CAPABILITY


def _assess_block(facts: DeviceFacts, capability: tuple[int, int]) -> Support:
    if capability < _BLOCK_CAPABILITY:
        return Support(False, f"{_capability(facts)}; block scaling needs 9.0 or newer")
    has_cuda = version_numbers(facts.torch_cuda) >= _BLOCK_CUDA
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


def is_cpu_build_beside_gpu(facts: DeviceFacts) -> bool:
    """Tell whether there is an NVIDIA driver that this build of torch does not use."""
    return facts.driver is not None and facts.torch_cuda is None and facts.torch_hip is None
