"""A trial of the fused kernel on the very device, before it may update anything there."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from lightning_mp.master_weights.adam_kernel import BLOCK, CHUNK
from lightning_mp.master_weights.fused_adam import FusedAdam
from lightning_mp.master_weights.gradients import Gradients
from lightning_mp.master_weights.masters import CopyMaster, Master
from lightning_mp.master_weights.split import flat_view, publish_
from lightning_mp.master_weights.split_master import SplitMaster

__all__ = ["may_wait", "why_not"]

_log = logging.getLogger(__name__)

_DTYPES = {"split": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A full chunk, a full block and a part of one; less than a block.
_SIZES = (CHUNK + BLOCK + 5, 3)
# Four FP32 ulp. torch's kernel rounds the same values at the same places; its compiler may contract
# products and sums in FP64 and its bias correction may be rounded to FP32 once more, an ulp of the update
# each. A wrong update is off by the learning rate, 1e-2 here.
_TOLERANCE = 2.0**-21
_SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}


@cache
def why_not(device: torch.device, weights: str, grads: str) -> str | None:
    """Return why the kernel cannot be used on a device; ``None`` if it can. The first answer is kept, and logged.

    Args:
        device: Where.
        weights: ``"split"``, or the dtype of copied weights as ``"bf16"`` or ``"fp16"``.
        grads: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
    """
    reason = _why_not(device, weights, grads)
    if reason is not None:
        _log.warning(
            "master_weights: AdamW and Adam with fused=True step on %s without the fused kernel for 16-bit weights, "
            "more slowly and with the same result, because %s.",
            device,
            reason,
        )
    return reason


def _why_not(device: torch.device, weights: str, grads: str) -> str | None:
    if device.type == "cuda" and os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "TRITON_INTERPRET is set, with which Triton computes on the host"
    try:
        with may_wait(device):
            wrong = _disagreement(device, weights, grads)
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    except Exception as error:  # of the compiler, the driver or the launcher: their types are not public
        return f"the kernel failed in a trial with {type(error).__name__}: {error}"
    return None if wrong is None else f"the kernel disagreed with torch's in a trial: {wrong}"


@contextmanager
def may_wait(device: torch.device) -> Iterator[None]:
    """Allow host syncs, whatever the debug mode says: a trial reads its results, once."""
    mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    if mode == 0:  # setting it would make torch warn that this mode is a prototype
        yield
        return
    torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _disagreement(device: torch.device, weights: str, grads: str) -> str | None:
    """Run five steps, one of them skipped, beside torch's fused optimizers on FP32 parameters."""
    for optimizer_class in (torch.optim.AdamW, torch.optim.Adam):
        for offset in (0, 1):  # aligned and not
            wrong = _Trial(optimizer_class, device, weights, grads, offset).run()
            if wrong is not None:
                return f"{wrong} of {optimizer_class.__name__}"
    return None


class _Trial:
    def __init__(
        self, optimizer_class: type[torch.optim.Adam], device: torch.device, weights: str, grads: str, offset: int
    ) -> None:
        self._grad_dtype = _DTYPES[grads]
        values = [_wave(size, 1.0, device) for size in _SIZES]
        self._exact = [nn.Parameter(value.clone()) for value in values]
        self._params = [nn.Parameter(value) for value in values]
        self._masters: dict[nn.Parameter, Master] = {}
        for param in self._params:
            kind = SplitMaster if weights == "split" else CopyMaster
            master = self._masters[param] = kind(param, _DTYPES[weights])
            param.data = torch.cat([param.detach()[:offset], param.detach()])[offset:]
            master.settle_writes()
            param.grad_dtype = None
        self._optimizer = optimizer_class(self._params, **_SETTINGS)  # type: ignore[arg-type]
        self._oracle = optimizer_class(self._exact, **_SETTINGS)  # type: ignore[arg-type]
        self._gradients = Gradients()
        self._gradients.defers = True
        self._step = FusedAdam(self._optimizer, self._masters, self._gradients, is_trial=True)

    def run(self) -> str | None:
        """Return what disagrees first, or ``None``."""
        for step in range(5):
            for param, exact in zip(self._params, self._exact, strict=True):
                param.grad = _wave(param.numel(), 3.0 + step, param.device).to(self._grad_dtype)
                exact.grad = param.grad.to(torch.float32, copy=True)
            norm = torch.ones((), dtype=torch.float32, device=self._params[0].device)
            self._gradients.clip_with_norm_(self._params, 0.75, norm)
            nn.utils.clip_grads_with_norm_(self._exact, 0.75, norm)
            skipped = (norm * (step == 2)).detach()
            for optimizer in (self._optimizer, self._oracle):
                optimizer.found_inf = skipped  # type: ignore[attr-defined]
            if len(self._step.step_()) != len(self._params):
                return f"not every parameter ({self._step.reason})"
            self._oracle.step()
        return self._difference()

    def _difference(self) -> str | None:
        for param, exact in zip(self._params, self._exact, strict=True):
            published = torch.empty_like(param)
            value = self._masters[param].value()
            publish_(flat_view(value), published)
            found = {"weights": value, **self._optimizer.state[param]}
            expected = {"weights": exact.detach(), **self._oracle.state[exact]}
            for name, tensor in expected.items():
                if not torch.allclose(found[name], tensor, rtol=_TOLERANCE, atol=_TOLERANCE):
                    return f"{name} by up to {(found[name] - tensor).abs().max().item():.3g}"
            if not torch.equal(published.view(torch.int16), param.detach().view(torch.int16)):
                return "the rounded weights"
        return None


def _wave(size: int, frequency: float, device: torch.device) -> Tensor:
    """Return values of many magnitudes and both signs that need no random numbers."""
    return torch.sin(torch.arange(size, dtype=torch.float32, device=device) * frequency)
