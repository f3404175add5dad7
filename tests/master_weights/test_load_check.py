"""While a module has masters, load_state_dict refuses exactly what torch refuses, and before it loads anything."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights import MasterWeights


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.register_parameter("absent", None)


class ExtraState(nn.Linear):
    def get_extra_state(self) -> Tensor:
        return torch.tensor(3)

    def set_extra_state(self, state: Tensor) -> None:
        assert state is not None


class RenamesOldKeys(nn.Linear):
    """As modules do whose parameters had other names in an older version."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "kernel" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel").t()
        super()._load_from_state_dict(state_dict, prefix, *args)


def with_renaming_hook() -> nn.Module:
    linear = nn.Linear(4, 4)

    def rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        if prefix + "kernel" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel").t()

    linear.register_load_state_dict_pre_hook(rename)
    return linear


def with_forgiving_hook() -> nn.Module:
    linear = nn.Linear(4, 4)
    # As adapters do whose weights no checkpoint of the base model has.
    linear.register_load_state_dict_post_hook(lambda module, found: found.missing_keys.clear())
    return linear


def tied() -> nn.Module:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "head": nn.Linear(4, 4, bias=False)})
    model["head"].weight = model["embedding"].weight
    return model


def shared() -> nn.Module:
    linear = nn.Linear(4, 4)
    return nn.ModuleDict({"first": linear, "again": linear})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "norms": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.InstanceNorm1d(4)),
    "buffers": WithBuffers,
    "extra state": lambda: nn.Sequential(nn.Linear(4, 4), ExtraState(4, 4)),
    "tied": tied,
    "shared": shared,
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 4),
    "renames in load": lambda: nn.Sequential(nn.Linear(4, 4), RenamesOldKeys(4, 4)),
    "renames in a hook": lambda: nn.Sequential(nn.Linear(4, 4), with_renaming_hook()),
    "forgives in a hook": lambda: nn.Sequential(nn.Linear(4, 4), with_forgiving_hook()),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "lists": lambda: nn.ModuleDict({"a": nn.ParameterList([nn.Parameter(torch.zeros(4)), torch.zeros(2)])}),
}


