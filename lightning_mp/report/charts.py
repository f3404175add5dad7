"""Charts of the report page as inline SVG, colored by the page's style sheet, light and dark."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import get_args

from lightning_mp.formats import FP16
from lightning_mp.metrics.exponents import SHOWN_FORMATS, range_below, shown_exponents
from lightning_mp.metrics.health import Health, ScaleRecord
from lightning_mp.metrics.trajectory import change_points

__all__ = ["exponent_chart", "trajectory_chart"]

# Narrow, so that text stays readable when the page scales the chart to a phone.
_WIDTH, _HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 40
_RANGE_HEIGHT = 20
_MAX_MARKS = 500
_MAX_TICKS = 6
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class _Axis:
    """Maps numbers to places."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> str:
        share = (value - self.low) / ((self.high - self.low) or 1)
        return f"{self.start + share * (self.end - self.start):.1f}"

    def ticks(self) -> list[int]:
        first, last = math.ceil(self.low), math.floor(self.high)
        step = max(1, math.ceil((last - first) / _MAX_TICKS))
        power = 10 ** math.floor(math.log10(step))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= step)
        return list(range(math.ceil(first / step) * step, last + 1, step))


def trajectory_chart(records: Sequence[ScaleRecord], spans: Sequence[tuple[int, int, str]]) -> str:
    """Draw the scale on a logarithmic axis, overflows as crosses, and the health as bands.

    Args:
        records: Attempts in order, at least one.
        spans: What ``metrics.health.shown_spans`` returns.
    """
    exponents = [math.log2(r.loss_scale) for r in records if r.loss_scale > 0] or [0.0]
    x = _Axis(records[0].step, max(records[-1].step, records[0].step + 1), _LEFT, _WIDTH - _RIGHT)
    y = _Axis(math.floor(min(exponents)) - 1, math.ceil(max(exponents)) + 1, _HEIGHT - _BOTTOM, _TOP)
    parts = [_band(x, spans, index) for index in range(len(spans))]
    parts += [_horizontal(y.place(tick), f"2{str(tick).translate(_SUPERSCRIPTS)}") for tick in y.ticks()]
    parts += [_vertical(x.place(tick), f"{tick:,}") for tick in x.ticks()]
    parts.append(f'<path class="line" d="{_staircase(x, y, _thin(change_points(records)))}"/>')
    bad = [record for record in records if record.found_inf]
    parts += [_cross(x.place(r.step), y.place(_exponent(r.loss_scale, y))) for r in _thin(bad)]
    title = f"Loss scale over {len(records)} attempts, {len(bad)} of them with non-finite gradients"
    return _svg(title, parts, "step", "loss scale")


def _exponent(scale: float, axis: _Axis) -> float:
    return math.log2(scale) if scale > 0 else axis.low


