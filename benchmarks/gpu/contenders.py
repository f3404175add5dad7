"""Who competes: Lightning's own precisions, plain loops of torchao and Transformer Engine, and ours.

Each trains with AdamW without clipping (Lightning refuses it beside fused FP16), fused unless its name says otherwise.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_mp import (
    FP8Monitor,
    GradientRangeMonitor,
    LossScaleMonitor,
    MixedPrecision,
    OverflowMonitor,
    PrecisionReport,
    PrecisionSummary,
)

REFERENCE = "Lightning bf16-mixed"
BASELINE = "Lightning 32-true"
DEFAULT_SAMPLING = 100  # steps between samples of GradientRangeMonitor and FP8Monitor


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Args:
        name: As the tables call it.
        kind: ``lightning``, ``ours``, ``torchao`` or ``te``.
        precision: Lightning's name, ours, or the recipe of a plain loop.
        format: Whose GEMM ceiling it is held against: ``fp32``, ``tf32``, ``fp16``, ``bf16`` or ``fp8``.
        core: Whether it runs where only the most important ones do.
        sample_every: Steps between the samples of the monitors; 0 for no monitors.
    """

    name: str
    kind: str
    precision: str
    format: str
    core: bool = False
    master_weights: str = "params"
    recipe: str = ""
    compile: bool = False
    fused: bool = True
    sample_every: int = 0


def _ours(name: str, precision: str, masters: str = "params", recipe: str = "", **settings: Any) -> Contender:
    return Contender(f"ours {name}", "ours", precision, precision, master_weights=masters, recipe=recipe, **settings)


CONTENDERS = (
    Contender(REFERENCE, "lightning", "bf16-mixed", "bf16", core=True),
    Contender(BASELINE, "lightning", "32-true", "fp32", core=True),
    Contender("Lightning 32-true, TF32", "lightning", "32-true", "tf32", core=True),
    Contender("Lightning 16-mixed", "lightning", "16-mixed", "fp16", core=True),
    Contender("Lightning bf16-true", "lightning", "bf16-true", "bf16"),
    Contender("Lightning transformer-engine", "lightning", "transformer-engine", "fp8", core=True),
    _ours("bf16 split", "bf16", "split", core=True),
    _ours("fp16 copy", "fp16", "copy", core=True),
    _ours("fp8 current split", "fp8", "split", "current", core=True),
    Contender("Transformer Engine loop, current", "te", "current", "fp8"),
    _ours("fp8 current params", "fp8", "params", "current"),
    _ours("bf16 params", "bf16"),
    _ours("bf16 copy", "bf16", "copy"),
    _ours("fp16 params", "fp16"),
    Contender("Transformer Engine loop, delayed", "te", "delayed", "fp8"),
    _ours("fp8 delayed params", "fp8", "params", "delayed"),
    _ours("fp8 delayed split", "fp8", "split", "delayed"),
    _ours("fp8 block params", "fp8", "params", "block"),
    _ours("fp8 block split", "fp8", "split", "block"),
    _ours("bf16 split, monitors", "bf16", "split", sample_every=DEFAULT_SAMPLING),
    _ours("bf16 split, monitors sample", "bf16", "split", sample_every=1),
    _ours("fp8 current split, monitors", "fp8", "split", "current", sample_every=DEFAULT_SAMPLING),
    _ours("fp8 current split, monitors sample", "fp8", "split", "current", sample_every=1),
    Contender("Lightning bf16-mixed, compiled", "lightning", "bf16-mixed", "bf16", compile=True),
    _ours("bf16 split, compiled", "bf16", "split", compile=True),
    _ours("fp8 current split, compiled", "fp8", "split", "current", compile=True),
    Contender("torchao tensorwise, compiled", "torchao", "tensorwise", "fp8", compile=True),
    Contender("torchao rowwise, compiled", "torchao", "rowwise", "fp8", compile=True),
    Contender("torchao tensorwise", "torchao", "tensorwise", "fp8"),
    Contender("torchao rowwise", "torchao", "rowwise", "fp8"),
    Contender("Lightning bf16-mixed, AdamW not fused", "lightning", "bf16-mixed", "bf16", fused=False),
    _ours("bf16 split, AdamW not fused", "bf16", "split", fused=False),
)


def why_not(contender: Contender, device: torch.device) -> str:
    """Return what this machine lacks for a contender; empty if it is worth trying."""
    is_cuda = device.type == "cuda"
    if contender.format == "tf32" and not is_cuda:
        return "TF32 is a mode of CUDA's FP32 products"
    if contender.kind == "te" or contender.precision == "transformer-engine":
        return _import_error("transformer_engine.pytorch") if is_cuda else "Transformer Engine needs a CUDA device"
    if contender.kind == "torchao":
        return _import_error("torchao.float8")
    if contender.kind == "ours" and contender.precision == "fp8" and is_cuda:
        return _import_error("transformer_engine.pytorch")
    return ""


def _import_error(name: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    except Exception as error:  # a broken build fails with OSError, RuntimeError or AttributeError too
        return f"import {name}: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def trainer_settings(contender: Contender, device: torch.device, folder: str) -> dict[str, Any]:
    """Return what a Trainer gets for a contender of Lightning's or ours."""
    if contender.kind == "lightning":
        return {"precision": contender.precision, "callbacks": []}
    fp8 = None
    if contender.precision == "fp8":
        backend = "transformer_engine" if device.type == "cuda" else "emulated"
        fp8 = {"recipe": contender.recipe, "backend": backend}
    plugin = MixedPrecision(contender.precision, master_weights=contender.master_weights, fp8=fp8)
    return {"plugins": [plugin], "callbacks": monitors(contender, folder) if contender.sample_every else []}


def monitors(contender: Contender, folder: str) -> list[Callback]:
    """Return all monitors."""
    every = contender.sample_every
    found = [
        OverflowMonitor(dirpath=folder),
        LossScaleMonitor(dirpath=folder),
        GradientRangeMonitor(every, dirpath=folder),
        PrecisionSummary(),
        PrecisionReport(dirpath=folder),
    ]
    return [*found, FP8Monitor(every, dirpath=folder)] if contender.precision == "fp8" else found


def convert_for_loop(contender: Contender, net: nn.Module, device: torch.device) -> Any:
    """Convert a model for a plain loop, in place, the output head left out; return the recipe's region, if any."""
    return _to_torchao(contender, net, device) if contender.kind == "torchao" else _to_library(contender, net)


def _is_eligible(name: str, layer: nn.Module) -> bool:
    fits = isinstance(layer, nn.Linear) and layer.in_features % 16 == 0 and layer.out_features % 16 == 0
    return fits and not name.endswith("head")


def _to_torchao(contender: Contender, net: nn.Module, device: torch.device) -> None:
    from dataclasses import replace

    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(contender.precision)
    if device.type != "cuda":
        config = replace(config, emulate=True)
    convert_to_float8_training(net, config=config, module_filter_fn=lambda layer, name: _is_eligible(name, layer))


def _to_library(contender: Contender, net: nn.Module) -> Any:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as library

    for path, layer in list(net.named_modules()):
        if not _is_eligible(path, layer):
            continue
        swapped = te.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                getattr(swapped, name).copy_(parameter)
        parent, _, child = path.rpartition(".")
        setattr(net.get_submodule(parent), child, swapped)
    recipes = {"current": library.Float8CurrentScaling, "delayed": library.DelayedScaling}
    recipe = recipes[contender.precision]()
    return lambda: te.autocast(enabled=True, recipe=recipe)
