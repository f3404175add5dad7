#!/usr/bin/env bash
# One call on a lent GPU machine, most valuable things first (see "A session with a GPU" in ../NOTES.md):
#   bash benchmarks/gpu/session.sh first|second SECONDS COMMIT
# Results go to $OUT, and to /tmp for a second call on the same machine. REHEARSE=1 tries it without a GPU.
set -u
part=$1 deadline=$((SECONDS + $2)) commit=$3
: "${OUT:?a folder for the results}"
report=$OUT/gpu.json kept=/tmp/lightning-mp-gpu.json
export PYTHONUNBUFFERED=1 TORCHAO_FORCE_SKIP_LOADING_SO_FILES=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
rehearse=${REHEARSE:+--rehearse --rounds 1 --steps 1 --warmup 1}
workers=$(python3 -c 'import xdist' 2>/dev/null && echo "-n 6 --dist worksteal")

left() { echo $((deadline - SECONDS > $1 ? deadline - SECONDS - $1 : 1)); } # seconds, but for the last $1
say() { echo; echo "=== $* ($((deadline - SECONDS)) s left)"; }
tests() { # NAME LIMIT ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  say "tests: $name"
  timeout "$limit" python3 -m pytest -q -rfE --tb=short "$@" >"$OUT/pytest-$name.log" 2>&1
  tail -n 25 "$OUT/pytest-$name.log" | cut -c1-300
}
bench() { # LIMIT ARGUMENTS...
  local limit=$1
  shift
  say "benchmarks: $*"
  # shellcheck disable=SC2086
  timeout "$limit" python3 -m benchmarks.gpu $rehearse --time-limit "$((limit > 25 ? limit - 20 : limit))" \
    --commit "$commit" --out "$report" "$@" 2>&1 | tee -a "$OUT/bench.log" | grep -v '^|'
  [ ! -e "$report" ] || cp "$report" "$kept"
}
te() { # Transformer Engine, built in the first call; and torchao
  [ -z "${REHEARSE:-}" ] || return 0
  . .te/setup_te.sh || return 1
  [ -d /tmp/site ] || python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl
  export PYTHONPATH=$PYTHONPATH:/tmp/site
}

for earlier in "$kept" .te/gpu.json; do # of this machine, or carried from one that is gone
  [ -e "$report" ] || [ ! -e "$earlier" ] || cp "$earlier" "$report"
done
case $part in
  first)
    te >"$OUT/te.log" 2>&1 & # compiles on the CPU cores while the tests that need no FP8 run
    building=$!
    # Alone in its process: a fault of the kernel would spoil whatever runs after it.
    tests kernel 100 -m gpu tests/master_weights/test_fused_adam.py
    # shellcheck disable=SC2086
    tests gpu 150 -m gpu $workers tests/integration/test_steps.py tests/grad_scaler tests/master_weights/test_engine.py \
      tests/test_numerics.py tests/test_hardware.py tests/test_overflow.py tests/pinning/test_functions.py \
      tests/integration/test_gpu.py
    wait $building || tail -n 5 "$OUT/te.log"
    bench 60 --only ceilings optimizer
    te >>"$OUT/te.log" 2>&1 && tests fp8 "$(left 0)" -m fp8 tests/fp8/test_transformer_engine.py \
      tests/test_hardware.py tests/integration/test_gpu.py
    ;;
  second)
    te >"$OUT/te.log" 2>&1 || tail -n 5 "$OUT/te.log"
    bench "$(left 60)" --only models --models llama-8b-blocks --batches full --layers 8 --steps 6 --contenders \
      "ours bf16 split" "Lightning 16-mixed" "ours fp16 copy" "ours fp8 current split" \
      "Transformer Engine loop, current" "ours bf16 params" "ours bf16 split, monitors"
    bench "$(left 25)" --only widths
    bench "$(left 0)" --only models --models gpt2-124m --batches full --contenders core --steps 6 --rounds 2
    ;;
esac
say "end of $part"
