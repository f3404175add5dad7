"""The engine on plain modules: where values first go non-finite, and what a replay leaves behind."""

import collections
import gc
import random
import time
import weakref
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_mp.overflow import Finding, Probes, RandomState, copy_containers, find_in_gradients, replay
from lightning_mp.overflow.preserve import preserved
from lightning_mp.overflow.statistics import Statistics, TensorStats, named_tensors

INF = float("inf")
NAN = float("nan")


class Call(nn.Module):
    """A module that is one function of its input; the parameter, if any, takes no part."""

    def __init__(self, function: Any, *, parameter: bool = False) -> None:
        super().__init__()
        self.function = function
        if parameter:
            self.weight = nn.Parameter(torch.ones(1))

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class GradTimes(torch.autograd.Function):
    """Identity in forward, times a factor in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def draw_torch(generator: torch.Generator) -> float:
    return torch.rand(1, generator=generator).item()


def grad_times(factor: float) -> Call:
    return Call(lambda x: GradTimes.apply(x, factor))


def look(model: nn.Module, batch: Any = None, *, scale: float = 1.0, step: Any = None, fp16: bool = False) -> Any:
    batch = torch.ones(2, 4) if batch is None else batch
    return replay(
        model,
        step or (lambda b: model(b).float().sum()),
        batch,
        rng=RandomState.now(),
        loss_scale=scale,
        region=lambda: torch.autocast("cpu", torch.float16) if fp16 else nullcontext(),
    )


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def where(finding: Finding | None) -> tuple[str, str, str] | None:
    return None if finding is None else (finding.phase, finding.fqn, finding.kind)


def test_finite_batch_has_no_culprit() -> None:
    assert look(nn.Sequential(linear(), nn.ReLU(), linear())) is None


# --- Forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [INF, NAN])
def test_module_is_named_wherever_in_a_chain_it_stands(place, value) -> None:
    layers: list[nn.Module] = [linear() for _ in range(4)]
    layers.insert(place, Call(lambda x: x * value))
    expected = ("forward", str(place), "inf" if value == INF else "nan")
    assert where(look(nn.Sequential(*layers))) == expected


def test_module_inside_is_named_and_not_its_parents() -> None:
    model = nn.Sequential(nn.Sequential(linear(), nn.Sequential(Call(lambda x: x / 0)), linear()))
    assert where(look(model)) == ("forward", "0.1.0", "inf")


def test_parent_whose_own_code_overflows_is_named() -> None:
    # 60000 + 60000 is above 65504: the addition of the block overflows, nothing inside it does.
    block = Residual(nn.Sequential(Call(lambda x: x * 1)))
    model = nn.Sequential(Call(lambda x: (x * 6e4).half()), block, Call(lambda x: x.float()))
    assert where(look(model)) == ("forward", "1", "inf")


def test_fp16_linear_is_named_with_the_amaxes_that_explain_it() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(-300.0)
    finding = look(model, torch.full((1, 4), 100.0), fp16=True)
    # 4 * 100 * 300 = 120000 is above 65504, and negative: minus infinity alone is no mask here.
    assert finding == Finding("forward", "0", "inf", 1, {"input": 100.0, "output": INF, "weight": 300.0})


def test_shared_module_has_the_name_by_which_the_failing_call_knew_it() -> None:
    shared = Call(lambda x: x * 200)
    # FP16: 200 * 200 = 40000 is finite, the third call is not.
    model = nn.Sequential(Call(lambda x: x.half()), shared, shared, nn.Identity(), shared, Call(lambda x: x.float()))
    assert where(look(model)) == ("forward", "4", "inf")
    assert model[1] is model[2] is model[4] is shared


def test_shared_module_of_two_parents_has_the_name_of_the_parent_that_called() -> None:
    shared = Call(lambda x: x * 300)
    first, second = nn.Sequential(shared), nn.Sequential(shared)
    model = nn.Sequential(Call(lambda x: x.half()), first, second, Call(lambda x: x.float()))
    assert where(look(model)) == ("forward", "2.0", "inf")


def test_softmax_of_a_fully_masked_row_is_named_and_not_the_mask() -> None:
    mask = Call(lambda x: x.masked_fill(torch.ones_like(x, dtype=torch.bool), -INF))
    assert where(look(nn.Sequential(linear(), mask, nn.Softmax(-1), linear()))) == ("forward", "2", "nan")


def test_mask_that_a_softmax_makes_finite_hides_no_later_culprit() -> None:
    upper = torch.ones(2, 4, dtype=torch.bool).triu(1)
    mask = Call(lambda x: x.masked_fill(upper, -INF), parameter=True)
    model = nn.Sequential(linear(), mask, nn.Softmax(-1), Call(lambda x: x / 0))
    assert where(look(model)) == ("forward", "3", "both")


def test_mask_of_minus_infinity_in_the_batch_is_not_the_culprit_if_something_else_is() -> None:
    model = nn.Sequential(nn.Softmax(-1), Call(lambda x: x * INF))
    batch = {"mask": torch.tensor([[0.0, -INF]]), "x": torch.ones(1, 2)}
    found = look(model, batch, step=lambda b: model(b["x"] + b["mask"]).nansum() * INF)
    assert found.fqn == "1"


def attend(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(scores + mask, -1)


FULL = torch.full((4, 4), -INF)
# What makes minus infinity of finite values: no mask.
LOG_ZERO = lambda: Call(lambda x: x.relu().mul(0).log())  # noqa: E731
NEGATIVE = lambda: Call(lambda x: -((x.abs() + 1).half() * 300).square())  # noqa: E731


@pytest.mark.parametrize("make", [LOG_ZERO, NEGATIVE])
@pytest.mark.parametrize("user", [linear, lambda: nn.LayerNorm(4), lambda: nn.Linear(4, 4, bias=False), nn.GELU])
def test_minus_infinity_that_a_layer_turns_into_nan_was_no_mask(make, user) -> None:
    cast = Call(lambda x: x.float())
    model = nn.Sequential(linear(), make(), cast, user())
    assert where(look(model)) == ("forward", "1", "inf")
    # From within a block, which has parameters without having made it itself.
    assert where(look(nn.Sequential(nn.Sequential(linear(), make()), cast, user()))) == ("forward", "0.1", "inf")


class OwnWeights(nn.Module):
    """A layer of the user's, unknown to the package."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_minus_infinity_that_reaches_weights_of_the_users_own_layer_was_no_mask() -> None:
    assert where(look(nn.Sequential(linear(), LOG_ZERO(), OwnWeights()))) == ("forward", "1", "inf")


