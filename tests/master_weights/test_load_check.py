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
        "master_weights: the checkpoint does not fit Sequential; nothing was loaded into it.\n"
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


# --- Writes, and loads that pass over them ----------------------------------------------------------


class ZeroInitializesAfterLoading(nn.Linear):
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "bias" not in state_dict:
            nn.init.zeros_(self.bias)


class CopiesByHand(nn.Linear):
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(state_dict[prefix + "weight"])


def writes_head(model: nn.Module) -> None:
    nn.init.zeros_(model[1].weight)
    nn.init.ones_(model[1].bias)


def writes_row(model: nn.Module) -> None:
    with torch.no_grad():
        model[1].weight[2].fill_(-torch.inf)


def writes_in_post_hook(model: nn.Module) -> None:
    def write(module: nn.Module, _: Any) -> None:
        with torch.no_grad():
            module.weight.fill_(0.5)

    model[1].register_load_state_dict_post_hook(write)


def writes_memory(model: nn.Module) -> None:
    model[1].bias.data = torch.full((4,), 1.2345678)


def nothing(model: nn.Module) -> None:
    pass


def renames_from_now_on(model: nn.Module) -> None:
    def double(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2

    model[0].register_load_state_dict_pre_hook(double)


WRITES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], None]]] = {
    "a head": (lambda: nn.Linear(4, 4), writes_head),
    "a row": (lambda: nn.Linear(4, 4), writes_row),
    "in a post-hook": (lambda: nn.Linear(4, 4), writes_in_post_hook),
    "memory": (lambda: nn.Linear(4, 4), writes_memory),
    "after loading": (lambda: ZeroInitializesAfterLoading(4, 4), nothing),
    "a hook that came later": (lambda: nn.Linear(4, 4), renames_from_now_on),
}


@pytest.mark.parametrize("mode", ["copy", "split"])
@pytest.mark.parametrize("case", WRITES)
def test_what_was_written_beside_a_load_is_what_plain_torch_has(case: str, mode: str) -> None:
    layer, write = WRITES[case]

    def run(mode: str | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), layer())
        with torch.no_grad():  # an untouched element of a block that was written may be rounded
            model[1].weight.copy_(model[1].weight.bfloat16())
        masters = MasterWeights(mode) if mode else None  # type: ignore[arg-type]
        if masters is not None:
            masters.convert_(model)
        write(model)
        torch.manual_seed(1)
        model.load_state_dict({"0.weight": torch.randn(4, 4), "0.bias": torch.randn(4)}, strict=False)
        return bits(model)

    assert_same(run(mode), run(None))


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_a_module_that_copies_by_hand_has_its_values_rounded_once(mode: str) -> None:
    model = nn.Sequential(CopiesByHand(4, 4))
    MasterWeights(mode).convert_(model)  # type: ignore[arg-type]
    value = torch.randn(4, 4)
    model.load_state_dict({"0.weight": value, "0.bias": torch.zeros(4)})
    assert torch.equal(model.state_dict()["0.weight"], value.bfloat16().float())


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_a_loader_of_its_own_gets_fp32_values_into_the_masters(mode: str) -> None:
    def load_by_module(module: nn.Module, state: dict[str, Any]) -> list[str]:
        errors: list[str] = []
        for name, child in module.named_modules():
            prefix = f"{name}." if name else ""
            child._load_from_state_dict(state, prefix, {}, True, [], [], errors)
        return errors

    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    MasterWeights(mode).convert_(model)  # type: ignore[arg-type]
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    state["1.bias"] = torch.zeros(9)
    (error,) = load_by_module(model, dict(state))
    assert error.startswith("size mismatch for 1.bias")
    for key in ("0.weight", "0.bias", "1.weight"):
        assert torch.equal(model.state_dict()[key], state[key])


def test_a_part_inside_a_stranger_is_checked_and_assign_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    MasterWeights("split").convert_(nn.ModuleDict({"body": model}))
    before = bits(model)
    stranger = nn.ModuleDict({"x": model})
    state = {key: torch.ones_like(value) for key, value in stranger.state_dict().items()}
    with pytest.raises(UnsupportedError, match=r"assign=True\) would replace"):
        stranger.load_state_dict(state, assign=True)
    with pytest.raises(UnsupportedError, match=r"size mismatch for x\.1\.bias"):
        stranger.load_state_dict({**state, "x.1.bias": torch.ones(7)})
    assert_same(bits(model), before)


@pytest.mark.parametrize("value", [torch.ones(4, 4, device="meta"), torch.eye(4).to_sparse()], ids=["meta", "sparse"])
def test_a_tensor_without_dense_values_is_named(value: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    MasterWeights("split").convert_(model)
    before = bits(model)
    state = {key: torch.ones_like(old) for key, old in before.items()}
    with pytest.raises(UnsupportedError, match=r"'1.weight' is a (meta|sparse) tensor of torch.float32"):
        model.load_state_dict({**state, "1.weight": value})
    assert_same(bits(model), before)


@pytest.mark.parametrize("make_layer", [nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hooks_of_torchs_own_are_looked_through(make_layer: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(make_layer(nn.Linear(4, 4)), nn.Linear(4, 4))
    MasterWeights("split").convert_(model)
    before = bits(model)
    state = model.state_dict()
    del state["0.bias"]
    with pytest.raises(UnsupportedError, match=r'Missing key\(s\) in state_dict: "0.bias"'):
        model.load_state_dict(state)
    assert_same(bits(model), before)


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_values_halfway_between_two_of_bf16_are_loaded_exactly(mode: str) -> None:
    model = nn.Linear(64, 1)
    MasterWeights(mode).convert_(model)  # type: ignore[arg-type]
    halfway = 1 + 2.0**-8 + torch.arange(64.0) * 2.0**-7  # torch rounds to even, half of them down
    model.load_state_dict({"weight": halfway[None], "bias": torch.zeros(1)})
    assert torch.equal(model.state_dict()["weight"][0], halfway)


def test_old_names_that_a_hook_of_torch_knows_are_loaded() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))

    plain, ours = make(), make()
    MasterWeights("split").convert_(ours)
    old = {"0.weight_g": torch.rand(4, 1), "0.weight_v": torch.randn(4, 4), "0.bias": torch.randn(4)}
    plain.load_state_dict(old)
    ours.load_state_dict(old)
    assert_same(bits(ours), bits(plain))


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_rows_that_a_module_writes_after_loading_leave_the_others_in_fp32(mode: str) -> None:
    class Padded(nn.Embedding):
        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)
            with torch.no_grad():
                self.weight[0].zero_()

    model = nn.Sequential(Padded(40, 64))
    MasterWeights(mode).convert_(model)  # type: ignore[arg-type]
    value = torch.randn(40, 64)
    model.load_state_dict({"0.weight": value})
    assert torch.equal(model.state_dict()["0.weight"], torch.cat([torch.zeros(1, 64), value[1:]]))
