"""The rules of loss scaling against torch's own update kernel, and their bounds."""

from dataclasses import asdict, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mp.errors import LightningMPError, SettingTypeError, SettingValueError
from lightning_mp.loss_scale import DynamicLossScale, LossScaleState, StaticLossScale, parse_loss_scale

histories = st.lists(st.booleans(), max_size=120)
powers = st.integers(-10, 30).map(lambda n: 2.0**n)
CHANGED = {
    "init_scale": 8.0,
    "growth_factor": 4.0,
    "backoff_factor": 0.25,
    "growth_interval": 3,
    "min_scale": 2.0,
    "max_scale": 2.0**20,
    "hysteresis": 2,
    "hysteresis_refill": "clean_step",
    "floor_patience": 7,
}


def on_device(rule: DynamicLossScale) -> LossScaleState:
    state = rule.initial_state()
    return LossScaleState(
        torch.tensor(state.scale),
        torch.tensor(state.growth_tracker, dtype=torch.int32),
        torch.tensor(state.hysteresis_left, dtype=torch.int32),
    )


def as_numbers(state: LossScaleState) -> tuple[float, int, int]:
    return float(state.scale), int(state.growth_tracker), int(state.hysteresis_left)


@settings(deadline=None, max_examples=150)
@given(
    history=histories,
    init=powers,
    growth=st.floats(1.01, 8),
    backoff=st.floats(0.05, 0.95),
    interval=st.integers(1, 5),
)
def test_scale_follows_torch_over_random_histories(history, init, growth, backoff, interval):
    # Oracle: torch._amp_update_scale_. The bounds are set so wide that they are not reached.
    rule = DynamicLossScale(
        init_scale=init,
        growth_factor=growth,
        backoff_factor=backoff,
        growth_interval=interval,
        min_scale=1e-37,
        max_scale=3e38,
    )
    scale, tracker = torch.tensor(init), torch.tensor(0, dtype=torch.int32)
    numbers, tensors = rule.initial_state(), on_device(rule)
    for found_inf in history:
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(found_inf)), growth, backoff, interval)
        if not 1e-36 < scale.item() < 3e37:
            break
        numbers = rule.next(numbers, found_inf=found_inf)
        tensors = rule.next(tensors, found_inf=torch.tensor(float(found_inf)))
        assert as_numbers(numbers)[:2] == (scale.item(), tracker.item())
        assert as_numbers(tensors)[:2] == (scale.item(), tracker.item())


@settings(deadline=None, max_examples=150)
@given(
    history=histories,
    floor=st.integers(-5, 5),
    span=st.integers(0, 6),
    interval=st.integers(1, 3),
    hysteresis=st.integers(1, 4),
    refill=st.sampled_from(["growth", "clean_step"]),
)
def test_scale_stays_between_its_bounds_for_every_history(history, floor, span, interval, hysteresis, refill):
    rule = DynamicLossScale(
        init_scale=2.0 ** (floor + span // 2),
        min_scale=2.0**floor,
        max_scale=2.0 ** (floor + span),
        growth_interval=interval,
        hysteresis=hysteresis,
        hysteresis_refill=refill,
    )
    numbers, tensors = rule.initial_state(), on_device(rule)
    for found_inf in history:
        numbers = rule.next(numbers, found_inf=found_inf)
        tensors = rule.next(tensors, found_inf=torch.tensor(found_inf))
        assert rule.min_scale <= numbers.scale <= rule.max_scale
        assert as_numbers(tensors) == as_numbers(numbers)


@pytest.mark.parametrize(
    ("refill", "expected"),
    [
        # Two overflows are forgiven. "growth": a clean step in between refills nothing.
        ("growth", [8, 8, 8, 4, 2, 2]),
        ("clean_step", [8, 8, 8, 8, 8, 8]),
    ],
)
def test_hysteresis_lowers_the_scale_on_the_kth_overflow(refill, expected):
    rule = DynamicLossScale(init_scale=8, hysteresis=3, hysteresis_refill=refill, growth_interval=100)
    state, scales = rule.initial_state(), []
    for found_inf in [True, True, False, True, True, False]:
        state = rule.next(state, found_inf=found_inf)
        scales.append(state.scale)
    assert scales == expected


def test_hysteresis_is_refilled_when_the_scale_grows():
    rule = DynamicLossScale(init_scale=8, hysteresis=2, growth_interval=1)
    state = rule.next(rule.initial_state(), found_inf=True)
    assert (state.scale, state.hysteresis_left) == (8, 1)
    state = rule.next(state, found_inf=False)
    assert (state.scale, state.hysteresis_left) == (16, 2)


def test_three_hundred_overflows_leave_the_scale_at_its_floor():
    # torch's rule is at 0 after 166 of them and stays there.
    rule, state = DynamicLossScale(), DynamicLossScale().initial_state()
    for _ in range(300):
        state = rule.next(state, found_inf=True)
    assert state.scale == 1.0


def test_static_scale_never_moves():
    rule = StaticLossScale(128)
    assert rule.next(rule.initial_state(), found_inf=True).scale == 128.0


def test_passing_one_rule_twice_leaves_it_equal():
    rule = DynamicLossScale()
    before = asdict(rule)
    rule.next(rule.initial_state(), found_inf=True)
    assert parse_loss_scale(rule) is rule
    assert asdict(rule) == before


@pytest.mark.parametrize("name", [f.name for f in fields(DynamicLossScale)])
def test_every_field_survives_as_a_plain_dict(name):
    changed = DynamicLossScale(**{name: CHANGED[name]})
    assert changed != DynamicLossScale()
    assert parse_loss_scale(asdict(changed)) == changed


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("dynamic", DynamicLossScale()),
        (128, StaticLossScale(128.0)),
        ("128", StaticLossScale(128.0)),
        ({"scale": 4}, StaticLossScale(4.0)),
        ({"init_scale": 1024, "growth_interval": 10}, DynamicLossScale(init_scale=1024, growth_interval=10)),
    ],
)
def test_plain_types_become_rules(value, expected):
    assert parse_loss_scale(value) == expected


