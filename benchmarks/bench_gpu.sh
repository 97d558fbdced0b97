#!/usr/bin/env bash
# What `make bench-gpu` does: the tests that want a GPU, then the figures that docs/benchmarks.md has of one, as JSON
# under benchmarks/results/bench/ (or the folder that is named), under the name of the card. Under 8 minutes; nothing is
# read from the network. The order is that of what is wanted most.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/bench}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} PYTHONPATH=src HF_HUB_OFFLINE=1
card=$(python -c 'import re, torch; print(re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()))') || exit 1
mkdir -p "$out"
bench() { # name, seconds, arguments of `lora-rite bench`
  local name=$1 seconds=$2
  shift 2
  timeout "$seconds" python -m lora_rite bench "$@" --device cuda --out "$out/${name}_$card.json" || echo "!! $name"
}
failed=0
timeout 150 make test-gpu || failed=1
bench step_gemma-2b_triton 110 step --models gemma-2b --ranks 4 16 64 256 --dtypes float32 --rounds 20
bench step_gemma-2b_bfloat16 60 step --models gemma-2b --ranks 16 --dtypes bfloat16 --rounds 20
for shape in "8 1024 10" "4 512 20"; do
  read -r batch length steps <<<"$shape"
  timeout 75 python benchmarks/bench_loop.py --model gemma-2b --batch_size "$batch" --length "$length" --steps "$steps" \
    --device cuda --out "$out/loop_gemma-2b_${batch}x${length}_$card.json" || echo "!! loop $shape"
done
exit $failed
