"""The Transformer Engine backend.

What needs no GPU is checked against a stand-in that keeps the library's books (regions, depth,
updates, registration of parameters) and computes ordinary products: it says when the library is
called and with what, and nothing about numbers. Numbers are checked against the library itself, under
the marker ``fp8``.
"""

import copy
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mp.errors import SettingValueError, UnsupportedError
from lightning_mp.fp8 import FP8Config, FP8Engine, FP8Linear
from lightning_mp.fp8.quantize import amax_of, quantize_blocks, quantize_tensor, scale_from_amax
from lightning_mp.fp8.recipes import QuantizationSettings, parse_recipe
from lightning_mp.fp8.transformer_engine import build_recipe, import_facts

# --- A stand-in that keeps the library's books ----------------------------------------------------


class Manager:
    """FP8GlobalStateManager of 2.12, its depth, its updates and its buffers only."""

    # One book for the whole stand-in, which the fixture opens.
    AUTOCAST_DEPTH: int
    enabled: bool
    updates: list[bool]
    global_amax_buffer: dict[str, list[torch.Tensor]]
    global_amax_history_buffer: dict[str, list[torch.Tensor]]
    global_scale_buffer: dict[str, list[torch.Tensor]]

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled

    @classmethod
    def reduce_and_update_fp8_tensors(cls, forward: bool = True) -> None:
        cls.updates.append(forward)

    @classmethod
    def register(cls, key: str, meta: Any) -> None:
        cls.global_amax_buffer.setdefault(key, []).append(meta.amax_history[0])
        cls.global_amax_history_buffer.setdefault(key, []).append(meta.amax_history)
        cls.global_scale_buffer.setdefault(key, []).append(meta.scale)


@contextmanager
def autocast(enabled: bool, recipe: Any):
    before, Manager.enabled = Manager.enabled, enabled
    Manager.AUTOCAST_DEPTH += 1
    try:
        yield
    finally:
        Manager.enabled = before
        Manager.AUTOCAST_DEPTH -= 1
        if Manager.AUTOCAST_DEPTH == 0 and torch.is_grad_enabled():
            Manager.reduce_and_update_fp8_tensors(forward=True)


class Linear(nn.Module):
    """Registers parameters of its own, as te.Linear does, and notes how it is called."""

    def __init__(self, in_features, out_features, *, bias, params_dtype, device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device))
        self.calls: list[Any] = []
        self.fp8_meta: dict[str, Any] = {}

    def init_fp8_metadata(self, num_gemms: int) -> None:
        for key, columns in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            if key not in self.fp8_meta:
                meta = SimpleNamespace(scale=torch.ones(columns), amax_history=torch.zeros(4, columns))
                self.fp8_meta[key] = meta
                Manager.register(key, meta)

    def forward(self, x, is_first_microbatch=None):
        assert Manager.enabled
        assert x.shape[0] % 16 == 0
        assert x.shape[0] > 0
        assert x.shape[1] == self.weight.shape[1], "GEMM not possible"
        self.was_traced = torch.compiler.is_compiling()
        self.init_fp8_metadata(1)
        self.calls.append(is_first_microbatch)
        with torch.no_grad():  # its casts note the amax in any mode, the weight's where it is cast
            entry = self.fp8_meta["scaling_fwd"].amax_history[0]
            entry[0].copy_(torch.fmax(entry[0], x.abs().max()))
            if is_first_microbatch is not False:
                entry[1].copy_(torch.fmax(entry[1], self.weight.abs().max()))
        return nn.functional.linear(x, self.weight, getattr(self, "bias", None))


class Format(Enum):
    E4M3 = 1
    HYBRID = 2


@dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False
    amax_epsilon: float = 0.0


class Recipe:
    def __init__(self, **settings: Any) -> None:
        if "unknown" in settings:
            raise TypeError("unexpected keyword argument 'unknown'")
        self.__dict__.update(settings)


