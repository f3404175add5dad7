"""Who is blamed where several calls use the same parameter or argument, and where the data or a side branch is bad."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_mp import MixedPrecision, OverflowMonitor
from lightning_mp.overflow import OverflowEvent, describe_event
from tests.models import trainer
from tests.test_overflow import INF, NAN, Call, grad_times, linear, look, where

pytestmark = pytest.mark.filterwarnings("ignore:OverflowMonitor. step")

HUGE = 3e38  # twice this is Inf in FP32


# --- What several calls use ----------------------------------------------------------------------


class Tied(nn.Module):
    """Embedding and head with one weight around something bad."""

    def __init__(self, bad: nn.Module | None = None) -> None:
        super().__init__()
        self.emb, self.low, self.bad, self.up = nn.Embedding(4, 4), linear(), bad or grad_times(NAN), linear()
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.bad(self.low(self.emb(torch.arange(4))))))


class TiedByHand(Tied):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.up(self.bad(self.low(self.emb(torch.arange(4))))), self.emb.weight)


class Recurrent(nn.Module):
    """A cell that is called before and after something bad."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.bad, self.head = linear(), grad_times(NAN), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.bad(self.cell(x)).tanh()))


class Unrolled(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.cell(x).tanh()
        return self.head(self.cell(self.bad(x)))


class Checkpointed(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda h: self.cell(self.bad(self.cell(h))), x, use_reentrant=False))


class SharedBlock(nn.Module):
    """A block of several layers, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.bad = nn.Sequential(linear(), nn.LayerNorm(4), linear()), grad_times(NAN)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.bad(self.block(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [Tied, TiedByHand, Recurrent, Unrolled, Checkpointed, SharedBlock])
def test_layer_that_shares_a_parameter_is_not_blamed_for_a_gradient_born_between_its_uses(make, dtype) -> None:
    model = make()

    def step(batch: Tensor) -> Tensor:
        # autocast keeps one cast of a weight for all its uses, so that these meet before the weight.
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            return model(batch).float().sum()

    assert where(look(model, step=step)) == ("backward", "bad", "nan")


def test_shared_layer_that_overflows_is_named_with_the_numbers_of_the_call_that_does() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.stem = nn.Linear(4, 4, bias=False), linear()
            nn.init.constant_(self.shared.weight, 1e-10)

        def forward(self, x: Tensor) -> Tensor:
            # This call alone gives the weight a gradient of Inf; what goes out and on is finite in both.
            return self.shared(torch.full((2, 4), HUGE)).sum() * 1e-3 + self.shared(self.stem(x)).sum()

    model = Twice()
    found = look(model, step=lambda b: model(b), scale=1e4)
    assert where(found) == ("backward", "shared", "inf")
    assert found.amax["input"] == pytest.approx(HUGE)
    assert found.amax["grad"] == pytest.approx(10.0)  # 1e4 * 1e-3


def test_embedding_that_overflows_by_itself_is_named_and_not_the_head_that_shares_its_weight() -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, x: Tensor) -> Tensor:
            # The gradients of the two rows of one token add up to 2 * HUGE.
            return self.emb(torch.zeros(2, dtype=torch.long)).sum() + self.head(x).sum() * 1e-30

    model = Repeats()
    assert where(look(model, step=lambda b: model(b), scale=HUGE)) == ("backward", "emb", "inf")


class Fitted(LightningModule):
    """Trains a module on its sum."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch).float().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("probe", ["replay", "always"])
@pytest.mark.parametrize("make", [Tied, Recurrent, lambda: Heads("dict", ("bad", "good"), by_name=False)])
def test_monitor_blames_no_layer_for_what_it_shares(make, probe) -> None:
    monitor = OverflowMonitor(probe=probe)
    batches = DataLoader([torch.ones(2, 4)], batch_size=None)
    trainer(MixedPrecision("bf16"), callbacks=[monitor]).fit(Fitted(make()), batches)
    (event,) = monitor.events
    assert (event.phase, event.fqn.removeprefix("net.").partition(".")[0]) == ("backward", "bad")


@dataclass
class State:
    x: Any


HANDED = {
    "dict": lambda h: ({"x": h},),
    "list": lambda h: ([h],),
    "nested": lambda h: ([({"x": h}, 1)],),
    "dataclass": lambda h: (State(h),),
    "object in a list": lambda h: ([State([h])],),
}