def test_minus_infinity_of_the_batch_that_reaches_a_layer_names_its_item() -> None:
    batch = {"mask": torch.zeros(1, 4), "x": torch.tensor([[1.0, 0.0, 1.0, 0.0]]).log()}
    model = nn.Sequential(linear(), linear())
    found = look(model, batch, step=lambda b: model(b["x"]).sum())
    assert (where(found), found.count) == (("batch", "x", "inf"), 2)


def test_minus_infinity_made_between_modules_names_the_code_that_made_it() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = linear(), linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).mul(0).log())

    assert where(look(nn.Sequential(linear(), Between()))) == ("forward", "1", "inf")
    model = linear()
    assert where(look(model, step=lambda b: model(b.mul(0).log()).sum())) == ("forward", "Linear", "inf")


@pytest.mark.parametrize(
    "attention",
    [
        nn.Softmax(-1),
        Call(lambda x: x.softmax(-1), parameter=False),
        Call(lambda x: x - x.amax(-1, keepdim=True)),
        nn.Sequential(nn.Softmax(-1)),
    ],
)
def test_nan_from_a_mask_is_the_fault_of_who_computes_with_it(attention) -> None:
    mask = Call(lambda x: x + FULL[:2])
    found = look(nn.Sequential(linear(), mask, attention, linear()))
    assert where(found) == ("forward", "2.0" if isinstance(attention, nn.Sequential) else "2", "nan")


def test_attention_that_is_handed_a_mask_of_the_batch_is_named_and_not_the_item() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return attend(x @ x.mT * self.scale, mask) @ x

    batch = {"x": torch.ones(4, 4), "mask": FULL}
    own, torchs = Own(), nn.MultiheadAttention(4, 1)
    assert where(look(own, batch, step=lambda b: own(b["x"], b["mask"]).sum())) == ("forward", "Own", "nan")
    found = look(torchs, batch, step=lambda b: torchs(b["x"], b["x"], b["x"], attn_mask=b["mask"])[0].sum())
    assert where(found) == ("forward", "MultiheadAttention", "nan")


def test_mask_that_a_softmax_used_up_is_not_the_fault_of_the_loss() -> None:
    mask = Call(lambda x: x + torch.tensor([0.0, -INF, -INF, 0.0]))
    model = nn.Sequential(linear(), mask, nn.Softmax(-1))
    assert where(look(model, step=lambda b: torch.log(model(b).sum() * 0))) == ("loss", "loss", "inf")


# --- What another module made finite again -------------------------------------------------------


class Gated(nn.Module):
    """``up(x) * gate(up(x))``; the fault is in ``up`` or in the block's own code."""

    def __init__(self, up: nn.Module, *, factor: float = 1.0, uses_up: bool = True) -> None:
        super().__init__()
        self.up, self.gate, self.factor, self.uses_up = up, nn.Sigmoid(), factor, uses_up

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return (h if self.uses_up else x) * self.gate(h) * self.factor


def overflowing() -> Call:
    return Call(lambda x: (x.abs() + 1) * INF)


