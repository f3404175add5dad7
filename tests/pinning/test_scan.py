"""The code of a method tells what it may call, also in a branch that has not run."""

import functools
import importlib.util
import math
import sys
import time
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


# --- Objects of the user's are not asked ---------------------------------------------------------


class DotDict(dict):
    """The usual config: a missing key is a KeyError, where hasattr expects an AttributeError."""

    def __getattr__(self, name):
        return self[name]


class Growing(dict):
    """A config that makes what it lacks, so that it has every attribute there is, and can be called."""

    def __getattr__(self, name):
        return self.setdefault(name, Growing())

    def __call__(self):
        return self


class Untouchable:
    """Whoever asks it for anything is told off, also for what Python keeps itself, such as __class__."""

    def __getattribute__(self, name):
        raise RuntimeError(name)

    def __call__(self):
        raise RuntimeError

    def __eq__(self, other):
        raise RuntimeError

    __hash__ = None


class StrangeMeta(type):
    __hash__ = None

    def __eq__(cls, other):
        raise RuntimeError


class OfStrangeClass(metaclass=StrangeMeta):
    pass


def wrapped_by_itself():
    def function(x):
        return x

    function.__wrapped__ = function
    return function


# Made in the test alone: pytest asks what it meets in a module for attributes, too.
OPAQUE = [lambda: DotDict(p=0.1), Growing, Untouchable, OfStrangeClass, wrapped_by_itself]
THING = None


class ByGlobal(nn.Module):
    def forward(self, x):
        return x * THING.p


class Elsewhere:
    __module__ = 7

    def scale(self, x):
        return x


@pytest.mark.parametrize("make", OPAQUE)
def test_objects_that_answer_in_their_own_way_are_opaque(make, monkeypatch):
    thing = make()
    assert not holds_any(thing, NAMES, FUNCTIONS)
    assert not holds_any([thing, functools.partial(thing) if callable(thing) else thing], NAMES, FUNCTIONS)
    monkeypatch.setitem(globals(), "THING", thing)
    assert not mentions_any(ByGlobal, "forward", NAMES, FUNCTIONS)
    # Beside one that is looked for.
    assert holds_any({"a": thing, "b": torch.softmax}, NAMES, FUNCTIONS)


def test_config_that_makes_what_it_lacks_stays_as_it_is():
    config = Growing()
    assert not holds_any(config, NAMES, FUNCTIONS)
    assert config == {}


def test_class_with_a_strange_module_name_is_read():
    assert not mentions_any(type("Own", (Elsewhere, nn.Module), {"forward": helper}), "scale", NAMES)
    helper_of_nowhere = types.FunctionType(helper.__code__, globals())
    helper_of_nowhere.__module__ = 7
    assert holds_any(helper_of_nowhere, NAMES, FUNCTIONS) is True


@pytest.mark.parametrize("wrap", [functools.lru_cache, torch.no_grad(), staticmethod, functools.partial])
def test_wrapped_functions_are_read(wrap):
    assert holds_any(wrap(helper), NAMES, ())
    assert holds_any(wrap(wrap(helper)) if wrap is not staticmethod else [wrap(helper)], NAMES, ())


def test_lazy_module_is_not_loaded(monkeypatch):
    spec = importlib.util.find_spec("this")  # Prints a poem once it is loaded.
    spec.loader = importlib.util.LazyLoader(spec.loader)
    lazy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "this", lazy)
    spec.loader.exec_module(lazy)
    monkeypatch.setitem(globals(), "THING", lazy)
    assert not mentions_any(ByGlobal, "forward", NAMES, FUNCTIONS)
    # Once loaded it has the class of other modules.
    assert type(lazy) is not types.ModuleType


def test_table_of_numbers_is_told_by_its_types():
    table = list(range(3_000_000))
    start = time.process_time()
    assert not holds_any(table, NAMES, FUNCTIONS)
    # Measured 0.2 s; item by item it was 3 and more.
    assert time.process_time() - start < 1.5
    assert holds_any([*table, torch.softmax], NAMES, FUNCTIONS)
