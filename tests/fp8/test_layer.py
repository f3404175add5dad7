"""``FP8Linear`` is an ordinary layer wherever FP8 does not run, and leaves the run behind in copies."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_mp.fp8 import FP8Linear
from lightning_mp.fp8.layer import LayerBackend, LayerSettings, StepFlags


class Doubling(LayerBackend):
    """A backend whose results cannot be mistaken for the layer's own."""

    def forward(self, layer, x):
        return 2 * nn.functional.linear(x, layer.weight, layer.bias)


def layer_of(*, in_eval: bool = False) -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.__dict__["_fp8"] = Doubling(LayerSettings(torch.bfloat16, in_eval, True))
    layer.__class__ = FP8Linear
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


def test_copies_and_pickles_leave_the_flags_of_the_run_behind() -> None:
    flags = StepFlags(collects=True, has_amax=True, weight_source=lambda weight: weight)
    for twin in (copy.deepcopy(flags), pickle.loads(pickle.dumps(flags))):
        assert twin == StepFlags()
    assert flags.collects


def test_base_backend_asks_its_subclass() -> None:
    backend = LayerBackend(LayerSettings(torch.bfloat16, False, True))
    with pytest.raises(NotImplementedError):
        backend.forward(nn.Linear(1, 1), torch.ones(1, 1))
    with pytest.raises(NotImplementedError):
        backend.invalidate_weight()
    with pytest.raises(NotImplementedError):
        backend.end_step(has_amax=True)
