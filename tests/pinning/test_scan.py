"""The code of a method tells what it may call, also in a branch that has not run."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mp.pinning.scan import mentions_any

NAMES = frozenset({"softmax", "cross_entropy"})


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


@pytest.mark.parametrize("cls", [Own, InBranch, ByHelper, ByMethod, ByParent, ByProperty, ByStatic])
def test_code_that_may_call_a_function_is_found(cls):
    assert mentions_any(cls, "forward", NAMES)


@pytest.mark.parametrize("cls", [Recursive, OtherMethod, nn.Linear, nn.TransformerEncoderLayer, nn.Sequential])
def test_code_that_cannot_is_not(cls):
    assert not mentions_any(cls, "forward", NAMES)


def test_missing_method_mentions_nothing():
    assert not mentions_any(nn.Linear, "training_step", NAMES)
