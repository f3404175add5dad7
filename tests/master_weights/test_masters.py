"""How one parameter's FP32 value is kept, and what a write from outside does to it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mp.master_weights.masters import CopyMaster, Master, NoMaster
from lightning_mp.master_weights.scratch import Scratch
from lightning_mp.master_weights.split_master import SplitMaster

KINDS = [CopyMaster, SplitMaster]


def make(kind: type[Master], value: torch.Tensor | None = None) -> tuple[nn.Parameter, Master, torch.Tensor]:
    value = torch.randn(40, 8) if value is None else value
    param = nn.Parameter(value.clone())
    return param, kind(param, torch.bfloat16), value


@contextmanager
def stepped(master: Master) -> Iterator[nn.Parameter]:
    """Load, let the caller update, and store, as a step does."""
    scratch = Scratch()
    stand_ins = type(master).load_all([master], scratch)
    with torch.no_grad():
        yield stand_ins[0]
    type(master).store_all([master], stand_ins, scratch)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype is right.dtype is torch.float32 and torch.equal(left.view(torch.int32), right.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_master_keeps_the_value_that_the_cast_parameter_loses(kind: type[Master]) -> None:
    param, master, value = make(kind)
    assert param.dtype is torch.bfloat16
    assert not torch.equal(param.detach().float(), value)
    assert same_bits(master.value(), value)
    master.restore_()
    assert same_bits(param.detach(), value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_arrives_in_16_bits_gives_its_value_as_master(kind: type[Master], dtype: torch.dtype) -> None:
    value = torch.randn(100).to(dtype)
    param = nn.Parameter(value.clone())
    master = kind(param, torch.bfloat16)
    assert same_bits(master.value(), value.float())


@pytest.mark.parametrize(("kind", "expected"), [(CopyMaster, 4), (SplitMaster, 2), (NoMaster, 0)])
def test_bytes_beside_the_parameter_are_those_of_the_contract(kind: type[Master], expected: int) -> None:
    _, master, value = make(kind)
    assert master.nbytes == expected * value.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_laid_out_anew_in_training_keeps_every_bit(kind: type[Master]) -> None:
    param, master, value = make(kind, torch.randn(16, 16, 3, 3))
    param.data = param.data.to(memory_format=torch.channels_last)
    with stepped(master) as stand_in:
        assert same_bits(stand_in.detach(), value)
    assert same_bits(master.value(), value)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [CopyMaster, SplitMaster])
def test_another_dtype_with_the_same_values_changes_no_master(
    kind: type[Master], dtype: torch.dtype, layout: Any
) -> None:
    param, master, value = make(kind, torch.randn(16, 16, 3, 3))
    param.data = param.data.to(dtype, memory_format=layout)
    assert same_bits(master.value(), value)
    assert param.dtype is torch.bfloat16
    # And with one value changed by less than the master's own bits, that one alone.
    param.data = param.data.to(dtype)
    param.data[3, 2, 1, 0] += 1e-6
    expected = value.clone()
    expected[3, 2, 1, 0] = param.data[3, 2, 1, 0]
    assert same_bits(master.value(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_before_a_parameter_is_laid_out_anew_is_taken_over(kind: type[Master]) -> None:
    param, master, value = make(kind, torch.randn(16, 16, 3, 3))
    for layout in (torch.channels_last, torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            param.zero_()
            param[1].fill_(-0.25)
        expected = torch.zeros_like(value)
        expected[1] = -0.25
        param.data = param.data.to(memory_format=layout)
        assert same_bits(master.value(), expected)
        master.assign(value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_a_parameter_in_another_memory_order_is_restored(kind: type[Master], layout: str) -> None:
    value = torch.randn(4, 3, 2, 5)
    value = value.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else value.transpose(0, 1)
    _param, master, value = make(kind, value)
    assert same_bits(master.value(), value)
    with stepped(master) as stand_in:
        stand_in.add_(1.0)
    assert same_bits(master.value(), value + 1.0)


WRITES = {
    "zero_": lambda param: param.zero_(),
    "fill_": lambda param: param.fill_(0.1),
    "copy_": lambda param: param.copy_(torch.linspace(-3, 3, param.numel()).view_as(param)),
    "init": lambda param: nn.init.constant_(param, 1.5),
    "data.zero_": lambda param: param.data.zero_(),
    "data.fill_": lambda param: param.data.fill_(0.1),
    "data.copy_": lambda param: param.data.copy_(torch.linspace(-3, 3, param.numel()).view_as(param)),
    "data of one element": lambda param: param.data[0].fill_(0.3),
    "data": lambda param: setattr(param, "data", torch.full_like(param, 0.7)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_written_from_outside_is_taken_over_exactly(kind: type[Master], write: Any) -> None:
    param, master, _ = make(kind, torch.randn(40, 8).bfloat16().float())
    with torch.no_grad():
        write(param)
    assert same_bits(master.value(), param.detach().float())
    with stepped(master) as stand_in:
        assert same_bits(stand_in.detach(), param.detach().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_another_dtype_assigned_through_data_is_taken_over_whole_and_cast_back(
    kind: type[Master], dtype: torch.dtype
) -> None:
    param, master, _ = make(kind)
    grad = torch.randn(40, 8)
    param.grad_dtype = torch.float32
    param.grad = grad
    value = torch.randn(40, 8).to(dtype)
    param.data = value.clone()
    with stepped(master) as stand_in:
        assert same_bits(stand_in.detach(), value.float())
        stand_in.add_(1e-4)
    assert param.dtype is torch.bfloat16
    assert same_bits(master.value(), value.float() + 1e-4)
    assert param.grad is not None
    assert torch.equal(param.grad, grad)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_another_dtype_is_restored_without_a_step_in_between(kind: type[Master]) -> None:
    param, master, _ = make(kind)
    value = torch.randn(40, 8)
    param.data = value.clone()
    master.restore_()
    assert same_bits(param.detach(), value)


@pytest.mark.parametrize("kind", KINDS)
def test_vector_to_parameters_writes_the_masters(kind: type[Master]) -> None:
    pairs = [make(kind) for _ in range(3)]
    vector = torch.randn(3 * 320)
    nn.utils.vector_to_parameters(vector, [param for param, _, _ in pairs])
    for (_, master, _), expected in zip(pairs, vector.view(3, 40, 8), strict=True):
        with stepped(master):
            """Nothing is updated."""
        assert same_bits(master.value(), expected)


@pytest.mark.parametrize("shape", [(40, 8), (3, 5), (1,), ()])
def test_a_value_with_more_than_16_bits_survives_until_the_weight_is_written(shape: tuple[int, ...]) -> None:
    param, master, value = make(SplitMaster, torch.randn(shape))
    for _ in range(3):
        with stepped(master):
            """Nothing is updated."""
        assert same_bits(master.value(), value)
    param.data.fill_(0.3)
    assert same_bits(master.value(), param.detach().float())


def test_copy_takes_over_only_the_elements_that_were_written() -> None:
    param, master, value = make(CopyMaster)
    with torch.no_grad():
        param[3].fill_(2.0)
    expected = value.clone()
    expected[3] = 2.0
    assert same_bits(master.value(), expected)


def test_split_takes_over_the_written_block_at_first_and_the_written_elements_from_then_on() -> None:
    param, master, value = make(SplitMaster)
    with torch.no_grad():
        param[3].fill_(2.0)
    # The first write: the weight as it stands, in the 256 elements that are one block.
    expected = value.clone()
    expected[:32] = param.detach()[:32].float()
    assert same_bits(master.value(), expected)
    with stepped(master) as stand_in:
        stand_in.copy_(value)
    with torch.no_grad():
        param.clamp_(-1.0, 1.0)  # as a WGAN does after every step
    clamped = value.bfloat16().abs() > 1.0
    found = master.value()
    assert same_bits(found[~clamped], value[~clamped])
    assert same_bits(found[clamped], value[clamped].sign())


def test_split_keeps_every_element_that_is_not_written_once_the_published_bits_are_kept() -> None:
    param, master, value = make(SplitMaster)
    master.keep_published_()
    assert master.nbytes == 4 * value.numel()
    with torch.no_grad():
        param[3].fill_(2.0)
    value[3] = 2.0
    assert same_bits(master.value(), value)


WRITES_BACK = {
    "multiplied by one": lambda param: param.mul_(1.0),
    "perturbed and restored": lambda param: (old := param.clone(), param.add_(0.1), param.copy_(old)),
    "swapped through data": lambda param: setattr(param, "data", param.data.clone()),
    "clamped out of reach": lambda param: param.clamp_(-100.0, 100.0),
}


@pytest.mark.parametrize("write", WRITES_BACK.values(), ids=WRITES_BACK)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_written_and_put_back_loses_nothing(kind: type[Master], write: Any) -> None:
    param, master, value = make(kind)
    with torch.no_grad():
        write(param)
    with stepped(master) as stand_in:
        assert same_bits(stand_in.detach(), value)
    assert master.nbytes == (4 if kind is CopyMaster else 2) * value.numel()


PERMUTATIONS = {
    "rows": lambda param: param.data.flip(0),
    "columns": lambda param: param.data.flip(1),
    "two elements": lambda param: torch.cat([param.data.flatten()[[8, *range(1, 8), 0]], param.data.flatten()[9:]]),
}


@pytest.mark.parametrize("permute", PERMUTATIONS.values(), ids=PERMUTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_permutation_through_data_is_taken_over(kind: type[Master], permute: Any) -> None:
    param, master, _ = make(kind, torch.randn(40, 8).bfloat16().float() + 2.0**-20)
    permuted = permute(param).reshape(40, 8)
    changed = permuted != param.detach()
    param.data.copy_(permuted)
    assert same_bits(master.value()[changed], permuted[changed].float())


@pytest.mark.parametrize("when", ["on the parameter", "through data"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_written_before_training_is_taken_over(kind: type[Master], when: str) -> None:
    # Zero with the further bits of what was there before would be a NaN where these are negative.
    param, master, _ = make(kind)
    with torch.no_grad():
        (param if when == "on the parameter" else param.data).zero_()
    master.take_writes_()
    assert same_bits(master.value(), torch.zeros(40, 8))


@pytest.mark.parametrize("kind", [CopyMaster, SplitMaster, NoMaster])
def test_identity_gradient_dtype_and_deepcopy_survive_a_round_trip(kind: type[Master]) -> None:
    param, master, _ = make(kind)
    identity = id(param)
    master.restore_()
    assert id(param) == identity
    assert param.grad_dtype is param.dtype
    param.float().sum().backward()
    assert param.grad.dtype is param.dtype
    assert copy.deepcopy(param).dtype is (torch.bfloat16 if kind is NoMaster else torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_an_optimizer_assigns_to_the_stand_in_is_taken(kind: type[Master]) -> None:
    # Some optimizers write `param.data = new` where others update in place.
    _, master, value = make(kind)
    with stepped(master) as stand_in:
        stand_in.data = stand_in.data + 1.0
    assert same_bits(master.value(), value + 1.0)
