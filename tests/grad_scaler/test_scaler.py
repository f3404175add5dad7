"""``LossScaler`` against ``torch.amp.GradScaler``: the same numbers, the same interface, bounds besides."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_mp.grad_scaler import LossScaler, Readback
from lightning_mp.loss_scale import DynamicLossScale, LossScaleState, StaticLossScale


def train(scaler, factors):
    """Drive a scaler the way PyTorch's documentation does; return weights and scales."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
    scales = []
    for factor in factors:
        optimizer.zero_grad()
        scaler.scale(layer(torch.ones(2, 4)).pow(2).mean() * factor).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return [p.detach() for p in layer.parameters()], scales


@settings(deadline=None, max_examples=25)
@given(history=st.lists(st.sampled_from([1.0, float("inf"), float("nan")]), max_size=12), interval=st.integers(1, 3))
def test_driven_by_hand_it_is_torchs_grad_scaler(history, interval):
    ours = LossScaler(DynamicLossScale(init_scale=2.0**16, growth_interval=interval))
    torchs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=interval)
    ours_weights, ours_scales = train(ours, history)
    torch_weights, torch_scales = train(torchs, history)
    assert ours_scales == torch_scales
    assert all(torch.equal(p, q) for p, q in zip(ours_weights, torch_weights, strict=True))
    assert ours.state_dict() == torchs.state_dict()


@settings(deadline=None, max_examples=60)
@given(
    history=st.lists(st.booleans(), max_size=60),
    hysteresis=st.integers(1, 3),
    refill=st.sampled_from(["growth", "clean_step"]),
)
def test_scale_in_place_follows_the_pure_rule(history, hysteresis, refill):
    rule = DynamicLossScale(
        init_scale=8, growth_interval=2, hysteresis=hysteresis, hysteresis_refill=refill, max_scale=64
    )
    scaler, state = LossScaler(rule), rule.initial_state()
    for found_inf in history:
        scaler.update_(torch.tensor(float(found_inf)))
        state = rule.next(state, found_inf=found_inf)
        assert scaler.state == state


def test_scale_is_one_tensor_updated_in_place():
    scaler = LossScaler(DynamicLossScale(init_scale=8))
    tensor = scaler.scale_tensor(torch.device("cpu"))
    scaler.update_(torch.ones(()))
    assert tensor.item() == 4.0


def test_static_scale_stays_and_reads_as_a_scaler_that_never_grows():
    scaler = LossScaler(StaticLossScale(128))
    scaler.scale(torch.ones(()))
    scaler.update_(torch.ones(()))
    assert scaler.state_dict() == {
        "scale": 128.0,
        "growth_factor": 1.0,
        "backoff_factor": 1.0,
        "growth_interval": 2000,
        "_growth_tracker": 0,
    }


def test_state_before_the_first_loss_needs_no_read_of_the_device():
    before = Readback.count
    assert LossScaler(DynamicLossScale()).state == LossScaleState(65536.0, 0, 1)
    assert Readback.count == before


def test_restored_scale_continues_where_it_was():
    rule = DynamicLossScale(growth_interval=5)
    scaler = LossScaler(DynamicLossScale())
    scaler.scale(torch.ones(()))
    scaler.restore(rule, LossScaleState(32.0, 3, 1))
    scaler.update_(torch.zeros(()))
    assert scaler.state == LossScaleState(32.0, 4, 1)
    scaler.update_(torch.zeros(()))
    assert scaler.state == LossScaleState(64.0, 0, 1)


@pytest.mark.parametrize("setting", ["growth_factor", "backoff_factor", "growth_interval"])
def test_setting_a_field_of_the_rule_is_refused_with_the_fix(setting):
    with pytest.raises(AttributeError, match=rf"loss_scale=\{{'{setting}': 3\}}"):
        getattr(LossScaler(DynamicLossScale()), f"set_{setting}")(3)


def test_scaler_survives_a_copy_and_a_pickle():
    scaler = LossScaler(DynamicLossScale(init_scale=8))
    scaler.scale(torch.ones(()))
    scaler.update_(torch.ones(()))
    for clone in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
        assert clone.state.scale == 4.0
        assert clone.rule == scaler.rule
