"""PrecisionSummary shows what the model computes in, with numbers that are counted here by hand."""

import pytest
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.plugins.precision import MixedPrecision as LightningMixedPrecision
from torch import nn

from lightning_mp import MixedPrecision, PrecisionReport, PrecisionSummary
from lightning_mp.errors import SettingTypeError, SettingValueError
from lightning_mp.precision import ManifestRow
from lightning_mp.precision.manifest import build_manifest
from lightning_mp.report.summary import describe_totals, find_misaligned, group_manifest
from tests.models import Regression, batches, trainer


class Model(Regression):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 130)) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(3))
        for parameter in (*self.blocks.parameters(), self.scale):
            parameter.requires_grad = False


def show(plugin, max_depth=1, model=None):
    summary = PrecisionSummary(max_depth)
    trainer(plugin, callbacks=[summary]).fit(model or Model(), batches())
    return summary.text.splitlines()


def row(fqn, module_class="Linear", *, num=4, param=torch.float32, compute=torch.bfloat16, **settings):
    values = {"master": "params", "pinned": False, "fp8": False, "reason": "", **settings}
    return ManifestRow(fqn, module_class, num, param, compute, None, **values)


def test_each_top_module_has_a_row_with_its_parameters_and_bytes(capsys):
    lines = show(MixedPrecision("bf16"))
    # 5 = 4 + 1; 8708 = 2 x (32 + 32 + 32 x 130 + 130), 4 bytes each.
    assert [line.split() for line in lines[2:5]] == [
        ["(the", "model", "itself)", "Model", "3", "12", "B", "FP32", "as", "its", "input", "params"],
        ["layer", "Linear", "5", "20", "B", "FP32", "BF16", "params"],
        ["blocks", "Sequential", "8,708", "34.0", "KiB", "FP32", "BF16", "params"],
    ]
    assert "Parameters: 8,716 in FP32 (34.0 KiB)" in lines
    assert "Master weights: the parameters themselves, in FP32 (8,716)" in lines
    shown = capsys.readouterr().out
    assert "8,708" in shown
    assert "as its input" in shown


@pytest.mark.parametrize(("max_depth", "num_rows"), [(0, 0), (1, 3), (2, 4), (-1, 6)])
def test_depth_says_how_many_rows_there_are(max_depth, num_rows):
    lines = show(MixedPrecision("bf16"), max_depth)
    table = [line for line in lines if line.endswith("params")]
    assert len(table) == num_rows


def test_misaligned_dimensions_are_named_with_the_padded_size():
    line = next(line for line in show(MixedPrecision("bf16")) if line.startswith("Misaligned"))
    assert "3 dimensions are no multiples of 8" in line
    assert "in_features 4 -> 8 (layer)" in line
    assert "out_features 130 -> 136 (blocks.0.1, blocks.1.1)" in line


def test_every_misaligned_dimension_is_named_however_many_there_are():
    rows = [row(f"m{i}") for i in range(5)] + [row(f"layers.{i}.fc{i % 2}") for i in range(12)] + [row("head")]
    sizes = {"m": (8, 20), "l": (12, 12), "h": (12, 16)}
    model = nn.Module()
    for found in rows:
        parent, _, name = found.fqn.rpartition(".")
        model.add_module("layers", getattr(model, "layers", nn.ModuleDict()))
        index = parent.rpartition(".")[2]
        if parent and index not in model.layers:
            model.layers[index] = nn.Module()
        owner = model.layers[index] if parent else model
        owner.add_module(name, nn.Linear(*sizes[found.fqn[0]]))
    line = describe_totals(rows, find_misaligned(model, rows), is_fp8=False)[-1]
    assert line.startswith("Misaligned: 30 dimensions are no multiples of 8")
    assert line.endswith(
        "pad: out_features 20 -> 24 (m0, m1, m2, m3, m4); in_features 12 -> 16 (6 x layers.*.fc0, 6 x layers.*.fc1, "
        "head); out_features 12 -> 16 (6 x layers.*.fc0, 6 x layers.*.fc1)"
    )


def test_fp32_products_are_never_misaligned():
    assert not any(line.startswith("Misaligned") for line in show(MixedPrecision("fp32")))


def test_fp8_wants_multiples_of_16_and_pinned_modules_none():
    model = nn.ModuleDict({"a": nn.Linear(24, 32), "b": nn.Linear(24, 32), "c": nn.Conv2d(3, 16, 3)})
    model["d"] = nn.Conv2d(16, 16, 3, groups=16)
    rows = [row("a"), row("b", compute=torch.float32, pinned=True), row("c", "Conv2d"), row("d", "Conv2d")]
    found = [(m.fqn, m.dimension, m.size, m.padded) for m in find_misaligned(model, rows, is_fp8=True)]
    assert found == [("a", "in_features", 24, 32), ("c", "in_channels", 3, 16)]
    assert [m.padded for m in find_misaligned(model, rows)] == [8]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(1, 30, 3), [("out_channels", 30, 32)]),  # not depthwise, though groups == in_channels
        (nn.Conv2d(30, 30, 3, groups=30), []),
        (nn.Conv2d(30, 60, 3, groups=30), []),
        (nn.Conv2d(48, 64, 1, groups=4), [("in_channels / groups", 12, 16)]),
        (
            nn.ConvTranspose1d(48, 80, 1, groups=4),
            [("in_channels / groups", 12, 16), ("out_channels / groups", 20, 24)],
        ),
        (nn.Conv2d(64, 32, 1, groups=4), []),
    ],
    ids=str,
)
def test_misaligned_are_the_dimensions_of_each_matrix_product(module, expected):
    rows = [row("m", type(module).__name__)]
    found = find_misaligned(nn.ModuleDict({"m": module}), rows)
    assert [(m.dimension, m.size, m.padded) for m in found] == expected


