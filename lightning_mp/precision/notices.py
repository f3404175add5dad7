"""Telling the user, from rank zero, and once per process where once is enough."""

from lightning_utilities.core.rank_zero import rank_zero_info

__all__ = ["notice", "notice_once"]

_said: set[str] = set()


def notice(message: str) -> None:
    """Log ``message`` from rank zero through Lightning's logger, which shows it by default."""
    rank_zero_info(f"lightning_mp: {message}")


def notice_once(message: str) -> None:
    """Log ``message`` unless this process said it before."""
    if message not in _said:
        _said.add(message)
        notice(message)
