"""What compiled code casts to FP8 in place of a 16-bit weight: the FP32 values of the moment."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lightning_mp.fp8 import FP8Config, FP8Engine
from lightning_mp.fp8.weight_values import new_key, weight_values

# Between two BF16 values, and not to be had from one.
MASTER = 1.0 + 2.0**-10


class Masters:
    """FP32 values beside BF16 parameters, as a bare table."""

    def __init__(self, *layers: nn.Linear, value: float = MASTER) -> None:
        self.values = {layer.weight: torch.full(layer.weight.shape, value) for layer in layers}

    def value_of(self, param: nn.Parameter) -> Tensor:
        return self.values[param]


def converted(*layers: nn.Linear) -> tuple[FP8Engine, Masters]:
    model = nn.Sequential(*layers).bfloat16()
    engine = FP8Engine(FP8Config(backend="emulated", skip_output_head=False))
    engine.convert_(model)
    masters = Masters(*layers)
    engine.take_weights_from(masters.value_of)
    return engine, masters


def test_operator_keeps_the_rules_of_torch_for_operators() -> None:
    layer = nn.Linear(16, 32)
    engine, _ = converted(layer)
    torch.library.opcheck(weight_values, (layer.weight.detach(), layer._fp8.weight_key))
    engine.revert_()


def test_values_are_those_of_the_moment_and_in_memory_of_their_own() -> None:
    layer = nn.Linear(16, 32)
    _, masters = converted(layer)
    first = weight_values(layer.weight, layer._fp8.weight_key)
    masters.values[layer.weight].fill_(3.0)
    second = weight_values(layer.weight, layer._fp8.weight_key)
    assert (first.unique().tolist(), second.unique().tolist()) == ([MASTER], [3.0])


def test_copy_of_the_weight_is_the_weight_and_another_tensor_is_itself() -> None:
    layer = nn.Linear(16, 32)
    _, _ = converted(layer)
    key = layer._fp8.weight_key
    assert weight_values(layer.weight.detach().clone(), key).unique().tolist() == [MASTER]
    other = torch.full((32, 16), 0.5, dtype=torch.bfloat16)
    assert weight_values(other, key).unique().tolist() == [0.5]


def test_weight_of_a_layer_that_is_not_in_fp8_any_more_is_itself() -> None:
    layer = nn.Linear(16, 32)
    engine, _ = converted(layer)
    key = layer._fp8.weight_key
    engine.revert_()
    assert torch.equal(weight_values(layer.weight, key), layer.weight.float())
    gone = new_key(nn.Linear(16, 32))
    gc.collect()
    assert torch.equal(weight_values(layer.weight, gone), layer.weight.float())


@pytest.mark.parametrize("num_layers", [1, 12])
def test_equal_layers_share_one_graph_that_never_grows_old(num_layers) -> None:
    torch._dynamo.reset()
    layers = [nn.Linear(32, 32, bias=False) for _ in range(num_layers)]
    _, masters = converted(*layers)
    counter = CompileCounter()
    for layer in layers:
        layer.compile(backend=counter, fullgraph=True)
    # 1.0 in FP8 in both operands: each element of the result is the scaled master, in FP8 exactly its amax.
    x = torch.eye(32)
    for value in (1.0, 2.0, 4.0):
        for layer in layers:
            masters.values[layer.weight].fill_(value)
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x).unique().tolist() == [value]
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_functional_call_in_a_graph_uses_the_weights_that_it_was_given() -> None:
    torch._dynamo.reset()
    layer = nn.Linear(32, 32, bias=False)
    converted(layer)
    given = torch.full((32, 32), 0.5, dtype=torch.bfloat16, requires_grad=True)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": given}, (x,))

    with torch.autocast("cpu", torch.bfloat16):
        y = call(torch.eye(32))
    assert y.unique().tolist() == [0.5]
    y.float().sum().backward()
    assert given.grad is not None
    assert layer.weight.grad is None
    torch._dynamo.reset()
