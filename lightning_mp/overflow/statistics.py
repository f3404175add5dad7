"""What a tensor holds that is not finite, collected on its device and read once at the end."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from lightning_mp.numerics import NonfiniteKind, amax, nonfinite_kind

__all__ = ["Statistics", "TensorStats", "Wanted", "make_finite_", "named_tensors", "tensor_values"]

_MAX_DEPTH = 8
# Each tensor found takes 50 us to be measured on a CPU, so that no batch takes longer than a fifth of a second.
_MAX_ITEMS = 4096
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@dataclass(frozen=True)
class TensorStats:
    """Numbers of one tensor, or of several together.

    Args:
        num_positive_inf: Elements equal to infinity.
        num_negative_inf: Elements equal to minus infinity.
        num_nan: Elements that are NaN.
        amax: Largest magnitude as ``numerics.amax`` gives it: infinity counts, NaN gives NaN;
            ``None`` if there was no tensor.
    """

    num_positive_inf: int = 0
    num_negative_inf: int = 0
    num_nan: int = 0
    amax: float | None = None

    @property
    def count(self) -> int:
        """Elements that are not finite."""
        return self.num_positive_inf + self.num_negative_inf + self.num_nan

    @property
    def is_finite(self) -> bool:
        """Whether every element is finite."""
        return self.count == 0

    @property
    def is_bad(self) -> bool:
        """Whether there is NaN or infinity; minus infinity alone is what masks are made of."""
        return self.num_positive_inf + self.num_nan > 0

    @property
    def kind(self) -> NonfiniteKind | None:
        """``"inf"``, ``"nan"``, ``"both"``, or ``None`` if all is finite."""
        return nonfinite_kind(self.num_positive_inf + self.num_negative_inf, self.num_nan)

    @staticmethod
    def joined(several: Iterable["TensorStats"]) -> "TensorStats":
        """Return the numbers of several tensors together."""
        stats = list(several)
        amaxes = [s.amax for s in stats if s.amax is not None]
        return TensorStats(
            sum(s.num_positive_inf for s in stats),
            sum(s.num_negative_inf for s in stats),
            sum(s.num_nan for s in stats),
            # max() would depend on the place of a NaN.
            next((a for a in amaxes if a != a), max(amaxes, default=None)),
        )


# Places in a ``Statistics``, to be looked up after its ``read``.
Wanted = list[int]


class Statistics:
    """Measures tensors without asking the host; ``read`` asks once for all of them."""

    def __init__(self) -> None:
        self._counts: list[Tensor] = []
        self._amaxes: list[Tensor] = []
        self._results: list[TensorStats] = []

    def add(self, tensors: Iterable[Tensor]) -> Wanted:
        """Measure the floating-point tensors among ``tensors`` and return where their numbers will be."""
        places = []
        for tensor in tensors:
            values = tensor_values(tensor)
            if values is None:
                continue
            try:
                counts, largest = _measure(values)
            except (RuntimeError, TypeError):
                # Tensor classes of a library's own may know no such operation; watching must not end a run.
                if type(values) is Tensor:
                    raise
                continue
            places.append(len(self._counts))
            self._counts.append(counts)
            self._amaxes.append(largest)
        return places

    def read(self) -> None:
        """Read what was added since the last call; waits for the devices."""
        start = len(self._results)
        # One transfer per device would do; tensors of several devices are rare, so they go one by one.
        counts = _to_lists(self._counts[start:])
        amaxes = _to_lists(self._amaxes[start:])
        self._results += [TensorStats(c[0], c[1], c[2], a) for c, a in zip(counts, amaxes, strict=True)]

    def of(self, wanted: Wanted) -> TensorStats:
        """Return the numbers of the tensors at these places together, after ``read``."""
        return TensorStats.joined(self._results[place] for place in wanted)


@torch.no_grad()
def _measure(values: Tensor) -> tuple[Tensor, Tensor]:
    # isinf and isnan of FP8 tensors are missing on some devices, and every format casts exactly.
    wide = values if values.dtype.itemsize > 1 else values.float()
    counts = [torch.isposinf(wide).sum(), torch.isneginf(wide).sum(), torch.isnan(wide).sum()]
    return torch.stack(counts), amax(values).float()


def _to_lists(tensors: list[Tensor]) -> list[Any]:
    if len({t.device for t in tensors}) > 1:
        return [t.tolist() for t in tensors]
    return torch.stack(tensors).tolist() if tensors else []


def tensor_values(tensor: Tensor) -> Tensor | None:
    """Return the real, dense, local numbers of a tensor; ``None`` for one that cannot overflow."""
    values = tensor.detach()
    if hasattr(values, "to_local"):
        values = values.to_local()
    if values.is_nested:
        # Its parts alone: what it stores may have gaps.
        parts = [part.flatten() for part in values.unbind()]
        values = torch.cat(parts) if parts else torch.empty(0)
    if values.layout in (torch.sparse_coo, torch.sparse_csr):
        values = values._values() if values.layout is torch.sparse_coo else values.values()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if values.layout is not torch.strided or not values.is_floating_point() or values.is_meta:
        return None
    return values


@torch.no_grad()
def make_finite_(tensor: Tensor) -> bool:
    """Put a finite value in the place of each that is not; tell whether the tensor has numbers to write to."""
    # The same numbers, but for the sign of their imaginary parts: what resolves a conjugate is a copy.
    values = tensor_values(tensor.conj() if tensor.is_conj() else tensor)
    if values is None or tensor.is_nested:
        return False
    wide = values.float() if values.dtype is not torch.float64 else values
    finite = wide[wide.isfinite()]
    # The middle one of its values is as likely as any to be valid, and 0.5 where a probability is meant.
    middle = finite.median() if finite.numel() else wide.new_tensor(0.5)
    values.copy_(torch.where(wide.isfinite(), wide, middle))
    return True


def named_tensors(value: Any) -> list[tuple[str, Tensor]]:
    """Find the tensors in nested mappings, sequences, dataclasses and plain objects, with dotted paths.

    What is reached in two ways is found in one of them, the shorter; a graph of objects, as of samples that refer to
    their data set, to a depth of 8 and to 4096 items, the nearest.

    Example:
        >>> [path for path, _ in named_tensors([torch.zeros(1), {"mask": torch.ones(1)}])]
        ['0', '1.mask']
    """
    if isinstance(value, Tensor):
        return [("", value)]
    found: list[tuple[tuple[int, ...], str, Tensor]] = []
    # Held: a property may make what it returns, and the next could get its address.
    seen: dict[int, Any] = {id(value): value}
    level: list[tuple[tuple[int, ...], str, Any]] = [((), "", value)]
    num_items = 0
    for _ in range(_MAX_DEPTH):
        holders, level = level, []
        for place, name, holder in holders:
            for position, (key, item) in enumerate(_items(holder)):
                num_items += 1
                if num_items > _MAX_ITEMS:
                    return _in_order(found)
                if isinstance(item, _PLAIN):
                    continue
                path = f"{name}.{key}" if name else str(key)
                if isinstance(item, Tensor):
                    found.append(((*place, position), path, item))
                elif id(item) not in seen:
                    seen[id(item)] = item
                    level.append(((*place, position), path, item))
    return _in_order(found)


def _in_order(found: list[tuple[tuple[int, ...], str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [(path, tensor) for _, path, tensor in sorted(found, key=itemgetter(0))]


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return zip(value._fields, value, strict=True)
    if isinstance(value, list | tuple):
        return enumerate(value)
    if is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in fields(value)]
    # Graphs and other batches of a library's own; modules and functions are no data.
    if isinstance(value, str | bytes | type | torch.nn.Module) or callable(value):
        return ()
    return getattr(value, "__dict__", {}).items()