@pytest.fixture
def library(monkeypatch) -> type[Manager]:
    names = ["", ".common", ".common.recipe", ".pytorch", ".pytorch.quantization"]
    modules = {name: ModuleType(f"transformer_engine{name}") for name in names}
    classes = ("Float8CurrentScaling", "DelayedScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling")
    vars(modules[".common.recipe"]).update({c: type(c, (Recipe,), {}) for c in classes}, Format=Format, QParams=QParams)
    modules[".common"].recipe = modules[".common.recipe"]
    vars(modules[".pytorch"]).update(Linear=Linear, autocast=autocast)
    modules[""].pytorch = modules[".pytorch"]
    modules[".pytorch.quantization"].FP8GlobalStateManager = Manager
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
    Manager.AUTOCAST_DEPTH, Manager.enabled, Manager.updates = 0, False, []
    Manager.global_amax_buffer, Manager.global_amax_history_buffer, Manager.global_scale_buffer = {}, {}, {}
    return Manager


def model_and_engine(recipe: Any = "current", **settings: Any) -> tuple[nn.Module, FP8Engine]:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32, bias=False), nn.Linear(32, 16))
    engine = FP8Engine(FP8Config(recipe=recipe, backend="transformer_engine", **settings))
    engine.convert_(model)
    return model, engine


def forward(model: nn.Module, engine: FP8Engine, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16), engine.autocast_context():
        return model(x).float().square().mean()


def test_layer_computes_on_its_own_parameters_outside_the_module_tree(library) -> None:
    model, engine = model_and_engine()
    keys, names = list(model.state_dict()), [n for n, _ in model.named_modules()]
    forward(model, engine, torch.randn(16, 32)).backward()
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_modules()] == names
    assert model[0].weight.grad is not None
    assert model[0].bias.grad is not None
    model[0].weight = nn.Parameter(torch.zeros(64, 32))
    model[0].bias = nn.Parameter(torch.zeros(64))
    with torch.autocast("cpu", torch.bfloat16), engine.autocast_context():
        assert model[0](torch.randn(16, 32)).count_nonzero() == 0


def test_weight_that_became_a_parametrization_is_refused(library) -> None:
    model, engine = model_and_engine()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(UnsupportedError, match=r"in_features=32, out_features=64.*Register it before fit"):
        forward(model, engine, torch.randn(16, 32))
    engine.revert_()
    model[0](torch.randn(16, 32))


@pytest.mark.parametrize("shape", [(32,), (7, 32), (16, 32), (3, 5, 32), (0, 32), (2, 0, 32)])
def test_rows_are_padded_and_cut_off_again(library, shape) -> None:
    model, engine = model_and_engine()
    plain = nn.Linear(32, 64)
    plain.load_state_dict(model[0].state_dict())
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), engine.autocast_context():
        y = model[0](x)
    y.float().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(x.detach())
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-3)  # another row count, another order of sums
    assert x.grad.shape == x.shape


def test_weight_is_cast_for_the_first_micro_batch_of_a_step_and_after_a_write(library) -> None:
    model, engine = model_and_engine()
    for _ in range(2):
        for _ in range(2):
            forward(model, engine, torch.randn(16, 32)).backward()
        engine.on_optimizer_step()
    with torch.no_grad():
        forward(model, engine, torch.randn(16, 32))
        model[0].weight.mul_(2)
        forward(model, engine, torch.randn(16, 32))
    calls = model[0]._fp8.engine.calls
    assert calls == [True, False, True, False, True, True]
    assert engine.weight_casts["0"] == 4


