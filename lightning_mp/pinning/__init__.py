"""Softmax, norms, losses and chosen modules in FP32: parameters and compute."""

from lightning_mp.pinning.engine import PinnedModule, PinReport, Pins, PinSpec
from lightning_mp.pinning.watch import Observation, PinnedCall

__all__ = ["Observation", "PinReport", "PinSpec", "PinnedCall", "PinnedModule", "Pins"]
