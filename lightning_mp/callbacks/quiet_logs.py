"""A context in which what training logs goes nowhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection

__all__ = ["quiet_logs"]


@contextmanager
def quiet_logs(trainer: Trainer, module: LightningModule, batch: Any) -> Iterator[None]:
    """Have ``self.log``, however it is reached, and the ``log_*`` methods of the loggers leave nothing behind.

    Values go to results of their own, under the hook that a step would have; loggers get stand-ins on the object,
    which come off afterwards. What is written by ``logger.experiment`` is not seen here.
    """
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    # Not by setattr: a module may have a __setattr__ of its own.
    own = module.__dict__
    results, last_hook, hook = loop._results, connector._current_fx, module._current_fx_name
    silenced = [(vars(logger), name) for logger in trainer.loggers for name in _log_methods(logger)]
    try:
        loop._results = _ResultCollection(training=True)
        loop._results.batch = batch
        own["_current_fx_name"] = "training_step"
        for attributes, name in silenced:
            attributes[name] = _do_nothing
        yield
    finally:
        loop._results, connector._current_fx = results, last_hook
        own["_current_fx_name"] = hook
        for attributes, name in silenced:
            attributes.pop(name, None)


def _log_methods(logger: Any) -> list[str]:
    """Return those that the class defines, and nobody replaced on the object."""
    replaced = getattr(logger, "__dict__", None)
    if replaced is None:
        return []
    names = (name for name in dir(type(logger)) if name.startswith("log_") and name not in replaced)
    return [name for name in names if callable(getattr(type(logger), name, None))]


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a method that must leave no trace."""