def test_weight_that_evaluation_cast_does_not_serve_training(library) -> None:
    model, engine = model_and_engine(fp8_in_eval=True)
    x = torch.randn(16, 32, requires_grad=True)
    kept = []

    def run(mode: Any) -> None:
        with mode:
            forward(model, engine, x)
        workspaces = vars(model[0]._fp8.engine).setdefault("_fp8_workspaces", {})
        kept.append("weight" in workspaces)
        workspaces["weight"] = object()  # what the library would keep

    run(torch.enable_grad())
    run(torch.enable_grad())
    engine.on_optimizer_step()
    run(torch.inference_mode())  # the same memory, in another mode: no transpose, not to be saved for backward
    run(torch.inference_mode())
    engine.on_optimizer_step()
    run(torch.enable_grad())
    engine.on_optimizer_step()
    run(torch.enable_grad())
    assert kept == [False, True, False, True, False, True]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weight_that_was_swapped_through_data_for_evaluation_is_cast_and_does_not_serve_training(library, mode) -> None:
    model, engine = model_and_engine(fp8_in_eval=True)
    x = torch.randn(16, 32)  # without gradient: training and evaluation ask for the same cast
    forward(model, engine, x).backward()
    engine.on_optimizer_step()
    for factor in (0.5, 2.0):  # averaged weights come and go, as in Lightning's WeightAveraging
        model[0].weight.data.mul_(factor)
        model.eval()
        with mode():
            forward(model, engine, x)
        model.train()
    forward(model, engine, x)
    assert model[0]._fp8.engine.calls == [True, True, True, True]


