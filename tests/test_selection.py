import re

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_mp.errors import SettingTypeError, UnmatchedPatternError
from lightning_mp.selection import clean_fqn, named_inner_modules, select_modules


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.norm2 = nn.LayerNorm(4)


class TinyEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Block()
        self.head = nn.Linear(4, 4)


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        for index in range(depth):
            setattr(self, f"layer{index}", nn.Linear(2, 2))


def select(model, *selectors):
    return select_modules(model, selectors, argument="modules")


def test_full_name_selects_exactly_that_module() -> None:
    model = TinyEncoder()
    assert select(model, "encoder.norm1") == {"encoder.norm1": model.encoder.norm1}


def test_pattern_for_one_layer_leaves_layers_sharing_its_prefix() -> None:
    assert list(select(Stack(12), "layer1")) == ["layer1"]


def test_star_crosses_dots_and_result_keeps_the_order_of_the_model() -> None:
    assert list(select(TinyEncoder(), "head", "*norm*")) == ["encoder.norm1", "encoder.norm2", "head"]


def test_last_component_alone_does_not_match() -> None:
    with pytest.raises(UnmatchedPatternError, match=r"Nearest names: encoder\.norm1, "):
        select(TinyEncoder(), "norm1")


def test_patterns_are_case_sensitive() -> None:
    with pytest.raises(UnmatchedPatternError, match="'HEAD' matches no module"):
        select(TinyEncoder(), "HEAD")


def test_class_selects_subclasses_and_no_other() -> None:
    class RowLinear(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), RowLinear(2, 2), nn.LayerNorm(2))
    assert list(select(model, nn.Linear)) == ["0", "1"]
    assert list(select(model, RowLinear)) == ["1"]


def test_class_can_select_the_root_and_a_pattern_cannot() -> None:
    model = TinyEncoder()
    assert select(model, TinyEncoder) == {"": model}
    assert "" not in select(model, "*")


def test_several_items_that_select_one_module_return_it_once() -> None:
    assert list(select(TinyEncoder(), "head", "he*", nn.Linear)) == ["encoder.linear", "head"]


def test_no_items_select_nothing() -> None:
    assert select_modules(TinyEncoder(), (), argument="modules") == {}


@pytest.mark.parametrize("alone", ["head", nn.Linear], ids=["pattern", "class"])
def test_an_item_may_stand_alone(alone) -> None:
    # A string is an iterable of its letters: read as one it would be four patterns.
    assert "head" in select_modules(TinyEncoder(), alone, argument="modules")


def test_items_may_come_from_a_generator() -> None:
    assert list(select_modules(TinyEncoder(), (name for name in ["head"]), argument="modules")) == ["head"]


def test_unmatched_pattern_names_setting_item_model_and_nearest_names() -> None:
    expected = (
        "modules: 'encodr.norm*' matches no module of TinyEncoder. Patterns are matched to the full dotted name. "
        "Nearest names: encoder.norm2, encoder.norm1, encoder.linear."
    )
    with pytest.raises(UnmatchedPatternError, match=f"^{re.escape(expected)}$"):
        select(TinyEncoder(), "head", "encodr.norm*")


def test_unmatched_class_names_the_classes_of_the_model() -> None:
    expected = (
        "exclude: class RMSNorm matches no module of TinyEncoder. Classes are matched with isinstance. "
        "Nearest classes: LayerNorm, TinyEncoder, "
    )
    with pytest.raises(UnmatchedPatternError, match=f"^{re.escape(expected)}"):
        select_modules(TinyEncoder(), [nn.RMSNorm], argument="exclude")


def test_at_most_three_names_are_suggested() -> None:
    with pytest.raises(UnmatchedPatternError, match=r"Nearest names: \w+, \w+, \w+\.$"):
        select(Stack(12), "layr")


def test_model_without_modules_has_no_names_to_suggest() -> None:
    with pytest.raises(UnmatchedPatternError, match=r"'head' matches no module of Linear\. .* no modules inside"):
        select(nn.Linear(2, 2), "head")


def test_empty_pattern_is_unmatched() -> None:
    with pytest.raises(UnmatchedPatternError, match=r"^modules: '' matches no module"):
        select(TinyEncoder(), "")


@pytest.mark.parametrize("wrong", [3, None, True], ids=repr)
def test_wrong_setting_type_is_refused(wrong) -> None:
    with pytest.raises(SettingTypeError, match=f"^modules={wrong!r} has type {type(wrong).__name__}"):
        select_modules(TinyEncoder(), wrong, argument="modules")