def test_smallest_scale_has_an_inverse_that_fp32_holds():
    scale = torch.tensor(parse_loss_scale(torch.finfo(torch.float32).tiny).scale)
    assert scale == 2.0**-126
    assert scale.reciprocal() == 2.0**126


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0, SettingValueError, r"StaticLossScale: scale=0.0 is not allowed; it must be a finite number above zero"),
        (-2.0, SettingValueError, r"scale=-2.0"),
        (float("inf"), SettingValueError, r"scale=inf"),
        (float("nan"), SettingValueError, r"scale=nan"),
        (1e-38, SettingValueError, r"scale=1e-38 is not allowed.*from 1.175e-38"),
        (1e-46, SettingValueError, r"scale=1e-46 is not allowed.*from 1.175e-38"),
        ({"min_scale": 1e-40}, SettingValueError, r"min_scale=1e-40 is not allowed.*from 1.175e-38"),
        (True, SettingTypeError, r"loss_scale=True is a bool"),
        ([1], SettingTypeError, r"loss_scale=\[1\] is a list"),
        ("dynamc", SettingValueError, r"loss_scale='dynamc' is not known. Allowed: 'dynamic'"),
        ("-3", SettingValueError, r"scale=-3.0"),
        ({"init_scal": 4}, SettingValueError, r"key 'init_scal'.*Did you mean 'init_scale'\?"),
        ({"min_scale": 8, "max_scale": 4, "init_scale": 4}, SettingValueError, r"min_scale=8.0.*at most max_scale=4.0"),
        ({"init_scale": 0.5}, SettingValueError, r"init_scale=0.5.*between min_scale=1.0"),
        ({"growth_factor": 1.0}, SettingValueError, r"growth_factor=1.0.*above 1, so that the scale grows"),
        ({"backoff_factor": 1.0}, SettingValueError, r"backoff_factor=1.0.*below 1, so that it backs off"),
        ({"backoff_factor": 0}, SettingValueError, r"backoff_factor=0"),
        ({"growth_interval": 0}, SettingValueError, r"growth_interval=0.*at least 1"),
        ({"growth_interval": 2.5}, SettingTypeError, r"growth_interval=2.5 is a float; it must be an integer"),
        ({"hysteresis": 0}, SettingValueError, r"hysteresis=0"),
        ({"hysteresis_refill": "never"}, SettingValueError, r"hysteresis_refill='never'.*one of"),
        ({"floor_patience": 0}, SettingValueError, r"floor_patience=0"),
        ({"init_scale": "big"}, SettingTypeError, r"init_scale='big' is a str; it must be a number"),
    ],
)
def test_bad_loss_scale_is_one_clear_error(value, error, text):
    with pytest.raises(error, match=text) as caught:
        parse_loss_scale(value)
    assert isinstance(caught.value, LightningMPError)
