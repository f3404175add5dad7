"""The precision manifest in few rows, and what a reader should know about it."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.formats import HALF_DTYPES
from lightning_mp.precision import ManifestRow
from lightning_mp.selection import is_transposed_linear

__all__ = [
    "ManifestGroup",
    "Misaligned",
    "count_bytes",
    "describe_totals",
    "dtype_name",
    "find_misaligned",
    "group_manifest",
]

_NAMES = {
    torch.float64: "FP64",
    torch.float32: "FP32",
    torch.bfloat16: "BF16",
    torch.float16: "FP16",
    torch.float8_e4m3fn: "FP8 E4M3FN",
    torch.float8_e5m2: "FP8 E5M2",
}
# Dimensions of tensor-core products: NVIDIA, "Deep Learning Performance" guide, 16-byte alignment.
_MULTIPLE, _FP8_MULTIPLE = 8, 16
_MAX_NAMES = 5
_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class ManifestGroup:
    """Rows of the manifest that share the first parts of their name.

    Args:
        fqn: The shared name; empty for the model itself.
        module_class: Name of the class of that module.
        num_params: Elements of its parameters, with those of all modules inside.
        num_bytes: What they occupy.
        param_dtypes: Names of the dtypes they are stored in.
        compute_dtypes: Names of the dtypes of matrix products and pinned modules.
        master: Where the FP32 values live that the optimizer updates.
        num_modules: Modules with parameters.
        num_pinned: Modules that are pinned to FP32.
        num_fp8: Modules whose products run in FP8.
    """

    fqn: str
    module_class: str
    num_params: int
    num_bytes: int
    param_dtypes: str
    compute_dtypes: str
    master: str
    num_modules: int
    num_pinned: int
    num_fp8: int


@dataclass(frozen=True)
class Misaligned:
    """A dimension of a matrix product that tensor cores run below their full rate.

    Args:
        fqn: Full dotted name of the module.
        dimension: Its attribute, such as ``"out_features"``; of a grouped convolution ``"in_channels / groups"``.
        size: What it is.
        padded: The next size that is aligned.
        multiple: What aligned sizes are multiples of.
    """

    fqn: str
    dimension: str
    size: int
    padded: int
    multiple: int


def dtype_name(dtype: torch.dtype | None) -> str:
    """Return ``"BF16"`` for ``torch.bfloat16``, and so on; empty for ``None``."""
    return "" if dtype is None else _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def group_manifest(rows: Sequence[ManifestRow], module: nn.Module, *, max_depth: int = 1) -> list[ManifestGroup]:
    """Join the rows of modules that are deeper in the model than ``max_depth``.

    Args:
        rows: The manifest.
        module: The model that the rows describe.
        max_depth: Parts of a name that stay apart: 0 gives one row for the model, -1 one per module.

    Raises:
        SettingTypeError: If ``max_depth`` is not an integer.
        SettingValueError: If ``max_depth`` is below -1.
    """
    check_max_depth(max_depth)
    groups: dict[str, list[ManifestRow]] = {}
    for row in rows:
        parts = row.fqn.split(".")
        key = row.fqn if max_depth < 0 else ".".join(parts[:max_depth])
        groups.setdefault(key, []).append(row)
    return [_join(key, members, module) for key, members in groups.items()]


def check_max_depth(max_depth: Any) -> None:
    """Refuse what is no depth."""
    if isinstance(max_depth, bool) or not isinstance(max_depth, int):
        raise SettingTypeError(f"max_depth={max_depth!r} is not allowed; it must be an integer.")
    if max_depth < -1:
        raise SettingValueError(f"max_depth={max_depth} is not allowed; it must be -1 (every module) or more.")


def _join(key: str, rows: Sequence[ManifestRow], module: nn.Module) -> ManifestGroup:
    return ManifestGroup(
        fqn=key,
        module_class=type(module.get_submodule(key)).__name__,
        num_params=sum(row.num_params for row in rows),
        num_bytes=sum(map(count_bytes, rows)),
        param_dtypes=_names(dtype_name(row.param_dtype) for row in rows),
        compute_dtypes=_names(dtype_name(row.compute_dtype) for row in rows),
        master=_names(row.master for row in rows),
        num_modules=len(rows),
        num_pinned=sum(row.pinned for row in rows),
        num_fp8=sum(row.fp8 for row in rows),
    )


def _names(found: Any) -> str:
    return ", ".join(dict.fromkeys(name for name in found if name))


def count_bytes(row: ManifestRow) -> int:
    """Return what the parameters of one row occupy."""
    return row.num_params * row.param_dtype.itemsize if row.param_dtype is not None else 0


def find_misaligned(module: nn.Module, rows: Sequence[ManifestRow], *, is_fp8: bool = False) -> list[Misaligned]:
    """Return the dimensions of 16-bit matrix products that are no multiples of 8, or 16 under FP8.

    A dimension of 1 is left out: padding it would multiply the work. So are depthwise convolutions, which
    are no matrix products. Other grouped convolutions are one product per group, whose channels count.

    Args:
        module: The model.
        rows: Its manifest; only modules that compute in 16 bits or FP8 count.
        is_fp8: Whether products are to run in FP8.
    """
    multiple = _FP8_MULTIPLE if is_fp8 else _MULTIPLE
    found = []
    for row in rows:
        if row.compute_dtype not in HALF_DTYPES and not row.fp8:
            continue
        for dimension, size in _dimensions(module.get_submodule(row.fqn)).items():
            if size > 1 and size % multiple:
                padded = -(-size // multiple) * multiple
                found.append(Misaligned(row.fqn, dimension, size, padded, multiple))
    return found


def _dimensions(module: nn.Module) -> dict[str, int]:
    if isinstance(module, nn.Linear):
        return {"in_features": module.in_features, "out_features": module.out_features}
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups == 1:
            return {"in_channels": module.in_channels, "out_channels": module.out_channels}
        if module.groups == module.in_channels:
            return {}
        return {
            "in_channels / groups": module.in_channels // module.groups,
            "out_channels / groups": module.out_channels // module.groups,
        }
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return {"input_size": int(module.input_size), "hidden_size": int(module.hidden_size)}
    if isinstance(module, nn.MultiheadAttention):
        return {"embed_dim": module.embed_dim}
    if is_transposed_linear(module):
        num_inputs, num_outputs = module.get_parameter("weight").shape
        return {"inputs": num_inputs, "outputs": num_outputs}
    return {}


def describe_totals(
    rows: Sequence[ManifestRow], misaligned: Sequence[Misaligned], *, is_fp8: bool, coverage: str = ""
) -> list[str]:
    """Return one line each for parameters by dtype, masters, pins, FP8 coverage and misaligned dimensions.

    Args:
        rows: The manifest.
        misaligned: What ``find_misaligned`` found.
        is_fp8: Whether products are to run in FP8.
        coverage: How much does, where that is known better than by counting rows.
    """
    lines = [_describe_parameters(rows), _describe_masters(rows)]
    pinned = [row.fqn for row in rows if row.pinned]
    if pinned:
        lines.append(f"Pinned to FP32: {len(pinned)} module{'s' if len(pinned) > 1 else ''} ({_few(pinned)})")
    if is_fp8:
        lines.append(_describe_fp8(rows, coverage))
    if misaligned:
        number = len(misaligned)
        found = "1 dimension is no multiple" if number == 1 else f"{number} dimensions are no multiples"
        pads = _describe_pads(misaligned)
        lines.append(f"Misaligned: {found} of {misaligned[0].multiple}, which costs speed on tensor cores; pad: {pads}")
    return lines


def _describe_pads(misaligned: Sequence[Misaligned]) -> str:
    """Name every dimension: modules with the same one together, and many of them by a pattern over their indices."""
    names: dict[str, list[str]] = {}
    for found in misaligned:
        names.setdefault(f"{found.dimension} {found.size} -> {found.padded}", []).append(found.fqn)
    return "; ".join(f"{pad} ({', '.join(_as_patterns(fqns))})" for pad, fqns in names.items())


def _as_patterns(fqns: Sequence[str]) -> list[str]:
    if len(fqns) <= _MAX_NAMES:
        return list(fqns)
    inside: dict[str, list[str]] = {}
    for fqn in fqns:
        inside.setdefault(_INDEX.sub("*", fqn), []).append(fqn)
    return [f"{len(many)} x {pattern}" if len(many) > 1 else many[0] for pattern, many in inside.items()]


def _describe_parameters(rows: Sequence[ManifestRow]) -> str:
    sizes: dict[str, list[int]] = {}
    for row in rows:
        if row.num_params:
            total = sizes.setdefault(dtype_name(row.param_dtype), [0, 0])
            total[0] += row.num_params
            total[1] += count_bytes(row)
    parts = [f"{count:,} in {name} ({size_text(size)})" for name, (count, size) in sizes.items()]
    return f"Parameters: {', '.join(parts) or 'none'}"


def _describe_masters(rows: Sequence[ManifestRow]) -> str:
    places: dict[str, int] = {}
    for row in rows:
        if row.num_params:
            # Parameters that are their own masters may be FP64.
            themselves = f"the parameters themselves, in {dtype_name(row.param_dtype)}"
            place = themselves if row.master == "params" else row.master
            places[place] = places.get(place, 0) + row.num_params
    words = {
        "copy": "an FP32 copy",
        "split": "16 further bits beside the BF16 parameter",
        "none": "nowhere: updates are rounded to 16 bits",
    }
    parts = [f"{words.get(place, place)} ({count:,})" for place, count in places.items()]
    return f"Master weights: {'; '.join(parts) or 'none'}"


def _describe_fp8(rows: Sequence[ManifestRow], coverage: str) -> str:
    linears = [row for row in rows if row.fp8 or "Linear" in row.module_class]
    left = [f"{row.fqn} ({row.reason})" for row in linears if not row.fp8]
    rest = f"; not: {_few(left)}" if left else ""
    return f"FP8: {coverage or f'{len(linears) - len(left)} of {len(linears)} Linear layers'}{rest}"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(name or "the model" for name in islice(names, _MAX_NAMES)) + more


def size_text(num_bytes: float) -> str:
    """Return bytes with a unit.

    Example:
        >>> size_text(512), size_text(3 * 2**20)
        ('512 B', '3.0 MiB')
    """
    if num_bytes < 1024:
        return f"{num_bytes:g} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        num_bytes /= 1024
        if num_bytes < 1024 or unit == "TiB":
            break
    return f"{num_bytes:.1f} {unit}"


def as_events(rows: Sequence[ManifestRow]) -> list[dict[str, Any]]:
    """Return rows as plain values, dtypes by name, for an event log."""
    dtypes = ("param_dtype", "compute_dtype", "observed_dtype")
    return [{**asdict(row), **{name: dtype_name(getattr(row, name)) for name in dtypes}} for row in rows]
