"""state_dict and load_state_dict speak FP32; a refused checkpoint changes nothing."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights import MasterWeights

MODES = ["copy", "split"]


class Model(nn.Module):
    def __init__(self, seed: int = 0, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(16, width)
        self.encoder = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embedding.weight


def convert(mode: str, seed: int = 0, **kwargs: Any) -> tuple[Model, MasterWeights]:
    model = Model(seed, **kwargs)
    masters = MasterWeights(mode)
    masters.convert_(model)
    return model, masters


def assert_equal_states(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype is value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_holds_the_fp32_values_under_the_usual_keys(mode: str) -> None:
    plain = Model()
    model, _ = convert(mode)
    assert {param.dtype for param in model.encoder[0].parameters()} == {torch.bfloat16}
    assert_equal_states(model.state_dict(), plain.state_dict())
    assert_equal_states(model.encoder.state_dict(), plain.encoder.state_dict())
    Model(seed=1).load_state_dict(model.state_dict())


def test_none_saves_fp32_tensors_of_its_16_bit_values() -> None:
    model, _ = convert("none")
    expected = {
        name: value if "1." in name else value.bfloat16().float() for name, value in Model().state_dict().items()
    }
    assert_equal_states(model.state_dict(), expected)


@pytest.mark.parametrize("mode", MODES)
def test_saved_file_loads_with_weights_only(mode: str) -> None:
    model, _ = convert(mode)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert_equal_states(torch.load(file, weights_only=True), Model().state_dict())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", ["whole", "submodule"])
def test_a_loaded_checkpoint_becomes_the_master_exactly(mode: str, part: str) -> None:
    # Ties included: torch's own copy rounds them to even, and split could not be inverted then.
    model, masters = convert(mode)
    source = Model(seed=1)
    with torch.no_grad():
        source.encoder[0].weight.view(torch.int32).bitwise_and_(-65536).add_(0x8000)
    if part == "whole":
        model.load_state_dict(source.state_dict())
    else:
        model.encoder.load_state_dict(source.encoder.state_dict())
    assert torch.equal(masters.value_of(model.encoder[0].weight), source.encoder[0].weight)
    masters.detach()
    assert torch.equal(model.encoder[0].weight, source.encoder[0].weight)


@pytest.mark.parametrize("mode", MODES)
def test_a_half_precision_checkpoint_is_taken_over_as_it_is(mode: str) -> None:
    model, _ = convert(mode)
    half = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in Model(1).state_dict().items()
    }
    model.load_state_dict(half)
    assert_equal_states(
        model.state_dict(),
        {name: value.float() if value.is_floating_point() else value for name, value in half.items()},
    )


def broken_states() -> dict[str, tuple[dict[str, Any], str]]:
    state = Model(seed=1).state_dict()
    other_shape = {**state, "encoder.0.weight": torch.zeros(8, 9)}
    integer = {**state, "encoder.0.weight": torch.zeros(8, 8, dtype=torch.int64)}
    return {
        "shape": (
            other_shape,
            r"(?s)nothing was loaded.*size mismatch for encoder.0.weight: .*current model is .*8, 8",
        ),
        "integer": (integer, r"'encoder.0.weight' is a tensor of torch.int64, and a master needs a floating-point"),
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", broken_states())
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_loaded(mode: str, fault: str) -> None:
    model, _ = convert(mode)
    state, message = broken_states()[fault]
    with pytest.raises(UnsupportedError, match=message):
        model.load_state_dict(state)
    assert_equal_states(model.state_dict(), Model().state_dict())


def test_missing_masters_keep_their_value_with_strict_off() -> None:
    model, _ = convert("split")
    state = Model(seed=1).state_dict()
    del state["encoder.0.weight"]
    model.load_state_dict(state, strict=False)
    assert torch.equal(model.state_dict()["encoder.0.weight"], Model().encoder[0].weight)
    assert torch.equal(model.state_dict()["embedding.weight"], Model(seed=1).embedding.weight)


def test_assign_is_refused_because_it_replaces_parameters() -> None:
    model, _ = convert("split")
    with pytest.raises(UnsupportedError, match=r"assign=True\) would replace the parameters that have masters"):
        model.load_state_dict(Model(seed=1).state_dict(), assign=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_deepcopy_is_a_plain_fp32_model_with_the_masters_values(mode: str) -> None:
    model, _masters = convert(mode)
    twin = copy.deepcopy(model)
    assert_equal_states(twin.state_dict(), Model().state_dict())
    assert {param.dtype for param in twin.parameters()} == {torch.float32}
    assert twin.head.weight is twin.embedding.weight
    with torch.no_grad():
        for param in twin.parameters():
            param.zero_()
    assert all(not bool(value.any()) for name, value in twin.state_dict().items() if name.endswith("weight"))
    assert_equal_states(model.state_dict(), Model().state_dict())  # the original is untouched
    twin.load_state_dict(Model(seed=1).state_dict())
    assert_equal_states(twin.state_dict(), Model(seed=1).state_dict())
    twin.embedding.weight.sum().backward()
    assert twin.embedding.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_a_deepcopy_of_a_part_and_an_averaged_model_are_fp32_too(mode: str) -> None:
    model, _ = convert(mode)
    assert torch.equal(copy.deepcopy(model.encoder)[0].weight, Model().encoder[0].weight)
    assert {param.dtype for param in AveragedModel(model).parameters()} == {torch.float32}


@pytest.mark.parametrize("mode", [*MODES, "none"])
def test_detach_leaves_a_module_that_never_had_masters(mode: str) -> None:
    model, masters = convert(mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masters.attach([optimizer])
    masters.detach()
    for child in model.modules():
        assert not child._state_dict_hooks
        assert not child._load_state_dict_pre_hooks
        assert not child._load_state_dict_post_hooks
    assert not {"step", "load_state_dict"} & set(vars(optimizer))
    if mode != "none":
        assert_equal_states(model.state_dict(), Model().state_dict())
    for param in model.parameters():
        assert param.grad_dtype is param.dtype
    masters.detach()  # once more: nothing


def test_keep_vars_returns_the_parameters_themselves() -> None:
    model, _ = convert("split")
    assert model.state_dict(keep_vars=True)["embedding.weight"] is model.embedding.weight


def test_a_parameter_that_replaces_a_mastered_one_is_saved_as_it_is() -> None:
    model, _ = convert("split")
    model.encoder[0].weight = nn.Parameter(torch.ones(8, 8))
    assert torch.equal(model.state_dict()["encoder.0.weight"], torch.ones(8, 8))


def pickled(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("mode", MODES)
def test_a_pickled_module_is_a_plain_fp32_one_with_the_masters_values(mode: str) -> None:
    model, masters = convert(mode)
    model.encoder[0].weight.note = "kept"
    model.encoder[0].bias.requires_grad_(False)
    loaded = pickled(model)
    assert_equal_states(loaded.state_dict(), Model().state_dict())
    assert {param.dtype for param in loaded.parameters()} == {torch.float32}
    assert loaded.head.weight is loaded.embedding.weight
    assert loaded.encoder[0].weight.note == "kept"
    assert not loaded.encoder[0].bias.requires_grad
    assert torch.equal(pickled(model.encoder)[0].weight, Model().encoder[0].weight)
    assert torch.equal(pickled(list(model.parameters()))[0], Model().embedding.weight)
    assert_equal_states(model.state_dict(), Model().state_dict())
    masters.detach()
    assert all("__reduce_ex__" not in vars(param) for param in model.parameters())
    assert_equal_states(pickled(model).state_dict(), Model().state_dict())


def test_with_none_a_pickled_module_has_its_16_bit_values() -> None:
    model, _ = convert("none")
    assert torch.equal(pickled(model).encoder[0].weight, Model().encoder[0].weight.bfloat16())


SUBMODULE_STATES: dict[str, dict[str, torch.Tensor]] = {
    "broadcastable": {"weight": torch.ones(8), "bias": torch.ones(8)},
    "bias broadcastable": {"weight": torch.ones(8, 8), "bias": torch.ones(1)},
    "not broadcastable": {"weight": torch.ones(8, 8), "bias": torch.ones(7)},
}


@pytest.mark.parametrize("case", SUBMODULE_STATES)
@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_shape_loaded_into_a_part_is_torchs_size_mismatch_and_changes_nothing(mode: str, case: str) -> None:
    model, _ = convert(mode)
    with pytest.raises(RuntimeError, match=r"size mismatch for (weight|bias): copying a param with shape torch.Size"):
        model.encoder[0].load_state_dict(SUBMODULE_STATES[case])
    assert_equal_states(model.state_dict(), Model().state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_a_part_with_other_names_around_it_is_checked_by_torch(mode: str) -> None:
    # As a wrapper's load_state_dict does, whose own hooks are not ours.
    model, _ = convert(mode)
    wrapper = nn.ModuleDict({"part": model.encoder})
    with pytest.raises(RuntimeError, match=r"size mismatch for part.0.weight: copying a param with shape"):
        wrapper.load_state_dict({"part.0.weight": torch.ones(8)}, strict=False)
    assert_equal_states(model.state_dict(), Model().state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_a_single_element_loads_into_a_parameter_without_dimensions(mode: str) -> None:
    module = nn.Module()
    module.temperature = nn.Parameter(torch.tensor(1.0))
    MasterWeights(mode).convert_(module)
    module.load_state_dict({"temperature": torch.tensor([0.1])})
    assert torch.equal(module.state_dict()["temperature"], torch.tensor(0.1))


def test_a_write_into_a_tensor_of_state_dict_reaches_a_copied_master_in_full() -> None:
    model, masters = convert("copy")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    masters.attach([optimizer])
    own = model.state_dict()
    own["encoder.0.weight"].copy_(torch.full((8, 8), 0.3))
    for param in model.parameters():
        param.grad = torch.ones(param.shape)
    optimizer.step()
    assert torch.equal(masters.value_of(model.encoder[0].weight), torch.full((8, 8), 0.3) - 1e-4)
    own["encoder.0.weight"].fill_(0.1)
    assert torch.equal(model.state_dict()["encoder.0.weight"], torch.full((8, 8), 0.1))
    assert torch.equal(model.encoder[0].weight, torch.full((8, 8), 0.1).bfloat16())


def test_a_checkpoint_without_a_master_is_an_error_that_names_it_when_loading_is_strict() -> None:
    model, _ = convert("split")
    state = Model(seed=1).state_dict()
    del state["encoder.0.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "encoder.0.weight"'):
        model.load_state_dict(state)
    assert_equal_states(model.state_dict(), Model().state_dict())
