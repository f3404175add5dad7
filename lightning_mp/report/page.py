"""The report page: from event logs to one HTML file that needs nothing else."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, get_args

from lightning_mp.errors import SettingValueError
from lightning_mp.metrics.health import (
    Health,
    ScaleLimits,
    ScaleRecord,
    find_concern,
    find_first_applied,
    judge_health,
    shown_spans,
)
from lightning_mp.report.charts import exponent_chart, trajectory_chart
from lightning_mp.report.events import LOG_NAMES, read_events
from lightning_mp.report.summary import size_text

__all__ = ["FILENAME", "build_report", "read_logs", "render_page", "write_page"]

FILENAME = "precision_report.html"
Events: TypeAlias = list[dict[str, Any]]

_MAX_EVENTS = 50
_MAX_LAYERS = 30


def build_report(run_dir: str | Path, *, filename: str = FILENAME) -> Path:
    """Build the report page of a run from its event logs, and return its path.

    Args:
        run_dir: The directory that holds the logs: the logger's, or the ``dirpath`` of the callbacks.
        filename: Name of the page, which is written there.

    Raises:
        SettingValueError: If ``run_dir`` has no event logs, or one that somebody else wrote into.
    """
    directory = Path(run_dir)
    logs = read_logs(directory)
    if not logs:
        deeper = sorted({str(path.parent) for name in LOG_NAMES for path in directory.glob(f"**/{name}.jsonl")})
        hint = f" Found some in: {', '.join(deeper[:3])}." if deeper else ""
        raise SettingValueError(
            f"run_dir={str(run_dir)!r} holds no event logs (.jsonl).{hint} Pass the directory of the logger's files, "
            "or the dirpath of PrecisionReport and the monitors."
        )
    return write_page(logs, directory / filename)


def read_logs(directory: Path) -> dict[str, Events]:
    """Return the events of each log in a directory by its name; other files there are the user's.

    Raises:
        SettingValueError: If a log holds a line that is not JSON.
    """
    paths = [path for name in LOG_NAMES if (path := directory / f"{name}.jsonl").is_file()]
    return {path.stem: _read_log(path) for path in paths}


def _read_log(path: Path) -> Events:
    try:
        return read_events(path)
    except json.JSONDecodeError as error:
        raise SettingValueError(
            f"run_dir={str(path.parent)!r}: {path.name} holds a line that is not JSON ({error}). Only monitors write "
            "there: remove that line, or move the file away."
        ) from error


def write_page(logs: Mapping[str, Events], path: Path) -> Path:
    """Write the page for ``logs`` and return ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page(logs), encoding="utf-8")
    return path


def render_page(logs: Mapping[str, Events]) -> str:
    """Return the page as HTML.

    Args:
        logs: Events by name of the log: ``run``, ``loss_scale``, ``overflow``, ``gradient_range``, ``fp8``. What is
            missing is named on the page with the callback that records it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined)
    run = logs.get("run", [])
    start = _latest(run, "start")
    end = _latest(run, "end")
    return environment.get_template("template.html").render(
        start=start,
        end=end,
        checks_gradients=(start or {}).get("checks_gradients", True),
        num_starts=sum(event.get("event") == "start" for event in run),
        trajectory=_trajectory(logs.get("loss_scale", []), start),
        overflow=_overflow(logs.get("overflow", [])),
        gradients=_gradients(logs.get("gradient_range", []), logs.get("loss_scale", [])),
        fp8=_fp8(logs.get("fp8", [])),
        pins=_pins(_latest(run, "pins") or {}),
        memory=_memory(start, end),
        unmeasured_masters=any(name == "masters" and size and not held for name, size, held in _memory(start, end)),
        size_text=size_text,
    )


def _latest(run: Events, kind: str) -> dict[str, Any] | None:
    return next((event for event in reversed(run) if event.get("event") == kind), None)


def _pins(event: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the reports with the calls of all modules added up."""
    reports = []
    for report in event.get("reports", []):
        calls: Counter[tuple[str, str]] = Counter()
        for call in report["calls"]:
            calls[call["name"], call["dtype"]] += call["count"]
        added = [{"name": name, "dtype": dtype, "count": count} for (name, dtype), count in calls.items()]
        reports.append({**report, "calls": added})
    return reports


def _trajectory(events: Events, start: dict[str, Any] | None) -> dict[str, Any] | None:
    records = [ScaleRecord(**event) for event in events]
    if not records:
        return None
    limits = ScaleLimits(**(start or {}).get("limits") or {"is_dynamic": len({r.loss_scale for r in records}) > 1})
    first_applied = find_first_applied(records)
    health = judge_health(records, limits, first_applied=first_applied)
    spans = shown_spans(records, limits)
    return {
        "health": health,
        "concern": find_concern(records, first_applied=first_applied) if health == "healthy" else None,
        "message": (start or {}).get("message", ""),
        "num_attempts": len(records),
        "num_skipped": sum(record.skipped for record in records),
        "num_overflows": sum(record.found_inf for record in records),
        "last_scale": records[-1].loss_scale,
        "is_scaled": any(record.loss_scale != 1.0 for record in records),
        "concerns": sorted({state for _, _, state in spans if state not in get_args(Health)}),
        "chart": trajectory_chart(records, spans),
    }


def _overflow(events: Events) -> dict[str, Any] | None:
    if not events:
        return None
    alarms = [event for event in events if not event.get("calibrating")]
    return {
        "num_calibrating": len(events) - len(alarms),
        "num_alarms": len(alarms),
        "culprits": Counter((event.get("fqn", ""), event.get("phase", "")) for event in alarms).most_common(10),
        "shown": [{**event, "amax": _spell_amax(event.get("amax") or {})} for event in events[-_MAX_EVENTS:]],
    }


def _spell_amax(amax: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in amax.items() if isinstance(value, int | float))


def _gradients(events: Events, scales: Events) -> dict[str, Any] | None:
    everything = [event for event in events if str(event["group"]).rpartition("/")[2] == "all"]
    counts: Counter[int] = Counter()
    for event in everything:
        counts.update({int(exponent): count for exponent, count in event["histogram"].items()})
    if not counts:
        return None
    last = everything[-1]["step"]
    scale = next((event["loss_scale"] for event in reversed(scales) if event["step"] <= last), 1.0)
    newest = {event["group"]: event for event in events}
    if len(newest) == 2:  # a single group says the same as all
        newest = {group: event for group, event in newest.items() if group == everything[-1]["group"]}
    return {
        "num_measured": len(everything),
        "chart": exponent_chart(counts, loss_scale=scale or 1.0),
        "groups": list(newest.values()),
    }


def _fp8(events: Events) -> dict[str, Any] | None:
    """Return the layers that lose most at their last measurement, and those that were demoted."""
    if not events:
        return None
    newest = {(event["fqn"], event["operand"]): event for event in events}
    worst = sorted(newest.values(), key=lambda event: -max(event["saturated"] or 0, event["flushed"] or 0))
    demoted = list(dict.fromkeys(event["fqn"] for event in events if event.get("demoted")))
    return {"shown": worst[:_MAX_LAYERS], "num_operands": len(newest), "demoted": demoted}


def _memory(start: dict[str, Any] | None, end: dict[str, Any] | None) -> Sequence[tuple[str, Any, Any]]:
    """Return rows of component, estimated and measured bytes."""
    estimate = (start or {}).get("estimate") or {}
    measured = (end or {}).get("memory") or {}
    names = dict.fromkeys([*estimate, *measured])
    return [(name, estimate.get(name), measured.get(name)) for name in names]
