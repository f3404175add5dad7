"""Which module or parameter went non-finite: probes, replay of a batch, and attribution."""

from lightning_mp.overflow.attribution import Observation, find_culprit
from lightning_mp.overflow.event import Finding, OverflowEvent, OverflowPhase, describe_event
from lightning_mp.overflow.gradients import find_in_gradients
from lightning_mp.overflow.part import part_for
from lightning_mp.overflow.preserve import RandomState, eager
from lightning_mp.overflow.probes import ModuleCall, Probes
from lightning_mp.overflow.replay import copy_containers, replay
from lightning_mp.overflow.together import RanksPartedError, Together
from lightning_mp.overflow.written import KeptState, StateLostError, WrittenState

__all__ = [
    "Finding",
    "KeptState",
    "ModuleCall",
    "Observation",
    "OverflowEvent",
    "OverflowPhase",
    "Probes",
    "RandomState",
    "RanksPartedError",
    "StateLostError",
    "Together",
    "WrittenState",
    "copy_containers",
    "describe_event",
    "eager",
    "find_culprit",
    "find_in_gradients",
    "part_for",
    "replay",
]
