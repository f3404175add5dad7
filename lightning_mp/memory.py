"""How many bytes a training run keeps per rank, by component, before it is run."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_mp.errors import SettingTypeError, SettingValueError, UnsupportedError
from lightning_mp.selection import is_normalization

__all__ = ["MemoryEstimate", "estimate_memory", "format_estimate"]

MasterWeightsMode: TypeAlias = Literal["params", "copy", "split", "none"]
Strategy: TypeAlias = Literal["auto", "ddp", "fsdp", "fsdp2"]

_PRECISIONS = ("fp32", "fp16", "bf16", "fp8")
_ALIASES = {
    "32": "fp32",
    "32-true": "fp32",
    "16": "fp16",
    "16-mixed": "fp16",
    "bf16-mixed": "bf16",
    "fp8-mixed": "fp8",
    "transformer-engine": "fp8",
}
_MODES = ("params", "copy", "split", "none")
_STRATEGIES = ("auto", "ddp", "fsdp", "fsdp2")
# FP32 values that the optimizer keeps for each trainable parameter.
_STATES_PER_PARAM = {"adamw": 2, "adam": 2, "sgd": 0, "sgd-momentum": 1, "adamw8bit": 2}
_MASTER_BYTES = {"params": 0, "copy": 4, "split": 2, "none": 0}
_CAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# torchao's 8-bit states (0.15): one FP32 scale per 256 values and a table of 256 FP32 values per
# tensor; tensors under 4096 values or not divisible by 256 keep FP32 states.
_8BIT_BLOCK = 256
_8BIT_TABLE_BYTES = 256 * 4
_8BIT_MIN_NUMEL = 4096
# FP8 products need both dimensions of a weight to be multiples of 16, and the weight in both
# layouts: rows for the forward product, columns for the gradient of the input.
_FP8_MULTIPLE = 16
_FP8_BYTES = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank that live between two training steps, just before gradients are cleared.

    Args:
        weights: The module's parameters.
        masters: FP32 copies, or the further 16 bits of ``"split"``.
        gradients: Gradients of trainable parameters.
        optimizer_state: What the optimizer keeps.
        fp8_weights: Cached FP8 weights, in both layouts.
        communication: DDP's buckets.
        num_params: Parameters of the whole model, over which ``bytes_per_param`` divides.
    """

    weights: int
    masters: int
    gradients: int
    optimizer_state: int
    fp8_weights: int
    communication: int
    num_params: int

    @property
    def total(self) -> int:
        """Sum of all components, in bytes per rank."""
        return sum(getattr(self, name) for name in _COMPONENTS)

    @property
    def bytes_per_param(self) -> float:
        """``total`` divided by the parameters of the whole model; zero for a model without any."""
        return self.total / self.num_params if self.num_params else 0.0


_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_COMPONENTS = tuple(field.name for field in fields(MemoryEstimate) if field.name != "num_params")


@dataclass(frozen=True)
class _Tensor:
    """What of one parameter decides its bytes."""

    numel: int
    bytes_fp32: int  # its bytes where weights are not cast
    is_cast: bool
    is_trainable: bool
    is_fp8: bool
    is_whole: bool  # a real tensor rather than a count of parameters
    is_rewritten: bool = False  # by its own module, in forward: split keeps the published bits too

    @property
    def bytes_half(self) -> int:
        """Bytes of it in a mode with 16-bit weights."""
        return 2 * self.numel if self.is_cast else self.bytes_fp32


