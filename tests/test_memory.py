"""The planner: exact bytes by hand, and the live bytes of a real run."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mp.errors import SettingTypeError, SettingValueError, UnsupportedError
from lightning_mp.master_weights import MasterWeights
from lightning_mp.memory import MemoryEstimate, estimate_memory, format_estimate


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # weights + masters + gradients + AdamW's two states (+ DDP's bucket), in bytes per parameter
        ({"precision": "fp32"}, 4 + 0 + 4 + 8),
        ({"precision": "bf16"}, 4 + 0 + 4 + 8),
        ({"master_weights": "copy"}, 2 + 4 + 2 + 8),
        ({"master_weights": "split"}, 2 + 2 + 2 + 8),
        ({"master_weights": "split", "accumulate_grad_batches": 8}, 2 + 2 + 4 + 8),
        ({"master_weights": "split", "world_size": 2}, 2 + 2 + 4 + 8 + 2),
        ({"master_weights": "copy", "precision": "fp16"}, 2 + 4 + 4 + 8),
        ({"master_weights": "none"}, 2 + 0 + 2 + 4),
        ({"master_weights": "split", "optimizer": "sgd"}, 2 + 2 + 2),
        ({"master_weights": "split", "optimizer": "sgd-momentum"}, 2 + 2 + 2 + 4),
        ({"master_weights": "split", "optimizer": "adamw8bit"}, 2 + 2 + 2 + 2 * (1 + 4 / 256)),
        ({"strategy": "ddp"}, 4 + 4 + 8 + 4),
        ({"world_size": 4}, 4 + 4 + 8 + 4),
        ({"strategy": "fsdp", "world_size": 4}, 16 / 4),
        ({"strategy": "fsdp2", "world_size": 8}, 16 / 8),
        ({"precision": "fp8", "master_weights": "split"}, 14 + 2),
        ({"precision": "bf16-mixed"}, 16),
    ],
)
def test_bytes_per_parameter_add_up_by_hand(settings: dict[str, Any], expected: float) -> None:
    estimate = estimate_memory(256_000_000, **settings)
    assert estimate.bytes_per_param == pytest.approx(expected, rel=1e-9)
    assert estimate.total == sum(
        getattr(estimate, field.name) for field in dataclasses.fields(estimate) if field.name != "num_params"
    )


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.first = nn.Linear(32, 128)
        self.norm = nn.LayerNorm(128)
        self.last = nn.Linear(128, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.wide = nn.Parameter(torch.zeros(7, dtype=torch.float64))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(self.frozen(self.embedding(index))).float()).to(self.last.weight.dtype)
        return self.head(self.last(hidden)).float().sum() + self.wide.sum()


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "sgd": (torch.optim.SGD, {}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.9}),
}


@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["copy", "split", "none"])
def test_estimate_is_what_the_engine_keeps(mode: Any, optimizer: str, backwards: int) -> None:
    model = Model()
    estimate = estimate_memory(model, master_weights=mode, optimizer=optimizer, accumulate_grad_batches=backwards)
    masters = MasterWeights(mode)
    masters.convert_(model)
    cls, settings = OPTIMIZERS[optimizer]
    opt = cls([param for param in model.parameters() if param.requires_grad], lr=0.1, **settings)
    masters.attach([opt], accumulates=backwards > 1)
    for _ in range(backwards):
        model(torch.arange(4)).backward()
    opt.step()
    assert estimate.weights == sum(param.nbytes for param in model.parameters())
    assert estimate.masters == masters.nbytes
    assert estimate.gradients == sum(param.grad.nbytes for param in model.parameters() if param.grad is not None)
    # Step counters are 0-dim: the estimate leaves them out.
    states = [value for state in opt.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert estimate.optimizer_state == sum(value.nbytes for value in states if value.dim() > 0)
    assert estimate.num_params == sum(param.numel() for param in model.parameters())


def test_8_bit_states_of_a_model_are_those_that_torchao_makes() -> None:
    optim = pytest.importorskip("torchao.optim")
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 3))
    opt = optim.AdamW8bit(model.parameters())
    found = 0
    for param in model.parameters():
        for signed in (True, False):
            buffer = opt._new_buffer(param, signed)
            parts = [getattr(buffer, name) for name in getattr(buffer, "tensor_attrs", [])] or [buffer]
            found += sum(part.nbytes for part in parts)
    assert estimate_memory(model, optimizer="adamw8bit").optimizer_state == found


def test_fp8_weights_leave_out_the_head_and_shapes_that_do_not_fit() -> None:
    # last (128 -> 32), frozen (32 -> 32) and first (32 -> 128) fit; the head is tied to the embedding.
    assert estimate_memory(Model(), precision="fp8").fp8_weights == 2 * (32 * 128 + 128 * 32 + 32 * 32)
    untied = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 20), nn.Linear(20, 32), nn.Linear(32, 64))
    assert estimate_memory(untied, precision="fp8").fp8_weights == 2 * 32 * 32


def test_a_model_on_the_meta_device_is_enough() -> None:
    with torch.device("meta"):
        model = nn.Linear(1000, 1000)
    assert estimate_memory(model, master_weights="split").bytes_per_param == 14.0


def test_a_model_without_parameters_needs_nothing() -> None:
    estimate = estimate_memory(nn.ReLU())
    assert (estimate.total, estimate.bytes_per_param) == (0, 0.0)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"precision": "int8"}, SettingValueError, r"precision: found 'int8'; allowed are 'fp32', 'fp16', 'bf16'"),
        ({"master_weights": "half"}, SettingValueError, r"master_weights: found 'half'; allowed are 'params'"),
        ({"optimizer": "lion"}, SettingValueError, r"optimizer: found 'lion'; allowed are 'adamw', 'adam', 'sgd'"),
        ({"strategy": "zero"}, SettingValueError, r"strategy: found 'zero'; allowed are 'auto', 'ddp', 'fsdp'"),
        ({"world_size": 0}, SettingValueError, r"world_size: found 0; it must be an integer of at least 1"),
        ({"accumulate_grad_batches": 1.5}, SettingValueError, r"accumulate_grad_batches: found 1.5; it must be"),
        (
            {"precision": "fp16", "master_weights": "split"},
            SettingValueError,
            r"'split' is set beside precision='fp16'",
        ),
        ({"precision": "fp32", "master_weights": "copy"}, SettingValueError, r"'copy' is set beside precision='fp32'"),
        ({"strategy": "fsdp", "master_weights": "copy"}, SettingValueError, r"'copy' is not for strategy='fsdp'"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        estimate_memory(1000, **settings)


@pytest.mark.parametrize("model", ["7b", None, True])
def test_what_is_neither_a_model_nor_a_number_is_refused(model: Any) -> None:
    with pytest.raises(SettingTypeError, match=r"model_or_num_params: found a \w+; pass an nn.Module or a number"):
        estimate_memory(model)


def test_a_negative_number_and_a_lazy_model_are_refused() -> None:
    with pytest.raises(SettingValueError, match=r"model_or_num_params: found -1; it must not be negative"):
        estimate_memory(-1)
    with pytest.raises(UnsupportedError, match=r"parameter 'weight' is not initialized yet, so its size is not known"):
        estimate_memory(nn.LazyLinear(4))


def test_estimates_are_frozen_and_print_as_a_table() -> None:
    estimate = estimate_memory(1e9, master_weights="split")
    assert isinstance(estimate, MemoryEstimate)
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate.weights = 0
    assert format_estimate(estimate).splitlines()[-1].split() == ["total", "13.04", "14.00"]


@pytest.mark.parametrize("name", ["params", "copy", "split", "split, 4 backwards per step", "none"])
@pytest.mark.filterwarnings("ignore:.*master_weights='none'.*")
def test_estimate_is_within_2_percent_of_the_live_bytes_of_a_real_run(name: str) -> None:
    from benchmarks.memory import CASES, measure

    case = next(case for case in CASES if case.name == name)
    row = measure(case, device="cpu", width=128, layers=8)
    # The rest is Adam's step counters, the loss and the like: some bytes per tensor.
    assert row["estimate"] == pytest.approx(row["rest"], rel=0.02)
    assert row["peak"] > row["rest"]
