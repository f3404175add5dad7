"""The command line: ``lightning-mp COMMAND``, the same as ``python -m lightning_mp COMMAND``."""

import argparse
import importlib
import re
import sys
from collections.abc import Sequence

import torch
from torch import nn

from lightning_mp.__about__ import __version__
from lightning_mp.errors import LightningMPError, SettingValueError
from lightning_mp.hardware import default_device, describe_machine, read_facts, resolve_auto
from lightning_mp.memory import estimate_memory, format_estimate
from lightning_mp.report import build_report

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; those of the process if ``None``.

    Returns:
        The exit status: 0, or 1 where the command cannot do what it was asked. Wrong usage exits with
        2, as argparse does.
    """
    arguments = _parser().parse_args(argv)
    try:
        print(arguments.run(arguments))
    except LightningMPError as error:
        print(f"lightning-mp: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-mp", description="Mixed-precision training for PyTorch Lightning.")
    parser.add_argument("--version", action="version", version=f"lightning-mp {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    # Each command adds its own parser and sets ``run``, a function from arguments to the text shown.
    _add_doctor(commands)
    _add_plan(commands)
    _add_report(commands)
    return parser


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine can run, and why not",
        description="Say which formats and FP8 recipes this machine can run, why not, and what to do about it.",
    )
    doctor.add_argument("--device", help="device to look at, such as cuda:1 (default: the one that a Trainer picks)")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> str:
    device = default_device() if arguments.device is None else _parse_device(arguments.device)
    return describe_machine(read_facts(device))


def _parse_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise SettingValueError(
            f"--device={text!r} is not a torch device. Pass one such as cpu, cuda or cuda:1."
        ) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise SettingValueError(f"--device={text!r}: cpu, cuda and mps are supported.")
    if device.type == "cuda" and (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise SettingValueError(f"--device={text!r}, but this machine has {torch.cuda.device_count()} CUDA devices.")
    return device


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    plan = commands.add_parser(
        "plan",
        help="bytes of a run by component, before it is started",
        description="Estimate the memory of weights, masters, gradients and optimizer state, per rank.",
    )
    plan.add_argument(
        "model", help="number of parameters (7e9, 7B, 350M), or module:Class of a model that is built without arguments"
    )
    plan.add_argument(
        "--precision", default="bf16", help="as of MixedPrecision; auto: what this machine gets (default: %(default)s)"
    )
    plan.add_argument("--master-weights", default="params", help="params, copy, split or none (default: %(default)s)")
    plan.add_argument("--optimizer", default="adamw", help="adamw, adam, sgd, sgd-momentum or adamw8bit")
    plan.add_argument("--accumulate-grad-batches", type=int, default=1, metavar="N")
    plan.add_argument("--strategy", default="auto", help="auto, ddp, fsdp or fsdp2")
    plan.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks")
    plan.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> str:
    is_auto = arguments.precision == "auto"
    estimate = estimate_memory(
        _parse_model(arguments.model),
        precision=resolve_auto(default_device())[0] if is_auto else arguments.precision,
        master_weights=arguments.master_weights,
        optimizer=arguments.optimizer,
        accumulate_grad_batches=arguments.accumulate_grad_batches,
        strategy=arguments.strategy,
        world_size=arguments.world_size,
    )
    return format_estimate(estimate) + "\nActivations come on top; 16-bit compute halves those of matrix products."


def _parse_model(text: str) -> nn.Module | float:
    number = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)(e[0-9]{1,2})?([kmb]?)", text.lower())
    if number is not None:
        return float(number[1] + (number[2] or "")) * {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}[number[3]]
    path, _, name = text.partition(":")
    if not path or not name:
        raise SettingValueError(
            f"model={text!r} is neither a number of parameters nor module:Class. Pass one such as 7e9, 7B, 350M, or "
            "my_package.my_module:MyLightningModule."
        )
    return _build_on_meta(path, name, text)


def _build_on_meta(path: str, name: str, text: str) -> nn.Module:
    sys.path.insert(0, "")
    try:
        model_class = getattr(importlib.import_module(path), name)
        with torch.device("meta"):
            model = model_class()
            if hasattr(model, "configure_model"):
                model.configure_model()
    # The constructor is the user's and raises what it likes.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SettingValueError(
            f"model={text!r} could not be built without arguments: {reason}. Pass the number of parameters instead."
        ) from error
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise SettingValueError(
            f"model={text!r} gives an object of {type(model).__name__}; it must be a torch.nn.Module."
        )
    return model


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    report = commands.add_parser(
        "report",
        help="rebuild the report page of a run",
        description="Rebuild RUN/precision_report.html from the event logs of the run, also of one that was killed.",
    )
    report.add_argument("run_dir", metavar="RUN", help="directory of the event logs (.jsonl), such as the logger's")
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> str:
    return f"wrote {build_report(arguments.run_dir)}"
