"""Where a monitor writes what it saw: an append-only ``.jsonl`` file beside the logger's files."""

import os
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch import Trainer

from lightning_mp.report.events import LOG_NAMES, as_record, encode_event, read_events

__all__ = ["EventLog", "gather_events", "logs_of", "run_directory"]

_T = TypeVar("_T")

_MAX_DEFERRED = 16


class EventLog:
    """Writes the events of one monitor, one JSON object per line, from rank zero.

    Each line reaches the operating system in one write, so that a killed process leaves complete lines
    and at most one torn one, which the next run removes. A run that resumes at step s first removes
    the events with a ``step`` of s or more: it makes those steps again. A run from step zero moves a
    log that it finds aside, to ``NAME-v1.jsonl``, and with it the logs of monitors that it does not
    have, so that a directory tells of one run. The second of two monitors that share name and directory
    writes ``NAME-copy2.jsonl``. Without a directory events are kept in memory. Nothing is written under
    ``fast_dev_run``.

    Args:
        name: Name of the file without its ending, such as ``"overflow"``.
        dirpath: Directory of the file; ``None`` for the logger's.

    Attributes:
        path: The file; ``None`` without a directory, on other ranks, and before ``open``.
    """

    def __init__(self, name: str, dirpath: str | Path | None = None) -> None:
        self.name = name
        self.dirpath = dirpath
        self.path: Path | None = None
        self._is_writer = False
        self._file: FileIO | None = None
        self._kept: list[Any] = []
        self._deferred: list[Any] = []

    def open(self, trainer: Trainer) -> None:
        """Begin or continue at the step where ``trainer`` stands; call it in ``on_train_start``.

        Earlier hooks are too early: they also run before the learning-rate finder's probing, and the
        step of a checkpoint is not restored yet.
        """
        self.close()
        self._is_writer = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        directory = run_directory(trainer, self.dirpath) if self._is_writer else None
        self.path = None if directory is None else self._path_in(directory, trainer)
        if directory is not None and trainer.global_step == 0:
            _set_strangers_aside(directory, trainer)
        self._kept = [event for event in self._kept if _is_before(event, trainer.global_step)]
        if self.path is not None and self.path.exists():
            _continue_at(self.path, trainer.global_step)

    def _path_in(self, directory: Path, trainer: Trainer) -> Path:
        same = [log for log in logs_of(trainer.callbacks) if log.name == self.name]  # type: ignore[attr-defined]
        here = [log for log in same if run_directory(trainer, log.dirpath) == directory]
        number = next((index for index, log in enumerate(here) if log is self), 0)
        return directory / (f"{self.name}-copy{number + 1}.jsonl" if number else f"{self.name}.jsonl")

    def append(self, event: Any) -> None:
        """Write one event, a dataclass or a mapping; on other ranks than zero nothing happens."""
        if self.path is None:
            if self._is_writer:
                self._kept.append(event)
            return
        self._deferred.append(event)
        self.flush()

    def defer(self, event: Any) -> None:
        """Write one event together with the next ones, at the latest when 16 wait: a write costs as much as an event.

        A killed process loses those that wait.
        """
        if self.path is None:
            self.append(event)
            return
        self._deferred.append(event)
        if len(self._deferred) >= _MAX_DEFERRED:
            self.flush()

    def flush(self) -> None:
        """Write the events that wait."""
        if not self._deferred or self.path is None:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(self.path, "a")
        deferred, self._deferred = self._deferred, []
        self._file.write(b"".join([encode_event(event) for event in deferred]))

    def read(self) -> list[dict[str, Any]]:
        """Return all events of the run as dicts, from the file or from memory."""
        self.flush()
        if self.path is not None:
            return read_events(self.path)
        return [as_record(event) for event in self._kept]

    def close(self) -> None:
        """Close the file; the next event opens it again."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, as a launcher or deepcopy makes it, opens the file for itself.
        return {**self.__dict__, "_file": None, "_deferred": []}


def run_directory(trainer: Trainer, dirpath: str | Path | None = None) -> Path | None:
    """Return the directory for what describes this run, or ``None`` if no local one is known.

    ``dirpath`` wins. Else it is that of the first logger with a directory: its ``log_dir``, or
    ``save_dir/name/version``, where ``ModelCheckpoint`` puts its files. Only rank zero may rely on it.
    """
    if dirpath is not None:
        return Path(dirpath)
    for logger in trainer.loggers:
        found = logger.log_dir
        if found is None and isinstance(logger.save_dir, str | os.PathLike):
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            found = os.path.join(logger.save_dir, str(logger.name), version)
        if isinstance(found, str | os.PathLike) and "://" not in str(found):
            return Path(found)
    return None


def logs_of(callbacks: Iterable[Any]) -> list[EventLog]:
    """Return the event logs of the monitors, wherever they lie."""
    return [value for callback in callbacks for value in vars(callback).values() if isinstance(value, EventLog)]


def gather_events(events: list[_T]) -> list[_T]:
    """Return the events of all ranks, in the order of the ranks; every rank must call this.

    Args:
        events: Picklable values of this rank; they should carry their rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return list(events)
    gathered: list[list[_T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, events)
    return [event for of_rank in gathered for event in of_rank]


def _is_before(event: Any, step: int) -> bool:
    return bool(as_record(event).get("step", -1) < step)


def _continue_at(path: Path, step: int) -> None:
    """Leave of the file the events before ``step``, whole lines only; from step zero set it aside."""
    events = read_events(path)
    if step == 0 and events:
        path.replace(_unused(path))
        return
    kept = b"".join(encode_event(event) for event in events if _is_before(event, step))
    if kept != path.read_bytes():
        # Written beside and moved over: a process killed in between leaves the old file whole.
        beside = path.with_suffix(".jsonl.tmp")
        beside.write_bytes(kept)
        beside.replace(path)


def _set_strangers_aside(directory: Path, trainer: Trainer) -> None:
    """Move the logs of an earlier run away that no callback of this one continues; the page would mix them."""
    logs = logs_of(trainer.callbacks)  # type: ignore[attr-defined]
    here = {log.name for log in logs if run_directory(trainer, log.dirpath) == directory}
    for path in (directory / f"{name}.jsonl" for name in LOG_NAMES if name not in here):
        if path.exists():
            path.replace(_unused(path))


def _unused(path: Path) -> Path:
    number = 1
    while (found := path.with_name(f"{path.stem}-v{number}{path.suffix}")).exists():
        number += 1
    return found
