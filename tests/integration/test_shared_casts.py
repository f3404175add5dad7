"""Forwards of one training_step share the casts of its weights, unless the step writes weights."""

import functools
import logging
import re
from collections import OrderedDict
from types import MethodType, SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mp import MixedPrecision
from lightning_mp.precision.weight_writes import may_write_weights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def write(weight: Tensor) -> None:
    weight.add_(1.0)


class Perturbation:
    """An object of the user's that changes weights, as of adversarial weight perturbation."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def attack(self) -> None:
        self.weight.add_(1.0)


class Writes(LightningModule):
    """Runs its layer, writes 1 more into its weight, and runs it again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 2, bias=False)
        self.perturbation = Perturbation(self.net.weight)
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        before = self.net(x)
        with torch.no_grad():
            self.change()
        after = self.net(x)
        self.found.append((x, after.detach(), self.net.weight.detach().clone()))
        return (before + after).float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.0)


class InPlace(Writes):
    def change(self) -> None:
        self.net.weight.add_(1.0)


class PastAutograd(Writes):
    def change(self) -> None:
        self.net.weight.data += 1.0


class NewMemory(Writes):
    def change(self) -> None:
        self.net.weight.data = self.net.weight + 1.0


class Loads(Writes):
    def change(self) -> None:
        self.net.load_state_dict({"weight": self.net.weight + 1.0})


class OverParameters(Writes):
    def change(self) -> None:
        for p in self.net.parameters():
            p += 1.0


class InFunction(Writes):
    def change(self) -> None:
        write(self.net.weight)


class InObject(Writes):
    def change(self) -> None:
        self.perturbation.attack()


class LaterBranch(Writes):
    """Writes from its third step on, as a perturbation after a warm-up does, past the version of the tensor."""

    def change(self) -> None:
        if len(self.found) > 1:
            self.net.weight.data.add_(1.0)


class Shift(nn.Module):
    """An algorithm as a module, which writes past the version of the tensor."""

    def __init__(self, net: nn.Linear) -> None:
        super().__init__()
        self.net = net

    def forward(self) -> None:
        self.add()

    def add(self) -> None:
        self.net.weight.data.add_(1.0)


class Tool:
    """An object of the user's that may hold another one."""

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner

    def run(self, net: nn.Linear) -> None:
        if self.inner is not None:
            self.inner.run(net)
        else:
            net.weight.data += 1.0


TOOL = Tool()


class ShiftCallback(Callback):
    def shift(self, net: nn.Linear) -> None:
        net.weight.data = net.weight + 1.0


class InModule(Writes):
    def __init__(self) -> None:
        super().__init__()
        self.shift = Shift(self.net)

    def change(self) -> None:
        self.shift()


class InMethodOfModule(InModule):
    def change(self) -> None:
        shift = self.shift
        shift.add()


class InNestedObject(Writes):
    def __init__(self) -> None:
        super().__init__()
        self.tool = Tool(SimpleNamespace(run=Tool().run))

    def change(self) -> None:
        self.tool.run(self.net)


class InContainer(Writes):
    def __init__(self) -> None:
        super().__init__()
        self.tools = OrderedDict(first=[Tool()])

    def change(self) -> None:
        for tool in self.tools["first"]:
            tool.run(self.net)


class InGlobalObject(Writes):
    def change(self) -> None:
        TOOL.run(self.net)


class InHook(Writes):
    def __init__(self) -> None:
        super().__init__()
        self.is_due = False
        tool = Tool()

        def write_if_due(module: nn.Module, args: Any) -> None:
            if self.is_due:
                tool.run(module)
                self.is_due = False

        self.net.register_forward_pre_hook(write_if_due)

    def change(self) -> None:
        self.is_due = True


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data += 1.0
        return super().forward(x)


class InForward(Writes):
    def __init__(self) -> None:
        super().__init__()
        self.net = Noisy(8, 2, bias=False)

    def change(self) -> None:
        pass


class InCallback(Writes):
    def configure_callbacks(self) -> list[Callback]:
        return [ShiftCallback()]

    def change(self) -> None:
        for callback in self.trainer.callbacks:
            if isinstance(callback, ShiftCallback):
                callback.shift(self.net)


class ByName(Writes):
    def change(self) -> None:
        getattr(self, "_".join(["change", "weight"]))()

    def change_weight(self) -> None:
        self.net.weight.data += 1.0


