"""Recipes are parsed from what users write, or refused with what is allowed."""

from enum import Enum
from types import SimpleNamespace

import pytest
import torch

from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.fp8.recipes import (
    BlockScaling,
    CurrentScaling,
    DelayedScaling,
    PassThroughRecipe,
    QuantizationSettings,
    describe_recipe,
    emulated_twin,
    operand_dtype,
    parse_recipe,
)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("current", CurrentScaling()),
        ("delayed", DelayedScaling()),
        ("block", BlockScaling()),
        ("mxfp8", PassThroughRecipe("mxfp8", {})),
        ({"name": "current", "fp8_format": "E4M3"}, CurrentScaling(fp8_format="E4M3")),
        (
            {
                "name": "delayed",
                "margin": 0,
                "amax_history_len": 16,
                "amax_compute_algo": "max",
                "fp8_format": "HYBRID",
            },
            DelayedScaling(amax_history_len=16),
        ),
        ({"name": "nvfp4", "disable_rht": True}, PassThroughRecipe("nvfp4", {"disable_rht": True})),
        (
            {"name": "current", "fp8_quant_fwd_inp": {"power_2_scale": True}},
            CurrentScaling(fp8_quant_fwd_inp=QuantizationSettings(power_2_scale=True)),
        ),
    ],
)
def test_recipe_is_parsed_from_plain_values(written, expected) -> None:
    assert parse_recipe(written) == expected


def test_defaults_are_those_of_transformer_engine() -> None:
    # transformer_engine/common/recipe/__init__.py, 2.12.
    delayed = DelayedScaling()
    assert (delayed.margin, delayed.amax_history_len, delayed.amax_compute_algo) == (0, 1024, "max")
    assert delayed.reduce_amax
    assert (CurrentScaling().fp8_format, delayed.fp8_format, BlockScaling().fp8_format) == ("HYBRID", "HYBRID", "E4M3")
    assert CurrentScaling().quantization("input") == QuantizationSettings(False, 0.0)
    assert BlockScaling().quantization("grad") == QuantizationSettings(True, 0.0)
    assert [BlockScaling().block_dim(operand) for operand in ("input", "weight", "grad")] == [1, 2, 1]


def test_gradients_of_hybrid_alone_are_e5m2() -> None:
    wide = [(f, o) for f in ("HYBRID", "E4M3") for o in ("input", "weight", "grad")
            if operand_dtype(f, o) is torch.float8_e5m2]  # fmt: skip
    assert wide == [("HYBRID", "grad")]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("curent", "Did you mean 'current'"),
        ({"amax_history_len": 16}, "has no 'name'"),
        ({"name": "delayed", "amax_history_length": 16}, "Did you mean 'amax_history_len'"),
        ({"name": "current", "fp8_format": "E5M2"}, "Allowed: 'HYBRID', 'E4M3'"),
        ({"name": "delayed", "amax_history_len": 0}, "must be >= 1"),
        ({"name": "delayed", "amax_compute_algo": "mean"}, "Allowed: 'max', 'most_recent'"),
        ({"name": "block", "x_block_scaling_dim": 3}, "must be 1 or 2"),
        ({"name": "block", "x_block_scaling_dim": 2}, "at most one"),
        ({"name": "block", "fp8_quant_fwd_inp": {"power2": True}}, "'power_2_scale', 'amax_epsilon'"),
        ({"name": "block", "fp8_quant_fwd_inp": {"amax_epsilon": -1}}, "fp8_quant_fwd_inp.amax_epsilon=-1 is not"),
        ({"name": "current", "fp8_quant_bwd_grad": {"amax_epsilon": torch.inf}}, "must be from 0 to 3.4e"),
        ({"name": "current", "fp8_quant_bwd_grad": {"amax_epsilon": torch.nan}}, "must be from 0 to 3.4e"),
        ({"name": "delayed", "margin": -200}, "margin=-200 is not allowed.*from -112 to 134"),
        ({"name": "delayed", "margin": 2000}, "margin=2000 is not allowed.*from -112 to 134"),
        ({"name": "block", "x_block_scaling_dim": True}, "must be 1 or 2"),
    ],
)
def test_unknown_values_are_refused_with_what_is_allowed(written, message) -> None:
    with pytest.raises(SettingValueError, match=message):
        parse_recipe(written)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (max, r"amax_compute_algo=<built-in function max> is not allowed: .*it raised RuntimeError: Boolean value"),
        (
            torch.max,
            r"history of shape \(4, 2\), one row per step, it returned shape \(\)\. It must return one amax per",
        ),
        (lambda history: history.amax(1), r"it returned shape \(4,\)\."),
        (lambda history: history.max(0), r"it returned torch.return_types.max"),
        (lambda: 1.0, r"it raised TypeError: .*lambda history: history.mean\(0\)"),
    ],
)
def test_function_that_takes_no_history_is_refused_at_once(function, message) -> None:
    with pytest.raises(SettingValueError, match=f"(?s){message}"):
        parse_recipe({"name": "delayed", "amax_history_len": 4, "amax_compute_algo": function})


def test_function_over_the_wrong_dimension_is_refused_whatever_the_length() -> None:
    for length in (1, 2, 3):
        with pytest.raises(SettingValueError, match="one amax per column"):
            parse_recipe(
                {"name": "delayed", "amax_history_len": length, "amax_compute_algo": lambda history: history.amax(1)}
            )