def test_totals_tell_pins_masters_and_fp8_coverage_with_reasons():
    rows = [
        row("a", num=10, param=torch.bfloat16, master="split", fp8=True),
        row("norm", "LayerNorm", num=2, compute=torch.float32, pinned=True),
        row("head", num=6, param=torch.bfloat16, master="split", reason="output head"),
    ]
    assert describe_totals(rows, [], is_fp8=True) == [
        "Parameters: 16 in BF16 (32 B), 2 in FP32 (8 B)",
        "Master weights: 16 further bits beside the BF16 parameter (16); the parameters themselves, in FP32 (2)",
        "Pinned to FP32: 1 module (norm)",
        "FP8: 1 of 2 Linear layers; not: head (output head)",
    ]
    assert describe_totals(rows, [], is_fp8=True, coverage="1 of 2 Linear layers, 40.0% of GEMM FLOPs")[-1] == (
        "FP8: 1 of 2 Linear layers, 40.0% of GEMM FLOPs; not: head (output head)"
    )


def test_summary_and_page_of_an_fp8_run_tell_the_share_of_gemm_flops(tmp_path):
    class Two(Regression):
        def __init__(self):
            super().__init__()
            self.wide = nn.Linear(32, 64)
            self.odd = nn.Linear(32, 8)

    summary, report = PrecisionSummary(), PrecisionReport(dirpath=tmp_path)
    plugin = MixedPrecision("fp8", fp8={"backend": "emulated", "skip_output_head": False})
    trainer(plugin, callbacks=[summary, report]).fit(Two(), batches())
    # By hand: 32 * 64 of 32 * 64 + 32 * 8 + 4 * 1 multiplications per row.
    line = "FP8: 1 of 3 Linear layers, 88.7% of GEMM FLOPs; not: layer ("
    assert line in summary.text
    assert line in report.path.read_text(encoding="utf-8")


def test_layers_of_gpt2_are_matrix_products():
    library = pytest.importorskip("transformers.pytorch_utils")
    model = nn.ModuleDict({"attention": library.Conv1D(30, 32)})
    rows = build_manifest(model, MixedPrecision("bf16").policy)
    assert [row.compute_dtype for row in rows] == [torch.bfloat16]
    assert [(m.dimension, m.size, m.padded) for m in find_misaligned(model, rows)] == [("outputs", 30, 32)]


def test_groups_add_up_what_is_inside():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    rows = [row("0.0", param=torch.bfloat16, master="copy"), row("0.1", compute=torch.float32, pinned=True)]
    (group,) = group_manifest(rows, model)
    assert (group.module_class, group.num_params, group.num_bytes) == ("Sequential", 8, 4 * 2 + 4 * 4)
    assert (group.param_dtypes, group.compute_dtypes, group.master) == ("BF16, FP32", "BF16, FP32", "copy, params")
    assert (group.num_pinned, group.num_modules) == (1, 2)


@pytest.mark.parametrize(
    ("plugin", "stored", "computes"),
    [(LightningMixedPrecision("bf16-mixed", "cpu"), "FP32", "BF16"), (HalfPrecision("bf16-true"), "BF16", "BF16")],
)
def test_plugins_of_lightning_are_summarized_too(plugin, stored, computes):
    line = next(line for line in show(plugin) if line.startswith("layer"))
    assert line.split()[:7] == [
        "layer",
        "Linear",
        "5",
        *("20 B" if stored == "FP32" else "10 B").split(),
        stored,
        computes,
    ]


@pytest.mark.parametrize(
    ("plugin", "place", "master"),
    [
        (HalfPrecision("bf16-true"), "nowhere: updates are rounded to 16 bits", "none"),
        (HalfPrecision("16-true"), "nowhere: updates are rounded to 16 bits", "none"),
        (DoublePrecision(), "the parameters themselves, in FP64", "params"),
        (LightningMixedPrecision("bf16-mixed", "cpu"), "the parameters themselves, in FP32", "params"),
        (None, "the parameters themselves, in FP32", "params"),
    ],
)
def test_masters_are_those_that_lightnings_plugins_have(plugin, place, master):
    lines = show(plugin, model=Regression())
    assert f"Master weights: {place} (5)" in lines
    assert next(line for line in lines if line.startswith("layer")).split()[-1] == master


def test_masters_of_a_model_of_several_dtypes_are_told_apart():
    model = Model()
    model.blocks.bfloat16()
    model.scale.data = model.scale.data.double()
    line = next(line for line in show(LightningMixedPrecision("bf16-mixed", "cpu"), model=model) if "Master" in line)
    assert line == (
        "Master weights: the parameters themselves, in FP64 (3); the parameters themselves, in FP32 (5); "
        "nowhere: updates are rounded to 16 bits (8,708)"
    )


def test_without_rich_the_table_goes_to_the_logger(monkeypatch, caplog, capsys):
    caplog.set_level("INFO")
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    lines = show(MixedPrecision("bf16"))
    assert "\n".join(lines) in caplog.text
    assert "Parameters:" not in capsys.readouterr().out


def test_modules_without_parameters_do_not_stop_the_run():
    class WithIdentity(Regression):
        def __init__(self):
            super().__init__()
            self.extra = nn.Identity()

    assert any(line.startswith("Parameters: 5") for line in show(MixedPrecision("bf16"), model=WithIdentity()))


@pytest.mark.parametrize(("value", "error"), [(-2, SettingValueError), ("1", SettingTypeError)])
def test_depth_is_checked(value, error):
    with pytest.raises(error, match="max_depth"):
        PrecisionSummary(value)
