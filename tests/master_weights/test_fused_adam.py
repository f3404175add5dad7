"""The fused step: AdamW and Adam on masters by one kernel, as the generic path and torch's fused kernel do it.

The tests of the kernel run on a GPU, and where Triton is installed also in its interpreter on the CPU:
``test_kernel_tests_pass_in_the_interpreter`` runs this file again with ``TRITON_INTERPRET=1``.
"""

import importlib.util
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mp.grad_scaler import step_unless
from lightning_mp.master_weights import MasterWeights, fused_adam, fused_check
from lightning_mp.master_weights.adam_kernel import BLOCK, CHUNK
from lightning_mp.master_weights.split import publish_
from tests.mastered import Net, fit
from tests.metrics.ranks import on_two_ranks

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
HAS_TRITON = importlib.util.find_spec("triton") is not None
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# A full chunk and a part of one that is no whole block; sizes below a block; one element; none.
SHAPES = [(CHUNK + BLOCK + 5,), (7, 3), (), (0, 4), (2, 3, 4, 5), (33,)]
MODES = [("split", BF16), ("copy", BF16), ("copy", FP16)]
LR = 1e-2
# An update is lr * m / (sqrt(v) + eps), at most a few lr here. Kernels that round the same values at other
# places (torch's on the CPU has its moments in FP32) are off by a few ulp of an update, and by one
# rounding of the weight itself, per step: 2**-24 of a weight of 2**2 or less.
ULP = 2.0**-23


if IS_INTERPRETED:
    # NumPy says so wherever Inf or NaN comes up, which it should here.
    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def on_device(test: Any) -> Any:
    return test if IS_INTERPRETED else pytest.mark.gpu(test)


@pytest.fixture(autouse=True)
def _kernel_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if IS_INTERPRETED:
        monkeypatch.setattr(fused_adam, "DEVICE_TYPE", "cpu")


# --- Where the rest of this file runs ------------------------------------------------------------


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, **environment},
        check=False,
    )


def skip_without_triton(name: str) -> Any:
    return pytest.mark.skipif(not HAS_TRITON, reason=f"{name}: needs Triton, which is not installed")


if not IS_INTERPRETED:

    @pytest.mark.slow
    @skip_without_triton("test_kernel_tests_pass_in_the_interpreter")
    def test_kernel_tests_pass_in_the_interpreter() -> None:
        done = run_python("-m", "pytest", "-q", __file__, TRITON_INTERPRET="1")
        assert done.returncode == 0, done.stdout[-5000:]
        assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 40  # type: ignore[index]
        assert "skipped" not in done.stdout.splitlines()[-1]


def test_step_on_a_cpu_is_the_generic_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_adam, "DEVICE_TYPE", "cuda")
    masters, params, optimizer = attached("split", BF16, shapes=[(3,)], device="cpu")
    set_gradients(params, BF16, 1)
    optimizer.step()
    assert masters.step_path(optimizer).startswith("generic path: ")


# --- Models --------------------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, values: list[Tensor]) -> None:
        super().__init__()
        self.items = nn.ParameterList([nn.Parameter(value) for value in values])


