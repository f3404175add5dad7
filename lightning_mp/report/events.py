"""Event logs: one JSON object per line, as the monitors write them and the report page reads them.

Numbers that JSON has no word for are written as the strings ``"Infinity"``, ``"-Infinity"`` and
``"NaN"``, so that any reader of JSON can read a log; ``read_events`` turns them back into floats. A text
that reads like one of them is written with an apostrophe before it, ``"'NaN"``, which ``read_events`` removes.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

__all__ = ["LOG_NAMES", "as_record", "encode_event", "read_events"]

# The logs of this package in the directory of a run; other files there are the user's.
LOG_NAMES = ("run", "loss_scale", "overflow", "gradient_range", "fp8")
_ENCODER = json.JSONEncoder(allow_nan=False)
_NONFINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def _write_float(value: float) -> str:
    return repr(value) if math.isfinite(value) else f'"{_spell(value)}"'


_WRITERS: dict[type, Callable[[Any], str]] = {
    bool: lambda value: "true" if value else "false",
    int: repr,
    float: _write_float,
}
_quote = json.encoder.encode_basestring_ascii


def as_record(event: Any) -> dict[str, Any]:
    """Return an event, a dataclass or a mapping, as a dict of its fields."""
    if is_dataclass(event) and not isinstance(event, type):
        # Without asdict, which copies every value deeply: this runs at every step.
        return {name: getattr(event, name) for name in event.__dataclass_fields__}
    return dict(event)


def encode_event(event: Any) -> bytes:
    r"""Return the line of the log that holds ``event``, a dataclass or a mapping, with its newline.

    Example:
        >>> encode_event({"step": 3, "amax": float("inf")})
        b'{"step": 3, "amax": "Infinity"}\n'
    """
    record = as_record(event)
    try:
        # A record of plain numbers is written at every step; JSONEncoder takes four times as long for it.
        return f"{{{', '.join([f'{_quote(k)}: {_WRITERS[type(v)](v)}' for k, v in record.items()])}}}\n".encode()
    except KeyError:
        return _ENCODER.encode(_spell(record)).encode() + b"\n"


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a log in order; a torn last line, left by a killed process, is none.

    Raises:
        json.JSONDecodeError: If a complete line is not JSON: somebody else wrote into the file.
    """
    if not path.exists():
        return []
    complete, _, _ = path.read_bytes().rpartition(b"\n")
    return [json.loads(line, object_hook=_unspell) for line in complete.splitlines() if line.strip()]


def _spell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str) and value.lstrip("'") in _NONFINITE:
        return f"'{value}"
    if isinstance(value, Mapping):
        return {key: _spell(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spell(item) for item in value]
    return value


def _unspell(record: dict[str, Any]) -> dict[str, Any]:
    return {key: _read_text(item) for key, item in record.items()}


def _read_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_read_text(item) for item in value]
    if not isinstance(value, str):
        return value
    is_quoted = value.startswith("'") and value.lstrip("'") in _NONFINITE
    return value[1:] if is_quoted else _NONFINITE.get(value, value)
