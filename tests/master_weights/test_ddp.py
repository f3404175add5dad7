"""Two gloo ranks: FP32 accumulation and reduction of 16-bit parameters' gradients."""

import contextlib
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights import MasterWeights
from tests.spawned import free_port

WORLD = 2
STEPS = 3
ALL: dict[str, bool] = {}
NO_B = {"use_b": False}


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.b = nn.Linear(32, 32)
        self.c = nn.Linear(32, 4)
        self.scale = nn.Parameter(torch.rand(32))

    def forward(self, x: Tensor, use_b: bool = True) -> Tensor:
        # FP32 activations times a 16-bit parameter: its gradient is computed in FP32.
        h = self.norm(self.a(x).relu().float()) * self.scale
        if use_b:
            h = self.b(h.bfloat16()).relu()
        return self.c(h.bfloat16())


def batch(rank: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + micro)
    return torch.randn(8, 16, generator=generator).bfloat16()


def loss_of(output: Tensor) -> Tensor:
    return output.float().square().mean()


def options_of(options: Any, rank: int) -> dict[str, bool]:
    return options[rank] if isinstance(options, tuple) else options


def reference_gradients(module: nn.Module, micros: list[Any]) -> dict[str, Tensor]:
    """Average over ranks of the FP64 sum over micro-batches of single BF16 backwards."""
    total: dict[str, Tensor] = {}
    for rank in range(WORLD):
        for micro, options in enumerate(micros):
            for param in module.parameters():
                param.grad = None
            loss_of(module(batch(rank, micro), **options_of(options, rank))).backward()
            for name, param in module.named_parameters():
                if param.grad is not None:
                    total[name] = total.get(name, 0.0) + param.grad.double().to_dense() / WORLD
    for param in module.parameters():
        param.grad = None
    return total


def bf16_twin(module: nn.Module) -> nn.Module:
    twin = Net()
    for ours, theirs in zip(twin.parameters(), module.parameters(), strict=True):
        ours.data = theirs.detach().clone()
    return twin


def check_gradients(module: nn.Module, expected: dict[str, Tensor], tolerance: float) -> None:
    for name, param in module.named_parameters():
        if name not in expected:
            assert param.grad is None, name
            continue
        assert param.grad.dtype is torch.float32
        scale = expected[name].abs().max().item() + 1e-30
        assert (param.grad.double() - expected[name]).abs().max().item() <= tolerance * scale, name


def assert_ranks_equal(tensors: list[Tensor]) -> None:
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    everywhere = [torch.empty_like(flat) for _ in range(WORLD)]
    dist.all_gather(everywhere, flat)
    assert torch.equal(everywhere[0].view(torch.int32), everywhere[1].view(torch.int32))


