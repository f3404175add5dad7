"""Target networks: copies that user code averages into, as MoCo, BYOL and DQN do, and no optimizer updates.

An average moves by less than half a BF16 ulp, so in 16 bits it stands still. Frozen copies are found at
setup and stay FP32; those that are not frozen are noticed when they are written again and again.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["WriteWatch", "frozen_twins"]

# Odd: memory that is assigned anew often alternates between two addresses.
_LOOK_EVERY = 7
_LOOKS = 4


def frozen_twins(module: nn.Module) -> dict[str, nn.Module]:
    """Find frozen FP32 modules that have the structure of a trainable one beside them.

    Layers repeated in a ``Sequential`` or ``ModuleList`` are no twins of each other.

    Args:
        module: The root. Not modified.

    Returns:
        Dotted name to module.
    """
    found = {}
    for fqn, parent in module.named_modules():
        if isinstance(parent, (nn.Sequential, nn.ModuleList)):
            continue
        children = {name: child for name, child in parent.named_children() if any(True for _ in child.parameters())}
        trained = [_structure(child) for child in children.values() if any(p.requires_grad for p in child.parameters())]
        for name, child in children.items():
            if all(_is_frozen_fp32(p) for p in child.parameters()) and _structure(child) in trained:
                found[f"{fqn}.{name}".lstrip(".")] = child
    return found


def _is_frozen_fp32(param: nn.Parameter) -> bool:
    return not param.requires_grad and param.dtype is torch.float32


def _structure(module: nn.Module) -> list[tuple[str, tuple[int, ...] | None]]:
    return [(name, None if is_lazy(p) else tuple(p.shape)) for name, p in module.named_parameters()]


class WriteWatch:
    """Tell once of 16-bit parameters that no optimizer updates and that are written all the time.

    It looks at version counters and addresses, which asks no device, every 7th step.

    Args:
        names: The mastered parameters and their dotted names. The mapping is read at each look.
        updated: Returns the parameters that optimizers update now.
        tell: Called with a message, at most once.
    """

    def __init__(
        self,
        names: Mapping[nn.Parameter, str],
        updated: Callable[[], Iterable[nn.Parameter]],
        tell: Callable[[str], None],
    ) -> None:
        self._names = names
        self._updated = updated
        self._tell = tell
        self._steps = 0
        self._seen: dict[nn.Parameter, tuple[int, int]] = {}
        self._counts: dict[nn.Parameter, int] = {}
        self._is_over = False

    def note_step(self) -> None:
        """Count a step, and look at the parameters now and then."""
        self._steps += 1
        if self._steps % _LOOK_EVERY == 0 and not self._is_over:
            self._look()

    def _look(self) -> None:
        updated = set(self._updated())
        written = []
        for param, name in self._names.items():
            if param in updated:
                continue
            mark = param._version, param.data_ptr()
            is_written = self._seen.get(param, mark) != mark
            self._seen[param] = mark
            self._counts[param] = max(0, self._counts.get(param, 0) + (1 if is_written else -1))
            if self._counts[param] >= _LOOKS:
                written.append(name)
        if written:
            self._is_over = True
            module = written[0].rpartition(".")[0]
            top = module.partition(".")[0] or written[0]
            patterns = (top, f"{top}.*") if "." in module else (top,)
            self._tell(
                f"master_weights: {len(written)} parameters that no optimizer updates are written between steps, "
                f"{written[0]} first. If they average other weights, as a target network does, they do so in 16 bits "
                "and stand still. Keep them in FP32: freeze the network before the fit (requires_grad_(False)), or "
                f"FP32Pin(modules={patterns!r})."
            )