def test_culprit_that_a_gate_makes_finite_is_named_if_its_values_went_elsewhere_too() -> None:
    assert where(look(nn.Sequential(linear(), Gated(overflowing()), linear()))) == ("forward", "1.up", "inf")
    model = Gated(overflowing())
    found = look(model, step=lambda b: (h := model.up(model_stem(b))) is not None and (h * model.gate(h)).sum())
    assert where(found) == ("forward", "up", "inf")


def model_stem(x: Tensor) -> Tensor:
    return x * torch.ones((), requires_grad=True)


def test_block_that_overflows_by_itself_is_named_though_a_gate_made_something_else_finite() -> None:
    block = Gated(overflowing(), factor=INF, uses_up=False)
    assert where(look(nn.Sequential(linear(), block, linear()))) == ("forward", "1", "inf")


def test_later_culprit_is_named_after_a_gate_made_an_earlier_one_finite() -> None:
    model = nn.Sequential(linear(), overflowing(), nn.Sigmoid(), Call(lambda x: x / 0))
    assert where(look(model)) == ("forward", "3", "inf")
    assert where(look(model[:3], step=lambda b: torch.log(model[:3](b).sum() * 0))) == ("loss", "loss", "inf")


def as_statistic(h: Tensor, blow: nn.Module) -> None:
    with torch.no_grad():
        blow(h)


ASIDE = {
    "statistic": as_statistic,
    "detached": lambda h, blow: blow(h.detach()),
    "unused": lambda h, blow: blow(h),
}


@pytest.mark.parametrize("aside", ASIDE)
def test_infinity_that_never_reaches_the_loss_hides_no_later_culprit(aside) -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blow, self.bad = linear(), overflowing(), Call(lambda x: x / 0)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            ASIDE[aside](h, self.blow)
            return self.bad(h)

    assert where(look(Aside()))[:2] == ("forward", "bad")


def test_frozen_part_without_a_graph_is_named_if_its_values_do_the_harm() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Sequential(linear(), overflowing()), linear()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.encoder(x)
            return self.head(h)

    assert where(look(Frozen())) == ("forward", "encoder.1", "inf")
    model = Frozen()
    assert where(look(model, step=lambda b: Frozen.forward(model, b).sum())) == ("forward", "encoder.1", "inf")


@pytest.mark.parametrize("value", [INF, NAN])
def test_batch_is_named_by_the_path_of_its_item(value) -> None:
    model = linear()
    batch = {"inputs": [torch.zeros(1), torch.full((1, 4), value)], "size": 3}
    found = look(model, batch, step=lambda b: model(b["inputs"][1]).sum())
    assert (found.phase, found.fqn, found.count) == ("batch", "inputs.1", 4)
    assert where(look(model, torch.full((1, 4), value))) == ("batch", "batch", "inf" if value == INF else "nan")


