"""The report page and the event logs that it is built from."""

from lightning_mp.report.events import read_events
from lightning_mp.report.page import build_report

__all__ = ["build_report", "read_events"]
