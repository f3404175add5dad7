"""``MixedPrecision``, the Precision plugin: it orders the hooks and leaves the numerics to the engines."""

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import FSDPPrecision
from torch import nn
from torch.optim import Optimizer

from lightning_mp.errors import LightningMPError, SettingValueError, UnsupportedError
from lightning_mp.fp8 import FP8Config
from lightning_mp.grad_scaler import LossScaler
from lightning_mp.hardware import bf16_support, default_device, resolve_auto
from lightning_mp.loss_scale import DynamicLossScale, StaticLossScale
from lightning_mp.master_weights import MasterWeights
from lightning_mp.policy import PrecisionPolicy
from lightning_mp.precision.checkpoint import (
    LEGACY_KEYS,
    dump_state,
    restore_ledger,
    restore_scaler,
    saved_fp8,
    saved_precision,
)
from lightning_mp.precision.checks import check_optimizers, check_parameters, check_strategy
from lightning_mp.precision.culprit import first_nonfinite_parameter
from lightning_mp.precision.dtype_hint import add_dtype_hint
from lightning_mp.precision.fp8 import add_fp8_hint, convert_to_fp8, fp8_reasons, new_fp8_engine
from lightning_mp.precision.manifest import ManifestRow, build_manifest
from lightning_mp.precision.masters import (
    attach_masters,
    check_averaging,
    convert_to_masters,
    new_masters,
)
from lightning_mp.precision.notices import notice, notice_once
from lightning_mp.precision.ranks import compress_reduction, is_sharded
from lightning_mp.precision.schedulers import SchedulerHold, hold_schedulers, take_back
from lightning_mp.precision.shared_casts import SharedCasts
from lightning_mp.precision.stepping import OptimizerStepper
from lightning_mp.precision.steps import Attempt, StepLedger
from lightning_mp.precision.training import TrainingHooks

__all__ = ["MixedPrecision", "ModulePin"]


class ModulePin(Protocol):
    """What ``register_pin`` takes: something that keeps modules in FP32 between setup and teardown."""

    def apply_(self, module: nn.Module) -> None:
        """Pin what matches, in place, before anything is cast."""

    def undo_(self) -> None:
        """Leave the module as it was before ``apply_``."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that stay in FP32."""

    @property
    def modules(self) -> Mapping[str, object]:
        """The pinned modules by full dotted name."""


