"""The facts about a device, and the functions that read them from the machine."""

import ctypes
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = [
    "DeviceFacts",
    "TransformerEngineFacts",
    "default_device",
    "read_driver",
    "read_facts",
    "read_nvml",
    "read_transformer_engine",
    "version_numbers",
]

# 2.9 is the first release with te.autocast.
_MIN_TRANSFORMER_ENGINE = (2, 9)
_NVML_LIBRARY = "libnvidia-ml.so.1"
# NVML_DEVICE_NAME_V2_BUFFER_SIZE of nvml.h.
_NVML_NAME_SIZE = 96
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


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


def read_facts(device: torch.device, transformer_engine: TransformerEngineFacts | None = None) -> DeviceFacts:
    """Look at ``device``, without initializing CUDA where all NVIDIA GPUs of the machine are alike.

    After CUDA is initialized a process cannot fork workers, which is how Trainers start several GPUs
    from a notebook; a plugin made in a cell must not take that away.

    Args:
        device: Any torch device.
        transformer_engine: What an import of it showed, if one was tried; else what is installed.

    Returns:
        The facts that every decision here is made from.
    """
    found = read_transformer_engine() if transformer_engine is None else transformer_engine
    usable = device.type == "cuda" and torch.cuda.is_available()
    name, capability = _read_gpu(device) if usable else ("", None)
    has_mps = torch.backends.mps.is_available()
    return DeviceFacts(
        device_type=device.type,
        device_name=name,
        available=usable if device.type == "cuda" else has_mps if device.type == "mps" else True,
        compute_capability=capability,
        driver=read_driver(_DRIVER_FILE),
        torch_cuda=torch.version.cuda,
        torch_hip=torch.version.hip,
        has_mps_bf16=has_mps and torch.backends.mps.is_macos_or_newer(14, 0),
        transformer_engine=found,
    )


def _read_gpu(device: torch.device) -> tuple[str, tuple[int, int] | None]:
    if torch.version.hip is not None:
        return torch.cuda.get_device_name(device), None  # its numbers are not NVIDIA's
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gpus = set(read_nvml(_NVML_LIBRARY))
        if len(gpus) == 1:  # NVML counts in another order than CUDA, which is no matter where all are alike
            return gpus.pop()
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


def read_nvml(library: str) -> list[tuple[str, tuple[int, int]]]:
    """Return name and compute capability of each GPU, or nothing where NVML does not answer."""
    try:
        nvml = ctypes.CDLL(library)
    except OSError:  # not on this system: the caller asks CUDA instead
        return []
    num_gpus = ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(num_gpus)):
        return []
    return [gpu for index in range(num_gpus.value) for gpu in _read_nvml_gpu(nvml, index)]


def _read_nvml_gpu(nvml: ctypes.CDLL, index: int) -> list[tuple[str, tuple[int, int]]]:
    handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NVML_NAME_SIZE)
    failed = (
        nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
        or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        or nvml.nvmlDeviceGetName(handle, name, _NVML_NAME_SIZE)
    )
    return [] if failed else [(name.value.decode(), (major.value, minor.value))]


def read_driver(path: Path) -> str | None:
    """Return the driver's version from the file of its kernel module, ``None`` without one."""
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
    if version_numbers(version) < _MIN_TRANSFORMER_ENGINE:
        return TransformerEngineFacts(version, f"it is {version}, and 2.9 or newer is needed")
    return TransformerEngineFacts(version)


def version_numbers(version: str | None) -> tuple[int, ...]:
    """Return the first two numbers of a version, so that versions compare as tuples."""
    return tuple(int(number) for number in re.findall(r"\d+", version or "")[:2])
