"""The FP32 values of a weight with a master, as an operator that a compiler does not look into.

Compiled code knows the 16-bit parameter only, and a master that it read itself would be an input of the
graph that grows old. The operator is called at each run of the graph and asks for the values of that moment.
"""

import itertools
import weakref

import torch
from torch import Tensor, nn

from lightning_mp.fp8.emulated import is_same

__all__ = ["new_key", "weight_values"]

_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def new_key(layer: nn.Module) -> Tensor:
    """Return what :func:`weight_values` knows a layer by.

    A tensor: the compiler would guard a number by its value, and compile equal blocks once each.
    """
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number, device="cpu")


@torch.library.custom_op("lightning_mp::weight_values", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def weight_values(weight: Tensor, key: Tensor) -> Tensor:
    """Return the values to cast to FP8 for a weight, those of its master if it is the layer's own.

    Args:
        weight: The layer's weight, or what ``torch.func.functional_call`` puts in its place.
        key: From :func:`new_key`, on the CPU.

    Returns:
        FP32 in fresh contiguous memory, of the shape of ``weight`` and on its device. Of a layer that is not
        in FP8 any more, and of a weight that is not its own, the values of ``weight`` itself.
    """
    layer = _layers.get(int(key))
    own = None if layer is None else layer._parameters.get("weight")
    backend = None if layer is None else layer.__dict__.get("_fp8")
    source = None if backend is None else backend.settings.step.weight_source
    with torch.no_grad():
        # The same bits elsewhere are the parameter too: a compiler may copy an input to align it.
        is_own = own is not None and (own.data_ptr() == weight.data_ptr() or is_same(own, weight))
        values = source(own) if source is not None and is_own else weight
        # A copy: memory that an operator returns is the compiler's to use again.
        return torch.empty(weight.shape, dtype=torch.float32, device=weight.device).copy_(values)


@weight_values.register_fake
def _(weight: Tensor, key: Tensor) -> Tensor:
    return torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