def test_weight_of_a_forward_that_failed_is_cast_in_the_next_one(library, monkeypatch) -> None:
    model, engine = model_and_engine()
    x = torch.randn(16, 32)
    forward(model, engine, x)
    engine.on_optimizer_step()

    def run_out_of_memory(*args: Any, **settings: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(model[0]._fp8.engine, "forward", run_out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            forward(model, engine, x)
    forward(model, engine, x)
    assert model[0]._fp8.engine.calls == [True, True]


def test_reentrant_checkpointing_casts_a_weight_once_per_step_after_the_first(library) -> None:
    model, engine = model_and_engine()
    for _ in range(2):
        for _ in range(3):
            x = torch.randn(16, 32, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16), engine.autocast_context():
                loss = checkpoint(model, x, use_reentrant=True).float().sum()
            loss.backward()
        engine.on_optimizer_step()
    # The first forward runs without gradients and gets no transpose, which its recompute needs.
    assert model[0]._fp8.engine.calls == [True, True, False, False, False, False, True, *([False] * 5)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation_leaves_the_librarys_amax_history_to_training(library, mode) -> None:
    model, engine = model_and_engine({"name": "delayed", "amax_history_len": 4}, fp8_in_eval=True)
    x = torch.randn(16, 32)

    def entry() -> list[float]:
        return engine.state_dict()["delayed"]["0"]["amax_history"][0, :2].tolist()

    def evaluate() -> None:
        model.eval()
        with mode():
            forward(model, engine, 100 * x)
        model.train()

    seen = [x.abs().max().item(), model[0].weight.abs().max().item()]
    evaluate()
    assert entry() == [0.0, 0.0]
    forward(model, engine, x)
    assert entry() == seen
    evaluate()
    assert entry() == seen


def test_without_a_cache_the_library_keeps_no_weight(library) -> None:
    model, engine = model_and_engine(cache_weights=False)
    forward(model, engine, torch.randn(16, 32))
    assert model[0]._fp8.engine.calls == [None]


def test_evaluation_never_calls_the_library_unless_asked(library) -> None:
    model, _ = model_and_engine()
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(3, 32))
    assert model[0]._fp8.engine is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_delayed_scales_update_once_per_optimizer_step(library, use_reentrant) -> None:
    model, engine = model_and_engine("delayed")
    for _ in range(2):
        for _ in range(3):
            x = torch.randn(16, 32, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16), engine.autocast_context():
                loss = checkpoint(model, x, use_reentrant=use_reentrant).float().sum()
            loss.backward()  # the recompute enters regions of its own
        assert library.updates == []
        engine.on_optimizer_step()
        assert library.updates == [True, False]
        library.updates.clear()
    engine.revert_()
    assert library.AUTOCAST_DEPTH == 0


def test_step_inside_the_forwards_region_updates_once(library) -> None:
    model, engine = model_and_engine("delayed")
    for _ in range(2):
        # Manual optimization: two optimizers step within training_step.
        with torch.autocast("cpu", torch.bfloat16), engine.autocast_context():
            for _ in range(2):
                model(torch.randn(16, 32)).float().sum().backward()
                engine.on_optimizer_step()
        assert library.updates == [True, False] * 2
        library.updates.clear()


def test_other_recipes_are_never_held_open(library) -> None:
    model, engine = model_and_engine("current")
    forward(model, engine, torch.randn(16, 32))
    assert library.AUTOCAST_DEPTH == 0


@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_region_and_depth_are_restored_after_an_exception_and_a_teardown(library, recipe) -> None:
    model, engine = model_and_engine(recipe)
    forward(model, engine, torch.randn(16, 32))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # as a plain layer says it
        forward(model, engine, torch.randn(16, 31))
    assert not library.enabled
    engine.revert_()
    assert library.AUTOCAST_DEPTH == 0
    assert type(model[0]) is nn.Linear


def test_modules_that_others_brought_keep_their_places_in_the_librarys_buffers(library) -> None:
    model, engine = model_and_engine("delayed")
    metas = [SimpleNamespace(scale=torch.ones(3), amax_history=torch.zeros(4, 3)) for _ in range(2)]
    library.register("scaling_fwd", metas[0])  # in a list with the model's layers
    library.register("another recipe", metas[1])
    forward(model, engine, torch.randn(16, 32))
    assert list(library.global_scale_buffer) == ["scaling_fwd", "another recipe", "scaling_bwd"]
    engine.revert_()
    for buffer in (library.global_scale_buffer, library.global_amax_buffer, library.global_amax_history_buffer):
        assert list(buffer) == ["scaling_fwd", "another recipe"]
    assert library.global_scale_buffer["scaling_fwd"][0] is metas[0].scale


def test_depth_that_cannot_be_found_is_an_error(library, monkeypatch) -> None:
    model, engine = model_and_engine("delayed")
    monkeypatch.delattr(Manager, "AUTOCAST_DEPTH")
    with pytest.raises(UnsupportedError, match="recipe='current'"):
        forward(model, engine, torch.randn(16, 32))


def test_depth_of_newer_versions_is_found(library, monkeypatch) -> None:
    model, engine = model_and_engine("delayed")
    state = SimpleNamespace(autocast_depth=0, global_scale_buffer={})
    monkeypatch.delattr(Manager, "AUTOCAST_DEPTH")
    monkeypatch.setattr(Manager, "quantization_state", state, raising=False)
    engine._session._hold()
    assert state.autocast_depth == 1
    engine._session.close()
    assert state.autocast_depth == 0
    assert isinstance(model[0], FP8Linear)


def test_delayed_state_travels_as_three_columns(library) -> None:
    recipe = {"name": "delayed", "amax_history_len": 4}
    model, engine = model_and_engine(recipe)
    forward(model, engine, torch.randn(16, 32)).backward()
    metas = model[0]._fp8.engine.fp8_meta
    metas["scaling_fwd"].scale.copy_(torch.tensor([1.0, 2.0, 9.0]))
    metas["scaling_bwd"].scale.copy_(torch.tensor([3.0, 9.0]))
    metas["scaling_fwd"].amax_history[1, 0] = 5.0
    saved = engine.state_dict()
    assert saved["delayed"]["0"]["scale"].tolist() == [1.0, 2.0, 3.0]
    resumed, other = model_and_engine(recipe)
    assert other.load_state_dict(saved) == []
    assert other.state_dict()["delayed"]["0"]["scale"].tolist() == [1.0, 2.0, 3.0]
    forward(resumed, other, torch.randn(16, 32))
    taken = resumed[0]._fp8.engine.fp8_meta
    assert taken["scaling_fwd"].scale.tolist() == [1.0, 2.0, 1.0]
    assert taken["scaling_bwd"].scale.tolist() == [3.0, 1.0]
    assert other.state_dict()["delayed"]["0"]["amax_history"][1].tolist() == [5.0, 0.0, 0.0]


def test_tensors_of_the_library_can_be_written_after_evaluation_in_inference_mode_came_first(library) -> None:
    model, engine = model_and_engine({"name": "delayed", "amax_history_len": 4}, fp8_in_eval=True)
    engine.load_state_dict(engine.state_dict())  # a resumed run that validates before it trains
    model.eval()
    with torch.inference_mode():
        forward(model, engine, torch.randn(16, 32))
    metas = model[0]._fp8.engine.fp8_meta
    assert not any(t.is_inference() for meta in metas.values() for t in (meta.scale, meta.amax_history))


def test_replay_leaves_the_librarys_history_to_the_step_that_follows(library) -> None:
    model, engine = model_and_engine({"name": "delayed", "amax_history_len": 4})
    forward(model, engine, torch.randn(16, 32)).backward()
    history = model[0]._fp8.engine.fp8_meta["scaling_fwd"].amax_history
    seen = history.clone()
    with engine.unrecorded():
        forward(model, engine, 100 * torch.randn(16, 32))
    # The library updates its scales from these tensors before the next forward.
    assert torch.equal(history, seen)


def test_emulated_state_continues_on_the_library_with_a_notice(library) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 16))
    first = FP8Engine(FP8Config(recipe={"name": "delayed", "amax_history_len": 4}, backend="emulated"))
    first.convert_(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 32)).float().sum().backward()
    first.on_optimizer_step()
    saved = first.state_dict()
    first.revert_()
    second = FP8Engine(FP8Config(recipe={"name": "delayed", "amax_history_len": 4}, backend="transformer_engine"))
    second.convert_(model)
    assert second.load_state_dict(saved) == ["the FP8 backend was 'emulated' and is 'transformer_engine'"]
    forward(model, second, torch.randn(16, 32))
    assert torch.equal(second.state_dict()["delayed"]["0"]["scale"], saved["delayed"]["0"]["scale"])


