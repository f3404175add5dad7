"""The report page and the event logs that it is built from."""

from lightning_mp.report.events import read_events

__all__ = ["read_events"]
