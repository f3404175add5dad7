"""The FLOPs of a step, counted from shapes, against torch's own counter of what really ran."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.models import MODELS, llama_layers_that_fit, shrunk, training_flops


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("size", [1, 3])
def test_training_flops_are_those_that_torch_counts_in_a_step(spec, size) -> None:
    spec = shrunk(spec)
    model = spec.build()
    # Fused attention kernels recompute a product in backward, which is no useful work and is not counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*spec.batch(size, "cpu")).backward()
    assert training_flops(spec, size) == counter.get_total_flops()


def test_full_models_have_the_sizes_that_their_names_say() -> None:
    sizes = {}
    for spec in MODELS[1:]:
        with torch.device("meta"):
            sizes[spec.name] = sum(p.numel() for p in spec.build().parameters())
    assert sizes["gpt2-124m"] == pytest.approx(124.4e6, rel=0.01)
    assert sizes["gpt-1.3b"] == pytest.approx(1.31e9, rel=0.02)
    assert sizes["vit-l16"] == pytest.approx(304.3e6, rel=0.01)
    assert sizes["convnet-50"] == pytest.approx(25.56e6, rel=0.01)


def test_llama_blocks_of_eight_billion_have_218_million_parameters_and_as_many_layers_as_fit() -> None:
    spec = MODELS[0]
    h200, small = 139 * 2**30, 24 * 2**30
    # By hand: 4096 * (4096 + 4096 + 1024 + 1024) + 3 * 4096 * 14336 = 218.1M parameters, 3.49 GB of states, and
    # 4 * 4096 * (14 * 4096 + 5 * 14336) = 2.11 GB of activations: 5.60 GB per block.
    assert llama_layers_that_fit(spec, small) == int(0.85 * small / 5.6036e9) == 3
    assert llama_layers_that_fit(spec, h200) == 16
