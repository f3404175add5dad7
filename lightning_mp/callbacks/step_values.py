"""Values of single steps in Lightning's results, kept there for their step alone."""

from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer

__all__ = ["StepValues"]


class StepValues:
    """Logs what belongs to one step, and takes it out of the results at the next.

    Lightning goes through all that was logged in an epoch at each further step, five Python calls for each value,
    although a value of ``on_step=True`` alone is only asked for at its own. ``trainer.callback_metrics`` keeps it.

    Attributes:
        keys: What is in the results now, so that a step without any needs no call.
    """

    def __init__(self) -> None:
        self.keys: list[str] = []

    def log(self, pl_module: LightningModule, values: Mapping[str, float], *, logger: bool = True) -> None:
        """Log from ``on_train_batch_end``."""
        for name, value in values.items():
            # Without a batch size Lightning would look for one in the batch, and refuse dataloader_iter.
            pl_module.log(name, float(value), on_step=True, on_epoch=False, logger=logger, batch_size=1)
        self.keys += [f"on_train_batch_end.{name}" for name in values]

    def drop(self, trainer: Trainer) -> None:
        """Take out what was logged at an earlier step."""
        results = trainer._results
        if results is not None:
            for key in self.keys:
                results.pop(key, None)
        self.keys.clear()
