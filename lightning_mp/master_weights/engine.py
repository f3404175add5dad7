"""Master weights of one module: taken, attached to optimizers, and given back."""

import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_mp.errors import SettingValueError
from lightning_mp.formats import HALF_DTYPES
from lightning_mp.master_weights.checkpoints import install_hooks, install_own_hooks
from lightning_mp.master_weights.ddp import FP32Reducer
from lightning_mp.master_weights.gradients import Gradients
from lightning_mp.master_weights.lazy import take_when_initialized
from lightning_mp.master_weights.masters import CopyMaster, Master, NoMaster, cast_param_
from lightning_mp.master_weights.optimizers import check_optimizer, upcast_state_
from lightning_mp.master_weights.param_hooks import has_hooks, hooks_made
from lightning_mp.master_weights.plan import kept_params, params_to_cast, widen_norms_
from lightning_mp.master_weights.split import flat_view
from lightning_mp.master_weights.split_master import SplitMaster
from lightning_mp.master_weights.stepping import MasterStep
from lightning_mp.master_weights.strangers import StrangerGuard
from lightning_mp.master_weights.targets import WriteWatch

__all__ = ["MasterMode", "MasterWeights"]

MasterMode = Literal["copy", "split", "none"]

_KINDS: dict[str, type[Master]] = {"copy": CopyMaster, "split": SplitMaster, "none": NoMaster}
# 2**22 elements: FP32 stand-ins and gradients of 16 MB each. On a CPU a step of 25e6 parameters takes
# 91 to 98 ms with buckets of 2**18 to 2**22, and 225 ms with 2**25, whose fresh pages cost more than
# they save (benchmarks/optimizer_stage.py with fused AdamW).
_BUCKET_NUMEL = 2**22


