"""What FP8 adds to the plugin: the engine that the policy asks for, its region, and what it reports."""

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

from torch import nn

from lightning_mp.fp8 import FP8Engine
from lightning_mp.fp8.coverage import PINNED
from lightning_mp.policy import PrecisionPolicy
from lightning_mp.precision.dtype_hint import add_hint
from lightning_mp.precision.notices import notice, notice_once

__all__ = [
    "FP8Region",
    "add_fp8_hint",
    "convert_to_fp8",
    "fp8_reasons",
    "new_fp8_engine",
    "tell_missing_history",
]

_MAX_NAMED = 3
# What torch says, why, and where it comes from as a rule.
_IMPOSSIBLE = (
    (
        re.compile("once_differentiable"),
        "a layer in FP8 has no second derivative",
        ", such as the critic's of a gradient penalty",
    ),
    (
        re.compile("functorch transforms|setup_context"),
        "transforms of torch.func (vmap, grad, jvp) know no layer in FP8",
        ", such as the critic's whose gradients are taken per sample",
    ),
    (
        # Of a jagged tensor one size is a symbol, j3.
        re.compile(r"(view|reshape).*\(.*\bj\d+.*\)|not implemented for sparse"),
        "a layer in FP8 takes dense tensors, no nested or sparse ones",
        "",
    ),
)
_RESTING = "in evaluation mode, which runs in BF16 (fp8_in_eval=False)"


def new_fp8_engine(policy: PrecisionPolicy) -> FP8Engine | None:
    """Return the engine that the policy asks for; ``None`` without FP8."""
    return None if policy.fp8 is None else FP8Engine(policy.fp8, policy.compute_dtype)


def convert_to_fp8(engine: FP8Engine, module: nn.Module, pinned: Iterable[nn.Parameter]) -> None:
    """Convert the layers of a model and say what became of them."""
    engine.revert_()
    ids = {id(parameter) for parameter in pinned}
    keep = [m for m in module.modules() if any(id(p) in ids for p in m.parameters(recurse=False))]
    rows = engine.convert_(module, keep=keep)
    left = [f"{row.fqn}: {row.reason}" for row in rows if not row.converted]
    more = f" and {len(left) - _MAX_NAMED} more" if len(left) > _MAX_NAMED else ""
    outside = f" Not in FP8: {'; '.join(left[:_MAX_NAMED])}{more}." if left else ""
    backend = "emulated" if engine.is_emulated else "Transformer Engine"
    resting = f" Now {_RESTING}: {len(engine.resting)}." if engine.resting else ""
    notice(f"FP8 with recipe {engine.recipe.name!r} ({backend}): {engine.coverage}.{resting}{outside}")


def fp8_reasons(engine: FP8Engine) -> dict[str, tuple[bool, str]]:
    """Return for each Linear layer whether it runs in FP8, and why; after a run, whether it did."""
    engine.follow_names_()
    if engine.is_converted:
        resting = engine.resting
        return {
            row.fqn: (
                row.converted,
                f"{row.reason} once in training mode; now {_RESTING}" if row.fqn in resting else row.reason,
            )
            for row in engine.rows
        }
    # Pins end with the run as well, and leave no word.
    rows = [row for row in engine.rows if row.reason != PINNED]
    ended = "in the last run; an ordinary layer now"
    return {row.fqn: (row.converted, f"{row.reason} {ended}" if row.converted else row.reason) for row in rows}


def tell_missing_history() -> None:
    """Say once that an evaluation runs with scales of 1."""
    notice_once(
        "recipe='delayed' with fp8_in_eval=True, but no amax history was loaded, so that all scales are 1. Pass the "
        "ckpt_path of a checkpoint with more than weights, or use recipe='current' or fp8_in_eval=False."
    )


def add_fp8_hint(error: BaseException | None) -> None:
    """Add the fix to an error of torch about what no layer in FP8 can do."""
    if not isinstance(error, RuntimeError):
        return
    text = str(error)
    for pattern, cause, layers in _IMPOSSIBLE:
        if pattern.search(text):
            add_hint(
                error,
                f"precision='fp8': {cause}. Leave the layers that it goes through{layers}, in BF16: "
                "fp8={'exclude': ('critic.*',)}.",
            )
            return


class FP8Region:
    """Torch's autocast region and the engine's region inside it, entered any number of times."""

    __slots__ = ("_autocast", "_engine", "_entered")

    def __init__(self, autocast: AbstractContextManager[Any], engine: FP8Engine) -> None:
        self._autocast = autocast
        self._engine = engine
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._autocast)
            stack.enter_context(self._engine.autocast_context())
            self._entered.append(stack.pop_all())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.pop().__exit__(kind, error, trace)
