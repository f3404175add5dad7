"""Batches and outputs of every kind: measured, or left out, and never the end of a run or a hang."""

import time
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mp import MixedPrecision, OverflowMonitor
from lightning_mp.overflow import copy_containers
from lightning_mp.overflow.statistics import Statistics, TensorStats, named_tensors
from tests.models import trainer
from tests.test_overflow import INF, NAN, Call, linear, look, where

pytestmark = [
    pytest.mark.filterwarnings("ignore:OverflowMonitor. step"),
    pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSC|Sparse CSR).*:UserWarning"),
]


# --- Tensors that are not plain ------------------------------------------------------------------

ROWS = [torch.ones(2, 4), torch.full((3, 4), 2.0)]


def padded(nested: Tensor) -> Tensor:
    return torch.nested.to_padded_tensor(nested, 0.0).flatten(0, 1)


# How to make one, with the factor in one place, and how a model makes a plain tensor of it again.
KINDS: dict[str, tuple[Any, Any]] = {
    "conjugate": (lambda k: torch.complex(torch.ones(2, 4), torch.ones(2, 4) * k).conj(), lambda x: x.imag),
    "complex": (lambda k: torch.complex(torch.ones(2, 4), torch.ones(2, 4) * k), lambda x: x.imag),
    "negative view": (lambda k: torch.complex(torch.ones(2, 4), torch.ones(2, 4) * k).conj().imag, lambda x: x + 0),
    "nested": (lambda k: torch.nested.nested_tensor([ROWS[0] * k, ROWS[1]]), padded),
    "jagged": (lambda k: torch.nested.nested_tensor([ROWS[0] * k, ROWS[1]], layout=torch.jagged), padded),
    "coo": (lambda k: (torch.eye(4) * k).to_sparse(), lambda x: x.to_dense()),
    "csr": (lambda k: (torch.eye(4) * k).to_sparse_csr(), lambda x: x.to_dense()),
    "csc": (lambda k: (torch.eye(4) * k).to_sparse_csc(), lambda x: x.to_dense()),
}


class FromKind(LightningModule):
    """Gets or makes a tensor of some kind, then goes on with a plain one, and is bad where it is asked to."""

    def __init__(self, kind: str, *, makes: bool) -> None:
        super().__init__()
        make, plain = KINDS[kind]
        self.make = Call(lambda x: make(1.0)) if makes else nn.Identity()
        self.plain, self.layer, self.bad = Call(plain), linear(), Call(lambda x, k: x * k)

    def training_step(self, batch: list[Any], batch_idx: int) -> Tensor:
        values, factor = batch
        return self.bad(self.layer(self.plain(self.make(values))), factor).float().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("probe", ["replay", "always"])
@pytest.mark.parametrize("makes", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tensor_of_any_kind_is_no_hindrance_in_batch_or_output(kind, makes, probe) -> None:
    monitor = OverflowMonitor(probe=probe)
    values = torch.ones(1) if makes else KINDS[kind][0](1.0)
    batches = DataLoader([[values, 1.0], [values, INF]], batch_size=None)
    trainer(MixedPrecision("bf16"), callbacks=[monitor]).fit(FromKind(kind, makes=makes), batches)
    assert [(e.step, e.phase, e.fqn) for e in monitor.events] == [(1, "forward", "bad")]


@pytest.mark.parametrize("probe", ["replay", "always"])
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"csc"}))
def test_item_of_any_kind_is_blamed_where_it_is_not_finite(kind, probe) -> None:
    monitor = OverflowMonitor(probe=probe)
    batches = DataLoader([[KINDS[kind][0](k), 1.0] for k in (1.0, NAN)], batch_size=None)
    trainer(MixedPrecision("bf16"), callbacks=[monitor]).fit(FromKind(kind, makes=False), batches)
    assert [(e.step, e.phase, e.fqn) for e in monitor.events] == [(1, "batch", "0")]


MEASURED = {
    # The imaginary part of a conjugate has the other sign, and so has its infinity.
    "conjugate": (
        lambda: torch.complex(torch.tensor([1.0, NAN]), torch.tensor([INF, 0.0])).conj(),
        TensorStats(0, 1, 1, NAN),
    ),
    "negative view": (lambda: torch.tensor([1j * INF]).conj().imag, TensorStats(0, 1, 0, INF)),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.tensor([1.0, INF]), torch.tensor([-INF])]),
        TensorStats(1, 1, 0, INF),
    ),
    "empty nested": (lambda: torch.nested.nested_tensor([]), TensorStats(0, 0, 0, 0.0)),
}


