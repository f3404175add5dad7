"""The function mode that runs pinned functions in FP32."""

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

from lightning_mp.pinning.functions import FunctionRules, run_function, unfolded

__all__ = ["FunctionPins"]


class FunctionPins(TorchFunctionMode):
    """Run the functions that ``rules`` names in FP32 while this mode is entered.

    Every call of torch passes through an entered mode, at about 1.2 us each on CPU. It is therefore
    entered only in the ``forward`` of modules that call such functions, and left inside the others.

    Args:
        rules: Function to the dtype rule of its result.
    """

    def __init__(self, rules: FunctionRules) -> None:
        super().__init__()
        self.rules = rules

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = self.rules.get(func)
        if rule is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        if rule != "look inside":
            return run_function(func, args, kwargs or {}, rule)
        with self:
            return unfolded(func)(*args, **(kwargs or {}))
