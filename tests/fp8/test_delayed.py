"""Delayed scaling: first step, order of the history, and amaxes that say nothing."""

import math

import pytest
import torch

from lightning_mp.fp8.delayed import DelayedState
from lightning_mp.fp8.recipes import DelayedScaling

FP32_MAX = torch.finfo(torch.float32).max


class ReferenceState:
    """Transformer Engine's update, on Python lists, for one operand."""

    def __init__(self, length: int, fp8_max: float, algo: str, margin: int) -> None:
        self.history, self.scale = [0.0] * length, 1.0
        self.fp8_max, self.algo, self.margin = fp8_max, algo, margin

    def record(self, amax: float) -> None:
        self.history[0] = max(self.history[0], amax)

    def update(self) -> None:
        amax = max(self.history) if self.algo == "max" else self.history[0]
        self.history = [*self.history[1:], self.history[0]]
        self.history[0] = 0.0
        if amax > 0 and math.isfinite(amax):
            scaled_max = torch.tensor(self.fp8_max * 2.0**-self.margin)
            scale = (scaled_max / torch.tensor(amax)).item()
            self.scale = FP32_MAX if math.isinf(scale) else scale


def state_of(**settings) -> DelayedState:
    return DelayedState(DelayedScaling(**settings))


def test_scales_of_the_first_step_are_one() -> None:
    assert state_of().scale.tolist() == [1.0, 1.0, 1.0]
    assert state_of().amax_history.shape == (1024, 3)


@pytest.mark.parametrize("algo", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("margin", [0, 2])
def test_history_and_scales_follow_the_reference_over_many_steps(algo, length, margin) -> None:
    state = state_of(amax_history_len=length, amax_compute_algo=algo, margin=margin)
    references = [ReferenceState(length, limit, algo, margin) for limit in (448.0, 448.0, 57344.0)]
    special = [0.0, math.inf, 1e-45, 3e38, 7.0]
    for step in range(24):
        for index, operand in enumerate(("input", "weight", "grad")):
            amax = special[(step + index) % 5] if step % 3 == 0 else torch.rand(()).item() * 10
            amax = torch.tensor(amax).item()  # as FP32 holds it
            state.record(operand, torch.tensor(amax))
            references[index].record(amax)
        state.update()
        for reference in references:
            reference.update()
        assert state.scale.tolist() == [reference.scale for reference in references]
        assert state.amax_history.t().tolist() == [reference.history for reference in references]


def test_the_largest_amax_of_several_calls_counts_once() -> None:
    state = state_of(amax_history_len=3)
    for amax in (2.0, 7.0, 5.0):
        state.record("input", torch.tensor(amax))
    state.update()
    assert state.scale[0].item() == 64.0
    assert state.amax_history[:, 0].tolist() == [0.0, 0.0, 7.0]


def test_nan_amax_is_passed_over() -> None:
    state = state_of(amax_history_len=2)
    state.record("grad", torch.tensor(math.nan))
    state.update()
    assert state.scale.tolist() == [1.0, 1.0, 1.0]


def test_e4m3_format_limits_gradients_to_448() -> None:
    state = state_of(fp8_format="E4M3")
    state.record("grad", torch.tensor(1.0))
    state.update()
    assert state.scale[2].item() == 448.0


def test_users_functions_compute_amax_and_scale() -> None:
    seen = []

    def amax_of(history):
        return history.mean(0)

    def scale_of(amax, scale, fp8_max, recipe):
        seen.append((amax.tolist(), fp8_max, recipe.margin))
        return scale + 1

    state = state_of(amax_history_len=2, amax_compute_algo=amax_of, scaling_factor_compute_algo=scale_of)
    state.record("input", torch.tensor(4.0))
    state.update()
    assert seen == [([2.0, 0.0], 448.0, 0), ([0.0], 57344.0, 0)]
    assert state.scale.tolist() == [2.0, 2.0, 2.0]


def test_scale_in_use_is_not_changed_by_an_update() -> None:
    state = state_of()
    scale = state.scale_of("input", torch.device("cpu"))
    state.record("input", torch.tensor(7.0))
    state.update()
    assert scale.item() == 1.0


def test_state_round_trip_is_exact_and_independent() -> None:
    first, second = state_of(amax_history_len=4), state_of(amax_history_len=4)
    first.record("input", torch.tensor(3.0))
    first.update()
    saved = first.state_dict()
    assert second.load_state_dict(saved)
    first.record("input", torch.tensor(9.0))
    first.update()
    assert torch.equal(second.scale, saved["scale"])
    assert torch.equal(second.amax_history, saved["amax_history"])


def test_history_of_another_length_is_not_taken_over() -> None:
    state = state_of(amax_history_len=4)
    assert not state.load_state_dict(state_of(amax_history_len=5).state_dict())
    assert state.amax_history.shape == (4, 3)