def test_function_of_the_history_is_taken() -> None:
    def mean(history: torch.Tensor) -> torch.Tensor:
        return history.mean(0)

    assert parse_recipe({"name": "delayed", "amax_compute_algo": mean}).amax_compute_algo is mean


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda amax, scale, fp8_max: scale, r"it raised TypeError: .* takes 3 positional arguments but 4 were given"),
        (lambda amax, scale, fp8_max, recipe: None, "it returned None"),
        (lambda amax, scale, fp8_max, recipe: fp8_max / amax.max(), r"it returned shape \(\)"),
        (lambda amax, scale, fp8_max, recipe: amax.unsqueeze(0), r"it returned shape \(1, 2\)"),
        (lambda amax, scale, fp8_max, recipe: 1 / recipe.margins, "it raised AttributeError"),
    ],
)
def test_function_that_gives_no_scales_is_refused_before_the_first_step(function, text) -> None:
    with pytest.raises(SettingValueError, match=text):
        parse_recipe({"name": "delayed", "scaling_factor_compute_algo": function})


def test_function_that_gives_scales_is_taken() -> None:
    def scales(amax, scale, fp8_max, recipe):
        return torch.where(amax > 0, fp8_max / amax / 2**recipe.margin, scale)

    taken = parse_recipe({"name": "delayed", "scaling_factor_compute_algo": scales})
    assert taken.scaling_factor_compute_algo is scales


@pytest.mark.parametrize("margin", [-112, 134])
def test_largest_margins_leave_the_maximum_of_both_formats_in_fp32(margin) -> None:
    assert parse_recipe({"name": "delayed", "margin": margin}).margin == margin
    products = [torch.finfo(dtype).max * 2.0**-margin for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]
    assert all(torch.finfo(torch.float32).tiny <= product <= torch.finfo(torch.float32).max for product in products)
    beyond = margin + (1 if margin > 0 else -1)
    products = [torch.finfo(dtype).max * 2.0**-beyond for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]
    assert not all(torch.finfo(torch.float32).tiny <= p <= torch.finfo(torch.float32).max for p in products)


@pytest.mark.parametrize("written", [3, None, object()])
def test_what_is_no_recipe_is_refused(written) -> None:
    with pytest.raises(SettingTypeError, match="or a Transformer Engine recipe object"):
        parse_recipe(written)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("delayed", "margin", "0"),
        ("delayed", "margin", True),
        ("delayed", "reduce_amax", "off"),
        ("delayed", "reduce_amax", 0),
        ("delayed", "scaling_factor_compute_algo", "fast"),
        ("current", "use_power_2_scales", "no"),
        ("block", "use_f32_scales", 1),
    ],
)
def test_wrong_type_of_a_field_is_refused_with_its_name(name, field, value) -> None:
    with pytest.raises(SettingTypeError, match=f"recipe: {field}={value!r} is a {type(value).__name__}; it must be"):
        parse_recipe({"name": name, field: value})


@pytest.mark.parametrize(("key", "value"), [("amax_epsilon", "x"), ("amax_epsilon", True), ("power_2_scale", "yes")])
@pytest.mark.parametrize("name", ["current", "block"])
def test_wrong_type_inside_quantization_settings_is_refused_with_its_path(name, key, value) -> None:
    with pytest.raises(SettingTypeError, match=f"recipe: fp8_quant_fwd_weight.{key}={value!r} is a"):
        parse_recipe({"name": name, "fp8_quant_fwd_weight": {key: value}})


class Format(Enum):
    E4M3 = 1
    HYBRID = 2


class Recipe:
    """Stands for the base class of Transformer Engine's recipes, which are read by their class's name."""


class DelayedScalingObject(Recipe):
    margin, amax_history_len, fp8_format, amax_compute_algo = 2, 4, Format.E4M3, "most_recent"


DelayedScalingObject.__name__ = "DelayedScaling"


class CustomRecipe(Recipe):
    pass


def test_recipe_object_is_handed_on_as_it_is_and_has_an_emulated_twin() -> None:
    source = DelayedScalingObject()
    recipe = parse_recipe(source)
    assert recipe.source is source
    assert emulated_twin(recipe) == DelayedScaling(
        margin=2, amax_history_len=4, fp8_format="E4M3", amax_compute_algo="most_recent"
    )


def test_object_of_a_derived_class_is_the_recipe_it_is_derived_from() -> None:
    derived = parse_recipe(type("Mine", (DelayedScalingObject,), {"amax_history_len": 8})())
    assert derived.name == "delayed"
    assert emulated_twin(derived).amax_history_len == 8


def test_current_scaling_object_brings_its_quantization_settings() -> None:
    params = SimpleNamespace(power_2_scale=True, amax_epsilon=0.5)
    source_class = type("Float8CurrentScaling", (Recipe,), {"fp8_quant_bwd_grad": params, "fp8_format": Format.HYBRID})
    twin = emulated_twin(parse_recipe(source_class()))
    assert twin.quantization("grad") == QuantizationSettings(True, 0.5)
    assert twin.quantization("input") == QuantizationSettings()


def test_custom_recipe_object_passes_through() -> None:
    recipe = parse_recipe(CustomRecipe())
    assert recipe.name == "CustomRecipe"
    assert emulated_twin(recipe) is recipe


@pytest.mark.parametrize(
    "written",
    ["current", "delayed", "block", "mxfp8", {"name": "delayed", "amax_compute_algo": lambda history: history.mean(0)}],
)
def test_description_holds_plain_values_only(written) -> None:
    def leaves(value):
        return [leaf for each in value.values() for leaf in leaves(each)] if isinstance(value, dict) else [value]

    described = describe_recipe(parse_recipe(written))
    assert described["name"] in ("current", "delayed", "block", "mxfp8")
    assert all(isinstance(leaf, (bool, int, float, str, type(None))) for leaf in leaves(described))
