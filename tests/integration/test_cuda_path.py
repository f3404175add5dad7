"""One optimizer step as it runs on CUDA, without a device: no operation waits, and none is missing there."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mp.grad_scaler import LossScaler
from lightning_mp.loss_scale import parse_loss_scale
from lightning_mp.master_weights import MasterWeights, plan, split_master
from lightning_mp.precision import stepping
from lightning_mp.precision.stepping import OptimizerStepper
from lightning_mp.precision.steps import StepLedger
from tests.cuda_path import HostWaitError, on_fake_cuda

pytestmark = [
    pytest.mark.skipif(
        torch.version.cuda is None, reason="test_cuda_path: needs a torch that was built with CUDA, but no device"
    ),
    # SplitMaster asks whether the optimizer moved a stand-in, which has no address here.
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]


class NotedRead:
    """Stands for a read that was asked for: pinned memory and events need a driver."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        assert {(v.device, v.dtype, v.dim()) for v in values} == {(torch.device("cuda", 0), torch.float32, 0)}
        self.numbers = [0.0] * len(values)

    def wait(self) -> list[float]:
        return self.numbers


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor(2.0, device=x.device) + x,
        lambda x: torch.tensor([1.0, 2.0]).to(x.device),
    ],
)
def test_what_waits_for_a_device_is_seen_without_one(ask: Any) -> None:
    with on_fake_cuda() as watch:
        x = torch.ones(2, device="cuda")
        watch.is_armed = True
        with pytest.raises(HostWaitError):
            ask(x)


@pytest.mark.parametrize(("optimizer_class", "clip"), [(torch.optim.AdamW, True), (torch.optim.Adam, False)])
@pytest.mark.parametrize(
    ("masters", "dtype", "loss_scale", "on_nonfinite"),
    [
        *((masters, torch.bfloat16, None, "skip") for masters in ("params", "copy", "split", "none")),
        *((masters, torch.float16, "dynamic", "skip") for masters in ("params", "copy", "none")),
        ("split", torch.bfloat16, None, "ignore"),
        ("none", torch.bfloat16, 1024.0, "skip"),
        ("copy", torch.float16, "dynamic", "ignore"),
        ("params", torch.float16, {"hysteresis": 2}, "skip"),
        ("params", torch.float16, {"hysteresis": 2, "hysteresis_refill": "clean_step"}, "skip"),
    ],
)
def test_step_of_a_fused_optimizer_waits_for_nothing_on_cuda(
    monkeypatch: pytest.MonkeyPatch,
    masters: Any,
    dtype: torch.dtype,
    loss_scale: Any,
    on_nonfinite: str,
    optimizer_class: Any,
    clip: bool,
) -> None:
    monkeypatch.setattr(stepping, "Readback", NotedRead)
    # Masters refuse tensors that hold no numbers, and ones that lie at one address.
    monkeypatch.setattr(plan, "_is_subclass", lambda _: False)
    monkeypatch.setattr(plan, "check_overlap", lambda *_: None)
    rule = parse_loss_scale(loss_scale)
    with on_fake_cuda() as watch:
        monkeypatch.setattr(split_master, "_NOTHING", torch.empty(0))  # stand-ins are made of it
        layers = nn.Conv2d(2, 3, 3, device="cuda"), nn.LayerNorm(4, device="cuda"), nn.Linear(4, 5, device="cuda")
        net = nn.Sequential(*layers)
        engine = MasterWeights(masters, param_dtype=dtype, bucket_numel=20) if masters != "params" else None
        if engine is not None:
            engine.convert_(net)
        optimizer = optimizer_class(net.parameters(), lr=0.1, fused=True)
        ledger = StepLedger(rule, on_nonfinite)
        scaler = None if rule is None else LossScaler(rule, "cuda")
        stepper = OptimizerStepper(scaler, ledger, on_nonfinite=on_nonfinite, optimizers=[optimizer])
        if engine is not None:
            engine.attach([optimizer], accumulates=False)
            stepper.gradients = engine.gradients
        params = list(net.parameters())

        def closure() -> Tensor:
            if engine is not None:
                engine.begin_backward()
            loss = stepper.before_backward(torch.ones((), device="cuda"))
            for param in params:
                param.grad = torch.ones_like(param, dtype=param.grad_dtype or param.dtype)
            return loss

        def clipping(_: Any) -> None:
            if clip:
                stepper.clip_by_norm(net, params, 1.0)

        for step in range(4):
            watch.is_armed = step > 0  # the first makes state and settles what belongs to it
            stepper.step(optimizer, closure, clipping, {})
        ledger.settle()
    assert ledger.applied_steps == 4


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_values_that_an_fp8_cast_takes_from_a_master_wait_for_nothing_on_cuda(
    monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    monkeypatch.setattr(plan, "_is_subclass", lambda _: False)
    monkeypatch.setattr(plan, "check_overlap", lambda *_: None)
    with on_fake_cuda() as watch:
        monkeypatch.setattr(split_master, "_NOTHING", torch.empty(0))
        layer = nn.Linear(4, 5, device="cuda")
        engine = MasterWeights(mode)
        engine.convert_(layer)
        watch.is_armed = True
        for _ in range(2):
            value = engine.value_of(layer.weight)
            assert (value.dtype, value.device.type) == (torch.float32, "cuda")
            with torch.no_grad():
                layer.weight.zero_()  # a write that the next value takes over