def test_second_derivative_is_refused(library) -> None:
    model, engine = model_and_engine()
    x = torch.randn(16, 32, requires_grad=True)
    loss = forward(model, engine, x)
    with pytest.raises(UnsupportedError, match=r"create_graph=True.*no second derivative.*exclude"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_second_backward_through_one_forward_is_refused(library) -> None:
    model, engine = model_and_engine()
    loss = forward(model, engine, torch.randn(16, 32))
    loss.backward(retain_graph=True)
    with pytest.raises(UnsupportedError, match=r"retain_graph=True.*Add up the losses"):
        loss.backward()


# torch 2.13: dynamo looks at the grad of what one graph hands to the next; pytest undoes the filter of its import.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_layers_on_the_library_stay_outside_the_graphs_of_a_compiled_model(library) -> None:
    torch._dynamo.reset()
    model, engine = model_and_engine()
    x = torch.randn(16, 32)
    expected = forward(model, engine, x)
    assert torch.equal(forward(torch.compile(model, backend="aot_eager"), engine, x), expected)
    assert not model[0]._fp8.engine.was_traced
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="use fullgraph=False"):
        forward(torch.compile(model, backend="aot_eager", fullgraph=True), engine, x)


def test_copies_never_call_the_library(library) -> None:
    model, engine = model_and_engine()
    forward(model, engine, torch.randn(16, 32))
    calls = model[0]._fp8.engine.calls
    twin = copy.deepcopy(model)
    assert [type(m) for m in twin] == [nn.Linear, nn.GELU, nn.Linear, nn.Linear]
    forward(twin, engine, torch.randn(16, 32)).backward()
    assert len(calls) == 1
    assert twin[0].weight.grad is not None
    assert model[0].weight.grad is None


def test_statistics_are_measured_beside_the_library(library) -> None:
    model, engine = model_and_engine()
    engine.collect_statistics()
    forward(model, engine, torch.randn(7, 32)).backward()
    found = [(row.fqn, row.operand) for row in engine.statistics()]
    assert found == [(fqn, operand) for fqn in ("0", "2") for operand in ("input", "weight", "grad")]


def test_statistics_leave_out_what_runs_while_they_are_stopped(library) -> None:
    model, engine = model_and_engine()
    x = torch.randn(16, 32)
    engine.collect_statistics()
    forward(model, engine, x).backward()
    engine.stop_statistics()
    before = engine.statistics()
    forward(model, engine, 1000 * x).backward()
    assert engine.statistics() == before
    engine.resume_statistics()
    forward(model, engine, 1000 * x)
    first = next(row for row in engine.statistics() if (row.fqn, row.operand) == ("0", "input"))
    assert first.amax == (1000 * x).abs().max().item()


