"""Steps of ``torch.optim.AdamW(fused=True)`` and ``Adam(fused=True)`` on masters, by one kernel on CUDA.

One launch updates all parameters of a device whose weights and gradients have the same dtypes. It does
what the generic path does with torch's fused kernel, without FP32 weights and gradients in memory:
state layout, step counts, skips by ``found_inf`` and clips that wait are the same. What it does not
handle (other optimizers, ``fused=None``, amsgrad, capturable, sparse gradients, several clips) is left
to the generic path, parameter by parameter.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from math import inf, log
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mp.master_weights.adam_kernel import BLOCK, CHUNK, NUM_SETTINGS, ROW, compiled_kernel
from lightning_mp.master_weights.gradients import Gradients, Scaling
from lightning_mp.master_weights.masters import CopyMaster, Master
from lightning_mp.master_weights.split_master import SplitMaster

__all__ = ["DEVICE_TYPE", "FusedAdam"]

#: Where the kernel runs. Triton's interpreter runs it on ``"cpu"`` in tests.
DEVICE_TYPE = "cuda"

_GRADS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_ALIGNMENT = 16  # bytes of the widest access


class Variant(NamedTuple):
    """What the kernel is compiled for, besides the alignment."""

    device: torch.device
    weights: str
    grads: str


@dataclass
class _Entry:
    """One parameter that the kernel updates."""

    param: nn.Parameter
    master: Master
    grad: Tensor
    state: dict[str, Tensor]
    group: int
    factor: Tensor | None  # which clips the gradient

    def row(self) -> tuple[int, ...]:
        state = self.state
        tensors = (self.param, self.master.tensors()[0], self.grad, state["exp_avg"], state["exp_avg_sq"])
        addresses = [tensor.data_ptr() for tensor in tensors]
        return (*addresses, state["step"].data_ptr(), self.param.numel(), self.group)


class FusedAdam:
    """Update with one kernel what it can update of an optimizer's parameters.

    Args:
        optimizer: Any; only ``torch.optim.AdamW`` and ``Adam`` themselves are updated.
        masters: Parameter to master. The mapping is read at every step.
        gradients: Knows the clips that wait.
        is_trial: Whether this is the trial that decides if the kernel may be used.

    Attributes:
        num_updated: Parameters that the last step updated.
        reason: Why it left others with masters to the generic path; empty if it did not.
        process_group: Ranks that hold the same weights. They use the kernel together or not at all: it may
            round otherwise than the generic path, and replicas must not drift apart.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        masters: Mapping[nn.Parameter, Master],
        gradients: Gradients,
        *,
        is_trial: bool = False,
    ) -> None:
        self.num_updated = 0
        self.reason = ""
        self.process_group: dist.ProcessGroup | None = None
        self._refusals: dict[Variant, str | None] = {}
        self._optimizer = optimizer
        self._masters = masters
        self._gradients = gradients
        self._is_trial = is_trial
        self._tables = _Tables()
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step_(self) -> Collection[nn.Parameter]:
        """Update parameters, their masters and their state; return those that are done."""
        self.num_updated, self.reason = 0, ""
        batches: dict[tuple[Any, ...], list[_Entry]] = {}
        for entry in self._entries():
            # The number of the device: hashing a device itself costs more than all the rest.
            key = (entry.param.get_device(), type(entry.master), entry.param.dtype, entry.grad.dtype, id(entry.factor))
            batches.setdefault(key, []).append(entry)
        done: set[nn.Parameter] = set()
        settings: dict[torch.device, Tensor] = {}
        for number, entries in enumerate(batches.values()):
            variant = self._variant(entries[0])
            if (refusal := self._refusal(variant)) is not None:
                self.reason = refusal
                continue
            with torch.cuda.device(variant.device) if variant.device.type == "cuda" else nullcontext():
                if variant.device not in settings:
                    settings[variant.device] = self._settings(variant.device)
                self._update_(number, variant, entries, settings[variant.device])
            done.update(entry.param for entry in entries)
        self.num_updated = len(done)
        return done

    def prepare(self) -> None:
        """Compile and check now what the first step will most likely need, rather than in that step."""
        if self._why_not_optimizer() is not None:
            return
        reduced = None if self.process_group is None else torch.float32
        found = {
            Variant(param.device, _weights_of(self._masters[param]), _GRADS[reduced or param.grad_dtype or param.dtype])
            for group in self._optimizer.param_groups
            for param in group["params"]
            if _why_not_group(group) is None and param.device.type == DEVICE_TYPE
            if isinstance(self._masters.get(param), (CopyMaster, SplitMaster)) and param.requires_grad
        }
        for variant in sorted(found, key=str):  # in the same order on every rank
            self._refusal(variant)

    def _refusal(self, variant: Variant) -> str | None:
        if self._is_trial:
            return None
        if variant not in self._refusals:
            from lightning_mp.master_weights.fused_check import why_not  # which runs this class

            reason = why_not(variant.device, variant.weights, variant.grads)
            self._refusals[variant] = reason if self.process_group is None else self._agreed(reason, variant.device)
        return self._refusals[variant]

    def _agreed(self, reason: str | None, device: torch.device) -> str | None:
        from lightning_mp.master_weights.fused_check import may_wait

        with may_wait(device):
            is_refused = torch.tensor(float(reason is not None), dtype=torch.float32, device=device)
            dist.all_reduce(is_refused, op=dist.ReduceOp.MAX, group=self.process_group)
            return reason or ("another rank cannot use the kernel" if bool(is_refused) else None)

    # --- What is updated -------------------------------------------------------------------------

    def _entries(self) -> Iterator[_Entry]:
        """Yield the parameters that the kernel can update."""
        refusal = self._why_not_optimizer()
        if refusal is not None:
            self.reason = refusal
            return
        for index, group in enumerate(self._optimizer.param_groups):
            refusal = _why_not_group(group)
            if refusal is not None:
                self.reason = refusal
                continue
            for param in group["params"]:
                master = self._masters.get(param)
                if master is None or param.grad is None:
                    continue
                found = _why_not_master(master)
                operations: list[Any] = []
                if found is None:
                    master.move_()
                    operations = self._gradients.waiting(param)
                    found = self._why_not_tensors(param) or _why_not_clips(operations)
                if found is not None:
                    self.reason = found
                    continue
                factor = operations[0].factor if operations else None
                yield _Entry(param, master, param.grad, self._state(param), index, factor)

    def _why_not_optimizer(self) -> str | None:
        optimizer = self._optimizer
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
            return f"the optimizer is {type(optimizer).__qualname__}, not torch.optim.AdamW or Adam themselves"
        if getattr(optimizer, "grad_scale", None) is not None:
            return "the optimizer is to unscale gradients itself"
        if DEVICE_TYPE != "cuda":
            return None
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return "no parameter is on CUDA"
        return "the step is captured as a CUDA graph" if torch.cuda.is_current_stream_capturing() else None

    def _why_not_tensors(self, param: nn.Parameter) -> str | None:
        grad, state = param.grad, self._optimizer.state.get(param)
        if type(grad) is not Tensor or grad.layout is not torch.strided or grad.dtype not in _GRADS:
            return "a gradient is not dense, or not BF16, FP16 or FP32"
        if state and not _is_plain_state(state, param):
            return "optimizer state is not laid out as torch's fused kernel lays it out"
        return None

    def _state(self, param: nn.Parameter) -> dict[str, Tensor]:
        """Return the optimizer's state, made as torch makes it where there is none."""
        state: dict[str, Tensor] = self._optimizer.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, dtype=torch.float32, memory_format=torch.preserve_format)
        return state

    @staticmethod
    def _variant(entry: _Entry) -> Variant:
        return Variant(entry.param.device, _weights_of(entry.master), _GRADS[entry.grad.dtype])

    # --- The update ------------------------------------------------------------------------------

    def _update_(self, number: int, variant: Variant, entries: list[_Entry], settings: Tensor) -> None:
        device = variant.device
        one, zero = self._constants_on(device)
        flag = getattr(self._optimizer, "found_inf", None)
        flag = zero if flag is None else flag.to(device=device, dtype=torch.float32, non_blocking=True)
        factor = entries[0].factor
        writes = self._gradients.shows_clipped and factor is not None
        factor = one if factor is None else factor.to(device, non_blocking=True)
        masters = [entry.master for entry in entries]
        type(masters[0]).before_in_place(masters)
        for entry in entries:
            if not _has_order_of(entry.grad, entry.param):
                entry.grad = torch.empty_like(entry.param, dtype=entry.grad.dtype).copy_(entry.grad)
        advance = one if flag is zero else (flag == 0).to(torch.float32)
        torch._foreach_add_([entry.state["step"] for entry in entries], advance)
        self._launch(number, variant, entries, (settings, factor, flag, int(writes)))
        changed: list[Tensor] = [entry.param for entry in entries]
        for entry in entries:
            changed += entry.master.tensors()
            if writes:
                changed.append(entry.grad)
                if entry.grad is not entry.param.grad:
                    entry.param.grad.copy_(entry.grad)  # type: ignore[union-attr]
            self._gradients.used(entry.param, None)
        # Autograd, and whatever keeps something made from a weight, sees that it was written.
        torch.autograd.graph.increment_version(changed)
        type(masters[0]).after_in_place(masters)

    def _launch(self, number: int, variant: Variant, entries: list[_Entry], arguments: tuple[Any, ...]) -> None:
        by_alignment: dict[bool, list[tuple[int, ...]]] = {}
        for entry in entries:
            if entry.param.numel() > 0:
                row = entry.row()
                is_aligned = not any(address % _ALIGNMENT for address in row[:5])
                by_alignment.setdefault(is_aligned, []).append(row)
        for is_aligned, rows in by_alignment.items():
            table, chunks = self._tables.on_device((variant, number, is_aligned), rows, variant.device)
            compiled_kernel()[(len(chunks),)](
                table,
                chunks,
                *arguments,
                WEIGHT=variant.weights,
                GRAD=variant.grads,
                ALIGNED=is_aligned,
                ROW=ROW,
                NUM_SETTINGS=NUM_SETTINGS,
                CHUNK=CHUNK,
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=False,
            )

    def _settings(self, device: torch.device) -> Tensor:
        """Return the settings of all groups as FP64 on the device; a learning rate there stays there."""
        groups = self._optimizer.param_groups
        on_device = [isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu" for group in groups]
        numbers = [_numbers(group, lr_is_later=later) for group, later in zip(groups, on_device, strict=True)]
        settings = self._tables.settings(numbers, device)
        for index, later in enumerate(on_device):
            if later:
                settings[index, 0].copy_(groups[index]["lr"].reshape(()), non_blocking=True)
        return settings

    def _constants_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._constants:
            one = torch.ones((), dtype=torch.float32, device=device)
            self._constants[device] = one, torch.zeros_like(one)
        return self._constants[device]


class _Tables:
    """Addresses and settings on devices, sent again only when they changed.

    Per stream: memory that another stream still reads is not given back to the allocator.
    """

    def __init__(self) -> None:
        self._rows: dict[Any, tuple[list[tuple[int, ...]], Tensor, Tensor]] = {}
        self._settings: dict[Any, tuple[list[list[float]], Tensor]] = {}

    def on_device(self, key: Any, rows: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the table, and of each chunk the row and its number in the tensor."""
        key = (key, _stream(device))
        kept = self._rows.get(key)
        if kept is not None and kept[0] == rows:
            return kept[1:]
        sizes = [row[6] for row in rows]
        is_same_size = kept is not None and [row[6] for row in kept[0]] == sizes
        chunks = kept[2] if kept is not None and is_same_size else _sent(_chunks(sizes), device)
        table = _sent(torch.tensor(rows, dtype=torch.int64).reshape(-1, ROW), device)
        self._rows[key] = rows, table, chunks
        return table, chunks

    def settings(self, numbers: list[list[float]], device: torch.device) -> Tensor:
        key = (device, _stream(device))
        kept = self._settings.get(key)
        if kept is None or kept[0] != numbers:
            kept = self._settings[key] = numbers, _sent(torch.tensor(numbers, dtype=torch.float64), device)
        return kept[1]


def _chunks(sizes: list[int]) -> Tensor:
    counts = torch.tensor([-(-size // CHUNK) for size in sizes], dtype=torch.int64)
    rows = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    numbers = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    return torch.stack([rows, numbers], dim=1)


def _sent(host: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device, which the host does not wait for."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _numbers(group: Mapping[str, Any], *, lr_is_later: bool) -> list[float]:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return [
        0.0 if lr_is_later else float(group["lr"]),
        beta1,
        beta2,
        *(log(beta) if beta > 0 else -inf for beta in (beta1, beta2)),
        float(group["eps"]),
        float(group["weight_decay"]),
        float(group["decoupled_weight_decay"]),
        -1.0 if group["maximize"] else 1.0,
    ]


def _why_not_group(group: Mapping[str, Any]) -> str | None:
    if group["fused"] is not True:
        return "fused=True is not set"
    for name in ("amsgrad", "capturable", "differentiable"):
        if group[name]:
            return f"{name}=True is set"
    numbers = (*group["betas"], group["eps"], group["weight_decay"])
    return None if not any(isinstance(number, Tensor) for number in numbers) else "a setting besides lr is a tensor"


def _why_not_master(master: Master) -> str | None:
    if not isinstance(master, (CopyMaster, SplitMaster)):
        return "there are no masters"
    device = master.param.device
    return None if device.type == DEVICE_TYPE else f"parameters are on {device.type}"


def _why_not_clips(operations: list[Any]) -> str | None:
    if not operations:
        return None
    only = operations[0] if len(operations) == 1 else None
    if isinstance(only, Scaling) and only.factor.dtype is torch.float32:
        return None
    return "gradients wait for another clip than one by their norm"


def _weights_of(master: Master) -> str:
    if isinstance(master, SplitMaster):
        return "split"
    return "bf16" if master.param.dtype is torch.bfloat16 else "fp16"


def _is_plain_state(state: Mapping[str, Any], param: nn.Parameter) -> bool:
    step, first, second = state.get("step"), state.get("exp_avg"), state.get("exp_avg_sq")
    if not (isinstance(step, Tensor) and isinstance(first, Tensor) and isinstance(second, Tensor)):
        return False
    return (
        step.dtype is first.dtype is second.dtype is torch.float32
        and param.device == step.device == first.device == second.device
        and _has_order_of(first, param)
        and _has_order_of(second, param)
    )


def _has_order_of(tensor: Tensor, param: nn.Parameter) -> bool:
    """Tell whether elements lie in memory as the parameter's, which is dense."""
    if tensor.stride() != param.stride() and not (tensor.is_contiguous() and param.is_contiguous()):
        return False
    return tensor.shape == param.shape