class MixedPrecision(TrainingHooks, FSDPPrecision):  # type: ignore[misc]  # Lightning types its contexts as generators
    """Train in mixed precision: ``Trainer(plugins=[MixedPrecision("bf16")])``.

    All arguments take plain types, so that a LightningCLI YAML file can set them.

    Args:
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, or ``"auto"`` (BF16 where the device has it,
            else FP16), ``"fp8"``; Lightning's names such as ``"16-mixed"`` are accepted too.
        loss_scale: ``None`` (dynamic for FP16, none otherwise), ``"dynamic"``, a number (static), a
            rule, or a dict of the rule's fields.
        master_weights: Where the FP32 values live that the optimizer updates. ``"params"``: in the
            parameters themselves. ``"copy"``: in an FP32 copy beside 16-bit parameters. ``"split"``:
            in BF16 parameters and 16 further bits, exactly. ``"none"``: nowhere.
        fp8: Settings of the FP8 path, a dict of ``FP8Config``'s fields or one; only with
            ``precision="fp8"``.
        reduce_dtype: Dtype in which DDP reduces gradients: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        on_nonfinite: What happens to a step with Inf or NaN gradients, in any precision: ``"skip"``,
            ``"raise"`` or ``"ignore"``. Under a dynamic loss scale an overflow of scaled gradients is
            always skipped, and this speaks of a non-finite unscaled loss only.
        hold_schedulers: Whether step-interval LR schedulers wait for applied steps.
        device: Device type such as ``"cuda"``; ``None`` follows the Trainer.

    Raises:
        SettingTypeError: If an argument has a type that is not allowed.
        SettingValueError: If an argument is not known, or two exclude each other.

    Note:
        In FP16, ``on_before_backward`` and ``on_after_backward`` see the scaled loss and gradients;
        ``on_before_optimizer_step`` and clipping see unscaled ones. ``Trainer.global_step`` counts
        attempts, skipped steps included; ``applied_steps`` counts updates.
    """

    def __init__(
        self,
        precision: str | int,
        *,
        loss_scale: DynamicLossScale | StaticLossScale | str | float | dict[str, Any] | None = None,
        master_weights: str = "params",
        fp8: FP8Config | dict[str, Any] | None = None,
        reduce_dtype: str = "fp32",
        on_nonfinite: str = "skip",
        hold_schedulers: bool = True,
        device: str | None = None,
    ) -> None:
        # In the annotations classes stand before dict, which would take their class_path for a key in YAML.
        # FSDPPrecision.__init__ is left out: it accepts other names and builds its own scaler. This
        # class derives from it only because FSDPStrategy takes nothing else.
        asked = PrecisionPolicy.parse(
            precision,
            loss_scale=loss_scale,
            master_weights=master_weights,
            fp8=fp8,
            reduce_dtype=reduce_dtype,
            on_nonfinite=on_nonfinite,
            hold_schedulers=hold_schedulers,
            device=device,
        )
        self._asked = asked
        self._module_ref: Callable[[], LightningModule | None] = _no_module
        self._holds: list[SchedulerHold] = []
        self._handles: list[Any] = []
        self._model: nn.Module | None = None
        self._held_states: list[list[int]] = []
        self._is_first_step = True
        self._pins: list[ModulePin] = []
        self._applied_pins: list[ModulePin] = []
        self._masters: MasterWeights | None = None
        self._fp8 = new_fp8_engine(asked)
        self.scaler: LossScaler | None = None  # type: ignore[assignment]
        self._ledger = StepLedger(None, asked.on_nonfinite)
        self._resolve(torch.device(asked.device) if asked.device else default_device())

    # --- What users read -------------------------------------------------------------------------

    @property
    def _module(self) -> LightningModule | None:
        """The model set up last, as long as anybody else holds it: a plugin kept for its counts frees the memory."""
        return self._module_ref()

    def __getstate__(self) -> dict[str, Any]:
        # A copy, as that of a launcher, belongs to no model until it trains one.
        return {**self.__dict__, "_module_ref": _no_module}

    @property
    def next_step(self) -> int:
        """The ``step`` that the next optimizer step's report will have; reading it waits for nothing."""
        if not self._is_first_step:
            return self._ledger.attempts
        trainer = getattr(self._module, "_trainer", None)
        return self._ledger.attempts if trainer is None else int(trainer.global_step)

    def manifest(self) -> list[ManifestRow]:
        """Return which module computes in what, as of now, one frozen row per module with parameters.

        Of FP8, which ends with a run, the rows say after it what the last run did.

        Raises:
            UnsupportedError: If no model was set up yet.
        """
        module = self._module
        if module is None:
            raise UnsupportedError(
                "manifest() needs a model: call it after Trainer.fit or validate has set one up, while it is in use."
            )
        return build_manifest(
            module,
            self.policy,
            pinned=frozenset(fqn for pin in self._applied_pins for fqn in pin.modules),
            fp8_reasons={} if self._fp8 is None else fp8_reasons(self._fp8),
        )

    def fp32_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Return ``module.state_dict()`` with floating-point weights in full precision."""
        self._ledger.settle_for_reading()
        if self._masters is not None:
            return self._masters.fp32_state_dict(module)
        state: dict[str, Any] = module.state_dict()
        return state

    def register_pin(self, pin: ModulePin) -> None:
        """Apply ``pin`` when the next model is set up, and undo and forget it at teardown. Twice is once."""
        if pin not in self._pins:
            self._pins.append(pin)

    def unrecorded(self) -> AbstractContextManager[None]:
        """Return a context for a forward and backward beside training, which FP8 statistics then do not see."""
        return nullcontext() if self._fp8 is None else self._fp8.unrecorded()

    # --- Setup and teardown ----------------------------------------------------------------------

    def _resolve(self, device: torch.device) -> None:
        """Settle what depends on the device: the precision that "auto" stands for, and the scaler."""
        policy = self._asked
        self._auto_reason = ""
        if policy.precision == "auto":
            chosen, self._auto_reason = resolve_auto(device)
            policy = policy.resolve(chosen)
        self._device = device
        self.policy = policy
        self.precision = policy.lightning_precision  # type: ignore[assignment]
        self._desired_input_dtype = torch.float32
        rule = policy.active_loss_scale
        if rule is None:
            self.scaler = None
        elif self.scaler is None:
            self.scaler = LossScaler(rule, device.type)
        self._ledger.rule = self.scaler.rule if self.scaler is not None else None
        self._stepper = OptimizerStepper(self.scaler, self._ledger, on_nonfinite=policy.on_nonfinite)
        self._region = None

    def convert_module(self, module: nn.Module) -> nn.Module:
        trainer = getattr(module, "_trainer", None)
        self._module_ref = weakref.ref(module) if isinstance(module, LightningModule) else _no_module
        if trainer is not None:
            check_strategy(trainer.strategy, self._asked)
            self._resolve(self._check_device(trainer.strategy.root_device))
            self._say_what_runs()
        check_parameters(module, self.policy, is_fit=trainer is None or trainer.state.fn == "fit")
        for pin in self._pins:
            pin.apply_(module)
            self._applied_pins.append(pin)
        if self._fp8 is not None:
            convert_to_fp8(self._fp8, module, self._pinned_parameters())
        self._convert_to_masters(module, trainer)
        return module

    def _convert_to_masters(self, module: nn.Module, trainer: Any) -> None:
        if self.policy.master_weights == "params":
            return
        if trainer is not None and trainer.state.fn == "fit":
            check_averaging(trainer.callbacks, self.policy)
        self._masters = self._masters or new_masters(self.policy)
        if self._masters is not None:
            convert_to_masters(self._masters, module, self._pinned_parameters())
            if self._fp8 is not None and self._masters.mode != "none":
                self._fp8.take_weights_from(self._masters.value_of)

    def _pinned_parameters(self) -> list[nn.Parameter]:
        return [p for pin in self._applied_pins for p in pin.parameters()]

    def _check_device(self, device: torch.device) -> torch.device:
        if self._asked.device is not None and self._asked.device != device.type:
            raise SettingValueError(
                f"device={self._asked.device!r} is set, and the Trainer runs on {device.type!r}. "
                "Remove device, or set Trainer(accelerator=...) to match."
            )
        if self._asked.precision in ("bf16", "fp8"):
            support = bf16_support(device)
            if not support.available:
                raise UnsupportedError(
                    f"precision={self._asked.precision!r}, but {support.reason}. Use MixedPrecision('fp16') or 'auto'."
                )
        if self._fp8 is not None:
            self._fp8.check_available(device)
        return device

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        # Lightning enters it before configure_model: the first moment at which a missing device can be told.
        if self._fp8 is not None:
            self._fp8.check_available(self._device)
        return nullcontext()

    def _say_what_runs(self) -> None:
        if self.policy.precision == "fp16" and self._device.type == "cpu":
            notice_once("precision='fp16' on a CPU is exact but very slow: CPUs have no fast FP16 matrix product.")
        rule = self.scaler.rule if self.scaler is not None else None
        chosen = f" (chosen by 'auto': {self._auto_reason})" if self._auto_reason else ""
        notice(
            f"precision={self.policy.precision!r}{chosen} on {self._device.type}, "
            f"master_weights={self.policy.master_weights!r}, loss scale {rule or 'none'}, "
            f"on_nonfinite={self.policy.on_nonfinite!r}."
        )

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        trainer = getattr(self._module, "_trainer", None)
        if self._masters is not None and not (optimizers and (trainer is None or trainer.state.fn == "fit")):
            self._masters.attach([])
        # validate and test connect again, with the optimizers of an earlier fit.
        if optimizers and (trainer is None or trainer.state.fn == "fit"):
            self._release()
            check_optimizers(optimizers, self.policy)
            self._attach(model, optimizers, lr_schedulers)
        return model, optimizers, lr_schedulers

    def _attach(self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]) -> None:
        module = self._module
        is_manual = module is not None and not module.automatic_optimization
        trainer = getattr(module, "_trainer", None)
        is_distributed = trainer is not None and trainer.world_size > 1
        self._ledger.is_distributed = is_distributed
        self._model = model
        self._is_first_step = True
        sharded = is_sharded(model, optimizers)
        self._stepper = OptimizerStepper(
            self.scaler,
            self._ledger,
            on_nonfinite=self.policy.on_nonfinite,
            is_manual=is_manual,
            optimizers=list(optimizers),
            is_sharded=sharded,
            is_distributed=is_distributed,
            is_log_step=self._is_log_step,
        )
        if self._masters is not None:
            attach_masters(self._masters, model, optimizers, trainer=trainer, policy=self.policy)
            self._stepper.gradients = self._masters.gradients
        elif module is not None and self.policy.precision != "fp32" and not sharded:
            self._stepper.shared_casts = SharedCasts(module, self._drop_region)
        self._region = None
        self._ledger.name_parameter = self._name_first_nonfinite
        # A wrapper that never called Optimizer.__init__ takes no hooks; it cannot skip on the device either,
        # so that nothing is pending when its state is read.
        hooked = [o for o in optimizers if hasattr(o, "_optimizer_state_dict_pre_hooks")]
        self._handles = [o.register_state_dict_pre_hook(lambda _: self._ledger.settle_for_reading()) for o in hooked]
        if is_manual and (self.scaler is not None or self._fp8 is not None):
            self._handles += [o.register_step_pre_hook(self._before_any_step) for o in hooked]
        if self.policy.hold_schedulers:
            self._holds = hold_schedulers(
                lr_schedulers,
                self._ledger,
                is_manual=is_manual,
                is_in_batch=lambda: self._stepper.is_in_batch,
                settles_now=self._is_log_step,
                accumulate=trainer.accumulate_grad_batches if trainer is not None else 1,
            )
        self._ledger.on_settled = self._release_schedulers if self._holds else _ignore
        reduce_dtype = self.policy.reduce_torch_dtype
        if (
            self._masters is None
            and reduce_dtype is not torch.float32
            and isinstance(model, nn.parallel.DistributedDataParallel)
        ):
            compress_reduction(model, reduce_dtype)

    def _before_any_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Refuse a step that passes by the plugin, with gradients that are scaled or FP8 scales that stand still."""
        if not self._stepper.is_stepping:
            name = type(optimizer).__name__
            raise UnsupportedError(
                f"precision={self.policy.precision!r}: {name}.step() was called on the optimizer itself, past the "
                "plugin, which unscales gradients and moves FP8 scales in a step. Step what self.optimizers() returns, "
                "with use_pl_optimizer=True."
            )

    def _name_first_nonfinite(self, attempt: Attempt) -> str | None:
        module = self._module
        return None if module is None else first_nonfinite_parameter(module, attempt)

    def _release_schedulers(self, attempt: Attempt) -> None:
        if attempt.scheduler_requests:
            take_back(attempt)
        for hold in self._holds:
            hold.settled(attempt)

    def _release(self) -> None:
        """Undo what ``connect`` did to optimizers and schedulers."""
        for handle in self._handles:
            handle.remove()
        for hold in self._holds:
            hold.release()
        self._held_states = [hold.state() for hold in self._holds]
        self._handles, self._holds, self._model = [], [], None
        self._stepper.backward_watch.remove()
        if self.scaler is not None:
            self.scaler.driver = None
        self._stepper.release_hook()
        self._ledger.latest.clear()
        self._ledger.keep_last(self._ledger.last_step)
        self._stepper = OptimizerStepper(self.scaler, self._ledger, on_nonfinite=self.policy.on_nonfinite)
        self._region = None

    def teardown(self) -> None:
        trainer = getattr(self._module, "_trainer", None)
        interrupted = trainer is not None and trainer.state.status == "interrupted"
        try:
            self.settle()
        except LightningMPError as error:
            if not interrupted:
                raise
            notice(f"while the run was being interrupted: {error}")
        finally:
            self._release()
            if self._masters is not None:
                add_dtype_hint(sys.exc_info()[1], self._module, self.policy.master_weights)
                self._masters.detach()
            if self._fp8 is not None:
                add_fp8_hint(sys.exc_info()[1])
                self._fp8.revert_()
            while self._applied_pins:
                self._applied_pins.pop().undo_()
            self._pins.clear()

    # --- Checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        held = [hold.state() for hold in self._holds] or self._held_states
        fp8 = None if self._fp8 is None else self._fp8.state_dict()
        return dump_state(self.policy.precision, self.scaler, self._ledger, held, fp8=fp8)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._ledger.pending = None
        self._held_states = restore_ledger(self._ledger, state_dict)
        for hold, state in zip(self._holds, self._held_states, strict=False):
            hold.load_state(state)
        changes = restore_scaler(self.scaler, state_dict) if self.scaler is not None and state_dict else []
        if self._fp8 is not None:
            changes += self._fp8.load_state_dict(saved_fp8(state_dict))
        self._ledger.rule = self.scaler.rule if self.scaler is not None else None
        saved = saved_precision(state_dict)
        if state_dict and saved != self.policy.precision:
            changes.insert(
                0, f"the checkpoint was written in {saved!r}, this run continues in {self.policy.precision!r}"
            )
        if changes:
            notice(f"resuming: {'; '.join(changes)}.")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if type(self).__qualname__ in checkpoint:
            return
        legacy = next((checkpoint[key] for key in LEGACY_KEYS if checkpoint.get(key)), None)
        if legacy is not None:
            self.load_state_dict(legacy)

    # --- FSDP ------------------------------------------------------------------------------------

    @property
    def mixed_precision_config(self) -> Any:
        """What FSDP casts its shards to: parameters to the compute dtype, gradients to ``reduce_dtype``."""
        from torch.distributed.fsdp import MixedPrecision as FSDPMixedPrecision

        return FSDPMixedPrecision(param_dtype=self.policy.compute_dtype, reduce_dtype=self.policy.reduce_torch_dtype)

    def _is_log_step(self) -> bool:
        """Tell whether this batch or the next one logs, and so may read a learning rate or a count."""
        trainer = getattr(self._module, "_trainer", None)
        if trainer is None or trainer.log_every_n_steps == 0:
            return False
        logged = trainer.fit_loop.epoch_loop._batches_that_stepped
        every = trainer.log_every_n_steps
        return (logged + 1) % every == 0 or (logged + 2) % every == 0 or bool(trainer.should_stop)


def _no_module() -> None:
    """Stand in for a reference to a module where there is none."""


def _ignore(attempt: Attempt) -> None:
    """Stand in where nothing waits for an attempt."""
