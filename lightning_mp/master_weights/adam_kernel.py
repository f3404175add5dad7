"""One step of AdamW or Adam on FP32 masters of 16-bit weights, as a Triton kernel over many tensors.

Each element is read once and written once: 26 bytes with ``split`` and a 16-bit gradient, 30 with ``copy``.
The arithmetic is that of ``torch.optim.AdamW(fused=True)`` on CUDA: moments and weight decay in FP64,
rounded to FP32 where they are stored, bias corrections in FP64, the quotient in FP32. Every operation
rounds for itself (no contraction, IEEE division and square root), so the result does not depend on how
a variant is compiled: ``split`` and ``copy`` give the same bits.

Triton finds the names that a kernel uses among the globals of its file. They are set when
:func:`compiled_kernel` imports Triton, so that importing this file does not.
"""

# Triton compiles the kernels and reads annotations as its own.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, valid-type, name-defined"
# ruff: noqa: ANN001, ANN202, N803

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["BLOCK", "CHUNK", "NUM_SETTINGS", "ROW", "compiled_kernel"]

#: Elements per program and per iteration of one: 8 to a thread, so that a 16-bit access has 16 bytes.
CHUNK = 2**14
BLOCK = 2**10

#: Numbers in a row of the table: addresses of weight, further bits or master, gradient, first and second
#: moment and step count; elements; number of the group.
ROW = 8

#: FP64 numbers per group: lr, beta1, beta2, log(beta1), log(beta2), eps, weight decay, whether it is
#: decoupled, and -1 to maximize or else 1.
NUM_SETTINGS = 9

tl: Any = None


@cache
def compiled_kernel() -> Any:
    """Return the kernel to launch.

    Raises:
        ImportError: If Triton is not installed.
    """
    import triton
    import triton.language

    names = globals()
    names["tl"] = triton.language
    for name in ("_bf16_bits", "_bf16_bits_to_even", "_update"):
        names[name] = triton.jit(names[name])
    # Compiled for any value and alignment of these, so that what was tried before is what runs later.
    return triton.jit(_adam_step, do_not_specialize=["factor", "found_inf", "writes_grads"])


def _bf16_bits(value):
    # As in split.py: half a BF16 ulp is 0x8000 steps of the FP32 pattern. The sum carries some NaNs into
    # the sign, so that each becomes 0x7FC0.
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value != value, 0x7FC0, (bits + 0x8000) >> 16)


def _bf16_bits_to_even(value):
    # As torch casts: half a BF16 ulp less one, and one more where the upper half is odd.
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value != value, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