def known_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Leave out the rows without a label, as a user does who has some."""
    known = ~batch["y"].isnan()
    return (model(batch["x"]).sum(-1)[known] - batch["y"][known]).square().mean()


LABELS = {"unused": torch.full((3,), NAN), "x": torch.ones(3, 4), "y": torch.tensor([1.0, NAN, 2.0])}


def test_labels_that_are_masked_out_are_not_blamed_for_a_loss_that_overflows_by_itself() -> None:
    model = linear()
    assert look(model, LABELS, step=lambda b: known_loss(model, b)) is None
    found = look(model, LABELS, step=lambda b: torch.log(known_loss(model, b) * 0))
    assert where(found) == ("loss", "loss", "inf")
    assert LABELS["y"].isnan().tolist() == [False, True, False]


def test_labels_that_are_masked_out_are_not_blamed_for_a_gradient_that_overflows_by_itself() -> None:
    model = nn.Sequential(linear(), grad_times(INF))
    assert where(look(model, LABELS, step=lambda b: known_loss(model, b)))[:2] == ("backward", "1")


def test_labels_are_blamed_where_nobody_masked_them_or_none_is_left() -> None:
    model = linear()
    plain = lambda b: (model(b["x"]).sum(-1) - b["y"]).square().mean()  # noqa: E731
    assert where(look(model, LABELS, step=plain)) == ("batch", "y", "nan")
    # The mean of no rows is 0 / 0.
    empty = {**LABELS, "y": torch.full((3,), NAN)}
    assert where(look(model, empty, step=lambda b: known_loss(model, b))) == ("batch", "y", "nan")


def test_item_that_harms_is_told_from_one_that_does_not() -> None:
    model = linear()
    batch = {**LABELS, "x": torch.full((3, 4), INF)}
    assert where(look(model, batch, step=lambda b: known_loss(model, b))) == ("batch", "x", "inf")
    both = {"x": torch.full((2, 4), NAN), "y": torch.full((2, 4), INF)}
    assert where(look(model, both, step=lambda b: (model(b["x"]) - b["y"]).sum())) == ("batch", "x", "nan")


def count_passes(step: Any) -> tuple[Any, list[int]]:
    passes: list[int] = []

    def counted(batch: Any) -> Tensor:
        passes.append(1)
        return step(batch)

    return counted, passes


@pytest.mark.parametrize("order", [("c", "a", "b"), ("a", "c", "b"), ("a", "b", "c")])
@pytest.mark.parametrize("harmless", [NAN, INF, -INF])
def test_harmless_item_beside_two_harmful_ones_is_not_blamed(order, harmless) -> None:
    model = linear()
    values = {"a": NAN, "b": INF, "c": harmless}
    batch = {name: torch.full((2, 4), values[name]) for name in order}
    found = look(model, batch, step=lambda b: model(b["a"]).sum() + model(b["b"]).sum() + b["c"].isfinite().sum())
    assert found.phase == "batch"
    assert found.fqn in ("a", "b")


def test_item_is_found_among_many_in_a_handful_of_passes() -> None:
    model = linear()
    mask = torch.tensor([0.0, -INF, 0.0, -INF])
    batch = [{"x": torch.ones(4), "mask": mask} for _ in range(100)]
    for place in (61, 88):
        batch[place]["x"] = torch.full((4,), NAN)
    # The mask of each is used as one, which does no harm.
    step, passes = count_passes(lambda b: sum((model(one["x"]) * one["mask"].softmax(0)).sum() for one in b))
    assert where(look(model, batch, step=step)) == ("batch", "61.x", "nan")
    # The batch, all 102 items finite, and log2 of 102, rounded up.
    assert len(passes) <= 1 + 1 + 7


def test_items_that_cannot_all_be_repaired_take_a_handful_of_passes() -> None:
    model = linear()
    batch = {"x": torch.tensor([[1.0] * 4, [NAN] * 4]), **{str(i): torch.full((4,), -INF) for i in range(50)}}
    step, passes = count_passes(lambda b: torch.log(padded_loss(model, b) * 0))
    assert where(look(model, batch, step=step)) == ("batch", "x", "nan")
    assert len(passes) <= 8


def padded_loss(model: nn.Module, batch: Any) -> Tensor:
    """NaN fills up what is too short; a batch without any is refused."""
    rows = batch["x"][~batch["x"].isnan().any(-1)]
    if len(rows) == len(batch["x"]):
        raise ValueError("the last row is padding")
    return model(rows).sum() * batch.get("weight", torch.ones(1)).sum()


def test_repaired_item_that_the_step_refuses_leaves_the_replay_valid() -> None:
    model, padded = linear(), torch.tensor([[1.0] * 4, [NAN] * 4])
    found = look(model, {"x": padded}, step=lambda b: torch.log(padded_loss(model, b) * 0))
    # What is wrong is the loss, but nothing can tell as long as the item stays.
    assert where(found) == ("batch", "x", "nan")
    # An item that can be repaired is still told from the one that cannot.
    batch = {"x": padded, "weight": torch.tensor([INF])}
    assert where(look(model, batch, step=lambda b: padded_loss(model, b))) == ("batch", "weight", "inf")
    # On the batch as it is, an error is one.
    with pytest.raises(ValueError, match="padding"):
        look(model, {"x": torch.ones(2, 4)}, step=lambda b: padded_loss(model, b))


def test_probabilities_keep_valid_values_where_they_are_made_finite() -> None:
    model = linear()
    batch = {"p": torch.tensor([0.25, NAN]), "q": torch.tensor([NAN, NAN])}
    for name in batch:
        step = lambda b, name=name: model(torch.ones(4)).sum() * torch.log(b[name]).sum()  # noqa: E731
        assert where(look(model, batch, step=step)) == ("batch", name, "nan")


def test_module_that_masks_the_batch_and_overflows_by_itself_is_named() -> None:
    model = nn.Sequential(Call(lambda x: (x.nan_to_num() + 1) / 0), linear())
    assert where(look(model, torch.tensor([[1.0, NAN, 2.0, 3.0]]))) == ("forward", "0", "inf")


def test_batch_that_cannot_be_copied_is_blamed_as_it_is_and_left_alone() -> None:
    class Graph:
        def __init__(self) -> None:
            self.x = torch.full((2, 4), NAN)

    model, graph = linear(), Graph()
    assert where(look(model, graph, step=lambda b: model(b.x).sum())) == ("batch", "x", "nan")
    assert graph.x.isnan().all()


def test_finite_activations_with_a_nonfinite_loss_name_the_loss() -> None:
    model = linear()
    assert where(look(model, step=lambda b: torch.log(model(b).sum() * 0))) == ("loss", "loss", "inf")


def test_loss_module_is_the_loss() -> None:
    model = nn.Sequential(linear(), nn.PoissonNLLLoss())
    found = look(model, step=lambda b: model[1](model[0](b) + 200, torch.ones(2, 4)))
    assert where(found) == ("loss", "loss", "inf")


def test_code_between_modules_is_named_by_the_class_of_the_model() -> None:
    model = nn.Sequential(linear(), linear())
    found = look(model, step=lambda b: model[1](model[0](b) * INF).sum())
    assert where(found)[:2] == ("forward", "Sequential")


# --- Backward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(1, 5))
def test_backward_overflow_is_named_wherever_in_a_chain_it_stands(place) -> None:
    layers: list[nn.Module] = [linear() for _ in range(4)]
    layers.insert(place, grad_times(INF))
    assert where(look(nn.Sequential(*layers)))[:2] == ("backward", str(place))


def test_backward_culprit_inside_a_residual_block_is_told_from_its_neighbours() -> None:
    model = nn.Sequential(
        linear(), Residual(linear()), Residual(nn.Sequential(linear(), grad_times(INF), linear())), Residual(linear())
    )
    assert where(look(model))[:2] == ("backward", "2.inner.1")


def test_parallel_branch_is_not_blamed_for_its_sibling() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.good, self.bad = linear(), linear(), grad_times(INF)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            return self.good(h) + self.bad(h)

    # The gradient of h is non-finite in all; what the good branch sent back is not.
    assert where(look(Branches()))[:2] == ("backward", "bad")


def test_gradient_that_only_the_scale_makes_overflow_is_found_at_that_scale() -> None:
    model = nn.Sequential(linear(), Call(lambda x: x.half()), grad_times(2.0**10), Call(lambda x: x.float()))
    assert look(model, scale=1.0) is None
    found = look(model, scale=2.0**12)
    # Arrives as 2**12 and leaves as 2**22, which FP16 does not have.
    assert (found.phase, found.fqn, found.amax["grad"]) == ("backward", "2", 2.0**12)


def test_gradient_that_overflows_before_it_reaches_a_module_names_the_first_it_reaches() -> None:
    model = nn.Sequential(linear(), Call(lambda x: x.half()))
    found = look(model, scale=2.0**20, step=lambda b: model(b).float().sum())
    assert (found.phase, found.fqn, found.amax["grad"]) == ("backward", "1", INF)


def test_first_layer_is_named_by_its_parameters_gradient() -> None:
    model = nn.Sequential(linear(), nn.Identity())
    model[0].weight.register_hook(lambda grad: grad * INF)
    assert where(look(model))[:2] == ("backward", "0")


def test_infinity_behind_where_is_found_in_backward() -> None:
    # Finite in forward; the gradient of the branch that was not taken is 0 * Inf = NaN.
    inner = Call(lambda x: torch.where(x > 1e9, 1 / (x - x), x))
    model = nn.Sequential(linear(), inner, linear())
    assert where(look(model)) == ("backward", "1", "nan")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_module_is_no_hindrance_and_its_overflow_shows_in_its_parent() -> None:
    class Divide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0

    fine = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    means = fine[1].running_mean.clone()
    assert where(look(nn.Sequential(linear(), fine, Call(lambda x: x / 0), linear())))[1] == "2"
    assert torch.equal(fine[1].running_mean, means)
    bad = nn.Sequential(linear(), nn.Sequential(torch.jit.script(Divide())), linear())
    assert where(look(bad))[:2] == ("forward", "1")


def test_module_that_never_learned_its_shapes_is_no_hindrance() -> None:
    model = nn.Sequential(linear(), Call(lambda x: x * INF))
    model.unused = nn.ModuleList([nn.LazyBatchNorm1d()])
    model.forward = lambda x: model[1](model[0](x))
    assert where(look(model)) == ("forward", "1", "inf")


# --- No trace ------------------------------------------------------------------------------------


def test_probes_leave_no_hook_after_an_exception() -> None:
    model = nn.Sequential(linear(), Call(lambda x: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        look(model)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p._backward_hooks is None or not p._backward_hooks for p in model.parameters())


def test_replay_keeps_gradients_and_their_hooks_untouched() -> None:
    model = linear()
    calls = []
    model.weight.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    model.weight.grad = torch.full((4, 4), 3.0)
    kept = model.weight.grad
    look(model)
    assert model.weight.grad is kept
    assert torch.equal(kept, torch.full((4, 4), 3.0))
    assert model.bias.grad is None
    assert calls == []


def test_preserved_restores_buffers_attributes_and_random_states() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    model.tensor, model.items, model.table, model.count = torch.zeros(2), [1], {"a": 1}, 0
    kept = model.tensor
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with preserved(model):
        model(torch.randn(3, 4))
        model.eval()
        model.tensor.add_(1)
        model.tensor = torch.ones(3)
        model.items.append(2)
        model.table["b"] = 2
        model.count += 1
        model.new = 1
        model[0].running_mean = torch.ones(4)
        random.random()
        np.random.rand()
    assert model.tensor is kept
    assert kept.tolist() == [0, 0]
    assert (model.items, model.table, model.count, hasattr(model, "new")) == ([1], {"a": 1}, 0, False)
    assert model[0].running_mean.tolist() == [0] * 4
    assert model[0].running_var.tolist() == [1] * 4
    assert model[0].num_batches_tracked == 0
    assert model[0].training
    assert model[1].training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


class Counted(collections.UserDict):
    """A class of the user's, which is not protected; a dict subclass is."""


