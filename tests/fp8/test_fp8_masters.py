"""FP32 masters feed the FP8 cast of 16-bit weights, on every backend.

Each claim is checked on the emulated backend and on Transformer Engine itself, under the marker ``fp8``. In
between stands a stand-in for the library, which calls its casts where and how ``te.Linear`` does: it says
when the backend lets it cast what. Its casts are torch's own conversion, at a scale of 1.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lightning_mp.fp8 import FP8Config, FP8Engine
from lightning_mp.fp8.emulated import EmulatedBackend
from lightning_mp.master_weights import MasterWeights
from tests.fp8.test_transformer_engine import Linear, library  # noqa: F401 - a fixture

# Halfway between two E4M3 values, which BF16 can tell and whose tie goes to the even one, 1.0.
TIE = 1.0625
# Less than half a BF16 ulp beside it: the master decides where the tie goes.
STEP = 2.0**-12
BELOW, ABOVE = 1.0, 1.125
# The largest E4M3 value, in each block of 128 x 128: all scales are 1, and each result is a weight as it was cast.
LARGEST = 448.0
IN_FEATURES, OUT_FEATURES = 128, 256


class Kept:
    """What the library keeps of a cached weight: it is cast again in place."""

    def __init__(self, x: Tensor) -> None:
        self.quantize_(x)

    def quantize_(self, x: Tensor, *, noop_flag: Tensor | None = None) -> None:
        self.values = x.detach().to(torch.float8_e4m3fn).float()


class Quantizer:
    def quantize(self, x: Tensor, *, dtype: torch.dtype | None = None) -> Kept:
        return Kept(x)


class CastingLinear(Linear):
    """Casts its weight where and how te.Linear does, and multiplies by what became of it."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.quantizers: dict[str, Any] = {"scaling_fwd": {}, "scaling_bwd": {}}
        self._fp8_workspaces: dict[str, Kept] = {}

    def init_fp8_metadata(self, num_gemms: int) -> None:
        with torch.inference_mode(False):
            super().init_fp8_metadata(num_gemms)
        self.quantizers["scaling_fwd"] = self.quantizers["scaling_fwd"] or [Quantizer() for _ in range(3)]

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        super().forward(x, is_first_microbatch)
        weight, kept = self.weight, self._fp8_workspaces.get("weight")
        if is_first_microbatch is None or kept is None:
            kept = self.quantizers["scaling_fwd"][1].quantize(weight, dtype=torch.bfloat16)
            if is_first_microbatch is not None:
                self._fp8_workspaces["weight"] = kept
        elif is_first_microbatch:
            kept.quantize_(weight, noop_flag=None)
        own = weight.float()
        return nn.functional.linear(x, own + (kept.values - own).detach())


