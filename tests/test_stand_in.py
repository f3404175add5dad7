"""A stand-in passes for the class behind it wherever Python asks, and nobody is told that it was made."""

import abc
import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from lightning_mp.stand_in import InFront, class_behind, stand_in


class Front(InFront):
    def forward(self, *args):
        return "in front"


class AnotherFront(InFront):
    pass


def stand_in_for(cls, front=Front):
    return stand_in(cls, front, cls, namespace={})


MADE = []


class Meta(type):
    def __new__(cls, name, bases, namespace, *, kind):
        MADE.append((name, kind))
        return super().__new__(cls, name, bases, namespace)

    def __init__(cls, name, bases, namespace, *, kind):
        super().__init__(name, bases, namespace)


class WithMetaclass(nn.Module, metaclass=Meta, kind="own"):
    pass


class Abstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def work(self): ...


class Concrete(Abstract):
    def work(self): ...


class OtherConcrete(Abstract):
    def work(self): ...


class WithArguments(nn.Module):
    def __new__(cls, size, *, module):
        made = super().__new__(cls)
        made.given = (size, module)
        return made

    def __init__(self, size, *, module):
        super().__init__()


CLASSES = [nn.LayerNorm, nn.Module, WithMetaclass, Concrete, WithArguments]


@pytest.mark.parametrize("cls", CLASSES)
def test_stand_in_equals_its_class_from_both_sides_and_in_every_lookup(cls):
    ours, another = stand_in_for(cls), stand_in_for(cls)
    assert ours is not cls
    assert ours == cls
    assert cls == ours
    assert ours == another
    assert (ours != cls, cls != ours, ours != another) == (False, False, False)
    assert ours in (cls,)
    assert cls in [ours]
    assert ours in {cls}
    assert {cls: 1}[ours] == {ours: 1}[cls] == 1
    assert ours != nn.ReLU
    assert nn.ReLU != ours
    assert ours != cls.__name__
    assert class_behind(stand_in_for(ours, AnotherFront)) is cls
    assert stand_in_for(ours, AnotherFront) == cls


@pytest.mark.parametrize("cls", CLASSES)
def test_stand_in_has_the_instances_and_subclasses_of_its_class(cls):
    ours, sub = stand_in_for(cls), type.__new__(type(cls), "Sub", (cls,), {})
    assert issubclass(cls, ours)
    assert issubclass(ours, cls)
    assert issubclass(sub, ours)
    assert not issubclass(nn.ReLU, ours) or cls is nn.Module
    module = nn.Module()
    object.__setattr__(module, "__class__", cls)
    assert isinstance(module, ours)
    assert not isinstance(nn.Parameter(torch.ones(1)), ours)


def test_abc_answers_as_before_beside_its_stand_in():
    # An ABC asks its subclasses, a stand-in for it among them, and keeps what they said.
    ours = stand_in_for(Abstract), stand_in_for(Concrete)
    for _ in range(2):
        assert isinstance(Concrete(), Abstract)
        assert isinstance(Concrete(), ours)
        assert issubclass(ours[1], Abstract)
        assert not isinstance(nn.ReLU(), Abstract)
        assert not isinstance(nn.ReLU(), ours)
        assert not isinstance(OtherConcrete(), Concrete)
        assert not isinstance(OtherConcrete(), ours[1])
    with pytest.raises(TypeError, match="abstract"):
        ours[0]()


def test_single_dispatch_finds_what_was_registered_for_the_class():
    @functools.singledispatch
    def name(module):
        return "other"

    name.register(nn.LayerNorm, lambda module: "norm")
    ours = nn.LayerNorm(2)
    object.__setattr__(ours, "__class__", stand_in_for(nn.LayerNorm))
    assert [name(ours), name(nn.LayerNorm(2)), name(nn.ReLU())] == ["norm", "norm", "other"]


def test_stand_in_builds_instances_of_its_class():
    made = stand_in_for(WithArguments)(3, module="any name")
    assert type(made) is WithArguments
    assert made.given == (3, "any name")
    assert type(stand_in_for(nn.LayerNorm)(4)) is nn.LayerNorm
    bare = stand_in_for(nn.LayerNorm)
    assert type(bare.__new__(bare)) is nn.LayerNorm


def test_making_a_stand_in_runs_neither_init_subclass_nor_a_metaclass():
    seen = []

    class Registered(nn.Module):
        def __init_subclass__(cls, *, kind, **kwargs):
            super().__init_subclass__(**kwargs)
            seen.append((cls.__name__, kind))

    class Block(Registered, kind="own"):
        pass

    ours = stand_in_for(Block)
    stand_in_for(WithMetaclass)
    assert seen == [("Block", "own")]
    assert MADE == [("WithMetaclass", "own")]

    # What others derive meanwhile is the user's business as without us.
    class Derived(ours, kind="derived"):
        pass

    assert seen[1:] == [("Derived", "derived")]


def test_class_derived_from_a_stand_in_is_itself():
    ours = stand_in_for(nn.LayerNorm)
    derived = type("Derived", (ours,), {})
    assert derived != nn.LayerNorm
    assert derived != ours
    assert derived == derived
    assert derived in {derived, nn.LayerNorm}
    assert len({derived, nn.LayerNorm}) == 2
    assert type(derived(4)) is derived
    assert isinstance(derived(4), nn.LayerNorm)
    assert not isinstance(nn.LayerNorm(4), derived)


def test_usual_deepcopy_of_a_user_makes_an_instance_of_the_class():
    class Copied(nn.Linear):
        def __deepcopy__(self, memo):
            cls = self.__class__
            made = cls.__new__(cls)
            made.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return made

    layer = Copied(2, 2)
    object.__setattr__(layer, "__class__", stand_in_for(Copied))
    twin = copy.deepcopy(layer)
    assert type(twin) is Copied
    assert torch.equal(twin.weight, layer.weight)


def test_look_up_in_an_unpickled_table_of_classes_finds_the_class():
    assert pickle.loads(pickle.dumps({nn.LayerNorm: 1}))[stand_in_for(nn.LayerNorm)] == 1
