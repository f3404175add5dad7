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
    ],
)
def test_unknown_values_are_refused_with_what_is_allowed(written, message) -> None:
    with pytest.raises(SettingValueError, match=message):
        parse_recipe(written)


@pytest.mark.parametrize("written", [3, None, object(), {"name": "delayed", "margin": "0"}])
def test_wrong_types_are_refused(written) -> None:
    with pytest.raises(SettingTypeError):
        parse_recipe(written)


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
    "written", ["current", "delayed", "block", "mxfp8", {"name": "delayed", "amax_compute_algo": max}]
)
def test_description_holds_plain_values_only(written) -> None:
    def leaves(value):
        return [leaf for each in value.values() for leaf in leaves(each)] if isinstance(value, dict) else [value]

    described = describe_recipe(parse_recipe(written))
    assert described["name"] in ("current", "delayed", "block", "mxfp8")
    assert all(isinstance(leaf, (bool, int, float, str, type(None))) for leaf in leaves(described))