def checkpoints(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Checkpoints of a twin with other values: whole, and with one fault each."""
    torch.manual_seed(1)
    whole = OrderedDict(
        (key, torch.randn_like(value) if value.is_floating_point() else value + 1)
        for key, value in model.state_dict().items()
    )
    whole._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]

    def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        twin = copy.copy(whole)
        twin._metadata = whole._metadata  # type: ignore[attr-defined]
        change(twin)
        return twin

    def rename(found: dict[str, Any]) -> None:
        found["1.kernel"] = found.pop("1.weight").t()

    cases: dict[str, dict[str, Any]] = {
        "whole": whole,
        "old": dict(whole),
        "empty": {},
        "extra": changed(lambda found: found.update(other=torch.zeros(2))),
        "extra below": changed(lambda found: found.update({f"{next(iter(whole))}.more": torch.zeros(2)})),
        "cache": changed(lambda found: found.update(cache=torch.zeros(3))),
        "absent": changed(lambda found: found.update(absent=torch.zeros(3))),
    }
    for key in whole:
        cases[f"without {key}"] = changed(lambda found, key=key: found.pop(key))
        if not key.endswith("_extra_state"):
            cases[f"{key} longer"] = changed(lambda found, key=key: found.update({key: torch.zeros(7, 7)}))
        cases[f"old without {key}"] = {name: value for name, value in whole.items() if name != key}
    if "1.weight" in whole:
        cases["renamed"] = changed(rename)
    return cases


CASES = [(model, case) for model, make in MODELS.items() for case in checkpoints(make())]


def load(module: nn.Module, state: dict[str, Any], *, strict: bool) -> Exception | None:
    try:
        module.load_state_dict(state, strict=strict)
    except Exception as error:
        return error
    return None


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def bits(module: nn.Module) -> dict[str, Any]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}-{case}" for name, case in CASES])
def test_a_load_ends_as_torchs_and_a_refused_one_changes_nothing(name: str, case: str, strict: bool) -> None:
    plain, ours = make(name), make(name)
    MasterWeights("split").convert_(ours)
    before, state = bits(ours), checkpoints(plain)[case]
    expected = load(plain, copy.copy(state), strict=strict)
    found = load(ours, copy.copy(state), strict=strict)
    assert (found is None) == (expected is None), (found, expected)
    if expected is None:
        assert_same(bits(ours), bits(plain))
    elif not is_left_to_torch(name, case):
        assert isinstance(found, UnsupportedError)
        assert_same(bits(ours), before)


def is_left_to_torch(name: str, case: str) -> bool:
    """Whether only the module itself knows what it loads: then torch's error comes after the load."""
    if name == "forgives in a hook":
        return "longer" not in case
    return name.startswith("renames") and "0." not in case and case != "cache"


def test_the_error_names_all_faults_in_torchs_words() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    MasterWeights("copy").convert_(model)
    state = {
        "0.weight": torch.zeros(4, 5),
        "1.weight": torch.zeros(3),
        "1.bias": torch.zeros(4),
        "2.bias": torch.zeros(1),
    }
    with pytest.raises(UnsupportedError) as caught:
        model.load_state_dict(state)
    assert str(caught.value) == (
        "master_weights: the checkpoint does not fit Sequential; nothing was loaded.\n"
        '\tMissing key(s) in state_dict: "0.bias".\n'
        '\tUnexpected key(s) in state_dict: "2.bias".\n'
        "\tsize mismatch for 0.weight: copying a param with shape torch.Size([4, 5]) from checkpoint, the shape in "
        "current model is torch.Size([4, 4]).\n"
        "\tsize mismatch for 1.weight: copying a param with shape torch.Size([3]) from checkpoint, the shape in "
        "current model is torch.Size([4]).\n"
        "Build the model with the checkpoint's sizes and names. With strict=False keys may be missing or unexpected; "
        "one that does not fit has to be dropped from the checkpoint."
    )


def test_many_faults_are_counted() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(8)))
    MasterWeights("copy").convert_(model)
    with pytest.raises(UnsupportedError, match=r'"4.bias" and 6 more\.'):
        model.load_state_dict({})


class FillsWhatIsMissing(nn.Sequential):
    """A model whose own load is not strict, whatever it is asked."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def test_the_strictness_that_counts_is_what_torchs_load_gets() -> None:
    model = FillsWhatIsMissing(nn.Linear(4, 4))
    MasterWeights("split").convert_(model)
    model.load_state_dict({"0.bias": torch.ones(4)}, strict=True)
    assert torch.equal(model.state_dict()["0.bias"], torch.ones(4))


@pytest.mark.parametrize("case", ["0.weight missing", "1.weight longer"])
def test_a_load_through_a_wrapper_is_checked_under_its_names(case: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    MasterWeights("split").convert_(model)
    before = bits(model)
    wrapper = nn.Module()
    wrapper.module = model  # as DistributedDataParallel does
    state = {key: torch.zeros_like(value) for key, value in wrapper.state_dict().items()}
    if case == "0.weight missing":
        del state["module.0.weight"]
    else:
        state["module.1.weight"] = torch.zeros(9)
    with pytest.raises(UnsupportedError, match=f"module.{case[:8]}"):
        wrapper.load_state_dict(state)
    assert_same(bits(model), before)


def test_a_part_is_checked_when_it_is_loaded_alone() -> None:
    model = nn.ModuleDict({"part": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))})
    MasterWeights("split").convert_(model)
    before = bits(model)
    with pytest.raises(UnsupportedError, match=r'Missing key\(s\) in state_dict: "1.bias"'):
        model["part"].load_state_dict(
            {"0.weight": torch.ones(4, 4), "0.bias": torch.ones(4), "1.weight": torch.ones(4)}
        )
    assert_same(bits(model), before)


def test_after_detach_torch_checks_alone() -> None:
    model, masters = nn.Linear(4, 4), MasterWeights("split")
    masters.convert_(model)
    masters.detach()
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        model.load_state_dict({"bias": torch.ones(4)})
    assert not isinstance(caught.value, UnsupportedError)
