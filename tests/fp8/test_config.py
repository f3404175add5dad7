"""``FP8Config`` is one frozen value that YAML can write."""

from dataclasses import FrozenInstanceError, fields

import pytest
from torch import nn

from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.fp8 import FP8Config


def test_fields_and_defaults_are_those_of_the_contract() -> None:
    assert {f.name: f.default for f in fields(FP8Config)} == {
        "recipe": "current",
        "backend": "auto",
        "exclude": (),
        "include": None,
        "skip_output_head": True,
        "fp8_in_eval": False,
        "cache_weights": True,
    }


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (None, FP8Config()),
        ("block", FP8Config(recipe="block")),
        ({"recipe": "delayed", "exclude": ["a.*"]}, FP8Config(recipe="delayed", exclude=("a.*",))),
        ({"include": "a.*"}, FP8Config(include=("a.*",))),
        ({"exclude": nn.Linear}, FP8Config(exclude=(nn.Linear,))),
        (FP8Config(fp8_in_eval=True), FP8Config(fp8_in_eval=True)),
    ],
)
def test_parse_takes_what_users_write(written, expected) -> None:
    assert FP8Config.parse(written) == expected


def test_config_is_frozen_and_leaves_the_users_dict_alone() -> None:
    recipe = {"name": "delayed", "margin": 1}
    config = FP8Config(recipe=recipe)
    recipe["margin"] = 2
    assert config.recipe == {"name": "delayed", "margin": 1}
    with pytest.raises(FrozenInstanceError):
        config.backend = "emulated"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"recipes": "current"}, "Did you mean 'recipe'"),
        ({"backend": "te"}, "Allowed: 'auto', 'transformer_engine', 'emulated'"),
        ({"recipe": {"name": "delayed", "len": 3}}, "no field of the 'delayed' recipe"),
    ],
)
def test_unknown_values_are_refused(written, message) -> None:
    with pytest.raises(SettingValueError, match=message):
        FP8Config.parse(written)


@pytest.mark.parametrize("written", [3, ["current"], {"exclude": [3]}, {"include": 3}, {"fp8_in_eval": "yes"}])
def test_wrong_types_are_refused(written) -> None:
    with pytest.raises(SettingTypeError):
        FP8Config.parse(written)
