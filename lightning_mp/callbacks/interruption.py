"""What a monitor may still do when an exception ends the run."""

from collections.abc import Callable

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerStatus

from lightning_mp.precision.notices import notice

__all__ = ["is_alone", "is_interrupted", "settle_interrupted"]


def is_interrupted(trainer: Trainer) -> bool:
    """Tell whether an exception is ending the run, which no error of ours may hide."""
    return trainer.state.status == TrainerStatus.INTERRUPTED


def is_alone(trainer: Trainer) -> bool:
    """Tell whether other ranks may go on without this one, so that a collective would wait forever."""
    return trainer.world_size > 1 and is_interrupted(trainer)


def settle_interrupted(settle: Callable[[], None]) -> None:
    """Settle the step before the exception, and only say it if that fails too."""
    try:
        settle()
    # Whatever the device raises now, as after a failed kernel: the user is to see what ended the run.
    except Exception as error:
        notice(f"while the run was being interrupted: {error}")
