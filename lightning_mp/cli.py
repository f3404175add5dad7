"""The command line: ``lightning-mp COMMAND``, the same as ``python -m lightning_mp COMMAND``."""

import argparse
import sys
from collections.abc import Sequence

import torch

from lightning_mp.__about__ import __version__
from lightning_mp.errors import LightningMPError, SettingValueError
from lightning_mp.hardware import default_device, describe_machine, read_facts

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
    if device.type == "cuda" and (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise SettingValueError(f"--device={text!r}, but this machine has {torch.cuda.device_count()} CUDA devices.")
    return device