class LoudDict(dict):
    """Refuses what is written through its own methods once it is loud."""

    loud = False

    def __setitem__(self, key: Any, value: Any) -> None:
        assert not self.loud
        super().__setitem__(key, value)


Point = collections.namedtuple("Point", "x")

# What a training step may keep on its module, how it changes, and what shows the change.
STATES = {
    "nested dict": (lambda: {"a": {"n": 0}}, lambda v: v["a"].update(n=1), lambda v: v["a"]["n"]),
    "dict of lists": (lambda: {"a": [1, [2]]}, lambda v: v["a"][1].append(3), str),
    "counter": (collections.Counter, lambda v: v.update("aab"), dict),
    "default dict": (lambda: collections.defaultdict(list), lambda v: v["a"].append(1), dict),
    "ordered dict": (
        lambda: collections.OrderedDict(a=1, b=2), lambda v: v.move_to_end("a"), lambda v: list(v.items())
    ),
    "dict subclass": (lambda: LoudDict(a=1), lambda v: dict.update(v, a=2), dict),
    "set": (lambda: {1}, lambda v: v.add(2), set),
    "deque": (lambda: collections.deque([1, 2], maxlen=2), lambda v: v.append(3), lambda v: (list(v), v.maxlen)),
    "list of tensors": (lambda: [torch.zeros(2)], lambda v: v[0].add_(1), lambda v: v[0].tolist()),
    "tuple of tensors": (lambda: (torch.zeros(2),), lambda v: v[0].add_(1), lambda v: v[0].tolist()),
    "named tuple of lists": (lambda: Point([1]), lambda v: v.x.append(2), lambda v: v.x),
    "dict of tensors": (lambda: {"w": torch.zeros(2)}, lambda v: v["w"].lerp_(torch.ones(2), 0.5), str),
    "tensor with other data": (lambda: torch.zeros(2), lambda v: setattr(v, "data", torch.ones(3)), Tensor.tolist),
    "sparse tensor": (lambda: torch.eye(2).to_sparse(), lambda v: v.mul_(2), lambda v: v.to_dense().tolist()),
    "array": (lambda: np.zeros(2), lambda v: v.__setitem__(0, 1), np.ndarray.tolist),
    "list of arrays": (lambda: [np.zeros(2)], lambda v: v[0].__iadd__(1), str),
    "generator of torch": (lambda: torch.Generator().manual_seed(1), lambda v: torch.rand(1, generator=v), draw_torch),
    "generator of NumPy": (lambda: np.random.default_rng(1), lambda v: v.random(), lambda v: v.random()),
    "old generator of NumPy": (lambda: np.random.RandomState(1), lambda v: v.rand(), lambda v: v.rand()),
    "generator of Python": (lambda: random.Random(1), lambda v: v.random(), lambda v: v.random()),
    "dict of generators": (lambda: {1: np.random.default_rng(1)}, lambda v: v[1].random(), lambda v: v[1].random()),
    "module in a nested list": (
        lambda: [[nn.BatchNorm1d(4)]], lambda v: v[0][0](torch.randn(3, 4)), lambda v: v[0][0].running_var.tolist()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_preserved_puts_back_what_a_module_keeps_in(name) -> None:
    make, change, show = STATES[name]
    model, reference = linear(), make()
    model.state = kept = make()
    LoudDict.loud = True
    with preserved(model):
        change(model.state)
    LoudDict.loud = False
    assert model.state is kept
    assert show(model.state) == show(reference)
    changed = make()
    change(changed)
    # The oracle tells the two apart.
    assert show(changed) != show(make())


def stored_by_validation(value: float) -> Tensor:
    with torch.inference_mode():
        return torch.full((2,), value)


def set_in_inference(value: Tensor) -> None:
    with torch.inference_mode():
        value.fill_(7)


# Tensors that hold NaN, cannot be written by a plain copy_, or both, and how a step may change them.
TENSORS = {
    "expanded": (lambda: torch.full((1,), NAN).expand(3), lambda v: v[:1].fill_(7)),
    "expanded both ways": (lambda: torch.full((1, 2, 1), NAN).expand(3, 2, 4), lambda v: v[:1, :, :1].fill_(7)),
    "of inference mode": (lambda: stored_by_validation(NAN), set_in_inference),
    "nested": (lambda: torch.nested.nested_tensor([torch.full((2,), NAN), torch.ones(3)]), lambda v: v.mul_(0)),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.full((2,), NAN), torch.ones(3)], layout=torch.jagged),
        lambda v: v.values().fill_(7),
    ),
    "sparse": (lambda: torch.tensor([0, NAN]).to_sparse(), lambda v: v.zero_()),
    "rows": (lambda: torch.tensor([[0, NAN]]).to_sparse_csr(), lambda v: v.values().fill_(7)),
    "conjugate": (lambda: torch.tensor([complex(NAN, 1)]).conj(), lambda v: v.fill_(7)),
    **{
        str(dtype): (lambda dtype=dtype: torch.full((2,), NAN).to(dtype), lambda v: v.zero_())
        for dtype in (torch.float64, torch.bfloat16, torch.float8_e5m2, torch.complex128)
    },
}


