"""Every softmax, norm and loss of torch, as a module and as a function, computes in FP32 when pinned.

The oracle is the same call on the same 16-bit values in FP64. What FP32 leaves is measured in ulp of
FP32; BF16 and FP16 arithmetic miss the bound by orders of magnitude.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.loss import _Loss

from lightning_mp.pinning import Pins, PinSpec
from lightning_mp.pinning.functions import kind_of_module, names_of

# 2**-23 is FP32's ulp at one; sums over at most a few hundred terms, exp and log lose a few hundred of
# them at worst. BF16's ulp at one is 2**-7, FP16's 2**-10: both far outside.
FP32_BOUND = 2**-15
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16]
ROWS = 6


class Calls(nn.Module):
    """Calls a function that its code does not name, so that only watching finds it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def normal(*shape, scale=1.0, shift=0.0):
    return torch.randn(*shape, dtype=torch.float64) * scale + shift


def probabilities(*shape):
    return torch.rand(*shape, dtype=torch.float64) * 0.98 + 0.01


def sign(*shape):
    return torch.where(torch.rand(*shape) < 0.5, -1.0, 1.0).double()


def image():
    return normal(2, 4, 5, 5, scale=3, shift=40)


def logits():
    return normal(ROWS, 300, scale=4)


def targets():
    return torch.arange(ROWS)