def run_case(
    rank: int, mode: str, micros: list[Any], *, tolerance: float, reduce_dtype: torch.dtype, **kwargs: Any
) -> None:
    module = Net(seed=rank)  # ranks start from different weights, as unseeded runs do
    masters = MasterWeights(mode, bucket_numel=600)
    masters.convert_(module)
    ddp = DistributedDataParallel(module, bucket_cap_mb=0.001, **kwargs)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    masters.attach([optimizer], ddp=ddp, reduce_dtype=reduce_dtype, accumulates=len(micros) > 1)
    masters.attach([optimizer], ddp=ddp, reduce_dtype=reduce_dtype, accumulates=len(micros) > 1)  # once more: nothing
    for _ in range(STEPS):
        expected = reference_gradients(bf16_twin(module), micros)
        for micro, options in enumerate(micros):
            is_last = micro == len(micros) - 1
            with contextlib.nullcontext() if is_last else ddp.no_sync():
                loss = loss_of(ddp(batch(rank, micro), **options_of(options, rank)))
                masters.begin_backward()
                loss.backward()
                masters.finish_backward()
        check_gradients(module, expected, tolerance)
        assert_ranks_equal([param.grad for param in module.parameters() if param.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        assert_ranks_equal([masters.value_of(param) for param in module.parameters()])
        assert_ranks_equal(list(module.parameters()))
    masters.detach()
    assert {param.dtype for param in module.parameters()} == {torch.float32}


def cases() -> list[tuple[str, list[Any], dict[str, Any]]]:
    found = []
    for view in (False, True):
        common = {"gradient_as_bucket_view": view}
        unused = {**common, "find_unused_parameters": True}
        found += [
            ("one backward", [ALL], common),
            ("three backwards", [ALL, ALL, ALL], common),
            ("unused in the last backward", [ALL, ALL, NO_B], unused),
            ("unused on one rank", [ALL, (ALL, NO_B)], unused),
            ("unused everywhere", [NO_B, NO_B], unused),
        ]
    return found


def worker(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        for mode in ("copy", "split"):
            for _, micros, kwargs in cases():
                # FP32 sums of a handful of terms: a few FP32 ulps. BF16 accumulation would be off by 2**-9.
                run_case(rank, mode, micros, tolerance=1e-6, reduce_dtype=torch.float32, **kwargs)
        # Reduced in BF16: one rounding of 2**-9 per rank's part and of the sum.
        run_case(rank, "split", [ALL, ALL], tolerance=2.0**-7, reduce_dtype=torch.bfloat16)
        check_zero_grad_between_backwards(rank)
        check_second_backward_without_zero_grad(rank)
        check_another_dtype_through_data(rank)
        for mode in ("copy", "split", "none"):
            for micros in ([ALL], [ALL, ALL, ALL]):
                check_hooks_of_others(rank, mode, micros)
                for reduce_dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-7)):
                    check_sparse(rank, mode, micros, reduce_dtype=reduce_dtype, tolerance=tolerance)
        check_hooks_of_others(rank, "copy", [ALL, (ALL, NO_B), NO_B], find_unused_parameters=True)
        check_counts_travel_only_where_asked_for(rank)
        check_refusals()
    finally:
        dist.destroy_process_group()


def attached(rank: int) -> tuple[Net, MasterWeights, DistributedDataParallel]:
    module = Net()
    masters = MasterWeights("split")
    masters.convert_(module)
    ddp = DistributedDataParallel(module)
    masters.attach([torch.optim.SGD(module.parameters(), lr=0.1)], ddp=ddp)
    return module, masters, ddp


def backward(masters: MasterWeights, ddp: DistributedDataParallel, x: Tensor) -> None:
    loss = loss_of(ddp(x))
    masters.begin_backward()
    loss.backward()
    masters.finish_backward()


def check_zero_grad_between_backwards(rank: int) -> None:
    """What a user clears must not come back from an accumulator."""
    module, masters, ddp = attached(rank)
    with ddp.no_sync():
        backward(masters, ddp, batch(rank, 7))
    assert {param.grad.dtype for param in module.parameters()} == {torch.float32}
    for param in module.parameters():
        param.grad = None
    backward(masters, ddp, batch(rank, 0))
    check_gradients(module, reference_gradients(bf16_twin(module), [ALL]), 1e-6)
    for param in module.parameters():
        param.grad.zero_()
    backward(masters, ddp, batch(rank, 0))
    check_gradients(module, reference_gradients(bf16_twin(module), [ALL]), 1e-6)


def check_second_backward_without_zero_grad(rank: int) -> None:
    module, masters, ddp = attached(rank)
    backward(masters, ddp, batch(rank, 0))
    backward(masters, ddp, batch(rank, 1))
    check_gradients(module, reference_gradients(bf16_twin(module), [ALL, ALL]), 1e-6)


def check_another_dtype_through_data(rank: int) -> None:
    """The reducer would never hear of this parameter again."""
    module, masters, ddp = attached(rank)
    module.b.weight.data = torch.full((32, 32), 0.3)
    optimizer = next(iter(masters._steps.values())).optimizer
    with torch.autocast("cpu", torch.bfloat16):
        backward(masters, ddp, batch(rank, 0))
    with pytest.raises(
        UnsupportedError, match=r"assigned memory of torch.float32 through .data.*weight.copy_\(value\)"
    ):
        optimizer.step()
    masters.detach()
    assert {param.dtype for param in module.parameters()} == {torch.float32}
    assert torch.equal(module.b.weight, torch.full((32, 32), 0.3))
    assert torch.equal(module.a.weight, Net().a.weight)


THIRD = torch.tensor(1 / 3)  # in BF16 it is off by 2**-9 of itself


class Watched(nn.Module):
    """Hooks on gradients as pruning masks and clipping inside of backward have them."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        self.handles = [
            net.a.weight.register_hook(lambda grad: grad * THIRD),
            net.b.weight.register_post_accumulate_grad_hook(self.replace),
        ]

    def add_late(self) -> None:
        self.handles += [
            self.net.scale.register_hook(lambda grad: grad * THIRD),
            self.net.b.bias.register_hook(lambda grad: grad * THIRD),
            self.net.c.weight.register_post_accumulate_grad_hook(self.write),
        ]

    @staticmethod
    def replace(param: nn.Parameter) -> None:
        param.grad = param.grad * THIRD

    @staticmethod
    def write(param: nn.Parameter) -> None:
        param.grad.mul_(THIRD)

    def forward(self, x: Tensor, **options: bool) -> Tensor:
        return self.net(x, **options)


def check_hooks_of_others(rank: int, mode: str, micros: list[Any], **kwargs: Any) -> None:
    module = Watched(Net())
    masters = MasterWeights(mode)
    masters.convert_(module)
    ddp = DistributedDataParallel(module, bucket_cap_mb=0.001, **kwargs)
    masters.attach([torch.optim.SGD(module.parameters(), lr=0.1)], ddp=ddp, accumulates=len(micros) > 1)
    module.add_late()
    twin = bf16_twin(module.net)
    twin.scale.grad_dtype = torch.float32  # the hook sees the product before it is rounded
    # What a tensor hook changes is the gradient of one backward; what the other kind changes is the sum so far.
    expected: dict[str, Tensor] = {}
    for other in range(WORLD):
        sums: dict[str, Tensor] = {}
        for micro, options in enumerate(micros):
            twin.zero_grad()
            loss_of(twin(batch(other, micro), **options_of(options, other))).backward()
            for name, param in twin.named_parameters():
                if param.grad is None:
                    continue
                grad = param.grad.double()
                if name in ("a.weight", "scale", "b.bias"):
                    grad = grad * THIRD.double()
                sums[name] = sums.get(name, 0.0) + grad
                if name in ("b.weight", "c.weight"):
                    sums[name] = sums[name] * THIRD.double()
        for name, total in sums.items():
            expected[name] = expected.get(name, 0.0) + total / WORLD
    for micro, options in enumerate(micros):
        with contextlib.nullcontext() if micro == len(micros) - 1 else ddp.no_sync():
            loss = loss_of(ddp(batch(rank, micro), **options_of(options, rank)))
            masters.begin_backward()
            loss.backward()
            masters.finish_backward()
    check_gradients(module.net, expected, 1e-6)
    assert_ranks_equal([param.grad for param in module.parameters() if param.grad is not None])
    masters.detach()
    for handle in module.handles:
        handle.remove()
    assert not any(param._post_accumulate_grad_hooks or param._backward_hooks for param in module.parameters())


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(12, 16, sparse=True)
        self.hooked = nn.Embedding(12, 16, sparse=True)
        self.kept = nn.Embedding(12, 16, sparse=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        # Indices that repeat within a batch and differ between ranks and micro-batches.
        rows = (x.float().abs() * 4).long() % 12
        found = self.table(rows) * self.hooked(rows) + self.kept(rows)
        return self.head(found.sum(1).to(self.head.weight.dtype))


def check_sparse(rank: int, mode: str, micros: list[Any], *, reduce_dtype: torch.dtype, tolerance: float) -> None:
    """Sparse gradients of 16-bit and of FP32 tables, with the rows of all ranks."""
    module = Sparse()
    masters = MasterWeights(mode)
    masters.convert_(module, keep_fp32=[module.kept])
    twin = Sparse()
    for ours, theirs in zip(twin.parameters(), module.parameters(), strict=True):
        ours.data = theirs.detach().clone()
    expected = reference_gradients(twin, micros)
    expected["hooked.weight"] = expected["hooked.weight"] * THIRD.double()
    module.hooked.weight.register_hook(lambda grad: grad * THIRD)
    ddp = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    masters.attach([optimizer], ddp=ddp, reduce_dtype=reduce_dtype, accumulates=len(micros) > 1)
    for micro in range(len(micros)):
        with contextlib.nullcontext() if micro == len(micros) - 1 else ddp.no_sync():
            backward(masters, ddp, batch(rank, micro))
    for name, param in module.named_parameters():
        assert param.grad.is_sparse == (not name.startswith("head"))
        assert param.grad.dtype is torch.float32
        found = param.grad.to_dense().double()
        assert (found - expected[name]).abs().max().item() <= tolerance * expected[name].abs().max().item(), name
    before = masters.value_of(module.table.weight).clone()
    grad = module.table.weight.grad.to_dense()
    optimizer.step()
    if mode != "none":
        assert torch.equal(masters.value_of(module.table.weight), before - 0.5 * grad)
    assert_ranks_equal(list(module.parameters()))
    masters.detach()


def check_counts_travel_only_where_asked_for(rank: int) -> None:
    """They are made on the host, which on CUDA costs a copy per bucket in the middle of backward."""
    for asks in (False, True):
        module = Net()
        masters = MasterWeights("split")
        masters.convert_(module)
        ddp = DistributedDataParallel(module, find_unused_parameters=asks)
        masters.attach([torch.optim.SGD(module.parameters(), lr=0.1)], ddp=ddp)
        reducer, sizes = masters._reducer, []
        all_reduce = reducer._all_reduce

        def note(tensor: Tensor, sizes=sizes, all_reduce=all_reduce) -> Any:
            sizes.append(tensor.numel())
            return all_reduce(tensor)

        reducer._all_reduce = note  # type: ignore[method-assign]
        backward(masters, ddp, batch(rank, 0))
        elements = sum(param.numel() for param in module.parameters())
        assert sum(sizes) == elements + asks * len(masters.masters)


def check_refusals() -> None:
    module = Net()
    masters = MasterWeights("split")
    masters.convert_(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    ddp = DistributedDataParallel(module)
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    ddp.register_comm_hook(None, default_hooks.allreduce_hook)
    with pytest.raises(UnsupportedError, match=r"DDP has a communication hook already.*use reduce_dtype='bf16'"):
        masters.attach([optimizer], ddp=ddp)
    ddp = DistributedDataParallel(module, static_graph=True)
    with pytest.raises(UnsupportedError, match=r"static_graph=True cannot accumulate.*accumulate_grad_batches=1"):
        masters.attach([optimizer], ddp=ddp, accumulates=True)
    assert "step" not in vars(optimizer)


def test_two_ranks_accumulate_and_reduce_in_fp32_and_stay_bit_identical() -> None:
    mp.spawn(worker, (free_port(),), nprocs=WORLD)
