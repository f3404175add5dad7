"""Compiled models: the numbers of the eager run, and no graph break of ours."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lightning_mp import DynamicLossScale, FP32Pin, MixedPrecision
from tests.models import Regression, batches, trainer, weights

INF = float("inf")


class Net(Regression):
    """A layer with a norm and a softmax, compiled or not."""

    def __init__(self, *, backend: Any = None, **settings: Any) -> None:
        super().__init__(optimizer=torch.optim.SGD, lr=0.05, **settings)
        block = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Softmax(-1), nn.Linear(8, 4))
        self.block = block if backend is None else torch.compile(block, backend=backend, fullgraph=True)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss([self.block(batch[0]), batch[1]])


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plugin(precision: str) -> MixedPrecision:
    return MixedPrecision(precision, loss_scale=DynamicLossScale(init_scale=8.0) if precision == "fp16" else None)


def fit(model: Any, precision: str, **settings: Any) -> MixedPrecision:
    run = trainer(plugin(precision), **settings)
    run.fit(model, batches())
    return run.precision_plugin


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_compiled_submodule_is_one_graph_and_trains_as_the_eager_one(precision) -> None:
    counter = CompileCounter()
    eager, compiled = Net(factors={3: INF}), Net(backend=counter, factors={3: INF})
    found = [fit(model, precision, gradient_clip_val=0.5) for model in (eager, compiled)]
    assert counter.frame_count == 1
    assert [(p.applied_steps, p.skipped_steps) for p in found] == [(7, 1)] * 2
    for left, right in zip(weights(eager), weights(compiled), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_compiled_lightning_module_trains_as_the_eager_one(precision) -> None:
    eager, compiled = Net(factors={3: INF}), Net(factors={3: INF})
    fit(eager, precision)
    found = fit(torch.compile(compiled, backend="eager"), precision)
    assert (found.applied_steps, found.skipped_steps) == (7, 1)
    for left, right in zip(weights(eager), weights(compiled), strict=True):
        assert torch.equal(left, right)


def test_compiled_training_step_breaks_no_more_than_without_the_plugin() -> None:
    """The step is traced once under our autocast region, with the graph that torch.autocast itself gives."""
    model, counts = Net(), []
    x, y = next(iter(batches()))
    for region in (lambda: torch.autocast("cpu", torch.bfloat16), MixedPrecision("bf16", device="cpu").forward_context):
        torch._dynamo.reset()
        counter = CompileCounter()

        def step(x: Tensor, y: Tensor, region: Any = region) -> Tensor:
            return model.loss([x, y])

        compiled = torch.compile(step, backend=counter, fullgraph=True)
        for _ in range(3):
            with region():
                compiled(x, y).backward()
        counts.append((counter.frame_count, counter.op_count))
    assert counts[0] == counts[1]
    assert counts[0][0] == 1


def test_pinned_compiled_block_is_one_graph() -> None:
    counter = CompileCounter()
    eager, compiled = Net(), Net(backend=counter)
    for model in (eager, compiled):
        fit(model, "bf16", callbacks=[FP32Pin()])
    assert counter.frame_count == 1
    for left, right in zip(weights(eager), weights(compiled), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_compiled_block_trains_through_masters(mode) -> None:
    eager, compiled = Net(), Net(backend=CompileCounter())
    for model in (eager, compiled):
        trainer(MixedPrecision("bf16", master_weights=mode)).fit(model, batches())
    for left, right in zip(weights(eager), weights(compiled), strict=True):
        assert torch.equal(left, right)


@pytest.mark.slow
def test_inductor_trains_in_bf16_to_the_eager_loss() -> None:
    losses = []
    for model in (Net(), Net(backend="inductor")):
        run = trainer(plugin("bf16"), max_epochs=3)
        run.fit(model, batches())
        x, y = next(iter(batches()))
        with torch.no_grad():
            losses.append(float(nn.functional.mse_loss(model.layer(model.block(x)), y)))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
