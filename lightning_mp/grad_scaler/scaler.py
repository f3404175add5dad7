"""The loss scale as a ``torch.amp.GradScaler``: a rule's state in tensors, updated in place."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mp.grad_scaler.readback import Readback
from lightning_mp.loss_scale import DynamicLossScale, LossScaleRule, LossScaleState

__all__ = ["LossScaler", "StepDriver"]


class StepDriver(Protocol):
    """Unscales, steps and moves the scale on its own, and is to hear what user code does through the scaler."""

    def before_scaled_backward(self, loss: Tensor) -> None:
        """Hear, inside of a backward, that it is one of ``loss`` times the scale."""

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, once."""


class LossScaler(torch.amp.GradScaler):
    """A ``torch.amp.GradScaler`` whose scale follows a rule of ``loss_scale``.

    The scale and its counters live in 0-dim tensors on the device of the loss and are updated there. While
    a ``driver`` is set, torch's recipe by hand (``scale``, ``unscale_``, ``step``, ``update``) goes through it.

    Args:
        rule: ``DynamicLossScale`` or ``StaticLossScale``.
        device_type: Device type of the loss, such as ``"cuda"``.
    """

    def __init__(self, rule: LossScaleRule, device_type: str = "cpu") -> None:
        # The base class disables itself, with a warning, when CUDA is asked for and absent; the
        # device is only known later here, and nothing but that check reads it.
        super().__init__(device="cpu", init_scale=rule.init_scale)
        self._device = device_type
        self._hysteresis_tracker: Tensor | None = None
        self._init_hysteresis = 1
        self.driver: StepDriver | None = None
        self._set_rule(rule)
        self._set_state(rule.initial_state())

    @property
    def rule(self) -> LossScaleRule:
        """The rule that the scale follows."""
        return self._rule

    @property
    def is_dynamic(self) -> bool:
        """Whether an overflow lowers the scale."""
        return isinstance(self._rule, DynamicLossScale)

    def _set_rule(self, rule: LossScaleRule) -> None:
        self._rule = rule
        if isinstance(rule, DynamicLossScale):
            self._growth_factor = rule.growth_factor
            self._backoff_factor = rule.backoff_factor
            self._growth_interval = rule.growth_interval
        else:
            self._growth_factor = self._backoff_factor = 1.0

    def _set_state(self, state: LossScaleState) -> None:
        self._init_scale = float(state.scale)
        self._init_growth_tracker = int(state.growth_tracker)
        self._init_hysteresis = int(state.hysteresis_left)
        self._scale = None
        self._growth_tracker = None
        self._hysteresis_tracker = None

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        super()._lazy_init_scale_growth_tracker(dev)
        self._hysteresis_tracker = torch.full((), self._init_hysteresis, dtype=torch.int32, device=dev)

    def scale_tensor(self, device: torch.device) -> Tensor:
        """Return the scale as the 0-dim FP32 tensor that is updated in place."""
        return self._tensors(device)[0]

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if self._scale is None or self._growth_tracker is None or self._hysteresis_tracker is None:
            self._lazy_init_scale_growth_tracker(device)
            return self._tensors(device)
        return self._scale, self._growth_tracker, self._hysteresis_tracker

    @property
    def state(self) -> LossScaleState:
        """The scale and its counters as numbers. Reads the device once the first loss was scaled."""
        if self._scale is None:
            return LossScaleState(self._init_scale, self._init_growth_tracker, self._init_hysteresis)
        scale, tracker, left = Readback.read(torch.stack([v.float() for v in self._tensors(self._scale.device)]))
        return LossScaleState(scale, int(tracker), int(left))

    def restore(self, rule: LossScaleRule, state: LossScaleState) -> None:
        """Continue with ``rule`` from ``state``, as after loading a checkpoint."""
        self._set_rule(rule)
        self._set_state(state)
        self._per_optimizer_states.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "driver": None}

    def multiply(self, loss: Tensor) -> Tensor:
        """Return ``loss`` times the scale, of which the driver knows itself."""
        return super().scale(loss)

    def scale(self, outputs: Any) -> Any:
        """Return the outputs times the scale; their backward is announced to the driver, if there is one.

        Args:
            outputs: A tensor, or an iterable of them, as for ``torch.amp.GradScaler.scale``.
        """
        if self.driver is None:
            return super().scale(outputs)
        if isinstance(outputs, Iterable) and not isinstance(outputs, Tensor):
            scaled = map(self.scale, outputs)
            return type(outputs)(scaled) if isinstance(outputs, (list, tuple)) else scaled
        return _announced(super().scale(outputs), outputs, self.driver.before_scaled_backward)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, as ``torch.amp.GradScaler.unscale_``.

        While there is a driver a second call changes nothing.
        """
        if self.driver is None:
            super().unscale_(optimizer)
        else:
            self.driver.unscale_gradients(optimizer)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step the optimizer unless a gradient is not finite: the driver's part, where there is one."""
        if self.driver is None:
            return super().step(optimizer, *args, **kwargs)
        return optimizer.step(*args, **kwargs)

    def update_(self, found_inf: Tensor) -> None:
        """Move the scale to the next step's, in place and on its device.

        Args:
            found_inf: 0-dim FP32 tensor, nonzero if any gradient of the step was non-finite.
        """
        rule = self._rule
        if not isinstance(rule, DynamicLossScale):
            return
        scale, tracker, left = self._tensors(found_inf.device)
        found_inf = found_inf.to(scale.device, non_blocking=True)
        if rule.hysteresis == 1:
            # torch's fused kernel is this rule exactly while no overflow is forgiven.
            torch._amp_update_scale_(
                scale, tracker, found_inf, rule.growth_factor, rule.backoff_factor, rule.growth_interval
            )
            scale.clamp_(rule.min_scale, rule.max_scale)
            return
        following = rule.next(LossScaleState(scale, tracker, left), found_inf=found_inf)
        for tensor, value in zip(
            (scale, tracker, left),
            (following.scale, following.growth_tracker, following.hysteresis_left),
            strict=True,
        ):
            tensor.copy_(torch.as_tensor(value))

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Set ``new_scale``, or follow the rule for optimizers stepped through this object.

        A driver calls ``update_`` itself; this is for code that drives a ``GradScaler`` by hand.
        """
        if new_scale is not None:
            super().update(new_scale)
            return
        found = [t for s in self._per_optimizer_states.values() for t in s["found_inf_per_device"].values()]
        self._per_optimizer_states.clear()
        if found:
            self.update_(torch.stack([t.to(found[0].device) for t in found]).amax())

    def set_growth_factor(self, new_factor: float) -> None:
        """Refuse: a rule is a frozen value."""
        self._refuse_set("growth_factor", new_factor)

    def set_backoff_factor(self, new_factor: float) -> None:
        """Refuse: a rule is a frozen value."""
        self._refuse_set("backoff_factor", new_factor)

    def set_growth_interval(self, new_interval: int) -> None:
        """Refuse: a rule is a frozen value."""
        self._refuse_set("growth_interval", new_interval)

    def _refuse_set(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"{name} cannot be set to {value!r} on the scaler: its rule is a frozen value. "
            f"Pass MixedPrecision('fp16', loss_scale={{'{name}': {value!r}}}) instead."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the keys of ``torch.amp.GradScaler``, so that either class loads the other's."""
        state = self.state
        return {
            "scale": float(state.scale),
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": int(state.growth_tracker),
        }


def _announced(scaled: Tensor, loss: Tensor, announce: Callable[[Tensor], None]) -> Tensor:
    """Let the backward of ``scaled`` call ``announce`` with ``loss`` before it reaches anything else."""
    if scaled.requires_grad:
        loss = loss.detach()
        scaled.register_hook(lambda _: announce(loss))  # type: ignore[no-untyped-call]
    return scaled
