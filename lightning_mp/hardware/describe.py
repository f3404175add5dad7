"""The report about a machine, and what to do where FP8 does not run."""

from lightning_mp.hardware.facts import DeviceFacts, TransformerEngineFacts, version_numbers
from lightning_mp.hardware.support import (
    Support,
    assess_auto,
    assess_bf16,
    assess_fp8,
    assess_fp8_device,
    assess_fp16,
    assess_recipes,
    has_fp8_units,
    is_cpu_build_beside_gpu,
)

__all__ = ["describe_machine", "fp8_remedy"]

# The first drivers that run CUDA 13 and CUDA 12.8 (CUDA toolkit release notes).
_CUDA_13_DRIVER = 580
_CUDA_12_8_DRIVER = 570


def fp8_remedy(facts: DeviceFacts) -> str:
    """Say what to do to get FP8 on this machine: a command where one helps, else the alternative.

    Returns:
        One or two sentences; empty if FP8 runs.
    """
    if assess_fp8(facts).available:
        return ""
    if is_cpu_build_beside_gpu(facts):
        return f"Run: {_torch_command(facts)} && {_engine_command(version_numbers(_cuda_for(facts)))}"
    if assess_fp8_device(facts).available:
        return f"Run: {_engine_command(version_numbers(facts.torch_cuda))}"
    if has_fp8_units(facts):
        return f"Run: {_torch_command(facts)}"
    return (
        f'Use MixedPrecision("{assess_auto(facts)[0]}"), or run on Ada, Hopper or later. '
        'MixedPrecision("fp8", fp8={"backend": "emulated"}) computes the same recipe here, slowly.'
    )


def _cuda_for(facts: DeviceFacts) -> str:
    """Return the newest CUDA version that this driver runs and torch has a wheel index for."""
    driver = (version_numbers(facts.driver) or (0,))[0]
    if driver >= _CUDA_13_DRIVER:
        return "13.0"
    return "12.8" if driver >= _CUDA_12_8_DRIVER else "12.6"


def _torch_command(facts: DeviceFacts) -> str:
    index = f"https://download.pytorch.org/whl/cu{_cuda_for(facts).replace('.', '')}"
    return f"pip install --force-reinstall torch --index-url {index}"


def _engine_command(cuda: tuple[int, ...]) -> str:
    # Its PyTorch part is compiled against the installed torch, hence no build isolation. Its default
    # core library is for CUDA 12.
    core = " 'transformer-engine[core_cu13]'" if cuda >= (13,) else ""
    return f"pip install --upgrade --no-build-isolation 'lightning-mp[fp8]'{core}"


def describe_machine(facts: DeviceFacts) -> str:
    """Write what the machine can run, why not, and what to do, as aligned lines of text.

    ``lightning-mp doctor`` prints it and the error of ``precision="fp8"`` ends with it.
    """
    chosen, reason = assess_auto(facts)
    capability = facts.compute_capability
    rows = [
        ("device", facts.label),
        ("driver", facts.driver or ("unknown" if capability else "no NVIDIA driver found")),
        ("compute capability", f"{capability[0]}.{capability[1]}" if capability else "none"),
        ("PyTorch", f"{facts.torch_version}, {_build(facts)}"),
        ("Transformer Engine", _engine(facts.transformer_engine)),
        ("FP16", _verdict(assess_fp16(facts))),
        ("BF16", _verdict(assess_bf16(facts))),
        ("FP8", _verdict(assess_fp8(facts))),
        *_recipe_rows(facts),
        ('precision="auto"', f"{chosen}, because {reason}"),
    ]
    remedy = fp8_remedy(facts)
    if remedy:
        rows.append(("to get FP8", remedy))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _recipe_rows(facts: DeviceFacts) -> list[tuple[str, str]]:
    recipes = assess_recipes(facts)
    available = [name for name, support in recipes.items() if support.available]
    rows = [("FP8 recipes", ", ".join(available) or "none")]
    if available:
        rows += [(f"  {name}", _verdict(support)) for name, support in recipes.items() if not support.available]
    return rows


def _build(facts: DeviceFacts) -> str:
    if facts.torch_cuda is not None:
        return f"CUDA {facts.torch_cuda}"
    return f"ROCm {facts.torch_hip}" if facts.torch_hip is not None else "CPU build"


def _engine(engine: TransformerEngineFacts) -> str:
    if engine.error:
        return f"cannot be used: {engine.error}"
    return engine.version or "installed, version unknown"


def _verdict(support: Support) -> str:
    return f"{'yes' if support.available else 'no'}: {support.reason}"
