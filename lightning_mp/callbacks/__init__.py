"""Callbacks: they read and log, and never steer the numerics."""

__all__: list[str] = []
