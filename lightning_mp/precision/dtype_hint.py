"""What to do when torch says that an operation met two dtypes, while weights are in 16 bits."""

from types import TracebackType

from torch import nn

from lightning_mp.errors import LightningMPError
from lightning_mp.precision.notices import notice

__all__ = ["add_dtype_hint"]

_WORDS = ("dtype", "scalar type", "same type", "BFloat16", "Half")


def add_dtype_hint(error: BaseException | None, module: nn.Module | None, master_weights: str) -> None:
    """Add to a ``RuntimeError`` of torch about dtypes that 16-bit weights may be its cause, and the fix.

    Args:
        error: What ended the run; anything else than such an error is left alone.
        module: The root, to name the module in whose forward the error was raised.
        master_weights: The mode.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, LightningMPError):
        return
    if not any(word in str(error) for word in _WORDS):
        return
    name = _module_of(error.__traceback__, module)
    inner = None if name is None or module is None else module.get_submodule(name)
    patterns = (name,) if inner is not None and not list(inner.children()) else (name or "name", f"{name or 'name'}.*")
    hint = (
        f"master_weights={master_weights!r} keeps weights in 16 bits, and autocast does not cast for every operation. "
        "If this one met such a weight with FP32 values, keep its module in FP32: "
        f"FP32Pin(modules={patterns!r}). A forward outside of a step needs "
        "`with trainer.precision_plugin.forward_context():`. master_weights='params' has FP32 weights throughout."
    )
    if hasattr(error, "add_note"):
        error.add_note(f"lightning_mp: {hint}")
    else:  # Python 3.10
        notice(hint)


def _module_of(trace: TracebackType | None, root: nn.Module | None) -> str | None:
    """Return the dotted name of the innermost module below ``root`` whose method is on the stack."""
    names = {} if root is None else {id(child): name for name, child in root.named_modules() if name}
    found = None
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found
