"""The precision manifest: which module computes in what, and why."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lightning_mp.fp8 import FP8Linear
from lightning_mp.policy import PrecisionPolicy
from lightning_mp.selection import is_transposed_linear, named_inner_modules

__all__ = ["ManifestRow", "build_manifest"]

# Not nn.Bilinear, which autocast leaves in the dtype of its FP32 weight.
_PRODUCTS = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


@dataclass(frozen=True)
class ManifestRow:
    """One module that owns parameters, or that is pinned, or that FP8 was asked for.

    Args:
        fqn: Full dotted name of the module.
        module_class: Name of its class.
        num_params: Elements of the parameters that it owns itself; tied ones count where they come first.
        param_dtype: Dtype that its parameters are stored in now; ``None`` without parameters.
        compute_dtype: Dtype of its matrix products; ``None`` where it follows the input.
        observed_dtype: Dtype of its output at the last observed batch; ``None`` if not observed.
        master: Where the FP32 values live that the optimizer updates.
        pinned: Whether it is kept in FP32.
        fp8: Whether its products run in FP8; after a run, whether they did.
        reason: Why, in a few words.
    """

    fqn: str
    module_class: str
    num_params: int
    param_dtype: torch.dtype | None
    compute_dtype: torch.dtype | None
    observed_dtype: torch.dtype | None
    master: str
    pinned: bool
    fp8: bool
    reason: str


def build_manifest(
    module: nn.Module,
    policy: PrecisionPolicy,
    *,
    observed: Mapping[str, torch.dtype] | None = None,
    pinned: frozenset[str] = frozenset(),
    fp8_reasons: Mapping[str, tuple[bool, str]] | None = None,
) -> list[ManifestRow]:
    """Return a row per module that owns parameters, is pinned or has a reason from FP8, in registration order."""
    rows = []
    seen: set[int] = set()
    # FP8 names modules without wrappers, such as that of torch.compile.
    inner = named_inner_modules(module) if fp8_reasons else {}
    reasons = {id(inner[fqn]): reason for fqn, reason in (fp8_reasons or {}).items() if fqn in inner}
    for fqn, child in module.named_modules():
        params = [p for p in child.parameters(recurse=False) if not isinstance(p, nn.UninitializedParameter)]
        if not params and fqn not in pinned and id(child) not in reasons:
            continue
        own = [p for p in params if id(p) not in seen]
        seen.update(id(p) for p in own)
        converted, fp8_reason = reasons.get(id(child), (False, ""))
        compute, reason = _compute(child, policy, is_pinned=fqn in pinned)
        rows.append(
            ManifestRow(
                fqn=fqn,
                module_class=_class_name(child),
                num_params=sum(p.numel() for p in own),
                param_dtype=params[0].dtype if params else None,
                compute_dtype=compute,
                observed_dtype=(observed or {}).get(fqn),
                master=_master(params, policy),
                pinned=fqn in pinned,
                fp8=converted,
                reason=fp8_reason or reason,
            )
        )
    return rows


def _class_name(module: nn.Module) -> str:
    """Return the name of the class that the user built; FP8 says itself in a field of its own."""
    return nn.Linear.__name__ if isinstance(module, FP8Linear) else type(module).__name__


def _compute(module: nn.Module, policy: PrecisionPolicy, *, is_pinned: bool) -> tuple[torch.dtype | None, str]:
    if is_pinned:
        return torch.float32, "pinned to FP32"
    if policy.precision == "fp32":
        return torch.float32, "precision='fp32'"
    if isinstance(module, _PRODUCTS) or is_transposed_linear(module):
        return policy.compute_dtype, "autocast: matrix product"
    return None, "autocast: follows its input, or FP32 by torch's list"


def _master(params: list[nn.Parameter], policy: PrecisionPolicy) -> str:
    if not params:
        return ""
    if all(p.dtype in (torch.float32, torch.float64) for p in params):
        return "params"
    return policy.master_weights
