"""Lazily initialized modules train through masters under a real Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.mastered import LR, MASTERS, Net, Save, assert_same_weights, fit, plugin
from tests.models import batches, trainer


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.LazyLinear(16), nn.GELU(), nn.LazyLinear(16))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=LR)


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_lazy_modules_train_in_16_bits_and_split_equals_copy(settings: dict[str, Any]) -> None:
    copied, _ = fit("copy", Lazy(), **settings)
    split, _ = fit("split", Lazy(), **settings)
    assert_same_weights(split, copied)
    assert torch.bfloat16 in split.dtypes
    wide, _ = fit("params", Lazy(), **settings)
    moved = [a.detach() - b.detach() for a, b in zip(split.parameters(), wide.parameters(), strict=True)]
    # Adam moves each weight by about LR a step: 16 steps, of which rounding of the weights turns few around.
    assert max(part.abs().max().item() for part in moved) < 16 * LR


@pytest.mark.parametrize("mode", MASTERS)
def test_a_checkpoint_of_lazy_modules_resumes_bit_for_bit(mode: str, tmp_path: Path) -> None:
    whole, _ = fit(mode, Lazy(), max_epochs=4)
    fit(mode, Lazy(), max_epochs=2, callbacks=[Save(tmp_path / "half.ckpt")])
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert state["backbone.0.weight"].dtype is torch.float32
    resumed = Lazy()
    trainer(plugin(mode), max_epochs=4).fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert_same_weights(resumed, whole)