def estimate_memory(
    model_or_num_params: nn.Module | float,
    *,
    precision: str = "bf16",
    master_weights: MasterWeightsMode = "params",
    optimizer: str = "adamw",
    accumulate_grad_batches: int = 1,
    strategy: Strategy = "auto",
    world_size: int = 1,
) -> MemoryEstimate:
    """Estimate the bytes per rank of weights, masters, gradients, optimizer state and buckets.

    Activations come on top and depend on batch and architecture: 16-bit compute halves those that
    matrix products save. With ``"params"``, autocast also keeps a 16-bit copy of each FP32 weight
    from its use in forward until backward has passed it, up to 2 bytes per parameter; the other modes
    make no such copy. Inside the optimizer step ``"split"`` adds FP32 memory for one bucket only. What
    FSDP gathers while it computes depends on the wrapping and is not counted.

    Args:
        model_or_num_params: A module on any device, meta included, or a number of parameters, all
            trainable then. A module also tells frozen, tied and norm parameters, which stay FP32.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"fp8"``, or Lightning's name for one.
        master_weights: As of ``MixedPrecision``.
        optimizer: ``"adamw"``, ``"adam"``, ``"sgd"``, ``"sgd-momentum"``, or ``"adamw8bit"`` (torchao).
        accumulate_grad_batches: Backwards per step. More than one means FP32 gradients.
        strategy: ``"auto"`` is DDP from two ranks on. FSDP divides everything by ``world_size``.
        world_size: Ranks.

    Returns:
        Bytes by component, frozen.

    Raises:
        SettingValueError: If a value is not allowed, or two exclude each other.
        SettingTypeError: If the first argument is neither a module nor a number.
        UnsupportedError: If the module has parameters that are not initialized yet.

    Example:
        >>> estimate_memory(7e9, master_weights="split").bytes_per_param
        14.0
        >>> estimate_memory(7e9, master_weights="split", accumulate_grad_batches=8).bytes_per_param
        16.0
    """
    precision = _ALIASES.get(str(precision), str(precision))
    _check_choices(precision, master_weights, optimizer, strategy)
    _check_counts(accumulate_grad_batches, world_size)
    _check_combination(precision, master_weights, strategy)
    if strategy == "auto":
        strategy = "ddp" if world_size > 1 else "auto"
    tensors = list(_tensors_of(model_or_num_params))
    trainable = [tensor for tensor in tensors if tensor.is_trainable]
    is_half = master_weights != "params"
    has_fp32_gradients = accumulate_grad_batches > 1 or precision == "fp16" or strategy == "ddp"
    shards = world_size if strategy in ("fsdp", "fsdp2") else 1
    estimate = MemoryEstimate(
        weights=sum(t.bytes_half if is_half else t.bytes_fp32 for t in tensors),
        masters=sum(_master_bytes(t, master_weights) for t in tensors if t.is_cast),
        gradients=sum(t.bytes_half if is_half and not has_fp32_gradients else t.bytes_fp32 for t in trainable),
        optimizer_state=sum(_state_bytes(t, optimizer, is_half=master_weights == "none") for t in trainable),
        fp8_weights=sum(_FP8_BYTES * t.numel for t in tensors if t.is_fp8) if precision == "fp8" else 0,
        communication=sum(t.bytes_half if is_half else t.bytes_fp32 for t in trainable) if strategy == "ddp" else 0,
        num_params=sum(t.numel for t in tensors),
    )
    return _divide(estimate, shards)


def format_estimate(estimate: MemoryEstimate) -> str:
    """Lay out an estimate as a table of component, size per rank and bytes per parameter.

    Example:
        >>> print(format_estimate(estimate_memory(1e9, master_weights="split", optimizer="sgd")))
        component             GiB  bytes/param
        weights              1.86         2.00
        masters              1.86         2.00
        gradients            1.86         2.00
        optimizer_state      0.00         0.00
        fp8_weights          0.00         0.00
        communication        0.00         0.00
        total                5.59         6.00
    """
    rows = [(name, getattr(estimate, name)) for name in (*_COMPONENTS, "total")]
    # Of a small model all sizes would be 0.00 GiB.
    unit, size = next(((u, s) for u, s in _UNITS if estimate.total >= s), _UNITS[-1])
    lines = [f"{'component':<16} {unit:>8} {'bytes/param':>12}"]
    for name, value in rows:
        share = value / estimate.num_params if estimate.num_params else 0.0
        lines.append(f"{name:<16} {value / size:>8.2f} {share:>12.2f}")
    return "\n".join(lines)


def _tensors_of(model_or_num_params: nn.Module | float) -> Iterator[_Tensor]:
    if isinstance(model_or_num_params, nn.Module):
        yield from _tensors_of_module(model_or_num_params)
        return
    if isinstance(model_or_num_params, bool) or not isinstance(model_or_num_params, (int, float)):
        raise SettingTypeError(
            f"model_or_num_params: found a {type(model_or_num_params).__name__}; pass an nn.Module or a number of "
            "parameters such as 7e9."
        )
    numel = int(model_or_num_params)
    if numel < 0:
        raise SettingValueError(f"model_or_num_params: found {model_or_num_params!r}; it must not be negative.")
    yield _Tensor(numel, 4 * numel, is_cast=True, is_trainable=True, is_fp8=True, is_whole=False)


