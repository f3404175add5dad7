"""The engine over the life of a run: settings, accumulation, identity, starting over."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mp.errors import SettingValueError, UnsupportedError
from lightning_mp.master_weights import MasterWeights

MICRO_BATCHES = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.last = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


def loss_of(net: nn.Module, seed: int) -> torch.Tensor:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
    with torch.autocast("cpu", torch.bfloat16):
        return net(x).float().square().mean()


def accumulation_error(grad_dtype: torch.dtype | None) -> float:
    """Accumulate eight backwards and compare with the FP64 sum of the single ones, relative to its size."""
    net = Net()
    masters = MasterWeights("split")
    masters.convert_(net)
    masters.attach([torch.optim.SGD(net.parameters(), lr=0.1)])
    weight = net.first.weight
    exact = torch.zeros(weight.shape, dtype=torch.float64)
    for seed in range(MICRO_BATCHES):
        exact += torch.autograd.grad(loss_of(net, seed), weight)[0].double()
    if grad_dtype is not None:
        weight.grad_dtype = grad_dtype
    for seed in range(MICRO_BATCHES):
        loss_of(net, seed).backward()
    return float((weight.grad.double() - exact).abs().max() / exact.abs().max())


def test_eight_backwards_accumulate_with_the_error_of_fp32() -> None:
    # FP32 rounds each of 8 partial sums by 2**-24 relative; BF16 by 2**-9, four thousand times more.
    assert accumulation_error(None) < 8 * 2.0**-24
    assert accumulation_error(torch.bfloat16) > 2.0**-10  # what the bound above would catch


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_fp32_under_activation_checkpointing(reentrant: bool) -> None:
    net = Net()
    masters = MasterWeights("copy")
    masters.convert_(net)
    masters.attach([torch.optim.SGD(net.parameters(), lr=0.1)])
    x = torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        checkpoint(net, x, use_reentrant=reentrant).float().sum().backward()
    assert {param.grad.dtype for param in net.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("param_dtype", "accumulates", "expected"),
    [
        (torch.bfloat16, False, torch.bfloat16),
        (torch.bfloat16, True, torch.float32),
        (torch.float16, False, torch.float32),
    ],
)
def test_gradients_stay_in_16_bits_only_in_bf16_with_one_backward(
    param_dtype: torch.dtype, accumulates: bool, expected: torch.dtype
) -> None:
    module = nn.Linear(2, 2)
    masters = MasterWeights("copy", param_dtype=param_dtype)
    masters.convert_(module)
    masters.attach([torch.optim.SGD(module.parameters(), lr=0.1)], accumulates=accumulates)
    (module.weight.float().sum() + module.bias.float().sum()).backward()
    assert module.weight.grad.dtype is expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "twin"}, r"master_weights: found 'twin'; allowed are 'copy', 'split' and 'none'"),
        ({"mode": "split", "param_dtype": torch.float16}, r"'split': found torch.float16; FP32 is split into BF16"),
        ({"mode": "split", "param_dtype": torch.float32}, r"parameters would be torch.float32; 16-bit weights are"),
        ({"mode": "copy", "bucket_numel": 0}, r"bucket_numel: found 0; it must be at least 1"),
    ],
)
def test_settings_that_are_not_allowed_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingValueError, match=message):
        MasterWeights(**settings)


def test_a_refused_module_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(UnsupportedError):
        MasterWeights("split").convert_(module)
    assert module[0].weight.dtype is torch.float32


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_identity_tying_buffers_and_frozen_values_survive(mode: str) -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    module["b"].weight = module["a"].weight
    module["a"].bias.requires_grad_(False)
    module.register_buffer("table", torch.randn(3))
    before = dict(module.named_parameters())
    frozen = module["a"].bias.detach().clone()
    masters = MasterWeights(mode)
    masters.convert_(module)
    after = dict(module.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert module["b"].weight is module["a"].weight
    assert len(masters.masters) == 3
    assert module.table.dtype is torch.float32
    assert module["norm"].weight.dtype is torch.float32
    assert module["norm"].running_mean.dtype is torch.float32
    assert not module["a"].bias.requires_grad
    assert torch.equal(masters.value_of(module["a"].bias), frozen)
    assert masters.name_of(module["b"].weight) == "a.weight"


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_converting_again_starts_from_the_masters(mode: str) -> None:
    net = Net()
    exact = net.first.weight.detach().clone()
    masters = MasterWeights(mode)
    for _ in range(3):
        masters.convert_(net)
        assert net.first.weight.dtype is torch.bfloat16
    assert torch.equal(masters.value_of(net.first.weight), exact)
    masters.detach()
    assert torch.equal(net.first.weight, exact)


@pytest.mark.parametrize(("mode", "per_element"), [("copy", 4), ("split", 2), ("none", 0)])
def test_bytes_kept_beside_the_parameters_are_those_of_the_contract(mode: str, per_element: int) -> None:
    net = Net()
    cast = sum(param.numel() for name, param in net.named_parameters() if "norm" not in name)
    masters = MasterWeights(mode)
    masters.convert_(net)
    assert masters.nbytes == per_element * cast


def test_optimizers_made_anew_after_detach_train_on() -> None:
    net, reference = Net(), Net()
    masters = MasterWeights("split")
    for run in range(2):
        masters.convert_(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
        masters.attach([optimizer])
        plain = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9)
        for step in range(3):
            for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
                ours.grad = torch.full(ours.shape, 2.0**-14 * (1 + step + run))
                theirs.grad = ours.grad.clone()
            optimizer.step()
            plain.step()
        masters.detach()
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_fp32_state_dict_is_full_precision_whatever_the_mode() -> None:
    for mode in ("copy", "split", "none"):
        net = Net()
        masters = MasterWeights(mode)
        masters.convert_(net)
        assert {value.dtype for value in masters.fp32_state_dict(net).values()} == {torch.float32}


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_a_weight_written_between_steps_is_updated_from_its_new_value(mode: str) -> None:
    net = Net()
    masters = MasterWeights(mode)
    masters.convert_(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    masters.attach([optimizer])
    for _ in range(2):
        with torch.no_grad():
            net.first.weight.zero_()
        net.first.weight.grad = torch.full((32, 16), 2.0**-20)
        optimizer.step()
    assert torch.equal(masters.value_of(net.first.weight), torch.full((32, 16), -(2.0**-20)))


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_detach_restores_all_other_weights_after_one_that_cannot_be(mode: str) -> None:
    net, plain = Net(), Net()
    masters = MasterWeights(mode)
    masters.convert_(net)
    net.first.weight.data = torch.ones(net.first.weight.shape[0], 100, dtype=torch.bfloat16)[
        :, : net.first.weight.shape[1]
    ]
    with pytest.raises(UnsupportedError, match=r"has gaps or shares elements"):
        masters.detach()
    for (name, param), expected in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert param.dtype is torch.float32
        assert torch.equal(param, torch.ones_like(param) if name == "first.weight" else expected)


def test_a_second_backward_makes_16_bit_gradients_fp32_without_being_announced() -> None:
    # As when a callback raises accumulate_grad_batches in mid-run.
    results = []
    for accumulates in (True, False):
        net = Net()
        masters = MasterWeights("split")
        masters.convert_(net)
        masters.attach([torch.optim.SGD(net.parameters(), lr=0.1)], accumulates=accumulates)
        for seed in range(MICRO_BATCHES):
            masters.begin_backward()
            loss_of(net, seed).backward()
        results.append(net.first.weight.grad)
    assert torch.equal(*results)
    assert results[1].dtype is torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}])
def test_split_equals_copy_on_cuda_and_masters_follow_the_module_there(settings: dict[str, Any]) -> None:
    results = []
    for mode in ("copy", "split"):
        net = Net()
        exact = net.first.weight.detach().clone()
        masters = MasterWeights(mode, bucket_numel=300)
        masters.convert_(net)  # before the strategy moves the module
        net.to("cuda")
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, **settings)
        masters.attach([optimizer], accumulates=False)
        assert torch.equal(masters.value_of(net.first.weight).cpu(), exact)
        for seed in range(5):
            for param in net.parameters():
                generator = torch.Generator("cuda").manual_seed(seed)
                param.grad = torch.randn(param.shape, generator=generator, device="cuda").to(param.dtype)
            masters.gradients.defers = True
            masters.gradients.clip_norm_(net.parameters(), 1.0)
            optimizer.step()
        net.cpu()  # as Lightning's teardown does first
        masters.detach()
        results.append(net)
    for left, right in zip(results[0].parameters(), results[1].parameters(), strict=True):
        assert left.device.type == "cpu"
        assert torch.equal(left, right)


@pytest.mark.gpu
def test_a_step_with_16_bit_gradients_and_clipping_waits_for_no_device() -> None:
    net = Net()
    masters = MasterWeights("split")
    masters.convert_(net)
    net.to("cuda")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    masters.attach([optimizer], accumulates=False)
    try:
        for _ in range(2):
            for param in net.parameters():
                param.grad = torch.ones_like(param, dtype=param.grad_dtype)
            torch.cuda.set_sync_debug_mode("error")
            masters.gradients.defers = True
            masters.gradients.clip_norm_(net.parameters(), 1.0)
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", ["read", "write", "layout", "dtype"])
@pytest.mark.parametrize("mode", ["copy", "split"])
def test_training_goes_on_after_a_checkpoint_was_taken_in_inference_mode(mode: str, case: str) -> None:
    def run(mode: str | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 4, 3)
        with torch.no_grad():
            conv.weight.copy_(conv.weight.bfloat16())
        optimizer = torch.optim.SGD(conv.parameters(), lr=0.5)
        masters = MasterWeights(mode) if mode else None  # type: ignore[arg-type]
        if masters is not None:
            masters.convert_(conv)
            masters.attach([optimizer], accumulates=False)
        if case == "write":
            with torch.no_grad():
                conv.weight[1].zero_()
        elif case == "layout":
            conv.to(memory_format=torch.channels_last)
        elif case == "dtype":
            conv.weight.data = conv.weight.data.float()
        with torch.inference_mode():
            conv.state_dict()
        for param in conv.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        state = {key: value.clone() for key, value in conv.state_dict().items()}
        conv.load_state_dict(state)
        if masters is not None:
            masters.detach()
        assert all(torch.equal(value, state[key]) for key, value in conv.state_dict().items())
        return state

    expected, found = run(None), run(mode)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_hooked_parameter_keeps_fp32_gradients_when_optimizers_are_attached_again() -> None:
    module = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    masters = MasterWeights("copy")
    masters.convert_(module)
    handle = module.weight.register_hook(lambda grad: grad * torch.ones(4, 4))
    for _ in range(2):
        masters.attach([optimizer], accumulates=False)
        for _ in range(2):
            masters.begin_backward()
            module(torch.ones(2, 4, dtype=torch.bfloat16)).float().sum().backward()
            assert (module.weight.grad.dtype, module.bias.grad.dtype) == (torch.float32, torch.bfloat16)
            optimizer.step()
            optimizer.zero_grad()
    handle.remove()
    masters.detach()
