"""Settings: every accepted spelling, and one clear error for every bad one."""

import pytest
import torch

from lightning_mp import DynamicLossScale, MixedPrecision, StaticLossScale
from lightning_mp.errors import LightningMPError, SettingTypeError, SettingValueError
from lightning_mp.policy import PrecisionPolicy

SPELLINGS = {
    "fp32": ("fp32", "32", 32, "32-true"),
    "fp16": ("fp16", "16", 16, "16-mixed"),
    "bf16": ("bf16", "bf16-mixed"),
    "fp8": ("fp8", "fp8-mixed", "transformer-engine"),
    "auto": ("auto",),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in SPELLINGS.items() for v in values])
def test_every_spelling_of_a_precision_is_accepted(name, value):
    assert PrecisionPolicy.parse(value).precision == name


@pytest.mark.parametrize(
    ("precision", "dtype", "rule", "lightning"),
    [
        ("fp32", torch.float32, None, "32-true"),
        ("fp16", torch.float16, DynamicLossScale(), "16-mixed"),
        ("bf16", torch.bfloat16, None, "bf16-mixed"),
        ("fp8", torch.bfloat16, None, "transformer-engine"),
    ],
)
def test_precision_decides_dtype_rule_and_lightnings_name(precision, dtype, rule, lightning):
    policy = PrecisionPolicy.parse(precision)
    assert (policy.compute_dtype, policy.active_loss_scale, policy.lightning_precision) == (dtype, rule, lightning)


def test_loss_scale_beside_auto_waits_for_the_device():
    policy = PrecisionPolicy.parse("auto", loss_scale=128)
    assert policy.resolve("bf16").active_loss_scale is None
    assert policy.resolve("fp16").active_loss_scale == StaticLossScale(128.0)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"precision": "fp61"}, SettingValueError, r"precision='fp61' is not known\. Did you mean 'fp16'\? Allowed:"),
        ({"precision": "BF16"}, SettingValueError, r"precision='BF16' is not known\. Did you mean 'bf16'\?"),
        ({"precision": 64}, SettingValueError, r"precision=64 is not known"),
        ({"precision": "bf16-true"}, SettingValueError, r"For 16-bit weights use MixedPrecision\('bf16'"),
        ({"precision": None}, SettingTypeError, r"precision=None is a NoneType"),
        ({"precision": True}, SettingTypeError, r"precision=True is a bool"),
        (
            {"precision": "bf16", "loss_scale": "dynamic"},
            SettingValueError,
            r"^loss_scale='dynamic' is set beside",
        ),
        ({"precision": "fp32", "loss_scale": 8}, SettingValueError, r"beside precision='fp32', which needs no loss"),
        ({"precision": "fp16", "loss_scale": 0}, SettingValueError, r"scale=0.* above zero"),
        ({"precision": "fp16", "loss_scale": {"min_scal": 1}}, SettingValueError, r"key 'min_scal'"),
        ({"precision": "bf16", "master_weights": "param"}, SettingValueError, r"Did you mean 'params'\?"),
        ({"precision": "bf16", "master_weights": 1}, SettingTypeError, r"master_weights=1 is a int"),
        ({"precision": "fp16", "master_weights": "split"}, SettingValueError, r"Use master_weights='copy'"),
        ({"precision": "fp32", "master_weights": "split"}, SettingValueError, r"beside precision='fp32'"),
        ({"precision": "bf16", "fp8": {"recipe": "current"}}, SettingValueError, r"which runs no FP8"),
        ({"precision": "bf16", "reduce_dtype": "fp8"}, SettingValueError, r"reduce_dtype='fp8' is not known"),
        ({"precision": "bf16", "on_nonfinite": "warn"}, SettingValueError, r"on_nonfinite='warn'.*'skip', 'raise'"),
        ({"precision": "bf16", "hold_schedulers": 1}, SettingTypeError, r"hold_schedulers=1.*True or False"),
        ({"precision": "bf16", "device": "gpu0"}, SettingValueError, r"device='gpu0' is not a torch device"),
    ],
)
def test_bad_setting_is_one_clear_error(arguments, error, text):
    with pytest.raises(error, match=text) as caught:
        MixedPrecision(**arguments)
    assert isinstance(caught.value, LightningMPError)


def test_error_classes_are_the_built_in_ones_too():
    assert issubclass(SettingValueError, ValueError)
    assert issubclass(SettingTypeError, TypeError)