class MasterWeights:
    """A module with 16-bit parameters whose FP32 values the optimizers update.

    The life of one: ``convert_`` before optimizers are made, ``attach`` to them, training with plain
    ``optimizer.step()``, ``detach``. Then it may be used again. ``torch.optim.AdamW`` and ``Adam`` with
    ``fused=True`` on CUDA are stepped by a kernel of ours (:meth:`step_path` says so), all others by
    their own ``step`` on FP32 stand-ins.

    Args:
        mode: ``"copy"`` keeps an FP32 tensor beside each parameter, ``"split"`` the 16 bits that a
            BF16 parameter lacks, ``"none"`` nothing: the optimizer updates 16-bit values.
        param_dtype: What parameters are cast to: ``torch.bfloat16``, or ``torch.float16`` except
            with ``"split"``.
        bucket_numel: Elements that are FP32 at once inside a step where they are not kept in FP32.
            A parameter larger than this is a bucket of its own.

    Raises:
        SettingValueError: If a value is not one of those, or ``"split"`` meets another dtype than BF16.
    """

    def __init__(
        self,
        mode: MasterMode,
        *,
        param_dtype: torch.dtype = torch.bfloat16,
        bucket_numel: int = _BUCKET_NUMEL,
    ) -> None:
        _check_settings(mode, param_dtype, bucket_numel)
        self.mode = mode
        self.param_dtype = param_dtype
        self.bucket_numel = bucket_numel
        self.gradients = Gradients()
        self.tell: Callable[[str], None] = warnings.warn
        self._masters: dict[nn.Parameter, Master] = {}
        self._names: dict[nn.Parameter, str] = {}
        self._steps: dict[int, MasterStep] = {}
        self._handles: list[RemovableHandle] = []
        self._guard: RemovableHandle | None = None
        self._reducer: FP32Reducer | None = None
        self._watch: WriteWatch | None = None
        self._has_16_bit_gradients = False
        self._grad_dtype: torch.dtype | None = None
        self._hooks_made = -1

    @property
    def masters(self) -> Mapping[nn.Parameter, Master]:
        """Each cast parameter and what keeps its FP32 value."""
        return MappingProxyType(self._masters)

    @property
    def nbytes(self) -> int:
        """Bytes kept between steps besides the model parameters."""
        return sum(master.nbytes for master in self._masters.values())

    def convert_(self, module: nn.Module, *, keep_fp32: Collection[nn.Parameter | nn.Module] = ()) -> None:
        """Take masters of the parameters of ``module`` and cast those to ``param_dtype``, in place.

        Those of lazy modules follow in the first forward. Parameters keep their identity, tied ones are taken
        once, and a parameter that arrives in 16 bits gets that value as its master; a normalization layer
        that does becomes FP32. Called on a converted module, it starts over from the masters' values.

        Args:
            module: The root; its ``state_dict`` and ``load_state_dict`` speak FP32 from now on.
            keep_fp32: Parameters and modules that stay FP32, besides all normalization layers.

        Raises:
            UnsupportedError: If a parameter cannot have a master. Nothing is changed then.
        """
        found = params_to_cast(module, keep_fp32=keep_fp32)
        if self._handles:
            self.detach()
            found = params_to_cast(module, keep_fp32=keep_fp32)
        widen_norms_(module)
        self._names = found
        self._masters = {param: _KINDS[self.mode](param, self.param_dtype) for param in found}
        _flatten_rnn_weights(module)
        self._expect_writes(module)
        self._handles = install_hooks(module, self._masters)
        self._handles += take_when_initialized(module, kept_params(module, keep_fp32), self._take)

    def attach(
        self,
        optimizers: Iterable[Optimizer],
        *,
        accumulates: bool = True,
        ddp: DistributedDataParallel | None = None,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Let ``optimizers`` update the masters. Those attached already are left as they are.

        Args:
            optimizers: Made from the converted module's parameters; others in them are stepped as ever.
            accumulates: Whether more than one backward feeds a step. Gradients are FP32 then, and
                always in FP16, under DDP and where a parameter has hooks. Otherwise BF16 ones stay BF16
                until the step upcasts them by the bucket.
            ddp: The wrapper around the module, if there is one. Rank 0's masters go to all ranks.
            reduce_dtype: Dtype in which gradients travel between ranks; only with ``ddp``.

        Raises:
            UnsupportedError: If an optimizer cannot carry masters, or DDP cannot reduce in FP32. No
                optimizer is changed then.
        """
        fresh = [optimizer for optimizer in optimizers if id(optimizer) not in self._steps]
        if self.mode != "none":
            for optimizer in fresh:
                check_optimizer(optimizer, self._masters, _KINDS[self.mode], self.param_dtype)
        for master in self._masters.values():
            master.move_()
            if ddp is not None and ddp.process_group.rank() > 0:
                master.settle_writes()  # rank 0's values are here now, and what belongs to them comes below
            else:
                master.take_writes_()
        if ddp is not None:
            self._attach_ddp(ddp, reduce_dtype=reduce_dtype, accumulates=accumulates)
        elif self._reducer is None:
            is_fp32 = accumulates or self.param_dtype is torch.float16
            # None: gradients are of the dtype that backward computes them in, 16 bits as a rule, and
            # others may be assigned.
            self._set_grad_dtype(torch.float32 if is_fp32 else None)
        for optimizer in fresh:
            self._attach_one(optimizer)
        if self.mode != "none" and self._guard is None:
            engine = weakref.ref(self)
            guard = StrangerGuard(lambda optimizer: (alive := engine()) is not None and alive._is_stranger(optimizer))
            self._guard = guard.install()
            weakref.finalize(self, self._guard.remove)
            self._watch = WriteWatch(self._names, self._updated_params, self.tell)

    def adopt(self, optimizer: Optimizer) -> None:
        """Attach an optimizer that was made in mid-training; nothing happens if it is attached.

        Raises:
            UnsupportedError: If it cannot carry masters.
        """
        if id(optimizer) in self._steps or not self._handles:
            return
        if self.mode != "none":
            check_optimizer(optimizer, self._masters, _KINDS[self.mode], self.param_dtype)
        self._attach_one(optimizer)

    def detach(self) -> None:
        """Give optimizers their own ``step`` and the module FP32 parameters with the masters' values.

        With ``"none"`` the parameters stay in 16 bits: there are no other values.
        """
        for step in self._steps.values():
            step.remove()
        if self._reducer is not None:
            self._reducer.remove()
            self._reducer = None
        if self._guard is not None:
            self._guard.remove()
            self._guard = self._watch = None
        for handle in self._handles:
            handle.remove()
        failed = _restore_all(self._masters.values())
        self._steps, self._handles, self._masters, self._names = {}, [], {}, {}
        self.gradients = Gradients()
        if failed is not None:
            raise failed

    def fp32_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Return ``module.state_dict()`` with FP32 values wherever it has floating-point parameters.

        Args:
            module: The converted module, a part of it, or any other module.
        """
        state = dict(module.state_dict())
        params = dict(module.named_parameters(remove_duplicate=False))
        for name, value in state.items():
            if name in params and value.dtype in HALF_DTYPES:
                state[name] = value.to(torch.float32)
        return state

    def value_of(self, param: nn.Parameter) -> Tensor:
        """Return the FP32 value of a parameter; of one without a master, the parameter detached."""
        master = self._masters.get(param)
        return param.detach() if master is None else master.value()

    def name_of(self, param: nn.Parameter) -> str:
        """Return the dotted name under which a mastered parameter was found."""
        return self._names[param]

    def step_path(self, optimizer: Optimizer) -> str:
        """Say how an attached optimizer updated the masters in its last step."""
        fused = self._steps[id(optimizer)].fused
        if fused is None or fused.num_updated == 0:
            reason = "its step was replaced" if fused is None else fused.reason or "it has not stepped"
            return f"generic path: {reason}"
        return f"fused kernel for {fused.num_updated} parameters" + (fused.reason and f", not others: {fused.reason}")

    def begin_backward(self) -> None:
        """Make room for the gradients of a backward; call it before each one.

        Gradients that are there already will be added to, so 16-bit ones become FP32 here for good. So do
        those of parameters with hooks of others, which read or change a gradient inside of backward.
        """
        self.gradients.forget_all()
        if self._reducer is not None:
            self._reducer.begin_backward()
            return
        if not self._has_16_bit_gradients:
            return
        if any(param.grad is not None for param in self._masters):
            self._set_grad_dtype(torch.float32)
        elif self._hooks_made != hooks_made():
            self._widen_hooked()

    def finish_backward(self) -> None:
        """Put gradients that were reduced over ranks into ``param.grad``; the step does it otherwise."""
        if self._reducer is not None:
            self._reducer.finish_backward()

    def _attach_ddp(self, ddp: DistributedDataParallel, *, reduce_dtype: torch.dtype, accumulates: bool) -> None:
        if self._reducer is not None and self._reducer.ddp is ddp:
            return
        self._reducer = FP32Reducer(
            ddp,
            [param for param in self._masters if param.requires_grad],
            reduce_dtype=reduce_dtype,
            accumulates=accumulates,
        )
        # DDP sent rank 0's 16-bit weights to all ranks; what belongs to them must follow.
        source = dist.get_global_rank(ddp.process_group, 0)
        for master in self._masters.values():
            master.is_under_ddp = True
            for tensor in master.tensors():
                # As bytes: neither gloo nor NCCL knows int16.
                dist.broadcast(flat_view(tensor).view(torch.uint8), source, group=ddp.process_group)

    def _attach_one(self, optimizer: Optimizer) -> None:
        if self.mode != "none":
            upcast_state_(optimizer, self._masters)
        step = MasterStep(
            optimizer,
            self._masters,
            self.gradients,
            bucket_numel=self.bucket_numel,
            before_step=self._before_step,
            tell=self.tell,
        )
        if self._reducer is not None and step.fused is not None:
            step.fused.process_group = self._reducer.ddp.process_group
        step.install()
        self._steps[id(optimizer)] = step

    def _take(self, module: nn.Module, params: dict[nn.Parameter, str]) -> None:
        """Take masters of what a lazy module has initialized."""
        for param, name in params.items():
            if param not in self._masters and param.dtype in (torch.float32, *HALF_DTYPES):
                self._names[param] = name
                self._masters[param] = _KINDS[self.mode](param, self.param_dtype)
                param.grad_dtype = self._grad_dtype
        self._handles += install_own_hooks(module, self._masters)

    def _expect_writes(self, module: nn.Module) -> None:
        """Keep the published bits of tables that renormalize themselves in every forward."""
        for child in module.modules():
            if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and child.max_norm is not None:
                master = next((self._masters[p] for p in child.parameters(recurse=False) if p in self._masters), None)
                if isinstance(master, SplitMaster):
                    master.keep_published_()

    def _before_step(self) -> None:
        self.finish_backward()
        if self._watch is not None:
            self._watch.note_step()

    def _updated_params(self) -> Iterable[nn.Parameter]:
        for step in self._steps.values():
            for group in step.optimizer.param_groups:
                yield from group["params"]

    def _is_stranger(self, optimizer: Optimizer) -> bool:
        if id(optimizer) in self._steps:
            return False
        return any(param in self._masters for group in optimizer.param_groups for param in group["params"])

    def _set_grad_dtype(self, dtype: torch.dtype | None) -> None:
        self._has_16_bit_gradients = dtype is None
        self._grad_dtype = dtype
        self._hooks_made = -1
        for param in self._masters:
            grad, param.grad = param.grad, None
            param.grad_dtype = dtype
            param.grad = grad if grad is None or dtype is None else grad.to(dtype)

    def _widen_hooked(self) -> None:
        """Make gradients FP32 where others have hooks on a parameter. None is there yet."""
        self._hooks_made = hooks_made()
        for param in self._masters:
            if has_hooks(param):
                param.grad_dtype = torch.float32


def _check_settings(mode: str, param_dtype: torch.dtype, bucket_numel: int) -> None:
    if mode not in _KINDS:
        raise SettingValueError(f"master_weights: found {mode!r}; allowed are 'copy', 'split' and 'none'.")
    if param_dtype not in HALF_DTYPES:
        raise SettingValueError(
            f"master_weights={mode!r}: parameters would be {param_dtype}; 16-bit weights are torch.bfloat16 or "
            "torch.float16. Use precision 'bf16', 'fp16' or 'fp8', or master_weights='params'."
        )
    if mode == "split" and param_dtype is not torch.bfloat16:
        raise SettingValueError(
            f"master_weights='split': found {param_dtype}; FP32 is split into BF16 and 16 further bits, which FP16 "
            "cannot do exactly. Use master_weights='copy', or precision 'bf16' or 'fp8'."
        )
    if bucket_numel < 1:
        raise SettingValueError(f"bucket_numel: found {bucket_numel!r}; it must be at least 1.")


def _restore_all(masters: Iterable[Master]) -> Exception | None:
    """Give all parameters their FP32 values, also after one that cannot have it; return the first error."""
    failed = None
    for master in masters:
        try:
            master.restore_()
        except Exception as error:
            failed = failed or error
            value = master.param.detach().to(torch.float32)
            cast_param_(master.param, torch.float32)
            master.param.data = value
    return failed


def _flatten_rnn_weights(module: nn.Module) -> None:
    """Put the cast weights of cuDNN recurrent layers into one block again, as cuDNN wants them."""
    for child in module.modules():
        if isinstance(child, nn.RNNBase):
            child.flatten_parameters()
