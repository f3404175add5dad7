"""What monitors log at one step does not stay in Lightning's results for the steps after it."""

import pytest
from lightning.pytorch import Callback

from lightning_mp import GradientRangeMonitor, LossScaleMonitor, MixedPrecision, OverflowMonitor
from tests.models import INF, Regression, batches, trainer


class Looks(Callback):
    """Notes what Lightning goes through at the end of each step, once the monitors had their turn."""

    def __init__(self):
        self.held = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.held.append({metric.meta.name for metric in trainer._results.values()})


@pytest.mark.parametrize(
    ("monitor", "name"),
    [
        (LossScaleMonitor(), "loss_scale"),
        (GradientRangeMonitor(every_n_steps=3), "gradient_range/flushed"),
        (OverflowMonitor(on_overflow="log"), "overflow/loss/nonfinite"),
    ],
)
def test_value_is_in_the_results_at_its_step_only_and_in_callback_metrics_for_good(monitor, name):
    looks = Looks()
    # Logged, measured and overflowed at steps 2 and 5 of 0 to 7, or 0, 3 and 6.
    run = trainer(MixedPrecision("bf16"), callbacks=[monitor, looks], log_every_n_steps=3)
    run.fit(Regression(factors={2: INF, 5: INF}), batches())
    holding = [step for step, names in enumerate(looks.held) if name in names]
    assert holding == ([0, 3, 6] if isinstance(monitor, GradientRangeMonitor) else [2, 5])
    assert name in run.callback_metrics
