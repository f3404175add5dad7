"""Callback that keeps softmax, norms, the loss and chosen modules in FP32."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.checkpoint import CheckpointError

from lightning_mp.errors import UnsupportedError
from lightning_mp.pinning import PinReport, Pins, PinSpec
from lightning_mp.pinning.functions import OutputRule, PinKind
from lightning_mp.precision import MixedPrecision
from lightning_mp.precision.notices import notice
from lightning_mp.selection import Selector

__all__ = ["FP32Pin"]

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_PLAIN = ("configure_optimizers",)
_MAX_NAMES = 5
_RECOMPUTED = (
    "FP32Pin: a bare function under torch.utils.checkpoint.checkpoint that calls a pinned function is recomputed "
    "outside the module, in another dtype. If this is one, put its code into the forward of an nn.Module that is a "
    "submodule of the model, and checkpoint the module."
)


class FP32Pin(Callback):
    """Compute softmax, normalization and the loss in FP32, and whatever else you name.

    Pinned operations get FP32 inputs, run outside autocast, and pinned modules keep FP32 parameters,
    on CPU and CUDA alike, as modules and as functions (``F.softmax``, ``torch.softmax``,
    ``Tensor.softmax``, ``F.layer_norm``, ``F.cross_entropy``, ...). Without it autocast on a CPU leaves
    softmax and norms of a BF16 tensor in BF16, and ``BCELoss`` under CUDA autocast raises. It works with
    ``MixedPrecision`` and with Lightning's own precision plugins.

    The first batch of each step runs under a watch, eagerly if the model is compiled, that shows who
    calls what and in what dtype the kernels ran. The result is logged once from rank zero and kept in
    ``reports``. A function that is first reached after that batch is pinned too, under any name: code is
    read, with the globals, closures, defaults and attributes of the instance that it names, also in dicts
    and lists, and that of forward hooks. What it reaches otherwise is not, as through an argument, a
    class or object of yours, a package's submodule, an import inside the function, another method of a submodule
    than ``forward``, or a module that is no submodule of the model: make it a submodule, and name the module whose
    ``forward`` calls it in ``modules``. Of a module named there only ``forward`` is pinned, with what it calls, and
    no method that others call. A module that is added during the run is pinned from the start of the next epoch on.
    Hooks of the LightningModule such as ``on_validation_epoch_end`` are no steps: what they call themselves is
    not pinned.

    The class of a pinned module, of one that calls pinned functions and of the LightningModule is a stand-in until
    the run ends, which passes for the module's own: ``type(m) == nn.LayerNorm``, ``type(m) in (...)``, a dict of
    classes, ``isinstance`` and ``type(m)(...)`` mean what they say. ``type(m) is nn.LayerNorm`` holds in
    ``configure_optimizers`` only, and code under torch.compile does not find a stand-in in a dict of classes.

    The functions, as torch and ``torch.nn.functional`` name them and as methods of tensors:

    - softmax: ``softmax``, ``log_softmax``, ``softmin``, ``gumbel_softmax``;
    - norm: ``batch_norm``, ``group_norm``, ``instance_norm``, ``layer_norm``, ``local_response_norm``,
      ``rms_norm``, ``native_batch_norm``, ``native_group_norm``, ``native_layer_norm``;
    - loss: ``cross_entropy``, ``nll_loss``, ``mse_loss`` and every other loss of ``torch.nn.functional``.

    ``logsumexp``, ``torch.sparse.softmax``, ``normalize``, ``cosine_similarity`` and vector norms are none
    of these: name the module that calls them in ``modules``.

    Not pinned: the softmax inside ``scaled_dot_product_attention``, which is fused with two matrix
    products and already computes in FP32. On CPU (torch 2.13; BF16 normal inputs, 64 heads of 128 keys
    of 64 features) its largest error against float64 is 2.7e-3, of which rounding the exact result to
    BF16 explains 2.0e-3. Attention written out in BF16 has 9.1e-3, with its softmax pinned or not:
    there the BF16 scores that enter the softmax decide.

    Args:
        pins: Any of ``"softmax"``, ``"norm"`` and ``"loss"``: the functions and modules of torch.nn of
            that kind, with subclasses of those modules and with what these hold, such as the projection of a loss.
        modules: Further modules, by class or by ``fnmatch`` pattern over the full dotted name, with all
            that is inside them, such as ``("*.norm", LlamaRMSNorm, "head")``. Tensors among their arguments are
            cast, also in lists, tuples and dicts, and not in dataclasses or other objects.
        output: ``"float32"`` returns FP32; ``"input"`` the dtype of the input, which saves activation
            memory. A loss is returned in FP32 either way, and ``dtype=`` in a call gives that dtype.

    Raises:
        SettingValueError: If a setting has an unknown value.
        UnmatchedPatternError: During setup, if an entry of ``modules`` matches nothing.
        UnsupportedError: During setup, under DeepSpeed, and under a plugin without autocast (such as
            ``bf16-true``) where FP32 outputs would meet 16-bit layers; in the first batch, if activation
            checkpointing recomputes a bare function that calls a pinned one, and in a later batch where that is
            reentrant; where it is not, torch raises its ``CheckpointError``.

    Example:
        >>> FP32Pin(pins=("softmax", "loss"), modules=["head"]).spec.pins
        ('softmax', 'loss')
    """

    def __init__(
        self,
        pins: Iterable[PinKind] = ("softmax", "norm", "loss"),
        modules: Selector | Iterable[Selector] = (),
        output: OutputRule = "float32",
    ) -> None:
        self.spec = PinSpec(pins, modules, output)  # type: ignore[arg-type]
        self.reports: dict[str, PinReport] = {}
        self._engine: Pins | None = None
        self._said: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        together = [callback for callback in trainer.callbacks if isinstance(callback, FP32Pin)]  # type: ignore[attr-defined]
        # One engine per model: the first callback pins for all of them.
        if together[0] is not self:
            return
        self._release()
        self.reports = {}
        self._engine = self._engine or Pins(*(callback.spec for callback in together), steps=_STEPS, plain=_PLAIN)
        plugin = trainer.precision_plugin
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise UnsupportedError(
                "FP32Pin does not work under DeepSpeed, which casts and flattens the parameters itself. "
                "Use DDP, FSDP or FSDP2, or remove FP32Pin."
            )
        if isinstance(plugin, MixedPrecision):
            plugin.register_pin(self._engine)
            return
        has_no_autocast = _runs_without_autocast(str(plugin.precision))
        if has_no_autocast:
            _check_without_autocast(str(plugin.precision), together, pl_module)
        # Layers that configure_model builds do not exist yet; on_fit_start pins them.
        if not is_overridden("configure_model", pl_module):
            self._engine.apply_(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._apply_where_nobody_does(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._apply_where_nobody_does(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._apply_where_nobody_does(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._apply_where_nobody_does(trainer, pl_module)

    def _apply_where_nobody_does(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pin what configure_model built or the strategy replaced, such as batch norms by synchronized ones."""
        if self._engine is not None and not isinstance(trainer.precision_plugin, MixedPrecision):
            self._engine.apply_(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Here the model's own on_train_epoch_start has run, where growing networks add modules.
        if batch_idx == 0 and self._engine is not None:
            self._engine.follow_()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if "training_step" not in self.reports:
            self._report()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._report()

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._report()

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._report()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(trainer.precision_plugin, MixedPrecision):
            self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._engine is not None and isinstance(exception, CheckpointError):
            # Python 3.10 has no notes on exceptions.
            getattr(exception, "add_note", rank_zero_warn)(_RECOMPUTED)
        if not isinstance(trainer.precision_plugin, MixedPrecision):
            self._release()

    def _release(self) -> None:
        if self._engine is not None:
            self._engine.undo_()

    def _report(self) -> None:
        """Log what the first batch of a step showed, once per step."""
        if self._engine is None or len(self._engine.observations) == len(self.reports):
            return
        for step in self._engine.observations.keys() - self.reports.keys():
            report = self._engine.report(step)
            self.reports[step] = report
            self._say(_describe(report))
            if report.below_fp32:
                rank_zero_warn(_complain(report))

    def _say(self, text: str) -> None:
        """Log what a further stage or run does not merely repeat."""
        if text not in self._said:
            self._said.add(text)
            notice(text)


def _runs_without_autocast(precision: str) -> bool:
    return precision in ("16-true", "bf16-true") or precision.startswith("transformer-engine")


def _check_without_autocast(precision: str, together: list[FP32Pin], pl_module: LightningModule) -> None:
    if any(callback.spec.output == "float32" for callback in together):
        raise UnsupportedError(
            f"FP32Pin(output='float32') under precision={precision!r}, which runs without autocast, so that the "
            "16-bit layer after a pinned one would refuse its FP32 output. Use FP32Pin(output='input'), or "
            "MixedPrecision('bf16', master_weights='copy')."
        )
    if is_overridden("configure_model", pl_module):
        raise UnsupportedError(
            f"FP32Pin under precision={precision!r} with configure_model: its layers are built in 16 bits, so the "
            "FP32 values of pinned ones are lost. Build them in __init__, or use "
            "MixedPrecision('bf16', master_weights='copy')."
        )


def _describe(report: PinReport) -> str:
    classes = Counter(report.modules.values())
    kept = ", ".join(f"{count} {name}" for name, count in classes.items()) or "no modules"
    ran: Counter[str] = Counter()
    for call, count in report.calls.items():
        ran[f"{call.name} in {str(call.dtype).removeprefix('torch.')}"] += count
    lines = [
        f"FP32Pin: {kept} kept in FP32, and the functions that {_few(report.callers)} call.",
        f"First {report.step} ran {', '.join(f'{count} x {name}' for name, count in ran.items()) or 'none of them'}.",
    ]
    if report.not_reached:
        lines.append(f"Not reached: {_few(report.not_reached)}.")
    if report.without_match:
        lines.append(f"Found nothing of torch.nn to pin as: {', '.join(report.without_match)}.")
    if report.other_norms:
        lines.append(f"Not pinned, because no norm of torch.nn: {_few(report.other_norms)}; name it in modules=.")
    if report.fused_attention:
        lines.append(f"scaled_dot_product_attention keeps its own softmax, in {_few(report.fused_attention)}.")
    return " ".join(lines)


def _complain(report: PinReport) -> str:
    found = [f"{call.name} in {call.dtype} in {call.fqn or 'the model'}" for call in report.below_fp32]
    return (
        f"FP32Pin: despite the pin, {report.step} ran {_few(found)}. This code casts its inputs itself, takes them "
        "from an object that the pin does not look into, opens its own autocast region, or calls torch.ops, which "
        "no pin reaches. Change it there."
    )


def _few(names: Iterable[str]) -> str:
    shown = [name or "the model" for name in names]
    more = f" and {len(shown) - _MAX_NAMES} more" if len(shown) > _MAX_NAMES else ""
    return (", ".join(shown[:_MAX_NAMES]) or "no module") + more
