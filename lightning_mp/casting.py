"""The autocast region that a step runs in."""

from functools import cache

import torch
from torch import nn

__all__ = ["autocast_region", "clear_cast_weights", "is_autocast_cache_safe"]


@cache
def is_autocast_cache_safe() -> bool:
    """Tell whether this torch keeps gradients when a cast weight was first used under ``no_grad``.

    Autocast casts an FP32 weight once per region and keeps the result. Older releases kept a result
    without a graph when the first use stood under ``torch.no_grad``: later uses then silently lost
    the gradient. Asked of torch itself, once per process, rather than guessed from its version.
    """
    weight = nn.Parameter(torch.ones(1, 1, dtype=torch.float32))
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.inference_mode(False), torch.no_grad():
            nn.functional.linear(torch.ones(1, 1, dtype=torch.float32), weight)
        return nn.functional.linear(torch.ones(1, 1, dtype=torch.float32), weight).requires_grad


def autocast_region(device_type: str, dtype: torch.dtype, *, cache_weights: bool) -> torch.autocast:
    """Return an autocast region; ``cache_weights`` casts each FP32 weight once inside it.

    Without the cache K calls of one layer save K casts of its weight for backward.
    """
    return torch.autocast(device_type, dtype=dtype, cache_enabled=cache_weights)


def clear_cast_weights() -> None:
    """Forget the weights cast so far in this region; call it wherever weights may have changed."""
    torch.clear_autocast_cache()
