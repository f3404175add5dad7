"""Find out by trial whether an optimizer treats each parameter for itself."""

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights.gradients import Gradients
from lightning_mp.master_weights.stepping import MasterStep

__all__ = ["check_independence"]

# Each parameter for itself, as read in their source and held by tests.
_TRUSTED = ("torch.optim.", "torchao.optim.", "transformer_engine.")
_NOT_COPIED = {"state", "param_groups", "step", "load_state_dict"}
_TRIALS = 2
_SIDE = 4


def check_independence(optimizer: Optimizer) -> None:
    """Step a small likeness of ``optimizer`` at once and parameter by parameter, and compare the bits.

    Finds global gradient norms (LAMB of apex), learning rates estimated over all parameters
    (D-Adaptation, Prodigy) and the like. Where the likeness cannot be built or stepped, nothing is
    concluded. Optimizers of torch and torchao are not tried.

    Args:
        optimizer: Not modified; its own parameters and state take no part.

    Raises:
        UnsupportedError: If the results differ.
    """
    if f"{type(optimizer).__module__}.".startswith(_TRUSTED):
        return
    try:
        together = _trial(optimizer, bucket_numel=_SIDE**8)
    except Exception:
        # Any author's code runs here. What it does not accept of a likeness, such as its shapes, says
        # nothing about the real step, which raises for itself if it has to.
        return
    try:
        apart = _trial(optimizer, bucket_numel=1)
    except Exception as error:
        raise _dependent(optimizer) from error
    if not all(torch.equal(left, right) for left, right in zip(together, apart, strict=True)):
        raise _dependent(optimizer)


def _dependent(optimizer: Optimizer) -> UnsupportedError:
    return UnsupportedError(
        f"master_weights: {type(optimizer).__qualname__} updates one parameter by what it sees of the others, as a "
        "norm over all gradients does, so it cannot be stepped bucket by bucket. Use an optimizer of torch.optim, or "
        "master_weights='params'."
    )


def _trial(optimizer: Optimizer, *, bucket_numel: int) -> list[torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        likeness = _likeness(optimizer)
        params = [param for group in likeness.param_groups for param in group["params"]]
        step = MasterStep(likeness, {}, Gradients(), bucket_numel=bucket_numel, before_step=_nothing)
        step.install()
        for _ in range(_TRIALS):
            for size, param in enumerate(params, start=1):
                param.grad = size * torch.randn(param.shape)
            likeness.step()
    return [param.detach() for param in params]


def _likeness(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer of the same class and settings with small CPU parameters of its own."""
    likeness = object.__new__(type(optimizer))
    hooks: dict[str, Any] = {key: OrderedDict() for key in vars(optimizer) if key.endswith("_hooks")}
    copied = {key: value for key, value in vars(optimizer).items() if key not in _NOT_COPIED and key not in hooks}
    vars(likeness).update(copy.deepcopy(copied), **hooks)
    likeness.state = defaultdict(dict)
    likeness.param_groups = [_small_group(group) for group in optimizer.param_groups]
    return likeness


def _small_group(group: dict[str, Any]) -> dict[str, Any]:
    settings = copy.deepcopy({key: value for key, value in group.items() if key != "params"})
    shapes = [(_SIDE,) * param.dim() for param in group["params"][:2]]
    return {"params": [nn.Parameter(torch.randn(shape)) for shape in (shapes * 2)[:2]], **settings}


def _nothing() -> None:
    """Stand in for what the engine does before a step."""
