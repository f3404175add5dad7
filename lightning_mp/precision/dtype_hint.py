"""What to do when torch says that an operation met two dtypes, while weights are in 16 bits."""

import re
from types import TracebackType

from torch import nn

from lightning_mp.errors import LightningMPError
from lightning_mp.precision.notices import notice

__all__ = ["add_dtype_hint", "add_hint"]

# Torch writes c10::BFloat16, CPUBFloat16Type, torch.bfloat16, Half; float, Float, torch.float32, Double.
_NARROW = re.compile(r"bfloat16|float16|\bhalf\b|HalfT", re.IGNORECASE)
_WIDE = re.compile(r"\b(torch\.)?(float|double)(32|64)?\b", re.IGNORECASE)
# What an operation says that has no 16-bit version: torch.linalg, torch.fft, cdist, Tensor.numpy.
_UNSUPPORTED = re.compile(
    r"(low precision dtypes not supported|not implemented for|unsupported (scalartype|dtype)|scalar type:)"
    r".*(bfloat16|half)",
    re.IGNORECASE,
)
# CPU norms and embedding_bag name one dtype or none.
_OTHER_WORDS = ("mixed dtype (CPU)", "to have the same type as tensor for argument", "to be equal to src.dtype")


def add_dtype_hint(error: BaseException | None, module: nn.Module | None, master_weights: str) -> None:
    """Add to an error of torch about a 16-bit and a wider dtype that 16-bit weights may be its cause.

    Args:
        error: What ended the run; anything else than such an error is left alone.
        module: The root, to name the module in whose forward the error was raised.
        master_weights: The mode.
    """
    if not isinstance(error, (RuntimeError, TypeError)) or isinstance(error, LightningMPError):
        return
    text = str(error)
    # Of TypeErrors only torch's own, as of Tensor.numpy.
    if not (_UNSUPPORTED.search(text) or (isinstance(error, RuntimeError) and _is_about_dtypes(text))):
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
    add_hint(error, hint)


def add_hint(error: BaseException, hint: str) -> None:
    """Add a note of ours to an error of somebody else."""
    if hasattr(error, "add_note"):
        error.add_note(f"lightning_mp: {hint}")
    else:  # Python 3.10
        notice(hint)


def _is_about_dtypes(text: str) -> bool:
    if "inplace operation" in text:
        return False
    names_both = _NARROW.search(text) is not None and _WIDE.search(text) is not None
    return names_both or any(words in text for words in _OTHER_WORDS)


def _module_of(trace: TracebackType | None, root: nn.Module | None) -> str | None:
    """Return the dotted name of the innermost module below ``root`` whose method is on the stack."""
    names = {} if root is None else {id(child): name for name, child in root.named_modules() if name}
    found = None
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found
