#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under 10 minutes: the gpu tests, then the benchmarks on Llama-shaped
# models with random weights. Every part has its own time limit and writes its rows as it goes, so that what was
# measured before a limit is kept. Results go to $OUT (default: benchmarks/results). Packages that the machine lacks
# (pydantic and what it needs) come in through PYTHONPATH; without trl its peers are named and left out.
#
#   OUT=results benchmarks/gpu.sh
#   MODEL=tiny BIG=tiny MOST=4 ROW=128 POOL=8 STEP=32 DEVICE=cpu OUT=results benchmarks/gpu.sh    # does it all start?
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
MODEL=${MODEL:-llama-1b}
BIG=${BIG:-llama-8b}
DEVICE=${DEVICE:-cuda}
MOST=${MOST:-1024}
ROW=${ROW:-8192}
POOL=${POOL:-84}
STEP=${STEP:-512}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH="$PWD/src:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
failed=0

part() { # part SECONDS SCRIPT ARGUMENTS...
    local limit=$1 script=$2
    shift 2
    echo "== $script $*"
    timeout "$limit" "$PYTHON" "benchmarks/$script.py" --device "$DEVICE" --out "$OUT" "$@" || {
        echo "== $script ended with $? (124: its limit of $limit s)"
        failed=1
    }
}

timeout 80 "$PYTHON" -m pytest -m gpu -p no:cacheprovider tests/gpu 2>&1 | tee "$OUT/gpu-tests.txt"
tests=${PIPESTATUS[0]}

# 42 examples are 8,100 tokens on average; a row may be longer than that, so that no batch is cut in two
part 80 one_trial --model "$MODEL" --methods lora --batch-size 42 --loop-batch-size 8 --row-tokens 12288 --pool "$POOL"
part 60 fit --models "$MODEL"    # the memory that was expected, beside what was measured
if "$PYTHON" -c "import bitsandbytes" 2>/dev/null; then
    part 50 fit --models "$MODEL" --methods lora --quantization nf4
else
    echo "== no bitsandbytes: quantised bases are left out"
fi
part 120 many_trials --model "$MODEL" --parts speed --variants equal unequal mixed --trials 16 --step-tokens "$STEP" \
    --length 128 --row-tokens "$ROW" --solo-rows "$ROW" --rounds 2
part 70 many_trials --model "$MODEL" --parts slots --step-tokens 128 --length 64 --most-slots "$MOST"
part 50 many_trials --model "$BIG" --parts slots --step-tokens 128 --length 64 --most-slots "$MOST"
part 60 growth --model "$MODEL" --row "$ROW" --rows $((ROW / 8)) $((ROW / 4)) $((ROW / 2)) "$ROW" $((ROW * 2)) \
    --step-tokens "$STEP" --repeats 2
part 10 summary
exit $((tests || failed))
