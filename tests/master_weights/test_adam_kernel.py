"""The fused kernel as the compiler leaves it. What it computes is tested in ``test_fused_adam.py``."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lightning_mp.master_weights.adam_kernel import BLOCK, CHUNK, NUM_SETTINGS, ROW, compiled_kernel
kernel = compiled_kernel()
types = {"table": "*i64", "chunks": "*i64", "settings": "*fp64", "factor": "*fp32", "found_inf": "*fp32"}
for weights, grads in (("split", "bf16"), ("split", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")):
    for aligned in (True, False):
        fixed = {"WEIGHT": weights, "GRAD": grads, "ALIGNED": aligned, "ROW": ROW, "NUM_SETTINGS": NUM_SETTINGS,
                 "CHUNK": CHUNK, "BLOCK": BLOCK}
        types_of_all = {**types, "writes_grads": "i32", **dict.fromkeys(fixed, "constexpr")}
        compiled = triton.compile(ASTSource(kernel, types_of_all, constexprs=fixed), target=GPUTarget("cuda", 90, 32),
                                  options={"num_warps": 4, "enable_fp_fusion": False})
        assert compiled.asm["cubin"]
        ptx = compiled.asm["ptx"]
        # Every FP32 operation rounds for itself, keeps subnormals, and divides as IEEE says. (The exponential
        # of the bias correction looks at magnitudes with abs.ftz.)
        assert "fma.rn.f32" not in ptx and "div.full" not in ptx and "approx" not in ptx
        assert ".ftz" not in ptx.replace("abs.ftz", "")
        assert ("ld.global.v4.b32" in ptx) is aligned
        print("compiled", weights, grads, aligned)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="test_kernel_compiles_for_hopper_without_contracted_or_approximate_arithmetic: needs Triton, "
    "which is not installed",
)
def test_kernel_compiles_for_hopper_without_contracted_or_approximate_arithmetic(tmp_path: Path) -> None:
    # Needs no GPU. In a process of its own, because Triton decides once whether it interprets.
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == 8
