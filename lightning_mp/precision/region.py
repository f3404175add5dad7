"""The regions that steps run in."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lightning_mp.casting import autocast_region, is_autocast_cache_safe
from lightning_mp.fp8 import FP8Engine
from lightning_mp.policy import PrecisionPolicy
from lightning_mp.precision.fp8 import FP8Region, tell_missing_history
from lightning_mp.precision.readings import StepReadings
from lightning_mp.precision.stepping import OptimizerStepper

__all__ = ["StepRegions", "TrainStepRegion"]


class TrainStepRegion:
    """Enter the autocast region, and tell when the step's batch is over.

    A plain class rather than a generator: entering and leaving cost a tenth.
    """

    __slots__ = ("_autocast", "_on_enter", "_on_exit")

    def __init__(
        self,
        autocast: AbstractContextManager[Any] | None,
        on_enter: Callable[[], None],
        on_exit: Callable[[bool], None],
    ) -> None:
        self._autocast = autocast
        self._on_enter = on_enter
        self._on_exit = on_exit

    def __enter__(self) -> None:
        self._on_enter()
        if self._autocast is not None:
            self._autocast.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._autocast is not None:
            self._autocast.__exit__(kind, error, trace)
        self._on_exit(error is None)


class StepRegions(StepReadings):
    """The part of the plugin that Lightning enters around ``training_step`` and its like."""

    policy: PrecisionPolicy
    _device: torch.device
    _stepper: OptimizerStepper
    _region: TrainStepRegion | None
    _fp8: FP8Engine | None
    _model: nn.Module | None

    @property
    def fp8_engine(self) -> FP8Engine | None:
        """What runs layers in FP8; ``None`` in other precisions."""
        return self._fp8

    def forward_context(self) -> AbstractContextManager[Any]:
        if self.policy.precision == "fp32":
            return nullcontext()
        region = autocast_region(self._device.type, self.policy.compute_dtype, cache_weights=False)
        if self._fp8 is not None and self._fp8.config.fp8_in_eval:
            # A fit, which has a model connected, evaluates before its first step too.
            if self._fp8.lacks_history and self._model is None:
                tell_missing_history()
            return FP8Region(region, self._fp8)
        return region

    def train_step_context(self) -> TrainStepRegion:
        if self._region is None or self._stepper.is_in_batch:
            self._region = self._new_region()
        return self._region

    def _new_region(self) -> TrainStepRegion:
        autocast: AbstractContextManager[Any] | None = None
        if self.policy.precision != "fp32":
            shared = self._stepper.shared_casts
            caches = is_autocast_cache_safe() if shared is None else shared.is_allowed
            autocast = autocast_region(self._device.type, self.policy.compute_dtype, cache_weights=caches)
            if self._fp8 is not None:
                autocast = FP8Region(autocast, self._fp8)
        return TrainStepRegion(autocast, self._stepper.enter_batch, self._stepper.exit_batch)

    def _drop_region(self) -> None:
        self._region = None

    def val_step_context(self) -> AbstractContextManager[Any]:
        self.settle()
        return self.forward_context()

    def test_step_context(self) -> AbstractContextManager[Any]:
        return self.forward_context()

    def predict_step_context(self) -> AbstractContextManager[Any]:
        return self.forward_context()

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_output(self, data: Any) -> Any:
        return data

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        return nullcontext()
