"""Measuring the casts of Transformer Engine from its own tensors, with tensors of the same layout."""

import pytest
import torch

from lightning_mp.fp8.emulated import EmulatedBackend
from lightning_mp.fp8.layer import LayerSettings
from lightning_mp.fp8.library_casts import CastWatch, measure_library_cast
from lightning_mp.fp8.quantize import Quantized, amax_of, quantize_tensor
from lightning_mp.fp8.recipes import BlockScaling
from lightning_mp.fp8.statistics import measure_cast

E4M3 = torch.float8_e4m3fn


class LibraryTensor:
    """What the library's tensors have: ``dequantize`` and the inverse scale."""

    def __init__(self, quantized: Quantized) -> None:
        self._quantized = quantized
        self._scale_inv = quantized.scale_inv

    def dequantize(self, *, dtype):
        return self._quantized.dequantize().to(dtype)


class LibraryBlocks:
    """What the library's block-scaled tensors have."""

    def __init__(self, quantized: Quantized) -> None:
        self.dequantize = LibraryTensor(quantized).dequantize


class LibraryQuantizer:
    """What the library's quantizers have: ``quantize_impl``."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def quantize_impl(self, x):
        return LibraryTensor(quantize_tensor(x, torch.tensor(self.scale), E4M3))


@pytest.mark.parametrize("scale", [448.0, 4096.0, 2.0**-12])
def test_numbers_are_those_of_the_emulated_cast(scale) -> None:
    x = torch.randn(32, 16) * torch.logspace(-4, 0, 32)[:, None]
    quantized = quantize_tensor(x, torch.tensor(scale), E4M3)
    expected = measure_cast(x, quantized)
    assert float(expected[2]) > 0 or float(expected[3]) > 0, "one of the scales must lose something"
    torch.testing.assert_close(measure_library_cast(x, LibraryTensor(quantized), E4M3), expected, rtol=1e-6, atol=0)


def test_numbers_of_block_scaling_are_those_of_the_emulated_cast() -> None:
    x = torch.randn(256, 256) * torch.logspace(-3, 3, 256)[:, None]
    backend = EmulatedBackend(LayerSettings(torch.bfloat16, fp8_in_eval=False, cache_weights=False), BlockScaling())
    quantized = backend.quantize(x, "input", is_recorded=False).rowwise
    found = measure_library_cast(x, LibraryBlocks(quantized), quantized.data.dtype)
    torch.testing.assert_close(found, measure_cast(x, quantized), rtol=1e-6, atol=0)


def test_watch_tells_of_every_cast_and_leaves_the_quantizer_as_it_was() -> None:
    quantizer, found = LibraryQuantizer(448.0), []
    watch = CastWatch(quantizer, "input", E4M3, lambda operand, measured: found.append((operand, measured)))
    x = torch.randn(2, 4, 16)
    cast = quantizer.quantize_impl(x)
    plain = LibraryQuantizer(448.0).quantize_impl(x)
    assert torch.equal(cast.dequantize(dtype=torch.float32), plain.dequantize(dtype=torch.float32))
    watch.stop()
    quantizer.quantize_impl(x)
    assert [operand for operand, _ in found] == ["input"]
    assert found[0][1][0] == amax_of(x)
    assert vars(quantizer) == {"scale": 448.0}