def _thin(records: Sequence[ScaleRecord]) -> list[ScaleRecord]:
    """Leave out records evenly where there are more than a chart can show; the last one stays."""
    stride = max(1, len(records) // _MAX_MARKS)
    return list(records) if stride == 1 else [*records[:-1:stride], records[-1]]


def _staircase(x: _Axis, y: _Axis, records: Sequence[ScaleRecord]) -> str:
    first, *rest = records
    steps = [f"M{x.place(first.step)} {y.place(_exponent(first.loss_scale, y))}"]
    steps += [f"H{x.place(r.step)}V{y.place(_exponent(r.loss_scale, y))}" for r in rest]
    return "".join(steps)


def _band(x: _Axis, spans: Sequence[tuple[int, int, str]], index: int) -> str:
    first, last, health = spans[index]
    end = spans[index + 1][0] if index + 1 < len(spans) else last
    left, right = float(x.place(first)), float(x.place(end))
    height = _HEIGHT - _TOP - _BOTTOM
    kind = health if health in get_args(Health) else "concern"
    return (
        f'<rect class="band {kind}" x="{left}" y="{_TOP}" width="{max(right - left, 1.5):.1f}" height="{height}">'
        f"<title>{health}: steps {first} to {last}</title></rect>"
    )


def _cross(x: str, y: str) -> str:
    return f'<path class="mark" transform="translate({x} {y})" d="M-3.5-3.5L3.5 3.5M-3.5 3.5L3.5-3.5"/>'


def exponent_chart(counts: Mapping[int, int], *, loss_scale: float = 1.0) -> str:
    """Draw the share of nonzero gradients per exponent under the ranges of four formats.

    Args:
        counts: Elements by exponent, at least one.
        loss_scale: Marks the lower end of FP16 at this loss scale too.
    """
    total = sum(counts.values())
    full = {exponent: counts.get(exponent, 0) for exponent in range(min(counts), max(counts) + 1)}
    shown = shown_exponents(full)
    top = max(counts.values()) / total * 100
    x = _Axis(shown[0], shown[-1] + 1, _LEFT, _WIDTH - _RIGHT)
    ranges_height = _RANGE_HEIGHT * len(SHOWN_FORMATS)
    y = _Axis(0, top, _HEIGHT - _BOTTOM, _TOP + ranges_height)
    parts = [_horizontal(y.place(tick), f"{tick}%") for tick in y.ticks()]
    parts += [_vertical(x.place(tick), f"2{str(tick).translate(_SUPERSCRIPTS)}") for tick in x.ticks()]
    for exponent in shown:
        if full.get(exponent):
            parts.append(_bar(x, y, exponent, 100 * full[exponent] / total))
    parts += [_range(x, row, full, total) for row in range(len(SHOWN_FORMATS))]
    floor = FP16.min_subnormal_exponent - math.log2(loss_scale)
    if loss_scale != 1.0 and shown[0] < floor < shown[-1]:
        label = f"FP16 floor at loss scale {loss_scale:g}"
        parts.append(
            f'<path class="floor" d="M{x.place(floor)} {_TOP}V{_HEIGHT - _BOTTOM}"><title>{label}</title></path>'
        )
    return _svg(f"Exponents of {total:,} gradients against four formats", parts, "magnitude of the gradient", "share")


def _bar(x: _Axis, y: _Axis, exponent: int, share: float) -> str:
    left, right, height = float(x.place(exponent)), float(x.place(exponent + 1)), float(y.place(share))
    return (
        f'<rect class="bar" x="{left + 0.5:.1f}" y="{height}" width="{max(right - left - 1, 0.8):.1f}" '
        f'height="{_HEIGHT - _BOTTOM - height:.1f}"><title>2^{exponent}: {share:.3g}%</title></rect>'
    )


def _range(x: _Axis, row: int, counts: dict[int, int], total: int) -> str:
    known = SHOWN_FORMATS[row]
    height = _TOP + _RANGE_HEIGHT * row + 12
    lowest, normal = max(known.min_subnormal_exponent, x.low), max(known.min_exponent, x.low)
    highest = min(known.max_exponent + 1, x.high)
    lost = 100 * range_below(counts, known) / total
    name = f"format{row}"
    return (
        f'<path class="subnormal {name}" d="M{x.place(lowest)} {height}H{x.place(normal)}"/>'
        f'<path class="normal {name}" d="M{x.place(normal)} {height}H{x.place(highest)}"/>'
        f'<text x="{_WIDTH - _RIGHT}" y="{height - 5}" class="range" text-anchor="end">'
        f"{known.name}: {lost:.3g}% below</text>"
    )


def _horizontal(y: str, label: str) -> str:
    line = f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>'
    return f'{line}<text x="{_LEFT - 5}" y="{float(y) + 4:.1f}" text-anchor="end">{label}</text>'


def _vertical(x: str, label: str) -> str:
    return f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{label}</text>'


def _svg(title: str, parts: Sequence[str], x_name: str, y_name: str) -> str:
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    names = f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle" class="name">{x_name}</text>'
    frame = f'<path class="frame" d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>'
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}: {y_name} over {x_name}">'
    return f"{head}<title>{escape(title)}</title>{''.join(parts)}{frame}{names}</svg>"