@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse).*:UserWarning")
@pytest.mark.parametrize("name", TENSORS)
def test_preserved_writes_a_tensor_only_if_it_changed(name) -> None:
    make, change = TENSORS[name]
    model, reference = linear(), make()
    model.state = kept = make()
    version = None if kept.is_inference() else kept._version
    with preserved(model):
        model.count = 1
    assert version is None or kept._version == version
    with preserved(model):
        change(kept)
        assert bits(kept) != bits(reference)
    assert model.state is kept
    assert bits(kept) == bits(reference)


def bits(value: Tensor) -> str:
    # Printed digits: NaN prints like NaN.
    return str(value.values().tolist() if value.is_nested else value.to_dense().tolist())


class Stubborn(random.Random):
    """Takes back no state."""

    def setstate(self, state: Any) -> None:
        raise ValueError("no way back")


def test_value_that_cannot_be_put_back_keeps_no_other_from_it_and_the_replay_counts() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), overflowing())
    model.first, model.state, model.meta, model.last = [1], Stubborn(), torch.empty(2, device="meta"), [1]
    torch_state, python_state = torch.get_rng_state(), random.getstate()

    def step(batch: Tensor) -> Tensor:
        model.first.append(2)
        model.last.append(2)
        torch.rand(1)
        random.random()
        return model(batch).sum()

    with pytest.warns(RuntimeWarning, match="1 of the values that Sequential .* ValueError: no way back"):
        found = look(model, step=step)
    assert where(found) == ("forward", "1", "inf")
    assert (model.first, model.last) == ([1], [1])
    assert model[0].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


