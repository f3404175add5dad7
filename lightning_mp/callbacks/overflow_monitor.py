"""Callback that names the module or parameter where a step went non-finite."""

from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_mp.callbacks.added_hooks import add_to_hook, remove_added_hooks, without_added_hooks
from lightning_mp.callbacks.batch_window import BatchWindow, HeldBatch
from lightning_mp.callbacks.event_log import EventLog, run_directory
from lightning_mp.callbacks.interruption import is_interrupted, settle_interrupted
from lightning_mp.callbacks.overflow_inquiry import Inquiry, Probe
from lightning_mp.callbacks.overflow_watch import ScalerWatch, reason_against_replay, save_batch, shards_parameters
from lightning_mp.callbacks.step_start import StepStart, runs_code_before_step
from lightning_mp.callbacks.step_values import StepValues
from lightning_mp.errors import OverflowFoundError, SettingValueError
from lightning_mp.grad_scaler import gradient_amaxes, supports_skip_on_device
from lightning_mp.loss_scale import DynamicLossScale
from lightning_mp.overflow import OverflowEvent, WrittenState, copy_containers, describe_event
from lightning_mp.precision import MixedPrecision, StepReport
from lightning_mp.precision.notices import notice, notice_once

__all__ = ["OverflowEvent", "OverflowMonitor"]

OnOverflow = Literal["warn", "raise", "log"]

# Batches in which is looked for what a step writes: what it writes only now and then shows in one of them. A look
# takes 1 ms for a hundred modules.
_NUM_LOOKS = 4
# Attributes of a LightningModule that Lightning writes around each hook.
_OF_LIGHTNING = ("_current_fx_name",)