@dataclass
class Run:
    """A layer in FP8 whose master lies just above the tie."""

    model: nn.Sequential
    engine: FP8Engine
    masters: MasterWeights
    optimizer: torch.optim.Optimizer
    reads: list[StorageWeakRef] = field(default_factory=list)
    """The memory of each FP32 value that was read for a cast."""

    @classmethod
    def of(cls, weight: Tensor, mode: str, *, lr: float, **settings: Any) -> "Run":
        model = nn.Sequential(nn.Linear(IN_FEATURES, OUT_FEATURES, bias=False, device=weight.device))
        with torch.no_grad():
            model[0].weight.copy_(weight)
        engine = FP8Engine(FP8Config(skip_output_head=False, **settings))
        engine.convert_(model)
        masters = MasterWeights(mode)
        masters.convert_(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        masters.attach([optimizer])
        run = cls(model, engine, masters, optimizer)
        engine.take_weights_from(run.read)
        return run

    @classmethod
    def of_random_weights(cls, mode: str, recipe: str, backend: str) -> "Run":
        weight = torch.randn(OUT_FEATURES, IN_FEATURES, generator=torch.Generator().manual_seed(0))
        return cls.of(weight.to("cuda"), mode, lr=1e-3, recipe=recipe, backend=backend)

    def close(self) -> None:
        self.engine.revert_()
        self.masters.detach()

    @property
    def weight(self) -> nn.Parameter:
        return self.model[0].weight

    def read(self, param: nn.Parameter) -> Tensor:
        value = self.masters.value_of(param)
        self.reads.append(StorageWeakRef(value.untyped_storage()))
        return value

    def forward(self, x: Tensor | None = None, *, use_reentrant: bool | None = None) -> Tensor:
        device = self.weight.device
        x = torch.eye(IN_FEATURES, device=device) if x is None else x
        with torch.autocast(device.type, torch.bfloat16), self.engine.autocast_context():
            return self.model(x) if use_reentrant is None else checkpoint(self.model, x, use_reentrant=use_reentrant)

    def cast_value(self) -> float:
        """Return what all elements but the largest ones are in FP8 now."""
        found = self.forward().detach().float().unique().tolist()
        assert len(found) == 1 + (LARGEST in found)
        return found[0]

    def step(self, move: float) -> None:
        """Move all elements but the largest ones by ``move`` times ``STEP``."""
        self.weight.grad = torch.where(self.weight.detach() == LARGEST, 0.0, -move).float()
        self.optimizer.step()
        self.engine.on_optimizer_step()


RECIPES = ("current", "delayed", "block")
BACKENDS = [
    pytest.param(("stand-in", "current"), id="stand-in"),
    *(pytest.param(("emulated", recipe), id=f"emulated-{recipe}") for recipe in RECIPES),
    *(pytest.param(("library", recipe), id=f"library-{recipe}", marks=pytest.mark.fp8) for recipe in RECIPES),
]


@pytest.fixture(params=["copy", "split"])
def mode(request) -> str:
    return request.param


@pytest.fixture(params=BACKENDS)
def make(request, mode, monkeypatch) -> Iterator[Callable[..., Run]]:
    """Make layers, and take them back at the end: the library's state is global."""
    name, recipe = request.param
    if name == "stand-in":
        request.getfixturevalue("library")
        monkeypatch.setattr(sys.modules["transformer_engine.pytorch"], "Linear", CastingLinear)
    runs = []

    def make_run(**settings: Any) -> Run:
        weight = torch.full((OUT_FEATURES, IN_FEATURES), TIE + STEP, device="cuda" if name == "library" else "cpu")
        weight[::128, 0] = LARGEST
        backend = "emulated" if name == "emulated" else "transformer_engine"
        runs.append(Run.of(weight, mode, lr=STEP, recipe=recipe, backend=backend, **settings))
        return runs[-1]

    yield make_run
    for run in runs:
        run.close()


@pytest.mark.parametrize("cache_weights", [True, False])
def test_training_casts_the_master_and_not_its_rounded_value(make, cache_weights) -> None:
    run = make(cache_weights=cache_weights)
    assert run.weight.dtype is torch.bfloat16
    assert run.weight.detach().unique().tolist() == [TIE, LARGEST]
    for _ in range(2):
        assert run.cast_value() == ABOVE
        run.engine.on_optimizer_step()


@pytest.mark.parametrize("cache_weights", [True, False])
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_casts_the_master_and_training_after_it_does(make, cache_weights, grad_mode) -> None:
    run = make(cache_weights=cache_weights, fp8_in_eval=True)
    for _ in range(2):
        run.model.eval()
        with grad_mode():
            assert run.cast_value() == ABOVE
            run.model.train()
            assert run.cast_value() == ABOVE
        assert run.cast_value() == ABOVE
        run.step(-2)
        run.model.eval()
        with grad_mode():
            assert run.cast_value() == BELOW
        run.model.train()
        assert run.cast_value() == BELOW
        run.step(2)


@pytest.mark.parametrize("cache_weights", [True, False])
def test_step_that_moves_no_bit_of_the_weight_moves_its_cast(make, cache_weights) -> None:
    run = make(cache_weights=cache_weights)
    before = run.weight.detach().clone()
    found = [run.cast_value()]
    for move in (-2, 0, 2):
        run.step(move)
        found.append(run.cast_value())
    assert found == [ABOVE, BELOW, BELOW, ABOVE]
    assert torch.equal(run.weight, before)


def test_skipped_step_changes_no_cast(make) -> None:
    run = make()
    for _ in range(2):
        assert run.cast_value() == ABOVE
        run.engine.on_optimizer_step()
    run.step(-2)
    run.engine.on_optimizer_step()
    assert run.cast_value() == BELOW


def test_weight_that_is_written_by_hand_is_cast_as_it_was_written(make) -> None:
    run = make()
    assert run.cast_value() == ABOVE
    with torch.no_grad():
        run.weight.fill_(2.0)
    assert run.cast_value() == 2.0
    run.engine.on_optimizer_step()
    assert run.cast_value() == 2.0


def test_weight_that_is_swapped_through_data_for_evaluation_is_cast_there(make) -> None:
    run = make(fp8_in_eval=True)
    run.cast_value()
    run.engine.on_optimizer_step()
    for value in (2.0, 4.0):
        run.weight.data.fill_(value)
        run.model.eval()
        with torch.no_grad():
            assert run.cast_value() == value
        run.model.train()
    assert run.cast_value() == 4.0


def test_loaded_master_is_cast_though_the_weight_keeps_its_bits(make) -> None:
    run = make()
    state = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.step(-2)
    assert run.cast_value() == BELOW
    before = run.weight.detach().clone()
    run.model.load_state_dict(state)  # in the middle of a step
    assert torch.equal(run.weight, before)
    assert run.cast_value() == ABOVE


def test_weight_and_its_master_are_cast_once_per_step_under_accumulation(make) -> None:
    run = make()
    for _ in range(2):
        for _ in range(3):
            run.forward().float().sum().backward()
        run.engine.on_optimizer_step()
    assert run.engine.weight_casts == {"0": 2}
    assert len(run.reads) == 2


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("cache_weights", [True, False])
def test_gradients_are_those_of_a_layer_whose_weight_is_the_master(make, cache_weights, use_reentrant) -> None:
    run = make(cache_weights=cache_weights)
    plain = nn.Sequential(nn.Linear(IN_FEATURES, OUT_FEATURES, bias=False)).to(run.weight.device)
    with torch.no_grad():
        plain[0].weight.copy_(run.masters.value_of(run.weight))
    recipe = run.engine.config
    reference = Run(plain, FP8Engine(recipe), MasterWeights("copy"), torch.optim.SGD(plain.parameters()))
    x = torch.randn(64, IN_FEATURES, device=run.weight.device)
    upstream = torch.randn(64, OUT_FEATURES, device=run.weight.device)
    found = []
    for one in (run, reference):
        if one is reference:
            run.engine.revert_()
            reference.engine.convert_(plain)
        inputs = x.clone().requires_grad_()
        for _ in range(2):
            one.forward(inputs, use_reentrant=use_reentrant).float().mul(upstream).sum().backward()
        found.append((inputs.grad, one.weight.grad))
    reference.engine.revert_()
    (dx, dw), (expected_dx, expected_dw) = found
    assert torch.equal(dx, expected_dx)
    assert torch.equal(dw, expected_dw)
    assert dw.dtype is torch.float32


def test_values_are_freed_after_the_cast(make, mode) -> None:
    run = make()
    y = run.forward(torch.randn(16, IN_FEATURES, device=run.weight.device, requires_grad=True))
    # The master itself, or memory of its own.
    assert [memory.expired() for memory in run.reads] == [mode == "split"]
    y.float().sum().backward()


@pytest.mark.fp8
@pytest.mark.parametrize("recipe", RECIPES)
def test_quantized_weights_of_the_library_are_the_emulated_ones_bit_for_bit(mode, recipe) -> None:
    quantized = []
    for backend in ("emulated", "transformer_engine"):
        run = Run.of_random_weights(mode, recipe, backend)
        for seed in range(3):
            x = torch.randn(64, IN_FEATURES, generator=torch.Generator().manual_seed(seed)).to("cuda")
            run.forward(x.requires_grad_()).float().square().mean().backward()
            run.weight.grad = torch.randn(run.weight.shape, generator=torch.Generator().manual_seed(seed)).to("cuda")
            if seed < 2:
                run.optimizer.step()
                run.engine.on_optimizer_step()
        exact, rounded = run.masters.value_of(run.weight), run.weight.detach().float()
        assert not torch.equal(exact, rounded)
        quantized.append(_rowwise_and_transposed(run.model[0]._fp8))
        run.close()
    for ours, theirs in zip(*quantized, strict=True):
        assert torch.equal(ours, theirs)


def _rowwise_and_transposed(backend: Any) -> list[Tensor]:
    if isinstance(backend, EmulatedBackend):
        both = backend._cached.quantized
        return [both.rowwise.data.view(torch.uint8), both.columnwise.data.t().contiguous().view(torch.uint8)]
    kept = backend.engine._fp8_workspaces["weight"]
    names = ("_data", "_transpose") if hasattr(kept, "_data") else ("_rowwise_data", "_columnwise_data")
    return [getattr(kept, name) for name in names]


@pytest.mark.fp8
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("num_casts", [1, 2])
def test_statistics_compare_the_librarys_weight_with_the_master(mode, recipe, num_casts) -> None:
    found = []
    for backend in ("emulated", "transformer_engine"):
        run = Run.of_random_weights(mode, recipe, backend)
        for _ in range(num_casts):  # the first one is made by the quantizer, later ones in place
            run.engine.collect_statistics()
            run.forward(torch.randn(64, IN_FEATURES, device="cuda"))
            run.engine.stop_statistics()
        found.append(next(row for row in run.engine.statistics() if row.operand == "weight"))
        assert found[-1].amax == run.masters.value_of(run.weight).abs().max().item()
        assert found[-1].amax != run.weight.abs().max().item()
        run.close()
    ours, theirs = found
    assert (theirs.scale, theirs.saturated, theirs.flushed) == (ours.scale, ours.saturated, ours.flushed)
    assert theirs.sqnr_db == pytest.approx(ours.sqnr_db, rel=1e-5)  # sums of FP32 squares in another order