TABLES = {
    "numbers": (lambda: list(range(2_000_000)), lambda v: v.__setitem__(7, 0)),
    "words": (lambda: {str(i): i for i in range(2_000_000)}, lambda v: v.update({"7": 0})),
    "known": (lambda: set(range(2_000_000)), lambda v: v.discard(7)),
}


@pytest.mark.parametrize("name", TABLES)
def test_preserved_copies_a_large_table_and_does_not_walk_it(name) -> None:
    make, change = TABLES[name]
    model = linear()
    model.table = kept = make()
    start = time.process_time()
    with preserved(model):
        change(kept)
    # Measured 0.2 to 0.5 s; item by item it was 3.7 to 5.
    assert time.process_time() - start < 2
    assert kept == make()


class Untouchable:
    """Tells off whoever asks it for anything, also for its class."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


def test_preserved_asks_objects_of_other_classes_for_nothing() -> None:
    model = linear()
    # Past Module.__setattr__, which asks.
    vars(model).update(items=[Untouchable(), [1]], thing=Untouchable())
    with preserved(model):
        model.items[1].append(2)
    assert model.items[1] == [1]


def test_preserved_leaves_objects_of_other_classes_and_parameters_as_the_block_left_them() -> None:
    model = linear()
    model.state = Counted(a=1)
    with preserved(model):
        model.state["a"] = 2
        model.weight.data.zero_()
    assert model.state["a"] == 2
    assert not model.weight.any()


def test_replay_does_not_change_the_batch() -> None:
    model = linear()
    batch = {"x": torch.ones(1, 4), "drop": 1}

    def step(b: dict[str, Any]) -> Tensor:
        b.pop("drop")
        return model(b["x"].mul_(2)).sum()

    look(model, batch, step=step)
    assert batch["x"].tolist() == [[1.0] * 4]
    assert "drop" in batch


def test_in_place_modules_run_under_probes() -> None:
    model = nn.Sequential(linear(), nn.ReLU(inplace=True), linear(), grad_times(INF), nn.Dropout(0.1, inplace=True))
    assert where(look(model))[:2] == ("backward", "3")


def test_attention_keeps_its_self_attention_path() -> None:
    seen: list[bool] = []
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.ones(1, 3, 4, requires_grad=True)
    with Probes(model):
        # Registered after the probes' hook, so that it sees what they hand on.
        model.register_forward_pre_hook(lambda m, args: seen.append(args[0] is args[1] is args[2] and args[0] is not x))
        model(x, x, x)
    assert seen == [True]


# --- Statistics ----------------------------------------------------------------------------------

VALUES = st.lists(st.sampled_from([0.0, -1.5, 448.0, INF, -INF, NAN]), max_size=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
@settings(max_examples=25, deadline=None)
@given(values=VALUES)
def test_statistics_count_what_a_loop_counts(dtype, values) -> None:
    statistics = Statistics()
    wanted = statistics.add([torch.tensor(values, dtype=torch.float32).to(dtype)])
    statistics.read()
    found = statistics.of(wanted)
    assert found.num_positive_inf == values.count(INF)
    assert found.num_negative_inf == values.count(-INF)
    assert found.num_nan == sum(v != v for v in values)
    if found.num_nan == 0:
        assert found.amax == max(map(abs, values), default=0.0)


def test_joined_statistics_keep_a_nan_whatever_its_place() -> None:
    for order in (1, -1):
        parts = [TensorStats(amax=1.0), TensorStats(num_nan=1, amax=NAN)][::order]
        joined = TensorStats.joined(parts)
        assert joined.amax != joined.amax
        assert joined.kind == "nan"


def test_integer_sparse_and_complex_tensors_are_measured_or_left_out() -> None:
    sparse = torch.tensor([0.0, INF]).to_sparse()
    statistics = Statistics()
    wanted = statistics.add([torch.ones(2, dtype=torch.long), sparse, torch.tensor([complex(1, NAN)])])
    statistics.read()
    assert statistics.of(wanted) == TensorStats(1, 0, 1, statistics.of(wanted).amax)


def test_named_tensors_finds_tensors_in_objects_that_are_no_containers() -> None:
    class Graph:
        def __init__(self) -> None:
            self.x = torch.zeros(1)
            self.name = "g"

    assert [path for path, _ in named_tensors({"graph": Graph(), "y": (torch.zeros(1), 2)})] == ["graph.x", "y.0"]


def test_copied_containers_share_tensors_only() -> None:
    batch = {"x": [torch.ones(1)], "t": (1, {"y": torch.ones(1)})}
    copied = copy_containers(batch)
    assert copied is not batch
    assert copied["x"] is not batch["x"]
    assert copied["x"][0] is batch["x"][0]
    assert copied["t"][1] is not batch["t"][1]


def test_gradients_name_the_last_nonfinite_parameter_in_registration_order() -> None:
    model = nn.Sequential(linear(), linear(), linear())
    assert find_in_gradients(model.named_parameters()) is None
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert find_in_gradients(model.named_parameters()) is None
    model[0].weight.grad[0, 0] = NAN
    model[1].weight.grad[1] = INF
    with torch.no_grad():
        model[1].weight.fill_(2.0)
    expected = Finding("backward", "1.weight", "inf", 4, {"grad": INF, "weight": 2.0})
    assert find_in_gradients(model.named_parameters()) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("fp16", [True, False])
def test_replay_on_cuda_rewinds_its_generator_and_names_the_module(fp16) -> None:
    model = nn.Sequential(linear(), nn.Dropout(0.5), linear(), Call(lambda x: x / 0)).cuda()
    x = torch.ones(2, 4, device="cuda")
    rng = RandomState.now()
    expected = model[1](x)
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda m, i, o: seen.append((o != 0).clone()))
    before = torch.cuda.get_rng_state()
    region = torch.autocast("cuda", torch.float16) if fp16 else nullcontext()
    found = replay(
        model, lambda b: model[1](b).sum() + model(b).sum(), x, rng=rng, loss_scale=1.0, region=lambda: region
    )
    assert found.fqn == "3"
    assert torch.equal(seen[0], expected != 0)
    assert torch.equal(torch.cuda.get_rng_state(), before)


class Kept(torch.autograd.Function):
    """Identity that leaves an object in the graph, which lives as long as the graph does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: list[Any]) -> Tensor:
        ctx.token = Call(None)
        kept.append(weakref.ref(ctx.token))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def test_replay_keeps_no_activation_alive() -> None:
    kept: list[Any] = []
    model = nn.Sequential(linear(), Call(lambda x: Kept.apply(x, kept)), linear(), Call(lambda x: x / 0))
    assert where(look(model)) == ("forward", "3", "inf")
    gc.collect()
    assert [reference() for reference in kept] == [None]


class Causal(nn.Module):
    """A mask, made by a module and used up by the softmax of the model's own code."""

    def forward(self, size: int) -> Tensor:
        return torch.full((size, size), -INF).triu(1)


class MasksAndLogs(nn.Module):
    """Its own code takes the logarithm of zero, after a mask that does no harm."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.mask, self.out = linear(), Causal(), linear()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.query(x)
        hidden = torch.softmax(hidden @ hidden.T + self.mask(len(x)), -1) @ hidden
        return self.out(torch.log(hidden.relu() * 0))


def test_mask_that_was_used_up_is_not_blamed_for_minus_infinity_of_the_models_own_code() -> None:
    assert where(look(MasksAndLogs(), torch.randn(3, 4))) == ("forward", "MasksAndLogs", "inf")
