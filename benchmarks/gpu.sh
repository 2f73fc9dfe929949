#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under 8 minutes: the gpu tests, then speed on a random 1B model.
# Results go to $OUT (default: benchmarks/results). Packages that the machine lacks (pydantic and what it needs) come
# in through PYTHONPATH.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

python3 -m pytest -m gpu -p no:cacheprovider tests/gpu 2>&1 | tee "$OUT/gpu-tests.txt"
tests=${PIPESTATUS[0]}
for rows in 1024 8192; do
    timeout 150 python3 benchmarks/throughput.py --model llama-1b --row-tokens "$rows"
done | tee "$OUT/gpu-throughput.jsonl"
exit "$tests"