class Bound:
    """A decorator that is a descriptor and cannot be called itself."""

    def __init__(self, function: Any) -> None:
        functools.update_wrapper(self, function)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else MethodType(self.__wrapped__, instance)


class Described(PastAutograd):
    training_step = Bound(PastAutograd.training_step)


class OnInstance(Writes):
    def __init__(self) -> None:
        super().__init__()
        self.training_step = MethodType(PastAutograd.training_step, self)
        self.change = MethodType(PastAutograd.change, self)


PAST_VERSIONS = [
    ByName,
    Described,
    OnInstance,
    InModule,
    InMethodOfModule,
    InNestedObject,
    InContainer,
    InGlobalObject,
    InHook,
    InForward,
    InCallback,
]


class Unnamed(Writes):
    """Writes by an operator, which leaves no name in the code."""

    def change(self) -> None:
        weight = self.net.weight
        weight += 1.0


def assert_last_forward_used_the_weight(model: Writes, dtype: torch.dtype, *, steps: range) -> None:
    # What autocast does, by hand: both operands rounded to 16 bits, one product.
    for step in steps:
        x, found, weight = model.found[step]
        assert torch.equal(found, F.linear(x.to(dtype), weight.to(dtype)))


def train(model: LightningModule, precision: str) -> None:
    trainer = Trainer(
        plugins=[MixedPrecision(precision)],
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader([torch.full((8,), 0.5)] * 4, batch_size=1))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "cls",
    [InPlace, PastAutograd, NewMemory, Loads, OverParameters, InFunction, InObject, LaterBranch, *PAST_VERSIONS],
)
def test_weight_written_in_a_step_is_what_its_next_forward_uses(cls, precision, caplog) -> None:
    model = cls()
    with caplog.at_level(logging.INFO):
        train(model, precision)
    assert_last_forward_used_the_weight(model, DTYPES[precision], steps=range(4))
    assert "wrote weights" not in caplog.text


def test_frozen_teacher_from_inference_mode_is_no_obstacle() -> None:
    class Student(OnlyReads):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 2, bias=False)
            with torch.inference_mode():
                self.teacher = nn.Linear(8, 2).requires_grad_(False)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            with torch.no_grad():
                target = self.teacher(batch)
            return F.mse_loss(self.net(batch), target)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    model = Student()
    before = model.net.weight.detach().clone()
    train(model, "bf16")
    assert not torch.equal(model.net.weight, before)


def test_write_without_a_name_is_said_and_used_from_the_next_step_on(caplog) -> None:
    model = Unnamed()
    with caplog.at_level(logging.INFO):
        train(model, "bf16")
    assert_last_forward_used_the_weight(model, torch.bfloat16, steps=range(1, 4))
    assert caplog.text.count("training_step wrote weights between its forwards") == 1


class Alternates(LightningModule):
    """Manual optimization: two optimizer steps in one training_step, and a lookup that scales its own rows."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.table = nn.Embedding(4, 8, max_norm=0.1)
        self.net = nn.Linear(8, 2)

    def training_step(self, x: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            rows = self.table(torch.tensor([0, 1]))
            self.manual_backward((self.net(x).sum() + self.net(rows.detach()).sum()).float())
            optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def test_optimizer_steps_and_max_norm_are_no_writes_of_the_step(caplog) -> None:
    model = Alternates()
    with caplog.at_level(logging.INFO):
        train(model, "bf16")
    assert not may_write_weights(model)
    assert "wrote weights" not in caplog.text


class OnlyReads(LightningModule):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self.net(batch)
        loss = 0.0
        for _ in range(3):
            loss += F.mse_loss(self.net(batch.requires_grad_()), target)
        self.log("loss", loss)
        return loss


class Named(nn.Linear):
    """Calls Python's own modules, whose code says ``data`` too: weakref and re."""

    kept: ClassVar[WeakValueDictionary[str, nn.Module]] = WeakValueDictionary()

    def forward(self, x: Tensor) -> Tensor:
        self.kept[re.sub("a", "b", "a")] = self
        return super().forward(x)


def test_code_that_only_reads_weights_is_not_taken_for_a_writer() -> None:
    assert not may_write_weights(OnlyReads())
    with_names = OnlyReads()
    with_names.net = nn.Sequential(Named(8, 8), nn.Transformer(8, 2, 1, 1, 8, batch_first=True))
    assert not may_write_weights(with_names)
    assert all(may_write_weights(cls()) for cls in (InPlace, PastAutograd, Loads, OverParameters, InFunction, InObject))