def test_recipe_objects_get_the_users_fields(library) -> None:
    delayed = build_recipe(parse_recipe({"name": "delayed", "margin": 2, "fp8_format": "E4M3"}))
    assert (type(delayed).__name__, delayed.margin, delayed.fp8_format) == ("DelayedScaling", 2, Format.E4M3)
    current = build_recipe(parse_recipe({"name": "current", "use_power_2_scales": True}))
    assert current.fp8_quant_fwd_inp == current.fp8_quant_bwd_grad == QParams(power_2_scale=True)
    nvfp4 = build_recipe(parse_recipe({"name": "nvfp4", "disable_rht": True}))
    assert (type(nvfp4).__name__, nvfp4.disable_rht) == ("NVFP4BlockScaling", True)
    source = Recipe()
    assert build_recipe(parse_recipe(source)) is source


def test_field_that_the_library_does_not_know_is_a_setting_error(library) -> None:
    with pytest.raises(SettingValueError, match=r"recipe='mxfp8': MXFP8BlockScaling says: unexpected"):
        build_recipe(parse_recipe({"name": "mxfp8", "unknown": 1}))
    with pytest.raises(SettingValueError, match=r"recipe='mxfp8': fp8_format='E9' is not known. Allowed: 'E4M3', "):
        build_recipe(parse_recipe({"name": "mxfp8", "fp8_format": "E9"}))


def test_missing_library_is_told_without_an_import() -> None:
    if "transformer_engine" in sys.modules:
        pytest.skip("the library is loaded")
    facts = import_facts()
    assert facts.error == "it is not installed"
    assert "transformer_engine" not in sys.modules


def test_library_whose_build_is_broken_is_told_with_the_error_of_its_import(tmp_path, monkeypatch) -> None:
    if "transformer_engine" in sys.modules:
        pytest.skip("the library is loaded")
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "pytorch.py").write_text("raise OSError('libcublasLt.so.13: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        facts = import_facts()
    finally:
        sys.modules.pop("transformer_engine", None)
    assert facts.error == "its import failed with OSError: libcublasLt.so.13: cannot open shared object file"


# --- The library itself, on a GPU with FP8 ---------------------------------------------------------


def special_values() -> torch.Tensor:
    x = torch.randn(256, 384, device="cuda").bfloat16()
    x[0, :8] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e4, -3e4, 2.0**-20, 1.0])
    return x