def _tensors_of_module(module: nn.Module) -> Iterator[_Tensor]:
    """Describe each parameter once, however often it is tied."""
    norms = {id(p) for m in module.modules() if is_normalization(m) for p in m.parameters(recurse=False)}
    eligible = {id(weight) for weight in _fp8_weights(module)}
    tables = [m for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None]
    rewritten = {id(table.weight) for table in tables}
    for name, param in module.named_parameters():
        if is_lazy(param):
            raise UnsupportedError(
                f"estimate_memory: parameter {name!r} is not initialized yet, so its size is not known. Run one batch "
                "through the lazy modules first."
            )
        is_float = param.dtype in _CAST_DTYPES
        yield _Tensor(
            numel=param.numel(),
            bytes_fp32=4 * param.numel() if is_float else param.nbytes,
            is_cast=is_float and id(param) not in norms,
            is_trainable=param.requires_grad,
            is_fp8=id(param) in eligible,
            is_whole=True,
            is_rewritten=id(param) in rewritten,
        )


def _fp8_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights that FP8 converts by default: of eligible shape, without the output head."""
    linears = [child for child in module.modules() if type(child) is nn.Linear and not is_lazy(child.weight)]
    embeddings = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    tied = [linear for linear in linears if id(linear.weight) in embeddings]
    heads = tied or linears[-1:]
    for linear in linears:
        fits = linear.in_features % _FP8_MULTIPLE == 0 and linear.out_features % _FP8_MULTIPLE == 0
        if fits and linear not in heads:
            yield linear.weight  # type: ignore[misc]  # torch types it as a Tensor


def _master_bytes(tensor: _Tensor, master_weights: str) -> int:
    published = 2 if tensor.is_rewritten and master_weights == "split" else 0
    return (_MASTER_BYTES[master_weights] + published) * tensor.numel


def _state_bytes(tensor: _Tensor, optimizer: str, *, is_half: bool) -> int:
    num_states = _STATES_PER_PARAM[optimizer]
    is_8bit = optimizer == "adamw8bit"
    if is_8bit and not tensor.is_whole:
        return num_states * (tensor.numel + 4 * tensor.numel // _8BIT_BLOCK)
    if is_8bit and tensor.numel >= _8BIT_MIN_NUMEL and tensor.numel % _8BIT_BLOCK == 0:
        return num_states * (tensor.numel + 4 * tensor.numel // _8BIT_BLOCK + _8BIT_TABLE_BYTES)
    return num_states * (tensor.bytes_half if is_half else tensor.bytes_fp32)


def _divide(estimate: MemoryEstimate, shards: int) -> MemoryEstimate:
    # Rounded up: the last shard is padded.
    divided = {name: -(-getattr(estimate, name) // shards) for name in _COMPONENTS}
    return MemoryEstimate(**divided, num_params=estimate.num_params)


def _check_choices(precision: str, master_weights: str, optimizer: str, strategy: str) -> None:
    for setting, found, allowed in (
        ("precision", precision, _PRECISIONS),
        ("master_weights", master_weights, _MODES),
        ("optimizer", optimizer, tuple(_STATES_PER_PARAM)),
        ("strategy", strategy, _STRATEGIES),
    ):
        if found not in allowed:
            raise SettingValueError(f"{setting}: found {found!r}; allowed are {', '.join(map(repr, allowed))}.")


def _check_counts(accumulate_grad_batches: int, world_size: int) -> None:
    for setting, found in (("accumulate_grad_batches", accumulate_grad_batches), ("world_size", world_size)):
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise SettingValueError(f"{setting}: found {found!r}; it must be an integer of at least 1.")


def _check_combination(precision: str, master_weights: str, strategy: str) -> None:
    if master_weights != "params" and precision == "fp32":
        raise SettingValueError(
            f"master_weights={master_weights!r} is set beside precision='fp32', whose parameters are FP32 themselves. "
            "Use master_weights='params', or a 16-bit precision."
        )
    if master_weights == "split" and precision == "fp16":
        raise SettingValueError(
            "master_weights='split' is set beside precision='fp16'; FP32 is a BF16 value plus 16 further bits, but no "
            "FP16 value plus 16 bits. Use master_weights='copy', or precision='bf16'."
        )
    if master_weights != "params" and strategy in ("fsdp", "fsdp2"):
        raise SettingValueError(
            f"master_weights={master_weights!r} is not for strategy={strategy!r}: its FP32 shards are the master "
            "weights already. Use master_weights='params'."
        )
