"""Mixed-precision training for PyTorch Lightning: fast, small and visible."""

from lightning_mp.__about__ import __version__

__all__ = ["__version__"]