@pytest.mark.fp8
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("kind", ["kFloat8E4M3", "kFloat8E5M2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.0, 1e-37, 1e30])
def test_current_scaling_is_bit_equal_to_the_librarys(kind, dtype, factor, power_of_two) -> None:
    import transformer_engine.pytorch  # noqa: F401
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    ours_dtype = torch.float8_e4m3fn if kind == "kFloat8E4M3" else torch.float8_e5m2
    x = (special_values().float() * factor).to(dtype)
    quantizer = Float8CurrentScalingQuantizer(getattr(tex.DType, kind), device="cuda", force_pow_2_scales=power_of_two)
    theirs = quantizer(x)
    settings = QuantizationSettings(power_2_scale=power_of_two)
    ours = quantize_tensor(x, scale_from_amax(amax_of(x), ours_dtype, settings), ours_dtype)
    assert torch.equal(ours.data.view(torch.uint8), theirs._data)
    assert torch.equal(ours.scale_inv, theirs._scale_inv.reshape(()))


@pytest.mark.fp8
@pytest.mark.parametrize("scale", [1.0, 37.5, 1e4, 1e-4])
@pytest.mark.parametrize("kind", ["kFloat8E4M3", "kFloat8E5M2"])
def test_delayed_scaling_is_bit_equal_to_the_librarys(kind, scale) -> None:
    import transformer_engine.pytorch  # noqa: F401
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    ours_dtype = torch.float8_e4m3fn if kind == "kFloat8E4M3" else torch.float8_e5m2
    x, amax = special_values(), torch.zeros(1, device="cuda")
    scale_tensor = torch.tensor([scale], device="cuda")
    theirs = Float8Quantizer(scale_tensor, amax, getattr(tex.DType, kind))(x)
    ours = quantize_tensor(x, scale_tensor[0], ours_dtype)
    assert torch.equal(ours.data.view(torch.uint8), theirs._data)
    assert torch.equal(amax.reshape(()), amax_of(x))


@pytest.mark.fp8
@pytest.mark.parametrize(("dim", "block"), [(1, (1, 128)), (2, (128, 128))])
def test_block_scaling_is_bit_equal_to_the_librarys(dim, block) -> None:
    import transformer_engine.pytorch  # noqa: F401
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    x = special_values()
    quantizer = Float8BlockQuantizer(
        fp8_dtype=tex.DType.kFloat8E4M3, rowwise=True, columnwise=True, amax_epsilon=0.0, force_pow_2_scales=True,
        block_scaling_dim=dim,
    )  # fmt: skip
    theirs = quantizer(x)
    settings = QuantizationSettings(power_2_scale=True)
    ours = quantize_blocks(x, block, torch.float8_e4m3fn, settings)
    assert torch.equal(ours.data.view(torch.uint8), theirs._rowwise_data)
    across = quantize_blocks(x, block[::-1], torch.float8_e4m3fn, settings)
    # The library stores the columnwise copy transposed.
    assert torch.equal(across.data.t().contiguous().view(torch.uint8), theirs._columnwise_data)


@pytest.fixture
def gpu_pair():
    """Make the same model on the library and emulated, and take both back at the end: the library's state is global."""
    engines: list[FP8Engine] = []

    def make(recipe: Any) -> list[tuple[nn.Module, FP8Engine]]:
        pairs = []
        for backend in ("transformer_engine", "emulated"):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.Linear(256, 16)).cuda()
            engine = FP8Engine(FP8Config(recipe=recipe, backend=backend))
            engine.check_available(torch.device("cuda"))
            engine.convert_(model)
            engines.append(engine)
            pairs.append((model, engine))
        return pairs

    yield make
    for engine in engines:
        engine.revert_()


def gpu_step(
    model: nn.Module, engine: FP8Engine, x: torch.Tensor, *, use_reentrant: bool | None = None
) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16), engine.autocast_context():
        y = model(x) if use_reentrant is None else checkpoint(model, x, use_reentrant=use_reentrant)
    y.float().square().mean().backward()
    return y.detach()


def sqnr_db(reference: torch.Tensor, found: torch.Tensor) -> float:
    reference, found = reference.double(), found.double()
    return (10 * torch.log10(reference.square().sum() / (reference - found).square().sum())).item()


@pytest.mark.fp8
@pytest.mark.parametrize("recipe", ["current", "delayed", {"name": "delayed", "amax_history_len": 4}])
@pytest.mark.parametrize("rows", [64, 37])
def test_outputs_gradients_and_scales_agree_with_emulation(gpu_pair, recipe, rows) -> None:
    (library_model, library_engine), (emulated_model, emulated_engine) = gpu_pair(recipe)
    for _ in range(3):
        x = torch.randn(rows, 256, device="cuda")
        theirs = gpu_step(library_model, library_engine, x)
        ours = gpu_step(emulated_model, emulated_engine, x)
        # Fast accumulation on Hopper keeps about 14 bits; BF16 results keep 8. A value that lands on
        # the other side of a rounding threshold in a later layer costs an FP8 ulp: 30 dB is near the
        # noise of one such cast, which only a wrong recipe falls below.
        assert sqnr_db(theirs, ours) > 30
        for a, b in zip(library_model.parameters(), emulated_model.parameters(), strict=True):
            assert sqnr_db(a.grad, b.grad) > 25
        library_engine.on_optimizer_step()
        emulated_engine.on_optimizer_step()
    theirs, ours = (e.state_dict()["delayed"] for e in (library_engine, emulated_engine))
    for fqn in ours:
        # The input and the weight of the first layer are the same tensors.
        torch.testing.assert_close(theirs[fqn]["scale"], ours[fqn]["scale"], rtol=0.1, atol=0)
    if ours:
        assert torch.equal(theirs["0"]["scale"][:2], ours["0"]["scale"][:2])
        assert torch.equal(theirs["0"]["amax_history"][:, :2], ours["0"]["amax_history"][:, :2])