class OverflowMonitor(Callback):
    """Say which module or parameter went non-finite, in which phase, whenever a step has Inf or NaN gradients.

    A step without overflow costs one snapshot of torch's random states (2 us): no hook and no host sync.
    With ``probe="replay"`` the offending batch is computed once more under probes, on all ranks together.
    That leaves random states, gradients, buffers, metrics, logs and progress as they were, and attributes
    of modules: of lists, dicts, sets and deques (nested, and subclasses), tensors, NumPy arrays and
    random generators among them the contents too. torch's global random numbers are rewound for it;
    Python's, NumPy's and those of generators of your own are only protected. Not protected: direct calls
    of ``logger.experiment``, iterators that modules hold, learning rates, what ``training_step`` writes to
    parameters (as a momentum encoder does), to attributes of objects that are no modules, and to anything
    outside modules. A tensor of the batch that it changes in place is replayed as changed. A batch is held
    one step longer, under accumulation all batches of a step.

    A replay starts from the attributes and buffers of before the step, as of a hidden state that is carried
    on: those that the step was seen to write in its first four batches, or in an earlier replay, are kept
    (up to 64, by reference, 0.3 us each; up to 8 tensors that are written in place, if small beside the
    model, as copies). Where another one holds Inf or NaN that the step itself has put there, a replay
    would blame whoever reads it: a parameter is named instead, and this is said. Writes to ``.data`` show
    in neither.

    A non-finite item of the batch is blamed if the replay is finite with finite values in all such items and
    not while this one stays; not if it does no harm, as labels that are masked out. That takes a few passes
    more: 1 for one such item, 8 for 100. In the same way a module without a gradient is blamed if its values
    did the harm, as a teacher's, and not if they were only logged. ``"always"`` cannot tell: it blames an
    item if no module made anything non-finite of finite values, and such a module in either case.

    With an optimizer that skips on the device (fused Adam, AdamW) the event comes one step late, before the
    next update. Manual optimization, ``dataloader_iter``, sharding strategies and a replay that fails (as by
    reentrant checkpointing) fall back to ``"gradients"``, which is said once. Where the gradients are gone
    by then, as with the first failed replay under such an optimizer, ``fqn`` is ``"unknown"``.

    It works with ``MixedPrecision`` in every precision, and with the ``GradScaler`` of Lightning's own
    plugins. Plugins that look at no gradient (FP32 and BF16 of Lightning) give no events.

    Args:
        probe: ``"replay"``; ``"gradients"`` only looks at the parameters' gradients and names a parameter;
            ``"always"`` keeps the probes on in every step, which is slow and works where a replay does
            not show the same again.
        on_overflow: ``"warn"``, once per culprit; ``"raise"`` stops the run; ``"log"`` only keeps the event.
            Gradient overflows of a dynamic scale that still looks for its value are never alarmed.
        save_batch: Whether to write the batch to ``overflow-step{step}-rank{rank}.pt``, a dict of
            ``batch``, ``batch_idx``, ``step``, ``rng`` (``"cpu"``, ``"cuda"``) and ``loss_scale``. The
            rank of the event writes its batch; where gradients alone are known, which DDP adds up over
            the ranks, each rank writes its own, since any may be the cause. Where gradients alone are
            known under accumulation, ``batch_idx`` and the batch written are the last of the step, and
            any of its batches may be the cause.
        dirpath: Directory of event log and batches; ``None`` for that of the logger.

    Attributes:
        events: Frozen events in order, of all ranks.

    Raises:
        SettingValueError: If ``probe`` or ``on_overflow`` has another value.
        OverflowFoundError: In training, if ``on_overflow="raise"``.

    Example:
        >>> OverflowMonitor(probe="gradients").events
        []
    """

    def __init__(
        self,
        probe: Probe = "replay",
        on_overflow: OnOverflow = "warn",
        save_batch: bool = False,
        dirpath: str | Path | None = None,
    ) -> None:
        _check("probe", probe, get_args(Probe))
        _check("on_overflow", on_overflow, get_args(OnOverflow))
        self.probe = probe
        self.on_overflow = on_overflow
        self.save_batch = save_batch
        self.dirpath = dirpath
        self.event_log = EventLog("overflow", dirpath)
        self.events: list[OverflowEvent] = []
        self._forget()

    def _forget(self) -> None:
        """Drop everything that belongs to a run."""
        remove_added_hooks(self)
        self._method: Probe = self.probe
        self._trainer: Trainer | None = None
        self._module: LightningModule | None = None
        self._plugin: MixedPrecision | None = None
        self._watch: ScalerWatch | None = None
        self._directory: Path | None = None
        self._window = BatchWindow()
        self._start: StepStart | None = None
        self._written: WrittenState | None = None
        self._num_looks = 0  # batches whose writes are still to be looked at
        self._looked: HeldBatch | None = None
        self._zeroed_step = 0
        self._has_stepped = False
        self._step_handles: list[Any] = []
        self._stepped: Optimizer | None = None  # the latest, where there are several
        self._amaxes: tuple[list[Parameter], Tensor] | None = None
        self._may_lose_gradients = False
        self._has_validation = False
        self._has_applied = False
        self._alarmed: set[tuple[str, str, str]] = set()
        self._unlogged: dict[str, float] = {}
        self._values = StepValues()

    def __getstate__(self) -> dict[str, Any]:
        # The copy that a launcher or deepcopy makes listens to nothing until it trains.
        copied = object.__new__(type(self))
        vars(copied).update(without_added_hooks(vars(self)), events=list(self.events))
        copied._forget()
        return vars(copied)

    # --- Beginning and end -----------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: on_fit_start also comes before the learning-rate finder's probing.
        self._release()
        self._trainer, self._module = trainer, pl_module
        self.event_log.open(trainer)
        logged = [OverflowEvent(**event) for event in self.event_log.read()]
        kept = [event for event in self.events if event.step < trainer.global_step]
        self.events = logged if len(logged) > len(kept) else kept
        if self.save_batch and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            directory = str(run_directory(trainer, self.dirpath) or trainer.default_root_dir)
            self._directory = Path(trainer.strategy.broadcast(directory))
        reason = reason_against_replay(trainer, pl_module) if self.probe == "replay" else None
        if reason is not None:
            self._fall_back(reason)
        self._has_validation = trainer.enable_validation
        if self._method == "replay":
            self._written, self._num_looks = WrittenState(pl_module, ignored=_OF_LIGHTNING), _NUM_LOOKS
        if runs_code_before_step(trainer, pl_module, self):
            self._start = StepStart(trainer.precision_plugin, self._begin_step)
        self._listen(trainer)

    def _listen(self, trainer: Trainer) -> None:
        plugin = trainer.precision_plugin
        is_manual = not trainer.lightning_module.automatic_optimization
        if self._method == "always":
            add_to_hook(self, "on_before_backward", self._note_loss)
        if self._method == "always" and is_manual:
            # A step past the plugin, which BF16 and FP32 allow, has no report: what it used is no more to blame.
            hooked = [o for o in trainer.optimizers if hasattr(o, "_optimizer_step_post_hooks")]
            self._step_handles = [o.register_step_post_hook(self._note_any_step) for o in hooked]
        self._may_lose_gradients = is_manual
        if isinstance(plugin, MixedPrecision):
            self._may_lose_gradients = is_manual or plugin.policy.on_nonfinite == "ignore"
            self._plugin = plugin
            plugin.add_step_listener(self._on_report)
            if self._may_lose_gradients:
                add_to_hook(self, "on_before_optimizer_step", self._measure_gradients)
            return
        scaler = getattr(plugin, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            self._watch = ScalerWatch(scaler, self._on_report)
            add_to_hook(self, "on_before_optimizer_step", self._watch_scaler)
            return
        notice_once(
            f"OverflowMonitor: {type(plugin).__name__} without a loss scale looks at no gradient, so that there are no "
            "events. Use MixedPrecision(...), which checks every step."
        )

    def _fall_back(self, reason: str) -> None:
        self._method = "gradients"
        self._written, self._num_looks = None, 0
        notice_once(f"OverflowMonitor: probe='replay' falls back to 'gradients', which names a parameter: {reason}.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle()
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._window.end()
        settle_interrupted(self._settle)
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        self._window.end()
        if self._plugin is not None:
            self._plugin.remove_step_listener(self._on_report)
        if self._start is not None:
            self._start.remove()
        for handle in self._step_handles:
            handle.remove()
        self.event_log.close()
        self._forget()

    # --- Steps -----------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step if self._plugin is None else self._plugin.next_step
        held = HeldBatch(copy_containers(batch), batch_idx)
        # Without a replay or probes the last batch is all that is named.
        can_blame_earlier = self._method != "gradients" and not self._has_stepped
        self._window.start(held, step, keeps_earlier=can_blame_earlier)
        self._has_stepped = False
        if self._method == "always":
            held.watch(pl_module, watches_parameters=not shards_parameters(trainer))
        if self._start is None:
            self._begin_state(held)

    def _begin_step(self) -> None:
        """Note what the step starts from, as hooks before it have left it."""
        held = self._window.running
        # A closure that is computed several times, as with L-BFGS, starts once.
        if held is not None and not held.has_begun:
            held.begin()
            self._begin_state(held)

    def _begin_state(self, held: HeldBatch) -> None:
        """Keep what the step may write, and look at the modules if it is one of the first."""
        if self._written is None:
            return
        try:
            held.state = self._written.keep()
            if self._num_looks:
                self._num_looks -= 1
                self._looked = held
                self._written.begin()
        # Watching must not end a run, and what modules hold may do anything when it is read.
        except Exception as error:
            self._forget_state(error)

    def _end_look(self) -> None:
        held, self._looked = self._looked, None
        if held is None or self._written is None:
            return
        try:
            held.state += self._written.end(held.state)
        except Exception as error:
            self._forget_state(error)

    def _forget_state(self, error: Exception) -> None:
        self._written, self._looked, self._num_looks = None, None, 0
        notice_once(
            f"OverflowMonitor: what the modules hold cannot be read ({type(error).__name__}: {error}), so that a "
            "replay starts from what the step has left there. Use probe='always' if steps carry state on."
        )

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # The last moment at which the gradients of the previous step are there.
        if self._method == "gradients":
            self._settle()
        self._zeroed_step = self._window.step
        # Where the hook stands for zeroing, batches of before count no more: their gradients never made a step.
        if len(self._window) > 1 and not is_overridden("optimizer_zero_grad", pl_module):
            self._window.keep_last()

    def _watch_scaler(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._watch is not None:
            self._watch.before_step(trainer.global_step)
        self._measure_gradients(trainer, pl_module, optimizer)

    def _measure_gradients(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if len(trainer.optimizers) > 1:
            self._stepped = optimizer
        if self._may_lose_gradients and self._loses_gradients(optimizer):
            self._amaxes = gradient_amaxes(optimizer)

    def _note_any_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._has_stepped = True

    def _note_loss(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._window.running is not None:
            self._window.running.note_loss(loss)

    def _loses_gradients(self, optimizer: Optimizer) -> bool:
        """Tell whether nobody can look at this step's gradients any more when its outcome is known."""
        self._amaxes = None
        plugin = self._plugin
        return plugin is None or plugin.policy.on_nonfinite == "ignore" or supports_skip_on_device(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._window.end()
        if self._looked is not None:
            self._end_look()
        if self._watch is not None:
            self._watch.after_step()
        # Validation changes the mode of the modules and takes no gradients.
        if self._has_validation and _validates_next(trainer):
            self._settle()
        if self._values.keys:
            self._values.drop(trainer)
        if self._unlogged:
            self._values.log(pl_module, self._unlogged, logger=False)
            self._unlogged.clear()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._window.drop_running()

    def _settle(self) -> None:
        if self._plugin is not None:
            self._plugin.settle()
        if self._watch is not None:
            self._watch.settle()

    # --- Events ----------------------------------------------------------------------------------

    def _on_report(self, report: StepReport) -> str | None:
        """Look into a settled step; return the culprit for the plugin's messages."""
        trainer, module = self._trainer, self._module
        # A learning-rate finder that probes during training takes the callbacks away, not the plugin.
        if trainer is None or module is None or self not in trainer.callbacks:  # type: ignore[attr-defined]
            return None
        if not report.found_inf:
            self._has_applied = True
            return None
        events = self._investigate(trainer, module, report)
        self.events += events
        for event in events:
            self._publish(trainer, event)
        for event in events:
            self._alarm(trainer, event)
        return f"{events[0].fqn} ({events[0].phase})"

    def _investigate(self, trainer: Trainer, module: LightningModule, report: StepReport) -> list[OverflowEvent]:
        self._end_look()
        answer = Inquiry(
            trainer=trainer,
            module=module,
            plugin=self._plugin,
            report=report,
            method=self._method,
            batches=self._window.of(report.step),
            stepped=self._stepped,
            amaxes=self._amaxes,
            written=self._written,
            has_gradients=self._zeroed_step <= report.step,
            calibrating=self._is_calibrating(),
        ).run()
        if answer.failure is not None and self._method == "replay":
            self._fall_back(answer.failure)
        if self._directory is not None and answer.held is not None:
            save_batch(self._directory, answer.held, report, trainer.global_rank)
        return answer.events

    def _is_calibrating(self) -> bool:
        if self._plugin is None:
            return not self._has_applied
        scaler = self._plugin.scaler
        return scaler is not None and isinstance(scaler.rule, DynamicLossScale) and self._plugin.applied_steps == 0

    def _publish(self, trainer: Trainer, event: OverflowEvent) -> None:
        """Write the event to its log and to the loggers at once: log steps would miss most events."""
        self.event_log.append(event)
        name = f"overflow/{event.fqn}/nonfinite"
        self._unlogged[name] = float(event.count)
        for logger in trainer.loggers:
            logger.log_metrics({name: float(event.count)}, step=event.step)

    def _alarm(self, trainer: Trainer, event: OverflowEvent) -> None:
        if event.calibrating and event.phase == "backward":
            return
        if self.on_overflow == "raise" and not is_interrupted(trainer):
            raise OverflowFoundError(
                f"on_overflow='raise': {describe_event(event)} Its update was not applied. "
                "Use on_overflow='warn' to go on."
            )
        culprit = (event.phase, event.fqn, event.kind)
        if culprit in self._alarmed:
            return
        self._alarmed.add(culprit)
        if self.on_overflow == "warn":
            rank_zero_warn(f"OverflowMonitor: {describe_event(event)} Said once for this culprit; events has them all.")
        else:
            notice(f"OverflowMonitor: {describe_event(event)}")


def _validates_next(trainer: Trainer) -> bool:
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingValueError(f"{name}={value!r} is not known. Use one of {', '.join(map(repr, allowed))}.")
