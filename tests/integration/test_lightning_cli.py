"""The plugin and the callbacks from a LightningCLI file and from the command line."""

from typing import Any

import pytest

from lightning_mp import (
    DynamicLossScale,
    FP8Config,
    FP32Pin,
    MixedPrecision,
    OverflowMonitor,
    StaticLossScale,
    UnsupportedError,
)
from tests.models import Regression, batches

pytest.importorskip("jsonargparse")

# Lightning 2.6 uses parts of jsonargparse that newer ones deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")

QUIET = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Model(Regression):
    """A regression without arguments that a file would have to name."""

    def __init__(self) -> None:
        super().__init__(factors={2: float("inf")})

    def train_dataloader(self) -> Any:
        return batches()


@pytest.fixture
def cli(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    from lightning.pytorch.cli import LightningCLI

    def make(*args: str, run: bool = True) -> Any:
        monkeypatch.setattr("sys.argv", ["run", *args])
        return LightningCLI(
            Model, run=run, save_config_callback=None, trainer_defaults=QUIET, seed_everything_default=0
        )

    return make


def write(folder, trainer: str):
    path = folder / "run.yaml"
    path.write_text(f"trainer:\n{trainer}")
    return f"--config={path}"


def test_file_with_plugin_and_callbacks_trains(cli, tmp_path) -> None:
    config = write(
        tmp_path,
        """
  callbacks:
    - class_path: lightning_mp.FP32Pin
      init_args: {pins: [norm, loss], modules: [layer]}
    - class_path: lightning_mp.OverflowMonitor
      init_args: {on_overflow: log}
  plugins:
    - class_path: lightning_mp.MixedPrecision
      init_args: {precision: fp16, loss_scale: {init_scale: 64.0, growth_interval: 3}}
""",
    )
    trainer = cli("fit", config).trainer
    plugin = trainer.precision_plugin
    assert (plugin.applied_steps, plugin.skipped_steps) == (7, 1)
    assert plugin.scaler.rule == DynamicLossScale(init_scale=64.0, growth_interval=3)
    # 64, halved in step 2, doubled after three clean steps, and two more follow.
    assert plugin.scaler.get_scale() == 64.0
    pin, monitor = trainer.callbacks[:2]
    assert isinstance(pin, FP32Pin)
    assert list(pin.reports["training_step"].modules) == ["layer"]
    assert isinstance(monitor, OverflowMonitor)
    assert [event.step for event in monitor.events] == [2]


@pytest.mark.parametrize(
    ("args", "precision", "rule"),
    [
        (["precision=16-mixed", "loss_scale=512"], "fp16", StaticLossScale(512.0)),
        (["precision=fp16", "loss_scale=dynamic"], "fp16", DynamicLossScale()),
        (["precision=fp16", "loss_scale.init_scale=8", "loss_scale.hysteresis=2"], "fp16", None),
        (["precision=bf16", "master_weights=split"], "bf16", None),
        (["precision=32", "on_nonfinite=raise"], "fp32", None),
    ],
)
def test_command_line_sets_every_kind_of_argument(cli, args, precision, rule) -> None:
    found = cli(
        "fit",
        "--trainer.plugins+=lightning_mp.MixedPrecision",
        *(f"--trainer.plugins.{arg}" for arg in args),
        "--trainer.limit_train_batches=1",
    ).trainer.precision_plugin
    assert isinstance(found, MixedPrecision)
    assert found.policy.precision == precision
    if rule is not None:
        assert found.scaler.rule == rule
    if "loss_scale.hysteresis=2" in args:
        assert found.scaler.rule == DynamicLossScale(init_scale=8.0, hysteresis=2)
    assert found.applied_steps + found.skipped_steps == 1


def test_file_asks_for_fp8(cli, tmp_path) -> None:
    config = write(
        tmp_path,
        """
  fast_dev_run: true
  plugins:
    - class_path: lightning_mp.MixedPrecision
      init_args:
        precision: fp8
        fp8: {recipe: {name: delayed, amax_history_len: 4}, backend: emulated, include: ["layer"]}
""",
    )
    with pytest.raises(UnsupportedError, match=r"layer: in_features=4 is not a multiple of 16"):
        cli("fit", config)


BY_CLASS = "{class_path: lightning_mp.%s, init_args: %s}"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{backend: emulated, recipe: block}", FP8Config("block", "emulated")),
        (BY_CLASS % ("FP8Config", "{backend: emulated, recipe: block}"), FP8Config("block", "emulated")),
        (
            BY_CLASS
            % ("FP8Config", "{recipe: {name: delayed, amax_history_len: 4}, backend: emulated, include: [a.*]}"),
            FP8Config({"name": "delayed", "amax_history_len": 4}, "emulated", include=("a.*",)),
        ),
    ],
)
def test_file_writes_fp8_settings_as_a_dict_or_by_class(cli, tmp_path, written, expected) -> None:
    plugin = f"class_path: lightning_mp.MixedPrecision\n      init_args: {{precision: fp8, fp8: {written}}}"
    config = write(tmp_path, f"  plugins:\n    - {plugin}\n")
    assert cli(config, run=False).trainer.precision_plugin.policy.fp8 == expected
    # The config that Lightning saves beside a run sets the same.
    saved = tmp_path / "saved.yaml"
    made = cli(config, run=False)
    saved.write_text(made.parser.dump(made.config, skip_none=False))
    assert cli(f"--config={saved}", run=False).trainer.precision_plugin.policy.fp8 == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{init_scale: 64.0}", DynamicLossScale(init_scale=64.0)),
        (BY_CLASS % ("DynamicLossScale", "{init_scale: 64.0, hysteresis: 2}"), DynamicLossScale(64.0, hysteresis=2)),
        ("{scale: 64.0}", StaticLossScale(64.0)),
        (BY_CLASS % ("StaticLossScale", "{scale: 64.0}"), StaticLossScale(64.0)),
        ("64", StaticLossScale(64.0)),
        ("dynamic", DynamicLossScale()),
        ("null", DynamicLossScale()),
    ],
)
def test_file_writes_a_loss_scale_in_every_form(cli, tmp_path, written, expected) -> None:
    plugin = f"class_path: lightning_mp.MixedPrecision\n      init_args: {{precision: fp16, loss_scale: {written}}}"
    config = write(tmp_path, f"  plugins:\n    - {plugin}\n")
    assert cli(config, run=False).trainer.precision_plugin.scaler.rule == expected


@pytest.mark.parametrize(
    ("init_args", "message"),
    [
        ("{precision: fp17}", "fp17"),
        ("{precision: fp16, loss_scale: {init_scal: 2.0}}", "init_scale"),
        ("{precision: bf16, loss_scale: 1024.0}", "loss_scale"),
        ("{precision: fp8, fp8: {recip: current}}", "Did you mean 'recipe'"),
        ("{precision: bf16, master_wieghts: split}", "master_wieghts"),
    ],
)
def test_mistake_in_a_file_is_named(cli, tmp_path, capsys, init_args, message) -> None:
    plugin = f"class_path: lightning_mp.MixedPrecision\n      init_args: {init_args}"
    config = write(tmp_path, f"  plugins:\n    - {plugin}\n")
    with pytest.raises((SystemExit, ValueError)) as caught:
        cli("fit", config)
    assert message in capsys.readouterr().err + str(caught.value)