SOFTMAX_FUNCTIONS = {
    "F.softmax": (lambda x: F.softmax(x, dim=-1), [logits]),
    "F.log_softmax": (lambda x: F.log_softmax(x, dim=-1), [logits]),
    "F.softmin": (lambda x: F.softmin(x, dim=-1), [logits]),
    "torch.softmax": (lambda x: torch.softmax(x, -1), [logits]),
    "torch.log_softmax": (lambda x: torch.log_softmax(x, dim=-1), [logits]),
    "torch.special.softmax": (lambda x: torch.special.softmax(x, -1), [logits]),
    "torch.special.log_softmax": (lambda x: torch.special.log_softmax(x, -1), [logits]),
    "Tensor.softmax": (lambda x: x.softmax(-1), [logits]),
    "Tensor.log_softmax": (lambda x: x.log_softmax(dim=-1), [logits]),
}
NORM_FUNCTIONS = {
    "F.layer_norm": (lambda x: F.layer_norm(x, (5,)), [image]),
    "torch.layer_norm": (lambda x: torch.layer_norm(x, (5,)), [image]),
    "F.rms_norm": (lambda x: F.rms_norm(x, (5,), eps=1e-6), [image]),
    "torch.rms_norm": (lambda x: torch.rms_norm(x, (5,), eps=1e-6), [image]),
    "F.group_norm": (lambda x: F.group_norm(x, 2), [image]),
    "torch.group_norm": (lambda x: torch.group_norm(x, 2), [image]),
    "F.batch_norm": (lambda x: F.batch_norm(x, None, None, training=True), [image]),
    "F.instance_norm": (lambda x: F.instance_norm(x), [image]),
    "F.local_response_norm": (lambda x: F.local_response_norm(x, 2), [image]),
    "torch.native_layer_norm": (lambda x: torch.native_layer_norm(x, (5,), None, None, 1e-5)[0], [image]),
}
LOSS_FUNCTIONS = {
    "binary_cross_entropy": (F.binary_cross_entropy, [lambda: probabilities(ROWS), lambda: probabilities(ROWS)]),
    "binary_cross_entropy_with_logits": (
        F.binary_cross_entropy_with_logits,
        [lambda: normal(ROWS), lambda: probabilities(ROWS)],
    ),
    "cosine_embedding_loss": (
        F.cosine_embedding_loss,
        [lambda: normal(ROWS, 64), lambda: normal(ROWS, 64), lambda: sign(ROWS)],
    ),
    "cross_entropy": (F.cross_entropy, [logits, targets]),
    "ctc_loss": (
        lambda x: F.ctc_loss(x, torch.ones(1, 2, dtype=torch.long, device=x.device), (ROWS,), (2,)),
        [lambda: F.log_softmax(normal(ROWS, 1, 9, scale=4), -1)],
    ),
    "gaussian_nll_loss": (
        F.gaussian_nll_loss,
        [lambda: normal(ROWS), lambda: normal(ROWS), lambda: probabilities(ROWS)],
    ),
    "hinge_embedding_loss": (F.hinge_embedding_loss, [lambda: normal(ROWS), lambda: sign(ROWS)]),
    "huber_loss": (F.huber_loss, [lambda: normal(ROWS), lambda: normal(ROWS)]),
    "kl_div": (
        lambda x, y: F.kl_div(x, y, reduction="batchmean"),
        [lambda: F.log_softmax(logits(), -1), lambda: F.softmax(logits(), -1)],
    ),
    "l1_loss": (F.l1_loss, [logits, logits]),
    "linear_cross_entropy": (
        getattr(F, "linear_cross_entropy", None),
        [lambda: normal(ROWS, 64), lambda: normal(40, 64), targets],
    ),
    "margin_ranking_loss": (
        F.margin_ranking_loss,
        [lambda: normal(ROWS), lambda: normal(ROWS), lambda: sign(ROWS)],
    ),
    "mse_loss": (F.mse_loss, [logits, logits]),
    "multi_margin_loss": (F.multi_margin_loss, [logits, targets]),
    "multilabel_margin_loss": (
        F.multilabel_margin_loss,
        [lambda: normal(ROWS, 9), lambda: torch.tensor([[1, -1, 0, 0, 0, 0, 0, 0, 0]] * ROWS)],
    ),
    "multilabel_soft_margin_loss": (
        F.multilabel_soft_margin_loss,
        [lambda: normal(ROWS, 9), lambda: (torch.rand(ROWS, 9) < 0.5).double()],
    ),
    "nll_loss": (F.nll_loss, [lambda: F.log_softmax(logits(), -1), targets]),
    "poisson_nll_loss": (F.poisson_nll_loss, [lambda: normal(ROWS), lambda: probabilities(ROWS)]),
    "smooth_l1_loss": (F.smooth_l1_loss, [logits, logits]),
    "soft_margin_loss": (F.soft_margin_loss, [lambda: normal(ROWS, 9), lambda: sign(ROWS, 9)]),
    "triplet_margin_loss": (F.triplet_margin_loss, [lambda: normal(ROWS, 64)] * 3),
    "triplet_margin_with_distance_loss": (F.triplet_margin_with_distance_loss, [lambda: normal(ROWS, 64)] * 3),
}
FUNCTIONS = {
    **SOFTMAX_FUNCTIONS,
    **NORM_FUNCTIONS,
    **{f"F.{name}": call for name, call in LOSS_FUNCTIONS.items() if call[0] is not None},
}
MODULES = {
    "Softmax": (lambda: nn.Softmax(-1), [logits]),
    "LogSoftmax": (lambda: nn.LogSoftmax(-1), [logits]),
    "Softmin": (lambda: nn.Softmin(-1), [logits]),
    "Softmax2d": (nn.Softmax2d, [image]),
    "LayerNorm": (lambda: nn.LayerNorm(5), [image]),
    "RMSNorm": (lambda: nn.RMSNorm(5, eps=1e-6), [image]),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), [image]),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), [image]),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), [image]),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), [image]),
    "CrossEntropyLoss": (lambda: nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 300)), [logits, targets]),
    "BCELoss": (nn.BCELoss, LOSS_FUNCTIONS["binary_cross_entropy"][1]),
    "MSELoss": (nn.MSELoss, [logits, logits]),
    "KLDivLoss": (lambda: nn.KLDivLoss(reduction="batchmean"), LOSS_FUNCTIONS["kl_div"][1]),
    "TripletMarginLoss": (nn.TripletMarginLoss, LOSS_FUNCTIONS["triplet_margin_loss"][1]),
    "AdaptiveLogSoftmaxWithLoss": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(32, 20, [8]),
        [lambda: normal(ROWS, 32), lambda: torch.arange(ROWS)],
    ),
}


def narrow(args, dtype, device="cpu"):
    return [a.to(device, dtype) if a.is_floating_point() else a.to(device) for a in args]


def first(result):
    """The tensor to compare: AdaptiveLogSoftmaxWithLoss returns a pair of output and loss."""
    return result[0] if isinstance(result, tuple) else result


def assert_fp32(result, reference):
    result = first(result)
    assert result.dtype is torch.float32
    reference = first(reference).to(result.device)
    scale = reference.abs().amax().clamp_min(1e-3)
    assert ((result.double() - reference) / scale).abs().amax() < FP32_BOUND


def check_function(name, dtype, autocast, device):
    function, makers = FUNCTIONS[name]
    args = narrow([make() for make in makers], dtype, device)
    reference = function(*(a.double() if a.is_floating_point() else a for a in args))
    model = Calls(function)
    pins = Pins(PinSpec())
    pins.apply_(model)
    with torch.autocast(device, dtype, enabled=autocast):
        with pins.watch():
            watched = model(*args)
        result = model(*args)
    assert_fp32(watched, reference)
    assert_fp32(result, reference)