def unpack(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = value.x if isinstance(value, State) else value["x"] if isinstance(value, dict) else value[0]
    return value


class Head(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, linear()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.out(self.inner(unpack([*args, *kwargs.values()][0])))


class Heads(nn.Module):
    def __init__(self, handed: str, order: tuple[str, ...], *, by_name: bool) -> None:
        super().__init__()
        self.stem, self.good, self.bad = linear(), Head(nn.Identity()), Head(grad_times(NAN))
        self.handed, self.order, self.by_name = HANDED[handed], order, by_name

    def forward(self, x: Tensor) -> Tensor:
        (arg,) = self.handed(self.stem(x))
        heads = {name: getattr(self, name) for name in self.order}
        return sum(head(state=arg) if self.by_name else head(arg) for head in heads.values())


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("order", [("good", "bad"), ("bad", "good")])
@pytest.mark.parametrize("handed", HANDED)
def test_sibling_that_is_handed_the_same_container_is_not_blamed(handed, order, by_name) -> None:
    assert where(look(Heads(handed, order, by_name=by_name))) == ("backward", "bad.inner", "nan")


def test_module_whose_own_code_overflows_for_an_argument_in_a_container_is_named() -> None:
    class Own(nn.Module):
        def forward(self, state: dict[str, Tensor]) -> Tensor:
            return torch.where(state["x"] > 1e9, 1 / (state["x"] - state["x"]), state["x"])

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.own, self.head = linear(), Own(), linear()

        def forward(self, x: Tensor) -> Tensor:
            state = {"x": self.stem(x)}
            return self.head(self.own(state)) + self.head(state["x"])

    assert where(look(Outer())) == ("backward", "own", "nan")


# --- A batch that is not finite ------------------------------------------------------------------


class Saturates(nn.Module):
    """A layer of torch, or of the user's own, whose output something makes finite again."""

    def __init__(self, layer: nn.Module, squash: Any) -> None:
        super().__init__()
        self.layer, self.squash, self.head = layer, squash, linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.squash(self.layer(x)))


class Own(nn.Module):
    """Saturates within itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).tanh()


SATURATING = {
    "function": lambda: Saturates(linear(), torch.tanh),
    "module": lambda: Saturates(linear(), nn.Sigmoid()),
    "own code": lambda: Saturates(Own(), torch.clone),
    "convolution": lambda: Saturates(
        nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 1), nn.Flatten()), torch.tanh
    ),
}


@pytest.mark.parametrize("probe", ["replay", "always"])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("saturates", SATURATING)
def test_item_of_the_batch_is_blamed_though_its_layer_saturates(saturates, value, probe) -> None:
    x = torch.ones(2, 4)
    x[0, 1] = value
    monitor = OverflowMonitor(probe=probe)
    batches = DataLoader([x], batch_size=None)
    trainer(MixedPrecision("bf16"), callbacks=[monitor]).fit(Fitted(SATURATING[saturates]()), batches)
    (event,) = monitor.events
    assert (event.phase, event.fqn) == ("batch", "batch")


def test_saturated_item_is_blamed_though_a_module_after_it_goes_wrong() -> None:
    # The clamp of the model's own code makes a finite value of Inf, and that is what the module cannot take.
    model = nn.Sequential(Call(lambda x: torch.log(5.0 - x)), linear())
    x = torch.ones(2, 4)
    assert look(model, {"x": x}, step=lambda b: model(b["x"].clamp(max=9.0)).sum()) is None
    x[0, 1] = INF
    assert where(look(model, {"x": x}, step=lambda b: model(b["x"].clamp(max=9.0)).sum())) == ("batch", "x", "inf")


def test_module_that_overflows_by_itself_is_named_though_the_batch_is_not_finite() -> None:
    model = nn.Sequential(linear(), Call(torch.tanh), grad_times(NAN), linear())
    batch = {"x": torch.ones(2, 4), "unused": torch.full((3,), INF)}
    assert where(look(model, batch, step=lambda b: model(b["x"]).sum())) == ("backward", "2", "nan")


def test_layer_whose_gradient_is_spoilt_by_its_own_infinite_output_is_named_for_the_forward() -> None:
    # 7e4 is Inf in FP16: the output is Inf, tanh makes it 1, and its gradient of zero times Inf is NaN.
    model = Saturates(nn.Linear(4, 4), torch.tanh)
    found = look(model, torch.full((2, 4), 7e4), fp16=True)
    assert (found.phase, found.fqn) == ("forward", "layer")
    assert found.amax["input"] == 7e4


# --- Values beside the loss ----------------------------------------------------------------------


class Beside(nn.Module):
    """A student, and a module that is infinite whose values go to the loss or to a log only."""

    def __init__(self, how: str, depth: int = 0) -> None:
        super().__init__()
        self.student, self.how = linear(), how
        self.teacher: nn.Module = nn.Sequential(linear(), Call(lambda x: x.float() * INF))
        for _ in range(depth):
            self.teacher = nn.Sequential(self.teacher)

    def teach(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                return self.teacher(x)
        return self.teacher(x).detach()


HOW = ["no_grad", "detach"]


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("how", HOW)
def test_statistic_that_is_only_logged_is_not_blamed_for_a_loss_that_divides_by_zero(how, depth) -> None:
    model, logged = Beside(how, depth), []

    def step(x: Tensor) -> Tensor:
        logged.append(model.teach(x).mean())
        return model.student(x).sum() / 0

    assert where(look(model, step=step))[:2] == ("loss", "loss")


@pytest.mark.parametrize("how", HOW)
def test_teacher_whose_values_are_the_target_is_blamed(how) -> None:
    model = Beside(how)
    found = look(model, step=lambda x: F.mse_loss(model.student(x), model.teach(x)))
    assert where(found)[:2] == ("forward", "teacher.1")


@pytest.mark.parametrize("how", HOW)
def test_teacher_is_told_from_a_statistic_beside_it(how) -> None:
    class Both(Beside):
        def __init__(self) -> None:
            super().__init__(how)
            self.statistic = Call(lambda x: x * INF)

    model = Both()

    def step(x: Tensor) -> Tensor:
        model.statistic(x.detach())
        return F.mse_loss(model.student(x), model.teach(x))

    assert where(look(model, step=step))[:2] == ("forward", "teacher.1")


@pytest.mark.parametrize(("reaches", "phase", "fqn"), [(False, "loss", "loss"), (True, "forward", "Beside")])
def test_code_that_hands_a_teacher_infinity_is_blamed_only_if_the_teacher_matters(reaches, phase, fqn) -> None:
    model = Beside("no_grad")
    model.teacher = linear()

    def step(x: Tensor) -> Tensor:
        y = model.teach(x * INF)
        return F.mse_loss(model.student(x), y) if reaches else model.student(x).sum() / 0

    assert where(look(model, step=step))[:2] == (phase, fqn)


# --- Logarithms of zero --------------------------------------------------------------------------


class LogOfZero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x.float() * torch.tensor([1e4, 1.0, 1.0, 1.0]), -1).log()


LOSSES = {
    "NLLLoss": nn.NLLLoss(),
    "nll_loss": F.nll_loss,
    "KLDivLoss": nn.KLDivLoss(reduction="batchmean"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_module_that_took_the_logarithm_of_zero_is_named_and_not_the_loss(loss) -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.logs, self.criterion = linear(), LogOfZero(), LOSSES[loss]

    model = Scores()
    nn.init.eye_(model.stem.weight)
    target = torch.tensor([1, 2]) if "l_l" in loss.lower() or "NLL" in loss else torch.full((2, 4), 0.25)
    found = look(model, step=lambda x: model.criterion(model.logs(model.stem(x)), target))
    assert where(found) == ("forward", "logs", "inf")


def test_masked_scores_of_the_true_class_are_no_contradiction_in_the_sentence_about_the_loss() -> None:
    model = nn.Sequential(linear(), Call(lambda x: x.masked_fill(torch.eye(2, 4) > 0, -INF)), nn.CrossEntropyLoss())
    found = look(model, step=lambda x: model[2](model[1](model[0](x)), torch.arange(2)))
    assert where(found)[:2] == ("loss", "loss")
    said = describe_event(OverflowEvent(0, 0, 0, loss_scale=1.0, calibrating=False, **vars(found)))
    assert "the loss is Inf (" in said
    assert "finite" not in said
    alone = look(linear(), step=lambda x: x.sum() / 0)
    said = describe_event(OverflowEvent(0, 0, 0, loss_scale=1.0, calibrating=False, **vars(alone)))
    assert "while all activations are finite" in said
