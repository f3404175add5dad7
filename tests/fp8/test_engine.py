"""Conversion in place and back, steps, state, statistics and demotion, through the emulated backend."""

import copy
import io
import math
import pickle
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lightning_mp.errors import FP8UnavailableError, SettingValueError, UnsupportedError
from lightning_mp.fp8 import FP8Config, FP8Engine, FP8Linear
from lightning_mp.fp8.layer import ConvertedLinear

RECIPES = ["current", "delayed", "block"]


class Model(nn.Module):
    """A tied head, a frozen layer, a shared layer object, a plain list, a LoRA-like subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32, bias=False)
        self.alias = self.first
        self.plain_list = [self.second]
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embedding.weight
        self.first.weight.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.alias(torch.relu(self.plain_list[0](self.first(self.embedding(tokens))))))


def converted(model: nn.Module, recipe="current", **settings) -> FP8Engine:
    engine = FP8Engine(FP8Config(recipe=recipe, backend="emulated", **settings))
    engine.convert_(model)
    return engine


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x).float().square().mean()


def body() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 16))


def train(model: nn.Module, engine: FP8Engine, steps: int, *, seed: int = 0, micro_batches: int = 1) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        for _ in range(micro_batches):
            with engine.autocast_context():
                loss = loss_of(model, torch.randn(8, 32, generator=generator))
            (loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.on_optimizer_step()
        losses.append(loss.item())
    return losses


# --- Conversion ------------------------------------------------------------------------------------


def test_conversion_keeps_everything_but_the_class() -> None:
    model = Model()
    fired = []
    model.second.register_forward_hook(lambda *args: fired.append(1))
    keys = list(model.state_dict())
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    modules = {name: id(m) for name, m in model.named_modules(remove_duplicate=False)}
    engine = converted(model)
    assert [row.fqn for row in engine.rows if row.converted] == ["first", "second"]
    assert type(model.first) is type(model.plain_list[0]) is ConvertedLinear
    assert type(model.head) is nn.Linear
    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == parameters
    assert {name: id(m) for name, m in model.named_modules(remove_duplicate=False)} == modules
    assert model.head.weight is model.embedding.weight
    assert model.alias is model.first
    loss_of(model, torch.arange(8))
    assert fired == [1]


def test_layer_whose_name_goes_to_another_stays_in_hand() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    engine = converted(model, "delayed", skip_output_head=False)
    first, second, third = model
    del model[1]
    model.insert(0, nn.Linear(16, 16))  # new, first, third: the first one has the name of the second
    engine.collect_statistics()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(16, 16)).sum().backward()
    assert {each.fqn for each in engine.statistics()} == {"1", "2"}
    engine.on_optimizer_step()
    histories = [layer._fp8.delayed.amax_history for layer in (first, second, third)]
    assert [bool(history[:, 0].any()) for history in histories] == [True, False, True]
    assert set(engine.state_dict()["delayed"]) == {"1", "2", "1 (removed)"}
    model.append(second)
    assert set(engine.state_dict()["delayed"]) == {"1", "2", "3"}
    engine.revert_()
    assert {type(layer) for layer in (first, second, third)} == {nn.Linear}


def test_layer_goes_on_with_its_own_history_and_demotion_in_a_second_conversion_of_a_grown_model() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    engine = converted(model, "delayed", skip_output_head=False)
    first, second, third = model
    for value, layer in ((1.0, first), (2.0, second), (4.0, third)):
        layer.weight.data.fill_(value)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(16, 16)).sum().backward()
    engine.on_optimizer_step()
    engine.demote("1", "unhealthy")
    engine.revert_()
    del model[2]
    model.insert(0, nn.Linear(16, 16))  # new, first, second
    engine.convert_(model)
    assert engine.demoted == {"2": "unhealthy"}
    # The column of the weight: amax 1 and 2 by hand; the new layer has seen nothing.
    seen = [layer._fp8.delayed.amax_history[:, 1].max().item() for layer in model]
    assert seen == [0.0, 1.0, 2.0]
    engine.revert_()


def test_reverting_leaves_no_trace() -> None:
    model = Model()
    before = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    engine = converted(model)
    loss_of(model, torch.arange(8)).backward()
    engine.revert_()
    assert {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()} == before
    assert [row.fqn for row in converted(model).rows if row.converted] == ["first", "second"]


def doubled(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Doubling())


class Doubling(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("register", [doubled, parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("recipe", RECIPES)
def test_parametrization_registered_meanwhile_outlives_the_run(register, recipe) -> None:
    model, plain, twin = body(), body(), body()
    plain.load_state_dict(model.state_dict())
    engine = converted(model, recipe)
    x = torch.randn(8, 32)
    for each in (model, plain, twin):
        torch.manual_seed(0)  # spectral_norm starts from random vectors
        register(each[0])
    loss_of(model, x).backward()
    assert engine.weight_casts["0"] == 1
    copied = copy.deepcopy(model)
    engine.revert_()
    assert type(model[0]).__name__ == "ParametrizedLinear"
    assert type(model[0]).__bases__ == (nn.Linear,)
    assert not any(isinstance(m, FP8Linear) for m in model.modules())
    plain.load_state_dict(model.state_dict())
    model.eval()
    assert torch.equal(loss_of(model, x), loss_of(plain.eval(), x))
    assert torch.equal(loss_of(copied.eval(), x), loss_of(plain, x))
    assert torch.equal(loss_of(copy.deepcopy(model), x), loss_of(plain, x))
    row = next(row for row in converted(model).rows if row.fqn == "0")
    assert (row.converted, row.reason.split(",")[0]) == (False, "a ParametrizedLinear")
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear


def test_class_that_others_derived_meanwhile_and_share_stays_as_it_is() -> None:
    model = body()
    engine = converted(model)
    # What fully_shard does; torch keeps such a class for all modules of the class that it is derived from.
    shared = type("FSDPFP8Linear", (Mixin, ConvertedLinear), {})
    for layer in (model[0], model[2]):
        layer.__class__ = shared
    loss_of(model, torch.randn(4, 32)).backward()
    assert engine.weight_casts == {"0": 1, "2": 1}
    engine.revert_()
    assert shared.__bases__ == (Mixin, ConvertedLinear)
    assert [type(m).__mro__[1:3] for m in (model[0], model[2])] == [(Mixin, nn.Linear)] * 2
    assert type(model[0]).__name__ == "FSDPLinear"
    assert model[0].added() == "added"


def test_class_of_a_converted_layer_passes_for_nn_linear_in_every_comparison() -> None:
    model = body()
    converted(model)
    cls = type(model[0])
    assert cls is not nn.Linear
    assert cls == nn.Linear
    assert nn.Linear == cls
    assert cls in (nn.GELU, nn.Linear)
    assert {nn.Linear: 1}[cls] == 1
    assert cls != Foreign
    assert cls not in (nn.GELU, nn.Module)
    assert isinstance(model[3], cls)
    assert not isinstance(model[1], cls)


@pytest.mark.parametrize("build", [lambda m: type(m)(32, 64), lambda m: type(m).__new__(type(m))])
def test_layer_that_is_built_from_the_class_of_a_converted_one_is_plain(build) -> None:
    model = body()
    engine = converted(model)
    built = build(model[0])
    assert type(built) is nn.Linear
    engine.revert_()
    assert type(model[0]) is nn.Linear


def test_class_derived_meanwhile_with_arguments_for_its_registry_is_reverted_without_them() -> None:
    seen = []

    class Registered:
        def __init_subclass__(cls, *, kind: str) -> None:
            seen.append(kind)

    model = body()
    engine = converted(model)
    model[0].__class__ = types.new_class("Derived", (Registered, type(model[0])), {"kind": "own"})
    engine.revert_()
    assert type(model[0]).__mro__[1:3] == (Registered, nn.Linear)
    assert seen == ["own"]


def test_foreign_class_given_meanwhile_stays() -> None:
    model = body()
    engine = converted(model)
    model[0].__class__ = Foreign
    engine.revert_()
    assert [type(m) for m in (model[0], model[2])] == [Foreign, nn.Linear]
    assert "_fp8" not in vars(model[0])


class Mixin:
    def added(self) -> str:
        return "added"


class Foreign(nn.Linear):
    pass


def test_reverting_twice_and_converting_twice() -> None:
    model = Model()
    engine = converted(model)
    with pytest.raises(UnsupportedError, match="revert_"):
        engine.convert_(model)
    engine.revert_()
    engine.revert_()
    assert engine.convert_(model)[0].converted


def test_plain_and_converted_models_load_each_other_strictly() -> None:
    plain, fp8 = Model(), Model()
    converted(fp8)
    fp8.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(fp8.second.weight, plain.second.weight)
    plain.load_state_dict(fp8.state_dict(), strict=True)


def test_copies_and_pickles_of_a_whole_model_are_plain() -> None:
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    converted(model, "delayed")
    tokens = torch.arange(8)
    expected = loss_of(plain, tokens)
    assert not torch.equal(loss_of(model, tokens), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(loss_of(twin, tokens), expected)
        assert not any(isinstance(m, FP8Linear) for m in twin.modules())
        assert twin.head.weight is twin.embedding.weight


def test_model_without_an_eligible_layer_is_refused_with_the_reasons() -> None:
    with pytest.raises(
        UnsupportedError, match=r"none of the 2 Linear layers of Sequential.*0: in_features=10.*16 would"
    ):
        converted(nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 16)))
    with pytest.raises(UnsupportedError, match="no Linear layer in ReLU"):
        converted(nn.ReLU())


def test_refused_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 16))
    with pytest.raises(UnsupportedError):
        converted(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]


def test_attention_and_encoder_layers_run_in_both_modes() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(32, 16))
    x = torch.randn(2, 5, 32)
    plain = copy.deepcopy(model)
    engine = converted(model)
    names = [row.fqn for row in engine.rows if row.converted]
    assert names == [f"0.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    loss_of(model, x).backward()
    # The inference fast path reads weights directly: evaluation is BF16 with and without it.
    model.eval()
    plain.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(x))
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x))


def test_emulation_refuses_what_only_the_library_computes() -> None:
    with pytest.raises(SettingValueError, match=r"'mxfp8'.*'current', 'delayed' and 'block'"):
        FP8Engine(FP8Config(recipe="mxfp8", backend="emulated"))


@pytest.mark.parametrize("backend", ["auto", "transformer_engine"])
@pytest.mark.parametrize("recipe", ["current", "mxfp8"])
def test_library_backend_is_refused_on_a_cpu_with_reason_and_remedy(backend, recipe) -> None:
    engine = FP8Engine(FP8Config(backend=backend, recipe=recipe))
    with pytest.raises(FP8UnavailableError, match=r"(?s)FP8 needs an NVIDIA GPU.*emulated"):
        engine.check_available(torch.device("cpu"))
    FP8Engine(FP8Config(backend="emulated")).check_available(torch.device("cpu"))


def test_compiled_model_is_refused_with_delayed_scaling_only() -> None:
    compiled = nn.Sequential(torch.compile(body(), backend="eager"))
    in_place = body()
    in_place[0].compile(backend="eager")
    for model in (compiled, in_place):
        with pytest.raises(UnsupportedError, match="recipe='current'"):
            converted(model, "delayed")
        converted(model)


def test_model_compiled_before_runs_fp8_after_conversion_and_as_before_after_it() -> None:
    model, x = body(), torch.randn(16, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = compiled(x)
        engine = converted(model)
        assert torch.equal(compiled(x), model(x))
        assert not torch.equal(compiled(x), plain)
        engine.revert_()
        assert torch.equal(compiled(x), plain)


class CompiledForward(nn.Sequential):
    @torch.compile(backend="eager")
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_model_with_a_compiled_method_is_refused_with_delayed_scaling_only() -> None:
    by_class, by_instance, disabled = nn.Sequential(CompiledForward(*body())), body(), body()
    by_instance.forward = torch.compile(by_instance.forward, backend="eager")
    for model, name in ((by_class, "0"), (by_instance, "Sequential")):
        with pytest.raises(UnsupportedError, match=rf"delayed.*\({name} is compiled\).*recipe='current'"):
            converted(model, "delayed")
        assert not any(isinstance(m, FP8Linear) for m in model.modules())
        converted(model)
    # What torch.compiler.disable returns carries the same mark.
    disabled.forward = torch.compiler.disable(disabled.forward)
    converted(disabled, "delayed")
    loss_of(disabled, torch.randn(4, 32))


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("how", ["module", "method", "function"])
def test_model_compiled_after_conversion_is_refused_at_its_first_call(how, fullgraph) -> None:
    torch._dynamo.reset()
    model = body()
    converted(model, "delayed")
    settings = {"backend": "aot_eager", "fullgraph": fullgraph}
    if how == "module":
        model.compile(**settings)
        compiled = model
    else:
        compiled = torch.compile(model.forward if how == "method" else lambda x: model(x), **settings)
    # With fullgraph=True the error is the compiler's, with our text in it.
    error = torch._dynamo.exc.Unsupported if fullgraph else UnsupportedError
    with pytest.raises(error, match=r"recipe='delayed' cannot run under torch.compile \(0 is compiled\)"):
        loss_of(compiled, torch.randn(4, 32))
    loss_of(model.forward, torch.randn(4, 32)) if how == "module" else loss_of(model, torch.randn(4, 32))


def test_model_compiled_before_conversion_runs_in_fp8() -> None:
    torch._dynamo.reset()
    model = body()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 32)
    before = loss_of(compiled, x)
    converted(model)
    after = loss_of(compiled, x)
    assert not torch.equal(before, after)
    assert torch.equal(after, loss_of(model, x))


# --- Steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_are_cast_once_per_optimizer_step_under_accumulation(recipe) -> None:
    model = body()
    engine = converted(model, recipe)
    train(model, engine, 3, micro_batches=4)
    assert engine.weight_casts == {"0": 3, "2": 3}


@pytest.mark.parametrize("recipe", RECIPES)
def test_accumulated_micro_batches_give_the_gradient_of_one_batch(recipe) -> None:
    model = body()
    engine = converted(model, recipe)
    train(model, engine, 1)
    whole, parts = copy.deepcopy(model), model
    twin = converted(whole, recipe)
    twin.load_state_dict(engine.state_dict())
    x = torch.randn(32, 32)
    loss_of(whole, x).backward()
    for part in x.split(8):
        (loss_of(parts, part) / 4).backward()
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        # Four quarters have their own scales (not with delayed) and round their sums to BF16 each;
        # E5M2 gradients carry noise 25 dB below the signal.
        noise = (a.grad - b.grad).square().sum() / a.grad.square().sum()
        assert noise < 10**-1.8, name


def test_delayed_history_gets_one_entry_per_optimizer_step() -> None:
    model = body()
    engine = converted(model, {"name": "delayed", "amax_history_len": 8})
    train(model, engine, 3, micro_batches=4)
    history = engine.state_dict()["delayed"]["0"]["amax_history"]
    assert [bool(row.all()) for row in history] == [False] * 5 + [True] * 3


def test_layer_called_twice_in_a_step_records_the_larger_amax() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
    engine = converted(model, {"name": "delayed", "amax_history_len": 4})
    small, large = torch.full((4, 32), 0.5), torch.full((4, 32), 2.0)
    for x in (large, small):
        loss_of(model, x)
    engine.on_optimizer_step()
    assert engine.state_dict()["delayed"]["0"]["amax_history"][-1, 0].item() == 2.0


def test_step_without_a_forward_adds_no_entry() -> None:
    model = body()
    engine = converted(model, {"name": "delayed", "amax_history_len": 4})
    train(model, engine, 1)
    before = engine.state_dict()["delayed"]["0"]["amax_history"]
    engine.on_optimizer_step()
    assert torch.equal(engine.state_dict()["delayed"]["0"]["amax_history"], before)


def test_step_with_infinite_gradients_keeps_the_scale() -> None:
    model = body()
    engine = converted(model, {"name": "delayed", "amax_compute_algo": "most_recent", "amax_history_len": 4})
    train(model, engine, 2)
    before = engine.state_dict()["delayed"]["2"]["scale"][2]
    (loss_of(model, torch.randn(4, 32)) * math.inf).backward()
    engine.on_optimizer_step()
    assert engine.state_dict()["delayed"]["2"]["scale"][2] == before


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_comes_close_to_training_in_fp32(recipe) -> None:
    losses = train(model := body(), converted(model, recipe), 60)
    plain = body()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        loss = plain(torch.randn(8, 32, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    # The same batches; FP8 noise of about 4% in gradients leaves the loss of a smooth problem within 5%.
    assert losses[-1] == pytest.approx(loss.item(), rel=0.05)


# --- State -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_resumed_run_continues_bit_for_bit(recipe) -> None:
    straight = body()
    engine = converted(straight, recipe)
    train(straight, engine, 3)
    saved = io.BytesIO()
    torch.save({"model": straight.state_dict(), "fp8": engine.state_dict()}, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    resumed = body()
    other = converted(resumed, recipe)
    resumed.load_state_dict(loaded["model"])
    assert other.load_state_dict(loaded["fp8"]) == []
    assert train(straight, engine, 4, seed=1) == train(resumed, other, 4, seed=1)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_loaded_before_conversion_is_applied_by_it() -> None:
    model = body()
    first = converted(model, "delayed")
    train(model, first, 2)
    second = FP8Engine(FP8Config(recipe="delayed", backend="emulated"))
    second.load_state_dict(first.state_dict())
    second.convert_(body())
    saved, restored = first.state_dict()["delayed"]["0"], second.state_dict()["delayed"]["0"]
    assert all(torch.equal(saved[key], restored[key]) for key in saved)


def test_history_survives_a_teardown() -> None:
    model = body()
    engine = converted(model, "delayed")
    train(model, engine, 2)
    scale = engine.state_dict()["delayed"]["0"]["scale"]
    engine.revert_()
    assert torch.equal(engine.state_dict()["delayed"]["0"]["scale"], scale)
    engine.convert_(model)
    assert torch.equal(engine.state_dict()["delayed"]["0"]["scale"], scale)


def test_another_model_starts_anew_and_the_first_one_goes_on_where_it_was() -> None:
    first, second, straight = body(), body(), body()
    reused, alone = (FP8Engine(FP8Config(recipe="delayed", backend="emulated")) for _ in range(2))
    reused.convert_(first)
    train(first, reused, 2)
    reused.demote("2", "saturated")
    reused.revert_()
    for engine, model in ((reused, second), (alone, straight)):
        engine.convert_(model)
        assert (engine.demoted, engine.coverage.num_converted) == ({}, 2)
        train(model, engine, 2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), straight.parameters(), strict=True))
    torch.testing.assert_close(reused.state_dict()["delayed"], alone.state_dict()["delayed"], rtol=0, atol=0)
    reused.revert_()
    reused.convert_(first)
    assert reused.demoted == {"2": "saturated"}


def test_two_conversions_of_a_model_are_one_run() -> None:
    once, twice = body(), body()
    engine = converted(once, "delayed")
    train(once, engine, 2)
    train(once, engine, 2, seed=1)
    engine = converted(twice, "delayed")
    train(twice, engine, 2)
    engine.revert_()
    engine.convert_(twice)
    train(twice, engine, 2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))


def test_loaded_state_wins_over_what_the_model_had() -> None:
    model = body()
    engine = converted(model, {"name": "delayed", "amax_history_len": 4})
    blank = copy.deepcopy(engine.state_dict())
    train(model, engine, 2)
    engine.demote("2", "saturated")
    trained = copy.deepcopy(engine.state_dict())
    assert engine.load_state_dict(blank) == []
    torch.testing.assert_close(engine.state_dict()["delayed"], blank["delayed"], rtol=0, atol=0)
    assert (engine.demoted, engine.rows[1].reason, engine.coverage.num_converted) == ({}, "FP8", 2)
    engine.revert_()
    engine.load_state_dict(trained)
    engine.convert_(body())
    assert engine.demoted == {"2": "saturated"}
    torch.testing.assert_close(engine.state_dict()["delayed"], trained["delayed"], rtol=0, atol=0)
    engine.load_state_dict(converted(body(), "current").state_dict())
    torch.testing.assert_close(engine.state_dict()["delayed"], blank["delayed"], rtol=0, atol=0)


def test_engine_that_ran_can_be_pickled() -> None:
    model = body()
    engine = converted(model, "delayed")
    train(model, engine, 1)
    engine.revert_()
    twin = pickle.loads(pickle.dumps(engine))
    torch.testing.assert_close(twin.state_dict()["delayed"], engine.state_dict()["delayed"], rtol=0, atol=0)
    assert twin.convert_(body())[0].converted


def test_another_recipe_on_resume_is_said_once_and_starts_anew() -> None:
    saved = converted(body(), "delayed").state_dict()
    assert converted(body(), "current").load_state_dict(saved) == ["the FP8 recipe was 'delayed' and is 'current'"]
    changes = converted(body(), {"name": "delayed", "amax_history_len": 4}).load_state_dict(saved)
    assert changes[0] == "the FP8 recipe was {'amax_history_len': 1024} and is {'amax_history_len': 4}"
    assert changes[1:] == ["the amax history of 2 layers starts anew: its length changed"]


def test_another_backend_on_resume_is_said() -> None:
    saved = {**converted(body(), "delayed").state_dict(), "backend": "transformer_engine"}
    changes = converted(body(), "delayed").load_state_dict(saved)
    assert changes == ["the FP8 backend was 'transformer_engine' and is 'emulated'"]


def test_empty_state_is_taken() -> None:
    assert converted(body()).load_state_dict({}) == []


# --- Demotion and statistics -----------------------------------------------------------------------


def test_demoted_layer_runs_in_bf16_and_the_state_remembers() -> None:
    model, plain = body(), body()
    engine = converted(model, include=["0"])
    engine.demote("0", "3.0% saturated")
    x = torch.randn(4, 32)
    assert torch.equal(loss_of(model, x), loss_of(plain, x))
    assert engine.coverage.num_converted == 0
    assert engine.rows[0].reason == "demoted: 3.0% saturated"
    resumed = converted(body(), include=["0"])
    resumed.load_state_dict(engine.state_dict())
    assert resumed.demoted == {"0": "3.0% saturated"}
    with pytest.raises(SettingValueError, match=r"fqn='9'.*Layers in FP8: 0"):
        engine.demote("9", "x")


@pytest.mark.parametrize("recipe", RECIPES)
def test_statistics_are_collected_between_start_and_stop(recipe) -> None:
    model = body()
    engine = converted(model, recipe)
    train(model, engine, 2)
    assert engine.statistics() == []
    engine.collect_statistics()
    train(model, engine, 1, micro_batches=2)
    engine.stop_statistics()
    found = engine.statistics()
    assert [(row.fqn, row.operand) for row in found] == [
        (fqn, operand) for fqn in ("0", "2") for operand in ("input", "weight", "grad")
    ]
    assert all(row.amax > 0 and row.scale > 0 and row.saturated < 0.2 and row.flushed < 0.2 for row in found)
    assert all(row.sqnr_db > (20 if row.operand == "grad" else 25) for row in found)
    train(model, engine, 1)
    assert engine.statistics() == found


def test_statistics_see_what_a_stale_scale_saturates() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
    engine = converted(model, "delayed")
    loss_of(model, torch.ones(4, 32)).backward()
    engine.on_optimizer_step()
    engine.collect_statistics()
    x = torch.ones(4, 32)
    x[:, :8] = 100.0
    loss_of(model, x).backward()
    row = next(row for row in engine.statistics() if row.operand == "input")
    assert (row.amax, row.scale, row.saturated) == (100.0, 448.0, 0.25)


# --- Ranks -----------------------------------------------------------------------------------------

RANKS = """
    import sys, torch, torch.distributed as dist
    from torch import nn
    from lightning_mp.fp8 import FP8Config, FP8Engine
    rank, reduces, path = int(sys.argv[1]), sys.argv[2] == "True", sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    recipe = {"name": "delayed", "amax_history_len": 4, "reduce_amax": reduces}
    engine = FP8Engine(FP8Config(recipe=recipe, backend="emulated"))
    engine.convert_(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.full((2, 16), rank + 1.0)).sum().backward()
    engine.on_optimizer_step()
    print(engine.state_dict()["delayed"]["0"]["scale"][0].item())
    dist.destroy_process_group()
"""


@pytest.mark.parametrize(("reduces", "scales"), [(True, [224.0, 224.0]), (False, [448.0, 224.0])])
def test_ranks_share_their_amax_if_the_recipe_says_so(reduces, scales, tmp_path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(RANKS)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(reduces), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in (0, 1)
    ]
    assert [float(rank.communicate(timeout=120)[0]) for rank in ranks] == scales