@pytest.mark.fp8
@pytest.mark.parametrize("recipe", ["current", "delayed"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_on_the_library_gives_the_plain_gradients(gpu_pair, recipe, use_reentrant) -> None:
    grads = []
    for mode in (None, use_reentrant):
        model, engine = gpu_pair(recipe)[0]
        for step in range(3):
            torch.manual_seed(step)
            gpu_step(model, engine, torch.randn(64, 256, device="cuda", requires_grad=True), use_reentrant=mode)
            engine.on_optimizer_step()
        grads.append([p.grad for p in model.parameters()])
        engine.revert_()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.fp8
@pytest.mark.parametrize("recipe", ["current", "delayed", "block"])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_training_on_the_library_after_validation_in_fp8_gives_the_gradients_without_it(recipe, needs_gradient) -> None:
    grads = []
    for validates in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.Linear(256, 16)).cuda()
        engine = FP8Engine(FP8Config(recipe=recipe, backend="transformer_engine", fp8_in_eval=True))
        engine.convert_(model)
        x = torch.randn(64, 256, device="cuda", requires_grad=needs_gradient)
        if validates:
            model.eval()
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16), engine.autocast_context():
                model(x)
            model.train()
        gpu_step(model, engine, x)
        grads.append([p.grad for p in model.parameters()])
        engine.revert_()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.fp8
@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_padded_rows_on_the_library_give_the_unpadded_result(gpu_pair, recipe) -> None:
    (model, engine), _ = gpu_pair(recipe)
    x = torch.randn(48, 256, device="cuda")
    x[37:] = 0
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), engine.autocast_context():
        whole, part = model[0](x), model[0](x[:37])
    assert torch.equal(whole[:37], part)


@pytest.mark.fp8
def test_replay_on_the_library_leaves_scales_and_history_as_they_would_be_without_it(gpu_pair) -> None:
    states = []
    for replays in (False, True):
        model, engine = gpu_pair({"name": "delayed", "amax_history_len": 4})[0]
        for step in range(3):
            torch.manual_seed(step)
            gpu_step(model, engine, torch.randn(64, 256, device="cuda"))
            if replays:
                with engine.unrecorded():
                    gpu_step(model, engine, 100 * torch.randn(64, 256, device="cuda"))
                model.zero_grad()
            engine.on_optimizer_step()
        states.append(engine.state_dict()["delayed"])
        engine.revert_()
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@pytest.mark.fp8
def test_layers_that_a_model_brings_learn_their_scales_in_each_run() -> None:
    import transformer_engine.pytorch as te

    model = nn.Sequential(te.Linear(256, 256), nn.Linear(256, 16)).cuda()
    for factor in (1.0, 8.0):
        engine = FP8Engine(FP8Config(recipe={"name": "delayed", "amax_history_len": 2}, backend="transformer_engine"))
        engine.convert_(model)
        x = factor * torch.randn(64, 256, device="cuda")
        for _ in range(2):
            gpu_step(model, engine, x)
            engine.on_optimizer_step()
        engine.revert_()
        scale = model[0].fp8_meta["scaling_fwd"].scale[0]
        torch.testing.assert_close(scale, 448 / x.abs().max(), rtol=1e-6, atol=0)


@pytest.mark.fp8
@pytest.mark.parametrize("recipe", ["current", "block"])
def test_second_derivative_and_second_backward_are_refused_on_the_library(gpu_pair, recipe) -> None:
    model, engine = gpu_pair(recipe)[0]
    x = torch.randn(64, 256, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16), engine.autocast_context():
        loss = model(x).float().square().mean()
    with pytest.raises(UnsupportedError, match="create_graph=True"):
        torch.autograd.grad(loss, x, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(UnsupportedError, match="retain_graph=True"):
        loss.backward()
