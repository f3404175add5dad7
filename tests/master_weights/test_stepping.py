"""Optimizers on masters: split equals copy bit for bit, and everyone else sees the module's parameters."""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_mp.master_weights import MasterWeights

SHAPES = [(64, 32), (64,), (33, 17), (5,), (130, 64), (7, 3, 2)]


class Lion(Optimizer):
    """A custom optimizer as people write them: per-parameter state, a counter in the group."""

    def __init__(self, params: Any, lr: float = 1e-4, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "calls": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            group["calls"] += 1
            for param in group["params"]:
                if param.grad is None:
                    continue
                momentum = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(torch.lerp(momentum, param.grad, 0.1).sign(), alpha=-group["lr"])
                momentum.lerp_(param.grad, 0.01)


class Counting(torch.optim.AdamW):
    """A subclass whose step calls the decorated step of its base."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().step(closure)


OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AdamW-amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "Adam": (torch.optim.Adam, {}),
    "SGD": (torch.optim.SGD, {}),
    "SGD-momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "Adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Rprop": (torch.optim.Rprop, {}),
    "ASGD": (torch.optim.ASGD, {}),
    "Lion": (Lion, {}),
    "Counting": (Counting, {}),
}


def variants() -> Iterator[Any]:
    for name, (cls, _) in OPTIMIZERS.items():
        parameters = inspect.signature(cls.__init__).parameters
        yield pytest.param(name, {"foreach": False} if "foreach" in parameters else {}, id=f"{name}-forloop")
        if "foreach" in parameters:
            yield pytest.param(name, {"foreach": True}, id=f"{name}-foreach")
        if "fused" in parameters:
            yield pytest.param(name, {"fused": True}, id=f"{name}-fused")


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.items = nn.ParameterList(torch.randn(shape, generator=generator) * 0.1 for shape in SHAPES)


def make(mode: str, name: str, options: dict[str, Any], **engine: Any) -> tuple[Weights, MasterWeights, Optimizer]:
    module = Weights()
    masters = MasterWeights(mode, **engine)
    masters.convert_(module)
    cls, settings = OPTIMIZERS[name]
    items = list(module.items)
    groups = [{"params": items[:3]}, {"params": items[3:], "lr": 5e-3, "weight_decay": 0.0}]
    optimizer = cls(groups, lr=1e-2, **settings, **options)
    return module, masters, optimizer


def train(module: Weights, masters: MasterWeights, optimizer: Optimizer, steps: int, *, grads: bool = True) -> None:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    fused_sgd = isinstance(optimizer, torch.optim.SGD) and optimizer.defaults.get("fused")
    masters.gradients.defers = True
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 + step)
        for index, param in enumerate(module.items):
            grad = torch.randn(param.shape, generator=generator).bfloat16()
            # Fused SGD of torch needs the same parameters at every step.
            param.grad = None if index == 2 and step % 3 == 0 and not fused_sgd else grad.to(param.grad_dtype)
        masters.gradients.clip_norm_(module.parameters(), 20.0 + step)
        if step == 4:
            optimizer.param_groups[0]["weight_decay"] = 0.3
        optimizer.step()
        scheduler.step()


def values(module: nn.Module, masters: MasterWeights) -> list[torch.Tensor]:
    return [masters.value_of(param).clone() for param in module.parameters()]


def assert_same_bits(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left.view(torch.int32), right.view(torch.int32))


@pytest.mark.parametrize("accumulates", [True, False], ids=["fp32-grads", "bf16-grads"])
@pytest.mark.parametrize(("name", "options"), list(variants()))
def test_split_equals_copy_bit_for_bit_over_a_run(name: str, options: dict[str, Any], accumulates: bool) -> None:
    runs = {}
    for mode, bucket_numel in (("copy", 2**22), ("split", 1500)):
        module, masters, optimizer = make(mode, name, options, bucket_numel=bucket_numel)
        masters.attach([optimizer], accumulates=accumulates)
        train(module, masters, optimizer, steps=12)
        runs[mode] = module, masters, optimizer
    (copied, copy_masters, copy_opt), (split, split_masters, split_opt) = runs["copy"], runs["split"]
    assert_same_bits(values(split, split_masters), values(copied, copy_masters))
    for left, right in zip(split.parameters(), copied.parameters(), strict=True):
        assert torch.equal(left, right)
    assert_same_state(split_opt.state_dict(), copy_opt.state_dict())


@pytest.mark.parametrize(("name", "options"), list(variants()))
def test_copy_follows_the_optimizer_on_fp32_parameters_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    # Oracle: the same optimizer on FP32 parameters with the same (BF16-valued) FP32 gradients. Gradients
    # do not depend on the weights here, so the rounding of the working weight plays no part.
    module, masters, optimizer = make("copy", name, options)
    masters.attach([optimizer])
    train(module, masters, optimizer, steps=8)
    plain, unused, reference = make("copy", name, options)
    unused.detach()
    cls, settings = OPTIMIZERS[name]
    items = list(plain.items)
    groups = [{"params": items[:3]}, {"params": items[3:], "lr": 5e-3, "weight_decay": 0.0}]
    reference = cls(groups, lr=1e-2, **settings, **options)
    train(plain, unused, reference, steps=8)
    assert_same_bits(values(module, masters), [param.detach() for param in plain.parameters()])
    assert_same_state(optimizer.state_dict(), reference.state_dict())


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["state"].keys() == expected["state"].keys()
    for key, state in expected["state"].items():
        assert found["state"][key].keys() == state.keys()
        for name, value in state.items():
            other = found["state"][key][name]
            if isinstance(value, torch.Tensor):
                assert other.dtype is value.dtype
                assert torch.equal(other, value), name
                assert value.dtype is torch.float32
            else:
                assert other == value, name
    for left, right in zip(found["param_groups"], expected["param_groups"], strict=True):
        assert left == right


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_small_updates_move_a_bf16_weight_as_they_move_an_fp32_one(mode: str) -> None:
    # BF16 spacing above 1.0 is 2**-7, so 1e-3 alone never moves the weight; 1000 of them give about 2.0.
    weight = nn.Module()
    weight.w = nn.Parameter(torch.ones(1))
    expected = torch.ones(1)
    masters = MasterWeights(mode)
    masters.convert_(weight)
    optimizer = torch.optim.SGD([weight.w], lr=1e-3)
    masters.attach([optimizer])
    for _ in range(1000):
        weight.w.grad = -torch.ones(1)
        optimizer.step()
        expected.add_(torch.ones(1), alpha=1e-3)
    assert torch.equal(masters.value_of(weight.w), expected)
    assert weight.w.item() == 2.0


def test_none_leaves_the_weight_where_bf16_leaves_it() -> None:
    weight = nn.Module()
    weight.w = nn.Parameter(torch.ones(1))
    masters = MasterWeights("none")
    masters.convert_(weight)
    optimizer = torch.optim.AdamW([weight.w], lr=1e-3, weight_decay=0.0)
    masters.attach([optimizer])
    for _ in range(10):
        weight.w.grad = -torch.ones(1)
        optimizer.step()
    assert weight.w.item() == 1.0
    assert optimizer.state[weight.w]["exp_avg"].dtype is torch.bfloat16


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_groups_and_state_belong_to_the_module_between_steps_and_in_hooks(mode: str) -> None:
    module, masters, optimizer = make(mode, "AdamW", {}, bucket_numel=100)
    seen = []

    def own(*_: Any) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        seen.append(all(left is right for left, right in zip(params, module.parameters(), strict=True)))
        seen.append(set(optimizer.state) <= set(module.parameters()))

    optimizer.register_step_pre_hook(own)
    optimizer.register_step_post_hook(own)
    masters.attach([optimizer])
    optimizer.register_step_post_hook(own)
    train(module, masters, optimizer, steps=2)
    own()
    assert seen == [True] * 14


@pytest.mark.parametrize("name", ["AdamW", "Counting", "Lion"])
def test_hooks_and_counters_see_one_step_however_many_buckets(name: str) -> None:
    module, masters, optimizer = make("split", name, {}, bucket_numel=1)
    calls = {"pre": 0, "post": 0}
    optimizer.register_step_pre_hook(lambda *_: calls.update(pre=calls["pre"] + 1))
    optimizer.register_step_post_hook(lambda *_: calls.update(post=calls["post"] + 1))
    masters.attach([optimizer])
    train(module, masters, optimizer, steps=3)
    # A step that calls super().step() runs hooks twice in plain torch too; here they come once.
    assert calls == {"pre": 3, "post": 3}
    if name == "Counting":
        assert optimizer.calls == 3
    if name == "Lion":
        assert [group["calls"] for group in optimizer.param_groups] == [3, 3]


def test_step_is_still_called_once_in_fp32_when_no_parameter_has_a_gradient() -> None:
    _module, masters, optimizer = make("split", "Lion", {})
    masters.attach([optimizer])
    optimizer.step()
    assert [group["calls"] for group in optimizer.param_groups] == [1, 1]
    assert not optimizer.state


@pytest.mark.parametrize("when", ["before", "after"])
def test_scheduler_made_before_or_after_attach_gives_no_warning(when: str) -> None:
    _module, masters, optimizer = make("split", "AdamW", {})
    if when == "before":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    masters.attach([optimizer])
    if when == "after":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step()
    scheduler.step()  # warnings are errors here
    assert optimizer.param_groups[0]["lr"] == 5e-3
    masters.detach()
    optimizer.step()
    scheduler.step()
    assert "load_state_dict" not in vars(optimizer)


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_loaded_state_stays_fp32_and_continues_bit_for_bit(mode: str) -> None:
    whole, whole_masters, whole_opt = make(mode, "AdamW", {})
    whole_masters.attach([whole_opt])
    train(whole, whole_masters, whole_opt, steps=4)

    saved_model = {name: value.clone() for name, value in whole.state_dict().items()}
    saved_opt = copy.deepcopy(whole_opt.state_dict())
    resumed, resumed_masters, resumed_opt = make(mode, "AdamW", {}, bucket_numel=64)
    resumed_masters.attach([resumed_opt])
    resumed.load_state_dict(saved_model)
    resumed_opt.load_state_dict(saved_opt)
    assert {value["exp_avg"].dtype for value in resumed_opt.state.values()} == {torch.float32}
    assert set(resumed_opt.state) == set(resumed.parameters())

    for module, masters, optimizer in (
        (whole, whole_masters, whole_opt),
        (resumed, resumed_masters, resumed_opt),
    ):
        train(module, masters, optimizer, steps=4)
    assert_same_bits(values(resumed, resumed_masters), values(whole, whole_masters))


def test_a_failed_load_leaves_the_optimizer_with_the_modules_parameters() -> None:
    module, masters, optimizer = make("split", "AdamW", {})
    masters.attach([optimizer])
    train(module, masters, optimizer, steps=1)
    before = copy.deepcopy(optimizer.state_dict())
    broken = copy.deepcopy(before)
    broken["param_groups"].pop()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(broken)
    assert [param for group in optimizer.param_groups for param in group["params"]] == list(module.parameters())
    assert set(optimizer.state) == set(module.parameters()) - {module.items[2]}  # had no gradient


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_a_step_that_raises_leaves_structure_and_masters_whole(mode: str) -> None:
    class Failing(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for param in group["params"]:
                    param.add_(param.grad, alpha=-group["lr"])
                    raise ZeroDivisionError

    module = Weights()
    start = [param.detach().clone() for param in module.parameters()]
    masters = MasterWeights(mode)
    masters.convert_(module)
    optimizer = Failing(module.parameters(), lr=1.0)
    masters.attach([optimizer])
    for param in module.parameters():
        param.grad = torch.full(param.shape, 2.0**-20)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    # Torch applies what was done before the error; here too, in full precision.
    assert_same_bits(values(module, masters), [start[0] - 2.0**-20, *start[1:]])
    assert [param for group in optimizer.param_groups for param in group["params"]] == list(module.parameters())


@pytest.mark.parametrize("mode", ["copy", "split"])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam, torch.optim.Adagrad])
def test_a_fused_step_skipped_on_the_device_changes_nothing(mode: str, cls: type[Optimizer]) -> None:
    module = Weights()
    masters = MasterWeights(mode, bucket_numel=500)
    masters.convert_(module)
    optimizer = cls(module.parameters(), lr=1e-2, fused=True)
    masters.attach([optimizer])
    train(module, masters, optimizer, steps=1)
    before, weights = values(module, masters), [param.detach().clone() for param in module.parameters()]
    for param in module.parameters():
        param.grad = torch.full(param.shape, float("inf"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    optimizer.step()
    assert_same_bits(values(module, masters), before)
    assert all(torch.equal(param, weight) for param, weight in zip(module.parameters(), weights, strict=True))
    assert {int(state["step"]) for param, state in optimizer.state.items() if param is not module.items[2]} == {1}


def test_closure_runs_once_with_gradients_enabled() -> None:
    module, masters, optimizer = make("split", "SGD", {}, bucket_numel=1)
    masters.attach([optimizer])
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        loss = sum(param.float().square().sum() for param in module.parameters())
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() > 0


def test_peak_inside_a_split_step_is_bounded_by_the_bucket() -> None:
    module = nn.Module()
    module.items = nn.ParameterList(torch.zeros(1000) for _ in range(20))
    masters = MasterWeights("split", bucket_numel=2000)
    masters.convert_(module)
    alive = []

    class Watching(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            alive.append(sum(param.numel() for group in self.param_groups for param in group["params"]))

    optimizer = Watching(module.parameters(), lr=0.1)
    masters.attach([optimizer], accumulates=False)
    alive.clear()  # attaching tries a small likeness of an optimizer from outside torch
    for param in module.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert alive == [2000] * 10


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_a_group_added_in_mid_run_is_updated_through_its_masters(mode: str) -> None:
    module = Weights()
    masters = MasterWeights(mode)
    module.items[4].requires_grad_(False)
    masters.convert_(module)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-5)
    masters.attach([optimizer])
    exact = masters.value_of(module.items[4]).clone()
    for param in module.parameters():
        param.grad = torch.ones(param.shape) if param.requires_grad else None
    optimizer.step()
    assert torch.equal(masters.value_of(module.items[4]), exact)  # kept exact while frozen
    assert torch.equal(exact, Weights().items[4])
    module.items[4].requires_grad_(True)
    optimizer.add_param_group({"params": [module.items[4]], "lr": 1e-5, "weight_decay": 0.0})
    module.items[4].grad = torch.ones(module.items[4].shape)
    optimizer.step()
    moved = masters.value_of(module.items[4]) - exact
    # Adam's first step is lr against the sign; 1e-5 is far below the BF16 spacing of weights near 0.1.
    torch.testing.assert_close(moved, torch.full_like(moved, -1e-5), rtol=1e-3, atol=2e-8)


def test_two_optimizers_share_one_master_of_a_shared_parameter() -> None:
    module = Weights()
    reference = Weights()
    masters = MasterWeights("split")
    masters.convert_(module)
    pairs = []
    for model in (module, reference):
        pairs.append((torch.optim.AdamW(model.parameters(), lr=1e-3), torch.optim.SGD([model.items[0]], lr=1e-3)))
    masters.attach(pairs[0])
    for model, optimizers in zip((module, reference), pairs, strict=True):
        for step in range(4):
            for optimizer in optimizers:
                for param in model.parameters():
                    param.grad = torch.full(param.shape, 0.5 + step)
                optimizer.step()
    assert_same_bits(values(module, masters), [param.detach() for param in reference.parameters()])


def test_sparse_gradients_reach_the_master() -> None:
    tables = []
    for _ in range(2):
        torch.manual_seed(0)
        tables.append(nn.Embedding(10, 4, sparse=True))
    masters = MasterWeights("split")
    masters.convert_(tables[0])
    optimizers = [torch.optim.SparseAdam(list(table.parameters()), lr=1e-3) for table in tables]
    masters.attach(optimizers[:1])
    for table, optimizer in zip(tables, optimizers, strict=True):
        table(torch.tensor([1, 3, 3])).float().sum().backward()
        optimizer.step()
    assert_same_bits([masters.value_of(tables[0].weight)], [tables[1].weight.detach()])


@pytest.mark.parametrize("mode", ["copy", "split", "none"])
def test_a_16_bit_parameter_made_during_the_fit_is_told_about_once(mode: str) -> None:
    module = nn.Linear(4, 4)
    masters = MasterWeights(mode)  # type: ignore[arg-type]
    masters.convert_(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    masters.attach([optimizer], accumulates=False)
    made, fp32 = nn.Parameter(module.weight.detach().clone()), nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [made, fp32]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for param in (*module.parameters(), made, fp32):
                param.grad = torch.ones_like(param)
            optimizer.step()
    told = [str(warning.message) for warning in caught if "has no FP32 master" in str(warning.message)]
    assert len(told) == (mode != "none")
    assert all("SGD steps a torch.bfloat16 parameter of shape (4, 4)" in text for text in told)