def test_wrong_item_type_is_refused() -> None:
    with pytest.raises(SettingTypeError, match=r"^modules: 3 has type int\. Pass dotted-name patterns"):
        select(TinyEncoder(), "head", 3)


def test_module_object_in_place_of_its_class_is_refused_with_the_fix() -> None:
    with pytest.raises(SettingTypeError, match=r"^modules: found a Linear object\. Pass its class"):
        select(TinyEncoder(), nn.Linear(2, 2))


def test_model_given_as_an_iterable_of_modules_is_refused() -> None:
    # nn.Sequential is iterable, over modules.
    with pytest.raises(SettingTypeError, match="found a Linear object"):
        select_modules(TinyEncoder(), nn.Sequential(nn.Linear(2, 2)), argument="modules")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.second = self.first


@pytest.mark.parametrize("pattern", ["first.linear", "second.linear", "*.linear"])
def test_shared_module_is_found_under_each_name_and_returned_once_under_its_first(pattern) -> None:
    model = Tied()
    assert select(model, pattern) == {"first.linear": model.first.linear}


def test_attribute_and_its_alias_in_one_module_both_match() -> None:
    model = nn.Module()
    model.query = nn.Linear(2, 2)
    model.key = model.query
    assert list(select(model, "key")) == ["query"]


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("", ""),
        ("encoder.norm", "encoder.norm"),
        ("_orig_mod.encoder._orig_mod.norm.weight", "encoder.norm.weight"),
        ("encoder._checkpoint_wrapped_module.norm", "encoder.norm"),
        ("_fsdp_wrapped_module.encoder._fsdp_wrapped_module._checkpoint_wrapped_module.norm", "encoder.norm"),
        ("_orig_mod", ""),
        ("module.encoder", "module.encoder"),
        ("my_orig_mod.norm", "my_orig_mod.norm"),
    ],
)
def test_clean_fqn_drops_whole_components_of_wrappers_only(name, clean) -> None:
    assert clean_fqn(name) == clean


def test_clean_fqn_drops_module_where_data_parallel_put_it_and_keeps_the_users() -> None:
    model = nn.Module()
    model.module = nn.DataParallel(nn.Sequential(nn.Linear(2, 2)))
    assert clean_fqn("module.module.0.weight", model) == "module.0.weight"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_names_inside_a_scripted_module_are_what_torch_gives() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(2, 2))))
    assert [clean_fqn(name, model) for name, _ in model.named_parameters()] == ["0.0.weight", "0.0.bias"]


@pytest.mark.parametrize("text", ["torch.nn.Linear", "Linear"])
def test_class_that_is_given_as_text_gets_the_names_of_its_modules(text) -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(5)], nn.LayerNorm(2))
    match = rf"modules: '{text}' matches no module of Sequential\..*Linear is a class.*: 0, 1, 2 and 2 more\.$"
    with pytest.raises(UnmatchedPatternError, match=match):
        select_modules(model, [text], argument="modules")


def test_pattern_matches_through_compile_and_returns_the_module_that_runs() -> None:
    model = TinyEncoder()
    inner = model.encoder
    model.encoder = torch.compile(inner, backend="eager")
    assert select(model, "encoder.norm1", "encoder") == {"encoder": inner, "encoder.norm1": inner.norm1}


def test_pattern_matches_through_a_compiled_root() -> None:
    model = TinyEncoder()
    assert list(select(torch.compile(model, backend="eager"), "head", TinyEncoder)) == ["", "head"]


def test_error_of_a_compiled_root_names_the_class_of_the_user() -> None:
    with pytest.raises(UnmatchedPatternError, match="no module of TinyEncoder"):
        select(torch.compile(TinyEncoder(), backend="eager"), "nothing")


def test_pattern_matches_through_activation_checkpointing() -> None:
    model = TinyEncoder()
    linear = model.encoder.linear
    model.encoder.linear = checkpoint_wrapper(linear)
    model.encoder = checkpoint_wrapper(model.encoder)
    assert select(model, "encoder.linear") == {"encoder.linear": linear}


def test_pattern_matches_through_data_parallel() -> None:
    model = TinyEncoder()
    assert select(nn.DataParallel(model), "head", "encoder.norm?") == select(model, "head", "encoder.norm?")


def test_every_name_of_a_shared_module_is_listed() -> None:
    assert [name for name in named_inner_modules(Tied()) if name.endswith("linear")] == [
        "first.linear",
        "second.linear",
    ]
