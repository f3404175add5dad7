"""What every test shares: seeds, skips by name, and a guard against leaked global state."""

import gc
import logging
import os

# Before torch is imported, and for the ranks that tests spawn too.
os.environ["OMP_NUM_THREADS"] = "1"

import warnings
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch.optim import optimizer as optimizer_hooks
from torch.overrides import _get_current_function_mode_stack

from lightning_mp.precision import notices

# The suite runs beside others on few cores; one thread also keeps reductions in one order.
torch.set_num_threads(1)

_FP8_CAPABILITY = (8, 9)


def _why_no_cuda() -> str | None:
    return None if torch.cuda.is_available() else "needs a CUDA device, and torch.cuda.is_available() is False"


@cache
def _why_no_fp8() -> str | None:
    missing = _why_no_cuda()
    if missing is not None:
        return missing
    capability = torch.cuda.get_device_capability()
    if capability < _FP8_CAPABILITY:
        return f"needs compute capability 8.9 or newer, and this device has {capability[0]}.{capability[1]}"
    return _why_no_transformer_engine()


def _why_no_transformer_engine() -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a broken build fails with OSError, RuntimeError or AttributeError too
        return f"needs Transformer Engine, whose import failed with {error!r}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = None
        if item.get_closest_marker("fp8") is not None:
            reason = _why_no_fp8()
        elif item.get_closest_marker("gpu") is not None:
            reason = _why_no_cuda()
        if reason is not None:
            # The name stands in the reason because pytest folds equal reasons into one line.
            item.add_marker(pytest.mark.skip(reason=f"{item.name}: {reason}"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_was_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process says once, each test may hear: its outcome does not hang on those before it."""
    monkeypatch.setattr(notices, "_said", set())


@pytest.fixture(autouse=True)
def _log_levels_are_restored() -> Iterator[None]:
    """Benchmarks and examples, whose ``main`` tests call, silence Lightning's log."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def _rendezvous_is_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test finds its own port: Lightning leaves the last one in the environment, and its store may still run."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"):
        monkeypatch.setenv(name, "")  # recorded as unset, so that it is unset again afterwards
        monkeypatch.delenv(name)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _global_state() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast on cpu": torch.is_autocast_enabled("cpu"),
        "autocast dtype on cpu": torch.get_autocast_dtype("cpu"),
        "autocast on cuda": torch.is_autocast_enabled("cuda"),
        "autocast dtype on cuda": torch.get_autocast_dtype("cuda"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "function modes": tuple(_get_current_function_mode_stack()),
        "hooks of all optimizers": tuple(optimizer_hooks._global_optimizer_pre_hooks),
    }


def _put_back(state: dict[str, object]) -> None:
    """Undo what settings can be undone, so that one leak fails one test and not all after it."""
    torch.set_default_dtype(state["default dtype"])
    torch.set_grad_enabled(state["grad mode"])
    for device_type in ("cpu", "cuda"):
        torch.set_autocast_enabled(device_type, state[f"autocast on {device_type}"])
        torch.set_autocast_dtype(device_type, state[f"autocast dtype on {device_type}"])
    torch.set_autocast_cache_enabled(state["autocast cache"])


@pytest.fixture(autouse=True)
def _global_state_is_restored() -> Iterator[None]:
    before = _global_state()
    yield
    if _global_state() != before:
        gc.collect()  # what belongs to an object goes with it
    after = _global_state()
    leaked = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    _put_back(before)
    assert not leaked, f"this test left global state changed (before, after): {leaked}"
