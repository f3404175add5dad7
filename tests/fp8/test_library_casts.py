"""Measuring and feeding the casts of Transformer Engine, with tensors and methods of the same layout."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_mp.errors import UnsupportedError
from lightning_mp.fp8.emulated import EmulatedBackend
from lightning_mp.fp8.layer import LayerSettings
from lightning_mp.fp8.library_casts import CastWatch, cast_weight_from, measure_library_cast
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


class Kept:
    """What the library keeps of a cached weight."""

    def __init__(self, x: Tensor) -> None:
        self.source = x

    def quantize_(self, x: Tensor, *, noop_flag: Tensor | None = None) -> None:
        self.source = x


class OuterQuantizer:
    """What the library calls: ``quantize``."""

    def quantize(self, x: Tensor, *, dtype: torch.dtype | None = None) -> Kept:
        return Kept(x)


class Module(nn.Module):
    """What a te.Linear has; its forward is what a test makes of it."""

    def __init__(self, *, one_quantizer: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
        self.quantizers = {"scaling_fwd": {}}
        self._fp8_workspaces: dict[str, Kept] = {}
        self._makers = [OuterQuantizer()] * 3 if one_quantizer else [OuterQuantizer() for _ in range(3)]

    def init_fp8_metadata(self, num_gemms: int) -> None:
        self.quantizers["scaling_fwd"] = self._makers


def test_first_cast_and_those_in_place_take_the_values_and_leave_no_trace() -> None:
    module = Module()
    for number in range(3):
        values = torch.full((2, 2), float(number))
        with cast_weight_from(module, lambda values=values: values, is_due=True):
            if number == 0:
                kept = module._makers[1].quantize(module.weight, dtype=torch.bfloat16)
                module._fp8_workspaces["weight"] = kept
            else:
                kept.quantize_(module.weight, noop_flag=None)
        assert kept.source is values
        assert vars(module._makers[1]) == {}
        assert list(vars(kept)) == ["source"]
    assert module._makers[1].quantize(module.weight).source is module.weight


def test_operand_that_shares_the_weights_quantizer_is_cast_itself() -> None:
    module, x, values = Module(one_quantizer=True), torch.zeros(4, 2), torch.zeros(2, 2)
    with cast_weight_from(module, lambda: values, is_due=True):
        casts = [module._makers[0].quantize(x), module._makers[1].quantize(module.weight)]
    assert casts[0].source is x
    assert casts[1].source is values


def test_values_are_not_read_where_nothing_is_cast() -> None:
    module, reads = Module(), []
    module._fp8_workspaces["weight"] = Kept(module.weight)
    with cast_weight_from(module, lambda: reads.append(1), is_due=False):
        pass
    assert reads == []


def test_methods_are_the_librarys_own_again_after_an_exception() -> None:
    module = Module()
    module._fp8_workspaces["weight"] = Kept(module.weight)
    with pytest.raises(ZeroDivisionError), cast_weight_from(module, lambda: module.weight, is_due=True):
        raise ZeroDivisionError
    assert vars(module._makers[1]) == {}
    assert list(vars(module._fp8_workspaces["weight"])) == ["source"]


def _casts_elsewhere(module: Module) -> None:
    module._fp8_workspaces["weight"] = Kept(module.weight)


def _has_no_quantizers(module: Module) -> None:
    del module.quantizers
    module.init_fp8_metadata = lambda num_gemms: None


@pytest.mark.parametrize("change", [_casts_elsewhere, _has_no_quantizers])
def test_cast_that_does_not_take_the_master_is_refused(change: Callable[[Module], None]) -> None:
    module = Module()
    with (
        pytest.raises(UnsupportedError, match=r"FP32 masters cannot feed. Use Transformer Engine 2.9 to 2.20"),
        cast_weight_from(module, lambda: module.weight, is_due=True),
    ):
        change(module)
