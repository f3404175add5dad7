"""What this machine can run, and why not.

``read_facts`` looks at the machine; everything else is a pure function of the frozen ``DeviceFacts``,
so that a machine which is not at hand can be described and tested.
"""

from typing import Literal

import torch

from lightning_mp.hardware.describe import describe_machine, fp8_remedy
from lightning_mp.hardware.facts import (
    DeviceFacts,
    TransformerEngineFacts,
    default_device,
    read_facts,
    read_transformer_engine,
)
from lightning_mp.hardware.support import (
    RECIPES,
    Support,
    assess_auto,
    assess_bf16,
    assess_fp8,
    assess_fp16,
    assess_recipes,
)

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