@pytest.mark.parametrize("kind", MEASURED)
def test_statistics_of_other_kinds_count_what_is_there(kind) -> None:
    make, expected = MEASURED[kind]
    statistics = Statistics()
    places = statistics.add([make()])
    statistics.read()
    assert str(statistics.of(places)) == str(expected)


class Opaque(Tensor):
    """A tensor class that knows few operations, as those of quantization libraries."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.isposinf, torch.isnan):
            raise NotImplementedError(f"no implementation of {func}")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_class_that_cannot_be_measured_is_left_out() -> None:
    statistics = Statistics()
    places = statistics.add([torch.ones(1).as_subclass(Opaque), torch.tensor([INF])])
    statistics.read()
    assert statistics.of(places) == TensorStats(1, 0, 0, INF)


# --- Graphs of objects ---------------------------------------------------------------------------


class Samples(torch.utils.data.Dataset[Any]):
    """Each sample refers to the data set, and it to all of them."""

    def __init__(self, num: int) -> None:
        self.samples = [Sample(self, torch.ones(4)) for _ in range(num)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> "Sample":
        return self.samples[index]


class Sample:
    def __init__(self, dataset: Samples, x: Tensor) -> None:
        self.dataset = dataset
        self.x = x


def test_each_tensor_of_a_graph_of_objects_is_found_once() -> None:
    dataset = Samples(12)
    found = named_tensors([dataset[3], dataset[4]])
    assert len(found) == len({id(tensor) for _, tensor in found}) == 12
    assert {"0.x", "1.x"} <= {path for path, _ in found}


def test_tensors_near_the_batch_are_found_in_a_graph_of_a_hundred_thousand() -> None:
    dataset = Samples(100_000)
    start = time.perf_counter()
    paths = {path for path, _ in named_tensors([dataset[k] for k in range(8)])}
    assert {f"{k}.x" for k in range(8)} <= paths
    # 20 ms here; the walk over all paths to all tensors takes hours.
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("probe", ["replay", "always"])
def test_batch_of_objects_that_refer_to_their_data_set_costs_no_more_than_a_moment(probe) -> None:
    class FromSamples(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()

        def training_step(self, batch: list[Sample], batch_idx: int) -> Tensor:
            x = torch.stack([sample.x for sample in batch])
            return self.layer(x).float().mean() / (0 if batch_idx == 1 else 1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    monitor = OverflowMonitor(probe=probe)
    batches = DataLoader(Samples(256), batch_size=8, collate_fn=list)
    start = time.perf_counter()
    trainer(MixedPrecision("bf16"), callbacks=[monitor], max_steps=3).fit(FromSamples(), batches)
    assert [(e.step, e.phase) for e in monitor.events] == [(1, "loss")]
    # 0.3 s here; 45 s before.
    assert time.perf_counter() - start < 10


def cycle() -> Any:
    value: dict[str, Any] = {"x": torch.ones(2, 4)}
    value["all"] = [value, [value]]
    return value


def test_containers_that_hold_themselves_are_copied_once_and_replayed() -> None:
    value = cycle()
    copied = copy_containers(value)
    assert copied is not value
    assert copied["all"][0] is copied
    assert copied["all"][1][0] is copied
    assert copied["x"] is value["x"]
    model = nn.Sequential(linear(), Call(lambda x: x / 0))
    assert where(look(model, value, step=lambda b: model(b["all"][0]["x"]).sum()))[:2] == ("forward", "1")
    value["x"][0, 0] = INF
    assert where(look(linear(), value, step=lambda b: (b["all"][1][0]["x"] * torch.ones(4, requires_grad=True)).sum()))


def test_containers_that_refer_to_many_others_are_copied_in_a_moment() -> None:
    samples: list[dict[str, Any]] = [{"x": torch.ones(1)} for _ in range(3000)]
    for sample in samples:
        sample["others"] = samples
    chain: list[Any] = []
    for _ in range(3000):
        chain = [chain]
    start = time.perf_counter()
    copied = copy_containers([*samples[:4], chain])
    assert copied[0] is not samples[0]
    assert copied[0]["x"] is samples[0]["x"]
    assert time.perf_counter() - start < 2


def test_part_of_a_batch_in_two_places_is_repaired_in_both() -> None:
    part = {"y": torch.full((2, 4), NAN)}
    model = linear()
    batch = {"first": part, "second": part}
    found = look(model, batch, step=lambda b: model(b["first"]["y"]).sum() + model(b["second"]["y"]).sum())
    assert where(found) == ("batch", "first.y", "nan")
