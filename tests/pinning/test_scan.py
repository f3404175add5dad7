"""The code of a method tells what it may call, also in a branch that has not run."""

import functools
import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import softmax as other_name

from lightning_mp.pinning.scan import find_mentions, holds_any

NAMES = frozenset({"softmax", "cross_entropy"})
FUNCTIONS = {torch.softmax, Tensor.softmax, F.softmax, F.cross_entropy}

TABLE = {"plain": F.relu, "weights": F.softmax}
HARMLESS = {"plain": F.relu, "numbers": [1.0, torch.ones(2)]}
CALLS = [lambda x: x.softmax(-1)]
FIXED = functools.partial(torch.softmax, dim=-1)
OPS = types.ModuleType("ops")
OPS.weigh = Tensor.softmax


def mentions_any(cls, method, names, functions=()):
    return find_mentions(cls, method, names, functions).is_found


def helper(x):
    return F.softmax(x, -1)


def twice_removed(x):
    return helper(x)


class Own(nn.Module):
    def forward(self, x):
        return torch.softmax(x, -1)


class InBranch(nn.Module):
    def forward(self, x):
        if self.training and x.numel() > 10**9:
            return [row.softmax(-1) for row in x]
        return x


class ByHelper(nn.Module):
    def forward(self, x):
        return twice_removed(x)


class ByMethod(nn.Module):
    def forward(self, x):
        return self.score(x)

    def score(self, x):
        return (lambda y: F.cross_entropy(y, y))(x)


class ByParent(ByMethod):
    def score(self, x):
        return super().score(x)


class ByProperty(nn.Module):
    def forward(self, x):
        return self.loss

    @property
    def loss(self):
        return F.cross_entropy(self.a, self.b)


class ByStatic(nn.Module):
    def forward(self, x):
        return self.score(x)

    @staticmethod
    def score(x):
        return x.softmax(-1)


class Recursive(nn.Module):
    def forward(self, x):
        return self.forward(math.sqrt(x))


class OtherMethod(nn.Module):
    def forward(self, x):
        return x + 1

    def loss(self, x):
        return x.softmax(-1)


class ByAlias(nn.Module):
    def forward(self, x):
        return other_name(x, -1) if self.is_late else x


class ByTable(nn.Module):
    def forward(self, x):
        return TABLE["weights"](x, -1)


class ByList(nn.Module):
    def forward(self, x):
        return CALLS[0](x)


class ByPartial(nn.Module):
    def forward(self, x):
        return FIXED(x)


class ByOtherModule(nn.Module):
    def forward(self, x):
        return OPS.weigh(x, -1)


class ByDefault(nn.Module):
    def forward(self, x, weigh=torch.softmax):
        return weigh(x, -1)


class ByKeywordDefault(nn.Module):
    def forward(self, x, *, weigh=(F.relu, torch.softmax)):
        return weigh[1](x, -1)


class ByClassAttribute(nn.Module):
    weigh = staticmethod(torch.softmax)

    def forward(self, x):
        return self.weigh(x, -1)


def make_closure(weigh):
    class ByClosure(nn.Module):
        def forward(self, x):
            return weigh(x, -1)

    return ByClosure


class Harmless(nn.Module):
    weigh = staticmethod(torch.relu)

    def forward(self, x, weigh=torch.relu):
        return HARMLESS["plain"](x) + self.weigh(x)


class ByAttribute(nn.Module):
    """What it calls is known by the instance alone."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return self.compute(x)

    def compute(self, x):
        return self.act(x)


ALIASES = [
    *(ByAlias, ByTable, ByPartial, ByOtherModule, ByDefault, ByKeywordDefault, ByClassAttribute),
    make_closure(torch.softmax),
]


@pytest.mark.parametrize("cls", ALIASES)
def test_code_that_calls_a_function_by_another_name_is_found(cls):
    assert mentions_any(cls, "forward", NAMES, FUNCTIONS)
    # By its names alone it is not.
    assert not mentions_any(cls, "forward", NAMES)


@pytest.mark.parametrize("cls", [Harmless, make_closure(torch.relu)])
def test_code_that_calls_other_functions_is_not(cls):
    assert not mentions_any(cls, "forward", NAMES, FUNCTIONS)


def test_functions_in_a_table_are_read_too():
    assert mentions_any(ByList, "forward", NAMES)


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (torch.softmax, True),
        (F.softmax, True),
        (functools.partial(F.softmax, dim=-1), True),
        ({"a": torch.relu, "b": torch.softmax}, True),
        ([torch.relu, torch.softmax], True),
        (lambda x: x.softmax(-1), True),
        (twice_removed, True),
        (Own().forward, True),
        (torch.relu, False),
        (lambda x: x + 1, False),
        ([1, None, torch.ones(2), {}], False),
        (nn.Softmax(-1), False),  # a module is pinned by itself
    ],
)
def test_attribute_that_is_holds_or_calls_a_function_is_found(act, expected):
    assert "act" in find_mentions(ByAttribute, "forward", NAMES, FUNCTIONS).names
    assert holds_any(act, NAMES, FUNCTIONS) is expected


@pytest.mark.parametrize("cls", [Own, InBranch, ByHelper, ByMethod, ByParent, ByProperty, ByStatic])
def test_code_that_may_call_a_function_is_found(cls):
    assert mentions_any(cls, "forward", NAMES)


@pytest.mark.parametrize("cls", [Recursive, OtherMethod, nn.Linear, nn.TransformerEncoderLayer, nn.Sequential])
def test_code_that_cannot_is_not(cls):
    assert not mentions_any(cls, "forward", NAMES)


def test_missing_method_mentions_nothing():
    assert not mentions_any(nn.Linear, "training_step", NAMES)
