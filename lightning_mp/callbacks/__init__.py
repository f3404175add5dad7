"""Callbacks: they read and log, and never steer the numerics."""

from lightning_mp.callbacks.loss_scale_monitor import LossScaleMonitor

__all__ = ["LossScaleMonitor"]
