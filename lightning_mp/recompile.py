"""What ``torch.compile`` must be told after a module has been given another class."""

import sys

import torch

__all__ = ["forget_compiled"]

# Of a module of torch.nn, torch 2.11 does not look at the class again, so that code compiled before a swap runs on.
_NOTICES_CLASSES = torch.__version__ >= "2.13"


def forget_compiled() -> None:
    """Drop compiled code that does not notice that modules took another class; the next call compiles again."""
    if not _NOTICES_CLASSES and "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
