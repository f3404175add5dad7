"""Which parameters become 16-bit."""

import pytest
import torch
from torch import nn

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights import params_to_cast
from lightning_mp.selection import is_normalization


class LlamaRMSNorm(nn.Module):
    """As the transformers library writes it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class ConvNorm(nn.Module):
    """A block whose name ends in Norm and that is none: its weight is a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm1d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.LayerNorm((4, 4)),
        nn.RMSNorm(4),
        LlamaRMSNorm(4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_parameters_of_normalization_layers_stay_fp32(module: nn.Module) -> None:
    assert is_normalization(module)
    root = nn.Sequential(module, nn.Linear(4, 4))
    assert set(params_to_cast(root).values()) == {"1.weight", "1.bias"}


def test_a_matrix_is_cast_whatever_its_class_is_called() -> None:
    assert not is_normalization(ConvNorm())
    assert list(params_to_cast(nn.Sequential(ConvNorm())).values()) == ["0.weight"]


def test_only_floats_of_up_to_32_bits_are_cast_and_buffers_never() -> None:
    root = nn.Module()
    root.fp32 = nn.Parameter(torch.ones(2))
    root.fp16 = nn.Parameter(torch.ones(2).half())
    root.fp64 = nn.Parameter(torch.ones(2).double())
    root.complex = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    root.integer = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    root.register_buffer("buffer", torch.ones(2))
    assert list(params_to_cast(root).values()) == ["fp32", "fp16"]


def test_tied_parameters_count_once_and_stay_fp32_if_one_owner_must() -> None:
    root = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "head": nn.Linear(4, 4, bias=False)})
    root["head"].weight = root["embedding"].weight
    assert list(params_to_cast(root).values()) == ["embedding.weight"]
    assert params_to_cast(root, keep_fp32=[root["head"]]) == {}
    assert params_to_cast(root, keep_fp32=[root["head"].weight]) == {}


def test_a_lazy_parameter_is_left_out_until_it_has_a_shape() -> None:
    root = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    assert list(params_to_cast(root).values()) == ["0.weight", "0.bias"]
    root(torch.ones(1, 4))
    assert list(params_to_cast(root).values()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_meta_parameter_is_refused_with_its_name_and_the_fix() -> None:
    with torch.device("meta"):
        root = nn.Linear(4, 4)
    with pytest.raises(UnsupportedError, match=r"'weight' is on the meta device; masters need plain dense tensors"):
        params_to_cast(root)
