"""``FP8Linear`` is an ordinary layer wherever FP8 does not run, and leaves the run behind in copies."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_mp.fp8.layer import ConvertedLinear, LayerBackend, LayerSettings


class Doubling(LayerBackend):
    """A backend whose results cannot be mistaken for the layer's own."""

    def forward(self, layer, x):
        return 2 * nn.functional.linear(x, layer.weight, layer.bias)


def layer_of(*, in_eval: bool = False) -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.__dict__["_fp8"] = Doubling(LayerSettings(torch.bfloat16, in_eval, True))
    layer.__class__ = ConvertedLinear
    return layer


@pytest.mark.parametrize("in_region", [False, True])
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("in_eval", [False, True])
@pytest.mark.parametrize("demoted", ["", "saturated"])
def test_backend_runs_in_the_region_in_training_or_on_request_unless_demoted(
    in_region, is_training, in_eval, demoted
) -> None:
    layer = layer_of(in_eval=in_eval).train(is_training)
    layer._fp8.demoted = demoted
    x = torch.randn(2, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=in_region):
        y, plain = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    is_expected = in_region and (is_training or in_eval) and not demoted
    assert torch.equal(y, 2 * plain if is_expected else plain)


def by_torch_save(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_pickle(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("twin_of", [copy.deepcopy, copy.copy, by_pickle, by_torch_save])
def test_copies_and_pickles_are_plain_layers_with_everything_but_fp8(twin_of) -> None:
    layer = layer_of()
    layer.bias.requires_grad_(False)
    layer.register_forward_hook(add_one)
    twin = twin_of(layer)
    assert type(twin) is nn.Linear
    assert vars(twin).keys() == vars(nn.Linear(1, 1)).keys()
    assert (twin.in_features, twin.bias.requires_grad, twin.training) == (16, False, True)
    x = torch.randn(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(twin(x), nn.functional.linear(x, layer.weight, layer.bias) + 1)
    assert type(layer) is ConvertedLinear
    assert layer._fp8 is not None


def test_copies_of_a_layer_share_tied_parameters_with_their_copies() -> None:
    layer = layer_of()
    model = nn.ModuleList([layer, nn.Embedding(16, 16), layer])
    model[1].weight = layer.weight
    twin = copy.deepcopy(model)
    assert twin[0] is twin[2]
    assert twin[0].weight is twin[1].weight
    assert twin[0].weight is not layer.weight


def add_one(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output + 1


def test_base_backend_asks_its_subclass() -> None:
    backend = LayerBackend(LayerSettings(torch.bfloat16, False, True))
    with pytest.raises(NotImplementedError):
        backend.forward(nn.Linear(1, 1), torch.ones(1, 1))
    with pytest.raises(NotImplementedError):
        backend.invalidate_weight()
    with pytest.raises(NotImplementedError):
        backend.end_step(has_amax=True)