def check_module(name, dtype, autocast, device):
    make, makers = MODULES[name]
    module = make().to(device)
    args = narrow([make_arg() for make_arg in makers], dtype, device)
    with torch.no_grad():
        reference = module.double()(*(a.double() if a.is_floating_point() else a for a in args))
    module.float()
    pins = Pins(PinSpec())
    pins.apply_(module)
    with torch.autocast(device, dtype, enabled=autocast):
        assert_fp32(module(*args), reference)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_pinned_function_agrees_with_float64_to_fp32_accuracy(name, dtype, autocast):
    check_function(name, dtype, autocast, "cpu")


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", MODULES)
def test_pinned_module_agrees_with_float64_to_fp32_accuracy(name, dtype, autocast):
    check_module(name, dtype, autocast, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
def test_pins_agree_with_float64_to_fp32_accuracy_on_cuda(dtype, autocast):
    # In one loop, so that a machine without CUDA prints four reasons and not two hundred.
    for check, names in ((check_function, FUNCTIONS), (check_module, MODULES)):
        for name in names:
            check(name, dtype, autocast, "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_pinned_gumbel_softmax_has_rows_that_sum_to_one_in_fp32(device):
    # Its noise is random, so the invariant is the oracle: BF16 rows of 300 miss one by about 1e-3.
    model = Calls(lambda x: F.gumbel_softmax(x, dim=-1))
    pins = Pins(PinSpec())
    pins.apply_(model)
    with pins.watch():
        result = model(logits().to(device, torch.bfloat16))
    assert (result.double().sum(-1) - 1).abs().amax() < 2**-20


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("name", "make", "shape"),
    [
        # 4096 equal scores: each weight is 2**-12 and the row sums to one exactly in FP32.
        ("long softmax row", lambda: nn.Softmax(-1), lambda: normal(2, 4096, scale=1e-3)),
        # Mean 100, deviation 1: squares near 1e4 leave BF16 (ulp 64 there) no digit of the variance.
        ("layer norm of a large mean", lambda: nn.LayerNorm(512), lambda: normal(4, 512, shift=100)),
        ("cross entropy over 50k classes", nn.CrossEntropyLoss, lambda: normal(2, 50_000, scale=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pin_is_exact_where_sixteen_bits_visibly_fail(name, make, shape, dtype, device):
    x = shape().to(device, dtype)
    rest = [torch.arange(2, device=device)] if "classes" in name else []
    reference = make().to(device).double()(x.double(), *rest)
    unpinned = make().to(device, dtype)(x, *rest)
    pinned = make().to(device)
    pins = Pins(PinSpec())
    pins.apply_(pinned)
    error = (pinned(x, *rest).double() - reference).abs().amax()
    # 2**-9 relative is what rounding a result to BF16 alone costs; FP32 is 2**14 times finer.
    assert error / reference.abs().amax() < FP32_BOUND / 4
    assert error < (unpinned.double() - reference).abs().amax() / 64


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
def test_gradient_through_a_pin_is_the_float64_gradient_rounded_once(dtype):
    x = normal(4, 300, scale=4).to(dtype)
    wide = x.double().requires_grad_()
    F.cross_entropy(F.layer_norm(wide, (300,)), torch.arange(4)).backward()
    x.requires_grad_()
    model = nn.Sequential(nn.LayerNorm(300))
    pins = Pins(PinSpec())
    pins.apply_(model)
    nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
    # One rounding to 16 bits is at most half an ulp, a relative 2**-8 in BF16; 1e-7 is FP16's subnormal ulp.
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2**-8 if dtype is torch.bfloat16 else 2**-11, atol=1e-7)
    assert x.grad.dtype is dtype


def test_every_loss_class_of_torch_is_pinned():
    classes = [
        c for _, c in inspect.getmembers(nn, inspect.isclass) if issubclass(c, nn.Module) and "Loss" in c.__name__
    ]
    assert len(classes) >= 20
    for cls in classes:
        assert issubclass(cls, (_Loss, nn.AdaptiveLogSoftmaxWithLoss)), cls
        assert kind_of_module(object.__new__(cls)) == "loss"


def test_every_norm_class_of_torch_is_pinned():
    classes = [
        c for _, c in inspect.getmembers(nn, inspect.isclass) if issubclass(c, nn.Module) and "Norm" in c.__name__
    ]
    assert len(classes) >= 15
    for cls in [*classes, nn.CrossMapLRN2d]:
        assert kind_of_module(object.__new__(cls)) == "norm", cls


def test_every_softmax_class_of_torch_is_pinned():
    classes = [
        c for _, c in inspect.getmembers(nn, inspect.isclass) if "Softm" in c.__name__ and "Loss" not in c.__name__
    ]
    assert {kind_of_module(object.__new__(cls)) for cls in classes} == {"softmax"}
    assert len(classes) == 4


def test_every_such_function_of_torch_is_pinned():
    # Oracle: the names that torch itself exports. lp_normalize-like helpers are no norm layers.
    exported = {name for name, f in vars(F).items() if callable(f) and not name.startswith("_")}
    wanted = {n for n in exported if n.endswith(("_loss", "softmax", "softmin", "cross_entropy", "kl_div", "_norm"))}
    wanted |= {"binary_cross_entropy_with_logits"}
    # In torch.nn.functional by import, and no norm layer.
    wanted -= {"layer_norm_", "Optional"}
    pinned = {name for kind in ("softmax", "norm", "loss") for name in names_of(kind)}
    assert wanted <= pinned, wanted - pinned


@pytest.mark.parametrize("output", ["float32", "input"])
def test_output_has_the_dtype_that_was_asked_for(output):
    model = nn.Sequential(nn.LayerNorm(8), nn.Softmax(-1), Calls(lambda x: F.rms_norm(x, (8,))))
    pins = Pins(PinSpec(output=output))
    pins.apply_(model)
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    with pins.watch():
        result = model(x)
    assert result.dtype is (torch.float32 if output == "float32" else torch.bfloat16)


def test_loss_stays_fp32_where_outputs_have_the_input_dtype():
    # 70000 is beyond FP16's 65504.
    model = nn.Sequential(nn.MSELoss(reduction="sum"))
    pins = Pins(PinSpec(output="input"))
    pins.apply_(model)
    loss = model[0](torch.full((7,), 100.0, dtype=torch.float16), torch.zeros(7, dtype=torch.float16))
    assert loss.dtype is torch.float32
    assert loss.item() == 70_000


@pytest.mark.parametrize("output", ["float32", "input"])
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_that_the_caller_wrote_is_the_dtype_of_the_result(asked, output):
    def calls(x):
        return F.softmax(x, -1, dtype=asked), torch.softmax(x, -1, asked), x.softmax(-1, dtype=asked)

    model = Calls(calls)
    pins = Pins(PinSpec(output=output))
    pins.apply_(model)
    x = torch.randn(2, 300).bfloat16()
    with pins.watch():
        results = model(x)
    expected = x.double().softmax(-1)
    for result in (*results, *model(x)):
        assert result.dtype is asked
        torch.testing.assert_close(result.double(), expected, rtol=2 * torch.finfo(asked).eps + 1e-6, atol=0)


def test_out_tensor_is_written():
    model = Calls(lambda x, out: torch.softmax(x, -1, out=out))
    pins = Pins(PinSpec())
    pins.apply_(model)
    x, out = torch.randn(2, 300, dtype=torch.bfloat16), torch.zeros(2, 300, dtype=torch.bfloat16)
    with pins.watch():
        result = model(x, out)
    assert result is out
    assert torch.equal(out, torch.softmax(x.float(), -1).bfloat16())


@pytest.mark.parametrize("positional", [True, False])
def test_running_statistics_in_sixteen_bits_are_updated(positional):
    mean, var = torch.zeros(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)

    def call(x):
        if positional:
            return F.batch_norm(x, mean, var, training=True)
        return F.batch_norm(x, running_mean=mean, running_var=var, training=True)

    model = Calls(call)
    pins = Pins(PinSpec())
    pins.apply_(model)
    x = torch.randn(8, 4, dtype=torch.bfloat16) + 3
    with pins.watch():
        model(x)
    # Momentum 0.1 from zero: a tenth of the batch mean, in BF16.
    assert torch.equal(mean, (0.1 * x.float().mean(0)).bfloat16())


def test_float64_stays_float64():
    model = nn.Sequential(nn.LayerNorm(8)).double()
    pins = Pins(PinSpec())
    pins.apply_(model)
    assert model(torch.randn(2, 8, dtype=torch.float64)).dtype is torch.float64


@pytest.mark.gpu
def test_pinned_bce_loss_trains_under_cuda_autocast():
    model = nn.Sequential(nn.Linear(8, 1), nn.Sigmoid()).cuda()
    loss = nn.BCELoss()
    x, y = torch.randn(4, 8, device="cuda"), torch.rand(4, 1, device="cuda")
    with torch.autocast("cuda", torch.float16), pytest.raises(RuntimeError, match="unsafe to autocast"):
        loss(model(x), y)
    pins = Pins(PinSpec())
    pins.apply_(loss)
    with torch.autocast("cuda", torch.float16):
        loss(model(x), y).backward()
    assert model[0].weight.grad.abs().sum() > 0
