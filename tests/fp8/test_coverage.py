"""Which layers can run in FP8, with the reason for each of the others."""

import pytest
import torch
from torch import nn

from lightning_mp.errors import UnmatchedPatternError
from lightning_mp.fp8 import Coverage, FP8Config, FP8Engine, LayerRow
from lightning_mp.fp8.coverage import brings_transformer_engine, plan_layers

OWN_WAYS = "which is a subclass of nn.Linear with ways of its own"


class Adapter(nn.Linear):
    """Stands for a LoRA layer, which is an nn.Linear with more to do."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.odd = nn.Linear(100, 32)
        self.body = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32)])
        self.adapter = Adapter(32, 32)
        self.attention = nn.MultiheadAttention(32, 2)
        self.head = nn.Linear(32, 64)


def reasons(model: nn.Module, keep=(), **settings) -> dict[str, str]:
    planned = plan_layers(model, FP8Config(**settings), keep=keep)
    return {row.fqn: row.reason if not row.converted else "FP8" for row, _ in planned}


def test_each_layer_has_a_row_with_its_reason() -> None:
    assert reasons(Model()) == {
        "odd": "in_features=100 is not a multiple of 16 (112 would be)",
        "body.0": "FP8",
        "body.1": "FP8",
        "body.2": "FP8",
        "adapter": f"a Adapter, {OWN_WAYS}",
        "attention.out_proj": f"a NonDynamicallyQuantizableLinear, {OWN_WAYS}",
        "head": "output head: the last Linear layer (skip_output_head)",
        "attention": "nn.MultiheadAttention multiplies by its in_proj_weight itself",
    }


def test_head_that_shares_the_embeddings_weight_stays_out_and_the_last_layer_does_not() -> None:
    model = Model()
    model.head.weight = model.embedding.weight
    model.last = nn.Linear(32, 32)
    found = reasons(model)
    assert found["head"] == "output head: it shares the weight of an embedding (skip_output_head)"
    assert found["last"] == "FP8"


def test_head_runs_in_fp8_on_request() -> None:
    assert reasons(Model(), skip_output_head=False)["head"] == "FP8"


def test_include_and_exclude_take_patterns_and_classes_with_what_is_inside() -> None:
    assert reasons(Model(), exclude="body.1")["body.1"] == "excluded"
    assert reasons(Model(), exclude=[nn.ModuleList])["body.0"] == "excluded"
    found = reasons(Model(), include=["body.?"])
    assert (found["body.2"], found["odd"][:11]) == ("FP8", "in_features")
    assert reasons(Model(), include=["body"], exclude=["body.0"])["body.0"] == "excluded"


def test_layers_inside_pinned_modules_stay_out() -> None:
    model = Model()
    assert reasons(model, keep=[model.body])["body.1"] == "pinned to FP32"


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_pattern_that_matches_nothing_is_an_error(argument) -> None:
    with pytest.raises(UnmatchedPatternError, match=rf"{argument}: 'bdy.0' matches no module of Model.*body.0"):
        reasons(Model(), **{argument: ["bdy.0"]})


def test_shared_layer_has_one_row_under_its_first_name() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model.append(model[0])
    assert list(reasons(model)) == ["0", "1"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.double(), "its weight is torch.float64"),
        (lambda layer: setattr(layer, "forward", layer.forward), "its forward was replaced"),
        (lambda layer: nn.utils.spectral_norm(layer), "its weight is computed by a hook and is no parameter"),
        (lambda layer: nn.utils.parametrizations.weight_norm(layer), "subclass of nn.Linear"),
    ],
)
def test_layers_with_ways_of_their_own_stay_as_they_are(change, reason) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    change(model[0])
    assert reason in reasons(model)["0"]


def test_both_sizes_are_named_with_what_would_qualify() -> None:
    found = reasons(nn.Sequential(nn.Linear(17, 15), nn.Linear(16, 16)))["0"]
    assert "in_features=17 is not a multiple of 16 (32 would be)" in found
    assert "out_features=15 is not a multiple of 16 (16 would be)" in found


def test_lazy_layer_has_a_row_with_the_reason_until_it_has_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 16))
    assert reasons(model)["0"] == "a LazyLinear without a shape at setup (run a batch through the model before fit)"
    model(torch.randn(2, 16))
    assert reasons(model)["0"] == "FP8"


@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (16, 48)])
def test_flops_count_the_input_projection_of_attention_and_layers_do_not(kdim, vdim) -> None:
    model = nn.ModuleList([nn.MultiheadAttention(32, 2, kdim=kdim, vdim=vdim), nn.Linear(32, 64), nn.Linear(64, 32)])
    rows = [row for row, _ in plan_layers(model, FP8Config(skip_output_head=False))]
    # Multiplications per row of input: query, key, value and output of attention, and the two layers in FP8.
    attention = 32 * 32 + 32 * (kdim or 32) + 32 * (vdim or 32) + 32 * 32
    assert Coverage.of(rows) == Coverage(2, 3, 2 * 32 * 64 / (2 * 32 * 64 + attention))


def test_flops_count_recurrent_and_bilinear_layers() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(32, 32),
            "lstm": nn.LSTM(32, 512, proj_size=32),
            "gru": nn.GRU(16, 24, num_layers=2, bidirectional=True),
            "cell": nn.LSTMCell(8, 12),
            "bilinear": nn.Bilinear(5, 6, 7),
        }
    )
    planned = [row for row, _ in plan_layers(model, FP8Config(skip_output_head=False))]
    # By the formulas of torch's documentation, per step in time: gates of hidden by (input + hidden), in each
    # direction; the second layer reads both directions of the first.
    flops = {
        "linear": 32 * 32,
        "lstm": 4 * 512 * (32 + 32) + 32 * 512,
        "gru": 2 * 3 * 24 * (16 + 24) + 2 * 3 * 24 * (48 + 24),
        "cell": 4 * 12 * (8 + 12),
        "bilinear": 5 * 6 * 7,
    }
    assert {row.fqn: row.num_multiplications for row in planned} == flops
    assert Coverage.of(planned) == Coverage(1, 1, 32 * 32 / sum(flops.values()))
    assert reasons(model)["lstm"] == "LSTM: only Linear layers run in FP8"
    assert reasons(model, keep=[model["lstm"]])["lstm"] == "pinned to FP32"


def test_flops_count_the_linear_layers_of_gpt2() -> None:
    library = pytest.importorskip("transformers.pytorch_utils")
    model = nn.ModuleDict({"attention": library.Conv1D(96, 32), "head": nn.Linear(32, 64)})
    planned = [row for row, _ in plan_layers(model, FP8Config(skip_output_head=False))]
    assert Coverage.of(planned) == Coverage(1, 1, 32 * 64 / (32 * 64 + 32 * 96))
    assert reasons(model)["attention"] == "Conv1D: only Linear layers run in FP8"


def test_weight_of_a_recurrent_layer_counts_where_it_is_parametrized() -> None:
    model = nn.ModuleList([nn.Linear(16, 16), nn.utils.parametrizations.weight_norm(nn.GRU(16, 16), "weight_hh_l0")])
    rows = [row for row, _ in plan_layers(model, FP8Config(skip_output_head=False))]
    assert rows[1].num_multiplications == 3 * 16 * (16 + 16)


def test_text_says_that_convolutions_are_not_counted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16, 16))
    engine = FP8Engine(FP8Config(backend="emulated", skip_output_head=False))
    engine.convert_(model)
    assert str(engine.coverage) == "1 of 1 Linear layers, 100.0% of GEMM FLOPs without convolutions, in FP8"
    engine.revert_()


def test_coverage_counts_layers_and_multiplications() -> None:
    rows = [
        LayerRow("a", True, "FP8", 32, 64),
        LayerRow("b", False, "excluded", 32, 32),
        LayerRow("c", True, "FP8", 32, 32),
    ]
    coverage = Coverage.of(rows)
    assert coverage == Coverage(2, 3, 0.75)
    assert str(coverage) == "2 of 3 Linear layers, 75.0% of GEMM FLOPs, in FP8"
    assert Coverage.of([]) == Coverage(0, 0, 0.0)


def test_model_that_brings_transformer_engine_is_left_as_it_is() -> None:
    foreign = type("Linear", (nn.Module,), {"__module__": "transformer_engine.pytorch.module.linear"})
    model = nn.Sequential(nn.Linear(16, 16), foreign(), nn.Linear(16, 16))
    assert brings_transformer_engine(model)
    assert set(reasons(model).values()) == {"the model brings layers of Transformer Engine and is left as it is"}
    assert not brings_transformer_engine(Model())


def test_planning_changes_nothing() -> None:
    model = Model()
    before = [(type(m), set(m.__dict__)) for m in model.modules()]
    plan_layers(model, FP8Config())
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == before
    assert torch.is_grad_enabled()
