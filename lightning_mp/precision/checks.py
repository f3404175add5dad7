"""Refusing, at setup, what could only fail or lie later."""

from collections.abc import Iterable
from functools import cache
from inspect import Parameter, signature
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_mp.errors import UnsupportedError
from lightning_mp.formats import HALF_DTYPES
from lightning_mp.policy import PrecisionPolicy

__all__ = [
    "check_optimizers",
    "check_parameters",
    "check_strategy",
    "ignores_closure",
    "is_closure_repeating",
    "takes_closure",
]

_REFUSED_STRATEGIES = {
    "DeepSpeedStrategy": "owns its precision: remove the plugin and pass Trainer(strategy='deepspeed', "
    "precision='bf16-mixed'), or use strategy='ddp' or 'fsdp' with the plugin",
    "XLAStrategy": "compiles its own precision: remove the plugin and pass Trainer(precision='bf16-true')",
    "SingleDeviceXLAStrategy": "compiles its own precision: remove the plugin and pass Trainer(precision='bf16-true')",
    "XLAFSDPStrategy": "compiles its own precision: remove the plugin and pass Trainer(precision='bf16-true')",
}
_SHARDED_STRATEGIES = {"FSDPStrategy", "ModelParallelStrategy"}


def check_strategy(strategy: Any, policy: PrecisionPolicy) -> None:
    """Refuse a strategy that keeps its own precision, and masters under one that shards FP32 weights.

    Raises:
        UnsupportedError: If the strategy cannot take this plugin, or not with these settings.
    """
    names = {c.__name__ for c in type(strategy).__mro__}
    for name, remedy in _REFUSED_STRATEGIES.items():
        if name in names:
            raise UnsupportedError(f"MixedPrecision cannot run under {type(strategy).__name__}, which {remedy}.")
    if names & _SHARDED_STRATEGIES and policy.master_weights != "params":
        raise UnsupportedError(
            f"master_weights={policy.master_weights!r} is not for {type(strategy).__name__}: its FP32 shards are the "
            "master weights already. Use master_weights='params'."
        )
    if getattr(strategy, "_ddp_comm_hook", None) is not None and policy.reduce_dtype != "fp32":
        raise UnsupportedError(
            f"reduce_dtype={policy.reduce_dtype!r} needs DDP's communication hook, and the strategy brings one of its "
            "own (ddp_comm_hook). DDP takes a single hook: remove one of the two."
        )


def check_optimizers(optimizers: Iterable[Optimizer], policy: PrecisionPolicy) -> None:
    """Refuse optimizers that repeat the closure where a loss scale could change in between.

    Raises:
        UnsupportedError: If loss scaling meets LBFGS or its like.
    """
    if policy.active_loss_scale is None:
        return
    for optimizer in optimizers:
        if is_closure_repeating(optimizer):
            raise UnsupportedError(
                f"precision='fp16' cannot train with {type(optimizer).__name__}: its step demands a closure, which it "
                "may evaluate several times, and one overflow would end its line search in Inf. Use precision='bf16' "
                "or 'fp32'; if it evaluates the closure once and first, declare that: def step(self, closure=None)."
            )


def is_closure_repeating(optimizer: Optimizer) -> bool:
    """Tell whether ``step`` demands a closure, as LBFGS does to evaluate it several times."""
    optimizer_class: Any = type(optimizer)
    return _demands_closure(optimizer_class)


def ignores_closure(optimizer: Optimizer) -> bool:
    """Tell whether ``step`` only returns what its closure returns: torch's own do, LBFGS apart, at 3 us a call."""
    optimizer_class: Any = type(optimizer)
    return _is_of_torch(optimizer_class) and not _demands_closure(optimizer_class)


def takes_closure(optimizer: Optimizer) -> bool:
    """Tell whether ``step`` has an argument for a closure."""
    optimizer_class: Any = type(optimizer)
    return _has_closure_argument(optimizer_class)


@cache
def _has_closure_argument(optimizer_class: Any) -> bool:
    return "closure" in signature(optimizer_class.step).parameters


@cache
def _is_of_torch(optimizer_class: Any) -> bool:
    return bool(optimizer_class.__module__.startswith("torch.optim."))


@cache
def _demands_closure(optimizer_class: Any) -> bool:
    if issubclass(optimizer_class, LBFGS):
        return True
    closure = signature(optimizer_class.step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty


def check_parameters(module: nn.Module, policy: PrecisionPolicy, *, is_fit: bool = True) -> None:
    """Refuse trainable 16-bit parameters where the parameters are to be the FP32 masters.

    Evaluation updates nothing, and autocast computes with 16-bit parameters; only FP32 cannot.

    Raises:
        UnsupportedError: If ``master_weights="params"`` and a trainable parameter is FP16 or BF16.
    """
    if policy.master_weights != "params" or not (is_fit or policy.precision == "fp32"):
        return
    half = [(n, p.dtype) for n, p in module.named_parameters() if p.requires_grad and p.dtype in HALF_DTYPES]
    if half:
        name, dtype = half[0]
        raise UnsupportedError(
            f"master_weights='params' updates the parameters themselves in FP32, and {len(half)} trainable parameters "
            f"arrive in 16 bits (first: {name}, {dtype}): updates below half a unit in the last place would be lost. "
            "Call model.float() before."
        )