def _update(
    weights,
    extras,
    grads,
    firsts,
    seconds,
    left,
    beta1,
    beta2,
    eps,
    decay,
    coupled,
    sign,
    factor,
    step_size,
    correction,
    writes_grads,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.arange(0, BLOCK)
    mask = index < left if MASKED else None

    # All that is read, before anything is waited for.
    found = tl.load(weights + index, mask=mask).to(tl.int32)
    extra = tl.load(extras + index, mask=mask)
    raw = tl.load(grads + index, mask=mask)
    first = tl.load(firsts + index, mask=mask).to(tl.float64)
    second = tl.load(seconds + index, mask=mask).to(tl.float64)

    # The gradient, clipped in FP32.
    grad = raw.to(tl.float32)
    if GRAD == "bf16":
        grad = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    grad = grad * factor
    if writes_grads != 0:
        if GRAD == "bf16":
            tl.store(grads + index, _bf16_bits_to_even(grad).to(tl.int16), mask=mask)
        elif GRAD == "fp16":
            tl.store(grads + index, grad.to(tl.float16), mask=mask)
    grad = grad * sign

    # The FP32 value. An element of a copied weight that is not the published one was written from outside.
    if WEIGHT == "split":
        value = ((found << 16) + extra.to(tl.int32)).to(tl.float32, bitcast=True)
        # As `restore_written_` does: a NaN of two halves that do not belong together is a write from outside.
        value = tl.where(value != value, (found << 16).to(tl.float32, bitcast=True), value)
    else:
        if WEIGHT == "bf16":
            expected = _bf16_bits(extra)
            written = (found << 16).to(tl.float32, bitcast=True)
        else:
            expected = extra.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
            written = found.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        # The upper bits of a sign extension do not count.
        value = tl.where(((found ^ expected) & 0xFFFF) == 0, extra, written)

    # Without decay nothing is multiplied: an infinite weight stays one.
    if coupled != 0.0:
        grad = (grad.to(tl.float64) + value.to(tl.float64) * coupled).to(tl.float32)
    if decay != 0.0:
        value = (value.to(tl.float64) - value.to(tl.float64) * decay).to(tl.float32)

    grad64 = grad.to(tl.float64)
    first = (beta1 * first + (1.0 - beta1) * grad64).to(tl.float32)
    second = (beta2 * second + (1.0 - beta2) * grad64 * grad64).to(tl.float32)
    denominator = (tl.div_rn(tl.sqrt_rn(second), correction).to(tl.float64) + eps).to(tl.float32)
    value = value - tl.div_rn(step_size * first, denominator)

    tl.store(firsts + index, first, mask=mask)
    tl.store(seconds + index, second, mask=mask)
    if WEIGHT == "split":
        # Narrowing keeps the low 16 bits.
        tl.store(extras + index, value.to(tl.int32, bitcast=True).to(tl.int16), mask=mask)
        tl.store(weights + index, _bf16_bits(value).to(tl.int16), mask=mask)
    else:
        tl.store(extras + index, value, mask=mask)
        if WEIGHT == "bf16":
            tl.store(weights + index, _bf16_bits(value).to(tl.int16), mask=mask)
        else:
            tl.store(weights + index, value.to(tl.float16).to(tl.int16, bitcast=True), mask=mask)


def _adam_step(
    table,
    chunks,
    settings,
    factor,
    found_inf,
    writes_grads,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROW: tl.constexpr,
    NUM_SETTINGS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = table + tl.load(chunks + 2 * program) * ROW
    start = tl.load(chunks + 2 * program + 1) * CHUNK

    grad_type = tl.int16
    if GRAD == "fp16":
        grad_type = tl.float16
    if GRAD == "fp32":
        grad_type = tl.float32
    extra_type = tl.int16 if WEIGHT == "split" else tl.float32
    weights = tl.load(row).to(tl.pointer_type(tl.int16)) + start
    extras = tl.load(row + 1).to(tl.pointer_type(extra_type)) + start
    grads = tl.load(row + 2).to(tl.pointer_type(grad_type)) + start
    firsts = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + start
    seconds = tl.load(row + 4).to(tl.pointer_type(tl.float32)) + start
    if ALIGNED:
        weights = tl.multiple_of(weights, 16)
        extras = tl.multiple_of(extras, 16)
        grads = tl.multiple_of(grads, 16)
        firsts = tl.multiple_of(firsts, 16)
        seconds = tl.multiple_of(seconds, 16)
    step = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float32))).to(tl.float64)
    left = tl.load(row + 6) - start
    if tl.load(found_inf) != 0.0:
        left = left * 0

    group = settings + tl.load(row + 7) * NUM_SETTINGS
    lr = tl.load(group)
    beta1 = tl.load(group + 1)
    beta2 = tl.load(group + 2)
    step_size = (lr / (1.0 - tl.exp(step * tl.load(group + 3))).to(tl.float32).to(tl.float64)).to(tl.float32)
    correction = tl.sqrt(1.0 - tl.exp(step * tl.load(group + 4))).to(tl.float32)
    eps = tl.load(group + 5)
    weight_decay = tl.load(group + 6)
    decoupled = tl.load(group + 7)
    decay = lr * weight_decay * decoupled
    coupled = weight_decay * (1.0 - decoupled)
    sign = tl.load(group + 8).to(tl.float32)
    clip = tl.load(factor)

    if left >= CHUNK:
        for offset in range(0, CHUNK, BLOCK):
            _update(
                weights + offset,
                extras + offset,
                grads + offset,
                firsts + offset,
                seconds + offset,
                left,
                beta1,
                beta2,
                eps,
                decay,
                coupled,
                sign,
                clip,
                step_size,
                correction,
                writes_grads,
                WEIGHT=WEIGHT,
                GRAD=GRAD,
                MASKED=False,
                BLOCK=BLOCK,
            )
    else:
        count = tl.minimum(left, CHUNK).to(tl.int32)
        for rest in range(0, CHUNK, BLOCK):
            if rest < count:
                _update(
                    weights + rest,
                    extras + rest,
                    grads + rest,
                    firsts + rest,
                    seconds + rest,
                    count - rest,
                    beta1,
                    beta2,
                    eps,
                    decay,
                    coupled,
                    sign,
                    clip,
                    step_size,
                    correction,
                    writes_grads,
                    WEIGHT=WEIGHT,
                    GRAD=GRAD,
                    MASKED=True,
                    BLOCK=BLOCK,
                )
