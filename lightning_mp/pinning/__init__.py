"""Softmax, norms, losses and chosen modules in FP32: parameters and compute."""

from lightning_mp.pinning.engine import PinnedModule, Pins
from lightning_mp.pinning.spec import PinSpec
from lightning_mp.pinning.watch import Observation, PinnedCall, PinReport

__all__ = ["Observation", "PinReport", "PinSpec", "PinnedCall", "PinnedModule", "Pins"]
