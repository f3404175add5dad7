"""Operations that autocast does not cast: torch refuses 16-bit weights there, and the error leads to the fix."""

import sys
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_mp import FP32Pin
from tests.mastered import MASTERS, Net, fit


class Bilinear(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), nn.Module())
        self.inner[1].b = nn.Bilinear(4, 4, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.inner[1].b(batch[0], batch[0]).float(), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def notes_of(error: BaseException) -> str:
    return " ".join(getattr(error, "__notes__", []))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11; before, the hint is logged")
@pytest.mark.parametrize("mode", MASTERS)
def test_an_operation_that_refuses_16_bit_weights_names_its_module_and_the_pin(mode: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        fit(mode, Bilinear())
    assert "FP32Pin(modules=('inner.1.b',))" in notes_of(caught.value)
    fit(mode, Bilinear(), callbacks=[FP32Pin(modules=("inner.1.b",))])


class Sampling(Callback):
    """A forward outside of any step, as for logging samples."""

    def __init__(self, *, in_context: bool) -> None:
        self.in_context = in_context

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.in_context:
            with trainer.precision_plugin.forward_context():
                pl_module(torch.randn(2, 4))
        else:
            pl_module(torch.randn(2, 4))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11; before, the hint is logged")
def test_a_forward_in_a_hook_is_led_to_the_forward_context() -> None:
    with pytest.raises(RuntimeError) as caught:
        fit("split", callbacks=[Sampling(in_context=False)])
    assert "trainer.precision_plugin.forward_context()" in notes_of(caught.value)
    fit("split", callbacks=[Sampling(in_context=True)])


class SaysSo(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        raise RuntimeError("no such dataset column 'dtype'")


class WritesBeforeBackward(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        found = super().training_step(batch, batch_idx)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(1.0)
        return found


class ComparesWithFloats(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), torch.zeros(batch[0].shape[0]))


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (SaysSo, "dataset column"),
        (WritesBeforeBackward, "modified by an inplace operation"),
        (ComparesWithFloats, "Long or Byte, but got Float"),
    ],
)
def test_errors_that_16_bit_weights_do_not_cause_get_no_hint(cls: type[Net], text: str) -> None:
    with pytest.raises(RuntimeError, match=text) as caught:
        fit("split", cls())
    assert not notes_of(caught.value)


@pytest.mark.parametrize(
    "operation",
    [
        lambda wide, narrow: wide @ narrow,
        lambda wide, narrow: torch.lerp(wide, narrow, 0.5),
        lambda wide, narrow: nn.functional.layer_norm(wide, (4,), narrow[0], narrow[0]),
        lambda wide, narrow: wide.scatter(0, torch.tensor([[0]]), narrow[:1, :1]),
        lambda wide, narrow: nn.functional.embedding_bag(
            torch.tensor([[0, 1]]), narrow, per_sample_weights=wide[:1, :2], mode="sum"
        ),
        lambda wide, narrow: torch.linalg.slogdet(narrow),
        lambda wide, narrow: torch.linalg.cholesky(narrow),
        lambda wide, narrow: torch.cdist(narrow, narrow),
        lambda wide, narrow: torch.fft.fft(narrow),
        lambda wide, narrow: narrow.numpy(),
    ],
    ids=[
        *["matmul", "lerp", "layer_norm", "scatter", "embedding_bag"],
        *["slogdet", "cholesky", "cdist", "fft", "numpy"],
    ],
)
@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11; before, the hint is logged")
def test_each_way_of_torch_to_say_that_dtypes_differ_gets_the_hint(operation: Any) -> None:
    class Mixes(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return operation(torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bfloat16))

    with pytest.raises((RuntimeError, TypeError)) as caught:
        fit("split", Mixes())
    assert "FP32Pin(modules=" in notes_of(caught.value)


@pytest.mark.parametrize("mode", MASTERS)
def test_fp32_gradients_may_be_assigned(mode: str) -> None:
    class Assign(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for param in pl_module.parameters():
                param.grad = torch.full(param.shape, 2.0**-20)

    model, _ = fit(mode, Net(torch.optim.SGD, lr=1.0), callbacks=[Assign()], max_steps=1)
    assert torch.equal(model.head.bias, Net().head.bias - 2.0**-20)