def values_of(shapes: list[tuple[int, ...]], device: str = DEVICE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def attached(
    mode: str,
    dtype: torch.dtype,
    *,
    shapes: list[tuple[int, ...]] | None = None,
    values: list[Tensor] | None = None,
    optimizer_class: Any = torch.optim.AdamW,
    device: str = DEVICE,
    groups: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> tuple[MasterWeights, list[nn.Parameter], torch.optim.Optimizer]:
    module = Holder(values_of(SHAPES if shapes is None else shapes, device) if values is None else values)
    masters = MasterWeights(mode, param_dtype=dtype)  # type: ignore[arg-type]
    masters.convert_(module)
    params = list(module.items)
    settings = {"lr": LR, "fused": True, **settings}
    if groups is None:
        optimizer = optimizer_class(params, **settings)
    else:
        split = [{"params": params[index :: len(groups)], **group} for index, group in enumerate(groups)]
        optimizer = optimizer_class(split, **settings)
    masters.attach([optimizer], accumulates=False)
    masters.gradients.defers = True
    masters.keeps = module  # type: ignore[attr-defined]
    for param in params:
        param.grad_dtype = None
    return masters, params, optimizer


def gradients_of(params: list[nn.Parameter], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(param.shape, generator=generator).to(dtype) for param in params]
    return [grad.to(param.device) for grad, param in zip(found, params, strict=True)]


def set_gradients(params: list[nn.Parameter], dtype: torch.dtype, seed: int) -> None:
    for param, grad in zip(params, gradients_of(params, dtype, seed), strict=True):
        param.grad = grad


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype is expected.dtype
    assert torch.equal(bits_of(found), bits_of(expected))


def assert_fused(masters: MasterWeights, optimizer: torch.optim.Optimizer, num_params: int) -> None:
    assert masters.step_path(optimizer) == f"fused kernel for {num_params} parameters"


# --- Oracles -------------------------------------------------------------------------------------


def float64_adam(values: list[Tensor], grads: list[list[Tensor]], *, decoupled: bool, **settings: Any) -> list[Tensor]:
    """Kingma and Ba's algorithm, with Loshchilov and Hutter's decay if decoupled, in FP64 throughout."""
    lr, (beta1, beta2), eps, decay = (settings[name] for name in ("lr", "betas", "eps", "weight_decay"))
    results = []
    for index, start in enumerate(values):
        value = start.detach().cpu().double()
        m, v = torch.zeros_like(value), torch.zeros_like(value)
        for step, of_step in enumerate(grads, start=1):
            grad = of_step[index].cpu().double() * (-1 if settings.get("maximize") else 1)
            if decoupled:
                value = value - lr * decay * value
            else:
                grad = grad + decay * value
            m = beta1 * m + (1 - beta1) * grad
            v = beta2 * v + (1 - beta2) * grad * grad
            value = value - lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        results.append(value)
    return results


def rounded_adamw(value: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, **settings: Any) -> list[Tensor]:
    """One step in plain torch that rounds where the kernel says that it does."""
    lr, (beta1, beta2), eps, decay = (settings[name] for name in ("lr", "betas", "eps", "weight_decay"))
    value = (value.double() - value.double() * (lr * decay)).float()
    wide = grad.float().double()
    m = (beta1 * m.double() + (1 - beta1) * wide).float()
    v = (beta2 * v.double() + (1 - beta2) * wide * wide).float()
    # As tensors of the full shape: torch may divide by a scalar through its reciprocal.
    step_size = torch.full_like(value, lr / torch.tensor(1 - beta1**step, dtype=FP32).double().item())
    correction = torch.full_like(value, math.sqrt(1 - beta2**step))
    # Through FP64, which rounds correctly: torch's own on the CPU is off by an ulp here and there.
    root = v.double().sqrt().float()
    denominator = ((root / correction).double() + eps).float()
    return [value - step_size * m / denominator, m, v]


SETTINGS = {"lr": LR, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


# --- The kernel ----------------------------------------------------------------------------------


@on_device
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("grad_dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("mode", "dtype"), MODES)
def test_masters_follow_a_float64_optimizer(mode, dtype, grad_dtype, optimizer_class, maximize) -> None:
    shapes = [(2 * BLOCK + 5,), (3,)]
    masters, params, optimizer = attached(
        mode, dtype, shapes=shapes, optimizer_class=optimizer_class, maximize=maximize, **SETTINGS
    )
    grads = []
    for step in range(3):
        grads.append(gradients_of(params, grad_dtype, step))
        for param, grad in zip(params, grads[-1], strict=True):
            param.grad = grad.clone()
        optimizer.step()
        assert_fused(masters, optimizer, len(params))
    expected = float64_adam(
        values_of(shapes), grads, decoupled=optimizer_class is torch.optim.AdamW, maximize=maximize, **SETTINGS
    )
    for param, value in zip(params, expected, strict=True):
        # Per step: two roundings of a weight below 8 (half an ulp is 2**-22), and the update's own.
        error = (masters.value_of(param).cpu().double() - value).abs().max()
        assert error <= 3 * (2 * 2.0**-22 + 4 * LR * ULP)


@on_device
def test_each_operation_rounds_where_the_kernel_says() -> None:
    masters, params, optimizer = attached("split", BF16, shapes=[(3 * BLOCK + 1,)], **SETTINGS)
    value = values_of([(3 * BLOCK + 1,)])[0].cpu()
    m, v = torch.zeros_like(value), torch.zeros_like(value)
    for step in range(1, 6):
        set_gradients(params, BF16, step)
        grad = params[0].grad.cpu()  # type: ignore[union-attr]
        optimizer.step()
        value, m, v = rounded_adamw(value, grad, m, v, step, **SETTINGS)
        assert_same_bits(masters.value_of(params[0]), value)
        assert_same_bits(optimizer.state[params[0]]["exp_avg"], m)
        assert_same_bits(optimizer.state[params[0]]["exp_avg_sq"], v)


@on_device
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adam])
def test_split_gives_the_bits_of_copy(optimizer_class) -> None:
    results = []
    for mode in ("copy", "split"):
        masters, params, optimizer = attached(mode, BF16, optimizer_class=optimizer_class, **SETTINGS)
        for step in range(6):
            set_gradients(params, BF16 if step % 2 else FP32, step)
            masters.gradients.clip_norm_(params, 1.0)
            optimizer.param_groups[0]["lr"] = LR / (step + 1)
            optimizer.step()
            assert_fused(masters, optimizer, len(params))
        results.append([(masters.value_of(p), p.detach(), *optimizer.state[p].values()) for p in params])
    for copied, split in zip(*results, strict=True):
        for left, right in zip(copied, split, strict=True):
            assert_same_bits(left, right)


@on_device
@pytest.mark.parametrize(("mode", "dtype"), MODES)
def test_masters_agree_with_torchs_fused_adamw_on_fp32_over_fifty_steps(mode, dtype) -> None:
    shapes = [(BLOCK + 5,), (7, 3)]
    masters, params, optimizer = attached(mode, dtype, shapes=shapes, **SETTINGS)
    exact = [nn.Parameter(value) for value in values_of(shapes)]
    oracle = torch.optim.AdamW(exact, fused=True, **SETTINGS)
    for step in range(50):
        grads = gradients_of(params, dtype, step)
        if step in (7, 20):
            grads[0].view(-1)[5] = math.inf
        for param, plain, grad in zip(params, exact, grads, strict=True):
            param.grad, plain.grad = grad, grad.float()
        masters.gradients.clip_norm_(params, 1.0)
        nn.utils.clip_grad_norm_(exact, 1.0)
        found_inf = torch.tensor(float(step in (7, 20)), device=DEVICE)
        for one in (optimizer, oracle):
            one.param_groups[0]["lr"] = LR * (1 - step / 100)
            step_unless(found_inf, one, {})
        assert_fused(masters, optimizer, len(params))
    for param, plain in zip(params, exact, strict=True):
        # Per step at most one ulp of a weight below 4 (2**-22), and 4 ulp of an update of about lr.
        error = (masters.value_of(param) - plain).abs().max()
        assert error <= 50 * (2.0**-22 + 4 * LR * ULP)
        # Fifty errors of either sign, each up to half an ulp of a weight near 1, walk sqrt(50) / 2 ulp.
        assert (masters.value_of(param) - plain).abs().mean() <= 3.6 * ULP
        assert float(optimizer.state[param]["step"]) == float(oracle.state[plain]["step"]) == 48


def every_upper_half() -> Tensor:
    """All signs, exponents and upper mantissas, NaN and infinities too, with low bits where rounding turns."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    bits = (upper[:, None] + torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten()
    return (((bits + 2**31) % 2**32) - 2**31).to(torch.int32).view(FP32)


@on_device
@pytest.mark.parametrize(("mode", "dtype"), MODES)
def test_weights_are_joined_and_rounded_as_by_the_generic_path_for_every_exponent(mode, dtype) -> None:
    # With a learning rate of zero a finite value minus zero is that value, so only the rounding is left.
    value = every_upper_half()
    masters, (param,), optimizer = attached(mode, dtype, values=[value.to(DEVICE)], lr=0.0, weight_decay=0.0)
    param.grad = torch.ones_like(param)
    expected = torch.empty_like(value, dtype=dtype)
    publish_(value, expected)
    optimizer.step()
    assert_fused(masters, optimizer, 1)
    is_nan = value.isnan()
    assert torch.equal(bits_of(param)[~is_nan], bits_of(expected)[~is_nan])
    assert bool(param[is_nan.to(DEVICE)].isnan().all())
    found = masters.value_of(param).cpu()
    # -0.0 - 0.0 is -0.0, so that zeros keep their sign.
    assert torch.equal(bits_of(found)[~is_nan], bits_of(value)[~is_nan])
    assert bool(found[is_nan].isnan().all())


@on_device
@pytest.mark.parametrize(("mode", "dtype"), MODES)
def test_skipped_step_changes_nothing(mode, dtype) -> None:
    masters, params, optimizer = attached(mode, dtype)
    set_gradients(params, dtype, 0)
    optimizer.step()
    before = [
        (masters.value_of(p).clone(), p.detach().clone(), *map(Tensor.clone, optimizer.state[p].values()))
        for p in params
    ]
    for param in params:
        param.grad = torch.full_like(param, math.nan)
    step_unless(torch.ones((), device=DEVICE), optimizer, {})
    assert_fused(masters, optimizer, len(params))
    for param, kept in zip(params, before, strict=True):
        for found, expected in zip(
            (masters.value_of(param), param.detach(), *optimizer.state[param].values()), kept, strict=True
        ):
            assert_same_bits(found, expected)


@on_device
@pytest.mark.parametrize(("mode", "dtype"), MODES)
@pytest.mark.parametrize("write", ["in_place", "data"])
def test_weight_written_from_outside_is_taken_over(mode, dtype, write) -> None:
    # A write through .data leaves no mark on CUDA under split: the value is within half a BF16 ulp of it.
    is_unseen = mode == "split" and write == "data" and DEVICE == "cuda"
    tolerance = 2.0**-8 if is_unseen else 0.0
    masters, (param,), optimizer = attached(mode, dtype, shapes=[(2 * BLOCK,)], lr=0.0, weight_decay=0.0)
    for round_number in (1, 2):  # under split, the second write is seen by comparing
        if write == "data":
            param.data[3] = 5.0 * round_number
        else:
            with torch.no_grad():
                param[3] = 5.0 * round_number
        set_gradients([param], dtype, 0)
        optimizer.step()
        assert_fused(masters, optimizer, 1)
        value = float(masters.value_of(param)[3])
        assert abs(value - 5.0 * round_number) <= tolerance * value
        assert float(param.detach()[3]) == 5.0 * round_number


@on_device
@pytest.mark.parametrize("fused", [True, False])
def test_zero_or_infinity_unseen_beside_further_bits_of_before_becomes_no_nan(fused) -> None:
    # As `weight.data.mul_(mask)` leaves them on CUDA. The interpreter has a kernel, but not the generic path, to show.
    if IS_INTERPRETED and not fused:
        return
    written = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.0], device=DEVICE)
    masters, (param,), optimizer = attached("split", BF16, values=[written], lr=0.0, weight_decay=0.0, fused=fused)
    for further in (-(2**15), -1, 1, 2**15 - 1):
        (lo,) = masters._masters[param].tensors()
        lo.fill_(further)
        with torch.no_grad():
            param.data.copy_(written)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        # 1.0 -/+ half an ulp; half an ulp around zero is 2**-134; around infinity 2**119 below it.
        zeros, infinities, one = param.detach().float().split([2, 2, 1])
        assert bool((zeros.abs() <= 2.0**-134).all())
        assert bool((infinities.abs() >= 3e38).all())
        assert abs(float(one) - 1.0) <= 2.0**-8


@on_device
@pytest.mark.parametrize(("mode", "dtype"), MODES)
def test_weight_written_after_a_step_is_read_as_written(mode, dtype) -> None:
    masters, (param,), optimizer = attached(mode, dtype, shapes=[(2 * BLOCK,)], lr=0.0, weight_decay=0.0)
    for value in (5.0, -7.0):
        set_gradients([param], dtype, 0)
        optimizer.step()
        assert_fused(masters, optimizer, 1)
        with torch.no_grad():
            param[3] = value
        assert float(masters.value_of(param)[3]) == value  # as a checkpoint reads it
        assert float(param.detach()[3]) == value


@on_device
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_master_written_through_what_a_state_dict_showed_reaches_the_weight_by_the_next_step(dtype) -> None:
    masters, (param,), optimizer = attached("copy", dtype, shapes=[(2 * BLOCK,)], lr=0.0, weight_decay=0.0)
    for value in (5.0, -7.0):
        masters.value_of(param)[3] = value
        set_gradients([param], dtype, 0)
        optimizer.step()
        assert_fused(masters, optimizer, 1)
        assert float(masters.value_of(param)[3]) == value
        assert float(param.detach()[3]) == value


@on_device
@pytest.mark.parametrize(("mode", "dtype"), MODES)
def test_step_raises_the_version_of_what_it_writes(mode, dtype) -> None:
    # Autograd refuses a backward through weights that changed; FP8 casts weights again when it rises.
    _, (param,), optimizer = attached(mode, dtype, shapes=[(5,)])
    set_gradients([param], dtype, 0)
    version = param._version
    optimizer.step()
    assert param._version > version


@on_device
@pytest.mark.parametrize(("mode", "dtype"), MODES)
def test_any_size_layout_and_alignment_is_updated_as_a_contiguous_one(mode, dtype) -> None:
    def strange(value: Tensor) -> list[Tensor]:
        block = torch.empty(value.numel() + 1, device=DEVICE)[1:]
        return [
            value,
            block.view(value.shape).copy_(value),
            value.transpose(1, 2).contiguous().transpose(1, 2),
            value.contiguous(memory_format=torch.channels_last),
        ]

    value = values_of([(4, 3, 17, 11)])[0]
    values = [nn.Parameter(one) for one in strange(value)]
    masters, params, optimizer = attached(mode, dtype, values=[one.detach() for one in values], **SETTINGS)
    shifted = torch.empty(value.numel() + 1, dtype=dtype, device=DEVICE)[1:].view(value.shape)
    params[1].data = shifted.copy_(params[1].detach())
    masters.masters[params[1]].settle_writes()
    for step in range(3):
        grad = gradients_of(params[:1], dtype, step)[0]
        for param in params:
            param.grad = grad.clone()  # of other strides than some of the parameters
        masters.gradients.clip_norm_(params, 1.0)
        optimizer.step()
        assert_fused(masters, optimizer, 4)
    for param in params[1:]:
        assert_same_bits(masters.value_of(param).contiguous(), masters.value_of(params[0]))
        assert_same_bits(param.detach().contiguous(), params[0].detach())
        assert optimizer.state[param]["exp_avg"].stride() == param.stride()


@on_device
@pytest.mark.parametrize("kind", ["number", "tensor", "tensor_on_device"])
def test_learning_rate_is_read_at_every_step_whatever_holds_it(kind) -> None:
    rates = {"number": float, "tensor": torch.tensor, "tensor_on_device": lambda lr: torch.tensor(lr, device=DEVICE)}
    masters, params, optimizer = attached("split", BF16, shapes=[(9,)], lr=rates[kind](0.5))
    other, plain, oracle = attached("split", BF16, shapes=[(9,)], lr=0.5)
    for step in range(3):
        for one in (params, plain):
            set_gradients(one, BF16, step)
        rate = 2.0**-step  # exact in FP32
        if kind == "number":
            optimizer.param_groups[0]["lr"] = rate
        else:
            optimizer.param_groups[0]["lr"].fill_(rate)  # as schedulers do
        oracle.param_groups[0]["lr"] = rate
        optimizer.step()
        oracle.step()
    assert_same_bits(masters.value_of(params[0]), other.value_of(plain[0]))


@on_device
def test_groups_have_their_own_settings_in_one_launch() -> None:
    groups = [
        {"lr": 0.1, "weight_decay": 0.0},
        {"lr": 0.01, "betas": (0.0, 0.5), "eps": 1e-3},
        {"lr": 0.2, "maximize": True, "weight_decay": 0.3},
    ]
    masters, params, optimizer = attached("copy", BF16, groups=groups)
    set_gradients(params, BF16, 1)
    optimizer.step()
    assert_fused(masters, optimizer, len(params))
    for index, group in enumerate(groups):
        alone, others, single = attached("copy", BF16, **group)
        set_gradients(others, BF16, 1)
        single.step()
        for param, other in list(zip(params, others, strict=True))[index :: len(groups)]:
            assert_same_bits(masters.value_of(param), alone.value_of(other))


@on_device
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_clip_that_waits_is_applied_in_fp32_and_shown_afterwards_where_someone_may_look(dtype) -> None:
    masters, params, optimizer = attached("copy", dtype, shapes=[(BLOCK + 3,)], lr=0.0)
    masters.gradients.shows_clipped = True
    set_gradients(params, dtype, 0)
    wide = params[0].grad.float()  # type: ignore[union-attr]
    factor = 1.0 / (torch.linalg.vector_norm(wide) + 1e-6)
    masters.gradients.clip_norm_(params, 1.0)
    optimizer.step()
    assert_fused(masters, optimizer, 1)
    assert_same_bits(params[0].grad, (wide * factor).to(dtype))
    # The moment shows that the unrounded value was used.
    torch.testing.assert_close(optimizer.state[params[0]]["exp_avg"], wide * factor * 0.1, rtol=ULP, atol=0)
    assert masters.gradients.waiting(params[0]) == []


# --- Beside the generic path -----------------------------------------------------------------------


@on_device
@pytest.mark.parametrize(("mode", "dtype"), MODES)
def test_state_is_laid_out_as_torchs_fused_kernel_has_it(mode, dtype) -> None:
    _, params, optimizer = attached(mode, dtype)
    exact = [nn.Parameter(value) for value in values_of(SHAPES)]
    oracle = torch.optim.AdamW(exact, lr=LR, fused=True)
    set_gradients(params, dtype, 0)
    set_gradients(exact, FP32, 0)
    optimizer.step()
    oracle.step()
    for param, plain in zip(params, exact, strict=True):
        assert list(optimizer.state[param]) == list(oracle.state[plain])
        for name, value in oracle.state[plain].items():
            found = optimizer.state[param][name]
            assert (found.dtype, found.shape, found.device) == (value.dtype, value.shape, value.device)
    left, right = optimizer.state_dict()["param_groups"], oracle.state_dict()["param_groups"]
    assert left == right


def generic(monkeypatch: pytest.MonkeyPatch, is_generic: bool) -> None:
    monkeypatch.setattr(fused_adam, "DEVICE_TYPE", "nowhere" if is_generic else DEVICE)


@on_device
@pytest.mark.parametrize(("mode", "dtype"), MODES)
@pytest.mark.parametrize("first_is_generic", [True, False])
def test_checkpoints_pass_between_the_kernel_and_the_generic_path(mode, dtype, first_is_generic, monkeypatch) -> None:
    def train(is_generic: bool, steps: range, run: Any) -> None:
        generic(monkeypatch, is_generic)
        masters, params, optimizer = run
        for step in steps:
            set_gradients(params, dtype, step)
            masters.gradients.clip_norm_(params, 1.0)
            optimizer.step()
            assert masters.step_path(optimizer).startswith("generic" if is_generic else "fused")

    whole = attached(mode, dtype, **SETTINGS)
    train(False, range(6), whole)
    first = attached(mode, dtype, **SETTINGS)
    train(first_is_generic, range(3), first)
    second = attached(mode, dtype, values=[first[0].value_of(param).clone() for param in first[1]], **SETTINGS)
    second[2].load_state_dict(first[2].state_dict())
    train(not first_is_generic, range(3, 6), second)
    for one, other in zip(whole[1], second[1], strict=True):
        found, expected = second[0].value_of(other), whole[0].value_of(one)
        # As over fifty steps: both kernels are off by an ulp here and there.
        assert float((found - expected).abs().sum()) <= 6 * (2.0**-22 + 4 * LR * ULP) * max(1, found.numel())
        assert float(second[2].state[other]["step"]) == 6


class Own(torch.optim.AdamW):
    """A subclass may compute something else."""


@on_device
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"fused": None}, "fused=True is not set"),
        ({"amsgrad": True}, "amsgrad=True is set"),
        ({"capturable": True}, "capturable=True is set"),
        ({"optimizer_class": Own}, "the optimizer is Own, not torch.optim.AdamW or Adam themselves"),
        ({"optimizer_class": torch.optim.SGD}, "the optimizer is SGD, not torch.optim.AdamW or Adam themselves"),
    ],
)
def test_other_optimizers_and_settings_take_the_generic_path(settings, reason, monkeypatch) -> None:
    results = []
    for is_generic in (True, False):
        generic(monkeypatch, is_generic)
        masters, params, optimizer = attached("split", BF16, shapes=[(5,), (7,)], **settings)
        for step in range(2):
            set_gradients(params, BF16, step)
            optimizer.step()
        results.append([masters.value_of(param) for param in params])
    assert masters.step_path(optimizer) == f"generic path: {reason}"
    for left, right in zip(*results, strict=True):
        assert_same_bits(left, right)


@on_device
def test_groups_and_parameters_that_the_kernel_does_not_take_are_stepped_beside_it() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6, device=DEVICE)
            self.norm = nn.LayerNorm(6, device=DEVICE)  # stays FP32

    module = Mixed()
    exact = [param.detach().clone() for param in module.parameters()]
    masters = MasterWeights("split")
    masters.convert_(module)
    optimizer = torch.optim.AdamW(
        [
            {"params": [module.linear.weight, module.norm.weight]},
            {"params": [module.linear.bias, module.norm.bias], "fused": False},
        ],
        fused=True,
        **SETTINGS,
    )
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    masters.attach([optimizer], accumulates=False)
    plain = [nn.Parameter(value) for value in exact]
    oracle = torch.optim.AdamW(plain, fused=True, **SETTINGS)
    params = list(module.parameters())
    for step in range(3):
        for param, other in zip(params, plain, strict=True):
            other.grad = gradients_of([other], BF16, step)[0].float()  # type: ignore[list-item]
            param.grad = other.grad.to(param.dtype)
        optimizer.step()
        oracle.step()
    assert calls == [1, 1, 1]
    assert masters.step_path(optimizer) == "fused kernel for 1 parameters, not others: fused=True is not set"
    for param, other in zip(params, plain, strict=True):
        error = (masters.value_of(param) - other).abs().max()
        assert error <= 3 * (2.0**-22 + 4 * LR * ULP)
        assert float(optimizer.state[param]["step"]) == 3


@on_device
def test_clip_by_value_that_waits_takes_the_generic_path() -> None:
    masters, params, optimizer = attached("split", BF16, shapes=[(9,)], betas=(0.0, 0.9))
    set_gradients(params, BF16, 0)
    expected = params[0].grad.float().clamp(-0.5, 0.5)  # type: ignore[union-attr]
    masters.gradients.clip_value_(params, 0.5)
    optimizer.step()
    assert masters.step_path(optimizer).endswith("gradients wait for another clip than one by their norm")
    assert_same_bits(optimizer.state[params[0]]["exp_avg"], expected)


@on_device
def test_parameters_without_gradients_are_left_as_they_are() -> None:
    masters, params, optimizer = attached("split", BF16, shapes=[(9,), (9,)])
    set_gradients(params[:1], BF16, 0)
    before = masters.value_of(params[1]).clone()
    optimizer.step()
    assert_fused(masters, optimizer, 1)
    assert_same_bits(masters.value_of(params[1]), before)
    assert params[1] not in optimizer.state


@on_device
def test_addresses_and_settings_are_sent_again_only_when_they_change(monkeypatch) -> None:
    sent = []
    send = fused_adam._sent
    monkeypatch.setattr(fused_adam, "_sent", lambda *arguments: sent.append(1) or send(*arguments))
    _, params, optimizer = attached("split", BF16)
    set_gradients(params, BF16, 0)
    optimizer.step()
    first = len(sent)
    optimizer.step()
    assert len(sent) == first
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert len(sent) == first + 1
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert len(sent) == first + 2


@on_device
@pytest.mark.filterwarnings("ignore:.*GPU available but not used.*")
def test_fits_with_clipping_skips_and_a_schedule_give_what_the_generic_path_gives(monkeypatch) -> None:
    class Skips(Net):
        def loss(self, batch: list[Tensor]) -> Tensor:
            self.seen = getattr(self, "seen", 0) + 1
            return super().loss(batch) * (math.inf if self.seen == 3 else 1.0)

        def on_train_batch_end(self, *_: Any) -> None:
            (step,) = self.trainer.precision_plugin._masters._steps.values()
            self.num_updated = step.fused.num_updated

    found = {}
    for mode, is_generic in (("copy", False), ("split", False), ("split", True)):
        generic(monkeypatch, is_generic)
        torch.manual_seed(0)
        model, run = fit(
            mode,
            Skips(fused=True),
            max_epochs=1,
            gradient_clip_val=0.1,
            accelerator="cpu" if IS_INTERPRETED else "gpu",
        )
        assert run.precision_plugin.skipped_steps == 1
        assert model.num_updated == (0 if is_generic else 7)
        found[mode, is_generic] = [param.detach().clone() for param in model.parameters()]
    for copied, split, plain in zip(*found.values(), strict=True):
        assert_same_bits(copied, split)
        # Weights below 1, at most an ulp of each apart per step, and a rate of 1e-4.
        assert float((split - plain).abs().max()) <= 8 * 2.0**-23


# --- The trial -------------------------------------------------------------------------------------


@pytest.fixture
def _trials_are_forgotten() -> Iterator[None]:
    fused_check.why_not.cache_clear()
    yield
    fused_check.why_not.cache_clear()


def stepped(caplog: pytest.LogCaptureFixture) -> tuple[str, str]:
    masters, params, optimizer = attached("split", BF16, shapes=[(5,)])
    set_gradients(params, BF16, 0)
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    return masters.step_path(optimizer), caplog.text


@on_device
@pytest.mark.usefixtures("_trials_are_forgotten")
def test_kernel_that_cannot_be_built_leaves_the_generic_path_and_says_why(monkeypatch, caplog) -> None:
    def broken() -> Any:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(fused_adam, "compiled_kernel", broken)
    path, text = stepped(caplog)
    assert path == "generic path: Triton cannot be imported (No module named 'triton')"
    assert text.count("without the fused kernel for 16-bit weights, more slowly and with the same result") == 1


@on_device
@pytest.mark.usefixtures("_trials_are_forgotten")
@pytest.mark.parametrize("change", ["rate", "step", "rounding"])
def test_kernel_that_computes_something_else_is_not_used(change, monkeypatch, caplog) -> None:
    kernel = fused_adam.compiled_kernel()

    class Wrong:
        def __getitem__(self, grid: Any) -> Any:
            def launch(table: Tensor, chunks: Tensor, settings: Tensor, *arguments: Any, **fixed: Any) -> None:
                if change == "rate":
                    settings = settings * torch.tensor([1.001, *[1.0] * 8], device=settings.device)
                if change == "step":  # one too many: wrong bias corrections
                    arguments = (arguments[0], torch.zeros_like(arguments[1]), *arguments[2:])
                kernel[grid](table, chunks, settings, *arguments, **fixed)
                if change == "rounding":
                    kernel[grid](table, chunks, settings * 0 + 1, *arguments, **fixed)

            return launch

    monkeypatch.setattr(fused_adam, "compiled_kernel", Wrong)
    path, text = stepped(caplog)
    assert path.startswith("generic path: the kernel disagreed with torch's in a trial: ")
    assert "because the kernel disagreed" in text


def path_on_rank(rank: int) -> tuple[str, list[Tensor]]:
    fused_adam.DEVICE_TYPE = "cpu"
    if rank == 1:

        def broken() -> Any:
            raise ImportError("none here")

        fused_adam.compiled_kernel = broken
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    masters = MasterWeights("split")
    masters.convert_(module)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True, **SETTINGS)
    ddp = nn.parallel.DistributedDataParallel(module)
    masters.attach([optimizer], ddp=ddp)
    for _ in range(2):
        masters.begin_backward()
        ddp(torch.ones(2, 3).bfloat16()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return masters.step_path(optimizer), [masters.value_of(param).clone() for param in module.parameters()]


if IS_INTERPRETED:

    def test_ranks_with_the_same_weights_use_the_kernel_together_or_not_at_all() -> None:
        (first, left), (second, right) = on_two_ranks(path_on_rank)
        assert first == "generic path: another rank cannot use the kernel"
        assert second == "generic path: Triton cannot be imported (none here)"
        for one, other in zip(left, right, strict=True):
            assert_same_bits(one, other)


@on_device
@pytest.mark.parametrize("grads", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("weights", ["split", "bf16", "fp16"])
def test_every_variant_passes_its_trial(weights, grads) -> None:
    assert (
        fused_check._why_not(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"), weights, grads)
        is None
    )


# --- On a GPU only ---------------------------------------------------------------------------------


if not IS_INTERPRETED:

    @pytest.mark.gpu
    @pytest.mark.parametrize(("mode", "dtype"), MODES)
    def test_steps_clips_and_skips_wait_for_no_device(mode, dtype) -> None:
        masters, params, optimizer = attached(mode, dtype)
        grads = [gradients_of(params, dtype, step) for step in range(4)]
        flags = [torch.tensor(float(step == 2), device="cuda") for step in range(4)]
        try:
            for step in range(4):
                if step == 1:  # kernels are loaded and pinned memory is there
                    torch.cuda.set_sync_debug_mode("error")
                for param, grad in zip(params, grads[step], strict=True):
                    param.grad = grad
                optimizer.param_groups[0]["lr"] = LR / (step + 1)
                masters.gradients.clip_norm_(params, 1.0)
                step_unless(flags[step], optimizer, {})
                assert_fused(masters, optimizer, len(params))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert float(optimizer.state[params[0]]["step"]) == 3

    @pytest.mark.gpu
    @pytest.mark.slow
    def test_tensor_of_more_than_two_to_the_31_elements_is_updated_to_its_end() -> None:
        value = torch.zeros(2**31 + 5, dtype=BF16, device="cuda")
        masters, (param,), optimizer = attached("split", BF16, values=[value], weight_decay=0.0)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert_fused(masters, optimizer, 1)
        # The first Adam step is lr in the direction of the gradient.
        torch.testing.assert_close(
            param.detach()[-5:].float(), torch.full((5,), -LR, device="cuda"), rtol=2.0**-8, atol=0
        )
