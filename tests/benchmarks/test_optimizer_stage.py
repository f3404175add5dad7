"""The optimizer stage measures what it says."""

import pytest
import torch

from benchmarks import optimizer_stage


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_gradients_of_ours_are_in_16_bits_as_one_backward_leaves_them(mode, monkeypatch):
    module = torch.nn.Linear(8, 8, bias=False)
    monkeypatch.setattr(optimizer_stage, "build", lambda *_: module)
    optimizer_stage.SIDES[mode]("cpu", 64, True)()
    assert module.weight.grad.dtype is torch.bfloat16


def test_gradients_of_fp32_weights_are_fp32():
    module = torch.nn.Linear(8, 8)
    optimizer_stage.fill_gradients(module)
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}
